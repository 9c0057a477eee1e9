//! Disks whose image fails or hangs while they are detached: other disks see nothing, and no completed write is lost
//! without the operator's word.

#[path = "common/mod.rs"]
mod common;

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use virtio_bindings::virtio_blk::VIRTIO_BLK_T_OUT;

use common::daemon::{Daemon, TempDir, server_binary};
use common::nbd_server::NbdServer;
use common::operator::{Call, call, genblk, names, start, state, stdout_of, table};
use common::request::Payload;
use common::session::{Session, SessionOptions};
use common::wait::{TIMEOUT, poll_until};

/// A disk `d0` on a server whose writes fail while the file `fails` exists.
struct Failing {
    daemon: Daemon,
    control: PathBuf,
    fails: PathBuf,
    server: NbdServer,
}

/// Starts a daemon with these devices and a control socket.
fn launch(directory: TempDir, devices: &str, sockets: Vec<PathBuf>) -> (Daemon, PathBuf) {
    let (control, config) = (directory.path().join("control.sock"), directory.path().join("genblk.toml"));
    fs::write(&config, format!("[control]\nsocket = {control:?}\n{devices}")).expect("a configuration can be written");
    let mut command = Command::new(server_binary());
    command.arg("--config").arg(config);
    let daemon = Daemon::launch(directory, command, sockets);
    poll_until("the control socket", TIMEOUT, || UnixStream::connect(&control).ok());
    (daemon, control)
}

/// The table of a disk on a server.
fn on_server(directory: &TempDir, name: &str, server: &NbdServer, more: &str) -> String {
    let table = table(directory, name, "image", more);
    let image = format!("image = {:?}", directory.path().join("image"));
    table.replace(&image, &format!("image = {:?}", server.uri()))
}

/// `None`: nbdkit is not installed.
fn failing(name: &str, more: &str) -> Option<Failing> {
    let directory = TempDir::new(name);
    let (fails, socket) = (directory.path().join("fails"), directory.path().join("d0.sock"));
    let file = format!("error-file={}", fails.display());
    let arguments = ["--filter=error", "memory", "8M", "error-pwrite=EIO", "error-pwrite-rate=1", &file];
    let server = NbdServer::nbdkit(&directory.path().join("nbd"), &arguments)?;
    let device = on_server(&directory, "d0", &server, more);
    let (daemon, control) = launch(directory, &device, vec![socket]);
    Some(Failing { daemon, control, fails, server })
}

fn stderr_of(control: &Path, arguments: &[&str]) -> String {
    let output = genblk(control, arguments);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    String::from_utf8(output.stderr).expect("text")
}

/// Waits until `d0` has a front-end, or has none.
fn await_front_end(control: &Path, is_there: bool) {
    poll_until("the front-end", TIMEOUT, || {
        let listed = call(control, "List", &json!({"device": "d0"}));
        (listed["parameters"]["devices"][0]["front_end"].is_null() != is_there).then_some(())
    });
}

#[test]
fn a_disk_whose_image_fails_stays_attached_and_served() {
    let Some(Failing { daemon, control, fails, server: _server }) = failing("detach-fails", "") else { return };
    let mut session = Session::open(&daemon.socket_of(0), &SessionOptions::default());
    session.write(0, &[1; 4096]);
    File::create(&fails).expect("a file can be created");
    let text = stderr_of(&control, &["flush", "d0"]);
    assert!(text.contains("d0: the image failed (I/O error); 1 dirty page"), "{text}");
    drop(session);
    let refused = poll_until("the front-end is gone", TIMEOUT, || {
        let refused = call(&control, "Detach", &json!({"device": "d0"}));
        (refused["error"] != json!("io.genblk.Control.InUse")).then_some(refused)
    });
    assert_eq!(refused["error"], json!("io.genblk.Control.NotWritten"), "{refused}");
    assert_eq!(refused["parameters"]["dirty_bytes"], json!(4096), "{refused}");
    let mut session = Session::open(&daemon.socket_of(0), &SessionOptions::default());
    assert_eq!(session.read(0, 4096), vec![1; 4096], "it is served as before");
    fs::remove_file(&fails).expect("it exists");
    stdout_of(&genblk(&control, &["resume", "d0"]));
    poll_until("a flush", TIMEOUT, || genblk(&control, &["flush", "d0"]).status.success().then_some(()));
}

