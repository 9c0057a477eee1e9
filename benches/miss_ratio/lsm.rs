//! A log-structured merge tree: flushes and compactions in long runs, under point reads that prefer what is new.

use super::workloads::{Trace, Zipf};

/// A level is merged into the next when it holds this many runs.
const RUNS_PER_LEVEL: usize = 4;
/// Levels; the last one's runs are merged into one of their size.
const LEVELS: usize = 4;
/// Point reads between two pages of a flush.
const READS_PER_PAGE: u32 = 3;

/// A sorted run: a file that is written once and never changed.
#[derive(Clone, Copy, Debug)]
struct Run {
    start: u32,
    pages: u32,
}

/// Size-tiered compaction in an image that is written through from its start to its end, and again.
#[derive(Debug)]
struct Tree {
    levels: [Vec<Run>; LEVELS],
    /// Where the next run is written.
    next: u32,
    /// Pages of a run that is flushed from memory.
    flush_pages: u32,
    popularity: Zipf,
}

/// Fills the trace with the life of one tree.
pub(super) fn lsm(trace: &mut Trace) {
    let flush_pages = trace.share(2).max(4);
    let mut tree = Tree {
        levels: Default::default(),
        next: 0,
        flush_pages,
        popularity: Zipf::new(flush_pages * 4u32.pow(LEVELS as u32 - 1), 0.8),
    };
    while !trace.is_full() {
        tree.flush(trace);
    }
}

impl Tree {
    /// Memory is full: a new run on the first level, and the merges that it sets off.
    fn flush(&mut self, trace: &mut Trace) {
        let run = self.allocate(self.flush_pages, trace.scale.pages);
        for page in run.start..run.start + run.pages {
            trace.write(page);
            for _ in 0..READS_PER_PAGE {
                self.point_read(trace);
            }
        }
        self.levels[0].push(run);
        for level in 0..LEVELS {
            if self.levels[level].len() == RUNS_PER_LEVEL {
                self.merge(level, trace);
            }
        }
    }

    /// Reads the runs of a level side by side and writes them out as one.
    fn merge(&mut self, level: usize, trace: &mut Trace) {
        let sources = std::mem::take(&mut self.levels[level]);
        let total: u32 = sources.iter().map(|run| run.pages).sum();
        // On the last level all versions but the newest go.
        let into = if level + 1 < LEVELS { level + 1 } else { level };
        let pages = if into > level { total } else { total / RUNS_PER_LEVEL as u32 };
        let target = self.allocate(pages, trace.scale.pages);
        let mut written = 0;
        for at in 0..sources[0].pages {
            for run in &sources {
                trace.read(run.start + at % run.pages);
            }
            let due = (u64::from(at + 1) * u64::from(pages) / u64::from(sources[0].pages)) as u32;
            (written..due).for_each(|page| trace.write(target.start + page));
            written = due;
            self.point_read(trace);
        }
        self.levels[into].push(target);
    }

    /// A key is looked for from the newest run to the oldest; filters keep most runs from being read in vain.
    fn point_read(&self, trace: &mut Trace) {
        let runs: Vec<Run> = self.levels.iter().flat_map(|level| level.iter().rev()).copied().collect();
        if runs.is_empty() {
            return;
        }
        let run = runs[trace.below(runs.len() as u32) as usize];
        // The run's index comes first, and is asked for with every read.
        let index = trace.below(run.pages.div_ceil(128));
        trace.read(run.start + index);
        let rank = self.popularity.draw(trace);
        trace.read(run.start + rank % run.pages);
    }

    fn allocate(&mut self, pages: u32, image_pages: u32) -> Run {
        if self.next + pages > image_pages {
            self.next = 0;
        }
        let start = self.next;
        self.next += pages;
        Run { start, pages }
    }
}
