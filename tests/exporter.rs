//! `genblk exporter`: what a scraper gets, in both formats, from a daemon that serves, hangs or is gone; and the alert
//! rules and the board that use it.

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use common::control::{genblk, start, stdout_of};
use common::daemon::{TempDir, send, server_binary};
use common::session::{Session, SessionOptions};
use common::wait::{TIMEOUT, poll_until};

/// How long a scrape may take, the machine's load included: the daemon has 2 s of it.
const SCRAPE_LIMIT: Duration = Duration::from_secs(6);

/// A process that is killed at the end of its test.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill().and_then(|()| self.0.wait());
    }
}

fn free_address() -> String {
    let address = TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a free port");
    address.to_string()
}

/// The exporter of the daemon at `control`, at an address.
fn export(control: &Path, address: &str) -> Guard {
    let mut exporter = Command::new(server_binary());
    exporter.args(["exporter", "--listen", address]).arg("--socket").arg(control);
    Guard(exporter.spawn().expect("genblk runs"))
}

fn exchange(mut stream: impl Read + Write, request: &[u8]) -> Option<String> {
    // A server that refuses a long request may close the connection before it has all of it.
    let _ = stream.write_all(request);
    let mut reply = String::new();
    let _ = stream.read_to_string(&mut reply);
    Some(reply).filter(|reply| !reply.is_empty())
}

fn ask(address: &str, request: &[u8]) -> Option<String> {
    match address.strip_prefix("unix:") {
        Some(path) => exchange(UnixStream::connect(path).ok()?, request),
        None => exchange(TcpStream::connect(address).ok()?, request),
    }
}

fn get(address: &str, accept: &str) -> Option<String> {
    let request = format!("GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: {accept}\r\n\r\n");
    ask(address, request.as_bytes()).filter(|reply| reply.starts_with("HTTP/1.1 200"))
}

/// Waits until an exporter replies.
fn await_exporter(address: &str) -> String {
    poll_until("the exporter", TIMEOUT, || get(address, "text/plain"))
}

/// The path of a program of the Prometheus package: setup.sh unpacks it, or it is installed.
fn prometheus_program(name: &str) -> Option<PathBuf> {
    let unpacked = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/prometheus/usr/bin").join(name);
    let runs = |program: &PathBuf| {
        let version = Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
        version.is_ok_and(|status| status.success())
    };
    let found = [unpacked, PathBuf::from(name)].into_iter().find(runs);
    if found.is_none() {
        eprintln!("skipped: {name} is not there (scripts/setup.sh unpacks the package prometheus)");
    }
    found
}

fn packaging(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging").join(path)
}

/// A daemon whose disk `d0` has completed 5 reads and a write.
fn busy_daemon(name: &str) -> (common::daemon::Daemon, PathBuf) {
    let (daemon, control) = start(name, true);
    let mut session = Session::open(&daemon.socket_of(0), &SessionOptions::default());
    session.write(0, &[1; 4096]);
    (0..5).for_each(|_| drop(session.read(0, 4096)));
    let is_counted = |text: &String| {
        let count = "genblk_request_duration_seconds_count{device=\"d0\",operation=";
        // A disk process tells the size of its image a few times a second.
        text.contains(&format!("{count}\"read\",served=\"memory\"}} 5"))
            && text.contains("device_size_bytes{device=\"d0\"}")
    };
    poll_until("the requests are counted", TIMEOUT, || {
        Some(stdout_of(&genblk(&control, &["exporter", "--once"]))).filter(is_counted)
    });
    (daemon, control)
}