#[test]
fn a_second_change_of_a_disk_is_refused_while_one_is_under_way() {
    let Some(Failing { daemon, control, server, .. }) = failing("detach-busy", "") else { return };
    let mut session = Session::open(&daemon.socket_of(0), &SessionOptions::default());
    call(&control, "Freeze", &json!({"device": "d0", "timeout_ms": 60000}));
    let frozen = call(&control, "Detach", &json!({"device": "d0"}));
    assert_eq!(frozen["error"], json!("io.genblk.Control.Frozen"), "{frozen}");
    call(&control, "Thaw", &json!({"device": "d0"}));
    session.write(0, &[1; 4096]);
    server.signal(libc::SIGSTOP);
    let mut flush = Call::start(&control, "Flush", &json!({"device": "d0"}), false);
    let busy = poll_until("a refusal", TIMEOUT, || {
        let reply = call(&control, "Detach", &json!({"device": "d0"}));
        (reply["error"] == json!("io.genblk.Control.Busy")).then_some(reply)
    });
    assert_eq!(busy["parameters"]["what"], json!("d0: flush"), "{busy}");
    assert_eq!(session.read(0, 4096), vec![1; 4096], "it is served meanwhile");
    server.signal(libc::SIGCONT);
    assert!(flush.reply()["error"].is_null());
}

#[test]
fn a_forced_detach_does_not_wait_for_another_change() {
    let Some(Failing { daemon, control, server, .. }) = failing("detach-forced", "") else { return };
    let mut session = Session::open(&daemon.socket_of(0), &SessionOptions::default());
    session.write(0, &[1; 4096]);
    await_front_end(&control, true);
    server.signal(libc::SIGSTOP);
    let mut flush = Call::start(&control, "Flush", &json!({"device": "d0"}), false);
    poll_until("the flush", TIMEOUT, || {
        let reply = call(&control, "Detach", &json!({"device": "d0"}));
        (reply["error"] == json!("io.genblk.Control.Busy")).then_some(())
    });
    let mut detach = Call::start(&control, "Detach", &json!({"device": "d0", "force": true}), false);
    poll_until("its end", TIMEOUT, || (state(&control) == json!("ending")).then_some(()));
    assert_eq!(flush.reply()["parameters"]["why"], json!("a forced detach has ended the wait"));
    server.signal(libc::SIGCONT);
    let detached = detach.reply();
    assert!(detached["error"].is_null(), "{detached}");
}

/// What the daemon shows of front-ends is up to a quarter of a second old.
#[test]
fn a_front_end_that_has_just_connected_keeps_its_disk() {
    let (mut daemon, control) = start("detach-connected");
    for _ in 0..3 {
        await_front_end(&control, false);
        let mut session = Session::open(&daemon.socket_of(0), &SessionOptions::default());
        let refused = call(&control, "Detach", &json!({"device": "d0"}));
        assert_eq!(refused["error"], json!("io.genblk.Control.InUse"), "{refused}");
        session.write(0, &[1; 4096]);
    }
    // QEMU connects again within a second or two.
    daemon.kill();
    daemon.restart();
    poll_until("the control socket", TIMEOUT, || genblk(&control, &["list"]).status.success().then_some(()));
    poll_until("the disk", TIMEOUT, || (state(&control) == json!("serving")).then_some(()));
    let text = stderr_of(&control, &["detach", "d0"]);
    assert!(text.contains("d0: in use by a front-end that may reconnect after a restart, within "), "{text}");
    let session = Session::open(&daemon.socket_of(0), &SessionOptions::default());
    await_front_end(&control, true);
    drop(session);
    poll_until("its end", TIMEOUT, || genblk(&control, &["detach", "d0"]).status.success().then_some(()));
}

