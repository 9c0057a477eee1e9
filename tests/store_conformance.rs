//! The contract of a store (`store/mod.rs`), tested on every engine with every kind of image that this machine has: a
//! regular file with and without direct I/O, tmpfs, loop devices with small and large blocks.

mod store_kit;

use std::sync::Arc;
use std::time::{Duration, Instant};

use genblk::arena::Arena;
use genblk::store::file::{FileImage, IoEngine, OpenOptions};
use genblk::store::{Backing, Event, Refused, Segment};
use genblk::units::{ExtentKind, Fault, FrameId, ImageHoles, OpKind, SectorMask, Unmap};
use store_kit::{Buffer, Driver, Image, MIB, pattern, readable, settings};

/// Runs `case` on every combination of engine and image.
fn on_each(name: &str, size: u64, case: impl Fn(&Arc<dyn Backing>)) {
    let all = settings(name, size);
    assert!(all.len() >= 5, "two engines, direct and buffered, and the faulty image: only {} settings", all.len());
    for setting in all {
        println!("{name}: {}", setting.label);
        case(&setting.backing);
    }
}

fn all_done<'a>(events: impl IntoIterator<Item = &'a Event>) -> bool {
    events.into_iter().all(|event| matches!(event, Event::Done { .. }))
}

#[test]
fn an_idle_queue_has_no_events_and_no_readable_wake_fd() {
    on_each("idle", MIB, |backing| {
        let mut driver = Driver::new(backing);
        let mut events = Vec::new();
        driver.queue.reap(&mut events);
        driver.queue.kick();
        driver.queue.reap(&mut events);
        assert!(events.is_empty());
        assert_eq!(driver.queue.in_flight(), 0);
        assert!(!readable(driver.queue.wake_fd(), 0));
    });
}

#[test]
fn written_data_reads_back_through_segments_cut_elsewhere() {
    const PIECE: usize = 12 * 1024;
    on_each("cut", 2 * MIB, |backing| {
        let mut driver = Driver::new(backing);
        let want = pattern(64 * PIECE, 1);
        let mut buffers: Vec<Buffer> = want.chunks(PIECE).map(Buffer::copy_of).collect();
        // The middle segment is the shortest that the image takes.
        let middle = usize::try_from(backing.limits().memory_align.max(512)).unwrap();
        for (number, buffer) in buffers.iter_mut().enumerate() {
            let cuts = [(0, 4096), (4096, middle), (4096 + middle, PIECE - 4096 - middle)];
            let segments = cuts.into_iter().filter(|c| c.1 > 0).map(|(at, len)| buffer.segment(at, len)).collect();
            driver.start(OpKind::Write, (number * PIECE) as u64, PIECE as u64, segments);
        }
        let events = driver.finish();
        assert_eq!(events.len(), 64);
        assert!(all_done(events.values()), "{events:?}");
        driver.run(OpKind::Sync, 0, 0, Vec::new());

        // 96 reads of 8 KiB, each into two halves that memory holds in the reverse order.
        let mut halves: Vec<Buffer> = (0..96).map(|_| Buffer::filled(8192, 0xee)).collect();
        for (number, buffer) in halves.iter_mut().enumerate() {
            let segments = vec![buffer.segment(4096, 4096), buffer.segment(0, 4096)];
            driver.start(OpKind::Read, number as u64 * 8192, 8192, segments);
        }
        let events = driver.finish();
        assert!(events.len() == 96 && all_done(events.values()), "{events:?}");
        for (number, buffer) in halves.iter().enumerate() {
            let (low, high) = buffer.bytes().split_at(4096);
            assert!(high == &want[number * 8192..][..4096], "read {number}, first half");
            assert!(low == &want[number * 8192 + 4096..][..4096], "read {number}, second half");
        }
    });
}

#[test]
fn opening_a_sparse_file_finds_its_first_data_runs() {
    let directory = std::env::temp_dir().join(format!("genblk-runs-{}", std::process::id()));
    let file = std::fs::File::create(&directory).unwrap();
    file.set_len(8 * MIB).unwrap();
    for (offset, len) in [(0, 64 * 1024), (MIB, 128 * 1024), (8 * MIB - 65536, 65536)] {
        std::os::unix::fs::FileExt::write_all_at(&file, &vec![1; len], offset).unwrap();
    }
    let image = FileImage::open(&directory, &OpenOptions::default()).unwrap();
    let runs = image.data_runs();
    std::fs::remove_file(&directory).unwrap();
    // A file system that cannot find holes reports one run.
    if image.limits().holes == ImageHoles::Possible {
        assert_eq!(runs, [0..65536, MIB..MIB + 131_072, 8 * MIB - 65536..8 * MIB]);
    }
}

