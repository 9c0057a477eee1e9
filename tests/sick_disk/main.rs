//! One sick disk is one sick disk: a daemon with three disks, of which the image of one does not answer. The others
//! start, are served and end on their own, and the log says what is waited for.
//!
//! The sick image is a file on a FUSE file system that this process serves (`tests/volatile/disk.rs`). A host that
//! cannot mount FUSE file systems skips these tests.

#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "sizes are small"
)]

#[path = "../common/mod.rs"]
mod common;
#[path = "../volatile/disk.rs"]
#[allow(dead_code, reason = "shared with tests/volatile, which uses more of it")]
mod disk;
#[path = "../volatile/mount.rs"]
mod mount;

use std::fs;
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd};
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};

use common::daemon::{Daemon, TempDir, has_ended, send, server_binary};
use common::request::{OK, Payload, assert_serves, pattern};
use common::session::{Session, SessionOptions};
use common::wait::{TIMEOUT, is_listening, poll_until};
use disk::{Disk, OpClass};
use genblk::store::file::{FileImage, OpenOptions};
use mount::Mount;
use vmm_sys_util::eventfd::EventFd;

const IMAGE_BYTES: usize = 4 << 20;
/// How long a wait may take that the daemon bounds at some seconds.
const WAIT_LIMIT: Duration = Duration::from_secs(20);
/// A buffer of a page.
const READ: Payload<'static> = Payload::Receive(4096);

/// The configuration of a daemon with the disks `sick`, `good1` and `good2`, and the image of the first.
struct Fixture {
    directory: Option<TempDir>,
    paths: PathBuf,
    disk: Arc<Disk>,
    mount: Mount,
}

impl Fixture {
    /// `None` if this host cannot mount the disk; a line says why. `sick` is more of the sick disk's table.
    fn new(sick: &str) -> Option<Self> {
        let disk = Arc::new(Disk::new(pattern(1, 0, IMAGE_BYTES), 1));
        let mount = match Mount::new(Arc::clone(&disk)) {
            Ok(mount) => mount,
            Err(reason) => {
                println!("SKIPPED: {reason}");
                return None;
            }
        };
        let directory = TempDir::new("sick");
        let paths = directory.path().to_path_buf();
        let mut text = String::new();
        for (name, image, rest) in
            [("sick", mount.image(), sick), ("good1", paths.join("good1"), ""), ("good2", paths.join("good2"), "")]
        {
            if name != "sick" {
                fs::write(&image, pattern(2, 0, IMAGE_BYTES)).expect("an image can be written");
            }
            let (socket, memory) = (paths.join(format!("{name}.sock")), directory.memory());
            text += &format!(
                "[[device]]\nname = {name:?}\nsocket = {socket:?}\nimage = {image:?}\n{rest}\ncache.size = \"4M\"\n\
                 cache.memory_dir = {memory:?}\n"
            );
        }
        fs::write(paths.join("genblk.toml"), text).expect("a configuration can be written");
        Some(Self { directory: Some(directory), paths, disk, mount })
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.paths.join(format!("{name}.sock"))
    }

    /// Starts a daemon; returns when these disks are served.
    fn start(&mut self, served: &[&str]) -> Served {
        let mut command = Command::new(server_binary());
        command.arg("--config").arg(self.paths.join("genblk.toml"));
        command.env("NOTIFY_SOCKET", self.paths.join("notify"));
        let sockets = served.iter().map(|name| self.socket(name)).collect();
        let daemon = Daemon::launch(self.directory.take().expect("one daemon"), command, sockets);
        Served { _release: Release(Arc::clone(&self.disk)), daemon }
    }

    /// A guest of the sick disk whose FLUSH waits for a write that the image does not complete.
    fn hang(&self) -> Session {
        let mut session = Session::open(&self.socket("sick"), &SessionOptions::default());
        // On a file system without times and attributes, the next daemon compares clean pages with the image.
        assert_eq!(session.read(1024, 65536), pattern(1, 1024, 65536));
        session.write(0, &pattern(3, 0, 8192));
        self.disk.hold(OpClass::Write);
        session.submit(0, VIRTIO_BLK_T_FLUSH, 0, Payload::Empty);
        poll_until("the image to hang", TIMEOUT, || (self.disk.held(OpClass::Write) > 0).then_some(()));
        session
    }

