//! Decisions of a daemon about a cache and an image that changed between two daemons, with bugs planted in the proof.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use super::write_back::without_dirty;
use super::*;
use crate::config::Socket;
use crate::fault_injection::{PlantedBug, run_with};
use crate::store::file::{FileImage, KnownRaw, OpenOptions, PageBytes};
use crate::store::format::Format;
use crate::store::named::{BlockWriter, ImageKind};
use crate::store::{Backing, Limits, StoreQueue};
use crate::tenure::token::ChangeToken;
use crate::units::{
    FrameId, FrameRecord, PAGE_BYTES, PAGE_SIZE, PageNo, SECTOR_BYTES, SECTORS_PER_PAGE, SectorMask, SectorSpan,
};

mod leftovers;

const FRAMES: usize = 16;
const IMAGE_PAGES: u64 = 64;
const IMAGE_BYTES: usize = 64 * PAGE_SIZE;

/// An image in memory with a cache directory; removed with the value.
struct World {
    directory: PathBuf,
    config: DeviceConfig,
}

impl World {
    fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let directory = PathBuf::from(format!("/dev/shm/genblk-recover-{}-{number}", std::process::id()));
        DirBuilder::new().mode(0o700).create(&directory).unwrap();
        let image = directory.join("image");
        File::create(&image).and_then(|file| file.set_len(IMAGE_PAGES * PAGE_BYTES)).unwrap();
        let mut config = DeviceConfig::new("world", Socket::Path(PathBuf::new()), image);
        config.cache.survive = Survive::Always;
        config.cache.memory_dir = MemoryDir::Path(directory.clone());
        Self { directory, config }
    }

    fn image(&self) -> File {
        File::options().read(true).write(true).open(&self.config.image).unwrap()
    }

    fn open(&self) -> Arc<FileImage> {
        FileImage::open(&self.config.image, &OpenOptions { direct: false, ..OpenOptions::default() }).unwrap()
    }

    /// A daemon starts; returns the number of pages in its cache and the dirty ones among them.
    fn start(&self) -> Result<(usize, usize)> {
        let image = self.open();
        let arena = arena_for(&self.config, &*image, [FRAMES; 2], &Arc::default())?;
        arena.keep_on_drop(true);
        let dirty = arena.records().filter(|(_, record)| !record.dirty.is_empty()).count();
        Ok((arena.records().count(), dirty))
    }

    /// A daemon starts, gets pages that are zeros, and dies: page 0 is clean, page 1 is dirty if `dirty` says so. With
    /// `in_flight` it dies while it changes the image.
    fn live_and_die(&self, dirty: SectorMask, in_flight: bool) {
        let image = self.open();
        let arena = arena_for(&self.config, &*image, [FRAMES; 2], &Arc::default()).unwrap();
        arena.publish(FrameId(0), FrameRecord { page: PageNo(0), valid: SectorMask::ALL, dirty: SectorMask::NONE });
        if !dirty.is_empty() {
            arena.publish(FrameId(1), FrameRecord { page: PageNo(1), valid: SectorMask::ALL, dirty });
        }
        if in_flight {
            arena.begin_change(SectorSpan::new(8, 8));
        }
        arena.keep_on_drop(true);
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// Whether a dirty cache is used after `change`, with a bug planted or none.
fn is_used(bug: Option<PlantedBug>, in_flight: bool, change: impl Fn(&World)) -> bool {
    let world = World::new();
    world.live_and_die(SectorMask::ALL, in_flight);
    change(&world);
    run_with(bug, || world.start()).unwrap().is_ok_and(|(_, dirty)| dirty > 0)
}

#[test]
fn the_cache_of_an_unchanged_image_is_used() {
    for in_flight in [false, true] {
        assert!(is_used(None, in_flight, |_| {}));
    }
}

#[test]
fn the_tests_catch_a_check_that_skips_the_generation() {
    // Another host has held the image, and has set the image's times back.
    let overtake = |world: &World| {
        let image = world.open();
        let record = match image.last_tenure().unwrap() {
            LastTenure::Recorded(record) => record,
            last => panic!("{last:?}"),
        };
        let tenure = TenureId::new(record.tenure.generation + 1).unwrap();
        image.write_record(&Record { tenure, state: TenureState::Clean, ..record }).unwrap();
    };
    assert!(!is_used(None, false, overtake));
    assert!(is_used(Some(PlantedBug::GenerationNotCompared), false, overtake));
}

#[test]
fn a_copy_of_a_cache_is_not_used_after_its_tenure_has_ended() {
    for (is_recorded, is_used) in [(true, false), (false, true)] {
        let world = World::new();
        world.live_and_die(SectorMask::ALL, true);
        let image = world.open();
        if !is_recorded {
            // The record that the tenure goes on could not be written.
            let arena = arena_for(&world.config, &*image, [FRAMES; 2], &Arc::default()).unwrap();
            arena.set_recorded(false, false);
            arena.keep_on_drop(true);
        }
        let LastTenure::Recorded(record) = image.last_tenure().unwrap() else { panic!("the image has a record") };
        image.write_record(&Record { state: TenureState::Clean, ..record }).unwrap();
        drop(image);
        let (_, dirty) = world.start().unwrap();
        assert_eq!(dirty > 0, is_used, "recorded: {is_recorded}");
    }
}

#[test]
fn the_tests_catch_a_check_that_skips_the_change_token() {
    // No clean page of the cache covers the write.
    let write = |world: &World| world.image().write_all_at(&[7; 512], 20 * PAGE_BYTES).unwrap();
    assert!(!is_used(None, false, write));
    assert!(is_used(Some(PlantedBug::TokenNotCompared), false, write));
}

#[test]
fn the_tests_catch_a_check_that_skips_the_samples() {
    // The modification time could be one of the daemon's own writes.
    let write = |world: &World| {
        let file = world.image();
        let modified = file.metadata().and_then(|metadata| metadata.modified()).unwrap();
        file.write_all_at(&[7; 512], 0).unwrap();
        file.set_modified(modified).unwrap();
    };
    assert!(!is_used(None, true, write));
    assert!(is_used(Some(PlantedBug::SampleSkipped), true, write));
}

/// An image full of data whose daemon died while writing page 40: its cache holds only that page, dirty.
fn killed_without_clean_pages(in_flight: SectorSpan) -> World {
    let world = World::new();
    world.image().write_all_at(&[5; IMAGE_BYTES], 0).unwrap();
    let image = world.open();
    let arena = arena_for(&world.config, &*image, [FRAMES; 2], &Arc::default()).unwrap();
    let dirty = FrameRecord { page: PageNo(40), valid: SectorMask::ALL, dirty: SectorMask::ALL };
    arena.publish(FrameId(1), dirty);
    arena.begin_change(in_flight);
    arena.keep_on_drop(true);
    world
}

#[test]
fn samples_of_uncached_pages_reveal_a_backup_restored_after_a_kill() {
    let restore = |world: &World, bytes: u8| {
        let image = world.image();
        image.write_all_at(&[bytes; IMAGE_BYTES], 0).unwrap();
    };
    let in_flight = SectorSpan::new(40 * 8, 8);
    let world = killed_without_clean_pages(in_flight);
    restore(&world, 6);
    let refused = world.start().unwrap_err();
    assert!(refused.to_string().contains("of the image differs from the cache"), "{refused}");
    let used = run_with(Some(PlantedBug::SampleSkipped), || world.start()).unwrap();
    assert!(used.is_ok(), "without the comparison the restored image is overwritten");
    // A backup that is equal to the image loses nothing.
    let world = killed_without_clean_pages(in_flight);
    restore(&world, 5);
    assert_eq!(world.start().unwrap(), (1, 1));
}

/// The page that was written last differs; all others that could be compared are equal.
#[test]
fn the_last_written_page_reveals_an_older_copy_of_the_image() {
    for (has_last_write, is_planted) in [(true, false), (false, false), (false, true)] {
        let world = World::new();
        world.image().write_all_at(&[5; IMAGE_BYTES], 0).unwrap();
        let image = world.open();
        let arena = arena_for(&world.config, &*image, [FRAMES; 2], &Arc::default()).unwrap();
        let record = |page, dirty| FrameRecord { page: PageNo(page), valid: SectorMask::ALL, dirty };
        // Page 33 is in memory with other bytes than the image has, and is on its way there: no hash has it.
        arena.begin_change(SectorSpan::new(33 * 8, 8));
        arena.publish(FrameId(1), record(33, SectorMask::ALL));
        arena.record_witness(PageNo(33), FrameId(1));
        assert_eq!(arena.witnesses().len(), 1);
        arena.publish(FrameId(2), record(40, SectorMask::ALL));
        arena.begin_change(SectorSpan::new(40 * 8, 8));
        arena.keep_on_drop(true);
        drop((arena, image));
        if has_last_write {
            world.image().write_all_at(&[0; PAGE_SIZE], 33 * PAGE_BYTES).unwrap();
        }
        let bug = is_planted.then_some(PlantedBug::SampleSkipped);
        let started = run_with(bug, || world.start()).unwrap();
        assert_eq!(started.is_ok(), has_last_write || is_planted, "{started:?}");
    }
}

#[test]
fn the_ledger_keeps_the_last_two_unchanged_witnesses() {
    let world = World::new();
    let image = world.open();
    let arena = arena_for(&world.config, &*image, [FRAMES; 2], &Arc::default()).unwrap();
    let pages = |arena: &Arena| arena.witnesses().iter().map(|(page, _)| page.0).collect::<Vec<_>>();
    for page in [3, 4, 4, 3, 5] {
        arena.record_witness(PageNo(page), FrameId(0));
    }
    assert_eq!(pages(&arena), [5, 4]);
    let samples = arena.samples();
    arena.record_samples(&samples);
    assert_eq!(pages(&arena), [5, 4], "a new sample leaves them");
    arena.begin_change(SectorSpan::new(5 * 8 + 7, 1));
    assert_eq!(pages(&arena), [4]);
    arena.record_witness(PageNo(6), FrameId(0));
    assert_eq!(pages(&arena), [6, 4]);
    arena.begin_change(SectorSpan::new(5 * 8, 9));
    assert_eq!(pages(&arena), [4], "a change of its first sector");
    arena.keep_on_drop(true);
}

#[test]
fn a_write_in_flight_at_the_daemons_death_is_no_foreign_change() {
    let (page, write) = (SectorSpan::new(0, 8), [9; 512]);
    let world = killed_without_clean_pages(page);
    world.image().write_all_at(&write, 0).unwrap();
    assert_eq!(world.start().unwrap(), (1, 1));
    let world = run_with(Some(PlantedBug::SamplesKept), || killed_without_clean_pages(page)).unwrap();
    world.image().write_all_at(&write, 0).unwrap();
    assert!(world.start().is_err(), "a hash that is kept is found");
}

#[test]
fn a_clean_cache_of_a_changed_image_is_discarded() {
    let world = World::new();
    world.live_and_die(SectorMask::NONE, false);
    world.image().write_all_at(&[7; 512], 20 * PAGE_BYTES).unwrap();
    assert_eq!(world.start().unwrap(), (0, 0));
}

#[test]
fn a_changed_image_is_refused_even_without_its_record() {
    let strip = |world: &World| crate::sys::xattr::remove(&world.image(), crate::tenure::record::ATTRIBUTE).unwrap();
    assert!(is_used(None, false, strip));
    assert!(!is_used(None, false, |world| {
        strip(world);
        world.image().write_all_at(&[7; 512], 20 * PAGE_BYTES).unwrap();
    }));
}

/// An image whose syncs can fail, and that records what was read before the first successful one.
#[derive(Debug)]
struct SyncedImage {
    image: Arc<FileImage>,
    fails: bool,
    is_synced: AtomicBool,
    read_before: AtomicU32,
    /// How often it was told that an earlier daemon died while it was changing the image.
    quarantines: AtomicU32,
}

impl SyncedImage {
    fn new(image: Arc<FileImage>, fails: bool) -> Self {
        let (read_before, quarantines) = (AtomicU32::new(0), AtomicU32::new(0));
        Self { image, fails, is_synced: AtomicBool::new(false), read_before, quarantines }
    }
}

struct SyncOnly<'a>(&'a SyncedImage);

