//! The command line.

use std::path::PathBuf;

use clap::{Parser, Subcommand};

/// Benchmarks genblk. Without a command it runs a short smoke test.
#[derive(Debug, Parser)]
pub struct Arguments {
    #[command(subcommand)]
    pub command: Option<BenchCommand>,
    /// Passed by cargo bench.
    #[arg(long, global = true, hide = true)]
    pub bench: bool,
}

#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// Compare genblk with other servers and the limit of this machine
    Compare(Compare),
    /// Render RESULTS.md and results.svg from results.toml, without measuring
    #[command(visible_alias = "chart")]
    Render,
    /// Measure how the cost grows with sizes and counts
    Scale {
        /// Sweeps to measure, by name; all by default
        #[arg(long, value_delimiter = ',')]
        sweeps: Vec<String>,
    },
    /// Run the copy server (used by the other commands)
    #[command(hide = true)]
    ServeLimit { socket: PathBuf, disk_bytes: u64, buffer_bytes: usize },
}

#[derive(Debug, Default, clap::Args)]
pub struct Compare {
    /// Rows to measure, by key; all by default
    #[arg(long, value_delimiter = ',')]
    pub rows: Vec<String>,
    /// Columns to measure, by name ("genblk", "limit", "device" ...); all by default
    #[arg(long, value_delimiter = ',')]
    pub only: Vec<String>,
    /// Number of rounds; each round measures every column once
    #[arg(long, default_value_t = 5)]
    pub rounds: usize,
    /// Factor on the time and data of each job
    #[arg(long, default_value_t = 1.0)]
    pub scale: f64,
    /// Another server: 'name=command with {sock} {img} {queues}'; may be repeated
    #[arg(long)]
    pub peer: Vec<String>,
    /// Another build of genblk to compare with, interleaved
    #[arg(long)]
    pub base: Option<PathBuf>,
}
