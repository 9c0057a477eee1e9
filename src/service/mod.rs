//! A device with all that serves it: image, cache, socket and threads, put together from its configuration and taken apart
//! in order.

use std::collections::HashMap;
use std::fs;
use std::os::fd::{FromRawFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use log::{error, info};

use crate::arena::Arena;
use crate::cache::{ErrorPolicy, PolicyKind, Settings, Stats};
use crate::cached_image::CachedImage;
use crate::config::{self, Allocate, CacheConfig, CacheMode, DeviceConfig, Engine, Policy, Socket};
use crate::device::control::Workers;
use crate::device::{self, Device};
use crate::error::{Error, ErrorKind, Result};
use crate::image_id::ImageId;
use crate::recover;
use crate::store::file::{self, FileImage, OpenOptions};
use crate::store::{Backing, Limits};
use crate::systemd::ServiceManager;
use crate::units::{PAGE_BYTES, SECTOR_BYTES, counted, low_u32};
use crate::vhost::{Server, bind};
use crate::virtio::config_space::DiskParameters;
use crate::virtio::request::{Disk, serial};

/// How long the end waits for an image that fails to take what is dirty.
const LAST_WRITES: Duration = Duration::from_secs(10);

/// A device that is open and not yet served.
#[derive(Debug)]
pub struct Service {
    device: Arc<Device>,
    image: Arc<CachedImage>,
    socket: Bound,
    workers: u16,
    queue_size: u16,
    about: String,
}

/// A listening socket, and the path to take away at the end.
#[derive(Debug)]
struct Bound {
    listener: UnixListener,
    path: Option<PathBuf>,
}

impl Drop for Bound {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            // Somebody may have taken it away already.
            let _ = fs::remove_file(path);
        }
    }
}

impl Service {
    /// Opens a device's image, memory and socket. Read-only devices on one image share one cached image, which `images` keeps.
    /// `manager` may have what a predecessor's cache held, and may be asked to keep this one.
    ///
    /// # Errors
    /// What is wrong with the image or the socket, or a want of memory; nothing has been changed then.
    pub fn open(
        config: &DeviceConfig,
        images: &mut HashMap<ImageId, Arc<CachedImage>>,
        manager: &Arc<ServiceManager>,
    ) -> Result<Self> {
        let engine = match config.engine {
            Engine::Auto => file::IoEngine::Auto,
            Engine::IoUring => file::IoEngine::Uring,
            Engine::Threads => file::IoEngine::Threads,
        };
        let (read_only, direct) = (config.read_only, config.direct);
        let options = OpenOptions { read_only, engine, direct, lock_patience: recover::LOCK_PATIENCE };
        let image = FileImage::open(&config.image, &options)?;
        let identity = image.identity();
        let io = if image.direct() { "O_DIRECT" } else { "buffered" };
        let service = match images.get(&identity).filter(|_| read_only) {
            Some(cached) => Self::of(config, Arc::clone(cached), io)?,
            None => {
                let settings = settings(&config.cache, image.limits());
                let arena = recover::arena_for(config, &image, settings.frames as usize, manager)?;
                Self::of(config, CachedImage::new(&config.name, image, arena, settings), io)?
            }
        };
        if read_only {
            images.insert(identity, Arc::clone(&service.image));
        }
        Ok(service)
    }

    /// A device over an image that is open already, whatever it is; its cache goes with this process.
    ///
    /// # Errors
    /// As [`Service::open`].
    pub fn with_image(config: &DeviceConfig, image: Arc<dyn Backing>) -> Result<Self> {
        let settings = settings(&config.cache, image.limits());
        let arena = Arena::anonymous(settings.frames as usize)?;
        Self::of(config, CachedImage::new(&config.name, image, arena, settings), "as given")
    }

    /// One more read-only device on the same image, with the same cache.
    ///
    /// # Errors
    /// [`ErrorKind::Socket`] for its socket.
    pub fn sharing_image_of(&self, config: &DeviceConfig) -> Result<Self> {
        Self::of(config, Arc::clone(&self.image), "as given")
    }

