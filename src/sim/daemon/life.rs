//! One life of the simulated daemon: real workers, a real cached image and a real arena in a file, on a simulated
//! image. It ends with a shutdown, or by a panic of [`DaemonDied`].

use std::cell::Cell;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use super::store::{SimulatedImage, sector_of, value_of};
use crate::arena::{AllowedOwner, ArenaFile, HEARTBEAT_AT};
use crate::cache::Settings;
use crate::cached_image::CachedImage;
use crate::config::{DeviceConfig, MemoryDir, Socket, Survive};
use crate::counters::worker::Counters;
use crate::device::Device;
use crate::device::budget::Budget;
use crate::device::control::Workers;
use crate::device::worker::Worker;
use crate::error::{Error, ErrorKind};
use crate::fault_injection::{DaemonDied, crash_after};
use crate::recover::{NOTHING_TO_COMPARE, arena_for};
use crate::store::file::{FileImage, OpenOptions};
use crate::store::{Backing, Limits, StoreQueue};
use crate::sys::xattr;
use crate::systemd::ServiceManager;
use crate::tenure::record::ATTRIBUTE;
use crate::tenure::token::wall_clock_ns;
use crate::units::{PAGE_BYTES, SECTOR_BYTES, SECTOR_SIZE, SECTORS_PER_PAGE, SectorSpan, Tick};
use crate::virtio::config_space::{DiscardLimits, DiskParameters};
use crate::virtio::request::{RequestLimits, serial};

/// VIRTIO_BLK_F_FLUSH and VIRTIO_BLK_F_CONFIG_WCE.
const CACHE_FEATURES: u64 = 1 << 9 | 1 << 11;

/// A directory in memory for the files of one world.
#[derive(Debug)]
pub(super) struct Directory {
    path: PathBuf,
    /// Number of times that a daemon has found a restored image.
    restores: Cell<u32>,
    /// The modification time of the image's file before it grew beyond the size that a daemon has served.
    modified: Cell<Option<SystemTime>>,
}

impl Directory {
    /// Creates a file `image` of this length in it, to which the arena belongs.
    pub fn new(image_bytes: u64) -> Self {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        // Paths have the same length: a header stores its path word by word, and the daemon may die between two words.
        let path = PathBuf::from(format!("/dev/shm/genblk-sim-{:010}-{number:06}", std::process::id()));
        fs::create_dir(&path).expect("a directory in shared memory");
        let directory = Self { path, restores: Cell::new(0), modified: Cell::new(None) };
        File::create(directory.image()).and_then(|file| file.set_len(image_bytes)).expect("an image");
        directory
    }

    /// Makes the image's file larger, as another process would.
    pub fn grow_image(&self, image_bytes: u64) {
        let modified = self.modified();
        self.open_image().set_len(image_bytes).expect("the file can grow");
        self.modified.set(self.modified.get().or(Some(modified)));
    }

    /// Restores the former length and modification time of the image's file.
    pub fn undo_growth(&self, image_bytes: u64) {
        let image = self.open_image();
        image.set_len(image_bytes).expect("the file can shrink");
        if let Some(modified) = self.modified.take() {
            image.set_modified(modified).expect("a file has times");
        }
    }

    /// A daemon serves the image: its growth is final.
    pub fn keep_growth(&self) {
        self.modified.set(None);
    }

    /// The modification time of the image's file.
    fn modified(&self) -> SystemTime {
        self.open_image().metadata().and_then(|metadata| metadata.modified()).expect("a file has times")
    }

    fn open_image(&self) -> File {
        File::options().write(true).open(self.image()).expect("the image's file")
    }

    fn image(&self) -> PathBuf {
        self.path.join("image")
    }

    /// Removes the arena, as a power cut would.
    pub fn remove_arena(&self) {
        let files = fs::read_dir(&self.path).expect("the directory");
        let arenas = files.flatten().map(|entry| entry.path()).filter(|path| path.is_dir());
        arenas.for_each(|path| fs::remove_dir_all(path).expect("a directory of the world"));
        // The record is then of an earlier boot; without a record, the next daemon treats it the same way.
        let image = File::options().read(true).write(true).open(self.image()).expect("the image's file");
        xattr::remove(&image, ATTRIBUTE).expect("the file system of the world has attributes");
    }

