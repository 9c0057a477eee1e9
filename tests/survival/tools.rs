//! What the tools of a host do to an image between two daemons: the next daemon serves the image as the tool has left
//! it, or refuses while its cache holds completed writes.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use super::common::daemon::{Daemon, run_to_end, server_binary};
use super::common::request::pattern;
use super::common::session::{Session, SessionOptions};
use super::common::wait::{TIMEOUT, poll_until};
use super::start;

const DEVICE: &str = "cache.size = \"32M\"\ncache.dirty_age_max_ms = 600000";
/// Tools that change the image in place, as commands of a shell. `$I` is the image, `$B` a backup of it.
const IN_PLACE: &[(&str, &str)] = &[
    ("cp", "cp $B $I"),
    ("cp with times", "cp --preserve=timestamps $B $I"),
    ("dd", "dd if=$B of=$I bs=64k conv=notrunc status=none"),
    ("rsync", "rsync --inplace --ignore-times $B $I"),
    ("rsync of what differs, with times", "rsync --inplace --no-whole-file --ignore-times --times $B $I"),
    ("qemu-img", "qemu-img convert -n -f raw -O raw $B $I"),
];
/// Tools that put another file in the image's place.
const REPLACING: &[(&str, &str)] = &[
    ("mv", "cp $B $B.2 && mv $B.2 $I"),
    ("cp --sparse", "cp --sparse=always $B $B.2 && mv $B.2 $I"),
    ("cp --reflink", "cp --reflink=auto $B $B.2 && mv $B.2 $I"),
    ("rsync", "rsync --ignore-times $B $I"),
    ("qemu-img", "qemu-img convert -f raw -O raw $B $B.2 && mv $B.2 $I"),
];

/// Runs a tool on the daemon's image; `false` if it is not installed.
fn run(daemon: &Daemon, line: &str) -> bool {
    let tool = line.split(' ').next().expect("a command has a name");
    let has = Command::new("sh").args(["-c", &format!("command -v {tool} >/dev/null")]).status();
    if !has.is_ok_and(|status| status.success()) {
        println!("skipped: {tool} is not installed");
        return false;
    }
    let mut command = Command::new("sh");
    command.args(["-c", line]).env("I", daemon.image()).env("B", daemon.directory().path().join("backup"));
    // The kernel keeps the lock of a daemon that was killed until it has finished that daemon's I/O.
    let mut ended = run_to_end(&mut command);
    poll_until("the tool to get the image's lock", TIMEOUT, || {
        let is_locked = ended.stderr.contains("Failed to get \"write\" lock");
        if is_locked {
            ended = run_to_end(&mut command);
        }
        (!is_locked).then_some(())
    });
    assert!(ended.status.success(), "{line}: {ended:?}");
    true
}

/// A daemon whose guest has written data, read all of it, and changed some after a backup was made.
fn with_backup() -> (Daemon, Session) {
    let mut daemon = start(DEVICE);
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    for mib in 0..4 {
        session.write(mib * 2048, &pattern(1, mib * 2048, 1 << 20));
    }
    session.flush();
    drop(session);
    daemon.stop();
    fs::copy(daemon.image(), daemon.directory().path().join("backup")).expect("the image can be copied");
    daemon.restart();
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    session.read(0, 1 << 20);
    session.write(4096, &pattern(2, 4096, 256 << 10));
    session.flush();
    (daemon, session)
}

/// What the guest reads is what the image has.
fn assert_serves_the_image(daemon: &Daemon, what: &str) {
    let mut session = Session::open(&daemon.socket(), &SessionOptions { region_bytes: 64 << 20, ..Default::default() });
    let image = fs::read(daemon.image()).expect("the image can be read");
    for mib in 0..image.len() as u64 >> 20 {
        let at = usize::try_from(mib << 20).expect("small");
        assert!(session.read(mib * 2048, 1 << 20) == image[at..at + (1 << 20)], "{what}: MiB {mib}\n{}", daemon.log());
    }
}

#[test]
fn an_image_restored_after_a_hand_over_is_served_unchanged() {
    for (what, line) in IN_PLACE.iter().chain(REPLACING) {
        let (mut daemon, session) = with_backup();
        drop(session);
        daemon.signal(libc::SIGUSR1);
        assert!(daemon.wait().success());
        if run(&daemon, line) {
            daemon.restart();
            assert_serves_the_image(&daemon, what);
        }
    }
}

#[test]
fn an_image_restored_in_place_after_a_kill_is_refused_while_its_cache_is_dirty() {
    for (what, line) in IN_PLACE {
        let (mut daemon, mut session) = with_backup();
        session.write(80, &pattern(3, 80, 16 << 10));
        daemon.kill();
        if !run(&daemon, line) {
            continue;
        }
        let restored = fs::read(daemon.image()).expect("the image can be read");
        let ended = run_to_end(Command::new(server_binary()).arg("--config").arg(daemon.config()));
        assert!(
            ended.status.code() == Some(1) && ended.stderr.contains("has changed since its cache"),
            "{what}: {ended:?}"
        );
        assert!(fs::read(daemon.image()).expect("the image can be read") == restored, "{what}: nothing is written");
    }
}

