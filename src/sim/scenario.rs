//! What chance decides about a world before it begins: the cache's shape, the guest's and the disk's ways.

use crate::cache::{ErrorPolicy, PolicyKind, Settings};
use crate::prng::Prng;
use crate::units::OpKind;

/// What chance decided about a world as a whole.
#[derive(Debug)]
pub(super) struct Scenario {
    pub fault_percent: u64,
    pub latency_us_max: u64,
    pub requests_max: usize,
    pub overlap: bool,
    /// Daemons die.
    pub daemon_crashes: bool,
    /// Steps between two deaths, on average; none where daemons live, and in the end.
    pub steps_per_death: Option<u64>,
    /// The front-end hands a successor what was in flight. Without that it is lost, and the guest never hears of it.
    pub replays: bool,
    /// Of the guest's requests, those that zero a range.
    pub zero_percent: u64,
    /// Operations that fail each time, and do not heal before the end.
    pub broken: &'static [FailureClass],
}

impl Scenario {
    pub fn new(prng: &mut Prng) -> Self {
        let daemon_crashes = prng.percent(50);
        Self {
            fault_percent: prng.pick(&[0, 0, 1, 5, 30]),
            latency_us_max: prng.pick(&[10, 1000, 100_000]),
            requests_max: prng.pick(&[1, 4, 32]),
            overlap: prng.percent(50),
            daemon_crashes,
            steps_per_death: daemon_crashes.then_some(prng.pick(&[30, 300])),
            replays: prng.percent(70),
            zero_percent: prng.pick(&[0, 5, 30]),
            broken: &[],
        }
    }
}

/// Operations by what fails them together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FailureClass {
    Read,
    Write,
    Sync,
    Allocate,
    Range,
}

impl FailureClass {
    pub fn of(kind: OpKind) -> Option<Self> {
        match kind {
            OpKind::Read => Some(Self::Read),
            OpKind::Write => Some(Self::Write),
            OpKind::Sync => Some(Self::Sync),
            OpKind::Allocate => Some(Self::Allocate),
            OpKind::Zero { .. } | OpKind::Discard => Some(Self::Range),
            OpKind::Map => None,
        }
    }
}

/// Ways in which a disk breaks for good.
pub(super) const BREAKAGES: [&[FailureClass]; 7] = [
    &[FailureClass::Read],
    &[FailureClass::Read, FailureClass::Write],
    &[FailureClass::Write],
    &[FailureClass::Sync],
    &[FailureClass::Allocate],
    &[FailureClass::Write, FailureClass::Allocate],
    &[FailureClass::Write, FailureClass::Sync, FailureClass::Allocate, FailureClass::Range],
];

/// A cache's shape, by chance.
pub(super) fn settings(prng: &mut Prng) -> Settings {
    let frames = prng.pick(&[12, 24, 48, 160]);
    let (sparse, allocate) = (prng.percent(60), prng.percent(50));
    let block_sectors = prng.pick(&[1, 1, 2, 8]);
    // A store never has a block that the image's end cuts.
    let image_sectors = prng.between(40, 3000).next_multiple_of(u64::from(block_sectors));
    Settings {
        frames,
        image_sectors,
        block_sectors,
        sparse,
        // A device has none, and nothing to reserve.
        can_map: sparse || allocate || prng.percent(50),
        cluster_pages_max: prng.pick(&[1, 3, 8, 256]),
        retain: prng.percent(90),
        policy: prng.pick(&[PolicyKind::S3Fifo, PolicyKind::Lru]),
        readahead_pages_max: prng.pick(&[0, 4, 64, 512]),
        flush_target_us: 250_000,
        dirty_pages_max: prng.pick(&[frames / 4, frames / 2, frames]),
        dirty_age_us: prng.pick(&[10_000, 1_000_000]),
        allocate,
        on_error: prng.pick(&[ErrorPolicy::Report, ErrorPolicy::Report, ErrorPolicy::Hold, ErrorPolicy::Stop]),
        on_full: prng.pick(&[ErrorPolicy::Report, ErrorPolicy::Hold, ErrorPolicy::Stop]),
        hold_us: prng.pick(&[10_000, 10_000_000]),
    }
}
