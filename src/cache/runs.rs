//! Long runs of data and of holes, as the store reported them.
//!
//! A store finds the end of a run by a walk over the extents of the image (SEEK_HOLE, SEEK_DATA). On a fragmented image
//! that takes milliseconds, far more than a read. So the whole run is recorded, even beyond the requested region;
//! otherwise each region of the run would cost the same walk again.
//!
//! The table is bounded. It may drop a run, but never keeps a wrong one: a write removes its range from holes, and a
//! zero or discard removes its range from every run.

use std::collections::BTreeMap;

use crate::units::{ExtentKind, PageNo, PageSpan};

/// Frames of the cache for each run of the table, which takes less than 0.01 % of the cache.
const FRAMES_PER_RUN: u32 = 256;
/// Fewest runs of the table.
const RUNS_MIN: u32 = 64;
/// Most runs in the table: in an image with more runs that are longer than a region, a query of the store is fast.
const RUNS_MAX: u32 = 4096;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct ExtentRun {
    /// The page after the run.
    end: u64,
    kind: ExtentKind,
}

/// See the documentation of the module.
#[derive(Debug)]
pub(super) struct Runs {
    /// By first page; they do not overlap.
    runs: BTreeMap<u64, ExtentRun>,
    runs_max: usize,
    /// The run that begins at or after this page is the next one to be dropped.
    victim: u64,
}

impl Runs {
    /// A table for a cache of `frames` frames.
    pub fn new(frames: u32) -> Self {
        let runs_max = (frames / FRAMES_PER_RUN).clamp(RUNS_MIN, RUNS_MAX) as usize;
        Self { runs: BTreeMap::new(), runs_max, victim: 0 }
    }

    /// The known kind of a page.
    pub fn kind(&self, no: PageNo) -> Option<ExtentKind> {
        let (_, run) = self.runs.range(..=no.0).next_back()?;
        (no.0 < run.end).then_some(run.kind)
    }

    /// Records that all pages of the span are of this kind.
    pub fn record(&mut self, span: PageSpan, kind: ExtentKind) {
        self.cut(span);
        self.insert(span.first.0, ExtentRun { end: span.end().0, kind });
    }

    /// The pages were written to the store: they are not holes.
    pub fn mark_data(&mut self, span: PageSpan) {
        let last = self.runs.range(..span.end().0).next_back();
        // By far the most common case: no run, or a run of data.
        if last
            .is_some_and(|(&first, run)| run.kind == ExtentKind::Hole && run.end > span.first.0 || first > span.first.0)
        {
            let holes = self.overlapping(span).filter(|(_, run)| run.kind == ExtentKind::Hole);
            for (first, run) in holes.collect::<Vec<_>>() {
                let first = first.max(span.first.0);
                self.cut(PageSpan::new(PageNo(first), run.end.min(span.end().0) - first));
            }
        }
    }

    /// Drops the known kinds of the pages of the span.
    pub fn cut(&mut self, span: PageSpan) {
        let (first, end) = (span.first.0, span.end().0);
        for (start, run) in self.overlapping(span).collect::<Vec<_>>() {
            self.runs.remove(&start);
            if start < first {
                self.insert(start, ExtentRun { end: first, ..run });
            }
            if run.end > end {
                self.insert(end, run);
            }
        }
    }

    fn overlapping(&self, span: PageSpan) -> impl Iterator<Item = (u64, ExtentRun)> {
        let before = self.runs.range(..span.first.0).next_back().filter(|(_, run)| run.end > span.first.0);
        before.into_iter().chain(self.runs.range(span.first.0..span.end().0)).map(|(&first, &run)| (first, run))
    }

    fn insert(&mut self, first: u64, run: ExtentRun) {
        if self.runs.len() >= self.runs_max {
            let next = self.runs.range(self.victim..).next().or_else(|| self.runs.iter().next());
            let victim = *next.expect("a full table has runs").0;
            self.runs.remove(&victim);
            self.victim = victim + 1;
        }
        self.runs.insert(first, run);
    }

    /// Bytes of memory that the full table takes, estimated: the nodes of a B-tree are two thirds full on average.
    pub fn metadata_bytes(&self) -> usize {
        self.runs_max * size_of::<(u64, ExtentRun)>() * 3 / 2
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

    /// Random steps, compared with a model that has the true kind of every page: the table is never wrong.
    #[test]
    fn the_run_table_may_forget_but_is_never_wrong() {
        const PAGES: u64 = 4000;
        for seed in 0..50 {
            let mut prng = Prng::new(seed);
            let mut holes: Vec<bool> = (0..PAGES).map(|_| true).collect();
            let mut runs = Runs::new(0);
            let mut known = 0;
            for _ in 0..2000 {
                let first = prng.below(PAGES);
                let longest = prng.pick(&[1, 20, 1000]);
                let count = prng.between(1, longest).min(PAGES - first);
                let pages = first as usize..(first + count) as usize;
                match prng.below(4) {
                    0 => {
                        holes[pages].fill(false);
                        runs.mark_data(span(first, count));
                    }
                    1 => {
                        holes[pages].fill(true);
                        runs.cut(span(first, count));
                    }
                    _ => {
                        let hole = holes[first as usize];
                        let end = (first..PAGES).find(|&no| holes[no as usize] != hole).unwrap_or(PAGES);
                        let kind = if hole { ExtentKind::Hole } else { ExtentKind::Data };
                        runs.record(span(first, end - first), kind);
                    }
                }
                for _ in 0..20 {
                    let no = prng.below(PAGES);
                    if let Some(kind) = runs.kind(PageNo(no)) {
                        assert_eq!(kind == ExtentKind::Hole, holes[no as usize], "seed {seed}, page {no}");
                        known += 1;
                    }
                }
                assert!(runs.runs.len() <= RUNS_MIN as usize);
            }
            assert!(known > 1000, "seed {seed}: the table had only {known} of 40000 pages");
        }
    }

    #[test]
    fn sequential_writes_into_a_hole_leave_one_run() {
        let mut runs = Runs::new(0);
        runs.record(span(0, 10_000), ExtentKind::Hole);
        (0..1000).for_each(|no| runs.mark_data(span(no, 1)));
        assert_eq!((runs.kind(PageNo(999)), runs.kind(PageNo(1000))), (None, Some(ExtentKind::Hole)));
        assert_eq!(runs.runs.len(), 1);
    }
}
