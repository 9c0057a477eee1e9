//! The statistics of a device's cache, logged when it stops: one line per subject.

use log::info;

use crate::cache::Stats;
use crate::units::{PAGE_BYTES, SECTOR_BYTES, counted};

/// Logs the statistics of the cache of device `name`.
pub(super) fn log_stats(name: &str, stats: &Stats) {
    info!("{name}: {}", reads(stats));
    info!("{name}: {}", readahead(stats));
    info!("{name}: {}", writeback(stats));
}

fn reads(stats: &Stats) -> String {
    let pages = stats.read_hit_pages + stats.read_miss_pages;
    format!(
        "reads: {}, {}% hits, {} in holes; {} MiB read from the image in {}",
        counted(pages, "page"),
        percent(stats.read_hit_pages, pages),
        stats.read_hole_pages,
        mib(stats.store_read_sectors * SECTOR_BYTES),
        counted(stats.store_reads, "operation"),
    )
}

fn readahead(stats: &Stats) -> String {
    let (read, used) = (stats.readahead_pages, stats.readahead_used_pages);
    format!("read-ahead: {} MiB, {}% used", mib(read * PAGE_BYTES), percent(used, read))
}

fn writeback(stats: &Stats) -> String {
    let bytes = stats.store_written_sectors * SECTOR_BYTES;
    let kib_per_cluster = bytes / 1024 / stats.store_writes.max(1);
    let syncs = counted(stats.syncs, "sync");
    format!(
        "write-back: the guest wrote {}; {} MiB written to the image in {} of {kib_per_cluster} KiB on average, {}, \
         {syncs}, {} left",
        counted(stats.write_pages, "page"),
        mib(bytes),
        counted(stats.store_writes, "cluster"),
        match stats.flushes {
            1 => "1 flush".to_owned(),
            flushes => format!("{flushes} flushes"),
        },
        counted(stats.dirty_pages, "dirty page"),
    )
}

fn mib(bytes: u64) -> u64 {
    bytes >> 20
}

/// `part` in percent of `whole`, rounded down; 0 if `whole` is 0.
fn percent(part: u64, whole: u64) -> u64 {
    (part * 100).checked_div(whole).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_lines_have_the_right_numbers_and_plurals() {
        let stats = Stats {
            read_hit_pages: 3,
            read_miss_pages: 1,
            read_hole_pages: 1,
            store_reads: 1,
            store_read_sectors: 4096,
            readahead_pages: 512,
            readahead_used_pages: 128,
            write_pages: 1024,
            store_writes: 4,
            store_written_sectors: 8192,
            flushes: 2,
            syncs: 1,
            ..Stats::default()
        };
        assert_eq!(reads(&stats), "reads: 4 pages, 75% hits, 1 in holes; 2 MiB read from the image in 1 operation");
        assert_eq!(readahead(&stats), "read-ahead: 2 MiB, 25% used");
        let expected = "write-back: the guest wrote 1024 pages; 4 MiB written to the image in 4 clusters of 1024 KiB \
                        on average, 2 flushes, 1 sync, 0 dirty pages left";
        assert_eq!(writeback(&stats), expected);
    }

    #[test]
    fn statistics_of_an_idle_cache_do_not_divide_by_zero() {
        let stats = Stats::default();
        assert!(reads(&stats).contains("0 pages, 0% hits"));
        assert!(writeback(&stats).contains("0 clusters of 0 KiB"));
    }
}
