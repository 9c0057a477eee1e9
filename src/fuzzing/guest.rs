//! What a guest controls: descriptor chains, rings, and the inflight region that its front-end can write to.

use std::collections::VecDeque;
use std::fs::File;
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, MmapRegion, VolatileMemory};

use super::input::Input;
use crate::device::control::RingSetup;
use crate::device::inflight::{InflightTracker, ring_bytes};
use crate::device::ring::Ring;
use crate::virtio::GuestRam;
use crate::virtio::chain::{CHAIN_DESCRIPTORS_MAX, DescriptorTable};
use crate::virtio::request::{Malformed, Request, RequestKind, RequestLimits, parse, serial};
use crate::virtio::split::{QueueLayout, QueuePosition};

/// Guest memory: two adjacent regions, a hole, and a third region.
const SEAM: u64 = 0x1_0000;
const HOLE: u64 = 0x2_0000;
const HIGH: u64 = 0x4_0000;
const END: u64 = 0x5_0000;
/// A second descriptor table, for indirect descriptors.
const INDIRECT_TABLE: u64 = 0x4000;
/// Where buffers begin, but for a small offset.
const PLACES: [u64; 8] = [0x1000, SEAM - 8, HOLE - 8, HIGH, END - 8, u64::MAX - 8, INDIRECT_TABLE, 0x8000];
const LENGTHS: [u32; 12] = [0, 1, 8, 15, 16, 17, 32, 512, 4096, 0x1_0000, u32::MAX, 513];

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const HEADER_BYTES: u64 = 16;
const DESCRIPTOR_BYTES: u64 = 16;

fn memory() -> Arc<GuestMemoryMmap<()>> {
    let region = |start: u64| (GuestAddress(start), 0x1_0000);
    Arc::new(GuestMemoryMmap::from_ranges(&[region(0), region(SEAM), region(HIGH)]).expect("memory"))
}

/// A buffer of a chain: address, length, whether the device writes it.
type FuzzBuffer = (u64, u32, bool);

/// Any descriptor chain: parsed as a naive model does it.
///
/// Input: size of the ring, head; descriptors of both tables up to a place of 0xff; then bytes for each place.
pub(super) fn request_parse(input: &[u8]) {
    let mut input = Input::new(input);
    let entries = 1 << input.below(8);
    let head = input.u16();
    let backing = memory();
    for table in [0, INDIRECT_TABLE] {
        for index in 0..64 {
            let place = input.u8();
            if place == u8::MAX || input.is_empty() {
                break;
            }
            let address = PLACES[usize::from(place) % PLACES.len()].wrapping_add(u64::from(input.u8()));
            let (len, flags, next) = (input.pick(&LENGTHS), input.u8() & 7, u16::from(input.u8()));
            let words = [&address.to_le_bytes()[..], &len.to_le_bytes(), &[flags, 0], &next.to_le_bytes()].concat();
            backing.write_slice(&words, GuestAddress(table + index * DESCRIPTOR_BYTES)).expect("guest memory");
        }
    }
    for place in PLACES {
        // What is outside guest memory is lost.
        let _ = backing.write(input.take(48), GuestAddress(place));
    }
    let mem = GuestRam::new(Arc::clone(&backing));
    let table = DescriptorTable::new(&mem, GuestAddress(0), entries);
    table.prefetch_heads(&mem, &[head]);
    let mut request = Request::default();
    let parsed = parse(&mem, &table, head, &mut request);
    let Some(buffers) = flatten(&backing, u64::from(entries), head) else {
        return assert_eq!(parsed, Err(Malformed::Unreadable));
    };
    match (parsed, model(&backing, &buffers)) {
        (Ok(()), Ok(expected)) => {
            let ranges = request.data.iter().map(|range| (range.addr.0, range.len)).collect::<Vec<_>>();
            let (kind, sector) = (request.kind, request.sector);
            assert_eq!((kind, sector, &ranges), (expected.kind, expected.sector, &expected.data));
            assert_eq!(request.data_bytes, expected.data.iter().map(|(_, len)| u64::from(*len)).sum::<u64>());
            assert_eq!(request.status_addr.0, expected.status);
            check_against_disks(&mem, &request);
        }
        (Err(Malformed::WithStatus { status_addr }), Err(Some(status))) => assert_eq!(status_addr.0, status),
        (Err(Malformed::NoStatus | Malformed::Unreadable), Err(None)) => {}
        (parsed, expected) => panic!("{buffers:?} are parsed as {parsed:?}: {request:?}; the model says {expected:?}"),
    }
}

