//! A raw image, a regular file or a block device, with a queue for every worker.

use std::io;
use std::path::Path;
use std::sync::{Arc, Once};

use super::image::OpenImage;
pub use super::options::{IoEngine, OpenOptions};
use super::threads::ThreadQueue;
use super::uring::UringQueue;
use super::{Backing, Limits, StoreQueue, blocking};
use crate::error::{Error, ErrorKind, Result};
use crate::image_id::ImageId;
use crate::units::Unmap;

/// A raw image, opened and locked. The lock lasts as long as this value and its queues.
#[derive(Debug)]
pub struct FileImage {
    image: Arc<OpenImage>,
    engine: IoEngine,
    /// Logs once that threads replace io_uring.
    fallback_warning: Once,
}

impl FileImage {
    /// Opens and locks the image at `path`. Blocks: not for a worker's thread.
    ///
    /// # Errors
    /// [`ErrorKind::Image`] if it is missing, neither a regular file nor a block device, empty, too large, not a
    /// multiple of 512 bytes long, or can't be opened; [`ErrorKind::Locked`] if another opener's lock conflicts. Every
    /// error names the image.
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Arc<Self>> {
        Self::open_labelled(format!("image {}", path.display()), path, options)
    }

    /// As [`FileImage::open`], for the device of this name: log lines about the image begin with it.
    ///
    /// # Errors
    /// As [`FileImage::open`].
    pub fn open_for(device: &str, path: &Path, options: &OpenOptions) -> Result<Arc<Self>> {
        Self::open_labelled(format!("{device}: image {}", path.display()), path, options)
    }

    fn open_labelled(label: String, path: &Path, options: &OpenOptions) -> Result<Arc<Self>> {
        let image = OpenImage::open(label, path, options)?;
        Ok(Arc::new(Self { image: Arc::new(image), engine: options.engine, fallback_warning: Once::new() }))
    }

    /// What the image is, whatever its name: equal for two names of one image.
    pub fn identity(&self) -> ImageId {
        self.image.identity()
    }

    /// Whether transfers bypass the host's page cache.
    pub fn direct(&self) -> bool {
        self.image.is_direct()
    }

    /// Makes every system call move at most `bytes` from now on, as short transfers do.
    #[cfg(test)]
    pub(super) fn limit_transfers(&self, bytes: usize) {
        self.image.limit_transfers(bytes);
    }

    /// Makes a range (in bytes) read as zeros and keeps its space. Blocks.
    ///
    /// => No other operation on the range is in flight.
    ///
    /// # Errors
    /// The error of fallocate(2), pread(2) or pwrite(2).
    pub fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        blocking::zero(&self.image, offset, len, Unmap::Forbidden)
    }

    /// Where the image was opened.
    pub fn path(&self) -> &Path {
        self.image.path()
    }
}

impl Backing for FileImage {
    fn limits(&self) -> &Limits {
        &self.image.limits
    }

    fn attach(&self) -> Result<Box<dyn StoreQueue>> {
        let path = self.image.path().display();
        let failed = |action: &str, error: io::Error| {
            Error::io(ErrorKind::System, format!("image {path}: cannot {action}"), error)
        };
        if self.engine != IoEngine::Threads {
            match UringQueue::new(Arc::clone(&self.image)) {
                Ok(queue) => return Ok(Box::new(queue)),
                // ENOSYS: not in this kernel. EPERM: forbidden (seccomp, io_uring_disabled). EINVAL: the kernel is too
                // old for the options that we need.
                Err(error)
                    if self.engine == IoEngine::Auto
                        && matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EPERM | libc::EINVAL)) =>
                {
                    self.fallback_warning.call_once(|| {
                        let label = self.image.label();
                        log::warn!("{label}: io_uring is not available ({error}); using threads");
                    });
                }
                Err(error) => return Err(failed("set up io_uring", error)),
            }
        }
        match ThreadQueue::new(Arc::clone(&self.image)) {
            Ok(queue) => Ok(Box::new(queue)),
            Err(error) => Err(failed("start I/O threads", error)),
        }
    }
}