#[test]
fn a_reload_does_not_wait_for_an_image_that_hangs() {
    let directory = TempDir::new("reload-hangs");
    let Some(server) = NbdServer::nbdkit(&directory.path().join("nbd"), &["memory", "8M"]) else { return };
    File::create(directory.path().join("image")).and_then(|file| file.set_len(8 << 20)).expect("an image");
    let sockets = ["d0", "d1"].map(|name| directory.path().join(format!("{name}.sock"))).to_vec();
    let hung = on_server(&directory, "d0", &server, "");
    let other = table(&directory, "d1", "image", "");
    let (daemon, control) = launch(directory, &(hung + &other), sockets);
    let mut session = Session::open(&daemon.socket_of(0), &SessionOptions::default());
    session.write(0, &[1; 4096]);
    await_front_end(&control, true);
    server.signal(libc::SIGSTOP);
    drop(session);
    await_front_end(&control, false);
    let text = format!("[control]\nsocket = {control:?}\n{other}poll_us = 9\n");
    fs::write(daemon.config(), text).expect("a configuration can be written");
    let changes = stdout_of(&genblk(&control, &["reload"]));
    assert!(changes.contains("d0: kept, although it is no longer in the file: its image does not answer"), "{changes}");
    assert!(changes.contains("poll_us"), "{changes}");
    server.signal(libc::SIGCONT);
    let changes = stdout_of(&genblk(&control, &["reload"]));
    assert_eq!(changes, "d0: detached\n");
}

#[test]
fn detaching_a_hanging_disk_does_not_disturb_its_group() {
    let directory = TempDir::new("detach-group");
    let Some(server) = NbdServer::nbdkit(&directory.path().join("nbd"), &["memory", "8M"]) else { return };
    let sockets = ["d0", "d1"].map(|name| directory.path().join(format!("{name}.sock"))).to_vec();
    File::create(directory.path().join("image")).and_then(|file| file.set_len(8 << 20)).expect("an image");
    let group = "group = \"tenant\"\n";
    let devices = on_server(&directory, "d0", &server, group) + &table(&directory, "d1", "image", group);
    let (daemon, control) = launch(directory, &devices, sockets);
    let processes = poll_until("one process for both", TIMEOUT, || {
        Some(daemon.disk_processes()).filter(|processes| processes.len() == 1)
    });
    let mut hung = Session::open(&daemon.socket_of(0), &SessionOptions::default());
    let mut other = Session::open(&daemon.socket_of(1), &SessionOptions::default());
    hung.write(0, &[1; 4096]);
    other.write(0, &[2; 4096]);
    server.signal(libc::SIGSTOP);
    let mut detach = Call::start(&control, "Detach", &json!({"device": "d0", "force": true}), false);
    // Longer than a disk that ends alone waits for its image, before its process is killed.
    let until = Instant::now() + Duration::from_secs(34);
    while Instant::now() < until {
        assert_eq!(other.read(0, 4096), vec![2; 4096]);
        thread::sleep(Duration::from_millis(100));
    }
    assert_eq!((daemon.disk_processes(), names(&control).len()), (processes, 2));
    server.signal(libc::SIGCONT);
    assert!(detach.reply()["error"].is_null(), "it goes on when the image answers");
    assert_eq!(names(&control), ["d1"]);
    assert_eq!(other.read(0, 4096), vec![2; 4096]);
    let disk = on_server(daemon.directory(), "d0", &server, "");
    let file = daemon.directory().path().join("again.toml");
    fs::write(&file, disk).expect("a file can be written");
    stdout_of(&genblk(&control, &["attach", &file.display().to_string()]));
    let mut again = Session::open(&daemon.socket_of(0), &SessionOptions::default());
    assert_eq!(again.read(0, 4096), vec![1; 4096], "what it had completed is on the image");
}

/// A disk whose cache ends with its process is detached by force, while its image takes no writes.
fn detach_unkept(name: &str) -> Option<(Failing, Call)> {
    let failing = failing(name, "cache.survive = \"never\"\n")?;
    let mut session = Session::open(&failing.daemon.socket_of(0), &SessionOptions::default());
    session.write(0, &[3; 4096]);
    File::create(&failing.fails).expect("a file can be created");
    let detach = Call::start(&failing.control, "Detach", &json!({"device": "d0", "force": true}), false);
    failing.daemon.await_log("d0: detach is waiting: writes to the image fail (I/O error)");
    assert_eq!(names(&failing.control), ["d0"]);
    Some((failing, detach))
}

