//! Images that cannot carry the record of a tenure: block devices, and files on file systems without extended
//! attributes. This host has their records. These tests need root, and are skipped without it.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use virtio_bindings::virtio_blk::VIRTIO_BLK_T_IN;

use super::common::daemon::{Daemon, TempDir, run_to_end, server_binary};
use super::common::request::{Payload, pattern};
use super::common::session::{Session, SessionOptions};
use super::common::wait::{TIMEOUT, try_poll};
use super::remounts::{Loop, run, sparse_file};
use super::{IMAGE_BYTES, IOERR};

const DEVICE: &str = "cache.size = \"8M\"\ncache.dirty_age_max_ms = 600000";
const AT: u64 = 80;
const BYTES: usize = 16 << 10;

/// What keeps an image available, undone on drop.
enum Place {
    Device { _device: Loop },
    FileSystem(PathBuf),
}

impl Drop for Place {
    fn drop(&mut self) {
        let Self::FileSystem(directory) = self else { return };
        let path = directory.to_str().expect("UTF-8").to_owned();
        let unmounted = try_poll(TIMEOUT, || run("umount", &[&path]));
        if unmounted.is_none() {
            run("umount", &["-l", &path]);
        }
    }
}

/// A directory whose `image` is a loop device, or a file on a file system without extended attributes.
fn image(is_device: bool) -> Option<(TempDir, Place)> {
    let directory = TempDir::new("unrecorded");
    let link = directory.path().join("image");
    let place = if is_device {
        let disk = directory.path().join("disk");
        sparse_file(&disk, IMAGE_BYTES);
        let device = Loop::attach(&disk);
        device.map(|device| (PathBuf::from(&device.device), Place::Device { _device: device }))
    } else {
        let mounted = directory.path().join("mounted");
        fs::create_dir(&mounted).expect("a directory can be created");
        let is_mounted = run("mount", &["-t", "ramfs", "none", mounted.to_str().expect("UTF-8")]).is_some();
        is_mounted.then(|| {
            let file = mounted.join("image");
            sparse_file(&file, IMAGE_BYTES);
            (file, Place::FileSystem(mounted))
        })
    };
    if place.is_none() {
        eprintln!("skipped: no loop devices or no mounts here");
    }
    let (target, place) = place?;
    std::os::unix::fs::symlink(target, link).expect("a link can be created");
    Some((directory, place))
}

fn in_memory_dir(memory_dir: &Path) -> String {
    format!("{DEVICE}\ncache.memory_dir = {memory_dir:?}")
}

/// A killed daemon with completed writes that the image lacks, and its guest.
fn kill(directory: TempDir) -> (Daemon, Session, Vec<u8>) {
    let mut daemon = Daemon::start_configured(directory, &[DEVICE]);
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    session.write(0, &pattern(1, 0, 1 << 20));
    session.flush();
    let bytes = pattern(2, AT, BYTES);
    session.write(AT, &bytes);
    daemon.kill();
    (daemon, session, bytes)
}

fn take_over(daemon: &Daemon, memory_dir: &Path) {
    let mut command = Command::new(server_binary());
    let ended = run_to_end(command.arg("take-over").arg(daemon.image()).arg("--memory-dir").arg(memory_dir));
    assert!(ended.status.success() && ended.stdout.ends_with("can be served now\n"), "{ended:?}");
}

fn caches(memory_dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(memory_dir.join("genblk")).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| !path.to_string_lossy().contains("/.")).collect()
}

#[test]
fn the_cache_of_an_image_without_attributes_is_found_in_another_memory_dir() {
    for is_device in [true, false] {
        let Some((directory, place)) = image(is_device) else { return };
        let (mut daemon, session, bytes) = kill(directory);
        let left = daemon.directory().left();
        // Not below the default directory, nor below the first one.
        let elsewhere = daemon.directory().other_memory("elsewhere");
        daemon.reconfigure(&in_memory_dir(&elsewhere));
        let mut session = session.reconnect(&daemon.socket());
        session.start_ring(0);
        assert!(session.read(AT, BYTES) == bytes, "{}", daemon.log());
        assert!(daemon.image_bytes(AT * 512, BYTES) == bytes && !left[0].exists(), "{}", daemon.log());
        drop(session);
        daemon.stop();
        fs::remove_dir_all(&elsewhere).expect("it can be removed");
        daemon.reconfigure(DEVICE);
        daemon.stop();
        assert!(!daemon.log().contains("ERROR") && !daemon.log().contains(" lost"), "{}", daemon.log());
        drop((daemon, place));
    }
}

