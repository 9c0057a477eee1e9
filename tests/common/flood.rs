//! A guest that fills its ring with one legal request of up to 4 GiB, again and again.

use virtio_bindings::virtio_blk::VIRTIO_BLK_T_IN;

use super::raw_ring::{DESC_INDIRECT, Descriptor, Ring, Segment};
use super::request::header;
use super::session::Session;

/// Buffers of a large request, and the length of each: nearly 4 GiB in all.
pub const BUFFERS: usize = 1000;
pub const BUFFER_BYTES: u32 = 4 << 20;

/// A request that every chain of a flood is: an indirect table in guest memory.
#[derive(Debug)]
pub struct Flood {
    table: u64,
    descriptors: Vec<Descriptor>,
    pub status: u64,
}

impl Flood {
    /// A request of `buffers` buffers, all of them the same memory.
    pub fn new(session: &Session, kind: u32, sector: u64, buffers: usize) -> Self {
        let memory = &session.memory;
        let (head, status) = (memory.alloc(16, 16), memory.alloc(1, 1));
        memory.write(head, &header(kind, sector));
        let data = memory.alloc_in(1, BUFFER_BYTES as usize, 4096);
        let writable = kind == VIRTIO_BLK_T_IN;
        let mut segments = vec![Segment::readable(head, 16)];
        segments.resize(1 + buffers, Segment { addr: data, len: BUFFER_BYTES, writable });
        segments.push(Segment::writable(status, 1));
        Self::of(session, Ring::table_of(&segments), status)
    }

    /// A request with these descriptors, whose status byte is at `status`.
    pub fn of(session: &Session, descriptors: Vec<Descriptor>, status: u64) -> Self {
        Self { table: session.rings[0].write_table(&descriptors), descriptors, status }
    }

    /// Makes `count` of them available on ring `queue`.
    pub fn submit(&self, session: &mut Session, queue: usize, count: u16) {
        let len = (self.descriptors.len() * 16) as u32;
        let ring = &mut session.rings[queue];
        for slot in 0..count {
            ring.write_descriptor(slot, Descriptor { addr: self.table, len, flags: DESC_INDIRECT, next: 0 });
            ring.publish(slot);
        }
        ring.notify();
    }

    /// Makes every chain that was not taken yet a read of one sector.
    pub fn shrink_pending_chains(&self, session: &Session) {
        let data = Descriptor { len: 512, next: self.descriptors.len() as u16 - 1, ..self.descriptors[1] };
        session.memory.write(self.table + 16, &descriptor_bytes(data));
    }
}

fn descriptor_bytes(descriptor: Descriptor) -> Vec<u8> {
    let Descriptor { addr, len, flags, next } = descriptor;
    [&addr.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()].concat()
}
