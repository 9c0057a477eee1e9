//! An open image, its cache, and the disk process that uses both. The slot outlives that process.
//!
//! The slot keeps the image's lock and the cache. When its process dies, it starts another one with the same cache.
//! Each method may wait for the image, so the main thread calls none of them.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use log::{error, warn};

use super::process::{Exit, Hosting, Process, SharedProcess};
use super::warm_list::TenureKey;
use crate::arena::KeptArena;
use crate::config::{DeviceConfig, Engine, ImageFormat, Survive};
use crate::disk_protocol::{DeviceSettings, ToDisk};
use crate::error::{Error, ErrorKind, Result};
use crate::recover;
use crate::store;
use crate::store::file::{IoEngine, IoLock, KnownRaw, OpenOptions};
use crate::store::named::{ImageKind, NamedImage};
use crate::sys::privileges::{self, User};
use crate::systemd::ServiceManager;
use crate::units::PAGE_BYTES;

/// How often to check whether the kernel has completed the I/O of a process that died.
const FENCE_POLL: Duration = Duration::from_millis(2);

/// How long one attempt to start a process waits for that, before the disk counts as not served: Linux's timeout of a
/// SCSI command.
const FENCE_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a disk process that has ended cleanly may take to close the descriptor of a block device.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// A cache file counts as lost once its path has not led to it for this long.
const MISSED_MIN: Duration = Duration::from_millis(500);

/// A step of a change of an image's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SizeStep {
    /// Grow it to this size; without one, serve it with its present size.
    Grow(Option<u64>),
    /// If it is larger than this size: check whether it can shrink to it, and do not follow other changes of its size
    /// until the next step.
    BeginShrink(u64),
    /// Cut it to this size. The disk process does not use it beyond that.
    Truncate(u64),
    /// It does not shrink after all.
    KeepSize,
}

/// See the module.
#[derive(Debug)]
pub(super) struct ImageSlot {
    /// Number of the device for which the image was opened; identifies the image.
    image_of: u32,
    /// Settings of the device for which the image was opened.
    settings: DeviceSettings,
    /// The user that its process runs as; `None`: the daemon's own.
    user: Option<User>,
    /// The process of the image's group, if it is in one.
    group: Option<SharedProcess>,
    /// The process may get further devices.
    is_shared: bool,
    hosting: Hosting,
    /// Size of the cache that has memory: less than the configured one if the host has not had more.
    pub cache_bytes: u64,
    /// Size to which the cache can grow.
    pub room_bytes: u64,
    /// The cache is one that an earlier daemon left, probably with a guest that waits.
    pub is_restored: bool,
    /// The last tenure of the image before it was opened.
    pub last_tenure: TenureKey,
    state: Mutex<SlotState>,
}

/// Fields are dropped in this order, the image last: a daemon that waits for the image's lock must find the cache free
/// when it gets the lock.
#[derive(Debug)]
struct SlotState {
    process: Option<Arc<Process>>,
    /// `None` once its files are removed.
    cache: Option<KeptArena>,
    /// This daemon created the cache, and no process has used it.
    is_unused: bool,
    file: FileWatch,
    image: Arc<dyn NamedImage>,
}

/// The state of the file by which the cache outlives the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FileWatch {
    /// Its path leads to it, or the cache has no file.
    Reachable,
    /// A check at this time found that its path does not lead to it.
    Missed(Instant),
    /// The cache no longer outlives the daemon, and that was logged.
    Lost,
}

impl ImageSlot {
    /// The slot of an open image; opens its cache.
    ///
    /// # Errors
    /// [`ErrorKind::Memory`] and [`ErrorKind::Ledger`] for the cache. The guest's data is unchanged then.
    pub fn new(
        image_of: u32,
        config: &DeviceConfig,
        image: Arc<dyn NamedImage>,
        manager: &Arc<ServiceManager>,
        hosting: Hosting,
        group: Option<SharedProcess>,
    ) -> Result<Arc<Self>> {
        let refused = |why| Error::new(ErrorKind::Image, format!("image {}: {why}", config.image.display()));
        image.limits().check().map_err(refused)?;
        let user = match config.user.as_str() {
            "" => None,
            name => Some(look_up_user(name)?),
        };
        // Before a new tenure begins.
        let last_tenure = TenureKey::of(&*image);
        let arena = recover::arena_for(config, &*image, frames_of(config), manager);
        let arena = arena.map_err(|error| recover::with_unused_caches(error, config))?;
        let [cache_bytes, room_bytes] =
            [arena.reserved_frames(), arena.frames()].map(|frames| frames as u64 * PAGE_BYTES);
        let is_restored = arena.is_kept_on_drop();
        let state = SlotState {
            process: None,
            is_unused: !is_restored,
            cache: Some(arena.into_kept()),
            file: FileWatch::Reachable,
            image,
        };
        let is_shared = group.is_some() || config.read_only && !config.isolate;
        let settings = DeviceSettings::from(config);
        let state = Mutex::new(state);
        Ok(Arc::new(Self {
            image_of,
            settings,
            user,
            group,
            is_shared,
            hosting,
            cache_bytes,
            room_bytes,
            is_restored,
            last_tenure,
            state,
        }))
    }

