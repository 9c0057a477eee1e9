//! What earlier daemons left: their caches, in one file or in several, with the state of the guest in them.

use super::*;
use crate::arena::AllowedOwner;

impl World {
    /// The path of the cache.
    fn cache_path(&self) -> PathBuf {
        let mut files = fs::read_dir(ArenaFile::dir(&self.directory)).unwrap().flatten();
        files.next().unwrap().path()
    }

    /// Starts a daemon, changes its arena, and kills it.
    fn live(&self, change: impl FnOnce(&Arena)) {
        let image = self.open();
        let arena = arena_for(&self.config, &*image, [FRAMES; 2], &Arc::default()).unwrap();
        change(&arena);
        arena.keep_on_drop(true);
    }

    /// A later daemon did not find the cache of [`World::live_and_die`], made one of its own, and died. The image has
    /// the record of its tenure if `is_recorded` says so. Returns both caches.
    fn add_cache(&self, is_recorded: bool) -> [Arena; 2] {
        let image = self.open();
        let facts = search::facts_of(&*image);
        let first = ArenaFile::open_existing(&self.cache_path(), AllowedOwner::Own).unwrap();
        let header = first.header().unwrap().unwrap();
        let own = header.tenure.unwrap();
        let tenure = TenureFacts { id: TenureId::new(own.id.generation + 1).unwrap(), is_recorded, ..own };
        let spec = ArenaSpec { frames: FRAMES, reserved: FRAMES, image: &facts, tenure, guest: GuestState::FRESH };
        let file = ArenaFile::create_for(&self.directory, &facts).unwrap();
        let second = Arena::persistent(file, &spec).unwrap();
        if is_recorded {
            let LastTenure::Recorded(record) = image.last_tenure().unwrap() else { panic!("the image has a record") };
            image.write_record(&Record { tenure: tenure.id, cache: second.cache_location(), ..record }).unwrap();
        }
        second.record_token_now(image.change_token().unwrap());
        [Arena::attach(first, &header).unwrap(), second]
    }
}

/// What an earlier daemon of the guest recorded is kept, whichever of several files of the image has it.
#[test]
fn guest_state_is_merged_from_all_leftover_files() {
    // The first file, then the second one, has no pages.
    for markers in [[false, false], [true, false], [false, true], [true, true]] {
        for (in_second, is_recorded) in [(false, false), (false, true), (true, false), (true, true)] {
            let world = World::new();
            world.live_and_die(SectorMask::NONE, false);
            for (index, arena) in world.add_cache(is_recorded).into_iter().enumerate() {
                let has_state = (index == 1) == in_second;
                arena.set_write_through(has_state);
                arena.add_guest_formats(u64::from(has_state) << 3);
                let file = arena.into_file().unwrap();
                if markers[index] {
                    file.shrink_to_header().unwrap();
                }
            }
            let case = format!("markers {markers:?}, in the second file: {in_second}, recorded: {is_recorded}");
            world.live(|arena| assert!(arena.is_write_through() && arena.guest_formats() == 8, "{case}"));
        }
    }
}

#[test]
fn a_read_only_device_reports_the_loss_recorded_in_a_mismatched_cache() {
    let mut world = World::new();
    world.live_and_die(SectorMask::NONE, false);
    world.live(Arena::set_data_loss);
    world.image().write_all_at(&[7; 512], 20 * PAGE_BYTES).unwrap();
    world.config.read_only = true;
    world.live(|arena| assert!(arena.has_data_loss()));
}

#[test]
fn guest_state_moves_with_its_cache_to_another_directory() {
    for is_marker in [false, true] {
        let mut world = World::new();
        world.live_and_die(SectorMask::NONE, false);
        world.live(|arena| arena.set_write_through(true));
        if is_marker {
            ArenaFile::open_existing(&world.cache_path(), AllowedOwner::Own).unwrap().shrink_to_header().unwrap();
        }
        let other = world.directory.join("other");
        DirBuilder::new().mode(0o700).create(&other).unwrap();
        world.config.cache.memory_dir = MemoryDir::Path(other.clone());
        world.live(|arena| {
            assert!(arena.file().unwrap().is_in(&other));
            assert!(arena.is_write_through(), "a marker: {is_marker}");
        });
        assert_eq!(fs::read_dir(ArenaFile::dir(&world.directory)).unwrap().count(), 0, "the old file is removed");
    }
}

#[test]
fn every_new_cache_begins_a_later_tenure() {
    let world = World::new();
    let generation = |frames| {
        let image = world.open();
        let arena = arena_for(&world.config, &*image, [frames; 2], &Arc::default()).unwrap();
        arena.keep_on_drop(true);
        arena.tenure().unwrap().generation
    };
    // A cache of the same size continues its tenure.
    assert_eq!([FRAMES, FRAMES, 2 * FRAMES, 4 * FRAMES].map(generation), [1, 1, 2, 3]);
}