    fn of(config: &DeviceConfig, image: Arc<CachedImage>, io: &str) -> Result<Self> {
        let device = device_of(config, &image);
        let about = format!(
            "{}: {} on {}, {} bytes{}, {io}, cache {} bytes {}",
            config.name,
            config.image.display(),
            config.socket,
            image.limits().size_bytes,
            if config.read_only { " read-only" } else { "" },
            config.cache.size_bytes,
            config.cache.mode,
        );
        let socket = open_socket(&config.socket)?;
        Ok(Self { device, image, socket, workers: config.workers, queue_size: config.queue_size, about })
    }

    /// Starts the device's threads.
    ///
    /// # Errors
    /// [`ErrorKind::System`] when the host refuses a thread or a descriptor.
    pub fn start(self) -> Result<Running> {
        let Self { device, image, socket, workers, queue_size, about } = self;
        let (controls, threads): (Vec<_>, Vec<_>) =
            (0..workers).map(|_| device::spawn(&device, &image)).collect::<Result<Vec<_>>>()?.into_iter().unzip();
        let workers = Arc::new(Workers::new(controls));
        let listener = socket.listener.try_clone().map_err(|e| system("cannot copy a descriptor", e))?;
        let server = Arc::new(Server::new(Arc::clone(&device), Arc::clone(&workers), queue_size, listener)?);
        // Before anybody can attach, so that the log is in order.
        info!("{about}");
        let serving = Arc::clone(&server);
        let acceptor = std::thread::Builder::new()
            .name(format!("accept {}", device.name))
            .spawn(move || serving.serve())
            .map_err(|e| system("cannot start a thread", e))?;
        image.arena().keep_on_drop(false);
        Ok(Running { _socket: socket, server, device, workers, threads, acceptor: Some(acceptor), image })
    }
}

/// A device that is served.
///
/// => Dropped in this order: who waits for the image's lock is to find the socket and the ledger free when it gets it.
#[derive(Debug)]
pub struct Running {
    _socket: Bound,
    server: Arc<Server>,
    device: Arc<Device>,
    workers: Arc<Workers>,
    threads: Vec<JoinHandle<()>>,
    /// `None`: it has ended.
    acceptor: Option<JoinHandle<()>>,
    image: Arc<CachedImage>,
}

impl Running {
    /// What the device's cache did and holds.
    pub fn stats(&self) -> Stats {
        self.image.stats()
    }

    /// The operator says that the image is well again.
    pub fn resume(&self) {
        self.workers.resume();
    }

    /// Ends the front-end's connection and takes no other; [`Running::quiesce`] waits for that.
    pub fn stop_accepting(&self) {
        self.server.stop();
    }

    /// As [`Running::stop_accepting`]; when it returns, every ring has answered what it took, and none runs.
    ///
    /// # Errors
    /// [`ErrorKind::System`] when the thread that should have seen to that has panicked.
    pub fn quiesce(&mut self) -> Result<()> {
        self.stop_accepting();
        let accepted = self.acceptor.take().map_or(Ok(()), JoinHandle::join);
        accepted.map_err(|_| self.panicked("accept"))
    }

    fn panicked(&self, what: &str) -> Error {
        Error::new(ErrorKind::System, format!("{}: the {what} thread has panicked", self.device.name))
    }

    /// Ends the device: everything is written and its threads are gone.
    ///
    /// # Errors
    /// [`ErrorKind::Image`] when not everything could be written.
    pub fn shutdown(self) -> Result<()> {
        self.finish(write_everything)
    }

    /// Ends the device for a successor, which takes the cache over as it is; where the cache can't outlive the daemon,
    /// this is [`Running::shutdown`].
    ///
    /// # Errors
    /// As [`Running::shutdown`].
    pub fn hand_over(self) -> Result<()> {
        let arena = self.image.arena();
        arena.keep_on_drop(true);
        if arena.file().is_some() { self.finish(|_, _, _| Ok(())) } else { self.shutdown() }
    }

