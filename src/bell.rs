//! What calls a worker thread. One that sleeps hears it in epoll; one that is at work looks at a flag, which costs it a
//! load where an empty mailbox would cost it a lock, at each of its looks for work.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// See the module.
#[derive(Debug)]
pub struct Bell {
    rung: AtomicBool,
    fd: EventFd,
}

impl Bell {
    /// A bell that nobody has rung.
    ///
    /// # Errors
    /// The host's, which has no descriptor to give.
    pub fn new() -> io::Result<Self> {
        Ok(Self { rung: AtomicBool::new(false), fd: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)? })
    }

    /// Rings it.
    ///
    /// => First put down what the worker is to find.
    ///
    /// # Errors
    /// The host's, if it can't wake a worker that sleeps.
    pub fn ring(&self) -> io::Result<()> {
        self.rung.store(true, Ordering::Release);
        self.fd.write(1)
    }

    /// Whether it has been rung since the last look; what was put down before that is seen now.
    pub fn was_rung(&self) -> bool {
        self.rung.load(Ordering::Relaxed) && self.rung.swap(false, Ordering::Acquire)
    }

    /// The descriptor is not readable any more, until the next ring.
    pub fn hush(&self) {
        // Nothing to read is no harm: it is not readable.
        let _ = self.fd.read();
    }
}

impl AsRawFd for Bell {
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
    fn a_ring_is_seen_once_and_readable_until_it_is_hushed() {
        let bell = Bell::new().unwrap();
        assert!(!bell.was_rung());
        assert_eq!(bell.fd.read().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        bell.ring().unwrap();
        bell.ring().unwrap();
        assert!(bell.was_rung() && !bell.was_rung());
        assert_eq!(bell.fd.read().unwrap(), 2);
        bell.ring().unwrap();
        bell.hush();
        bell.hush();
        assert_eq!(bell.fd.read().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        assert!(bell.was_rung(), "hushed and yet to be looked at");
    }

    #[test]
    fn who_looks_finds_all_that_was_put_down() {
        const MESSAGES: u32 = 100_000;
        let bell = Bell::new().unwrap();
        let (sender, receiver) = channel();
        let deadline = Instant::now() + Duration::from_secs(60);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for message in 0..MESSAGES {
                    sender.send(message).unwrap();
                    bell.ring().unwrap();
                }
            });
            let mut found = 0;
            while found < MESSAGES {
                assert!(Instant::now() < deadline, "{found} of {MESSAGES} messages found");
                if bell.was_rung() {
                    while let Ok(message) = receiver.try_recv() {
                        assert_eq!(message, found);
                        found += 1;
                    }
                }
            }
        });
    }
}
