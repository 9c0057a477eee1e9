//! Images at NBD servers (nbdkit, qemu-nbd) that are killed, stopped, full or changed under a daemon and its verifying
//! client. A test whose server is not installed says so in one line.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

#[path = "../common/mod.rs"]
mod common;
mod deaths;
#[allow(dead_code, clippy::cast_possible_truncation, reason = "each test binary uses its part; sizes are small")]
#[path = "../survival/guest.rs"]
mod guest;
mod network;
mod random_deaths;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::daemon::{Daemon, TempDir, run_to_end, server_binary};
use common::nbd_server::NbdServer;
use common::request::{OK, Payload, pattern};
use common::session::{Session, SessionOptions};
use common::shadow::Shadow;
use common::wait::{TIMEOUT, poll_until};
use common::workload::{Client, ClientOptions, FaultRules, IoPlan, random_io, read_everything, settle};
use virtio_bindings::virtio_blk::VIRTIO_BLK_T_FLUSH;

const IMAGE_BYTES: usize = 32 << 20;

fn socket_of(directory: &TempDir) -> PathBuf {
    directory.path().join("nbd")
}

fn image_of(directory: &TempDir) -> PathBuf {
    directory.path().join("image")
}

/// A directory with an image of zeros.
fn directory_with_image(name: &str) -> TempDir {
    let directory = TempDir::new(name);
    File::create(image_of(&directory)).unwrap().set_len(IMAGE_BYTES as u64).unwrap();
    directory
}

fn device(server: &NbdServer, keys: &str) -> String {
    format!("image = {:?}\n{keys}\ncache.size = \"8M\"", server.uri())
}

/// Runs random I/O, which must succeed, while `disturb` does something to the server.
fn verify_while(daemon: &Daemon, shadow: &mut Shadow, requests: u64, disturb: impl FnOnce()) {
    let is_disturbed = AtomicBool::new(false);
    thread::scope(|scope| {
        let client = scope.spawn(|| {
            let mut client = Client::connect(&daemon.socket(), &ClientOptions::default());
            let mut seed = 0;
            while seed == 0 || !is_disturbed.load(Ordering::Relaxed) {
                seed += 1;
                let plan = IoPlan { requests, seed, checkpoints: 4, read_only: false };
                let mut nothing = |_: &Shadow| {};
                let mut rules = FaultRules { may_fail: &|| false, after_flush: &mut nothing };
                let report = random_io(&mut client, shadow, &plan, &mut rules);
                assert_eq!((report.completed, report.failed), (requests, 0), "{report:?}");
            }
            read_everything(&mut client, shadow);
        });
        disturb();
        is_disturbed.store(true, Ordering::Relaxed);
        client.join().expect("every request succeeds, and reads what was written");
    });
}

fn check_image(shadow: &Shadow, path: &Path) {
    if let Err(mismatch) = shadow.check_image(path) {
        panic!("the image in the end: {mismatch:x?}");
    }
}

#[test]
fn a_server_crash_that_drops_its_write_cache_loses_no_data() {
    let directory = directory_with_image("nbd-killed");
    let image = image_of(&directory);
    let Some(mut server) = NbdServer::forgetful(&socket_of(&directory), &image) else { return };
    let mut daemon = Daemon::start_configured(directory, &[&device(&server, "")]);
    let mut shadow = Shadow::zeros(IMAGE_BYTES);
    verify_while(&daemon, &mut shadow, 400, || {
        for _ in 0..3 {
            thread::sleep(Duration::from_millis(500));
            server.kill();
            thread::sleep(Duration::from_millis(200));
            server.restart();
        }
        thread::sleep(Duration::from_millis(500));
    });
    assert!(daemon.log().matches("reconnected after").count() >= 3, "{}", daemon.log());
    daemon.stop();
    // What is in its write cache was flushed.
    server.kill();
    check_image(&shadow, &image);
}

