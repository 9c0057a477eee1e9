//! The guest's driver: split virtqueues in guest memory, and the requests in flight on them.
//!
//! It observes the notification protocol: it kicks only when the device requests it, and reads a used ring only after
//! an interrupt. So a lost kick or interrupt hangs a request, which the world detects.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{FromRawFd, IntoRawFd};
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::oracle::{OracleSnapshot, RequestId, SectorValue};
use super::store::{sector_of, value_of};
use crate::prng::Prng;
use crate::units::{SECTOR_SIZE, SectorSpan};
use crate::virtio::split::QueueLayout;

/// Most sectors of a request.
pub(super) const SECTORS_MAX: u64 = 32;
/// Largest queue.
const SIZE_MAX: u16 = 32;
// A ring's part of guest memory: its queue, then a slot for the chain of each head.
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
const SLOTS: u64 = 0x4000;
const RING_BYTES: u64 = SLOTS + SIZE_MAX as u64 * SLOT_BYTES;
// A slot: header, status, indirect table, data.
const STATUS: u64 = 16;
const INDIRECT_TABLE: u64 = 32;
const DATA: u64 = 512;
const SLOT_BYTES: u64 = DATA + SECTORS_MAX * SECTOR_SIZE as u64;
/// Contents of a read's buffer before the read.
const UNREAD: SectorValue = 0xbad_bad_bad;
/// Contents of a status byte before the request completes.
const NO_STATUS: u8 = 0xff;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// The action that the guest requests.
#[derive(Clone, Debug)]
pub(super) enum GuestAction {
    Read,
    /// With a number that makes its values unique.
    Write(u64),
    Zero {
        unmap: bool,
    },
    Discard,
    Flush(OracleSnapshot),
}

/// A request in flight.
#[derive(Clone, Debug)]
pub(super) struct Submitted {
    pub id: RequestId,
    pub action: GuestAction,
    pub span: SectorSpan,
    /// The period of write-through mode in which the request was submitted, if any.
    pub write_through: Option<u64>,
}

/// The value that a write gives to a sector.
pub(super) fn written(number: u64, sector: u64) -> SectorValue {
    number << 24 | sector
}

/// A request that has completed.
#[derive(Debug)]
pub(super) struct Completed {
    pub request: Submitted,
    pub succeeded: bool,
    /// The sectors that a read returned.
    pub values: Vec<SectorValue>,
}

#[derive(Debug)]
struct Chain {
    request: Submitted,
    descriptors: Vec<u16>,
}

/// A virtqueue, from the driver's side.
#[derive(Debug)]
pub(super) struct Ring {
    memory: Arc<GuestMemoryMmap<()>>,
    base: u64,
    size: u16,
    event_idx: bool,
    free: Vec<u16>,
    avail_idx: u16,
    last_used: u16,
    chains: BTreeMap<u16, Chain>,
    kick: EventFd,
    call: EventFd,
    /// The daemon died before it interrupted the driver, so the next one must.
    pub awaits_interrupt: bool,
    /// The position at which the ring was last stopped, for the front-end.
    pub stopped_at: u16,
    /// The available index when it last received the command to stop.
    pub available_at_stop: u16,
}

fn eventfd() -> EventFd {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).expect("an eventfd")
}

fn duplicate(eventfd: &EventFd) -> File {
    let copy = eventfd.try_clone().expect("a descriptor");
    // SAFETY: the descriptor was just created, and nothing else owns it.
    unsafe { File::from_raw_fd(copy.into_raw_fd()) }
}

/// Guest memory for `rings` rings.
pub(super) fn guest_memory(rings: usize) -> Arc<GuestMemoryMmap<()>> {
    let bytes = rings * RING_BYTES as usize;
    Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), bytes)]).expect("memory for a guest"))
}

impl Ring {
    pub fn new(memory: &Arc<GuestMemoryMmap<()>>, index: usize, size: u16, event_idx: bool) -> Self {
        assert!(size <= SIZE_MAX);
        let base = index as u64 * RING_BYTES;
        let mut ring = Self {
            memory: Arc::clone(memory),
            base,
            size,
            event_idx,
            free: Vec::new(),
            avail_idx: 0,
            last_used: 0,
            chains: BTreeMap::new(),
            kick: eventfd(),
            call: eventfd(),
            awaits_interrupt: false,
            stopped_at: 0,
            available_at_stop: 0,
        };
        ring.reset();
        ring
    }

    /// The driver restarts; its requests in flight are lost.
    pub fn reset(&mut self) -> Vec<Submitted> {
        self.memory.write_slice(&vec![0; SLOTS as usize], self.at(0)).expect("guest memory");
        self.free = (0..self.size).rev().collect();
        (self.avail_idx, self.last_used, self.stopped_at, self.available_at_stop) = (0, 0, 0, 0);
        self.awaits_interrupt = false;
        std::mem::take(&mut self.chains).into_values().map(|chain| chain.request).collect()
    }

