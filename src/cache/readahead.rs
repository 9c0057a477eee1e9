//! Readahead: detects sequential streams even if their requests are reordered, and reads ahead in windows that grow
//! while their pages are used.
//!
//! Guests read ahead themselves, in requests of 128 KiB that their queues reorder. So a request belongs to a stream if
//! it is near enough. A stream differs from random reads by the few gaps between its requests, not by their order.
//!
//! A stream is looked up on a miss, and when a reader reaches the marker on the first page of the newest window. The
//! marker starts the next window, so that the store stays one window ahead. Sources: Linux's on-demand readahead and
//! NetBSD's uvm_readahead; for the feedback from unused pages AMP (Gill and Bathen, FAST 2007).
//!
//! A window that is cut short for lack of frames or of an extent map continues when they are available.

use crate::units::{PageNo, PageSpan, Tick, low_u32};

use super::PageCache;
use super::pages::Period;

/// Frames of the cache for each stream of the table: a cache of 64 MiB follows 512 streams. The table takes 0.04 % of
/// the cache.
const FRAMES_PER_STREAM: u32 = 32;
/// Fewest streams in the table ...
const STREAMS_MIN: u32 = 64;
/// ... and most: a golden image has hundreds of guests, and concurrent random reads must not displace their streams.
const STREAMS_MAX: u32 = 1024;
/// A request belongs to a stream if it is within this distance of the expected page (256 KiB).
const SLACK_PAGES: u64 = 64;
/// The shortest window, and the pages that the first two requests of a stream must cover to start readahead (128 KiB).
const WINDOW_PAGES_MIN: u64 = 32;
/// A stream without a window is recent if one of the last so many lookups found it. If it is not recent, it only
/// accepts requests that begin where its last one ended, and three of them start readahead, whatever their size. The
/// reason: if the table is full of random reads, another random read is often near one of them.
const LOOKUPS_RECENT: u32 = 64;
/// A window that is shorter than this (16 KiB) saves no operation of the store.
const WINDOW_PAGES_USEFUL: u64 = 4;
/// This many requests start readahead, however small they are. Two adjacent 4 KiB reads would be too few: of random
/// reads in 1 GiB, one in two thousand is adjacent to one of the preceding 64, and each such pair would cost a window.
const REQUESTS_MIN: u8 = 3;
/// A stream's requests must cover at least half of the pages that they span. If they cover less, they are random reads
/// near each other, or the stream starts later.
const SPAN_PER_COVERED_MAX: u64 = 2;
/// Window lengths are rounded up to a multiple of this (64 KiB).
const ROUND_PAGES: u64 = 16;
/// A window below 1/16 of the longest one grows fast (Linux: get_next_ra_size) ...
const FAST_GROWTH_DIVISOR: u64 = 16;
/// ... by this factor ...
const FAST_GROWTH: u64 = 4;
/// ... and a longer one by this.
const GROWTH: u64 = 2;
/// A stream ends when this many runs of [`ROUND_PAGES`] in a row went unread.
const WASTED_MAX: u8 = 3;
/// Unread pages fill at most 1/20 of the cache. That is half of the policy's small queue while the queue is short, so
/// readahead evicts no page that was used twice.
const UNREAD_DIVISOR: u32 = 20;
/// As much again for every so many streams with windows ...
const STREAMS_PER_SHARE: u32 = 64;
/// ... up to 1/4 of the cache: the windows of hundreds of streams would otherwise be shorter than their requests.
const UNREAD_DIVISOR_MIN: u32 = 4;
/// A window takes at most 1/8 of the pages that may still be read ahead. So a few streams get long windows, many get
/// short ones, and new streams get some even if the windows of ended streams are still unread.
const WINDOW_DIVISOR: u64 = 8;
/// Most pages of requests that are counted before readahead starts; a larger count has no effect.
const COVERED_MAX: u64 = 1 << 20;
/// A search tests this many streams with one comparison for any that may be near.
const PLACES_PER_CHUNK: usize = 32;
/// Length of a [`Period`]. A stream ends without notice, and the pages of its last window stay unread. They count only
/// for this period and the next one. Otherwise a series of files would leave enough unread pages to stop all readahead
/// until the cache is full, which may never happen.
const PERIOD_US: u64 = 1_000_000;

#[derive(Clone, Copy, Debug, Default)]
struct Stream {
    /// The first page that was requested.
    start: u64,
    /// The page after the last one that was requested.
    next: u64,
    /// The page after the last one that was read ahead.
    ahead: u64,
    /// The page after the newest window. `ahead` is below it if readahead stopped for lack of a frame or a map.
    wanted: u64,
    /// Number of pages between `start` and `next` that were requested; counted until readahead starts.
    covered: u32,
    /// Requests counted in `covered`.
    requests: u8,
    /// Length of the newest window; 0: none yet.
    window: u32,
    /// Runs of [`ROUND_PAGES`] that went unread since a reader last reached a marker.
    wasted: u8,
    /// The newest window has no marker yet.
    marker_due: bool,
    /// The stream was found since the hand of the CLOCK last passed.
    found: bool,
    /// Number of the lookup that last found it; 0: the slot is free.
    used: u32,
}

