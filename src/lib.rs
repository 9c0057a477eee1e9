//! genblk: a vhost-user daemon that serves virtio-blk disks to virtual machines, with a page cache of its own.
//!
//! Read the modules in this order and you follow a request from the socket to the disk and back.

/// The command line: a configuration file, or one device in options.
pub mod cli;
/// What the operator asks for, checked whole before anything starts.
pub mod config;
/// The log: one line a record on standard error.
pub mod logging;

pub mod arena;
pub mod cache;
pub mod error;
#[cfg(test)]
mod sim;
pub mod store;
pub mod units;
pub mod virtio;
