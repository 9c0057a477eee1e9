//! Short transfers, in both engines, and slow writes in the thread engine. Nothing outside the store can cause a short
//! transfer, so the tests limit what a system call moves; the rest of a transfer then arrives only if the store
//! continues it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::file::{FileImage, IoEngine, OpenOptions};
use super::{Backing, Event, IoRequest, Segment};
use crate::sys;
use crate::units::{OpKind, Urgency};

const IMAGE_BYTES: usize = 64 * 1024;

/// Memory for a whole image, aligned for direct I/O.
#[repr(C, align(4096))]
struct Memory([u8; IMAGE_BYTES]);

impl Memory {
    fn filled(byte: u8) -> Box<Self> {
        Box::new(Self([byte; IMAGE_BYTES]))
    }

    /// Bytes with a period of 251, which no block size is a multiple of.
    fn pattern() -> Box<Self> {
        let mut memory = Self::filled(0);
        memory.0.iter_mut().zip((0..251).cycle()).for_each(|(target, byte)| *target = byte);
        memory
    }

    /// The whole memory, in segments of different lengths.
    fn segments(&mut self) -> Vec<Segment> {
        let mut rest = &mut self.0[..];
        let mut segments = Vec::new();
        for len in [4096, 512, 8192 + 512, 16384].into_iter().cycle() {
            let (segment, after) = rest.split_at_mut(len.min(rest.len()));
            segments.push(Segment { base: segment.as_mut_ptr(), len: segment.len() });
            rest = after;
            if rest.is_empty() {
                return segments;
            }
        }
        unreachable!("the lengths repeat without end")
    }
}

/// A sparse image file; deleted with the value.
struct Image(PathBuf);

impl Image {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("genblk-short-{}-{name}.img", std::process::id()));
        File::create(&path).and_then(|file| file.set_len(IMAGE_BYTES as u64)).unwrap();
        Self(path)
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn request(tag: u64, op: OpKind, segments: Vec<Segment>) -> IoRequest {
    let urgency = if op == OpKind::Read { Urgency::Demand } else { Urgency::Background };
    IoRequest { tag, op, offset: 0, len: IMAGE_BYTES as u64, urgency, segments }
}

/// Transfers all of the memory in one operation.
fn run(image: &FileImage, op: OpKind, memory: &mut Memory) -> Event {
    let mut queue = image.attach().unwrap();
    let request = request(1, op, memory.segments());
    queue.submit(request).unwrap();
    queue.kick();
    let mut events = Vec::new();
    while events.is_empty() {
        assert!(sys::poll::wait_readable(queue.wake_fd(), Duration::from_secs(30)), "the operation did not complete");
        queue.reap(&mut events);
    }
    events.pop().unwrap()
}

/// Runs `test` on both engines, with and without direct I/O. With direct I/O a system call moves one block, because
/// direct I/O requires whole blocks.
fn on_each(name: &str, test: impl Fn(&Arc<FileImage>, &Image, &str)) {
    for engine in [IoEngine::Uring, IoEngine::Threads] {
        for direct in [true, false] {
            let file = Image::new(name);
            let image = FileImage::open(&file.0, &OpenOptions { engine, direct, ..OpenOptions::default() }).unwrap();
            let block = usize::try_from(image.limits().transfer_block_bytes()).unwrap();
            image.limit_transfers(if image.direct() { block } else { 1000 });
            test(&image, &file, &format!("{engine:?}, direct: {}", image.direct()));
        }
    }
}

#[test]
fn a_short_write_is_continued_until_complete() {
    on_each("write", |image, file, label| {
        let mut memory = Memory::pattern();
        let want = memory.0;
        assert!(matches!(run(image, OpKind::Write, &mut memory), Event::Done { .. }), "{label}");
        let mut found = vec![0; IMAGE_BYTES];
        File::open(&file.0).unwrap().read_exact_at(&mut found, 0).unwrap();
        assert!(found == want, "{label}: bytes are missing on the image");
    });
}

#[test]
fn a_short_read_is_continued_until_complete() {
    on_each("read", |image, file, label| {
        let want = Memory::pattern();
        File::options().write(true).open(&file.0).unwrap().write_all_at(&want.0, 0).unwrap();
        let mut memory = Memory::filled(0xee);
        assert!(matches!(run(image, OpKind::Read, &mut memory), Event::Done { .. }), "{label}");
        assert!(memory.0 == want.0, "{label}: bytes are missing in memory");
    });
}

#[test]
fn a_transfer_that_never_moves_a_whole_block_fails() {
    on_each("never", |image, _, label| {
        if !image.direct() {
            image.limit_transfers(100);
            let event = run(image, OpKind::Write, &mut Memory::filled(1));
            assert!(matches!(event, Event::Failed { errno: libc::EIO, .. }), "{label}: {event:?}");
        }
    });
}

