//! Readahead: sequential streams, found with slack, and windows that grow while they pay.
//!
//! Guests read ahead themselves, in pieces of 128 KiB that their queues shuffle. So a stream matches by nearness, and what
//! tells it from chance is not the order of its requests but that they leave few gaps. Streams are looked up on a miss,
//! and when a reader reaches the marker on the first page of the newest window: then the next window is read, and the
//! store stays one window ahead (Linux' on-demand readahead; NetBSD's uvm_readahead; for the feedback AMP: Gill and
//! Bathen, FAST 2007). A window that was cut short, for want of frames or of the map of holes, goes on when they are there.

use crate::units::{PageNo, PageSpan, Tick, low_u32};

use super::PageCache;
use super::pages::Period;

/// Streams that are followed at a time.
const STREAMS: usize = 64;
/// A request matches a stream this far from where it is expected (256 KiB).
const SLACK_PAGES: u64 = 64;
/// The shortest window, and what a stream has to cover before its second request starts readahead (128 KiB).
const WINDOW_PAGES_MIN: u64 = 32;
/// With so many requests a stream has readahead, however small they are. Two 4 KiB reads side by side are no proof: of
/// random reads in 1 GiB, one in two thousand adjoins one of the 64 before it, and each would cost a window.
const REQUESTS_MIN: u8 = 3;
/// Windows are rounded to this (64 KiB).
const ROUND_PAGES: u64 = 16;
/// A stream whose windows went unread this often in a row is given up.
const WASTED_MAX: u8 = 3;
/// A window is at most such a part of what may still lie unread.
const WINDOW_SHARE: u64 = 8;
/// Readers stop without a word. What was read ahead before this period and the last one does not count as unread: else
/// the files that were read by and by would end readahead for all, until the cache is full, which it may never be.
const PERIOD_US: u64 = 1_000_000;

#[derive(Clone, Copy, Debug, Default)]
struct Stream {
    /// The first page that was asked for.
    start: u64,
    /// The page after the furthest that was asked for.
    next: u64,
    /// Pages between those two that were asked for; counted until readahead starts.
    covered: u64,
    /// Requests for those pages.
    requests: u8,
    /// The page after the last that was read ahead.
    ahead: u64,
    /// The page after the newest window. Readahead stops short of it for want of a frame or a map, and goes on later.
    wanted: u64,
    /// The newest window has no marker yet.
    marker_due: bool,
    /// Length of the newest window; 0: none yet.
    window: u64,
    /// Windows evicted unread in a row.
    wasted: u8,
    /// When the stream was last matched, by count of look-ups; 0: never.
    used: u64,
}

/// The table of streams.
#[derive(Debug)]
pub(super) struct Streams {
    table: Vec<Stream>,
    window_max: u64,
    /// Pages that readahead may hold unread.
    unread_max: u32,
    /// Pages that readahead brought in this period and in the one before, and nobody has asked for.
    unread_pages: [u32; 2],
    period: Period,
    period_ends: Tick,
    /// Some window is not read to its end.
    cut: bool,
    clock: u64,
}

impl Streams {
    /// Windows of at most `window_max` pages (0: no readahead) for a cache of `frames`; unread pages fill at most half
    /// of the small queue, so they push out nothing that was asked for twice.
    pub fn new(window_max: u32, frames: u32) -> Self {
        let table = if window_max == 0 { Vec::new() } else { vec![Stream::default(); STREAMS] };
        Self {
            table,
            window_max: u64::from(window_max),
            unread_max: (frames / 20).max(1),
            unread_pages: [0; 2],
            period: Period(0),
            period_ends: Tick(PERIOD_US),
            cut: false,
            clock: 0,
        }
    }

    /// Begins another period when the last one is over.
    fn keep_time(&mut self, now: Tick) {
        if now >= self.period_ends {
            // Nobody may have looked for longer than a period.
            let periods = if now < self.period_ends.plus_us(PERIOD_US) { 1 } else { 2 };
            self.unread_pages = [0, if periods == 1 { self.unread_pages[0] } else { 0 }];
            self.period = Period(self.period.0.wrapping_add(periods));
            self.period_ends = now.plus_us(PERIOD_US);
        }
    }

    /// How many periods ago that was: 0, 1, or more than matters.
    fn age(&self, period: Period) -> u32 {
        self.period.0.wrapping_sub(period.0)
    }

    /// How many more pages may be read ahead.
    fn room(&self) -> u32 {
        self.unread_max.saturating_sub(self.unread_pages.iter().sum())
    }

    /// Whether one more page may be read ahead.
    pub fn may_prefetch(&self) -> bool {
        self.room() > 0
    }

    /// One more page is read ahead; returns what is to be last_reported of it when that ends.
    pub fn page_unread(&mut self) -> Period {
        self.unread_pages[0] += 1;
        self.period
    }

    /// A page that was read ahead in `period` has been asked for, or goes.
    pub fn page_not_unread(&mut self, period: Period) {
        let age = self.age(period);
        if let Some(pages) = self.unread_pages.get_mut(age as usize) {
            *pages -= 1;
        }
    }

    /// Recounts by the periods of all unread pages (I4).
    pub fn check(&self, unread: &[Period]) {
        let of_age = |age| low_u32(unread.iter().filter(|&&period| self.age(period) == age).count() as u64);
        assert_eq!(self.unread_pages, [of_age(0), of_age(1)], "I4: unread readahead");
    }

