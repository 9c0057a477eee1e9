//! The guest's side of a vhost-user socket: queues of the `blkio` crate's virtio-blk driver, which nobody here wrote.

use std::mem::MaybeUninit;
use std::path::Path;
use std::time::Duration;

use blkio::{Blkio, Blkioq, Completion, MemoryRegion, ReqFlags};

use crate::job::{Actor, Job, Wait};
use crate::queue::{Op, Queue};

/// A server that answers nothing for so long is given up.
const PATIENCE: Duration = Duration::from_secs(60);

/// A connection and its queues.
pub struct Guest {
    pub queues: Vec<GuestQueue>,
    /// Declared last: queues go before the device that they belong to.
    pub connection: Blkio,
}

impl Guest {
    /// Connects with so many queues, each good for any actor of the job.
    ///
    /// # Errors
    /// The driver's, as text.
    pub fn connect(socket: &Path, job: &Job, queues: usize) -> Result<Self, String> {
        let said = |e: blkio::Error| format!("blkio: {e}");
        let wait = job.wait;
        let buffer_bytes = job.actors.iter().map(Actor::buffer_bytes).max().unwrap_or(0);
        let buffer_bytes = buffer_bytes.next_multiple_of(1 << 16);
        let mut blkio = Blkio::new("virtio-blk-vhost-user").map_err(said)?;
        blkio.set_str("path", socket.to_str().expect("our paths are UTF-8")).map_err(said)?;
        blkio.connect().map_err(said)?;
        let count = i32::try_from(queues).expect("a few queues");
        let (called, polled) = if wait == Wait::Poll { (0, count) } else { (count, 0) };
        blkio.set_i32("num-queues", called).map_err(said)?;
        blkio.set_i32("num-poll-queues", polled).map_err(said)?;
        let started = blkio.start().map_err(said)?;
        let memory = blkio.alloc_mem_region(queues * buffer_bytes).map_err(said)?;
        blkio.map_mem_region(&memory).map_err(said)?;
        touch(&memory);
        let made = if wait == Wait::Poll { started.poll_queues } else { started.queues };
        let mut queues: Vec<GuestQueue> =
            (0..).zip(made).map(|(i, queue)| GuestQueue::new(queue, memory.addr + i * buffer_bytes)).collect();
        for queue in &mut queues {
            queue.queue.set_completion_fd_enabled(wait == Wait::Interrupt);
        }
        Ok(Self { queues, connection: blkio })
    }
}

/// A guest's memory is there: the first touch must not be part of what is measured.
fn touch(memory: &MemoryRegion) {
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
        // With a limit the driver would read the clock each time: only a queue that sleeps can afford that.
        let mut limit = PATIENCE;
        let limit = self.queue.get_completion_fd().is_some().then_some(&mut limit);
        let count = self.queue.do_io(&mut completions, 1, limit, None).expect("the server answers");
        for completion in &completions[..count] {
            // SAFETY: do_io has written the first `count` elements.
            let completion = unsafe { completion.assume_init_ref() };
            done.push((completion.user_data, completion.ret));
        }
    }
}