    /// New kick and call descriptors, for a connection.
    pub fn connect(&mut self) -> (File, File) {
        (self.kick, self.call) = (eventfd(), eventfd());
        (duplicate(&self.kick), duplicate(&self.call))
    }

    pub fn layout(&self) -> QueueLayout {
        QueueLayout {
            size: self.size,
            desc_table: self.base,
            avail_ring: self.base + AVAIL,
            used_ring: self.base + USED,
            event_idx: self.event_idx,
        }
    }

    pub fn avail_idx(&self) -> u16 {
        self.avail_idx
    }

    /// The used index in guest memory.
    pub fn used_idx(&self) -> u16 {
        self.read(USED + 2)
    }

    pub fn in_flight(&self) -> usize {
        self.chains.len()
    }

    /// The requests in flight that are not on the used ring.
    pub fn not_completed(&self) -> impl Iterator<Item = &Submitted> {
        let pushed: Vec<u16> = self.unseen().map(|(head, _)| head).collect();
        let open = self.chains.iter().filter(move |(head, _)| !pushed.contains(head));
        open.map(|(_, chain)| &chain.request)
    }

    /// The elements of the used ring that the driver has not seen, as (head, length).
    fn unseen(&self) -> impl Iterator<Item = (u16, u32)> {
        let count = self.used_idx().wrapping_sub(self.last_used);
        assert!(count <= self.size, "the used index runs ahead of the available one");
        (0..count).map(|n| {
            let element = USED + 4 + u64::from(self.last_used.wrapping_add(n) % self.size) * 8;
            let head: u32 = self.read(element);
            (u16::try_from(head).expect("a head"), self.read(element + 4))
        })
    }

    fn at(&self, offset: u64) -> GuestAddress {
        GuestAddress(self.base + offset)
    }

    fn slot(head: u16, offset: u64) -> u64 {
        SLOTS + u64::from(head) * SLOT_BYTES + offset
    }

    fn read<T: vm_memory::ByteValued>(&self, offset: u64) -> T {
        self.memory.read_obj(self.at(offset)).expect("guest memory")
    }

    fn write<T: vm_memory::ByteValued>(&self, offset: u64, value: T) {
        self.memory.write_obj(value, self.at(offset)).expect("guest memory");
    }

    /// Whether a request may be submitted.
    pub fn has_space(&self) -> bool {
        !self.free.is_empty()
    }

    /// Makes a request available, and kicks if the device requests that.
    pub fn submit(&mut self, request: Submitted, prng: &mut Prng) {
        assert!(request.span.count <= SECTORS_MAX, "{request:?} exceeds its slot");
        let head = *self.free.last().expect("the caller has asked has_space()");
        let buffers = self.write_buffers(head, &request, prng);
        let direct = buffers.len() <= self.free.len() && prng.percent(50);
        let descriptors = if direct {
            let chosen = self.free.split_off(self.free.len() - buffers.len());
            let chosen: Vec<u16> = chosen.into_iter().rev().collect();
            self.write_chain(&buffers, &chosen, |index| u64::from(index) * 16);
            chosen
        } else {
            let table = Self::slot(head, INDIRECT_TABLE);
            let indices: Vec<u16> = (0..buffers.len() as u16).collect();
            self.write_chain(&buffers, &indices, |index| table + u64::from(index) * 16);
            self.write_descriptor(u64::from(head) * 16, (table, buffers.len() as u32 * 16, INDIRECT), 0);
            vec![self.free.pop().expect("the head")]
        };
        self.chains.insert(head, Chain { request, descriptors });
        self.write(AVAIL + 4 + u64::from(self.avail_idx % self.size) * 2, head);
        let old = self.avail_idx;
        self.avail_idx = old.wrapping_add(1);
        self.write(AVAIL + 2, self.avail_idx);
        if self.needs_kick(old) {
            self.kick();
        }
    }

    /// Kicks, like a front-end for a ring that starts.
    pub fn kick(&self) {
        self.kick.write(1).expect("an eventfd takes a count");
    }

    fn needs_kick(&self, old: u16) -> bool {
        if self.event_idx {
            let event: u16 = self.read(USED + 4 + u64::from(self.size) * 8);
            self.avail_idx.wrapping_sub(event).wrapping_sub(1) < self.avail_idx.wrapping_sub(old)
        } else {
            self.read::<u16>(USED) & 1 == 0
        }
    }

