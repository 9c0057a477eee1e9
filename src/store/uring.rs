//! The normal engine: one io_uring per worker, with the image as its registered file and an eventfd that the worker
//! polls.
//!
//! An operation occupies a slot from `submit` to its completion: the slot owns the request, hence the segments (which
//! are the kernel's iovec array) and the memory that they name. Operations that a ring cannot do, or must not wait for
//! (hole maps, device ioctls, the fallbacks of `blocking`), run on a helper thread that notifies the same eventfd.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::mem;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use io_uring::squeue::Entry;
use io_uring::{IoUring, opcode, types};

use super::blocking::{self, TransferProgress};
use super::image::OpenImage;
use super::pool::{Pool, Threads};
use super::registered_buffers::RegisteredBuffers;
use super::restricted_ring::new_ring;
use super::wake::WakeFd;
use super::{DRAIN_MAX, Event, IoRequest, Limits, Refused, StoreQueue, wait_until_drained};
use crate::sys;
use crate::sys::file::FallocateMode;
use crate::units::{OpKind, counted};

/// The image's index in the ring's table of registered files.
const IMAGE: types::Fixed = types::Fixed(0);
/// Pauses before a failed submission is retried: the first, and the longest.
const RETRY_PAUSE_MIN: Duration = Duration::from_millis(1);
const RETRY_PAUSE_MAX: Duration = Duration::from_millis(64);
/// The helper's threads: one for zeros and discards that a ring cannot do, and one for the maps that reads wait for.
const HELPERS: Threads = Threads { for_changes: 1, for_reads: 1 };

/// One worker's queue on an image: an io_uring with as many slots as the image's depth, and a helper thread.
///
/// => `submit` puts an operation into a slot and marks it ready; `kick` moves ready slots to the submission queue and
///    enters the kernel once for all of them.
/// => A short transfer, or one that must be repeated, makes its slot ready again; `reap` submits it.
/// => Events come from the ring's completion queue and from the helper. Both notify the wake fd.
pub(super) struct UringQueue {
    ring: IoUring,
    image: Arc<OpenImage>,
    wake: WakeFd,
    /// Runs the operations that the ring cannot do.
    helper: Pool,
    /// The memory that the kernel keeps pinned for this ring.
    buffers: RegisteredBuffers,
    /// Whether the kernel supports transfers between a registered buffer and several segments of it (Linux 6.15).
    has_vectored_fixed: bool,
    /// As many as the image's depth.
    slots: Vec<UringSlot>,
    /// Slots without an operation.
    free: Vec<usize>,
    /// Slots whose operation must enter the submission queue, for the first time or again; oldest first, because the
    /// block layer merges neighbours that arrive in order.
    ready: VecDeque<usize>,
    /// Operations in slots and at the helper, and the helper's events that have not been reaped.
    in_flight: usize,
    /// Whether the log has reported that the kernel did not accept a submission.
    submit_failure_logged: bool,
    /// The kernel did not accept the last submission: the pause before the next one, and its end.
    retry: Option<(Duration, Instant)>,
    /// Whether [`StoreQueue::drain`] has ended the queue's use.
    drained: bool,
}

/// An operation and how much of it is complete; free without a request.
#[derive(Debug, Default)]
struct UringSlot {
    request: Option<IoRequest>,
    progress: TransferProgress,
    /// The registered buffer that holds its memory, if one does.
    buffer: Option<u16>,
}

impl UringQueue {
    /// Sets up a ring and starts its helper. Fails with ENOSYS if the kernel lacks a necessary opcode, otherwise with
    /// the error of the system call that failed.
    pub(super) fn new(image: Arc<OpenImage>) -> io::Result<Self> {
        let depth = usize::from(image.limits.depth);
        let wake = WakeFd::new()?;
        let (ring, probe) = new_ring(u32::from(image.limits.depth), image.file.as_raw_fd(), wake.as_raw_fd())?;
        let helper = Pool::new(Arc::clone(&image), wake.clone(), HELPERS, depth)?;
        Ok(Self {
            ring,
            image,
            wake,
            helper,
            buffers: RegisteredBuffers::default(),
            has_vectored_fixed: [opcode::ReadvFixed::CODE, opcode::WritevFixed::CODE]
                .iter()
                .all(|&code| probe.is_supported(code)),
            slots: (0..depth).map(|_| UringSlot::default()).collect(),
            free: (0..depth).rev().collect(),
            ready: VecDeque::with_capacity(depth),
            in_flight: 0,
            submit_failure_logged: false,
            retry: None,
            drained: false,
        })
    }

