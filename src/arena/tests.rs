//! The size of an arena, and operations on parts of its frames.

use std::time::Duration;

use super::crash_tests::Directory;
use super::*;
use crate::image_id::ImageId;
use crate::tenure::TenureId;

#[test]
fn the_ledger_takes_at_most_0_2_percent_and_three_pages() {
    for mib in [4, 6, 256, 8192] {
        let frames = (mib << 20) / PAGE_SIZE;
        let identity = ImageId { device: 1, inode: 2, born_ns: 3 };
        let image = ImageFacts { identity, size_bytes: 1 << 30, path: "/image".into(), alias: String::new() };
        let id = TenureId { generation: 1, id: 2 };
        let tenure = TenureFacts { id, since: 0, is_recorded: false, is_over: false };
        let spec = ArenaSpec { frames, reserved: frames, image: &image, tenure, guest: GuestState::FRESH };
        let bytes = frames_at(&Header::new(&spec), frames);
        assert!(bytes <= frames * PAGE_SIZE / 500 + 3 * PAGE_SIZE, "{bytes} for {mib} MiB");
    }
}

#[test]
fn copies_and_zeroing_touch_only_the_sectors_of_the_mask() {
    let arena = Arena::anonymous(2).unwrap();
    let (a, b) = (FrameId(0), FrameId(1));
    // SAFETY: both frames belong to this test alone.
    unsafe {
        arena.frame(a).write_bytes(7, PAGE_SIZE);
        arena.frame(b).write_bytes(9, PAGE_SIZE);
    }
    arena.copy_sectors(a, b, SectorMask(0b0010_0110));
    arena.zero_sectors(b, SectorMask(0b1000_0000));
    let expected = [9, 7, 7, 9, 9, 7, 9, 0];
    for (sector, want) in expected.into_iter().enumerate() {
        for byte in 0..512 {
            // SAFETY: within the frame.
            assert_eq!(unsafe { *arena.frame(b).add(sector * 512 + byte) }, want);
        }
    }
}

#[test]
fn a_partial_last_page_has_only_its_first_sectors_within_the_image() {
    let within = |image_sectors| [0, 1, 2].map(|page| sectors_within(image_sectors, PageNo(page)).0);
    assert_eq!(within(1), [0b0000_0001, 0, 0]);
    assert_eq!(within(8), [0xff, 0, 0]);
    assert_eq!(within(13), [0xff, 0b0001_1111, 0]);
    assert_eq!(within(16), [0xff, 0xff, 0]);
    assert_eq!(within(23), [0xff, 0xff, 0b0111_1111]);
}

#[test]
fn a_file_that_was_removed_before_it_was_locked_is_not_used() {
    let dir = Directory::new(&[]);
    let CacheLocation::Path(path) = dir.file().cache_location() else { unreachable!("it has a path") };
    let open_and_remove = || {
        for _ in 0..2000 {
            let _ = File::options().create(true).append(true).open(&path);
            // It is empty, so the drop removes it.
            if let Ok(file) = ArenaFile::open_within(&path, AllowedOwner::Own, Duration::ZERO) {
                assert!(file.is_reachable());
            }
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(open_and_remove);
        open_and_remove();
    });
}

#[test]
fn an_arena_larger_than_memory_is_refused() {
    for frames in [1 << 40, usize::MAX / 2] {
        assert_eq!(Arena::anonymous(frames).unwrap_err().kind(), ErrorKind::Memory);
    }
}
