//! A cache in the service manager's fd store survives its daemon like any other, and a unit without an fd store is
//! reported. A test double of the service manager treats the fd store's descriptors as systemd does.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use virtio_bindings::virtio_blk::VIRTIO_BLK_T_IN;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::common::daemon::{Daemon, TempDir, run_to_end, server_binary};
use super::common::request::{Payload, assert_serves, pattern};
use super::common::session::{Session, SessionOptions};
use super::guest::FrontEnd;
use super::{Ends, IOERR, assert_survives, make_image, write_and_kill};

/// Number of the first descriptor that a service manager passes to a daemon.
const FIRST_FD: i32 = 3;
/// Stored descriptors get numbers from here on, apart from those that a daemon is passed.
const FIRST_STORED_FD: i32 = 100;
/// More than a test stores.
const SLOTS: usize = 8;

/// What the listening thread shares with the test.
struct Shared {
    /// Size of the fd store (FileDescriptorStoreMax=).
    max: usize,
    /// The fd store: descriptors with their names.
    stored: Mutex<Vec<(String, OwnedFd)>>,
    /// The messages that do not concern the fd store.
    states: Mutex<Vec<String>>,
    /// The descriptors for the next daemon; -1: none. A child between fork() and exec() must not lock a mutex.
    slots: [AtomicI32; SLOTS],
}

/// A test double of systemd.
struct Systemd {
    state: Arc<Shared>,
    listener: Option<JoinHandle<()>>,
    /// Its own directory, because it outlives its daemons.
    directory: TempDir,
}

impl Systemd {
    /// One whose fd store holds up to `max` descriptors.
    fn new(max: usize) -> Self {
        let directory = TempDir::new("systemd");
        let socket = UnixDatagram::bind(directory.path().join("notify")).expect("a socket can be bound");
        let slots = [const { AtomicI32::new(-1) }; SLOTS];
        let state = Arc::new(Shared { max, stored: Mutex::default(), states: Mutex::default(), slots });
        let listening = Arc::clone(&state);
        let listener = std::thread::spawn(move || {
            let mut message = [0; 1024];
            loop {
                let (length, file) = socket.recv_with_fd(&mut message).expect("a message");
                match std::str::from_utf8(&message[..length]).expect("UTF-8") {
                    "" => return,
                    text => listening.receive(text, file),
                }
            }
        });
        Self { state, listener: Some(listener), directory }
    }

    /// The path of its socket.
    fn address(&self) -> PathBuf {
        self.directory.path().join("notify")
    }

    /// Starts a daemon on a new image.
    fn start(&self, device: &str) -> Daemon {
        let directory = TempDir::new("fdstore");
        make_image(&directory);
        // $LISTEN_PID must be the daemon's own process ID.
        let mut command = Command::new("sh");
        command.args(["-c", "export LISTEN_PID=$$; exec \"$@\"", "sh"]).arg(server_binary());
        command.env("NOTIFY_SOCKET", self.address());
        let state = Arc::clone(&self.state);
        // SAFETY: between fork and exec only atomics and dup2, which are async-signal-safe.
        unsafe {
            command.pre_exec(move || {
                for (slot, target) in state.slots.iter().zip(FIRST_FD..) {
                    let fd = slot.load(Ordering::Relaxed);
                    if fd >= 0 && libc::dup2(fd, target) < 0 {
                        return Err(std::io::Error::last_os_error());
                    }
                }
                Ok(())
            })
        };
        Daemon::start_by(directory, &[device], command)
    }

    /// Passes the contents of the fd store to the daemon at its next start.
    fn pass_fdstore(&self, daemon: &mut Daemon) {
        self.sync();
        let stored = self.state.stored.lock().expect("no thread panics with the fd store locked");
        for (at, slot) in self.state.slots.iter().enumerate() {
            slot.store(stored.get(at).map_or(-1, |(_, fd)| fd.as_raw_fd()), Ordering::Relaxed);
        }
        let names: Vec<&str> = stored.iter().map(|(name, _)| name.as_str()).collect();
        let command = daemon.command();
        command.env_remove("LISTEN_FDS").env_remove("LISTEN_FDNAMES");
        if !names.is_empty() {
            command.env("LISTEN_FDS", names.len().to_string()).env("LISTEN_FDNAMES", names.join(":"));
        }
    }

    /// Waits until it has processed all messages sent so far.
    fn sync(&self) {
        let (mut ours, theirs) = UnixStream::pair().expect("sockets can be created");
        let socket = UnixDatagram::unbound().expect("a socket can be created");
        socket.connect(self.address()).expect("the service manager listens");
        socket.send_with_fd("BARRIER=1".as_bytes(), theirs.as_raw_fd()).expect("the service manager listens");
        drop(theirs);
        assert_eq!(ours.read(&mut [0]).expect("the barrier is closed"), 0);
    }