impl BlockWriter for SyncOnly<'_> {
    fn write_at(&mut self, _: &[u8], _: u64) -> io::Result<()> {
        unreachable!("nothing is written")
    }

    fn sync(&mut self) -> io::Result<()> {
        if self.0.fails {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        self.0.is_synced.store(true, Ordering::Relaxed);
        Ok(())
    }
}

impl Backing for SyncedImage {
    fn limits(&self) -> &Limits {
        self.image.limits()
    }

    fn attach(&self) -> Result<Box<dyn StoreQueue>> {
        self.image.attach()
    }
}

impl NamedImage for SyncedImage {
    fn path(&self) -> &Path {
        self.image.path()
    }

    fn canonical_path(&self) -> PathBuf {
        self.image.canonical_path()
    }

    fn identity(&self) -> ImageId {
        self.image.identity()
    }

    fn kind(&self) -> ImageKind {
        ImageKind::File
    }

    fn io_mode(&self) -> String {
        String::new()
    }

    fn found_format(&self) -> Option<Format> {
        None
    }

    fn check_format(&self, _: Option<KnownRaw>) -> Result<()> {
        Ok(())
    }

    fn found_token(&self) -> ChangeToken {
        self.image.found_token()
    }

    fn quarantine_earlier_writes(&self) {
        self.quarantines.fetch_add(1, Ordering::Relaxed);
    }

