//! How often genblk's replacement policy misses, against LRU, CLOCK, ARC and OPT: `make bench-policy`.
//!
//! The workloads are those of `miss_ratio/workloads.rs`, at a tenth of a million pages and a million accesses: each as it
//! is (raw), and behind a guest whose own LRU cache is as large as genblk's, or four times as large. What stands below is
//! the share of misses in percent, of the accesses that come through. All traces are made from fixed seeds, so that every
//! run finds the same.
//!
//! - No argument: measures, prints the table, and fails (exit status 1) if a demand of `miss_ratio/gates.rs` is not met.
//! - `--table`: the same, and writes the table into this file.
//! - `--trace FILE`: the same table for a trace of yours; lines of (time, op, sector, count): `miss_ratio/trace_file.rs`.
//!
//! ```text
//!                     |                           raw|                      guest x1|                      guest x4
//! size, % of footprint|   0.1     1     5    10    20|   0.1     1     5    10    20|   0.1     1     5    10    20
//! zipf 0.6     genblk |  95.4  87.7  76.0  67.7  56.2|  96.6  91.7  86.2  82.9  79.2| 100.0 100.0 100.0 100.0  99.4
//!              LRU    |  99.2  94.7  83.9  75.0  61.6| 100.0  99.9  99.4  98.4  95.8| 100.0 100.0 100.0 100.0 100.0
//!              CLOCK  |  99.2  94.3  83.1  74.0  60.5| 100.0  99.9  99.4  98.4  95.8| 100.0 100.0 100.0 100.0 100.0
//!              ARC    |  95.4  87.7  76.2  68.1  57.0|  99.0  94.5  89.7  86.1  82.2| 100.0 100.0 100.0 100.0 100.0
//!              OPT    |  90.6  76.2  57.4  46.4  33.9|  91.3  80.4  67.9  60.8  52.5|  92.9  86.7  80.8  77.5  78.7
//! zipf 0.8     genblk |  84.1  69.5  54.6  46.6  37.3|  89.1  84.5  81.1  79.7  78.1| 100.0 100.0 100.0 100.0 100.0
//!              LRU    |  93.4  79.9  63.6  53.8  42.0|  99.9  99.6  98.6  97.3  94.2| 100.0 100.0 100.0 100.0 100.0
//!              CLOCK  |  92.8  78.9  62.4  52.7  40.9|  99.9  99.6  98.6  97.3  94.2| 100.0 100.0 100.0 100.0 100.0
//!              ARC    |  84.0  69.3  54.7  46.9  37.8|  89.2  85.3  83.4  82.5  81.9| 100.0 100.0 100.0 100.0 100.0
//!              OPT    |  78.1  59.4  41.3  32.4  23.2|  83.6  74.1  64.1  58.5  52.1|  89.7  85.0  80.2  78.0  83.0
//! zipf 0.99    genblk |  62.7  43.8  30.7  25.1  19.6|  82.1  79.2  77.8  78.1  82.5| 100.0 100.0 100.0 100.0 100.0
//!              LRU    |  74.3  53.0  37.1  29.9  22.5|  99.5  98.8  97.4  96.1  93.6| 100.0 100.0 100.0 100.0 100.0
//!              CLOCK  |  73.1  51.8  36.1  29.0  21.8|  99.5  98.8  97.4  96.0  93.5| 100.0 100.0 100.0 100.0 100.0
//!              ARC    |  62.4  43.6  30.7  25.2  19.7|  81.5  79.1  79.6  81.6  85.0| 100.0 100.0 100.0 100.0 100.0
//!              OPT    |  56.0  36.5  23.3  17.9  13.1|  75.1  68.2  61.2  57.6  54.9|  86.9  83.5  80.5  80.3  91.4
//! zipf 1.2     genblk |  38.3  20.6  12.5   9.8   7.6|  75.7  74.2  74.9  77.5  83.1| 100.0 100.0 100.0 100.0 100.0
//!              LRU    |  48.1  25.9  15.5  11.9   8.9|  98.0  97.2  96.0  95.2  93.9| 100.0 100.0 100.0 100.0 100.0
//!              CLOCK  |  46.7  25.1  15.0  11.5   8.6|  97.9  97.1  96.0  95.0  93.7| 100.0 100.0 100.0 100.0 100.0
//!              ARC    |  38.4  20.4  12.4   9.7   7.6|  75.1  73.6  76.4  81.9  89.3| 100.0 100.0 100.0 100.0 100.0
//!              OPT    |  32.6  16.6   9.5   7.3   5.6|  66.6  62.4  59.0  58.3  60.0|  84.5  82.2  81.7  84.3  97.1
//! pdsim cycle  genblk | 100.0 100.0 100.0 100.0 100.0| 100.0 100.0 100.0 100.0 100.0| 100.0 100.0 100.0 100.0 100.0
//!              LRU    | 100.0 100.0 100.0 100.0 100.0| 100.0 100.0 100.0 100.0 100.0| 100.0 100.0 100.0 100.0 100.0
//!              CLOCK  | 100.0 100.0 100.0 100.0 100.0| 100.0 100.0 100.0 100.0 100.0| 100.0 100.0 100.0 100.0 100.0
//!              ARC    | 100.0 100.0 100.0 100.0 100.0| 100.0 100.0 100.0 100.0 100.0| 100.0 100.0 100.0 100.0 100.0
//!              OPT    |  99.9  99.1  95.5  91.0  82.0|  99.9  99.1  95.5  91.0  82.0|  99.9  99.1  95.5  91.0  82.0
//! pdsim even   genblk |  99.9  99.0  95.0  90.0  80.2|  99.9  99.2  96.0  92.0  86.0| 100.0 100.0 100.0 100.0  99.0
//!              LRU    |  99.9  99.0  95.0  90.1  80.2| 100.0 100.0  99.9  99.5  97.9| 100.0 100.0 100.0 100.0 100.0
//!              CLOCK  |  99.9  99.0  95.0  90.0  80.2| 100.0 100.0  99.9  99.5  97.9| 100.0 100.0 100.0 100.0 100.0
//!              ARC    |  99.9  99.0  95.0  90.0  80.2| 100.0 100.0  99.2  96.6  88.2| 100.0 100.0 100.0 100.0 100.0
//!              OPT    |  95.8  86.4  70.7  59.8  46.0|  95.9  87.3  74.1  65.8  55.5|  96.2  89.5  82.3  78.3  74.3
//! pdsim root   genblk |  99.9  98.6  92.9  86.1  73.0|  99.9  98.9  94.1  88.7  81.5| 100.0 100.0 100.0 100.0  98.5
//!              LRU    |  99.9  98.7  93.7  87.5  75.4| 100.0 100.0  99.8  99.2  96.9| 100.0 100.0 100.0 100.0 100.0
//!              CLOCK  |  99.9  98.7  93.7  87.4  75.1| 100.0 100.0  99.8  99.2  96.9| 100.0 100.0 100.0 100.0 100.0
//!              ARC    |  99.9  98.6  93.1  86.5  74.0| 100.0  99.9  98.1  92.3  82.7| 100.0 100.0 100.0 100.0 100.0
//!              OPT    |  95.3  84.8  67.4  55.7  40.9|  95.4  85.9  71.6  62.7  52.2|  95.7  88.6  81.2  77.0  76.2
//! pdsim square genblk |  97.9  93.6  85.3  78.4  67.5|  98.5  95.9  90.4  86.3  81.7| 100.0 100.0 100.0 100.0  98.0
//!              LRU    |  99.7  97.6  90.7  83.6  71.5| 100.0 100.0  99.7  99.1  96.9| 100.0 100.0 100.0 100.0 100.0
//!              CLOCK  |  99.7  97.5  90.3  83.0  70.8| 100.0 100.0  99.7  99.1  96.9| 100.0 100.0 100.0 100.0 100.0
//!              ARC    |  98.0  93.7  85.6  78.9  68.4|  99.9  98.8  93.9  89.2  82.7| 100.0 100.0 100.0 100.0 100.0
//!              OPT    |  93.8  82.1  64.5  53.2  39.6|  94.1  84.1  70.8  62.9  53.4|  94.8  88.0  81.4  77.3  72.0
//! pdsim drift  genblk |  98.3  84.9  63.7  63.7  63.6| 100.0  98.8  99.9 100.0 100.0| 100.0 100.0 100.0 100.0 100.0
//!              LRU    |  98.3  84.9  63.7  63.6  63.6| 100.0  99.0  99.9 100.0 100.0| 100.0 100.0 100.0 100.0 100.0
//!              CLOCK  |  98.3  84.9  64.2  63.6  63.6| 100.0  99.0  99.9 100.0 100.0| 100.0 100.0 100.0 100.0 100.0
//!              ARC    |  98.3  85.3  65.4  65.3  65.3| 100.0  99.3  99.9 100.0 100.0| 100.0 100.0 100.0 100.0 100.0
//!              OPT    |  83.2  63.6  63.6  63.6  63.6|  84.5  74.9  99.9 100.0 100.0|  88.0  98.6 100.0 100.0 100.0
//! loops        genblk |  99.9  98.4  84.6  71.9  45.5|  99.9  99.8  96.3  91.6  76.0| 100.0 100.0 100.0 100.0 100.0
//!              LRU    | 100.0  98.7  84.8  78.8  54.3| 100.0 100.0 100.0 100.0  99.2| 100.0 100.0 100.0 100.0 100.0
//!              CLOCK  | 100.0  98.8  86.1  80.3  56.7| 100.0 100.0 100.0 100.0  99.2| 100.0 100.0 100.0 100.0 100.0
//!              ARC    |  99.9  98.3  83.5  75.8  52.3| 100.0 100.0 100.0 100.0  94.5| 100.0 100.0 100.0 100.0 100.0
//!              OPT    |  98.8  89.3  63.9  44.8  26.3|  98.8  90.5  74.6  55.9  46.4|  98.9  93.9  84.7  88.8  89.0
//! scan+hot set genblk |  86.4  68.3  41.1  38.6  38.5|  89.7  82.3  71.2  83.6  97.2| 100.0 100.0 100.0 100.0 100.0
//!              LRU    |  94.9  79.6  57.7  47.4  40.6|  99.9  99.3  97.9  98.3  99.7| 100.0 100.0 100.0 100.0 100.0
//!              CLOCK  |  94.5  78.5  55.8  45.1  39.4|  99.9  99.3  97.8  98.3  99.7| 100.0 100.0 100.0 100.0 100.0
//!              ARC    |  86.3  67.9  38.9  38.6  38.5|  89.5  81.9  72.9  88.0  98.9| 100.0 100.0 100.0 100.0 100.0
//!              OPT    |  78.6  56.1  38.5  37.0  34.0|  82.8  70.2  66.7  77.9  82.5|  88.8  84.0  93.6  92.1  84.4
//! oltp+journal genblk |  53.1  36.0  26.2  22.1  16.5|  61.6  50.3  43.4  40.1  32.9|  66.7  54.8  46.6  41.7  29.5
//!              LRU    |  58.9  43.1  31.5  26.3  21.0|  69.5  62.6  54.9  50.3  44.7|  70.5  62.6  53.0  46.7  32.0
//!              CLOCK  |  58.7  43.0  31.4  26.3  19.8|  69.1  62.2  54.6  50.0  40.9|  70.6  62.7  53.3  46.9  31.8
//!              ARC    |  56.8  40.7  29.5  24.7  17.4|  66.3  57.8  49.8  45.5  35.2|  69.8  61.5  51.8  39.5  30.3
//!              OPT    |  45.1  30.5  20.6  15.7  11.2|  52.5  43.4  35.1  29.2  23.1|  58.2  49.0  38.9  30.2  22.8
//! boot         genblk |  77.9  63.9  51.6  40.5  29.8|  87.9  85.9  82.9  77.8  71.1| 100.0 100.0 100.0 100.0 100.0
//!              LRU    |  87.3  70.9  54.8  46.9  37.8|  99.8  99.3  98.4  97.7  96.5| 100.0 100.0 100.0 100.0 100.0
//!              CLOCK  |  86.4  69.9  53.8  46.0  37.0|  99.8  99.3  98.3  97.7  96.5| 100.0 100.0 100.0 100.0 100.0
//!              ARC    |  77.8  63.4  50.0  41.1  31.5|  87.5  85.2  84.3  82.4  83.9| 100.0 100.0 100.0 100.0 100.0
//!              OPT    |  71.1  52.5  37.3  29.0  18.7|  81.4  73.7  66.0  60.7  46.5|  89.2  85.9  82.5  76.9  87.5
//! lsm          genblk |  78.5  66.9  52.2  45.0  39.6|  91.4  95.6  97.2  96.2  90.1| 100.0  99.9  99.4  98.9  99.2
//!              LRU    |  86.5  69.3  52.1  45.1  39.3|  99.7  98.2  97.5  97.1  96.7| 100.0 100.0  99.9  99.7  99.5
//!              CLOCK  |  85.8  68.6  52.5  46.9  40.6|  99.7  98.2  97.5  97.0  96.6| 100.0 100.0  99.9  99.7  99.5
//!              ARC    |  78.3  67.5  52.3  44.9  38.3|  90.5  96.3  96.9  94.9  91.9| 100.0  99.9  99.6  99.3  99.2
//!              OPT    |  72.4  52.9  38.0  32.7  27.1|  83.5  75.2  71.1  70.4  66.0|  90.8  88.5  86.0  83.8  80.3
//! recency      genblk |  76.8  63.0  53.8  50.4  50.0|  99.6  99.4  97.6  98.5 100.0| 100.0 100.0 100.0 100.0 100.0
//!              LRU    |  76.7  63.0  53.7  50.3  49.9|  99.7  99.5  99.5  99.5 100.0| 100.0 100.0 100.0 100.0 100.0
//!              CLOCK  |  76.5  62.6  53.3  50.5  49.9|  99.7  99.5  99.5  99.5 100.0| 100.0 100.0 100.0 100.0 100.0
//!              ARC    |  76.4  62.4  53.3  50.6  50.5|  99.7  99.5  98.7  98.8 100.0| 100.0 100.0 100.0 100.0 100.0
//!              OPT    |  62.5  50.0  47.9  45.9  41.9|  81.0  79.2  89.2  91.3  84.0|  89.1  90.6  96.0  92.0  84.0
//! ```

