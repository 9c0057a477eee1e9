//! The media that servers export: one image in memory, as a file, as a fast disk, and as a slow disk.
//!
//! The image is on tmpfs: the disk of a small cloud instance is throttled after a burst, so the benchmark would measure
//! the cloud provider. Cached rows export the file itself. Cold rows export a loop device over it with direct I/O, so
//! that the kernel keeps no second copy. Slow-disk rows export a second loop device over the first one, which is
//! throttled. The throttle then counts operations as a disk would: after the kernel has merged the pages that its page
//! cache writes.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{self, Command};

use crate::prng::Prng;
use crate::throttle::{Rate, Throttle};

/// What a row's servers export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Medium {
    /// A file on tmpfs.
    Memory,
    /// A loop device over it.
    Disk,
    /// A throttled loop device over it.
    SlowDisk(Rate),
}

/// A tmpfs that every machine has.
const TMPFS: &str = "/dev/shm";

/// An unnamed file on tmpfs: a killed benchmark leaves no gigabytes behind.
#[derive(Debug)]
pub struct MemoryFile {
    file: File,
    filled_bytes: u64,
}

impl MemoryFile {
    /// A sparse file of `bytes`.
    ///
    /// # Errors
    /// The system's.
    pub fn new(bytes: u64) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_TMPFILE).open(TMPFS)?;
        file.set_len(bytes)?;
        Ok(Self { file, filled_bytes: 0 })
    }

    /// A path under which other processes can open it.
    pub fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", process::id(), self.file.as_raw_fd()).into()
    }

    /// Fills the first `bytes` with data, because reading holes costs nothing.
    ///
    /// # Errors
    /// The system's.
    pub fn fill(&mut self, bytes: u64) -> io::Result<()> {
        let noise = Prng::new(1).bytes(1 << 20);
        for at in (self.filled_bytes..bytes).step_by(noise.len()) {
            self.file.write_all_at(&noise, at)?;
        }
        self.filled_bytes = self.filled_bytes.max(bytes);
        Ok(())
    }
}

/// The media of a run; dropping the value removes them.
#[derive(Debug)]
pub struct Media {
    image: MemoryFile,
    directory: PathBuf,
    // Removed in this order: the upper one first.
    slow: Option<Loop>,
    fast: Option<Loop>,
}

impl Media {
    /// An empty image of `bytes`, and a temporary directory.
    ///
    /// # Errors
    /// The system's.
    pub fn new(bytes: u64) -> io::Result<Self> {
        let image = MemoryFile::new(bytes)?;
        let directory = std::env::temp_dir().join(format!("genblk-bench-{}", process::id()));
        fs::create_dir_all(&directory)?;
        Ok(Self { image, directory, slow: None, fast: None })
    }

    /// The directory for sockets, configurations and logs.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// As [`MemoryFile::fill`], of the image.
    ///
    /// # Errors
    /// The system's.
    pub fn fill(&mut self, bytes: u64) -> io::Result<()> {
        self.image.fill(bytes)
    }

    /// Prepares a medium with a cold page cache in the kernel.
    ///
    /// # Errors
    /// The system's: a loop device or the throttle cannot be set up.
    pub fn open(&mut self, medium: Medium) -> io::Result<OpenMedium> {
        if medium == Medium::Memory {
            return Ok(OpenMedium { path: self.image.path(), throttle: None, counters: None });
        }
        if self.fast.is_none() {
            self.fast = Some(Loop::over(&self.image.path())?);
        }
        let fast = self.fast.as_ref().expect("made above");
        fast.drop_page_cache()?;
        let Medium::SlowDisk(rate) = medium else {
            return Ok(OpenMedium { path: fast.path.clone(), throttle: None, counters: Some(fast.counters()) });
        };
        if self.slow.is_none() {
            self.slow = Some(Loop::over(&fast.path)?);
        }
        let slow = self.slow.as_ref().expect("made above");
        slow.drop_page_cache()?;
        let throttle = Throttle::new(&fast.number()?, rate)?;
        Ok(OpenMedium { path: slow.path.clone(), throttle: Some(throttle), counters: Some(slow.counters()) })
    }
}

impl Drop for Media {
    fn drop(&mut self) {
        (self.slow, self.fast) = (None, None);
        // A leftover directory is harmless.
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// A medium while a server exports it.
#[derive(Debug)]
pub struct OpenMedium {
    pub path: PathBuf,
    throttle: Option<Throttle>,
    /// The device's `stat` file in sysfs.
    counters: Option<PathBuf>,
}

impl OpenMedium {
    /// Whether [`OpenMedium::writes`] counts anything.
    pub fn counts_writes(&self) -> bool {
        self.counters.is_some()
    }

    /// Writes so far: operations and bytes.
    pub fn writes(&self) -> (u64, u64) {
        let text = self.counters.as_ref().and_then(|path| fs::read_to_string(path).ok()).unwrap_or_default();
        let number = |at: usize| text.split_whitespace().nth(at).and_then(|word| word.parse().ok()).unwrap_or(0);
        (number(4), number(6) * 512)
    }

    /// Returns the device to full speed.
    pub fn lift_throttle(&mut self) {
        self.throttle = None;
    }
}

/// A loop device. The kernel detaches it when this value is dropped or the process dies.
#[derive(Debug)]
struct Loop {
    path: PathBuf,
    device: File,
}

impl Loop {
    fn over(file: &Path) -> io::Result<Self> {
        let output = Command::new("losetup").args(["--show", "--direct-io=on", "--find"]).arg(file).output()?;
        if !output.status.success() {
            return Err(io::Error::other(String::from_utf8_lossy(&output.stderr).trim().to_string()));
        }
        let path = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
        let device = OpenOptions::new().read(true).write(true).open(&path)?;
        // While the device is open, this only requests a detach at the last close, so a killed benchmark leaves none.
        Command::new("losetup").arg("--detach").arg(&path).status()?;
        let new = Self { path, device };
        Throttle::remove_stale(&new.number()?);
        Ok(new)
    }

    /// Writes back and drops its pages in the kernel's page cache.
    fn drop_page_cache(&self) -> io::Result<()> {
        /// _IO(0x12, 97)
        const BLKFLSBUF: libc::Ioctl = 0x1261;
        // SAFETY: the ioctl takes no argument, and the descriptor is ours.
        match unsafe { libc::ioctl(self.device.as_raw_fd(), BLKFLSBUF, 0) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn number(&self) -> io::Result<String> {
        let number = self.device.metadata()?.rdev();
        Ok(format!("{}:{}", libc::major(number), libc::minor(number)))
    }

    fn counters(&self) -> PathBuf {
        let name = self.path.file_name().expect("a device has a name");
        Path::new("/sys/block").join(name).join("stat")
    }
}
