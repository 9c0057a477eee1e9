//! Commands of an operator for a disk while guests use it: flush, drop, freeze, thaw, resume, attach and detach.

#[path = "common/mod.rs"]
mod common;

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use virtio_bindings::virtio_blk::VIRTIO_BLK_T_OUT;

use common::daemon::{Daemon, send};
use common::operator::{Call, IMAGE_BYTES, call, genblk, names, start, state, stdout_of, table};
use common::request::Payload;
use common::session::{Session, SessionOptions};
use common::wait::{ABSENCE, TIMEOUT, poll_until};

#[test]
fn the_flush_and_drop_commands_sync_and_empty_the_cache() {
    let (daemon, control) = start("operator-flush");
    let mut session = Session::open(&daemon.socket_of(0), &SessionOptions::default());
    session.write(0, &[7; 8192]);
    assert_eq!(daemon.image_bytes(0, 8192), vec![0; 8192], "nothing has written it back yet");
    assert!(stdout_of(&genblk(&control, &["flush", "d0"])).starts_with("d0: all completed writes are durable"));
    assert_eq!(daemon.image_bytes(0, 8192), vec![7; 8192]);
    session.write(64, &[8; 4096]);
    let dropped: Value = serde_json::from_str(&stdout_of(&genblk(&control, &["drop", "d0", "--json"]))).expect("JSON");
    assert_eq!(dropped["dropped_bytes"], json!(8192), "a dirty page stays");
    let dropped = call(&control, "Drop", &json!({"device": "d0", "flushed": true}));
    assert_eq!(dropped["parameters"]["dropped_bytes"], json!(4096));
    assert_eq!(daemon.image_bytes(64 * 512, 4096), vec![8; 4096]);
    assert_eq!(session.read(0, 8192), vec![7; 8192], "read in again");
    assert!(stdout_of(&genblk(&control, &["resume", "d0"])).contains("resumed"));
}

#[test]
fn a_frozen_image_has_all_completed_writes_and_stays_unchanged() {
    let (daemon, control) = start("operator-freeze");
    let mut session = Session::open(&daemon.socket_of(0), &SessionOptions::default());
    session.write(0, &[1; 65536]);
    let frozen = call(&control, "Freeze", &json!({"device": "d0", "timeout_ms": 60000}));
    assert_eq!(frozen["parameters"]["frozen"], json!(true), "{frozen}");
    assert_eq!(state(&control), json!("frozen"));
    let image = fs::read(daemon.image()).expect("the image can be read");
    assert_eq!(image[..65536], [1; 65536]);
    assert_eq!(call(&control, "Freeze", &json!({"device": "d0"}))["error"], json!("io.genblk.Control.Frozen"));
    let pending = session.submit(0, VIRTIO_BLK_T_OUT, 256, Payload::Send(&[2; 4096]));
    session.rings[0].notify();
    assert!(session.rings[0].try_wait_used(ABSENCE).is_none(), "a write waits");
    assert_eq!(fs::read(daemon.image()).expect("the image can be read"), image);
    let thawed = call(&control, "Thaw", &json!({"device": "d0"}));
    assert_eq!(thawed["parameters"]["held"], json!(true), "{thawed}");
    let used = session.rings[0].wait_used(TIMEOUT);
    assert_eq!(session.outcome(&pending, used).status, 0);
    assert_eq!(state(&control), json!("serving"));
    session.flush();
    assert_eq!(daemon.image_bytes(256 * 512, 4096), vec![2; 4096]);
    let thawed = call(&control, "Thaw", &json!({"device": "d0"}));
    assert_eq!(thawed["parameters"]["held"], json!(false), "there is no freeze any more");
}

#[test]
fn reads_and_flushes_complete_during_a_freeze() {
    let (daemon, control) = start("operator-freeze-reads");
    let mut session = Session::open(&daemon.socket_of(0), &SessionOptions::default());
    session.write(0, &[1; 4096]);
    call(&control, "Freeze", &json!({"device": "d0", "timeout_ms": 60000}));
    assert_eq!(session.read(0, 4096), vec![1; 4096]);
    assert_eq!(session.read(1024, 4096), vec![0; 4096]);
    session.flush();
    call(&control, "Thaw", &json!({"device": "d0"}));
}

