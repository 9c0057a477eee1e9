//! The queue that the load generator drives: a virtqueue of a server, or io_uring on a device.

/// One request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    Read { offset: u64, len: usize },
    Write { offset: u64, len: usize },
    Flush,
}

/// A queue of requests. Each slot has its own buffer.
pub trait Queue: Send {
    /// Sets the size of all requests. The buffers of the slots are adjacent, like those of a small pool in a guest.
    fn prepare(&mut self, block_bytes: usize);

    /// Queues a request. The queue may hold it back until [`Queue::wait`].
    fn submit(&mut self, slot: usize, op: Op);

    /// Submits everything that is queued, waits for at least one completion, and appends each completed slot with its
    /// result (a negative result is an errno).
    fn wait(&mut self, done: &mut Vec<(usize, i32)>);
}
