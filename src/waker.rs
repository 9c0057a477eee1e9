//! Wakes a worker thread. A sleeping worker waits for the eventfd in epoll; a busy one loads a flag, which is cheaper
//! than locking an empty mailbox each time it checks for work.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use crate::sync::{AtomicBool, EFD_CLOEXEC, EFD_NONBLOCK, EventFd, Ordering};

/// An eventfd combined with a flag; see the documentation of the module.
#[derive(Debug)]
pub struct Waker {
    notified: AtomicBool,
    fd: EventFd,
}

impl Waker {
    /// A waker that was not notified.
    ///
    /// # Errors
    /// The error of eventfd(2), for example EMFILE.
    pub fn new() -> io::Result<Self> {
        Ok(Self { notified: AtomicBool::new(false), fd: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)? })
    }

    /// Wakes the worker.
    ///
    /// => Queue the message first: the worker reads the mailbox as soon as the flag is set.
    ///
    /// # Errors
    /// The error of write(2) on the eventfd.
    pub fn notify(&self) -> io::Result<()> {
        self.notified.store(true, Ordering::Release);
        self.fd.write(1)
    }

    /// Returns whether [`Waker::notify`] was called since the last call, and resets the flag. Messages queued before
    /// that notification are visible afterwards.
    pub fn take_notified(&self) -> bool {
        self.notified.load(Ordering::Relaxed) && self.notified.swap(false, Ordering::Acquire)
    }

    /// Makes the eventfd unreadable until the next notification. The flag stays.
    pub fn clear(&self) {
        // EAGAIN: it was not readable, which is the desired state.
        let _ = self.fd.read();
    }
}

impl AsRawFd for Waker {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn a_notification_is_taken_once_and_readable_until_cleared() {
        let waker = Waker::new().unwrap();
        assert!(!waker.take_notified());
        assert_eq!(waker.fd.read().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        waker.notify().unwrap();
        waker.notify().unwrap();
        assert!(waker.take_notified() && !waker.take_notified());
        assert_eq!(waker.fd.read().unwrap(), 2);
        waker.notify().unwrap();
        waker.clear();
        waker.clear();
        assert_eq!(waker.fd.read().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        assert!(waker.take_notified(), "clearing the eventfd keeps the flag");
    }

    #[test]
    fn every_message_queued_before_a_notification_is_found() {
        const MESSAGES: u32 = 100_000;
        let waker = Waker::new().unwrap();
        let (sender, receiver) = channel();
        let deadline = Instant::now() + Duration::from_secs(60);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for message in 0..MESSAGES {
                    sender.send(message).unwrap();
                    waker.notify().unwrap();
                }
            });
            let mut found = 0;
            while found < MESSAGES {
                assert!(Instant::now() < deadline, "{found} of {MESSAGES} messages found");
                if waker.take_notified() {
                    while let Ok(message) = receiver.try_recv() {
                        assert_eq!(message, found);
                        found += 1;
                    }
                }
            }
        });
    }
}