    /// Waits until the good disks have ended: their sockets are gone, and their images are free.
    #[track_caller]
    fn wait_until_the_others_end(&self) {
        for name in ["good1", "good2"] {
            poll_until("a good disk to end", TIMEOUT, || (!is_listening(&self.socket(name))).then_some(()));
            poll_until("a good disk's image to be free", TIMEOUT, || {
                FileImage::open(&self.paths.join(name), &OpenOptions::default()).ok()
            });
        }
    }
}

/// A daemon. The disk is released before it is killed: a killed process stays until the disk has completed its
/// operations.
struct Served {
    _release: Release,
    daemon: Daemon,
}

struct Release(Arc<Disk>);

impl Drop for Release {
    fn drop(&mut self) {
        self.0.release(OpClass::Read);
        self.0.release(OpClass::Write);
        self.0.release(OpClass::Sync);
        self.0.release(OpClass::Close);
    }
}

impl Deref for Served {
    type Target = Daemon;

    fn deref(&self) -> &Daemon {
        &self.daemon
    }
}

impl DerefMut for Served {
    fn deref_mut(&mut self) -> &mut Daemon {
        &mut self.daemon
    }
}

/// Nobody restarts the process of a dead supervisor, so its memory is the only copy of what the guest wrote.
#[test]
fn a_disk_process_without_a_supervisor_waits_for_a_slow_image_if_its_cache_is_volatile() {
    let Some(mut fixture) = Fixture::new("cache.survive = \"never\"") else { return };
    let mut daemon = fixture.start(&["sick", "good1", "good2"]);
    let session = fixture.hang();
    let process = daemon.disk_process("sick");
    daemon.kill_supervisor();
    drop(session);
    // Longer than it would wait if it could leave a cache behind.
    thread::sleep(Duration::from_secs(8));
    assert!(!has_ended(process), "it waits for its image");
    fixture.disk.release(OpClass::Write);
    poll_until("the disk process to end", TIMEOUT, || has_ended(process).then_some(()));
    assert!(fixture.disk.platter(0..8192) == pattern(3, 0, 8192), "everything is on the image");
}

#[test]
fn a_second_sigterm_ends_the_wait_for_a_hanging_disk() {
    let Some(mut fixture) = Fixture::new("") else { return };
    let mut daemon = fixture.start(&["sick", "good1", "good2"]);
    let session = fixture.hang();
    daemon.terminate();
    fixture.wait_until_the_others_end();
    daemon.assert_alive();
    poll_until("a line about the wait", WAIT_LIMIT, || {
        let log = daemon.log();
        let line = log.lines().find(|line| line.contains("sick: image ") && line.contains(" s so far"))?.to_owned();
        let parts = ["a write of", "in flight", "repeat the signal"];
        assert!(parts.iter().all(|part| line.contains(part)), "{line}");
        Some(())
    });
    daemon.terminate();
    let status = daemon.wait();
    assert_eq!(status.code(), Some(1), "{}", daemon.log());
    let log = daemon.log();
    assert!(log.contains("SIGTERM again: not waiting for sick"), "{log}");
    assert!(log.contains("genblk: sick: could not write") && log.contains("the cache stays in"), "{log}");
    drop(session);
    // What the guest wrote is in the cache that stayed.
    fixture.disk.release(OpClass::Write);
    daemon.restart();
    let mut session = Session::open(&fixture.socket("sick"), &SessionOptions::default());
    assert_eq!(session.read(0, 8192), pattern(3, 0, 8192));
    drop(session);
    daemon.stop();
}

