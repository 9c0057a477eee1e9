//! Notifies the front-end that the configuration space has changed (VHOST_USER_BACKEND_CONFIG_CHANGE_MSG), on the
//! channel that it opened for messages of the back-end (SET_BACKEND_REQ_FD).
//!
//! The message has no reply, and sending it never waits: the front-end reads the configuration space on the main
//! channel while it handles the message.
//!
//! QEMU ignores the message while its virtual machine is stopped, and does not read the configuration space when it
//! connects to a new daemon. So the message is repeated when a vring is set up, unless the front-end has read the
//! configuration space since the change, or since it connected.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, MutexGuard};

use log::debug;

use crate::sys::socket::send_with_files;

/// A message without a payload: its number, protocol version 1, and the size of the payload.
const CONFIG_CHANGE: [u32; 3] = [2, 1, 0];

/// See the documentation of the module.
#[derive(Debug, Default)]
pub(super) struct ConfigChange(Mutex<ChannelState>);

#[derive(Debug, Default)]
struct ChannelState {
    channel: Option<UnixStream>,
    /// The front-end may not have the present configuration space.
    is_due: bool,
}

impl ConfigChange {
    fn lock(&self) -> MutexGuard<'_, ChannelState> {
        self.0.lock().expect("no thread panics with the channel locked")
    }

    /// Another front-end has connected.
    pub fn begin_session(&self) {
        *self.lock() = ChannelState { channel: None, is_due: true };
    }

    /// The front-end opens the channel, or closes it.
    pub fn set_channel(&self, file: Option<File>) {
        self.lock().channel = file.map(|file| OwnedFd::from(file).into());
    }

    /// The front-end reads the configuration space.
    pub fn mark_read(&self) {
        self.lock().is_due = false;
    }

    /// The configuration space has changed.
    pub fn notify(&self) {
        self.lock().is_due = true;
        self.repeat();
    }

    /// Repeats a notification that the front-end may have ignored.
    pub fn repeat(&self) {
        let state = self.lock();
        if let (Some(channel), true) = (&state.channel, state.is_due) {
            let bytes: Vec<u8> = CONFIG_CHANGE.iter().flat_map(|word| word.to_le_bytes()).collect();
            if let Err(e) = send_with_files(channel, &bytes, &[]) {
                debug!("cannot notify a front-end of a configuration change: {e}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn a_config_change_is_announced_until_the_front_end_reads_it() {
        let change = ConfigChange::default();
        change.begin_session();
        let (ours, mut front_end) = UnixStream::pair().expect("a pair of sockets");
        front_end.set_nonblocking(true).expect("a flag can be set");
        let mut told = || {
            let mut bytes = [0; 12];
            front_end.read_exact(&mut bytes).is_ok_and(|()| bytes == [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0])
        };
        change.notify();
        change.set_channel(Some(OwnedFd::from(ours).into()));
        assert!(!told(), "there was no channel");
        change.repeat();
        assert!(told());
        change.repeat();
        assert!(told(), "it has not read the space yet");
        change.mark_read();
        change.repeat();
        assert!(!told());
        change.notify();
        assert!(told());
        // A front-end that reads nothing blocks no other thread.
        (0..10_000).for_each(|_| change.notify());
        drop(front_end);
        change.notify();
    }
}
