//! Parses a descriptor chain into a typed request (virtio 1.2, section 5.2.6), and checks it against the disk.
//!
//! With VERSION_1 the layout is arbitrary (section 2.7.4): the header is the first 16 readable bytes, the status the
//! last writable byte, and the data is between them, however the driver splits them into descriptors. An invalid
//! request is completed with an error status if it has a status byte in guest memory; [`Malformed`] describes the
//! others.

use std::fmt;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::{Address, GuestAddress};

use crate::units::{LiveSize, SECTOR_BYTES, SectorSpan, Unmap};
use crate::virtio::chain::{BrokenChain, Buffer, DescriptorChain, DescriptorTable};
use crate::virtio::guest_copy::{BadAddress, GuestCursor, GuestRange, read_once};
use crate::virtio::{GuestRam, MAX_DISCARD_SEGMENTS, MAX_WRITE_ZEROES_SECTORS, Status};

#[cfg(test)]
mod tests;

/// struct virtio_blk_req up to its data: le32 type, le32 reserved, le64 sector.
const HEADER_BYTES: usize = 16;
/// struct virtio_blk_discard_write_zeroes: le64 sector, le32 num_sectors, le32 flags.
const SEGMENT_BYTES: usize = 16;
/// Largest payload of a DISCARD or WRITE ZEROES.
const PAYLOAD_BYTES_MAX: usize = SEGMENT_BYTES * MAX_DISCARD_SEGMENTS as usize;
/// Length of a device ID string. A shorter one is padded with NULs.
pub const ID_BYTES: usize = VIRTIO_BLK_ID_BYTES as usize;

/// The type of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestKind {
    /// IN: sectors to the guest.
    Read,
    /// OUT: sectors from the guest.
    Write,
    /// FLUSH: make completed writes stable.
    Flush,
    /// DISCARD: the contents no longer matter.
    Discard,
    /// WRITE ZEROES.
    WriteZeroes,
    /// GET ID: the serial.
    GetId,
    /// Anything else, including the types of features that are never offered (zones, secure erase, lifetime).
    Unknown(u32),
}

impl RequestKind {
    fn from_wire(value: u32) -> Self {
        match value {
            VIRTIO_BLK_T_IN => Self::Read,
            VIRTIO_BLK_T_OUT => Self::Write,
            VIRTIO_BLK_T_FLUSH => Self::Flush,
            VIRTIO_BLK_T_DISCARD => Self::Discard,
            VIRTIO_BLK_T_WRITE_ZEROES => Self::WriteZeroes,
            VIRTIO_BLK_T_GET_ID => Self::GetId,
            other => Self::Unknown(other),
        }
    }

    /// Whether it has data from the guest: the readable bytes after the header.
    fn has_readable_data(self) -> bool {
        matches!(self, Self::Write | Self::Discard | Self::WriteZeroes)
    }

    /// Whether it has data to the guest: the writable bytes before the status.
    fn has_writable_data(self) -> bool {
        matches!(self, Self::Read | Self::GetId)
    }
}

/// The properties of the disk against which requests are checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestLimits {
    /// Size in sectors.
    pub capacity_sectors: LiveSize,
    /// Whether VIRTIO_BLK_F_RO is offered.
    pub read_only: bool,
    /// Whether VIRTIO_BLK_F_DISCARD is offered.
    pub can_discard: bool,
    /// Most sectors of a DISCARD segment.
    pub max_discard_sectors: u32,
    /// Whether VIRTIO_BLK_F_WRITE_ZEROES is offered.
    pub can_zero: bool,
    /// The data that GET ID returns; see [`serial`].
    pub serial: [u8; ID_BYTES],
}

/// A serial in the form that GET ID returns: the first 20 bytes of `text`, padded with NULs.
pub fn serial(text: &str) -> [u8; ID_BYTES] {
    let mut padded = [0; ID_BYTES];
    for (to, from) in padded.iter_mut().zip(text.bytes()) {
        *to = from;
    }
    padded
}

/// A segment of a DISCARD or WRITE ZEROES request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RangeSegment {
    /// The sectors: at least one, all within the disk.
    pub span: SectorSpan,
    /// Whether the sectors' space may be deallocated; never [`Unmap::Allowed`] for DISCARD.
    pub unmap: Unmap,
}

