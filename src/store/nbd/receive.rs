//! Replies: parses the bytes from the server, and rejects invalid ones.

use std::time::Duration;

use super::client::Client;
use super::memory;
use super::slot::{Receiving, Slot, Violation};
use super::wire::{ESHUTDOWN, SIMPLE_REPLY_MAGIC, STATE_ZERO, STRUCTURED_REPLY_MAGIC, be16, be32, be64, chunk};
use crate::store::{Extent, Segment};
use crate::units::{ExtentKind, OpKind};

/// Bytes of the header of a simple reply, and of a chunk.
const SIMPLE_BYTES: usize = 16;
const CHUNK_BYTES: usize = 20;
/// Longest chunk that is buffered as a whole: an error with its text.
const WHOLE_CHUNK_MAX: usize = 16 << 10;
/// Most bytes that [`Client::receive`] may need at a time.
pub(super) const LOOK_AHEAD: usize = CHUNK_BYTES + WHOLE_CHUNK_MAX;
/// Most separate ranges of a read, and most extents of a map, that are kept.
const RANGES_MAX: usize = 1024;
const EXTENTS_MAX: usize = 64 << 10;

impl Client {
    /// Fills `pieces` with the memory for the next bytes, at most `max` pieces; none if the next bytes are not data.
    pub fn data_target(&self, max: usize, pieces: &mut Vec<Segment>) {
        pieces.clear();
        if let Receiving::Data { slot, at, left, .. } = self.receiving {
            let slot = self.slots[slot].as_ref().expect("data belongs to a slot");
            memory::pieces(&slot.request.segments, at, left, max, pieces);
        }
    }

    /// This many bytes of the data have been received into their memory.
    pub fn data_received(&mut self, bytes: u64, now: Duration) -> Result<(), Violation> {
        let Receiving::Data { slot, at, left, is_last } = self.receiving else { return Ok(()) };
        let left = left - bytes;
        if left > 0 {
            self.receiving = Receiving::Data { slot, at: at + bytes, left, is_last };
            return Ok(());
        }
        self.receiving = Receiving::Header;
        if is_last { self.finish(slot, now) } else { Ok(()) }
    }

    /// Takes bytes from the server; returns how many it took. 0: it needs more bytes in one call, at most
    /// [`LOOK_AHEAD`].
    pub fn receive(&mut self, bytes: &[u8], now: Duration) -> Result<usize, Violation> {
        match self.receiving {
            Receiving::Data { slot, at, left, .. } => {
                let len = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len());
                let segments = &self.slots[slot].as_ref().expect("data belongs to a slot").request.segments;
                memory::copy_in(segments, at, &bytes[..len]);
                self.data_received(len as u64, now)?;
                Ok(len)
            }
            Receiving::Extents { slot, left, is_last } => self.extents(slot, left, is_last, bytes, now),
            Receiving::Header if bytes.len() < 4 => Ok(0),
            Receiving::Header => match be32(bytes, 0) {
                SIMPLE_REPLY_MAGIC => self.simple_reply(bytes, now),
                STRUCTURED_REPLY_MAGIC => self.chunk(bytes, now),
                _ => Err(Violation("the server sends a bad reply magic")),
            },
        }
    }

    fn simple_reply(&mut self, bytes: &[u8], now: Duration) -> Result<usize, Violation> {
        if bytes.len() < SIMPLE_BYTES {
            return Ok(0);
        }
        let (error, cookie) = (be32(bytes, 4), be64(bytes, 8));
        let index = self.slot_of(cookie)?;
        let is_structured = self.is_structured();
        let slot = self.slots[index].as_mut().expect("slot_of() has found it");
        if error != 0 {
            record_error(slot, error)?;
        } else if matches!(slot.request.op, OpKind::Read | OpKind::Map) {
            if is_structured || slot.request.op == OpKind::Map {
                return Err(Violation("the server sends a simple reply where a structured reply is required"));
            }
            let left = slot.part_bytes;
            slot.arrived.push(0..left);
            self.receiving = Receiving::Data { slot: index, at: 0, left, is_last: true };
            return Ok(SIMPLE_BYTES);
        }
        self.finish(index, now)?;
        Ok(SIMPLE_BYTES)
    }

    fn chunk(&mut self, bytes: &[u8], now: Duration) -> Result<usize, Violation> {
        if bytes.len() < CHUNK_BYTES {
            return Ok(0);
        }
        let (flags, kind, cookie) = (be16(bytes, 4), be16(bytes, 6), be64(bytes, 8));
        let (len, is_last) = (be32(bytes, 16) as usize, flags & chunk::DONE != 0);
        if !self.is_structured() {
            return Err(Violation("the server sends an unnegotiated structured reply"));
        }
        let index = self.slot_of(cookie)?;
        let slot = self.slots[index].as_mut().expect("slot_of() has found it");
        let data = &bytes[CHUNK_BYTES..];
        match (kind, slot.request.op) {
            (chunk::OFFSET_DATA, OpKind::Read) => {
                if data.len() < 8 {
                    return Ok(0);
                }
                let len =
                    (len as u64).checked_sub(8).ok_or(Violation("the server sends a data chunk without an offset"))?;
                let at = arrives(slot, be64(data, 0), len)?;
                self.receiving = Receiving::Data { slot: index, at, left: len, is_last };
                return Ok(CHUNK_BYTES + 8);
            }
            (chunk::BLOCK_STATUS, OpKind::Map) => {
                if data.len() < 4 {
                    return Ok(0);
                }
                if len < 12 || !(len - 4).is_multiple_of(8) || Some(be32(data, 0)) != self.allocation() {
                    return Err(Violation("the server sends a block status of another context or of a wrong length"));
                }
                self.receiving = Receiving::Extents { slot: index, left: len as u64 - 4, is_last };
                return Ok(CHUNK_BYTES + 4);
            }
            _ if len > WHOLE_CHUNK_MAX => return Err(Violation("the server sends a chunk that is too long")),
            _ if data.len() < len => return Ok(0),
            (chunk::NONE, _) if len == 0 && is_last => {}
            (chunk::OFFSET_HOLE, OpKind::Read) if len == 12 => {
                let len = u64::from(be32(data, 8));
                let at = arrives(slot, be64(data, 0), len)?;
                memory::zero(&slot.request.segments, at, len);
            }
            (kind, _) if kind & chunk::ERROR != 0 && len >= 6 => record_error(slot, be32(data, 0))?,
            _ => return Err(Violation("the server sends a chunk type that does not match the request")),
        }
        if is_last {
            self.finish(index, now)?;
        }
        Ok(CHUNK_BYTES + len)
    }

    /// Takes whole descriptors.
    fn extents(
        &mut self,
        index: usize,
        left: u64,
        is_last: bool,
        bytes: &[u8],
        now: Duration,
    ) -> Result<usize, Violation> {
        let slot = self.slots[index].as_mut().expect("descriptors belong to a slot");
        let taken = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len()) / 8 * 8;
        for descriptor in bytes[..taken].chunks_exact(8) {
            let is_zero = be32(descriptor, 4) & STATE_ZERO != 0;
            let kind = if is_zero { ExtentKind::Hole } else { ExtentKind::Data };
            add_extent(slot, be32(descriptor, 0).into(), kind)?;
        }
        let left = left - taken as u64;
        self.receiving = Receiving::Extents { slot: index, left, is_last };
        if left == 0 {
            self.receiving = Receiving::Header;
            if is_last {
                self.finish(index, now)?;
            }
        }
        Ok(taken)
    }
}

