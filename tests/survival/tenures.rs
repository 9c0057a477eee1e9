//! Whose cache is it? What happens to an image or to its cache between two daemons is noticed: the next daemon uses the
//! cache, or serves the image as it is, or refuses and names the ways out. It never writes old pages over newer data.

use std::ffi::{CStr, CString};
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;

use virtio_bindings::virtio_blk::VIRTIO_BLK_T_IN;

use super::common::daemon::{Daemon, Ended, TempDir, run_to_end, server_binary};
use super::common::request::{Payload, pattern};
use super::common::session::{Session, SessionOptions};
use super::{IMAGE_BYTES, IOERR, start, write_and_kill};

const DEVICE: &str = "cache.size = \"8M\"\ncache.dirty_age_max_ms = 600000";
const RECORD: &CStr = c"user.genblk.tenure";
/// Where tests write, in sectors, and how much, in bytes.
const AT: u64 = 80;
const BYTES: usize = 16 << 10;

fn c_path(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).expect("a path without NUL")
}

/// The record at an image.
pub fn record(image: &Path) -> String {
    let (path, mut value) = (c_path(image), vec![0u8; 4096]);
    // SAFETY: the strings are NUL-terminated, and the call writes at most the buffer's length to it.
    let len = unsafe { libc::getxattr(path.as_ptr(), RECORD.as_ptr(), value.as_mut_ptr().cast(), value.len()) };
    value.truncate(usize::try_from(len).expect("the image has a record"));
    String::from_utf8(value).expect("the record is text")
}