#[test]
fn a_freeze_with_a_command_ends_when_the_command_does() {
    let (daemon, control) = start("operator-freeze-command");
    let mut session = Session::open(&daemon.socket_of(0), &SessionOptions::default());
    session.write(0, &[9; 4096]);
    let copy = daemon.directory().path().join("copy");
    let (image, copy_name) = (daemon.image().display().to_string(), copy.display().to_string());
    let output = genblk(&control, &["freeze", "d0", "--", "cp", &image, &copy_name]);
    let text = stdout_of(&output);
    assert!(text.contains("d0: frozen in") && text.contains("nothing was written meanwhile"), "{text}");
    assert_eq!(fs::read(copy).expect("it was copied")[..4096], [9; 4096]);
    assert_eq!(state(&control), json!("serving"));
    assert_eq!(genblk(&control, &["freeze", "d0", "--", "sh", "-c", "exit 7"]).status.code(), Some(7));
    let torn = genblk(&control, &["freeze", "d0", "--timeout", "50ms", "--", "sleep", "1"]);
    assert_eq!(torn.status.code(), Some(1), "{torn:?}");
    assert!(String::from_utf8_lossy(&torn.stderr).contains("d0: the freeze ended early"), "{torn:?}");
}

#[test]
fn a_freeze_ends_at_its_timeout_or_when_its_client_or_process_dies() {
    let (daemon, control) = start("operator-freeze-ends");
    let mut session = Session::open(&daemon.socket_of(0), &SessionOptions::default());
    call(&control, "Freeze", &json!({"device": "d0", "timeout_ms": 100}));
    session.write(0, &[1; 4096]);
    assert_eq!(call(&control, "Thaw", &json!({"device": "d0"}))["parameters"]["held"], json!(false));

    let mut lease = Call::start(&control, "Freeze", &json!({"device": "d0", "timeout_ms": 60000}), true);
    assert_eq!(lease.reply()["continues"], json!(true));
    drop(lease);
    session.write(0, &[2; 4096]);

    call(&control, "Freeze", &json!({"device": "d0", "timeout_ms": 60000}));
    send(daemon.disk_process("d0"), libc::SIGKILL);
    let mut session = session.reconnect(&daemon.socket_of(0));
    session.start_ring(0);
    session.write(0, &[3; 4096]);
    assert_eq!(call(&control, "Thaw", &json!({"device": "d0"}))["parameters"]["held"], json!(false));
    assert_eq!(session.read(0, 4096), vec![3; 4096]);
}

#[test]
fn a_thaw_with_an_expired_lease_does_not_end_another_clients_freeze() {
    let (_daemon, control) = start("operator-freeze-lease");
    poll_until("the disk to be served", TIMEOUT, || (state(&control) == json!("serving")).then_some(()));
    let freeze = |timeout_ms: u32| {
        let frozen = call(&control, "Freeze", &json!({"device": "d0", "timeout_ms": timeout_ms}));
        frozen["parameters"]["lease"].as_u64()
    };
    let over = poll_until("a freeze", TIMEOUT, || freeze(300));
    // Refused while the first one lasts.
    let other = poll_until("the end of the first freeze", TIMEOUT, || freeze(60000));
    let thaw = |lease: u64| call(&control, "Thaw", &json!({"device": "d0", "lease": lease}))["parameters"].clone();
    assert_eq!(thaw(over)["held"], json!(false));
    assert_eq!(state(&control), json!("frozen"), "the other freeze continues");
    assert_eq!(thaw(other)["held"], json!(true));
    assert_eq!(state(&control), json!("serving"));
}

#[test]
fn a_daemon_without_disks_serves_those_attached_later() {
    let (mut daemon, control) = start("operator-empty");
    let table = fs::read_to_string(daemon.config()).expect("it can be read");
    fs::write(daemon.config(), format!("[control]\nsocket = {control:?}\n")).expect("it can be written");
    daemon.stop();
    let socket = daemon.socket_of(0);
    let mut empty = Command::new(common::daemon::server_binary());
    let mut empty = empty.arg("--config").arg(daemon.config()).stderr(Stdio::null()).spawn().expect("it starts");
    poll_until("the control socket", TIMEOUT, || UnixStream::connect(&control).ok());
    assert!(names(&control).is_empty());
    let file = daemon.config().with_file_name("whole.toml");
    fs::write(&file, table).expect("it can be written");
    assert_eq!(stdout_of(&genblk(&control, &["attach", &file.display().to_string()])), "d0: attached\n");
    let mut session = Session::open(&socket, &SessionOptions::default());
    session.write(0, &[6; 4096]);
    drop(session);
    send(empty.id(), libc::SIGTERM);
    assert!(empty.wait().expect("it ends").success());
    assert_eq!(daemon.image_bytes(0, 4096), vec![6; 4096]);
}

