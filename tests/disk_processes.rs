//! One process a disk: a disk process that dies, hangs or is attacked by its front-end hurts no other disk, and its own
//! disk is served again within moments, with the same cache.

#![allow(clippy::cast_possible_truncation, reason = "sizes are small")]

#[path = "common/mod.rs"]
mod common;

use std::fs;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Command, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserInflight;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};

use common::daemon::{Daemon, TempDir, has_ended, send, server_binary};
use common::request::{OK, Payload, assert_serves, pattern};
use common::session::{Session, SessionOptions};
use common::wait::{TIMEOUT, is_listening, poll_until};
use genblk::store::file::{FileImage, OpenOptions};

const IMAGE_BYTES: u64 = 8 << 20;
/// VIRTIO_BLK_S_IOERR, the status of a request that failed.
const IOERR: u8 = 1;

/// Starts a daemon with `count` disks, `d0` and so on, each with an image of its own; each has `rest` in its table.
fn start(name: &str, count: usize, rest: &str) -> Daemon {
    let directory = TempDir::new(name);
    let paths = directory.path().to_path_buf();
    let mut text = String::new();
    for disk in 0..count {
        let (image, socket) = (image_of(&paths, disk), paths.join(format!("d{disk}.sock")));
        fs::File::create(&image).and_then(|file| file.set_len(IMAGE_BYTES)).expect("an image can be created");
        text += &format!(
            "[[device]]\nname = \"d{disk}\"\nsocket = {socket:?}\nimage = {image:?}\ncache.memory_dir = {:?}\n\
             cache.dirty_age_max_ms = 600000\n{rest}\n",
            directory.memory()
        );
    }
    let config = paths.join("genblk.toml");
    fs::write(&config, text).expect("a configuration can be written");
    let mut command = Command::new(server_binary());
    command.arg("--config").arg(config);
    let sockets = (0..count).map(|disk| paths.join(format!("d{disk}.sock"))).collect();
    Daemon::launch(directory, command, sockets)
}

const SMALL: &str = "cache.size = \"4M\"";

fn image_of(directory: &std::path::Path, disk: usize) -> PathBuf {
    directory.join(format!("image{disk}"))
}

fn open(daemon: &Daemon, disk: usize) -> Session {
    Session::open(&daemon.socket_of(disk), &SessionOptions::default())
}

/// Bytes of a disk's image, as another process sees them.
fn image_bytes(daemon: &Daemon, disk: usize, sector: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let image = fs::File::open(image_of(daemon.directory().path(), disk)).expect("the image exists");
    image.read_exact_at(&mut bytes, sector * 512).expect("the image is that long");
    bytes
}

/// Kills the process of a disk, and waits until it has ended.
#[track_caller]
fn kill_disk(daemon: &Daemon, disk: &str) {
    let process = daemon.disk_process(disk);
    send(process, libc::SIGKILL);
    poll_until("a disk process to end", TIMEOUT, || (!daemon.disk_processes().contains(&process)).then_some(()));
}

/// The front-end connects again, as front-ends do.
fn reconnect(session: Session, daemon: &Daemon, disk: usize) -> Session {
    let mut session = session.reconnect(&daemon.socket_of(disk));
    session.start_ring(0);
    session
}

#[test]
fn a_killed_disk_process_is_restarted_with_its_cache() {
    let mut daemon = start("die", 2, SMALL);
    let (mut one, mut other) = (open(&daemon, 0), open(&daemon, 1));
    one.write(8, &pattern(1, 8, 8192));
    other.write(8, &pattern(2, 8, 8192));
    for round in 0..3 {
        kill_disk(&daemon, "d0");
        one = reconnect(one, &daemon, 0);
        assert_eq!(one.read(8, 8192), pattern(1, 8, 8192), "round {round}: completed writes are there");
        one.write(64 + round * 8, &pattern(3, 64 + round * 8, 4096));
        assert_eq!(other.read(8, 8192), pattern(2, 8, 8192), "the other front-end is still connected");
    }
    daemon.await_log("d0: its process has died: killed by SIGKILL");
    daemon.await_log("restarting it in 200 ms");
    assert!(!daemon.log().contains("d1: its process has died"), "{}", daemon.log());
    daemon.await_log("d0: restored 2 cached pages (2 dirty) left by the previous daemon");
    drop((one, other));
    daemon.stop();
    assert_eq!(image_bytes(&daemon, 0, 8, 8192), pattern(1, 8, 8192));
    for round in 0..3 {
        assert_eq!(image_bytes(&daemon, 0, 64 + round * 8, 4096), pattern(3, 64 + round * 8, 4096));
    }
    assert_eq!(image_bytes(&daemon, 1, 8, 8192), pattern(2, 8, 8192));
    assert!(daemon.directory().left().is_empty(), "no cache is left");
}

