//! virtio-blk requests over a [`Session`]'s rings.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_OK, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};

use super::SECTOR_BYTES;
use super::raw_ring::{Segment, Used};
use super::session::{Session, SessionOptions};
use super::wait::TIMEOUT;

/// The status byte before the device writes it. No virtio status has this value.
pub const STATUS_UNTOUCHED: u8 = 0xa5;

/// VIRTIO_BLK_S_OK as a byte.
pub const OK: u8 = VIRTIO_BLK_S_OK as u8;

/// The header of a request.
pub fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    bytes
}

/// One range of a discard or write-zeroes request.
pub fn range(sector: u64, sectors: u32, flags: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&sector.to_le_bytes());
    bytes[8..12].copy_from_slice(&sectors.to_le_bytes());
    bytes[12..].copy_from_slice(&flags.to_le_bytes());
    bytes
}

/// The part of a request between header and status.
#[derive(Clone, Copy, Debug)]
pub enum Payload<'a> {
    /// Nothing.
    Empty,
    /// Data for the device.
    Send(&'a [u8]),
    /// A buffer of this many bytes for data from the device.
    Receive(usize),
}

/// The guest memory of a request in flight.
#[derive(Clone, Copy, Debug)]
pub struct Pending {
    pub head: u16,
    pub header: u64,
    pub data: u64,
    pub data_len: usize,
    pub status: u64,
}

/// The result of a completed request.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub status: u8,
    pub used_len: u32,
    pub data: Vec<u8>,
}

impl Session {
    /// Writes a request to guest memory: header and status to the low region, data to the high one. It is not available
    /// yet.
    pub fn prepare(&self, kind: u32, sector: u64, payload: Payload<'_>) -> (Pending, Vec<Segment>) {
        let memory = &self.memory;
        let header_addr = memory.alloc(16, 16);
        memory.write(header_addr, &header(kind, sector));
        let status = memory.alloc(1, 1);
        memory.write(status, &[STATUS_UNTOUCHED]);
        let mut segments = vec![Segment::readable(header_addr, 16)];
        let (data, data_len) = match payload {
            Payload::Empty => (0, 0),
            Payload::Send(bytes) => {
                let data = memory.alloc_in(1, bytes.len(), 16);
                memory.write(data, bytes);
                segments.push(Segment::readable(data, bytes.len() as u32));
                (data, bytes.len())
            }
            Payload::Receive(len) => {
                let data = memory.alloc_in(1, len, 16);
                segments.push(Segment::writable(data, len as u32));
                (data, len)
            }
        };
        segments.push(Segment::writable(status, 1));
        (Pending { head: 0, header: header_addr, data, data_len, status }, segments)
    }

    /// Makes a request of the classic layout (header, data, status) available on ring `queue`; does not notify the
    /// device.
    pub fn submit(&mut self, queue: usize, kind: u32, sector: u64, payload: Payload<'_>) -> Pending {
        let (pending, segments) = self.prepare(kind, sector, payload);
        let head = self.rings[queue].submit(&segments);
        Pending { head, ..pending }
    }

    /// The result of `pending`, whose used element is `used`.
    pub fn outcome(&self, pending: &Pending, used: Used) -> Outcome {
        let data = if pending.data_len == 0 { Vec::new() } else { self.memory.read(pending.data, pending.data_len) };
        Outcome { status: self.memory.byte(pending.status), used_len: used.len, data }
    }

    /// Runs one request on ring `queue`, with nothing else in flight there.
    #[track_caller]
    pub fn run(&mut self, queue: usize, kind: u32, sector: u64, payload: Payload<'_>) -> Outcome {
        let pending = self.submit(queue, kind, sector, payload);
        self.rings[queue].notify();
        let used = self.rings[queue].wait_used(TIMEOUT);
        assert_eq!(used.head, pending.head, "the submitted request completes");
        self.outcome(&pending, used)
    }

    /// Waits for `count` completions on ring `queue`; returns them by their heads.
    #[track_caller]
    pub fn wait_for(&mut self, queue: usize, count: usize) -> HashMap<u16, Used> {
        let mut done = HashMap::new();
        for _ in 0..count {
            let used = self.rings[queue].wait_used(TIMEOUT);
            assert!(done.insert(used.head, used).is_none(), "request {} completed twice", used.head);
        }
        done
    }

    /// Writes `bytes` at `sector`. The write must succeed.
    #[track_caller]
    pub fn write(&mut self, sector: u64, bytes: &[u8]) {
        let outcome = self.run(0, VIRTIO_BLK_T_OUT, sector, Payload::Send(bytes));
        assert_eq!(outcome.status, OK, "a write of {} bytes at sector {sector}", bytes.len());
    }

    /// Reads `len` bytes at `sector`. The read must succeed.
    #[track_caller]
    pub fn read(&mut self, sector: u64, len: usize) -> Vec<u8> {
        let outcome = self.run(0, VIRTIO_BLK_T_IN, sector, Payload::Receive(len));
        assert_eq!(outcome.status, OK, "a read of {len} bytes at sector {sector}");
        outcome.data
    }

    /// Flushes. The FLUSH must succeed.
    #[track_caller]
    pub fn flush(&mut self) {
        assert_eq!(self.run(0, VIRTIO_BLK_T_FLUSH, 0, Payload::Empty).status, OK, "a flush");
    }

    /// Discards `ranges`; returns the status.
    #[track_caller]
    pub fn discard(&mut self, ranges: &[[u8; 16]]) -> u8 {
        self.run(0, VIRTIO_BLK_T_DISCARD, 0, Payload::Send(&ranges.concat())).status
    }

    /// Zeroes `ranges`; returns the status.
    #[track_caller]
    pub fn write_zeroes(&mut self, ranges: &[[u8; 16]]) -> u8 {
        self.run(0, VIRTIO_BLK_T_WRITE_ZEROES, 0, Payload::Send(&ranges.concat())).status
    }
}

/// `len` bytes of test data for `sector`. Two sectors, or two marks below 2^16, never have equal data.
pub fn pattern(mark: u64, sector: u64, len: usize) -> Vec<u8> {
    const WORDS_PER_SECTOR: u64 = SECTOR_BYTES as u64 / 8;
    let mut bytes = vec![0; len];
    for (word, at) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(0..) {
        *word = (mark << 48 | (sector * WORDS_PER_SECTOR + at)).to_le_bytes();
    }
    bytes
}

/// Checks that a new front-end can write, flush and read. Tests call it after each hostile case.
///
/// Overwrites the 8 KiB at `sector`.
#[track_caller]
pub fn assert_serves(socket: &Path, sector: u64) {
    // A new mark each time, so that data of an earlier check cannot pass for this one's.
    static MARK: AtomicU64 = AtomicU64::new(0x1000);
    let mut session = Session::open(socket, &SessionOptions::default());
    let mark = MARK.fetch_add(1, Ordering::Relaxed);
    let bytes = pattern(mark, sector, 8192);
    session.write(sector, &bytes);
    session.flush();
    assert_eq!(session.read(sector, bytes.len()), bytes, "a read returns the written data");
}
