//! Limits the rates at which a guest's requests start: reads, writes and both together, in requests and in bytes.
//!
//! Each limit is a token bucket in its virtual-scheduling form (ITU-T I.371, the generic cell rate algorithm). Its
//! state is one time: the time at which everything taken from it is paid for. A request may start once that time has
//! come, and advances it by its own cost. So a request of any size can start, and the next one waits in proportion to
//! that size. An idle bucket saves up tokens for `burst_ms`.
//!
//! A request that may not start stays on its ring, and keeps its place: it is charged immediately, and starts when its
//! time has come. So the heads of all rings, also those of different workers, wait in one queue. No ring starves, and
//! none takes the tokens of a ring whose worker wakes up a moment later. FLUSH and GET ID cost nothing; they wait for
//! earlier requests on their ring.
//!
//! A ring that stops has not taken the request that is held back: it need not complete it, and returns its tokens.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::units::Tick;
use crate::virtio::request::RequestKind;

/// Fractions of a nanosecond in which a bucket counts.
const PARTS_PER_NS: u64 = 64;
/// Fraction bits of the cost of a unit, below a nanosecond.
const COST_BITS: u32 = 20;

/// A limit for each second; 0: none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RateLimit {
    /// Requests.
    pub requests: u64,
    /// Bytes.
    pub bytes: u64,
}

/// The limits of a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RateLimits {
    /// Limit of reads.
    pub read: RateLimit,
    /// Limit of writes, discards and zeroes. Discards and zeroes carry no data and count no bytes.
    pub write: RateLimit,
    /// Limit of both together.
    pub total: RateLimit,
    /// How long an idle device saves up tokens.
    pub burst_ms: u32,
}

/// The kind of a request as far as the limits distinguish it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LimitedKind {
    Read,
    Write,
}

impl LimitedKind {
    /// The kind of a request; `None` for one that is not limited.
    pub fn of(kind: RequestKind) -> Option<Self> {
        match kind {
            RequestKind::Read => Some(Self::Read),
            RequestKind::Write | RequestKind::Discard | RequestKind::WriteZeroes => Some(Self::Write),
            RequestKind::Flush | RequestKind::GetId | RequestKind::Unknown(_) => None,
        }
    }
}

/// The tokens that a request takes from the buckets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Price {
    pub kind: LimitedKind,
    pub bytes: u64,
}

/// A request at the head of its ring that was charged and has to wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct HeldHead {
    pub price: Price,
    /// When it may start.
    pub ready_at: Tick,
    /// Since when it waits.
    pub since: Tick,
    /// The generation of the limits that hold it.
    pub generation: u32,
}

/// One limit.
#[derive(Debug, Default)]
struct Bucket {
    /// The cost of a unit, in nanoseconds with [`COST_BITS`] fraction bits; 0: no limit.
    unit_cost: AtomicU64,
    /// The time at which everything taken is paid for, in parts of a nanosecond.
    paid_at: AtomicU64,
}

impl Bucket {
    /// Sets the limit in units per second. A changed limit restarts with a full bucket.
    fn set(&self, per_second: u64) {
        let unit_cost = (1_000_000_000u64 << COST_BITS).checked_div(per_second).map_or(0, |cost| cost.max(1));
        if self.unit_cost.swap(unit_cost, Ordering::Relaxed) != unit_cost {
            self.paid_at.store(0, Ordering::Relaxed);
        }
    }

    /// The cost of this many units, in parts of a nanosecond.
    fn cost(&self, units: u64) -> u64 {
        let cost = u128::from(units) * u128::from(self.unit_cost.load(Ordering::Relaxed)) * u128::from(PARTS_PER_NS);
        u64::try_from(cost >> COST_BITS).unwrap_or(u64::MAX)
    }

    /// Takes this many units. Returns when they are available, if that is later than `now`.
    fn take(&self, units: u64, now: u64, burst: u64) -> Option<u64> {
        let cost = self.cost(units);
        if cost == 0 {
            return None;
        }
        let earliest = now.saturating_sub(burst);
        let pay = |paid_at: u64| Some(paid_at.max(earliest).saturating_add(cost));
        let before = self.paid_at.fetch_update(Ordering::Relaxed, Ordering::Relaxed, pay);
        before.ok().filter(|ready| *ready > now)
    }