    fn lock(&self) -> MutexGuard<'_, SlotState> {
        self.state.lock().expect("no thread panics with a slot locked")
    }

    /// Number of the device for which the image was opened; identifies the image.
    pub fn image_of(&self) -> u32 {
        self.image_of
    }

    /// The process of the slot; starts one with these settings of the cache if there is none, or if it has died. Calls
    /// `on_wait` if it has to wait for the I/O of the one that died.
    ///
    /// # Errors
    /// [`ErrorKind::System`] if a process or a descriptor cannot be created; [`ErrorKind::Image`] if that I/O does not
    /// end in time.
    pub fn process(&self, settings: &DeviceSettings, on_wait: impl FnOnce()) -> Result<Arc<Process>> {
        let (mut state, exit) = self.lock_without_old_io(on_wait)?;
        if let Some(process) = &state.process {
            let Some(exit) = exit else { return Ok(Arc::clone(process)) };
            if !exit.is_clean() {
                state.image.quarantine_earlier_writes();
                if let Some(cache) = &mut state.cache {
                    cache.record_death(self.settings.read_only);
                }
            }
            state.process = None;
        }
        let process = match &self.group {
            None => self.pass_to_process(&state, settings, None)?,
            Some(group) => {
                let mut group = group.lock().expect("no thread panics with a group locked");
                let process =
                    self.pass_to_process(&state, settings, group.upgrade().filter(|process| process.is_running()))?;
                *group = Arc::downgrade(&process);
                process
            }
        };
        state.is_unused = false;
        state.process = Some(Arc::clone(&process));
        Ok(process)
    }

    /// Locks the slot when the kernel has completed all I/O of a process that died: an old write must not overtake a
    /// new one. Other threads can lock it meanwhile. Also returns how the process had ended then; `None`: it had not.
    fn lock_without_old_io(&self, on_wait: impl FnOnce()) -> Result<(MutexGuard<'_, SlotState>, Option<Exit>)> {
        let (since, mut on_wait) = (Instant::now(), Some(on_wait));
        loop {
            let state = self.lock();
            let exit = state.process.as_ref().and_then(|process| process.exit_of(self.image_of));
            let died = state.process.as_ref().filter(|_| exit.is_some());
            if !died.is_some_and(|process| state.image.is_io_locked(process.io_lock())) {
                return Ok((state, exit));
            }
            drop(state);
            if let Some(on_wait) = on_wait.take() {
                on_wait();
            }
            let seconds = since.elapsed().as_secs();
            if since.elapsed() >= FENCE_TIMEOUT {
                let context = format!("the kernel has not ended the I/O of its process, which died, for {seconds} s");
                return Err(Error::new(ErrorKind::Image, context));
            }
            thread::sleep(FENCE_POLL);
        }
    }

    /// Hands the image and the cache to a process: to the group's present one, unless it is ending, or to a new one.
    fn pass_to_process(
        &self,
        state: &SlotState,
        settings: &DeviceSettings,
        present: Option<Arc<Process>>,
    ) -> Result<Arc<Process>> {
        let failed =
            |e| Error::io(ErrorKind::System, format!("{}: cannot start a disk process", self.settings.name), e);
        let io_lock = present.as_ref().map_or_else(IoLock::unique, |process| process.io_lock());
        let (file, parts) = state.image.reopen_for_process(io_lock).map_err(failed)?;
        let cache = state.cache.as_ref().ok_or_else(|| Error::new(ErrorKind::System, "the cache was removed"))?;
        let open = ToDisk::Open {
            image_of: self.image_of,
            name: self.settings.name.clone(),
            image: Box::new(parts),
            cache: Box::new(cache.parts()),
            settings: Box::new(DeviceSettings { name: self.settings.name.clone(), ..settings.clone() }),
            user: self.user.clone(),
            is_shared: self.is_shared,
        };
        let process = match present {
            Some(present) => present,
            None => Process::start(&self.settings.name, self.hosting, io_lock)?,
        };
        match process.open(self.image_of, &open, &file, &cache.descriptors()) {
            // It has ended; the keeper gets an event about that.
            Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(failed(e)),
            _ => Ok(process),
        }
    }

    /// Checks that the next daemon would find the cache. If its file was removed, the cache is volatile from now on.
    /// `is_final`: no other check follows. Never waits.
    pub fn check_cache_file(&self, is_final: bool) {
        let Ok(mut state) = self.state.try_lock() else { return };
        let state = &mut *state;
        let Some(cache) = &mut state.cache else { return };
        if state.file == FileWatch::Lost || cache.is_reachable() {
            if matches!(state.file, FileWatch::Missed(_)) {
                state.file = FileWatch::Reachable;
            }
            return;
        }
        // A single failed check is not enough: a rename of a directory, or a mount, may be in progress.
        match state.file {
            _ if is_final => {}
            FileWatch::Missed(since) if since.elapsed() >= MISSED_MIN => {}
            FileWatch::Missed(_) => return,
            _ => return state.file = FileWatch::Missed(Instant::now()),
        }
        state.file = FileWatch::Lost;
        let name = &self.settings.name;
        let Some(process) = &state.process else { return };
        let lost = |unmarked| ToDisk::CacheFileLost { image_of: self.image_of, unmarked };
        let told = match cache.replace_lost_file() {
            Ok(marker) => process.send(&lost(None), marker.as_slice()),
            Err(e) => {
                let is_recorded =
                    !state.image.is_recorded_on_host() || state.image.lose_cache().is_ok_and(|known| known);
                if !is_recorded {
                    error!("{name}: a crash of the daemon would lose writes unnoticed");
                }
                process.send(&lost(Some(e.to_string())), &[])
            }
        };
        if let Err(e) = told {
            error!(
                "{name}: cannot pass the loss marker to its process: {e}; after a crash, lost writes would \
                 go undetected"
            );
        }
    }

    /// The size up to which the image is served; `None` if another thread holds the slot, perhaps waiting for the
    /// image. Never waits.
    pub fn image_bytes(&self) -> Option<u64> {
        Some(self.state.try_lock().ok()?.image.limits().size_bytes.get())
    }

    /// Carries out a step of a change of the image's size. Returns the size with which the image is served.
    ///
    /// # Errors
    /// The reason in words.
    pub fn change_size(&self, step: SizeStep) -> std::result::Result<u64, String> {
        let state = self.lock();
        let image = &state.image;
        match step {
            // Its process would refuse the size, and the file would keep it.
            SizeStep::Grow(Some(size_bytes))
                if size_bytes > image.limits().size_bytes.get()
                    && state.cache.as_ref().is_some_and(|cache| !cache.has_room_for(size_bytes)) =>
            {
                Err("the cache of an image above 4 PiB cannot outlive the daemon".to_owned())
            }
            SizeStep::Grow(size_bytes) => image.grow(size_bytes),
            SizeStep::BeginShrink(size_bytes) => image.check_shrink(size_bytes),
            SizeStep::Truncate(size_bytes) => image.truncate(size_bytes).map(|()| size_bytes),
            SizeStep::KeepSize => Ok(image.limits().size_bytes.get()),
        }
    }

    /// Follows an image that another program has made grow. Never waits.
    pub fn follow_growth(&self) {
        let Ok(state) = self.state.try_lock() else { return };
        let served = state.image.limits().size_bytes.get();
        if state.image.present_size().is_some_and(|now| now > served && now.is_multiple_of(PAGE_BYTES))
            && let Err(why) = state.image.grow(None)
        {
            warn!("{}: cannot grow the disk with its image: {why}", self.settings.name);
        }
    }

    /// The present tenure of the image. Waits for the image.
    pub fn present_tenure(&self) -> TenureKey {
        TenureKey::of(&*self.lock().image)
    }

    /// Whether the cache still holds data not written to the image, after its process has ended.
    pub fn holds_unwritten(&self) -> bool {
        let state = self.lock();
        // A cache that cannot be read may hold such data.
        state.cache.as_ref().is_some_and(|cache| cache.holds_unwritten().unwrap_or(true))
    }
}

