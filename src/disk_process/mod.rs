//! A disk process: serves an image, or the images of a group, to the front-ends of its devices. The supervisor sends it
//! descriptors and values; the process opens no path and reads no configuration file.
//!
//! Its first thread, or in a daemon without disk processes the thread `control NAME`, runs [`run`]: it executes the
//! supervisor's commands and writes the statistics pages. It never waits for the image, so it can end a device that
//! hangs. Each device has its own thread (`device.rs`), which does wait. If the supervisor dies, the process ends by
//! itself (`orphan.rs`).

mod device;
mod orphan;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use log::{error, warn};

use crate::broker::Broker;
use crate::cached_image::CachedImage;
use crate::device::Untracked;
use crate::disk_protocol::{Channel, DeviceReply, DeviceSettings, ErrorText, FromDisk, Received, ToDisk};
use crate::disk_stats::{StatsPage, TruncatedMemory};
use crate::error::{Error, ErrorKind, Result};
use crate::sandbox::{self, ThreadKind};
use crate::service::{Service, cached_image};
use crate::store;
use crate::sys::fd::close_inherited;
use crate::sys::poll::wait_any_readable_for;
use crate::sys::privileges::User;
use crate::sys::process::{raise_descriptor_limit, set_thread_name};
use crate::sys::regions::{Registration, record_bus_error, register};
use crate::sys::signal;
use crate::waker::Waker;

use device::DeviceControl;

/// The disk process's end of the channel.
pub type DiskChannel = Channel<FromDisk, ToDisk>;

/// How often the statistics pages and the heartbeats in the ledgers are written.
const TICK: Duration = Duration::from_millis(250);

/// Signals that must not end a disk process: the service manager and a terminal send signals to every process of the
/// daemon, but only the supervisor ends a disk process.
const IGNORED: [i32; 11] = [
    libc::SIGTERM,
    libc::SIGINT,
    libc::SIGHUP,
    libc::SIGUSR1,
    libc::SIGXFSZ,
    libc::SIGPIPE,
    libc::SIGUSR2,
    libc::SIGALRM,
    libc::SIGVTALRM,
    libc::SIGPROF,
    libc::SIGIO,
];

/// Body of the disk process of a device `name`; its standard input is its end of the channel.
///
/// # Errors
/// [`ErrorKind::System`] if standard input is no channel, and those of [`run`].
pub fn main(name: &str, standard_input: OwnedFd) -> Result<()> {
    let system = |context: &'static str| move |e| Error::io(ErrorKind::System, context, e);
    // The process that started the supervisor may have left descriptors open.
    if let Err(e) = close_inherited(&standard_input) {
        warn!("{name}: cannot close inherited descriptors: {e}");
    }
    // Otherwise the kernel names the thread after the executed file, /proc/self/exe.
    set_thread_name(c"genblk-disk");
    signal::ignore(&IGNORED).map_err(system("cannot ignore signals"))?;
    if let Err(e) = raise_descriptor_limit() {
        warn!("{name}: cannot raise the limit of open descriptors: {e}");
    }
    run(&Arc::new(Channel::from_socket(standard_input.into())))
}

/// Executes the commands of the supervisor at the other end of the channel, until the supervisor ends the process or
/// dies.
///
/// # Errors
/// [`ErrorKind::System`] if the channel fails or a message is invalid.
pub fn run(channel: &Arc<DiskChannel>) -> Result<()> {
    let system = |context: &'static str| move |e| Error::io(ErrorKind::System, context, e);
    signal::on_bus_error(record_bus_error).map_err(system("cannot handle SIGBUS"))?;
    let waker = Arc::new(Waker::new().map_err(system("cannot create an eventfd"))?);
    let mut control = Control {
        channel: Arc::clone(channel),
        waker,
        images: BTreeMap::new(),
        devices: BTreeMap::new(),
        releases: Vec::new(),
        has_released: false,
        is_shared: false,
    };
    while !control.has_ended() {
        let ready = wait_any_readable_for([channel.as_ref(), control.waker.as_ref()], TICK);
        let [message, _] = ready.map_err(system("cannot wait for the supervisor"))?;
        control.waker.clear();
        if message {
            match channel.receive().map_err(system("cannot talk to the supervisor"))? {
                Received::Message(message, files) => control.handle_message(message, files)?,
                Received::Closed => return orphan::end_all(control),
            }
        }
        control.check();
        control.release_unused();
    }
    control.end();
    Ok(())
}

/// An image and its cache.
#[derive(Debug)]
struct ServedImage {
    /// Name of the device for which the image was opened.
    name: String,
    image: Arc<CachedImage>,
    io_mode: &'static str,
    /// See [`crate::arena::ReceivedArena`].
    is_cache_removed: Arc<AtomicBool>,
    /// An empty file that replaces the cache's removed file, until a worker leaves the cache.
    lost: Option<std::result::Result<File, String>>,
    /// Whether a device was served on it, or failed.
    is_used: bool,
}