#[test]
fn truncating_guest_memory_ends_only_its_own_disk() {
    let mut daemon = start("cut", 2, SMALL);
    let mut other = open(&daemon, 1);
    other.write(8, &pattern(2, 8, 4096));
    let mut hostile = open(&daemon, 0);
    hostile.write(8, &pattern(1, 8, 4096));
    hostile.memory.cut_short();
    // The worker polls the ring.
    hostile.rings[0].kick.write(1).expect("an eventfd can be written");
    daemon.await_log("d0: its process has died: killed by SIGBUS: the file of the guest's memory was truncated");
    assert_eq!(other.read(8, 4096), pattern(2, 8, 4096));
    assert_eq!(open(&daemon, 0).read(8, 4096), pattern(1, 8, 4096), "the next front-end is served, from the cache");
    drop(other);
    daemon.stop();
}

#[test]
fn truncating_an_inflight_region_ends_only_its_own_disk() {
    const QUEUE_SIZE: u16 = 128;
    let mut daemon = start("cut", 2, SMALL);
    let mut other = open(&daemon, 1);
    other.write(8, &pattern(2, 8, 4096));
    let mut hostile = Session::negotiate(&daemon.socket_of(0), &SessionOptions::default());
    hostile.share_memory();
    hostile.add_ring(QUEUE_SIZE);
    let wanted = VhostUserInflight { mmap_size: 0, mmap_offset: 0, num_queues: 1, queue_size: QUEUE_SIZE };
    let (region, sealed) = hostile.frontend.get_inflight_fd(&wanted).expect("GET_INFLIGHT_FD");
    // A region of its own in place of the daemon's, which cannot be cut short.
    let path = daemon.directory().memory().join("inflight");
    let file = fs::File::options().read(true).write(true).create_new(true).open(path).expect("shared memory");
    file.set_len(region.mmap_size).expect("shared memory");
    hostile.frontend.set_inflight_fd(&region, file.as_raw_fd()).expect("SET_INFLIGHT_FD");
    hostile.start_ring(0);
    hostile.write(8, &pattern(1, 8, 4096));
    // The ring still uses the first one.
    for _ in 0..300 {
        hostile.frontend.set_inflight_fd(&region, sealed.as_raw_fd()).expect("SET_INFLIGHT_FD");
    }
    file.set_len(0).expect("it has no seals");
    hostile.submit(0, VIRTIO_BLK_T_IN, 8, Payload::Receive(512));
    hostile.rings[0].notify();
    daemon.await_log("d0: its process has died: killed by SIGBUS: the file of the inflight region was truncated");
    assert_eq!(other.read(8, 4096), pattern(2, 8, 4096));
    drop(hostile);
    assert_eq!(open(&daemon, 0).read(8, 4096), pattern(1, 8, 4096), "the next front-end is served, from the cache");
    drop(other);
    daemon.stop();
}

