//! When a worker's next turn is due.

use std::fs::File;
use std::time::{Duration, Instant};

use crate::cache::Access;
use crate::cached_image::CachedImage;
use crate::cached_image::tenure_tests::{IMAGE_SECTORS, arena_of, settings};
use crate::counters::worker::Counters;
use crate::store::file::{FileImage, IoEngine, OpenOptions};
use crate::sys::poll::wait_readable;
use crate::units::SectorSpan;

/// The store's pauses after refusals are much shorter.
const TIME_MAX: Duration = Duration::from_secs(2);

/// A guest with a single request sends nothing else that would wake the worker.
#[test]
fn a_turn_is_due_soon_after_the_store_refused_an_operation() {
    let (directory, arena) = arena_of("refused");
    let path = directory.join("image");
    File::create(&path).and_then(|file| file.set_len(IMAGE_SECTORS * 512)).unwrap();
    let options = OpenOptions { direct: false, engine: IoEngine::Uring, ..OpenOptions::default() };
    let image = FileImage::open(&path, &options).unwrap();
    let cached = CachedImage::new("test", image.clone(), arena, settings());
    let mut port = cached.port("test", Counters::new(1).unwrap().of_worker(0)).unwrap();
    image.refuse_submissions(3);
    let access = Access::new(port.ticket(1), SectorSpan::new(24, 8));
    port.with_cache(cached.now(), |cache, _| _ = cache.read(access, &mut Vec::new()));
    let begun = Instant::now();
    let mut is_ready = false;
    while !is_ready {
        let deadline = port.end_turn(cached.now(), |_| {});
        let pause = deadline.map_or(Duration::MAX, |due| Duration::from_micros(due.since_us(cached.now())));
        if wait_readable(port.store_fd(), pause.min(2 * TIME_MAX)) {
            port.set_store_ready();
        }
        port.reap(false);
        port.with_cache(cached.now(), |_, notices| is_ready = !notices.is_empty());
        assert!(begun.elapsed() < TIME_MAX, "the read takes {:?}", begun.elapsed());
    }
    drop(port);
    drop(cached);
    std::fs::remove_dir_all(directory).unwrap();
}
