//! The CPU time of the page cache itself: `make bench-page`.
//!
//! One thread, no data, and a store whose operations succeed immediately. What remains is the lookup, the page states,
//! the policy, readahead, write-back and eviction. The medians are far steadier than the rows of `make bench`, whose
//! servers share two CPUs with their client, so they show the effect of a change to the cache: measure both versions
//! alternately. On the machine of RESULTS.md, in nanoseconds per page:
//!
//! ```text
//!                    cold read    sequential hit        random hit  sequential write      random write
//!    256 MiB              59.7               7.3              19.4             120.4             537.1
//!   4096 MiB             108.9              11.2              93.6             230.6            1488.4
//! ```

#![allow(clippy::cast_possible_truncation, clippy::cast_precision_loss, reason = "small constants, and times")]

mod bare_cache;
#[path = "../tests/common/prng.rs"]
#[allow(dead_code, reason = "shared with the tests, which use more of it")]
mod prng;

use std::time::Instant;

use bare_cache::InstantStoreCache;
use genblk::cache::Settings;
use genblk::units::{PageNo, SECTORS_PER_PAGE};
use prng::Prng;

/// 256 MiB and 4 GiB.
const FRAMES: [u32; 2] = [1 << 16, 1 << 20];
/// Size of the image in caches.
const IMAGE_CACHES: u64 = 4;
/// Pages of a sequential request (128 KiB).
const REQUEST_PAGES: u64 = 32;
/// Pages between two turns.
const TURN_PAGES: u64 = 32;
const ROUNDS: usize = 5;
const KINDS: [&str; 5] = ["cold read", "sequential hit", "random hit", "sequential write", "random write"];

fn main() {
    // "cargo test" runs this, too, without "--bench": a smoke test.
    let smoke_test = !std::env::args().any(|arg| arg == "--bench");
    let (divisor, rounds) = if smoke_test { (8, 1) } else { (1, ROUNDS) };
    println!("{:>10}{}", "", KINDS.map(|kind| format!("{kind:>18}")).concat());
    for frames in FRAMES.map(|frames| frames / divisor) {
        let measured: Vec<[f64; 5]> = (0..rounds).map(|_| measure(frames)).collect();
        let medians: Vec<String> = (0..KINDS.len()).map(|kind| format!("{:>18.1}", median(&measured, kind))).collect();
        println!("{:>10}{}", format!("{} MiB", frames >> 8), medians.concat());
    }
}

fn median(rounds: &[[f64; 5]], kind: usize) -> f64 {
    let mut values: Vec<f64> = rounds.iter().map(|round| round[kind]).collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Nanoseconds per page, for each of [`KINDS`], in a new cache.
fn measure(frames: u32) -> [f64; 5] {
    let image = u64::from(frames) * IMAGE_CACHES;
    let mut cache = InstantStoreCache::new(Settings::of(frames, image * SECTORS_PER_PAGE));
    let sequential = |first: u64, pages: u64| {
        (first..first + pages).step_by(REQUEST_PAGES as usize).map(|page| (page, REQUEST_PAGES))
    };
    let random = |first: u64, pages: u64| {
        let mut prng = Prng::new(1);
        (0..frames).map(move |_| (first + prng.below(pages), 1))
    };
    // The middle of what the cold read has left in the cache.
    let (cached, cached_pages) = (image - u64::from(frames) / 2, u64::from(frames) / 4);
    let cold_read = time(&mut cache, InstantStoreCache::read, sequential(0, image));
    let misses = cache.stats().read_miss_pages;
    let sequential_hit = time(&mut cache, InstantStoreCache::read, sequential(cached, cached_pages));
    let random_hit = time(&mut cache, InstantStoreCache::read, random(cached, cached_pages));
    assert_eq!(cache.stats().read_miss_pages, misses, "the reads are hits");
    let sequential_write = time(&mut cache, InstantStoreCache::write, sequential(0, image));
    let random_write = time(&mut cache, InstantStoreCache::write, random(0, image));
    [cold_read, sequential_hit, random_hit, sequential_write, random_write]
}

/// Nanoseconds per page for requests of `(first page, pages)`, with a turn after every [`TURN_PAGES`].
fn time(
    cache: &mut InstantStoreCache,
    submit: fn(&mut InstantStoreCache, PageNo, u64),
    requests: impl Iterator<Item = (u64, u64)>,
) -> f64 {
    let (mut pages, mut since_turn) = (0, 0);
    let begin = Instant::now();
    for (first, count) in requests {
        submit(cache, PageNo(first), count);
        pages += count;
        since_turn += count;
        if since_turn >= TURN_PAGES {
            since_turn = 0;
            cache.turn();
        }
    }
    begin.elapsed().as_nanos() as f64 / pages as f64
}
