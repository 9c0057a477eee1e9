//! What is to be run.

use std::path::PathBuf;

use clap::{Parser, Subcommand};

/// The benchmark; without a command, a short part of it that shows that it still works.
#[derive(Debug, Parser)]
pub struct Arguments {
    #[command(subcommand)]
    pub command: Option<What>,
    /// Cargo says so.
    #[arg(long, global = true, hide = true)]
    pub bench: bool,
}

#[derive(Debug, Subcommand)]
pub enum What {
    /// genblk against its peers and the limit
    Compare(Compare),
    /// How the cost grows with sizes and numbers
    Scale {
        /// Parts to measure, by name; all without
        #[arg(long, value_delimiter = ',')]
        parts: Vec<String>,
    },
    /// The bare server (started by the others)
    #[command(hide = true)]
    ServeLimit { socket: PathBuf, disk_bytes: u64, buffer_bytes: usize },
}

#[derive(Debug, Default, clap::Args)]
pub struct Compare {
    /// Rows to measure, by name; all without
    #[arg(long, value_delimiter = ',')]
    pub rows: Vec<String>,
    /// Who is measured, by name ("genblk", "limit", "device" ...); all without
    #[arg(long, value_delimiter = ',')]
    pub who: Vec<String>,
    /// How often everybody is measured
    #[arg(long, default_value_t = 5)]
    pub rounds: usize,
    /// How long, in parts of the usual time
    #[arg(long, default_value_t = 1.0)]
    pub scale: f64,
    /// Another server: 'name=command with {sock} {img} {queues}'
    #[arg(long)]
    pub peer: Vec<String>,
}
