//! The protocol between the supervisor and a disk process: a few messages over a pair of sockets, each with its
//! descriptors.
//!
//! A message is one packet of JSON with the version of the protocol. Both ends are the same binary, so another version
//! is an error, and the error text names both. A test reads messages that an earlier build recorded: the wire format
//! changes only with [`VERSION`].
//!
//! The supervisor identifies devices by number. It sends no configuration and no path to be opened, only values that it
//! has checked, descriptors that it has opened, and texts for messages.

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
    /// Use this image and this cache. Sent as the first message, and for each further image of a group. Carries the
    /// image's descriptor (for an NBD export, a socket for requesting connections), then those of the cache.
    Open {
        /// Number of the device for which the image was first opened; identifies the image in messages. Unlike the
        /// name, which a device attached later may have, the number is never reused.
        image_of: u32,
        /// Name of that device, for the log.
        name: String,
        /// The image's properties.
        image: Box<ImageParts>,
        /// The cache.
        cache: Box<ArenaParts>,
        /// The settings of the first device, which determine the cache.
        settings: Box<DeviceSettings>,
        /// The user that the process must run as; `None`: the supervisor's.
        user: Option<User>,
        /// Whether other devices may follow, on this image or in the group.
        is_shared: bool,
    },
    /// Serve a device on that image. Carries its listening socket, its statistics page, and its end of the connection
    /// to the broker.
    Serve {
        /// Number of the device.
        device: u32,
        /// Number of the device for which its image was opened.
        image_of: u32,
        /// The device's settings.
        settings: Box<DeviceSettings>,
    },
    /// Retry failed operations: the operator has resumed the image of this device. This does not affect other images of
    /// the process, because one of them may have been stopped for inspection.
    Resume {
        /// Number of the device.
        device: u32,
    },
    /// Complete the guest's requests and accept no new ones. Then wait for [`ToDisk::Finish`].
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
        /// Whether to wait for requests that the next daemon cannot resubmit.
        waits_for_untracked: bool,
    },
    /// Close the connection of the device without waiting for its threads.
    ForceClose {
        /// Number of the device.
        device: u32,
    },
    /// Execute a request of the operator; the reply has the same number.
    Request {
        /// Number of the device.
        device: u32,
        /// Number of the request.
        id: u64,
        /// The request.
        request: DeviceRequest,
    },
    /// The path of a cache's file no longer leads to it. Carries an empty file that replaces it, unless creating that
    /// file failed.
    CacheFileLost {
        /// Number of the device for which its image was opened.
        image_of: u32,
        /// Why there is no replacement file.
        unmarked: Option<String>,
    },
}

/// How a device ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ending {
    /// All dirty data is written to the image.
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
    /// The last device of an image has ended, and the image and the cache are no longer in use. This is the last
    /// message about the image.
    Released {
        /// Number of the device for which the image was opened.
        image_of: u32,
        /// Whether everything is on the image, so that the cache's file can be removed.
        is_cache_removed: bool,
    },
}

/// An error of another process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorText {
    /// Its kind.
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