    fn read_page(&self, page: PageNo) -> io::Result<Box<PageBytes>> {
        self.read_before.fetch_add(u32::from(!self.is_synced.load(Ordering::Relaxed)), Ordering::Relaxed);
        self.image.read_page(page)
    }

    fn zero(&self, _: u64, _: u64) -> io::Result<()> {
        unreachable!("nothing is zeroed")
    }

    fn writer(&self) -> io::Result<Box<dyn BlockWriter + '_>> {
        Ok(Box::new(SyncOnly(self)))
    }
}

#[test]
fn a_possible_discard_of_the_last_daemon_is_synced_before_sampling() {
    for fails in [false, true] {
        let world = World::new();
        let image = world.open();
        let arena = arena_for(&world.config, &*image, [FRAMES; 2], &Arc::default()).unwrap();
        arena.publish(FrameId(0), FrameRecord { page: PageNo(0), valid: SectorMask::ALL, dirty: SectorMask::NONE });
        arena
            .publish(FrameId(1), FrameRecord { page: PageNo(1), valid: SectorMask::ALL, dirty: SectorMask::run(0, 1) });
        arena.record_samples(&[]);
        let synced = SyncedImage::new(image, fails);
        take_samples("world", &synced, &arena, true);
        assert_eq!(synced.read_before.load(Ordering::Relaxed), 0);
        assert_eq!(arena.samples().is_empty(), fails);
        // If the sync has lost a discard, a clean page may differ from the image.
        let clean = arena.records().filter(|(_, record)| record.valid != record.dirty).count();
        assert_eq!(clean, if fails { 0 } else { 2 });
        assert!(arena.records().any(|(_, record)| record.dirty == SectorMask::run(0, 1)));
    }
}

