//! What the operator asks of a device that is served, and the replies. A request may wait for the image; its reply
//! comes when it is done.

use serde::{Deserialize, Serialize};

use super::DeviceSettings;

/// A request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceRequest {
    /// Make everything durable that has completed.
    Flush,
    /// Evict every clean page.
    DropClean,
    /// Make everything durable that has completed, and change the image no more until the thaw.
    Freeze {
        /// It ends by itself after this time, which counts from now.
        time_ms: u32,
        /// Whether reads wait, too; else only what changes the image does.
        holds_reads: bool,
    },
    /// End a freeze.
    Thaw,
    /// Take from these settings what may change while the device is served.
    Configure {
        /// The settings.
        settings: Box<DeviceSettings>,
    },
    /// The image has grown. The guest is told.
    Grow {
        /// Its size.
        size_bytes: u64,
    },
}

/// The reply to a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceReply {
    /// It is done.
    Done,
    /// So many clean pages were evicted.
    Dropped {
        /// Number of pages.
        pages: u64,
    },
    /// The freeze has ended.
    Thawed {
        /// Whether the image was frozen until now.
        was_frozen: bool,
    },
    /// The image has failed.
    Failed {
        /// Its fault.
        fault: String,
    },
    /// The device is not served.
    NotServed,
}