#[test]
fn once_prints_metrics_that_promtool_accepts() {
    let (_daemon, control) = busy_daemon("exporter-once");
    let text = stdout_of(&genblk(&control, &["exporter", "--once"]));
    let has = |text: &str, line: &str| assert!(text.lines().any(|found| found == line), "{line} in {text}");
    has(&text, "genblk_up 1");
    has(&text, "genblk_device_state{device=\"d1\",state=\"failed\"} 1");
    has(&text, "genblk_device_state{device=\"d0\",state=\"failed\"} 0");
    has(&text, "genblk_read_bytes_total{device=\"d0\"} 20480");
    has(&text, "genblk_device_size_bytes{device=\"d0\"} 8388608");
    assert!(text.contains("genblk_device_info{device=\"d0\",image=\"/"), "{text}");
    assert!(text.contains(".img\",serial=\"d0\"} 1"), "{text}");
    let short = stdout_of(&genblk(&control, &["exporter", "--once", "--no-histograms"]));
    assert!(!short.contains("_bucket{"), "{short}");
    has(&short, "genblk_request_duration_seconds_count{device=\"d0\",operation=\"read\",served=\"memory\"} 5");
    let Some(promtool) = prometheus_program("promtool") else { return };
    for text in [text, short, stdout_of(&genblk(Path::new("/nonexistent"), &["exporter", "--once"]))] {
        let mut check = Command::new(&promtool);
        check.args(["check", "metrics"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut check = check.spawn().expect("promtool runs");
        check.stdin.take().expect("it is piped").write_all(text.as_bytes()).expect("promtool reads");
        let checked = check.wait_with_output().expect("promtool ends");
        assert!(checked.status.success() && checked.stderr.is_empty(), "{checked:?}");
    }
}

#[test]
fn a_scraper_gets_the_format_that_it_accepts_over_tcp_and_over_a_unix_socket() {
    let (daemon, control) = start("exporter-formats", false);
    let unix = format!("unix:{}", daemon.directory().path().join("exporter.sock").display());
    for address in [free_address(), unix] {
        let exporter = export(&control, &address);
        let plain = await_exporter(&address);
        assert!(plain.contains("\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n"), "{plain}");
        assert!(plain.contains("\n# TYPE genblk_read_bytes_total counter\n"), "{plain}");
        let (head, body) = plain.split_once("\r\n\r\n").expect("a head");
        assert!(head.contains(&format!("\r\nContent-Length: {}\r\n", body.len())), "{head}");
        let open = get(&address, "application/openmetrics-text;version=1.0.0,text/plain;q=0.5").expect("a reply");
        assert!(open.contains("\r\nContent-Type: application/openmetrics-text; version=1.0.0; charset=utf-8\r\n"));
        assert!(
            open.contains("\n# TYPE genblk_read_bytes counter\ngenblk_read_bytes_total{device=\"d0\"} 0\n"),
            "{open}"
        );
        assert!(open.ends_with("\n# EOF\n"));
        drop(exporter);
        // Another exporter takes the socket of one that has ended.
        let _again = export(&control, &address);
        await_exporter(&address);
    }
}

#[test]
fn the_exporter_serves_a_socket_passed_by_systemd() {
    let (daemon, control) = start("exporter-systemd", false);
    let path = daemon.directory().path().join("exporter.sock");
    let listener = UnixListener::bind(&path).expect("a socket can be bound");
    let fd = listener.as_raw_fd();
    let mut exporter = Command::new("sh");
    exporter.args(["-c", "LISTEN_PID=$$ LISTEN_FDS=1 exec \"$@\"", "sh"]).arg(server_binary());
    exporter.args(["exporter", "--listen", "systemd", "--socket"]).arg(&control);
    // SAFETY: between fork and exec the child calls only dup2, which is async-signal-safe.
    unsafe {
        exporter.pre_exec(move || match libc::dup2(fd, 3) {
            -1 => Err(std::io::Error::last_os_error()),
            _ => Ok(()),
        })
    };
    let _exporter = Guard(exporter.spawn().expect("genblk runs"));
    let reply = await_exporter(&format!("unix:{}", path.display()));
    assert!(reply.contains("\ngenblk_up 1\n"), "{reply}");
    let alone = genblk(&control, &["exporter", "--listen", "systemd"]);
    assert_eq!(alone.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&alone.stderr).contains("has not passed one socket"), "{alone:?}");
}

#[test]
fn bad_requests_and_silent_clients_do_not_block_scrapes() {
    let (_daemon, control) = start("exporter-bad", false);
    let address = free_address();
    let _exporter = export(&control, &address);
    await_exporter(&address);
    let status = |request: &[u8]| {
        let reply = ask(&address, request).unwrap_or_default();
        reply.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)).unwrap_or_default().to_owned()
    };
    assert_eq!(status(b"GET / HTTP/1.1\r\n\r\n"), "404");
    assert_eq!(status(b"POST /metrics HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc"), "405");
    assert_eq!(status(b"\x16\x03\x01\x02\x00 this is TLS\r\n\r\n"), "400");
    assert_eq!(status(b"\0\0\0\0\r\n\r\n"), "400");
    let long = [b"GET /metrics HTTP/1.1\r\nX: ".as_slice(), &[b'x'; 64 << 10], b"\r\n\r\n"].concat();
    assert_eq!(status(&long), "431");
    assert_eq!(status(format!("GET /metrics HTTP/1.1\r\n{}\r\n", "X: y\r\n".repeat(100)).as_bytes()), "431");
    let _silent: Vec<TcpStream> = (0..4).map(|_| TcpStream::connect(&address).expect("it listens")).collect();
    let started = Instant::now();
    assert!(get(&address, "text/plain").is_some(), "silent clients do not matter");
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    let _more: Vec<TcpStream> = (0..20).map(|_| TcpStream::connect(&address).expect("it listens")).collect();
    poll_until("the silent clients are cut off", TIMEOUT, || get(&address, "text/plain"));
}

