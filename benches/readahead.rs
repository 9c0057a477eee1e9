//! The benefit and cost of readahead: `make bench-policy`.
//!
//! Runs the page cache with several kinds of readers on simulated stores that have a latency and a bandwidth. Time is
//! simulated, so every run has the same results. Fails (exit status 1) if a requirement is not met; `--table` writes
//! the table into this file.
//!
//! - bandwidth: the guests' throughput, in percent of the store's bandwidth;
//! - coverage: the share of the guests' pages that readahead requested before the guests did;
//! - accuracy: the share of readahead's pages that guests used;
//! - late: the share of the guests' pages that readahead had requested, but that had not arrived yet;
//! - extra: pages that were read ahead and never used, in percent of the guests' pages.
//!
//! It also measures what a scan with readahead costs a hot set; benches/miss_ratio.rs does so without readahead.
//!
//! ```text
//! local store, %               bandwidth  coverage  accuracy      late     extra
//! 1 stream, 128 KiB                100.0     99.99     99.77     17.64      0.23
//! 1 stream, 4 KiB                  100.0    100.00     99.74      1.56      0.26
//! 8 streams, 128 KiB                99.4     99.95     99.36     51.17      0.64
//! 64 streams, 128 KiB               99.7     96.61     99.70     55.22      0.29
//! files of 16 MiB                   85.9     96.22     95.60     44.99      4.43
//! files of 1 MiB                    43.3     22.69     80.61     16.19      5.46
//! 1 stream, 3/4 speed               74.6     99.99     99.96      0.01      0.04
//! 1 stream, shuffled               100.0     99.98     99.74     82.65      0.26
//! strided                            7.4      0.00      0.00      0.00      0.00
//! random 4 KiB in 64 GiB            10.2      0.00      0.00      0.00      0.00
//! random 4 KiB in 4 GiB             12.2      0.00      0.00      0.00      0.00
//! random 4 KiB in 1 GiB             25.9      0.00     22.92      0.00      0.00
//! random 128 KiB in 64 GiB         100.3      0.00      0.00      0.00      0.02
//! random 128 KiB in 4 GiB          105.9      0.01      3.67      0.01      0.32
//! 2 streams + random                53.6     89.99     99.68     47.32      0.29
//!
//! remote store, %              bandwidth  coverage  accuracy      late     extra
//! 1 stream, 128 KiB                100.0     99.99     99.82     22.86      0.18
//! 1 stream, 4 KiB                   99.9    100.00     99.86      0.77      0.14
//! 8 streams, 128 KiB                99.1     99.78     99.08     40.46      0.93
//! 64 streams, 128 KiB               97.6     96.04     99.66     51.74      0.33
//! files of 16 MiB                   71.0     98.25     95.99     30.05      4.11
//! files of 1 MiB                    19.9     12.28     64.18      7.65      6.85
//! 1 stream, 3/4 speed               74.9     99.99     99.96      0.01      0.04
//! 1 stream, shuffled               100.0     99.98     99.85     80.30      0.15
//! strided                            2.6      0.00      0.00      0.00      0.00
//! random 4 KiB in 64 GiB             3.3      0.00      0.00      0.00      0.00
//! random 4 KiB in 4 GiB              4.0      0.00      0.00      0.00      0.00
//! random 4 KiB in 1 GiB              8.5      0.00     22.92      0.00      0.00
//! random 128 KiB in 64 GiB          92.4      0.00      0.00      0.00      0.02
//! random 128 KiB in 4 GiB          100.0      0.02      4.42      0.01      0.33
//! 2 streams + random                25.9     89.99     99.71     32.70      0.26
//! ```

#[allow(dead_code, reason = "shared with page_cost.rs, which needs no store")]
mod bare_cache;
#[path = "readahead/mod.rs"]
mod experiment;
mod policy_report;
#[path = "../tests/common/prng.rs"]
#[allow(dead_code, reason = "shared with the tests, which use more of it")]
mod prng;

use std::process::ExitCode;

use experiment::{STORES, judge, measure, table};

/// Pages that all readers of a pattern read together (4 GiB).
const PAGES: u64 = 1 << 20;

fn main() -> ExitCode {
    let arguments = policy_report::arguments();
    policy_report::exit_code(match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => run(false),
        ["--table"] => run(true),
        _ => Err("usage: readahead [--table]".to_string()),
    })
}

/// Measures every pattern on every store and judges the results.
fn run(write_table: bool) -> Result<(), String> {
    let measured = STORES.map(|store| (store, measure(store, PAGES)));
    let tables: Vec<String> = measured.iter().map(|(store, rows)| table(*store, rows)).collect();
    let tables = tables.join("\n");
    println!("{tables}");
    if write_table {
        policy_report::write_table_to("readahead.rs", &tables)?;
    }
    let gates: Vec<_> = measured.iter().flat_map(|(store, rows)| judge(*store, rows, PAGES)).collect();
    policy_report::print_verdicts(&gates)
}
