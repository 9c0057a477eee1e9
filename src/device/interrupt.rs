//! Interrupts to the driver: writes to an eventfd of the front-end, which must not block a worker.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;

/// The call descriptor of a ring (VHOST_USER_SET_VRING_CALL).
#[derive(Debug)]
pub(super) struct Interrupt {
    file: File,
    /// Writes block while the eventfd's counter is full. Most front-ends send a non-blocking one, whose writes fail then.
    blocks: bool,
}

impl Interrupt {
    /// Takes a call descriptor.
    pub fn new(file: File) -> Self {
        // SAFETY: a plain system call on an open descriptor.
        let blocks = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) & libc::O_NONBLOCK == 0 };
        Self { file, blocks }
    }

    /// Interrupts the driver. With the eventfd's counter full there is nothing to do: an interrupt is pending anyway.
    ///
    /// # Errors
    /// The error of write(2).
    pub fn trigger(&mut self) -> io::Result<()> {
        if self.blocks && !self.is_writable() {
            return Ok(());
        }
        self.file.write(&1u64.to_ne_bytes()).map(|_| ())
    }

    fn is_writable(&self) -> bool {
        let mut polled = libc::pollfd { fd: self.file.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
        // SAFETY: poll reads and writes one pollfd at the address given, and this one is a local.
        unsafe { libc::poll(&raw mut polled, 1, 0) == 1 && polled.revents & libc::POLLOUT != 0 }
    }
}
