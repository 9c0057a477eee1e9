//! How often, and how soon, a disk process that dies is restarted.
//!
//! After the first death it is restarted immediately. If a front-end makes its process die repeatedly, for example by
//! truncating its memory file, the pauses grow, and at last the process is not restarted: such a front-end must neither
//! keep a processor busy nor fill the log.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Time window in which deaths are counted.
const WINDOW: Duration = Duration::from_secs(60);
/// Pause before the second start in a window; each further one is twice as long.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(10);

/// The deaths of a device's process.
#[derive(Debug)]
pub(super) struct Restarts {
    /// Most starts in a window.
    burst: u32,
    deaths: VecDeque<Instant>,
}

impl Restarts {
    /// A record without deaths.
    pub fn new(burst: u32) -> Self {
        Self { burst, deaths: VecDeque::new() }
    }

    /// Records a death; returns the pause before the next start. `None`: it has died too often.
    pub fn after_death(&mut self, now: Instant) -> Option<Duration> {
        while self.deaths.front().is_some_and(|&death| now.duration_since(death) >= WINDOW) {
            self.deaths.pop_front();
        }
        let before = u32::try_from(self.deaths.len()).unwrap_or(u32::MAX);
        if before >= self.burst {
            return None;
        }
        self.deaths.push_back(now);
        Some(match before {
            0 => Duration::ZERO,
            before => (PAUSE_MIN * 2u32.saturating_pow(before - 1)).min(PAUSE_MAX),
        })
    }

    /// Forgets all deaths: the operator has resumed the device.
    pub fn forget(&mut self) {
        self.deaths.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn restart_pauses_grow_within_a_burst_and_reset_after_a_window() {
        let mut restarts = Restarts::new(5);
        let begin = Instant::now();
        let mut die_at = |seconds: u64| restarts.after_death(begin + Duration::from_secs(seconds));
        let pauses: Vec<_> = (0..6).map(&mut die_at).map(|pause| pause.map(|pause| pause.as_millis())).collect();
        assert_eq!(pauses, [Some(0), Some(100), Some(200), Some(400), Some(800), None]);
        assert_eq!(die_at(61), Some(Duration::from_millis(400)), "the first two have passed");
        assert_eq!(die_at(200), Some(Duration::ZERO));
        restarts = Restarts::new(0);
        assert_eq!(restarts.after_death(begin), None);
        restarts = Restarts::new(1);
        assert_eq!(restarts.after_death(begin), Some(Duration::ZERO));
        restarts.forget();
        assert_eq!(restarts.after_death(begin), Some(Duration::ZERO));
    }
}
