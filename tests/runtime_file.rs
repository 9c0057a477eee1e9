//! The operator's changes, kept for the next daemon: it must find every disk with unwritten data, and must not find
//! disks that a clean stop has ended.

#[path = "common/mod.rs"]
mod common;

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use serde_json::json;

use common::daemon::{Daemon, has_ended, send};
use common::nbd_server::NbdServer;
use common::operator::{call, genblk, names, start, stdout_of, table};
use common::session::{Session, SessionOptions};
use common::wait::{TIMEOUT, poll_until};

/// A daemon that serves `d0`, and `d1`, which was attached: on a server whose writes fail while the file `fails`
/// exists.
struct Attached {
    daemon: Daemon,
    control: PathBuf,
    socket: PathBuf,
    fails: PathBuf,
    server: NbdServer,
}

/// `None`: nbdkit is not installed.
fn attached(name: &str) -> Option<Attached> {
    let (daemon, control) = start(name);
    let paths = daemon.directory().path().to_path_buf();
    let fails = paths.join("fails");
    let file = format!("error-file={}", fails.display());
    let arguments = ["--filter=error", "memory", "8M", "error-pwrite=EIO", "error-pwrite-rate=1", &file];
    let server = NbdServer::nbdkit(&paths.join("nbd"), &arguments)?;
    attach(&daemon, &control, "d1", &server.uri());
    let socket = paths.join("d1.sock");
    let mut session = Session::open(&socket, &SessionOptions::default());
    session.write(0, &[7; 4096]);
    Some(Attached { daemon, control, socket, fails, server })
}

/// Attaches a disk with this image.
#[track_caller]
fn attach(daemon: &Daemon, control: &Path, name: &str, image: &str) {
    let directory = daemon.directory();
    let file = directory.path().join(format!("{name}.toml"));
    let given = format!("image = {:?}", directory.path().join("IMAGE"));
    let table = table(directory, name, "IMAGE", "").replace(&given, &format!("image = {image:?}"));
    fs::write(&file, table).expect("a file can be written");
    stdout_of(&genblk(control, &["attach", &file.display().to_string()]));
}

/// Starts the next daemon; it must serve both disks, and `d1` with the written data.
#[track_caller]
fn check_next(attached: &mut Attached) {
    let sockets = [attached.daemon.socket_of(0), attached.socket.clone()];
    attached.daemon.restart_for(&sockets);
    poll_until("the control socket", TIMEOUT, || UnixStream::connect(&attached.control).ok());
    assert_eq!(names(&attached.control), ["d0", "d1"]);
    let mut session = Session::open(&attached.socket, &SessionOptions::default());
    assert_eq!(session.read(0, 4096), vec![7; 4096]);
    drop(session);
    attached.daemon.stop();
    assert!(!attached.control.with_file_name("runtime.toml").exists(), "an orderly stop ends it");
}

#[test]
fn an_image_failure_during_an_orderly_stop_loses_no_data() {
    let Some(mut attached) = attached("runtime-fails") else { return };
    File::create(&attached.fails).expect("a file can be created");
    attached.daemon.terminate();
    assert!(!attached.daemon.wait().success(), "its image lacks completed writes");
    attached.daemon.await_log("runtime.toml is kept for the next daemon");
    fs::remove_file(&attached.fails).expect("it exists");
    check_next(&mut attached);
}

#[test]
fn a_kill_during_an_orderly_stop_loses_no_data() {
    let Some(mut attached) = attached("runtime-killed") else { return };
    attached.server.signal(libc::SIGSTOP);
    attached.daemon.terminate();
    attached.daemon.await_log("d0: stopped");
    attached.daemon.kill();
    attached.server.signal(libc::SIGCONT);
    check_next(&mut attached);
}

#[test]
fn a_replacing_daemon_inherits_disks_runtime_changes_and_control_socket() {
    let (mut daemon, control) = start("runtime-next");
    let image = |name: &str| daemon.directory().path().join(name).display().to_string();
    let (first_image, second_image) = (image("d1.img"), image("d2.img"));
    for path in [&first_image, &second_image] {
        File::create(path).and_then(|file| file.set_len(1 << 20)).expect("an image can be created");
    }
    attach(&daemon, &control, "d1", &first_image);
    let mut session = Session::open(&daemon.directory().path().join("d1.sock"), &SessionOptions::default());
    session.write(0, &[7; 4096]);
    let before = daemon.id();
    // Its sockets are those of the first one still.
    daemon.restart();
    daemon.await_log("the operator's commands do not work until it opens; retrying");
    attach(&daemon, &control, "d2", &second_image);
    send(before, libc::SIGUSR1);
    poll_until("the end of the first daemon", TIMEOUT, || has_ended(before).then_some(()));
    poll_until("the disks of both", TIMEOUT, || {
        UnixStream::connect(&control).ok()?;
        let listed = call(&control, "List", &json!({}));
        let devices = listed["parameters"]["devices"].as_array()?;
        (devices.len() == 3 && devices.iter().all(|device| device["state"] == json!("serving"))).then_some(())
    });
    assert_eq!(call(&control, "Describe", &json!({}))["parameters"]["pid"], json!(daemon.id()));
    let mut session = session.reconnect(&daemon.directory().path().join("d1.sock"));
    session.start_ring(0);
    assert_eq!(session.read(0, 4096), vec![7; 4096]);
    drop(session);
    // A guest of the previous daemon might still connect.
    stdout_of(&genblk(&control, &["detach", "d0", "--force"]));
    daemon.kill();
    daemon.restart_for(&["d1", "d2"].map(|name| daemon.directory().path().join(format!("{name}.sock"))));
    poll_until("the control socket", TIMEOUT, || UnixStream::connect(&control).ok());
    assert_eq!(names(&control), ["d1", "d2"], "it has recorded its own changes");
}