/// Why a chain is not a valid request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Malformed {
    /// It can be completed: with IOERR in its status byte, and a used length of 1.
    WithStatus {
        /// The address of the status byte, in guest memory.
        status_addr: GuestAddress,
    },
    /// It has no status byte in guest memory. It can be completed with a used length of 0, which indicates to the
    /// driver that no status was written (section 2.7.8.3).
    NoStatus,
    /// It cannot be followed to its end, or neither its header nor its status byte is in guest memory. It cannot be
    /// completed: drivers ignore the used length, and would interpret the byte in their own memory (from the previous
    /// request, usually OK) as the status of this request.
    Unreadable,
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::WithStatus { .. } => "the chain is not a valid request",
            Self::NoStatus => "the chain has no status byte in guest memory",
            Self::Unreadable => "the chain cannot be read",
        })
    }
}

impl std::error::Error for Malformed {}

/// A request. To save allocations, parse repeatedly into the same value: it keeps its memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The head of the chain, which is the `id` of its used element.
    pub head: u16,
    /// The type of the request.
    pub kind: RequestKind,
    /// First sector of a read or write.
    pub sector: u64,
    /// The data: readable for OUT kinds, writable for IN kinds, empty for the others. No range is empty.
    pub data: Vec<GuestRange>,
    /// Sum of the lengths in `data`. With the status byte it is at most `u32::MAX`.
    pub data_bytes: u64,
    /// The address of the status byte.
    pub status_addr: GuestAddress,
    /// Number of buffers of the chain that were read.
    pub buffers: u32,
}

impl Default for Request {
    fn default() -> Self {
        let (kind, status_addr) = (RequestKind::Unknown(u32::MAX), GuestAddress(0));
        Self { head: 0, kind, sector: 0, data: Vec::new(), data_bytes: 0, status_addr, buffers: 0 }
    }
}

/// Parses the chain at `head` of a ring's descriptor table into `request`.
///
/// => One pass that reads each descriptor and the header once. Nothing is allocated once `request` has grown to the
///    largest request.
/// => The status byte is in guest memory. The data may be outside; copying it then fails.
///
/// # Errors
/// [`Malformed`] if the header is short or unreadable, a readable buffer follows a writable one (section 2.7.4.2), the
/// chain has more than `u32::MAX` bytes (section 2.7.5.2) or cannot be followed to its end, or it has no status byte.
/// `request` is then meaningless.
pub fn parse(mem: &GuestRam, table: &DescriptorTable<'_>, head: u16, request: &mut Request) -> Result<(), Malformed> {
    request.head = head;
    request.data.clear();
    request.data_bytes = 0;
    let mut chain = DescriptorChain::new(mem, table.clone(), head);
    let mut parser = Parser::new(request);
    let ended = chain.try_for_each(|buffer| buffer.map(|buffer| parser.add(mem, buffer)));
    parser.request.buffers = chain.buffers();
    ended.map_err(|BrokenChain| Malformed::Unreadable)?;
    parser.finish(mem)
}

/// The state of [`parse`].
#[derive(Debug)]
struct Parser<'a> {
    request: &'a mut Request,
    header: [u8; HEADER_BYTES],
    header_len: usize,
    /// The last writable buffer that is not empty; its last byte is the status.
    last_writable: Option<GuestRange>,
    chain_bytes: u64,
    malformed: bool,
    /// The header is not in guest memory.
    no_header: bool,
}

impl<'a> Parser<'a> {
    fn new(request: &'a mut Request) -> Self {
        let header = [0; HEADER_BYTES];
        let (header_len, chain_bytes, last_writable) = (0, 0, None);
        Self { request, header, header_len, last_writable, chain_bytes, malformed: false, no_header: false }
    }

    /// Adds the next buffer of the chain. An empty one is ignored, whatever its address.
    #[inline]
    fn add(&mut self, mem: &GuestRam, buffer: Buffer) {
        let range = buffer.range;
        if range.len == 0 {
            return;
        }
        self.chain_bytes += u64::from(range.len);
        if buffer.writable {
            self.last_writable = Some(range);
            if self.header_len == HEADER_BYTES && self.request.kind.has_writable_data() {
                self.push(range);
            }
        } else if self.last_writable.is_some() {
            self.malformed = true;
        } else {
            self.add_readable(mem, range);
        }
    }

