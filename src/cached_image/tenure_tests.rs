//! When a tenure counts as over: the image must not record that while the cache has data that the image lacks.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::{CachedImage, WorkerPort};
use crate::arena::{AllowedOwner, Arena, ArenaFile, ArenaSpec, GuestState, ImageFacts, TenureFacts};
use crate::cache::{Access, Admitted, CopyResult, ErrorPolicy, PageCache, PolicyKind, Settings};
use crate::counters::worker::Counters;
use crate::error::Result;
use crate::image_id::ImageId;
use crate::store::file::{FileImage, OpenOptions};
use crate::store::{Backing, Limits, StoreQueue};
use crate::sys::poll::wait_readable;
use crate::tenure::TenureId;
use crate::tenure::record::CacheLocation;
use crate::tenure::token::wall_clock_ns;
use crate::units::{FrameId, FrameRecord, ImageHoles, PageNo, SectorMask, SectorSpan, Unmap};

const FRAMES: u32 = 16;
pub(super) const IMAGE_SECTORS: u64 = 1024;

/// Counts how often a tenure ended.
#[derive(Debug, Default)]
struct Recorded(AtomicU32);

impl Backing for Recorded {
    fn limits(&self) -> &Limits {
        unreachable!("no caller needs them")
    }

    fn attach(&self) -> Result<Box<dyn StoreQueue>> {
        unreachable!("nothing is read")
    }

    fn end_tenure(&self) -> io::Result<bool> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(true)
    }
}

/// An image in a file that ends its tenure with success or an error. Notes what the ledger in a file says before.
#[derive(Debug)]
struct EndingImage {
    image: Arc<FileImage>,
    ledger: Option<PathBuf>,
    fails: bool,
    /// For each end: what the ledger said of the tenure.
    ends: Mutex<Vec<Option<TenureFacts>>>,
}

impl Backing for EndingImage {
    fn limits(&self) -> &Limits {
        self.image.limits()
    }

    fn attach(&self) -> Result<Box<dyn StoreQueue>> {
        self.image.attach()
    }

    fn end_tenure(&self) -> io::Result<bool> {
        self.ends.lock().unwrap().push(self.ledger.as_deref().and_then(tenure_in));
        if self.fails { Err(io::Error::from_raw_os_error(libc::ENOSPC)) } else { Ok(true) }
    }
}

/// The tenure in the header of a cache file.
fn tenure_in(path: &Path) -> Option<TenureFacts> {
    ArenaFile::peek(path, AllowedOwner::Own).unwrap().expect("it has a header").tenure
}

/// An image in `directory`, with the ledger of its cache.
fn ending_image(directory: &Path, ledger: Option<PathBuf>, fails: bool) -> Arc<EndingImage> {
    let path = directory.join("image");
    File::create(&path).and_then(|file| file.set_len(IMAGE_SECTORS * 512)).unwrap();
    let image = FileImage::open(&path, &OpenOptions { direct: false, ..OpenOptions::default() }).unwrap();
    Arc::new(EndingImage { image, ledger, fails, ends: Mutex::default() })
}

pub(super) fn settings() -> Settings {
    Settings {
        frames: FRAMES,
        frames_max: FRAMES,
        image_sectors: IMAGE_SECTORS,
        block_sectors: 1,
        holes: ImageHoles::Unmappable,
        cluster_pages_max: 64,
        retain: true,
        policy: PolicyKind::S3Fifo,
        readahead_pages_max: 0,
        flush_target_us: 250_000,
        dirty_pages_max: FRAMES,
        dirty_age_us: 1_000_000,
        allocate: false,
        unmap: true,
        on_error: ErrorPolicy::Report,
        on_full: ErrorPolicy::Report,
        page_key: 0,
        hold_us: 10_000,
    }
}

