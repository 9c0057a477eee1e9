//! Executes every operation with blocking system calls, with fallbacks for hosts that lack the best one. The thread
//! engine runs all operations here, the io_uring engine those that a ring cannot do.

use std::io;
use std::os::unix::fs::FileExt;

use super::image::OpenImage;
use super::{Event, Extent, IoRequest, Segment};
use crate::sys;
use crate::sys::file::{Direction, FallocateMode};
use crate::units::{ExtentKind, Fault, OpKind, Unmap};

/// Length of one write of zeros, if the host has no better way.
const CHUNK_BYTES: usize = 128 * 1024;
/// A map has at most this many runs and reports the rest of its range as data: its size stays bounded on an image with
/// very many holes.
const EXTENTS_MAX: usize = if cfg!(test) { 64 } else { 64 * 1024 };

/// The fault for an error number. This is the only mapping from errno to [`Fault`].
pub(super) fn fault_of(errno: i32) -> Fault {
    match errno {
        libc::ENOSPC | libc::EDQUOT | libc::EFBIG => Fault::NoSpace,
        // A reservation conflict on a shared disk (BLK_STS_RESV_CONFLICT): another initiator has reserved it.
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

/// The progress of a transfer.
#[derive(Debug, Default)]
pub(super) struct TransferProgress {
    /// The first segment with memory that has not been transferred.
    first: usize,
    /// Bytes transferred.
    done: u64,
}

impl TransferProgress {
    /// The position on the image at which the rest of the transfer starts, in bytes.
    pub(super) fn offset(&self, request: &IoRequest) -> u64 {
        request.offset + self.done
    }

    /// The memory of the rest of the transfer.
    pub(super) fn rest<'a>(&self, request: &'a IoRequest) -> &'a [Segment] {
        &request.segments[self.first..]
    }

    /// Records that a system call moved `moved` bytes; returns whether the transfer is complete. `block` is the
    /// alignment of transfers, in bytes.
    ///
    /// => The rest starts on a block boundary, because direct I/O could not continue elsewhere. Bytes behind the last
    ///    boundary are transferred again, to the same place.
    ///
    /// # Errors
    /// EIO if not even one block moved (the image has been truncated), so that no transfer is retried forever.
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

/// Runs one operation to completion.
pub(super) fn execute(image: &OpenImage, request: &mut IoRequest) -> Event {
    let (tag, offset, len) = (request.tag, request.offset, request.len);
    let result = match request.op {
        _ if !image.still_covers(request) => Err(io::Error::from_raw_os_error(libc::ENXIO)),
        OpKind::Read => transfer(image, request),
        OpKind::Write => {
            image.delay_write();
            image.record_guest_formats();
            transfer(image, request)
        }
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
    let block = u64::from(image.limits.transfer_block_bytes());
    let direction = if request.op == OpKind::Write { Direction::Write } else { Direction::Read };
    let mut progress = TransferProgress::default();
    loop {
        let (segments, offset) = (progress.rest(request), progress.offset(request));
        let start = image.limited_start(segments);
        let segments = start.as_ref().map_or(segments, std::slice::from_ref);
        // SAFETY: the request owns the memory of its segments until its event is reaped (the contract in mod.rs).
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

fn sync(image: &OpenImage) -> io::Result<()> {
    loop {
        match image.file.sync_data() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// The fallocate modes that make a range of this image read as zeros, best first.
pub(super) fn zero_modes(image: &OpenImage, unmap: Unmap) -> &'static [FallocateMode] {
    match (unmap, image.is_device()) {
        (Unmap::Allowed, _) => &[FallocateMode::PunchHole, FallocateMode::ZeroRange],
        // If a device has no command for it, the kernel writes the zeros.
        (Unmap::Forbidden, true) => &[FallocateMode::ZeroRange],
        // Some file systems (such as tmpfs) can punch holes but not zero a range; freeing the space costs less than
        // writing it all.
        (Unmap::Forbidden, false) => &[FallocateMode::ZeroRange, FallocateMode::PunchHole],
    }
}

/// Makes a range (in bytes, of whole sectors) read as zeros.
pub(super) fn zero(image: &OpenImage, offset: u64, len: u64, unmap: Unmap) -> io::Result<()> {
    // On a device, fallocate takes only whole logical blocks: zeros are written to the partial ones at both ends.
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

/// Memory that is aligned for every direct I/O that an image may require.
#[repr(C, align(4096))]
struct Chunk([u8; CHUNK_BYTES]);

/// Writes zeros over a range at sector granularity.
///
/// => A partly covered block is read, changed and written back. No other operation on such a block may be in flight.
///    The cache ensures it: a range operation locks its pages, and a page is at least one block.
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

/// A position within a chunk, for indexing.
fn index(bytes: u64) -> usize {
    usize::try_from(bytes).expect("a chunk is small")
}

fn discard(image: &OpenImage, offset: u64, len: u64) -> io::Result<()> {
    if !image.is_device() {
        return sys::file::fallocate(&image.file, FallocateMode::PunchHole, offset, len);
    }
    match image.whole_blocks(offset, len) {
        Some((first, last)) => sys::block::discard(&image.file, first, last - first),
        // Less than a block: a discard may leave the data unchanged.
        None => Ok(()),
    }
}

/// The runs of data and holes from `offset` that cover the range. The last one is not truncated to the range: the
/// kernel finds the end of a run by a walk over the extents, which takes long on a fragmented file and must not be
/// repeated for each range of one run.
///
/// => A hole reads as zeros. Data may read as zeros too.
fn map(image: &OpenImage, offset: u64, len: u64) -> io::Result<Vec<Extent>> {
    let (mut at, end, image_end) = (offset, offset + len, image.limits.size_bytes.get());
    if image.is_device() {
        return Ok(vec![Extent { len: image_end - offset, kind: ExtentKind::Data }]);
    }
    let mut extents = Vec::new();
    while at < end {
        if extents.len() >= EXTENTS_MAX {
            push(&mut extents, end - at, ExtentKind::Data);
            break;
        }
        match next_data(image, at, end) {
            Ok(data) => {
                push(&mut extents, data - at, ExtentKind::Hole);
                at = data;
            }
            // The file system has no SEEK_DATA: all of it may be data.
            Err(error) if matches!(sys::errno_of(&error), libc::EINVAL | libc::EOPNOTSUPP) => {
                push(&mut extents, image_end - at, ExtentKind::Data);
                break;
            }
            Err(error) => return Err(error),
        }
        if at < end {
            let hole = sys::file::seek_hole(&image.file, at)?.clamp(at, image_end);
            push(&mut extents, hole - at, ExtentKind::Data);
            at = hole;
        }
    }
    Ok(extents)
}

/// The first byte of data at or after `at`, or the end of the image; an error if the file ends before `needed`.
fn next_data(image: &OpenImage, at: u64, needed: u64) -> io::Result<u64> {
    let image_end = image.limits.size_bytes.get();
    match sys::file::seek_data(&image.file, at) {
        Ok(data) => Ok(data.clamp(at, image_end)),
        // ENXIO: no data before the end of the file. That is a hole only up to the present end of the file.
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => {
            let file_end = image.file.metadata()?.len();
            let shrunk = file_end < needed;
            if shrunk { Err(io::Error::from_raw_os_error(libc::EIO)) } else { Ok(file_end.min(image_end)) }
        }
        Err(error) => Err(error),
    }
}

/// Appends a run unless it is empty; merges it with a preceding run of the same kind.
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
    use crate::store::file::OpenOptions;
    use crate::units::Urgency;

    fn request(lens: &[usize]) -> IoRequest {
        let mut base = std::ptr::without_provenance_mut::<u8>(4096);
        let mut segments = Vec::new();
        for &len in lens {
            segments.push(Segment { base, len });
            base = base.wrapping_add(len);
        }
        let len = lens.iter().map(|&n| n as u64).sum();
        IoRequest { tag: 1, op: OpKind::Read, offset: 8192, len, urgency: Urgency::Demand, segments }
    }

    #[test]
    fn a_short_transfer_continues_where_it_stopped_or_at_the_block_boundary_before() {
        let mut request = request(&[512, 1024, 512]);
        let mut progress = TransferProgress::default();
        assert!(!progress.advance(&mut request, 1000, 512).unwrap());
        assert_eq!(progress.offset(&request), 8192 + 512);
        assert_eq!(progress.rest(&request).len(), 2);
        assert!(!progress.advance(&mut request, 512, 512).unwrap());
        let rest = progress.rest(&request);
        assert_eq!((rest[0].base.addr(), rest[0].len, rest[1].len), (4096 + 1024, 512, 512));
        assert!(progress.advance(&mut request, 1024, 512).unwrap());
    }

    #[test]
    fn a_transfer_that_moves_no_whole_block_fails_instead_of_repeating() {
        let mut request = request(&[4096]);
        assert_eq!(
            TransferProgress::default().advance(&mut request, 0, 512).unwrap_err().raw_os_error(),
            Some(libc::EIO)
        );
        assert!(TransferProgress::default().advance(&mut request, 511, 512).is_err());
    }

    #[test]
    fn each_errno_maps_to_its_fault() {
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

    /// An image of `pages` pages, every second of which is data.
    fn fragmented(name: &str, pages: u64) -> (std::path::PathBuf, OpenImage) {
        let path = std::path::PathBuf::from(format!("/dev/shm/genblk-map-{}-{name}", std::process::id()));
        let file = std::fs::File::create(&path).unwrap();
        file.set_len(pages * 4096).unwrap();
        (0..pages).step_by(2).for_each(|page| file.write_all_at(&[1; 4096], page * 4096).unwrap());
        let options = OpenOptions { direct: false, ..OpenOptions::default() };
        let image = OpenImage::open(name.to_owned(), &path, &options).unwrap();
        (path, image)
    }

    #[test]
    fn a_map_with_too_many_runs_reports_the_rest_as_data() {
        let (path, image) = fragmented("runs", 200);
        let extents = map(&image, 0, 200 * 4096).unwrap();
        std::fs::remove_file(path).unwrap();
        assert_eq!(extents.iter().map(|extent| extent.len).sum::<u64>(), 200 * 4096);
        let last = extents.last().unwrap();
        assert_eq!((last.kind, last.len > 4096), (ExtentKind::Data, true));
        let is_right = |(nth, extent): (usize, &Extent)| (extent.kind == ExtentKind::Data) == (nth % 2 == 0);
        assert!(extents.iter().enumerate().all(is_right), "{extents:?}");
    }

    #[test]
    fn a_map_past_the_end_of_a_truncated_file_fails() {
        let (path, image) = fragmented("shrunk", 8);
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        file.set_len(3 * 4096).unwrap();
        let shrunk = map(&image, 0, 8 * 4096).map_err(|e| e.raw_os_error());
        std::fs::remove_file(path).unwrap();
        assert_eq!(shrunk.unwrap_err(), Some(libc::EIO));
    }

    /// What the image holds in the first block must not get into the whole blocks after it.
    #[test]
    fn zeros_that_begin_within_a_block_are_zeros_to_their_end() {
        let (path, mut image) = fragmented("partial", 16);
        image.limits.block_bytes = 4096;
        let mut expected = vec![1; 16 * 4096];
        image.file.write_all_at(&expected, 0).unwrap();
        write_zeros(&image, 512, 10 * 4096).unwrap();
        let written = std::fs::read(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        expected[512..512 + 10 * 4096].fill(0);
        assert!(written == expected);
    }

    #[test]
    fn zeros_keep_their_space_unless_it_may_be_freed() {
        let (path, image) = fragmented("modes", 2);
        std::fs::remove_file(path).unwrap();
        assert_eq!(zero_modes(&image, Unmap::Forbidden)[0], FallocateMode::ZeroRange);
        assert_eq!(zero_modes(&image, Unmap::Allowed)[0], FallocateMode::PunchHole);
    }
}
