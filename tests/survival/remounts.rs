//! A file system that is mounted again, and a block device that is attached again, have other numbers; a file system
//! without birth times gives a new file the number of a deleted one. These tests need root, and are skipped without it.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::common::daemon::{Daemon, TempDir, run_to_end, server_binary};
use super::common::request::pattern;
use super::common::session::{Session, SessionOptions};
use super::common::wait::{TIMEOUT, try_poll};
use super::guest::FrontEnd;
use super::{Ends, assert_survives};

const DEVICE: &str = "cache.size = \"8M\"\ncache.dirty_age_max_ms = 600000";
const FILE_SYSTEM_BYTES: u64 = 160 << 20;
const IMAGE_BYTES: u64 = 16 << 20;
const AT: u64 = 80;
const BYTES: usize = 16 << 10;

/// Runs a command; its output, or `None` if it fails or is not installed.
pub fn run(command: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(command).args(arguments).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// A file on a loop device, detached on drop.
pub struct Loop {
    pub device: String,
}

impl Loop {
    pub fn attach(file: &Path) -> Option<Self> {
        run("losetup", &["-f", "--show", file.to_str()?]).map(|device| Self { device })
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        run("delpart", &[&self.device, "1"]);
        run("losetup", &["-d", &self.device]);
    }
}

/// A file system that is mounted on a directory, unmounted on drop.
struct Mount {
    directory: PathBuf,
    _device: Loop,
}

impl Mount {
    fn new(file: &Path, directory: &Path) -> Option<Self> {
        fs::create_dir_all(directory).ok()?;
        let device = Loop::attach(file)?;
        run("mount", &[&device.device, directory.to_str()?])?;
        Some(Self { directory: directory.to_path_buf(), _device: device })
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // A daemon that was killed holds the file system until the kernel has finished its I/O.
        let path = self.directory.to_str().expect("UTF-8").to_owned();
        let unmounted = try_poll(TIMEOUT, || run("umount", &[&path]));
        if unmounted.is_none() {
            run("umount", &["-l", &path]);
        }
    }
}

/// Creates a file of zeros.
pub fn sparse_file(path: &Path, bytes: u64) {
    File::create(path).and_then(|file| file.set_len(bytes)).expect("a file can be created");
}

/// A directory with a new file system in `disk`, which is mounted on `mounted`; `image` leads to an image in it. `None`
/// where that cannot be done.
fn file_system(name: &str, mkfs: &[&str]) -> Option<(TempDir, Mount)> {
    let directory = TempDir::new(name);
    let disk = directory.path().join("disk");
    sparse_file(&disk, FILE_SYSTEM_BYTES);
    let arguments: Vec<&str> = mkfs[1..].iter().copied().chain(disk.to_str()).collect();
    let made = run(mkfs[0], &arguments);
    let mount = made.and_then(|_| Mount::new(&disk, &directory.path().join("mounted")));
    if mount.is_none() {
        eprintln!("skipped: no {} on a loop device here", mkfs[0]);
    }
    let mount = mount?;
    sparse_file(&mount.directory.join("image"), IMAGE_BYTES);
    std::os::unix::fs::symlink(mount.directory.join("image"), directory.path().join("image")).expect("a link");
    Some((directory, mount))
}

/// Completes writes, flushed ones and others, and kills the daemon; returns the bytes at [`AT`].
fn write_and_kill(daemon: &mut Daemon) -> Vec<u8> {
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    session.write(0, &pattern(1, 0, 1 << 20));
    session.flush();
    let bytes = pattern(2, AT, BYTES);
    session.write(AT, &bytes);
    daemon.kill();
    bytes
}

fn read(daemon: &Daemon) -> Vec<u8> {
    Session::open(&daemon.socket(), &SessionOptions::default()).read(AT, BYTES)
}

#[test]
fn a_file_system_that_is_mounted_again_keeps_the_caches_of_its_images() {
    for mkfs in [&["mkfs.ext4", "-q"][..], &["mkfs.btrfs", "-q"]] {
        let Some((directory, mount)) = file_system("remount", mkfs) else { continue };
        let other = directory.path().join("other");
        sparse_file(&other, 1 << 20);
        let (disk, mounted) = (directory.path().join("disk"), mount.directory.clone());
        let mut daemon = Daemon::start_configured(directory, &[DEVICE]);
        let bytes = write_and_kill(&mut daemon);
        let number = fs::metadata(daemon.image()).expect("the image").dev();
        drop(mount);
        // Another file takes the loop device's number.
        let _taken = Loop::attach(&other);
        let mount = Mount::new(&disk, &mounted).expect("it can be mounted again");
        let is_renumbered = fs::metadata(daemon.image()).expect("the image").dev() != number;
        daemon.restart();
        assert!(read(&daemon) == bytes, "{mkfs:?}, another number: {is_renumbered}: {}", daemon.log());
        assert_eq!(daemon.directory().left().len(), 1, "there is one cache");
        daemon.stop();
        assert!(daemon.image_bytes(AT * 512, BYTES) == bytes);
        drop(daemon);
        drop(mount);
    }
}

/// A file in a snapshot has the inode number, the creation time and the record of the original.
#[test]
fn a_snapshot_of_an_image_never_gets_the_cache_of_the_original() {
    let Some((directory, mount)) = file_system("snapshot", &["mkfs.btrfs", "-q"]) else { return };
    let mut daemon = Daemon::start_configured(directory, &[DEVICE]);
    let bytes = write_and_kill(&mut daemon);
    let root = mount.directory.to_str().expect("UTF-8");
    let flushed = &pattern(1, 0, 1 << 20)[AT as usize * 512..][..BYTES];
    for is_in_use in [false, true] {
        if is_in_use {
            daemon.restart();
        }
        let snapshot = mount.directory.join(format!("snapshot.{is_in_use}"));
        let made = run("btrfs", &["subvolume", "snapshot", root, snapshot.to_str().expect("UTF-8")]);
        assert!(made.is_some(), "a snapshot can be made");
        let directory = TempDir::new("of-snapshot");
        std::os::unix::fs::symlink(snapshot.join("image"), directory.path().join("image")).expect("a link");
        let copied = Daemon::start_configured(directory, &[DEVICE]);
        assert!(copied.log().contains("was copied from an image that was in use"), "{}", copied.log());
        // A disk process whose supervisor died, or the next one, may have written dirty pages to the original by now.
        let found = read(&copied);
        let pages = found.chunks(4096).zip(flushed.chunks(4096).zip(bytes.chunks(4096)));
        let is_as_expected = |(found, (flushed, written))| found == flushed || found == written;
        assert!(pages.into_iter().all(is_as_expected), "flushed or written pages: {}", copied.log());
    }
    assert!(read(&daemon) == bytes, "the original has its completed writes: {}", daemon.log());
    daemon.stop();
    drop(daemon);
    drop(mount);
}

/// Inodes of 128 bytes have no birth time.
#[test]
fn a_new_image_with_the_inode_number_of_an_old_one_gets_none_of_its_pages() {
    for is_dirty in [false, true] {
        let Some((directory, mount)) = file_system("inode", &["mkfs.ext4", "-q", "-I", "128"]) else { return };
        let image = mount.directory.join("image");
        let mut daemon = Daemon::start_configured(directory, &[DEVICE]);
        if is_dirty {
            write_and_kill(&mut daemon);
        } else {
            let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
            session.write(AT, &pattern(2, AT, BYTES));
            session.flush();
            daemon.signal(libc::SIGUSR1);
            assert!(daemon.wait().success());
        }
        let old = fs::metadata(&image).expect("the image").ino();
        fs::remove_file(&image).expect("the image can be removed");
        // The file system records whole seconds.
        std::thread::sleep(Duration::from_millis(1100));
        sparse_file(&image, IMAGE_BYTES);
        assert_eq!(fs::metadata(&image).expect("the image").ino(), old, "the number is used again");
        if is_dirty {
            let ended = run_to_end(Command::new(server_binary()).arg("--config").arg(daemon.config()));
            assert!(ended.stderr.contains("has changed since its cache"), "{ended:?}");
        } else {
            daemon.restart();
            assert!(read(&daemon).iter().all(|&byte| byte == 0), "{}", daemon.log());
            daemon.stop();
        }
        assert!(daemon.image_bytes(0, 1 << 20).iter().all(|&byte| byte == 0));
        drop(daemon);
        drop(mount);
    }
}

#[test]
fn a_block_device_that_is_attached_again_keeps_its_cache_unless_it_was_changed() {
    for is_changed in [false, true] {
        let directory = TempDir::new("attach");
        let (disk, image) = (directory.path().join("disk"), directory.path().join("image"));
        let other = directory.path().join("other");
        sparse_file(&disk, IMAGE_BYTES);
        sparse_file(&other, 1 << 20);
        let Some(device) = Loop::attach(&disk) else {
            eprintln!("skipped: no loop devices here");
            return;
        };
        std::os::unix::fs::symlink(&device.device, &image).expect("a link can be created");
        let mut daemon = Daemon::start_configured(directory, &[DEVICE]);
        let bytes = write_and_kill(&mut daemon);
        let detached = try_poll(TIMEOUT, || run("losetup", &["-d", &device.device]));
        assert!(detached.is_some());
        let _taken = Loop::attach(&other);
        if is_changed {
            let file = File::options().write(true).open(&disk).expect("the file can be opened");
            file.write_all_at(&[0; 1 << 20], 0).expect("the file can be written");
        }
        let again = Loop::attach(&disk).expect("it can be attached again");
        fs::remove_file(&image).expect("the link can be removed");
        std::os::unix::fs::symlink(&again.device, &image).expect("a link can be created");
        if is_changed {
            let ended = run_to_end(Command::new(server_binary()).arg("--config").arg(daemon.config()));
            assert!(ended.stderr.contains("has changed since its cache"), "{ended:?}");
        } else {
            daemon.restart();
            assert!(read(&daemon) == bytes, "{}", daemon.log());
            daemon.stop();
            assert!(daemon.image_bytes(AT * 512, BYTES) == bytes);
        }
        drop(daemon);
        std::mem::forget(device);
    }
}

/// A directory whose `image` leads to a loop device on its file `disk`. `None` where there are none.
fn loop_image(name: &str) -> Option<(TempDir, Loop)> {
    let directory = TempDir::new(name);
    let disk = directory.path().join("disk");
    sparse_file(&disk, IMAGE_BYTES);
    let device = Loop::attach(&disk);
    if device.is_none() {
        eprintln!("skipped: no loop devices here");
    }
    let device = device?;
    std::os::unix::fs::symlink(&device.device, directory.path().join("image")).expect("a link can be created");
    Some((directory, device))
}

#[test]
fn completed_writes_on_a_block_device_survive_kills() {
    let Some((directory, device)) = loop_image("kill-device") else { return };
    let daemon = Daemon::start_configured(directory, &["num_queues = 4\ncache.size = \"6M\""]);
    drop(assert_survives(daemon, FrontEnd::Qemu, Ends::kills(), 215, |_| {}));
    drop(device);
}

/// The times of the file behind the device do not distinguish it from the daemon's own last writes, and no clean page
/// of the cache differs from the backup.
#[test]
fn a_backup_restored_on_a_block_device_right_after_a_kill_is_not_overwritten() {
    let Some((directory, device)) = loop_image("restore-device") else { return };
    let disk = directory.path().join("disk");
    let mut daemon = Daemon::start_configured(directory, &[DEVICE]);
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    session.write(AT, &pattern(1, AT, BYTES));
    session.flush();
    let backup = fs::read(disk).expect("the device's file can be read");
    session.write(AT, &pattern(2, AT, BYTES));
    session.flush();
    session.write(AT, &pattern(3, AT, BYTES));
    daemon.kill();
    let file = File::options().write(true).open(&device.device).expect("the device can be opened");
    file.write_all_at(&backup, 0).and_then(|()| file.sync_all()).expect("the device can be written");
    drop(file);
    let refused = daemon.try_restart().expect_err("the image was restored");
    let is_explained = refused.contains("the device counts more writes") && refused.contains("holds 4 dirty pages");
    assert!(is_explained, "{refused}");
    assert!(daemon.image_bytes(0, IMAGE_BYTES as usize) == backup);
    drop(daemon);
    drop(device);
}

/// A disk and a partition of it are two images for the daemon.
#[test]
fn caches_of_a_disk_and_of_its_partition_are_never_mixed_up() {
    const START: u64 = 2048;
    for (is_disk_first, is_dirty) in [(true, true), (false, true), (true, false), (false, false)] {
        let Some((directory, device)) = loop_image("partition") else { return };
        let image = directory.path().join("image");
        let partition = format!("{}p1", device.device);
        run("addpart", &[&device.device, "1", &START.to_string(), "16384"]);
        if try_poll(Duration::from_secs(2), || Path::new(&partition).exists().then_some(())).is_none() {
            eprintln!("skipped: no partitions of loop devices here");
            return;
        }
        let link_to = |target: &str| {
            let _ = fs::remove_file(&image);
            std::os::unix::fs::symlink(target, &image).expect("a link can be created");
        };
        // The same sector of the disk.
        let [first, second] = match is_disk_first {
            true => [(&device.device, START + AT), (&partition, AT)],
            false => [(&partition, AT), (&device.device, START + AT)],
        };
        link_to(first.0);
        let mut daemon = Daemon::start_configured(directory, &[DEVICE]);
        let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
        let [old, new] = [pattern(1, 0, BYTES), pattern(2, 0, BYTES)];
        session.write(first.1, &old);
        if !is_dirty {
            session.flush();
        }
        daemon.signal(libc::SIGUSR1);
        assert!(daemon.wait().success(), "{}", daemon.log());
        drop(session);
        link_to(second.0);
        if is_dirty {
            let refused = daemon.try_restart().expect_err("a cache holds completed writes");
            assert!(refused.contains("which shares data with image"), "{refused}");
            assert!(refused.contains("\"genblk recover ") && refused.contains("\"genblk take-over "), "{refused}");
            link_to(first.0);
            daemon.restart();
            daemon.stop();
            link_to(second.0);
        }
        daemon.restart();
        assert_eq!(daemon.log().contains("dropped the cache in "), !is_dirty, "{}", daemon.log());
        let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
        assert!(session.read(second.1, BYTES) == old, "{}", daemon.log());
        session.write(second.1, &new);
        session.flush();
        daemon.stop();
        drop(session);
        link_to(first.0);
        daemon.restart();
        let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
        assert!(session.read(first.1, BYTES) == new, "{}", daemon.log());
        drop(session);
        daemon.stop();
        drop(daemon);
        drop(device);
    }
}

/// A file and a loop device on it are the same data for a guest, and two images for the daemon.
#[test]
fn dirty_caches_are_found_across_a_file_and_its_loop_device() {
    for (is_device_first, way_out) in [(false, "recover"), (true, "recover"), (false, "take-over")] {
        let directory = TempDir::new("behind");
        let (disk, image) = (directory.path().join("disk"), directory.path().join("image"));
        sparse_file(&disk, IMAGE_BYTES);
        let Some(device) = Loop::attach(&disk) else {
            eprintln!("skipped: no loop devices here");
            return;
        };
        let link_to = |target: &Path| {
            let _ = fs::remove_file(&image);
            std::os::unix::fs::symlink(target, &image).expect("a link can be created");
        };
        let (first, second) = match is_device_first {
            true => (Path::new(&device.device), disk.as_path()),
            false => (disk.as_path(), Path::new(&device.device)),
        };
        link_to(first);
        let mut daemon = Daemon::start_configured(directory, &[DEVICE]);
        let bytes = write_and_kill(&mut daemon);
        let cache = daemon.directory().left().into_iter().find(|path| !path.to_string_lossy().contains("/."));
        let cache = cache.expect("a cache").to_str().expect("UTF-8").to_owned();
        link_to(second);
        let refused = daemon.try_restart().expect_err("a cache holds completed writes");
        assert!(refused.contains("which shares data with image"), "{refused}");
        let argument = if way_out == "recover" { cache } else { image.to_str().expect("UTF-8").to_owned() };
        assert!(refused.contains(&format!("\"genblk {way_out} {argument}\"")), "{refused}");
        let memory = daemon.directory().memory();
        let mut command = Command::new(server_binary());
        command.args([way_out, &argument]);
        if way_out == "take-over" {
            command.arg("--memory-dir").arg(memory);
        }
        let ended = run_to_end(&mut command);
        assert!(ended.status.success(), "{ended:?}");
        daemon.restart();
        // Without recovery, write-back may have brought them to the image before the kill.
        assert!(way_out == "take-over" || read(&daemon) == bytes, "{ended:?}: {}", daemon.log());
        daemon.stop();
        drop(daemon);
        drop(device);
    }
}
