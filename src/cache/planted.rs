//! Deliberate bugs in the cache, for tests to plant: the simulator must find each. Outside tests there are none.

/// A bug to plant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PlantedBug {
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
    /// A zeroed range is not published: the next daemon does not zero it again if its Sync fails.
    ZeroNotPublished,
    /// Write-back that fails for lack of space counts as a success.
    NoSpaceIgnored,
    /// A write into a hole does not wait for the allocation of its space.
    WriteSkipsAllocation,
    /// Under the error policy `hold`, requests wait for ever.
    HoldNeverEnds,
    /// Under the error policy `hold`, requests fail at once.
    HoldFailsAtOnce,
    /// A failed Sync puts in doubt only what completed before it was sent.
    SyncDoubtsTooLittle,
    /// A failed write, which may be the sign of a reset, puts nothing else in doubt.
    FailedWriteDoubtsNothing,
    /// A write that was in flight when a Sync failed counts as stored.
    InFlightIsTrusted,
    /// A zero is published when it completes, and not before it starts.
    ZeroIsNotedLate,
    /// What a zero that no Sync covers has zeroed is read from the store.
    ZeroesAreReadFromStore,
    /// The age limit does not apply to what is written and not synced.
    AgeForgetsUnsynced,
    /// Sectors beyond the end of the image are published as dirty.
    TailIsPublished,
}

/// The bug that is planted in a cache, if there is one.
#[derive(Debug, Default)]
pub(super) struct Planted {
    #[cfg(test)]
    pub bug: Option<PlantedBug>,
}

impl Planted {
    #[cfg(test)]
    pub fn is(&self, bug: PlantedBug) -> bool {
        self.bug == Some(bug)
    }

    /// Whether this bug is planted: never outside tests.
    #[cfg(not(test))]
    #[allow(clippy::unused_self, reason = "in tests the result depends on it")]
    pub const fn is(&self, _bug: PlantedBug) -> bool {
        false
    }
}
