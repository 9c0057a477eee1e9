//! An image that needs memory aligned to more than its blocks, as some devices do for direct I/O (dio_mem_align of
//! statx(2)), is served: every transfer that reaches it is aligned.

#![allow(clippy::cast_possible_truncation, reason = "the tests use small sizes")]

mod common;

use std::fs;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::sync::Arc;

use common::SECTOR_BYTES;
use common::daemon::TempDir;
use common::prng::Prng;
use common::request::{OK, pattern, range};
use common::session::{Session, SessionOptions};
use genblk::config::{DeviceConfig, Socket};
use genblk::error::{ErrorKind, Result};
use genblk::service::{Running, Service};
use genblk::store::file::{FileImage, OpenOptions};
use genblk::store::{Backing, Event, IoRequest, Limits, Refused, StoreQueue};

/// An image with other limits than those of its file, which it enforces.
#[derive(Debug)]
struct Strict {
    file: Arc<FileImage>,
    limits: Limits,
}

#[derive(Debug)]
struct StrictQueue {
    queue: Box<dyn StoreQueue>,
    limits: Limits,
}

impl Backing for Strict {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn attach(&self) -> Result<Box<dyn StoreQueue>> {
        Ok(Box::new(StrictQueue { queue: self.file.attach()?, limits: self.limits.clone() }))
    }
}

impl StoreQueue for StrictQueue {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn wake_fd(&self) -> RawFd {
        self.queue.wake_fd()
    }

    fn submit(&mut self, request: IoRequest) -> std::result::Result<(), Refused> {
        if self.limits.admissible(&request) { self.queue.submit(request) } else { Err(Refused::Invalid(request)) }
    }

    fn kick(&mut self) {
        self.queue.kick();
    }

    fn reap(&mut self, events: &mut Vec<Event>) {
        self.queue.reap(events);
    }

    fn in_flight(&self) -> usize {
        self.queue.in_flight()
    }

    fn drain(&mut self, timeout: std::time::Duration) -> bool {
        self.queue.drain(timeout)
    }
}

/// An image of `sectors` sectors with limits that `adjust` changes, and a configuration that serves it.
fn strict(directory: &TempDir, sectors: u64, adjust: impl FnOnce(&mut Limits)) -> (Arc<Strict>, DeviceConfig) {
    let (image, socket) = (directory.path().join("image"), directory.path().join("socket"));
    fs::write(&image, pattern(1, 0, sectors as usize * SECTOR_BYTES)).expect("an image can be written");
    let file = FileImage::open(&image, &OpenOptions::default()).expect("the image opens");
    let mut limits = Limits { block_bytes: 512, memory_align: 512, ..file.limits().clone() };
    adjust(&mut limits);
    let mut config = DeviceConfig::new("strict", Socket::Path(socket), image);
    config.cache.size_bytes = 4 << 20;
    (Arc::new(Strict { file, limits }), config)
}

fn serve(config: &DeviceConfig, image: Arc<Strict>) -> Result<Running> {
    Service::with_image(config, image)?.start()
}

fn socket(directory: &TempDir) -> PathBuf {
    directory.path().join("socket")
}

#[test]
fn an_image_that_requires_page_aligned_memory_is_served() {
    // The second image ends within a page.
    for sectors in [16 << 10, (16 << 10) + 3] {
        for memory_align in [1024, 4096] {
            let directory = TempDir::new("aligned");
            let (image, config) = strict(&directory, sectors, |limits| limits.memory_align = memory_align);
            let path = config.image.clone();
            let running = serve(&config, image).expect("it is served");
            let mut session = Session::open(&socket(&directory), &SessionOptions::default());
            let mut expected = fs::read(&path).expect("the image can be read");
            let mut prng = Prng::new(sectors + u64::from(memory_align));
            for round in 2..300 {
                let count = 1 + prng.below(20);
                // Often at the end.
                let first = (sectors - count).min(prng.below(sectors + sectors / 4));
                let at = first as usize * SECTOR_BYTES;
                let len = count as usize * SECTOR_BYTES;
                match prng.below(8) {
                    0..4 => {
                        let bytes = pattern(round, first, len);
                        session.write(first, &bytes);
                        expected[at..at + len].copy_from_slice(&bytes);
                    }
                    4 => {
                        assert_eq!(session.write_zeroes(&[range(first, count as u32, 0)]), OK);
                        expected[at..at + len].fill(0);
                    }
                    5 => session.flush(),
                    _ => assert!(session.read(first, len) == expected[at..at + len], "{count} sectors at {first}"),
                }
            }
            drop(session);
            running.shutdown().expect("every dirty page is written");
            assert!(fs::read(&path).expect("the image can be read") == expected, "{sectors} sectors, {memory_align}");
        }
    }
}

#[test]
fn an_image_with_unsupportable_limits_is_refused() {
    type Adjust = fn(&mut Limits);
    let cases: [(Adjust, &str); 9] = [
        (|limits| limits.size_bytes = 0.into(), "a size of 0 bytes"),
        (|limits| limits.size_bytes = 1000.into(), "a size of 1000 bytes"),
        (|limits| limits.block_bytes = 256, "blocks of 256 bytes"),
        (|limits| limits.block_bytes = 1536, "blocks of 1536 bytes"),
        (|limits| limits.block_bytes = 8192, "aligned to 8192 bytes"),
        (|limits| limits.memory_align = 8192, "aligned to 8192 bytes"),
        (|limits| limits.memory_align = 0, "aligned to 512 bytes"),
        (|limits| limits.io_max_bytes = 2048, "2048 bytes"),
        (|limits| limits.segments_max = 0, "0 segments"),
    ];
    for (adjust, words) in cases {
        let directory = TempDir::new("narrow");
        let (image, config) = strict(&directory, 64, adjust);
        let error = serve(&config, image).expect_err(words);
        assert_eq!(error.kind(), ErrorKind::Image, "{error}");
        assert!(error.to_string().contains(words), "{words:?} is not in {error}");
    }
}