#[test]
fn a_third_sigterm_ends_the_wait_for_the_image_of_a_volatile_cache() {
    let Some(mut fixture) = Fixture::new("cache.survive = \"never\"") else { return };
    let mut daemon = fixture.start(&["sick", "good1", "good2"]);
    let session = fixture.hang();
    daemon.terminate();
    fixture.wait_until_the_others_end();
    daemon.terminate();
    daemon.await_log("sick: its cache does not outlive the daemon and holds data in flight; waiting for at most 30 s");
    daemon.assert_alive();
    let third = Instant::now();
    daemon.terminate();
    let status = daemon.wait();
    assert_eq!(status.code(), Some(1), "{}", daemon.log());
    assert!(third.elapsed() < Duration::from_secs(4), "{:?}", third.elapsed());
    drop(session);
}

#[test]
fn after_a_second_sigterm_a_volatile_cache_waits_5_s_for_each_operation_of_its_image() {
    let Some(mut fixture) = Fixture::new("cache.survive = \"never\"") else { return };
    let mut daemon = fixture.start(&["sick", "good1", "good2"]);
    let session = fixture.hang();
    daemon.terminate();
    poll_until("a line about the cache", WAIT_LIMIT, || {
        let log = daemon.log();
        let line = log.lines().find(|line| line.contains("sick: its cache is volatile and holds data in flight"))?;
        assert!(line.contains("repeat the signal"), "{line}");
        Some(())
    });
    daemon.terminate();
    assert_eq!(daemon.wait().code(), Some(1), "{}", daemon.log());
    drop(session);
}

/// The kernel still executes a write of the process that was killed: the next process must not write before that.
#[test]
fn a_killed_disk_process_is_restarted_when_its_io_has_ended() {
    for (engine, expected) in [
        ("io_uring", "waiting for the I/O of its process, which died, has taken 5 s so far; a write of 8192 bytes"),
        ("threads", "its process has not run for 5 s; it was killed, and one of its threads hangs in the kernel"),
    ] {
        let Some(mut fixture) = Fixture::new(&format!("engine = {engine:?}")) else { return };
        let mut daemon = fixture.start(&["sick", "good1", "good2"]);
        let mut session = fixture.hang();
        // The process publishes the operation.
        thread::sleep(Duration::from_secs(1));
        send(daemon.disk_process("sick"), libc::SIGKILL);
        poll_until("a line about the wait", WAIT_LIMIT, || daemon.log().contains(expected).then_some(()));
        assert_serves(&fixture.socket("good1"), 0);
        if engine == "io_uring" {
            poll_until("the disk to count as not served", 2 * WAIT_LIMIT, || {
                let line = "sick: not served: the kernel has not ended the I/O of its process, which died, for 30 s";
                daemon.log().contains(line).then_some(())
            });
        }
        fixture.disk.release(OpClass::Write);
        session = session.reconnect(&fixture.socket("sick"));
        session.start_ring(0);
        assert_eq!(session.read(0, 8192), pattern(3, 0, 8192), "{engine}");
        drop(session);
        daemon.stop();
    }
}

#[test]
fn sigterm_does_not_wait_for_the_io_of_a_killed_disk_process() {
    let Some(mut fixture) = Fixture::new("") else { return };
    let mut daemon = fixture.start(&["sick", "good1", "good2"]);
    let session = fixture.hang();
    send(daemon.disk_process("sick"), libc::SIGKILL);
    daemon.await_log("sick: its process has died: killed by SIGKILL");
    let begun = Instant::now();
    daemon.terminate();
    assert_eq!(daemon.wait().code(), Some(1), "{}", daemon.log());
    assert!(begun.elapsed() < WAIT_LIMIT / 2, "{:?}", begun.elapsed());
    drop(session);
}

