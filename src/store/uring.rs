//! The normal engine: one io_uring per worker, with the image as its registered file and an eventfd that the worker
//! polls.
//!
//! An operation lives in a slot from `submit` to its completion: the slot owns the request, hence the segments (which
//! are the kernel's iovec array) and the memory behind them. What a ring can't do, or must not wait for (hole maps,
//! device ioctls, the fallbacks of `blocking`), goes to a helper thread that pokes the same eventfd.

use crate::units::OpKind;
use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::mem;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Instant;

use io_uring::squeue::Entry;
use io_uring::{IoUring, Probe, opcode, types};
use vmm_sys_util::eventfd::EventFd;

use super::blocking::{self, Progress};
use super::file::OpenImage;
use super::pool::{self, DRAIN_MAX, Pool};
use super::registered_buffers::RegisteredBuffers;
use super::{Event, IoRequest, Limits, Refused, StoreQueue};
use crate::sys;
use crate::sys::file::FallocateMode;

/// The image's place in the ring's table of registered files.
const IMAGE: types::Fixed = types::Fixed(0);

/// One worker's store on a ring.
pub(super) struct UringQueue {
    ring: IoUring,
    image: Arc<OpenImage>,
    wake: Arc<EventFd>,
    helper: Pool,
    /// The memory that the kernel has pinned for us.
    fixed: RegisteredBuffers,
    /// The kernel knows transfers between pinned memory and several segments of it (Linux 6.15).
    vectored: bool,
    /// One for each operation of the depth.
    slots: Vec<Slot>,
    /// Slots without an operation.
    free: Vec<usize>,
    /// Slots whose operation must (again) enter the submission queue, oldest first: neighbours that come in order are
    /// merged by the block layer.
    ready: VecDeque<usize>,
    /// Operations in slots and at the helper, and events of the helper's that were not reaped.
    in_flight: usize,
    /// Whether the kernel's refusal of a submission was logged.
    refusal_logged: bool,
}

/// An operation on its way.
#[derive(Debug, Default)]
struct Slot {
    request: Option<IoRequest>,
    progress: Progress,
    /// The registered buffer that its memory lies in.
    buffer: Option<u16>,
}

impl UringQueue {
    pub(super) fn new(image: Arc<OpenImage>) -> io::Result<Self> {
        let depth = usize::from(image.limits.depth);
        let ring = new_ring(u32::from(image.limits.depth))?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let needed =
            [opcode::Read::CODE, opcode::Write::CODE, opcode::Readv::CODE, opcode::Writev::CODE, opcode::Fsync::CODE];
        if !needed.iter().chain([&opcode::Fallocate::CODE]).all(|&code| probe.is_supported(code)) {
            return Err(io::Error::from_raw_os_error(libc::ENOSYS));
        }
        ring.submitter().register_files(&[image.file.as_raw_fd()])?;
        let wake = pool::new_wake()?;
        ring.submitter().register_eventfd(wake.as_raw_fd())?;
        let helper = Pool::new(Arc::clone(&image), Arc::clone(&wake), 1, depth)?;
        Ok(Self {
            ring,
            image,
            wake,
            helper,
            fixed: RegisteredBuffers::default(),
            vectored: [opcode::ReadvFixed::CODE, opcode::WritevFixed::CODE]
                .iter()
                .all(|&code| probe.is_supported(code)),
            slots: (0..depth).map(|_| Slot::default()).collect(),
            free: (0..depth).rev().collect(),
            ready: VecDeque::with_capacity(depth),
            in_flight: 0,
            refusal_logged: false,
        })
    }

    /// Whether the ring has an opcode for the operation on this image, as it is now; the helper knows what to say to the
    /// others.
    fn fits_ring(&self, request: &IoRequest) -> bool {
        match request.op {
            _ if !self.image.still_holds(request) => false,
            OpKind::Read | OpKind::Write | OpKind::Sync | OpKind::Allocate => true,
            OpKind::Map => false,
            OpKind::Discard => !self.image.is_device(),
            OpKind::Zero { .. } => {
                let whole = (request.offset, request.offset + request.len);
                self.image.whole_blocks(request.offset, request.len) == Some(whole)
            }
        }
    }

    /// Moves ready slots to the submission queue, as many as it takes.
    fn fill_queue(&mut self) {
        let mut queue = self.ring.submission();
        while let Some(&index) = self.ready.front() {
            let entry = entry(&self.image, &self.slots[index]).user_data(index as u64);
            // SAFETY: the slot owns the request until its completion: the segment array and the memory it names stay
            // where they are. Drop waits for completions.
            if unsafe { queue.push(&entry) }.is_err() {
                return;
            }
            self.ready.pop_front();
        }
    }

    fn next_completion(&mut self) -> Option<(u64, i32)> {
        self.ring.completion().next().map(|completion| (completion.user_data(), completion.result()))
    }

