//! Steps 2 and 3 of a turn: requests are taken from a ring, parsed and checked, and admitted to the cache under its
//! lock.

use std::collections::VecDeque;

use crate::cache::{Access, Admitted, Attempt, Notice, PageCache};
use crate::units::{PageId, PageNo, SECTORS_PER_PAGE, low_u32};
use crate::virtio::chain::DescriptorTable;
use crate::virtio::request::{Malformed, RequestKind, parse};
use crate::virtio::{GuestRam, Status};

use super::budget::{PAGES_PER_RANGE_PART, RANGE_PARTS_MAX};
use super::limits::{HeldHead, LimitedKind, Price};
use super::pending::{PendingSlot, Stage};
use super::requests::Requests;
use super::ring::Ring;

/// Most requests taken from one ring in one turn, so that a busy ring does not delay the others.
const BATCH_MAX: usize = 64;

impl Requests {
    /// Takes requests from a ring, as far as `budget` allows, and deducts their cost from it. Requests that need no
    /// cache are finished, the others are queued for admission. Returns whether the ring had any.
    ///
    /// => A request that was already taken once starts regardless of limits: it was charged before.
    pub(super) fn take_from(&mut self, index: u16, ring: &mut Ring, budget: &mut u64) -> bool {
        let (mut heads, mut rejected) = (std::mem::take(&mut self.heads), std::mem::take(&mut self.rejected));
        ring.peek(BATCH_MAX, &mut heads);
        let (mut taken, mut load) = (0, 0);
        let load_max = ring.load_left();
        let is_limited = self.limits != 0 && !ring.has_resubmissions();
        let mut held = if is_limited { ring.held } else { None };
        let table = ring.table(&ring.memory);
        if heads.len() > 1 {
            table.prefetch_heads(&ring.memory, &heads);
        }
        for &head in &heads {
            if *budget == 0 || load >= load_max || !self.pending.has_room() {
                break;
            }
            let limit = is_limited.then_some(&mut held);
            let Some((cost, result)) = self.accept_chain(index, &ring.memory, &table, head, limit) else { break };
            match result {
                Ok(pages) => load += pages,
                Err(malformed) => rejected.push((head, malformed)),
            }
            *budget = budget.saturating_sub(cost);
            taken += 1;
        }
        if is_limited {
            ring.held = held;
        }
        ring.commit(&heads[..taken]);
        ring.add_load(load);
        heads.clear();
        rejected.drain(..).for_each(|(head, malformed)| ring.reject(head, malformed));
        (self.heads, self.rejected) = (heads, rejected);
        taken > 0
    }

    /// Turns the chain at `head` into a pending request. Returns the cost of that and of its admission to a turn's
    /// budget, and the load that it adds to its ring; `None` if a limit holds it back: its head is then in `limit`.
    ///
    /// # Errors
    /// Why the chain cannot be completed with a status.
    fn accept_chain(
        &mut self,
        index: u16,
        memory: &GuestRam,
        table: &DescriptorTable<'_>,
        head: u16,
        limit: Option<&mut Option<HeldHead>>,
    ) -> Option<(u64, Result<u64, Malformed>)> {
        let slot = self.pending.take(index, self.tally.turn());
        let request = &mut self.pending[slot].request;
        let held_before = request.data.capacity();
        let parsed = parse(memory, table, head, request);
        let buffers = request.buffers;
        self.pending.count_buffers(slot, held_before);
        if let Some(held) = limit
            && parsed.is_ok()
            && !self.may_begin(slot, held)
        {
            self.pending.release(slot);
            return None;
        }
        match parsed {
            Ok(()) => {
                self.tally.taken(self.pending[slot].request.kind);
                self.enqueue(slot, memory);
            }
            Err(Malformed::WithStatus { status_addr }) => {
                let pending = &mut self.pending[slot];
                (pending.request.status_addr, pending.status) = (status_addr, Status::IoErr);
                pending.request.kind = RequestKind::Unknown(u32::MAX);
                self.finished.push(slot);
            }
            Err(malformed) => {
                self.pending.release(slot);
                return Some((self.device.budget.cost_of_taking(0, buffers), Err(malformed)));
            }
        }
        let pending = &self.pending[slot];
        Some((self.device.budget.cost_of_taking(pending.load, buffers), Ok(pending.load)))
    }