    /// The file of the arena that an earlier daemon left.
    fn arena(&self) -> Option<PathBuf> {
        let files = fs::read_dir(&self.path).expect("the directory");
        let directory = files.flatten().map(|entry| entry.path()).find(|path| path.is_dir())?;
        Some(fs::read_dir(directory).expect("the directory").flatten().next()?.path())
    }

    /// Writes the contents of the image to its file, which changes the file's times. For the next daemon the last
    /// daemon must appear to have done it: that daemon's last change gets the same time, however long the simulation
    /// paused.
    fn write_image(&self, bytes: &[u8]) {
        fs::write(self.image(), bytes).expect("the image's file");
        let Some(arena) = self.arena() else { return };
        let arena = File::options().read(true).write(true).open(arena).expect("a file of the world");
        let mut heartbeat = [0; 8];
        if arena.read_exact_at(&mut heartbeat, HEARTBEAT_AT).is_ok() && heartbeat != [0; 8] {
            arena.write_all_at(&wall_clock_ns().to_le_bytes(), HEARTBEAT_AT).expect("a file of the world");
        }
    }

    /// The number of frames of the arena that an earlier daemon left; 0 if it has no pages.
    fn arena_frames(&self) -> Option<u64> {
        let path = self.arena()?;
        let header = ArenaFile::open_existing(&path, AllowedOwner::Own)
            .and_then(|file| file.header())
            .expect("a file of the world");
        Some(header?.frames)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        // Anything that cannot be removed stays.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Time between a daemon's death and the restoring of a backup.
const RESTORED_LATER: Duration = Duration::from_secs(10);

/// Runs code of the daemon. An error: the daemon died in it.
pub(super) fn in_daemon<R>(act: impl FnOnce() -> R) -> Result<R, DaemonDied> {
    catch_unwind(AssertUnwindSafe(act)).map_err(|panic| match panic.downcast::<DaemonDied>() {
        Ok(_) => DaemonDied,
        Err(other) => resume_unwind(other),
    })
}

/// A worker, awake or asleep in epoll.
#[derive(Debug)]
struct Thread {
    worker: Worker,
    /// Its last turn had nothing to do. The guest may act before the worker sleeps.
    idle: bool,
    asleep: bool,
}

/// See the documentation of the module.
#[derive(Debug)]
pub(super) struct Life {
    // Dropped in this order, like service::Running.
    threads: Vec<Thread>,
    pub device: Arc<Device>,
    pub workers: Workers,
    pub cached: Arc<CachedImage>,
    held: Arc<HeldImage>,
}

/// The simulated image, with the tenure of the file that stands for it.
#[derive(Debug)]
struct HeldImage {
    image: SimulatedImage,
    file: Arc<FileImage>,
    /// The daemon has died: it records nothing more.
    is_dead: AtomicBool,
}

impl Backing for HeldImage {
    fn limits(&self) -> &Limits {
        self.image.limits()
    }

    fn attach(&self) -> Result<Box<dyn StoreQueue>, Error> {
        self.image.attach()
    }

    fn end_tenure(&self) -> io::Result<bool> {
        if self.is_dead.load(Ordering::Relaxed) { Ok(false) } else { self.file.end_tenure() }
    }
}

/// The configuration of a daemon.
#[derive(Clone, Copy, Debug)]
pub(super) struct Configuration<'a> {
    pub directory: &'a Directory,
    pub settings: &'a Settings,
    pub workers: usize,
    pub writeback: bool,
    pub survive: Survive,
    pub read_only: bool,
    pub budget: Budget,
    /// A backup was restored over the image since the last daemon.
    pub is_restored: bool,
    /// The image has grown since the last daemon.
    pub has_grown: bool,
    /// The disk has lost unsynced changes, and the image has the times that it had.
    pub has_forgotten: bool,
}

impl Life {
    /// Starts a daemon: recovers the cache that the previous one left. `None`: the start was rejected. That happens to
    /// a read-only daemon if there is a dirty cache, and to any daemon if there is a dirty cache of an image that was
    /// restored since, or that has grown since and has no page that proves that nothing else has changed.
    pub fn start(configuration: &Configuration, image: &SimulatedImage) -> Result<Option<Self>, DaemonDied> {
        let Configuration {
            directory,
            settings,
            workers,
            writeback,
            survive,
            read_only,
            budget,
            is_restored,
            has_grown,
            has_forgotten,
        } = configuration;
        let mut config = DeviceConfig::new("sim", Socket::Path(PathBuf::new()), directory.image());
        config.cache.size_bytes = u64::from(settings.frames) * PAGE_BYTES;
        config.cache.survive = *survive;
        config.read_only = *read_only;
        config.cache.memory_dir = MemoryDir::Path(directory.path.clone());
        let options = OpenOptions { direct: false, ..OpenOptions::default() };
        let open = || FileImage::open(&config.image, &options).expect("the image's file");
        let mut file = open();
        // The file has the contents of the image while a daemon starts: clean pages are compared with it, and the dirty
        // pages of a cache with another size are written to it.
        let frames = directory.arena_frames().unwrap_or(0);
        let through_file = !read_only && frames != 0 && frames != u64::from(settings.frames);
        let values = if through_file { image.reopened() } else { image.values() };
        let bytes: Vec<u8> = values.into_iter().flat_map(sector_of).collect();
        if fs::read(&config.image).expect("the image's file") != bytes {
            let modified = directory.modified();
            directory.write_image(&bytes);
            if *has_forgotten {
                // An image on a server has no times to compare: its pages are compared.
                directory.open_image().set_modified(modified).expect("a file has times");
                drop(file);
                file = open();
            }
        }
        if *is_restored {
            // Not at a time that could be that of one of the last daemon's writes, nor near the last restore.
            directory.restores.set(directory.restores.get() + 1);
            let later = SystemTime::now() + RESTORED_LATER * directory.restores.get();
            let restored = File::options().write(true).open(&config.image).expect("the image's file");
            restored.set_modified(later).expect("a file has times");
            drop(file);
            file = open();
        }
        let manager = Arc::new(ServiceManager::default());
        let arena = in_daemon(|| arena_for(&config, &*file, [settings.frames as usize; 2], &manager));
        if through_file {
            let bytes = fs::read(&config.image).expect("the image's file");
            let values = bytes.chunks(SECTOR_SIZE).map(|sector| value_of(sector).expect("whole sectors"));
            // The old arena is replaced only after its pages are durable.
            let synced = arena.is_ok() || directory.arena_frames() != Some(frames);
            image.replace(&values.collect::<Vec<_>>(), synced);
        }
        let arena = match arena? {
            Ok(arena) => arena,
            Err(error) if (*read_only || *is_restored) && error.kind() == ErrorKind::Ledger => return Ok(None),
            Err(error) if *has_grown && error.to_string().contains(NOTHING_TO_COMPARE) => return Ok(None),
            Err(error) => panic!("the cache is recovered: {error}; {configuration:?}"),
        };
        // Recovery syncs the image before it takes samples, so they are of durable bytes: here, those of the file.
        let mut samples = arena.samples();
        samples.retain(|(page, _)| image.is_durable(SectorSpan::new(page.0 * SECTORS_PER_PAGE, SECTORS_PER_PAGE)));
        arena.keep_on_drop(true);
        in_daemon(|| arena.record_samples(&samples))?;
        let held = Arc::new(HeldImage { image: image.clone(), file, is_dead: AtomicBool::new(false) });
        in_daemon(|| {
            let backing: Arc<dyn Backing> = held.clone();
            let cached = CachedImage::new("sim", backing, arena, (*settings).clone());
            let device = device_of(&cached, *workers, *writeback, *read_only, *budget);
            let start = |index: usize| {
                Worker::new(&device, &cached, u16::try_from(index).expect("a few")).expect("descriptors for a worker")
            };
            let (started, controls): (Vec<_>, Vec<_>) = (0..*workers).map(start).unzip();
            cached.arena().keep_on_drop(false);
            let threads = started.into_iter().map(|worker| Thread { worker, idle: false, asleep: false }).collect();
            Some(Self { threads, device, workers: Workers::new(controls), cached, held })
        })
    }

