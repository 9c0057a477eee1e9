//! The client of one connection after another, as a state machine without I/O: it turns operations into requests of the
//! protocol, and replies into events. The socket (`queue.rs`) reports to it the bytes received and sent, and
//! connections that break or are established.
//!
//! => An operation that was not completed when its connection broke is sent again on the next one. Its memory does not
//!    change before its event is taken, so each repetition has the same bytes.
//! => A connection that is not the first one may lead to a server that was restarted, which may have lost everything
//!    that no FLUSH had made durable. So the first Sync after it fails with [`Fault::Lost`], and the receiver treats
//!    everything that it had submitted before as lost: see `losses.rs`.
//! => A change that was sent and not answered when its connection broke makes its range suspect: see `suspects.rs`.
//! => If a server violates the protocol, only its connection ends.
//! => Ranges written since the last FLUSH are data in every map: see `unflushed.rs`.

use std::collections::VecDeque;
use std::mem;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use super::losses::Losses;
use super::memory;
use super::notifier::Notifier;
use super::slot::{Phase, Receiving, Slot, Violation};
use super::suspects::{BreakId, EARLIER, Suspects};
use super::unflushed::{Unflushed, with_data};
use super::wire::{Export, REQUEST_BYTES, command_of, export_flag, fault_of, request};
use crate::fault_injection::{PlantedBug, planted};
use crate::store::{Event, Extent, IoRequest, Segment};
use crate::units::{ExtentKind, Fault, OpKind, SECTOR_BYTES};

/// Longest range of one request, except for reads and writes; a longer range takes several requests.
const PART_MAX: u64 = 1 << 30;
/// Most pieces of memory of one sendmsg(2) (UIO_MAXIOV).
const PIECES_MAX: usize = 1024;
/// Bits of a cookie that are the slot's number; the others are the number of the request.
const SLOT_BITS: u32 = 16;
/// How often a change checks whether the quarantine that it waits for has begun.
const HELD_CHECK: Duration = Duration::from_millis(100);
/// How long a Sync lets other queues replace their obsolete connections before it fails.
///
/// => Each such failure makes the cache write everything again that is not durable.
const SETTLE_TIME: Duration = Duration::from_secs(1);

/// Whether the client has a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Link {
    Down,
    Up,
    /// The connection has ended, and no other follows.
    Closed,
}

/// What the clients of an image share.
#[derive(Clone, Debug, Default)]
pub(super) struct SharedLists {
    pub suspects: Arc<Suspects>,
    pub losses: Arc<Losses>,
    pub unflushed: Arc<Unflushed>,
}

/// A request that is being sent.
#[derive(Debug)]
struct Sending {
    header: [u8; REQUEST_BYTES],
    slot: usize,
    sent: u64,
    /// Including the bytes of a write.
    total: u64,
}

/// See the documentation of the module.
#[derive(Debug)]
pub(super) struct Client {
    /// The export when the image was opened; a server that comes back must have at least its properties.
    export: Export,
    /// The server described the extents of the export when it was opened. Where it no longer does, all of it is data.
    has_extents: bool,
    /// The server supports FLUSH. Otherwise it is trusted to have no volatile cache.
    flushes: bool,
    link: Link,
    pub(super) slots: Vec<Option<Slot>>,
    free: Vec<usize>,
    sending: VecDeque<Sending>,
    pub(super) receiving: Receiving,
    requests: u64,
    submitted: u64,
    losses: Arc<Losses>,
    /// Its ID among the queues of the image.
    member: u64,
    /// The number of breaks when the connection was requested.
    breaks: u64,
    /// An event that was not taken yet tells the cache of this many losses.
    telling: u64,
    events: Vec<Event>,
    in_flight: usize,
    held: usize,
    /// The last connection broke, and no other followed yet.
    last_break: Option<BreakId>,
    suspects: Arc<Suspects>,
    unflushed: Arc<Unflushed>,
}

