//! The inflight region as the control plane sees it: made for a front-end that asks, taken back from one that kept it.
//!
//! (vhost-user specification, "Inflight I/O tracking".) The region is shared memory with a part for each ring, in which
//! the ring's worker marks what it has taken and not yet answered (`device/inflight.rs`). The front-end holds it while
//! no daemon lives.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::{Arc, Mutex};

use vm_memory::{FileOffset, MmapRegion};

use super::wire::Message;
use crate::device::inflight::{InflightTracker, ring_bytes};

/// Payload of GET_INFLIGHT_FD and SET_INFLIGHT_FD: size and offset of the region, number of queues, queue size. Some
/// front-ends send the four bytes of padding that C puts behind it.
const PAYLOAD_BYTES: std::ops::RangeInclusive<usize> = 20..=24;
/// More queues than any device of ours has.
const QUEUES_MAX: u16 = 1024;
/// Longest ring there is (virtio 1.2, section 2.7).
const QUEUE_SIZE_MAX: u16 = 32768;

/// The inflight region of a session, once there is one.
#[derive(Debug, Default)]
pub(super) struct Inflight(Mutex<Option<Region>>);

#[derive(Debug)]
struct Region {
    memory: Arc<MmapRegion>,
    shape: Shape,
}

/// How many rings a region has room for.
#[derive(Clone, Copy, Debug)]
struct Shape {
    queues: u16,
    queue_size: u16,
}

impl Shape {
    /// From the fields of a message.
    fn of(message: &Message) -> io::Result<Self> {
        let field = |at: usize| message.payload.get(at..at + 2).map_or(0, |two| u16::from_le_bytes([two[0], two[1]]));
        let shape = Self { queues: field(16), queue_size: field(18) };
        let fits = (1..=QUEUES_MAX).contains(&shape.queues) && (1..=QUEUE_SIZE_MAX).contains(&shape.queue_size);
        if PAYLOAD_BYTES.contains(&message.payload.len()) && fits {
            Ok(shape)
        } else {
            Err(invalid(format!("an inflight region can't be of {shape:?}")))
        }
    }

    fn bytes(self) -> usize {
        usize::from(self.queues) * ring_bytes(self.queue_size)
    }
}

impl Inflight {
    /// GET_INFLIGHT_FD: makes a region of the shape that the message asks for; returns the reply.
    ///
    /// => It comes into use when the front-end sends it back.
    pub fn create_region(&self, message: &Message) -> io::Result<Message> {
        let shape = Shape::of(message)?;
        let file = sealed_memfd(shape.bytes())?;
        let mut payload = message.payload.clone();
        payload[..8].copy_from_slice(&(shape.bytes() as u64).to_le_bytes());
        payload[8..16].fill(0);
        Ok(Message::reply(message.request, payload, vec![file]))
    }

    /// SET_INFLIGHT_FD: from now on rings that start keep their marks in this region.
    pub fn set_region(&self, mut message: Message) -> io::Result<()> {
        let shape = Shape::of(&message)?;
        let (Some(size), Some(offset), Some(file)) = (message.u64_at(0), message.u64_at(8), message.files.pop()) else {
            return Err(invalid("an inflight region without a descriptor".to_owned()));
        };
        let end = offset.checked_add(size).filter(|_| size >= shape.bytes() as u64);
        if end.is_none_or(|end| file.metadata().is_ok_and(|metadata| metadata.len() < end)) {
            return Err(invalid(format!("an inflight region of {size} bytes at {offset} is too small for {shape:?}")));
        }
        let memory = MmapRegion::from_file(FileOffset::new(file, offset), shape.bytes())
            .map_err(|e| invalid(format!("an inflight region can't be mapped: {e}")))?;
        *self.0.lock().expect("nobody panics holding this") = Some(Region { memory: Arc::new(memory), shape });
        Ok(())
    }

    /// The part of ring `index`; none if there is no region, or no room for such a ring in it.
    pub fn of_ring(&self, index: u16, size: u16) -> Option<InflightTracker> {
        let slot = self.0.lock().expect("nobody panics holding this");
        let Region { memory, shape } = slot.as_ref()?;
        (index < shape.queues && size <= shape.queue_size).then(|| {
            let offset = usize::from(index) * ring_bytes(shape.queue_size);
            InflightTracker::new(Arc::clone(memory), offset, size)
        })
    }
}

/// Shared memory that nobody can shrink: a region cut short would be SIGBUS at the next mark.
fn sealed_memfd(bytes: usize) -> io::Result<File> {
    // SAFETY: a plain system call with a constant NUL-terminated name.
    let fd = unsafe { libc::memfd_create(c"genblk-inflight".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: memfd_create returned a new descriptor that nobody else owns.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(bytes as u64)?;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: a plain system call on our own descriptor.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}

fn invalid(why: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}