/// See [`Streams::places`].
fn place_of(page: u64) -> u32 {
    low_u32(page / SLACK_PAGES)
}

/// The table of streams. CLOCK selects the stream to replace: continuing streams stay, however many random reads come
/// between their requests.
#[derive(Debug)]
pub(super) struct Streams {
    /// Empty if readahead is off.
    table: Vec<Stream>,
    /// By slot: the number of the run of [`SLACK_PAGES`] in which the stream's `next` lies. A search reads these first,
    /// and reads a stream only if it may match.
    places: Vec<u32>,
    /// The hand of the CLOCK.
    hand: usize,
    /// Streams with a window.
    with_window: u32,
    window_max: u64,
    frames: u32,
    /// Pages that readahead has read in during this period and the one before, and that no guest has read.
    unread_pages: [u32; 2],
    period: Period,
    period_ends: Tick,
    /// A window was cut short.
    cut: bool,
    /// Number of the last lookup of a request; wraps, and is never 0.
    lookup: u32,
}

impl Streams {
    /// Sets the longest window to `window_max` pages, in a cache of `frames` frames.
    pub fn set_window_max(&mut self, window_max: u32, frames: u32) {
        if self.table.is_empty() {
            // Nothing has been read ahead yet.
            *self = Self::new(window_max, frames);
        } else {
            (self.window_max, self.frames) = (window_max.into(), frames);
        }
    }

    /// A table for windows of at most `window_max` pages (0: no readahead) in a cache of `frames` frames.
    pub fn new(window_max: u32, frames: u32) -> Self {
        let streams = (frames / FRAMES_PER_STREAM).clamp(STREAMS_MIN, STREAMS_MAX) as usize;
        let streams = if window_max == 0 { 0 } else { streams };
        Self {
            table: vec![Stream::default(); streams],
            places: vec![0; streams],
            hand: 0,
            with_window: 0,
            window_max: u64::from(window_max),
            frames,
            unread_pages: [0; 2],
            period: Period(0),
            period_ends: Tick::from_us(PERIOD_US),
            cut: false,
            lookup: 0,
        }
    }

    /// Starts another period if the current one is over.
    fn advance_period(&mut self, now: Tick) {
        if now >= self.period_ends {
            // More than one period may have passed since the last call.
            let periods = if now < self.period_ends.plus_us(PERIOD_US) { 1 } else { 2 };
            self.unread_pages = [0, if periods == 1 { self.unread_pages[0] } else { 0 }];
            self.period = Period(self.period.0.wrapping_add(periods));
            self.period_ends = now.plus_us(PERIOD_US);
        }
    }

    /// How many periods ago `period` was. Its pages no longer count from 2 on.
    fn age(&self, period: Period) -> u32 {
        self.period.0.wrapping_sub(period.0)
    }

    /// How many more pages may be read ahead.
    fn room(&self) -> u32 {
        let share = u64::from(self.frames / UNREAD_DIVISOR);
        let shares = 1 + u64::from(self.with_window / STREAMS_PER_SHARE);
        let most = low_u32((share * shares).min(u64::from(self.frames / UNREAD_DIVISOR_MIN)).max(1));
        most.saturating_sub(self.unread_pages.iter().sum())
    }

    /// Whether one more page may be read ahead.
    pub fn may_read_ahead(&self) -> bool {
        self.room() > 0
    }

    /// Counts a page that is read ahead. Returns the period to pass to [`Streams::remove_unread`].
    pub fn add_unread(&mut self) -> Period {
        self.unread_pages[0] += 1;
        self.period
    }

    /// A page that was read ahead in `period` was read by a guest, overwritten, evicted or removed.
    pub fn remove_unread(&mut self, period: Period) {
        if period == Period::WARMED {
            return;
        }
        let age = self.age(period);
        if let Some(pages) = self.unread_pages.get_mut(age as usize) {
            *pages -= 1;
        }
    }

    /// Checks the counts against the periods of all unread pages (I4).
    pub fn check(&self, unread: &[Period]) {
        let counts = |period: &Period, age| *period != Period::WARMED && self.age(*period) == age;
        let of_age = |age| low_u32(unread.iter().filter(|period| counts(period, age)).count() as u64);
        assert_eq!(self.unread_pages, [of_age(0), of_age(1)], "I4: unread readahead");
        let with_window = self.table.iter().filter(|stream| stream.window > 0).count();
        assert_eq!(self.with_window as usize, with_window, "I4: streams with a window");
    }