#[path = "miss_ratio/mod.rs"]
mod lab;
#[path = "../tests/common/prng.rs"]
#[allow(dead_code, reason = "shared with the tests, which use more of it")]
mod prng;

use std::fs::{self, File};
use std::io::BufReader;
use std::process::ExitCode;

use lab::workloads::{Scale, WORKLOADS};
use lab::{Cell, gates, measure, table, trace_file};

const SCALE: Scale = Scale { pages: 100_000, accesses: 1_000_000 };
/// Cache sizes in thousandths of the footprint.
const SIZES_PERMILLE: [u32; 5] = [1, 10, 50, 100, 200];
/// genblk may miss so many points more often than LRU. The policy can't know beforehand which of its two shares is right,
/// and pays for finding out: this is what that costs in a trace of ten footprints. (ARC, which has to find out as well,
/// pays up to three times as much.)
const BEHIND_LRU_MAX: f64 = 0.5;

fn main() -> ExitCode {
    // Cargo adds --bench to whatever the user says.
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let result = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => run(false),
        ["--table"] => run(true),
        ["--trace", path] => run_trace(path),
        _ => Err("usage: miss_ratio [--table | --trace FILE]".to_string()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(fault) => {
            eprintln!("{fault}");
            ExitCode::FAILURE
        }
    }
}

