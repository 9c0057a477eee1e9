//! What the supervisor and a disk process tell each other: a few messages over a pair of sockets, each with the
//! descriptors that belong to it.
//!
//! A message is one packet of JSON with the version of the protocol. Both ends are the same binary, so an unknown
//! version means that something is wrong, and is refused with both versions in the text. A test reads messages that an
//! earlier build recorded: what is on the wire changes only with [`VERSION`].
//!
//! The supervisor names devices by number. It sends no path to be opened and no configuration: values that it has
//! checked, descriptors that it has opened, and texts for messages.

mod channel;
mod request;
mod settings;
#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

use crate::arena::ArenaParts;
use crate::error::{Error, ErrorKind};
use crate::store::file::ImageParts;
use crate::sys::privileges::User;

pub use channel::{Channel, Received};
#[cfg(any(test, fuzzing))]
pub(crate) use channel::{decode, encode};
pub use request::{DeviceReply, DeviceRequest};
pub use settings::DeviceSettings;

/// Version of the protocol.
pub const VERSION: u32 = 3;

/// From the supervisor to a disk process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToDisk {
    /// Use this image and this cache: the first message, and before each further image of a group. With the image's
    /// descriptor (for an export of an NBD server, a socket at which to ask for connections), then those of the cache.
    Open {
        /// Number of the device for which the image was opened first: it stands for the image in messages. No other
        /// device gets the number, and one that is attached later may get the name.
        image_of: u32,
        /// Name of that device, for the log.
        name: String,
        /// What was found out about the image.
        image: Box<ImageParts>,
        /// The cache.
        cache: Box<ArenaParts>,
        /// The settings that decide about the cache: those of the first device.
        settings: Box<DeviceSettings>,
        /// The user that the process is to run as; `None`: the supervisor's.
        user: Option<User>,
        /// Whether other devices may follow, on this image or in the group.
        is_shared: bool,
    },
    /// Serve a device on that image. With its listening socket, its page of statistics, and its end of the
    /// connection to the broker.
    Serve {
        /// Number of the device.
        device: u32,
        /// Number of the device for which its image was opened.
        image_of: u32,
        /// What the device is.
        settings: Box<DeviceSettings>,
    },
    /// Retry what failed: the operator says that the image of this device works again. Other images of the process are
    /// left alone: one of them may have been stopped to be looked at.
    Resume {
        /// Number of the device.
        device: u32,
    },
    /// Complete the guest's requests, and accept no others. Then wait for [`ToDisk::Finish`].
    Quiesce {
        /// Number of the device.
        device: u32,
    },
    /// End the device.
    Finish {
        /// Number of the device.
        device: u32,
        /// How.
        ending: Ending,
    },
    /// End the device as a crash would.
    Abandon {
        /// Number of the device.
        device: u32,
        /// Whether to wait for requests that the next daemon cannot repeat.
        waits_for_untracked: bool,
    },
    /// Close the connection of the device, whatever its threads do.
    ForceClose {
        /// Number of the device.
        device: u32,
    },
    /// Do what the operator asks; the reply has the same number.
    Request {
        /// Number of the device.
        device: u32,
        /// Number of the request.
        id: u64,
        /// What the operator asks.
        request: DeviceRequest,
    },
    /// The name of a cache's file no longer leads to it. With an empty file in its place, or without one for this
    /// reason.
    CacheFileLost {
        /// Number of the device for which its image was opened.
        image_of: u32,
        /// Why there is no file.
        unmarked: Option<String>,
    },
}

/// How a device ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ending {
    /// Everything dirty is written to the image.
    WriteBack,
    /// The cache stays for the next daemon.
    HandOver,
}

/// From a disk process to the supervisor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromDisk {
    /// The device is served.
    Served {
        /// Number of the device.
        device: u32,
    },
    /// A device cannot be served.
    Failed {
        /// Number of the device.
        device: u32,
        /// Why.
        error: ErrorText,
    },
    /// An image cannot be served.
    ImageFailed {
        /// Number of the device for which it was opened.
        image_of: u32,
        /// Why.
        error: ErrorText,
    },
    /// The device's rings have stopped.
    Quiesced {
        /// Number of the device.
        device: u32,
    },
    /// The device has ended.
    Ended {
        /// Number of the device.
        device: u32,
        /// The error with which it ended.
        error: Option<ErrorText>,
    },
    /// The reply to a request.
    Reply {
        /// Number of the request.
        id: u64,
        /// The reply.
        reply: DeviceReply,
    },
    /// The last device of an image has ended, and the image and the cache are not used any more. The last message about
    /// the image.
    Released {
        /// Number of the device for which the image was opened.
        image_of: u32,
        /// Everything is on the image, and the cache's file is to be removed.
        is_cache_removed: bool,
    },
}

/// An error of another process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorText {
    /// Number of its kind.
    kind: ErrorKind,
    /// Its text.
    text: String,
}

impl From<&Error> for ErrorText {
    fn from(error: &Error) -> Self {
        Self { kind: error.kind(), text: error.to_string() }
    }
}

impl From<ErrorText> for Error {
    fn from(ErrorText { kind, text }: ErrorText) -> Self {
        Self::new(kind, text)
    }
}