    /// A request missed. Returns the stream that has a window to read ahead now, if any.
    fn after_miss(&mut self, span: PageSpan) -> Option<usize> {
        if self.table.is_empty() {
            return None;
        }
        self.lookup = self.lookup.wrapping_add(1).max(1);
        let (first, end, lookup) = (span.first.0, span.end().0, self.lookup);
        let window_max = self.window_max_now();
        // If several streams match, take the one whose next page is nearest to the request.
        let distance = |stream: &Stream| stream.expects(first, lookup).then(|| stream.next.abs_diff(first));
        if let Some(at) = self.nearest(first, distance) {
            let ready = self.change(at, |stream| {
                let ready = stream.follow(first, end, lookup) && window_max >= WINDOW_PAGES_USEFUL;
                (stream.found, stream.used) = (true, lookup);
                if ready {
                    stream.grow(window_max);
                }
                ready
            });
            return ready.then_some(at);
        }
        let slot = self.take_slot();
        self.change(slot, |stream| *stream = Stream { used: lookup, ..Stream::begin(first, end) });
        None
    }

    /// A reader reached the marker at `no`. Returns the stream that has a window to read ahead now, if any.
    fn after_marker(&mut self, no: PageNo) -> Option<usize> {
        let window_max = self.window_max_now();
        let at = self.find_window(no)?;
        let ready = window_max >= WINDOW_PAGES_USEFUL;
        self.change(at, |stream| {
            stream.found = true;
            stream.wasted = 0;
            stream.next = stream.next.max(no.0 + 1);
            if ready {
                stream.grow(window_max);
            }
        });
        ready.then_some(at)
    }

    /// A page that was read ahead went unread. Halves the stream's window, once for each 64 KiB of unread pages.
    pub fn note_wasted(&mut self, no: PageNo) {
        if !no.0.is_multiple_of(ROUND_PAGES) {
            return;
        }
        if let Some(at) = self.find_window(no) {
            self.change(at, |stream| {
                stream.window /= 2;
                stream.wanted = stream.ahead;
                stream.wasted += 1;
                if stream.wasted >= WASTED_MAX {
                    *stream = Stream::default();
                }
            });
        }
    }

    /// The stream that has read `no` ahead: the page is in its newest window or in the one before.
    fn find_window(&self, no: PageNo) -> Option<usize> {
        self.nearest(no.0, |stream| {
            let in_windows = 2 * u64::from(stream.window).max(WINDOW_PAGES_MIN);
            let found = stream.window > 0 && no.0 < stream.ahead && no.0 + in_windows >= stream.ahead;
            found.then(|| stream.ahead - no.0)
        })
    }

    /// The stream with the least distance, of those whose `next` is near `page` and that have one.
    fn nearest(&self, page: u64, distance: impl Fn(&Stream) -> Option<u64>) -> Option<usize> {
        // A stream that matches has its `next` within this distance. Places wrap, which can only find too many streams.
        let reach = low_u32((3 * self.window_max.max(WINDOW_PAGES_MIN) + SLACK_PAGES) / SLACK_PAGES + 1);
        let lowest = place_of(page).wrapping_sub(reach);
        let may_be_near = |place: &u32| place.wrapping_sub(lowest) <= 2 * reach;
        let mut nearest: Option<(u64, usize)> = None;
        for (chunk, places) in self.places.chunks(PLACES_PER_CHUNK).enumerate() {
            // Without a branch for each place, so that the compiler can vectorize the comparison.
            if !places.iter().fold(false, |any, place| any | may_be_near(place)) {
                continue;
            }
            for (at, _) in (chunk * PLACES_PER_CHUNK..).zip(places).filter(|(_, place)| may_be_near(place)) {
                if let Some(distance) = distance(&self.table[at])
                    && nearest.is_none_or(|(least, _)| distance < least)
                {
                    nearest = Some((distance, at));
                }
            }
        }
        nearest.map(|(_, at)| at)
    }

    /// Changes a stream, and updates the totals of the table.
    fn change<R>(&mut self, at: usize, change: impl FnOnce(&mut Stream) -> R) -> R {
        let stream = &mut self.table[at];
        let had_window = stream.window > 0;
        let result = change(stream);
        self.with_window = self.with_window + u32::from(stream.window > 0) - u32::from(had_window);
        self.places[at] = place_of(stream.next);
        result
    }

    /// The slot for a new stream: the next one that is free, or whose stream was not found during a round of the hand.
    fn take_slot(&mut self) -> usize {
        loop {
            let at = self.hand;
            self.hand = (at + 1) % self.table.len();
            if !std::mem::take(&mut self.table[at].found) {
                return at;
            }
        }
    }