impl Client {
    /// A client without a connection. `wake` wakes the thread that uses it.
    pub fn new(export: Export, shared: &SharedLists, wake: Option<Notifier>) -> Self {
        let SharedLists { suspects, losses, unflushed } = shared.clone();
        Self {
            export,
            has_extents: export.allocation.is_some(),
            flushes: export.has(export_flag::SEND_FLUSH),
            link: Link::Down,
            slots: Vec::new(),
            free: Vec::new(),
            sending: VecDeque::new(),
            receiving: Receiving::Header,
            requests: 0,
            submitted: 0,
            member: losses.join(wake),
            breaks: losses.breaks(),
            losses,
            telling: 0,
            events: Vec::new(),
            in_flight: 0,
            held: 0,
            last_break: None,
            suspects,
            unflushed,
        }
    }

    /// Operations whose events have not been taken.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Operations that wait for a reply of the server.
    pub fn unanswered(&self) -> usize {
        self.slots.iter().flatten().count()
    }

    /// The ID of the context base:allocation.
    pub fn allocation(&self) -> Option<u32> {
        self.export.allocation
    }

    /// Whether replies have chunks.
    pub fn is_structured(&self) -> bool {
        self.export.is_structured
    }

    /// Whether another queue's connection broke after this one's was requested: it may lead to a server that has lost
    /// data since.
    pub fn is_obsolete(&self) -> bool {
        self.link == Link::Up && self.breaks != self.losses.breaks()
    }

    /// Whether a Sync must fail now.
    fn must_tell(&self) -> bool {
        self.losses.is_untold() || !self.losses.is_settled()
    }

    /// The failure of a Sync that reports the losses so far.
    fn lost(&mut self, tag: u64) -> Event {
        let count = self.losses.count();
        if self.losses.is_settled() {
            self.telling = count;
        }
        failed(tag, Fault::Lost, libc::ESTALE)
    }

    /// Whether there are events to take.
    pub fn has_events(&self) -> bool {
        !self.events.is_empty()
    }

    /// Takes an admissible operation. It starts once there is a connection.
    pub fn submit(&mut self, request: IoRequest, now: Duration) {
        self.in_flight += 1;
        let tag = request.tag;
        let event = match request.op {
            OpKind::Map if self.export.allocation.is_none() => Some(all_data(&request)),
            _ if !self.supports(request.op) => Some(failed(tag, Fault::Unsupported, libc::EOPNOTSUPP)),
            _ if self.link == Link::Closed => Some(failed(tag, Fault::Gone, libc::ENOTCONN)),
            OpKind::Sync if self.losses.is_untold() && self.losses.is_settled() => Some(self.lost(tag)),
            OpKind::Sync if !self.flushes => Some(Event::Done { tag }),
            // Less than a block of the server.
            OpKind::Discard if self.whole_blocks(&request).is_none() => Some(Event::Done { tag }),
            _ => None,
        };
        if let Some(event) = event {
            self.events.push(event);
            return;
        }
        let request = match (request.op, self.whole_blocks(&request)) {
            (OpKind::Discard, Some(range)) => {
                IoRequest { offset: range.start, len: range.end - range.start, ..request }
            }
            _ => request,
        };
        self.submitted += 1;
        let flush = if request.op == OpKind::Sync { self.unflushed.begin_flush() } else { 0 };
        let range = request.offset..request.offset + request.len;
        let written = if request.op == OpKind::Map { self.unflushed.within(&range) } else { Vec::new() };
        let slot = Slot {
            request,
            flush,
            losses: self.losses.count(),
            written,
            serial: self.submitted,
            phase: Phase::Waiting,
            was_sent: false,
            cookie: 0,
            done: 0,
            part_bytes: 0,
            error: None,
            arrived: Vec::new(),
            extents: Vec::new(),
            known: 0,
        };
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        self.slots[index] = Some(slot);
        self.start(index, now);
    }

    fn supports(&self, op: OpKind) -> bool {
        match op {
            OpKind::Read | OpKind::Write | OpKind::Sync | OpKind::Map => true,
            OpKind::Zero { .. } => self.export.can_zero(),
            OpKind::Discard => self.export.has(export_flag::SEND_TRIM),
            OpKind::Allocate => false,
        }
    }