/// Opens a device's image. May wait for as long as the image does not answer.
///
/// # Errors
/// [`ErrorKind::Image`] and [`ErrorKind::Locked`].
pub(super) fn open_image(config: &DeviceConfig, manager: &Arc<ServiceManager>) -> Result<Arc<dyn NamedImage>> {
    let (read_only, direct) = (config.read_only, config.direct);
    let engine = match config.engine {
        Engine::Auto => IoEngine::Auto,
        Engine::IoUring => IoEngine::Uring,
        Engine::Threads => IoEngine::Threads,
    };
    if config.cache.survive == Survive::Always {
        recover::check_memory_dir(config)?;
    }
    let nbd = recover::nbd_options(config);
    let options = OpenOptions { read_only, engine, direct, lock_timeout: recover::LOCK_TIMEOUT, nbd };
    let image = store::open(Some(&config.name), &config.image, &options)?;
    image.check_workers(config.workers)?;
    let identity = image.identity();
    let known_raw = match config.format {
        ImageFormat::Raw => Some(KnownRaw::Configured),
        ImageFormat::Auto => {
            let is_kept = |format| recover::has_kept_cache(config, &identity, format, manager);
            image.found_format().filter(|format| is_kept(*format)).map(|_| KnownRaw::KeptCache)
        }
    };
    image.check_format(known_raw)?;
    Ok(image)
}