#[test]
fn the_record_on_the_image_shows_whether_its_tenure_has_ended() {
    let world = World::new();
    let image = world.open();
    let arena = arena_for(&world.config, &*image, [FRAMES; 2], &Arc::default()).unwrap();
    let state = || match image.last_tenure().unwrap() {
        LastTenure::Recorded(record) => record.state,
        last => panic!("{last:?}"),
    };
    assert_eq!(state(), TenureState::Open);
    assert!(image.end_tenure().unwrap());
    assert_eq!(state(), TenureState::Clean);
    drop(arena);
}

#[test]
fn only_a_death_during_a_change_quarantines_the_image() {
    for in_flight in [false, true] {
        let world = World::new();
        world.live_and_die(SectorMask::ALL, in_flight);
        let image = SyncedImage::new(world.open(), false);
        let arena = arena_for(&world.config, &image, [FRAMES; 2], &Arc::default()).unwrap();
        arena.keep_on_drop(true);
        assert_eq!(image.quarantines.load(Ordering::Relaxed), u32::from(in_flight));
    }
}

#[test]
fn a_new_cache_waits_for_the_earlier_writes_of_the_one_that_was_dropped() {
    for in_flight in [false, true] {
        let world = World::new();
        world.live_and_die(SectorMask::NONE, in_flight);
        let image = world.open();
        let LastTenure::Recorded(record) = image.last_tenure().unwrap() else { panic!("the image has a record") };
        let tenure = TenureId::new(record.tenure.generation + 1).unwrap();
        image.write_record(&Record { tenure, state: TenureState::Clean, ..record }).unwrap();
        drop(image);
        let image = SyncedImage::new(world.open(), false);
        arena_for(&world.config, &image, [FRAMES; 2], &Arc::default()).unwrap();
        assert_eq!(image.quarantines.load(Ordering::Relaxed), u32::from(in_flight));
    }
}

#[test]
fn a_tenure_counts_as_recorded_only_if_the_image_can_store_it() {
    let world = World::new();
    let is_recorded = |image: &dyn NamedImage| {
        let arena = arena_for(&world.config, image, [FRAMES; 2], &Arc::default()).unwrap();
        arena.keep_on_drop(true);
        arena.file().unwrap().header().unwrap().unwrap().tenure.unwrap().is_recorded
    };
    assert!(is_recorded(&*world.open()));
    assert!(!is_recorded(&SyncedImage::new(world.open(), false)));
}

#[test]
fn a_cache_file_with_a_second_hard_link_is_not_trusted() {
    let world = World::new();
    world.live_and_die(SectorMask::ALL, false);
    fs::hard_link(world.cache_path(), world.directory.join("second")).unwrap();
    let refused = world.start().unwrap_err().to_string();
    assert!(refused.contains("it has more than one hard link"), "{refused}");
}

#[test]
fn pages_past_the_old_end_of_a_grown_image_are_restored() {
    let world = World::new();
    world.live_and_die(SectorMask::NONE, true);
    let file = world.image();
    let modified = file.metadata().and_then(|metadata| metadata.modified()).unwrap();
    file.set_len(2 * IMAGE_PAGES * PAGE_BYTES).and_then(|()| file.set_modified(modified)).unwrap();
    let beyond = FrameRecord { page: PageNo(IMAGE_PAGES + 1), valid: SectorMask::ALL, dirty: SectorMask::ALL };
    world.live(|arena| arena.publish(FrameId(3), beyond));
    assert_eq!(world.start().unwrap(), (2, 1));
}

#[test]
fn a_reported_data_loss_is_not_reported_again() {
    let world = World::new();
    world.live(Arena::set_data_loss);
    world.live(|arena| {
        assert!(arena.has_data_loss());
        arena.clear_data_loss();
    });
    world.live(|arena| assert!(!arena.has_data_loss()));
}

/// The ledger of an older version may have sectors beyond the end in its last page.
#[test]
fn sectors_beyond_the_end_of_the_image_are_not_written() {
    let world = World::new();
    let cut_at = (IMAGE_PAGES - 1) * PAGE_BYTES + 3 * SECTOR_BYTES;
    world.image().set_len(cut_at).unwrap();
    let last = FrameRecord { page: PageNo(IMAGE_PAGES - 1), valid: SectorMask::ALL, dirty: SectorMask::ALL };
    world.live(|arena| arena.publish(FrameId(2), last));
    let image = world.open();
    // A cache of another size is written to the image.
    let arena = arena_for(&world.config, &*image, [2 * FRAMES; 2], &Arc::default()).unwrap();
    assert_eq!(arena.records().count(), 0);
    assert_eq!(world.image().metadata().unwrap().len(), cut_at);
}
