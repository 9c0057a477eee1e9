//! Interrupts to the driver: writes to an eventfd of the front-end, which must not block a worker.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;

use crate::sys::fd::is_nonblocking;
use crate::sys::poll::is_writable;

/// The call descriptor of a ring (VHOST_USER_SET_VRING_CALL).
#[derive(Debug)]
pub(super) struct Interrupt {
    file: File,
    /// Writes block while the eventfd's counter is full. (Most front-ends send a non-blocking eventfd.)
    blocks: bool,
}

impl Interrupt {
    /// Takes a call descriptor.
    pub fn new(file: File) -> Self {
        let blocks = is_nonblocking(&file).is_ok_and(|nonblocking| !nonblocking);
        Self { file, blocks }
    }

    /// Interrupts the driver. With the eventfd's counter full there is nothing to do: an interrupt is pending anyway.
    ///
    /// # Errors
    /// The error of write(2).
    pub fn trigger(&mut self) -> io::Result<()> {
        if self.blocks && !is_writable(self.file.as_raw_fd()) {
            return Ok(());
        }
        self.file.write(&1u64.to_ne_bytes()).map(|_| ())
    }
}
