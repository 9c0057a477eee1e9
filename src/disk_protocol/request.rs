//! The operator's requests to a served device, and the replies. A request may wait for the image; its reply is sent
//! when it is done.

use serde::{Deserialize, Serialize};

use super::DeviceSettings;

/// A request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceRequest {
    /// Make all completed writes durable.
    Flush,
    /// Accept no front-end any more, unless one is connected: the device is being detached.
    StopAccepting,
    /// Evict every clean page.
    DropClean,
    /// Make all completed writes durable, and do not change the image until the thaw.
    Freeze {
        /// The freeze ends by itself after this time, counted from now.
        time_ms: u32,
        /// Whether reads wait too; otherwise only requests that change the image do.
        holds_reads: bool,
    },
    /// End a freeze.
    Thaw,
    /// Allocate the memory for a cache of this size, before a [`DeviceRequest::Configure`] with that size.
    Reserve {
        /// The size.
        size_bytes: u64,
    },
    /// Apply those of these settings that may change while the device is served.
    Configure {
        /// The settings.
        settings: Box<DeviceSettings>,
    },
    /// Read in these extents of pages (first page, number), at lower priority than the guest's requests, for at most
    /// this long.
    Warm {
        /// The pages.
        extents: Vec<(u64, u64)>,
        /// The time.
        time_ms: u32,
    },
    /// List the pages in memory, for a part of the page table.
    Resident {
        /// Where the part begins.
        from: u32,
    },
    /// The image has grown; notify the guest.
    Grow {
        /// Its size.
        size_bytes: u64,
    },
    /// The image is to shrink: notify the guest, and use the image only up to this size from now on.
    Shrink {
        /// The size.
        size_bytes: u64,
    },
    /// The image was cut, after a [`DeviceRequest::Shrink`].
    Cut {
        /// Its size.
        size_bytes: u64,
    },
}

/// The reply to a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceReply {
    /// The request is done.
    Done,
    /// Clean pages were evicted.
    Dropped {
        /// Number of pages.
        pages: u64,
    },
    /// The device is in use.
    InUse {
        /// By this front-end.
        by: String,
    },
    /// Pages were read in, or are being read in.
    Warmed {
        /// The extents that are left.
        left: Vec<(u64, u64)>,
        /// Whether the cache is full.
        is_full: bool,
    },
    /// Pages in memory.
    Resident {
        /// Their numbers.
        pages: Vec<u64>,
        /// Where the next part begins.
        next: Option<u32>,
    },
    /// The freeze has ended.
    Thawed {
        /// Whether the image stayed frozen until now.
        was_frozen: bool,
    },
    /// The image has failed.
    Failed {
        /// Its fault.
        fault: String,
    },
    /// The request cannot be executed; nothing has changed.
    Refused {
        /// Why, and what to do.
        why: String,
    },
    /// The device is not served.
    NotServed,
}
