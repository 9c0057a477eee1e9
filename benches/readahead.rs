//! What readahead is worth: `make bench-policy`.
//!
//! The page cache itself, with readers of several kinds over stores of which only latency and bandwidth are known; time
//! is simulated, so every run finds the same. Fails (exit status 1) if a demand is not met; `--table` writes the results
//! into this file.
//!
//! - bandwidth: what the guests read, in percent of what the store can do;
//! - coverage: of the pages that guests read, those that readahead had asked for;
//! - accuracy: of the pages that readahead brought, those that guests read;
//! - late: of the pages that guests read, those that readahead had asked for and that were not there yet;
//! - extra: pages that were read ahead and never asked for, in percent of the pages that guests read.
//!
//! And what a scan with readahead takes from a hot set, which benches/miss_ratio.rs measures without readahead.
//!
//! ```text
//! local store, %               bandwidth  coverage  accuracy      late     extra
//! 1 stream, 128 KiB                100.0     99.99     99.69     42.21      0.31
//! 1 stream, 4 KiB                  100.0    100.00     99.69     38.83      0.31
//! 8 streams, 128 KiB                98.9     97.72     98.73     85.27      1.26
//! 64 streams, 128 KiB               99.2     92.99     99.83     53.39      0.16
//! files of 16 MiB                   51.2     43.94     89.77     24.52      5.01
//! files of 1 MiB                    39.4      4.64     45.43      4.26      5.58
//! 1 stream, 3/4 speed               74.6     99.99     99.95      0.01      0.05
//! 1 stream, shuffled               100.0     99.98     99.69     84.02      0.31
//! strided                            7.4      0.00      0.00      0.00      0.00
//! random 4 KiB in 64 GiB            10.2      0.00      0.00      0.00      0.00
//! random 4 KiB in 4 GiB             12.2      0.00      0.00      0.00      0.00
//! random 4 KiB in 1 GiB             25.9      0.00     36.00      0.00      0.00
//! random 128 KiB in 64 GiB         100.3      0.00      0.00      0.00      0.04
//! random 128 KiB in 4 GiB          106.0      0.02      7.62      0.02      0.30
//! 2 streams + random                53.5     89.99     99.65     74.14      0.31
//!
//! remote store, %              bandwidth  coverage  accuracy      late     extra
//! 1 stream, 128 KiB                100.0     99.99     99.69     30.53      0.31
//! 1 stream, 4 KiB                   99.9    100.00     99.69     18.55      0.31
//! 8 streams, 128 KiB                98.8     98.20     98.81     85.58      1.18
//! 64 streams, 128 KiB               97.0     92.74     99.83     53.18      0.16
//! files of 16 MiB                   55.4     86.45     95.93     29.85      3.67
//! files of 1 MiB                    19.0      4.61     45.28      4.41      5.58
//! 1 stream, 3/4 speed               74.9     99.99     99.95      0.01      0.05
//! 1 stream, shuffled               100.0     99.97     99.69     81.69      0.31
//! strided                            2.6      0.00      0.00      0.00      0.00
//! random 4 KiB in 64 GiB             3.3      0.00      0.00      0.00      0.00
//! random 4 KiB in 4 GiB              4.0      0.00      0.00      0.00      0.00
//! random 4 KiB in 1 GiB              8.5      0.00     36.00      0.00      0.00
//! random 128 KiB in 64 GiB          92.4      0.00      0.00      0.00      0.04
//! random 128 KiB in 4 GiB          100.1      0.02      7.62      0.02      0.30
//! 2 streams + random                25.8     89.99     99.65     69.19      0.31
//! ```

#[allow(dead_code, reason = "shared with page_cost.rs, which needs no store")]
mod bare_cache;
#[path = "readahead/mod.rs"]
mod lab;
mod policy_report;
#[path = "../tests/common/prng.rs"]
#[allow(dead_code, reason = "shared with the tests, which use more of it")]
mod prng;

use std::process::ExitCode;

use lab::{STORES, judge, measure, table};

/// Pages that the readers of a pattern read together (4 GiB).
const PAGES: u64 = 1 << 20;

fn main() -> ExitCode {
    let arguments = policy_report::arguments();
    policy_report::exit(match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => run(false),
        ["--table"] => run(true),
        _ => Err("usage: readahead [--table]".to_string()),
    })
}

/// Measures every pattern on every store and judges what comes out.
fn run(write_table: bool) -> Result<(), String> {
    let measured = STORES.map(|store| (store, measure(store, PAGES)));
    let tables: Vec<String> = measured.iter().map(|(store, rows)| table(*store, rows)).collect();
    let tables = tables.join("\n");
    println!("{tables}");
    if write_table {
        policy_report::put_at_head_of("readahead.rs", &tables)?;
    }
    let gates: Vec<_> = measured.iter().flat_map(|(store, rows)| judge(*store, rows, PAGES)).collect();
    policy_report::conclude(&gates)
}