#[test]
fn killing_qemu_nbd_delays_requests_without_data_loss() {
    let directory = directory_with_image("nbd-qemu");
    let image = image_of(&directory);
    let shown = image.to_str().unwrap();
    let arguments = ["qemu-nbd", "-k", "SOCKET", "-t", "-f", "raw", "-e", "4", "--discard=unmap", shown];
    let Some(mut server) = NbdServer::start(&socket_of(&directory), &arguments) else { return };
    let mut daemon = Daemon::start_configured(directory, &[&device(&server, "workers = 2")]);
    let mut shadow = Shadow::zeros(IMAGE_BYTES);
    verify_while(&daemon, &mut shadow, 400, || {
        thread::sleep(Duration::from_millis(500));
        server.kill();
        server.restart();
        thread::sleep(Duration::from_millis(300));
    });
    daemon.stop();
    server.kill();
    check_image(&shadow, &image);
}

#[test]
fn requests_wait_for_a_stopped_server_on_the_same_connection() {
    let directory = directory_with_image("nbd-stopped");
    let Some(server) = NbdServer::forgetful(&socket_of(&directory), &image_of(&directory)) else { return };
    let mut daemon = Daemon::start_configured(directory, &[&device(&server, "")]);
    let mut shadow = Shadow::zeros(IMAGE_BYTES);
    verify_while(&daemon, &mut shadow, 400, || {
        thread::sleep(Duration::from_millis(300));
        server.signal(libc::SIGSTOP);
        thread::sleep(Duration::from_secs(3));
        server.signal(libc::SIGCONT);
    });
    assert!(!daemon.log().contains("connection lost"), "{}", daemon.log());
    daemon.stop();
}

#[test]
fn requests_to_an_absent_server_fail_after_the_give_up_time() {
    let directory = directory_with_image("nbd-gone");
    let image = image_of(&directory);
    let Some(mut server) = NbdServer::nbdkit(&socket_of(&directory), &["file", image.to_str().unwrap()]) else {
        return;
    };
    let mut daemon =
        Daemon::start_configured(directory, &[&device(&server, "nbd_give_up_ms = 500\nnbd_quarantine_ms = 300")]);
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    // A clean page, by which the next daemon knows the export again.
    session.write(64, &pattern(9, 64, 4096));
    session.flush();
    let bytes = pattern(1, 0, 4096);
    session.write(0, &bytes);
    server.kill();
    let started = Instant::now();
    let outcome = session.run(0, VIRTIO_BLK_T_FLUSH, 0, Payload::Empty);
    assert_ne!(outcome.status, OK);
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
    daemon.await_log("all I/O fails");
    drop(session);
    // The write is in the cache that a crash leaves. The next daemon writes it.
    daemon.kill();
    server.restart();
    daemon.restart();
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    assert_eq!(session.read(0, 4096), bytes);
    session.flush();
    assert_eq!(daemon.image_bytes(0, 4096), bytes);
    drop(session);
    daemon.stop();
}

/// A server whose writes fail while a file exists.
fn check_failing_writes(name: &str, error: &str, words: &str) {
    let directory = TempDir::new(name);
    let trigger = directory.path().join("fails");
    let (size, error) = (IMAGE_BYTES.to_string(), format!("error-pwrite={error}"));
    let file = format!("error-file={}", trigger.display());
    let arguments = ["--filter=error", "memory", &size, &error, "error-pwrite-rate=1", &file];
    let Some(server) = NbdServer::nbdkit(&socket_of(&directory), &arguments) else { return };
    let mut daemon = Daemon::start_configured(directory, &[&device(&server, "")]);
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    let bytes = pattern(2, 8, 4096);
    session.write(8, &bytes);
    File::create(&trigger).unwrap();
    let outcome = session.run(0, VIRTIO_BLK_T_FLUSH, 0, Payload::Empty);
    assert_ne!(outcome.status, OK, "a FLUSH that could not write must fail");
    daemon.await_log(words);
    std::fs::remove_file(&trigger).unwrap();
    poll_until("a FLUSH to succeed again", TIMEOUT, || {
        (session.run(0, VIRTIO_BLK_T_FLUSH, 0, Payload::Empty).status == OK).then_some(())
    });
    assert_eq!(session.read(8, 4096), bytes);
    assert!(!daemon.log().contains("connection lost"), "{}", daemon.log());
    drop(session);
    daemon.stop();
}