#[test]
fn a_file_that_replaced_the_image_after_a_kill_is_served_unchanged() {
    for (what, line) in REPLACING {
        let (mut daemon, mut session) = with_backup();
        session.write(80, &pattern(3, 80, 16 << 10));
        daemon.kill();
        if run(&daemon, line) {
            daemon.restart();
            assert_serves_the_image(&daemon, what);
            daemon.await_log("in use by no daemon (1 dirty, ");
            let image = daemon.image();
            let is_told = |line: &str| {
                line.contains(&format!("another file has replaced image {}", image.display()))
                    && line.contains("holds 4 dirty pages, not yet written")
            };
            assert!(daemon.log().lines().any(is_told), "{what}: {}", daemon.log());
        }
    }
}

#[test]
fn a_file_system_changed_between_two_daemons_is_served_unchanged() {
    let tools = [
        ("debugfs", "debugfs -w -R \"mkdir made\" $I"),
        ("e2fsck", "e2fsck -f -y $I >&2 || true"),
        ("tune2fs", "tune2fs -L renamed $I"),
        ("resize2fs", "resize2fs $I 12M"),
    ];
    for (what, line) in tools {
        let mut daemon = start(DEVICE);
        daemon.stop();
        if !run(&daemon, "mkfs.ext4 -q -F $I") {
            return;
        }
        daemon.restart();
        let mut session =
            Session::open(&daemon.socket(), &SessionOptions { region_bytes: 32 << 20, ..Default::default() });
        session.read(0, 8 << 20);
        session.write(30_000, &pattern(2, 30_000, 4096));
        session.flush();
        drop(session);
        daemon.signal(libc::SIGUSR1);
        assert!(daemon.wait().success());
        if run(&daemon, line) {
            daemon.restart();
            assert_serves_the_image(&daemon, what);
        }
    }
}

#[test]
fn an_image_is_served_only_after_a_copy_onto_it_has_ended() {
    let mut daemon = start(DEVICE);
    daemon.stop();
    let image = File::options().write(true).open(daemon.image()).expect("the image can be opened");
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            for at in (0..).take_while(|_| !is_over.load(Ordering::Relaxed)) {
                image.write_all_at(&[7; 4096], at % 64 * 4096).expect("the image can be written");
                thread::sleep(Duration::from_millis(10));
            }
        });
        let ended = run_to_end(Command::new(server_binary()).arg("--config").arg(daemon.config()));
        is_over.store(true, Ordering::Relaxed);
        assert_eq!(ended.status.code(), Some(1), "{ended:?}");
        assert!(ended.stderr.contains(&format!("is being written by pid {}", std::process::id())), "{ended:?}");
    });
    // A process that merely has it open keeps nobody from serving it.
    daemon.restart();
    daemon.await_log("has it open; that process ignores image locks and can corrupt the image");
    drop(image);
    assert_serves_the_image(&daemon, "after the copy");
}

#[test]
fn a_file_size_limit_fails_a_recovery_without_killing_it() {
    let mut daemon = start(DEVICE);
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    session.write(8192, &pattern(3, 8192, 16 << 10));
    drop(session);
    daemon.kill();
    let cache = daemon.directory().left().remove(0);
    let line = format!("ulimit -f 8; exec {} recover {}", server_binary(), cache.display());
    let ended = run_to_end(Command::new("sh").args(["-c", &line]));
    assert_eq!(ended.status.code(), Some(1), "{ended:?}");
    assert!(ended.stderr.contains("File too large") && ended.stderr.contains(" stays: run the command"), "{ended:?}");
    let ended = run_to_end(Command::new(server_binary()).arg("recover").arg(&cache));
    assert!(ended.status.success() && ended.stdout.starts_with("wrote 4 pages"), "{ended:?}");
}

/// Restores of a backup that differs from the image in one page, as commands of a shell.
const RESTORES: &[(&str, &str)] = &[
    ("cp, with the times of the image", "touch -r $I $B.times; cp $B $I; touch -r $B.times $I"),
    (
        "dd, with the times of the image",
        "touch -r $I $B.times; dd if=$B of=$I bs=64k status=none; touch -r $B.times $I",
    ),
    ("cp, and a larger size", "cp $B $I; truncate -s 20M $I"),
];

/// All pages are in memory, so a sample of them is unlikely to include the one that differs.
#[test]
fn a_backup_that_lacks_only_the_last_write_is_not_overwritten() {
    for (what, line) in RESTORES {
        let (mut daemon, mut session) = with_backup();
        drop(session);
        daemon.stop();
        fs::copy(daemon.image(), daemon.directory().path().join("backup")).expect("the image can be copied");
        daemon.restart();
        session = Session::open(&daemon.socket(), &SessionOptions { region_bytes: 32 << 20, ..Default::default() });
        session.read(0, 16 << 20);
        // An odd page: a sample of every second, fourth ... page does not have it.
        session.write(8 * 1501, &pattern(4, 8 * 1501, 4096));
        session.flush();
        session.write(8 * 3000, &pattern(5, 8 * 3000, 4096));
        daemon.kill();
        assert!(run(&daemon, line), "{what}");
        let restored = fs::read(daemon.image()).expect("the image can be read");
        let ended = run_to_end(Command::new(server_binary()).arg("--config").arg(daemon.config()));
        assert_eq!(ended.status.code(), Some(1), "{what}: {ended:?}");
        assert!(ended.stderr.contains("page 1501 of the image differs from the cache"), "{what}: {ended:?}");
        assert!(fs::read(daemon.image()).expect("the image can be read") == restored, "{what}: nothing is written");
    }
}