/// The user called `name`.
fn look_up_user(name: &str) -> Result<User> {
    match privileges::look_up_user(name) {
        Ok(Some(user)) => Ok(user),
        Ok(None) => Err(Error::new(ErrorKind::System, format!("no such user: {name} (key user)"))),
        Err(e) => Err(Error::io(ErrorKind::System, format!("cannot look up user {name} (key user)"), e)),
    }
}

/// The configured number of frames, and the maximum to which the cache can grow.
fn frames_of(config: &DeviceConfig) -> [usize; 2] {
    let frames = |bytes: u64| usize::try_from(bytes / PAGE_BYTES).unwrap_or(usize::MAX);
    [frames(config.cache.size_bytes), frames(config.cache.room_bytes())]
}

impl Drop for ImageSlot {
    /// Removes an empty cache. If the cache stays, records in it the state of the image, for the next daemon.
    fn drop(&mut self) {
        let state = self.state.get_mut().expect("no thread panics with a slot locked");
        let name = &self.settings.name;
        let Some(mut cache) = state.cache.take() else { return };
        if state.is_unused {
            // Mark the image clean first: the next daemon would otherwise report the removed cache file as missing.
            match state.image.end_tenure() {
                Ok(_) => cache.remove(),
                Err(e) => warn!("{name}: cannot mark the image clean ({e}); its cache is kept"),
            }
            return;
        }
        let exit = state.process.take().and_then(|process| Some((process.io_lock(), process.exit_of(self.image_of)?)));
        match exit {
            // The record first, as above.
            Some((_, Exit { is_cache_removed: true, .. })) => match recover::end_open_tenure(&*state.image) {
                Ok(()) => cache.remove(),
                Err(e) => warn!("{name}: cannot mark the image clean ({e}); its cache is kept"),
            },
            Some((io_lock, exit)) => {
                if state.image.kind() == ImageKind::Device {
                    record_device_token(name, &*state.image, &mut cache, io_lock);
                }
                // The process has not ended the tenure in a record that only this process writes.
                if exit.is_clean()
                    && state.image.is_recorded_on_host()
                    && cache.is_written()
                    && let Err(e) = end_tenure_of_kept(&*state.image, &mut cache)
                {
                    warn!("{name}: cannot record that the image was released: {e}");
                }
            }
            None => {}
        }
    }
}

/// Records the change token of a block device. Its counters are read through a path, which only this process may use.
///
/// => The image no longer changes once the kernel has released the process's descriptor.
fn record_device_token(name: &str, image: &dyn NamedImage, cache: &mut KeptArena, io_lock: IoLock) {
    let until = Instant::now() + CLOSE_TIMEOUT;
    while image.is_io_locked(io_lock) && Instant::now() < until {
        thread::sleep(FENCE_POLL);
    }
    if !image.is_io_locked(io_lock)
        && let Some(token) = image.change_token()
        && let Err(e) = cache.record_token(token)
    {
        warn!("{name}: {e}");
    }
}

/// Ends the tenure of a cache that stays, although all its data is on the image.
fn end_tenure_of_kept(image: &dyn NamedImage, cache: &mut KeptArena) -> io::Result<()> {
    recover::end_open_tenure(image)?;
    cache.record_end().map_err(io::Error::other)
}
