//! The memory of a cache whose size changes while it is used.
//!
//! The cache reports how many frames it uses (`use_frames`), and never waits. A thread frees the memory of the others.
//! Before that, every io_uring instance that keeps memory pinned must unpin it: a pinned page would differ from the
//! page that the cache gets when it grows again. Each worker does that in its next turn, and the thread waits for all
//! of them.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use log::{info, warn};

use super::port::wake;
use super::{CachedImage, Mailbox};
use crate::arena::{Arena, Populator};
use crate::error::Result;
use crate::units::PAGE_BYTES;

/// How often the thread checks whether the cache or a worker is ready: at first, and at most.
const WATCH_MIN: Duration = Duration::from_millis(2);
const WATCH_MAX: Duration = Duration::from_millis(100);

/// The mailboxes of all workers, and the number of changes of the memory that they may use.
#[derive(Debug, Default)]
pub(super) struct Mailboxes {
    list: Mutex<Vec<Arc<Mailbox>>>,
    pub memory_changes: AtomicU64,
}

impl Mailboxes {
    pub fn lock(&self) -> MutexGuard<'_, Vec<Arc<Mailbox>>> {
        self.list.lock().expect("no thread panics with the list locked")
    }

    /// Makes every ring unpin the memory that the cache does not use, and waits until all have. False: `stop` was set
    /// before that.
    fn limit_rings(&self, name: &str, stop: &AtomicBool) -> bool {
        let change = self.memory_changes.fetch_add(1, Ordering::AcqRel) + 1;
        wake(name, &self.lock());
        wait_until(stop, || self.lock().iter().all(|mailbox| mailbox.memory_seen.load(Ordering::Acquire) >= change))
    }
}

/// Waits until a condition holds. False: `stop` was set before that.
fn wait_until(stop: &AtomicBool, holds: impl Fn() -> bool) -> bool {
    let mut pause = WATCH_MIN;
    while !holds() {
        if stop.load(Ordering::Relaxed) {
            return false;
        }
        thread::sleep(pause);
        pause = (pause * 2).min(WATCH_MAX);
    }
    true
}

/// The size that the cache is to have, and the thread that allocates and frees its memory.
#[derive(Debug)]
pub(super) struct MemoryKeeper {
    frames: usize,
    thread: Option<Populator>,
}

impl MemoryKeeper {
    /// Starts the thread for a cache that has or will soon have `frames` frames. It confines itself if `confines`.
    pub fn start(name: &str, arena: &Arc<Arena>, mailboxes: &Arc<Mailboxes>, frames: usize, confines: bool) -> Self {
        Self { frames, thread: Some(memory_thread(name, arena, mailboxes, frames, confines)) }
    }
}

impl CachedImage {
    /// Allocates the memory of a cache of `frames` frames, before [`CachedImage::follow_size`].
    ///
    /// # Errors
    /// Like [`Arena::reserve`]: the cache cannot become that large.
    pub fn reserve(&self, frames: usize) -> Result<()> {
        let mut state = self.memory.lock().expect("no thread panics with the state locked");
        if frames == state.frames {
            return Ok(());
        }
        // Nothing is freed until the cache has reached its size.
        drop(state.thread.take());
        self.arena.reserve(frames)
    }

    /// The size of the cache was set to `frames` frames: starts a thread that frees the memory that it will not use,
    /// and populates the rest.
    pub fn follow_size(&self, frames: usize) {
        let mut state = self.memory.lock().expect("no thread panics with the state locked");
        if frames != state.frames || state.thread.is_none() {
            // The previous thread ends before the next one starts.
            drop(state.thread.take());
            // The process has confined threads, and a new thread inherits that.
            *state = MemoryKeeper::start(&self.name, &self.arena, &self.mailboxes, frames, false);
        }
    }
}

/// The thread that populates the memory of a cache of `frames` frames, and returns the rest to the host.
fn memory_thread(
    name: &str,
    arena: &Arc<Arena>,
    mailboxes: &Arc<Mailboxes>,
    frames: usize,
    confines: bool,
) -> Populator {
    let (log_name, to_free, rings) = (name.to_owned(), Arc::clone(arena), Arc::clone(mailboxes));
    Populator::after(name, arena, confines, move |stop| {
        let name = &log_name;
        let before = to_free.reserved_frames();
        if let Err(e) = to_free.free_uncounted() {
            warn!("{name}: {e}");
        }
        let is_resized = || {
            let is_resized = to_free.frames_in_use() <= frames;
            if !is_resized {
                // The cache shrinks in turns, and without a front-end a worker takes none on its own.
                wake(name, &rings.lock());
            }
            is_resized
        };
        if !wait_until(stop, is_resized) || !rings.limit_rings(name, stop) {
            return;
        }
        loop {
            match to_free.free_unused() {
                Ok(true) if !stop.load(Ordering::Relaxed) => {}
                Ok(_) => break,
                Err(e) => return warn!("{name}: {e}"),
            }
        }
        let after = to_free.reserved_frames();
        if after != before {
            info!("{name}: the cache now has {} MiB", (after as u64 * PAGE_BYTES) >> 20);
        }
    })
}
