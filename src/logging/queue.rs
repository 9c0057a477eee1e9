//! The queue between the threads that log and the thread that writes. It is bounded: if standard error is blocked (a
//! full pipe, a stopped journal), further lines are dropped and counted.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Most queued lines.
const LINES_MAX: usize = 1024;
/// How often the writer checks for counts to write.
const TICK: Duration = Duration::from_millis(250);
/// Pause before another attempt if standard error returns EAGAIN.
const RETRY: Duration = Duration::from_millis(10);

/// See the module.
#[derive(Debug)]
pub(super) struct LogQueue {
    state: Mutex<LogQueueState>,
    /// Signalled when there is a line.
    filled: Condvar,
    /// Signalled when every line is written.
    drained: Condvar,
    running: AtomicBool,
}

#[derive(Debug)]
struct LogQueueState {
    lines: VecDeque<Vec<u8>>,
    /// Whether the writer has a line that is not written yet.
    writing: bool,
    dropped: u64,
}

impl LogQueue {
    /// An empty queue without a writer.
    pub const fn new() -> Self {
        let state = LogQueueState { lines: VecDeque::new(), writing: false, dropped: 0 };
        Self {
            state: Mutex::new(state),
            filled: Condvar::new(),
            drained: Condvar::new(),
            running: AtomicBool::new(false),
        }
    }

    fn lock(&self) -> MutexGuard<'_, LogQueueState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a thread writes queued lines, or will.
    fn is_running(&self) -> bool {
        self.running.load(Ordering::Acquire)
    }

    /// Adds a line, or counts it as dropped. Does not wait for the writer; without one, writes the line itself.
    pub fn push(&self, line: Vec<u8>) {
        if !self.is_running() {
            return write_to_stderr(&line);
        }
        let mut state = self.lock();
        if state.lines.len() < LINES_MAX {
            state.lines.push_back(line);
            self.filled.notify_one();
        } else {
            state.dropped += 1;
        }
    }

    /// Number of lines dropped since the last call; 0 while the queue has no room for a line that reports it.
    pub fn take_dropped(&self) -> u64 {
        let mut state = self.lock();
        if state.lines.len() < LINES_MAX { std::mem::take(&mut state.dropped) } else { 0 }
    }

    /// Waits until every line is written, or until `timeout` has passed.
    pub fn flush(&self, timeout: Duration) {
        let until = Instant::now() + timeout;
        let mut state = self.lock();
        while self.is_running() && (state.writing || !state.lines.is_empty()) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            state = self.drained.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Announces a thread that calls [`LogQueue::run`].
    pub fn start(&self) {
        self.running.store(true, Ordering::Release);
    }

    /// Writes lines to standard error until the process ends; calls `tick` a few times a second.
    pub fn run(&self, mut tick: impl FnMut()) {
        let mut next_tick = Instant::now() + TICK;
        loop {
            let mut state = self.lock();
            state.writing = false;
            if state.lines.is_empty() {
                self.drained.notify_all();
                let left = next_tick.saturating_duration_since(Instant::now());
                state = self.filled.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
            }
            let line = state.lines.pop_front();
            state.writing = line.is_some();
            drop(state);
            if let Some(line) = line {
                write_to_stderr(&line);
            }
            if Instant::now() >= next_tick {
                tick();
                next_tick = Instant::now() + TICK;
            }
        }
    }
}

/// Writes a whole line, however long that takes. Gives up if standard error fails.
fn write_to_stderr(mut line: &[u8]) {
    while !line.is_empty() {
        match io::stderr().lock().write(line) {
            Ok(0) => return,
            Ok(written) => line = &line[written..],
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => std::thread::sleep(RETRY),
            // The other end is closed, or its disk is full.
            Err(_) => return,
        }
    }
}