#[test]
fn a_hung_or_stopped_daemon_is_scraped_as_not_up() {
    let (mut daemon, control) = start("exporter-hangs", false);
    let address = free_address();
    let _exporter = export(&control, &address);
    await_exporter(&address);
    let is_down = || {
        let started = Instant::now();
        let reply = get(&address, "text/plain").expect("a reply with status 200");
        assert!(started.elapsed() < SCRAPE_LIMIT, "{:?}", started.elapsed());
        assert!(reply.contains("\ngenblk_up 0\n") && !reply.contains("device="), "{reply}");
    };
    send(daemon.id(), libc::SIGSTOP);
    is_down();
    // The queue of connections of the daemon fills up.
    let _waiting: Vec<_> = (0..3).map(|_| UnixStream::connect(&control)).collect();
    is_down();
    send(daemon.id(), libc::SIGCONT);
    poll_until("the daemon is up again", TIMEOUT, || {
        get(&address, "text/plain").filter(|reply| reply.contains("\ngenblk_up 1\n"))
    });
    daemon.kill();
    is_down();
}

#[test]
fn prometheus_scrapes_the_exporter_in_its_preferred_format() {
    let Some(prometheus) = prometheus_program("prometheus") else { return };
    let (daemon, control) = busy_daemon("exporter-prometheus");
    let address = free_address();
    let _exporter = export(&control, &address);
    await_exporter(&address);
    let (directory, web) = (daemon.directory().path(), free_address());
    let config = format!(
        "global:\n  scrape_interval: 200ms\n  scrape_timeout: 200ms\n  evaluation_interval: 1s\n\
         rule_files: [{:?}]\n\
         scrape_configs:\n- job_name: genblk\n  static_configs:\n  - targets: [{address:?}]\n",
        packaging("prometheus/genblk.rules.yml")
    );
    fs::write(directory.join("prometheus.yml"), config).expect("a file can be written");
    let log = fs::File::create(directory.join("prometheus.log")).expect("a file can be created");
    let mut server = Command::new(prometheus);
    server.arg(format!("--config.file={}", directory.join("prometheus.yml").display()));
    server.arg(format!("--storage.tsdb.path={}", directory.join("prometheus").display()));
    server.arg(format!("--web.listen-address={web}"));
    let _server = Guard(server.stdout(Stdio::null()).stderr(log).spawn().expect("prometheus runs"));
    let query = |query: &str| -> Option<String> {
        let request = format!("GET /api/v1/query?query={query} HTTP/1.0\r\n\r\n");
        let reply = ask(&web, request.as_bytes())?;
        let body: Value = serde_json::from_str(reply.split_once("\r\n\r\n")?.1).ok()?;
        body["data"]["result"][0]["value"][1].as_str().map(str::to_owned)
    };
    let is = |expression: &str, value: &str| {
        poll_until(expression, 3 * TIMEOUT, || query(expression).filter(|found| found == value));
    };
    is("genblk_up", "1");
    is("genblk_read_bytes_total", "20480");
    is("genblk_request_duration_seconds_count{operation=%22read%22,served=%22memory%22}", "5");
    // A counter by its type: OpenMetrics was spoken.
    let metadata = ask(&web, b"GET /api/v1/metadata?metric=genblk_read_bytes HTTP/1.0\r\n\r\n").unwrap_or_default();
    assert!(metadata.contains("\"type\":\"counter\""), "{metadata}");
    // The rules are loaded, and the disk that is not served raises its alert.
    is("ALERTS{alertname=%22GenblkDiskNotServed%22,device=%22d1%22}", "1");
}

