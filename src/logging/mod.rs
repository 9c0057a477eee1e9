//! The log: one line per record on standard error, with time and level, filtered by `GENBLK_LOG`.
//!
//! A thread that logs never waits: it puts its line into a queue (`queue.rs`), and the log's own thread writes it.
//! Repeated lines are counted instead of written (`limit.rs`), so no guest, front-end or failing disk can fill the
//! host's disk with log lines.

mod limit;
mod queue;

use std::backtrace::{Backtrace, BacktraceStatus};
use std::env;
use std::io::{self, Write};
use std::panic::{self, PanicHookInfo};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use env_logger::{Builder, Target};
use log::{LevelFilter, Record, log, warn};

use crate::sandbox::{self, ThreadKind};
use crate::sys::signal::with_all_blocked;
use crate::units::counted;

use limit::{Limiter, LineKind};
use queue::LogQueue;

/// The environment variable that sets the level.
const VARIABLE: &str = "GENBLK_LOG";
/// Target of the lines that report how often another line was repeated; the limit does not count them.
const SUMMARY: &str = "genblk::logging::summary";
/// How long the end of the process waits for a blocked standard error.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

static QUEUE: LogQueue = LogQueue::new();
static LIMITER: Mutex<Option<Limiter>> = Mutex::new(None);

/// Starts the log; called once, before anything else. An invalid level in the variable causes a warning, and the level
/// `info`: a mistake in the environment must not prevent serving disks or printing --help.
pub fn init() {
    let wish = env::var_os(VARIABLE).filter(|wish| !wish.is_empty());
    let level = wish.as_ref().map_or(Some(LevelFilter::Info), |wish| wish.to_str()?.trim().parse().ok());
    // The thread starts before the daemon blocks the signals that it waits for, so it would not inherit that mask.
    let writer = with_all_blocked(|| thread::Builder::new().name("log".to_owned()).spawn(write_lines));
    if writer.is_ok() {
        QUEUE.start();
    }
    Builder::new()
        .filter_level(level.unwrap_or(LevelFilter::Info))
        .target(Target::Pipe(Box::new(ToQueue)))
        .format(|out, record| {
            // A message may contain a path or an error with line breaks. Keep each record on one line, so that part of
            // one record cannot be mistaken for another.
            let message = record.args().to_string().replace('\n', "; ");
            if !is_admitted(record, &message) {
                return Ok(());
            }
            writeln!(out, "{} {:5} {message}", out.timestamp_millis(), record.level())
        })
        .init();
    panic::set_hook(Box::new(report_panic));
    if let Err(e) = writer {
        warn!("cannot start the log's thread ({e}); a blocked standard error will block the daemon");
    }
    if let (None, Some(wish)) = (level, wish) {
        warn!("{VARIABLE}: {wish:?} is not one of off, error, warn, info, debug and trace; using info");
    }
}

/// Writes a line without time and level to standard error, after the lines before it. For the error that ends the
/// process.
pub fn print(line: &str) {
    log_counts();
    QUEUE.push(format!("{line}\n").into_bytes());
    flush();
}

/// Adds a finished line of another process's log, without its line break. Does not wait.
pub fn forward(line: &[u8]) {
    let mut line: Vec<u8> =
        line.iter().map(|byte| if byte.is_ascii_control() && *byte != b'\t' { b'?' } else { *byte }).collect();
    line.push(b'\n');
    QUEUE.push(line);
}

/// Waits until the lines so far are written, or until standard error has taken none for a second.
pub fn flush() {
    log_counts();
    QUEUE.flush(FLUSH_TIMEOUT);
}

/// Logs how many lines were counted so far and not written.
fn log_counts() {
    // Do not wait: a thread that panics within the limiter holds its lock.
    let counted = LIMITER.try_lock().ok().and_then(|mut limiter| Some(limiter.as_mut()?.take_all()));
    for (level, summary) in counted.unwrap_or_default() {
        log!(target: SUMMARY, level, "{summary}");
    }
}

/// Target of env_logger's pipe: each write is one line.
struct ToQueue;

impl Write for ToQueue {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if !line.is_empty() {
            QUEUE.push(line.to_vec());
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Calls `act` with the limiter.
fn with_limiter<T>(act: impl FnOnce(&mut Limiter) -> T) -> T {
    // A thread that panicked within the limiter must not prevent other threads from logging.
    let mut limiter = LIMITER.lock().unwrap_or_else(PoisonError::into_inner);
    act(limiter.get_or_insert_default())
}

/// Whether a record is written; otherwise it is counted.
fn is_admitted(record: &Record<'_>, message: &str) -> bool {
    if record.target() == SUMMARY {
        return true;
    }
    let kind = LineKind::new(record.level(), record.file_static().zip(record.line()), message);
    with_limiter(|limiter| limiter.admit(kind, message, Instant::now()))
}

/// Body of the log's thread: writes lines, and the counts of those that were not written.
fn write_lines() {
    let mut is_confined = false;
    QUEUE.run(|| {
        // The log starts before it is decided whether the process has a sandbox.
        if !is_confined && sandbox::is_on() {
            is_confined = true;
            sandbox::confine(ThreadKind::Log);
        }
        for (level, summary) in with_limiter(|limiter| limiter.take_due(Instant::now())) {
            log!(target: SUMMARY, level, "{summary}");
        }
        let lost = QUEUE.take_dropped();
        if lost > 0 {
            let lines = counted(lost, "line");
            warn!(target: SUMMARY, "dropped {lines} of the log: standard error was blocked");
        }
    });
}

/// Reports a panic through the queue: standard error may be blocked, and that must not prevent the process from ending.
fn report_panic(info: &PanicHookInfo<'_>) {
    let current = thread::current();
    let name = current.name().unwrap_or("without a name");
    print(&format!("thread '{name}' {info}"));
    // A backtrace needs symbols from files, which a confined thread cannot open.
    let backtrace = if sandbox::is_on() { Backtrace::disabled() } else { Backtrace::capture() };
    if backtrace.status() == BacktraceStatus::Captured {
        print(&backtrace.to_string());
    }
}