#[test]
fn an_io_error_of_a_server_fails_the_flush_until_it_is_gone() {
    check_failing_writes("nbd-eio", "EIO", "I/O error");
}

#[test]
fn a_server_without_space_fails_the_flush_until_it_has_space() {
    check_failing_writes("nbd-enospc", "ENOSPC", "no space");
}

#[test]
fn random_io_over_a_slow_server_with_small_blocks_reads_back() {
    let directory = directory_with_image("nbd-slow");
    let image = image_of(&directory);
    let (delay, policy) = (["--filter=delay", "--filter=blocksize-policy"], "blocksize-maximum=64K");
    let shown = image.to_str().unwrap();
    let arguments = [delay[0], delay[1], "file", shown, "delay-read=1ms", "delay-write=2ms", policy];
    let arguments = [&arguments[..], &["blocksize-minimum=512", "blocksize-preferred=4K"]].concat();
    let Some(mut server) = NbdServer::nbdkit(&socket_of(&directory), &arguments) else { return };
    let mut daemon = Daemon::start_configured(directory, &[&device(&server, "workers = 2")]);
    let mut shadow = Shadow::zeros(IMAGE_BYTES);
    verify_while(&daemon, &mut shadow, 1000, || {});
    daemon.stop();
    server.kill();
    check_image(&shadow, &image);
}

/// The log of a daemon that does not start.
fn refusal(directory: &TempDir, image: &str, keys: &str) -> String {
    let (socket, config) = (directory.path().join("vhost"), directory.path().join("refused.toml"));
    let memory = directory.memory();
    let text = format!(
        "[[device]]\nname = \"d\"\nsocket = {socket:?}\nimage = {image:?}\n{keys}\ncache.size = \"8M\"\n\
         cache.memory_dir = {memory:?}\n"
    );
    std::fs::write(&config, text).unwrap();
    let ended = run_to_end(Command::new(server_binary()).arg("--config").arg(&config));
    assert!(!ended.status.success());
    ended.stderr
}

#[test]
fn an_export_without_flush_is_writable_only_with_nbd_flush_none() {
    let directory = TempDir::new("nbd-noflush");
    let size = format!("get_size=echo {IMAGE_BYTES}");
    let zeros = "pread=dd if=/dev/zero bs=$3 count=1 2>/dev/null";
    let arguments = ["eval", &size, zeros, "pwrite=cat >/dev/null", "can_write=exit 0"];
    let Some(server) = NbdServer::nbdkit(&socket_of(&directory), &arguments) else { return };
    let log = refusal(&directory, &server.uri(), "");
    assert!(log.contains("no FLUSH") && log.contains("nbd_flush = \"none\""), "{log}");
    let mut daemon = Daemon::start_configured(directory, &[&device(&server, "nbd_flush = \"none\"")]);
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    session.write(0, &pattern(3, 0, 4096));
    session.flush();
    drop(session);
    daemon.stop();
}

#[test]
fn a_read_only_export_is_served_only_read_only() {
    let directory = directory_with_image("nbd-readonly");
    let image = image_of(&directory);
    let arguments = ["-r", "file", image.to_str().unwrap()];
    let Some(server) = NbdServer::nbdkit(&socket_of(&directory), &arguments) else { return };
    let log = refusal(&directory, &server.uri(), "");
    assert!(log.contains("read_only = true"), "{log}");
    let mut daemon = Daemon::start_configured(directory, &[&device(&server, "read_only = true")]);
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    assert!(session.read(0, 4096).iter().all(|&byte| byte == 0));
    drop(session);
    daemon.stop();
}

#[test]
fn several_workers_require_a_server_with_can_multi_conn() {
    let directory = directory_with_image("nbd-multi");
    let image = image_of(&directory);
    let arguments = ["--filter=multi-conn", "file", image.to_str().unwrap(), "multi-conn-mode=disable"];
    let Some(server) = NbdServer::nbdkit(&socket_of(&directory), &arguments) else { return };
    let log = refusal(&directory, &server.uri(), "workers = 2");
    assert!(log.contains("multi-conn") && log.contains("workers = 1"), "{log}");
}

