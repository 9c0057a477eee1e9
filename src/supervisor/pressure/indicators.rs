//! The indicators of memory pressure: PSI of the host and of the daemon's control group (proc_pressure(5)), and the
//! memory.high of the control groups that the daemon belongs to.
//!
//! The files are polled. A PSI trigger needs a privilege, and does not report the end of the pressure.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::controller::Sample;
use crate::arena::check_memory;
use crate::sys::cgroup::{self, MemoryLimit};

/// The host's file.
const HOST: &str = "/proc/pressure/memory";
/// A memory.high counts as reached when less than this part of it is left: at the limit the kernel throttles the
/// daemon.
const LIMIT_DIVISOR: u64 = 32;

/// See the module.
#[derive(Debug)]
pub(super) struct Indicators {
    /// The only file to read, for tests.
    only: Option<PathBuf>,
}

/// The total time for which tasks have waited for memory, from the text of a PSI file.
fn stalled_in(text: &str) -> Option<Duration> {
    let some = text.lines().find(|line| line.starts_with("some "))?;
    let total = some.split(' ').find_map(|field| field.strip_prefix("total="))?;
    total.parse().ok().map(Duration::from_micros)
}

fn read(file: &Path) -> Option<(PathBuf, Duration)> {
    Some((file.to_path_buf(), stalled_in(&fs::read_to_string(file).ok()?)?))
}

/// Bytes that are left of a limit before it counts as reached.
fn room_in(limit: &MemoryLimit) -> u64 {
    limit.available_bytes().saturating_sub(limit.limit_bytes / LIMIT_DIVISOR)
}

impl Indicators {
    /// The indicators of this host, or, for tests, the PSI file `only`.
    pub fn new(only: Option<PathBuf>) -> Self {
        Self { only }
    }

    /// The present indicators, and whether this host has any.
    pub fn sample(&self, now: Duration) -> (Sample, bool) {
        let (limits, own) = match &self.only {
            Some(file) => (Vec::new(), Some(file.clone())),
            None => cgroup::pressure_indicators(),
        };
        let host = self.only.is_none().then(|| HOST.into());
        let stalled: Vec<_> = [own, host].into_iter().flatten().filter_map(|file| read(&file)).collect();
        let has_indicators = !stalled.is_empty() || !limits.is_empty();
        let reached_limit = limits.into_iter().find(|limit| room_in(limit) == 0).map(|limit| limit.file);
        (Sample { now, stalled, reached_limit }, has_indicators)
    }

    /// Whether caches may take this much more memory: twice as much must be available.
    pub fn has_room(&self, bytes: u64) -> bool {
        let twice = bytes.saturating_mul(2);
        let limits = if self.only.is_some() { Vec::new() } else { cgroup::pressure_indicators().0 };
        limits.iter().all(|limit| room_in(limit) >= twice) && check_memory(twice).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stall_time_of_proc_pressure_is_parsed() {
        let text = "some avg10=1.05 avg60=0.00 avg300=0.00 total=19200515\nfull avg10=0.00 avg60=0.00 total=7\n";
        assert_eq!(stalled_in(text), Some(Duration::from_micros(19_200_515)));
        for other in ["", "full total=7\n", "some avg10=0.00\n", "some total=x\n"] {
            assert_eq!(stalled_in(other), None, "{other:?}");
        }
    }

    #[test]
    fn a_limit_counts_as_reached_with_a_margin_below_it() {
        let limit = |used_bytes| MemoryLimit { file: "/x".into(), limit_bytes: 3200, used_bytes };
        assert_eq!([0, 3000, 3100, 9000].map(|used| room_in(&limit(used))), [3100, 100, 0, 0]);
    }

    #[test]
    fn a_missing_file_indicates_no_pressure() {
        let indicators = Indicators::new(Some("/nonexistent".into()));
        assert!(!indicators.sample(Duration::ZERO).1 && indicators.has_room(4096) && !indicators.has_room(u64::MAX));
    }
}