#[test]
fn a_forced_detach_waits_until_completed_writes_are_on_the_image() {
    let Some((Failing { daemon, control, fails, server }, mut detach)) = detach_unkept("detach-unkept") else { return };
    fs::remove_file(&fails).expect("it exists");
    assert!(detach.reply()["error"].is_null());
    let file = daemon.directory().path().join("again.toml");
    fs::write(&file, on_server(daemon.directory(), "d0", &server, "")).expect("a file can be written");
    stdout_of(&genblk(&control, &["attach", &file.display().to_string()]));
    let mut again = Session::open(&daemon.socket_of(0), &SessionOptions::default());
    assert_eq!(again.read(0, 4096), vec![3; 4096]);
}

#[test]
fn only_an_explicit_discard_abandons_completed_writes() {
    let Some((failing, mut detach)) = detach_unkept("detach-discard") else { return };
    let control = failing.control.clone();
    let usage = genblk(&control, &["detach", "d0", "--discard"]);
    assert_eq!(usage.status.code(), Some(2), "it takes --force as well: {usage:?}");
    let text = stdout_of(&genblk(&control, &["detach", "d0", "--force", "--discard"]));
    assert_eq!(text, "d0: detached; data that could not be written to the image was discarded\n");
    let refused = detach.reply();
    assert!(refused["parameters"]["why"].as_str().is_some_and(|why| why.contains("dirty data remains")), "{refused}");
    assert!(names(&control).is_empty());
}

#[test]
fn a_forced_discard_that_cannot_be_recorded_is_reported() {
    let Some((failing, mut detach)) = detach_unkept("detach-unrecorded") else { return };
    let runtime = failing.control.with_file_name("runtime.toml");
    // A directory in its place cannot be replaced.
    let _ = fs::remove_file(&runtime);
    fs::create_dir_all(runtime.join("in-the-way")).expect("a directory can be created");
    let discard = genblk(&failing.control, &["detach", "d0", "--force", "--discard"]);
    assert_eq!(discard.status.code(), Some(1), "{discard:?}");
    let error = String::from_utf8_lossy(&discard.stderr).into_owned();
    assert!(error.contains("the next daemon will attach it again"), "{error}");
    assert!(!detach.reply()["error"].is_null());
}

/// Writes to a disk; returns the status of the request.
fn status_of_write(session: &mut Session) -> u8 {
    let pending = session.submit(0, VIRTIO_BLK_T_OUT, 0, Payload::Send(&[5; 4096]));
    session.rings[0].notify();
    let used = session.rings[0].wait_used(TIMEOUT);
    session.outcome(&pending, used).status
}

#[test]
fn resuming_one_disk_of_a_group_leaves_the_others_stopped() {
    let directory = TempDir::new("resume-group");
    let fails = directory.path().join("fails");
    let file = format!("error-file={}", fails.display());
    let arguments = ["--filter=error", "memory", "8M", "error-pwrite=EIO", "error-pwrite-rate=1", &file];
    let server = |name: &str| NbdServer::nbdkit(&directory.path().join(name), &arguments);
    let (Some(first), Some(second)) = (server("nbd0"), server("nbd1")) else { return };
    let sockets = ["d0", "d1"].map(|name| directory.path().join(format!("{name}.sock"))).to_vec();
    let more = "group = \"tenant\"\ncache.on_error = \"stop\"\n";
    let devices = on_server(&directory, "d0", &first, more) + &on_server(&directory, "d1", &second, more);
    let (daemon, control) = launch(directory, &devices, sockets);
    let mut sessions = [0, 1].map(|disk| Session::open(&daemon.socket_of(disk), &SessionOptions::default()));
    sessions.iter_mut().for_each(|session| session.write(0, &[1; 4096]));
    File::create(&fails).expect("a file can be created");
    for name in ["d0", "d1"] {
        stderr_of(&control, &["flush", name]);
    }
    assert!(sessions.iter_mut().all(|session| status_of_write(session) != 0), "both are stopped");
    fs::remove_file(&fails).expect("it exists");
    stdout_of(&genblk(&control, &["resume", "d0"]));
    poll_until("the disk that was resumed", TIMEOUT, || (status_of_write(&mut sessions[0]) == 0).then_some(()));
    assert_ne!(status_of_write(&mut sessions[1]), 0, "the other one waits for its operator");
    stdout_of(&genblk(&control, &["resume", "d1"]));
    poll_until("the other one", TIMEOUT, || (status_of_write(&mut sessions[1]) == 0).then_some(()));
}