    /// A front-end connects, and its driver acknowledges the features.
    pub fn connect(&self) {
        self.device.start_with_features(None);
        self.device.start_with_features(Some(CACHE_FEATURES));
    }

    /// The image has grown to `size_bytes` bytes: the guest may use it up to its new end.
    pub fn grow(&self, size_bytes: u64) -> Result<(), DaemonDied> {
        in_daemon(|| {
            self.cached.grow(size_bytes).expect("a size that a cache can follow");
            self.device.set_capacity(self.cached.limits().size_bytes.get() / SECTOR_BYTES);
        })
    }

    /// Takes a turn of a worker, or lets it sleep. Returns whether it did anything.
    pub fn step(&mut self, worker: usize, now: Tick) -> Result<bool, DaemonDied> {
        let Thread { worker, idle, asleep } = &mut self.threads[worker];
        in_daemon(|| {
            if worker.is_exiting() {
                return false;
            }
            if *asleep {
                let is_due = worker.next_due().is_some_and(|due| due <= now);
                if !worker.sleep(0) && !is_due {
                    return false;
                }
                worker.disable_notifications();
                *asleep = false;
            }
            if !std::mem::take(idle) {
                *idle = !worker.turn(now);
                return true;
            }
            if worker.enable_notifications() {
                worker.disable_notifications();
            } else {
                *asleep = true;
            }
            true
        })
    }