#[test]
fn a_write_past_the_end_of_a_truncated_image_fails_without_extending_it() {
    on_each("truncated", |image, file, label| {
        let half = IMAGE_BYTES as u64 / 2;
        let truncated = File::options().write(true).open(&file.0).unwrap();
        truncated.set_len(half).unwrap();
        let event = run(image, OpKind::Write, &mut Memory::filled(1));
        assert!(matches!(event, Event::Failed { .. }), "{label}: {event:?}");
        assert_eq!(truncated.metadata().unwrap().len(), half, "{label}");
    });
}

/// The write-back has at most 32 writes in flight. With a single queue, a read would wait for eight rounds of them.
#[test]
fn reads_of_the_thread_engine_do_not_wait_for_slow_writes() {
    const WRITE_MS: u64 = 100;
    let file = Image::new("slow-writes");
    let options = OpenOptions { engine: IoEngine::Threads, ..OpenOptions::default() };
    let image = FileImage::open(&file.0, &options).unwrap();
    image.slow_writes(WRITE_MS);
    let mut queue = image.attach().unwrap();
    let (mut written, mut read) = (Memory::pattern(), Memory::filled(0));
    for tag in 0..32 {
        queue.submit(request(tag, OpKind::Write, written.segments())).unwrap();
    }
    queue.kick();
    let mut waits = Vec::new();
    let mut events = Vec::new();
    for tag in 100..110 {
        let started = Instant::now();
        queue.submit(request(tag, OpKind::Read, read.segments())).unwrap();
        queue.kick();
        while !events.drain(..).any(|event| matches!(event, Event::Done { tag: ended } if ended == tag)) {
            assert!(sys::poll::wait_readable(queue.wake_fd(), Duration::from_secs(30)), "the read did not complete");
            queue.reap(&mut events);
        }
        waits.push(started.elapsed());
    }
    waits.sort_unstable();
    assert!(waits[5] < Duration::from_millis(WRITE_MS / 2), "reads waited for writes: {waits:?}");
    assert!(queue.in_flight() > 0, "the writes are still in flight");
}

#[test]
fn a_refused_submission_is_retried_a_bounded_number_of_times() {
    let file = Image::new("refused");
    let options = OpenOptions { engine: IoEngine::Uring, ..OpenOptions::default() };
    let image = FileImage::open(&file.0, &options).unwrap();
    let mut queue = image.attach().unwrap();
    image.refuse_submissions(4);
    let mut memory = Memory::filled(1);
    queue.submit(request(1, OpKind::Read, memory.segments())).unwrap();
    let begun = Instant::now();
    let (mut turns, mut events) = (0, Vec::new());
    queue.kick();
    while events.is_empty() {
        let pause = queue.retry_after().unwrap_or(Duration::from_secs(5));
        sys::poll::wait_readable(queue.wake_fd(), pause + Duration::from_millis(1));
        queue.kick();
        queue.reap(&mut events);
        turns += 1;
    }
    assert!(matches!(events[0], Event::Done { .. }), "{events:?}");
    assert!(begun.elapsed() >= Duration::from_millis(1 + 2 + 4 + 8), "the pauses grow");
    assert!(turns < 40, "{turns} turns");
    assert_eq!(queue.retry_after(), None);
}

/// A file system may take long to set an attribute: no worker waits for it, but the write that depends on it does.
#[test]
fn a_format_header_is_recorded_before_it_is_written() {
    for engine in [IoEngine::Uring, IoEngine::Threads] {
        let file = Image::new("header");
        let image = FileImage::open(&file.0, &OpenOptions { engine, ..OpenOptions::default() }).unwrap();
        let mut queue = image.attach().unwrap();
        let (mut written, mut read) = (Memory::filled(0), Memory::filled(0xee));
        written.0[..8].copy_from_slice(b"LUKS\xba\xbe\0\x02");
        let recording = image.hold_recording();
        let formats = image.inspect_guest_write(0, &written.0[..4096]);
        assert_ne!(formats, 0);
        assert_eq!(image.recorded_formats(), 0);
        queue.submit(request(1, OpKind::Write, written.segments())).unwrap();
        queue.submit(request(2, OpKind::Read, read.segments())).unwrap();
        queue.kick();
        let mut events = Vec::new();
        while events.is_empty() {
            assert!(sys::poll::wait_readable(queue.wake_fd(), Duration::from_secs(30)), "the read did not complete");
            queue.reap(&mut events);
        }
        assert!(matches!(events[..], [Event::Done { tag: 2 }]), "{engine:?}: {events:?}");
        assert_eq!(read.0[..8], [0; 8], "{engine:?}: the header is not on the image before it is on record");
        assert_eq!(image.inspect_guest_write(0, &written.0[..4096]), 0, "the same bytes show nothing new");
        drop(recording);
        events.clear();
        while events.is_empty() {
            assert!(sys::poll::wait_readable(queue.wake_fd(), Duration::from_secs(30)), "the write did not complete");
            queue.reap(&mut events);
        }
        assert!(matches!(events[..], [Event::Done { tag: 1 }]), "{engine:?}: {events:?}");
        assert_eq!(image.recorded_formats(), formats, "{engine:?}");
    }
}
