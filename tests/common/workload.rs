//! Random I/O through the `blkio` crate's virtio-blk driver, which nobody here wrote, checked against a [`Shadow`].
//!
//! To run it on a store that injects errors, serve that store on a socket and call [`random_io`] with an
//! [`Faults::allowed`] that says when errors may come; then heal the store and call [`settle`] and
//! [`read_everything`]. What holds in between is [`random_io`]'s contract.

use std::mem::MaybeUninit;
use std::os::fd::RawFd;
use std::path::Path;
use std::time::{Duration, Instant};

use blkio::{Blkio, Blkioq, Completion, MemoryRegion, ReqFlags};

use super::SECTOR_BYTES;
use super::prng::Prng;
use super::shadow::Shadow;
use super::wait::{self, PATIENCE, poll_until};

/// Bytes in the largest request.
const REQUEST_BYTES_MAX: usize = 1 << 20;

/// Image bytes that half of all requests go to, so that some pages are hot.
const HOT_BYTES: u64 = 4 << 20;

/// How a client connects.
#[derive(Clone, Copy, Debug)]
pub struct ClientOptions {
    pub queues: usize,
    /// Look for completions instead of waiting for interrupts.
    pub poll: bool,
    pub read_only: bool,
    /// Requests in flight at most, over all queues.
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
    /// Declared last: queues go before the device that they belong to.
    blkio: Blkio,
}

