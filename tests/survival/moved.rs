//! Images that are under another name, or were replaced, while a daemon or an operator removes caches that nobody uses.

use std::fs;
use std::path::{Path, PathBuf};

use virtio_bindings::virtio_blk::VIRTIO_BLK_T_IN;

use super::common::daemon::{Daemon, Ended, TempDir, run_to_end, server_binary};
use super::common::request::{Payload, pattern};
use super::common::session::{Session, SessionOptions};
use super::tenures::{record, take_over};
use super::{IOERR, make_image, start, start_in};

const DEVICE: &str = "cache.size = \"8M\"\ncache.dirty_age_max_ms = 600000";
const BYTES: usize = 16 << 10;

fn genblk_recover(arguments: &[&str]) -> Ended {
    run_to_end(std::process::Command::new(server_binary()).arg("recover").args(arguments))
}

/// A daemon that was killed with a clean cache: the image's record is open.
fn kill_with_clean_cache() -> (Daemon, Session) {
    let mut daemon = start(DEVICE);
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    session.write(80, &pattern(3, 80, BYTES));
    session.flush();
    daemon.kill();
    assert!(record(&daemon.image()).contains("state open"));
    (daemon, session)
}

/// Runs `act` while the image is under another name.
fn while_renamed(daemon: &Daemon, act: impl FnOnce()) {
    let other = daemon.directory().path().join("renamed");
    fs::rename(daemon.image(), &other).expect("the image can be renamed");
    act();
    fs::rename(&other, daemon.image()).expect("the image can be renamed back");
}

/// Starts another daemon with the memory directory of `daemon`, and stops it once it has looked at the caches there.
fn start_and_stop_another(daemon: &Daemon, log: &str) {
    let memory = daemon.directory().memory();
    let mut other = start_in(TempDir::new("other"), &format!("{DEVICE}\ncache.memory_dir = {memory:?}"));
    other.await_log(log);
    other.stop();
}

fn caches(daemon: &Daemon) -> Vec<PathBuf> {
    let is_cache = |path: &PathBuf| path.file_name().is_some_and(|name| !name.to_string_lossy().starts_with('.'));
    daemon.directory().left().into_iter().filter(is_cache).collect()
}

#[test]
fn a_clean_cache_removed_while_its_image_was_renamed_is_not_reported_missing() {
    for way in ["start", "prune", "discard"] {
        let (mut daemon, session) = kill_with_clean_cache();
        let memory = daemon.directory().memory();
        while_renamed(&daemon, || match way {
            "start" => start_and_stop_another(&daemon, "its image no longer exists, and it held no unwritten data"),
            "prune" => {
                let ended = genblk_recover(&["--prune", "--memory-dir", memory.to_str().expect("UTF-8")]);
                assert!(ended.status.success() && ended.stdout.contains("removed 1 cache"), "{ended:?}");
            }
            _ => {
                let ended = genblk_recover(&["--discard", caches(&daemon)[0].to_str().expect("UTF-8")]);
                assert!(ended.status.success(), "{ended:?}");
            }
        });
        assert!(caches(&daemon).is_empty(), "{way}: the cache is removed");
        if way == "prune" {
            let (image, memory) = (daemon.image(), memory.to_str().expect("UTF-8").to_owned());
            let arguments = ["take-over", image.to_str().expect("UTF-8"), "--memory-dir", &memory];
            let ended = run_to_end(std::process::Command::new(server_binary()).args(arguments));
            assert!(ended.status.success() && ended.stdout.contains("nothing to take over"), "{ended:?}");
            assert!(record(&image).contains("state clean"), "{}", record(&image));
        }
        daemon.restart();
        let mut session = session.reconnect(&daemon.socket());
        session.start_ring(0);
        assert!(session.read(80, BYTES) == pattern(3, 80, BYTES), "{way}: nothing was lost: {}", daemon.log());
    }
}