/// Follows a chain (virtio 1.2, section 2.7.5); `None`: it has no end.
fn flatten(memory: &GuestMemoryMmap<()>, entries: u64, head: u16) -> Option<Vec<FuzzBuffer>> {
    let (mut table, mut entries, mut index) = (0u64, entries, u64::from(head));
    let (mut seen, mut is_indirect) = (0, false);
    let mut buffers = Vec::new();
    loop {
        if index >= entries || seen == entries || buffers.len() == CHAIN_DESCRIPTORS_MAX as usize {
            return None;
        }
        seen += 1;
        let mut raw = [0; DESCRIPTOR_BYTES as usize];
        let address = table.checked_add(index * DESCRIPTOR_BYTES)?;
        memory.read_slice(&mut raw, GuestAddress(address)).ok()?;
        let address = u64::from_le_bytes(raw[..8].try_into().expect("eight bytes"));
        let len = u32::from_le_bytes(raw[8..12].try_into().expect("four bytes"));
        let flags = u16::from_le_bytes([raw[12], raw[13]]);
        if flags & INDIRECT != 0 {
            let inside = u64::from(len) / DESCRIPTOR_BYTES;
            let is_whole = u64::from(len) % DESCRIPTOR_BYTES == 0 && (1..=32768).contains(&inside);
            if is_indirect || flags & NEXT != 0 || !is_whole {
                return None;
            }
            (table, entries, index, seen, is_indirect) = (address, inside, 0, 0, true);
            continue;
        }
        buffers.push((address, len, flags & WRITE != 0));
        if flags & NEXT == 0 {
            return Some(buffers);
        }
        index = u64::from(u16::from_le_bytes([raw[14], raw[15]]));
    }
}

/// What [`model`] expects of a valid request.
#[derive(Debug)]
struct Expected {
    kind: RequestKind,
    sector: u64,
    data: Vec<(u64, u32)>,
    status: u64,
}

