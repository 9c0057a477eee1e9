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
    /// Allocate the memory of a cache of this size, before a [`DeviceRequest::Configure`] with that size.
    Reserve {
        /// The size.
        size_bytes: u64,
    },
    /// Take from these settings what may change while the device is served.
    Configure {
        /// The settings.
        settings: Box<DeviceSettings>,
    },
    /// Read in these pages (the first one and their number) behind what the guest asks for, for at most this long.
    Warm {
        /// The pages.
        extents: Vec<(u64, u64)>,
        /// The time.
        time_ms: u32,
    },
    /// The pages in memory, of a part of the page table.
    Resident {
        /// Where the part begins.
        from: u32,
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
    /// Pages were read in, or are being read in.
    Warmed {
        /// Those that are left.
        left: Vec<(u64, u64)>,
        /// The cache is full.
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
        /// Whether the image was frozen until now.
        was_frozen: bool,
    },
    /// The image has failed.
    Failed {
        /// Its fault.
        fault: String,
    },
    /// It cannot be done; nothing has changed.
    Refused {
        /// Why, and what to do.
        why: String,
    },
    /// The device is not served.
    NotServed,
}