/// A store may pin memory that it got a hint of. Segments inside it, outside it and across its end must all work.
#[test]
fn transfers_work_across_the_ends_of_hinted_memory() {
    const PAGE: usize = 4096;
    const PAGES: usize = 64;
    on_each("hinted", MIB, |backing| {
        let mut driver = Driver::new(backing);
        let mut memory = Buffer::copy_of(&pattern(PAGES * PAGE, 3));
        let want = memory.bytes().to_vec();
        let first = memory.segment(0, 0).base.addr();
        driver.queue.hint_memory(first..first + PAGES / 2 * PAGE);
        // One transfer a page, then one transfer with one segment, then one with the pages in reverse order.
        let one_by_one: Vec<Vec<_>> = (0..PAGES).map(|n| vec![memory.segment(n * PAGE, PAGE)]).collect();
        let whole = vec![vec![memory.segment(0, PAGES * PAGE)]];
        let backwards = vec![(0..PAGES).rev().map(|n| memory.segment(n * PAGE, PAGE)).collect()];
        for (transfers, reversed) in [(one_by_one, false), (whole, false), (backwards, true)] {
            let mut offset = 0;
            for segments in transfers.clone() {
                let len = segments.iter().map(|segment: &Segment| segment.len as u64).sum();
                driver.start(OpKind::Write, offset, len, segments);
                offset += len;
            }
            assert!(all_done(driver.finish().values()));
            let found = driver.read(0, PAGES * PAGE);
            let pages: Vec<&[u8]> = found.chunks_exact(PAGE).collect();
            let found: Vec<u8> = if reversed { pages.into_iter().rev().flatten().copied().collect() } else { found };
            assert!(found == want, "the image holds what was written");
            memory.fill(0xee);
            let mut offset = 0;
            for segments in transfers {
                let len = segments.iter().map(|segment| segment.len as u64).sum();
                driver.start(OpKind::Read, offset, len, segments);
                offset += len;
            }
            assert!(all_done(driver.finish().values()));
            assert!(memory.bytes() == want, "the memory holds what was read");
        }
    });
}

/// A cache that shrinks gives memory back to the host, and gets other memory when it grows again. What a store has
/// pinned of it must not be used any more.
#[test]
fn reallocated_memory_transfers_its_new_contents() {
    const FRAMES: usize = 64;
    on_each("anew", MIB, |backing| {
        let arena = Arena::anonymous(FRAMES).expect("256 KiB");
        let mut driver = Driver::new(backing);
        let want = pattern(4096, 5);
        driver.run(OpKind::Write, 0, 4096, vec![Buffer::copy_of(&want).segment(0, 4096)]);
        driver.queue.hint_memory(arena.addresses());
        for frames in [FRAMES, FRAMES / 2, FRAMES] {
            arena.reserve(frames).expect("the host has memory");
            arena.set_frames_in_use(frames);
            driver.queue.limit_memory(arena.addresses_in_use().end);
            while arena.free_unused().expect("memory can be freed") {}
            for index in [0, frames / 2, frames - 1] {
                let frame = FrameId(u32::try_from(index).expect("few"));
                arena.zero_sectors(frame, SectorMask::ALL);
                driver.run(OpKind::Read, 0, 4096, vec![Segment { base: arena.frame(frame), len: 4096 }]);
                assert!(arena.sectors(frame, 0, 8) == want, "{frame:?} of {frames}");
            }
        }
    });
}

#[test]
fn a_polling_worker_finds_every_event() {
    on_each("polls", 8 * MIB, |backing| {
        let mut driver = Driver::new(backing);
        let mut buffer = Buffer::filled(8 * 4096, 7);
        for (op, count) in [(OpKind::Write, 8), (OpKind::Read, 8), (OpKind::Sync, 1), (OpKind::Map, 1)] {
            for n in 0..count {
                match op {
                    OpKind::Sync => driver.start(op, 0, 0, Vec::new()),
                    OpKind::Map => driver.start(op, 0, MIB, Vec::new()),
                    _ => driver.start(op, n as u64 * 4096, 4096, vec![buffer.segment(n * 4096, 4096)]),
                };
            }
            driver.queue.kick();
            let (mut events, deadline) = (Vec::new(), Instant::now() + Duration::from_secs(30));
            while events.len() < count {
                assert!(Instant::now() < deadline, "{op:?}: {} of {count} events", events.len());
                if driver.queue.may_have_events() {
                    driver.queue.reap(&mut events);
                }
            }
            assert!(!driver.queue.may_have_events(), "{op:?}: no event is left");
        }
    });
}