    /// The names in the fd store.
    fn stored_names(&self) -> Vec<String> {
        self.sync();
        let stored = self.state.stored.lock().expect("no thread panics with the fd store locked");
        stored.iter().map(|(name, _)| name.clone()).collect()
    }

    /// The states that daemons have reported.
    fn states(&self) -> Vec<String> {
        self.sync();
        self.state.states.lock().expect("no thread panics with the states locked").clone()
    }
}

impl Shared {
    fn receive(&self, message: &str, file: Option<File>) {
        let name = message.lines().find_map(|line| line.strip_prefix("FDNAME=")).unwrap_or("stored");
        let mut stored = self.stored.lock().expect("no thread panics with the fd store locked");
        match (message.lines().next(), file) {
            (Some("FDSTORE=1"), Some(file)) if stored.len() < self.max => {
                stored.push((name.to_owned(), duplicate(&file)));
            }
            // A descriptor that is not stored is closed.
            (Some("FDSTORE=1" | "BARRIER=1"), Some(_)) => {}
            (Some("FDSTOREREMOVE=1"), None) => stored.retain(|(found, _)| found != name),
            (_, None) => {
                self.states.lock().expect("no thread panics with the states locked").push(message.to_owned());
            }
            (_, Some(_)) => panic!("an unexpected descriptor with {message:?}"),
        }
    }
}

impl Drop for Systemd {
    fn drop(&mut self) {
        // Fails only if the thread has ended.
        let _ = UnixDatagram::unbound().and_then(|socket| socket.send_to(&[], self.address()));
        let understood = self.listener.take().is_none_or(|listener| listener.join().is_ok());
        assert!(understood || std::thread::panicking(), "a daemon sent a message that systemd would not understand");
    }
}

/// Another descriptor for the same open file description.
fn duplicate(file: &File) -> OwnedFd {
    // SAFETY: a plain system call on an open descriptor.
    let fd = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_DUPFD_CLOEXEC, FIRST_STORED_FD) };
    assert!(fd >= FIRST_STORED_FD, "{}", std::io::Error::last_os_error());
    // SAFETY: fcntl returned a new descriptor, which nothing else owns.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

const DEVICE: &str = "num_queues = 4\ncache.memory_dir = \"systemd\"\ncache.survive = \"always\"";

#[test]
fn completed_writes_survive_kills_with_the_cache_in_the_fd_store() {
    let systemd = Systemd::new(1);
    let daemon = systemd.start(&format!("{DEVICE}\ncache.size = \"6M\""));
    let check_ended = |daemon: &mut Daemon| {
        assert!(systemd.stored_names()[0].starts_with("genblk-cache-"), "{:?}", systemd.stored_names());
        systemd.pass_fdstore(daemon);
    };
    let daemon = assert_survives(daemon, FrontEnd::Qemu, Ends::kills(), 206, check_ended);
    assert!(systemd.stored_names().is_empty(), "an orderly end leaves nothing in the fd store");
    daemon.await_log(" dirty) left by the previous daemon");
}

#[test]
fn upgrades_leave_the_cache_in_the_fd_store() {
    let systemd = Systemd::new(1);
    let daemon = systemd.start(&format!("{DEVICE}\ncache.size = \"32M\""));
    let check_ended = |daemon: &mut Daemon| {
        assert_eq!(systemd.stored_names().len(), 1, "the cache stays for the next daemon");
        systemd.pass_fdstore(daemon);
    };
    assert_survives(daemon, FrontEnd::Qemu, Ends::upgrades(3), 207, check_ended);
    let states = ["READY=1\nSTATUS=serving 1 of 1 disk", "STOPPING=1"];
    assert_eq!(systemd.states(), states.repeat(4), "each daemon reports its start and its end");
}

#[test]
fn a_cache_in_the_fd_store_is_found_after_a_change_of_size_or_location() {
    let systemd = Systemd::new(1);
    let dirty = "\ncache.dirty_age_max_ms = 600000";
    let mut daemon = systemd.start(&format!("{DEVICE}{dirty}\ncache.size = \"8M\""));
    let next = |daemon: &mut Daemon, device: &str| {
        let (session, bytes) = write_and_kill(daemon);
        daemon.configure(device);
        systemd.pass_fdstore(daemon);
        daemon.restart();
        let mut session = session.reconnect(&daemon.socket());
        session.start_ring(0);
        assert!(session.read(80, bytes.len()) == bytes);
        assert!(daemon.image_bytes(80 * 512, bytes.len()) == bytes, "the dirty pages are on the image");
    };
    next(&mut daemon, &format!("{DEVICE}{dirty}\ncache.size = \"64M\""));
    assert_eq!(systemd.stored_names().len(), 1, "the new cache is in the fd store");
    let stored = systemd.state.stored.lock().expect("no thread panics with the fd store locked")[0].1.try_clone();
    let file = File::from(stored.expect("a descriptor can be duplicated"));
    assert!(file.set_len(0).is_err(), "the memory is sealed against shrinking");
    next(&mut daemon, "cache.size = \"16M\"");
    assert!(systemd.stored_names().is_empty(), "the new cache is in a file");
    assert_eq!(daemon.directory().left().len(), 1);
}

