//! The limit on repeated log lines: the first is written, the others are counted, and the count is written once a
//! second.
//!
//! Lines are of one kind if the same statement logged them for the same device. So a flood of one device or statement
//! hides no lines of another. Within one kind, different lines are written, up to a number that no single event
//! reaches. If a kind continues to produce different lines, one of them is written per second.

use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::mem;
use std::time::{Duration, Instant};

use log::Level;

/// How long lines are counted before the count is written.
const WINDOW: Duration = Duration::from_secs(1);
/// How often the same warning or error is written in a window. Information about successive events, such as front-ends
/// that connect, is written more often.
const WARNINGS_MAX: u32 = 1;
const INFOS_MAX: u32 = 8;
/// How many different lines of a kind are written in a burst, and how many more in each further window.
const DIFFERENT_LINES_MAX: usize = 16;
const DIFFERENT_LINES_PER_WINDOW: usize = 1;
/// How many different counted lines of a kind are recorded per window.
const COUNTED_LINES_MAX: usize = 64;

/// The properties that lines of one kind share.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct LineKind {
    level: Level,
    /// File and line of the statement.
    statement: Option<(&'static str, u32)>,
    /// The line's prefix up to the first colon: the device.
    device: String,
}

impl LineKind {
    /// The kind of `message`, logged by `statement` (file and line).
    pub fn new(level: Level, statement: Option<(&'static str, u32)>, message: &str) -> Self {
        let device = message.split_once(": ").map_or("", |(device, _)| device).to_owned();
        Self { level, statement, device }
    }

    /// How often the same line is written in a window.
    fn repeats_max(&self) -> u32 {
        if self.level <= Level::Warn { WARNINGS_MAX } else { INFOS_MAX }
    }
}

/// The lines of one kind during one window.
#[derive(Debug)]
struct Window {
    since: Instant,
    /// How many different lines may still be written.
    credit: usize,
    /// How often each line was written, by its hash.
    written: HashMap<u64, u32>,
    /// How many lines were counted, and the last of them.
    counted: u64,
    last: String,
    /// Hashes of lines that were counted in this window and in the previous one; such lines are counted again.
    repeated: HashSet<u64>,
    repeated_before: HashSet<u64>,
}

impl Window {
    fn new(since: Instant, credit: usize, repeated_before: HashSet<u64>) -> Self {
        Self {
            since,
            credit,
            written: HashMap::new(),
            counted: 0,
            last: String::new(),
            repeated: HashSet::new(),
            repeated_before,
        }
    }
}

impl Window {
    /// The line that reports how many lines were counted.
    fn summary(&self, kind: &LineKind) -> Option<(Level, String)> {
        let Self { counted, last, .. } = self;
        let lines = if *counted == 1 { "line" } else { "lines" };
        (*counted > 0).then(|| (kind.level, format!("{last} ({counted} more {lines} like this in the last second)")))
    }
}

/// The windows of all kinds; see the module.
#[derive(Debug, Default)]
pub(super) struct Limiter(HashMap<LineKind, Window>);

impl Limiter {
    /// Whether `message` is written now; if not, it is counted.
    pub fn admit(&mut self, kind: LineKind, message: &str, now: Instant) -> bool {
        // Debug and trace are enabled to see every line.
        if kind.level > Level::Info {
            return true;
        }
        let repeats_max = kind.repeats_max();
        let window = self.0.entry(kind).or_insert_with(|| Window::new(now, DIFFERENT_LINES_MAX, HashSet::new()));
        let mut hasher = DefaultHasher::new();
        message.hash(&mut hasher);
        let line = hasher.finish();
        let is_new = !window.written.contains_key(&line);
        let has_room = !is_new || window.credit > 0;
        if has_room && !window.repeated_before.contains(&line) {
            window.credit -= usize::from(is_new);
            let times = window.written.entry(line).or_default();
            if *times < repeats_max {
                *times += 1;
                return true;
            }
        }
        window.counted += 1;
        message.clone_into(&mut window.last);
        if window.repeated.len() < COUNTED_LINES_MAX {
            window.repeated.insert(line);
        }
        false
    }

    /// Closes expired windows; returns a summary line for each that counted lines.
    pub fn take_due(&mut self, now: Instant) -> Vec<(Level, String)> {
        let mut summaries = Vec::new();
        self.0.retain(|kind, window| {
            if now.saturating_duration_since(window.since) < WINDOW {
                return true;
            }
            let credit = (window.credit + DIFFERENT_LINES_PER_WINDOW).min(DIFFERENT_LINES_MAX);
            let over = mem::replace(window, Window::new(now, credit, HashSet::new()));
            summaries.extend(over.summary(kind));
            window.repeated_before = over.repeated;
            over.counted > 0 || credit < DIFFERENT_LINES_MAX
        });
        summaries
    }

