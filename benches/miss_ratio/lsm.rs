//! A log-structured merge tree: flushes and compactions in long runs, beside point reads that prefer recent data.

use super::trace::{Trace, Zipf};

/// A level with this many runs is merged into the next level.
const RUNS_PER_LEVEL: usize = 4;
/// Levels. The runs of the last level are merged into one run of the same size.
const LEVELS: usize = 4;
/// Point reads per page of a flush.
const READS_PER_PAGE: u32 = 3;

/// A sorted run: a file that is written once.
#[derive(Clone, Copy, Debug)]
struct Run {
    start: u32,
    pages: u32,
}

/// Size-tiered compaction. Runs are allocated sequentially, and wrap around at the end of the image.
#[derive(Debug)]
struct Tree {
    levels: [Vec<Run>; LEVELS],
    /// Where the next run is written.
    next: u32,
    /// Pages of a run when it is flushed from memory.
    flush_pages: u32,
    popularity: Zipf,
}

/// The accesses of one tree.
pub fn lsm(trace: &mut Trace) {
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
    /// Writes a full memory table as a new run of the first level, and merges the levels that are then full.
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

    /// Merges the runs of a level into one run: reads them in parallel and writes the result.
    fn merge(&mut self, level: usize, trace: &mut Trace) {
        let sources = std::mem::take(&mut self.levels[level]);
        let total: u32 = sources.iter().map(|run| run.pages).sum();
        // The last level keeps only the newest versions.
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

    /// Reads a key from a random run: a Bloom filter usually excludes the runs without the key.
    fn point_read(&self, trace: &mut Trace) {
        let runs: Vec<Run> = self.levels.iter().flat_map(|level| level.iter().rev()).copied().collect();
        if runs.is_empty() {
            return;
        }
        let run = runs[trace.below(runs.len() as u32) as usize];
        // Each read starts with the run's index.
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