/// All readers share a process, but only the hostile one is refused in the end.
#[test]
fn a_reader_that_truncates_memory_repeatedly_takes_the_image_from_no_other() {
    const BURST: usize = 3;
    let directory = TempDir::new("golden");
    fs::write(directory.path().join("image"), pattern(7, 0, IMAGE_BYTES as usize)).expect("an image can be written");
    let device = format!("cache.size = \"4M\"\nread_only = true\nrestart_burst = {BURST}");
    let mut daemon = Daemon::start_configured(directory, &[device.as_str(), device.as_str()]);
    let mut bystander = open(&daemon, 1);
    for death in 1..=BURST + 1 {
        let hostile = open(&daemon, 0);
        let process = daemon.disk_processes();
        hostile.memory.cut_short();
        hostile.rings[0].kick.write(1).expect("an eventfd can be written");
        poll_until("the process to end", TIMEOUT, || (daemon.disk_processes() != process).then_some(()));
        bystander = reconnect(bystander, &daemon, 1);
        assert_eq!(bystander.read(death as u64 * 8, 4096), pattern(7, death as u64 * 8, 4096));
    }
    let own = "its process has died: killed by SIGBUS: the file of the guest's memory was truncated by the front-end";
    daemon.await_log(&format!("disk0: {own}; restarting it in 200 ms"));
    daemon.await_log(&format!("disk0: not served: {own}; restart_burst exceeded"));
    let others = "killed by SIGBUS: the front-end of disk0, which shares the process, truncated memory; restarting it";
    daemon.await_log(&format!("disk1: its process has died: {others}\n"));
    assert!(!daemon.log().contains("disk1: not served"), "{}", daemon.log());
    // The deaths do not count for the bystander: it is restarted at once also when its own front-end is the cause.
    bystander.memory.cut_short();
    bystander.rings[0].kick.write(1).expect("an eventfd can be written");
    daemon.await_log(&format!("disk1: {own}; restarting it\n"));
    assert_eq!(open(&daemon, 1).read(8, 4096), pattern(7, 8, 4096));
    daemon.signal(libc::SIGHUP);
    assert_eq!(open(&daemon, 0).read(8, 4096), pattern(7, 8, 4096), "the operator has resumed it");
    daemon.stop();
}

/// Only the daemon's own user can do that. What was in the cache is gone: the disk is not served, rather than with
/// other bytes.
#[test]
fn a_truncated_cache_file_ends_only_its_own_disk() {
    let mut daemon = start("cut", 2, SMALL);
    let (mut one, mut other) = (open(&daemon, 0), open(&daemon, 1));
    one.write(8, &pattern(1, 8, 4096));
    let [cache] = &daemon.directory().left()[..1] else { panic!("a cache file") };
    let (cut, served) = if is_open_in(cache, daemon.disk_process("d0")) { (0, 1) } else { (1, 0) };
    let (hurt, spared) = if cut == 0 { (&mut one, &mut other) } else { (&mut other, &mut one) };
    spared.write(64, &pattern(2, 64, 4096));
    fs::File::options().write(true).open(cache).and_then(|file| file.set_len(4096)).expect("our own file");
    hurt.submit(0, VIRTIO_BLK_T_OUT, 8, Payload::Send(&pattern(3, 8, 4096)));
    hurt.rings[0].notify();
    daemon.await_log(&format!("d{cut}: its process has died: killed by SIGBUS: the cache's file was truncated"));
    daemon.await_log("is truncated");
    assert_eq!(spared.read(64, 4096), pattern(2, 64, 4096));
    drop((one, other));
    assert_serves(&daemon.socket_of(served), 128);
    daemon.terminate();
    assert_eq!(daemon.wait().code(), Some(1), "the end says that completed writes are missing: {}", daemon.log());
}

/// Whether a process has a file open.
fn is_open_in(file: &std::path::Path, process: u32) -> bool {
    let descriptors = fs::read_dir(format!("/proc/{process}/fd")).expect("the process runs");
    descriptors.flatten().any(|entry| fs::read_link(entry.path()).is_ok_and(|target| target == file))
}

#[test]
fn a_disk_whose_process_dies_too_often_is_not_restarted_until_sighup() {
    let mut daemon = start("often", 2, &format!("{SMALL}\nrestart_burst = 2"));
    let mut session = open(&daemon, 0);
    session.write(8, &pattern(1, 8, 4096));
    for _ in 0..3 {
        session = reconnect(session, &daemon, 0);
        kill_disk(&daemon, "d0");
    }
    daemon.await_log("d0: not served: its process has died: killed by SIGKILL");
    assert_serves(&daemon.socket_of(1), 8);
    thread::sleep(Duration::from_millis(500));
    assert_eq!(daemon.disk_processes().len(), 1);
    daemon.signal(libc::SIGHUP);
    session = reconnect(session, &daemon, 0);
    // The deaths before that do not count any more.
    kill_disk(&daemon, "d0");
    poll_until("a restart", TIMEOUT, || (daemon.disk_processes().len() == 2).then_some(()));
    session = reconnect(session, &daemon, 0);
    assert_eq!(session.read(8, 4096), pattern(1, 8, 4096));
    drop(session);
    daemon.stop();
}