    /// When a sleeping worker wakes up without an event.
    pub fn next_due(&self) -> Option<Tick> {
        self.threads.iter().filter(|thread| thread.asleep).filter_map(|thread| thread.worker.next_due()).min()
    }

    /// The state of the workers and the cache, for the message of a failure.
    pub fn describe(&self) -> String {
        let due: Vec<_> = self.threads.iter().map(|thread| (thread.asleep, thread.worker.next_due())).collect();
        format!("workers {due:?}, {:?}", self.cached.stats())
    }

    /// Whether every worker has ended.
    pub fn has_ended(&self) -> bool {
        self.threads.iter().all(|thread| thread.worker.is_exiting())
    }

    /// Shuts down, as a drop of the daemon does.
    pub fn end(self, image: &SimulatedImage) -> Result<(), DaemonDied> {
        image.end_operations(true);
        in_daemon(|| drop(self))
    }

    /// Shuts down with operations of the disk in flight.
    pub fn end_with_io_in_flight(self, image: &SimulatedImage) -> Result<(), DaemonDied> {
        image.end_operations(false);
        in_daemon(|| drop(self))
    }

    /// Disposes of a daemon that has died: its memory and descriptors are freed, without any other effect.
    pub fn dispose(self, image: &SimulatedImage) {
        crash_after(None);
        image.end_operations(false);
        self.held.is_dead.store(true, Ordering::Relaxed);
        self.cached.arena().keep_on_drop(true);
    }
}

fn device_of(cached: &CachedImage, workers: usize, writeback: bool, read_only: bool, budget: Budget) -> Arc<Device> {
    let limits: &Limits = cached.limits();
    let capacity_sectors = limits.size_bytes.get() / SECTOR_BYTES;
    let parameters = DiskParameters {
        capacity_sectors,
        block_bytes: 512,
        physical_block_bytes: limits.physical_block_bytes,
        optimal_io_bytes: 0,
        discard: DiscardLimits::new(limits.discard_granularity, limits.discard_max_bytes),
        num_queues: 4,
        read_only,
        can_discard: true,
        can_zero: true,
        zero_may_unmap: true,
    };
    let disk = RequestLimits {
        capacity_sectors: capacity_sectors.into(),
        read_only,
        can_discard: true,
        max_discard_sectors: parameters.discard.max_sectors,
        can_zero: true,
        serial: serial("simulated"),
    };
    let counters = Counters::new(workers).expect("memory for counters");
    let mut device =
        Device::new("sim".to_owned(), Arc::clone(cached.arena()), disk, parameters, writeback, 0, counters);
    Arc::get_mut(&mut device).expect("it is not shared yet").budget = budget;
    device
}
