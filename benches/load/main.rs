//! The benchmark against other servers and the limit of the machine: `make bench`, `make bench-scale`.
//!
//! - `rows.rs` is the table of rows with their targets. `compare.rs` measures them.
//! - `figures.rs` computes the figures and keeps them in `results.toml`. `report.rs` and `chart.rs` render them.
//! - `load.rs` is the load generator. Its queues are `guest.rs` (a vhost-user socket) and `direct.rs` (the device).
//! - `servers.rs` starts the servers; one of them is the copy server of `limit.rs`. `medium.rs` and `throttle.rs` set
//!   up the disks.
//! - `scale.rs` measures how the cost grows.
#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    missing_debug_implementations,
    reason = "the numbers are measured and displayed, or small constants of the rows"
)]

mod arguments;
mod chart;
mod compare;
mod direct;
mod figures;
mod guest;
mod job;
mod limit;
mod load;
mod machine;
mod medium;
mod pattern;
mod queue;
mod report;
mod rows;
mod scale;
mod servers;
mod session;
mod throttle;

#[path = "../../tests/common/prng.rs"]
#[allow(dead_code, reason = "shared with the tests, which use more of it")]
mod prng;
#[path = "../../tests/common/wait.rs"]
#[allow(dead_code, reason = "shared with the tests, which use more of it")]
mod wait;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;

use arguments::{Arguments, BenchCommand, Compare};
use compare::{Others, Participant, RowSamples};
use figures::{Figures, GENBLK, RowResult};
use medium::Media;
use rows::{Against, Row};
use servers::ServerSpec;

/// The part of the image that the smoke test uses.
const SMOKE_BYTES: u64 = 16 << 20;

fn main() -> ExitCode {
    // "cargo test" runs this, too: without "--bench", and with its own filters.
    let smoke_test = !std::env::args().any(|arg| arg == "--bench" || arg == "serve-limit");
    let done = if smoke_test { smoke() } else { run(&Arguments::parse()) };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            eprintln!("bench: {reason}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<(), String> {
    match &arguments.command {
        Some(BenchCommand::Compare(options)) => compare_all(options),
        Some(BenchCommand::Render) => render(),
        Some(BenchCommand::ServeLimit { socket, disk_bytes, buffer_bytes }) => {
            limit::serve(socket, *disk_bytes, *buffer_bytes).map_err(|e| e.to_string())
        }
        Some(BenchCommand::Scale { sweeps }) => scale_all(sweeps),
        None => smoke(),
    }
}

/// Runs the comparison. Writes the report only if nothing was left out.
fn compare_all(options: &Compare) -> Result<(), String> {
    let (all, chosen) = (rows::all(), chosen(&options.rows)?);
    let mut others = Others { peers: ServerSpec::qemu(), base: options.base.as_deref().map(ServerSpec::genblk_base) };
    for peer in &options.peer {
        others.peers.push(ServerSpec::peer(peer)?);
    }
    let machine = machine::describe();
    let figures = Figures::new(machine, &measure(&chosen, others, options)?);
    let results = figures.results(&all)?;
    let (targets, medians) = (report::targets(&results), report::medians(&figures.columns, &results));
    let about = report::bullets(&figures.machine) + &report::bullets(&[figures.disturbance.describe()]);
    println!("{about}\n{targets}\n{medians}\n{}", report::not_measured(&results));
    println!("{}", report::compared_with_base(&results));
    let is_partial = chosen.len() < all.len() || !options.only.is_empty() || options.rounds < 5 || options.scale < 1.0;
    if is_partial || options.base.is_some() {
        println!(
            "benches/RESULTS.md is unchanged: only a run of all rows and columns, 5 rounds and full length, without a \
             base, writes it"
        );
        return Ok(());
    }
    write("results.toml", &figures.to_text())?;
    render()
}

/// Renders RESULTS.md and results.svg from results.toml.
fn render() -> Result<(), String> {
    let figures = Figures::read(&directory().join("results.toml"))?;
    let rows = rows::all();
    let results = figures.results(&rows)?;
    let notes = fs::read_to_string(directory().join("bottlenecks.md")).unwrap_or_default();
    write("RESULTS.md", &report::document(&figures, &results, &notes))?;
    write("results.svg", &chart::svg(&results))
}

/// Measures how the cost grows. Writes the report only if nothing was left out.
fn scale_all(sweeps: &[String]) -> Result<(), String> {
    let machine = machine::describe();
    let text = scale::run(sweeps)?;
    println!("{text}");
    if sweeps.is_empty() { write("SCALE.md", &scale::document(&machine, &text)) } else { Ok(()) }
}

fn write(name: &str, text: &str) -> Result<(), String> {
    fs::write(directory().join(name), text).map_err(|e| format!("{name}: {e}"))
}

/// The directory of the reports.
fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("benches")
}