    /// The whole blocks of the server in a request's range; `None` if there are none.
    fn whole_blocks(&self, request: &IoRequest) -> Option<Range<u64>> {
        let block = u64::from(self.export.block_min);
        let (start, end) = (request.offset.next_multiple_of(block), (request.offset + request.len) / block * block);
        (start < end).then_some(start..end)
    }

    /// Queues the next request of an operation, unless it has to wait.
    fn start(&mut self, index: usize, now: Duration) {
        if self.settle(index, now) {
            return;
        }
        let slot = self.slots[index].as_mut().expect("an operation that starts has a slot");
        if slot.request.op.is_change() && !slot.was_sent && !planted(PlantedBug::SuspectsNotHeld) {
            let until = self.suspects.blocked_until(&slot.range(), now);
            self.held -= usize::from(matches!(slot.phase, Phase::Held(_)));
            let check = |until| if until == Duration::MAX { now + HELD_CHECK } else { until };
            slot.phase = until.map_or(Phase::Waiting, |until| Phase::Held(check(until)));
            self.held += usize::from(until.is_some());
            if until.is_some() {
                return;
            }
        }
        if self.link != Link::Up {
            return;
        }
        let (command, flags) = command_of(slot.request.op).expect("submit() has refused what NBD does not have");
        slot.phase = Phase::Sent;
        self.requests += 1;
        slot.cookie = self.requests << SLOT_BITS | index as u64;
        slot.part_bytes = (slot.request.len - slot.done).min(PART_MAX);
        let offset = slot.request.offset + slot.done;
        let len = u32::try_from(slot.part_bytes).expect("a part is short");
        let header = request(command, flags, slot.cookie, offset, len);
        let payload = if slot.request.op == OpKind::Write { slot.request.len } else { 0 };
        self.sending.push_back(Sending { header, slot: index, sent: 0, total: REQUEST_BYTES as u64 + payload });
    }

    /// Lets a Sync wait or fail if it must not be sent now; returns whether it does.
    fn settle(&mut self, index: usize, now: Duration) -> bool {
        let slot = self.slots[index].as_mut().expect("an operation that starts has a slot");
        if slot.request.op != OpKind::Sync {
            return false;
        }
        let (tag, waited) = (slot.request.tag, matches!(slot.phase, Phase::Held(_)));
        slot.phase = Phase::Waiting;
        self.held -= usize::from(waited);
        if self.link != Link::Up || !self.must_tell() {
            return false;
        }
        if waited || self.losses.is_settled() {
            let event = self.lost(tag);
            self.complete(index, event);
        } else {
            self.slots[index].as_mut().expect("it was just found").phase = Phase::Held(now + SETTLE_TIME);
            self.held += 1;
        }
        true
    }

    /// Starts the operations whose quarantine has ended, and lets the others wait on.
    pub fn advance(&mut self, now: Duration) {
        if self.held == 0 {
            return;
        }
        let is_due = |slot: &Slot| matches!(slot.phase, Phase::Held(until) if until <= now);
        for index in self.in_order(is_due) {
            self.start(index, now);
        }
    }

    /// When [`Client::advance`] next has work.
    pub fn deadline(&self) -> Option<Duration> {
        if self.held == 0 {
            return None;
        }
        let held = self.slots.iter().flatten().filter_map(|slot| match slot.phase {
            Phase::Held(until) => Some(until),
            _ => None,
        });
        held.min()
    }

    /// Re-examines all held operations: suspects were released.
    pub fn retry_held(&mut self, now: Duration) {
        for index in self.in_order(|slot| matches!(slot.phase, Phase::Held(_))) {
            self.start(index, now);
        }
    }

    /// The operations that `is_wanted`, oldest first.
    fn in_order(&self, is_wanted: impl Fn(&Slot) -> bool) -> Vec<usize> {
        let slots = self.slots.iter().enumerate();
        let mut found: Vec<(u64, usize)> = slots
            .filter_map(|(index, slot)| slot.as_ref().filter(|slot| is_wanted(slot)).map(|slot| (slot.serial, index)))
            .collect();
        found.sort_unstable();
        found.into_iter().map(|(_, index)| index).collect()
    }

    /// Whether there is something to send.
    pub fn has_output(&self) -> bool {
        !self.sending.is_empty()
    }

