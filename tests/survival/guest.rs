//! A guest that outlives its disk's daemon: rings and memory stay when the daemon dies, and the front-end gives the
//! inflight region to the next daemon. The guest remembers what it wrote, and checks every completion.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserInflight;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

use crate::common::SECTOR_BYTES;
use crate::common::daemon::Daemon;
use crate::common::prng::Prng;
use crate::common::raw_ring::{Ring, Segment};
use crate::common::request::{OK, header, pattern, range};
use crate::common::session::{Session, SessionOptions, ring_addresses};
use crate::common::wait::TIMEOUT;

/// Requests in flight over all rings.
const DEPTH: usize = 64;
const RINGS: usize = 4;
const RING_SIZE: u16 = 128;
/// Sectors of the longest request.
const SECTORS_MAX: u64 = 64;

/// The front-end whose reconnection the guest imitates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrontEnd {
    /// Sets the ring base to the used index at the time of the disconnection, and kicks.
    Qemu,
    /// Sets the ring base to the available index, and does not kick (`reinitialize_vhost_user`).
    CloudHypervisor,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum GuestOp {
    Read,
    Write { mark: u64 },
    Zero,
    Discard,
    Flush,
}

/// What a sector holds: the mark of its last write (0: zeros); `None` if its contents are undefined.
type Known = Option<u64>;

/// What a guest knows of its disk.
#[derive(Clone, Debug)]
pub struct Memory {
    sectors: Vec<Known>,
    /// The mark of the last write.
    marks: u64,
}

impl Memory {
    /// Of a disk of zeros.
    pub fn of_zeros(sectors: u64) -> Self {
        Self { sectors: vec![Some(0); sectors as usize], marks: 0 }
    }
}

/// A request in flight.
#[derive(Clone, Copy, Debug)]
struct Submitted {
    op: GuestOp,
    first: u64,
    count: u64,
    head: u16,
}

/// Guest addresses for one request at a time.
#[derive(Debug)]
struct Slot {
    header: u64,
    data: u64,
    status: u64,
    request: Option<Submitted>,
}

/// The guest; see the module.
pub struct Guest {
    front_end: FrontEnd,
    session: Option<Session>,
    inflight: (VhostUserInflight, File),
    slots: Vec<Slot>,
    disk: Vec<Known>,
    prng: Prng,
    marks: u64,
    pub completed: u64,
}

impl Guest {
    /// Attaches to a disk of zeros.
    pub fn attach(front_end: FrontEnd, daemon: &Daemon, sectors: u64, seed: u64) -> Self {
        Self::boot(front_end, daemon, Memory::of_zeros(sectors), seed)
    }

    /// A guest that starts anew, of which it is known what its disk holds.
    pub fn boot(front_end: FrontEnd, daemon: &Daemon, memory: Memory, seed: u64) -> Self {
        let options = SessionOptions { queues: RINGS, ..SessionOptions::default() };
        let mut session = Session::negotiate(&daemon.socket(), &options);
        session.share_memory();
        let wish =
            VhostUserInflight { num_queues: RINGS as u16, queue_size: RING_SIZE, ..VhostUserInflight::default() };
        let inflight = session.frontend.get_inflight_fd(&wish).expect("GET_INFLIGHT_FD");
        session.frontend.set_inflight_fd(&inflight.0, inflight.1.as_raw_fd()).expect("SET_INFLIGHT_FD");
        let bytes = SECTORS_MAX as usize * SECTOR_BYTES;
        let slot = |_| Slot {
            header: session.memory.alloc(16, 16),
            data: session.memory.alloc_in(1, bytes, 16),
            status: session.memory.alloc(1, 1),
            request: None,
        };
        let slots = (0..DEPTH).map(slot).collect();
        for index in 0..RINGS {
            session.add_ring(RING_SIZE);
            session.start_ring(index);
        }
        let Memory { sectors: disk, marks } = memory;
        let prng = Prng::new(seed);
        Self { front_end, session: Some(session), inflight, slots, disk, prng, marks, completed: 0 }
    }

    /// Powers the guest off after its last request and a FLUSH; returns what its disk holds.
    pub fn shut_down(mut self) -> Memory {
        self.flush();
        Memory { sectors: self.disk, marks: self.marks }
    }

    /// The mark of the last write, for a guest that follows.
    pub fn continue_marks_of(memory: &mut Memory, other: &Self) {
        memory.marks = other.marks;
    }

