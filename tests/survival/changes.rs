//! An operator's changes in random order while a guest uses the disk, with kills between: the guest finds what it
//! wrote, a frozen image does not change, and after each kill the daemon serves what it had answered.
//!
//! `GENBLK_EVENTS` sets the number of events (`make soak`: 300).

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::common::daemon::{Daemon, TempDir, send};
use super::common::operator::{IMAGE_BYTES as OTHER_BYTES, call, names, table};
use super::common::prng::{Prng, seed};
use super::common::session::{Session, SessionOptions};
use super::common::wait::{PATIENCE, poll_until};
use super::guest::{FrontEnd, Guest, Memory};
use super::{IMAGE_SECTORS, make_image};

/// Keys that are set, with their values.
const SETTINGS: [(&str, [&str; 2]); 5] = [
    ("cache.mode", ["\"writeback\"", "\"writethrough\""]),
    ("cache.readahead_max", ["0", "\"2M\""]),
    ("cache.dirty_age_max_ms", ["100", "60000"]),
    ("cache.dirty_max_percent", ["5", "50"]),
    ("poll_us", ["0", "50"]),
];

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
}

impl Operator {
    #[track_caller]
    fn call(&self, method: &str, parameters: &Value) -> Value {
        let reply = call(&self.control, method, parameters);
        assert!(reply["error"].is_null(), "{method} {parameters}: {reply}");
        reply["parameters"].clone()
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
        poll_until("the disks that were served before", PATIENCE, || {
            std::os::unix::net::UnixStream::connect(&self.control).ok()?;
            let listed = self.call("List", &json!({}));
            let devices = listed["devices"].as_array().expect("an array");
            let all_served = devices.iter().all(|device| device["state"] == json!("serving"));
            (names(&self.control) == expected && all_served).then_some(())
        });
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
    let device =
        format!("num_queues = 4\ncache.size = \"6M\"\ncache.memory_dir = {memory:?}\n[control]\nsocket = {control:?}");
    Daemon::start_configured(directory, &[&device])
}

#[test]
fn changes_in_random_order_under_load_lose_nothing_and_outlive_kills() {
    let events = std::env::var("GENBLK_EVENTS").ok().and_then(|n| n.parse().ok()).unwrap_or(60);
    let seed = seed(25);
    let directory = TempDir::new("changes");
    let control = directory.path().join("control.sock");
    let mut daemon = start(directory, &control);
    let (image, other) = (daemon.image(), daemon.directory().path().join("other.img"));
    let mut operator = Operator { control, image, other, attached: false, set: [None; SETTINGS.len()], mark: 0 };
    operator.check();
    let mut guest = Guest::boot(FrontEnd::Qemu, &daemon, Memory::of_zeros(IMAGE_SECTORS), seed);
    let mut prng = Prng::new(seed);
    for _ in 0..events {
        let pause = Duration::from_millis(prng.below(30));
        match prng.below(12) {
            0 => drop(under_load(&mut guest, || operator.call("Flush", &json!({"device": "disk0"})))),
            1 => {
                let flushed = prng.below(2) == 0;
                under_load(&mut guest, || operator.call("Drop", &json!({"device": "disk0", "flushed": flushed})));
            }
            2 | 3 => under_load(&mut guest, || operator.freeze(pause)),
            4 => {
                // It may end at any moment, also while the thaw is on its way.
                let time_ms = 1 + pause.as_millis() as u64;
                under_load(&mut guest, || {
                    call(&operator.control, "Freeze", &json!({"device": "disk0", "timeout_ms": time_ms}));
                    thread::sleep(pause);
                    operator.call("Thaw", &json!({"device": "disk0"}));
                });
            }
            5 | 6 => under_load(&mut guest, || operator.set(&mut prng)),
            7 | 8 => under_load(&mut guest, || operator.attach_or_detach(daemon.directory())),
            9 => drop(under_load(&mut guest, || operator.call("Reload", &json!({})))),
            10 => {
                guest.run(Instant::now() + pause);
                send(daemon.disk_process("disk0"), libc::SIGKILL);
                guest.reconnect(&mut daemon, |_| {});
            }
            _ => {
                guest.run(Instant::now() + pause);
                let signal = if prng.below(2) == 0 { libc::SIGKILL } else { libc::SIGUSR1 };
                daemon.signal(signal);
                guest.reconnect(&mut daemon, |daemon| {
                    daemon.wait();
                    daemon.restart();
                });
            }
        }
        operator.check();
    }
    guest.check_everything();
    guest.flush();
    guest.assert_image(&fs::read(&operator.image).expect("the image can be read"));
}
