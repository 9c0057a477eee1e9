//! The inflight region in the control plane (vhost-user specification, "Inflight I/O tracking").
//!
//! GET_INFLIGHT_FD creates the region: shared memory with one part for each ring, in which the ring's worker marks the
//! requests that it has taken and not completed (`device/inflight.rs`). The front-end keeps the region while no daemon
//! runs, and passes it to the next one by SET_INFLIGHT_FD.

use std::fmt;
use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex};

use log::warn;
use vm_memory::{FileOffset, MmapRegion};

use super::wire::Message;
use crate::device::inflight::{InflightTracker, ring_bytes};
use crate::sys::memfd;
use crate::sys::regions::{BusErrorRecord, Registration, register};

/// Payload of GET_INFLIGHT_FD and SET_INFLIGHT_FD: size and offset of the region, number of queues, queue size. Some
/// front-ends append the four bytes of padding of the C structure.
const PAYLOAD_BYTES: std::ops::RangeInclusive<usize> = 20..=24;
/// Bound on the number of queues; a device has 256 at most.
const QUEUES_MAX: u16 = 1024;
/// Largest queue size (virtio 1.2, section 2.7).
const QUEUE_SIZE_MAX: u16 = 32768;

/// The inflight region of a session, if the front-end has set one.
#[derive(Debug, Default)]
pub(super) struct Inflight(Mutex<Option<InflightRegion>>);

#[derive(Debug)]
struct InflightRegion {
    /// Dropped first: while the region is registered, it is mapped.
    registration: Option<Arc<Registration>>,
    memory: Arc<MmapRegion>,
    shape: InflightShape,
}

/// Number and size of the queues that a region has room for.
#[derive(Clone, Copy, Debug)]
struct InflightShape {
    queues: u16,
    queue_size: u16,
}

impl InflightShape {
    /// Reads the shape from a message.
    fn of(message: &Message) -> io::Result<Self> {
        let field = |at: usize| message.payload.get(at..at + 2).map_or(0, |two| u16::from_le_bytes([two[0], two[1]]));
        let shape = Self { queues: field(16), queue_size: field(18) };
        let fits = (1..=QUEUES_MAX).contains(&shape.queues) && (1..=QUEUE_SIZE_MAX).contains(&shape.queue_size);
        if PAYLOAD_BYTES.contains(&message.payload.len()) && fits {
            Ok(shape)
        } else {
            Err(invalid(format!("inflight region: invalid shape {shape}")))
        }
    }

    fn bytes(self) -> usize {
        usize::from(self.queues) * ring_bytes(self.queue_size)
    }
}

impl fmt::Display for InflightShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} queues of size {}", self.queues, self.queue_size)
    }
}

impl Inflight {
    /// GET_INFLIGHT_FD: creates a region of the requested shape; returns the reply.
    ///
    /// => The region is used only after the front-end has sent it back by SET_INFLIGHT_FD.
    pub fn create_region(&self, message: &Message) -> io::Result<Message> {
        let shape = InflightShape::of(message)?;
        let file = sealed_memfd(shape.bytes())?;
        let mut payload = message.payload.clone();
        payload[..8].copy_from_slice(&(shape.bytes() as u64).to_le_bytes());
        payload[8..16].fill(0);
        Ok(Message::reply(message.request, payload, vec![file]))
    }

    /// SET_INFLIGHT_FD: rings that start from now on record their requests in this region. The handler of SIGBUS writes
    /// `record` if the access was to it.
    pub fn set_region(&self, mut message: Message, record: Option<BusErrorRecord>) -> io::Result<()> {
        let shape = InflightShape::of(&message)?;
        let (Some(size), Some(offset), Some(file)) = (message.u64_at(0), message.u64_at(8), message.files.pop()) else {
            return Err(invalid("inflight region: no file descriptor".to_owned()));
        };
        let end = offset.checked_add(size).filter(|_| size >= shape.bytes() as u64);
        if end.is_none_or(|end| file.metadata().is_ok_and(|metadata| metadata.len() < end)) {
            return Err(invalid(format!("inflight region: {size} bytes at offset {offset} do not hold {shape}")));
        }
        let memory = MmapRegion::from_file(FileOffset::new(file, offset), shape.bytes())
            .map_err(|e| invalid(format!("inflight region: cannot map it: {e}")))?;
        let first = memory.as_ptr().addr();
        let registration = record.map(|record| Arc::new(register(&(first..first + memory.size()), record)));
        *self.0.lock().expect("no thread panics with the region locked") =
            Some(InflightRegion { registration, memory: Arc::new(memory), shape });
        Ok(())
    }

    /// The part of ring `index`; `None` without a region, or if the region has no part for the ring: a front-end may
    /// create the region for the queues that the guest's firmware uses. The log then warns that requests in flight at a
    /// crash of the daemon are lost.
    ///
    /// # Errors
    /// The ring is larger than the queues of the region, in words. QEMU and cloud-hypervisor never do that: they create
    /// the region for the largest size that they offer to the guest.
    pub fn tracker_for(&self, device: &str, index: u16, size: u16) -> Result<Option<InflightTracker>, String> {
        let slot = self.0.lock().expect("no thread panics with the region locked");
        let Some(InflightRegion { registration, memory, shape }) = slot.as_ref() else { return Ok(None) };
        if size > shape.queue_size {
            return Err(format!("it has size {size}, and the front-end's inflight region is for {shape}"));
        }
        if index >= shape.queues {
            warn!(
                "{device}: vring {index}: its requests in flight are not recorded, because the front-end's inflight \
                 region is for {shape}"
            );
            return Ok(None);
        }
        let offset = usize::from(index) * ring_bytes(shape.queue_size);
        Ok(Some(InflightTracker::new(Arc::clone(memory), offset, size).registered(registration.clone())))
    }
}

/// Shared memory of a fixed size: access to a region that was truncated would raise SIGBUS.
fn sealed_memfd(bytes: usize) -> io::Result<File> {
    let file = memfd::create(c"genblk-inflight")?;
    file.set_len(bytes as u64)?;
    memfd::freeze_size(&file)?;
    Ok(file)
}

fn invalid(why: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use vhost::vhost_user::message::FrontendReq;

    use super::*;

    #[test]
    fn each_ring_has_its_own_part_of_the_inflight_region() {
        let inflight = Inflight::default();
        let payload = [[0xff; 16].as_slice(), &2u16.to_le_bytes(), &256u16.to_le_bytes()].concat();
        let request = FrontendReq::GET_INFLIGHT_FD as u32;
        let reply = inflight.create_region(&Message::reply(request, payload, Vec::new())).unwrap();
        assert_eq!(reply.u64_at(0), Some(2 * ring_bytes(256) as u64));
        assert_eq!(reply.u64_at(8), Some(0), "the region begins at the start of its file");
        let file = reply.files[0].try_clone().unwrap();
        inflight.set_region(reply, None).unwrap();
        for (index, size) in [(0, 256), (1, 128)] {
            let mut tracker = inflight.tracker_for("disk", index, size).unwrap().unwrap();
            assert_eq!(tracker.recover(0), None);
            tracker.take(size - 1);
            let mut mark = [0];
            let at = usize::from(index) * ring_bytes(256) + 16 + 16 * usize::from(size - 1);
            file.read_exact_at(&mut mark, at as u64).unwrap();
            assert_eq!(mark, [1], "ring {index}");
        }
        assert!(inflight.tracker_for("disk", 0, 512).is_err(), "there is no room for so large a ring");
        assert!(inflight.tracker_for("disk", 2, 256).unwrap().is_none());
    }
}