    /// A request missed: the stream that has a window to read ahead now, if any.
    fn after_miss(&mut self, span: PageSpan) -> Option<usize> {
        if self.table.is_empty() {
            return None;
        }
        self.clock += 1;
        let (first, end) = (span.first.0, span.end().0);
        let window_max = self.window_max_now();
        if let Some(at) = self.table.iter().position(|stream| stream.expects(first)) {
            let stream = &mut self.table[at];
            stream.used = self.clock;
            let ready = stream.follow(first, end);
            if ready {
                stream.grow(window_max);
            }
            return ready.then_some(at);
        }
        let oldest = self.table.iter_mut().min_by_key(|stream| stream.used).expect("the table is not empty");
        *oldest = Stream { used: self.clock, ..Stream::begin(first, end) };
        None
    }

    /// A reader reached the marker at `no`.
    fn after_marker(&mut self, no: PageNo) -> Option<usize> {
        self.clock += 1;
        let window_max = self.window_max_now();
        let at = self.find_window(no)?;
        let stream = &mut self.table[at];
        stream.used = self.clock;
        stream.wasted = 0;
        stream.next = stream.next.max(no.0 + 1);
        stream.grow(window_max);
        Some(at)
    }

    /// A page that was read ahead went unread: once for each 64 KiB, the stream's window is halved.
    pub fn wasted(&mut self, no: PageNo) {
        if !no.0.is_multiple_of(ROUND_PAGES) {
            return;
        }
        if let Some(at) = self.find_window(no) {
            let stream = &mut self.table[at];
            stream.window /= 2;
            stream.wanted = stream.ahead;
            stream.wasted += 1;
            if stream.wasted >= WASTED_MAX {
                *stream = Stream::default();
            }
        }
    }

    /// The stream that has read `no` ahead.
    fn find_window(&self, no: PageNo) -> Option<usize> {
        self.table.iter().position(|stream| {
            stream.window > 0 && no.0 < stream.ahead && no.0 + 2 * stream.window.max(WINDOW_PAGES_MIN) >= stream.ahead
        })
    }

    /// The longest window now: each takes a share of what may still lie unread, so that a few readers have long windows,
    /// many have short ones, and those who come after others have left theirs unread still have some.
    fn window_max_now(&self) -> u64 {
        (u64::from(self.room()) / WINDOW_SHARE).min(self.window_max)
    }
}

impl Stream {
    /// A stream of one request.
    fn begin(first: u64, end: u64) -> Self {
        Self { start: first, next: end, covered: end - first, requests: 1, ahead: end, ..Self::default() }
    }

    /// Whether a request at `first` belongs to the stream.
    fn expects(&self, first: u64) -> bool {
        // A long window means that much in op, and so the more to be passed on the way.
        let behind = SLACK_PAGES.max(self.window);
        self.used > 0 && first + behind >= self.next && first <= self.next.max(self.ahead) + SLACK_PAGES
    }

    /// A request of the stream missed. Returns whether it is time to read ahead.
    fn follow(&mut self, first: u64, end: u64) -> bool {
        let adjoins = first == self.next;
        if self.window == 0 && !self.cover(first, end) {
            return false;
        }
        self.next = self.next.max(end);
        // A reader that is past the window starts it anew from where it is.
        self.ahead = if first >= self.ahead { end } else { self.ahead.max(end) };
        self.window > 0 || self.requests >= REQUESTS_MIN || (adjoins && self.covered >= WINDOW_PAGES_MIN)
    }

    /// Takes a request into account before readahead starts. False: it tells nothing new, or leaves so much out that the
    /// stream, if it is one, begins only here.
    fn cover(&mut self, first: u64, end: u64) -> bool {
        if first >= self.start && end <= self.next {
            return false;
        }
        let (start, next) = (self.start.min(first), self.next.max(end));
        let covered = self.covered + (end - first);
        if covered * 2 < next - start {
            *self = Self { used: self.used, ..Self::begin(first, end) };
            return false;
        }
        (self.start, self.covered, self.requests) = (start, covered, self.requests.saturating_add(1));
        true
    }

    /// Plans the next window: as much as has been read at first, then times four while small, then doubled.
    fn grow(&mut self, window_max: u64) {
        let wanted = match self.window {
            0 => self.covered.max(WINDOW_PAGES_MIN).next_multiple_of(ROUND_PAGES),
            window if window < window_max / 16 => window * 4,
            window => window * 2,
        };
        self.window = wanted.min(window_max);
        self.wanted = self.ahead + self.window;
        self.marker_due = true;
    }
}

impl PageCache {
    /// A read missed: follow its stream.
    pub(super) fn read_ahead_after_miss(&mut self, span: PageSpan) {
        self.streams.keep_time(self.now);
        if let Some(at) = self.streams.after_miss(span) {
            self.read_window(at);
        }
    }

    /// A read reached the marker of a window: read the next one.
    pub(super) fn read_ahead_after_marker(&mut self, no: PageNo) {
        self.streams.keep_time(self.now);
        if let Some(at) = self.streams.after_marker(no) {
            self.read_window(at);
        }
    }

    /// Goes on with windows that were cut short, now that there are frames again, or a map has come.
    pub(super) fn continue_windows(&mut self) {
        if std::mem::take(&mut self.streams.cut) {
            for at in 0..STREAMS {
                self.read_window(at);
            }
        }
    }

    /// Reads what is left of a stream's window, as far as it goes.
    fn read_window(&mut self, at: usize) {
        let Stream { ahead, wanted, mut marker_due, .. } = self.streams.table[at];
        let wanted = wanted.min(self.image_pages());
        if ahead < wanted {
            let end = self.prefetch(PageSpan::new(PageNo(ahead), wanted - ahead), &mut marker_due);
            let stream = &mut self.streams.table[at];
            stream.marker_due = marker_due;
            stream.ahead = stream.ahead.max(end.0);
            // Who has no share left tries again with his next miss, if he is still there.
            self.streams.cut |= stream.ahead < wanted && self.streams.may_prefetch();
        }
    }
}