    /// Closes all windows; returns a summary line for each that counted lines.
    pub fn take_all(&mut self) -> Vec<(Level, String)> {
        let windows = mem::take(&mut self.0);
        windows.iter().filter_map(|(kind, window)| window.summary(kind)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(level: Level, message: &str) -> LineKind {
        LineKind::new(level, Some(("a.rs", 1)), message)
    }

    #[test]
    fn a_flood_of_equal_lines_is_logged_as_one_line_and_a_count_each_second() {
        let (mut limiter, start) = (Limiter::default(), Instant::now());
        let mut lines = 0;
        for ms in 0..3000 {
            let now = start + Duration::from_millis(ms);
            let written = (0..100).filter(|_| limiter.admit(kind(Level::Warn, "d: lost"), "d: lost", now)).count();
            lines += written + limiter.take_due(now).len();
        }
        let rest = limiter.take_due(start + Duration::from_secs(4));
        assert_eq!(lines, 3, "one line, and a count after each of two seconds");
        assert_eq!(rest.len(), 1);
        assert_eq!(rest[0].1, "d: lost (99900 more lines like this in the last second)");
        assert_eq!(limiter.take_due(start + Duration::from_secs(5)), [], "the flood is over");
        assert!(limiter.admit(kind(Level::Warn, "d: lost"), "d: lost", start + Duration::from_secs(6)));
    }

    #[test]
    fn a_flood_suppresses_only_lines_of_its_own_kind() {
        let (mut limiter, now) = (Limiter::default(), Instant::now());
        let mut admit = |kind: LineKind, message| limiter.admit(kind, message, now);
        for _ in 0..1000 {
            admit(kind(Level::Error, "a: lost"), "a: lost");
        }
        assert!(admit(kind(Level::Error, "b: lost"), "b: lost"), "another device");
        assert!(admit(kind(Level::Error, "a: gone"), "a: gone"), "another text of the same statement");
        assert!(admit(LineKind::new(Level::Error, Some(("a.rs", 2)), "a: lost"), "a: lost"), "another statement");
    }

    #[test]
    fn a_flood_of_different_lines_is_bounded() {
        let (mut limiter, now) = (Limiter::default(), Instant::now());
        let admit = |n: u32| {
            let message = format!("d: the chain at descriptor {n} is broken");
            limiter.admit(kind(Level::Error, &message), &message, now)
        };
        assert_eq!((0..1000).map(admit).filter(|&written| written).count(), DIFFERENT_LINES_MAX);
    }

    #[test]
    fn a_message_with_varying_values_is_logged_once_a_second() {
        let (mut limiter, start) = (Limiter::default(), Instant::now());
        let mut written = 0;
        for second in 0..20 {
            let now = start + Duration::from_secs(second);
            limiter.take_due(now);
            let admit = |n: u64| {
                let message = format!("d: the chain at descriptor {} is broken", second * 1000 + n);
                limiter.admit(kind(Level::Error, &message), &message, now)
            };
            written += (0..1000).map(admit).filter(|&written| written).count();
        }
        assert_eq!(written, DIFFERENT_LINES_MAX + 19 * DIFFERENT_LINES_PER_WINDOW);
        // A pause earns back what was spent.
        for second in 20..60 {
            limiter.take_due(start + Duration::from_secs(second));
        }
        assert!(limiter.0.is_empty(), "nothing is remembered of a flood that is long over");
    }

    #[test]
    fn counts_of_suppressed_lines_are_logged_at_the_end() {
        let (mut limiter, now) = (Limiter::default(), Instant::now());
        for _ in 0..5 {
            limiter.admit(kind(Level::Warn, "d: lost"), "d: lost", now);
        }
        let told = limiter.take_all();
        assert_eq!(told, [(Level::Warn, "d: lost (4 more lines like this in the last second)".to_owned())]);
        assert_eq!(limiter.take_all(), []);
    }

    #[test]
    fn a_few_equal_events_and_all_debug_lines_are_logged() {
        let (mut limiter, now) = (Limiter::default(), Instant::now());
        let mut written = |level, times| {
            let message = "d: front-end connected";
            (0..times).filter(|_| limiter.admit(kind(level, message), message, now)).count()
        };
        assert_eq!(written(Level::Info, 5), 5);
        assert_eq!(written(Level::Debug, 500), 500);
        assert_eq!(written(Level::Info, 500), 3);
    }
}