    fn add_readable(&mut self, mem: &GuestRam, mut range: GuestRange) {
        if self.header_len < HEADER_BYTES && !self.malformed {
            let missing = HEADER_BYTES - self.header_len;
            let count = missing.min(range.len as usize);
            let target = &mut self.header[self.header_len..self.header_len + count];
            if read_once(mem, range.addr, target).is_err() {
                (self.malformed, self.no_header) = (true, true);
                return;
            }
            self.header_len += count;
            if self.header_len == HEADER_BYTES {
                self.decode_header();
            }
            let Some(addr) = range.addr.checked_add(count as u64) else {
                self.malformed = true;
                return;
            };
            range = GuestRange { addr, len: range.len - u32::try_from(count).expect("at most 16 bytes") };
        }
        if range.len > 0 && self.header_len == HEADER_BYTES && self.request.kind.has_readable_data() {
            self.push(range);
        }
    }

    /// Decodes the header. Its reserved word (formerly the I/O priority) is ignored.
    fn decode_header(&mut self) {
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = self.header;
        self.request.kind = RequestKind::from_wire(u32::from_le_bytes([t0, t1, t2, t3]));
        self.request.sector = u64::from_le_bytes(sector);
    }

    fn push(&mut self, range: GuestRange) {
        self.request.data.push(range);
        self.request.data_bytes += u64::from(range.len);
    }

    /// Finds the status byte, and removes it from the data.
    fn finish(self, mem: &GuestRam) -> Result<(), Malformed> {
        let status_addr = self.last_writable.and_then(|last| last.addr.checked_add(u64::from(last.len) - 1));
        let Some(status_addr) = status_addr.filter(|&addr| mem.slice(addr, 1).is_some()) else {
            return Err(if self.no_header { Malformed::Unreadable } else { Malformed::NoStatus });
        };
        let whole = self.header_len == HEADER_BYTES && self.chain_bytes <= u64::from(u32::MAX);
        if self.malformed || !whole {
            return Err(Malformed::WithStatus { status_addr });
        }
        let request = self.request;
        request.status_addr = status_addr;
        if request.kind.has_writable_data()
            && let Some(range) = request.data.last_mut()
        {
            range.len -= 1;
            request.data_bytes -= 1;
            if range.len == 0 {
                request.data.pop();
            }
        }
        Ok(())
    }
}

impl Request {
    /// Checks the request against the disk.
    ///
    /// => An empty read or write within the disk is valid and moves nothing: 0 is a multiple of 512 (section 5.2.6.1),
    ///    and QEMU agrees. A FLUSH is valid whatever its sector and data. GET ID needs space for at least one byte.
    /// => Of DISCARD and WRITE ZEROES only the length of the payload is checked here; [`Self::range_segments`] checks
    ///    its content.
    ///
    /// # Errors
    /// [`Status::Unsupported`] for a request that the disk does not offer, [`Status::IoErr`] for an invalid one. On a
    /// read-only disk every kind that changes data gets `IoErr`, as section 5.2.6.2 requires.
    pub fn check(&self, disk: &RequestLimits) -> Result<(), Status> {
        let fail_if = |invalid: bool, status: Status| if invalid { Err(status) } else { Ok(()) };
        match self.kind {
            RequestKind::Read => self.check_range(disk),
            RequestKind::Write => {
                fail_if(disk.read_only, Status::IoErr)?;
                self.check_range(disk)
            }
            RequestKind::Flush => Ok(()),
            RequestKind::Discard | RequestKind::WriteZeroes => {
                let offered = if self.kind == RequestKind::Discard { disk.can_discard } else { disk.can_zero };
                fail_if(disk.read_only, Status::IoErr)?;
                fail_if(!offered, Status::Unsupported)?;
                self.payload_bytes().map(|_| ())
            }
            RequestKind::GetId => fail_if(self.data_bytes == 0, Status::IoErr),
            RequestKind::Unknown(_) => Err(Status::Unsupported),
        }
    }

    fn check_range(&self, disk: &RequestLimits) -> Result<(), Status> {
        let whole = self.data_bytes.is_multiple_of(SECTOR_BYTES);
        if whole && is_within(disk, self.sector, self.data_bytes / SECTOR_BYTES) { Ok(()) } else { Err(Status::IoErr) }
    }

    /// The sectors of a read or write that passed [`Self::check`].
    pub fn span(&self) -> SectorSpan {
        SectorSpan::new(self.sector, self.data_bytes / SECTOR_BYTES)
    }

