//! Output on the operator's terminal: questions, progress, and paths that may contain any bytes.

use std::io::{self, BufRead, IsTerminal, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use crate::units::counted;

/// How often progress is shown on a terminal, and in a log.
const REDRAW: Duration = Duration::from_millis(200);
const LINE_INTERVAL: Duration = Duration::from_secs(3);
/// Columns of the bar.
const BAR_COLUMNS: u64 = 40;

/// A path without control characters: a file of another user may contain any path, and a terminal executes some control
/// characters.
pub(super) fn visible(path: &Path) -> String {
    let text = path.display().to_string();
    text.chars().map(|c| if c.is_control() { c.escape_default().to_string() } else { c.to_string() }).collect()
}

/// Whether the command runs on a terminal, so that it can ask.
pub(super) fn is_interactive() -> bool {
    io::stdin().is_terminal() && io::stderr().is_terminal()
}

/// Asks a question on the terminal; anything but "y" or "yes" is no.
pub(super) fn confirm(question: &str) -> bool {
    let mut answer = String::new();
    eprint!("{question} [y/N] ");
    let _ = io::stderr().flush();
    let read = io::stdin().lock().read_line(&mut answer);
    read.is_ok() && matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes")
}

/// Shows the progress of a write-back: a bar on a terminal, otherwise a line every few seconds. A write-back that ends
/// immediately shows nothing.
#[derive(Debug)]
pub(super) struct ProgressBar {
    is_terminal: bool,
    next: Instant,
    is_bar_shown: bool,
}

impl ProgressBar {
    pub(super) fn new() -> Self {
        let is_terminal = io::stderr().is_terminal();
        let first = if is_terminal { REDRAW } else { LINE_INTERVAL };
        Self { is_terminal, next: Instant::now() + first, is_bar_shown: false }
    }

    /// `done` of `total` pages are written.
    pub(super) fn show(&mut self, done: u64, total: u64) {
        let now = Instant::now();
        if now < self.next {
            return;
        }
        if self.is_terminal {
            self.next = now + REDRAW;
            self.is_bar_shown = true;
            eprint!("\r{}", bar(done, total));
            let _ = io::stderr().flush();
        } else {
            self.next = now + LINE_INTERVAL;
            eprintln!("wrote {done} of {}", counted(total, "page"));
        }
    }
}

impl Drop for ProgressBar {
    /// Leaves the line of the bar.
    fn drop(&mut self) {
        if self.is_bar_shown {
            eprintln!();
        }
    }
}

fn bar(done: u64, total: u64) -> String {
    let total = total.max(1);
    let filled = usize::try_from(done * BAR_COLUMNS / total).unwrap_or(0);
    let empty = usize::try_from(BAR_COLUMNS).unwrap_or(0) - filled;
    format!(
        "[{}{}] {:3} %, {done} of {}",
        "#".repeat(filled),
        " ".repeat(empty),
        done * 100 / total,
        counted(total, "page")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_progress_bar_shows_the_share_written() {
        assert_eq!(bar(0, 8), format!("[{}]   0 %, 0 of 8 pages", " ".repeat(40)));
        assert_eq!(bar(4, 8), format!("[{}{}]  50 %, 4 of 8 pages", "#".repeat(20), " ".repeat(20)));
        assert_eq!(bar(8, 8), format!("[{}] 100 %, 8 of 8 pages", "#".repeat(40)));
    }

    #[test]
    fn control_characters_of_a_path_are_escaped() {
        assert_eq!(visible(Path::new("/a b/\u{1b}[31m\n")), "/a b/\\u{1b}[31m\\n");
    }
}