    /// Whether the limits let a request start that was just parsed and is the next one of its ring.
    fn may_begin(&mut self, slot: PendingSlot, held: &mut Option<HeldHead>) -> bool {
        let (request, now) = (&self.pending[slot].request, self.tally.turn());
        let price = LimitedKind::of(request.kind).map(|kind| Price { kind, bytes: request.data_bytes });
        let Ok(since) = self.device.limiter.may_begin(price, held, self.limits, now) else { return false };
        if let Some(since) = since {
            self.tally.was_limited(since);
        }
        true
    }

    /// Checks a request against the disk, and queues it for admission; finishes it immediately if it needs no cache.
    fn enqueue(&mut self, slot: PendingSlot, memory: &GuestRam) {
        let device = &self.device;
        let pending = &mut self.pending[slot];
        let request = &pending.request;
        pending.write_through = !device.writeback();
        pending.part_sectors = device.range_part_sectors();
        // Writes that completed for this guest are lost: every request fails until the guest resets the device.
        let intact = if device.arena.has_data_loss() { Err(Status::IoErr) } else { Ok(()) };
        let checked = intact.and_then(|()| request.check(&device.disk)).and_then(|()| match request.kind {
            RequestKind::Discard | RequestKind::WriteZeroes => {
                request.range_segments(memory, &device.disk, &mut pending.ranges)
            }
            RequestKind::GetId => request.write_id(memory, &device.disk).map_err(|_| Status::IoErr),
            _ => Ok(()),
        });
        let nothing_to_do = match request.kind {
            RequestKind::Read | RequestKind::Write => request.data_bytes == 0,
            RequestKind::Discard | RequestKind::WriteZeroes => pending.ranges.is_empty(),
            RequestKind::GetId => true,
            RequestKind::Flush | RequestKind::Unknown(_) => false,
        };
        if let Err(status) = checked {
            pending.status = status;
            self.finished.push(slot);
        } else if nothing_to_do {
            self.finished.push(slot);
        } else {
            pending.load = match request.kind {
                RequestKind::Read | RequestKind::Write => device.budget.load_of(request.span().pages().count),
                RequestKind::WriteZeroes => {
                    let pages = device.budget.pages_for_zeroes(pending.range_pages());
                    device.budget.load_of(pages).max(pending.total() * PAGES_PER_RANGE_PART)
                }
                _ => pending.total() * PAGES_PER_RANGE_PART,
            };
            self.incoming.push_back(slot);
        }
    }

    /// Admits queued requests to the cache, as far as a turn's budget allows: first those that the cache has resumed,
    /// then new ones. Another half of the budget is for further windows of long requests, one of each in turn.
    pub(super) fn admit_all(&mut self, cache: &mut PageCache) {
        let turn_pages = self.device.budget.turn_pages;
        let mut budget = turn_pages;
        while let Some(slot) = self.next_to_admit(budget, |requests| &mut requests.resumed) {
            self.pending[slot].stalled = false;
            budget = budget.saturating_sub(self.admit(cache, slot, Attempt::Resumed, PageId::NONE));
        }
        let Self { incoming, pending, found, .. } = self;
        found.clear();
        if incoming.len() > 1 {
            // A request without data has any sector that its guest sent; its lookup is wasted.
            let first_page = |&slot: &PendingSlot| PageNo(pending[slot].request.sector / SECTORS_PER_PAGE);
            cache.find_all(incoming.iter().map(first_page), found);
        }
        for at in 0.. {
            let Some(slot) = self.next_to_admit(budget, |requests| &mut requests.incoming) else { break };
            let guess = self.found.get(at).copied().unwrap_or(PageId::NONE);
            budget = budget.saturating_sub(self.admit(cache, slot, Attempt::New, guess));
        }
        let mut budget = (turn_pages / 2).max(1);
        for _ in 0..self.continuing.len() {
            let Some(slot) = self.next_to_admit(budget, |requests| &mut requests.continuing) else { break };
            self.pending[slot].continuing = false;
            budget = budget.saturating_sub(self.admit(cache, slot, Attempt::New, PageId::NONE));
        }
    }