#[test]
fn a_removed_cache_of_an_image_without_attributes_refuses_the_start_until_take_over() {
    for is_device in [true, false] {
        let Some((directory, place)) = image(is_device) else { return };
        let (mut daemon, session, _) = kill(directory);
        let (left, memory) = (daemon.directory().left(), daemon.directory().memory());
        let away = daemon.directory().other_memory("away");
        fs::rename(&memory, &away).expect("the folder can be renamed");
        let refused = daemon.try_restart().expect_err("a cache is missing");
        assert!(refused.contains("does not exist") && refused.contains(left[0].to_str().expect("UTF-8")), "{refused}");
        take_over(&daemon, &memory);
        daemon.restart();
        let mut session = session.reconnect(&daemon.socket());
        session.start_ring(0);
        assert_eq!(session.run(0, VIRTIO_BLK_T_IN, AT, Payload::Receive(512)).status, IOERR, "{}", daemon.log());
        drop(session);
        let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
        let newer = pattern(7, AT, BYTES);
        session.write(AT, &newer);
        drop(session);
        daemon.stop();
        // The folder comes back.
        let _ = fs::remove_dir_all(&memory);
        fs::rename(&away, &memory).expect("the folder can be renamed");
        daemon.restart();
        assert!(Session::open(&daemon.socket(), &SessionOptions::default()).read(AT, BYTES) == newer);
        assert!(daemon.log().contains("a later daemon has opened the image, as generation"), "{}", daemon.log());
        daemon.stop();
        assert!(daemon.image_bytes(AT * 512, BYTES) == newer);
        drop((daemon, place));
    }
}

#[test]
fn a_clean_end_of_an_image_without_attributes_needs_no_cache() {
    for (is_device, way) in
        [(true, "hand-over"), (false, "hand-over"), (true, "recover"), (true, "discard"), (true, "prune")]
    {
        let Some((directory, place)) = image(is_device) else { return };
        let mut daemon = Daemon::start_configured(directory, &[DEVICE]);
        let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
        let bytes = pattern(2, AT, BYTES);
        session.write(AT, &bytes);
        session.flush();
        if way == "recover" {
            session.write(AT, &bytes);
        }
        drop(session);
        daemon.signal(if way == "hand-over" { libc::SIGUSR1 } else { libc::SIGKILL });
        daemon.wait();
        let memory = daemon.directory().memory();
        let cache = caches(&memory).remove(0);
        let genblk = |arguments: &[&str]| {
            let mut command = Command::new(server_binary());
            let ended = run_to_end(command.arg("recover").args(arguments));
            assert!(ended.status.success(), "{way}: {ended:?}");
        };
        let (cache, folder) = (cache.to_str().expect("UTF-8"), memory.to_str().expect("UTF-8"));
        match way {
            "recover" => genblk(&[cache]),
            "discard" => genblk(&["--discard", cache]),
            "prune" => genblk(&["--prune", "--memory-dir", folder]),
            _ => {}
        }
        fs::remove_dir_all(&memory).expect("the folder can be removed");
        daemon.restart();
        let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
        assert!(session.read(AT, BYTES) == bytes, "{way}: {}", daemon.log());
        drop(session);
        daemon.stop();
        drop((daemon, place));
    }
}

/// The file that keeps the guest's choice for the next daemon holds no pages.
#[test]
fn a_clean_stop_of_a_guest_that_chose_write_through_needs_no_cache() {
    for survive in ["auto", "never"] {
        let Some((directory, place)) = image(true) else { return };
        let mut daemon = Daemon::start_configured(directory, &[&format!("{DEVICE}\ncache.survive = {survive:?}")]);
        let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
        session.set_writeback(false);
        let bytes = pattern(2, AT, BYTES);
        session.write(AT, &bytes);
        drop(session);
        daemon.stop();
        assert!(!daemon.log().contains("WARN"), "{survive}: {}", daemon.log());
        let _ = fs::remove_dir_all(daemon.directory().memory());
        daemon.restart();
        let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
        assert!(session.read(AT, BYTES) == bytes, "{survive}: {}", daemon.log());
        drop(session);
        daemon.stop();
        drop((daemon, place));
    }
}

/// A directory whose `disk` is a file with a loop device on it, and a daemon's configuration of each, with memory
/// directories that do not know of each other.
fn file_and_device() -> Option<(TempDir, Loop, [String; 2])> {
    let directory = TempDir::new("two-accesses");
    let disk = directory.path().join("disk");
    sparse_file(&disk, IMAGE_BYTES);
    let device = Loop::attach(&disk);
    if device.is_none() {
        eprintln!("skipped: no loop devices here");
    }
    let device = device?;
    let configuration =
        |image: &str, name: &str| format!("image = {image:?}\n{}", in_memory_dir(&directory.other_memory(name)));
    let disk = disk.to_str().expect("UTF-8");
    let configurations = [configuration(disk, "of-file"), configuration(&device.device, "of-device")];
    Some((directory, device, configurations))
}

