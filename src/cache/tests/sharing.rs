//! Several devices on one image have fair shares of its cache.

use super::*;

const FRAMES: u64 = 4096;

/// Reads a page as `reader`. Returns whether it was in memory.
fn read_as(cache: &mut PageCache, reader: usize, page: u64) -> bool {
    cache.set_reader(reader);
    let hit = read(cache, page * 8, 8);
    if !hit {
        complete_all(cache, Tick::from_us(1));
    }
    hit
}

#[test]
fn a_reader_over_its_share_does_not_evict_another_readers_pages() {
    for policy in [PolicyKind::S3Fifo, PolicyKind::Lru] {
        let settings = Settings { policy, readahead_pages_max: 0, ..Settings::of(4096, 1 << 24) };
        let mut cache = cache_with(settings);
        cache.share(2);
        for page in 0..FRAMES / 4 {
            read_as(&mut cache, 1, page);
        }
        // Loops over twice the cache, so that each page is used again and again.
        for _ in 0..4 {
            for page in 0..2 * FRAMES {
                read_as(&mut cache, 0, FRAMES + page);
                read_as(&mut cache, 0, FRAMES + page.saturating_sub(FRAMES / 8));
            }
        }
        let hits = (0..FRAMES / 4).filter(|&page| read_as(&mut cache, 1, page)).count() as u64;
        assert!(hits > FRAMES / 4 * 99 / 100, "{policy:?}: {hits} of {} pages are left", FRAMES / 4);
    }
}

#[test]
fn a_shared_page_is_charged_to_the_reader_with_room_in_its_share() {
    let mut cache = cache_with(Settings { readahead_pages_max: 0, ..Settings::of(4096, 1 << 24) });
    cache.share(2);
    // Everything was read in for the first reader, and the second one uses some of it.
    for page in 0..FRAMES {
        read_as(&mut cache, 0, page);
    }
    (FRAMES / 2..FRAMES / 2 + 500).for_each(|page| assert!(read_as(&mut cache, 1, page)));
    for page in FRAMES..4 * FRAMES {
        read_as(&mut cache, 0, page);
    }
    let hits = (FRAMES / 2..FRAMES / 2 + 500).filter(|&page| read_as(&mut cache, 1, page)).count();
    assert!(hits > 490, "{hits} of 500 pages are left");
}

#[test]
fn a_departed_reader_releases_its_share() {
    let mut cache = cache_with(Settings { readahead_pages_max: 0, ..Settings::of(4096, 1 << 24) });
    cache.share(2);
    (0..FRAMES / 4).for_each(|page| _ = read_as(&mut cache, 1, page));
    let scan = |cache: &mut PageCache| {
        for _ in 0..4 {
            for page in 0..2 * FRAMES {
                read_as(cache, 0, FRAMES + page);
                read_as(cache, 0, FRAMES + page.saturating_sub(FRAMES / 8));
            }
        }
    };
    scan(&mut cache);
    cache.set_reader_present(1, false);
    scan(&mut cache);
    let left = (0..FRAMES / 4).filter(|&page| read_as(&mut cache, 0, page)).count() as u64;
    assert!(left < FRAMES / 40, "{left} pages of the detached reader");
    // A reader with the same number has a share again.
    cache.set_reader_present(1, true);
    (0..FRAMES / 4).for_each(|page| _ = read_as(&mut cache, 1, page));
    scan(&mut cache);
    let hits = (0..FRAMES / 4).filter(|&page| read_as(&mut cache, 1, page)).count() as u64;
    assert!(hits > FRAMES / 4 * 99 / 100, "{hits} of {} pages are left", FRAMES / 4);
}
