//! Processes of the daemon that die while its server lives on, and daemons beside each other.

use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use super::common::daemon::{Daemon, has_ended, run_to_end, send, server_binary};
use super::common::nbd_server::NbdServer;
use super::common::request::{OK, Payload, pattern};
use super::common::session::{Session, SessionOptions};
use super::common::wait::{TIMEOUT, is_listening, poll_until};
use super::{IMAGE_BYTES, device, died_with_dirty_pages, directory_with_image, image_of, refusal, socket_of};
use virtio_bindings::virtio_blk::VIRTIO_BLK_T_FLUSH;

/// A daemon that keeps its dirty pages, over a server on a file.
fn start(name: &str, keys: &str) -> Option<(Daemon, NbdServer)> {
    let directory = directory_with_image(name);
    let image = image_of(&directory);
    let server = NbdServer::nbdkit(&socket_of(&directory), &["file", image.to_str().unwrap()])?;
    let keys = format!("cache.dirty_age_max_ms = 600000\n{keys}");
    Some((Daemon::start_configured(directory, &[&device(&server, &keys)]), server))
}

/// Kills the disk process, and waits until it has ended.
fn kill_disk(daemon: &Daemon) {
    let process = daemon.disk_process("disk0");
    send(process, libc::SIGKILL);
    poll_until("a disk process to end", TIMEOUT, || (!daemon.disk_processes().contains(&process)).then_some(()));
}

fn reconnect(session: Session, daemon: &Daemon) -> Session {
    let mut session = session.reconnect(&daemon.socket());
    session.start_ring(0);
    session
}

#[test]
fn a_killed_disk_process_reconnects_without_data_loss() {
    let Some((mut daemon, _server)) = start("nbd-die", "nbd_quarantine_ms = 300\nworkers = 2") else { return };
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    for round in 0..3 {
        let (at, bytes) = (64 + round * 8, pattern(round + 1, 64 + round * 8, 4096));
        session.write(at, &bytes);
        kill_disk(&daemon);
        session = reconnect(session, &daemon);
        assert_eq!(session.read(at, 4096), bytes, "round {round}: a completed write is there");
        session.flush();
        assert_eq!(daemon.image_bytes(at * 512, 4096), bytes, "round {round}: a FLUSH has written it");
    }
    drop(session);
    daemon.stop();
}

#[test]
fn a_disk_process_waits_for_an_absent_server_at_start() {
    let Some((mut daemon, mut server)) = start("nbd-away", "nbd_quarantine_ms = 300") else { return };
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    let bytes = pattern(1, 64, 4096);
    session.write(64, &bytes);
    server.kill();
    kill_disk(&daemon);
    session = reconnect(session, &daemon);
    assert_eq!(session.read(64, 4096), bytes, "what is in the cache needs no server");
    thread::scope(|scope| {
        let flush = scope.spawn(|| session.run(0, VIRTIO_BLK_T_FLUSH, 0, Payload::Empty).status);
        thread::sleep(Duration::from_secs(2));
        assert!(!flush.is_finished(), "a FLUSH waits for the server");
        // The thread that starts nbdkit must outlive it.
        server.restart();
        assert_eq!(flush.join().unwrap(), OK);
    });
    assert_eq!(daemon.image_bytes(64 * 512, 4096), bytes);
    drop(session);
    daemon.stop();
}

#[test]
fn writes_of_a_dead_disk_process_are_quarantined() {
    let Some((mut daemon, _server)) = start("nbd-quarantine", "nbd_quarantine_ms = 1500") else { return };
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    session.write(64, &pattern(1, 64, 4096));
    kill_disk(&daemon);
    let started = Instant::now();
    session = reconnect(session, &daemon);
    session.flush();
    assert!(started.elapsed() >= Duration::from_millis(1000), "{:?}", started.elapsed());
    drop(session);
    daemon.stop();
}