/// The rows with these keys, or all without keys.
fn chosen(keys: &[String]) -> Result<Vec<Row>, String> {
    let all = rows::all();
    let known: Vec<&str> = all.iter().map(|row| row.key).collect();
    if let Some(stray) = keys.iter().find(|key| !known.contains(&key.as_str())) {
        return Err(format!("unknown row {stray}; the rows are {}", known.join(", ")));
    }
    let wanted = |row: &Row| keys.is_empty() || keys.iter().any(|key| key == row.key);
    Ok(all.into_iter().filter(wanted).collect())
}

fn measure(rows: &[Row], mut others: Others, options: &Compare) -> Result<Vec<RowSamples>, String> {
    let Compare { only, rounds, scale, .. } = options;
    let takes_part = |participant: &Participant| only.is_empty() || only.iter().any(|name| name == participant.name());
    let failed = |e: std::io::Error| format!("cannot create the image in memory: {e}");
    let mut media = Media::new(rows::IMAGE_BYTES).map_err(failed)?;
    if rows.iter().any(|row| row.job.flushes()) {
        compare::probe_flush(&mut media, &mut others.peers);
    }
    let mut samples = Vec::new();
    for row in rows {
        media.fill(row.image_end()).map_err(failed)?;
        samples.push(compare::measure(&mut media, row, &others, takes_part, *rounds, *scale));
    }
    Ok(samples)
}

/// Runs two rows for a moment, without peers, and with genblk itself as the base. Shows that the benchmark works, from
/// the servers to the rendered reports.
fn smoke() -> Result<(), String> {
    let rows = chosen(&["read-poll".to_string(), "write-absorbed".to_string()])?;
    // A container may have no more shared memory than this.
    let rows: Vec<Row> = rows.into_iter().map(|row| row.clipped_to(SMOKE_BYTES)).collect();
    let options = Compare { rounds: 1, scale: 0.1, ..Compare::default() };
    let base = ServerSpec::genblk_base(Path::new(env!("CARGO_BIN_EXE_genblk")));
    let others = Others { peers: Vec::new(), base: Some(base) };
    let figures = Figures::new(machine::describe(), &measure(&rows, others, &options)?);
    let figures = Figures::from_text(&figures.to_text())?;
    let results = figures.results(&rows)?;
    let not_measured = report::not_measured(&results);
    println!("{}{not_measured}{}", report::targets(&results), report::compared_with_base(&results));
    let (document, svg) = (report::document(&figures, &results, ""), chart::svg(&results));
    let complete = rows.iter().all(|row| document.contains(row.title)) && svg.ends_with("</svg>\n");
    let judged = |result: &RowResult<'_>| result.verdict(&result.row.targets[0]).is_some_and(|(ratio, _)| ratio > 0.0);
    // Its disk process takes part, and the base does.
    let has_cpu_time = results[0].median(GENBLK, 1).is_some_and(|us| us > 0.0);
    let has_base = results.iter().all(|result| result.ratio(0, Against::Base).is_some());
    if not_measured.is_empty() && complete && has_cpu_time && has_base && results.iter().all(judged) {
        Ok(())
    } else {
        Err("the smoke test has no figures, or its report is incomplete".to_string())
    }
}
