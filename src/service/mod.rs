//! A device with everything that serves it: image, cache, socket and threads. A [`Service`] consists of open parts;
//! once started it is a [`Running`].

mod handle;
mod image_size;
mod request;
mod running;
mod settings;
mod stats;

use std::io;
use std::mem;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use log::{info, warn};

use crate::arena::Arena;
use crate::broker::Broker;
use crate::cached_image::CachedImage;
use crate::config::{DeviceConfig, Socket};
use crate::counters::worker::Counters;
use crate::device::control::Workers;
use crate::device::{self, Device, WorkerCommand, WorkerControl};
use crate::disk_protocol::DeviceSettings;
use crate::disk_stats::StatsPage;
use crate::error::{Error, ErrorKind, Result};
use crate::listener::{BoundSocket, SocketAccess, bind};
use crate::sandbox::{self, ThreadKind};
use crate::store::Backing;
use crate::units::PAGE_BYTES;
use crate::vhost::Server;

pub use handle::ServiceHandle;
pub use running::Running;

use settings::{device_of, settings};

/// A device that is open and not yet served.
#[derive(Debug)]
pub struct Service {
    device: Arc<Device>,
    image: Arc<CachedImage>,
    listener: UnixListener,
    /// The socket's file, if this process bound it.
    bound: Option<BoundSocket>,
    /// Looks up the processes of front-ends.
    broker: Broker,
    /// Where the handler of SIGBUS records that the front-end has truncated memory.
    page: Option<&'static StatsPage>,
    /// Devices of other front-ends may be served by this process too.
    shares_process: bool,
    workers: u16,
    queue_size: u16,
    /// The line to log when it starts.
    description: String,
}

/// An image with a cache in `arena`, with these settings. If there is no memory for the configured size, the cache has
/// the size for which the arena has memory.
///
/// # Errors
/// [`ErrorKind::Image`] if the image's limits are too narrow for a cache.
pub fn cached_image(of_device: &DeviceSettings, image: Arc<dyn Backing>, arena: Arena) -> Result<Arc<CachedImage>> {
    let mut cache = settings(of_device, image.limits())?;
    // A process that died may have left less memory, and the size may have been changed since.
    if let Err(error) = arena.reserve(cache.frames as usize) {
        if arena.reserved_frames() == 0 {
            return Err(error);
        }
        let mut smaller = of_device.clone();
        smaller.cache.size_bytes = arena.reserved_frames() as u64 * PAGE_BYTES;
        warn!("{}: {error}; the cache has {} MiB for now", of_device.name, smaller.cache.size_bytes >> 20);
        cache = settings(&smaller, image.limits())?;
    }
    cache.frames_max = u32::try_from(arena.frames()).unwrap_or(u32::MAX);
    Ok(CachedImage::new(&of_device.name, image, arena, cache))
}

impl Service {
    /// A device on an open image, with a listening socket; `counters` count its activity. The handler of SIGBUS records
    /// on `page` which memory its front-end has truncated.
    pub fn new(
        settings: &DeviceSettings,
        image: &Arc<CachedImage>,
        io_mode: &str,
        listener: UnixListener,
        broker: Broker,
        counters: Counters,
        page: Option<&'static StatsPage>,
    ) -> Self {
        let device = device_of(settings, image, counters);
        let description = format!(
            "{}: serving {} on {}: {} bytes, {}{io_mode}; cache of {} bytes, {}",
            settings.name,
            settings.image,
            settings.socket,
            image.limits().size_bytes.get(),
            if settings.read_only { "read-only, " } else { "" },
            settings.cache.size_bytes,
            settings.cache.mode,
        );
        let (workers, queue_size, image) = (settings.workers, settings.queue_size, Arc::clone(image));
        let shares_process = false;
        Self { device, image, listener, bound: None, broker, page, shares_process, workers, queue_size, description }
    }

    /// The same device in a process that may also serve devices of other front-ends.
    pub fn in_shared_process(self, shares_process: bool) -> Self {
        Self { shares_process, ..self }
    }

    /// A device on an image that the caller has opened, with a socket that this process binds. Its cache is volatile.
    ///
    /// # Errors
    /// [`ErrorKind::Image`] if the image's limits are too narrow for a cache, [`ErrorKind::Memory`] for the cache,
    /// [`ErrorKind::Socket`] for the socket.
    pub fn with_image(config: &DeviceConfig, image: Arc<dyn Backing>) -> Result<Self> {
        let of_device = DeviceSettings::from(config);
        let frames = settings(&of_device, image.limits())?.frames;
        let image = cached_image(&of_device, image, Arena::anonymous(frames as usize)?)?;
        Self::bound(config, &image)
    }