impl Client {
    /// Connects to the daemon at `socket`.
    pub fn connect(socket: &Path, options: &ClientOptions) -> Self {
        let mut blkio = poll_until("the daemon to take a connection", PATIENCE, || {
            let mut blkio = Blkio::new("virtio-blk-vhost-user").expect("the driver is compiled in");
            blkio.set_str("path", socket.to_str().expect("test paths are UTF-8")).expect("a path is a property");
            blkio.set_bool("read-only", options.read_only).expect("read-only is a property");
            blkio.connect().ok().map(|()| blkio)
        });
        let number = i32::try_from(options.queues).expect("a few queues");
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

    /// The buffer of slot `slot`.
    fn buffer(&mut self, slot: usize) -> &mut [u8] {
        assert!(slot < self.depth, "there is a buffer for each request");
        let start = (self.buffers.addr + slot * REQUEST_BYTES_MAX) as *mut u8;
        // SAFETY: inside the region that blkio mapped for us, which lives as long as `self.blkio`. The device is
        // done with a slot's buffer whenever this is called: the slot is free, or its request has completed.
        unsafe { std::slice::from_raw_parts_mut(start, REQUEST_BYTES_MAX) }
    }

    fn submit(&mut self, queue: usize, slot: usize, request: Request) {
        let start = request.first * SECTOR_BYTES as u64;
        let bytes = request.bytes();
        let buffer = self.buffer(slot).as_mut_ptr();
        let queue = &mut self.queues[queue];
        match request.kind {
            Kind::Read => queue.read(start, buffer, bytes, slot, ReqFlags::empty()),
            Kind::Write => queue.write(start, buffer, bytes, slot, ReqFlags::empty()),
            Kind::Discard => queue.discard(start, bytes as u64, slot, ReqFlags::empty()),
            Kind::WriteZeroes { unmap } => {
                let flags = if unmap { ReqFlags::empty() } else { ReqFlags::NO_UNMAP };
                queue.write_zeroes(start, bytes as u64, slot, flags);
            }
            Kind::Flush => queue.flush(slot, ReqFlags::empty()),
        }
    }

    /// Sends what has been submitted and returns the slots that have completed, each with its result (0 or -errno).
    fn collect(&mut self) -> Vec<(usize, i32)> {
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

    /// As [`Client::collect`], but waits for at least one completion.
    #[track_caller]
    fn wait(&mut self) -> Vec<(usize, i32)> {
        let end = Instant::now() + 3 * PATIENCE;
        loop {
            let done = self.collect();
            if !done.is_empty() {
                return done;
            }
            assert!(Instant::now() < end, "no completion for {:?}", 3 * PATIENCE);
            if self.poll {
                // The daemon shares the machine's few cores with us.
                std::thread::yield_now();
            } else {
                let fds: Vec<RawFd> = self.queues.iter().filter_map(Blkioq::get_completion_fd).collect();
                wait::readable(&fds, PATIENCE);
                assert!(Instant::now() < end, "no interrupt for {:?}", 3 * PATIENCE);
            }
        }
    }

    /// Runs one request alone; returns its result.
    #[track_caller]
    fn run(&mut self, request: Request) -> i32 {
        self.submit(0, 0, request);
        let done = self.wait();
        assert_eq!(done.len(), 1, "nothing else is in flight");
        done[0].1
    }

    /// Writes `bytes` at sector `first`, which must succeed.
    #[track_caller]
    pub fn write(&mut self, first: u64, bytes: &[u8]) {
        assert!(self.try_write(first, bytes), "a write at sector {first}");
    }

    /// Reads `len` bytes at sector `first`, which must succeed.
    #[track_caller]
    pub fn read(&mut self, first: u64, len: usize) -> Vec<u8> {
        self.try_read(first, len).unwrap_or_else(|| panic!("a read at sector {first}"))
    }

    /// As [`Client::write`], but may fail; whether it did not.
    #[track_caller]
    pub fn try_write(&mut self, first: u64, bytes: &[u8]) -> bool {
        let count = (bytes.len() / SECTOR_BYTES) as u64;
        self.buffer(0)[..bytes.len()].copy_from_slice(bytes);
        self.run(Request { kind: Kind::Write, first, count }) == 0
    }

    /// As [`Client::read`], but may fail.
    #[track_caller]
    pub fn try_read(&mut self, first: u64, len: usize) -> Option<Vec<u8>> {
        let count = (len / SECTOR_BYTES) as u64;
        let good = self.run(Request { kind: Kind::Read, first, count }) == 0;
        good.then(|| self.buffer(0)[..len].to_vec())
    }

    /// Flushes; true if the device said that all is well.
    #[track_caller]
    pub fn flush(&mut self) -> bool {
        self.run(Request { kind: Kind::Flush, first: 0, count: 0 }) == 0
    }
}

fn clear_eventfd(fd: RawFd) {
    let mut count = [0_u8; 8];
    // SAFETY: reads into a live buffer of that length. The descriptor is non-blocking; no event is no error.
    unsafe { libc::read(fd, count.as_mut_ptr().cast(), count.len()) };
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Discard,
    WriteZeroes { unmap: bool },
    Flush,
}

#[derive(Clone, Copy, Debug)]
struct Request {
    kind: Kind,
    first: u64,
    count: u64,
}

impl Request {
    fn bytes(self) -> usize {
        self.count as usize * SECTOR_BYTES
    }

    /// True if the outcome of the two would depend on which the device does first.
    fn conflicts_with(self, other: Self) -> bool {
        let both_read = self.kind == Kind::Read && other.kind == Kind::Read;
        let overlap = self.first < other.first + other.count && other.first < self.first + self.count;
        overlap && !both_read
    }
}

/// When requests may fail, and when the disk can be looked at.
pub struct Faults<'a> {
    /// True while the store may fail requests. Asked when a request is submitted and when it completes.
    pub allowed: &'a dyn Fn() -> bool,
    /// Called with nothing in flight after a FLUSH that succeeded: whatever the shadow knows is stable now, so a
    /// look at the store itself (even after a simulated power cut) must agree with it. The place to inject and heal.
    pub flushed: &'a mut dyn FnMut(&Shadow),
}

/// How much of what to do.
#[derive(Clone, Copy, Debug)]
pub struct IoPlan {
    pub requests: u64,
    pub seed: u64,
    /// Pauses in which everything is flushed and [`Faults::flushed`] is called.
    pub checkpoints: u64,
    pub read_only: bool,
}

/// What came of it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Report {
    pub completed: u64,
    pub failed: u64,
    pub failed_flushes: u64,
}

/// A request that is out.
struct InFlight {
    request: Request,
    /// Errors were allowed when it was submitted.
    errors_allowed: bool,
}

