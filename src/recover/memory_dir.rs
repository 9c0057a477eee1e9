//! Checks that a memory directory is on a file system in memory.

use std::fs::File;
use std::path::Path;

use crate::config::{DeviceConfig, MemoryDir, Survive};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::file_system::FileSystem;

/// Checks that files in a device's memory directory would be in memory. On a disk, the kernel would write each change
/// of the cache to the disk, and the cache would outlive a reboot.
///
/// # Errors
/// [`ErrorKind::Config`] with the file system's name, if it is not in memory; [`ErrorKind::Memory`] when it cannot be
/// inspected.
pub fn check_memory_dir(config: &DeviceConfig) -> Result<()> {
    let MemoryDir::Path(memory_dir) = &config.cache.memory_dir else { return Ok(()) };
    if config.read_only || config.cache.survive == Survive::Never {
        // Only a small marker is kept there.
        return Ok(());
    }
    let file_system = file_system_of(memory_dir)?;
    if file_system.is_memory() {
        return Ok(());
    }
    let (shown, found) = (memory_dir.display(), file_system.name());
    let context = format!("{}: memory_dir {shown} is on {found}, which is not memory", config.name);
    let hint = "use a tmpfs such as /dev/shm, or a mounted hugetlbfs";
    Err(Error::new(ErrorKind::Config, format!("{context}; {hint}")))
}

/// The file system of a directory, or of the one in which it would be created.
///
/// # Errors
/// [`ErrorKind::Memory`] when it cannot be inspected.
pub fn file_system_of(directory: &Path) -> Result<FileSystem> {
    let failed = |e| Error::io(ErrorKind::Memory, format!("cannot inspect {}", directory.display()), e);
    let existing = directory.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    File::open(existing).and_then(|file| FileSystem::of(&file)).map_err(failed)
}