/// The request in a chain (section 5.2.6). An error has the address of the status byte, if there is one.
fn model(memory: &GuestMemoryMmap<()>, buffers: &[FuzzBuffer]) -> Result<Expected, Option<u64>> {
    let buffers: Vec<FuzzBuffer> = buffers.iter().copied().filter(|(_, len, _)| *len > 0).collect();
    let of = |writable: bool| buffers.iter().filter(move |buffer| buffer.2 == writable);
    let last = of(true).next_back();
    let status = last.and_then(|&(address, len, _)| address.checked_add(u64::from(len) - 1));
    let status = status.filter(|&status| memory.read_obj::<u8>(GuestAddress(status)).is_ok()).ok_or(None)?;
    let malformed = Err(Some(status));
    let is_in_order = buffers.is_sorted_by_key(|buffer| buffer.2);
    let bytes: u64 = buffers.iter().map(|(_, len, _)| u64::from(*len)).sum();
    // The header is the first 16 bytes that the device reads.
    let bytes_of = |&(address, len, _): &FuzzBuffer| (0..u64::from(len)).map(move |at| address.checked_add(at));
    let byte = |address: Option<u64>| memory.read_obj::<u8>(GuestAddress(address?)).ok();
    let header: Option<Vec<u8>> = of(false).flat_map(bytes_of).take(HEADER_BYTES as usize).map(byte).collect();
    let header = header.filter(|header| header.len() == HEADER_BYTES as usize);
    let Some(header) = header.filter(|_| is_in_order && bytes <= u64::from(u32::MAX)) else { return malformed };
    let kind = match u32::from_le_bytes(header[..4].try_into().expect("four bytes")) {
        0 => RequestKind::Read,
        1 => RequestKind::Write,
        4 => RequestKind::Flush,
        8 => RequestKind::GetId,
        11 => RequestKind::Discard,
        13 => RequestKind::WriteZeroes,
        other => RequestKind::Unknown(other),
    };
    let mut data: Vec<(u64, u32)> = match kind {
        RequestKind::Read | RequestKind::GetId => of(true).map(|&(address, len, _)| (address, len)).collect(),
        RequestKind::Write | RequestKind::Discard | RequestKind::WriteZeroes => {
            let mut header_left = u32::try_from(HEADER_BYTES).expect("it is 16");
            let after_header = |&(address, len, _): &FuzzBuffer| {
                let skipped = header_left.min(len);
                header_left -= skipped;
                (address.wrapping_add(u64::from(skipped)), len - skipped)
            };
            of(false).map(after_header).collect()
        }
        _ => Vec::new(),
    };
    if matches!(kind, RequestKind::Read | RequestKind::GetId)
        && let Some((_, len)) = data.last_mut()
    {
        *len -= 1;
    }
    data.retain(|(_, len)| *len > 0);
    let sector = u64::from_le_bytes(header[8..].try_into().expect("eight bytes"));
    Ok(Expected { kind, sector, data, status })
}

/// Whatever passes the checks is within the disk.
fn check_against_disks(mem: &GuestRam, request: &Request) {
    for (capacity_sectors, read_only) in [(0, false), (8, false), (u64::MAX, false), (1 << 30, true)] {
        let disk = RequestLimits {
            capacity_sectors: capacity_sectors.into(),
            read_only,
            can_discard: true,
            max_discard_sectors: 1 << 21,
            can_zero: true,
            serial: serial("fuzzed"),
        };
        if request.check(&disk).is_err() {
            continue;
        }
        let is_within = |start: u64, count: u64| start.checked_add(count).is_some_and(|end| end <= capacity_sectors);
        match request.kind {
            RequestKind::Read | RequestKind::Write => {
                assert!(is_within(request.span().start, request.span().count), "{request:?}");
                assert!(!read_only || request.kind == RequestKind::Read, "a read-only disk takes {request:?}");
            }
            RequestKind::Discard | RequestKind::WriteZeroes => {
                let mut segments = Vec::new();
                let checked = request.range_segments(mem, &disk, &mut segments);
                assert!(checked.is_ok() || segments.is_empty(), "{segments:?} of an invalid request");
                let all_within = segments.iter().all(|one| is_within(one.span.start, one.span.count));
                assert!(all_within && segments.len() <= 32, "{segments:?} of {capacity_sectors} sectors");
            }
            // Where it has its space, it may write.
            RequestKind::GetId => drop(request.write_id(mem, &disk)),
            RequestKind::Flush | RequestKind::Unknown(_) => {}
        }
    }
}

const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;

/// A ring with its driver and its inflight region.
struct RingWorld {
    memory: Arc<GuestMemoryMmap<()>>,
    ram: Arc<GuestRam>,
    inflight: Arc<MmapRegion>,
    size: u16,
    event_idx: bool,
    /// Heads that are available and not taken, as an honest driver knows them.
    available: VecDeque<u16>,
    /// Heads taken and not pushed, in the order in which they were first taken; and those that no status can complete.
    taken: Vec<(u64, u16)>,
    unreadable: Vec<(u64, u16)>,
    /// Pushed and not published.
    pushed: Vec<(u64, u16)>,
    /// Heads that the ring has to take again.
    again: VecDeque<(u64, u16)>,
    order: u64,
    used: u16,
    avail: u16,
    /// The driver has kept to the specification so far: the model knows what the ring must do.
    is_honest: bool,
}

