//! Every method of the control interface in random order while a guest has 64 requests in flight, with kills between
//! and in the middle: the guest finds what it wrote, a frozen image does not change, and after each kill the daemon
//! serves what it had answered.
//!
//! `GENBLK_CHANGES` sets the number of events (`make soak`: 10000), and `GENBLK_TEST_SEED` their order.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::common::daemon::{Daemon, TempDir, send};
use super::common::operator::{Call, IMAGE_BYTES as OTHER_BYTES, call, names, table};
use super::common::prng::{Prng, seed};
use super::common::session::{Session, SessionOptions};
use super::common::wait::{TIMEOUT, poll_until};
use super::guest::{FrontEnd, Guest, Memory};
use super::{IMAGE_SECTORS, make_image};

/// Keys that are set, with their values.
const SETTINGS: [(&str, [&str; 2]); 6] = [
    ("cache.size", ["\"4M\"", "\"8M\""]),
    ("cache.mode", ["\"writeback\"", "\"writethrough\""]),
    ("cache.readahead_max", ["0", "\"2M\""]),
    ("cache.dirty_age_max_ms", ["100", "60000"]),
    ("cache.dirty_max_percent", ["5", "50"]),
    ("poll_us", ["0", "50"]),
];

/// Size of the image that the guest uses; an operator makes it longer, and cuts it to this size again.
const GUEST_BYTES: u64 = IMAGE_SECTORS * 512;

/// The operator, and what the daemon has answered.
struct Operator {
    control: PathBuf,
    image: PathBuf,
    other: PathBuf,
    attached: bool,
    /// By setting: the value.
    set: [Option<&'static str>; SETTINGS.len()],
    /// What the first sectors of the other disk hold.
    mark: u8,
    /// The size of the guest's image; `None`: a change of size was interrupted.
    image_bytes: Option<u64>,
}

impl Operator {
    #[track_caller]
    fn call(&self, method: &str, parameters: &Value) -> Value {
        let reply = call(&self.control, method, parameters);
        assert!(reply["error"].is_null(), "{method} {parameters}: {reply}");
        reply["parameters"].clone()
    }

    /// Makes the image longer, or cuts what is beyond the sectors that the guest uses.
    fn resize(&mut self, prng: &mut Prng) {
        let bytes = GUEST_BYTES + 4096 * prng.below(3) * prng.below(300);
        let parameters = json!({"device": "disk0", "bytes": bytes, "shrink": true});
        assert_eq!(self.call("Resize", &parameters)["image_bytes"], json!(bytes));
        self.image_bytes = Some(bytes);
        assert_eq!(fs::metadata(&self.image).expect("the image exists").len(), bytes);
    }

    /// Warms parts of the disk. Warming waits while the guest waits for pages, which may be always: the client hangs up
    /// after some reports.
    fn warm(&self, prng: &mut Prng) {
        let extents: Vec<Value> = (0..1 + prng.below(4))
            .map(|_| json!({"offset": prng.below(GUEST_BYTES / 2), "bytes": 1 + prng.below(GUEST_BYTES / 4)}))
            .collect();
        let parameters = json!({"device": "disk0", "extents": extents});
        let mut call = Call::start(&self.control, "Warm", &parameters, true);
        for _ in 0..prng.below(3) {
            let reply = call.reply();
            assert!(reply["error"].is_null(), "Warm {parameters}: {reply}");
            if reply["continues"] != json!(true) {
                return;
            }
        }
    }

    /// Asks what changes nothing.
    fn inspect(&self) {
        let resident = self.call("Resident", &json!({"device": "disk0"}));
        let extents = resident["extents"].as_array().expect("an array");
        let number = |extent: &Value, name: &str| extent[name].as_u64().expect("a number");
        let ends = extents.iter().map(|extent| number(extent, "offset") + number(extent, "bytes"));
        assert!(ends.max().unwrap_or(0) <= self.image_bytes.unwrap_or(u64::MAX), "{resident}");
        let watched = self.call("Watch", &json!({"since": 0}));
        let sequences = watched["events"].as_array().expect("an array").iter().map(|event| number(event, "sequence"));
        assert!(sequences.collect::<Vec<_>>().is_sorted_by(|one, other| one < other), "{watched}");
        self.call("Statistics", &json!({"device": "disk0"}));
        self.call("Describe", &json!({}));
        self.call("Reload", &json!({"dry_run": true}));
    }