    /// Returns units that were taken and not used.
    fn put_back(&self, units: u64) {
        let cost = self.cost(units);
        let pay_back = |paid_at: u64| Some(paid_at.saturating_sub(cost));
        let _ = self.paid_at.fetch_update(Ordering::Relaxed, Ordering::Relaxed, pay_back);
    }
}

/// Requests and bytes.
#[derive(Debug, Default)]
struct BucketPair {
    requests: Bucket,
    bytes: Bucket,
}

impl BucketPair {
    fn set(&self, limit: RateLimit) {
        self.requests.set(limit.requests);
        self.bytes.set(limit.bytes);
    }
}

/// The limits of a device, which its workers share.
#[derive(Debug, Default)]
pub struct RateLimiter {
    /// 0: no limit is set. The number changes with the limits.
    generation: AtomicU32,
    /// How long tokens are saved up, in parts of a nanosecond.
    burst: AtomicU64,
    read: BucketPair,
    write: BucketPair,
    total: BucketPair,
}

impl RateLimiter {
    /// A limiter with these initial limits.
    pub fn new(limits: &RateLimits) -> Self {
        let limiter = Self::default();
        limiter.set(limits);
        limiter
    }

    /// Sets the limits. The workers apply them when they next take requests.
    pub fn set(&self, limits: &RateLimits) {
        self.read.set(limits.read);
        self.write.set(limits.write);
        self.total.set(limits.total);
        let burst = u64::from(limits.burst_ms).saturating_mul(1_000_000 * PARTS_PER_NS);
        self.burst.store(burst, Ordering::Relaxed);
        let is_on = [limits.read, limits.write, limits.total].iter().any(|limit| *limit != RateLimit::default());
        let next = self.generation.load(Ordering::Relaxed).wrapping_add(1).max(1);
        self.generation.store(if is_on { next } else { 0 }, Ordering::Release);
    }

    /// 0 if no limit is set; otherwise a number that changes with the limits.
    #[inline]
    pub(super) fn generation(&self) -> u32 {
        self.generation.load(Ordering::Acquire)
    }

    /// Charges a request. Returns when it may start, if it has to wait.
    pub(super) fn pay(&self, price: Price, now: Tick) -> Option<Tick> {
        let (at, burst) = (parts_of(now), self.burst.load(Ordering::Relaxed));
        let ready = self.buckets(price.kind).into_iter().flat_map(|pair| {
            [pair.requests.take(1, at, burst), pair.bytes.take(price.bytes, at, burst)].into_iter().flatten()
        });
        // Rounded up to the resolution of a worker's sleep.
        ready.max().map(|parts| Tick::from_us((parts / PARTS_PER_NS).div_ceil(1000)))
    }

    /// Refunds the tokens of a request that does not start.
    pub(super) fn refund(&self, price: Price) {
        for pair in self.buckets(price.kind) {
            pair.requests.put_back(1);
            pair.bytes.put_back(price.bytes);
        }
    }

    fn buckets(&self, kind: LimitedKind) -> [&BucketPair; 2] {
        match kind {
            LimitedKind::Read => [&self.read, &self.total],
            LimitedKind::Write => [&self.write, &self.total],
        }
    }

    /// Whether the request at the head of a ring may start at `now`, under the limits of this generation. `held` keeps
    /// the place of a request that may not. If a request that waited may start now, returns since when it waited.
    pub(super) fn may_begin(
        &self,
        price: Option<Price>,
        held: &mut Option<HeldHead>,
        generation: u32,
        now: Tick,
    ) -> Result<Option<Tick>, ()> {
        let before = held.take();
        let since = before.map_or(now, |head| head.since);
        let is_paid = match before {
            Some(head) if Some(head.price) == price && head.generation == generation => {
                if head.ready_at > now {
                    *held = before;
                    return Err(());
                }
                true
            }
            // The limits have changed, or the guest has replaced the request.
            Some(head) => {
                self.refund(head.price);
                false
            }
            None => false,
        };
        if let Some(price) = price
            && !is_paid
            && let Some(ready_at) = self.pay(price, now)
        {
            *held = Some(HeldHead { price, ready_at, since, generation });
            return Err(());
        }
        Ok(before.map(|head| head.since))
    }
}

