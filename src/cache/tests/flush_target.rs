//! How long a FLUSH takes on slow disks, in simulated time: at most twice the flush target, including the first one.

#![allow(clippy::cast_possible_truncation, reason = "small numbers that the tests choose")]

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::*;

/// The speed of a disk: it executes one operation after the other, each as long as the slower limit requires. Each then
/// ends after a latency that does not delay the next one.
#[derive(Clone, Copy, Debug)]
struct DiskSpeed {
    bytes: u64,
    operations: u64,
    latency_us: u64,
}

/// The guest's writes.
#[derive(Clone, Copy, Debug)]
enum Pattern {
    /// Requests of this many pages at random places.
    Random(u64),
    /// Contiguous requests of 32 pages.
    Stream,
    /// Five seconds of contiguous pages, then five seconds of random ones, one page per request.
    Alternating,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// An operation of the disk ends.
    Ended(u32),
    /// A writer sends its next request, or retries it.
    Write(u64),
    /// The guest sends a FLUSH.
    Flush,
    /// The cache has work due.
    Pump,
}

const FLUSH: Ticket = Ticket(1000);
const SECONDS: u64 = 30;
const TARGET_US: u64 = 250_000;
const IMAGE_PAGES: u64 = 1 << 20;

struct World {
    cache: PageCache,
    disk: DiskSpeed,
    pattern: Pattern,
    prng: Prng,
    now: u64,
    disk_idle_at: u64,
    events: BinaryHeap<Reverse<(u64, Event)>>,
    /// By writer: its request, if that is not fully admitted.
    requests: Vec<Option<Access>>,
    next_page: u64,
    flush_sent: Option<u64>,
    flushes_us: Vec<u64>,
    written_pages: u64,
}

impl World {
    /// Runs `writers` that each have one request at a time.
    fn run(disk: DiskSpeed, pattern: Pattern, writers: u64) -> Self {
        let settings = Settings { flush_target_us: TARGET_US, ..Settings::of(65_536, IMAGE_PAGES * 8) };
        let mut world = Self {
            cache: PageCache::new(settings, Box::new(NoBytes)),
            disk,
            pattern,
            prng: Prng::new(1),
            now: 0,
            disk_idle_at: 0,
            events: (0..writers).map(|writer| Reverse((writer, Event::Write(writer)))).collect(),
            requests: vec![None; writers as usize],
            next_page: 0,
            flush_sent: None,
            flushes_us: Vec::new(),
            written_pages: 0,
        };
        world.schedule(300_000, Event::Flush);
        while let Some(Reverse((at, event))) = world.events.pop().filter(|event| event.0.0 < SECONDS * 1_000_000) {
            world.now = at;
            match event {
                Event::Ended(tag) => world.cache.complete(tag, &Outcome::Done, Tick::from_us(at)),
                Event::Write(writer) => world.write(writer),
                Event::Flush => {
                    world.flush_sent = Some(at);
                    world.cache.flush(FLUSH);
                }
                Event::Pump => {}
            }
            world.end_turn();
        }
        world
    }

    fn schedule(&mut self, after_us: u64, event: Event) {
        self.events.push(Reverse((self.now + after_us, event)));
    }

    fn next_request(&mut self) -> (u64, u64) {
        let in_a_row = match self.pattern {
            Pattern::Random(pages) => return (self.prng.below(IMAGE_PAGES / pages) * pages, pages),
            Pattern::Stream => true,
            Pattern::Alternating => (self.now / 5_000_000).is_multiple_of(2),
        };
        if !in_a_row {
            return (self.prng.below(IMAGE_PAGES), 1);
        }
        self.next_page = (self.next_page + 32) % IMAGE_PAGES;
        (self.next_page, 32)
    }

    fn write(&mut self, writer: u64) {
        let access = match self.requests[writer as usize].take() {
            Some(access) => access,
            None => {
                let (page, pages) = self.next_request();
                Access { ticket: Ticket(writer), ..access(page * 8, pages * 8) }
            }
        };
        let mut pieces = Vec::new();
        let admitted = self.cache.write(access, &mut pieces);
        pieces.iter().for_each(|piece| self.cache.finish_write(piece, CopyResult::Complete));
        match admitted {
            Admitted::All => {
                self.written_pages += access.span.count / 8;
                let delay = self.cache.write_delay_us(access.span.count);
                self.schedule(delay.max(5), Event::Write(writer));
            }
            Admitted::Until(from) => {
                self.requests[writer as usize] = Some(Access { from, attempt: Attempt::Resumed, ..access });
            }
            Admitted::Refused(..) => unreachable!("nothing fails"),
        }
    }