#[test]
fn a_file_and_its_loop_device_are_never_served_at_once() {
    for first in [0, 1] {
        let Some((directory, device, configurations)) = file_and_device() else { return };
        let mut daemon = Daemon::start_configured(directory, &[&configurations[first]]);
        let other = TempDir::new("second-access");
        let path = other.path().join("genblk.toml");
        let socket = other.path().join("socket");
        let text = format!("[[device]]\nname = \"other\"\nsocket = {socket:?}\n{}\n", configurations[1 - first]);
        fs::write(&path, text).expect("a file can be written");
        let ended = run_to_end(Command::new(server_binary()).arg("--config").arg(&path));
        let is_explained = ended.stderr.contains(&device.device) && ended.stderr.contains("the same bytes");
        assert!(!ended.status.success() && is_explained && ended.stderr.contains("is in use"), "{ended:?}");
        daemon.stop();
        drop((daemon, device));
    }
}

#[test]
fn a_cache_of_the_other_access_to_a_file_or_its_loop_device_is_found_in_any_memory_dir() {
    for (first, is_missing) in [(0, false), (1, false), (0, true), (1, true)] {
        let Some((directory, device, configurations)) = file_and_device() else { return };
        let memory = directory.other_memory(["of-file", "of-device"][first]);
        let target = |n: usize| if n == 0 { directory.path().join("disk") } else { PathBuf::from(&device.device) };
        let second = target(1 - first);
        let mut daemon = Daemon::start_configured(directory, &[&configurations[first]]);
        let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
        session.write(AT, &pattern(2, AT, BYTES));
        drop(session);
        daemon.kill();
        let cache = caches(&memory).remove(0);
        if is_missing {
            fs::remove_dir_all(&memory).expect("it can be removed");
        }
        daemon.configure(&configurations[1 - first]);
        let refused = daemon.try_restart().expect_err("a cache holds completed writes");
        assert!(refused.contains(cache.to_str().expect("UTF-8")), "{refused}");
        assert!(refused.contains(if is_missing { "does not exist" } else { "holds 4 dirty pages" }), "{refused}");
        assert!(refused.contains("\"genblk take-over "), "{refused}");
        let mut command = Command::new(server_binary());
        let ended = run_to_end(command.arg("take-over").arg(&second));
        assert!(ended.status.success() && ended.stdout.ends_with("can be served now\n"), "{ended:?}");
        daemon.restart();
        daemon.stop();
        drop((daemon, device));
    }
}

#[test]
fn the_loss_of_an_unmarked_cache_of_a_device_is_reported() {
    let Some((directory, place)) = image(true) else { return };
    // No directory can be created in a file, so the cache is in the daemon's memory alone.
    let memory_dir = directory.memory();
    fs::write(&memory_dir, "in the way").expect("a file can be created");
    let mut daemon = Daemon::start_configured(directory, &[&in_memory_dir(&memory_dir)]);
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    session.write(AT, &pattern(2, AT, BYTES));
    daemon.kill();
    daemon.restart();
    let mut session = session.reconnect(&daemon.socket());
    session.start_ring(0);
    assert_eq!(session.run(0, VIRTIO_BLK_T_IN, AT, Payload::Receive(512)).status, IOERR, "{}", daemon.log());
    drop(session);
    drop(Session::open(&daemon.socket(), &SessionOptions::default()));
    daemon.stop();
    // Everything is on the image now.
    daemon.restart();
    let losses = daemon.log().matches("all requests of this guest fail until it resets the device").count();
    assert_eq!(losses, 1, "{}", daemon.log());
    daemon.stop();
    fs::remove_file(&memory_dir).expect("the file can be removed");
    drop((daemon, place));
}

#[test]
fn a_start_warns_once_if_no_record_of_its_image_can_be_written() {
    let Some((directory, place)) = image(true) else { return };
    let in_the_way = directory.path().join("in-the-way");
    File::create(&in_the_way).and_then(|file| file.write_all_at(b"x", 0)).expect("a file can be created");
    let mut command = Command::new(server_binary());
    command.env("GENBLK_TEST_TENURES", &in_the_way);
    let daemon = Daemon::start_by(directory, &[DEVICE], command);
    let warnings = daemon.log().matches("cannot record for other daemons").count();
    assert_eq!(warnings, 1, "{}", daemon.log());
    drop((daemon, place));
}