fn set_record(image: &Path, record: &str) {
    let path = c_path(image);
    // SAFETY: the strings are NUL-terminated, and the call reads the record's bytes.
    let done = unsafe { libc::setxattr(path.as_ptr(), RECORD.as_ptr(), record.as_ptr().cast(), record.len(), 0) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}

/// Removes the record of an image.
pub fn remove_record(image: &Path) {
    let path = c_path(image);
    // SAFETY: the strings are NUL-terminated.
    let done = unsafe { libc::removexattr(path.as_ptr(), RECORD.as_ptr()) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}

/// Replaces the value of a line of the image's record.
fn forge(image: &Path, key: &str, value: &str) {
    let old = record(image);
    let edited = old.lines().map(|line| match line.split_once(' ') {
        Some((found, _)) if found == key => format!("{key} {value}\n"),
        _ => format!("{line}\n"),
    });
    set_record(image, &edited.collect::<String>());
}

/// Starts the daemon, which must refuse.
#[track_caller]
fn refused(daemon: &Daemon) -> Ended {
    let ended = run_to_end(Command::new(server_binary()).arg("--config").arg(daemon.config()));
    assert_eq!(ended.status.code(), Some(1), "{ended:?}");
    ended
}

fn genblk(arguments: &[&str]) -> Ended {
    run_to_end(Command::new(server_binary()).args(arguments))
}

#[track_caller]
pub fn take_over(daemon: &Daemon) {
    let (image, memory) = (daemon.image(), daemon.directory().memory());
    let [image, memory] = [&image, &memory].map(|path| path.to_str().expect("UTF-8"));
    let ended = genblk(&["take-over", image, "--memory-dir", memory]);
    assert!(ended.status.success() && ended.stdout.ends_with("can be served now\n"), "{ended:?}");
}

/// A killed daemon whose cache has clean pages, and completed writes that the image lacks.
fn killed() -> (Daemon, Session, Vec<u8>) {
    let mut daemon = start(DEVICE);
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    session.write(0, &pattern(1, 0, 1 << 20));
    session.flush();
    let bytes = pattern(2, AT, BYTES);
    session.write(AT, &bytes);
    daemon.kill();
    (daemon, session, bytes)
}

/// Copies a backup of zeros over the image, in place.
fn restore_backup(image: &Path) {
    let file = File::options().write(true).open(image).expect("the image can be opened");
    file.write_all_at(&vec![0; IMAGE_BYTES as usize], 0).expect("the image can be written");
}

fn image_is_zeros(daemon: &Daemon) -> bool {
    daemon.image_bytes(0, 1 << 20).iter().all(|&byte| byte == 0)
}

#[test]
fn a_backup_restored_in_place_after_a_kill_is_not_overwritten() {
    for sets_times_back in [false, true] {
        let (mut daemon, session, _) = killed();
        let image = daemon.image();
        let long_ago = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
        restore_backup(&image);
        if sets_times_back {
            File::options().write(true).open(&image).and_then(|file| file.set_modified(long_ago)).expect("times");
        }
        let left = daemon.directory().left();
        let cache = left[0].display().to_string();
        // A daemon that was refused leaves everything as it was.
        for _ in 0..2 {
            let text = refused(&daemon).stderr;
            let ways = [
                format!("genblk recover --force {cache}"),
                format!("genblk recover --discard {cache}"),
                format!("genblk take-over {}", image.display()),
                "holds 4 dirty pages (1 MiB, the last written ".to_owned(),
            ];
            assert!(
                text.contains("has changed since its cache") && ways.iter().all(|way| text.contains(way)),
                "{text}"
            );
        }
        let ended = genblk(&["recover", &cache]);
        assert!(!ended.status.success() && ended.stderr.contains("has changed since its cache"), "{ended:?}");
        assert!(image_is_zeros(&daemon));

        take_over(&daemon);
        daemon.restart();
        let mut session = session.reconnect(&daemon.socket());
        session.start_ring(0);
        let status = session.run(0, VIRTIO_BLK_T_IN, AT, Payload::Receive(512)).status;
        assert_eq!(status, IOERR, "a guest that outlived its completed writes is told");
        drop(session);
        let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
        assert!(session.read(AT, BYTES).iter().all(|&byte| byte == 0));
        let is_named =
            |line: &str| line.contains(&format!("{cache} is ignored")) && line.contains("holds 4 dirty pages");
        assert!(daemon.log().lines().any(is_named), "{}", daemon.log());
        assert!(daemon.directory().left().contains(&left[0]), "the cache stays for the operator");
    }
}

#[test]
fn an_image_changed_after_an_orderly_hand_over_is_served_unchanged() {
    let mut daemon = start(DEVICE);
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    session.write(AT, &pattern(1, AT, BYTES));
    session.flush();
    daemon.signal(libc::SIGUSR1);
    assert!(daemon.wait().success());
    let edited = pattern(3, AT, BYTES);
    let file = File::options().write(true).open(daemon.image()).expect("the image can be opened");
    file.write_all_at(&edited, AT * 512).expect("the image can be written");
    daemon.restart();
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    assert!(session.read(AT, BYTES) == edited);
    assert!(daemon.log().contains("dropped the cache in "), "{}", daemon.log());
}

#[test]
fn a_changed_image_is_refused_after_a_hand_over_with_dirty_pages() {
    let mut daemon = start(DEVICE);
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    session.write(AT, &pattern(1, AT, BYTES));
    daemon.signal(libc::SIGUSR1);
    assert!(daemon.wait().success());
    restore_backup(&daemon.image());
    assert!(refused(&daemon).stderr.contains("has changed since its cache"));
    assert!(image_is_zeros(&daemon));
}

#[test]
fn a_grown_image_keeps_its_cache() {
    for (signal, while_served) in [(libc::SIGKILL, false), (libc::SIGUSR1, false), (libc::SIGUSR1, true)] {
        let mut daemon = start(DEVICE);
        let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
        session.write(0, &pattern(1, 0, 1 << 20));
        session.flush();
        let grow = |image: PathBuf| {
            let file = File::options().write(true).open(image).expect("the image can be opened");
            file.set_len(2 * IMAGE_BYTES).expect("the image can grow");
        };
        if while_served {
            grow(daemon.image());
        }
        let bytes = pattern(2, AT, BYTES);
        session.write(AT, &bytes);
        daemon.signal(signal);
        daemon.wait();
        if !while_served {
            grow(daemon.image());
        }
        daemon.restart();
        let mut session = session.reconnect(&daemon.socket());
        session.start_ring(0);
        assert!(session.read(AT, BYTES) == bytes, "signal {signal}: {}", daemon.log());
        let beyond = pattern(4, IMAGE_BYTES / 512, BYTES);
        session.write(IMAGE_BYTES / 512, &beyond);
        daemon.stop();
        assert!(daemon.image_bytes(IMAGE_BYTES, BYTES) == beyond && daemon.image_bytes(AT * 512, BYTES) == bytes);
    }
}

#[test]
fn a_grown_image_keeps_its_all_dirty_cache() {
    let mut daemon = start(DEVICE);
    let (session, bytes) = write_and_kill(&mut daemon);
    let file = File::options().write(true).open(daemon.image()).expect("the image can be opened");
    file.set_len(2 * IMAGE_BYTES).expect("the image can grow");
    daemon.restart();
    let mut session = session.reconnect(&daemon.socket());
    session.start_ring(0);
    assert!(session.read(AT, bytes.len()) == bytes);
}

#[test]
fn a_shrunk_image_keeps_its_cache_only_if_nothing_dirty_lies_beyond_its_end() {
    for (sector, is_beyond) in [(AT, false), (IMAGE_BYTES / 512 - 64, true)] {
        let mut daemon = start(DEVICE);
        let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
        session.write(0, &pattern(1, 0, 1 << 20));
        session.write(IMAGE_BYTES / 512 - 64, &pattern(1, 9, BYTES));
        session.flush();
        let bytes = pattern(2, sector, BYTES);
        session.write(sector, &bytes);
        daemon.kill();
        let file = File::options().write(true).open(daemon.image()).expect("the image can be opened");
        file.set_len(IMAGE_BYTES / 2).expect("the image can shrink");
        if is_beyond {
            let text = refused(&daemon).stderr;
            assert!(text.contains("has shrunk") && text.contains("holds 4 dirty pages past the end"), "{text}");
            file.set_len(IMAGE_BYTES).expect("the image can grow");
            let cache = daemon.directory().left()[0].display().to_string();
            let ended = genblk(&["recover", "--force", &cache]);
            assert!(ended.status.success(), "{ended:?}");
        }
        daemon.restart();
        let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
        assert!(session.read(sector, BYTES) == bytes, "{}", daemon.log());
        session.flush();
        daemon.stop();
        assert!(daemon.image_bytes(sector * 512, BYTES) == bytes);
    }
}

#[test]
fn mode_and_path_of_an_image_may_change_after_a_kill() {
    let (mut daemon, session, bytes) = killed();
    let (image, other) = (daemon.image(), daemon.image().with_extension("moved"));
    fs::set_permissions(&image, fs::Permissions::from_mode(0o640)).expect("permissions can be changed");
    fs::rename(&image, &other).expect("the image can be renamed");
    std::os::unix::fs::symlink(&other, &image).expect("a link can be created");
    daemon.restart();
    let mut session = session.reconnect(&daemon.socket());
    session.start_ring(0);
    assert!(session.read(AT, BYTES) == bytes);
}

#[test]
fn a_cache_is_found_wherever_memory_dir_points_now() {
    let (mut daemon, session, bytes) = killed();
    let left = daemon.directory().left();
    let elsewhere = daemon.directory().memory().join("elsewhere");
    daemon.reconfigure(&format!("{DEVICE}\ncache.memory_dir = {elsewhere:?}"));
    let mut session = session.reconnect(&daemon.socket());
    session.start_ring(0);
    assert!(session.read(AT, BYTES) == bytes);
    assert!(daemon.image_bytes(AT * 512, BYTES) == bytes, "its dirty pages are on the image");
    assert!(!left[0].exists(), "the old cache is removed");
}

#[test]
fn a_removed_dirty_cache_refuses_the_start_until_take_over() {
    let (mut daemon, session, _) = killed();
    let left = daemon.directory().left();
    fs::remove_dir_all(daemon.directory().memory()).expect("the directory can be removed");
    for _ in 0..2 {
        let text = refused(&daemon).stderr;
        assert!(text.contains("does not exist") && text.contains(left[0].to_str().expect("UTF-8")), "{text}");
    }
    take_over(&daemon);
    daemon.restart();
    let mut session = session.reconnect(&daemon.socket());
    session.start_ring(0);
    let status = session.run(0, VIRTIO_BLK_T_IN, AT, Payload::Receive(512)).status;
    assert_eq!(status, IOERR, "the guest must not read older data");
}

#[test]
fn a_cache_of_an_overtaken_tenure_is_never_used() {
    let (mut daemon, _, _) = killed();
    let left = daemon.directory().left();
    let old = fs::read(&left[0]).expect("the file can be read");
    take_over(&daemon);
    fs::remove_file(&left[0]).expect("the file can be removed");
    daemon.restart();
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    let newer = pattern(7, AT, BYTES);
    session.write(AT, &newer);
    session.flush();
    daemon.kill();
    // The folder that was out of reach is back.
    let away = left[0].with_file_name("1-2-3-4");
    fs::write(&away, old).expect("the file can be written");
    daemon.restart();
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    assert!(session.read(AT, BYTES) == newer);
    daemon.stop();
    assert!(daemon.image_bytes(AT * 512, BYTES) == newer);
    assert!(daemon.log().contains("a later daemon has opened the image, as generation"), "{}", daemon.log());
    let listed = genblk(&["recover", "--memory-dir", daemon.directory().memory().to_str().expect("UTF-8")]);
    assert!(listed.stdout.contains("  overtaken: a later daemon has used the image\n"), "{listed:?}");
}

#[test]
fn an_image_that_another_host_holds_is_refused_until_it_is_taken_over() {
    let (mut daemon, _, _) = killed();
    let image = daemon.image();
    forge(&image, "host", "0123456789abcdef0123456789abcdef");
    forge(&image, "boot", "fedcba9876543210fedcba9876543210");
    for device in [DEVICE, "read_only = true"] {
        daemon.configure(device);
        let text = refused(&daemon).stderr;
        assert!(text.contains("host 0123456789abcdef0123456789abcdef") && text.contains("take-over"), "{text}");
    }
    take_over(&daemon);
    daemon.configure(DEVICE);
    daemon.restart();
}

#[test]
fn an_image_with_a_clean_record_of_another_host_is_served() {
    let mut daemon = start(DEVICE);
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    session.write(AT, &pattern(1, AT, BYTES));
    session.flush();
    daemon.signal(libc::SIGUSR1);
    assert!(daemon.wait().success());
    let image = daemon.image();
    assert!(record(&image).contains("state clean"), "{}", record(&image));
    let file = File::options().write(true).open(&image).expect("the image can be opened");
    let modified = file.metadata().and_then(|metadata| metadata.modified()).expect("times");
    let newer = pattern(5, AT, BYTES);
    file.write_all_at(&newer, AT * 512).expect("the image can be written");
    file.set_modified(modified).expect("times can be set");
    forge(&image, "host", "0123456789abcdef0123456789abcdef");
    forge(&image, "boot", "fedcba9876543210fedcba9876543210");
    forge(&image, "generation", "9");
    forge(&image, "id", "fedcba9876543210fedcba9876543210");
    daemon.restart();
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    assert!(session.read(AT, BYTES) == newer, "{}", daemon.log());
    assert!(record(&image).contains("generation 10\n") && record(&image).contains("state open"));
}

#[test]
fn a_data_loss_is_reported_after_a_reboot() {
    let (mut daemon, _, bytes) = killed();
    forge(&daemon.image(), "boot", "fedcba9876543210fedcba9876543210");
    fs::remove_dir_all(daemon.directory().memory()).expect("the directory can be removed");
    daemon.restart();
    assert!(daemon.log().contains("completed writes that were not flushed are lost"), "{}", daemon.log());
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    let (found, flushed) = (session.read(AT, BYTES), pattern(1, 0, 1 << 20));
    assert!(found == bytes || found == flushed[AT as usize * 512..][..BYTES]);
}

#[test]
fn a_record_that_cannot_be_read_is_refused_until_it_is_taken_over() {
    for damaged in ["", "genblk-tenure 2\n", "genblk-tenure 1\ngeneration x\n", "\0\u{1}\n\n\n"] {
        let mut daemon = start(DEVICE);
        daemon.stop();
        set_record(&daemon.image(), damaged);
        let text = refused(&daemon).stderr;
        assert!(text.contains("cannot read") && text.contains("take-over"), "{text}");
        take_over(&daemon);
        daemon.restart();
    }
}

#[test]
fn a_copy_of_an_image_in_use_has_its_own_tenure() {
    let daemon = start(DEVICE);
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    session.write(AT, &pattern(1, AT, BYTES));
    let copies = TempDir::new("copy");
    let copy = copies.path().join("image");
    fs::copy(daemon.image(), &copy).expect("the image can be copied");
    set_record(&copy, &record(&daemon.image()));
    let copied = Daemon::start_configured(copies, &[DEVICE]);
    assert!(copied.log().contains("was copied from an image that was in use"), "{}", copied.log());
    assert!(session.read(AT, BYTES) == pattern(1, AT, BYTES));
}

#[test]
fn a_cache_that_another_user_left_is_named() {
    // SAFETY: a plain system call.
    if unsafe { libc::geteuid() } != 0 {
        eprintln!("skipped: only root can act as several users");
        return;
    }
    let (daemon, _, _) = killed();
    let (image, memory) = (daemon.image(), daemon.directory().memory());
    let folder = memory.join("genblk-4321");
    fs::rename(memory.join("genblk"), &folder).expect("the folder can be renamed");
    let file = fs::read_dir(&folder).expect("the folder").flatten().next().expect("a cache").path();
    for path in [&image, &folder, &file] {
        chown(path, Some(4321), None).expect("root can change owners");
    }
    let text = refused(&daemon).stderr;
    assert!(text.contains("user 4321") && text.contains("holds 4 dirty pages"), "{text}");
}

/// libvirt gives the image of a running VM to QEMU's user. The disk process has no capabilities, the supervisor has.
#[test]
fn the_tenure_of_an_image_of_another_user_ends_cleanly() {
    // SAFETY: a plain system call.
    if unsafe { libc::geteuid() } != 0 {
        eprintln!("skipped: only root can act as several users");
        return;
    }
    for (survive, has_marker) in [("auto", true), ("never", true), ("auto", false)] {
        let directory = TempDir::new("foreign");
        super::make_image(&directory);
        let in_the_way = directory.path().join("in-the-way");
        fs::write(&in_the_way, "not a directory").expect("a file can be created");
        let memory_dir = if has_marker { directory.memory() } else { in_the_way };
        let device = format!("{DEVICE}\ncache.survive = {survive:?}\ncache.memory_dir = {memory_dir:?}");
        let mut daemon = Daemon::start_configured(directory, &[&device]);
        chown(daemon.image(), Some(4321), None).expect("root can change owners");
        let bytes = pattern(1, AT, BYTES);
        Session::open(&daemon.socket(), &SessionOptions::default()).write(AT, &bytes);
        daemon.stop();
        assert!(record(&daemon.image()).contains("state clean"), "{}", record(&daemon.image()));
        assert!(daemon.directory().left().is_empty() && daemon.image_bytes(AT * 512, BYTES) == bytes);
        daemon.restart();
        daemon.stop();
        let log = daemon.log();
        assert!(!log.contains("cannot mark") && !log.contains("reset") && !log.contains("ERROR"), "{log}");
    }
}

#[test]
fn the_tenure_record_reveals_a_loss_without_a_loss_marker() {
    let directory = TempDir::new("markerless");
    super::make_image(&directory);
    // No directory can be created in a file, so the cache is in the daemon's memory alone.
    let memory_dir = directory.memory();
    fs::write(&memory_dir, "in the way").expect("a file can be created");
    let device = format!("{DEVICE}\ncache.memory_dir = {memory_dir:?}");
    let mut daemon = Daemon::start_configured(directory, &[&device]);
    let (session, _) = write_and_kill(&mut daemon);
    assert!(record(&daemon.image()).ends_with("cache memory\n"));
    daemon.restart();
    let mut session = session.reconnect(&daemon.socket());
    session.start_ring(0);
    let status = session.run(0, VIRTIO_BLK_T_IN, AT, Payload::Receive(512)).status;
    assert_eq!(status, IOERR, "the guest must not read older data");
    drop(session);
    assert!(daemon.log().contains("all requests of this guest fail until it resets the device"), "{}", daemon.log());
    // A guest that starts over.
    drop(Session::open(&daemon.socket(), &SessionOptions::default()));
    daemon.stop();
    fs::remove_file(&memory_dir).expect("the file can be removed");
    assert!(record(&daemon.image()).contains("state clean"));
    let metadata = fs::metadata(daemon.image()).expect("the image");
    assert!(record(&daemon.image()).contains(&format!("inode {}\n", metadata.ino())));
}
