//! Random I/O through the `blkio` crate's virtio-blk driver, an independent implementation, checked against a
//! [`Shadow`].
//!
//! To test a store that injects errors, serve it on a socket and call [`random_io`] with a [`FaultRules::may_fail`]
//! that tells when requests may fail. Then heal the store, and call [`settle`] and [`read_everything`].

use std::mem::MaybeUninit;
use std::os::fd::RawFd;
use std::path::Path;
use std::time::{Duration, Instant};

use blkio::{Blkio, Blkioq, Completion, MemoryRegion, ReqFlags};

use super::SECTOR_BYTES;
use super::prng::Prng;
use super::shadow::Shadow;
use super::wait::{self, TIMEOUT, poll_until};

/// Bytes in the largest request.
const REQUEST_BYTES_MAX: usize = 1 << 20;

/// Half of all requests go to this many bytes at the start of the image, so that some pages are hot.
const HOT_BYTES: u64 = 4 << 20;

/// How a client connects.
#[derive(Clone, Copy, Debug)]
pub struct ClientOptions {
    pub queues: usize,
    /// Poll for completions instead of waiting for interrupts.
    pub poll: bool,
    pub read_only: bool,
    /// Maximum number of requests in flight, over all queues.
    pub depth: usize,
}

impl Default for ClientOptions {
    fn default() -> Self {
        Self { queues: 1, poll: false, read_only: false, depth: 64 }
    }
}

/// A connected `blkio` client with a buffer for each request in flight.
pub struct Client {
    queues: Vec<Blkioq>,
    buffers: MemoryRegion,
    depth: usize,
    poll: bool,
    /// The last field: the queues must be dropped before their device.
    blkio: Blkio,
}

impl Client {
    /// Connects to the daemon at `socket`.
    pub fn connect(socket: &Path, options: &ClientOptions) -> Self {
        let mut blkio = poll_until("the daemon to accept a connection", TIMEOUT, || {
            let mut blkio = Blkio::new("virtio-blk-vhost-user").expect("the driver is compiled in");
            blkio.set_str("path", socket.to_str().expect("test paths are UTF-8")).expect("a path is a property");
            blkio.set_bool("read-only", options.read_only).expect("read-only is a property");
            blkio.connect().ok().map(|()| blkio)
        });
        let number = i32::try_from(options.queues).expect("a small number");
        let (interrupt, polled) = if options.poll { (0, number) } else { (number, 0) };
        blkio.set_i32("num-queues", interrupt).expect("a number of queues is a property");
        blkio.set_i32("num-poll-queues", polled).expect("a number of queues is a property");
        let started = blkio.start().expect("the device starts");
        let buffers = blkio.alloc_mem_region(options.depth * REQUEST_BYTES_MAX).expect("memory for buffers");
        blkio.map_mem_region(&buffers).expect("buffers can be shared");
        let mut queues = if options.poll { started.poll_queues } else { started.queues };
        if !options.poll {
            for queue in &mut queues {
                queue.set_completion_fd_enabled(true);
            }
        }
        Self { queues, buffers, depth: options.depth, poll: options.poll, blkio }
    }

    /// The disk's size in sectors.
    pub fn sectors(&self) -> u64 {
        self.blkio.get_u64("capacity").expect("capacity is a property") / SECTOR_BYTES as u64
    }

    /// The buffer of a slot.
    fn buffer(&mut self, slot: usize) -> &mut [u8] {
        assert!(slot < self.depth, "there is a buffer for each request");
        let start = (self.buffers.addr + slot * REQUEST_BYTES_MAX) as *mut u8;
        // SAFETY: the range is inside the region that blkio mapped for us, which lives as long as `self.blkio`. The
        // device does not use the buffer now: the slot is free, or its request has completed.
        unsafe { std::slice::from_raw_parts_mut(start, REQUEST_BYTES_MAX) }
    }

