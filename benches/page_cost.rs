//! What the cache itself takes for a page: `make bench-page`.
//!
//! One thread, no store, no bytes: every operation ends well at once. What is left is the look-up, the states, the policy,
//! readahead, write-back and eviction. The median of the rounds is far steadier than a row of `make bench`, whose servers
//! share two processors with their client; so this tells what a change to the cache did, if both are measured in turn. On
//! the machine of RESULTS.md, in nanoseconds a page:
//!
//! ```text
//!                  cold read    hit in a row      random hit  write in a row    random write
//!    256 MiB            59.7             7.3            19.4           120.4           537.1
//!   4096 MiB           108.9            11.2            93.6           230.6          1488.4
//! ```

#![allow(clippy::cast_possible_truncation, clippy::cast_precision_loss, reason = "small constants, and times")]

mod bare_cache;
#[path = "../tests/common/prng.rs"]
#[allow(dead_code, reason = "shared with the tests, which use more of it")]
mod prng;

use std::time::Instant;

use bare_cache::{AtOnce, defaults};
use genblk::units::PageNo;
use prng::Prng;

/// 256 MiB and 4 GiB.
const FRAMES: [u32; 2] = [1 << 16, 1 << 20];
/// How often the cache goes into the image.
const IMAGE_CACHES: u64 = 4;
/// Pages of a request in a row (128 KiB).
const ROW_PAGES: u64 = 32;
/// Pages between two turns, in a row or not.
const TURN_PAGES: u64 = 32;
const ROUNDS: usize = 5;
const KINDS: [&str; 5] = ["cold read", "hit in a row", "random hit", "write in a row", "random write"];

fn main() {
    // "cargo test" runs this too, without "--bench": then it is to work, not to measure.
    let by_test = !std::env::args().any(|arg| arg == "--bench");
    let (divisor, rounds) = if by_test { (8, 1) } else { (1, ROUNDS) };
    println!("{:>10}{}", "", KINDS.map(|kind| format!("{kind:>16}")).concat());
    for frames in FRAMES.map(|frames| frames / divisor) {
        let measured: Vec<[f64; 5]> = (0..rounds).map(|_| measure(frames)).collect();
        let medians: Vec<String> = (0..KINDS.len()).map(|kind| format!("{:>16.1}", median(&measured, kind))).collect();
        println!("{:>10}{}", format!("{} MiB", frames >> 8), medians.concat());
    }
}

fn median(rounds: &[[f64; 5]], kind: usize) -> f64 {
    let mut values: Vec<f64> = rounds.iter().map(|round| round[kind]).collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Nanoseconds for a page, of each of [`KINDS`], in a new cache.
fn measure(frames: u32) -> [f64; 5] {
    let image = u64::from(frames) * IMAGE_CACHES;
    let mut cache = AtOnce::new(defaults(frames, image));
    let in_a_row =
        |first: u64, pages: u64| (first..first + pages).step_by(ROW_PAGES as usize).map(|page| (page, ROW_PAGES));
    let at_random = |first: u64, pages: u64| {
        let mut prng = Prng::new(1);
        (0..frames).map(move |_| (first + prng.below(pages), 1))
    };
    // What the cold reader has left in the cache, without what it read first and last of that.
    let (warm, warm_pages) = (image - u64::from(frames) / 2, u64::from(frames) / 4);
    let cold_read = time(&mut cache, AtOnce::read, in_a_row(0, image));
    let misses = cache.stats().read_miss_pages;
    let hit_in_a_row = time(&mut cache, AtOnce::read, in_a_row(warm, warm_pages));
    let random_hit = time(&mut cache, AtOnce::read, at_random(warm, warm_pages));
    assert_eq!(cache.stats().read_miss_pages, misses, "what is to be a hit is one");
    let write_in_a_row = time(&mut cache, AtOnce::write, in_a_row(0, image));
    let random_write = time(&mut cache, AtOnce::write, at_random(0, image));
    [cold_read, hit_in_a_row, random_hit, write_in_a_row, random_write]
}

/// Nanoseconds for a page when all of these `(first page, pages)` are asked for, a turn for every [`TURN_PAGES`].
fn time(cache: &mut AtOnce, ask: fn(&mut AtOnce, PageNo, u64), requests: impl Iterator<Item = (u64, u64)>) -> f64 {
    let (mut pages, mut since_turn) = (0, 0);
    let begin = Instant::now();
    for (first, count) in requests {
        ask(cache, PageNo(first), count);
        pages += count;
        since_turn += count;
        if since_turn >= TURN_PAGES {
            since_turn = 0;
            cache.turn();
        }
    }
    begin.elapsed().as_nanos() as f64 / pages as f64
}
