//! Populates the memory of an arena ahead of its use.
//!
//! The kernel zeroes and maps reserved memory at its first access, page by page, which doubles the time of the first
//! read into a frame. A thread accesses all memory ahead of that, and makes the kernel collapse it into huge pages,
//! whether or not the host enables them for shared memory. Nothing waits for the thread: memory that it has not reached
//! is populated at its first access, as without the thread.
//!
//! => The thread has normal priority, and pauses after each step. With a lower priority, it could be suspended for
//!    seconds in the middle of a step on a busy host; threads that map memory, and the end of the process, would wait
//!    for it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use log::debug;

use super::Arena;
use super::mapping::{HUGE_PAGE_BYTES, Mapping};
use crate::sandbox::{self, ThreadKind};
use crate::units::{PAGE_SIZE, counted};

/// Bytes populated by one system call, a fraction of a huge page. Meanwhile the kernel blocks every thread of the
/// process that maps memory, as a front-end's connection does.
const STEP_BYTES: usize = 256 << 10;
/// The pause after a step is as long as the step took, and at most this long: the thread takes about half a
/// processor.
const PAUSE_MAX: Duration = Duration::from_millis(10);

/// The thread that populates an arena; dropping the value stops it.
#[derive(Debug)]
pub struct Populator {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Populator {
    /// Starts populating `arena`; the thread's name and the log contain `name`.
    ///
    /// => Does nothing if the host cannot start a thread, or its kernel is older than Linux 5.14.
    pub fn start(name: &str, arena: &Arc<Arena>) -> Self {
        Self::after(name, arena, true, |_| {})
    }

    /// Like [`Populator::start`], but starts after `prepare` has returned. `prepare` gets a flag that is set when it
    /// must end early.
    ///
    /// => The thread confines itself if `confines`; otherwise it is confined like the caller.
    pub fn after(
        name: &str,
        arena: &Arc<Arena>,
        confines: bool,
        prepare: impl FnOnce(&AtomicBool) + Send + 'static,
    ) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (arena, stop_requested) = (Arc::clone(arena), Arc::clone(&stop));
        let thread_name = format!("memory {name}");
        let name = name.to_owned();
        let run = move || {
            if confines {
                sandbox::confine(ThreadKind::Memory);
            }
            prepare(&stop_requested);
            match populate(&arena, &stop_requested) {
                Ok(huge_pages) => debug!("{name}: populated the cache's memory, {}", counted(huge_pages, "huge page")),
                Err(e) => debug!("{name}: cannot populate the cache's memory ahead of its use: {e}"),
            }
        };
        Self { stop, thread: thread::Builder::new().name(thread_name).spawn(run).ok() }
    }
}

impl Drop for Populator {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It makes no difference if it panicked: the memory is usable either way.
            let _ = thread.join();
        }
    }
}

/// Populates the arena's memory, or a part of it if `stop_requested` is set meanwhile; returns the number of huge pages
/// made.
///
/// # Errors
/// As [`Mapping::populate`].
fn populate(arena: &Arena, stop_requested: &AtomicBool) -> io::Result<u64> {
    let memory = &arena.memory;
    let mut huge_pages = 0;
    let mut has_room = true;
    for at in (0..memory.bytes()).step_by(STEP_BYTES) {
        if stop_requested.load(Ordering::Relaxed) {
            break;
        }
        let begun = Instant::now();
        let next = at + STEP_BYTES;
        // A part without memory must not get any.
        let is_reserved = arena.with_reserved(|parts| {
            for part in parts {
                let (first, end) = (at.max(part.start), next.min(part.end));
                if first < end {
                    let first = first - first % PAGE_SIZE;
                    memory.populate(first, (end - first).next_multiple_of(PAGE_SIZE))?;
                }
            }
            if has_room && next.is_multiple_of(HUGE_PAGE_BYTES) {
                let first = next - HUGE_PAGE_BYTES;
                if parts.iter().any(|part| part.start <= first && next <= part.end) {
                    let made = collapse(memory, first);
                    huge_pages += made.unwrap_or(0);
                    has_room = made.is_some();
                }
            }
            Ok::<bool, io::Error>(at < parts[1].end)
        })?;
        if !is_reserved {
            break;
        }
        thread::sleep(begun.elapsed().min(PAUSE_MAX));
    }
    Ok(huge_pages)
}

/// Collapses the memory at offset `at` into a huge page; returns how many huge pages that made. `None`: the host has no
/// memory for more huge pages, so do not try again.
fn collapse(memory: &Mapping, at: usize) -> Option<u64> {
    match memory.collapse(at) {
        Ok(()) => Some(1),
        // EBUSY (ResourceBusy) is the error of a cgroup at its limit.
        Err(e) if matches!(e.kind(), io::ErrorKind::OutOfMemory | io::ErrorKind::ResourceBusy) => None,
        // A page is in use at the moment, or the kernel or the file system does not support huge pages here.
        Err(_) => Some(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::FrameId;

    /// KiB of the mapping at `address` that are mapped by huge pages (proc(5), smaps).
    fn huge_kib(address: usize) -> u64 {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let (_, mapping) = smaps.split_once(&format!("{address:x}-")).expect("the address is mapped");
        let line = mapping.lines().find_map(|line| line.strip_prefix("ShmemPmdMapped:")).unwrap_or("0 kB");
        line.trim().strip_suffix("kB").unwrap().trim().parse().unwrap()
    }

    #[test]
    fn memory_in_use_keeps_its_bytes_when_it_moves_into_huge_pages() {
        let frames = 7 * HUGE_PAGE_BYTES / 2 / PAGE_SIZE;
        let arena = Arc::new(Arena::anonymous(frames).unwrap());
        let ids = || (0..).map(FrameId).take(frames);
        // SAFETY: a frame holds a u32, and the frames belong to this test alone.
        ids().for_each(|frame| unsafe { arena.frame(frame).cast::<u32>().write(frame.0 ^ 0x5a5a_5a5a) });
        populate(&arena, &AtomicBool::new(false)).unwrap();
        // SAFETY: as above.
        assert!(ids().all(|frame| unsafe { arena.frame(frame).cast::<u32>().read() } == frame.0 ^ 0x5a5a_5a5a));
        match huge_kib(arena.frame(FrameId(0)).addr()) {
            0 => println!("SKIPPED: this host has no huge pages for shared memory"),
            // Less than three huge pages if the kernel was using one of them.
            kib => assert!(kib <= 6 << 10, "{kib} KiB of three and a half huge pages"),
        }
    }
}