    /// The longest window at the moment.
    fn window_max_now(&self) -> u64 {
        (u64::from(self.room()) / WINDOW_DIVISOR).min(self.window_max)
    }
}

impl Stream {
    /// A stream of one request.
    fn begin(first: u64, end: u64) -> Self {
        let covered = low_u32((end - first).min(COVERED_MAX));
        Self { start: first, next: end, covered, requests: 1, ahead: end, ..Self::default() }
    }

    /// Whether one of the last lookups found or created the stream.
    fn is_recent(&self, lookup: u32) -> bool {
        lookup.wrapping_sub(self.used) <= LOOKUPS_RECENT
    }

    /// Whether a request at `first` belongs to the stream.
    fn expects(&self, first: u64, lookup: u32) -> bool {
        if self.window == 0 && !self.is_recent(lookup) {
            return self.used > 0 && first == self.next;
        }
        // With a long window more requests are in flight, and a request can be overtaken by more pages.
        let behind = SLACK_PAGES.max(self.window.into());
        self.used > 0 && first + behind >= self.next && first <= self.next.max(self.ahead) + SLACK_PAGES
    }

    /// Adds a request that missed to the stream. Returns whether to read ahead now.
    fn follow(&mut self, first: u64, end: u64, lookup: u32) -> bool {
        let is_adjacent = first == self.next && self.is_recent(lookup);
        if self.window == 0 && !self.cover(first, end) {
            return false;
        }
        self.next = self.next.max(end);
        // If the reader has passed the window, the next one starts at the reader.
        self.ahead = if first >= self.ahead { end } else { self.ahead.max(end) };
        self.window > 0 || self.requests >= REQUESTS_MIN || (is_adjacent && u64::from(self.covered) >= WINDOW_PAGES_MIN)
    }

    /// Adds a request before readahead starts. False: it covers no new pages, or leaves so wide a gap that the stream
    /// starts over with this request.
    fn cover(&mut self, first: u64, end: u64) -> bool {
        if first >= self.start && end <= self.next {
            return false;
        }
        let (start, next) = (self.start.min(first), self.next.max(end));
        let covered = (u64::from(self.covered) + (end - first)).min(COVERED_MAX);
        if covered * SPAN_PER_COVERED_MAX < next - start {
            *self = Self { found: self.found, ..Self::begin(first, end) };
            return false;
        }
        (self.start, self.covered, self.requests) = (start, low_u32(covered), self.requests.saturating_add(1));
        true
    }

    /// Sets the next window: the first one is as long as the requests so far, later ones grow.
    fn grow(&mut self, window_max: u64) {
        let wanted = match u64::from(self.window) {
            0 => u64::from(self.covered).max(WINDOW_PAGES_MIN).next_multiple_of(ROUND_PAGES),
            window if window < window_max / FAST_GROWTH_DIVISOR => window * FAST_GROWTH,
            window => window * GROWTH,
        };
        self.window = low_u32(wanted.min(window_max));
        self.wanted = self.ahead + u64::from(self.window);
        self.marker_due = true;
    }
}

impl PageCache {
    /// A read missed: adds it to its stream, and reads ahead if that is due.
    pub(super) fn read_ahead_after_miss(&mut self, span: PageSpan) {
        self.streams.advance_period(self.now);
        if let Some(at) = self.streams.after_miss(span) {
            self.read_window(at);
        }
    }

    /// A read reached the marker of a window: reads the next one.
    pub(super) fn read_ahead_after_marker(&mut self, no: PageNo) {
        self.streams.advance_period(self.now);
        if let Some(at) = self.streams.after_marker(no) {
            self.read_window(at);
        }
    }

    /// Continues windows that were cut short: frames or a hole map may be available now.
    pub(super) fn continue_windows(&mut self) {
        if std::mem::take(&mut self.streams.cut) {
            for at in 0..self.streams.table.len() {
                self.read_window(at);
            }
        }
    }

    /// Reads the rest of a stream's window, as far as frames and maps allow.
    fn read_window(&mut self, at: usize) {
        let Stream { ahead, wanted, mut marker_due, .. } = self.streams.table[at];
        let wanted = wanted.min(self.readable_pages());
        if ahead < wanted {
            let end = self.read_ahead_window(PageSpan::new(PageNo(ahead), wanted - ahead), &mut marker_due);
            let stream = &mut self.streams.table[at];
            stream.marker_due = marker_due;
            stream.ahead = stream.ahead.max(end.0);
            // If too many pages are unread, the stream tries again at its reader's next miss.
            self.streams.cut |= stream.ahead < wanted && self.streams.may_read_ahead();
        }
    }
}