/// The next daemon waits for the image's lock, which the kernel holds until the operations of the old one are over.
#[test]
fn an_upgrade_hands_a_disk_with_a_hanging_image_to_the_next_daemon() {
    for engine in ["io_uring", "threads"] {
        let Some(mut fixture) = Fixture::new(&format!("engine = {engine:?}")) else { return };
        let mut daemon = fixture.start(&["sick", "good1", "good2"]);
        let mut guest = Session::open(&fixture.socket("good1"), &SessionOptions::default());
        guest.write(8, &pattern(4, 8, 4096));
        let session = fixture.hang();
        daemon.signal(libc::SIGUSR1);
        fixture.wait_until_the_others_end();
        if engine == "io_uring" {
            let status = daemon.wait();
            assert!(status.success(), "{status}: {}", daemon.log());
            daemon.restart_for(&[fixture.socket("good1"), fixture.socket("good2")]);
            drop(guest);
            let mut guest = Session::open(&fixture.socket("good1"), &SessionOptions::default());
            assert_eq!(guest.read(8, 4096), pattern(4, 8, 4096), "the other disks' caches were handed over");
            assert!(!is_listening(&fixture.socket("sick")), "the kernel still uses the image");
            drop(session);
            fixture.disk.release(OpClass::Write);
        } else {
            // A thread of the process hangs in the kernel, and so the process cannot end.
            fixture.disk.release(OpClass::Write);
            assert!(daemon.wait().success(), "{}", daemon.log());
            daemon.restart_for(&[fixture.socket("good1"), fixture.socket("good2")]);
            drop((guest, session));
        }
        poll_until("the sick disk to be served", WAIT_LIMIT, || is_listening(&fixture.socket("sick")).then_some(()));
        let mut session = Session::open(&fixture.socket("sick"), &SessionOptions::default());
        assert_eq!(session.read(0, 8192), pattern(3, 0, 8192), "{engine}: no completed write is lost");
        drop(session);
        daemon.stop();
    }
}

#[test]
fn a_hanging_image_does_not_delay_the_start_of_other_disks() {
    let Some(mut fixture) = Fixture::new("") else { return };
    let notified = UnixDatagram::bind(fixture.paths.join("notify")).expect("a socket can be bound");
    notified.set_read_timeout(Some(WAIT_LIMIT)).expect("a timeout can be set");
    fixture.disk.hold(OpClass::Read);
    let mut daemon = fixture.start(&["good1", "good2"]);
    assert_serves(&fixture.socket("good1"), 0);
    let mut message = [0; 1024];
    let length = notified.recv(&mut message).expect("the daemon notifies its service manager");
    let expected = "READY=1\nSTATUS=serving 2 of 3 disks; not served: sick (its image does not answer)";
    assert_eq!(String::from_utf8_lossy(&message[..length]), expected);
    poll_until("a line about the wait", TIMEOUT, || {
        let log = daemon.log();
        (log.contains("sick: image ") && log.contains("opening the image has taken 5 s so far")).then_some(())
    });
    fixture.disk.release(OpClass::Read);
    poll_until("the disk to be served", TIMEOUT, || is_listening(&fixture.socket("sick")).then_some(()));
    assert_serves(&fixture.socket("sick"), 64);
    daemon.stop();
}

#[test]
fn a_daemon_can_stop_while_a_disk_is_still_opening() {
    let Some(mut fixture) = Fixture::new("") else { return };
    fixture.disk.hold(OpClass::Read);
    let mut daemon = fixture.start(&["good1", "good2"]);
    daemon.terminate();
    fixture.wait_until_the_others_end();
    let started = Instant::now();
    poll_until("the daemon to give up the disk", WAIT_LIMIT, || {
        daemon.log().contains("sick: ended without waiting any longer for image").then_some(())
    });
    assert!(started.elapsed() < TIMEOUT, "{:?}", started.elapsed());
    // The thread that opens it hangs in the kernel.
    fixture.disk.release(OpClass::Read);
    assert!(daemon.wait().success(), "nothing of that disk was served: {}", daemon.log());
    assert!(!fixture.socket("sick").exists());
}

#[test]
fn a_hanging_image_and_its_recovery_are_logged() {
    let Some(mut fixture) = Fixture::new("") else { return };
    let mut daemon = fixture.start(&["sick", "good1", "good2"]);
    let mut session = fixture.hang();
    let mut other = Session::open(&fixture.socket("good2"), &SessionOptions::default());
    other.write(0, &pattern(5, 0, 4096));
    other.flush();
    poll_until("a line about the image", WAIT_LIMIT, || {
        let log = daemon.log();
        let line = log.lines().find(|line| line.contains("does not answer: a write of"))?.to_owned();
        assert!(line.contains("sick: image ") && line.contains("in flight for 5 s"), "{line}");
        Some(())
    });
    fixture.disk.release(OpClass::Write);
    session.wait_for(0, 1);
    poll_until("the image to answer", WAIT_LIMIT, || daemon.log().contains("answers again").then_some(()));
    drop((session, other));
    daemon.stop();
}