/// The descriptor of a disk process for its image, as the kernel holds it while an operation is in flight.
fn hold_image(daemon: &Daemon, disk: usize) -> OwnedFd {
    let process = daemon.disk_process(&format!("d{disk}"));
    let image = image_of(daemon.directory().path(), disk);
    let entries = fs::read_dir(format!("/proc/{process}/fd")).expect("its descriptors can be listed");
    let is_image = |entry: &fs::DirEntry| fs::read_link(entry.path()).is_ok_and(|path| path == image);
    let found = entries.flatten().find(is_image).expect("it has the image open");
    let number: i32 = found.file_name().to_string_lossy().parse().expect("a number");
    // SAFETY: plain system calls, which return new descriptors.
    unsafe {
        let process = OwnedFd::from_raw_fd(libc::syscall(libc::SYS_pidfd_open, process, 0) as i32);
        OwnedFd::from_raw_fd(libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), number, 0) as i32)
    }
}

#[test]
fn a_disk_process_is_restarted_after_the_last_operation_of_the_killed_one() {
    let mut daemon = start("fence", 2, SMALL);
    let mut session = open(&daemon, 0);
    session.write(8, &pattern(1, 8, 4096));
    let operation = hold_image(&daemon, 0);
    kill_disk(&daemon, "d0");
    daemon.await_log("d0: its process has died");
    thread::sleep(Duration::from_millis(500));
    assert_eq!(daemon.disk_processes().len(), 1, "it would change the image at the same time");
    drop(operation);
    session = reconnect(session, &daemon, 0);
    assert_eq!(session.read(8, 4096), pattern(1, 8, 4096));
    drop(session);
    daemon.stop();
}

/// A clean stop cannot write back the cache of a disk without a process, and reports that.
#[test]
fn stopping_an_unserved_disk_with_completed_writes_is_an_error_and_keeps_its_cache() {
    let mut daemon = start("unserved", 2, &format!("{SMALL}\nrestart_burst = 0"));
    let mut session = open(&daemon, 0);
    session.write(8, &pattern(1, 8, 4096));
    kill_disk(&daemon, "d0");
    daemon.await_log("d0: not served: its process has died: killed by SIGKILL");
    daemon.terminate();
    assert_eq!(daemon.wait().code(), Some(1), "{}", daemon.log());
    assert!(daemon.log().contains("genblk: d0: ended without being served"), "{}", daemon.log());
    assert_eq!(daemon.directory().left().len(), 1, "the cache stays");
    daemon.restart();
    session = reconnect(session, &daemon, 0);
    assert_eq!(session.read(8, 4096), pattern(1, 8, 4096));
    drop(session);
    daemon.stop();
}

/// Ends a daemon that cannot open the image of a disk whose cache has a completed write, and checks that the write is
/// there when the image is.
fn end_with_an_unopened_disk(name: &str, signal: i32, check: impl FnOnce(ExitStatus, String)) {
    let mut daemon = start(name, 2, SMALL);
    let mut session = open(&daemon, 0);
    session.write(8, &pattern(1, 8, 4096));
    daemon.kill();
    let image = image_of(daemon.directory().path(), 0);
    let away = image.with_extension("away");
    fs::rename(&image, &away).expect("the image can be moved");
    daemon.restart_for(&[daemon.socket_of(1)]);
    daemon.await_log("d0: not served: ");
    daemon.signal(signal);
    let status = daemon.wait();
    check(status, daemon.log());
    fs::rename(&away, &image).expect("the image can be moved back");
    daemon.restart();
    session = reconnect(session, &daemon, 0);
    assert_eq!(session.read(8, 4096), pattern(1, 8, 4096));
    drop(session);
    daemon.stop();
}