/// A ring under any stores of the guest, any order of its turns, and deaths of its daemon.
///
/// Input: size, features, start; then a script of steps.
pub(super) fn ring_turn(input: &[u8]) {
    let mut input = Input::new(input);
    let size = 1 << input.below(5);
    let event_idx = input.u8() % 2 == 1;
    let start = input.u16();
    let memory = memory();
    let ram = Arc::new(GuestRam::new(Arc::clone(&memory)));
    let inflight = Arc::new(MmapRegion::new(ring_bytes(size)).expect("memory"));
    let mut world = RingWorld {
        memory,
        ram,
        inflight,
        size,
        event_idx,
        available: VecDeque::new(),
        taken: Vec::new(),
        unreadable: Vec::new(),
        pushed: Vec::new(),
        again: VecDeque::new(),
        order: 0,
        used: start,
        avail: start,
        is_honest: true,
    };
    for at in [AVAIL + 2, USED + 2] {
        world.memory.write_obj(start, GuestAddress(at)).expect("guest memory");
    }
    let mut ring = world.start(start);
    while !input.is_empty() {
        match input.below(10) {
            0 => world.submit(input.u8()),
            1 => {
                // Any word of either ring.
                world.is_honest = false;
                let at = input.pick(&[AVAIL, USED]) + 2 * u64::from(input.u8() % 40);
                world.memory.write_obj(input.u16(), GuestAddress(at)).expect("guest memory");
            }
            2 | 3 => world.take(&mut ring, input.below(20)),
            4 | 5 => world.push(&mut ring, &mut input),
            6 => world.publish(&mut ring),
            7 => {
                ring.disable_notification();
                let _ = (ring.enable_notification(), ring.has_more(), ring.is_drained());
            }
            8 => {
                // A worker publishes at the end of each turn.
                world.publish(&mut ring);
                ring.set_memory(&world.ram);
                let unreadable = std::mem::take(&mut world.unreadable);
                unreadable.into_iter().rev().for_each(|request| world.again.push_front(request));
            }
            _ => {
                drop(ring);
                ring = world.start(input.u16());
            }
        }
    }
}

impl RingWorld {
    /// A daemon starts, perhaps after another has died.
    fn start(&mut self, base: u16) -> Ring {
        let layout = QueueLayout {
            size: self.size,
            desc_table: 0,
            avail_ring: AVAIL,
            used_ring: USED,
            event_idx: self.event_idx,
        };
        let setup = RingSetup {
            layout,
            position: QueuePosition { next_avail: base, next_used: base },
            kick: File::open("/dev/null").expect("it exists"),
            call_fd: None,
            err_fd: None,
            memory: Arc::clone(&self.ram),
            tracker: Some(InflightTracker::new(Arc::clone(&self.inflight), 0, self.size)),
        };
        let mut again: Vec<(u64, u16)> = [&mut self.taken, &mut self.unreadable, &mut self.pushed]
            .into_iter()
            .flat_map(std::mem::take)
            .chain(std::mem::take(&mut self.again))
            .collect();
        again.sort_unstable();
        self.again = again.into();
        let ring = Ring::new("fuzzed", 0, setup);
        if self.is_honest {
            let published = self.used;
            assert_eq!(ring.position().next_used, published, "the ring continues elsewhere");
        }
        ring
    }

    /// The driver makes a free descriptor available.
    fn submit(&mut self, head: u8) {
        let head = u16::from(head) % self.size;
        let lists = [&self.taken, &self.unreadable, &self.pushed];
        let mut in_use = lists.into_iter().flatten().chain(&self.again).map(|(_, head)| *head);
        if in_use.any(|used| used == head) || self.available.contains(&head) {
            return;
        }
        let entry = AVAIL + 4 + 2 * u64::from(self.avail % self.size);
        self.avail = self.avail.wrapping_add(1);
        self.memory.write_obj(head, GuestAddress(entry)).expect("guest memory");
        self.memory.write_obj(self.avail, GuestAddress(AVAIL + 2)).expect("guest memory");
        self.available.push_back(head);
    }

