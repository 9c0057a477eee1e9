//! Events of a daemon and its disks.

#[path = "common/mod.rs"]
mod common;

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use common::daemon::{send, server_binary};
use common::operator::{Call, call, genblk, start, state, stdout_of};
use common::session::{Session, SessionOptions};
use common::wait::{TIMEOUT, poll_until};

/// The next event of a kind, from a stream.
#[track_caller]
fn await_event(stream: &mut Call, kind: &str) -> Value {
    for _ in 0..100 {
        let reply = stream.reply();
        let events = reply["parameters"]["events"].as_array().expect("events").clone();
        if let Some(event) = events.into_iter().find(|event| event["kind"] == json!(kind)) {
            return event;
        }
    }
    panic!("no event {kind}");
}

fn await_served(control: &Path) {
    poll_until("the disk to be served", TIMEOUT, || (state(control) == json!("serving")).then_some(()));
}

#[test]
fn watchers_receive_every_event() {
    let (daemon, control) = start("events-watch");
    await_served(&control);
    let mut stream = Call::start(&control, "Watch", &json!({"since": 0}), true);
    let started = await_event(&mut stream, "started");
    assert_eq!((&started["sequence"], &started["device"]), (&json!(1), &Value::Null), "{started}");
    let session = Session::open(&daemon.socket_of(0), &SessionOptions::default());
    let attached = await_event(&mut stream, "front_end_attached");
    assert_eq!(attached["detail"]["pid"], json!(std::process::id()), "{attached}");
    stdout_of(&genblk(&control, &["set", "d0", "poll_us=7"]));
    assert_eq!(await_event(&mut stream, "set")["detail"]["keys"], json!(["poll_us"]));
    call(&control, "Freeze", &json!({"device": "d0"}));
    await_event(&mut stream, "frozen");
    call(&control, "Thaw", &json!({"device": "d0"}));
    assert_eq!(await_event(&mut stream, "thawed")["detail"]["held"], json!(true));
    stdout_of(&genblk(&control, &["reload"]));
    await_event(&mut stream, "reloaded");
    drop(session);
    await_event(&mut stream, "front_end_left");
    let pid = daemon.disk_process("d0");
    send(pid, libc::SIGKILL);
    assert_eq!(await_event(&mut stream, "restarted")["detail"]["pid_before"], json!(pid));
    await_served(&control);
    stdout_of(&genblk(&control, &["detach", "d0"]));
    await_event(&mut stream, "detached");
    // The kept events of one disk, which has been detached meanwhile, printed once.
    let kept = call(&control, "Watch", &json!({"device": "d0"}));
    let events = kept["parameters"]["events"].as_array().expect("events");
    assert_eq!(events.last().map(|event| &event["kind"]), Some(&json!("detached")));
    assert_eq!(kept["parameters"]["lost"], json!(false));
    let metrics = stdout_of(&genblk(&control, &["exporter", "--once"]));
    assert!(metrics.contains("genblk_events_total{kind=\"set\"} 1\n"), "{metrics}");
}

#[test]
fn events_are_printed_and_followed() {
    let (_daemon, control) = start("events-command");
    await_served(&control);
    let text = poll_until("an event of the disk", TIMEOUT, || {
        Some(stdout_of(&genblk(&control, &["events"]))).filter(|text| text.contains(" d0: state "))
    });
    assert!(text.contains(" started devices=1 pid="), "{text}");
    let mut command = Command::new(server_binary());
    command.args(["events", "-f", "d0", "--socket"]).arg(&control).stdout(Stdio::piped());
    let mut follower = command.spawn().expect("genblk runs");
    let mut lines = BufReader::new(follower.stdout.take().expect("a pipe")).lines().map_while(Result::ok);
    stdout_of(&genblk(&control, &["resume", "d0"]));
    assert!(lines.any(|line| line.ends_with(" d0: resumed")));
    follower.kill().and_then(|()| follower.wait()).expect("it ends");
}

#[test]
fn watchers_that_do_not_read_delay_nobody() {
    let (_daemon, control) = start("events-slow");
    await_served(&control);
    let held: Vec<Call> = (0..8).map(|_| Call::start(&control, "Watch", &json!({"since": 0}), true)).collect();
    for _ in 0..1500 {
        call(&control, "Resume", &json!({"device": "d0"}));
    }
    let mut reader = Call::start(&control, "Watch", &json!({"since": 1}), false);
    let parameters = reader.reply()["parameters"].clone();
    assert_eq!(parameters["events"].as_array().map(Vec::len), Some(1024), "as many as are kept");
    assert_eq!(parameters["lost"], json!(true));
    assert!(parameters["lost_events"].as_u64() > Some(400), "{}", parameters["lost_events"]);
    drop(held);
}

#[test]
fn streams_of_read_only_users_leave_connections_for_calls_of_others() {
    // SAFETY: a plain system call.
    if unsafe { libc::geteuid() } != 0 {
        eprintln!("skipped: only root can become another user");
        return;
    }
    let (_daemon, control) = start("events-crowd");
    std::fs::set_permissions(&control, std::os::unix::fs::PermissionsExt::from_mode(0o666)).expect("it exists");
    let script = format!(
        "import socket\nheld = []\nfor method in ['Watch', 'Statistics'] * 4 + ['List']:\n \
         s = socket.socket(socket.AF_UNIX)\n s.connect({control:?})\n \
         s.send(b'{{\"method\":\"io.genblk.Control.' + method.encode() + b'\",\"more\":true}}\\0')\n \
         reply = s.recv(65536)\n print(method, b'Busy' in reply, flush=True)\n \
         s.close() if b'Busy' in reply else held.append(s)\n"
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
    let busy = text.lines().filter(|line| line.ends_with("True")).count();
    assert_eq!(busy, 4, "four of eight streams are refused: {text}");
    assert!(text.contains("List False"), "a call is served: {text}");
}