/// A write that the image delays can change the image's times at any moment until it completes: the next daemon must
/// know how long this one lived.
#[test]
fn heartbeats_continue_while_a_write_hangs() {
    let Some(mut fixture) = Fixture::new("") else { return };
    let mut daemon = fixture.start(&["sick", "good1", "good2"]);
    let session = fixture.hang();
    // The word HEARTBEAT of the header (src/arena/ledger.rs) of each cache.
    let heartbeat = |path: &PathBuf| {
        let header = fs::read(path).expect("a cache file can be read");
        u64::from_le_bytes(header[3640..3648].try_into().expect("eight bytes"))
    };
    let caches = || {
        daemon
            .directory()
            .left()
            .into_iter()
            .filter(|path| fs::metadata(path).is_ok_and(|metadata| metadata.len() > 4096))
    };
    let latest = || caches().map(|path| heartbeat(&path)).max().expect("a cache");
    let hung_at = latest();
    for seconds in 1..4 {
        let expected = hung_at + seconds * 1_000_000_000;
        poll_until("a heartbeat", TIMEOUT, || (latest() >= expected).then_some(()));
    }
    drop(session);
    fixture.disk.release(OpClass::Write);
    daemon.stop();
}

/// A submission to an image that does not answer returns at once, with a ring and with threads: what needs no image
/// goes on.
#[test]
fn a_hanging_image_does_not_delay_cached_reads() {
    for engine in ["auto", "threads"] {
        for class in [OpClass::Read, OpClass::Write, OpClass::Sync] {
            let Some(mut fixture) = Fixture::new(&format!("engine = {engine:?}")) else { return };
            let mut daemon = fixture.start(&["sick", "good1", "good2"]);
            let mut session = Session::open(&fixture.socket("sick"), &SessionOptions::default());
            session.write(0, &pattern(3, 0, 8192));
            fixture.disk.hold(class);
            // More than any queue of operations holds beside a worker.
            match class {
                OpClass::Read => (0..32).for_each(|n| _ = session.submit(0, VIRTIO_BLK_T_IN, 2048 + n * 64, READ)),
                _ => _ = session.submit(0, VIRTIO_BLK_T_FLUSH, 0, Payload::Empty),
            }
            session.rings[0].notify();
            poll_until("the image to hang", TIMEOUT, || (fixture.disk.held(class) > 0).then_some(()));
            for _ in 0..20 {
                let begun = Instant::now();
                assert_eq!(session.read(0, 8192), pattern(3, 0, 8192), "{engine}, {class:?}");
                session.config_u32(0);
                assert!(begun.elapsed() < WAIT_LIMIT / 10, "{engine}, {class:?}: {:?}", begun.elapsed());
            }
            fixture.disk.release(class);
            drop(session);
            daemon.stop();
        }
    }
}

/// An access to memory whose pages another process delivers could hang a worker.
#[test]
fn guest_memory_on_a_fuse_or_network_file_system_is_refused() {
    let Some(mut fixture) = Fixture::new("") else { return };
    let mut daemon = fixture.start(&["sick", "good1", "good2"]);
    let file = fs::File::options().read(true).write(true).open(fixture.mount.image()).expect("the image exists");
    let session = Session::negotiate(&fixture.socket("good1"), &SessionOptions::default());
    let region = VhostUserMemoryRegionInfo {
        guest_phys_addr: 0,
        memory_size: 1 << 20,
        userspace_addr: 1 << 32,
        mmap_offset: 0,
        mmap_handle: file.as_raw_fd(),
    };
    session.frontend.set_mem_table(&[region]).expect_err("the memory may hang");
    daemon.await_log("good1: closed the connection of the front-end: memory on FUSE may hang");
    drop(session);
    assert_serves(&fixture.socket("good1"), 0);
    daemon.stop();
}

