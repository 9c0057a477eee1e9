//! A network that is cut between daemon and server, and comes back. Each test has two network namespaces of its own,
//! with a virtual cable between them; it needs root and says so in one line where it is skipped.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use super::common::daemon::{Daemon, TempDir, server_binary};
use super::common::nbd_server::is_installed;
use super::common::request::{OK, Payload, pattern};
use super::common::session::{Session, SessionOptions};
use super::common::wait::{TIMEOUT, poll_until};
use super::{directory_with_image, image_of};
use virtio_bindings::virtio_blk::VIRTIO_BLK_T_FLUSH;

/// How long it may take to find out that the other end is gone: 13 s, on a loaded machine.
const LOSS_LIMIT: Duration = Duration::from_secs(30);

/// Two namespaces with a cable between them, and a server in the second one.
struct Network {
    namespaces: [String; 2],
    server: Option<Child>,
}

fn socket_of_daemon(directory: &TempDir) -> PathBuf {
    directory.path().join("socket")
}

fn ip(arguments: &[&str]) -> bool {
    let ran = Command::new("ip").args(arguments).stderr(Stdio::null()).status();
    ran.is_ok_and(|status| status.success())
}

impl Network {
    /// `None` where namespaces cannot be made.
    fn start(name: &str, directory: &TempDir) -> Option<Self> {
        if !is_installed("nbdkit") {
            return None;
        }
        let namespaces = ["a", "b"].map(|end| format!("genblk-{name}-{}-{end}", std::process::id()));
        let mut network = Self { namespaces, server: None };
        let [one, other] = network.namespaces.each_ref().map(String::as_str);
        let is_made = ip(&["netns", "add", one])
            && ip(&["netns", "add", other])
            && ip(&["-n", one, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", other])
            && [(one, "10.99.0.1/24"), (other, "10.99.0.2/24")].iter().all(|(namespace, address)| {
                ip(&["-n", namespace, "addr", "add", address, "dev", "cable"])
                    && ip(&["-n", namespace, "link", "set", "cable", "up"])
            });
        if !is_made {
            println!("skipped: network namespaces cannot be made here");
            return None;
        }
        let image = image_of(directory);
        let mut server = Command::new("ip");
        server.args(["netns", "exec", other, "nbdkit", "-f", "-p", "10809", "file"]).arg(image);
        network.server = Some(server.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().ok()?);
        poll_until("the server to listen", TIMEOUT, || {
            let listening = Command::new("ip").args(["netns", "exec", other, "cat", "/proc/net/tcp"]).output().ok()?;
            String::from_utf8_lossy(&listening.stdout).contains(":2A39 ").then_some(())
        });
        Some(network)
    }

    /// Starts a daemon in the first namespace.
    fn daemon(&self, directory: TempDir, keys: &str) -> Daemon {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.namespaces[0]]).arg(server_binary());
        let (socket, config) = (socket_of_daemon(&directory), directory.path().join("genblk.toml"));
        let memory = directory.memory();
        let text = format!(
            "[[device]]\nname = \"disk0\"\nsocket = {socket:?}\nimage = \"nbd://10.99.0.2/\"\n{keys}\ncache.size = \
             \"8M\"\ncache.memory_dir = {memory:?}\n"
        );
        std::fs::write(&config, text).unwrap();
        command.arg("--config").arg(config);
        // Which sockets listen is known only in the daemon's namespace.
        let daemon = Daemon::launch(directory, command, Vec::new());
        daemon.await_log("serving");
        daemon
    }

    /// A front-end, which has no namespace of its own: a path leads to the socket.
    fn session(daemon: &Daemon) -> Session {
        Session::open(&socket_of_daemon(daemon.directory()), &SessionOptions::default())
    }

    fn set_cable(&self, state: &str) {
        assert!(ip(&["-n", &self.namespaces[1], "link", "set", "cable", state]), "the cable can be set {state}");
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        if let Some(mut server) = self.server.take() {
            let _ = server.kill();
            let _ = server.wait();
        }
        for namespace in &self.namespaces {
            ip(&["netns", "del", namespace]);
        }
    }
}

#[test]
fn a_short_network_outage_keeps_the_connection() {
    let directory = directory_with_image("nbd-blink");
    let Some(network) = Network::start("blink", &directory) else { return };
    let mut daemon = network.daemon(directory, "");
    let mut session = Network::session(&daemon);
    let bytes = pattern(1, 64, 64 << 10);
    session.write(64, &bytes);
    network.set_cable("down");
    thread::scope(|scope| {
        let flush = scope.spawn(|| session.run(0, VIRTIO_BLK_T_FLUSH, 0, Payload::Empty).status);
        thread::sleep(Duration::from_secs(2));
        assert!(!flush.is_finished(), "a FLUSH waits for the network");
        network.set_cable("up");
        assert_eq!(flush.join().unwrap(), OK);
    });
    assert_eq!(daemon.image_bytes(64 * 512, bytes.len()), bytes);
    assert!(!daemon.log().contains("connection lost"), "{}", daemon.log());
    drop(session);
    daemon.stop();
}

#[test]
fn a_long_network_outage_costs_the_connection_but_no_data() {
    let directory = directory_with_image("nbd-cut");
    let Some(network) = Network::start("cut", &directory) else { return };
    // Write-back is in flight when the network is cut.
    let mut daemon = network.daemon(directory, "cache.dirty_age_max_ms = 100\nnbd_quarantine_ms = 200");
    let mut session = Network::session(&daemon);
    session.write(0, &pattern(1, 0, 64 << 10));
    network.set_cable("down");
    session.write(256, &pattern(2, 256, 64 << 10));
    poll_until("the kernel to give the connection up", LOSS_LIMIT, || {
        daemon.log().contains("connection lost").then_some(())
    });
    // The same pages again: the server may still have the writes of the connection that was lost.
    session.write(256, &pattern(3, 256, 64 << 10));
    assert_eq!(session.read(0, 64 << 10), pattern(1, 0, 64 << 10), "what is in the cache needs no network");
    network.set_cable("up");
    daemon.await_log("reconnected after");
    session.flush();
    assert_eq!(daemon.image_bytes(256 * 512, 64 << 10), pattern(3, 256, 64 << 10));
    assert_eq!(daemon.image_bytes(0, 64 << 10), pattern(1, 0, 64 << 10));
    drop(session);
    daemon.stop();
}

#[test]
fn a_lost_idle_connection_is_replaced() {
    let directory = directory_with_image("nbd-idle");
    let Some(network) = Network::start("idle", &directory) else { return };
    let mut daemon = network.daemon(directory, "nbd_quarantine_ms = 200");
    let mut session = Network::session(&daemon);
    session.write(0, &pattern(1, 0, 4096));
    session.flush();
    network.set_cable("down");
    poll_until("the kernel to give the connection up", LOSS_LIMIT, || {
        daemon.log().contains("connection lost").then_some(())
    });
    network.set_cable("up");
    daemon.await_log("reconnected after");
    session.write(8, &pattern(2, 8, 4096));
    session.flush();
    assert_eq!(daemon.image_bytes(8 * 512, 4096), pattern(2, 8, 4096));
    drop(session);
    daemon.stop();
}