    /// Fills `pieces` with the next bytes to send, as far as they fit.
    pub fn output(&self, pieces: &mut Vec<Segment>) {
        pieces.clear();
        for sending in &self.sending {
            if pieces.len() + 1 >= PIECES_MAX {
                return;
            }
            let header_sent = usize::try_from(sending.sent).unwrap_or(usize::MAX).min(REQUEST_BYTES);
            let header = &sending.header[header_sent..];
            if !header.is_empty() {
                pieces.push(Segment { base: header.as_ptr().cast_mut(), len: header.len() });
            }
            let payload = REQUEST_BYTES as u64;
            if sending.total > payload {
                let slot = self.slots[sending.slot].as_ref().expect("what is being sent has a slot");
                let at = sending.sent.saturating_sub(payload);
                let before = pieces.len();
                memory::pieces(&slot.request.segments, at, sending.total - payload - at, PIECES_MAX, pieces);
                let listed: usize = pieces[before..].iter().map(|piece| piece.len).sum();
                if (listed as u64) < sending.total - payload - at {
                    return;
                }
            }
        }
    }

    /// The socket has accepted this many bytes of those that [`Client::output`] returned.
    pub fn sent(&mut self, bytes: usize) {
        let mut left = bytes as u64;
        while left > 0 {
            let front = self.sending.front_mut().expect("no more was sent than there is");
            let step = left.min(front.total - front.sent);
            (front.sent, left) = (front.sent + step, left - step);
            let slot = self.slots[front.slot].as_mut().expect("what is being sent has a slot");
            slot.was_sent = true;
            if front.sent == front.total {
                self.sending.pop_front();
            }
        }
    }

    /// The slot of a reply, which can only belong to a request that was sent in full.
    pub(super) fn slot_of(&self, cookie: u64) -> Result<usize, Violation> {
        let index = usize::try_from(cookie & ((1 << SLOT_BITS) - 1)).expect("16 bits");
        let slot = self.slots.get(index).and_then(Option::as_ref);
        let is_being_sent = || self.sending.iter().any(|sending| sending.slot == index);
        match slot {
            Some(slot) if slot.cookie == cookie && slot.phase == Phase::Sent && !is_being_sent() => Ok(index),
            _ => Err(Violation("the server sends a reply with an unknown cookie")),
        }
    }

    /// The reply to the request in flight of a slot is complete.
    pub(super) fn finish(&mut self, index: usize, now: Duration) -> Result<(), Violation> {
        let slot = self.slots[index].as_mut().expect("a reply belongs to a slot");
        let tag = slot.request.tag;
        if let Some(error) = slot.error {
            let errno = i32::try_from(error).unwrap_or(libc::EIO);
            self.complete(index, failed(tag, fault_of(error), errno));
            return Ok(());
        }
        match slot.request.op {
            OpKind::Read if !slot.has_arrived() => {
                return Err(Violation("the server ends a read reply early"));
            }
            OpKind::Map => {
                if slot.known <= slot.done {
                    return Err(Violation("the server sends an empty block status"));
                }
                slot.done = slot.known;
            }
            _ => slot.done += slot.part_bytes,
        }
        if slot.done < slot.request.len {
            self.start(index, now);
            return Ok(());
        }
        let losses = slot.losses;
        if slot.request.op == OpKind::Sync && (losses != self.losses.count() || self.must_tell()) {
            // A connection broke meanwhile.
            let event = self.lost(tag);
            self.complete(index, event);
            return Ok(());
        }
        let slot = self.slots[index].as_mut().expect("a reply belongs to a slot");
        let event = match slot.request.op {
            OpKind::Map => {
                let mut written = self.unflushed.within(&slot.range());
                written.append(&mut slot.written);
                Event::Mapped { tag, extents: in_sectors(&with_data(&slot.extents, slot.request.offset, &written)) }
            }
            op => {
                match op {
                    OpKind::Write if self.flushes && self.has_extents => {
                        self.unflushed.note_write(&slot.range());
                    }
                    OpKind::Sync => self.unflushed.flushed(slot.flush),
                    _ => {}
                }
                Event::Done { tag }
            }
        };
        self.complete(index, event);
        Ok(())
    }

