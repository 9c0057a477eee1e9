//! A device with everything that serves it: image, cache, socket and threads. A [`Service`] is opened from its
//! configuration; once started it is a [`Running`].

mod context;
mod handle;
mod running;
mod settings;
mod socket;
mod stats;

use std::io;
use std::mem;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use log::info;

use crate::arena::Arena;
use crate::broker::Broker;
use crate::cached_image::CachedImage;
use crate::config::{DeviceConfig, Engine, ImageFormat, Survive};
use crate::device::control::Workers;
use crate::device::{self, Command, Control, Device};
use crate::error::{Error, ErrorKind, Result};
use crate::recover;
use crate::sandbox::{self, ThreadKind};
use crate::store::file::{IoEngine, KnownRaw, OpenOptions};
use crate::store::{self, Backing};
use crate::vhost::Server;

pub use context::Context;
pub use handle::Handle;
pub use running::Running;

use settings::{device_of, settings};
use socket::ListenSocket;

/// A device that is open and not yet served.
#[derive(Debug)]
pub struct Service {
    device: Arc<Device>,
    image: Arc<CachedImage>,
    /// Path of the image.
    path: PathBuf,
    socket: ListenSocket,
    workers: u16,
    queue_size: u16,
    /// The line to log when it starts.
    description: String,
}

impl Service {
    /// Opens a device's image, memory and socket. May wait for as long as the image does not answer.
    ///
    /// Read-only devices on the same image share one cached image. The service manager may hold the cache of an earlier
    /// daemon, and stores the new one if the configuration says so.
    ///
    /// # Errors
    /// [`ErrorKind::Image`] and [`ErrorKind::Locked`] for the image, [`ErrorKind::Memory`] and [`ErrorKind::Ledger`]
    /// for the cache, [`ErrorKind::Socket`] for the socket. The guest's data is as it was then.
    pub fn open(config: &DeviceConfig, context: &Context) -> Result<Self> {
        let (read_only, direct) = (config.read_only, config.direct);
        let engine = match config.engine {
            Engine::Auto => IoEngine::Auto,
            Engine::IoUring => IoEngine::Uring,
            Engine::Threads => IoEngine::Threads,
        };
        if config.cache.survive == Survive::Always {
            recover::check_memory_dir(config)?;
        }
        let options = OpenOptions { read_only, engine, direct, lock_patience: recover::LOCK_PATIENCE };
        let image = store::open(Some(&config.name), &config.image, &options)?;
        let identity = image.identity();
        let known_raw = match config.format {
            ImageFormat::Raw => Some(KnownRaw::Configured),
            ImageFormat::Auto => {
                let is_kept = |format| recover::has_kept_cache(config, &identity, format, &context.manager);
                image.found_format().filter(|format| is_kept(*format)).map(|_| KnownRaw::KeptCache)
            }
        };
        image.check_format(known_raw)?;
        let io_mode = image.io_mode();
        let open_cache = || {
            let settings = settings(config, image.limits())?;
            let arena = recover::arena_for(config, &*image, settings.frames as usize, &context.manager);
            let arena = arena.map_err(|error| recover::with_unused_caches(error, config))?;
            Ok(CachedImage::new(&config.name, image, arena, settings))
        };
        let cached = if read_only { context.images.get_or_open(identity, open_cache) } else { open_cache() };
        Self::new(config, cached?, &io_mode, context)
    }

    /// A device on an image that the caller has opened. Its cache does not outlive the process.
    ///
    /// # Errors
    /// As [`Service::open`], for the cache and the socket, and [`ErrorKind::Image`] if its limits are too narrow for a
    /// cache.
    pub fn with_image(config: &DeviceConfig, image: Arc<dyn Backing>) -> Result<Self> {
        let settings = settings(config, image.limits())?;
        let arena = Arena::anonymous(settings.frames as usize)?;
        let image = CachedImage::new(&config.name, image, arena, settings);
        Self::new(config, image, "given image", &Context::default())
    }

    /// One more read-only device that shares this one's image and cache.
    ///
    /// # Errors
    /// [`ErrorKind::Socket`] for its socket.
    pub fn sharing_image_of(&self, config: &DeviceConfig) -> Result<Self> {
        Self::new(config, Arc::clone(&self.image), "given image", &Context::default())
    }

    fn new(config: &DeviceConfig, image: Arc<CachedImage>, io_mode: &str, context: &Context) -> Result<Self> {
        let device = device_of(config, &image);
        let description = format!(
            "{}: serving {} on {}: {} bytes, {}{io_mode}; cache of {} bytes, {}",
            config.name,
            config.image.display(),
            config.socket,
            image.limits().size_bytes,
            if config.read_only { "read-only, " } else { "" },
            config.cache.size_bytes,
            config.cache.mode,
        );
        let socket = ListenSocket::open(config, &context.sockets)?;
        let (path, workers, queue_size) = (config.image.clone(), config.workers, config.queue_size);
        Ok(Self { device, image, path, socket, workers, queue_size, description })
    }

    /// Starts the device's threads.
    ///
    /// # Errors
    /// [`ErrorKind::System`] when the host cannot provide a thread or a descriptor.
    pub fn start(self) -> Result<Running> {
        let Self { device, image, path, socket, workers, queue_size, description } = self;
        let mut starting = StartingWorkers::default();
        for index in 0..workers {
            starting.add(device::spawn(&device, &image, index)?);
        }
        let workers = Arc::new(Workers::new(starting.controls.clone()));
        let system = |what: &str, e: io::Error| Error::io(ErrorKind::System, format!("{}: {what}", device.name), e);
        let listener = socket.listener.try_clone().map_err(|e| system("cannot duplicate the socket", e))?;
        let broker = Broker::start(&device.name).map_err(|e| system("cannot start a thread", e))?;
        let server = Arc::new(Server::new(Arc::clone(&device), Arc::clone(&workers), queue_size, listener, broker)?);
        // Before a front-end can attach, so that the log is in order.
        info!("{description}");
        let serving = Arc::clone(&server);
        let acceptor = thread::Builder::new()
            .name(format!("accept {}", device.name))
            .spawn(move || {
                sandbox::confine(ThreadKind::Control);
                serving.serve();
            })
            .map_err(|e| system("cannot start a thread", e))?;
        // From here on an orderly end removes the cache file, unless it hands the cache over.
        image.arena().keep_on_drop(false);
        let threads = starting.started();
        Ok(Running { socket, server, device, workers, threads, acceptor: Some(acceptor), path, image })
    }
}

/// The worker threads of a device that starts. Dropping it ends them.
///
/// => A device that does not start leaves no thread, which would keep its image locked.
#[derive(Debug, Default)]
struct StartingWorkers {
    controls: Vec<Control>,
    threads: Vec<JoinHandle<()>>,
}

impl StartingWorkers {
    fn add(&mut self, (control, thread): (Control, JoinHandle<()>)) {
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
            control.send(Command::Exit(Duration::ZERO));
        }
        for thread in self.threads.drain(..) {
            // A panic has ended the process.
            let _ = thread.join();
        }
    }
}