fn parts_of(tick: Tick) -> u64 {
    tick.since_ns(Tick::ZERO).saturating_mul(PARTS_PER_NS)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND_US: u64 = 1_000_000;

    fn read(bytes: u64) -> Price {
        Price { kind: LimitedKind::Read, bytes }
    }

    fn write(bytes: u64) -> Price {
        Price { kind: LimitedKind::Write, bytes }
    }

    /// From a ring with endless requests, the number that start within a period, with a worker that wakes up `late_us`
    /// too late.
    fn begun(limiter: &RateLimiter, prices: &[Price], from_us: u64, until_us: u64, late_us: u64) -> Vec<u64> {
        let generation = limiter.generation();
        let mut held = vec![None; prices.len()];
        let mut counts = vec![0; prices.len()];
        let (mut now, mut turn) = (from_us, 0);
        while now < until_us {
            // The ring that is served first rotates, as in a worker.
            for nth in 0..prices.len() {
                let ring = (nth + turn) % prices.len();
                while limiter.may_begin(Some(prices[ring]), &mut held[ring], generation, Tick::from_us(now)).is_ok() {
                    counts[ring] += 1;
                }
            }
            turn += 1;
            let due = held.iter().flatten().map(|head| head.ready_at.since_us(Tick::ZERO)).min();
            now = due.expect("an endless ring is held") + late_us;
        }
        counts
    }

    fn limiter(limits: RateLimits) -> RateLimiter {
        RateLimiter::new(&limits)
    }

    fn requests(requests: u64) -> RateLimit {
        RateLimit { requests, bytes: 0 }
    }

    fn bytes(bytes: u64) -> RateLimit {
        RateLimit { requests: 0, bytes }
    }

    #[track_caller]
    fn assert_within(found: u64, expected: u64, permille: u64) {
        assert!(found.abs_diff(expected) * 1000 <= expected * permille, "{found} instead of {expected}");
    }

    #[test]
    fn flushes_and_identification_are_never_limited() {
        let limited = [RequestKind::Read, RequestKind::Write, RequestKind::Discard, RequestKind::WriteZeroes];
        assert!(limited.into_iter().all(|kind| LimitedKind::of(kind).is_some()));
        let unlimited = [RequestKind::Flush, RequestKind::GetId, RequestKind::Unknown(99)];
        assert!(unlimited.into_iter().all(|kind| LimitedKind::of(kind).is_none()));
    }

    #[test]
    fn a_rate_is_kept_however_late_the_worker_wakes_up() {
        for rate in [1, 3, 100, 1000, 7919, 250_000, 3_000_000] {
            for late_us in [0, 1, 999, 20_000] {
                let limits = RateLimits { total: requests(rate), burst_ms: 100, ..RateLimits::default() };
                let (from, us) = (10 * SECOND_US, (100_000 * SECOND_US / rate).min(20 * SECOND_US));
                let limiter = limiter(limits);
                let count = begun(&limiter, &[read(512)], from, from + us, late_us)[0];
                // The burst of a tenth of a second precedes the period, and one more request may start at each end. The
                // last wake-up may be too late.
                let expected = (rate * us / SECOND_US + rate / 10).saturating_sub(rate * late_us / SECOND_US / 2);
                let slack = expected / 500 + 1 + rate * late_us / SECOND_US / 2;
                assert!(count.abs_diff(expected) <= slack, "{rate}/s, {late_us} us late: {count}");
            }
        }
    }

    #[test]
    fn a_byte_limit_holds_for_any_request_size() {
        for size in [512, 4096, 1 << 20, 100 << 20] {
            for rate in [10 << 20, 50 << 20, 5 << 30] {
                let limits = RateLimits { write: bytes(rate), burst_ms: 10, ..RateLimits::default() };
                // The time of 100 000 requests, and longer than a single request.
                let (from, us) = (10 * SECOND_US, (size * 100_000 * SECOND_US / rate).min(100 * SECOND_US));
                let count = begun(&limiter(limits), &[write(size)], from, from + us, 50)[0];
                let (expected, slack) = (rate * us / SECOND_US, 2 * size + rate / 50);
                assert!((count * size).abs_diff(expected) <= slack, "{size} at {rate}: {}", count * size);
            }
        }
    }

    #[test]
    fn a_limit_on_writes_does_not_delay_reads() {
        let limits = RateLimits { write: requests(100), total: requests(1000), burst_ms: 10, ..Default::default() };
        let counts = begun(&limiter(limits), &[read(512), write(512)], SECOND_US, 11 * SECOND_US, 100);
        assert_within(counts[1], 1000, 20);
        assert_within(counts[0] + counts[1], 10_000, 20);
        let only_writes = limiter(RateLimits { write: requests(1), burst_ms: 10, ..Default::default() });
        let now = Tick::from_us(SECOND_US);
        assert!((0..1000).all(|_| only_writes.pay(read(1 << 20), now).is_none()));
    }

    #[test]
    fn an_idle_device_accumulates_at_most_one_burst() {
        let limits = RateLimits { total: requests(1000), burst_ms: 500, ..RateLimits::default() };
        let limiter = limiter(limits);
        let free = |now_us| {
            let mut held = None;
            let mut count = 0;
            while limiter.may_begin(Some(read(0)), &mut held, limiter.generation(), Tick::from_us(now_us)).is_ok() {
                count += 1;
            }
            held.into_iter().for_each(|head: HeldHead| limiter.refund(head.price));
            count
        };
        assert_within(free(100 * SECOND_US), 501, 3);
        assert_eq!(free(100 * SECOND_US), 0);
        assert_within(free(100 * SECOND_US + 100_000), 100, 10);
        assert_within(free(1000 * SECOND_US), 501, 3);
    }

    #[test]
    fn waiting_rings_take_turns() {
        for late_us in [0, 1500] {
            let limits = RateLimits { total: requests(10_000), burst_ms: 100, ..RateLimits::default() };
            let prices = [read(4096), write(4096), read(512), read(512)];
            let counts = begun(&limiter(limits), &prices, SECOND_US, 11 * SECOND_US, late_us);
            counts.iter().for_each(|count| assert_within(*count, 25_250, 100));
        }
    }

    #[test]
    fn a_held_request_is_charged_once_and_keeps_its_position() {
        let limits = RateLimits { total: bytes(1 << 20), burst_ms: 10, ..RateLimits::default() };
        let limiter = limiter(limits);
        let at = |us| Tick::from_us(SECOND_US + us);
        let generation = limiter.generation();
        let mut held = None;
        assert_eq!(limiter.may_begin(Some(read(1 << 20)), &mut held, generation, at(0)), Ok(None));
        assert_eq!(limiter.may_begin(Some(read(512)), &mut held, generation, at(1)), Err(()));
        let first = held.expect("it waits");
        assert_eq!(limiter.may_begin(Some(read(512)), &mut held, generation, at(2)), Err(()));
        assert_eq!(held, Some(first), "it is charged once");
        // A guest that writes a larger request in its place is charged for that one.
        let due = first.ready_at;
        assert_eq!(limiter.may_begin(Some(read(1 << 20)), &mut held, generation, due), Ok(Some(at(1))));
        assert_eq!(limiter.may_begin(Some(read(512)), &mut held, generation, due), Err(()));
        let next = held.expect("it waits").ready_at;
        assert_within(next.since_us(due), SECOND_US, 5);
        // A FLUSH in its place costs nothing, and the charge is refunded.
        assert_eq!(limiter.may_begin(None, &mut held, generation, due), Ok(Some(due)));
        assert_eq!(limiter.may_begin(Some(read(512)), &mut held, generation, due), Err(()));
        assert_eq!(held.map(|head| head.ready_at), Some(next));
    }

    #[test]
    fn new_limits_apply_at_once_and_cancel_old_debt() {
        let slow = RateLimits { read: bytes(4096), burst_ms: 10, ..RateLimits::default() };
        let limiter = limiter(slow);
        let now = Tick::from_us(SECOND_US);
        let mut held = None;
        assert_eq!(limiter.may_begin(Some(read(1 << 30)), &mut held, limiter.generation(), now), Ok(None));
        assert_eq!(limiter.may_begin(Some(read(4096)), &mut held, limiter.generation(), now), Err(()));
        limiter.set(&RateLimits { read: bytes(1 << 30), ..slow });
        assert_eq!(limiter.may_begin(Some(read(4096)), &mut held, limiter.generation(), now), Ok(Some(now)));
        let before = limiter.generation();
        limiter.set(&RateLimits::default());
        assert_eq!(limiter.generation(), 0);
        limiter.set(&slow);
        assert!(limiter.generation() != 0 && before != 0);
    }
}