/// The same for a disk whose image can no longer be opened.
#[test]
fn an_orderly_stop_names_an_unopened_disk_with_completed_writes() {
    end_with_an_unopened_disk("unopened", libc::SIGTERM, |status, log| {
        assert_eq!(status.code(), Some(1), "{log}");
        assert!(log.contains("genblk: d0: ended without being served"), "{log}");
    });
}

#[test]
fn an_upgrade_leaves_the_cache_of_an_unopened_disk_to_the_next_daemon() {
    end_with_an_unopened_disk("upgrade", libc::SIGUSR1, |status, log| assert!(status.success(), "{log}"));
}

#[test]
fn requests_fail_after_the_loss_of_a_volatile_cache_until_the_guest_resets() {
    let mut daemon = start("volatile", 1, &format!("{SMALL}\ncache.survive = \"never\""));
    let mut session = open(&daemon, 0);
    session.write(8, &pattern(1, 8, 4096));
    kill_disk(&daemon, "d0");
    session = reconnect(session, &daemon, 0);
    let status = session.run(0, VIRTIO_BLK_T_IN, 8, Payload::Receive(512)).status;
    assert_eq!(status, IOERR, "the guest must not read stale data");
    drop(session);
    let mut next = open(&daemon, 0);
    assert_eq!(next.read(8, 512), [0; 512], "a new guest relies on the image alone");
    next.write(8, &pattern(2, 8, 4096));
    next.flush();
    kill_disk(&daemon, "d0");
    next = reconnect(next, &daemon, 0);
    assert_eq!(next.run(0, VIRTIO_BLK_T_IN, 8, Payload::Receive(512)).status, OK, "nothing was lost");
    drop(next);
    daemon.stop();
}

#[test]
fn all_readers_of_a_shared_process_are_served_after_its_restart() {
    let directory = TempDir::new("readers");
    fs::write(directory.path().join("image"), pattern(7, 0, IMAGE_BYTES as usize)).expect("an image can be written");
    let device = "cache.size = \"4M\"\nread_only = true";
    let mut daemon = Daemon::start_configured(directory, &[device; 3]);
    for disk in 0..3 {
        assert_eq!(open(&daemon, disk).read(8, 4096), pattern(7, 8, 4096));
    }
    let processes = daemon.disk_processes();
    assert_eq!(processes.len(), 1);
    send(processes[0], libc::SIGKILL);
    poll_until("the process to end", TIMEOUT, || (daemon.disk_processes() != processes).then_some(()));
    for disk in 0..3 {
        let mut session = open(&daemon, disk);
        assert_eq!(session.read(8, 4096), pattern(7, 8, 4096));
    }
    assert_eq!(daemon.disk_processes().len(), 1);
    daemon.stop();
}

#[test]
fn all_disks_of_a_group_are_served_after_the_restart_of_its_process() {
    let mut daemon = start("group", 3, &format!("{SMALL}\ngroup = \"tenant\""));
    let open_all = |daemon: &Daemon| [0, 1, 2].map(|disk| open(daemon, disk));
    for (disk, session) in open_all(&daemon).iter_mut().enumerate() {
        session.write(8, &pattern(disk as u64, 8, 4096));
    }
    let processes = daemon.disk_processes();
    assert_eq!(processes.len(), 1);
    send(processes[0], libc::SIGKILL);
    poll_until("the process to end", TIMEOUT, || (daemon.disk_processes() != processes).then_some(()));
    for (disk, session) in open_all(&daemon).iter_mut().enumerate() {
        assert_eq!(session.read(8, 4096), pattern(disk as u64, 8, 4096));
    }
    assert_eq!(daemon.disk_processes().len(), 1);
    daemon.stop();
    for disk in 0..3 {
        assert_eq!(image_bytes(&daemon, disk, 8, 4096), pattern(disk as u64, 8, 4096));
    }
    assert!(daemon.directory().left().is_empty(), "no cache is left: {}", daemon.log());
}