    fn complete(&mut self, index: usize, event: Event) {
        let slot = self.slots[index].take().expect("an operation completes once");
        self.held -= usize::from(matches!(slot.phase, Phase::Held(_)));
        self.free.push(index);
        self.events.push(event);
    }

    /// Appends the pending events.
    pub fn take_events(&mut self, events: &mut Vec<Event>) {
        self.losses.tell(mem::take(&mut self.telling));
        self.in_flight -= self.events.len();
        events.append(&mut self.events);
    }

    /// The connection has broken. For `quarantine` after it has answered again, the server may still execute the
    /// requests that were sent.
    pub fn disconnected(&mut self, cause: BreakId, quarantine: Duration, now: Duration) {
        self.last_break = Some(cause);
        self.losses.broken(self.member);
        self.breaks = self.losses.breaks();
        self.link = if self.link == Link::Closed { Link::Closed } else { Link::Down };
        self.sending.clear();
        self.receiving = Receiving::Header;
        for slot in self.slots.iter_mut().flatten().filter(|slot| slot.phase == Phase::Sent) {
            if slot.was_sent && slot.request.op.is_change() {
                self.suspects.add(slot.range(), quarantine, cause, now);
            }
            slot.restart();
        }
    }

    /// A connection is established to an export that fulfils `Client::export`. `may_have_lost`: changes may have been
    /// completed on another connection.
    pub fn connected(&mut self, found: &Export, may_have_lost: bool, now: Duration) {
        self.link = Link::Up;
        let broken = self.last_break.take();
        broken.into_iter().chain([EARLIER]).for_each(|cause| self.suspects.answered(cause, now));
        self.losses.connected(self.member, self.breaks);
        if may_have_lost && broken.is_none() {
            self.losses.add();
        }
        self.export.is_structured = found.is_structured;
        self.export.allocation = found.allocation.filter(|_| self.has_extents);
        for index in self.in_order(|slot| slot.phase == Phase::Waiting) {
            let request = &self.slots[index].as_ref().expect("it was just found").request;
            if request.op == OpKind::Map && self.export.allocation.is_none() {
                let event = all_data(request);
                self.complete(index, event);
            } else {
                self.start(index, now);
            }
        }
        self.retry_held(now);
    }

    /// No further connection follows: every operation fails from now on.
    pub fn close(&mut self) {
        self.link = Link::Closed;
        self.losses.leave(self.member);
        self.sending.clear();
        for index in self.in_order(|_| true) {
            let tag = self.slots[index].as_ref().expect("it was just found").request.tag;
            self.complete(index, failed(tag, Fault::Gone, libc::ENOTCONN));
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.losses.leave(self.member);
        if let Some(cause) = self.last_break {
            self.suspects.disown(cause);
        }
    }
}

/// The reply to a map where the server describes nothing.
fn all_data(request: &IoRequest) -> Event {
    Event::Mapped { tag: request.tag, extents: vec![Extent { len: request.len, kind: ExtentKind::Data }] }
}

fn failed(tag: u64, fault: Fault, errno: i32) -> Event {
    Event::Failed { tag, fault, errno }
}

/// Extents in whole sectors, with neighbours of different kinds. A sector that is only partly a hole is data.
fn in_sectors(extents: &[Extent]) -> Vec<Extent> {
    let (mut merged, mut at, mut covered): (Vec<Extent>, u64, u64) = (Vec::new(), 0, 0);
    let mut push = |len: u64, kind: ExtentKind| match merged.last_mut() {
        _ if len == 0 => {}
        Some(Extent { len: last, kind: same }) if *same == kind => *last += len,
        _ => merged.push(Extent { len, kind }),
    };
    for extent in extents {
        at += extent.len;
        if extent.kind == ExtentKind::Hole {
            let start = (at - extent.len).next_multiple_of(SECTOR_BYTES).max(covered);
            let end = at / SECTOR_BYTES * SECTOR_BYTES;
            if start < end {
                push(start - covered, ExtentKind::Data);
                push(end - start, ExtentKind::Hole);
                covered = end;
            }
        }
    }
    push(at - covered, ExtentKind::Data);
    merged
}
