//! A device served in this process, on an image that fails on demand.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use genblk::config::{DeviceConfig, Socket};
use genblk::service::{Running, Service};
use genblk::store::Backing;
use genblk::store::faulty::{Faults, FaultyImage};
use genblk::store::file::{FileImage, OpenOptions};

use super::daemon::TempDir;
use super::shadow::Shadow;
use super::workload::{Client, ClientOptions};

/// A running device, and control of its image's faults.
#[derive(Debug)]
pub struct FaultyDevice {
    running: Option<Running>,
    pub faults: Faults,
    socket: PathBuf,
    image: PathBuf,
    _directory: TempDir,
}

impl FaultyDevice {
    /// Serves an image with the contents of `shadow`; `adjust` changes the configuration.
    pub fn new(name: &str, shadow: &Shadow, adjust: impl FnOnce(&mut DeviceConfig)) -> Self {
        let directory = TempDir::new(name);
        let (image, socket) = (directory.path().join("disk.img"), directory.path().join("blk.sock"));
        shadow.write_image(&image);
        let file: Arc<dyn Backing> = FileImage::open(&image, &OpenOptions::default()).expect("the image opens");
        let (faulty, faults) = FaultyImage::new(file);
        let mut config = DeviceConfig::new("faulty", Socket::Path(socket.clone()), image.clone());
        config.cache.size_bytes = 4 << 20;
        adjust(&mut config);
        let running = Service::with_image(&config, faulty).and_then(Service::start).expect("the device is served");
        Self { running: Some(running), faults, socket, image, _directory: directory }
    }

    /// The image's path.
    pub fn image(&self) -> &Path {
        &self.image
    }

    /// The socket to which front-ends connect.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// A client with this number of queues.
    pub fn client(&self, queues: u16) -> Client {
        let queues = queues.into();
        Client::connect(&self.socket, &ClientOptions { queues, ..ClientOptions::default() })
    }

    /// The running device.
    pub fn running(&self) -> &Running {
        self.running.as_ref().expect("the device runs until shutdown")
    }

    /// Shuts the device down; the image must then match the shadow.
    pub fn shutdown(mut self, shadow: &Shadow) {
        self.stop();
        if let Err(mismatch) = shadow.check_image(&self.image) {
            panic!("the image after shutdown: {mismatch:x?}");
        }
    }

    /// Shuts the device down; its image has been unlinked and is not checked.
    pub fn shutdown_without_image(mut self) {
        self.stop();
    }

    fn stop(&mut self) {
        self.running.take().expect("the device runs").shutdown().expect("every dirty page is written");
    }
}