#[test]
fn shutdown_thaws_a_device_and_completes_its_waiting_requests() {
    let (mut daemon, control) = start("operator-freeze-end");
    let mut session = Session::open(&daemon.socket_of(0), &SessionOptions::default());
    call(&control, "Freeze", &json!({"device": "d0", "timeout_ms": 60000}));
    let pending = session.submit(0, VIRTIO_BLK_T_OUT, 0, Payload::Send(&[5; 4096]));
    session.rings[0].notify();
    assert!(session.rings[0].try_wait_used(ABSENCE).is_none(), "a write waits");
    daemon.stop();
    let used = session.rings[0].wait_used(Duration::ZERO);
    assert_eq!(session.outcome(&pending, used).status, 0);
    assert_eq!(daemon.image_bytes(0, 4096), vec![5; 4096]);
}

#[test]
fn stopping_a_ring_ends_a_freeze_instead_of_waiting_for_it() {
    let (daemon, control) = start("operator-freeze-stop");
    let mut session = Session::open(&daemon.socket_of(0), &SessionOptions::default());
    session.write(0, &[1; 4096]);
    call(&control, "Freeze", &json!({"device": "d0", "timeout_ms": 60000}));
    session.stop_ring(0);
    session.start_ring(0);
    assert_eq!(session.read(0, 4096), vec![1; 4096]);
    let thawed = call(&control, "Thaw", &json!({"device": "d0"}));
    assert_eq!(thawed["parameters"]["held"], json!(true), "a ring that waits for nothing costs no freeze");
    call(&control, "Freeze", &json!({"device": "d0", "timeout_ms": 60000}));
    let begun = Instant::now();
    let pending = session.submit(0, VIRTIO_BLK_T_OUT, 256, Payload::Send(&[2; 4096]));
    session.rings[0].notify();
    assert!(session.rings[0].try_wait_used(ABSENCE).is_none(), "a write waits");
    session.stop_ring(0);
    let used = session.rings[0].wait_used(Duration::ZERO);
    assert_eq!(session.outcome(&pending, used).status, 0);
    assert!(begun.elapsed() < Duration::from_secs(60), "it has not waited for the end of the freeze");
    poll_until("the list to show that the freeze is lost", TIMEOUT, || {
        (state(&control) == json!("serving")).then_some(())
    });
    let again = call(&control, "Freeze", &json!({"device": "d0", "timeout_ms": 60000}));
    assert_eq!(again["parameters"]["frozen"], json!(true), "another freeze can begin: {again}");
    assert_eq!(call(&control, "Thaw", &json!({"device": "d0"}))["parameters"]["held"], json!(true));
    let thawed = call(&control, "Thaw", &json!({"device": "d0"}));
    assert_eq!(thawed["parameters"]["held"], json!(false), "{thawed}");
}

/// Attaches a disk with a new image, from a file.
#[track_caller]
fn attach(daemon: &Daemon, control: &Path, name: &str, more: &str) -> PathBuf {
    let directory = daemon.directory();
    let (image, file) = (format!("{name}.img"), directory.path().join(format!("{name}.toml")));
    let path = directory.path().join(&image);
    if !path.exists() {
        fs::File::create(&path).and_then(|file| file.set_len(IMAGE_BYTES)).expect("an image can be created");
    }
    fs::write(&file, table(directory, name, &image, more)).expect("a file can be written");
    let text = stdout_of(&genblk(control, &["attach", &file.display().to_string()]));
    assert_eq!(text, format!("{name}: attached\n"));
    directory.path().join(format!("{name}.sock"))
}