    /// A change that is interrupted: its reply may be an error.
    fn begin_change(&mut self, prng: &mut Prng) -> impl FnOnce() + Send + use<> {
        let bytes = GUEST_BYTES + 4096 * prng.below(300);
        let (method, parameters) = match prng.below(5) {
            0 => ("Flush", json!({"device": "disk0"})),
            1 => ("Drop", json!({"device": "disk0", "flushed": true})),
            2 => ("Freeze", json!({"device": "disk0", "timeout_ms": 50})),
            3 => ("Warm", json!({"device": "disk0"})),
            _ => {
                self.image_bytes = None;
                ("Resize", json!({"device": "disk0", "bytes": bytes, "shrink": true}))
            }
        };
        let control = self.control.clone();
        let message = json!({"method": format!("io.genblk.Control.{method}"), "parameters": parameters}).to_string();
        move || {
            // Everything may fail: the daemon may die at any moment.
            if let Ok(mut stream) = std::os::unix::net::UnixStream::connect(&control) {
                let _ = stream.set_read_timeout(Some(TIMEOUT));
                let _ = stream.write_all(&[message.as_bytes(), &[0]].concat());
                let _ = BufReader::new(stream).read_until(0, &mut Vec::new());
            }
        }
    }

    /// Freezes the disk, and looks at its image twice.
    fn freeze(&self, pause: Duration) {
        self.call("Freeze", &json!({"device": "disk0", "timeout_ms": 60000}));
        let before = fs::read(&self.image).expect("the image can be read");
        thread::sleep(pause);
        assert!(fs::read(&self.image).expect("the image can be read") == before, "a frozen image has changed");
        assert_eq!(self.call("Thaw", &json!({"device": "disk0"}))["held"], json!(true));
    }

    fn set(&mut self, prng: &mut Prng) {
        let at = prng.below(SETTINGS.len() as u64) as usize;
        let (key, values) = SETTINGS[at];
        let value = values[prng.below(2) as usize];
        let config = json!({ key: serde_json::from_str::<Value>(value).expect("JSON") });
        self.call("Set", &json!({"device": "disk0", "config": config}));
        self.set[at] = Some(value);
    }

    /// Attaches the other disk, or uses and detaches it.
    fn attach_or_detach(&mut self, directory: &TempDir) {
        let socket = directory.path().join("other.sock");
        if self.attached {
            self.mark = self.mark.wrapping_add(1);
            let mut session = Session::open(&socket, &SessionOptions::default());
            session.write(0, &[self.mark; 4096]);
            drop(session);
            self.call("Detach", &json!({"device": "other", "force": true}));
            let image = fs::read(&self.other).expect("the image can be read");
            assert_eq!(image[..4096], [self.mark; 4096], "a detached image lacks a completed write");
        } else {
            let text = table(directory, "other", "other.img", "");
            let parsed: toml::Table = text.parse().expect("TOML");
            self.call("Attach", &json!({"config": parsed["device"][0]}));
            let mut session = Session::open(&socket, &SessionOptions::default());
            assert_eq!(session.read(0, 4096), [self.mark; 4096]);
        }
        self.attached = !self.attached;
    }