#[test]
fn discarding_a_dirty_cache_is_reported_to_the_guest_of_a_renamed_image() {
    let mut daemon = start(DEVICE);
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    session.write(80, &pattern(3, 80, BYTES));
    daemon.kill();
    let cache = caches(&daemon).remove(0);
    while_renamed(&daemon, || {
        let ended = genblk_recover(&["--discard", "--force", cache.to_str().expect("UTF-8")]);
        assert!(ended.status.success(), "{ended:?}");
    });
    daemon.restart();
    let mut session = session.reconnect(&daemon.socket());
    session.start_ring(0);
    assert_eq!(session.run(0, VIRTIO_BLK_T_IN, 80, Payload::Receive(512)).status, IOERR, "{}", daemon.log());
}

#[test]
fn the_loss_marker_of_a_renamed_image_stays() {
    let mut daemon = start(&format!("{DEVICE}\ncache.survive = \"never\""));
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    session.write(80, &pattern(3, 80, BYTES));
    daemon.kill();
    // Without the record at the image, the marker alone knows of the loss.
    super::tenures::remove_record(&daemon.image());
    let marker = caches(&daemon).remove(0);
    while_renamed(&daemon, || {
        start_and_stop_another(&daemon, "serving");
        let memory = daemon.directory().memory();
        let ended = genblk_recover(&["--prune", "--memory-dir", memory.to_str().expect("UTF-8")]);
        assert!(ended.stdout.contains("kept 1"), "{ended:?}");
    });
    assert!(marker.exists(), "the marker stays");
    daemon.restart();
    let mut session = session.reconnect(&daemon.socket());
    session.start_ring(0);
    assert_eq!(session.run(0, VIRTIO_BLK_T_IN, 80, Payload::Receive(512)).status, IOERR, "{}", daemon.log());
}

#[test]
fn a_start_warns_of_the_dirty_cache_of_a_replaced_image() {
    let mut daemon = start(DEVICE);
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    session.write(80, &pattern(3, 80, BYTES));
    daemon.kill();
    let dirty = caches(&daemon).remove(0);
    fs::rename(daemon.image(), daemon.directory().path().join("old")).expect("the image can be renamed");
    make_image(daemon.directory());
    daemon.restart();
    daemon.await_log("1 cache in use by no daemon (1 dirty, ");
    assert!(dirty.exists());
}

#[test]
fn take_over_of_an_image_with_a_clean_cache_loses_no_data() {
    let (mut daemon, session) = kill_with_clean_cache();
    let (image, memory) = (daemon.image(), daemon.directory().memory());
    let arguments = ["take-over", image.to_str().expect("UTF-8"), "--memory-dir", memory.to_str().expect("UTF-8")];
    let ended = run_to_end(std::process::Command::new(server_binary()).args(arguments));
    assert!(ended.status.success() && ended.stdout.contains("nothing to take over"), "{ended:?}");
    daemon.restart();
    let mut session = session.reconnect(&daemon.socket());
    session.start_ring(0);
    assert!(session.read(80, BYTES) == pattern(3, 80, BYTES), "{}", daemon.log());
}

#[test]
fn take_over_sets_aside_the_other_caches_if_one_cannot_be_moved() {
    let mut daemon = start(DEVICE);
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    session.write(80, &pattern(3, 80, BYTES));
    daemon.kill();
    let dirty = caches(&daemon).remove(0);
    // A second file with the name of a cache of this image, before the first one in the order of the search.
    let mut bytes = fs::read(&dirty).expect("the cache can be read");
    bytes[8] = 99;
    let damaged = dirty.with_file_name(format!("{}-1", dirty.file_name().expect("a name").to_string_lossy()));
    fs::write(&damaged, &bytes).expect("a file can be written");
    let (image, memory) = (daemon.image(), daemon.directory().memory());
    let arguments = ["take-over", image.to_str().expect("UTF-8"), "--memory-dir", memory.to_str().expect("UTF-8")];
    let ended = run_to_end(std::process::Command::new(server_binary()).args(arguments));
    assert_eq!(ended.status.code(), Some(1), "{ended:?}");
    let text = &ended.stderr;
    assert!(text.contains(damaged.to_str().expect("UTF-8")) && text.contains("unknown ledger layout"), "{ended:?}");
    assert!(
        text.contains("cannot be served while that file exists") && !ended.stdout.contains("can be served"),
        "{ended:?}"
    );
    let listed = genblk_recover(&["--memory-dir", memory.to_str().expect("UTF-8")]);
    assert!(listed.stdout.contains("set aside"), "{listed:?}");
    fs::remove_file(&damaged).expect("the file can be removed");
    take_over(&daemon);
    daemon.restart();
    assert!(dirty.exists());
}