/// The supervisor dies: its disk processes end by themselves, and the next daemon has everything.
#[test]
fn completed_writes_survive_the_death_of_the_supervisor() {
    for survive in ["auto", "never"] {
        let mut daemon = start("orphan", 2, &format!("{SMALL}\ncache.survive = {survive:?}"));
        let mut sessions = [open(&daemon, 0), open(&daemon, 1)];
        for round in 0..4u64 {
            for (disk, session) in sessions.iter_mut().enumerate() {
                for write in 0..16 {
                    let sector = (round * 16 + write) * 8;
                    session.write(sector, &pattern(disk as u64, sector, 4096));
                }
            }
            let disks = daemon.disk_processes();
            assert_eq!(disks.len(), 2);
            daemon.kill_supervisor();
            // At once: the next daemon waits for the images' locks.
            daemon.restart();
            poll_until("the old disk processes to end", TIMEOUT, || {
                disks.iter().all(|pid| has_ended(*pid)).then_some(())
            });
            let sockets = [daemon.socket_of(0), daemon.socket_of(1)];
            poll_until("the sockets", TIMEOUT, || sockets.iter().all(|socket| is_listening(socket)).then_some(()));
            let mut disk = 0;
            sessions = sessions.map(|session| {
                disk += 1;
                reconnect(session, &daemon, disk - 1)
            });
            for (disk, session) in sessions.iter_mut().enumerate() {
                let len = (round as usize + 1) * 16 * 4096;
                assert_eq!(session.read(0, len), pattern(disk as u64, 0, len), "{survive}, round {round}");
            }
        }
        drop(sessions);
        daemon.stop();
        for disk in 0..2 {
            assert_eq!(image_bytes(&daemon, disk, 0, 64 * 4096), pattern(disk as u64, 0, 64 * 4096));
        }
    }
}

#[test]
fn no_other_program_can_use_an_image_while_a_disk_process_without_a_supervisor_does() {
    let mut daemon = start("orphan-lock", 1, SMALL);
    let _session = open(&daemon, 0);
    let process = daemon.disk_process("d0");
    send(process, libc::SIGSTOP);
    daemon.kill_supervisor();
    let image = image_of(daemon.directory().path(), 0);
    let opened = FileImage::open(&image, &OpenOptions::default());
    send(process, libc::SIGCONT);
    assert!(opened.is_err(), "the image is still in use");
    poll_until("the disk process to end", TIMEOUT, || has_ended(process).then_some(()));
    FileImage::open(&image, &OpenOptions::default()).expect("the image is free");
}

#[test]
fn the_guests_write_through_mode_survives_the_death_of_a_disk_process() {
    for survive in ["auto", "never"] {
        let mut daemon = start("mode", 1, &format!("{SMALL}\ncache.survive = {survive:?}"));
        let mut session = open(&daemon, 0);
        session.set_writeback(false);
        for round in 1..4 {
            kill_disk(&daemon, "d0");
            session = reconnect(session, &daemon, 0);
            session.write(80, &pattern(round, 80, 4096));
            assert!(image_bytes(&daemon, 0, 80, 4096) == pattern(round, 80, 4096), "{survive}, death {round}");
        }
        session.set_writeback(true);
        drop(session);
        daemon.stop();
    }
}

#[test]
fn a_stopped_disk_process_delays_neither_other_disks_nor_shutdown() {
    let mut daemon = start("stopped", 2, SMALL);
    let (mut one, mut other) = (open(&daemon, 0), open(&daemon, 1));
    one.write(8, &pattern(1, 8, 4096));
    other.write(8, &pattern(2, 8, 4096));
    send(daemon.disk_process("d0"), libc::SIGSTOP);
    daemon.await_log("d0: its process has not run for 5 s; it may be stopped");
    assert_eq!(other.read(8, 4096), pattern(2, 8, 4096));
    drop(other);
    let begun = Instant::now();
    daemon.signal(libc::SIGUSR1);
    poll_until("the other disk to end", TIMEOUT, || (!is_listening(&daemon.socket_of(1))).then_some(()));
    daemon.wait();
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    daemon.restart();
    one = reconnect(one, &daemon, 0);
    assert_eq!(one.read(8, 4096), pattern(1, 8, 4096), "its cache was left to the next daemon");
    assert_serves(&daemon.socket_of(1), 64);
    drop(one);
    daemon.stop();
}