/// Records the error of a reply. A server that is shutting down executes nothing more: the operation is repeated on the
/// next one.
fn record_error(slot: &mut Slot, error: u32) -> Result<(), Violation> {
    if error == ESHUTDOWN {
        return Err(Violation("the server is shutting down"));
    }
    if error == 0 {
        return Err(Violation("the server sends an error chunk with error 0"));
    }
    slot.error.get_or_insert(error);
    Ok(())
}

/// Records that `len` bytes of data at byte `offset` of the image arrive; returns their position in the request's
/// memory.
fn arrives(slot: &mut Slot, offset: u64, len: u64) -> Result<u64, Violation> {
    let start = offset.checked_sub(slot.request.offset);
    let end = start.and_then(|start| start.checked_add(len)).filter(|end| len > 0 && *end <= slot.request.len);
    let (Some(start), Some(end)) = (start, end) else {
        return Err(Violation("the server sends data outside the requested range"));
    };
    let at = slot.arrived.partition_point(|range| range.end < start);
    if slot.arrived.get(at).is_some_and(|next| next.start < end && start < next.end)
        || slot.arrived.get(at + 1).is_some_and(|next| next.start < end)
    {
        return Err(Violation("the server sends overlapping data chunks"));
    }
    // Adjacent ranges become one.
    let (mut from, mut to, mut until) = (start, end, at);
    while let Some(next) = slot.arrived.get(until).filter(|next| next.start <= to && next.end >= from) {
        (from, to, until) = (from.min(next.start), to.max(next.end), until + 1);
    }
    slot.arrived.splice(at..until, std::iter::once(from..to));
    if slot.arrived.len() > RANGES_MAX {
        return Err(Violation("the server sends a read in too many chunks"));
    }
    Ok(start)
}

/// Adds the next `len` bytes of a map's range.
///
/// => Bytes beyond the range are ignored, and bytes after too many extents count as data.
fn add_extent(slot: &mut Slot, len: u64, kind: ExtentKind) -> Result<(), Violation> {
    let left = slot.request.len - slot.known;
    if len == 0 {
        return Err(Violation("the server sends an extent of length 0"));
    }
    let is_full = slot.extents.len() >= EXTENTS_MAX;
    let (len, kind) = if is_full { (left, ExtentKind::Data) } else { (len.min(left), kind) };
    slot.known += len;
    match slot.extents.last_mut() {
        _ if len == 0 => {}
        Some(last) if last.kind == kind => last.len += len,
        _ => slot.extents.push(Extent { len, kind }),
    }
    Ok(())
}
