//! \[4\] An image with its cache (NetBSD UVM's `uvm_object`). It translates the cache's operations into requests to the
//! store, and the store's events into calls of the cache.
//!
//! A cached image outlives connections: the cache is warm for a guest that reboots and for a front-end that reconnects.
//! It belongs to one writable device, or to any number of read-only ones. Each worker thread uses it through a
//! [`WorkerPort`] with a store queue of its own; a port reaps the operations that it submitted. A notice about another
//! worker's request goes through that worker's mailbox.

mod image_size;
mod memory;
mod port;
mod report;
#[cfg(test)]
mod tenure_tests;
mod token_recorder;
mod translate;

pub use port::WorkerPort;

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use log::{error, info, warn};

use crate::arena::{Arena, RANGE_SLOTS};
use crate::cache::{FrameMemory, Notice, PageCache, Settings, Stats};
use crate::fault_injection::{PlantedBug, planted};
use crate::store::{Backing, Limits};
use crate::tenure::record::CacheLocation;
use crate::units::{FrameId, FrameRecord, OpKind, SECTOR_BYTES, SectorMask, SectorSpan, Tick, counted};
use crate::waker::Waker;

use memory::{Mailboxes, MemoryKeeper};
use port::{wake, worker_of};
use token_recorder::TokenRecorder;

impl FrameMemory for Arc<Arena> {
    fn copy_sectors(&self, source: FrameId, target: FrameId, mask: SectorMask) {
        Arena::copy_sectors(self, source, target, mask);
    }

    fn zero_sectors(&self, frame: FrameId, mask: SectorMask) {
        Arena::zero_sectors(self, frame, mask);
    }

    fn publish(&self, frame: FrameId, record: FrameRecord) {
        Arena::publish(self, frame, record);
    }

    fn use_frames(&self, count: u32) {
        Arena::set_frames_in_use(self, count as usize);
    }

    fn zero_slots(&self) -> usize {
        RANGE_SLOTS
    }

    fn note_zero(&self, slot: usize, span: Option<SectorSpan>) {
        Arena::note_zero(self, slot, span);
    }

    fn changed_slots(&self) -> usize {
        RANGE_SLOTS
    }

    fn note_changed(&self, slot: usize, span: Option<SectorSpan>) {
        Arena::note_changed(self, slot, span);
    }
}

/// Notices to a worker from other workers, and its waker.
#[derive(Debug)]
struct Mailbox {
    notices: Mutex<Vec<Notice>>,
    /// Number of the last change of the usable memory that this worker has applied.
    memory_seen: AtomicU64,
    waker: Arc<Waker>,
}

/// A device that is attached to an image, or was.
#[derive(Debug)]
struct AttachedDevice {
    name: String,
    /// Number of its workers that use the image; 0 once the device is detached.
    ports: usize,
}

/// An image, its page cache, and the cache's memory.
#[derive(Debug)]
pub struct CachedImage {
    /// The name of the device for which it was opened; its log lines begin with it.
    name: String,
    cache: Mutex<PageCache>,
    /// Declared before the arena, which it uses until it is dropped itself.
    memory: Mutex<MemoryKeeper>,
    arena: Arc<Arena>,
    backing: Arc<dyn Backing>,
    mailboxes: Arc<Mailboxes>,
    /// The devices that are attached to the image. A detached one's place is free.
    devices: Mutex<Vec<AttachedDevice>>,
    /// Number of devices that are attached at present.
    device_count: AtomicUsize,
    /// Number of rings that run without an inflight region, of all workers of all devices: a request on one of them may
    /// need operations that any worker has submitted to the store.
    pub untracked_rings: AtomicU32,
    /// The time of tick 0.
    opened: Instant,
    /// Records the image's change token.
    token_recorder: TokenRecorder,
}