#[test]
fn recovery_succeeds_only_if_its_sync_does() {
    for fails in [false, true] {
        let world = World::new();
        world.live_and_die(SectorMask::NONE, false);
        let image = world.open();
        let arena = arena_for(&world.config, &*image, [FRAMES; 2], &Arc::default()).unwrap();
        arena.keep_on_drop(true);
        let synced = SyncedImage::new(image, fails);
        assert_eq!(write_back(&arena, &synced, &mut |_, _| {}).is_err(), fails);
        assert_eq!(synced.is_synced.load(Ordering::Relaxed), !fails);
    }
}

#[test]
fn recovery_does_not_zero_sectors_written_since() {
    let record = |page, first, count| FrameRecord {
        page: PageNo(page),
        valid: SectorMask::ALL,
        dirty: SectorMask::run(first, count),
    };
    let dirty = [(1, 0, 8), (2, 0, 2), (2, 4, 1), (4, 6, 2), (9, 0, 8)]
        .map(|(page, first, count)| (FrameId(0), record(page, first, count)));
    let pieces = without_dirty(SectorSpan::new(12, 26), &dirty);
    assert_eq!(pieces, [SectorSpan::new(18, 2), SectorSpan::new(21, 17)]);
    assert_eq!(without_dirty(SectorSpan::new(8, 8), &dirty), []);
    assert_eq!(without_dirty(SectorSpan::new(40, 8), &dirty), [SectorSpan::new(40, 8)]);
}