    fn end_turn(&mut self) {
        self.cache.pump(Tick::from_us(self.now));
        let mut ops = Vec::new();
        self.cache.take_ops(|op| ops.push((op.tag, op.span.count)));
        for (tag, sectors) in ops {
            // A Sync takes no time: it has no sectors, and the disk has no cache of its own.
            let transfer_us = sectors * 512 * 1_000_000 / self.disk.bytes;
            let service_us = if sectors == 0 { 0 } else { transfer_us.max(1_000_000 / self.disk.operations) };
            self.disk_idle_at = self.disk_idle_at.max(self.now) + service_us;
            let ends = if sectors == 0 { self.now + 100 } else { self.disk_idle_at + self.disk.latency_us };
            self.events.push(Reverse((ends, Event::Ended(tag))));
        }
        let mut notices = Vec::new();
        self.cache.take_notices(&mut notices);
        for notice in notices {
            match notice {
                Notice::Resume(Ticket(writer)) => self.schedule(0, Event::Write(writer)),
                Notice::Done(FLUSH, result) => {
                    assert_eq!(result, Ok(()));
                    self.flushes_us.push(self.now - self.flush_sent.take().expect("a FLUSH was sent"));
                    self.schedule(200_000, Event::Flush);
                }
                notice => unreachable!("{notice:?}"),
            }
        }
        if let Some(deadline) = self.cache.next_deadline() {
            let next = self.events.peek().map_or(u64::MAX, |event| event.0.0);
            if deadline < Tick::from_us(next) {
                self.schedule(deadline.since_us(Tick::from_us(self.now)).max(1), Event::Pump);
            }
        }
    }
}

const PATTERNS: [Pattern; 5] =
    [Pattern::Random(1), Pattern::Random(16), Pattern::Random(128), Pattern::Stream, Pattern::Alternating];

fn check(disk: DiskSpeed) {
    for (pattern, writers) in PATTERNS.into_iter().flat_map(|pattern| [(pattern, 1), (pattern, 8)]) {
        check_pattern(disk, pattern, writers);
    }
}

fn check_pattern(disk: DiskSpeed, pattern: Pattern, writers: u64) {
    let mut world = World::run(disk, pattern, writers);
    let count = world.flushes_us.len();
    assert!(count >= 35, "{disk:?}, {pattern:?}: only {count} FLUSHes in {SECONDS} s");
    world.flushes_us.sort_unstable();
    let (p99, longest) = (world.flushes_us[(count - 1) * 99 / 100], world.flushes_us[count - 1]);
    println!(
        "{disk:?}, {pattern:?}, {writers} writers: {count} FLUSHes, p99 {p99} us, longest {longest} us, {} pages",
        world.written_pages
    );
    assert!(p99 <= 2 * TARGET_US, "{disk:?}, {pattern:?}: p99 of FLUSH {p99} us");
    // The disk was always busy: a low limit must not reduce the speed.
    let page_us = match pattern {
        Pattern::Random(pages) => (1_000_000 / disk.operations / pages).max(4096 * 1_000_000 / disk.bytes),
        Pattern::Stream => (1_000_000 / disk.operations / 256).max(4096 * 1_000_000 / disk.bytes),
        Pattern::Alternating => return,
    };
    let possible = SECONDS * 1_000_000 / page_us.max(1);
    assert!(world.written_pages * 10 > possible * 8, "{} of {possible} pages", world.written_pages);
}

#[test]
fn a_flush_takes_at_most_twice_its_target_at_5_mib_a_second() {
    check(DiskSpeed { bytes: 5 << 20, operations: 50_000, latency_us: 0 });
    check(DiskSpeed { bytes: 5 << 20, operations: 50_000, latency_us: 20_000 });
}

#[test]
fn a_flush_takes_at_most_twice_its_target_at_20_mib_a_second() {
    check(DiskSpeed { bytes: 20 << 20, operations: 50_000, latency_us: 1000 });
}

#[test]
fn a_flush_takes_at_most_twice_its_target_at_200_operations_a_second() {
    check(DiskSpeed { bytes: 200 << 20, operations: 200, latency_us: 0 });
}
