//! The page cache under the simulator, whose decisions come from the input.

use crate::sim;

/// Steps of a world: enough for its oracle to see write-back and Syncs.
const STEPS: u64 = 300;

/// Runs a world of the simulator that takes its decisions from the input, two bytes each. Its oracle panics.
pub(super) fn cache_ops(input: &[u8]) {
    sim::run_scripted(input, STEPS);
}