#[test]
fn an_image_does_not_shrink_below_a_pending_zero() {
    let world = World::new();
    let image = world.open();
    let arena = arena_for(&world.config, &*image, [FRAMES; 2], &Arc::default()).unwrap();
    arena.note_zero(0, Some(SectorSpan::new(60 * 8, 8)));
    let old = search::facts_of(&*image);
    let shrunk = |pages: u64| ImageFacts { size_bytes: pages * PAGE_BYTES, ..search::facts_of(&*image) };
    let beyond = arena.move_to(&old, &shrunk(60)).unwrap_err();
    assert_eq!((beyond.pages, beyond.ranges), (0, 1));
    assert!(arena.move_to(&old, &shrunk(61)).is_ok());
}

#[test]
fn a_cache_holds_no_data_past_the_old_end_of_a_grown_image() {
    let world = World::new();
    let cut_at = (IMAGE_PAGES - 1) * PAGE_BYTES + 3 * SECTOR_BYTES;
    world.image().set_len(cut_at).unwrap();
    world.live_and_die(SectorMask::ALL, false);
    let image = world.open();
    let arena = arena_for(&world.config, &*image, [FRAMES; 2], &Arc::default()).unwrap();
    let last = FrameRecord { page: PageNo(IMAGE_PAGES - 1), valid: SectorMask::ALL, dirty: SectorMask::NONE };
    arena.publish(FrameId(2), last);
    arena.keep_on_drop(true);
    drop((arena, image));
    world.image().write_all_at(&[7; 512], cut_at).unwrap();
    world.image().set_len(2 * IMAGE_PAGES * PAGE_BYTES).unwrap();
    assert_eq!(world.start().unwrap(), (3, 1));
    let image = world.open();
    let arena = arena_for(&world.config, &*image, [FRAMES; 2], &Arc::default()).unwrap();
    let (_, record) = arena.records().find(|(_, record)| record.page == last.page).unwrap();
    assert_eq!(record.valid, SectorMask::run(0, 3));
    arena.keep_on_drop(true);
}

#[test]
fn recovery_writes_only_the_dirty_sectors_of_a_page() {
    let world = World::new();
    world.image().write_all_at(&[7; PAGE_SIZE], PAGE_BYTES).unwrap();
    world.live_and_die(SectorMask::run(2, 3), false);
    let image = world.open();
    // A cache of another size is written to the image.
    let arena = arena_for(&world.config, &*image, [2 * FRAMES; 2], &Arc::default()).unwrap();
    assert_eq!(arena.records().count(), 0);
    let mut page = [0; PAGE_SIZE];
    world.image().read_exact_at(&mut page, PAGE_BYTES).unwrap();
    let sectors: Vec<u8> = page.chunks(512).map(|sector| sector[0]).collect();
    assert_eq!(sectors, [7, 7, 0, 0, 0, 7, 7, 7]);
}

/// The store has lost a discard: a page that was read since differs from the image.
#[test]
fn pages_of_a_discarded_range_are_not_compared() {
    for is_noted in [false, true] {
        let world = World::new();
        let image = world.open();
        let arena = arena_for(&world.config, &*image, [FRAMES; 2], &Arc::default()).unwrap();
        for (page, dirty) in [(0, SectorMask::NONE), (1, SectorMask::ALL)] {
            arena.publish(FrameId(page), FrameRecord { page: PageNo(page.into()), valid: SectorMask::ALL, dirty });
        }
        let discarded = SectorSpan::new(0, 8);
        arena.begin_change(discarded);
        if is_noted {
            arena.note_changed(3, Some(discarded));
        }
        arena.keep_on_drop(true);
        drop((arena, image));
        world.image().write_all_at(&[7; PAGE_SIZE], 0).unwrap();
        let started = world.start();
        assert_eq!(started.is_ok(), is_noted, "{started:?}");
        if is_noted {
            let image = world.open();
            let arena = arena_for(&world.config, &*image, [FRAMES; 2], &Arc::default()).unwrap();
            assert!(samples_of(&*image, &arena).iter().all(|(page, _)| *page != PageNo(0)), "it may change again");
            arena.keep_on_drop(true);
        }
    }
}