#[test]
fn the_largest_transfer_with_the_most_segments_succeeds() {
    on_each("largest", 8 * MIB, |backing| {
        let limits = backing.limits();
        let len = usize::try_from(limits.io_max_bytes).unwrap();
        let want = pattern(len, 4);
        let mut buffer = Buffer::copy_of(&want);
        let mut driver = Driver::new(backing);
        // As many segments of a page as the limits allow; the last one holds the rest.
        let most = usize::from(limits.segments_max).min(len / 4096);
        let mut pages: Vec<_> = (0..most - 1).map(|n| buffer.segment(n * 4096, 4096)).collect();
        pages.push(buffer.segment((most - 1) * 4096, len - (most - 1) * 4096));
        driver.run(OpKind::Write, 4096, len as u64, pages);
        assert!(driver.read(4096, len) == want);
        let (block, segments) = (limits.block_bytes as usize, usize::from(limits.segments_max) + 1);
        let one_too_many = (0..segments).map(|_| buffer.segment(0, block)).collect();
        let one_too_long = vec![buffer.segment(0, len), buffer.segment(0, 4096)];
        for (len, segments) in [(segments * block, one_too_many), (len + 4096, one_too_long)] {
            let request = driver.request(OpKind::Write, 0, len as u64, segments);
            assert!(matches!(driver.queue.submit(request), Err(Refused::Invalid(_))));
        }
    });
}

#[test]
fn an_inadmissible_request_is_rejected_as_invalid() {
    on_each("invalid", MIB, |backing| {
        let mut driver = Driver::new(backing);
        let mut buffer = Buffer::filled(8192, 0);
        let mut one = |len| vec![buffer.segment(0, len)];
        let mut bad = vec![
            (OpKind::Read, MIB, 4096, one(4096)),
            (OpKind::Write, MIB - 4096, 8192, one(8192)),
            (OpKind::Read, u64::MAX - 4095, 4096, one(4096)),
            (OpKind::Zero { unmap: Unmap::Allowed }, u64::MAX - 511, 1024, Vec::new()),
            (OpKind::Discard, 512, u64::MAX - 511, Vec::new()),
            (OpKind::Map, 1, u64::MAX, Vec::new()),
            (OpKind::Allocate, MIB, 512, Vec::new()),
            (OpKind::Read, 100, 4096, one(4096)),
            (OpKind::Write, 0, 100, one(100)),
            (OpKind::Zero { unmap: Unmap::Forbidden }, 0, 100, Vec::new()),
            (OpKind::Read, 0, 4096, one(8192)),
            (OpKind::Write, 0, 0, Vec::new()),
            (OpKind::Map, 0, 0, Vec::new()),
            (OpKind::Sync, 0, 512, Vec::new()),
            (OpKind::Discard, 0, 512, one(512)),
        ];
        if backing.limits().memory_align > 1 {
            bad.push((OpKind::Read, 0, 4096, vec![buffer.segment(1, 4096)]));
            bad.push((OpKind::Read, 0, 4096, vec![buffer.segment(0, 100), buffer.segment(4096, 3996)]));
        }
        for (op, offset, len, segments) in bad {
            let request = driver.request(op, offset, len, segments);
            let (tag, count) = (request.tag, request.segments.len());
            match driver.queue.submit(request) {
                Err(Refused::Invalid(back)) => {
                    assert_eq!((back.tag, back.op, back.offset, back.len), (tag, op, offset, len));
                    assert_eq!(back.segments.len(), count);
                }
                other => panic!("{op:?} at {offset}+{len}: {other:?}"),
            }
        }
        assert_eq!(driver.queue.in_flight(), 0);
    });
}