#[test]
fn a_cache_moves_between_file_and_fd_store_and_is_used_only_once() {
    let systemd = Systemd::new(1);
    const IN_FILE: &str = "cache.dirty_age_max_ms = 600000";
    let mut daemon = systemd.start(IN_FILE);
    let (session, bytes) = write_and_kill(&mut daemon);
    drop(session);
    let left = daemon.directory().left();
    let old = std::fs::read(&left[0]).expect("the file can be read");
    daemon.reconfigure(&format!("{DEVICE}\n{IN_FILE}"));
    assert!(daemon.image_bytes(80 * 512, bytes.len()) == bytes, "the dirty pages are on the image");
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    let newer = pattern(8, 80, 16 << 10);
    session.write(80, &newer);
    daemon.kill();
    // As if the first file had been out of reach meanwhile.
    std::fs::write(&left[0], old).expect("the file can be written");
    daemon.configure(IN_FILE);
    systemd.pass_fdstore(&mut daemon);
    daemon.restart();
    let mut session = session.reconnect(&daemon.socket());
    session.start_ring(0);
    assert!(session.read(80, newer.len()) == newer);
    assert!(daemon.image_bytes(80 * 512, newer.len()) == newer, "the newer pages are on the image");
    let shown = left[0].display().to_string();
    let is_named =
        |line: &str| line.contains(&format!("{shown} is ignored")) && line.contains("holds 4 dirty pages of ");
    assert!(daemon.log().lines().any(is_named), "{}", daemon.log());
    assert!(daemon.directory().left().contains(&left[0]), "the older cache stays for the operator");
}

#[test]
fn a_read_only_start_is_refused_while_the_fd_store_holds_dirty_pages() {
    let systemd = Systemd::new(1);
    let dirty = "cache.dirty_age_max_ms = 600000";
    let mut daemon = systemd.start(&format!("{DEVICE}\n{dirty}"));
    let (_guest, bytes) = write_and_kill(&mut daemon);
    let before = systemd.stored_names();
    // Wherever the reader's own cache would be.
    for device in ["read_only = true\ncache.memory_dir = \"systemd\"", "read_only = true"] {
        daemon.configure(device);
        systemd.pass_fdstore(&mut daemon);
        let refused = run_to_end(daemon.command());
        let message = format!(
            ": fd-store entry {} holds 4 dirty pages, not yet written to the image; to keep the data, remove \
             read_only and start the unit again; otherwise stop the unit and remove it with \"systemctl clean \
             --what=fdstore UNIT\"",
            before[0]
        );
        assert!(refused.status.code() == Some(1) && refused.stderr.contains(&message), "{refused:?}");
        assert_eq!(systemd.stored_names(), before, "the cache stays");
    }
    daemon.configure(DEVICE);
    daemon.restart();
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    assert!(session.read(80, bytes.len()) == bytes);
}

#[test]
fn a_loss_marker_in_the_fd_store_reports_a_data_loss() {
    let systemd = Systemd::new(1);
    let device = "cache.memory_dir = \"systemd\"\ncache.survive = \"never\"\ncache.dirty_age_max_ms = 600000";
    let mut daemon = systemd.start(device);
    let (session, _) = write_and_kill(&mut daemon);
    // Neither a daemon that dies before the guest reconnects nor another kind of cache may forget the loss.
    for survive in ["never", "always"] {
        daemon.configure(&device.replace("never", survive));
        systemd.pass_fdstore(&mut daemon);
        daemon.restart();
        daemon.kill();
    }
    systemd.pass_fdstore(&mut daemon);
    daemon.restart();
    let mut session = session.reconnect(&daemon.socket());
    session.start_ring(0);
    let status = session.run(0, VIRTIO_BLK_T_IN, 0, Payload::Receive(512)).status;
    assert_eq!(status, IOERR, "the guest must not read stale data");
    drop(session);
    Session::open(&daemon.socket(), &SessionOptions::default()).write(0, &pattern(8, 0, 512));
    daemon.stop();
    assert!(systemd.stored_names().is_empty(), "an orderly end leaves nothing in the fd store");
}