    /// Whether the ring can do the operation on the image in its present state. The helper completes or fails any
    /// other.
    fn ring_supports(&self, request: &IoRequest) -> bool {
        match request.op {
            _ if !self.image.still_covers(request) => false,
            OpKind::Write => !self.image.must_record_formats(request),
            OpKind::Read | OpKind::Sync | OpKind::Allocate => true,
            OpKind::Map => false,
            OpKind::Discard => !self.image.is_device(),
            OpKind::Zero { .. } => {
                let whole = (request.offset, request.offset + request.len);
                self.image.whole_blocks(request.offset, request.len) == Some(whole)
            }
        }
    }

    /// Moves ready slots to the submission queue until it is full.
    fn fill_queue(&mut self) {
        let mut queue = self.ring.submission();
        while let Some(&index) = self.ready.front() {
            let entry = entry(&self.image, &self.slots[index]).user_data(index as u64);
            // SAFETY: the slot owns the request until its completion, so the segment array and the memory that it names
            // stay in place. Drop waits for completions.
            if unsafe { queue.push(&entry) }.is_err() {
                return;
            }
            self.ready.pop_front();
        }
    }

    fn next_completion(&mut self) -> Option<(u64, i32)> {
        self.ring.completion().next().map(|completion| (completion.user_data(), completion.result()))
    }

    /// Handles one completion: turns it into an event, or makes the slot ready again.
    fn complete(&mut self, index: usize, result: i32, events: &mut Vec<Event>) {
        let block = u64::from(self.image.limits.transfer_block_bytes());
        let slot = &mut self.slots[index];
        let request = slot.request.as_mut().expect("a completion is of a slot with an operation");
        let tag = request.tag;
        let event = match u64::try_from(result) {
            Err(_) if is_to_be_repeated(-result) => None,
            Err(_) if matches!(request.op, OpKind::Zero { .. }) && sys::is_unsupported(-result) => {
                let request = slot.request.take().expect("the slot had a request above");
                self.free.push(index);
                self.helper.push(request);
                self.helper.wake_threads();
                return;
            }
            Err(_) => Some(blocking::failure(tag, -result)),
            Ok(moved) if matches!(request.op, OpKind::Read | OpKind::Write) => {
                match slot.progress.advance(request, moved, block) {
                    Ok(true) => Some(Event::Done { tag }),
                    Ok(false) => None,
                    Err(error) => Some(blocking::failure(tag, sys::errno_of(&error))),
                }
            }
            Ok(_) => Some(Event::Done { tag }),
        };
        match event {
            None => self.ready.push_back(index),
            Some(event) => {
                slot.request = None;
                self.free.push(index);
                self.in_flight -= 1;
                events.push(event);
            }
        }
    }

    /// The kernel did not accept the submission queue, which keeps its entries: for lack of memory, or because
    /// completions have to be reaped first. The worker retries after a pause, which grows.
    fn on_submit_failure(&mut self, error: &io::Error) {
        if !mem::replace(&mut self.submit_failure_logged, true) {
            let label = self.image.label();
            log::warn!("{label}: io_uring did not accept operations ({error}); retrying");
        }
        let pause = self.retry.map_or(RETRY_PAUSE_MIN, |(pause, _)| (pause * 2).min(RETRY_PAUSE_MAX));
        self.retry = Some((pause, Instant::now() + pause));
    }

    /// Like [`IoUring::submit`].
    fn submit_entries(&mut self) -> io::Result<usize> {
        #[cfg(test)]
        if self.image.refuses_submission() {
            return Err(io::Error::from_raw_os_error(libc::ENOMEM));
        }
        self.ring.submit()
    }

