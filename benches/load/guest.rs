//! The driver side of a vhost-user socket: the virtio-blk driver of libblkio, which is independent of genblk.

use std::mem::MaybeUninit;
use std::path::Path;
use std::time::Duration;

use blkio::{Blkio, Blkioq, Completion, MemoryRegion, ReqFlags};

use crate::job::{Client, CompletionMode, Job};
use crate::queue::{Op, Queue};

/// Without a completion for this long the benchmark aborts.
const COMPLETION_TIMEOUT: Duration = Duration::from_secs(60);

/// A connection and its queues.
pub struct Guest {
    pub queues: Vec<GuestQueue>,
    /// Declared last: the queues must be dropped before their device.
    pub connection: Blkio,
}

impl Guest {
    /// Connects with this many queues, each large enough for any client of the job.
    ///
    /// # Errors
    /// libblkio's, as text.
    pub fn connect(socket: &Path, job: &Job, queues: usize) -> Result<Self, String> {
        let failed = |e: blkio::Error| format!("blkio: {e}");
        let mode = job.mode;
        let buffer_bytes = job.clients.iter().map(Client::buffer_bytes).max().unwrap_or(0);
        let buffer_bytes = buffer_bytes.next_multiple_of(1 << 16);
        let mut blkio = Blkio::new("virtio-blk-vhost-user").map_err(failed)?;
        blkio.set_str("path", socket.to_str().expect("our paths are UTF-8")).map_err(failed)?;
        blkio.connect().map_err(failed)?;
        let count = i32::try_from(queues).expect("a few queues");
        let (interrupt_queues, poll_queues) = if mode == CompletionMode::Polling { (0, count) } else { (count, 0) };
        blkio.set_i32("num-queues", interrupt_queues).map_err(failed)?;
        blkio.set_i32("num-poll-queues", poll_queues).map_err(failed)?;
        let started = blkio.start().map_err(failed)?;
        let memory = blkio.alloc_mem_region(queues * buffer_bytes).map_err(failed)?;
        blkio.map_mem_region(&memory).map_err(failed)?;
        prefault(&memory);
        let started = if mode == CompletionMode::Polling { started.poll_queues } else { started.queues };
        let mut queues: Vec<GuestQueue> =
            (0..).zip(started).map(|(i, queue)| GuestQueue::new(queue, memory.addr + i * buffer_bytes)).collect();
        for queue in &mut queues {
            queue.queue.set_completion_fd_enabled(mode == CompletionMode::Interrupt);
        }
        Ok(Self { queues, connection: blkio })
    }
}

/// Page faults on first touch must not be part of the measurement.
fn prefault(memory: &MemoryRegion) {
    // SAFETY: the region was mapped for us with this length, and no request is in flight yet.
    unsafe { std::ptr::write_bytes(memory.addr as *mut u8, 0x5a, memory.len) };
}

/// One virtqueue.
pub struct GuestQueue {
    queue: Blkioq,
    buffers: usize,
    slot_bytes: usize,
}

impl GuestQueue {
    fn new(queue: Blkioq, buffers: usize) -> Self {
        Self { queue, buffers, slot_bytes: 0 }
    }
}

impl Queue for GuestQueue {
    fn prepare(&mut self, block_bytes: usize) {
        self.slot_bytes = block_bytes;
    }

    fn submit(&mut self, slot: usize, op: Op) {
        let buffer = (self.buffers + slot * self.slot_bytes) as *mut u8;
        match op {
            Op::Read { offset, len } => self.queue.read(offset, buffer, len, slot, ReqFlags::empty()),
            Op::Write { offset, len } => self.queue.write(offset, buffer, len, slot, ReqFlags::empty()),
            Op::Flush => self.queue.flush(slot, ReqFlags::empty()),
        }
    }

    fn wait(&mut self, done: &mut Vec<(usize, i32)>) {
        let mut completions = [const { MaybeUninit::<Completion>::uninit() }; 64];
        // With a timeout the driver reads the clock on each call, which a polling client cannot afford.
        let mut timeout = COMPLETION_TIMEOUT;
        let timeout = self.queue.get_completion_fd().is_some().then_some(&mut timeout);
        let count = self.queue.do_io(&mut completions, 1, timeout, None).expect("the server completes requests");
        for completion in &completions[..count] {
            // SAFETY: do_io has written the first `count` elements.
            let completion = unsafe { completion.assume_init_ref() };
            done.push((completion.user_data, completion.ret));
        }
    }
}