    fn session(&mut self) -> &mut Session {
        self.session.as_mut().expect("there is a session except during a reconnection")
    }

    /// Submits requests until the daemon hangs up. Then attaches to the daemon that `restart` starts, with the same
    /// memory, rings and inflight region. Submits requests in between, too.
    pub fn reconnect(&mut self, daemon: &mut Daemon, restart: impl FnOnce(&mut Daemon)) {
        self.run_until(|guest| guest.session().is_closed());
        // QEMU reads the used indices now; from here on they must not change.
        let used: Vec<u16> = self.session().rings.iter().map(Ring::used_idx).collect();
        restart(daemon);
        self.run(Instant::now() + Duration::from_millis(1));
        let old = self.session.take().expect("there is a session");
        self.session = Some(match self.front_end {
            FrontEnd::Qemu => self.reconnect_as_qemu(old, daemon, &used),
            FrontEnd::CloudHypervisor => self.reconnect_as_cloud_hypervisor(old, daemon),
        });
    }

    fn reconnect_as_qemu(&self, old: Session, daemon: &Daemon, used: &[u16]) -> Session {
        let mut session = old.reconnect(&daemon.socket());
        session.frontend.set_inflight_fd(&self.inflight.0, self.inflight.1.as_raw_fd()).expect("SET_INFLIGHT_FD");
        for (index, &base) in used.iter().enumerate() {
            session.set_up_ring(index, base);
            session.enable_ring(index, true);
            session.rings[index].notify();
        }
        session
    }

    /// Sends the messages of `setup_vhost_user`, in its order.
    fn reconnect_as_cloud_hypervisor(&self, old: Session, daemon: &Daemon) -> Session {
        let mut session = old.reconnect_unasked(&daemon.socket());
        let Session { frontend, rings, .. } = &mut session;
        for (index, ring) in rings.iter().enumerate() {
            frontend.set_vring_num(index, ring.size()).expect("SET_VRING_NUM");
        }
        frontend.set_inflight_fd(&self.inflight.0, self.inflight.1.as_raw_fd()).expect("SET_INFLIGHT_FD");
        for (index, ring) in rings.iter().enumerate() {
            frontend.set_vring_addr(index, &ring_addresses(ring)).expect("SET_VRING_ADDR");
            frontend.set_vring_base(index, ring.avail_idx()).expect("SET_VRING_BASE");
            frontend.set_vring_call(index, &ring.call).expect("SET_VRING_CALL");
            frontend.set_vring_kick(index, &ring.kick).expect("SET_VRING_KICK");
        }
        for index in 0..RINGS {
            frontend.set_vring_enable(index, true).expect("SET_VRING_ENABLE");
        }
        session
    }

    /// Submits and completes requests until `until`.
    pub fn run(&mut self, until: Instant) {
        self.run_until(|_| Instant::now() >= until);
    }

    fn run_until(&mut self, is_done: impl Fn(&mut Self) -> bool) {
        while !is_done(self) {
            for slot in 0..DEPTH {
                if self.slots[slot].request.is_none() {
                    self.submit_random(slot);
                }
            }
            self.reap();
        }
    }

    /// Waits until no request is in flight.
    #[track_caller]
    pub fn drain(&mut self) {
        let end = Instant::now() + TIMEOUT;
        while self.slots.iter().any(|slot| slot.request.is_some()) {
            self.reap();
            assert!(Instant::now() < end, "requests that never complete: {:?}", self.slots);
        }
    }

    /// Reads the whole disk and checks it.
    pub fn check_everything(&mut self) {
        self.drain();
        for first in (0..self.disk.len() as u64).step_by(SECTORS_MAX as usize) {
            let count = SECTORS_MAX.min(self.disk.len() as u64 - first);
            self.submit(0, GuestOp::Read, first, count);
            self.drain();
        }
    }

    /// Completes a FLUSH with no other request in flight.
    pub fn flush(&mut self) {
        self.drain();
        self.submit(0, GuestOp::Flush, 0, 0);
        self.drain();
    }

    /// Fails the test if `image` does not hold what the guest wrote.
    pub fn assert_image(&self, image: &[u8]) {
        for (sector, known) in self.disk.iter().enumerate() {
            let found = &image[sector * SECTOR_BYTES..(sector + 1) * SECTOR_BYTES];
            assert_holds(*known, sector as u64, found);
        }
    }