    fn finish(mut self, last_writes: impl FnOnce(&str, &CachedImage, &Workers) -> Result<()>) -> Result<()> {
        let rested = self.quiesce();
        let name = &self.device.name;
        let written = last_writes(name, &self.image, &self.workers);
        self.workers.exit();
        for thread in std::mem::take(&mut self.threads) {
            thread.join().map_err(|_| self.panicked("worker"))?;
        }
        log_stats(name, &self.image.stats());
        info!("{name}: stopped");
        rested.and(written)
    }
}

/// Ends devices as `end` does.
///
/// => All are at rest before the threads of the first go: a device may wait for what another on its image is reading.
///
/// # Errors
/// The first of [`Running::quiesce`] and `end`; every device is ended all the same.
pub fn shutdown_all(mut devices: Vec<Running>, end: impl Fn(Running) -> Result<()>) -> Result<()> {
    devices.iter().for_each(Running::stop_accepting);
    let rested = devices.iter_mut().map(Running::quiesce).fold(Ok(()), Result::and);
    devices.into_iter().map(end).fold(rested, Result::and)
}

/// The last writes; an image that fails is asked again for a while.
fn write_everything(name: &str, image: &CachedImage, workers: &Workers) -> Result<()> {
    let until = Instant::now() + LAST_WRITES;
    // If the image was left alone after an error, this is the last chance.
    workers.resume();
    loop {
        let Err(fault) = workers.flush() else { return Ok(()) };
        if Instant::now() >= until {
            let pages = counted(image.stats().dirty_pages, "dirty page");
            let hint = image
                .arena()
                .file()
                .map_or_else(String::new, |file| format!("; they are kept in {file} {}", file.recovery_hint()));
            let context = format!("{name}: {pages} could not be written: {fault}{hint}");
            return Err(Error::new(ErrorKind::Image, context));
        }
        error!("{name}: the last write-back failed ({fault}); retrying");
        std::thread::sleep(Duration::from_millis(500));
    }
}

/// What the cache did, in a few lines.
fn log_stats(name: &str, stats: &Stats) {
    let mib = |pages: u64| (pages * PAGE_BYTES) >> 20;
    let reads = stats.read_hit_pages + stats.read_miss_pages;
    let percent = |part: u64, whole: u64| (part * 100).checked_div(whole).unwrap_or(0);
    info!(
        "{name}: reads: {reads} pages, {}% hits, {} from holes; {} store reads of {} MiB",
        percent(stats.read_hit_pages, reads),
        stats.read_hole_pages,
        stats.store_reads,
        stats.store_read_sectors >> 11,
    );
    info!(
        "{name}: read-ahead: {} MiB, {}% of it used",
        mib(stats.readahead_pages),
        percent(stats.readahead_used_pages, stats.readahead_pages),
    );
    let kib_per_cluster = stats.store_written_sectors / 2 / stats.store_writes.max(1);
    info!(
        "{name}: write-back: {} pages written by the guest, {} MiB to the store in {} clusters of {kib_per_cluster} KiB, \
         {} flushes, {} syncs, {} dirty pages left",
        stats.write_pages,
        stats.store_written_sectors >> 11,
        stats.store_writes,
        stats.flushes,
        stats.syncs,
        stats.dirty_pages,
    );
}

fn system(context: &str, e: std::io::Error) -> Error {
    Error::io(ErrorKind::System, context, e)
}

fn open_socket(socket: &Socket) -> Result<Bound> {
    match socket {
        Socket::Path(path) => Ok(Bound { listener: bind(path)?, path: Some(path.clone()) }),
        Socket::Fd(fd) => Ok(Bound { listener: inherited(*fd)?, path: None }),
    }
}

