//! The memory of an arena made ready before it is needed.
//!
//! Memory that is reserved is cleared and mapped at its first touch, page by page, and the first read into a frame took
//! twice as long for it. A thread of the lowest priority touches all of it ahead of use, and has the kernel put it into huge
//! pages, whether or not the host's shared memory is set up for them. Nothing waits for that thread: what it has not come
//! to yet is made ready at its first touch, as ever.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use log::debug;

use super::Arena;
use super::mapping::{HUGE_PAGE_BYTES, Mapping};

/// Bytes that are made ready at a time, a part of a huge page: the kernel holds up whoever maps memory meanwhile (a front-end that attaches).
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
    let memory = &arena.memory;
    let mut huge_pages = Some(0);
    for at in (0..memory.bytes()).step_by(STEP_BYTES) {
        if stopped.load(Ordering::Relaxed) {
            return;
        }
        if let Err(e) = memory.populate(at, STEP_BYTES) {
            debug!("memory is made ready when it is first used: {e}");
            return;
        }
        let end = at + STEP_BYTES;
        if end.is_multiple_of(HUGE_PAGE_BYTES) && end <= memory.bytes() {
            huge_pages = huge_pages.and_then(|pages| collapse(memory, end - HUGE_PAGE_BYTES).map(|more| pages + more));
        }
    }
    debug!("the memory is ready, with {} huge pages", huge_pages.unwrap_or(0));
}

/// Makes a huge page; returns how many that makes. `None`: the host has no more memory for such, and is asked no more.
fn collapse(memory: &Mapping, at: usize) -> Option<u32> {
    match memory.collapse(at) {
        Ok(()) => Some(1),
        // From a cgroup at its limit it comes as EBUSY.
        Err(e) if matches!(e.kind(), io::ErrorKind::OutOfMemory | io::ErrorKind::ResourceBusy) => None,
        // Somebody uses the page just now, or the kernel or the file system does not do it.
        Err(_) => Some(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{FrameId, PAGE_SIZE};

    /// KiB that are mapped in huge pages at `address` (proc(5), smaps).
    fn huge_kib(address: usize) -> u64 {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let (_, mapping) = smaps.split_once(&format!("{address:x}-")).expect("it is mapped");
        let line = mapping.lines().find_map(|line| line.strip_prefix("ShmemPmdMapped:")).unwrap_or("0 kB");
        line.trim().strip_suffix("kB").unwrap().trim().parse().unwrap()
    }

    #[test]
    fn memory_in_use_is_put_into_huge_pages_and_keeps_its_bytes() {
        let frames = 7 * HUGE_PAGE_BYTES / 2 / PAGE_SIZE;
        let arena = Arc::new(Arena::anonymous(frames).unwrap());
        let ids = || (0..).map(FrameId).take(frames);
        // SAFETY: frames follow each other, and belong to this test alone.
        ids().for_each(|frame| unsafe { arena.frame(frame).cast::<u32>().write(frame.0 ^ 0x5a5a_5a5a) });
        populate(&arena, &AtomicBool::new(false));
        // SAFETY: as above.
        assert!(ids().all(|frame| unsafe { arena.frame(frame).cast::<u32>().read() } == frame.0 ^ 0x5a5a_5a5a));
        match huge_kib(arena.frame(FrameId(0)).addr()) {
            0 => println!("SKIPPED: this host has no huge pages for shared memory"),
            // Fewer where the kernel was busy with a page.
            kib => assert!(kib <= 6 << 10, "{kib} KiB, where three and a half pages are"),
        }
    }
}