#[test]
fn a_disk_is_attached_and_detached_while_another_is_served() {
    let (mut daemon, control) = start("operator-attach");
    let mut session = Session::open(&daemon.socket_of(0), &SessionOptions::default());
    session.write(0, &[1; 4096]);
    let socket = attach(&daemon, &control, "d1", "");
    assert_eq!(names(&control), ["d0", "d1"]);
    let mut second = Session::open(&socket, &SessionOptions::default());
    second.write(8, &[2; 4096]);
    drop(second);
    let image = daemon.directory().path().join("d1.img");
    // The daemon may not have noticed yet that the front-end has disconnected.
    poll_until("the end of the disk", TIMEOUT, || genblk(&control, &["detach", "d1"]).status.success().then_some(()));
    assert_eq!(names(&control), ["d0"]);
    assert_eq!(fs::read(&image).expect("the image exists")[4096..8192], [2; 4096]);
    assert!(!socket.exists(), "its socket is removed");
    let again = genblk(&control, &["detach", "d1"]);
    assert!(String::from_utf8_lossy(&again.stderr).contains("d1: no such device; devices: d0"), "{again:?}");
    assert_eq!(session.read(0, 4096), vec![1; 4096]);
    let socket = attach(&daemon, &control, "d1", "");
    assert_eq!(Session::open(&socket, &SessionOptions::default()).read(8, 4096), vec![2; 4096]);
    drop(session);
    daemon.stop();
}

#[test]
fn a_disk_in_use_is_detached_only_by_force() {
    let (daemon, control) = start("operator-detach");
    let mut session = Session::open(&daemon.socket_of(0), &SessionOptions::default());
    session.write(0, &[3; 4096]);
    let pid = std::process::id().to_string();
    poll_until("the front-end is shown", TIMEOUT, || {
        stdout_of(&genblk(&control, &["list"])).contains(&format!("pid {pid}")).then_some(())
    });
    let refused = genblk(&control, &["detach", "d0"]);
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    assert!(String::from_utf8_lossy(&refused.stderr).contains(&format!("d0: in use by pid {pid}")), "{refused:?}");
    assert_eq!(session.read(0, 4096), vec![3; 4096], "it is served as before");
    stdout_of(&genblk(&control, &["detach", "d0", "--force"]));
    assert_eq!(daemon.image_bytes(0, 4096), vec![3; 4096]);
    assert!(names(&control).is_empty());
    poll_until("the front-end is disconnected", TIMEOUT, || session.is_closed().then_some(()));
}

#[test]
fn detaching_a_reader_does_not_disturb_other_readers_of_its_image() {
    let (daemon, control) = start("operator-readers");
    fs::write(daemon.directory().path().join("r1.img"), vec![6; 8 << 20]).expect("an image");
    let first = attach(&daemon, &control, "r1", "read_only = true\n");
    let file = daemon.directory().path().join("r2.toml");
    let text = table(daemon.directory(), "r2", "r1.img", "read_only = true\n");
    fs::write(&file, text).expect("a file can be written");
    stdout_of(&genblk(&control, &["attach", &file.display().to_string()]));
    let mut second = Session::open(&daemon.directory().path().join("r2.sock"), &SessionOptions::default());
    let mut leaving = Session::open(&first, &SessionOptions::default());
    for sector in (0..1024).step_by(8) {
        assert_eq!(leaving.read(sector, 4096), vec![6; 4096]);
    }
    stdout_of(&genblk(&control, &["detach", "r1", "--force"]));
    for sector in (0..4096).step_by(8) {
        assert_eq!(second.read(sector, 4096), vec![6; 4096]);
    }
    drop(second);
    poll_until("the end of the disk", TIMEOUT, || genblk(&control, &["detach", "r2"]).status.success().then_some(()));
    assert_eq!(names(&control), ["d0"]);
}

#[test]
fn changing_a_shared_cache_through_one_device_is_refused() {
    let (daemon, control) = start("operator-shared-keys");
    fs::write(daemon.directory().path().join("r1.img"), vec![6; 8 << 20]).expect("an image");
    let first = attach(&daemon, &control, "r1", "read_only = true\n");
    // Alone on its image, it shares nothing.
    stdout_of(&genblk(&control, &["set", "r1", "cache.readahead_max=1M"]));
    let file = daemon.directory().path().join("r2.toml");
    let text = table(daemon.directory(), "r2", "r1.img", "read_only = true\ncache.readahead_max = \"1M\"\n");
    fs::write(&file, text).expect("a file can be written");
    stdout_of(&genblk(&control, &["attach", &file.display().to_string()]));
    for (device, other) in [("r1", "r2"), ("r2", "r1")] {
        let refused = genblk(&control, &["set", device, "cache.size=8M"]);
        let message = String::from_utf8_lossy(&refused.stderr).into_owned();
        let expected = format!("{device}: its cache is shared with {other}");
        assert!(refused.status.code() == Some(1) && message.contains(&expected), "{refused:?}");
        let config = stdout_of(&genblk(&control, &["config", device]));
        assert!(config.contains("cache.size = \"4M\""), "{config}");
    }
    stdout_of(&genblk(&control, &["set", "r2", "poll_us=7"]));
    stdout_of(&genblk(&control, &["detach", "r2"]));
    stdout_of(&genblk(&control, &["set", "r1", "cache.size=8M"]));
    let mut session = Session::open(&first, &SessionOptions::default());
    for sector in (0..16_384).step_by(8) {
        assert_eq!(session.read(sector, 4096), vec![6; 4096]);
    }
}