    /// Digests one completion.
    fn complete(&mut self, index: usize, result: i32, events: &mut Vec<Event>) {
        let block = u64::from(self.image.limits.block_bytes);
        let slot = &mut self.slots[index];
        let request = slot.request.as_mut().expect("a completion is of a slot with an operation");
        let tag = request.tag;
        let event = match u64::try_from(result) {
            // ECANCELED: the thread that submitted it has ended before it began. We never cancel.
            Err(_) if matches!(-result, libc::EINTR | libc::EAGAIN | libc::ECANCELED) => None,
            Err(_) if matches!(request.op, OpKind::Zero { .. }) && sys::is_unsupported(-result) => {
                let request = slot.request.take().expect("looked at just now");
                self.free.push(index);
                self.helper.push(request);
                self.helper.start();
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

    /// The kernel did not take what is queued. It stays queued; with nothing in flight no completion would bring the
    /// worker back to try again, so the wake-up descriptor does.
    fn on_refusal(&mut self, error: &io::Error) {
        if !mem::replace(&mut self.refusal_logged, true) {
            log::warn!(
                "image {}: io_uring did not take operations ({error}); trying again",
                self.image.path().display()
            );
        }
        pool::notify(&self.wake);
    }
}

/// A ring whose completions wait for the worker's next system call, where the kernel can do that (Linux 5.19): it would else
/// interrupt the worker's processor for each. A flag in the ring tells the worker that some wait.
fn new_ring(entries: u32) -> io::Result<IoUring> {
    match IoUring::builder().setup_coop_taskrun().setup_taskrun_flag().build(entries) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => IoUring::new(entries),
        result => result,
    }
}

/// The submission entry for the rest of a slot's operation.
fn entry(image: &OpenImage, slot: &Slot) -> Entry {
    let request = slot.request.as_ref().expect("a ready slot has an operation");
    match request.op {
        OpKind::Read | OpKind::Write => transfer_entry(image, slot, request),
        OpKind::Sync => opcode::Fsync::new(IMAGE).flags(types::FsyncFlags::DATASYNC).build(),
        OpKind::Zero { unmap } => fallocate_entry(blocking::zero_modes(image, unmap)[0], request),
        OpKind::Discard => fallocate_entry(FallocateMode::PunchHole, request),
        OpKind::Allocate => fallocate_entry(FallocateMode::Reserve, request),
        OpKind::Map => unreachable!("maps go to the helper"),
    }
}

fn fallocate_entry(mode: FallocateMode, request: &IoRequest) -> Entry {
    opcode::Fallocate::new(IMAGE, request.len).offset(request.offset).mode(mode.flags()).build()
}

#[cfg_attr(not(test), allow(unused_variables, reason = "tests cut transfers of an image short"))]
fn transfer_entry(image: &OpenImage, slot: &Slot, request: &IoRequest) -> Entry {
    let (rest, offset) = (slot.progress.rest(request), slot.progress.offset(request));
    #[cfg(test)]
    let cut = blocking::cut_short(image, rest);
    #[cfg(test)]
    let rest = cut.as_ref().map_or(rest, std::slice::from_ref);
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
        self.fixed = RegisteredBuffers::new(&self.ring.submitter(), memory);
    }

    fn submit(&mut self, request: IoRequest) -> Result<(), Refused> {
        if !self.image.limits.admissible(&request) {
            return Err(Refused::Invalid(request));
        }
        if self.in_flight >= self.slots.len() {
            return Err(Refused::Full(request));
        }
        self.in_flight += 1;
        if self.fits_ring(&request) {
            let index = self.free.pop().expect("fewer operations in flight than slots");
            let fixable = self.vectored || request.segments.len() == 1;
            let buffer = if fixable { self.fixed.buffer_of(&self.ring.submitter(), &request.segments) } else { None };
            self.slots[index] = Slot { request: Some(request), progress: Progress::default(), buffer };
            self.ready.push_back(index);
        } else {
            self.helper.push(request);
            self.helper.start();
        }
        Ok(())
    }

    fn kick(&mut self) {
        // Normally one round: the queue has room for every slot, and the kernel takes all of it.
        loop {
            self.fill_queue();
            if self.ring.submission().is_empty() {
                return;
            }
            match self.ring.submit() {
                Ok(0) => return self.on_refusal(&io::Error::from_raw_os_error(libc::EAGAIN)),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return self.on_refusal(&error),
            }
        }
    }

    fn reap(&mut self, events: &mut Vec<Event>) {
        // A system call, any one, lets the kernel post the completions that it held back, and with them a poke.
        if self.ring.submission().taskrun() {
            pool::clear(&self.wake);
        }
        // Before the look: what completes from here on pokes again.
        pool::clear(&self.wake);
        while let Some((user_data, result)) = self.next_completion() {
            let index = usize::try_from(user_data).expect("user data is a slot's index");
            self.complete(index, result, events);
        }
        self.in_flight -= self.helper.take(events);
        // The rest of short transfers, and what the kernel did not take, must not wait for a caller who has nothing more to
        // submit.
        if !self.ready.is_empty() || !self.ring.submission().is_empty() {
            self.kick();
        }
    }

    fn may_have_events(&mut self) -> bool {
        // The kernel leaves its flag set now and then.
        if self.in_flight == 0 {
            return false;
        }
        let helped = self.in_flight - (self.slots.len() - self.free.len());
        let queue = self.ring.submission();
        let (owes_submission, owes_completion) = (!queue.is_empty(), queue.taskrun());
        drop(queue);
        helped > 0 || owes_submission || owes_completion || !self.ring.completion().is_empty()
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }
}

impl Drop for UringQueue {
    /// Finishes what was accepted: the kernel may write to its memory until then.
    fn drop(&mut self) {
        let deadline = Instant::now() + DRAIN_MAX;
        let mut events = Vec::new();
        loop {
            self.kick();
            self.reap(&mut events);
            if self.in_flight == 0 {
                // A ring is torn down later, by a kernel thread: its hold on the file (for a device, an exclusive one) and on
                // the cache's memory (huge pages are few) should end now.
                let ring = self.ring.submitter();
                if let Err(error) = ring.unregister_files().and_then(|()| self.fixed.release(&ring)) {
                    log::debug!(
                        "image {}: what the ring holds is released later: {error}",
                        self.image.path().display()
                    );
                }
                return;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            sys::poll::wait_readable(self.wake.as_raw_fd(), left);
        }
        let path = self.image.path().display();
        log::error!("image {path}: {} operations hang; the kernel may still touch their memory", self.in_flight);
        // Their segment arrays at least must outlive them, and so must the image's lock.
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
