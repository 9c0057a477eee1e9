//! What tests inject into the daemon: its death between two stores to memory that outlives it, and bugs that the
//! simulator of the daemon must find. In every other build these functions are empty.

#[cfg(test)]
pub use enabled::*;

/// A bug outside the cache that a test can plant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlantedBug {
    /// The inflight region says that chains have completed before the used ring shows them to the driver.
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
}

/// A point before a store to memory that outlives the daemon: in tests the daemon may die here.
#[cfg(not(test))]
#[inline]
pub fn crash_point() {}

/// Whether this bug is planted.
#[cfg(not(test))]
#[inline]
pub const fn planted(_bug: PlantedBug) -> bool {
    false
}

#[cfg(test)]
mod enabled {
    use std::cell::Cell;
    use std::panic::resume_unwind;

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
    pub fn crash_point() {
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

    /// Plants a bug on this thread, or none.
    pub fn plant(bug: Option<PlantedBug>) {
        PLANTED.set(bug);
    }

    impl PlantedBug {
        pub const ALL: [Self; 7] = [
            Self::InflightClearedBeforePublishing,
            Self::ZeroesNotFlushed,
            Self::SwitchNotFlushed,
            Self::ReadCompletesBeforeCopy,
            Self::LedgerBeforeCopy,
            Self::NoticeDropped,
            Self::DrainEndsEarly,
        ];
    }
}

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
    fn one_bug_is_planted_at_a_time() {
        for bug in PlantedBug::ALL {
            plant(Some(bug));
            assert!(PlantedBug::ALL.into_iter().all(|other| planted(other) == (other == bug)));
        }
        plant(None);
        assert!(!PlantedBug::ALL.into_iter().any(planted));
    }
}