    fn submit_random(&mut self, slot: usize) {
        let count = 1 + self.prng.below(SECTORS_MAX);
        let first = self.prng.below(self.disk.len() as u64 - count);
        let op = match self.prng.below(100) {
            0..30 => GuestOp::Read,
            30..85 => {
                self.marks = self.marks % 0xfff0 + 1;
                GuestOp::Write { mark: self.marks }
            }
            85..90 => GuestOp::Zero,
            90..94 => GuestOp::Discard,
            _ => return self.submit(slot, GuestOp::Flush, 0, 0),
        };
        // Overlapping requests in flight leave undefined data.
        let overlaps = |other: &Submitted| first < other.first + other.count && other.first < first + count;
        if !self.slots.iter().filter_map(|slot| slot.request.as_ref()).any(overlaps) {
            self.submit(slot, op, first, count);
        }
    }

    fn submit(&mut self, slot: usize, op: GuestOp, first: u64, count: u64) {
        const NO_STATUS: u8 = 0xaa;
        let Slot { header: header_at, data, status, .. } = self.slots[slot];
        let session = self.session.as_mut().expect("there is a session");
        let memory = &session.memory;
        let bytes = (count as usize * SECTOR_BYTES) as u32;
        let (number, payload) = match op {
            GuestOp::Read => (VIRTIO_BLK_T_IN, Some(Segment::writable(data, bytes))),
            GuestOp::Write { mark } => {
                memory.write(data, &pattern(mark, first, bytes as usize));
                (VIRTIO_BLK_T_OUT, Some(Segment::readable(data, bytes)))
            }
            GuestOp::Zero | GuestOp::Discard => {
                memory.write(data, &range(first, count as u32, 0));
                let number = if op == GuestOp::Zero { VIRTIO_BLK_T_WRITE_ZEROES } else { VIRTIO_BLK_T_DISCARD };
                (number, Some(Segment::readable(data, 16)))
            }
            GuestOp::Flush => (VIRTIO_BLK_T_FLUSH, None),
        };
        let sector = if matches!(op, GuestOp::Read | GuestOp::Write { .. }) { first } else { 0 };
        memory.write(header_at, &header(number, sector));
        memory.write(status, &[NO_STATUS]);
        let segments: Vec<Segment> =
            [Some(Segment::readable(header_at, 16)), payload, Some(Segment::writable(status, 1))]
                .into_iter()
                .flatten()
                .collect();
        let ring = &mut session.rings[slot % RINGS];
        let head = ring.submit(&segments);
        ring.notify();
        self.slots[slot].request = Some(Submitted { op, first, count, head });
    }

    fn reap(&mut self) {
        for ring in 0..RINGS {
            while let Some(used) = self.session().rings[ring].take_used() {
                let mine = |slot: &usize| {
                    slot % RINGS == ring && self.slots[*slot].request.is_some_and(|request| request.head == used.head)
                };
                let slot = (0..DEPTH).find(mine);
                self.complete(slot.unwrap_or_else(|| panic!("ring {ring}: {used:?} completes no request in flight")));
            }
        }
    }

    fn complete(&mut self, slot: usize) {
        let request = self.slots[slot].request.take().expect("the slot has a request");
        let Slot { data, status, .. } = self.slots[slot];
        let memory = &self.session.as_ref().expect("there is a session").memory;
        assert_eq!(memory.byte(status), OK, "{request:?}");
        let sectors = request.first as usize..(request.first + request.count) as usize;
        match request.op {
            GuestOp::Read => {
                let bytes = memory.read(data, request.count as usize * SECTOR_BYTES);
                for (sector, found) in sectors.zip(bytes.chunks_exact(SECTOR_BYTES)) {
                    assert_holds(self.disk[sector], sector as u64, found);
                }
            }
            GuestOp::Write { mark } => self.disk[sectors].fill(Some(mark)),
            GuestOp::Zero => self.disk[sectors].fill(Some(0)),
            GuestOp::Discard => self.disk[sectors].fill(None),
            GuestOp::Flush => {}
        }
        self.completed += 1;
    }
}

fn assert_holds(known: Known, sector: u64, found: &[u8]) {
    let expected = match known {
        None => return,
        Some(0) => vec![0; SECTOR_BYTES],
        Some(mark) => pattern(mark, sector, SECTOR_BYTES),
    };
    let word = u64::from_le_bytes(found[..8].try_into().expect("eight bytes"));
    assert!(found == expected, "sector {sector}: expected mark {known:?}, found {:#x} (mark {})", word, word >> 48);
}