/// Measures every workload and judges what comes out.
fn run(write_table: bool) -> Result<(), String> {
    let mut cells: Vec<Cell> = Vec::new();
    for workload in WORKLOADS {
        eprintln!("measuring {}", workload.name);
        cells.extend(measure(workload.name, &workload.trace(SCALE), &SIZES_PERMILLE));
    }
    let table = table::render(&cells, &SIZES_PERMILLE);
    println!("{table}");
    if write_table {
        put_into_this_file(&table)?;
    }
    let gates = gates::judge(&cells, BEHIND_LRU_MAX);
    for gate in &gates {
        println!("{}  {}", if gate.holds { "holds" } else { "FAILS" }, gate.says);
    }
    if gates.iter().all(|gate| gate.holds) { Ok(()) } else { Err("a demand is not met".to_string()) }
}

/// Measures a trace of the user's.
fn run_trace(path: &str) -> Result<(), String> {
    let file = File::open(path).map_err(|e| format!("{path}: {e}"))?;
    let trace = trace_file::read(BufReader::new(file)).map_err(|fault| format!("{path}: {fault}"))?;
    println!("{} accesses to pages", trace.len());
    println!("{}", table::render(&measure("trace", &trace, &SIZES_PERMILLE), &SIZES_PERMILLE));
    Ok(())
}

/// Replaces the table at the head of this file.
fn put_into_this_file(table: &str) -> Result<(), String> {
    const OPEN: &str = "//! ```text\n";
    const CLOSE: &str = "//! ```\n";
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/miss_ratio.rs");
    let text = fs::read_to_string(path).map_err(|e| format!("{path}: {e}"))?;
    let (head, rest) = text.split_once(OPEN).ok_or("this file has no place for a table")?;
    let (_, tail) = rest.split_once(CLOSE).ok_or("the place for the table has no end")?;
    let lines: String = table.lines().map(|line| format!("//! {line}\n")).collect();
    fs::write(path, format!("{head}{OPEN}{lines}{CLOSE}{tail}")).map_err(|e| format!("{path}: {e}"))
}