#[test]
fn a_full_queue_accepts_a_request_again_after_a_reap() {
    on_each("full", 4 * MIB, |backing| {
        let mut driver = Driver::new(backing);
        let depth = usize::from(backing.limits().depth);
        let mut buffers: Vec<Buffer> = (0..=depth).map(|_| Buffer::filled(4096, 0xee)).collect();
        let (last, first) = buffers.split_last_mut().unwrap();
        for (number, buffer) in first.iter_mut().enumerate() {
            driver.start(OpKind::Read, number as u64 * 4096, 4096, vec![buffer.segment(0, 4096)]);
        }
        assert_eq!(driver.queue.in_flight(), depth);
        let request = driver.request(OpKind::Read, 0, 4096, vec![last.segment(0, 4096)]);
        let Err(Refused::Full(back)) = driver.queue.submit(request) else { panic!("accepted more than the depth") };
        assert_eq!((back.tag, back.segments.len()), (depth as u64 + 1, 1));
        let events = driver.finish();
        assert!(events.len() == depth && all_done(events.values()), "{events:?}");
        driver.queue.submit(back).expect("the queue has room again");
        assert_eq!(driver.finish().len(), 1);
        assert!(buffers.iter().all(|b| b.bytes().iter().all(|&byte| byte == 0)), "a new image reads as zeros");
    });
}

#[test]
fn zero_clears_exactly_its_range() {
    on_each("zero", MIB, |backing| {
        let mut driver = Driver::new(backing);
        for unmap in [Unmap::Allowed, Unmap::Forbidden] {
            for (offset, len) in
                [(65536, 65536), (512, 512), (4096 - 512, 1024), (8192 + 512, 300 * 1024 + 512), (512, 8192)]
            {
                let mut want = pattern(512 * 1024, offset ^ len);
                driver.write(0, &mut Buffer::copy_of(&want));
                let event = driver.run(OpKind::Zero { unmap }, offset, len, Vec::new());
                assert!(matches!(event, Event::Done { .. }));
                want[usize::try_from(offset).unwrap()..usize::try_from(offset + len).unwrap()].fill(0);
                assert!(driver.read(0, want.len()) == want, "unmap {unmap:?}, {offset}+{len}");
            }
        }
    });
}

#[test]
fn discard_and_allocate_change_nothing_outside_their_range() {
    on_each("discard", MIB, |backing| {
        let mut driver = Driver::new(backing);
        let want = pattern(256 * 1024, 5);
        driver.write(0, &mut Buffer::copy_of(&want));
        for (op, offset, len) in [
            (OpKind::Discard, 64 * 1024, 64 * 1024),
            (OpKind::Discard, 128 * 1024 + 512, 512),
            (OpKind::Allocate, 512 * 1024, 64 * 1024),
        ] {
            match driver.try_run(op, offset, len, Vec::new()) {
                Event::Done { .. } => {}
                Event::Failed { fault: Fault::Unsupported, .. } if op == OpKind::Allocate => {}
                Event::Failed { fault: Fault::Unsupported, .. } if !backing.limits().can_discard => {}
                other => panic!("{op:?}: {other:?}"),
            }
        }
        let got = driver.read(0, want.len());
        assert!(got[..64 * 1024] == want[..64 * 1024]);
        assert!(got[128 * 1024..][..512] == want[128 * 1024..][..512]);
        assert!(got[129 * 1024..] == want[129 * 1024..]);
        assert!(driver.read(512 * 1024, 64 * 1024).iter().all(|&byte| byte == 0), "an allocated hole reads as zeros");
    });
}

#[test]
fn a_map_covers_its_range_and_never_reports_data_as_a_hole() {
    on_each("map", 4 * MIB, |backing| {
        let mut driver = Driver::new(backing);
        let mut data = Buffer::filled(4096, 0x5a);
        let written = [0u64, 128 * 1024, 132 * 1024, MIB, 4 * MIB - 4096];
        for offset in written {
            driver.write(offset, &mut data);
        }
        let mut holes = 0;
        for (offset, len) in [(0, 4 * MIB), (512, 4 * MIB - 512), (130 * 1024, 512), (1, 4 * MIB - 2), (MIB, MIB)] {
            let Event::Mapped { extents, .. } = driver.run(OpKind::Map, offset, len, Vec::new()) else {
                panic!("no map");
            };
            let covered: u64 = extents.iter().map(|e| e.len).sum();
            let before_last = covered - extents.last().map_or(0, |e| e.len);
            assert!(before_last < len && len <= covered && offset + covered <= 4 * MIB, "{extents:?}");
            assert!(extents.iter().all(|e| e.len > 0) && extents.windows(2).all(|p| p[0].kind != p[1].kind));
            let mut at = offset;
            for extent in extents {
                let end = at + extent.len;
                if extent.kind == ExtentKind::Hole {
                    holes += 1;
                    assert!(written.iter().all(|&w| w + 4096 <= at || w >= end), "data in the hole {at}..{end}");
                }
                at = end;
            }
        }
        // The last run is reported whole: data, then a hole to the next data.
        let Event::Mapped { extents, .. } = driver.run(OpKind::Map, MIB, 8192, Vec::new()) else { panic!("no map") };
        let covered: u64 = extents.iter().map(|e| e.len).sum();
        let is_whole = covered == if holes > 0 { 3 * MIB - 4096 } else { 3 * MIB };
        // A server tells no more than it is asked, nor can direct I/O be known of it.
        assert!(is_whole || backing.limits().memory_align == 1 && covered == 8192, "{extents:?}");
        assert_eq!(
            holes > 0,
            backing.limits().holes == ImageHoles::Possible,
            "a map reports holes on a sparse image only"
        );
    });
}