    /// The next request of a list, unless the budget is spent or too much is in progress.
    fn next_to_admit(
        &mut self,
        budget: u64,
        list: impl FnOnce(&mut Self) -> &mut VecDeque<PendingSlot>,
    ) -> Option<PendingSlot> {
        if budget > 0 && self.can_admit() { list(self).pop_front() } else { None }
    }

    /// Admits a request to the cache, up to the end of its next window. Returns its cost to a turn's budget. `guess` is
    /// [`Access::guess`].
    fn admit(&mut self, cache: &mut PageCache, slot: PendingSlot, attempt: Attempt, guess: PageId) -> u64 {
        let ticket = self.pending.ticket(slot);
        let pending = &mut self.pending[slot];
        if pending.status != Status::Ok && pending.stage == Stage::Data {
            self.pending.skip_rest(slot);
            self.finish_if_settled(cache, slot);
            return 1;
        }
        if pending.is_cut {
            return 1;
        }
        if pending.request.kind == RequestKind::Flush {
            pending.stage = Stage::Flush;
            cache.flush(ticket);
            return 1;
        }
        if !matches!(pending.request.kind, RequestKind::Read | RequestKind::Write) {
            return self.admit_ranges(cache, slot);
        }
        let (span, from) = (pending.request.span(), pending.admitted());
        let until = low_u32(self.device.budget.window_end(span.start, span.count, pending.settled()));
        if until <= from {
            return 1;
        }
        let access = Access { from, until, attempt, guess, ..Access::new(ticket, span) };
        self.pieces.clear();
        let admitted = if pending.request.kind == RequestKind::Read {
            cache.read(access, &mut self.pieces)
        } else {
            if !pending.write_through {
                pending.delay_us = cache.write_delay_us(span.count);
            }
            cache.write(access, &mut self.pieces)
        };
        self.copies.extend(self.pieces.drain(..).map(|piece| (slot, piece)));
        let admitted_to = match admitted {
            Admitted::All => until,
            Admitted::Until(at) | Admitted::Refused(at, _) => at,
        };
        pending.stalled = matches!(admitted, Admitted::Until(_));
        self.pending.admit(slot, admitted_to);
        if let Admitted::Refused(_, fault) = admitted {
            self.pending.skip_rest(slot);
            self.pending[slot].status = Status::from(fault);
            self.finish_if_settled(cache, slot);
        }
        1 + u64::from(admitted_to - from) / SECTORS_PER_PAGE
    }

    /// Admits parts of a DISCARD or WRITE ZEROES, up to one that has to wait. Returns their cost to a turn's budget.
    fn admit_ranges(&mut self, cache: &mut PageCache, slot: PendingSlot) -> u64 {
        let ticket = self.pending.ticket(slot);
        let mut cost = 0;
        while self.pending[slot].outstanding() < RANGE_PARTS_MAX
            && let Some(part) = self.pending[slot].range_part(self.pending[slot].admitted().into())
        {
            let admitted = match self.pending[slot].request.kind {
                RequestKind::WriteZeroes => cache.zero(ticket, part.span, part.unmap),
                _ => cache.discard(ticket, part.span),
            };
            if !admitted {
                self.pending[slot].stalled = true;
                break;
            }
            let admitted_before = self.pending[slot].admitted();
            self.pending.admit(slot, admitted_before + 1);
            cost += PAGES_PER_RANGE_PART;
        }
        cost.max(1)
    }

