//! A served device, until it ends.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use log::{error, info};

use super::handle::ServiceHandle;
use super::stats::log_stats;
use crate::cache::Stats;
use crate::cached_image::CachedImage;
use crate::counters::snapshot::Snapshot;
use crate::device::Device;
use crate::device::control::Workers;
use crate::error::{Error, ErrorKind, Result};
use crate::listener::BoundSocket;
use crate::store::DRAIN_MAX;
use crate::units::counted;
use crate::vhost::Server;

/// How long a device that is ending retries its last flush on a failing image.
const LAST_FLUSH_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a device that leaves its cache to the next daemon waits for the image's operations in flight.
const HAND_OVER_DRAIN_MAX: Duration = Duration::from_secs(1);
/// The pause between two attempts.
const LAST_FLUSH_RETRY: Duration = Duration::from_millis(500);

/// A served device.
///
/// => Fields are dropped in this order, the image last: a daemon that waits for the image's lock must find the socket
///    and the cache file free when it gets the lock.
#[derive(Debug)]
pub struct Running {
    pub(super) _bound: Option<BoundSocket>,
    pub(super) server: Arc<Server>,
    pub(super) device: Arc<Device>,
    pub(super) workers: Arc<Workers>,
    pub(super) threads: Vec<JoinHandle<()>>,
    /// The thread that accepts front-ends; `None` once it has ended.
    pub(super) acceptor: Option<JoinHandle<()>>,
    pub(super) image: Arc<CachedImage>,
    pub(super) last_shrink: Arc<AtomicU64>,
}

impl Running {
    /// The statistics and the contents of the device's cache.
    pub fn stats(&self) -> Stats {
        self.image.stats()
    }

    /// The counters of the device's workers.
    pub fn counters(&self) -> Snapshot {
        Snapshot::read(&self.device.counters)
    }

    /// A handle that does not keep the device alive, for a thread that must not wait for it.
    pub fn handle(&self) -> ServiceHandle {
        ServiceHandle {
            server: Arc::downgrade(&self.server),
            workers: Arc::downgrade(&self.workers),
            image: Arc::downgrade(&self.image),
            device: Arc::downgrade(&self.device),
            last_shrink: Arc::clone(&self.last_shrink),
        }
    }

    /// Retries failed operations: the operator has resumed the image.
    pub fn resume(&self) {
        self.workers.resume();
    }

    /// Closes the front-end's connection and accepts no other. Does not wait; [`Running::quiesce`] does.
    pub fn stop_accepting(&self) {
        self.server.stop();
    }

    /// As [`Running::stop_accepting`], and waits until every ring has completed its requests in flight and stopped.
    ///
    /// # Errors
    /// [`ErrorKind::System`] when the accepting thread has panicked.
    pub fn quiesce(&mut self) -> Result<()> {
        // Rings that stop complete their requests, which may wait for the end of a freeze.
        self.workers.close_freezes();
        self.stop_accepting();
        let ended = self.acceptor.take().map_or(Ok(()), JoinHandle::join);
        ended.map_err(|_| self.panicked("accept"))
    }

    fn panicked(&self, thread: &str) -> Error {
        Error::new(ErrorKind::System, format!("{}: the {thread} thread has panicked", self.device.name))
    }

    /// Ends the device: flushes everything to the image and joins the threads.
    ///
    /// => Devices that share an image are all quiesced before the first of them ends: one may wait for a page that
    ///    another is reading.
    ///
    /// # Errors
    /// [`ErrorKind::Image`] when a dirty page could not be written; [`ErrorKind::System`] when a thread has panicked.
    pub fn shutdown(self) -> Result<()> {
        self.finish(LastFlush::Required)
    }

    /// Ends the device and leaves its cache unchanged for the next daemon. A volatile cache is flushed instead, as by
    /// [`Running::shutdown`].
    ///
    /// # Errors
    /// As [`Running::shutdown`].
    pub fn hand_over(self) -> Result<()> {
        let arena = self.image.arena();
        let outlives_daemon = arena.file().is_some();
        arena.keep_on_drop(outlives_daemon);
        self.finish(if outlives_daemon { LastFlush::Skipped } else { LastFlush::Required })
    }

    fn finish(mut self, last_flush: LastFlush) -> Result<()> {
        let quiesced = self.quiesce();
        let name = &self.device.name;
        let (flushed, timeout) = match last_flush {
            LastFlush::Required => (flush_everything(name, &self.image, &self.workers), DRAIN_MAX),
            // Pages in flight are dirty in the ledger, so the next daemon writes them again, after the kernel has
            // completed the operations and released the image's lock.
            LastFlush::Skipped => (Ok(()), HAND_OVER_DRAIN_MAX),
        };
        self.workers.exit(timeout);
        for thread in std::mem::take(&mut self.threads) {
            thread.join().map_err(|_| self.panicked("worker"))?;
        }
        log_stats(name, &self.image.stats());
        info!("{name}: stopped");
        quiesced.and(flushed)
    }
}

/// Whether a device that ends writes its dirty pages to the image.
#[derive(Clone, Copy, Debug)]
enum LastFlush {
    Required,
    Skipped,
}

/// Flushes all dirty pages to the image, and retries for a while if the image fails.
fn flush_everything(name: &str, image: &CachedImage, workers: &Workers) -> Result<()> {
    let until = Instant::now() + LAST_FLUSH_TIMEOUT;
    // Write-back may have been stopped after an error; this is its last chance.
    workers.resume();
    loop {
        let Err(fault) = workers.flush() else { return Ok(()) };
        if workers.has_ended() && !image.has_unstable_data() {
            return Ok(());
        }
        if workers.has_ended() || Instant::now() >= until {
            let pages = match image.stats().dirty_pages {
                0 => "data in flight".to_owned(),
                pages => counted(pages, "dirty page"),
            };
            let hint = image
                .arena()
                .file()
                .map_or_else(String::new, |file| format!("; the cache stays in {file}: {}", file.recovery_hint()));
            let context = format!("{name}: could not write {pages} to the image ({fault}){hint}");
            return Err(Error::new(ErrorKind::Image, context));
        }
        error!("{name}: the final flush failed ({fault}); retrying");
        std::thread::sleep(LAST_FLUSH_RETRY);
    }
}