#[test]
fn a_missing_server_and_a_missing_export_are_named() {
    let directory = directory_with_image("nbd-missing");
    let nowhere = format!("nbd+unix:///?socket={}", directory.path().join("nowhere").display());
    let log = refusal(&directory, &nowhere, "");
    assert!(log.contains("nowhere") && log.contains("No such file"), "{log}");
    let image = image_of(&directory);
    let shown = image.to_str().unwrap();
    let arguments = ["qemu-nbd", "-k", "SOCKET", "-t", "-f", "raw", "-x", "disk", shown];
    let Some(server) = NbdServer::start(&socket_of(&directory), &arguments) else { return };
    let log = refusal(&directory, &server.uri().replace("/?", "/other?"), "");
    assert!(log.contains("no export \"other\""), "{log}");
}

#[test]
fn an_export_that_returns_smaller_is_refused() {
    let directory = directory_with_image("nbd-smaller");
    let image = image_of(&directory);
    let shown = image.to_str().unwrap().to_owned();
    let Some(mut server) = NbdServer::nbdkit(&socket_of(&directory), &["file", &shown]) else { return };
    let mut daemon = Daemon::start_configured(directory, &[&device(&server, "")]);
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    session.write(0, &pattern(4, 0, 4096));
    session.flush();
    server.kill();
    File::options().write(true).open(&shown).unwrap().set_len(IMAGE_BYTES as u64 / 2).unwrap();
    server.restart();
    daemon.await_log("has shrunk from 33554432 to 16777216 bytes");
    session.write(16, &pattern(5, 16, 4096));
    let outcome = session.run(0, VIRTIO_BLK_T_FLUSH, 0, Payload::Empty);
    assert_ne!(outcome.status, OK);
    drop(session);
    daemon.kill();
}

#[test]
fn requests_wait_for_an_export_missing_after_a_server_restart() {
    let directory = directory_with_image("nbd-renamed");
    let image = image_of(&directory);
    let arguments = |export| ["-k", "SOCKET", "-t", "-f", "raw", "-e", "4", "-x", export, image.to_str().unwrap()];
    let first = [&["qemu-nbd"][..], &arguments("disk")].concat();
    let Some(mut server) = NbdServer::start(&socket_of(&directory), &first) else { return };
    let device = device(&server, "").replace("///?", "///disk?");
    let mut daemon = Daemon::start_configured(directory, &[&device]);
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    let bytes = pattern(4, 0, 4096);
    session.write(0, &bytes);
    server.kill();
    server.restart_with(&arguments("other"));
    daemon.await_log("the server has no export \"disk\"");
    assert_eq!(daemon.image_bytes(0, 4096), vec![0; 4096], "nothing is written to another export");
    server.kill();
    server.restart_with(&arguments("disk"));
    session.flush();
    assert_eq!(daemon.image_bytes(0, 4096), bytes);
    drop(session);
    daemon.stop();
}

#[test]
fn an_export_that_returns_larger_is_still_served() {
    let directory = directory_with_image("nbd-larger");
    let image = image_of(&directory);
    let shown = image.to_str().unwrap().to_owned();
    let Some(mut server) = NbdServer::nbdkit(&socket_of(&directory), &["file", &shown]) else { return };
    let mut daemon = Daemon::start_configured(directory, &[&device(&server, "")]);
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    server.kill();
    File::options().write(true).open(&shown).unwrap().set_len(IMAGE_BYTES as u64 * 2).unwrap();
    server.restart();
    daemon.await_log("has grown");
    let bytes = pattern(6, 0, 4096);
    session.write(0, &bytes);
    session.flush();
    assert_eq!(daemon.image_bytes(0, 4096), bytes);
    drop(session);
    daemon.stop();
}