#[test]
fn a_partial_last_page_is_read_and_written_to_its_end() {
    const SIZE: u64 = 512 * 2049;
    on_each("tail", SIZE, |backing| {
        let mut driver = Driver::new(backing);
        assert_eq!(backing.limits().size_bytes.get(), SIZE);
        assert_eq!(backing.limits().block_bytes, 512, "a larger block does not divide the size");
        let mut tail = Buffer::copy_of(&pattern(1536, 9));
        driver.write(SIZE - 1536, &mut tail);
        driver.run(OpKind::Zero { unmap: Unmap::Allowed }, SIZE - 512, 512, Vec::new());
        let got = driver.read(SIZE - 2048, 2048);
        assert!(got[..512].iter().all(|&byte| byte == 0));
        assert!(got[512..1536] == tail.bytes()[..1024]);
        assert!(got[1536..].iter().all(|&byte| byte == 0));
        let Event::Mapped { extents, .. } = driver.run(OpKind::Map, 0, SIZE, Vec::new()) else { panic!("no map") };
        assert_eq!(extents.iter().map(|e| e.len).sum::<u64>(), SIZE);
    });
}

#[test]
fn the_wake_fd_is_readable_exactly_while_events_wait() {
    on_each("wake", MIB, |backing| {
        let mut driver = Driver::new(backing);
        let mut buffer = Buffer::filled(4096, 3);
        for op in [
            OpKind::Write,
            OpKind::Read,
            OpKind::Sync,
            OpKind::Map,
            OpKind::Zero { unmap: Unmap::Allowed },
            OpKind::Discard,
            OpKind::Allocate,
        ] {
            let transfer = matches!(op, OpKind::Read | OpKind::Write);
            let segments = if transfer { vec![buffer.segment(0, 4096)] } else { Vec::new() };
            let tag = driver.start(op, 0, if op == OpKind::Sync { 0 } else { 4096 }, segments);
            driver.queue.kick();
            assert!(readable(driver.queue.wake_fd(), 30_000), "{op:?}: no wake-up");
            assert!(readable(driver.queue.wake_fd(), 0), "{op:?}: the wake fd must stay readable until the reap");
            assert_eq!(driver.queue.in_flight(), 1);
            // With io_uring, a fallback runs on the helper after the ring has failed: the first reap may find no event.
            let mut events = Vec::new();
            while events.is_empty() {
                assert!(readable(driver.queue.wake_fd(), 30_000), "{op:?}: no wake-up");
                driver.queue.reap(&mut events);
            }
            assert_eq!(events.iter().map(store_kit::tag_of).collect::<Vec<_>>(), [tag], "{op:?}");
            assert!(!readable(driver.queue.wake_fd(), 0), "{op:?}: readable although no event waits");
            assert_eq!(driver.queue.in_flight(), 0);
        }
    });
}

#[test]
fn dropping_a_queue_completes_the_operations_that_it_accepted() {
    on_each("drop", 8 * MIB, |backing| {
        let want = pattern(4 * 1024 * 1024, 77);
        let mut buffers: Vec<Buffer> = want.chunks(64 * 1024).map(Buffer::copy_of).collect();
        let mut driver = Driver::new(backing);
        for (number, buffer) in buffers.iter_mut().enumerate() {
            let segment = buffer.segment(0, 64 * 1024);
            driver.start(OpKind::Write, number as u64 * 65536, 65536, vec![segment]);
            if number == 32 {
                driver.queue.kick();
            }
        }
        driver.start(OpKind::Map, 0, 8 * MIB, Vec::new());
        drop(driver);
        // A write that is still in flight would write these bytes to the image.
        for buffer in &mut buffers {
            buffer.fill(0);
        }
        let mut driver = Driver::new(backing);
        for (number, piece) in want.chunks(64 * 1024).enumerate() {
            assert!(driver.read(number as u64 * 65536, 65536) == piece, "write {number}");
        }
    });
}

