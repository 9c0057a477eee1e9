//! State that the devices of a daemon share while they are opened in parallel.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, Weak};

use super::process::{Hosting, SharedProcess};
use super::slot::ImageSlot;
use super::socket::InheritedSockets;
use crate::config::Config;
use crate::error::Result;
use crate::image_id::ImageId;
use crate::systemd::ServiceManager;

/// See the module.
#[derive(Debug)]
pub(super) struct Context {
    pub manager: Arc<ServiceManager>,
    pub images: SharedImages,
    groups: Mutex<HashMap<String, SharedProcess>>,
    pub sockets: InheritedSockets,
    pub hosting: Hosting,
    /// Whether there is a control socket, through which the operator resumes disks; without one, SIGHUP resumes them.
    has_control: bool,
}

impl Context {
    /// The context of the devices of `config`. Takes the sockets that the daemon inherited.
    pub fn new(config: &Config, manager: &Arc<ServiceManager>, hosting: Hosting) -> Self {
        let (images, sockets) = (SharedImages::default(), InheritedSockets::take(config));
        let has_control = config.control.is_some();
        Self { manager: Arc::clone(manager), images, groups: Mutex::default(), sockets, hosting, has_control }
    }

    /// The command or signal that resumes a disk, for messages.
    pub fn resume_by(&self, name: &str) -> String {
        if self.has_control { format!("\"genblk resume {name}\"") } else { "SIGHUP".to_owned() }
    }

    /// The process of the group with this name; `None` if the name is empty.
    pub fn group(&self, name: &str) -> Option<SharedProcess> {
        let mut groups = self.groups.lock().expect("no thread panics with the groups locked");
        (!name.is_empty()).then(|| Arc::clone(groups.entry(name.to_owned()).or_default()))
    }
}

/// The images that read-only devices share, each with one cache and one disk process: by identity and group.
#[derive(Debug, Default)]
pub(super) struct SharedImages(Mutex<HashMap<(ImageId, String), SharedSlot>>);

/// The slot of an image, if a device has it open.
type SharedSlot = Arc<Mutex<Weak<ImageSlot>>>;

impl SharedImages {
    /// The slot of the image with this identity in a group; `open` makes it if no device of the group has it open.
    /// Devices on other images do not wait meanwhile.
    ///
    /// # Errors
    /// Those of `open`.
    pub fn get_or_open(
        &self,
        identity: ImageId,
        group: &str,
        open: impl FnOnce() -> Result<Arc<ImageSlot>>,
    ) -> Result<Arc<ImageSlot>> {
        const NO_PANIC: &str = "no thread panics with the images locked";
        let entry = Arc::clone(self.0.lock().expect(NO_PANIC).entry((identity, group.to_owned())).or_default());
        let mut image = entry.lock().expect(NO_PANIC);
        if let Some(shared) = image.upgrade() {
            return Ok(shared);
        }
        let opened = open()?;
        *image = Arc::downgrade(&opened);
        Ok(opened)
    }
}