/// A new directory in a file system, and in it a new arena.
pub(super) fn arena_of(test: &str) -> (PathBuf, Arena) {
    let directory: PathBuf = std::env::temp_dir().join(format!("genblk-{test}-{}", std::process::id()));
    let identity = ImageId { device: 1, inode: 2, born_ns: 3 };
    let image = ImageFacts { identity, size_bytes: IMAGE_SECTORS * 512, path: "/image".into(), alias: String::new() };
    let id = TenureId { generation: 1, id: 2 };
    let tenure = TenureFacts { id, since: 0, is_recorded: true, is_over: false };
    let spec = ArenaSpec {
        frames: FRAMES as usize,
        reserved: FRAMES as usize,
        image: &image,
        tenure,
        guest: GuestState::FRESH,
    };
    let file = ArenaFile::create_for(&directory, &image).unwrap();
    let arena = Arena::persistent(file, &spec).map_err(|e| e.error).unwrap();
    (directory, arena)
}

/// Ends a cache prepared by `prepare`; returns how often the image recorded that the tenure is over.
fn ended_tenures(test: &str, prepare: impl Fn(&Arena)) -> u32 {
    let (directory, arena) = arena_of(test);
    prepare(&arena);
    let recorded = Arc::new(Recorded::default());
    let backing: Arc<dyn Backing> = recorded.clone();
    drop(CachedImage::new("test", backing, arena, settings()));
    std::fs::remove_dir_all(directory).unwrap();
    recorded.0.load(Ordering::Relaxed)
}

#[test]
fn a_tenure_ends_only_when_nothing_is_dirty_and_no_loss_is_unreported() {
    let page = |dirty| FrameRecord { page: PageNo(3), valid: SectorMask::ALL, dirty };
    let is_over = |test: &str, prepare: &dyn Fn(&Arena)| ended_tenures(test, prepare) == 1;
    assert!(is_over("tenure-clean", &|arena| arena.publish(FrameId(0), page(SectorMask::NONE))));
    assert!(!is_over("tenure-dirty", &|arena| arena.publish(FrameId(0), page(SectorMask::run(2, 1)))));
    assert!(!is_over("tenure-zeroes", &|arena| arena.note_zero(0, Some(SectorSpan::new(8, 8)))));
    assert!(!is_over("tenure-lost", &Arena::set_data_loss));
}

/// If the daemon dies in between, or the image cannot record the end, the cache must not look like one that can be
/// removed: the next daemon would report it as missing.
#[test]
fn the_ledger_ends_a_tenure_only_after_the_image_has_recorded_the_end() {
    for fails in [false, true] {
        let (directory, arena) = arena_of("tenure-order");
        let CacheLocation::Path(ledger) = arena.cache_location() else { panic!("it is in a file") };
        arena.keep_on_drop(true);
        let image = ending_image(&directory, Some(ledger.clone()), fails);
        drop(CachedImage::new("test", image.clone(), arena, settings()));
        let ends = image.ends.lock().unwrap().clone();
        assert!(matches!(ends[..], [Some(TenureFacts { is_recorded: true, is_over: false, .. })]), "{ends:?}");
        assert_eq!(tenure_in(&ledger).unwrap().is_over, !fails);
        std::fs::remove_dir_all(directory).unwrap();
    }
}

#[test]
fn the_tenure_of_an_anonymous_cache_ends_only_when_all_is_durable_and_no_loss_is_unreported() {
    for (is_flushed, is_lost) in [(false, false), (true, false), (true, true)] {
        let directory = std::env::temp_dir().join(format!("genblk-tenure-anonymous-{}", std::process::id()));
        std::fs::create_dir(&directory).unwrap();
        let image = ending_image(&directory, None, false);
        let arena = Arena::anonymous(FRAMES as usize).unwrap();
        if is_lost {
            arena.set_data_loss();
        }
        let cached = CachedImage::new("test", image.clone(), arena, settings());
        let mut port = cached.port("test", Counters::new(1).unwrap().of_worker(0)).unwrap();
        if is_flushed {
            let ticket = port.ticket(1);
            port.with_cache(cached.now(), |cache, _| cache.flush(ticket));
            port.end_turn(cached.now(), |_| {});
            while cached.has_unstable_data() {
                assert!(wait_readable(port.store_fd(), Duration::from_secs(30)), "the Sync completes");
                port.set_store_ready();
                port.reap(false);
                port.with_cache(cached.now(), |_, notices| notices.clear());
                port.end_turn(cached.now(), |_| {});
            }
        }
        drop(port);
        drop(cached);
        let expected = usize::from(is_flushed && !is_lost);
        assert_eq!(image.ends.lock().unwrap().len(), expected, "flushed {is_flushed}, lost {is_lost}");
        std::fs::remove_dir_all(directory).unwrap();
    }
}