    /// Lists a request to continue, if its next window is due: half of the last one is done.
    pub(super) fn continue_if_due(&mut self, slot: PendingSlot) {
        let pending = &mut self.pending[slot];
        let window = match pending.request.kind {
            RequestKind::Read | RequestKind::Write => self.device.budget.window_pages * SECTORS_PER_PAGE,
            _ => RANGE_PARTS_MAX,
        };
        let has_rest = pending.settled() < pending.total() && u64::from(pending.admitted()) < pending.total();
        let is_listed = pending.stalled || pending.continuing;
        if has_rest && !is_listed && !pending.is_cut && pending.outstanding() <= window / 2 {
            pending.continuing = true;
            self.continuing.push_back(slot);
        }
    }

    /// Ends long requests and DISCARDs whose rings drain after their admitted part: the rings need not complete the
    /// rest, and the cache admits no more of it.
    ///
    /// => A long request was taken last from its ring. It has not completed, so it can be executed again. A repeated
    ///    long write, or WRITE ZEROES, may overwrite the data of an overlapping write that completed meanwhile. Both
    ///    were in flight, and virtio defines no order for such requests.
    /// => A DISCARD is a hint: the rest of it can be skipped.
    pub(super) fn cut_short(
        &mut self,
        cache: &mut PageCache,
        rings: &mut [Option<Ring>],
        drains: impl Fn(u16) -> bool,
    ) {
        let slots: Vec<PendingSlot> =
            self.pending.slots_in_use().filter(|&slot| drains(self.pending[slot].ring)).collect();
        for slot in slots {
            let (pending, budget) = (&self.pending[slot], &self.device.budget);
            let is_long = match pending.request.kind {
                RequestKind::Read | RequestKind::Write => budget.is_long(pending.request.span().pages().count),
                RequestKind::WriteZeroes => budget.is_long(budget.pages_for_zeroes(pending.range_pages())),
                kind => kind == RequestKind::Discard,
            };
            let has_rest = pending.stage == Stage::Data && u64::from(pending.admitted()) < pending.total();
            if !is_long || !has_rest || self.finished.contains(&slot) {
                continue;
            }
            let pending = &mut self.pending[slot];
            pending.is_cut = true;
            if pending.outstanding() > 0 {
                continue;
            }
            if pending.stalled && !cache.withdraw(self.pending.ticket(slot)) && !self.resumed.contains(&slot) {
                // Its notice is already queued.
                continue;
            }
            for list in [&mut self.resumed, &mut self.incoming, &mut self.continuing] {
                list.retain(|&other| other != slot);
            }
            let pending = &self.pending[slot];
            let ring = rings[usize::from(pending.ring)].as_mut().expect("it drains");
            if pending.request.kind == RequestKind::Discard {
                self.pending.skip_rest(slot);
                self.finished.push(slot);
            } else {
                self.tally.withdrawn(pending.request.kind);
                ring.suspend(pending.request.head);
                ring.remove_load(pending.load);
                self.pending.release(slot);
            }
        }
    }

    /// Handles a notice of the cache about a request that was admitted earlier.
    pub(super) fn handle_notice(&mut self, cache: &mut PageCache, notice: Notice) {
        match notice {
            Notice::Ready(ticket, piece) => self.copies.push((self.pending.slot_of(ticket), piece)),
            Notice::Unreadable(ticket, sectors, fault) => {
                let slot = self.pending.slot_of(ticket);
                self.pending.settle(slot, u64::from(sectors));
                self.pending[slot].status = Status::from(fault);
                self.finish_if_settled(cache, slot);
            }
            Notice::Resume(ticket) => self.resumed.push_back(self.pending.slot_of(ticket)),
            Notice::Done(ticket, result) => {
                if self.end_control_flush(ticket, result) {
                    return;
                }
                let slot = self.pending.slot_of(ticket);
                let pending = &mut self.pending[slot];
                if let Err(fault) = result {
                    pending.status = Status::from(fault);
                }
                if pending.stage == Stage::Flush {
                    self.finished.push(slot);
                } else {
                    self.pending.settle(slot, 1);
                    self.finish_if_settled(cache, slot);
                }
            }
        }
    }
}
