//! A machine: a daemon that serves a volatile disk, and its power switch.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use genblk::config::Engine;

use crate::common::SECTOR_BYTES;
use crate::common::daemon::{Daemon, TempDir, server_binary};
use crate::common::request::pattern;
use crate::common::session::{Session, SessionOptions};
use crate::common::wait::{TIMEOUT, poll_until};
use crate::disk::{Disk, Loss, OpClass};
use crate::mount::Mount;
use crate::oracle::byte_range;

const IMAGE_BYTES: usize = 8 << 20;
/// Patterns of mark 1 and holes alternate in the image, in pieces of this size.
pub const PATCH_BYTES: usize = 256 << 10;

/// A daemon on a volatile disk. Dropping it ends the daemon and unmounts the disk.
pub struct Machine {
    pub daemon: Daemon,
    _mount: Mount,
    pub disk: Arc<Disk>,
}

/// The directory of the machine's records of tenures, which are lost with its power.
fn records_of(directory: &TempDir) -> PathBuf {
    directory.path().join("records")
}

impl Machine {
    /// Starts a daemon with a cache of half the image's size. `None` if this host cannot mount the disk; a line says
    /// why.
    pub fn start(engine: Engine, seed: u64) -> Option<Self> {
        let mut bytes = vec![0; IMAGE_BYTES];
        for start in (0..IMAGE_BYTES).step_by(2 * PATCH_BYTES) {
            let data = pattern(1, (start / SECTOR_BYTES) as u64, PATCH_BYTES);
            bytes[start..start + PATCH_BYTES].copy_from_slice(&data);
        }
        let disk = Arc::new(Disk::new(bytes, seed));
        let mount = match Mount::new(Arc::clone(&disk)) {
            Ok(mount) => mount,
            Err(reason) => {
                println!("SKIPPED: {reason}");
                return None;
            }
        };
        let directory = TempDir::new("volatile");
        symlink(mount.image(), directory.path().join("image")).expect("a link can be made");
        let io_urings = usize::from(engine == Engine::IoUring);
        let device = format!("engine = \"{engine}\"\nnum_queues = 1\ncache.size = \"4M\"");
        let mut command = Command::new(server_binary());
        command.env("GENBLK_TEST_TENURES", records_of(&directory));
        let daemon = Daemon::start_by(directory, &[&device], command);
        // The worker starts its engine after the socket listens.
        poll_until("the configured engine", TIMEOUT, || (daemon.io_urings() == io_urings).then_some(()));
        Some(Self { daemon, _mount: mount, disk })
    }

    /// A front-end with one running vring.
    pub fn session(&self) -> Session {
        Session::open(&self.daemon.socket(), &SessionOptions::default())
    }

    /// The bytes that would survive a power cut now.
    pub fn platter(&self) -> Vec<u8> {
        self.disk.platter(0..IMAGE_BYTES)
    }

    /// Cuts the power: daemon, cache and unsynced writes are lost. Returns the bytes on the platter.
    pub fn cut_power(&mut self, loss: Loss) -> Vec<u8> {
        self.disk.cut_power(loss);
        self.daemon.kill();
        // The daemon's cache, and the host's records of tenures. Power cuts in a row find none.
        let directory = self.daemon.directory();
        let _ = fs::remove_dir_all(directory.memory());
        let _ = fs::remove_dir_all(records_of(directory));
        self.platter()
    }

    /// Restores the power and starts the daemon.
    pub fn restore_power(&mut self) {
        self.disk.restore_power();
        self.daemon.restart();
    }

    /// Fails the test unless the platter holds `bytes` at sector `first`.
    #[track_caller]
    pub fn assert_stable(&self, first: u64, bytes: &[u8]) {
        let range = byte_range(first, (bytes.len() / SECTOR_BYTES) as u64);
        assert!(
            self.disk.platter(range) == bytes,
            "{} bytes at sector {first} would not survive a power cut",
            bytes.len()
        );
    }

    /// Waits until the disk holds the completions of `count` operations of a class.
    #[track_caller]
    pub fn wait_until_held(&self, class: OpClass, count: usize) {
        let what = format!("{count} operations of class {class:?} to arrive");
        poll_until(&what, TIMEOUT, || (self.disk.held(class) == count).then_some(()));
    }
}

impl Drop for Machine {
    /// A killed process stays until the disk has completed its operations, so a held one would hang the test.
    fn drop(&mut self) {
        self.disk.cut_power(Loss::All);
    }
}