/// A device, and the number of the one for which its image was opened.
#[derive(Debug)]
struct ServedDevice {
    image_of: u32,
    device: DeviceControl,
    /// The cache, for the handler of SIGBUS.
    _cache: Registration,
}

/// See the module.
#[derive(Debug)]
struct Control {
    channel: Arc<DiskChannel>,
    /// Notified when a device has ended.
    waker: Arc<Waker>,
    /// Images, by the number of the device for which each was opened.
    images: BTreeMap<u32, ServedImage>,
    devices: BTreeMap<u32, ServedDevice>,
    /// Threads that release images.
    releases: Vec<JoinHandle<()>>,
    /// Whether an image was released.
    has_released: bool,
    /// Whether other devices may follow.
    is_shared: bool,
}

impl Control {
    /// Whether the last device has ended, or failed to start, and its image is released or about to be.
    fn has_ended(&self) -> bool {
        self.images.is_empty() && self.has_released
    }

    /// Its devices.
    fn devices(&self) -> impl Iterator<Item = &DeviceControl> {
        self.devices.values().map(|served| &served.device)
    }

    fn send(&self, message: &FromDisk) {
        send_event(&self.channel, message);
    }

    fn handle_message(&mut self, message: ToDisk, files: Vec<File>) -> Result<()> {
        let device = |number: u32| self.devices.get(&number).map(|served| &served.device);
        match message {
            ToDisk::Open { image_of, name, image, cache, settings, user, is_shared } => {
                let mut files = files.into_iter();
                let file = files.next().ok_or_else(|| unexpected("an image without a descriptor"))?;
                let is_first = self.images.is_empty();
                let confined = if is_first { confine(&settings, user.as_ref()) } else { Ok(()) };
                let settings = DeviceSettings { name, ..*settings };
                let opened =
                    confined.and_then(|()| self.open(image_of, file, *image, &cache, files.collect(), &settings));
                if let Err(error) = opened {
                    self.send(&FromDisk::ImageFailed { image_of, error: ErrorText::from(&error) });
                    if is_first {
                        return Err(error);
                    }
                    // Continue with the other images of the group.
                    self.send(&FromDisk::Released { image_of, is_cache_removed: false });
                    return Ok(());
                }
                self.is_shared |= is_shared;
            }
            ToDisk::Serve { device, image_of, settings } => self.serve(device, image_of, &settings, files)?,
            ToDisk::Resume { device: number } => _ = device(number).inspect(|device| device.resume()),
            ToDisk::Quiesce { device: number } => _ = device(number).inspect(|device| device.quiesce()),
            ToDisk::Finish { device: number, ending } => _ = device(number).inspect(|device| device.finish(ending)),
            ToDisk::Abandon { device: number, waits_for_untracked } => {
                let untracked = if waits_for_untracked { Untracked::Wait } else { Untracked::Lose };
                _ = device(number).inspect(|device| device.abandon(untracked));
            }
            ToDisk::ForceClose { device: number } => _ = device(number).inspect(|device| device.force_close()),
            ToDisk::Request { device: number, id, request } => match device(number) {
                Some(device) => device.request(id, request, &self.channel),
                None => self.send(&FromDisk::Reply { id, reply: DeviceReply::NotServed }),
            },
            ToDisk::CacheFileLost { image_of, unmarked } => {
                let marker = files.into_iter().next().ok_or_else(|| unmarked.unwrap_or_default());
                if let Some(open) = self.images.get_mut(&image_of) {
                    open.lost = Some(marker);
                }
            }
        }
        Ok(())
    }

    /// Opens an image and its cache.
    fn open(
        &mut self,
        image_of: u32,
        file: File,
        image: store::file::ImageParts,
        cache: &crate::arena::ArenaParts,
        cache_files: Vec<File>,
        settings: &DeviceSettings,
    ) -> Result<()> {
        let (image, io_mode) = store::received(file, image)?;
        let received = crate::arena::ReceivedArena::new(cache, cache_files)?;
        let (is_cache_removed, arena) = (received.is_removed, received.arena);
        // The image may have grown since the cache was opened.
        arena.set_image_size(image.limits().size_bytes.get());
        let (name, image) = (settings.name.clone(), cached_image(settings, image, arena)?);
        self.images
            .insert(image_of, ServedImage { name, image, io_mode, is_cache_removed, lost: None, is_used: false });
        Ok(())
    }

