//! When to log that something still takes long: after 5 s, and then at growing intervals.

use std::time::Duration;

/// Age of the first line.
pub(super) const FIRST: Duration = Duration::from_secs(5);
/// Longest time between two lines.
const PAUSE_MAX: Duration = Duration::from_secs(600);

/// The schedule of log lines about one wait: at 5, 10, 20, 40 s and so on, at least every ten minutes.
#[derive(Debug)]
pub(super) struct Reminder {
    next: Duration,
}

impl Reminder {
    /// No line was logged yet.
    pub fn new() -> Self {
        Self { next: FIRST }
    }

    /// Whether a wait of this age is to be logged now.
    pub fn is_due(&mut self, age: Duration) -> bool {
        let is_due = age >= self.next;
        while self.next <= age {
            self.next += self.next.min(PAUSE_MAX);
        }
        is_due
    }

    /// Whether a line was logged.
    pub fn was_due(&self) -> bool {
        self.next > FIRST
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reminder_intervals_grow_to_ten_minutes() {
        let mut reminder = Reminder::new();
        let due = |seconds: &u64| reminder.is_due(Duration::from_secs(*seconds));
        let seconds: Vec<u64> = (0..2500).filter(due).collect();
        assert_eq!(seconds, [5, 10, 20, 40, 80, 160, 320, 640, 1240, 1840, 2440]);
    }

    #[test]
    fn a_wait_noticed_late_is_logged_once() {
        let mut reminder = Reminder::new();
        assert!(!reminder.was_due());
        assert!(reminder.is_due(Duration::from_secs(3600)) && reminder.was_due());
        assert!(!reminder.is_due(Duration::from_secs(3601)));
    }
}
