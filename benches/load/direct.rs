//! The limit of cold rows: io_uring with O_DIRECT on the device, without a server.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use io_uring::{IoUring, opcode, types};

use crate::job::Client;
use crate::queue::{Op, Queue};

/// A queue on a file or a device.
pub struct DirectQueue {
    ring: IoUring,
    file: File,
    buffers: Buffers,
    slot_bytes: usize,
}

impl DirectQueue {
    /// # Errors
    /// The system's.
    pub fn open(path: &Path, client: &Client) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(path)?;
        let ring = IoUring::new(256)?;
        Ok(Self { ring, file, buffers: Buffers::new(client.buffer_bytes()), slot_bytes: client.block_bytes })
    }
}

impl Queue for DirectQueue {
    fn prepare(&mut self, block_bytes: usize) {
        self.slot_bytes = block_bytes;
    }

    fn submit(&mut self, slot: usize, op: Op) {
        let fd = types::Fd(self.file.as_raw_fd());
        let buffer = self.buffers.start.wrapping_add(slot * self.slot_bytes);
        let bytes = |len: usize| u32::try_from(len).expect("a request is below 4 GiB");
        let entry = match op {
            Op::Read { offset, len } => opcode::Read::new(fd, buffer, bytes(len)).offset(offset).build(),
            Op::Write { offset, len } => opcode::Write::new(fd, buffer, bytes(len)).offset(offset).build(),
            Op::Flush => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
        };
        let entry = entry.user_data(slot as u64);
        // SAFETY: the buffer of the slot lives until the queue is dropped, when no request is in flight. No other
        // request uses the slot until this one has completed.
        unsafe { self.ring.submission().push(&entry).expect("the ring is larger than any depth") };
    }

    fn wait(&mut self, done: &mut Vec<(usize, i32)>) {
        self.ring.submit_and_wait(1).expect("io_uring_enter succeeds");
        done.extend(self.ring.completion().map(|entry| (entry.user_data() as usize, entry.result())));
    }
}

/// Page-aligned memory, as O_DIRECT requires.
struct Buffers {
    start: *mut u8,
    layout: Layout,
}

// SAFETY: the memory belongs to this value alone, and moves between threads with it.
unsafe impl Send for Buffers {}

impl Buffers {
    fn new(bytes: usize) -> Self {
        let layout = Layout::from_size_align(bytes, 4096).expect("a few MiB");
        assert!(bytes > 0, "a buffer is not empty");
        // SAFETY: the layout is not empty.
        let start = unsafe { alloc_zeroed(layout) };
        assert!(!start.is_null(), "a few MiB can be allocated");
        Self { start, layout }
    }
}

impl Drop for Buffers {
    fn drop(&mut self) {
        // SAFETY: allocated in new() with this layout.
        unsafe { dealloc(self.start, self.layout) };
    }
}