    /// The number of the registered buffer that holds all of the request's memory, if there is one.
    fn registered_buffer(&mut self, request: &IoRequest) -> Option<u16> {
        if request.segments.len() != 1 && !self.has_vectored_fixed {
            return None;
        }
        self.buffers.buffer_of(&self.ring.submitter(), &request.segments).unwrap_or_else(|error| {
            let label = self.image.label();
            log::info!(
                "{label}: cannot register more io_uring buffers ({error}; RLIMIT_MEMLOCK?); each transfer pins its \
                 pages"
            );
            None
        })
    }
}

/// The submission entry for the rest of a slot's operation.
fn entry(image: &OpenImage, slot: &UringSlot) -> Entry {
    let request = slot.request.as_ref().expect("a ready slot has an operation");
    match request.op {
        OpKind::Read | OpKind::Write => transfer_entry(image, slot, request),
        OpKind::Sync => opcode::Fsync::new(IMAGE).flags(types::FsyncFlags::DATASYNC).build(),
        OpKind::Zero { unmap } => fallocate_entry(blocking::zero_modes(image, unmap)[0], request),
        OpKind::Discard => fallocate_entry(FallocateMode::PunchHole, request),
        OpKind::Allocate => fallocate_entry(FallocateMode::Reserve, request),
        OpKind::Map => unreachable!("ring_supports() sends maps to the helper"),
    }
}

fn fallocate_entry(mode: FallocateMode, request: &IoRequest) -> Entry {
    opcode::Fallocate::new(IMAGE, request.len).offset(request.offset).mode(mode.flags()).build()
}

fn transfer_entry(image: &OpenImage, slot: &UringSlot, request: &IoRequest) -> Entry {
    let (rest, offset) = (slot.progress.rest(request), slot.progress.offset(request));
    let start = image.limited_start(rest);
    let rest = start.as_ref().map_or(rest, std::slice::from_ref);
    let write = request.op == OpKind::Write;
    if let [only] = rest {
        let len = u32::try_from(only.len).expect("admissible() bounds a transfer");
        return match (write, slot.buffer) {
            (false, None) => opcode::Read::new(IMAGE, only.base, len).offset(offset).build(),
            (false, Some(buffer)) => opcode::ReadFixed::new(IMAGE, only.base, len, buffer).offset(offset).build(),
            (true, None) => opcode::Write::new(IMAGE, only.base, len).offset(offset).build(),
            (true, Some(buffer)) => opcode::WriteFixed::new(IMAGE, only.base, len, buffer).offset(offset).build(),
        };
    }
    let array = rest.as_ptr().cast::<libc::iovec>();
    let count = u32::try_from(rest.len()).expect("admissible() bounds the segments");
    match (write, slot.buffer) {
        (false, None) => opcode::Readv::new(IMAGE, array, count).offset(offset).build(),
        (false, Some(buffer)) => opcode::ReadvFixed::new(IMAGE, array, count, buffer).offset(offset).build(),
        (true, None) => opcode::Writev::new(IMAGE, array, count).offset(offset).build(),
        (true, Some(buffer)) => opcode::WritevFixed::new(IMAGE, array, count, buffer).offset(offset).build(),
    }
}

impl StoreQueue for UringQueue {
    fn limits(&self) -> &Limits {
        &self.image.limits
    }