impl CachedImage {
    /// An image with a cache in `arena`, which has memory for the number of frames in `settings`. Restores the pages
    /// that the previous daemon left in the arena. Log lines begin with `name`.
    pub fn new(name: &str, backing: Arc<dyn Backing>, arena: Arena, settings: Settings) -> Arc<Self> {
        let arena = Arc::new(arena);
        let frames = settings.frames as usize;
        let mut cache = PageCache::new(settings, Box::new(Arc::clone(&arena)));
        for run in backing.data_runs() {
            cache.record_data(SectorSpan::new(run.start / SECTOR_BYTES, (run.end - run.start) / SECTOR_BYTES));
        }
        let (pages, dirty) = cache.restore(arena.records(), arena.pending_zeroes(), arena.changed_ranges());
        if pages > 0 {
            let pages = counted(u64::from(pages), "cached page");
            info!("{name}: restored {pages} ({dirty} dirty) left by the previous daemon");
        }
        let token_recorder = TokenRecorder::start(name, &backing, &arena);
        let mailboxes = Arc::new(Mailboxes::default());
        let memory = Mutex::new(MemoryKeeper::start(name, &arena, &mailboxes, frames, true));
        Arc::new(Self {
            name: name.to_owned(),
            token_recorder,
            cache: Mutex::new(cache),
            untracked_rings: AtomicU32::new(0),
            memory,
            arena,
            backing,
            mailboxes,
            devices: Mutex::default(),
            device_count: AtomicUsize::new(0),
            opened: Instant::now(),
        })
    }

    /// The cache's memory.
    pub fn arena(&self) -> &Arc<Arena> {
        &self.arena
    }

    /// The image's properties and capabilities.
    pub fn limits(&self) -> &Limits {
        self.backing.limits()
    }

    /// See [`Arena::heartbeat`]; to be called several times a second, because an image that is slow executes changes
    /// long after their begin. Does not wait.
    pub fn heartbeat(&self) {
        self.arena.heartbeat();
    }

    /// Whether the image is on a server.
    pub fn is_remote(&self) -> bool {
        self.backing.is_remote()
    }

    /// The cache's statistics.
    pub fn stats(&self) -> Stats {
        let stats = self.lock().stats();
        Stats { metadata_bytes: stats.metadata_bytes + self.arena.overhead_bytes() as u64, ..stats }
    }

    /// The name of the cache's file no longer leads to the file: from now on the cache does not outlive the daemon.
    /// `marker` is an empty file that replaces it, or the reason why there is none. Does not wait: if a worker is using
    /// the cache, returns `marker` as the error.
    ///
    /// # Errors
    /// The marker, to be passed again.
    pub fn lose_cache_file(&self, marker: Result<File, String>) -> Result<(), Result<File, String>> {
        let Ok(cache) = self.cache.try_lock() else { return Err(marker) };
        let (name, file) = (&self.name, self.arena.file().map_or_else(String::new, |file| format!(" {file}")));
        let replaced = marker.and_then(|marker| {
            let marker = self.arena.received_marker(marker).ok_or("the cache has no file")?;
            self.arena.replace_lost_file(marker, !cache.is_durable()).map_err(|e| e.to_string())
        });
        drop(cache);
        error!(
            "{name}: the cache file{file} was removed or replaced while the daemon runs (by rm, or RemoveIPC= of \
             logind); the cache no longer survives a crash; stop the daemon with SIGTERM and start it again to \
             restore that"
        );
        if let Err(cause) = replaced {
            self.arena.record_unmarked_loss();
            self.record_cache_loss(cause);
        }
        Ok(())
    }

    /// Records in the image that its cache does not survive, because no marker could be created (`cause`). It uses a
    /// separate thread, because the image may not respond.
    fn record_cache_loss(&self, cause: String) {
        let (name, backing) = (self.name.clone(), Arc::clone(&self.backing));
        let record = move || {
            if !backing.lose_cache().is_ok_and(|is_recorded| is_recorded) {
                error!(
                    "{name}: cannot record that the cache file is gone ({cause}): a crash of the daemon would lose \
                     writes unnoticed; stop the daemon with SIGTERM and start it again"
                );
            }
        };
        if let Err(e) = thread::Builder::new().name("lost cache".to_owned()).spawn(record) {
            error!("{}: cannot record that the cache file is gone: {e}", self.name);
        }
    }

    /// Microseconds since the image was opened.
    pub fn now(&self) -> Tick {
        Tick::from_ns(u64::try_from(self.opened.elapsed().as_nanos()).expect("584 years"))
    }