    /// Fills the slot of `head`; returns the chain's buffers.
    fn write_buffers(&self, head: u16, request: &Submitted, prng: &mut Prng) -> Vec<(u64, u32, u16)> {
        let Submitted { action, span, .. } = request;
        let (kind, sector) = match action {
            GuestAction::Read => (0u32, span.start),
            GuestAction::Write(_) => (1, span.start),
            GuestAction::Flush(_) => (4, 0),
            GuestAction::Discard => (11, 0),
            GuestAction::Zero { .. } => (13, 0),
        };
        self.write(Self::slot(head, 0), kind);
        self.write(Self::slot(head, 4), 0u32);
        self.write(Self::slot(head, 8), sector);
        self.write(Self::slot(head, STATUS), NO_STATUS);
        let data: Vec<u8> = match action {
            GuestAction::Read => (0..span.count).flat_map(|_| sector_of(UNREAD)).collect(),
            GuestAction::Write(number) => {
                (span.start..span.end()).flat_map(|sector| sector_of(written(*number, sector))).collect()
            }
            GuestAction::Flush(_) => Vec::new(),
            GuestAction::Discard => range_segments(*span, false, prng),
            GuestAction::Zero { unmap } => range_segments(*span, *unmap, prng),
        };
        self.memory.write_slice(&data, self.at(Self::slot(head, DATA))).expect("guest memory");
        let direction = if matches!(action, GuestAction::Read) { WRITE } else { 0 };
        let mut buffers = vec![(Self::slot(head, 0), 16, 0)];
        let cuts = if data.len() > SECTOR_SIZE { prng.below(3) as usize } else { 0 };
        let mut rest = data.len();
        for left in (0..=cuts).rev() {
            let sectors = (rest / SECTOR_SIZE) as u64;
            let bytes =
                if left == 0 || sectors < 2 { rest } else { prng.between(1, sectors - 1) as usize * SECTOR_SIZE };
            if bytes > 0 {
                let at = Self::slot(head, DATA) + (data.len() - rest) as u64;
                buffers.push((at, bytes as u32, direction));
            }
            rest -= bytes;
        }
        buffers.push((Self::slot(head, STATUS), 1, WRITE));
        buffers
    }

    fn write_chain(&self, buffers: &[(u64, u32, u16)], indices: &[u16], place: impl Fn(u16) -> u64) {
        for (n, &(offset, len, flags)) in buffers.iter().enumerate() {
            let next = indices.get(n + 1).copied();
            let flags = flags | if next.is_some() { NEXT } else { 0 };
            self.write_descriptor(place(indices[n]), (offset, len, flags), next.unwrap_or(0));
        }
    }

    fn write_descriptor(&self, at: u64, (offset, len, flags): (u64, u32, u16), next: u16) {
        self.write(at, self.base + offset);
        self.write(at + 8, len);
        self.write(at + 12, flags);
        self.write(at + 14, next);
    }

    /// Whether an interrupt waits; takes it.
    pub fn take_interrupt(&mut self) -> bool {
        let interrupted = self.call.read().is_ok();
        self.awaits_interrupt &= !interrupted;
        interrupted
    }

    /// Takes the completed requests from the used ring, and requests an interrupt for the next one.
    pub fn reap(&mut self) -> Vec<Completed> {
        let mut completed = Vec::new();
        loop {
            let unseen: Vec<(u16, u32)> = self.unseen().collect();
            if unseen.is_empty() {
                break;
            }
            self.last_used = self.last_used.wrapping_add(unseen.len() as u16);
            completed.extend(unseen.into_iter().map(|(head, len)| self.take_completed(head, len)));
            if self.event_idx {
                self.write(AVAIL + 4 + u64::from(self.size) * 2, self.last_used);
            }
        }
        completed
    }

    fn take_completed(&mut self, head: u16, len: u32) -> Completed {
        let chain = self.chains.remove(&head);
        let Chain { request, descriptors } =
            chain.unwrap_or_else(|| panic!("chain {head} completes, and is not in flight: it completed before"));
        self.free.extend(descriptors.into_iter().rev());
        let status: u8 = self.read(Self::slot(head, STATUS));
        let is_read = matches!(request.action, GuestAction::Read);
        let data_bytes = if is_read && status == 0 { request.span.count as u32 * SECTOR_SIZE as u32 } else { 0 };
        assert!(status <= 1, "{request:?} completes with status {status}");
        assert_eq!(len, data_bytes + 1, "the used length of {request:?}");
        let mut values = Vec::new();
        if data_bytes > 0 {
            let mut bytes = vec![0; data_bytes as usize];
            self.memory.read_slice(&mut bytes, self.at(Self::slot(head, DATA))).expect("guest memory");
            let sectors = bytes.chunks(SECTOR_SIZE).map(value_of);
            values = sectors.map(|value| value.unwrap_or_else(|| panic!("{request:?} reads a torn sector"))).collect();
        }
        Completed { request, succeeded: status == 0, values }
    }
}

/// The payload of a DISCARD or WRITE ZEROES: one or two segments.
fn range_segments(span: SectorSpan, unmap: bool, prng: &mut Prng) -> Vec<u8> {
    let middle = if span.count > 1 && prng.percent(30) { prng.between(1, span.count - 1) } else { span.count };
    let mut bytes = Vec::new();
    for (start, count) in [(span.start, middle), (span.start + middle, span.count - middle)] {
        if count > 0 {
            bytes.extend(start.to_le_bytes());
            bytes.extend((count as u32).to_le_bytes());
            bytes.extend(u32::from(unmap).to_le_bytes());
        }
    }
    bytes
}
