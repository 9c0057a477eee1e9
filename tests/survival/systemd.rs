//! A cache in the service manager's store outlives its daemon as any other does, and a want of a store is told before a
//! guest is served. The service manager is one of our own, which does with a store's descriptors what systemd does.

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
use super::{IOERR, killed, make_image, survives, write_and_die};

/// Where the descriptors begin that a service manager hands over.
const FIRST: i32 = 3;
/// Descriptors that are kept lie from here on, out of the way of those that are handed over.
const KEPT: i32 = 100;
/// More than a test keeps.
const SLOTS: usize = 8;

/// What the thread that listens shares with the test.
struct State {
    max: usize,
    kept: Mutex<Vec<(String, OwnedFd)>>,
    told: Mutex<Vec<String>>,
    /// What the next daemon gets; -1: nothing. A child that has not reached exec() can read no more than this.
    slots: [AtomicI32; SLOTS],
}

struct Systemd {
    state: Arc<State>,
    listener: Option<JoinHandle<()>>,
    /// Of its own, for it outlives its daemons.
    directory: TempDir,
}

impl Systemd {
    /// One that keeps up to `max` descriptors.
    fn new(max: usize) -> Self {
        let directory = TempDir::new("systemd");
        let socket = UnixDatagram::bind(directory.path().join("notify")).expect("a socket can be bound");
        let slots = [const { AtomicI32::new(-1) }; SLOTS];
        let state = Arc::new(State { max, kept: Mutex::default(), told: Mutex::default(), slots });
        let listens = Arc::clone(&state);
        let listener = std::thread::spawn(move || {
            let mut message = [0; 1024];
            loop {
                let (length, file) = socket.recv_with_fd(&mut message).expect("a message");
                match std::str::from_utf8(&message[..length]).expect("UTF-8") {
                    "" => return,
                    text => listens.hear(text, file),
                }
            }
        });
        Self { state, listener: Some(listener), directory }
    }

    /// Where it listens.
    fn address(&self) -> PathBuf {
        self.directory.path().join("notify")
    }