/// The listening socket that the operator passed to us.
fn inherited(fd: RawFd) -> Result<UnixListener> {
    let what = format!("descriptor {fd} is no listening socket");
    let mut listens: libc::c_int = 0;
    let mut len = libc::socklen_t::try_from(size_of_val(&listens)).expect("4 bytes");
    let into = (&raw mut listens).cast();
    // SAFETY: getsockopt writes at most `len` bytes to `listens`, and fails on a descriptor that is no open socket.
    if unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_ACCEPTCONN, into, &raw mut len) } < 0 {
        return Err(Error::io(ErrorKind::Socket, what, std::io::Error::last_os_error()));
    }
    if listens == 0 {
        return Err(Error::new(ErrorKind::Socket, what + ": listen() was not called on it"));
    }
    // SAFETY: the descriptor is open; the operator passed it to us and nobody else in this process uses it.
    let listener = unsafe { UnixListener::from_raw_fd(fd) };
    match listener.local_addr() {
        Ok(_) => Ok(listener),
        Err(e) => Err(Error::io(ErrorKind::Socket, what, e)),
    }
}

/// The shape of a device's cache.
fn settings(cache: &CacheConfig, limits: &Limits) -> Settings {
    let pages = |bytes: u64| u32::try_from(bytes / PAGE_BYTES).unwrap_or(u32::MAX);
    let frames = pages(cache.size_bytes);
    let retain = cache.mode != CacheMode::None;
    let io_pages = (limits.io_max_bytes / 4096).min(u32::from(limits.segments_max)).clamp(1, 256);
    Settings {
        frames,
        image_sectors: limits.size_bytes / SECTOR_BYTES,
        block_sectors: u8::try_from(limits.block_bytes / 512).expect("a block is 512 to 4096 bytes"),
        can_map: limits.can_map,
        sparse: limits.sparse,
        cluster_pages_max: io_pages,
        retain,
        policy: match cache.policy {
            Policy::S3Fifo => PolicyKind::S3Fifo,
            Policy::Lru => PolicyKind::Lru,
        },
        readahead_pages_max: if retain { pages(cache.readahead_max_bytes) } else { 0 },
        flush_target_us: u64::from(cache.flush_target_ms) * 1000,
        dirty_pages_max: low_u32(u64::from(frames) * u64::from(cache.dirty_max_percent) / 100),
        dirty_age_us: u64::from(cache.dirty_age_max_ms) * 1000,
        allocate: cache.allocate == Allocate::OnWrite,
        on_error: on_error(cache.on_error),
        on_full: on_error(cache.on_full),
        hold_us: u64::from(cache.hold_max_ms) * 1000,
    }
}

fn on_error(policy: config::OnError) -> ErrorPolicy {
    match policy {
        config::OnError::Report => ErrorPolicy::Report,
        config::OnError::Hold => ErrorPolicy::Hold,
        config::OnError::Stop => ErrorPolicy::Stop,
    }
}

/// The virtio-blk device of a configuration.
fn device_of(config: &DeviceConfig, image: &CachedImage) -> Arc<Device> {
    let limits = image.limits();
    let parameters = DiskParameters {
        capacity_sectors: limits.size_bytes / SECTOR_BYTES,
        block_bytes: 512,
        physical_block_bytes: limits.physical_block_bytes,
        optimal_io_bytes: limits.optimal_io_bytes,
        discard_granularity_bytes: limits.discard_granularity,
        num_queues: config.num_queues,
        read_only: config.read_only,
        can_discard: limits.can_discard,
        can_zero: limits.can_zero,
        zero_may_unmap: limits.can_zero,
    };
    let disk = Disk {
        capacity_sectors: parameters.capacity_sectors,
        read_only: config.read_only,
        can_discard: limits.can_discard,
        can_zero: limits.can_zero,
        serial: serial(&config.serial),
    };
    let writeback = config.cache.mode == CacheMode::Writeback;
    Device::new(config.name.clone(), Arc::clone(image.arena()), disk, parameters, writeback, config.poll_us)
}
