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
//! ```text
//! local store, %               bandwidth  coverage  accuracy      late     extra
//! 1 stream, 128 KiB                100.0     99.99     99.80     10.81      0.20
//! 1 stream, 4 KiB                  100.0    100.00     99.81      0.60      0.19
//! 8 streams, 128 KiB                99.8     99.95     99.77     10.57      0.23
//! 64 streams, 128 KiB               99.3     98.17     99.32     40.21      0.67
//! 1 stream, 3/4 speed               74.6     99.99     99.97      0.01      0.03
//! 1 stream, shuffled               100.0     99.98     99.69     83.60      0.31
//! strided                            9.1      0.00      0.00      0.00      0.00
//! random 4 KiB in 64 GiB            19.8      0.00      0.00      0.00      0.00
//! random 4 KiB in 4 GiB             21.0      0.00      0.00      0.00      0.00
//! random 4 KiB in 1 GiB             25.9      0.00     36.00      0.00      0.00
//! random 128 KiB in 64 GiB         100.3      0.00      0.00      0.00      0.04
//! random 128 KiB in 4 GiB          106.0      0.02      6.80      0.02      0.29
//! 2 streams + random                72.1     89.99     99.82      9.85      0.16
//!
//! remote store, %              bandwidth  coverage  accuracy      late     extra
//! 1 stream, 128 KiB                100.0     99.99     99.80     10.81      0.20
//! 1 stream, 4 KiB                   99.9    100.00     99.81      0.60      0.19
//! 8 streams, 128 KiB                99.8     99.95     99.77     10.57      0.23
//! 64 streams, 128 KiB               99.3     98.17     99.32     40.21      0.67
//! 1 stream, 3/4 speed               64.8     99.99     99.97      4.30      0.03
//! 1 stream, shuffled               100.0     99.98     99.69     83.60      0.31
//! strided                            3.2      0.00      0.00      0.00      0.00
//! random 4 KiB in 64 GiB             6.5      0.00      0.00      0.00      0.00
//! random 4 KiB in 4 GiB              6.9      0.00      0.00      0.00      0.00
//! random 4 KiB in 1 GiB              8.5      0.00     36.00      0.00      0.00
//! random 128 KiB in 64 GiB         100.3      0.00      0.00      0.00      0.04
//! random 128 KiB in 4 GiB          106.0      0.02      6.80      0.02      0.29
//! 2 streams + random                42.2     89.99     99.77      9.88      0.21
//! ```

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
    let gates: Vec<_> = measured.iter().flat_map(|(store, rows)| judge(*store, rows)).collect();
    policy_report::conclude(&gates)
}