    /// Length of the payload of a DISCARD or WRITE ZEROES: one to [`MAX_DISCARD_SEGMENTS`] whole segments.
    fn payload_bytes(&self) -> Result<usize, Status> {
        match usize::try_from(self.data_bytes) {
            Ok(len) if len > 0 && len <= PAYLOAD_BYTES_MAX && len.is_multiple_of(SEGMENT_BYTES) => Ok(len),
            _ => Err(Status::IoErr),
        }
    }

    /// Reads the payload of a DISCARD or WRITE ZEROES into `segments`, in order and without empty segments.
    ///
    /// => `segments` has at most [`MAX_DISCARD_SEGMENTS`] elements. After an error it is empty: no segment is executed
    ///    if another is invalid.
    /// => A segment of no sectors within the disk is valid and does nothing, as in QEMU; the specification is silent.
    ///
    /// # Errors
    /// [`Status::Unsupported`] if any segment has an unknown flag, or UNMAP in a DISCARD (a MUST of section 5.2.6.2, so
    /// it precedes the other checks). [`Status::IoErr`] if the payload has a wrong length or is outside guest memory,
    /// or a segment is outside the disk or longer than the disk allows.
    pub fn range_segments(
        &self,
        mem: &GuestRam,
        disk: &RequestLimits,
        segments: &mut Vec<RangeSegment>,
    ) -> Result<(), Status> {
        segments.clear();
        let mut buffer = [0; PAYLOAD_BYTES_MAX];
        let payload = &mut buffer[..self.payload_bytes()?];
        GuestCursor::new(mem, &self.data).read(0, payload).map_err(|BadAddress| Status::IoErr)?;
        let allowed = if self.kind == RequestKind::WriteZeroes { VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP } else { 0 };
        let is_discard = self.kind == RequestKind::Discard;
        let count_max = if is_discard { disk.max_discard_sectors } else { MAX_WRITE_ZEROES_SECTORS };
        let (raw_segments, _) = payload.as_chunks::<SEGMENT_BYTES>();
        let mut invalid = false;
        for raw in raw_segments {
            let [sector @ .., c0, c1, c2, c3, f0, f1, f2, f3] = *raw;
            let start = u64::from_le_bytes(sector);
            let count = u32::from_le_bytes([c0, c1, c2, c3]);
            let flags = u32::from_le_bytes([f0, f1, f2, f3]);
            if flags & !allowed != 0 {
                segments.clear();
                return Err(Status::Unsupported);
            }
            invalid |= count > count_max || !is_within(disk, start, u64::from(count));
            if count > 0 {
                let span = SectorSpan::new(start, u64::from(count));
                let may_unmap = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
                segments.push(RangeSegment { span, unmap: if may_unmap { Unmap::Allowed } else { Unmap::Forbidden } });
            }
        }
        if invalid {
            segments.clear();
            return Err(Status::IoErr);
        }
        Ok(())
    }

    /// Writes the serial for a GET ID that passed [`Self::check`]: as many of its 20 bytes as fit in the data.
    ///
    /// # Errors
    /// [`BadAddress`] if the data is outside guest memory.
    pub fn write_id(&self, mem: &GuestRam, disk: &RequestLimits) -> Result<(), BadAddress> {
        GuestCursor::new(mem, &self.data).write(0, &disk.serial[..self.id_len()])
    }

    fn id_len(&self) -> usize {
        usize::try_from(self.data_bytes).unwrap_or(ID_BYTES).min(ID_BYTES)
    }

    /// The length for the used element: the number of bytes written to the chain, including the status (section 2.7.8).
    ///
    /// => After a failure only the status byte counts, whatever was copied before: the driver may not use the data.
    pub fn used_len(&self, status: Status) -> u32 {
        let data_written = match self.kind {
            _ if status != Status::Ok => 0,
            RequestKind::Read => u32::try_from(self.data_bytes).unwrap_or(u32::MAX),
            RequestKind::GetId => u32::try_from(self.id_len()).unwrap_or(u32::MAX),
            _ => 0,
        };
        data_written.saturating_add(1)
    }
}

/// Whether `count` sectors from `start` are within the disk. Computes no end, which could overflow.
fn is_within(disk: &RequestLimits, start: u64, count: u64) -> bool {
    let capacity = disk.capacity_sectors.get();
    start <= capacity && count <= capacity - start
}