#[test]
fn two_queues_of_an_image_see_each_others_completed_writes() {
    on_each("share", MIB, |backing| {
        let (mut a, mut b) = (Driver::new(backing), Driver::new(backing));
        let mut bytes = Buffer::copy_of(&pattern(8192, 3));
        a.write(16384, &mut bytes);
        assert!(b.read(16384, 8192) == bytes.bytes());
    });
}

#[test]
fn operations_outlive_the_thread_that_submitted_them() {
    on_each("move", 8 * MIB, |backing| {
        let backing = Arc::clone(backing);
        let want = pattern(4 * 1024 * 1024, 8);
        let pieces: Vec<Vec<u8>> = want.chunks(65536).map(<[u8]>::to_vec).collect();
        let (mut driver, buffers) = std::thread::spawn(move || {
            let mut driver = Driver::new(&backing);
            let mut buffers: Vec<Buffer> = pieces.iter().map(|piece| Buffer::copy_of(piece)).collect();
            for (number, buffer) in buffers.iter_mut().enumerate() {
                let segment = buffer.segment(0, 65536);
                driver.start(OpKind::Write, number as u64 * 65536, 65536, vec![segment]);
            }
            // With io_uring, this one needs a kernel worker, which ends with the thread that submitted it.
            driver.start(OpKind::Zero { unmap: Unmap::Allowed }, 6 * MIB, 65536, Vec::new());
            driver.queue.kick();
            (driver, buffers)
        })
        .join()
        .unwrap();
        let events = driver.finish();
        assert!(events.len() == 65 && all_done(events.values()), "{events:?}");
        drop(buffers);
        for (number, piece) in want.chunks(65536).enumerate() {
            assert!(driver.read(number as u64 * 65536, 65536) == piece, "write {number}");
        }
    });
}

#[test]
fn a_read_only_image_refuses_every_change() {
    let image = Image::file("read_only", MIB);
    for engine in [IoEngine::Uring, IoEngine::Threads] {
        let options = OpenOptions { read_only: true, engine, direct: true, ..OpenOptions::default() };
        let backing: Arc<dyn Backing> = FileImage::open(&image.path, &options).unwrap();
        let limits = backing.limits();
        assert!(!limits.writable && !limits.can_zero && !limits.can_discard);
        let mut driver = Driver::new(&backing);
        assert!(driver.read(0, 4096).iter().all(|&byte| byte == 0));
        let mut buffer = Buffer::filled(4096, 1);
        for op in [OpKind::Write, OpKind::Zero { unmap: Unmap::Allowed }, OpKind::Discard, OpKind::Allocate] {
            let segments = if op == OpKind::Write { vec![buffer.segment(0, 4096)] } else { Vec::new() };
            let request = driver.request(op, 0, 4096, segments);
            assert!(matches!(driver.queue.submit(request), Err(Refused::Invalid(_))), "{op:?}");
        }
        driver.run(OpKind::Sync, 0, 0, Vec::new());
    }
}

#[test]
fn a_read_beyond_the_end_of_a_truncated_image_fails_with_an_io_error() {
    for engine in [IoEngine::Uring, IoEngine::Threads] {
        for direct in [false, true] {
            let image = Image::file("shrunk", MIB);
            let options = OpenOptions { read_only: false, engine, direct, ..OpenOptions::default() };
            let backing: Arc<dyn Backing> = FileImage::open(&image.path, &options).unwrap();
            let mut driver = Driver::new(&backing);
            let file = std::fs::OpenOptions::new().write(true).open(&image.path).unwrap();
            file.set_len(MIB / 2 + 2048 + 100).unwrap();
            let mut buffer = Buffer::filled(8192, 0xee);
            let event = driver.try_run(OpKind::Read, MIB / 2, 8192, vec![buffer.segment(0, 8192)]);
            assert!(matches!(event, Event::Failed { fault: Fault::Media, .. }), "{event:?}");
            let event = driver.try_run(OpKind::Map, 0, MIB, Vec::new());
            assert!(
                matches!(event, Event::Failed { .. }),
                "a map must not report the missing part as a hole: {event:?}"
            );
        }
    }
}