/// Runs random reads, writes, flushes, discards and write-zeroes, as many at a time as the client has buffers, and
/// checks every read against `shadow`.
///
/// => every request completes, once, within a deadline, with success or, where `faults` allows it, with an error
/// => a read that succeeded returns what `shadow` allows
/// => a write that failed leaves each of its sectors old or new; a discard that failed leaves anything
/// => requests whose outcome would depend on their order are never out together
#[track_caller]
pub fn random_io(client: &mut Client, shadow: &mut Shadow, plan: &IoPlan, faults: &mut Faults<'_>) -> Report {
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
                if slots.iter().flatten().any(|out| out.request.conflicts_with(request)) {
                    continue;
                }
                if request.kind == Kind::Write {
                    prng.fill(&mut client.buffer(slot)[..request.bytes()]);
                }
                let queue = prng.below(client.queues.len() as u64) as usize;
                client.submit(queue, slot, request);
                slots[slot] = Some(InFlight { request, errors_allowed: (faults.allowed)() });
                submitted += 1;
            }
            if slots.iter().all(Option::is_none) {
                continue;
            }
            for (slot, result) in client.wait() {
                let out = slots[slot].take().expect("a request completes once");
                complete(client, shadow, slot, &out, result, faults, &mut report, plan.seed);
            }
        }
        if client.flush() {
            (faults.flushed)(shadow);
        } else {
            report.failed_flushes += 1;
            assert!((faults.allowed)(), "seed {}: checkpoint {checkpoint}: the flush failed", plan.seed);
        }
    }
    report
}

/// Enters a completion into the shadow.
#[expect(clippy::too_many_arguments, reason = "one call site, and a struct for it would say nothing more")]
#[track_caller]
fn complete(
    client: &mut Client,
    shadow: &mut Shadow,
    slot: usize,
    out: &InFlight,
    result: i32,
    faults: &Faults<'_>,
    report: &mut Report,
    seed: u64,
) {
    let Request { kind, first, count } = out.request;
    let bytes = out.request.bytes();
    report.completed += 1;
    if result == 0 {
        match kind {
            Kind::Read => {
                if let Err(mismatch) = shadow.check(first, &client.buffer(slot)[..bytes]) {
                    panic!("seed {seed}: request {}: {:?}: {mismatch:x?}", report.completed, out.request);
                }
            }
            Kind::Write => shadow.write(first, &client.buffer(slot)[..bytes]),
            Kind::WriteZeroes { .. } => shadow.write_zeroes(first, count),
            Kind::Discard => shadow.discard(first, count),
            Kind::Flush => {}
        }
        return;
    }
    let excused = out.errors_allowed || (faults.allowed)();
    assert!(excused, "seed {seed}: request {}: {:?} failed with {result}", report.completed, out.request);
    report.failed += 1;
    match kind {
        Kind::Read => {}
        Kind::Write => shadow.doubt_write(first, &client.buffer(slot)[..bytes]),
        Kind::WriteZeroes { .. } => shadow.doubt_write_zeroes(first, count),
        Kind::Discard => shadow.discard(first, count),
        Kind::Flush => report.failed_flushes += 1,
    }
}

/// A request anywhere on a disk of `sectors`: mostly small, half of them in the hot part, half of them on pages'
/// edges. `cursor` is where the one sequential reader has got to.
fn random_request(prng: &mut Prng, sectors: u64, cursor: &mut u64, read_only: bool) -> Request {
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
    let kind = match prng.below(100) {
        0..45 => Kind::Read,
        45..55 => {
            count = 128.min(sectors);
            first = if *cursor + count > sectors { 0 } else { *cursor };
            *cursor = first + count;
            Kind::Read
        }
        // A flush covers no range.
        55..57 => {
            return Request { kind: Kind::Flush, first: 0, count: 0 };
        }
        _ if read_only => Kind::Read,
        57..87 => Kind::Write,
        87..91 => Kind::Discard,
        91..96 => Kind::WriteZeroes { unmap: true },
        _ => Kind::WriteZeroes { unmap: false },
    };
    Request { kind, first, count }
}

/// Flushes until the device says that all is well; for a store that was healed a moment ago.
#[track_caller]
pub fn settle(client: &mut Client, limit: Duration) {
    poll_until("a flush to succeed on a healthy store", limit, || client.flush().then_some(()));
}

/// Reads the whole disk through `client` and checks it against `shadow`.
#[track_caller]
pub fn read_everything(client: &mut Client, shadow: &Shadow) {
    assert_eq!(client.sectors(), shadow.sectors(), "the disk is as large as it was");
    let step = (REQUEST_BYTES_MAX / SECTOR_BYTES) as u64;
    for first in (0..shadow.sectors()).step_by(step as usize) {
        let count = step.min(shadow.sectors() - first);
        let found = client.read(first, count as usize * SECTOR_BYTES);
        if let Err(mismatch) = shadow.check(first, &found) {
            panic!("reading everything back: {mismatch:x?}");
        }
    }
}