    fn submit(&mut self, queue: usize, slot: usize, request: WorkloadRequest) {
        let start = request.first * SECTOR_BYTES as u64;
        let bytes = request.bytes();
        let buffer = self.buffer(slot).as_mut_ptr();
        let queue = &mut self.queues[queue];
        match request.op {
            WorkloadOp::Read => queue.read(start, buffer, bytes, slot, ReqFlags::empty()),
            WorkloadOp::Write => queue.write(start, buffer, bytes, slot, ReqFlags::empty()),
            WorkloadOp::Discard => queue.discard(start, bytes as u64, slot, ReqFlags::empty()),
            WorkloadOp::WriteZeroes { unmap } => {
                let flags = if unmap { ReqFlags::empty() } else { ReqFlags::NO_UNMAP };
                queue.write_zeroes(start, bytes as u64, slot, flags);
            }
            WorkloadOp::Flush => queue.flush(slot, ReqFlags::empty()),
        }
    }

    /// Notifies the device of submitted requests; returns the completed slots, each with its result (0 or -errno).
    fn reap(&mut self) -> Vec<(usize, i32)> {
        let mut done = Vec::new();
        for queue in &mut self.queues {
            if let Some(fd) = queue.get_completion_fd() {
                clear_eventfd(fd);
            }
            let mut completions = [const { MaybeUninit::<Completion>::uninit() }; 64];
            let count = queue.do_io(&mut completions, 0, None, None).expect("the queue works");
            for completion in &completions[..count] {
                // SAFETY: do_io has written the first `count` elements.
                let completion = unsafe { completion.assume_init_ref() };
                done.push((completion.user_data, completion.ret));
            }
        }
        done
    }

    /// As [`Client::reap`], but waits for at least one completion.
    #[track_caller]
    fn wait(&mut self) -> Vec<(usize, i32)> {
        let end = Instant::now() + 3 * TIMEOUT;
        loop {
            let done = self.reap();
            if !done.is_empty() {
                return done;
            }
            assert!(Instant::now() < end, "no completion for {:?}", 3 * TIMEOUT);
            if self.poll {
                // The daemon needs a core too.
                std::thread::yield_now();
            } else {
                let fds: Vec<RawFd> = self.queues.iter().filter_map(Blkioq::get_completion_fd).collect();
                wait::readable(&fds, TIMEOUT);
                assert!(Instant::now() < end, "no interrupt for {:?}", 3 * TIMEOUT);
            }
        }
    }

    /// Runs one request with nothing else in flight; returns its result.
    #[track_caller]
    fn run(&mut self, request: WorkloadRequest) -> i32 {
        self.submit(0, 0, request);
        let done = self.wait();
        assert_eq!(done.len(), 1, "nothing else is in flight");
        done[0].1
    }

    /// Writes `bytes` at sector `first`. The write must succeed.
    #[track_caller]
    pub fn write(&mut self, first: u64, bytes: &[u8]) {
        assert!(self.try_write(first, bytes), "the write at sector {first} failed");
    }

    /// Reads `len` bytes at sector `first`. The read must succeed.
    #[track_caller]
    pub fn read(&mut self, first: u64, len: usize) -> Vec<u8> {
        self.try_read(first, len).unwrap_or_else(|| panic!("the read at sector {first} failed"))
    }

    /// As [`Client::write`], but the write may fail; returns whether it succeeded.
    #[track_caller]
    pub fn try_write(&mut self, first: u64, bytes: &[u8]) -> bool {
        let count = (bytes.len() / SECTOR_BYTES) as u64;
        self.buffer(0)[..bytes.len()].copy_from_slice(bytes);
        self.run(WorkloadRequest { op: WorkloadOp::Write, first, count }) == 0
    }

    /// As [`Client::read`], but the read may fail; then returns `None`.
    #[track_caller]
    pub fn try_read(&mut self, first: u64, len: usize) -> Option<Vec<u8>> {
        let count = (len / SECTOR_BYTES) as u64;
        let succeeded = self.run(WorkloadRequest { op: WorkloadOp::Read, first, count }) == 0;
        succeeded.then(|| self.buffer(0)[..len].to_vec())
    }

    /// Discards `count` sectors from sector `first` on. The discard must succeed.
    #[track_caller]
    pub fn discard(&mut self, first: u64, count: u64) {
        let result = self.run(WorkloadRequest { op: WorkloadOp::Discard, first, count });
        assert_eq!(result, 0, "the discard at sector {first} failed");
    }

    /// Flushes; returns whether the FLUSH succeeded.
    #[track_caller]
    pub fn flush(&mut self) -> bool {
        self.run(WorkloadRequest { op: WorkloadOp::Flush, first: 0, count: 0 }) == 0
    }
}