#[test]
fn the_write_through_mode_is_kept_in_the_fd_store() {
    let systemd = Systemd::new(1);
    let device = format!("{DEVICE}\ncache.dirty_age_max_ms = 600000");
    let mut daemon = systemd.start(&device);
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    session.set_writeback(false);
    // The last time the cache is one of another size.
    let sizes = ["8M", "8M", "8M", "16M"];
    for (round, (signal, size)) in
        (1..).zip([libc::SIGKILL, libc::SIGTERM, libc::SIGUSR1, libc::SIGKILL].iter().zip(sizes))
    {
        daemon.signal(*signal);
        daemon.wait();
        daemon.configure(&format!("{device}\ncache.size = {size:?}"));
        systemd.pass_fdstore(&mut daemon);
        daemon.restart();
        session = session.reconnect(&daemon.socket());
        session.start_ring(0);
        let bytes = pattern(round, 80, 4096);
        session.write(80, &bytes);
        let found = daemon.image_bytes(80 * 512, bytes.len());
        assert!(found == bytes, "after signal {signal} a completed write is on the image");
        assert_eq!(systemd.stored_names().len(), 1);
    }
    session.set_writeback(true);
    drop(session);
    daemon.stop();
    assert!(systemd.stored_names().is_empty(), "nothing is left in the fd store");
}

#[test]
fn a_unit_without_an_fd_store_is_reported() {
    let systemd = Systemd::new(0);
    let mut daemon = systemd.start("cache.memory_dir = \"systemd\"");
    assert_serves(&daemon.socket(), 0);
    daemon.stop();
    let message = "the fd store is full or disabled (see FileDescriptorStoreMax= of the unit); using a cache that does \
                   not survive a crash";
    assert!(daemon.log().contains(message), "{}", daemon.log());

    daemon.configure(DEVICE);
    let refusal = |address: Option<&str>| {
        let mut command = Command::new(server_binary());
        command.arg("--config").arg(daemon.config()).env_remove("NOTIFY_SOCKET");
        let ended = run_to_end(command.envs(address.map(|address| ("NOTIFY_SOCKET", address))));
        assert_eq!(ended.status.code(), Some(1), "{ended:?}");
        ended.stderr
    };
    let full = refusal(systemd.address().to_str());
    assert!(full.contains("cannot keep the cache in systemd's fd store: the fd store is full or disabled"), "{full}");
    for address in [None, Some("/nonexistent")] {
        let refusal = refusal(address);
        let message = "cannot keep the cache in systemd's fd store: the daemon was not started by a service manager";
        assert!(refusal.contains(message), "{refusal}");
    }
}

#[test]
fn unused_fd_store_entries_are_reported_and_stay() {
    let systemd = Systemd::new(SLOTS);
    let mut daemon = systemd.start(&format!("{DEVICE}\ncache.dirty_age_max_ms = 600000"));
    drop(write_and_kill(&mut daemon));
    let foreign = File::open("/dev/null").expect("/dev/null exists");
    systemd.state.receive("FDSTORE=1\nFDNAME=foreign", Some(foreign));
    let before = systemd.stored_names();
    // With a new image, no device uses the cache of the old one.
    std::fs::remove_file(daemon.image()).expect("the image can be removed");
    make_image(daemon.directory());
    systemd.pass_fdstore(&mut daemon);
    daemon.restart();
    assert_serves(&daemon.socket(), 0);
    let message = format!(
        "not used by any configured device (left in place): {} ({}: 4 cached pages (4 dirty)), foreign\n",
        before[0],
        daemon.image().display()
    );
    assert!(daemon.log().contains(&message), "{}", daemon.log());
    daemon.stop();
    assert_eq!(systemd.stored_names(), before);
}

/// Checked by `systemd-analyze`, which does not need a running systemd.
#[test]
fn systemd_accepts_the_unit_file() {
    let unit = include_str!("../../configs/genblk.service");
    let directory = TempDir::new("unit");
    let copy = directory.path().join("genblk.service");
    let adapted = unit.replace("/usr/local/bin/genblk", &server_binary());
    std::fs::write(&copy, adapted).expect("a file can be written");
    let Ok(output) = Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&copy).output() else {
        println!("SKIPPED: this host has no systemd-analyze");
        return;
    };
    let stderr = String::from_utf8_lossy(&output.stderr);
    // systemd before 254.
    let unknown = "Unknown key 'FileDescriptorStorePreserve' in section [Service], ignoring.";
    let complaints: Vec<&str> = stderr.lines().filter(|line| !line.ends_with(unknown)).collect();
    assert!(output.status.success() && complaints.is_empty(), "{output:?}");
}