    /// Fails the test if the daemon serves anything else than it has answered.
    fn check(&self) {
        let expected: &[&str] = if self.attached { &["disk0", "other"] } else { &["disk0"] };
        poll_until("the disks that were served before", TIMEOUT, || {
            std::os::unix::net::UnixStream::connect(&self.control).ok()?;
            let listed = self.call("List", &json!({}));
            let devices = listed["devices"].as_array().expect("an array");
            let all_served = devices.iter().all(|device| device["state"] == json!("serving"));
            (names(&self.control) == expected && all_served).then_some(())
        });
        if let Some(bytes) = self.image_bytes {
            poll_until("the size of the image", TIMEOUT, || {
                let listed = self.call("List", &json!({"device": "disk0"}));
                (listed["devices"][0]["image_bytes"] == json!(bytes)).then_some(())
            });
        }
        let toml = self.call("Configuration", &json!({"device": "disk0"}))["toml"].clone();
        let toml = toml.as_str().expect("text");
        for ((key, _), value) in SETTINGS.iter().zip(self.set) {
            let Some(value) = value else { continue };
            let value = if value == "0" && key.ends_with("readahead_max") { "\"0\"" } else { value };
            assert!(toml.lines().any(|line| line == format!("{key} = {value}")), "{key} = {value} in\n{toml}");
        }
    }
}

/// Does something while the guest runs.
fn under_load<R: Send>(guest: &mut Guest, work: impl FnOnce() -> R + Send) -> R {
    thread::scope(|scope| {
        let working = scope.spawn(work);
        while !working.is_finished() {
            guest.run(Instant::now() + Duration::from_millis(5));
        }
        working.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn start(directory: TempDir, control: &Path) -> Daemon {
    make_image(&directory);
    fs::File::create(directory.path().join("other.img"))
        .and_then(|image| image.set_len(OTHER_BYTES))
        .expect("an image can be created");
    let memory = directory.memory();
    // Many kills in a minute are part of the test.
    let device = format!(
        "num_queues = 4\nrestart_burst = 1000\ncache.size = \"6M\"\ncache.memory_dir = {memory:?}\n[control]\n\
         socket = {control:?}"
    );
    Daemon::start_configured(directory, &[&device])
}

/// Kills the disk process. After many deaths the daemon waits before it starts the next one, unless it is resumed.
fn kill_process(guest: &mut Guest, operator: &Operator, daemon: &mut Daemon) {
    let of_disk = json!({"device": "disk0"});
    let killed = daemon.disk_process("disk0");
    send(killed, libc::SIGKILL);
    guest.reconnect(daemon, |_| {
        poll_until("the next process", TIMEOUT, || {
            operator.call("Resume", &of_disk);
            let disk = operator.call("List", &of_disk)["devices"][0].clone();
            (disk["state"] == json!("serving") && disk["pid"] != json!(killed)).then_some(())
        });
    });
}

/// One event.
fn event(guest: &mut Guest, operator: &mut Operator, daemon: &mut Daemon, prng: &mut Prng) {
    let pause = Duration::from_millis(prng.below(30));
    let of_disk = json!({"device": "disk0"});
    match prng.below(19) {
        0 => drop(under_load(guest, || operator.call("Flush", &of_disk))),
        1 => {
            let flushed = prng.below(2) == 0;
            under_load(guest, || operator.call("Drop", &json!({"device": "disk0", "flushed": flushed})));
        }
        2 | 3 => under_load(guest, || operator.freeze(pause)),
        4 => {
            // It may end at any moment, also while the thaw is on its way.
            let time_ms = 1 + pause.as_millis() as u64;
            under_load(guest, || {
                call(&operator.control, "Freeze", &json!({"device": "disk0", "timeout_ms": time_ms}));
                thread::sleep(pause);
                operator.call("Thaw", &of_disk);
            });
        }
        5 | 6 => under_load(guest, || operator.set(prng)),
        7 | 8 => under_load(guest, || operator.attach_or_detach(daemon.directory())),
        9 => drop(under_load(guest, || operator.call("Reload", &json!({})))),
        10 | 11 => under_load(guest, || operator.resize(prng)),
        12 => under_load(guest, || operator.warm(prng)),
        13 => under_load(guest, || operator.inspect()),
        14 => drop(under_load(guest, || operator.call("Resume", &of_disk))),
        15 | 16 => {
            guest.run(Instant::now() + pause);
            kill_process(guest, operator, daemon);
        }
        17 => {
            let changing = thread::spawn(operator.begin_change(prng));
            guest.run(Instant::now() + pause / 4);
            kill_process(guest, operator, daemon);
            while !changing.is_finished() {
                guest.run(Instant::now() + Duration::from_millis(5));
            }
        }
        _ => {
            let changing = (prng.below(2) == 0).then(|| thread::spawn(operator.begin_change(prng)));
            guest.run(Instant::now() + pause / 4);
            let signal = if prng.below(2) == 0 { libc::SIGKILL } else { libc::SIGUSR1 };
            daemon.signal(signal);
            guest.reconnect(daemon, |daemon| {
                daemon.wait();
                daemon.restart();
            });
            if let Some(changing) = changing {
                changing.join().expect("it ends");
            }
        }
    }
}

#[test]
fn random_changes_and_kills_under_load_lose_no_data() {
    let events = std::env::var("GENBLK_CHANGES").ok().and_then(|n| n.parse().ok()).unwrap_or(80);
    let seed = seed(25);
    let directory = TempDir::new("changes");
    let control = directory.path().join("control.sock");
    let mut daemon = start(directory, &control);
    let (image, other) = (daemon.image(), daemon.directory().path().join("other.img"));
    let image_bytes = Some(GUEST_BYTES);
    let set = [None; SETTINGS.len()];
    let mut operator = Operator { control, image, other, attached: false, set, mark: 0, image_bytes };
    operator.check();
    let mut guest = Guest::boot(FrontEnd::Qemu, &daemon, Memory::of_zeros(IMAGE_SECTORS), seed);
    let mut prng = Prng::new(seed);
    let begun = Instant::now();
    for number in 1..=events {
        event(&mut guest, &mut operator, &mut daemon, &mut prng);
        operator.check();
        if number % 1000 == 0 {
            println!("{number} events, {} requests, {:?}", guest.completed, begun.elapsed());
        }
    }
    guest.check_everything();
    guest.flush();
    guest.assert_image(&fs::read(&operator.image).expect("the image can be read"));
}
