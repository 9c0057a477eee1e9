//! Each operation as plain blocking system calls, with the fallbacks for hosts that lack the better ones. The thread
//! engine runs everything here; the io_uring engine what a ring can't do.

use std::io;
use std::os::unix::fs::FileExt;

use super::file::OpenImage;
use super::{Event, Extent, ExtentKind, IoRequest, Segment};
use crate::sys;
use crate::sys::file::{Direction, FallocateMode};
use crate::units::{Fault, OpKind};

/// Zeros are written in pieces of this size where the host has no better way.
const CHUNK_BYTES: usize = 128 * 1024;
/// A map stops telling holes apart after this many runs, and calls the rest data: its size stays bounded on an image
/// shredded into holes.
const EXTENTS_MAX: usize = 64 * 1024;

/// What an error number means to the layers above; the one place that decides it.
pub(super) fn fault_of(errno: i32) -> Fault {
    match errno {
        libc::ENOSPC | libc::EDQUOT | libc::EFBIG => Fault::NoSpace,
        // A reservation conflict on a shared disk (BLK_STS_RESV_CONFLICT): another initiator owns it now.
        libc::EBADE => Fault::Fenced,
        libc::ENODEV | libc::ENXIO | libc::ESTALE | libc::ENOMEDIUM | libc::ESHUTDOWN => Fault::Gone,
        libc::ETIMEDOUT => Fault::TimedOut,
        errno if sys::is_unsupported(errno) => Fault::Unsupported,
        libc::EINVAL | libc::EFAULT => Fault::Invalid,
        _ => Fault::Media,
    }
}

/// The event of an operation that failed with `errno`.
pub(super) fn failure(tag: u64, errno: i32) -> Event {
    Event::Failed { tag, fault: fault_of(errno), errno }
}

/// How far a transfer has come.
#[derive(Debug, Default)]
pub(super) struct Progress {
    first: usize,
    done: u64,
}

impl Progress {
    /// Where the rest of the transfer starts on the image.
    pub(super) fn offset(&self, request: &IoRequest) -> u64 {
        request.offset + self.done
    }

    /// The memory of the rest.
    pub(super) fn rest<'a>(&self, request: &'a IoRequest) -> &'a [Segment] {
        &request.segments[self.first..]
    }

    /// Notes that the system moved `moved` bytes; returns whether the transfer is complete.
    ///
    /// => A rest that would not start on a block boundary is moved again from the boundary before: direct I/O could
    ///    not go on from there. The same bytes move twice, to the same place.
    ///
    /// # Errors
    /// EIO when nothing moved (the image ends early: somebody shrank it), so that no transfer goes round for ever.
    pub(super) fn advance(&mut self, request: &mut IoRequest, moved: u64, block: u64) -> io::Result<bool> {
        let mut count = moved.min(request.len - self.done);
        if self.done + count == request.len {
            self.done = request.len;
            return Ok(true);
        }
        count -= (self.done + count) % block;
        if count == 0 {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        self.done += count;
        while count > 0 {
            let segment = &mut request.segments[self.first];
            let step = usize::try_from(count).unwrap_or(usize::MAX).min(segment.len);
            segment.base = segment.base.wrapping_add(step);
            segment.len -= step;
            count -= step as u64;
            if segment.len == 0 {
                self.first += 1;
            }
        }
        Ok(false)
    }
}

/// Runs one operation to its end.
pub(super) fn execute(image: &OpenImage, request: &mut IoRequest) -> Event {
    let (tag, offset, len) = (request.tag, request.offset, request.len);
    let result = match request.op {
        _ if !image.still_holds(request) => Err(io::Error::from_raw_os_error(libc::ENXIO)),
        OpKind::Read | OpKind::Write => transfer(image, request),
        OpKind::Sync => sync(image),
        OpKind::Zero { unmap } => zero(image, offset, len, unmap),
        OpKind::Discard => discard(image, offset, len),
        OpKind::Allocate => sys::file::fallocate(&image.file, FallocateMode::Reserve, offset, len),
        OpKind::Map => match map(image, offset, len) {
            Ok(extents) => return Event::Mapped { tag, extents },
            Err(error) => Err(error),
        },
    };
    match result {
        Ok(()) => Event::Done { tag },
        Err(error) => failure(tag, sys::errno_of(&error)),
    }
}