/// The end of a process waits for the FUSE server too, even after SIGKILL. In the supervisor, that would be the end of
/// every disk.
#[test]
fn the_supervisor_gets_no_descriptor_whose_close_may_hang() {
    let Some(mut fixture) = Fixture::new("") else { return };
    let mut daemon = fixture.start(&["sick", "good1", "good2"]);
    let file = fs::File::options().read(true).write(true).open(fixture.mount.image()).expect("the image exists");
    let session = Session::negotiate(&fixture.socket("good1"), &SessionOptions::default());
    fixture.disk.hold(OpClass::Close);
    // SAFETY: the descriptor is open, and only `call` owns it.
    let call = unsafe { EventFd::from_raw_fd(file.into_raw_fd()) };
    // The reply comes when the disk process has closed its descriptor.
    let sent = thread::spawn(move || session.frontend.set_vring_call(0, &call));
    daemon.await_log("good1: vring 0: ignored a kick, call or error descriptor that is not an eventfd");
    // Time for a thread of the supervisor to close a copy, if it has one.
    thread::sleep(Duration::from_millis(500));
    let tasks = fs::read_dir(format!("/proc/{}/task", daemon.id())).expect("the supervisor runs").flatten();
    let calls = tasks.filter_map(|task| fs::read_to_string(task.path().join("syscall")).ok());
    let closing = calls.filter(|call| call.split(' ').next() == Some(&libc::SYS_close.to_string())).count();
    assert_serves(&fixture.socket("good2"), 0);
    fixture.disk.release(OpClass::Close);
    assert_eq!(closing, 0, "threads of the supervisor wait in close()");
    sent.join().expect("the thread ends").expect("SET_VRING_CALL");
    daemon.stop();
}

/// The hold ends only after a retry: the process, not the image, was away.
#[test]
fn requests_held_across_a_stop_of_the_process_are_retried_before_they_fail() {
    let Some(mut fixture) = Fixture::new("cache.on_error = \"hold\"\ncache.hold_max_ms = 1500") else { return };
    let mut daemon = fixture.start(&["sick", "good1", "good2"]);
    let mut session = Session::open(&fixture.socket("sick"), &SessionOptions::default());
    fixture.disk.fail(OpClass::Write, 100);
    session.write(0, &pattern(3, 0, 4096));
    let flush = session.submit(0, VIRTIO_BLK_T_FLUSH, 0, Payload::Empty);
    poll_until("the image to fail", TIMEOUT, || daemon.log().contains("write-back failing").then_some(()));
    daemon.signal(libc::SIGSTOP);
    thread::sleep(Duration::from_secs(4));
    fixture.disk.fail(OpClass::Write, 0);
    daemon.signal(libc::SIGCONT);
    let used = session.wait_for(0, 1);
    let used = used.into_values().next().expect("the FLUSH completes");
    assert_eq!(session.outcome(&flush, used).status, OK, "{}", daemon.log());
    let write = session.run(0, VIRTIO_BLK_T_OUT, 8, Payload::Send(&pattern(6, 8, 512)));
    assert_eq!(write.status, OK);
    drop(session);
    daemon.stop();
}

#[test]
fn a_front_end_that_blocks_another_is_named_in_the_log() {
    let Some(mut fixture) = Fixture::new("") else { return };
    let mut daemon = fixture.start(&["sick", "good1", "good2"]);
    let holder = std::os::unix::net::UnixStream::connect(fixture.socket("good1")).expect("the disk is served");
    poll_until("the first front-end to be served", TIMEOUT, || {
        daemon.log().contains("good1: front-end connected").then_some(())
    });
    let waiting = std::os::unix::net::UnixStream::connect(fixture.socket("good1")).expect("the socket listens");
    let expected = format!("the disk is busy with pid {}", std::process::id());
    poll_until("a line about the wait", WAIT_LIMIT, || daemon.log().contains(&expected).then_some(()));
    drop((holder, waiting));
    daemon.stop();
}