fn clear_eventfd(fd: RawFd) {
    let mut count = [0_u8; 8];
    // SAFETY: reads into a live buffer of that length. The descriptor is non-blocking; no event is no error.
    unsafe { libc::read(fd, count.as_mut_ptr().cast(), count.len()) };
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WorkloadOp {
    Read,
    Write,
    Discard,
    WriteZeroes { unmap: bool },
    Flush,
}

#[derive(Clone, Copy, Debug)]
struct WorkloadRequest {
    op: WorkloadOp,
    first: u64,
    count: u64,
}

impl WorkloadRequest {
    fn bytes(self) -> usize {
        self.count as usize * SECTOR_BYTES
    }

    /// Whether the result depends on which of the two the device processes first.
    fn conflicts_with(self, other: Self) -> bool {
        let both_read = self.op == WorkloadOp::Read && other.op == WorkloadOp::Read;
        let overlap = self.first < other.first + other.count && other.first < self.first + self.count;
        overlap && !both_read
    }
}

/// When requests may fail, and when the image can be checked.
pub struct FaultRules<'a> {
    /// Whether the store may fail requests now. Called when a request is submitted and when it completes.
    pub may_fail: &'a dyn Fn() -> bool,
    /// Called after each FLUSH that succeeded, with nothing in flight: the image (even after a simulated power cut)
    /// must match the shadow. Tests inject faults and heal the store here.
    pub after_flush: &'a mut dyn FnMut(&Shadow),
}

/// The amount and kind of I/O.
#[derive(Clone, Copy, Debug)]
pub struct IoPlan {
    pub requests: u64,
    pub seed: u64,
    /// Number of pauses in which the client flushes and [`FaultRules::after_flush`] is called.
    pub checkpoints: u64,
    pub read_only: bool,
}

/// The number of requests by result.
#[derive(Clone, Copy, Debug, Default)]
pub struct Report {
    pub completed: u64,
    pub failed: u64,
    pub failed_flushes: u64,
}

/// A request in flight.
struct InFlight {
    request: WorkloadRequest,
    /// It was submitted while requests could fail.
    could_fail: bool,
}

/// Runs random reads, writes, flushes, discards and write-zeroes, as many at a time as the client has buffers, and
/// checks every read against `shadow`.
///
/// => every request completes once, within a deadline; it fails only where `faults` allows it
/// => a read that succeeds returns data that `shadow` allows
/// => a write that fails leaves each of its sectors old or new; a discard that fails leaves any data
/// => requests whose result depends on their order are never in flight together
#[track_caller]
pub fn random_io(client: &mut Client, shadow: &mut Shadow, plan: &IoPlan, faults: &mut FaultRules<'_>) -> Report {
    let mut prng = Prng::new(plan.seed);
    let mut report = Report::default();
    let mut slots: Vec<Option<InFlight>> = (0..client.depth).map(|_| None).collect();
    let mut submitted = 0;
    let mut cursor = 0;
    for checkpoint in 1..=plan.checkpoints {
        let goal = plan.requests * checkpoint / plan.checkpoints;
        while submitted < goal || slots.iter().any(Option::is_some) {
            let free: Vec<usize> = (0..slots.len()).filter(|&slot| slots[slot].is_none()).collect();
            for slot in free {
                if submitted == goal {
                    break;
                }
                let request = random_request(&mut prng, shadow.sectors(), &mut cursor, plan.read_only);
                if slots.iter().flatten().any(|other| other.request.conflicts_with(request)) {
                    continue;
                }
                if request.op == WorkloadOp::Write {
                    prng.fill(&mut client.buffer(slot)[..request.bytes()]);
                }
                let queue = prng.below(client.queues.len() as u64) as usize;
                client.submit(queue, slot, request);
                slots[slot] = Some(InFlight { request, could_fail: (faults.may_fail)() });
                submitted += 1;
            }
            if slots.iter().all(Option::is_none) {
                continue;
            }
            for (slot, result) in client.wait() {
                let done = slots[slot].take().expect("a request completes once");
                complete(client, shadow, slot, &done, result, faults, &mut report, plan.seed);
            }
        }
        if client.flush() {
            (faults.after_flush)(shadow);
        } else {
            report.failed_flushes += 1;
            assert!((faults.may_fail)(), "seed {}: checkpoint {checkpoint}: the FLUSH failed", plan.seed);
        }
    }
    report
}