#[test]
fn the_start_of_a_change_records_a_heartbeat() {
    let (directory, arena) = arena_of("heartbeat");
    let last_seen = || arena.file().expect("it is persistent").header().unwrap().expect("it has a header").last_seen;
    assert_eq!(last_seen().heartbeat_ns, 0);
    let before = wall_clock_ns();
    arena.begin_change(SectorSpan::new(0, 8));
    assert!((before..=wall_clock_ns()).contains(&last_seen().heartbeat_ns), "{:?}", last_seen());
    std::fs::remove_dir_all(directory).unwrap();
}

#[test]
fn an_older_change_token_does_not_replace_a_newer_one() {
    let (directory, arena) = arena_of("tokens");
    let image = ending_image(&directory, None, false);
    let token = image.image.change_token().unwrap();
    let change = || {
        arena.begin_change(SectorSpan::new(0, 8));
        arena.idle_point().expect("the last token is older")
    };
    let (earlier, newer) = (change(), change());
    let is_at_rest = || arena.file().unwrap().header().unwrap().unwrap().last_seen.is_at_rest;
    arena.record_token(newer, token);
    assert!(is_at_rest());
    arena.record_token(earlier, token);
    assert!(is_at_rest());
    std::fs::remove_dir_all(directory).unwrap();
}

#[test]
fn attaching_a_clean_cache_keeps_its_file() {
    let (directory, arena) = arena_of("attached");
    arena.publish(FrameId(0), FrameRecord { page: PageNo(3), valid: SectorMask::ALL, dirty: SectorMask::NONE });
    arena.keep_on_drop(true);
    drop(arena);
    let file_in =
        |directory: &PathBuf| std::fs::read_dir(directory).unwrap().flatten().next().map(|entry| entry.path());
    let path = file_in(&file_in(&directory).expect("a directory of genblk")).expect("the cache stays");
    let file = ArenaFile::open_existing(&path, AllowedOwner::Own).unwrap();
    let header = file.header().unwrap().expect("it has a header");
    drop(Arena::attach(file, &header).unwrap());
    assert!(path.exists(), "a daemon that fails to start leaves the cache to the next one");
    std::fs::remove_dir_all(directory).unwrap();
}

#[test]
fn the_ledger_records_each_change_of_the_image_for_its_whole_duration() {
    let (directory, arena) = arena_of("changes");
    let path = directory.join("image");
    File::create(&path).and_then(|file| file.set_len(IMAGE_SECTORS * 512)).unwrap();
    let image = FileImage::open(&path, &OpenOptions { direct: false, ..OpenOptions::default() }).unwrap();
    let token = image.change_token().unwrap();
    let cached = CachedImage::new("test", image, arena, settings());
    let mut port = cached.port("test", Counters::new(1).unwrap().of_worker(0)).unwrap();
    let arena = cached.arena();
    let last_seen = || arena.file().expect("it is persistent").header().unwrap().expect("it has a header").last_seen;
    arena.record_token_now(token);
    let ticket = port.ticket(1);
    let span = SectorSpan::new(0, 64);
    let discard = |cache: &mut PageCache| assert!(cache.discard(ticket, span));
    let zero = |cache: &mut PageCache| assert!(cache.zero(ticket, span, Unmap::Allowed));
    for change in [&discard as &dyn Fn(&mut PageCache), &zero] {
        assert!(last_seen().is_at_rest);
        port.with_cache(cached.now(), |cache, _| change(cache));
        port.end_turn(cached.now(), |_| {});
        port.with_cache(cached.now(), |_, _| {});
        assert!(!last_seen().is_at_rest, "it is in flight");
        let before_end = wall_clock_ns();
        while !last_seen().is_at_rest {
            assert!(wait_readable(port.store_fd(), Duration::from_secs(30)), "the operation completes");
            port.set_store_ready();
            port.reap(false);
            port.with_cache(cached.now(), |_, notices| notices.clear());
        }
        assert!(last_seen().heartbeat_ns >= before_end);
    }
    drop(port);
    drop(cached);
    std::fs::remove_dir_all(directory).unwrap();
}