    fn wake_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }

    fn hint_memory(&mut self, memory: Range<usize>) {
        self.buffers = RegisteredBuffers::new(&self.ring.submitter(), memory);
    }

    fn limit_memory(&mut self, end: usize) {
        self.buffers.limit(&self.ring.submitter(), end);
    }

    fn submit(&mut self, request: IoRequest) -> Result<(), Refused> {
        if !self.image.limits.admissible(&request) {
            return Err(Refused::Invalid(request));
        }
        if self.in_flight >= self.slots.len() {
            return Err(Refused::Full(request));
        }
        self.in_flight += 1;
        if self.ring_supports(&request) {
            let index = self.free.pop().expect("fewer operations in flight than slots");
            let buffer = self.registered_buffer(&request);
            self.slots[index] = UringSlot { request: Some(request), progress: TransferProgress::default(), buffer };
            self.ready.push_back(index);
        } else {
            self.helper.push(request);
            self.helper.wake_threads();
        }
        Ok(())
    }

    fn kick(&mut self) {
        match self.retry {
            // Entries remain in the submission queue only after a failure.
            None if self.ready.is_empty() => return,
            Some((_, end)) if Instant::now() < end => return,
            _ => {}
        }
        // Normally one round: the queue has room for every slot, and the kernel accepts all entries.
        loop {
            self.fill_queue();
            if self.ring.submission().is_empty() {
                return;
            }
            match self.submit_entries() {
                Ok(0) => return self.on_submit_failure(&io::Error::from_raw_os_error(libc::EAGAIN)),
                Ok(_) => self.retry = None,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return self.on_submit_failure(&error),
            }
        }
    }

    fn reap(&mut self, events: &mut Vec<Event>) {
        // Any system call makes the kernel post the pending completions, and notify the wake fd.
        if self.ring.submission().taskrun() {
            self.wake.clear();
        }
        // Cleared before the completion queue is read: a later completion notifies again.
        self.wake.clear();
        while let Some((user_data, result)) = self.next_completion() {
            let index = usize::try_from(user_data).expect("user data is a slot's index");
            self.complete(index, result, events);
        }
        self.in_flight -= self.helper.take_events(events);
        // The rest of a short transfer, and entries that the kernel did not accept, must not wait for the caller's next
        // submission.
        if !self.ready.is_empty() || !self.ring.submission().is_empty() {
            self.kick();
        }
    }

    fn may_have_events(&mut self) -> bool {
        // Checked first, because the kernel sometimes leaves the taskrun flag set.
        if self.in_flight == 0 {
            return false;
        }
        let at_helper = self.in_flight - (self.slots.len() - self.free.len());
        let queue = self.ring.submission();
        let (has_submissions, holds_completions) = (!queue.is_empty(), queue.taskrun());
        drop(queue);
        at_helper > 0
            || has_submissions && self.retry.is_none()
            || holds_completions
            || !self.ring.completion().is_empty()
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn retry_after(&self) -> Option<Duration> {
        self.retry.map(|(_, end)| end.saturating_duration_since(Instant::now()))
    }

    fn drain(&mut self, timeout: Duration) -> bool {
        self.helper.abandon_on_drop();
        self.drained = true;
        wait_until_drained(self, timeout)
    }
}

impl Drop for UringQueue {
    /// Completes the accepted operations, because until then the kernel may write to their memory.
    fn drop(&mut self) {
        if !self.drained && !wait_until_drained(self, DRAIN_MAX) {
            let (label, hanging) = (self.image.label(), counted(self.in_flight as u64, "operation"));
            let seconds = DRAIN_MAX.as_secs();
            log::error!("{label}: {hanging} did not complete in {seconds} s; the kernel may still access the memory");
        }
        if self.in_flight == 0 {
            // A kernel thread releases the ring later. Its references to the file (to a device: an exclusive one) and
            // to the cache's memory (huge pages are scarce) should end now.
            let ring = self.ring.submitter();
            if let Err(error) = ring.unregister_files().and_then(|()| self.buffers.release(&ring)) {
                let label = self.image.label();
                log::debug!("{label}: cannot unregister the ring's file and buffers immediately: {error}");
            }
            return;
        }
        // The segment arrays and the image's lock must outlive those operations.
        mem::forget((mem::take(&mut self.slots), Arc::clone(&self.image)));
    }
}

impl fmt::Debug for UringQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UringQueue")
            .field("image", &self.image)
            .field("in_flight", &self.in_flight)
            .finish_non_exhaustive()
    }
}

/// Whether an operation that failed with this error had no effect, and is submitted again.
///
/// => ECANCELED: the thread that submitted the operation ended before the operation started. genblk never cancels.
fn is_to_be_repeated(errno: i32) -> bool {
    matches!(errno, libc::EINTR | libc::EAGAIN | libc::ECANCELED)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether the kernel cancels an operation depends on timing, so no test can wait for that.
    #[test]
    fn only_interrupted_or_cancelled_operations_are_repeated() {
        assert!([libc::EINTR, libc::EAGAIN, libc::ECANCELED].into_iter().all(is_to_be_repeated));
        let failures = [libc::EIO, libc::ENOSPC, libc::EOPNOTSUPP, libc::EINVAL, libc::ETIMEDOUT, libc::ENODEV];
        assert!(!failures.into_iter().any(is_to_be_repeated));
    }
}
