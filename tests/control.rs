//! The control socket and the commands that use it, over a daemon with two disks.

#[path = "common/mod.rs"]
mod common;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use common::control::{genblk, start, stdout_of};
use common::daemon::send;
use common::session::{Session, SessionOptions};
use common::wait::{TIMEOUT, poll_until};

/// A varlink connection.
struct Varlink(BufReader<UnixStream>);

impl Varlink {
    fn connect(control: &Path) -> Self {
        let stream = UnixStream::connect(control).expect("the daemon listens");
        stream.set_read_timeout(Some(TIMEOUT)).expect("a timeout can be set");
        Self(BufReader::new(stream))
    }

    fn send(&mut self, message: &str) {
        self.0.get_mut().write_all(&[message.as_bytes(), &[0]].concat()).expect("the daemon reads");
    }

    /// The next reply; `None` if the daemon has closed the connection.
    fn receive(&mut self) -> Option<Value> {
        let mut bytes = Vec::new();
        let count = self.0.read_until(0, &mut bytes).unwrap_or(0);
        (count > 0).then(|| serde_json::from_slice(&bytes[..count - 1]).expect("a reply is JSON"))
    }

    #[track_caller]
    fn call(&mut self, method: &str, parameters: &Value) -> Value {
        self.send(&json!({"method": method, "parameters": parameters}).to_string());
        self.receive().expect("a reply")
    }
}

/// Statistics of a disk.
fn statistics(control: &Path, device: &str) -> Value {
    let reply = Varlink::connect(control).call("io.genblk.Control.Statistics", &json!({"device": device}));
    reply["parameters"]["devices"][0].clone()
}

/// Waits until a device's statistics show these reads, writes and flushes: a worker counts a request when it next reads
/// the clock, which may be just after the request's completion.
#[track_caller]
fn await_requests(control: &Path, device: &str, requests: [u64; 3]) -> Value {
    poll_until("the requests are counted", TIMEOUT, || {
        let statistics = statistics(control, device);
        let counted = [0, 1, 2].map(|index: usize| statistics["requests"][index]["requests"].as_u64());
        (counted == requests.map(Some)).then_some(statistics)
    })
}

#[test]
fn list_shows_each_disk_and_why_one_is_not_served() {
    let (daemon, control) = start("control-list", true);
    let session = Session::open(&daemon.socket_of(0), &SessionOptions::default());
    let pid = std::process::id().to_string();
    let lines = poll_until("the front-end is shown", TIMEOUT, || {
        let text = stdout_of(&genblk(&control, &["list"]));
        text.contains(&format!("pid {pid}")).then_some(text)
    });
    let lines: Vec<&str> = lines.lines().collect();
    assert!(lines[0].starts_with("disk"), "{lines:?}");
    let first: Vec<&str> = lines[1].split_whitespace().collect();
    assert_eq!((first[0], first[1], first[5], first[6]), ("d0", "serving", "8.0M", "4.0M"), "{lines:?}");
    assert!(lines[2].starts_with("d1    failed"), "{lines:?}");
    assert!(lines[3].starts_with("d1: ") && lines[3].contains("No such file"), "{lines:?}");
    let alone = stdout_of(&genblk(&control, &["list", "d1", "--json"]));
    let reply: Value = serde_json::from_str(&alone).expect("JSON");
    assert_eq!((&reply["devices"][0]["name"], &reply["devices"][0]["state"]), (&json!("d1"), &json!("failed")));
    drop(session);
}

#[test]
fn stat_counts_every_request_and_shows_dashes_for_an_idle_disk() {
    let (daemon, control) = start("control-stat", false);
    let mut session = Session::open(&daemon.socket_of(0), &SessionOptions::default());
    for _ in 0..10 {
        session.write(0, &[1; 8192]);
    }
    for _ in 0..30 {
        session.read(0, 4096);
    }
    session.flush();
    let statistics = await_requests(&control, "d0", [30, 10, 1]);
    assert_eq!(
        (&statistics["requests"][0]["bytes"], &statistics["requests"][1]["bytes"]),
        (&json!(30 * 4096), &json!(10 * 8192))
    );
    assert_eq!(statistics["requests"][0]["from_memory"]["count"], json!(30));
    poll_until("the cache's statistics", TIMEOUT, || {
        (self::statistics(&control, "d0")["cache"]["hit_pages"] == json!(30)).then_some(())
    });
    let text = stdout_of(&genblk(&control, &["stat", "-H"]));
    let rows: Vec<Vec<&str>> = text.lines().map(|line| line.split('\t').collect()).collect();
    assert_eq!((rows[0][0], rows[1][0], rows.len()), ("d0", "d1", 2), "{text}");
    assert_ne!(rows[0][5], "-", "the 99th percentile of reads: {text}");
    assert_eq!(rows[1][1..11], ["0", "0.0", "-", "-", "-", "0", "0.0", "-", "-", "0"], "{text}");
    let two = stdout_of(&genblk(&control, &["stat", "d0", "-y", "-H", "0.2", "2"]));
    assert_eq!(two.lines().count(), 2, "two reports without the first: {two}");
    assert!(two.lines().all(|line| line.split('\t').nth(1) == Some("0")), "nothing happened since: {two}");
    assert_eq!(statistics["requests"][0]["sizes"], json!({"least_bytes": [4096], "counts": [30]}));
    assert_eq!(statistics["requests"][1]["sizes"], json!({"least_bytes": [8192], "counts": [10]}));
    assert_eq!(statistics["requests"][2]["sizes"], json!({"least_bytes": [], "counts": []}), "a FLUSH has no size");
    let sizes = stdout_of(&genblk(&control, &["stat", "d0", "-Hpr"]));
    let expected = ["4096\t30\t-\t", "8192\t-\t10\t"];
    assert!(sizes.lines().zip(expected).all(|(line, start)| line.starts_with(start)), "{sizes}");
    for view in ["-l", "-w", "-r", "-c"] {
        assert!(stdout_of(&genblk(&control, &["stat", view])).contains("d0"), "{view}");
    }
}