#[test]
fn the_alert_rules_fire_at_their_thresholds() {
    let Some(promtool) = prometheus_program("promtool") else { return };
    for arguments in [["check", "rules", "genblk.rules.yml"], ["test", "rules", "genblk.rules.test.yml"]] {
        let output = Command::new(&promtool).args(arguments).current_dir(packaging("prometheus")).output();
        let output = output.expect("promtool runs");
        assert!(
            output.status.success(),
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
}

/// The names in a text that begin with `genblk_`.
fn metric_names(text: &str) -> BTreeSet<String> {
    let words = text.split(|char: char| !(char.is_ascii_alphanumeric() || char == '_'));
    words.filter(|word| word.starts_with("genblk_")).map(str::to_owned).collect()
}

#[test]
fn rules_dashboard_and_documentation_name_only_existing_metrics() {
    let (_daemon, control) = start("exporter-names", true);
    let text = stdout_of(&genblk(&control, &["exporter", "--once"]));
    let families: BTreeSet<String> =
        text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).map(str::to_owned).collect();
    let read = |path: PathBuf| fs::read_to_string(path).expect("the file exists");
    let family = |name: &str| {
        let stems = ["_bucket", "_sum", "_count"].iter().filter_map(|end| name.strip_suffix(end));
        stems.chain([name]).any(|stem| families.contains(stem))
    };
    let board = read(packaging("grafana/genblk.json"));
    serde_json::from_str::<Value>(&board).expect("the board is JSON");
    for (what, text) in [("the rules", read(packaging("prometheus/genblk.rules.yml"))), ("the board", board)] {
        let names = metric_names(&text);
        assert!(names.len() > 5, "{what}: {names:?}");
        let unknown: Vec<_> = names.iter().filter(|name| !family(name)).collect();
        assert!(unknown.is_empty(), "{what} use {unknown:?}");
    }
    let documented = metric_names(&read(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/prometheus.md")));
    let missing: Vec<_> = families.difference(&documented).collect();
    let unknown: Vec<_> = documented.iter().filter(|name| !family(name)).collect();
    assert!(
        missing.is_empty() && unknown.is_empty(),
        "docs/prometheus.md: {missing:?} are missing, {unknown:?} unknown"
    );
}

#[test]
fn a_reply_for_many_disks_may_exceed_the_limit_of_a_call() {
    // A daemon with 2000 disks, each of which has completed a request.
    let directory = TempDir::new("exporter-many");
    let control = directory.path().join("control.sock");
    let listener = UnixListener::bind(&control).expect("a socket can be bound");
    let daemon = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a client comes");
        let latency = r#"{"count":1,"sum_ns":1000,"max_ns":1000,"bounds_ns":[1024],"counts":[1]}"#;
        let nothing = r#"{"count":0,"sum_ns":0,"max_ns":null,"bounds_ns":[],"counts":[]}"#;
        let cache: Value = serde_json::to_value(genblk::control::wire::CacheStatistics::default()).expect("JSON");
        let device = |index| {
            format!(
                r#"{{"name":"d{index}","requests":[{{"operation":"read","requests":1,"errors":0,"bytes":4096,
                "in_flight":0,"from_memory":{latency},"waited":{nothing}}}],"cache":{cache},"stores":[],"workers":[]}}"#
            )
        };
        let devices = (0..2000).map(device).collect::<Vec<_>>().join(",");
        let replies = [
            r#"{"version":"1","pid":1,"since_us":0}"#.to_owned(),
            r#"{"devices":[]}"#.to_owned(),
            format!(r#"{{"time_us":1,"devices":[{devices}]}}"#),
        ];
        assert!(replies[2].len() > 1 << 20, "{} bytes", replies[2].len());
        for parameters in replies {
            let mut call = [0; 4096];
            let count = stream.read(&mut call).expect("a call comes");
            assert_eq!(call[..count].last(), Some(&0), "one call at a time");
            stream.write_all(format!("{{\"parameters\":{parameters}}}\0").as_bytes()).expect("the client reads");
        }
    });
    let text = stdout_of(&genblk(&control, &["exporter", "--once", "--no-histograms"]));
    assert!(text.contains("genblk_read_bytes_total{device=\"d1999\"} 4096\n"), "{text:.1000}");
    daemon.join().expect("the daemon's thread ends");
}
