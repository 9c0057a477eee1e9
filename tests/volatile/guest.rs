//! A guest with random requests on one vring. It outlives its daemon, and boots again after a power cut. An oracle
//! checks what it reads.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::time::Instant;

use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserInflight;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

use crate::common::SECTOR_BYTES;
use crate::common::daemon::Daemon;
use crate::common::prng::Prng;
use crate::common::raw_ring::Segment;
use crate::common::request::{OK, STATUS_UNTOUCHED, header, pattern, range};
use crate::common::session::{Session, SessionOptions};
use crate::common::wait::TIMEOUT;
use crate::oracle::{Oracle, Value};

/// Requests in flight.
const DEPTH: usize = 32;
const QUEUE_SIZE: u16 = 128;
/// Sectors of the longest request.
const SECTORS_MAX: u64 = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum GuestOp {
    Read,
    Change(Value),
    /// Submitted at the oracle's time `then`.
    Flush {
        then: u64,
    },
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
    session: Option<Session>,
    inflight: (VhostUserInflight, File),
    slots: Vec<Slot>,
    pub oracle: Oracle,
    prng: Prng,
    marks: u64,
    is_write_through: bool,
    /// Whether requests may fail. Reads never may.
    pub may_fail: bool,
    pub completed: u64,
    pub flushes: u64,
}

impl Guest {
    /// A guest on a disk whose contents the oracle knows.
    pub fn start(daemon: &Daemon, oracle: Oracle, seed: u64) -> Self {
        let mut session = Session::negotiate(&daemon.socket(), &SessionOptions::default());
        session.share_memory();
        let wanted = VhostUserInflight { num_queues: 1, queue_size: QUEUE_SIZE, ..VhostUserInflight::default() };
        let inflight = session.frontend.get_inflight_fd(&wanted).expect("GET_INFLIGHT_FD");
        session.frontend.set_inflight_fd(&inflight.0, inflight.1.as_raw_fd()).expect("SET_INFLIGHT_FD");
        session.add_ring(QUEUE_SIZE);
        session.start_ring(0);
        let slot = |_| Slot {
            header: session.memory.alloc(16, 16),
            data: session.memory.alloc_in(1, SECTORS_MAX as usize * SECTOR_BYTES, 16),
            status: session.memory.alloc(1, 1),
            request: None,
        };
        let slots = (0..DEPTH).map(slot).collect();
        Self {
            session: Some(session),
            inflight,
            slots,
            oracle,
            prng: Prng::new(seed),
            marks: 1,
            is_write_through: false,
            may_fail: false,
            completed: 0,
            flushes: 0,
        }
    }

    fn session(&mut self) -> &mut Session {
        self.session.as_mut().expect("there is a session except during a reconnection")
    }

    /// Attaches the guest to the next daemon, with memory, vring and inflight region as the previous daemon left them.
    /// Sends QEMU's messages.
    pub fn reconnect(&mut self, daemon: &Daemon) {
        let old = self.session.take().expect("there is a session");
        let base = old.rings[0].used_idx();
        let mut session = old.reconnect(&daemon.socket());
        session.frontend.set_inflight_fd(&self.inflight.0, self.inflight.1.as_raw_fd()).expect("SET_INFLIGHT_FD");
        session.set_up_ring(0, base);
        session.enable_ring(0, true);
        session.rings[0].notify();
        self.session = Some(session);
    }

    /// The guest boots after a power cut that left the bytes `platter`.
    pub fn reboot(self, daemon: &Daemon, platter: &[u8]) -> Self {
        let Self { session, mut oracle, mut prng, marks, may_fail, completed, flushes, .. } = self;
        drop(session);
        oracle.power_cut(platter);
        Self { marks, may_fail, completed, flushes, ..Self::start(daemon, oracle, prng.next_u64()) }
    }

    /// Turns write-through on or off.
    ///
    /// => No request is in flight.
    /// => When it is turned on, all completed requests become stable, unless the disk fails.
    pub fn set_write_through(&mut self, on: bool) {
        self.session().set_writeback(!on);
        self.is_write_through = on;
        if on && !self.may_fail {
            self.oracle.flush(self.oracle.now());
        }
    }

    /// Submits and completes requests until `until`.
    pub fn run(&mut self, until: Instant) {
        while Instant::now() < until {
            for slot in 0..DEPTH {
                if self.slots[slot].request.is_none() {
                    self.submit_random(slot);
                }
            }
            self.reap();
            std::thread::yield_now();
        }
    }

    /// Completes all requests in flight.
    #[track_caller]
    pub fn drain(&mut self) {
        let end = Instant::now() + TIMEOUT;
        while self.slots.iter().any(|slot| slot.request.is_some()) {
            self.reap();
            assert!(Instant::now() < end, "requests that never complete: {:?}", self.slots);
            std::thread::yield_now();
        }
    }