#[test]
fn a_second_cache_with_unwritten_data_is_refused_and_kept() {
    let world = World::new();
    world.live_and_die(SectorMask::ALL, false);
    let name = |serial| world.open().identity().file_name(IMAGE_PAGES * PAGE_BYTES, serial);
    let [first, second] = [0, 1].map(|serial| ArenaFile::dir(&world.directory).join(name(serial)));
    fs::copy(&first, &second).unwrap();
    let refusal = world.start().unwrap_err().to_string();
    assert!(refusal.contains("found two caches") && refusal.contains("the second holds 1 dirty page"), "{refusal}");
    assert!(first.exists() && second.exists());
}

#[test]
fn a_new_cache_is_of_a_later_generation_than_those_that_were_found() {
    let world = World::new();
    let image = world.open();
    let arena = arena_for(&world.config, &*image, [FRAMES; 2], &Arc::default()).unwrap();
    let found = arena.tenure().unwrap().generation;
    arena.publish(FrameId(0), FrameRecord { page: PageNo(0), valid: SectorMask::ALL, dirty: SectorMask::ALL });
    // The record of its tenure could not be written.
    arena.set_recorded(false, false);
    arena.keep_on_drop(true);
    drop(arena);
    let LastTenure::Recorded(record) = image.last_tenure().unwrap() else { panic!("the image has a record") };
    let earlier = TenureId::new(found - 1).unwrap();
    image.write_record(&Record { tenure: earlier, state: TenureState::Clean, ..record }).unwrap();
    let arena = arena_for(&world.config, &*image, [2 * FRAMES; 2], &Arc::default()).unwrap();
    assert_eq!(arena.tenure().unwrap().generation, found + 1);
}

/// The image carries a record of a tenure before the cache's own. If that once was recorded, an older copy of the image
/// was restored; if it never was, the record could not be written.
#[test]
fn an_image_that_lost_the_record_of_the_caches_tenure_is_an_older_copy() {
    let world = World::new();
    let image = world.open();
    let arena = arena_for(&world.config, &*image, [FRAMES; 2], &Arc::default()).unwrap();
    let LastTenure::Recorded(record) = image.last_tenure().unwrap() else { panic!("the image has a record") };
    let header = arena.file().unwrap().header().unwrap().unwrap();
    let own = header.tenure.unwrap();
    let judge = |step: i64, is_recorded| {
        let generation = own.id.generation.checked_add_signed(step).unwrap();
        let id = TenureId { generation, id: own.id.id ^ u128::from(step != 0) };
        let mut header = header.clone();
        header.tenure = Some(TenureFacts { id, is_recorded, ..own });
        proof::superseded(&header, Some(&record))
    };
    assert_eq!(judge(0, true), None);
    assert!(matches!(judge(1, true), Some(proof::Proof::Refuted(why)) if why.contains("an older copy was restored")));
    assert_eq!(judge(1, false), None);
    for is_recorded in [false, true] {
        assert!(matches!(judge(-1, is_recorded), Some(proof::Proof::Overtaken(_))));
    }
}

#[test]
fn all_clean_runs_of_a_sampled_page_are_compared() {
    const PAGE: u64 = 20;
    for sector in [0, 3, 5, 7] {
        let world = World::new();
        let image = world.open();
        let arena = arena_for(&world.config, &*image, [FRAMES; 2], &Arc::default()).unwrap();
        arena.publish(FrameId(0), FrameRecord { page: PageNo(PAGE), valid: SectorMask::ALL, dirty: SectorMask::NONE });
        // Zeros that may not be on the image yet.
        for (slot, at) in [1, 4, 6].into_iter().enumerate() {
            arena.note_zero(slot, Some(SectorSpan::new(PAGE * SECTORS_PER_PAGE + at, 1)));
        }
        arena.begin_change(SectorSpan::new(8, 8));
        arena.keep_on_drop(true);
        drop((arena, image));
        let file = world.image();
        let modified = file.metadata().and_then(|metadata| metadata.modified()).unwrap();
        file.write_all_at(&[7; 512], PAGE * PAGE_BYTES + sector * 512).unwrap();
        file.set_modified(modified).unwrap();
        assert!(world.start().is_err(), "sector {sector} has changed");
    }
}