#[test]
fn the_quarantine_of_a_stopped_server_begins_when_it_continues() {
    let Some((mut daemon, server)) = start("nbd-stopped-quarantine", "nbd_quarantine_ms = 1500") else { return };
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    session.write(64, &pattern(1, 64, 4096));
    server.signal(libc::SIGSTOP);
    kill_disk(&daemon);
    session = reconnect(session, &daemon);
    thread::scope(|scope| {
        let flush = scope.spawn(|| session.run(0, VIRTIO_BLK_T_FLUSH, 0, Payload::Empty).status);
        thread::sleep(Duration::from_millis(2500));
        server.signal(libc::SIGCONT);
        let continued = Instant::now();
        assert_eq!(flush.join().unwrap(), OK);
        assert!(continued.elapsed() >= Duration::from_millis(1000), "{:?}", continued.elapsed());
    });
    drop(session);
    daemon.stop();
}

#[test]
fn a_second_daemon_on_one_host_does_not_write_to_the_same_export() {
    let Some((mut daemon, server)) = start("nbd-two", "") else { return };
    let other = directory_with_image("nbd-two-other");
    for keys in ["", "read_only = true"] {
        let log = refusal(&other, &server.uri(), keys);
        let holder = format!("process {} on this host writes to it", daemon.id());
        assert!(log.contains("cannot lock image nbd+unix:") && log.contains(&holder), "{keys}: {log}");
    }
    for command in [["take-over", &server.uri()], ["--check", "--blk-file"]] {
        let mut command_line = Command::new(server_binary());
        command_line.args(command);
        if command[0] == "--check" {
            command_line.arg(server.uri()).arg("--socket-path").arg(other.path().join("vhost"));
        }
        let ended = run_to_end(&mut command_line);
        let said = format!("{}{}", ended.stdout, ended.stderr);
        assert!(said.contains("process"), "{command:?}: {said}");
    }
    daemon.kill();
    daemon.restart();
    daemon.stop();
}

#[test]
fn killing_the_supervisor_of_an_export_loses_no_data() {
    let Some((mut daemon, _server)) = start("nbd-orphan", "nbd_quarantine_ms = 300") else { return };
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    session.write(0, &pattern(7, 0, 4096));
    session.flush();
    let bytes = pattern(1, 64, 4096);
    session.write(64, &bytes);
    let disk = daemon.disk_process("disk0");
    daemon.kill_supervisor();
    // At once: the next daemon waits for the export's lock.
    daemon.restart();
    poll_until("the old disk process to end", TIMEOUT, || has_ended(disk).then_some(()));
    poll_until("the socket", TIMEOUT, || is_listening(&daemon.socket()).then_some(()));
    session = reconnect(session, &daemon);
    assert_eq!(session.read(64, 4096), bytes);
    session.flush();
    assert_eq!(daemon.image_bytes(64 * 512, 4096), bytes);
    drop(session);
    daemon.stop();
}

#[test]
fn take_over_sets_the_cache_of_an_export_aside() {
    let Some((mut daemon, server, _)) = died_with_dirty_pages("nbd-take-over") else { return };
    let mut take_over = Command::new(server_binary());
    take_over.args(["take-over", &server.uri(), "--memory-dir"]).arg(daemon.directory().memory());
    let ended = run_to_end(&mut take_over);
    assert!(ended.status.success() && ended.stdout.contains("set aside: "), "{}{}", ended.stdout, ended.stderr);
    daemon.restart();
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    assert_eq!(session.read(64, 4096), daemon.image_bytes(64 * 512, 4096), "the export is served as it is");
    drop(session);
    daemon.stop();
    assert_eq!(daemon.directory().left().len(), 1, "the cache is kept aside");
}

#[test]
fn a_single_process_daemon_serves_an_export() {
    let directory = directory_with_image("nbd-one");
    let image = image_of(&directory);
    let Some(mut server) = NbdServer::nbdkit(&socket_of(&directory), &["file", image.to_str().unwrap()]) else {
        return;
    };
    let socket = directory.path().join("socket");
    let mut command = Command::new(server_binary());
    command.args(["--blk-file", &server.uri(), "--cache-size", "8M", "--socket-path"]).arg(&socket);
    command.arg("--memory-dir").arg(directory.memory());
    let mut daemon = Daemon::launch(directory, command, vec![socket]);
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    let bytes = pattern(1, 64, 4096);
    session.write(64, &bytes);
    server.kill();
    server.restart();
    session.flush();
    assert_eq!(daemon.image_bytes(64 * 512, 4096), bytes);
    assert_eq!(session.capacity_sectors(), IMAGE_BYTES as u64 / 512);
    drop(session);
    daemon.stop();
}