#[test]
fn a_sync_records_the_last_written_page_as_a_witness() {
    let (directory, arena) = arena_of("witness");
    let path = directory.join("image");
    File::create(&path).and_then(|file| file.set_len(IMAGE_SECTORS * 512)).unwrap();
    let image = FileImage::open(&path, &OpenOptions { direct: false, ..OpenOptions::default() }).unwrap();
    let cached = CachedImage::new("test", image, arena, settings());
    let mut port = cached.port("test", Counters::new(1).unwrap().of_worker(0)).unwrap();
    let witnesses = || cached.arena().witnesses().into_iter().map(|(page, _)| page.0).collect::<Vec<_>>();
    // A page, a part of one, and a page that is not flushed.
    for (number, span, is_flushed, expected) in [
        (1, SectorSpan::new(24, 8), true, vec![3]),
        (2, SectorSpan::new(40, 2), true, vec![3]),
        (3, SectorSpan::new(48, 8), false, vec![3]),
    ] {
        let ticket = port.ticket(number);
        let mut pieces = Vec::new();
        port.with_cache(cached.now(), |cache, _| {
            assert_eq!(cache.write(Access::new(ticket, span), &mut pieces), Admitted::All);
            pieces.iter().for_each(|piece| cache.finish_write(piece, CopyResult::Complete));
            if is_flushed {
                cache.flush(ticket);
            }
        });
        port.end_turn(cached.now(), |_| {});
        if is_flushed {
            await_flush(&mut port, &cached);
        }
        assert_eq!(witnesses(), expected, "write {number}");
    }
    drop(port);
    drop(cached);
    std::fs::remove_dir_all(directory).unwrap();
}

/// Takes turns until the one flush in progress completes.
fn await_flush(port: &mut WorkerPort, cached: &CachedImage) {
    let deadline = Instant::now() + Duration::from_secs(30);
    let mut is_done = false;
    while !is_done {
        assert!(Instant::now() < deadline, "the flush completes");
        // The notice of the flush may have come with the last turn.
        wait_readable(port.store_fd(), Duration::from_millis(1));
        port.set_store_ready();
        port.reap(false);
        port.with_cache(cached.now(), |_, notices| is_done = !std::mem::take(notices).is_empty());
        port.end_turn(cached.now(), |_| {});
    }
}

#[test]
fn a_discard_recorded_by_the_last_daemon_stays_recorded_until_a_sync() {
    let (directory, arena) = arena_of("noted");
    let image = ending_image(&directory, None, false);
    let discarded = SectorSpan::new(8, 16);
    arena.note_changed(5, Some(discarded));
    let cached = CachedImage::new("test", image, arena, settings());
    let mut port = cached.port("test", Counters::new(1).unwrap().of_worker(0)).unwrap();
    let noted = || cached.arena().changed_ranges().map(|(_, span)| span).collect::<Vec<_>>();
    assert_eq!(noted(), [discarded]);
    let ticket = port.ticket(1);
    port.with_cache(cached.now(), |cache, _| cache.flush(ticket));
    port.end_turn(cached.now(), |_| {});
    await_flush(&mut port, &cached);
    assert_eq!(noted(), []);
    drop(port);
    drop(cached);
    std::fs::remove_dir_all(directory).unwrap();
}
