//! genblk: a vhost-user daemon that serves virtio-blk disks to virtual machines, with a page cache of its own.
//!
//! Read the modules in this order and you follow a request from the socket to the disk and back.

/// What the operator says: the command line, and what follows from it.
pub mod cli;
/// What the operator asks for, checked whole before anything starts.
pub mod config;
/// The log: one line a record on standard error.
pub mod logging;

/// The process: opens, starts, waits, ends in order.
pub mod daemon;
/// What a daemon that is gone has left in memory.
pub mod recover;
/// A device with all that serves it.
pub mod service;
/// The socket, and what front-ends say on it.
pub mod vhost;
/// The guest's side: its rings, its requests, its memory. Trusts nothing.
pub mod virtio;

/// The memory behind frames.
pub mod arena;
/// The page cache, without I/O.
pub mod cache;
/// An image with its cache.
pub mod cached_image;
/// Where a request meets the cache.
pub mod device;
/// The backing image.
pub mod store;
/// Wakes a worker thread.
pub mod waker;

/// System calls that std does not wrap.
pub(crate) mod sys;

/// The service manager that started the daemon.
pub mod systemd;

/// The identity of an image.
pub mod image_id;

/// One error type.
pub mod error;
/// The words that every layer shares.
pub mod units;

#[cfg(test)]
#[path = "../tests/common/prng.rs"]
#[allow(dead_code, reason = "shared with the tests under tests/, which use more of it")]
mod prng;
#[cfg(test)]
mod sim;