/// What a process has for itself, in KiB: private memory that is no file's and no cache's.
fn own_kib(pid: u32) -> u64 {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).expect("the process runs");
    let (mut is_shared_memory, mut sum) = (false, 0);
    for line in smaps.lines() {
        let word = line.split_whitespace().next().unwrap_or_default();
        if word.contains('-') && !word.ends_with(':') {
            is_shared_memory = line.contains("/memfd:") || line.contains("/dev/shm/");
        } else if !is_shared_memory && matches!(word, "Private_Clean:" | "Private_Dirty:") {
            sum += line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).expect("a number");
        }
    }
    sum
}

#[test]
fn forty_disks_start_in_two_seconds_with_6_mib_of_overhead_each() {
    const DISKS: usize = 40;
    let begun = Instant::now();
    let mut daemon = start("forty", DISKS, "cache.size = \"4M\"");
    let mut sessions: Vec<Session> = (0..DISKS).map(|disk| open(&daemon, disk)).collect();
    for (disk, session) in sessions.iter_mut().enumerate() {
        assert_eq!(session.read(0, 512), [0; 512], "disk {disk}");
    }
    let elapsed = begun.elapsed();
    println!("{DISKS} disks were served after {elapsed:?}");
    let own: Vec<u64> = daemon.disk_processes().into_iter().map(own_kib).collect();
    println!("KiB of each disk process: {own:?}; of the supervisor: {}", own_kib(daemon.id()));
    assert_eq!(own.len(), DISKS);
    assert!(own.iter().all(|kib| *kib <= 6 << 10), "{own:?}");
    // On a host that is busy it takes longer; the time was two seconds with nothing else to do.
    assert!(elapsed < Duration::from_secs(20), "{elapsed:?}");
    drop(sessions);
    daemon.stop();
}

/// The descriptors of a disk process lead to its image, its cache, its sockets, and to nothing of another disk, nor to
/// what the process that starts the daemon has left open.
#[test]
fn a_disk_process_has_no_descriptor_of_another_disk_or_of_the_configuration() {
    let file = fs::File::open("/etc/passwd").expect("it exists");
    // SAFETY: a plain system call; the daemon inherits the copy, which stays open in this process.
    assert!(unsafe { libc::dup(file.as_raw_fd()) } > 0);
    let mut daemon = start("reach", 2, SMALL);
    let sessions = [open(&daemon, 0), open(&daemon, 1)];
    let reaches = |disk: &str| {
        let descriptors = fs::read_dir(format!("/proc/{}/fd", daemon.disk_process(disk))).expect("the process runs");
        let targets = descriptors.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
        let shown = targets.map(|target| target.display().to_string());
        shown.filter(|target| target.starts_with('/') && !target.starts_with("/memfd:guest")).collect::<Vec<_>>()
    };
    for (disk, image) in [("d0", "image0"), ("d1", "image1")] {
        let mut files: Vec<String> = reaches(disk);
        files.retain(|file| file != "/dev/null");
        let own = |file: &String| file.ends_with(image) || file.contains("/genblk/");
        assert!(files.iter().all(own), "{disk}: {files:?}");
        assert_eq!(files.len(), 2, "{disk}: image and cache: {files:?}");
    }
    drop(sessions);
    daemon.stop();
}

/// How long the guest waits when its disk process dies: from the kill to the first request that completes. A host that
/// is busy only adds to that, so the shortest of five pauses counts. With `GENBLK_STRICT=1` (`make bystander`) it must
/// be what genblk promises for an idle host.
#[test]
fn a_dead_disk_process_is_replaced_within_a_short_pause() {
    let limit = if std::env::var_os("GENBLK_STRICT").is_some() { 100 } else { 5000 };
    let mut pauses = Vec::new();
    for _ in 0..5 {
        // A new daemon: another death within a minute has a pause of its own.
        let mut daemon = start("pause", 1, "cache.size = \"64M\"");
        let mut session = open(&daemon, 0);
        session.write(8, &pattern(1, 8, 4096));
        let begun = Instant::now();
        kill_disk(&daemon, "d0");
        session = reconnect(session, &daemon, 0);
        assert_eq!(session.read(8, 4096), pattern(1, 8, 4096));
        pauses.push(begun.elapsed());
        drop(session);
        daemon.stop();
    }
    println!("pauses: {pauses:?}");
    assert!(pauses.iter().min() < Some(&Duration::from_millis(limit)), "{pauses:?}");
}
