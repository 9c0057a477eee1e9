//! The driver's side of a split virtqueue, without any checks: a test can also do what the specification forbids.
//!
//! Layouts and field names follow virtio 1.2, section 2.7.

use std::collections::HashMap;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::guest_memory::GuestMemory;
use super::wait;

/// Descriptor flags.
pub const DESC_NEXT: u16 = 1;
pub const DESC_WRITE: u16 = 2;
pub const DESC_INDIRECT: u16 = 4;

/// VIRTQ_AVAIL_F_NO_INTERRUPT in `avail.flags`: the driver wants no interrupts.
const AVAIL_NO_INTERRUPT: u16 = 1;
/// VIRTQ_USED_F_NO_NOTIFY in `used.flags`: the device wants no notifications.
const USED_NO_NOTIFY: u16 = 1;

const DESCRIPTOR_BYTES: usize = 16;

/// A buffer of a request in guest memory.
#[derive(Clone, Copy, Debug)]
pub struct Segment {
    pub addr: u64,
    pub len: u32,
    /// The device writes to it; otherwise the device reads it.
    pub writable: bool,
}

impl Segment {
    /// A buffer that the device reads.
    pub fn readable(addr: u64, len: u32) -> Self {
        Self { addr, len, writable: false }
    }

    /// A buffer that the device writes.
    pub fn writable(addr: u64, len: u32) -> Self {
        Self { addr, len, writable: true }
    }

    fn flags(self) -> u16 {
        if self.writable { DESC_WRITE } else { 0 }
    }
}

