//! The benchmark against other servers, and against the machine's limit: `make bench`, `make bench-scale`.
//!
//! `rows.rs` is the table of what is measured and what is to be reached; `compare.rs` runs it; `report.rs` and `chart.rs`
//! say what came of it. `load.rs` is the one client, over the queues of `guest.rs` (a vhost-user socket) and `direct.rs`
//! (the device itself). `servers.rs` starts who is compared, `limit.rs` is the bare server among them, and `medium.rs` and
//! `throttle.rs` make the disks. `scale.rs` shows how the cost grows.
#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    missing_debug_implementations,
    reason = "numbers here are measured and shown, and chosen by the rows"
)]

mod arguments;
mod chart;
mod compare;
mod direct;
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

use arguments::{Arguments, Compare, What};
use compare::{Entrant, Measured};
use medium::Media;
use rows::Row;
use servers::Contestant;

/// The part of the image that the short run uses.
const SMOKE_BYTES: u64 = 16 << 20;

fn main() -> ExitCode {
    // "cargo test" runs this too, without "--bench" and with filters of its own.
    let by_test = !std::env::args().any(|arg| arg == "--bench" || arg == "serve-limit");
    let done = if by_test { smoke() } else { run(&Arguments::parse()) };
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
        Some(What::Compare(options)) => compare_all(options),
        Some(What::ServeLimit { socket, disk_bytes, buffer_bytes }) => {
            limit::serve(socket, *disk_bytes, *buffer_bytes).map_err(|e| e.to_string())
        }
        Some(What::Scale { parts }) => scale_all(parts),
        None => smoke(),
    }
}

/// The comparison; the report is written only if nothing was left out.
fn compare_all(options: &Compare) -> Result<(), String> {
    let (all, chosen) = (rows::all(), chosen(&options.rows)?);
    let mut peers = Contestant::qemu();
    for peer in &options.peer {
        peers.push(Contestant::peer(peer)?);
    }
    let machine = machine::describe();
    let measured = measure(&chosen, &peers, options)?;
    let disturbance = report::disturbance(&measured);
    let (targets, medians) = (report::targets(&measured), report::medians(&measured));
    println!("{machine}{disturbance}\n{targets}\n{medians}\n{}", report::failures(&measured));
    if chosen.len() < all.len() || !options.who.is_empty() || options.rounds < 5 || options.scale < 1.0 {
        println!("benches/RESULTS.md is left as it was: that takes every row, everybody, 5 rounds and the whole time");
        return Ok(());
    }
    let folder = folder();
    let notes = fs::read_to_string(folder.join("bottlenecks.md")).unwrap_or_default();
    let write = |name: &str, text: String| fs::write(folder.join(name), text).map_err(|e| format!("{name}: {e}"));
    write("RESULTS.md", report::document(&measured, &machine, &notes))?;
    write("results.svg", chart::svg(&measured))
}

/// How the cost grows; the report is written only if nothing was left out.
fn scale_all(parts: &[String]) -> Result<(), String> {
    let machine = machine::describe();
    let text = scale::run(parts)?;
    println!("{text}");
    if parts.is_empty() { scale::write(&folder(), &machine, &text).map_err(|e| e.to_string()) } else { Ok(()) }
}

/// Where reports go.
fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("benches")
}

/// The rows of these names; all without any.
fn chosen(names: &[String]) -> Result<Vec<Row>, String> {
    let all = rows::all();
    let known: Vec<&str> = all.iter().map(|row| row.name).collect();
    if let Some(stray) = names.iter().find(|name| !known.contains(&name.as_str())) {
        return Err(format!("there is no row {stray}; there are {}", known.join(", ")));
    }
    let wanted = |row: &Row| names.is_empty() || names.iter().any(|name| name == row.name);
    Ok(all.into_iter().filter(wanted).collect())
}

fn measure(rows: &[Row], peers: &[Contestant], options: &Compare) -> Result<Vec<Measured>, String> {
    let Compare { who, rounds, scale, .. } = options;
    let takes_part = |entrant: &Entrant| who.is_empty() || who.iter().any(|name| name == entrant.name());
    let image = |e: std::io::Error| format!("no image in memory: {e}");
    let mut media = Media::new(rows::IMAGE_BYTES).map_err(image)?;
    let mut measured = Vec::new();
    for row in rows {
        media.fill(row.reach()).map_err(image)?;
        measured.push(compare::measure(&mut media, row, peers, takes_part, *rounds, *scale));
    }
    Ok(measured)
}

/// A moment of two rows, without a server of anybody else's: that the benchmark runs, not what it measures.
fn smoke() -> Result<(), String> {
    let rows = chosen(&["read-call".to_string(), "write-absorbed".to_string()])?;
    // A container may have no more memory for files than this.
    let rows: Vec<Row> = rows.into_iter().map(|row| row.within(SMOKE_BYTES)).collect();
    let options = Compare { rounds: 1, scale: 0.1, ..Compare::default() };
    let measured = measure(&rows, &[], &options)?;
    let (failures, table) = (report::failures(&measured), report::targets(&measured));
    println!("{table}{failures}");
    let written = report::document(&measured, &machine::describe(), "");
    let whole = rows.iter().all(|row| written.contains(row.title)) && chart::svg(&measured).ends_with("</svg>\n");
    let judged = measured.iter().all(|row| row.verdict(&row.row.targets[0]).is_some_and(|(ratio, _)| ratio > 0.0));
    if failures.is_empty() && whole && judged {
        Ok(())
    } else {
        Err("the benchmark does not work any more".to_string())
    }
}
