//! What the guest has trimmed: its space is not reserved again before the guest writes there.
//!
//! The set is bounded. If it is full, it unites a new range with its nearest neighbour: it may hold more than the guest
//! has trimmed, which costs only that reservations there are not rounded up, and never less.

use std::collections::BTreeMap;

use crate::units::{PageNo, PageSpan};

/// Frames of the cache for each range of the set, which takes less than 0.01 % of the cache.
const FRAMES_PER_RANGE: u32 = 256;
/// Fewest ranges of the set.
const RANGES_MIN: u32 = 64;
/// Most ranges of the set.
const RANGES_MAX: u32 = 4096;

/// See the module.
#[derive(Debug)]
pub(super) struct Trimmed {
    /// First page and the page after the last; they neither overlap nor adjoin.
    ranges: BTreeMap<u64, u64>,
    ranges_max: usize,
}

impl Trimmed {
    /// For a cache of `frames` frames.
    pub fn new(frames: u32) -> Self {
        let ranges_max = (frames / FRAMES_PER_RANGE).clamp(RANGES_MIN, RANGES_MAX) as usize;
        Self { ranges: BTreeMap::new(), ranges_max }
    }

    /// The guest has trimmed the span.
    pub fn insert(&mut self, span: PageSpan) {
        let (mut first, mut end) = (span.first.0, span.end().0);
        while let Some((&start, &stop)) = self.ranges.range(..=end).next_back().filter(|(_, stop)| **stop >= first) {
            (first, end) = (first.min(start), end.max(stop));
            self.ranges.remove(&start);
        }
        if self.ranges.len() >= self.ranges_max {
            let below = self.ranges.range(..first).next_back().map(|(&start, &stop)| (first - stop, start, stop));
            let above = self.ranges.range(end..).next().map(|(&start, &stop)| (start - end, start, stop));
            let (_, start, stop) = [below, above].into_iter().flatten().min().expect("a full set has ranges");
            self.ranges.remove(&start);
            (first, end) = (first.min(start), end.max(stop));
        }
        self.ranges.insert(first, end);
    }

    /// The guest has written the span, and has space for it.
    pub fn remove(&mut self, span: PageSpan) {
        let (first, end) = (span.first.0, span.end().0);
        while let Some((start, stop)) =
            self.ranges.range(..end).next_back().map(|(&start, &stop)| (start, stop)).filter(|(_, stop)| *stop > first)
        {
            let splits = start < first && stop > end;
            if splits && self.ranges.len() >= self.ranges_max {
                return;
            }
            self.ranges.remove(&start);
            if stop > end {
                self.ranges.insert(end, stop);
            }
            if start < first {
                self.ranges.insert(start, first);
            }
        }
    }

    /// `span`, extended as far as to `limit`, but not over trimmed pages.
    pub fn extend(&self, span: PageSpan, limit: PageSpan) -> PageSpan {
        let below = self.ranges.range(..span.first.0).next_back().map_or(0, |(_, &stop)| stop);
        let first = limit.first.0.max(below).min(span.first.0);
        let within = self.ranges.range(..=span.end().0).next_back().filter(|(_, stop)| **stop > span.end().0);
        let above = within.or_else(|| self.ranges.range(span.end().0..).next()).map_or(u64::MAX, |(&start, _)| start);
        let end = limit.end().0.min(above).max(span.end().0);
        PageSpan::new(PageNo(first), end - first)
    }

    /// Bytes of memory that the full set takes, estimated: the nodes of a B-tree are two thirds full on average.
    pub fn metadata_bytes(&self) -> usize {
        self.ranges_max * size_of::<(u64, u64)>() * 3 / 2
    }
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "small numbers that the tests choose")]
mod tests {
    use super::*;
    use crate::prng::Prng;

    fn span(first: u64, count: u64) -> PageSpan {
        PageSpan::new(PageNo(first), count)
    }

    #[test]
    fn an_extension_ends_at_trimmed_pages() {
        let mut trimmed = Trimmed::new(0);
        trimmed.insert(span(10, 5));
        trimmed.insert(span(30, 5));
        assert_eq!(trimmed.extend(span(20, 2), span(0, 100)), span(15, 15));
        assert_eq!(trimmed.extend(span(12, 1), span(0, 100)), span(12, 1), "trimmed on both sides");
        assert_eq!(trimmed.extend(span(15, 15), span(0, 100)), span(15, 15));
        trimmed.remove(span(12, 1));
        assert_eq!(trimmed.extend(span(12, 1), span(0, 100)), span(12, 1));
        trimmed.remove(span(0, 100));
        assert_eq!(trimmed.extend(span(12, 1), span(0, 100)), span(0, 100));
    }

    /// Random steps beside a model: every page that is trimmed stays out of every extension.
    #[test]
    fn a_full_set_holds_too_much_and_never_too_little() {
        const PAGES: u64 = 4000;
        let mut prng = Prng::new(1);
        let mut model = vec![false; PAGES as usize];
        let mut trimmed = Trimmed::new(0);
        for step in 0..20_000 {
            let first = prng.below(PAGES);
            let longest = prng.pick(&[1, 3, 30]);
            let count = prng.between(1, longest).min(PAGES - first);
            let insert = prng.percent(50);
            model[first as usize..(first + count) as usize].fill(insert);
            if insert {
                trimmed.insert(span(first, count));
            } else {
                trimmed.remove(span(first, count));
            }
            assert!(trimmed.ranges.len() <= RANGES_MIN as usize);
            let ends: Vec<(u64, u64)> = trimmed.ranges.iter().map(|(&start, &stop)| (start, stop)).collect();
            assert!(ends.iter().all(|(start, stop)| start < stop) && ends.windows(2).all(|pair| pair[0].1 < pair[1].0));
            for no in (0..PAGES).filter(|no| model[*no as usize]) {
                let known = ends.iter().any(|(start, stop)| (*start..*stop).contains(&no));
                assert!(known, "step {step}: page {no} was forgotten");
            }
            let extended = trimmed.extend(span(first, count), span(first.saturating_sub(50), 200));
            let outside = extended.iter().filter(|no| !span(first, count).contains(*no));
            assert!(outside.into_iter().all(|no| no.0 >= PAGES || !model[no.0 as usize]), "step {step}: {extended:?}");
        }
    }
}