/// An entry of the descriptor table.
#[derive(Clone, Copy, Debug)]
pub struct Descriptor {
    pub addr: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

impl Descriptor {
    fn to_bytes(self) -> [u8; DESCRIPTOR_BYTES] {
        let mut bytes = [0; DESCRIPTOR_BYTES];
        bytes[..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// An element of the used ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    pub head: u16,
    /// Number of bytes that the device wrote, according to the device.
    pub len: u32,
}

/// A ring, with all of the driver's state.
#[derive(Debug)]
pub struct Ring {
    memory: Arc<GuestMemory>,
    size: u16,
    desc: u64,
    avail: u64,
    used: u64,
    next_avail: u16,
    last_used: u16,
    free: Vec<u16>,
    /// The descriptors of each chain in flight, by its head.
    chains: HashMap<u16, Vec<u16>>,
    event_idx: bool,
    pub kick: EventFd,
    pub call: EventFd,
}

impl Ring {
    /// Creates a ring of `size` entries in `memory`. Its indices start at `start`.
    pub fn new(memory: &Arc<GuestMemory>, size: u16, start: u16, event_idx: bool) -> Self {
        let entries = usize::from(size);
        let desc = memory.alloc(entries * DESCRIPTOR_BYTES, 16);
        let avail = memory.alloc(6 + 2 * entries, 2);
        let used = memory.alloc(6 + 8 * entries, 4);
        let ring = Self {
            memory: Arc::clone(memory),
            size,
            desc,
            avail,
            used,
            next_avail: start,
            last_used: start,
            free: (0..size).rev().collect(),
            chains: HashMap::new(),
            event_idx,
            kick: EventFd::new(EFD_NONBLOCK).expect("an eventfd can be created"),
            call: EventFd::new(EFD_NONBLOCK).expect("an eventfd can be created"),
        };
        memory.word(avail).store(0, Ordering::Relaxed);
        memory.word(used).store(0, Ordering::Relaxed);
        memory.word(used + 2).store(start, Ordering::Relaxed);
        memory.word(avail + 2).store(start, Ordering::Release);
        ring.set_used_event(start);
        ring
    }

    pub fn size(&self) -> u16 {
        self.size
    }

    /// Guest address of the descriptor table.
    pub fn desc_addr(&self) -> u64 {
        self.desc
    }

    /// Guest address of the available ring.
    pub fn avail_addr(&self) -> u64 {
        self.avail
    }

    /// Guest address of the used ring.
    pub fn used_addr(&self) -> u64 {
        self.used
    }

    /// Number of requests made available so far, modulo 2^16.
    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// Number of chains in flight.
    pub fn in_flight(&self) -> usize {
        self.chains.len()
    }

    /// Writes entry `slot` of the descriptor table.
    pub fn write_descriptor(&self, slot: u16, descriptor: Descriptor) {
        self.memory.write(self.desc + u64::from(slot) * DESCRIPTOR_BYTES as u64, &descriptor.to_bytes());
    }

    /// Writes an indirect descriptor table to newly allocated memory; returns its guest address.
    pub fn write_table(&self, descriptors: &[Descriptor]) -> u64 {
        let bytes: Vec<u8> = descriptors.iter().flat_map(|descriptor| descriptor.to_bytes()).collect();
        let table = self.memory.alloc(bytes.len(), 16);
        self.memory.write(table, &bytes);
        table
    }

    /// The descriptors of an indirect table for `segments`, in order.
    pub fn table_of(segments: &[Segment]) -> Vec<Descriptor> {
        let last = segments.len().saturating_sub(1);
        let describe = |(slot, segment): (usize, &Segment)| {
            let more = if slot < last { DESC_NEXT } else { 0 };
            let next = if slot < last { slot as u16 + 1 } else { 0 };
            Descriptor { addr: segment.addr, len: segment.len, flags: segment.flags() | more, next }
        };
        segments.iter().enumerate().map(describe).collect()
    }

    /// Writes `head` to the available ring. The device sees it once the index moves: see [`Ring::publish`].
    fn add_available(&mut self, head: u16) {
        let slot = u64::from(self.next_avail % self.size);
        self.memory.word(self.avail + 4 + 2 * slot).store(head, Ordering::Relaxed);
        self.next_avail = self.next_avail.wrapping_add(1);
    }

    /// Makes chain `head` available.
    pub fn publish(&mut self, head: u16) {
        self.add_available(head);
        self.set_avail_idx(self.next_avail);
    }

    /// Sets `avail.idx` to any value.
    pub fn set_avail_idx(&self, idx: u16) {
        self.memory.word(self.avail + 2).store(idx, Ordering::Release);
    }

    /// Makes a chain of direct descriptors available; returns its head.
    pub fn submit(&mut self, segments: &[Segment]) -> u16 {
        self.submit_mixed(segments, &[])
    }

    /// Makes a chain of one indirect descriptor available; returns its head.
    pub fn submit_indirect(&mut self, segments: &[Segment]) -> u16 {
        self.submit_mixed(&[], segments)
    }

    /// Makes a chain of direct descriptors and one indirect descriptor at the end available; returns its head.
    pub fn submit_mixed(&mut self, direct: &[Segment], indirect: &[Segment]) -> u16 {
        let mut entries = Self::table_of(direct);
        if !indirect.is_empty() {
            let descriptors = Self::table_of(indirect);
            let len = (descriptors.len() * DESCRIPTOR_BYTES) as u32;
            entries.push(Descriptor { addr: self.write_table(&descriptors), len, flags: DESC_INDIRECT, next: 0 });
        }
        assert!(self.free.len() >= entries.len(), "the ring has room for the test's requests");
        let slots = self.free.split_off(self.free.len() - entries.len());
        for (at, mut entry) in entries.iter().copied().enumerate() {
            if let Some(&next) = slots.get(at + 1) {
                entry.flags |= DESC_NEXT;
                entry.next = next;
            }
            self.write_descriptor(slots[at], entry);
        }
        let head = slots[0];
        self.chains.insert(head, slots);
        self.publish(head);
        head
    }

    /// Notifies the device.
    pub fn notify(&self) {
        self.kick.write(1).expect("an eventfd can be written");
    }

    /// Notifies the device if it has enabled notifications, as a real driver does. `old_avail` is the index before the
    /// new requests.
    pub fn notify_if_enabled(&self, old_avail: u16) {
        fence(Ordering::SeqCst);
        let enabled = if self.event_idx {
            let avail_event_addr = self.used + 4 + 8 * u64::from(self.size);
            let avail_event = self.memory.word(avail_event_addr).load(Ordering::Acquire);
            let new = self.next_avail;
            new.wrapping_sub(avail_event).wrapping_sub(1) < new.wrapping_sub(old_avail)
        } else {
            self.memory.word(self.used).load(Ordering::Acquire) & USED_NO_NOTIFY == 0
        };
        if enabled {
            self.notify();
        }
    }

    /// The driver's `avail.idx`.
    pub fn avail_idx(&self) -> u16 {
        self.next_avail
    }

    /// The device's `used.idx`.
    pub fn used_idx(&self) -> u16 {
        self.memory.word(self.used + 2).load(Ordering::Acquire)
    }

    /// Requests an interrupt when `used.idx` passes `index` (VIRTIO_F_EVENT_IDX).
    pub fn set_used_event(&self, index: u16) {
        self.memory.word(self.avail + 4 + 2 * u64::from(self.size)).store(index, Ordering::Release);
        fence(Ordering::SeqCst);
    }

    /// Disables interrupts (without VIRTIO_F_EVENT_IDX).
    pub fn disable_interrupts(&self) {
        self.memory.word(self.avail).store(AVAIL_NO_INTERRUPT, Ordering::Release);
    }

    /// The next completion, if there is one.
    pub fn take_used(&mut self) -> Option<Used> {
        let idx = self.used_idx();
        if idx == self.last_used {
            return None;
        }
        let completed = idx.wrapping_sub(self.last_used);
        assert!(completed <= self.size, "the device completed {completed} requests of a ring of {}", self.size);
        let slot = u64::from(self.last_used % self.size);
        let bytes = self.memory.read(self.used + 4 + 8 * slot, 8);
        let id = u32::from_le_bytes(bytes[..4].try_into().expect("four bytes"));
        let len = u32::from_le_bytes(bytes[4..].try_into().expect("four bytes"));
        let head = u16::try_from(id).expect("a used element names a descriptor");
        self.last_used = self.last_used.wrapping_add(1);
        if let Some(slots) = self.chains.remove(&head) {
            self.free.extend(slots);
        }
        Some(Used { head, len })
    }

    /// Waits for the next completion and its interrupt.
    #[track_caller]
    pub fn wait_used(&mut self, limit: Duration) -> Used {
        self.try_wait_used(limit).unwrap_or_else(|| {
            panic!(
                "no completion within {limit:?}: avail.idx {}, used.idx {}, {} chains in flight",
                self.next_avail,
                self.used_idx(),
                self.chains.len()
            )
        })
    }

    /// As [`Ring::wait_used`], but returns `None` after `limit`.
    #[track_caller]
    pub fn try_wait_used(&mut self, limit: Duration) -> Option<Used> {
        let end = Instant::now() + limit;
        loop {
            if self.event_idx {
                self.set_used_event(self.last_used);
            }
            if let Some(used) = self.take_used() {
                return Some(used);
            }
            let left = end.checked_duration_since(Instant::now())?;
            if !wait::readable(&[self.call.as_raw_fd()], left) {
                assert!(self.take_used().is_none(), "a completion came without its interrupt");
                return None;
            }
            self.take_interrupts();
        }
    }

    /// Adds the chain at `head` to the used ring as entry `entry`, like a device that crashed afterwards.
    pub fn push_used_as_device(&self, entry: u16, head: u16) {
        let element = [u32::from(head).to_le_bytes(), 1_u32.to_le_bytes()].concat();
        self.memory.write(self.used + 4 + 8 * u64::from(entry), &element);
        self.memory.word(self.used + 2).store(entry + 1, Ordering::Release);
    }

    /// Number of interrupts since the last call.
    pub fn take_interrupts(&self) -> u64 {
        // Reading an empty eventfd fails with EAGAIN.
        self.call.read().unwrap_or(0)
    }

    /// The descriptor that signals interrupts.
    pub fn call_fd(&self) -> RawFd {
        self.call.as_raw_fd()
    }
}