    fn take(&mut self, ring: &mut Ring, max: usize) {
        let mut heads = Vec::new();
        ring.take(max, &mut heads);
        let in_flight = self.taken.len() + self.unreadable.len() + heads.len();
        assert!(heads.len() <= max && in_flight <= usize::from(self.size), "{in_flight} of {} in flight", self.size);
        let repeats = !self.again.is_empty();
        for head in heads {
            let again = if repeats { self.again.pop_front() } else { None };
            let expected = again.map(|(_, head)| head).or_else(|| self.available.pop_front());
            assert!(!self.is_honest || expected == Some(head), "head {head} is taken, not {expected:?}");
            self.order += 1;
            self.taken.push((again.map_or(self.order, |(order, _)| order), head));
        }
    }

    /// A request ends: it completes, or no status can complete it.
    fn push(&mut self, ring: &mut Ring, input: &mut Input<'_>) {
        if self.taken.is_empty() {
            return;
        }
        let request = self.taken.swap_remove(input.below(self.taken.len()));
        match input.below(8) {
            0 => {
                ring.reject(request.1, Malformed::Unreadable);
                return self.unreadable.push(request);
            }
            1 => ring.reject(request.1, Malformed::NoStatus),
            _ => ring.push_used(request.1, input.u32()),
        }
        self.pushed.push(request);
    }

    fn publish(&mut self, ring: &mut Ring) {
        ring.publish();
        if !self.is_honest {
            self.pushed.clear();
            return;
        }
        let index: u16 = self.memory.read_obj(GuestAddress(USED + 2)).expect("guest memory");
        let shown = index.wrapping_sub(self.used);
        assert_eq!(usize::from(shown), self.pushed.len(), "the driver sees other elements than were pushed");
        for (_, head) in self.pushed.drain(..) {
            let element = USED + 4 + 8 * u64::from(self.used % self.size);
            let id: u32 = self.memory.read_obj(GuestAddress(element)).expect("guest memory");
            assert_eq!(id, u32::from(head), "another request completes");
            self.used = self.used.wrapping_add(1);
        }
    }
}

/// Any bytes in an inflight region: what is owed to the driver is possible, and no other part of the region changes.
///
/// Input: size of the ring, used index; then the region's bytes, repeated.
pub(super) fn inflight_recover(input: &[u8]) {
    let mut input = Input::new(input);
    let size = 1 << input.below(11);
    let used = input.u16();
    let part = ring_bytes(size);
    let pattern = input.take(4096);
    let bytes: Vec<u8> = pattern.iter().copied().chain([0]).cycle().take(3 * part).collect();
    let memory = Arc::new(MmapRegion::new(3 * part).expect("memory"));
    memory.as_volatile_slice().copy_from(&bytes);
    let heads = InflightTracker::new(Arc::clone(&memory), part, size).recover(used);
    let mut after = vec![0; 3 * part];
    memory.as_volatile_slice().copy_to(&mut after);
    let is_other = |at: &usize| !(part..2 * part).contains(at);
    assert!((0..3 * part).filter(is_other).all(|at| after[at] == bytes[at]), "another ring's part has changed");
    let again = InflightTracker::new(Arc::clone(&memory), part, size).recover(used);
    let heads = heads.unwrap_or_default();
    assert_eq!(again.as_ref(), Some(&heads), "a second recovery finds something else");
    let mut sorted = heads.clone();
    sorted.sort_unstable();
    sorted.dedup();
    assert_eq!(sorted.len(), heads.len(), "a request is owed twice");
    assert!(heads.iter().all(|head| *head < size), "{heads:?} of a ring of size {size}");
}