    /// Reads the whole disk and checks it.
    #[track_caller]
    pub fn check_everything(&mut self) {
        self.drain();
        for first in (0..self.oracle.sectors()).step_by(SECTORS_MAX as usize) {
            let count = SECTORS_MAX.min(self.oracle.sectors() - first);
            self.submit(0, GuestOp::Read, first, count);
            self.drain();
        }
    }

    /// Drains the guest, then completes a FLUSH. Returns whether it succeeded.
    #[track_caller]
    pub fn flush(&mut self) -> bool {
        self.drain();
        let before = self.flushes;
        let then = self.oracle.now();
        self.submit(0, GuestOp::Flush { then }, 0, 0);
        self.drain();
        self.flushes > before
    }

    fn submit_random(&mut self, slot: usize) {
        let count = 1 + self.prng.below(SECTORS_MAX);
        let first = self.prng.below(self.oracle.sectors() - count);
        let op = match self.prng.below(100) {
            0..25 => GuestOp::Read,
            25..83 => {
                self.marks = self.marks % 0xfff0 + 1;
                GuestOp::Change(Value::Mark(self.marks))
            }
            83..93 => GuestOp::Change(Value::Mark(0)),
            93..95 => GuestOp::Change(Value::Any),
            _ => {
                let then = self.oracle.now();
                return self.submit(slot, GuestOp::Flush { then }, 0, 0);
            }
        };
        // Overlapping requests in flight have no defined order.
        let overlaps = |other: &Submitted| first < other.first + other.count && other.first < first + count;
        if !self.slots.iter().filter_map(|slot| slot.request.as_ref()).any(overlaps) {
            self.submit(slot, op, first, count);
        }
    }

    fn submit(&mut self, slot: usize, op: GuestOp, first: u64, count: u64) {
        let Slot { header: header_at, data, status, .. } = self.slots[slot];
        let session = self.session.as_mut().expect("there is a session");
        let memory = &session.memory;
        let len = (count as usize * SECTOR_BYTES) as u32;
        let (number, payload) = match op {
            GuestOp::Read => (VIRTIO_BLK_T_IN, Some(Segment::writable(data, len))),
            GuestOp::Change(Value::Mark(mark)) if mark > 0 => {
                memory.write(data, &pattern(mark, first, len as usize));
                (VIRTIO_BLK_T_OUT, Some(Segment::readable(data, len)))
            }
            GuestOp::Change(value) => {
                memory.write(data, &range(first, count as u32, 0));
                let number = if value == Value::Any { VIRTIO_BLK_T_DISCARD } else { VIRTIO_BLK_T_WRITE_ZEROES };
                (number, Some(Segment::readable(data, 16)))
            }
            GuestOp::Flush { .. } => (VIRTIO_BLK_T_FLUSH, None),
        };
        if let GuestOp::Change(value) = op {
            self.oracle.submit(first, count, value);
        }
        let sector = if matches!(number, VIRTIO_BLK_T_IN | VIRTIO_BLK_T_OUT) { first } else { 0 };
        memory.write(header_at, &header(number, sector));
        memory.write(status, &[STATUS_UNTOUCHED]);
        let parts = [Some(Segment::readable(header_at, 16)), payload, Some(Segment::writable(status, 1))];
        let segments: Vec<Segment> = parts.into_iter().flatten().collect();
        let head = session.rings[0].submit(&segments);
        session.rings[0].notify();
        self.slots[slot].request = Some(Submitted { op, first, count, head });
    }

    fn reap(&mut self) {
        while let Some(used) = self.session().rings[0].take_used() {
            let is_of = |slot: &Slot| slot.request.is_some_and(|request| request.head == used.head);
            let slot = self.slots.iter().position(is_of);
            self.complete(slot.unwrap_or_else(|| panic!("{used:?} completes no request in flight")));
        }
    }

    fn complete(&mut self, slot: usize) {
        let request = self.slots[slot].request.take().expect("the slot has a request");
        let Slot { data, status, .. } = self.slots[slot];
        let memory = &self.session.as_ref().expect("there is a session").memory;
        let is_ok = memory.byte(status) == OK;
        assert!(is_ok || self.may_fail && request.op != GuestOp::Read, "{request:?} failed");
        self.completed += 1;
        match request.op {
            GuestOp::Read => {
                let bytes = memory.read(data, request.count as usize * SECTOR_BYTES);
                self.oracle.check_read(request.first, &bytes).unwrap_or_else(|wrong| panic!("{request:?}: {wrong}"));
            }
            GuestOp::Change(_) if is_ok => self.oracle.complete(request.first, request.count, self.is_write_through),
            GuestOp::Flush { then } if is_ok => {
                self.flushes += 1;
                self.oracle.flush(then);
            }
            GuestOp::Change(_) | GuestOp::Flush { .. } => {}
        }
    }
}