fn transfer(image: &OpenImage, request: &mut IoRequest) -> io::Result<()> {
    let block = u64::from(image.limits.block_bytes);
    let direction = if request.op == OpKind::Write { Direction::Write } else { Direction::Read };
    let mut progress = Progress::default();
    loop {
        let (segments, offset) = (progress.rest(request), progress.offset(request));
        #[cfg(test)]
        let cut = cut_short(image, segments);
        #[cfg(test)]
        let segments = cut.as_ref().map_or(segments, std::slice::from_ref);
        // SAFETY: the request owns the memory of its segments until its event (the store's contract).
        match unsafe { sys::file::transfer(&image.file, direction, segments, offset) } {
            Ok(moved) => {
                if progress.advance(request, moved, block)? {
                    return Ok(());
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::yield_now(),
            Err(error) => return Err(error),
        }
    }
}

/// The start of a transfer, where a test wants it cut short; what lies behind must move with a later call.
#[cfg(test)]
pub(super) fn cut_short(image: &OpenImage, rest: &[Segment]) -> Option<Segment> {
    let max = image.moved_max.load(std::sync::atomic::Ordering::Relaxed);
    (max > 0).then(|| Segment { base: rest[0].base, len: rest[0].len.min(max) })
}

fn sync(image: &OpenImage) -> io::Result<()> {
    loop {
        match image.file.sync_data() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// The fallocate modes that make a range of this image read as zeros, best first.
pub(super) fn zero_modes(image: &OpenImage, unmap: bool) -> &'static [FallocateMode] {
    match (unmap, image.is_device()) {
        (true, _) => &[FallocateMode::PunchHole, FallocateMode::ZeroRange],
        // The kernel writes zeros itself where a device has no command for it.
        (false, true) => &[FallocateMode::ZeroRange],
        // tmpfs and others can punch but not zero; giving space back beats writing it all.
        (false, false) => &[FallocateMode::ZeroRange, FallocateMode::PunchHole],
    }
}

pub(super) fn zero(image: &OpenImage, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
    // The kernel takes only whole logical blocks of a device: the ends are written by hand.
    let Some((first, last)) = image.whole_blocks(offset, len) else {
        return write_zeros(image, offset, len);
    };
    for &mode in zero_modes(image, unmap) {
        match sys::file::fallocate(&image.file, mode, first, last - first) {
            Ok(()) => {
                write_zeros(image, offset, first - offset)?;
                return write_zeros(image, last, offset + len - last);
            }
            Err(error) if sys::is_unsupported(sys::errno_of(&error)) => {}
            Err(error) => return Err(error),
        }
    }
    write_zeros(image, offset, len)
}

/// Memory aligned for any direct I/O that we accept.
#[repr(C, align(4096))]
struct Chunk([u8; CHUNK_BYTES]);

/// Writes zeros over a range at sector granularity.
///
/// => Where the range does not fill the image's first or last block, the block is read and written back. Nobody else
///    may have an operation on those blocks in flight; the cache's pages are at least a block, so nobody has.
fn write_zeros(image: &OpenImage, offset: u64, len: u64) -> io::Result<()> {
    if len == 0 {
        return Ok(());
    }
    let block = u64::from(image.limits.block_bytes);
    let mut zeros = Box::new(Chunk([0; CHUNK_BYTES]));
    let (mut at, end) = (offset, offset + len);
    while at < end {
        let inside = at % block;
        let whole = (end - at).min(CHUNK_BYTES as u64) / block * block;
        if inside == 0 && whole > 0 {
            image.file.write_all_at(&zeros.0[..index(whole)], at)?;
            at += whole;
            continue;
        }
        let part = (block - inside).min(end - at);
        let bytes = &mut zeros.0[..index(block)];
        image.file.read_exact_at(bytes, at - inside)?;
        bytes[index(inside)..index(inside + part)].fill(0);
        image.file.write_all_at(bytes, at - inside)?;
        bytes.fill(0);
        at += part;
    }
    Ok(())
}

/// A position within a chunk.
fn index(bytes: u64) -> usize {
    usize::try_from(bytes).expect("a chunk is small")
}

fn discard(image: &OpenImage, offset: u64, len: u64) -> io::Result<()> {
    if !image.is_device() {
        return sys::file::fallocate(&image.file, FallocateMode::PunchHole, offset, len);
    }
    match image.whole_blocks(offset, len) {
        Some((first, last)) => sys::block::discard(&image.file, first, last - first),
        // Less than a block: to keep it is a discard too.
        None => Ok(()),
    }
}

/// Data and holes of a range, covering it exactly.
///
/// => What is called a hole reads as zeros; what is called data may as well.
fn map(image: &OpenImage, offset: u64, len: u64) -> io::Result<Vec<Extent>> {
    if image.is_device() {
        return Ok(vec![Extent { len, kind: ExtentKind::Data }]);
    }
    let mut extents = Vec::new();
    let (mut at, end) = (offset, offset + len);
    while at < end {
        let data = if extents.len() >= EXTENTS_MAX { Ok(at) } else { next_data(image, at, end) };
        match data {
            Ok(data) => {
                push(&mut extents, data - at, ExtentKind::Hole);
                at = data;
            }
            // No way to ask: all of it may be data.
            Err(error) if matches!(sys::errno_of(&error), libc::EINVAL | libc::EOPNOTSUPP) => {
                push(&mut extents, end - at, ExtentKind::Data);
                break;
            }
            Err(error) => return Err(error),
        }
        if at < end {
            let full = extents.len() >= EXTENTS_MAX;
            let hole = if full { end } else { sys::file::seek_hole(&image.file, at)?.clamp(at, end) };
            push(&mut extents, hole - at, ExtentKind::Data);
            at = hole;
        }
    }
    Ok(extents)
}

/// The first byte of data from `at`, or `end`.
fn next_data(image: &OpenImage, at: u64, end: u64) -> io::Result<u64> {
    match sys::file::seek_data(&image.file, at) {
        Ok(data) => Ok(data.clamp(at, end)),
        // ENXIO: no data up to the end of the file, which is a hole only if the file still reaches that far.
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => {
            let shrunk = image.file.metadata()?.len() < end;
            if shrunk { Err(io::Error::from_raw_os_error(libc::EIO)) } else { Ok(end) }
        }
        Err(error) => Err(error),
    }
}

/// Appends a run; runs of a kind merge, empty ones vanish.
fn push(extents: &mut Vec<Extent>, len: u64, kind: ExtentKind) {
    match extents.last_mut() {
        _ if len == 0 => {}
        Some(last) if last.kind == kind => last.len += len,
        _ => extents.push(Extent { len, kind }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(lens: &[usize]) -> IoRequest {
        let mut base = std::ptr::without_provenance_mut::<u8>(4096);
        let mut segments = Vec::new();
        for &len in lens {
            segments.push(Segment { base, len });
            base = base.wrapping_add(len);
        }
        let len = lens.iter().map(|&n| n as u64).sum();
        IoRequest { tag: 1, op: OpKind::Read, offset: 8192, len, segments }
    }

    #[test]
    fn a_short_transfer_goes_on_where_it_stopped_or_at_the_block_before() {
        let mut request = request(&[512, 1024, 512]);
        let mut progress = Progress::default();
        assert!(!progress.advance(&mut request, 1000, 512).unwrap());
        assert_eq!(progress.offset(&request), 8192 + 512);
        assert_eq!(progress.rest(&request).len(), 2);
        assert!(!progress.advance(&mut request, 512, 512).unwrap());
        let rest = progress.rest(&request);
        assert_eq!((rest[0].base.addr(), rest[0].len, rest[1].len), (4096 + 1024, 512, 512));
        assert!(progress.advance(&mut request, 1024, 512).unwrap());
    }

    #[test]
    fn a_transfer_that_moves_nothing_fails_instead_of_spinning() {
        let mut request = request(&[4096]);
        assert_eq!(Progress::default().advance(&mut request, 0, 512).unwrap_err().raw_os_error(), Some(libc::EIO));
        assert!(Progress::default().advance(&mut request, 511, 512).is_err());
    }

    #[test]
    fn no_space_is_told_apart_from_a_broken_medium_and_from_a_missing_ability() {
        let expected = [
            (libc::ENOSPC, Fault::NoSpace),
            (libc::EDQUOT, Fault::NoSpace),
            (libc::EIO, Fault::Media),
            (libc::EROFS, Fault::Media),
            (libc::EOPNOTSUPP, Fault::Unsupported),
            (libc::EINVAL, Fault::Invalid),
            (libc::ENODEV, Fault::Gone),
            (libc::EBADE, Fault::Fenced),
        ];
        for (errno, fault) in expected {
            assert_eq!(fault_of(errno), fault, "errno {errno}");
        }
    }
}