    /// Ends the tenure if all data is on the image, and records the image's change token for the next daemon.
    ///
    /// => The record comes before the removal of the cache file: otherwise the next daemon would report the cache as
    ///    missing.
    fn end_tenure(&mut self) {
        let cache = self.cache.get_mut().unwrap_or_else(PoisonError::into_inner);
        if cache.ops_in_flight() > 0 {
            // The image hangs. Do not wait for it: the next daemon finds the cache by the record, and the ledger lists
            // the data that may be missing.
            self.arena.keep_on_drop(true);
            return;
        }
        self.token_recorder.end();
        self.arena.remove_guest_formats(self.backing.recorded_formats());
        // The ledger is more precise than the cache: its clean pages include those that an earlier daemon has synced.
        let is_written = if self.arena.cache_location() == CacheLocation::Memory {
            cache.is_durable()
        } else {
            !self.arena.holds_unwritten()
        };
        // A loss that the guest has not yet detected must be reported to it by the next daemon.
        let is_over = is_written && !self.arena.has_data_loss();
        match is_over.then(|| self.backing.end_tenure()) {
            // This process has no capabilities. The supervisor wrote the record of the tenure's start, and ends the
            // tenure when it learns that the cache is released.
            Some(Err(e)) if e.kind() == io::ErrorKind::PermissionDenied && self.arena.is_kept_elsewhere() => {
                self.arena.release();
            }
            Some(Err(e)) => {
                warn!("{}: cannot mark the image clean ({e}); its cache is kept", self.name);
                self.arena.keep_on_drop(true);
            }
            Some(Ok(is_recorded)) => {
                if is_recorded {
                    self.arena.set_recorded(true, true);
                }
                self.arena.release();
            }
            None => {}
        }
        if let Some(token) = self.backing.change_token() {
            self.arena.record_token_now(token);
        }
    }

    fn lock(&self) -> MutexGuard<'_, PageCache> {
        // A thread that panicked in the cache found an invariant violated: the cache must not be used after that.
        self.cache.lock().expect("no thread panics with the cache locked")
    }

    /// Wakes all workers of all devices that use the image.
    pub fn wake_workers(&self) {
        let mailboxes = self.mailboxes.lock();
        wake(&self.name, &mailboxes);
    }

    /// Moves notices that are not for `worker` to the mailboxes of their workers. Returns those mailboxes, whose
    /// workers the caller wakes.
    #[inline]
    fn route_notices(&self, worker: u64, notices: &mut Vec<Notice>) -> Vec<Arc<Mailbox>> {
        if notices.iter().all(|notice| worker_of(notice) == worker) {
            return Vec::new();
        }
        self.post_to_others(worker, notices)
    }

    fn post_to_others(&self, worker: u64, notices: &mut Vec<Notice>) -> Vec<Arc<Mailbox>> {
        let mut recipients: Vec<Arc<Mailbox>> = Vec::new();
        let mailboxes = self.mailboxes.lock();
        notices.retain(|notice| {
            let other = worker_of(notice);
            if other == worker {
                return true;
            }
            if planted(PlantedBug::NoticeDropped) {
                return false;
            }
            let mailbox = &mailboxes[usize::try_from(other).expect("16 bits")];
            mailbox.notices.lock().expect("no thread panics with a mailbox locked").push(*notice);
            if !recipients.iter().any(|known| Arc::ptr_eq(known, mailbox)) {
                recipients.push(Arc::clone(mailbox));
            }
            false
        });
        recipients
    }

    /// The oldest operation of the cache that has not completed, if there is one: its kind, its sectors, and how long
    /// it has been in flight. `None` while a worker uses the cache.
    pub fn oldest_op(&self) -> Option<Option<(OpKind, SectorSpan, Duration)>> {
        let oldest = self.cache.try_lock().ok()?.oldest_op();
        let age = |since| Duration::from_micros(self.now().since_us(since));
        Some(oldest.map(|(kind, span, since)| (kind, span, age(since))))
    }

    /// Like [`CachedImage::stats`], and whether the cache is frozen; `None` while a worker uses the cache.
    pub fn try_stats_and_freeze(&self) -> Option<(Stats, bool)> {
        let cache = self.cache.try_lock().ok()?;
        Some((cache.stats(), cache.is_frozen()))
    }

    /// Whether some completed writes are not on the image or not durable; `true` while a worker uses the cache.
    pub fn has_unstable_data(&self) -> bool {
        self.cache.try_lock().map_or(true, |cache| !cache.is_durable())
    }
}

impl Drop for CachedImage {
    fn drop(&mut self) {
        self.end_tenure();
    }
}
