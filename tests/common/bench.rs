//! A device in this process over an image whose faults can be told when to come and go.

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

/// A device that is served, its image's faults, and where to find both.
#[derive(Debug)]
pub struct Bench {
    running: Option<Running>,
    pub faults: Faults,
    socket: PathBuf,
    image: PathBuf,
    _directory: TempDir,
}

impl Bench {
    /// Serves an image with what `shadow` says in it; `adjust` changes the configuration.
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

    /// The image.
    pub fn image(&self) -> &Path {
        &self.image
    }

    /// Where front-ends connect.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// A client with so many queues.
    pub fn client(&self, queues: u16) -> Client {
        let queues = queues.into();
        Client::connect(&self.socket, &ClientOptions { queues, ..ClientOptions::default() })
    }

    /// The device.
    pub fn running(&self) -> &Running {
        self.running.as_ref().expect("it runs until end()")
    }

    /// Ends the device; the image must be what the shadow says.
    pub fn end(mut self, shadow: &Shadow) {
        self.stop();
        if let Err(mismatch) = shadow.check_image(&self.image) {
            panic!("the image after the end: {mismatch:x?}");
        }
    }

    /// Ends the device; its image has no name any more.
    pub fn end_without_image(mut self) {
        self.stop();
    }

    fn stop(&mut self) {
        self.running.take().expect("it runs until here").shutdown().expect("everything can be written");
    }
}
