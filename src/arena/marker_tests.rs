//! The state of a loss marker after the daemon's death, whether it was created at the start or has replaced a lost
//! file.

use std::path::PathBuf;

use super::*;
use crate::image_id::ImageId;
use crate::tenure::TenureId;

/// Lets `act` use an arena with a loss marker; returns whether the marker reports a loss to the next daemon.
fn reports_loss(test: &str, act: impl Fn(&Arena)) -> bool {
    let directory: PathBuf = std::env::temp_dir().join(format!("genblk-{test}-{}", std::process::id()));
    let identity = ImageId { device: 1, inode: 2, born_ns: 3 };
    let image = ImageFacts { identity, size_bytes: 1 << 20, path: "/image".into(), alias: String::new() };
    let id = TenureId { generation: 1, id: 2 };
    let tenure = TenureFacts { id, since: 0, is_recorded: false, is_over: false };
    let spec = ArenaSpec { frames: 4, reserved: 4, image: &image, tenure, guest: GuestState::FRESH };
    let file = ArenaFile::create_for(&directory, &image).unwrap();
    let CacheLocation::Path(path) = file.cache_location() else { panic!("the file has a path") };
    let arena = Arena::loss_marker(file, &spec).map_err(|e| e.error).unwrap();
    act(&arena);
    arena.keep_on_drop(true);
    drop(arena);
    let header = ArenaFile::open_existing(&path, AllowedOwner::Own).unwrap().header().unwrap().expect("a header");
    std::fs::remove_dir_all(directory).unwrap();
    header.guest.data == GuestData::Lost
}

#[test]
fn only_a_dirty_page_or_a_pending_zero_sets_the_loss_marker() {
    let page = |dirty| FrameRecord { page: PageNo(3), valid: SectorMask::ALL, dirty };
    assert!(!reports_loss("marker-clean", |arena| arena.publish(FrameId(0), page(SectorMask::NONE))));
    assert!(reports_loss("marker-dirty", |arena| arena.publish(FrameId(0), page(SectorMask::run(2, 1)))));
    assert!(reports_loss("marker-zero", |arena| arena.note_zero(0, Some(SectorSpan::new(8, 8)))));
}

#[test]
fn only_an_unreported_loss_keeps_the_marker_once_all_is_written() {
    let dirty = FrameRecord { page: PageNo(3), valid: SectorMask::ALL, dirty: SectorMask::ALL };
    assert!(!reports_loss("marker-written", |arena| {
        arena.publish(FrameId(0), dirty);
        arena.all_written();
    }));
    assert!(reports_loss("marker-lost", |arena| {
        arena.set_data_loss();
        arena.all_written();
    }));
    assert!(!reports_loss("marker-known", |arena| {
        arena.set_data_loss();
        arena.clear_data_loss();
    }));
}
