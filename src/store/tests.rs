//! Transfers that the system cuts short, in both engines: nothing outside the store can make one, so they are cut here,
//! before the system call, and what lies behind the cut is on neither side until the store goes on.

use crate::units::OpKind;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::file::{FileImage, IoEngine, OpenOptions};
use super::{Backing, Event, IoRequest, Segment};
use crate::sys;

const IMAGE_BYTES: usize = 64 * 1024;

/// Aligned for direct I/O.
#[repr(C, align(4096))]
struct Memory([u8; IMAGE_BYTES]);

impl Memory {
    fn filled(byte: u8) -> Box<Self> {
        Box::new(Self([byte; IMAGE_BYTES]))
    }

    /// Bytes whose period is no block's.
    fn pattern() -> Box<Self> {
        let mut memory = Self::filled(0);
        memory.0.iter_mut().zip((0..251).cycle()).for_each(|(place, byte)| *place = byte);
        memory
    }

    /// All of it, in segments of uneven lengths.
    fn segments(&mut self) -> Vec<Segment> {
        let mut rest = &mut self.0[..];
        let mut segments = Vec::new();
        for len in [4096, 512, 8192 + 512, 16384].into_iter().cycle() {
            let (piece, behind) = rest.split_at_mut(len.min(rest.len()));
            segments.push(Segment { base: piece.as_mut_ptr(), len: piece.len() });
            rest = behind;
            if rest.is_empty() {
                return segments;
            }
        }
        unreachable!("the lengths go round for ever")
    }
}

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

/// Moves all of the memory in one operation.
fn run(image: &FileImage, op: OpKind, memory: &mut Memory) -> Event {
    let mut store = image.attach().unwrap();
    let request = IoRequest { tag: 1, op, offset: 0, len: IMAGE_BYTES as u64, segments: memory.segments() };
    store.submit(request).unwrap();
    store.kick();
    let mut events = Vec::new();
    while events.is_empty() {
        assert!(sys::poll::wait_readable(store.wake_fd(), Duration::from_secs(30)), "the operation hangs");
        store.reap(&mut events);
    }
    events.pop().unwrap()
}

/// Both engines, with and without direct I/O, and a cut that suits: direct I/O takes whole blocks only.
fn each(name: &str, test: impl Fn(&Arc<FileImage>, &Image, &str)) {
    for engine in [IoEngine::Uring, IoEngine::Threads] {
        for direct in [true, false] {
            let file = Image::new(name);
            let image = FileImage::open(&file.0, &OpenOptions { engine, direct, ..OpenOptions::default() }).unwrap();
            let block = usize::try_from(image.limits().block_bytes).unwrap();
            image.cut_transfers(if image.direct() { block } else { 1000 });
            test(&image, &file, &format!("{engine:?}, direct: {}", image.direct()));
        }
    }
}

#[test]
fn a_write_that_is_cut_short_goes_on_until_all_of_it_is_there() {
    each("write", |image, file, label| {
        let mut memory = Memory::pattern();
        let want = memory.0;
        assert!(matches!(run(image, OpKind::Write, &mut memory), Event::Done { .. }), "{label}");
        let mut found = vec![0; IMAGE_BYTES];
        File::open(&file.0).unwrap().read_exact_at(&mut found, 0).unwrap();
        assert!(found == want, "{label}: the image holds all of it");
    });
}

#[test]
fn a_read_that_is_cut_short_goes_on_until_all_of_it_is_there() {
    each("read", |image, file, label| {
        let want = Memory::pattern();
        File::options().write(true).open(&file.0).unwrap().write_all_at(&want.0, 0).unwrap();
        let mut memory = Memory::filled(0xee);
        assert!(matches!(run(image, OpKind::Read, &mut memory), Event::Done { .. }), "{label}");
        assert!(memory.0 == want.0, "{label}: the memory holds all of it");
    });
}

#[test]
fn a_transfer_that_never_gets_a_whole_block_fails() {
    each("never", |image, _, label| {
        if !image.direct() {
            image.cut_transfers(100);
            let event = run(image, OpKind::Write, &mut Memory::filled(1));
            assert!(matches!(event, Event::Failed { errno: libc::EIO, .. }), "{label}: {event:?}");
        }
    });
}