    /// Starts to serve a device on the image that was opened for `image_of`.
    fn serve(&mut self, number: u32, image_of: u32, settings: &DeviceSettings, files: Vec<File>) -> Result<()> {
        // An image that could not be opened has no devices.
        let Some(open) = self.images.get_mut(&image_of) else { return Ok(()) };
        open.is_used = true;
        let mut files = files.into_iter();
        let (Some(listener), Some(page), Some(broker)) = (files.next(), files.next(), files.next()) else {
            return Err(unexpected("a device without its descriptors"));
        };
        let listener = OwnedFd::from(listener).into();
        let broker = Broker::new(&settings.name, OwnedFd::from(broker));
        let page = StatsPage::open(&page, settings.workers.into());
        let page = page.map_err(|e| Error::io(ErrorKind::System, "cannot map a statistics page", e))?;
        // The handler of SIGBUS may write to it at any time.
        let page: &'static StatsPage = Box::leak(Box::new(page));
        let service = Service::new(settings, &open.image, open.io_mode, listener, broker, page.counters(), Some(page));
        let cache = register(&open.image.arena().mapped(), page.bus_error_record(TruncatedMemory::Cache));
        let service = service.in_shared_process(self.is_shared);
        let device = DeviceControl::start(number, &settings.name, service, page, &self.channel, &self.waker)?;
        self.devices.insert(number, ServedDevice { image_of, device, _cache: cache });
        if !self.is_shared {
            // No other device follows, so this thread creates no further rings.
            sandbox::confine(ThreadKind::Main);
        }
        Ok(())
    }

    /// Writes the statistics pages and the heartbeats, and retries pending work.
    fn check(&mut self) {
        for served in self.devices.values_mut() {
            served.device.publish_state();
        }
        for open in self.images.values_mut() {
            open.image.heartbeat();
            if let Some(marker) = open.lost.take() {
                open.lost = open.image.lose_cache_file(marker).err();
            }
        }
    }

    /// Releases the images whose last device has ended, or failed to start.
    fn release_unused(&mut self) {
        let has_ended = |image_of: u32| {
            let mut devices = self.devices.values().filter(|served| served.image_of == image_of);
            devices.all(|served| served.device.has_ended())
        };
        let unused: Vec<u32> = self
            .images
            .iter()
            .filter(|(image_of, open)| open.is_used && has_ended(**image_of))
            .map(|(image_of, _)| *image_of)
            .collect();
        for image_of in unused {
            self.release(image_of);
        }
    }

    /// Releases an image and its cache, and reports to the supervisor whether the cache's file can be removed. Runs on
    /// a separate thread, because writing the end of the tenure to the image may block.
    ///
    /// => The threads of its devices have ended. If one hangs in the kernel instead, the image is not released, and the
    /// cache stays.
    fn release(&mut self, image_of: u32) {
        let Some(ServedImage { name, image, is_cache_removed, .. }) = self.images.remove(&image_of) else { return };
        self.devices.retain(|_, served| served.image_of != image_of);
        self.has_released = true;
        let channel = Arc::clone(&self.channel);
        let release = move || {
            drop(image);
            let is_cache_removed = is_cache_removed.load(Ordering::Acquire);
            send_event(&channel, &FromDisk::Released { image_of, is_cache_removed });
        };
        match spawn(&format!("release {name}"), release) {
            Ok(thread) => self.releases.push(thread),
            // The failed call has released it, and the supervisor sees the end of the process.
            Err(e) => error!("{name}: {e}"),
        }
    }

    /// Releases all images and waits until that is done. The supervisor does not wait without limit.
    fn end(mut self) {
        let images: Vec<u32> = self.images.keys().copied().collect();
        for image_of in images {
            self.release(image_of);
        }
        for thread in self.releases {
            // It cannot have panicked: a panic ends the process.
            let _ = thread.join();
        }
    }
}

/// Confines the process for a device, before any byte of a guest or a front-end reaches it.
fn confine(settings: &DeviceSettings, user: Option<&User>) -> Result<()> {
    if settings.is_confined() {
        sandbox::prepare(user)?;
        sandbox::confine(ThreadKind::Opener);
    }
    Ok(())
}

/// Sends a message, unless the supervisor has died.
fn send_event(channel: &DiskChannel, message: &FromDisk) {
    match channel.send(message, &[]) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => error!("disk process: cannot report to the supervisor: {e}"),
        _ => {}
    }
}

fn unexpected(what: &str) -> Error {
    Error::new(ErrorKind::System, format!("the supervisor sent {what}"))
}

/// Runs `body` on a thread with this name.
fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    let failed = |e| Error::io(ErrorKind::System, format!("cannot start the thread {name}"), e);
    thread::Builder::new().name(name.to_owned()).spawn(body).map_err(failed)
}
