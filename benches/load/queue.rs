//! A queue of requests, whatever it leads to: the load needs no more of it.

/// One request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    Read { offset: u64, len: usize },
    Write { offset: u64, len: usize },
    Flush,
}

/// Where requests go. Each slot has a buffer of its own.
pub trait Queue: Send {
    /// Requests will be of this size: the slots' buffers lie side by side, as a guest's do in a small pool.
    fn prepare(&mut self, block_bytes: usize);

    /// Takes a request; it may wait in the queue until [`Queue::wait`].
    fn submit(&mut self, slot: usize, op: Op);

    /// Sends everything and waits for at least one completion: appends slots and results (0 or above: success).
    fn wait(&mut self, done: &mut Vec<(usize, i32)>);
}
