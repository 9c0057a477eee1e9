//! A bounded set of ranges of pages.
//!
//! If it is full, it merges a new range with its nearest neighbour: it may contain more pages than were inserted, never
//! fewer.

use std::collections::BTreeMap;

use crate::units::{PageNo, PageSpan};

/// See the documentation of the module.
#[derive(Debug)]
pub(super) struct PageRanges {
    /// First page and the page after the last; they neither overlap nor adjoin.
    ranges: BTreeMap<u64, u64>,
    ranges_max: usize,
}

impl PageRanges {
    /// An empty set, which holds at most `ranges_max` ranges.
    pub fn new(ranges_max: usize) -> Self {
        Self { ranges: BTreeMap::new(), ranges_max }
    }

    /// The ranges, by their first pages.
    pub fn iter(&self) -> impl Iterator<Item = PageSpan> {
        self.ranges.iter().map(|(&first, &end)| PageSpan::new(PageNo(first), end - first))
    }

    /// Whether the set has the page.
    pub fn contains(&self, no: PageNo) -> bool {
        self.ranges.range(..=no.0).next_back().is_some_and(|(_, &end)| no.0 < end)
    }

    /// Whether the set has all pages of the span.
    pub fn includes(&self, span: PageSpan) -> bool {
        let below = self.ranges.range(..=span.first.0).next_back();
        below.is_some_and(|(_, &end)| span.end().0 <= end)
    }

    /// Moves all ranges of `other` to this set.
    pub fn append(&mut self, other: &mut Self) {
        other.iter().for_each(|span| self.insert(span));
        other.clear();
    }

    /// Removes all ranges.
    pub fn clear(&mut self) {
        self.ranges.clear();
    }

    /// Adds the span.
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

    /// Removes the span; a full set keeps a span whose removal would split a range.
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

    /// `span`, extended towards `limit` on both sides, but not over pages of the set.
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
    fn an_extension_stops_at_pages_of_the_set() {
        let mut set = PageRanges::new(64);
        set.insert(span(10, 5));
        set.insert(span(30, 5));
        assert_eq!(set.extend(span(20, 2), span(0, 100)), span(15, 15));
        assert_eq!(set.extend(span(12, 1), span(0, 100)), span(12, 1), "pages of the set on both sides");
        assert_eq!(set.extend(span(15, 15), span(0, 100)), span(15, 15));
        set.remove(span(12, 1));
        assert_eq!(set.extend(span(12, 1), span(0, 100)), span(12, 1));
        set.remove(span(0, 100));
        assert_eq!(set.extend(span(12, 1), span(0, 100)), span(0, 100));
    }

    /// Random steps, compared with a model: no extension includes a page that was inserted.
    #[test]
    fn a_full_set_may_gain_pages_but_never_loses_one() {
        const PAGES: u64 = 4000;
        let mut prng = Prng::new(1);
        let mut model = vec![false; PAGES as usize];
        let mut set = PageRanges::new(64);
        for step in 0..20_000 {
            let first = prng.below(PAGES);
            let longest = prng.pick(&[1, 3, 30]);
            let count = prng.between(1, longest).min(PAGES - first);
            let insert = prng.percent(50);
            model[first as usize..(first + count) as usize].fill(insert);
            if insert {
                set.insert(span(first, count));
            } else {
                set.remove(span(first, count));
            }
            assert!(set.ranges.len() <= 64);
            let ends: Vec<(u64, u64)> = set.ranges.iter().map(|(&start, &stop)| (start, stop)).collect();
            assert!(ends.iter().all(|(start, stop)| start < stop) && ends.windows(2).all(|pair| pair[0].1 < pair[1].0));
            for no in (0..PAGES).filter(|no| model[*no as usize]) {
                let known = ends.iter().any(|(start, stop)| (*start..*stop).contains(&no));
                assert!(known && set.contains(PageNo(no)), "step {step}: page {no} was forgotten");
            }
            let pages = span(first, count);
            assert_eq!(set.includes(pages), pages.iter().all(|no| set.contains(no)), "step {step}: {pages:?}");
            let extended = set.extend(span(first, count), span(first.saturating_sub(50), 200));
            let outside = extended.iter().filter(|no| !span(first, count).contains(*no));
            assert!(outside.into_iter().all(|no| no.0 >= PAGES || !model[no.0 as usize]), "step {step}: {extended:?}");
        }
    }
}