    /// Starts a daemon of a unit on a new image.
    fn start(&self, device: &str) -> Daemon {
        let directory = TempDir::new("fdstore");
        make_image(&directory);
        // The daemon must be the process that its environment speaks of.
        let mut command = Command::new("sh");
        command.args(["-c", "export LISTEN_PID=$$; exec \"$@\"", "sh"]).arg(server_binary());
        command.env("NOTIFY_SOCKET", self.address());
        let state = Arc::clone(&self.state);
        // SAFETY: between fork and exec only atomics and dup2, which are async-signal-safe.
        unsafe {
            command.pre_exec(move || {
                for (slot, target) in state.slots.iter().zip(FIRST..) {
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

    /// Makes the daemon's next start one that gets what is kept.
    fn hand_over(&self, daemon: &mut Daemon) {
        self.wait();
        let kept = self.state.kept.lock().expect("nobody panics holding it");
        for (at, slot) in self.state.slots.iter().enumerate() {
            slot.store(kept.get(at).map_or(-1, |(_, fd)| fd.as_raw_fd()), Ordering::Relaxed);
        }
        let names: Vec<&str> = kept.iter().map(|(name, _)| name.as_str()).collect();
        let command = daemon.command();
        command.env_remove("LISTEN_FDS").env_remove("LISTEN_FDNAMES");
        if !names.is_empty() {
            command.env("LISTEN_FDS", names.len().to_string()).env("LISTEN_FDNAMES", names.join(":"));
        }
    }

    /// Waits until it has heard everything that was said.
    fn wait(&self) {
        let (mut ours, theirs) = UnixStream::pair().expect("sockets can be made");
        let socket = UnixDatagram::unbound().expect("a socket can be made");
        socket.connect(self.address()).expect("it listens");
        socket.send_with_fd("BARRIER=1".as_bytes(), theirs.as_raw_fd()).expect("it listens");
        drop(theirs);
        assert_eq!(ours.read(&mut [0]).expect("it answers"), 0);
    }

    /// The names of what it keeps.
    fn kept(&self) -> Vec<String> {
        self.wait();
        self.state.kept.lock().expect("nobody panics holding it").iter().map(|(name, _)| name.clone()).collect()
    }

    /// What daemons have told it beside that.
    fn told(&self) -> Vec<String> {
        self.wait();
        self.state.told.lock().expect("nobody panics holding it").clone()
    }
}

impl State {
    fn hear(&self, message: &str, file: Option<File>) {
        let name = message.lines().find_map(|line| line.strip_prefix("FDNAME=")).unwrap_or("stored");
        let mut kept = self.kept.lock().expect("nobody panics holding it");
        match (message.lines().next(), file) {
            (Some("FDSTORE=1"), Some(file)) if kept.len() < self.max => kept.push((name.to_owned(), keep(&file))),
            // What it does not keep, it closes.
            (Some("FDSTORE=1" | "BARRIER=1"), Some(_)) => {}
            (Some("FDSTOREREMOVE=1"), None) => kept.retain(|(found, _)| found != name),
            (_, None) => self.told.lock().expect("nobody panics holding it").push(message.to_owned()),
            (_, Some(_)) => panic!("a descriptor in {message:?}"),
        }
    }
}

impl Drop for Systemd {
    fn drop(&mut self) {
        // Fails only if nobody listens any more.
        let _ = UnixDatagram::unbound().and_then(|socket| socket.send_to(&[], self.address()));
        let heard = self.listener.take().is_none_or(|listener| listener.join().is_ok());
        assert!(heard || std::thread::panicking(), "the daemon said what no service manager understands");
    }
}

/// A descriptor for the same open file, as systemd has it.
fn keep(file: &File) -> OwnedFd {
    // SAFETY: plain system call on a descriptor that is open.
    let fd = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_DUPFD_CLOEXEC, KEPT) };
    assert!(fd >= KEPT, "{}", std::io::Error::last_os_error());
    // SAFETY: the call above has made it, and nobody else has it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

const DEVICE: &str = "num_queues = 4\ncache.memory_dir = \"systemd\"\ncache.survive = \"always\"";

#[test]
fn completed_writes_survive_kills_with_the_cache_in_the_store() {
    let systemd = Systemd::new(1);
    let daemon = systemd.start(&format!("{DEVICE}\ncache.size = \"6M\""));
    let ended = |daemon: &mut Daemon| {
        assert!(systemd.kept()[0].starts_with("genblk-cache-"), "{:?}", systemd.kept());
        systemd.hand_over(daemon);
    };
    let daemon = survives(daemon, FrontEnd::Qemu, killed(), 206, ended);
    assert!(systemd.kept().is_empty(), "an orderly end leaves nothing in the store");
    assert!(daemon.log().contains(" dirty) left by the previous daemon"), "{}", daemon.log());
}

#[test]
fn an_upgrade_leaves_the_cache_in_the_store() {
    let systemd = Systemd::new(1);
    let daemon = systemd.start(&format!("{DEVICE}\ncache.size = \"32M\""));
    let ended = |daemon: &mut Daemon| {
        assert_eq!(systemd.kept().len(), 1, "the cache is left for the next daemon");
        systemd.hand_over(daemon);
    };
    survives(daemon, FrontEnd::Qemu, (libc::SIGUSR1, 3), 207, ended);
    assert_eq!(systemd.told(), ["READY=1", "STOPPING=1"].repeat(4), "each daemon says when it serves and when it ends");
}

#[test]
fn a_cache_in_the_store_is_found_by_another_shape_and_from_another_place() {
    let systemd = Systemd::new(1);
    let dirty = "\ncache.dirty_age_max_ms = 600000";
    let mut daemon = systemd.start(&format!("{DEVICE}{dirty}\ncache.size = \"8M\""));
    let next = |daemon: &mut Daemon, device: &str| {
        let (session, bytes) = write_and_die(daemon);
        daemon.configure(device);
        systemd.hand_over(daemon);
        daemon.restart();
        let mut session = session.reconnect(&daemon.socket());
        session.start_ring(0);
        assert!(session.read(80, bytes.len()) == bytes);
        assert!(daemon.image_bytes(80 * 512, bytes.len()) == bytes, "it was written to the image");
    };
    next(&mut daemon, &format!("{DEVICE}{dirty}\ncache.size = \"16M\""));
    assert_eq!(systemd.kept().len(), 1, "the new cache is in the store");
    let kept = systemd.state.kept.lock().expect("nobody panics holding it")[0].1.try_clone().expect("a descriptor");
    assert!(File::from(kept).set_len(0).is_err(), "nobody can take the memory away");
    next(&mut daemon, "cache.size = \"16M\"");
    assert!(systemd.kept().is_empty(), "the new cache is in a file");
    assert_eq!(daemon.directory().left().len(), 1);
}

#[test]
fn a_volatile_caches_mark_in_the_store_tells_of_a_loss() {
    let systemd = Systemd::new(1);
    let device = "cache.memory_dir = \"systemd\"\ncache.survive = \"never\"\ncache.dirty_age_max_ms = 600000";
    let mut daemon = systemd.start(device);
    let (session, _) = write_and_die(&mut daemon);
    // A daemon that dies before the guest is back must not make it forgotten, nor may another kind of cache.
    for survive in ["never", "always"] {
        daemon.configure(&device.replace("never", survive));
        systemd.hand_over(&mut daemon);
        daemon.restart();
        daemon.kill();
    }
    systemd.hand_over(&mut daemon);
    daemon.restart();
    let mut session = session.reconnect(&daemon.socket());
    session.start_ring(0);
    let status = session.run(0, VIRTIO_BLK_T_IN, 0, Payload::Receive(512)).status;
    assert_eq!(status, IOERR, "the guest believes in what is gone");
    drop(session);
    Session::open(&daemon.socket(), &SessionOptions::default()).write(0, &pattern(8, 0, 512));
    daemon.stop();
    assert!(systemd.kept().is_empty(), "an orderly end leaves nothing in the store");
}

#[test]
fn a_want_of_a_store_is_told() {
    let systemd = Systemd::new(0);
    let mut daemon = systemd.start("cache.memory_dir = \"systemd\"");
    assert_serves(&daemon.socket(), 0);
    daemon.stop();
    let told = "the service manager does not keep it (FileDescriptorStoreMax= of the unit is too small); the cache goes \
                with the daemon";
    assert!(daemon.log().contains(told), "{}", daemon.log());

    daemon.configure(DEVICE);
    let refusal = |address: Option<&str>| {
        let mut command = Command::new(server_binary());
        command.arg("--config").arg(daemon.config()).env_remove("NOTIFY_SOCKET");
        let ended = run_to_end(command.envs(address.map(|address| ("NOTIFY_SOCKET", address))));
        assert_eq!(ended.status.code(), Some(1), "{ended:?}");
        ended.stderr
    };
    let full = refusal(systemd.address().to_str());
    assert!(full.contains("systemd can't keep the cache: the service manager does not keep it"), "{full}");
    for nobody in [None, Some("/nonexistent")] {
        let alone = refusal(nobody);
        assert!(alone.contains("systemd can't keep the cache: no service manager has started the daemon"), "{alone}");
    }
}

#[test]
fn what_no_device_uses_is_named_and_left_in_the_store() {
    let systemd = Systemd::new(SLOTS);
    let mut daemon = systemd.start(&format!("{DEVICE}\ncache.dirty_age_max_ms = 600000"));
    drop(write_and_die(&mut daemon));
    let foreign = File::open("/dev/null").expect("it is there");
    systemd.state.hear("FDSTORE=1\nFDNAME=foreign", Some(foreign));
    let before = systemd.kept();
    // Its cache is of the old image, and so of nobody here.
    std::fs::remove_file(daemon.image()).expect("the image can be removed");
    make_image(daemon.directory());
    systemd.hand_over(&mut daemon);
    daemon.restart();
    assert_serves(&daemon.socket(), 0);
    let told = format!(
        "it stays with it: {} (of {}: 4 pages, 4 of them not on the image), foreign\n",
        before[0],
        daemon.image().display()
    );
    assert!(daemon.log().contains(&told), "{}", daemon.log());
    daemon.stop();
    assert_eq!(systemd.kept(), before);
}

/// systemd's own opinion of the unit, where it is installed; it need not run.
#[test]
fn the_unit_file_is_one_that_systemd_understands() {
    let unit = include_str!("../../configs/genblk.service");
    let directory = TempDir::new("unit");
    let copy = directory.path().join("genblk.service");
    let here = unit.replace("/usr/local/bin/genblk", &server_binary());
    std::fs::write(&copy, here).expect("a file can be written");
    let Ok(said) = Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&copy).output() else {
        println!("SKIPPED: this host has no systemd-analyze");
        return;
    };
    let stderr = String::from_utf8_lossy(&said.stderr);
    // Of a version before 254.
    let unknown = "Unknown key 'FileDescriptorStorePreserve' in section [Service], ignoring.";
    let complaints: Vec<&str> = stderr.lines().filter(|line| !line.ends_with(unknown)).collect();
    assert!(said.status.success() && complaints.is_empty(), "{said:?}");
}