    /// Another read-only device that shares this one's image and cache.
    ///
    /// # Errors
    /// [`ErrorKind::Socket`] for its socket.
    pub fn sharing_image_of(&self, config: &DeviceConfig) -> Result<Self> {
        Self::bound(config, &self.image)
    }

    fn bound(config: &DeviceConfig, image: &Arc<CachedImage>) -> Result<Self> {
        let Socket::Path(path) = &config.socket else {
            return Err(Error::new(ErrorKind::Socket, "this process inherited no socket"));
        };
        let access = SocketAccess::new(config.socket_mode, &config.socket_group)?;
        let (listener, bound) = bind(&config.name, path, access)?;
        let failed = |e| Error::io(ErrorKind::System, format!("{}: cannot start a thread", config.name), e);
        let broker = Broker::start(&config.name).map_err(failed)?;
        let counters = Counters::new(config.workers.into());
        let counters = counters.map_err(|e| Error::io(ErrorKind::System, "cannot get memory for counters", e))?;
        let service = Self::new(&config.into(), image, "given image", listener, broker, counters, None);
        Ok(Self { bound: Some(bound), ..service })
    }

    /// Starts the device's threads.
    ///
    /// # Errors
    /// [`ErrorKind::System`] when the host cannot provide a thread or a descriptor.
    pub fn start(self) -> Result<Running> {
        let Self { device, image, listener, bound, broker, page, shares_process, workers, queue_size, description } =
            self;
        let mut starting = StartingWorkers::default();
        for index in 0..workers {
            starting.add(device::spawn(&device, &image, index)?);
        }
        let workers = Arc::new(Workers::new(starting.controls.clone()));
        let system = |what: &str, e: io::Error| Error::io(ErrorKind::System, format!("{}: {what}", device.name), e);
        let (of_device, of_workers) = (Arc::clone(&device), Arc::clone(&workers));
        let bus_errors = page.map(StatsPage::front_end_records);
        let server =
            Arc::new(Server::new(of_device, of_workers, queue_size, listener, broker, bus_errors, shares_process)?);
        // Before a front-end can connect, so that the log lines are in order.
        info!("{description}");
        let serving = Arc::clone(&server);
        let acceptor = thread::Builder::new()
            .name(format!("accept {}", device.name))
            .spawn(move || {
                sandbox::confine(ThreadKind::Control);
                serving.serve();
            })
            .map_err(|e| system("cannot start a thread", e))?;
        // From here on a clean shutdown removes the cache file, unless it hands the cache over.
        image.arena().keep_on_drop(false);
        let threads = starting.started();
        let last_shrink = Arc::default();
        Ok(Running { _bound: bound, server, device, workers, threads, acceptor: Some(acceptor), image, last_shrink })
    }
}

/// The worker threads of a device that is starting. Dropping it ends them.
///
/// => If the device fails to start, no thread remains that would keep its image locked.
#[derive(Debug, Default)]
struct StartingWorkers {
    controls: Vec<WorkerControl>,
    threads: Vec<JoinHandle<()>>,
}

impl StartingWorkers {
    fn add(&mut self, (control, thread): (WorkerControl, JoinHandle<()>)) {
        self.controls.push(control);
        self.threads.push(thread);
    }

    /// The threads of a device that has started.
    fn started(mut self) -> Vec<JoinHandle<()>> {
        self.controls.clear();
        mem::take(&mut self.threads)
    }
}

impl Drop for StartingWorkers {
    fn drop(&mut self) {
        for control in &self.controls {
            control.send(WorkerCommand::Exit(Duration::ZERO));
        }
        for thread in self.threads.drain(..) {
            // It cannot have panicked: a panic ends the process.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::file::{FileImage, OpenOptions};

    #[test]
    fn a_cache_without_memory_for_its_size_has_the_size_that_its_arena_has() {
        let path = std::env::temp_dir().join(format!("genblk-smaller-{}", std::process::id()));
        std::fs::File::create(&path).and_then(|file| file.set_len(1 << 20)).unwrap();
        let image = FileImage::open(&path, &OpenOptions { direct: false, ..OpenOptions::default() }).unwrap();
        let settings = DeviceSettings::from(&DeviceConfig::new("disk0", Socket::Path("socket".into()), &path));
        let arena = Arena::anonymous_with_room(1024, 2048).unwrap();
        let opened = cached_image(&settings, image, arena).unwrap();
        assert_eq!((opened.stats().frames, opened.arena().reserved_frames()), (1024, 1024));
        std::fs::remove_file(path).unwrap();
    }
}