/// A daemon that dies with completed writes in its cache, and the directory of its server.
fn died_with_dirty_pages(name: &str) -> Option<(Daemon, NbdServer, Vec<u8>)> {
    let directory = directory_with_image(name);
    let image = image_of(&directory);
    let server = NbdServer::nbdkit(&socket_of(&directory), &["file", image.to_str().unwrap()])?;
    let keys = "cache.dirty_age_max_ms = 600000\nnbd_quarantine_ms = 300";
    let mut daemon = Daemon::start_configured(directory, &[&device(&server, keys)]);
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    // A clean page, by which the export is known again.
    session.write(0, &pattern(7, 0, 4096));
    session.flush();
    let bytes = pattern(8, 64, 8192);
    session.write(64, &bytes);
    daemon.kill();
    drop(session);
    Some((daemon, server, bytes))
}

#[test]
fn the_cache_of_an_export_survives_a_kill_of_the_daemon() {
    let Some((mut daemon, _server, bytes)) = died_with_dirty_pages("nbd-adopted") else { return };
    daemon.restart();
    daemon.await_log("restored");
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    assert_eq!(session.read(64, 8192), bytes);
    session.flush();
    assert_eq!(daemon.image_bytes(64 * 512, 8192), bytes);
    drop(session);
    daemon.stop();
}

#[test]
fn a_dirty_cache_of_a_changed_export_is_refused() {
    let Some((mut daemon, server, _)) = died_with_dirty_pages("nbd-changed") else { return };
    let image = File::options().write(true).open(daemon.image()).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&image, &[0xaa; 4096], 0).unwrap();
    let log = refusal(daemon.directory(), &server.uri(), "");
    assert!(log.contains("of the image differs from the cache") && log.contains("genblk recover --force"), "{log}");
    // The operator knows better.
    let cache = daemon.directory().left().remove(0);
    let ended = run_to_end(Command::new(server_binary()).args(["recover", "--force"]).arg(&cache));
    assert!(ended.status.success(), "{}", ended.stderr);
    daemon.restart();
    daemon.stop();
}

#[test]
fn recover_writes_the_cache_of_an_export_to_its_server() {
    let Some((daemon, _server, bytes)) = died_with_dirty_pages("nbd-recover") else { return };
    let cache = daemon.directory().left().remove(0);
    let ended = run_to_end(Command::new(server_binary()).arg("recover").arg(&cache));
    assert!(ended.status.success(), "{}", ended.stderr);
    assert!(ended.stdout.contains("nbd+unix:///"), "{}", ended.stdout);
    assert_eq!(daemon.image_bytes(64 * 512, 8192), bytes);
    assert!(daemon.directory().left().is_empty());
}

#[test]
fn check_examines_an_export() {
    let directory = directory_with_image("nbd-check");
    let image = image_of(&directory);
    let Some(server) = NbdServer::nbdkit(&socket_of(&directory), &["file", image.to_str().unwrap()]) else { return };
    let socket = directory.path().join("vhost");
    let mut check = Command::new(server_binary());
    check.args(["--check", "--blk-file", &server.uri(), "--socket-path"]).arg(&socket);
    let ended = run_to_end(&mut check);
    assert!(ended.status.success(), "{}{}", ended.stdout, ended.stderr);
    drop(server);
    let ended = run_to_end(&mut check);
    assert!(!ended.status.success() && ended.stderr.contains("cannot open image nbd+unix"), "{}", ended.stderr);
}

#[test]
fn requests_complete_between_constant_server_restarts() {
    let directory = directory_with_image("nbd-flapping");
    let image = image_of(&directory);
    let Some(mut server) = NbdServer::forgetful(&socket_of(&directory), &image) else { return };
    let mut daemon = Daemon::start_configured(directory, &[&device(&server, "cache.on_error = \"hold\"")]);
    let mut shadow = Shadow::zeros(IMAGE_BYTES);
    verify_while(&daemon, &mut shadow, 200, || {
        for _ in 0..10 {
            thread::sleep(Duration::from_millis(100));
            server.kill();
            server.restart();
        }
    });
    let mut client = Client::connect(&daemon.socket(), &ClientOptions::default());
    settle(&mut client, TIMEOUT);
    drop(client);
    daemon.stop();
}