/// Moves the image of a killed daemon as mv(1) does between file systems, and configures the new path, unless the new
/// file is moved to the old path. Returns the new path.
fn move_to_another_inode(daemon: &Daemon, to: &str) -> PathBuf {
    let moved = daemon.directory().path().join("moved");
    copy_with_attributes(&daemon.image(), &moved);
    if to == "the same path" {
        fs::rename(&moved, daemon.image()).expect("a file can be renamed");
        return daemon.image();
    }
    if to == "another path" {
        fs::remove_file(daemon.image()).expect("the image can be removed");
    }
    let text = fs::read_to_string(daemon.config()).expect("a configuration");
    let (old, new) = (format!("image = {:?}", daemon.image()), format!("image = {moved:?}"));
    fs::write(daemon.config(), text.replace(&old, &new)).expect("a configuration can be written");
    moved
}

fn copy_with_attributes(from: &Path, to: &Path) {
    let copied = run_to_end(std::process::Command::new("cp").arg("--preserve=all").args([from, to]));
    assert!(copied.status.success(), "{copied:?}");
    assert_eq!(record(to), record(from), "times and extended attributes are copied");
}

#[test]
fn an_image_moved_to_another_file_system_is_refused_while_its_cache_is_dirty() {
    for to in ["another path", "the same path"] {
        for way_out in ["recover", "take-over"] {
            let mut daemon = start(DEVICE);
            let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
            session.write(80, &pattern(3, 80, BYTES));
            drop(session);
            daemon.kill();
            let moved = move_to_another_inode(&daemon, to);
            let (cache, image) = (caches(&daemon).remove(0), moved.to_str().expect("UTF-8"));
            let refused = daemon.try_restart().expect_err("the cache holds completed writes");
            assert!(
                refused.contains(&format!("{}, the cache of that file, holds 4 dirty", cache.display())),
                "{refused}"
            );
            let (command, expected) = match way_out {
                "recover" => (format!("recover --force --image {image} {}", cache.display()), pattern(3, 80, BYTES)),
                _ => (format!("take-over {image}"), vec![0; BYTES]),
            };
            assert!(refused.contains(&format!("\"genblk {command}\"")), "{refused}");
            let ended = run_to_end(std::process::Command::new(server_binary()).args(command.split(' ')));
            assert!(ended.status.success(), "{ended:?}");
            daemon.restart();
            let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
            assert!(session.read(80, BYTES) == expected, "{to}, {way_out}: {ended:?} {}", daemon.log());
            assert_eq!(cache.exists(), way_out == "take-over");
        }
    }
}

#[test]
fn a_copy_of_an_image_with_an_existing_original_is_served() {
    let mut daemon = start(DEVICE);
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    session.write(80, &pattern(3, 80, BYTES));
    daemon.kill();
    move_to_another_inode(&daemon, "a copy");
    daemon.restart();
    drop(session);
    daemon.kill();
    // Somebody writes to the original, which is then removed: the copy is not its last state.
    let (mut daemon, session) = kill_with_clean_cache();
    let backup = daemon.directory().path().join("backup");
    copy_with_attributes(&daemon.image(), &backup);
    daemon.restart();
    drop(session);
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    session.write(80, &pattern(4, 80, BYTES));
    session.flush();
    session.write(80, &pattern(5, 80, BYTES));
    drop(session);
    daemon.kill();
    fs::rename(&backup, daemon.image()).expect("the backup can be restored");
    daemon.restart();
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    assert!(session.read(80, BYTES) == pattern(3, 80, BYTES), "{}", daemon.log());
}
