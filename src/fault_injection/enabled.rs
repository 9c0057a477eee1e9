//! The functions as tests and fuzzers have them.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::thread;

use super::PlantedBug;

thread_local! {
    /// How many more crash points the daemon passes before it dies.
    static POINTS_LEFT: Cell<Option<u64>> = const { Cell::new(None) };
    static PLANTED: Cell<Option<PlantedBug>> = const { Cell::new(None) };
}

/// The payload of the panic by which the daemon on this thread dies.
#[derive(Debug)]
pub struct DaemonDied;

/// A point before a store to memory that outlives the daemon. Dies here with a panic of [`DaemonDied`] if
/// [`crash_after`] says so.
///
/// => Does nothing while the thread unwinds: a second panic would end the whole process, and no seed would be named.
pub fn crash_point() {
    if thread::panicking() {
        return;
    }
    match POINTS_LEFT.get() {
        None => {}
        Some(0) => {
            POINTS_LEFT.set(None);
            // Not a failure of a test: no message.
            resume_unwind(Box::new(DaemonDied));
        }
        Some(left) => POINTS_LEFT.set(Some(left - 1)),
    }
}

/// Lets the daemon on this thread die after `points` more crash points; `None`: not at all.
pub fn crash_after(points: Option<u64>) {
    POINTS_LEFT.set(points);
}

/// Whether this bug is planted on this thread.
pub fn planted(bug: PlantedBug) -> bool {
    PLANTED.get() == Some(bug)
}

/// Calls `run` with a bug planted on this thread, or none; a panic ends it and is the result.
///
/// => Afterwards no bug is planted and no death is due.
pub fn run_with<T>(bug: Option<PlantedBug>, run: impl FnOnce() -> T) -> thread::Result<T> {
    PLANTED.set(bug);
    let result = catch_unwind(AssertUnwindSafe(run));
    PLANTED.set(None);
    crash_after(None);
    result
}