/// Updates the shadow for a completed request, and checks a read.
#[expect(clippy::too_many_arguments, reason = "one call site: a struct would add nothing")]
#[track_caller]
fn complete(
    client: &mut Client,
    shadow: &mut Shadow,
    slot: usize,
    done: &InFlight,
    result: i32,
    faults: &FaultRules<'_>,
    report: &mut Report,
    seed: u64,
) {
    let WorkloadRequest { op, first, count } = done.request;
    let bytes = done.request.bytes();
    report.completed += 1;
    if result == 0 {
        match op {
            WorkloadOp::Read => {
                if let Err(mismatch) = shadow.check(first, &client.buffer(slot)[..bytes]) {
                    panic!("seed {seed}: request {}: {:?}: {mismatch:x?}", report.completed, done.request);
                }
            }
            WorkloadOp::Write => shadow.write(first, &client.buffer(slot)[..bytes]),
            WorkloadOp::WriteZeroes { .. } => shadow.write_zeroes(first, count),
            WorkloadOp::Discard => shadow.discard(first, count),
            WorkloadOp::Flush => {}
        }
        return;
    }
    let may_fail = done.could_fail || (faults.may_fail)();
    assert!(may_fail, "seed {seed}: request {}: {:?} failed with {result}", report.completed, done.request);
    report.failed += 1;
    match op {
        WorkloadOp::Read => {}
        WorkloadOp::Write => shadow.doubt_write(first, &client.buffer(slot)[..bytes]),
        WorkloadOp::WriteZeroes { .. } => shadow.doubt_write_zeroes(first, count),
        WorkloadOp::Discard => shadow.discard(first, count),
        WorkloadOp::Flush => report.failed_flushes += 1,
    }
}

/// A random request on a disk of `sectors`: mostly small, half of them in the hot part, half of them page-aligned.
/// `cursor` is the position of one sequential reader.
fn random_request(prng: &mut Prng, sectors: u64, cursor: &mut u64, read_only: bool) -> WorkloadRequest {
    let most = match prng.below(100) {
        0 => REQUEST_BYTES_MAX,
        1..10 => 64 << 10,
        _ => 8 << 10,
    };
    let mut count = 1 + prng.below((most / SECTOR_BYTES) as u64);
    let hot_sectors = HOT_BYTES / SECTOR_BYTES as u64;
    let reach = if prng.percent(50) { hot_sectors.min(sectors) } else { sectors };
    let mut first = prng.below(reach - count);
    if prng.percent(50) {
        first &= !7;
        count = count.next_multiple_of(8).min((most / SECTOR_BYTES) as u64);
    }
    let op = match prng.below(100) {
        0..45 => WorkloadOp::Read,
        45..55 => {
            count = 128.min(sectors);
            first = if *cursor + count > sectors { 0 } else { *cursor };
            *cursor = first + count;
            WorkloadOp::Read
        }
        // A flush has no range.
        55..57 => {
            return WorkloadRequest { op: WorkloadOp::Flush, first: 0, count: 0 };
        }
        _ if read_only => WorkloadOp::Read,
        57..87 => WorkloadOp::Write,
        87..91 => WorkloadOp::Discard,
        91..96 => WorkloadOp::WriteZeroes { unmap: true },
        _ => WorkloadOp::WriteZeroes { unmap: false },
    };
    WorkloadRequest { op, first, count }
}

/// Flushes until a FLUSH succeeds, for a store that was just healed.
#[track_caller]
pub fn settle(client: &mut Client, limit: Duration) {
    poll_until("a FLUSH to succeed on a healthy store", limit, || client.flush().then_some(()));
}

/// Reads the whole disk through `client` and checks it against `shadow`.
#[track_caller]
pub fn read_everything(client: &mut Client, shadow: &Shadow) {
    assert_eq!(client.sectors(), shadow.sectors(), "the disk keeps its size");
    let step = (REQUEST_BYTES_MAX / SECTOR_BYTES) as u64;
    for first in (0..shadow.sectors()).step_by(step as usize) {
        let count = step.min(shadow.sectors() - first);
        let found = client.read(first, count as usize * SECTOR_BYTES);
        if let Err(mismatch) = shadow.check(first, &found) {
            panic!("the whole disk: {mismatch:x?}");
        }
    }
}
