//! Faults that tests inject into the daemon: its death between two stores to memory that outlives it, and bugs that the
//! tests must find. In every other build these functions are empty.

#[cfg(any(test, fuzzing))]
pub use enabled::*;

/// A bug that a test can plant. The simulators have a seed for each (`FOUND_BY`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlantedBug {
    // In the cache.
    /// The end of write-back marks a page clean although a guest wrote it again meanwhile.
    RewriteIsLost,
    /// A read-in overwrites sectors that the guest has written.
    ReadInOverwritesDirty,
    /// A failed write to the store counts as a success.
    WriteErrorIgnored,
    /// A page under write-back is published as clean: a crash loses it.
    WritebackPublishedAsClean,
    /// A page that no Sync has covered is published as clean: the next daemon does not write it again if its Sync
    /// fails.
    UnsyncedPublishedAsClean,
    /// A zeroed range is not recorded for the next daemon, which then does not zero it again if this daemon's Sync has
    /// failed.
    ZeroNotPublished,
    /// Write-back that fails for lack of space counts as a success.
    NoSpaceIgnored,
    /// A write into a hole does not wait for the allocation of its space.
    WriteSkipsAllocation,
    /// Under the error policy `hold`, requests wait forever.
    HoldNeverEnds,
    /// Time in which the daemon was stopped (SIGSTOP) counts as time in which requests were held.
    StopUsesUpHold,
    /// Under the error policy `hold`, requests fail immediately.
    HoldFailsAtOnce,
    /// A failed Sync puts only operations in doubt that completed before it was sent.
    SyncDoubtsTooLittle,
    /// A Sync that reports that the store has lost writes puts nothing in doubt.
    LostIsNotDoubted,
    /// A newer change does not wait for the end of the quarantine after a connection has broken.
    SuspectsNotHeld,
    /// A connection to a server that may have been restarted is taken for the first one.
    RestartNotReported,
    /// A failed write, which may be the sign of a reset, puts nothing else in doubt.
    FailedWriteDoubtsNothing,
    /// A write that was in flight when a Sync failed counts as stored.
    InFlightIsTrusted,
    /// A Sync counts when it succeeds, although the result of a write in flight may still reveal an earlier reset.
    SyncCountsAtOnce,
    /// A zero is published when it completes, and not before it starts.
    ZeroIsNotedLate,
    /// A discarded range is not recorded for the next daemon.
    DiscardIsNotNoted,
    /// A range whose zeroing no Sync covers is read from the store.
    ZeroesAreReadFromStore,
    /// The age limit does not apply to pages that are written but not synced.
    AgeForgetsUnsynced,
    /// Requests that wait for space are resumed in every turn from the end of the pause on: a worker spins while the
    /// allocation is in flight.
    SpaceIsRetriedEveryTurn,
    /// Sectors beyond the end of the image are published as dirty.
    TailIsPublished,

    // Around the cache.
    /// Chains are marked complete in the inflight region before the used ring shows them to the driver.
    InflightClearedBeforePublishing,
    /// In write-through mode a WRITE ZEROES completes before it is stable.
    ZeroesNotFlushed,
    /// When the guest turns write-through on, writes that completed before are not made stable.
    SwitchNotFlushed,
    /// A read completes before its bytes are in guest memory.
    ReadCompletesBeforeCopy,
    /// The ledger records the sectors of a write before the bytes are in the frame.
    LedgerBeforeCopy,
    /// A notice for another worker is dropped.
    NoticeDropped,
    /// A ring counts as drained while requests are in flight.
    DrainEndsEarly,
    /// Abandoned workers end while they have requests that are in no inflight region.
    AbandonLosesUntracked,
    /// A long request whose ring stops is not returned to the driver.
    LongRequestForgotten,
    /// A cache of an earlier tenure counts as one of the image's last tenure.
    GenerationNotCompared,
    /// All changes of the image that the host reports count as changes by the last daemon.
    TokenNotCompared,
    /// Every cache of an image's last tenure counts as belonging to the image in its present state.
    ProofSkipped,
    /// Clean pages are not compared with the image.
    SampleSkipped,
    /// The hash of a page stays in the ledger while the daemon changes that page of the image.
    SamplesKept,
}

/// A point before a store to memory that outlives the daemon: in tests the daemon may die here.
#[cfg(not(any(test, fuzzing)))]
#[inline]
pub fn crash_point() {}

/// Whether this bug is planted.
#[cfg(not(any(test, fuzzing)))]
#[inline]
pub const fn planted(_bug: PlantedBug) -> bool {
    false
}

#[cfg(any(test, fuzzing))]
#[cfg_attr(not(test), allow(dead_code, reason = "fuzzers use only a part of it"))]
mod enabled;

#[cfg(test)]
mod tests {
    use std::panic::catch_unwind;

    use super::*;

    #[test]
    fn the_daemon_dies_once_at_the_chosen_crash_point() {
        crash_after(Some(1));
        crash_point();
        assert!(catch_unwind(crash_point).unwrap_err().is::<DaemonDied>());
        crash_point();
        crash_after(Some(0));
        crash_after(None);
        crash_point();
    }

    #[test]
    fn a_planted_bug_is_removed_even_if_its_run_panics() {
        use PlantedBug::{DrainEndsEarly, NoticeDropped};
        let seen = || [planted(NoticeDropped), planted(DrainEndsEarly)];
        assert_eq!(run_with(Some(NoticeDropped), seen).unwrap(), [true, false]);
        assert!(run_with(Some(DrainEndsEarly), || panic!("the bug is found")).is_err());
        assert_eq!(seen(), [false, false]);
    }

    #[test]
    fn an_unwinding_thread_passes_crash_points() {
        struct PassesCrashPoint;
        impl Drop for PassesCrashPoint {
            fn drop(&mut self) {
                crash_point();
            }
        }

        let violation = run_with(None, || {
            let _dropped = PassesCrashPoint;
            crash_after(Some(0));
            panic!("a violation of a guarantee");
        });
        let payload =
            violation.map(|()| "no panic").unwrap_or_else(|panic| *panic.downcast().expect("the first panic"));
        assert_eq!(payload, "a violation of a guarantee");
    }
}