#[test]
fn counters_continue_across_restarts_of_a_disk_process() {
    let (daemon, control) = start("control-restart", false);
    let mut session = Session::open(&daemon.socket_of(0), &SessionOptions::default());
    session.write(0, &[1; 4096]);
    await_requests(&control, "d0", [0, 1, 0]);
    let await_pages = |pages: u64| {
        poll_until("the pages are counted", TIMEOUT, || {
            (statistics(&control, "d0")["cache"]["written_pages"] == json!(pages)).then_some(())
        });
    };
    await_pages(1);
    send(daemon.disk_process("d0"), libc::SIGKILL);
    let mut session = session.reconnect(&daemon.socket_of(0));
    session.start_ring(0);
    session.write(0, &[2; 4096]);
    let statistics = await_requests(&control, "d0", [0, 2, 0]);
    assert_eq!(statistics["requests"][1]["in_flight"], json!(0));
    await_pages(2);
}

#[test]
fn a_failed_command_prints_its_reason_in_one_line() {
    let (_daemon, control) = start("control-errors", false);
    let unknown = genblk(&control, &["stat", "vm7"]);
    assert_eq!(unknown.status.code(), Some(1));
    assert_eq!(String::from_utf8_lossy(&unknown.stderr), "genblk: vm7: no such device; devices: d0, d1\n");
    let nobody = genblk(Path::new("/nonexistent/control.sock"), &["list"]);
    assert_eq!(nobody.status.code(), Some(3));
    assert!(
        String::from_utf8_lossy(&nobody.stderr).starts_with("genblk: no daemon listens on /nonexistent"),
        "{nobody:?}"
    );
    for wrong in [&["d0", "0.001"][..], &["d0", "1", "0"], &["1", "2", "d0"], &["1", "many"], &["-l", "-r"]] {
        let output = genblk(&control, &[&["stat"], wrong].concat());
        assert_eq!(output.status.code(), Some(2), "{wrong:?}: {output:?}");
    }
    let text = String::from_utf8(genblk(&control, &["stat", "1", "2", "d0"]).stderr).expect("text");
    assert!(text.starts_with("genblk: \"d0\" is an unexpected argument; genblk stat takes [DEVICE]"), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
}

#[test]
fn invalid_calls_get_varlink_errors_on_a_connection_that_stays_open() {
    let (_daemon, control) = start("control-calls", false);
    let mut varlink = Varlink::connect(&control);
    let nothing = json!({});
    let error = |reply: &Value| reply["error"].as_str().unwrap_or_default().to_owned();
    assert_eq!(error(&varlink.call("io.genblk.Control.Fly", &nothing)), "org.varlink.service.MethodNotFound");
    assert_eq!(error(&varlink.call("com.example.Fly", &nothing)), "org.varlink.service.InterfaceNotFound");
    let wrong = varlink.call("io.genblk.Control.List", &json!({"device": 7}));
    assert_eq!(
        (error(&wrong).as_str(), &wrong["parameters"]["parameter"]),
        ("org.varlink.service.InvalidParameter", &json!("device"))
    );
    let early = varlink.call("io.genblk.Control.Statistics", &json!({"interval_ms": 1}));
    assert_eq!(early["parameters"]["parameter"], json!("interval_ms"));
    let unknown = varlink.call("io.genblk.Control.List", &json!({"device": "x"}));
    assert_eq!(error(&unknown), "io.genblk.Control.NoSuchDevice");
    let info = varlink.call("org.varlink.service.GetInfo", &nothing);
    assert_eq!(info["parameters"]["interfaces"], json!(["org.varlink.service", "io.genblk.Control"]));
    let described =
        varlink.call("org.varlink.service.GetInterfaceDescription", &json!({"interface": "io.genblk.Control"}));
    assert!(described["parameters"]["description"].as_str().is_some_and(|text| text.contains("method Statistics(")));
    assert_eq!(
        varlink.call("io.genblk.Control.Describe", &nothing)["parameters"]["version"],
        json!(env!("CARGO_PKG_VERSION"))
    );
    let misspelt = varlink.call("io.genblk.Control.Reload", &json!({"dryrun": true}));
    assert_eq!(
        (error(&misspelt).as_str(), &misspelt["parameters"]["parameter"]),
        ("org.varlink.service.InvalidParameter", &json!("dryrun"))
    );
    let deep = format!(r#"{{"method":"io.genblk.Control.List","parameters":{}{}}}"#, "[".repeat(16), "]".repeat(16));
    for wrong in ["7", "[]", "{}", r#"{"method":7}"#, r#"{"method":"io.genblk.Control.List","more":"x"}"#, &deep] {
        varlink.send(wrong);
        let reply = varlink.receive().unwrap_or_default();
        assert_eq!(error(&reply), "org.varlink.service.InvalidParameter", "{wrong}: {reply}");
    }
    varlink.send("this is no JSON");
    assert_eq!(varlink.receive(), None, "what is no JSON ends the connection");
    assert!(stdout_of(&genblk(&control, &["list"])).contains("d0"));
}

#[test]
fn excess_connections_are_refused() {
    let (_daemon, control) = start("control-many", false);
    let mut held: Vec<Varlink> = (0..16).map(|_| Varlink::connect(&control)).collect();
    for client in &mut held {
        // Each asks for a stream that it never reads.
        client.send(r#"{"method":"io.genblk.Control.Statistics","parameters":{"interval_ms":100},"more":true}"#);
    }
    let refused = poll_until("a connection too many", TIMEOUT, || {
        let mut one_more = Varlink::connect(&control);
        one_more.send(r#"{"method":"io.genblk.Control.List"}"#);
        one_more.receive().filter(|reply| reply["error"] == json!("io.genblk.Control.Busy"))
    });
    assert_eq!(refused["parameters"]["connections"], json!(16));
    drop(held.pop());
    poll_until("a place that is free again", TIMEOUT, || genblk(&control, &["list"]).status.success().then_some(()));
}

#[test]
fn a_call_with_a_hundred_thousand_parameters_is_refused_quickly() {
    let (_daemon, control) = start("control-parameters", false);
    let mut parameters: serde_json::Map<String, Value> = (0..100_000).map(|i| (format!("{i}"), json!(0))).collect();
    parameters.insert("device".to_owned(), json!(7));
    let mut varlink = Varlink::connect(&control);
    let refused = varlink.call("io.genblk.Control.List", &Value::Object(parameters));
    assert_eq!(refused["error"], json!("org.varlink.service.InvalidParameter"));
    let reply = varlink.call("io.genblk.Control.Flush", &json!({"device": "d0"}));
    assert_eq!(reply["error"], Value::Null, "the connection goes on");
}

#[test]
fn connections_of_another_user_do_not_lock_out_the_operator() {
    // SAFETY: a plain system call.
    if unsafe { libc::geteuid() } != 0 {
        eprintln!("skipped: only root can become another user");
        return;
    }
    let (_daemon, control) = start("control-crowd", false);
    std::fs::set_permissions(&control, std::os::unix::fs::PermissionsExt::from_mode(0o666)).expect("it exists");
    let script = format!(
        "import socket, sys\nheld = []\nfor i in range(40):\n s = socket.socket(socket.AF_UNIX)\n \
         s.connect({control:?})\n held.append(s)\nprint(held[-1].recv(4096), flush=True)\nsys.stdin.read()"
    );
    let mut command = Command::new("python3");
    command.args(["-c", &script]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let Ok(mut crowd) = std::os::unix::process::CommandExt::uid(&mut command, 65534).spawn() else {
        eprintln!("skipped: python3 is not installed");
        return;
    };
    let mut line = String::new();
    BufReader::new(crowd.stdout.take().expect("a pipe")).read_line(&mut line).expect("it is read");
    if line.is_empty() {
        eprintln!("skipped: another user cannot reach the socket");
    } else {
        assert!(line.contains("io.genblk.Control.Busy"), "{line}");
        assert!(stdout_of(&genblk(&control, &["list"])).contains("d0"));
    }
    drop(crowd.stdin.take());
    crowd.wait().expect("it ends");
}

#[test]
fn a_stream_sends_statistics_until_the_client_hangs_up() {
    let (_daemon, control) = start("control-stream", false);
    let mut varlink = Varlink::connect(&control);
    varlink.send(r#"{"method":"io.genblk.Control.Statistics","parameters":{"interval_ms":100},"more":true}"#);
    let times: Vec<u64> = (0..3)
        .map(|_| {
            let reply = varlink.receive().expect("another reply");
            assert_eq!(reply["continues"], json!(true));
            reply["parameters"]["time_us"].as_u64().expect("a time")
        })
        .collect();
    assert!(times.windows(2).all(|pair| pair[1] >= pair[0] + 90_000), "{times:?}");
    varlink.0.get_ref().set_read_timeout(Some(Duration::from_secs(1))).expect("a timeout can be set");
}
