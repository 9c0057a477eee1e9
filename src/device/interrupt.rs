//! How the guest is called: an eventfd of the front-end's, which is not to make a worker wait.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;

use log::warn;

/// The descriptor by which a ring calls its guest.
#[derive(Debug)]
pub(super) struct Interrupt {
    file: File,
    /// A write waits while it is full. Most front-ends make theirs so that it fails.
    blocks: bool,
}

impl Interrupt {
    /// Looks at what kind of descriptor it is.
    pub fn new(file: File) -> Self {
        // SAFETY: a plain system call on an open descriptor.
        let blocks = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) & libc::O_NONBLOCK == 0 };
        Self { file, blocks }
    }

    /// Calls the guest. If there is no room for another call, those that are there do as well.
    pub fn trigger(&mut self) {
        if self.blocks && !self.has_room() {
            return;
        }
        if let Err(error) = self.file.write(&1u64.to_ne_bytes()) {
            warn!("cannot call the guest: {error}");
        }
    }

    fn has_room(&self) -> bool {
        let mut polled = libc::pollfd { fd: self.file.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
        // SAFETY: one pollfd of ours; it does not wait.
        unsafe { libc::poll(&raw mut polled, 1, 0) == 1 && polled.revents & libc::POLLOUT != 0 }
    }
}
