//! The memory of an arena made ready before it is needed.
//!
//! Memory that is reserved is cleared and mapped at its first touch, page by page, and the first read into a frame took
//! twice as long for it. A thread of the lowest priority touches all of it ahead of use. Nothing waits for that thread: what
//! it has not come to yet is made ready at its first touch, as ever.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use log::debug;

use super::Arena;

/// Bytes that are made ready at a time: the kernel holds up whoever maps memory meanwhile (a front-end that attaches).
const STEP_BYTES: usize = 256 << 10;
/// The lowest priority there is (setpriority(2)).
const NICE: libc::c_int = 19;

/// The thread; it ends with the value.
#[derive(Debug)]
pub struct Populator {
    stops: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Populator {
    /// Begins with `arena`; `name` is for the thread.
    ///
    /// => A host that has no thread for this, or a kernel before Linux 5.14, does without.
    pub fn start(name: &str, arena: &Arc<Arena>) -> Self {
        let stops = Arc::new(AtomicBool::new(false));
        let (arena, stopped) = (Arc::clone(arena), Arc::clone(&stops));
        let thread = thread::Builder::new().name(format!("memory {name}")).spawn(move || populate(&arena, &stopped));
        Self { stops, thread: thread.ok() }
    }
}

impl Drop for Populator {
    fn drop(&mut self) {
        self.stops.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It has nothing to say, however it ended.
            let _ = thread.join();
        }
    }
}

fn populate(arena: &Arena, stopped: &AtomicBool) {
    // SAFETY: a plain system call on the calling thread (in Linux each thread has a priority of its own).
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) };
    for at in (0..arena.memory.bytes()).step_by(STEP_BYTES) {
        if stopped.load(Ordering::Relaxed) {
            return;
        }
        if let Err(e) = arena.memory.populate(at, STEP_BYTES) {
            debug!("memory is made ready when it is first used: {e}");
            return;
        }
    }
}
