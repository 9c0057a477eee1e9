//! genblk: a vhost-user-blk server with its own page cache. ARCHITECTURE.md explains it; this is the map.
//!
//! The modules in the order in which a request passes them, from the socket to the disk. Each has its number in
//! brackets at its head:
//!
//! 1. [`vhost`]: the socket and the control plane. Messages of the front-end become commands to the workers: start and
//!    stop vrings, change guest memory.
//! 2. [`virtio`]: the guest's side, all of it untrusted. Virtqueues, descriptor chains parsed into requests,
//!    guest memory, configuration space.
//! 3. [`device`]: the workers. A turn takes requests from the vrings, admits them to the cache, copies their bytes and
//!    completes them. Read `worker.rs` first.
//! 4. [`cached_image`]: an image with its cache. Turns the cache's operations into store requests, and the store's
//!    events into calls of the cache; carries notices between workers.
//! 5. [`cache`]: the page cache, without I/O. Decides what is read, written, synced and evicted.
//! 6. [`store`]: the image: a raw file or block device, through io_uring or threads, or an export of an NBD server.
//!
//! Below that path:
//!
//! - [`arena`]: the memory of the frames, with the ledger by which a cache survives the daemon.
//! - `shared_memory`: stores to memory that outlives the process, so that tests can stop the daemon between any two.
//! - [`broker`]: queries of a confined thread to one that may access the host.
//! - [`waker`]: wakes a worker from another thread.
//! - [`counters`]: counters of a device's activity, for other processes to read.
//! - [`sandbox`]: the rights that each thread drops when it starts.
//! - `sync`: the atomics of the modules that `loom/` checks in every order.
//! - `sys`: system calls that std does not wrap.
//!
//! Around it, in the order in which a daemon starts:
//!
//! 1. [`logging`], [`cli`], [`config`]: the operator's configuration, checked completely before anything starts.
//!    [`check`] tells whether it could be served.
//! 2. [`supervisor`]: the first process. Opens devices in parallel, starts a disk process for each image and starts it
//!    again when it dies, waits for signals, and ends each device on its own. It does all that takes a path.
//! 3. [`recover`]: caches that an earlier daemon left. Restores them, or writes them to their images.
//! 4. [`listener`]: the sockets' files. [`systemd`]: notifies the service manager, and keeps memory with it.
//! 5. [`disk_protocol`]: the messages between the supervisor and a disk process; [`disk_stats`]: what the supervisor
//!    reads of a device at any moment.
//! 6. [`disk_process`]: one image and its devices, created from descriptors that the supervisor has opened.
//! 7. [`service`]: one device with everything that serves it.
//!
//! In addition, [`control`] lets other programs inspect and change the devices; [`client`] has the commands that use
//! it.
//!
//! Every layer uses [`units`] (pages, frames, sectors, epochs, faults) and [`error`]; [`image_id`] identifies images,
//! and [`tenure`] records which daemon last held an image for writing. `sim`, for tests, runs the cache, and the whole
//! daemon, in a simulated world; `fault_injection` lets it inject faults. `fuzzing` feeds arbitrary bytes to interfaces
//! that other parties control.

pub mod arena;
pub mod broker;
pub mod cache;
pub mod cached_image;
pub mod check;
pub mod cli;
pub mod client;
pub mod config;
pub mod control;
pub mod counters;
pub mod device;
pub mod disk_process;
pub mod disk_protocol;
pub mod disk_stats;
pub mod error;
pub(crate) mod fault_injection;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod image_id;
pub mod listener;
pub mod logging;
mod nbd_uri;
#[cfg(any(test, fuzzing))]
#[path = "../tests/common/prng.rs"]
#[allow(dead_code, reason = "shared with the tests under tests/, which use more of it")]
mod prng;
pub mod recover;
pub mod sandbox;
pub mod service;
pub(crate) mod shared_memory;
#[cfg(any(test, fuzzing))]
#[cfg_attr(not(test), allow(dead_code, reason = "fuzzers use only a part of it"))]
mod sim;
pub mod store;
pub mod supervisor;
pub(crate) mod sync;
pub(crate) mod sys;
pub mod systemd;
pub mod tenure;
pub mod units;
pub mod vhost;
pub mod virtio;
pub mod waker;
