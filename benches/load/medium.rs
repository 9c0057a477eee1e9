//! What the servers serve: one image in memory, as a file, as a fast device, and as a slow one.
//!
//! The disk of a small cloud machine is throttled after a burst, and would measure the cloud. So the image lies on tmpfs.
//! Cached rows serve the file itself. Cold rows serve a loop device over it, with direct I/O, so that nothing below keeps a
//! second copy. Rows about a slow disk serve a second loop device over the first one, while the first one is limited: the
//! limit then counts operations as a disk would, after the kernel has merged what its page cache writes page by page.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{self, Command};

use crate::prng::Prng;
use crate::throttle::{Rate, Throttle};

/// Where a row's image lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Medium {
    /// A file on tmpfs.
    Memory,
    /// A loop device over it.
    Disk,
    /// The same, limited.
    SlowDisk(Rate),
}

/// Where memory has a file system.
const TMPFS: &str = "/dev/shm";

/// A file in memory without a name: a benchmark that is killed leaves no gigabytes behind.
#[derive(Debug)]
pub struct MemoryFile {
    file: File,
    filled_bytes: u64,
}

impl MemoryFile {
    /// `bytes` of holes.
    ///
    /// # Errors
    /// The system's.
    pub fn new(bytes: u64) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_TMPFILE).open(TMPFS)?;
        file.set_len(bytes)?;
        Ok(Self { file, filled_bytes: 0 })
    }

    /// As other processes can open it.
    pub fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", process::id(), self.file.as_raw_fd()).into()
    }

    /// Puts data into the first `bytes`: holes would cost nothing to read.
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

/// The media of a run; all is taken away with the value.
#[derive(Debug)]
pub struct Media {
    image: MemoryFile,
    folder: PathBuf,
    // Taken down in this order: the upper one first.
    slow: Option<Loop>,
    fast: Option<Loop>,
}

impl Media {
    /// An empty image of `bytes`, and a folder.
    ///
    /// # Errors
    /// The system's.
    pub fn new(bytes: u64) -> io::Result<Self> {
        let image = MemoryFile::new(bytes)?;
        let folder = std::env::temp_dir().join(format!("genblk-bench-{}", process::id()));
        fs::create_dir_all(&folder)?;
        Ok(Self { image, folder, slow: None, fast: None })
    }

    /// Where servers put their sockets.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// As [`MemoryFile::fill`], of the image.
    ///
    /// # Errors
    /// The system's.
    pub fn fill(&mut self, bytes: u64) -> io::Result<()> {
        self.image.fill(bytes)
    }

    /// The path to serve, cold: nothing of it is in the kernel's page cache.
    ///
    /// # Errors
    /// Why there is no such medium here.
    pub fn open(&mut self, medium: Medium) -> io::Result<Opened> {
        if medium == Medium::Memory {
            return Ok(Opened { path: self.image.path(), throttle: None, counters: None });
        }
        if self.fast.is_none() {
            self.fast = Some(Loop::over(&self.image.path())?);
        }
        let fast = self.fast.as_ref().expect("made above");
        fast.forget_pages()?;
        let Medium::SlowDisk(rate) = medium else {
            return Ok(Opened { path: fast.path.clone(), throttle: None, counters: Some(fast.counters()) });
        };
        if self.slow.is_none() {
            self.slow = Some(Loop::over(&fast.path)?);
        }
        let slow = self.slow.as_ref().expect("made above");
        slow.forget_pages()?;
        let throttle = Throttle::new(&fast.number()?, rate)?;
        Ok(Opened { path: slow.path.clone(), throttle: Some(throttle), counters: Some(slow.counters()) })
    }
}

impl Drop for Media {
    fn drop(&mut self) {
        (self.slow, self.fast) = (None, None);
        // What is left is untidy, not wrong.
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// A medium while it is served.
#[derive(Debug)]
pub struct Opened {
    pub path: PathBuf,
    throttle: Option<Throttle>,
    /// The kernel's counters of the device.
    counters: Option<PathBuf>,
}

impl Opened {
    /// Whether [`Opened::writes`] tells anything.
    pub fn counts_writes(&self) -> bool {
        self.counters.is_some()
    }

    /// Operations and bytes written so far.
    pub fn writes(&self) -> (u64, u64) {
        let text = self.counters.as_ref().and_then(|path| fs::read_to_string(path).ok()).unwrap_or_default();
        let number = |at: usize| text.split_whitespace().nth(at).and_then(|word| word.parse().ok()).unwrap_or(0);
        (number(4), number(6) * 512)
    }

    /// The device at its full speed again.
    pub fn unleash(&mut self) {
        self.throttle = None;
    }
}

/// A loop device; the kernel takes it down when this value (or the process) is gone.
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
        // While it is open this only marks it to be taken down at the last close: a benchmark that is killed leaves none.
        Command::new("losetup").arg("--detach").arg(&path).status()?;
        let new = Self { path, device };
        Throttle::lift_old(&new.number()?);
        Ok(new)
    }

    /// Writes back and drops what the kernel's page cache holds of it.
    fn forget_pages(&self) -> io::Result<()> {
        /// _IO(0x12, 97)
        const BLKFLSBUF: libc::Ioctl = 0x1261;
        // SAFETY: the call takes no argument and works on our own descriptor.
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
