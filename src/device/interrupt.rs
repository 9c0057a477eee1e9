//! Interrupts to the driver, and errors to the front-end: writes to an eventfd of the front-end, which must not block a
//! worker.

use std::fs::File;
use std::io;

use crate::sys::guarded;

/// The call descriptor of a ring (VHOST_USER_SET_VRING_CALL), or its error descriptor (VHOST_USER_SET_VRING_ERR).
#[derive(Debug)]
pub(super) struct Interrupt {
    file: File,
    /// A write has blocked: no more are made.
    is_blocked: bool,
}

impl Interrupt {
    /// Takes the descriptor.
    pub fn new(file: File) -> Self {
        Self { file, is_blocked: false }
    }

    /// Interrupts the driver. If the eventfd's counter is full, an interrupt is already pending.
    ///
    /// => The front-end can make the eventfd full and blocking at any time. That delays the worker once, for some
    ///    milliseconds.
    ///
    /// # Errors
    /// The error of write(2); [`io::ErrorKind::Interrupted`] for a write that blocked.
    pub fn trigger(&mut self) -> io::Result<()> {
        if self.is_blocked {
            return Ok(());
        }
        match guarded::add_one(&self.file) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {
                self.is_blocked = true;
                Err(e)
            }
            result => result,
        }
    }
}