#[test]
fn attaches_and_detaches_survive_a_crash_but_not_an_orderly_stop() {
    let (mut daemon, control) = start("operator-runtime");
    let socket = attach(&daemon, &control, "d1", "");
    let mut session = Session::open(&socket, &SessionOptions::default());
    session.write(0, &[4; 4096]);
    stdout_of(&genblk(&control, &["detach", "d0"]));
    daemon.kill();
    daemon.restart_for(std::slice::from_ref(&socket));
    let mut session = session.reconnect(&socket);
    session.start_ring(0);
    assert_eq!(session.read(0, 4096), vec![4; 4096]);
    poll_until("the control socket", TIMEOUT, || UnixStream::connect(&control).ok());
    assert_eq!(names(&control), ["d1"]);
    drop(session);
    daemon.stop();
    daemon.restart();
    poll_until("the control socket", TIMEOUT, || UnixStream::connect(&control).ok());
    assert_eq!(names(&control), ["d0"]);
}

#[test]
fn a_failed_attach_changes_nothing() {
    let (daemon, control) = start("operator-attach-wrong");
    let before = call(&control, "List", &json!({}));
    let paths = daemon.directory().path();
    let socket = paths.join("x.sock");
    let image = paths.join("missing.img");
    let config = json!({"name": "x", "socket": socket, "image": image, "cache": {"size": "4M"}});
    let refused = call(&control, "Attach", &json!({"config": config}));
    assert_eq!(refused["error"], json!("io.genblk.Control.Refused"), "{refused}");
    assert!(refused["parameters"]["why"].as_str().is_some_and(|why| why.contains("missing.img")), "{refused}");
    let twice = json!({"name": "y", "socket": socket, "image": daemon.image()});
    let refused = call(&control, "Attach", &json!({"config": twice}));
    assert_eq!(refused["error"], json!("io.genblk.Control.Invalid"), "{refused}");
    let wrong = call(&control, "Attach", &json!({"config": {"name": "z", "imgae": "/x", "cache": {"size": 5}}}));
    assert_eq!(wrong["parameters"]["problems"].as_array().map(Vec::len), Some(4), "{wrong}");
    let differs = json!({"name": "d0", "socket": daemon.socket_of(0), "image": daemon.image()});
    assert_eq!(call(&control, "Attach", &json!({"config": differs}))["error"], json!("io.genblk.Control.DeviceExists"));
    poll_until("nothing is left of them", TIMEOUT, || (names(&control) == ["d0"]).then_some(()));
    let after = call(&control, "List", &json!({}));
    assert_eq!(after["parameters"]["devices"][0]["name"], before["parameters"]["devices"][0]["name"]);
    assert!(!paths.join("runtime.toml").exists(), "nothing was recorded");
}

#[test]
fn a_read_only_client_changes_nothing() {
    // SAFETY: a plain system call.
    if unsafe { libc::geteuid() } != 0 {
        eprintln!("skipped: only root can become another user");
        return;
    }
    let (daemon, control) = start("operator-peers");
    fs::set_permissions(&control, std::os::unix::fs::PermissionsExt::from_mode(0o666)).expect("the socket exists");
    let script = format!(
        "import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect({control:?})\n\
         s.send(b'{{\"method\":\"io.genblk.Control.Flush\",\"parameters\":{{\"device\":\"d0\"}}}}\\0')\n\
         print(s.recv(4096))"
    );
    let mut command = Command::new("python3");
    std::os::unix::process::CommandExt::uid(&mut command, 65534);
    let Ok(output) = command.args(["-c", &script]).output() else {
        eprintln!("skipped: python3 is not installed");
        return;
    };
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if text.is_empty() {
        eprintln!("skipped: another user cannot reach the socket: {output:?}");
        return;
    }
    assert!(text.contains("io.genblk.Control.PermissionDenied"), "{text}");
    drop(daemon);
}
