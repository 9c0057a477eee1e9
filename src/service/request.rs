//! Carries out what the operator asks of a device. May wait for the image.

use std::time::Duration;

use super::handle::ServiceHandle;
use crate::device::HeldRequests;
use crate::disk_protocol::{DeviceReply, DeviceRequest};
use crate::units::Fault;

impl ServiceHandle {
    /// Carries out a request and returns its reply.
    pub fn execute(&self, request: &DeviceRequest) -> DeviceReply {
        let Some(workers) = self.workers.upgrade() else { return DeviceReply::NotServed };
        let done = |result: Result<(), Fault>| match result {
            Ok(()) => DeviceReply::Done,
            Err(fault) => DeviceReply::Failed { fault: fault.to_string() },
        };
        match *request {
            DeviceRequest::Flush => done(workers.flush()),
            DeviceRequest::DropClean => DeviceReply::Dropped { pages: workers.drop_clean() },
            DeviceRequest::Freeze { time_ms, holds_reads } => {
                let held = if holds_reads { HeldRequests::All } else { HeldRequests::Changes };
                done(workers.freeze(Duration::from_millis(time_ms.into()), held))
            }
            DeviceRequest::Thaw => DeviceReply::Thawed { was_frozen: workers.thaw() },
        }
    }
}
