//! The log of a disk process: a pipe whose lines become lines of the daemon's log.
//!
//! Neither end waits for the other. A disk process whose pipe is full drops lines and logs that afterwards
//! (`logging/queue.rs`), and the supervisor's queue does the same. The rate of lines per process is limited, so one
//! process cannot fill the queue for the others.

use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::process::ChildStderr;
use std::time::{Duration, Instant};

use log::warn;

use crate::logging;
use crate::units::counted;

/// Longest line in bytes; the rest of a longer one becomes another line.
const LINE_BYTES_MAX: usize = 8 << 10;
/// Most lines of a process per second, far above its own limit on repeated lines.
const LINES_MAX: u32 = 500;

/// See the module.
#[derive(Debug)]
pub(super) struct LogPipe {
    name: String,
    pipe: ChildStderr,
    /// The beginning of an incomplete line.
    partial_line: Vec<u8>,
    /// When the present second began, and the number of its lines.
    current_second: (Instant, u32),
    dropped: u64,
}

impl LogPipe {
    /// The log pipe of the process of device `name`.
    pub fn new(name: &str, pipe: ChildStderr) -> Self {
        Self { name: name.to_owned(), pipe, partial_line: Vec::new(), current_second: (Instant::now(), 0), dropped: 0 }
    }

    /// Reads from the pipe, which is readable, and forwards its lines; returns whether more may come.
    pub fn forward(&mut self) -> bool {
        let mut bytes = [0; LINE_BYTES_MAX];
        let len = match self.pipe.read(&mut bytes) {
            Ok(0) => {
                let part = std::mem::take(&mut self.partial_line);
                self.log(&part);
                return false;
            }
            Ok(len) => len,
            Err(e) => return e.kind() == io::ErrorKind::Interrupted,
        };
        let mut rest = &bytes[..len];
        while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            let mut line = std::mem::take(&mut self.partial_line);
            line.extend_from_slice(&rest[..end]);
            self.log(&line);
            rest = &rest[end + 1..];
        }
        self.partial_line.extend_from_slice(rest);
        if self.partial_line.len() > LINE_BYTES_MAX {
            let part = std::mem::take(&mut self.partial_line);
            self.log(&part);
        }
        true
    }

    fn log(&mut self, line: &[u8]) {
        if line.is_empty() {
            return;
        }
        if self.current_second.0.elapsed() >= Duration::from_secs(1) {
            let dropped = std::mem::take(&mut self.dropped);
            if dropped > 0 {
                let lines = counted(dropped, "line");
                warn!("{}: dropped {lines} of its process's log: too many per second", self.name);
            }
            self.current_second = (Instant::now(), 0);
        }
        self.current_second.1 += 1;
        if self.current_second.1 > LINES_MAX {
            self.dropped += 1;
            return;
        }
        logging::forward(line);
    }
}

impl AsRawFd for LogPipe {
    fn as_raw_fd(&self) -> RawFd {
        self.pipe.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn excess_log_lines_of_a_process_are_counted() {
        let noise = "yes a line of the log | head -c 4000000 >&2";
        let mut child = Command::new("sh").args(["-c", noise]).stderr(Stdio::piped()).spawn().unwrap();
        let mut pipe = LogPipe::new("disk0", child.stderr.take().unwrap());
        // It has written its lines of this second.
        pipe.current_second = (Instant::now(), LINES_MAX);
        let begun = Instant::now();
        while pipe.forward() {}
        assert!(child.wait().unwrap().success());
        // There are more than 200 000, and 500 of each second are written.
        assert!(pipe.dropped > 100_000 || begun.elapsed() > Duration::from_secs(1), "{} are dropped", pipe.dropped);
    }

    #[test]
    fn an_endless_log_line_is_truncated() {
        let noise = "head -c 100000 /dev/zero >&2";
        let mut child = Command::new("sh").args(["-c", noise]).stderr(Stdio::piped()).spawn().unwrap();
        let mut pipe = LogPipe::new("disk0", child.stderr.take().unwrap());
        // It has written its lines of this second.
        pipe.current_second = (Instant::now(), LINES_MAX);
        while pipe.forward() {
            assert!(pipe.partial_line.len() <= 2 * LINE_BYTES_MAX);
        }
        child.wait().unwrap();
    }
}