#[test]
fn a_detaching_disk_cannot_be_frozen() {
    let Some(Failing { daemon, control, server, .. }) = failing("detach-freeze", "") else { return };
    let mut session = Session::open(&daemon.socket_of(0), &SessionOptions::default());
    session.write(0, &[1; 4096]);
    server.signal(libc::SIGSTOP);
    let mut detach = Call::start(&control, "Detach", &json!({"device": "d0", "force": true}), false);
    poll_until("its end", TIMEOUT, || (state(&control) == json!("ending")).then_some(()));
    let frozen = call(&control, "Freeze", &json!({"device": "d0", "timeout_ms": 60000}));
    server.signal(libc::SIGCONT);
    assert!(!frozen["error"].is_null(), "{frozen}");
    assert!(detach.reply()["error"].is_null());
}

#[test]
fn a_disk_whose_image_hangs_while_it_is_attached_can_be_detached() {
    let directory = TempDir::new("detach-attaching");
    let Some(server) = NbdServer::nbdkit(&directory.path().join("nbd"), &["memory", "8M"]) else { return };
    File::create(directory.path().join("image")).and_then(|file| file.set_len(8 << 20)).expect("an image");
    let sockets = vec![directory.path().join("d0.sock")];
    let (text, d0) = (on_server(&directory, "d1", &server, ""), table(&directory, "d0", "image", ""));
    let (daemon, control) = launch(directory, &d0, sockets);
    let disk: toml::Table = text.parse().expect("TOML");
    server.signal(libc::SIGSTOP);
    let mut attach = Call::start(&control, "Attach", &json!({"config": disk["device"][0]}), false);
    poll_until("the attach", TIMEOUT, || (names(&control) == ["d0", "d1"]).then_some(()));
    stdout_of(&genblk(&control, &["detach", "d1"]));
    let refused = attach.reply();
    assert_eq!(refused["parameters"]["why"], json!("it was detached before it was served"), "{refused}");
    assert_eq!(names(&control), ["d0"]);
    assert_eq!(stdout_of(&genblk(&control, &["reload"])), "nothing has changed\n");
    assert!(!control.with_file_name("runtime.toml").exists(), "nothing was recorded");
    server.signal(libc::SIGCONT);
    assert!(call(&control, "Attach", &json!({"config": disk["device"][0]}))["error"].is_null());
    drop(daemon);
}

#[test]
fn a_group_can_reuse_the_name_of_a_detached_disk() {
    let directory = TempDir::new("detach-names");
    for image in ["image", "other.img"] {
        File::create(directory.path().join(image)).and_then(|file| file.set_len(1 << 20)).expect("an image");
    }
    let group = "group = \"tenant\"\n";
    let reader = |name: &str| table(&directory, name, "image", &format!("{group}read_only = true\n"));
    let sockets = ["d0", "d1"].map(|name| directory.path().join(format!("{name}.sock"))).to_vec();
    let devices = reader("d0") + &reader("d1");
    let (daemon, control) = launch(directory, &devices, sockets);
    // One of them has opened the image.
    for opener in ["d0", "d1"] {
        poll_until("both to be served", TIMEOUT, || {
            let listed = call(&control, "List", &json!({}));
            let devices = listed["parameters"]["devices"].as_array().expect("an array").clone();
            devices.iter().all(|device| device["state"] == json!("serving")).then_some(())
        });
        stdout_of(&genblk(&control, &["detach", opener]));
        let file = daemon.directory().path().join("again.toml");
        for mark in [3, 4] {
            fs::write(&file, table(daemon.directory(), opener, "other.img", group)).expect("a file can be written");
            stdout_of(&genblk(&control, &["attach", &file.display().to_string()]));
            let socket = daemon.directory().path().join(format!("{opener}.sock"));
            let mut session = Session::open(&socket, &SessionOptions::default());
            session.write(0, &[mark; 4096]);
            drop(session);
            stdout_of(&genblk(&control, &["detach", opener, "--force"]));
            let image = fs::read(daemon.directory().path().join("other.img")).expect("the image can be read");
            assert_eq!(image[..4096], [mark; 4096]);
        }
        fs::write(&file, table(daemon.directory(), opener, "image", &format!("{group}read_only = true\n")))
            .expect("a file can be written");
        stdout_of(&genblk(&control, &["attach", &file.display().to_string()]));
    }
}
