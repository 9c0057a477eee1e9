//! The size of a cache changes while a guest uses the disk: its memory follows, and no completed write is lost.

#[path = "common/mod.rs"]
mod common;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use common::daemon::{Daemon, send};
use common::operator::{Call, IMAGE_BYTES, call, genblk, start, start_prepared, stdout_of, table};
use common::prng::{Prng, seed};
use common::session::{Session, SessionOptions};
use common::wait::{TIMEOUT, poll_until};

const PAGES: u64 = IMAGE_BYTES / 4096;
const MIB: u64 = 1 << 20;

/// Bytes of memory that the files of caches take.
fn cache_bytes(daemon: &Daemon) -> u64 {
    let folders = fs::read_dir(daemon.directory().memory()).expect("it exists").flatten();
    let files = folders.flat_map(|folder| fs::read_dir(folder.path()).into_iter().flatten().flatten());
    files.filter_map(|file| file.metadata().ok()).map(|metadata| metadata.blocks() * 512).sum()
}

/// Waits until the memory of the cache is that of this size, of its ledger, and of the rest of a huge page that the
/// kernel could not split.
#[track_caller]
fn await_memory(daemon: &Daemon, mib: u64) {
    let expected = mib * MIB..mib * MIB + 2 * MIB + MIB / 4;
    poll_until(&format!("{mib} MiB of memory, not {}", cache_bytes(daemon)), TIMEOUT, || {
        expected.contains(&cache_bytes(daemon)).then_some(())
    });
}

/// Memory for the buffers of many requests.
fn options() -> SessionOptions {
    SessionOptions { region_bytes: 1 << 30, ..SessionOptions::default() }
}

fn set_size(control: &Path, size: &str) -> Output {
    genblk(control, &["set", "d0", &format!("cache.size={size}")])
}

/// The guest's writes: a number for each page.
struct Contents {
    numbers: Vec<u64>,
    prng: Prng,
}

impl Contents {
    fn new() -> Self {
        Self { numbers: vec![0; usize::try_from(PAGES).expect("few")], prng: Prng::new(seed(7)) }
    }

    fn bytes(number: u64) -> Vec<u8> {
        number.to_le_bytes().repeat(512)
    }

    /// Writes a random page, or reads it and checks its contents.
    fn step(&mut self, session: &mut Session) {
        let page = self.prng.below(PAGES);
        let index = usize::try_from(page).expect("few");
        if self.prng.percent(40) {
            self.numbers[index] = self.prng.next_u64();
            session.write(page * 8, &Self::bytes(self.numbers[index]));
        } else {
            assert!(session.read(page * 8, 4096) == Self::bytes(self.numbers[index]), "page {page}");
        }
        if self.prng.percent(1) {
            session.flush();
        }
    }

    fn check_all(&self, session: &mut Session) {
        for (page, number) in (0..).zip(&self.numbers) {
            assert!(session.read(page * 8, 4096) == Self::bytes(*number), "page {page}");
        }
    }
}

#[test]
fn memory_use_follows_a_cache_that_is_resized_under_load() {
    let (mut daemon, control) = start("size-load");
    let mut session = Session::open(&daemon.socket_of(0), &options());
    let mut contents = Contents::new();
    await_memory(&daemon, 4);
    for mib in [16, 5, 12, 4, 16, 4, 8] {
        let change = thread::spawn({
            let control = control.clone();
            move || set_size(&control, &format!("{mib}M"))
        });
        while !change.is_finished() {
            contents.step(&mut session);
        }
        assert_eq!(stdout_of(&change.join().expect("it ends")), "d0: set cache.size\n");
        (0..500).for_each(|_| contents.step(&mut session));
        await_memory(&daemon, mib);
    }
    let shown = stdout_of(&genblk(&control, &["list"]));
    assert!(shown.contains("8.0M"), "{shown}");
    contents.check_all(&mut session);
    session.flush();
    drop(session);
    daemon.stop();
    for (page, number) in (0..).zip(&contents.numbers) {
        assert!(daemon.image_bytes(page * 4096, 4096) == Contents::bytes(*number), "page {page} of the image");
    }
}

#[test]
fn kills_during_resizes_of_the_cache_lose_no_data() {
    let (mut daemon, control) = start("size-kills");
    let mut session = Session::open(&daemon.socket_of(0), &options());
    let mut contents = Contents::new();
    for round in 0..12_u64 {
        let mib = [16, 4, 9, 5][usize::try_from(round % 4).expect("few")];
        let change = thread::spawn({
            let control = control.clone();
            move || set_size(&control, &format!("{mib}M"))
        });
        (0..contents.prng.below(400)).for_each(|_| contents.step(&mut session));
        if round % 3 == 0 {
            send(daemon.disk_process("d0"), libc::SIGKILL);
        } else {
            daemon.kill();
            daemon.restart();
        }
        // It was killed before, during or after the change.
        let _ = change.join().expect("it ends");
        session = session.reconnect(&daemon.socket_of(0));
        session.start_ring(0);
        contents.check_all(&mut session);
    }
    poll_until("the control socket", TIMEOUT, || set_size(&control, "4M").status.success().then_some(()));
    await_memory(&daemon, 4);
    contents.check_all(&mut session);
}

#[test]
fn a_changed_cache_size_survives_a_crash() {
    let (mut daemon, control) = start("size-recover");
    let mut session = Session::open(&daemon.socket_of(0), &options());
    stdout_of(&set_size(&control, "16M"));
    for page in 0..PAGES / 4 {
        session.write(page * 8, &Contents::bytes(page + 1));
    }
    stdout_of(&set_size(&control, "4M"));
    daemon.kill();
    daemon.restart();
    poll_until("the control socket", TIMEOUT, || genblk(&control, &["list"]).status.success().then_some(()));
    let config = stdout_of(&genblk(&control, &["config", "d0"]));
    assert!(config.contains("cache.size = \"4M\""), "{config}");
    await_memory(&daemon, 4);
    stdout_of(&set_size(&control, "12M"));
    daemon.kill();
    drop(session);
    let memory = daemon.directory().memory();
    let recovered = genblk(&control, &["recover", "--memory-dir", &memory.display().to_string()]);
    assert!(recovered.status.success(), "{recovered:?}");
    for page in 0..PAGES / 4 {
        assert!(daemon.image_bytes(page * 4096, 4096) == Contents::bytes(page + 1), "page {page} of the image");
    }
}

/// A ring keeps the cache's memory pinned, as far as the limit on pinned memory allows.
#[test]
fn reallocated_cache_memory_is_not_read_through_stale_pins() {
    let (daemon, control) = start("size-pinned");
    let directory = daemon.directory();
    fs::copy(daemon.image(), directory.path().join("d1.img")).expect("an image can be made");
    let file = directory.path().join("d1.toml");
    let text = table(directory, "d1", "d1.img", "").replace("\"4M\"", "\"6M\"");
    fs::write(&file, text).expect("a file can be written");
    stdout_of(&genblk(&control, &["attach", &file.display().to_string()]));
    let mut session = Session::open(&directory.path().join("d1.sock"), &options());
    let mut contents = Contents::new();
    for size in ["6M", "4M", "6M", "4M", "6M"] {
        stdout_of(&genblk(&control, &["set", "d1", &format!("cache.size={size}")]));
        let bytes = 4 * MIB + if size == "6M" { 6 * MIB } else { 4 * MIB };
        poll_until(size, TIMEOUT, || (bytes..bytes + 4 * MIB + MIB / 2).contains(&cache_bytes(&daemon)).then_some(()));
        (0..3000).for_each(|_| contents.step(&mut session));
        contents.check_all(&mut session);
    }
}

#[test]
fn a_refused_cache_size_changes_nothing() {
    let (daemon, control) = start("size-refused");
    let _session = Session::open(&daemon.socket_of(0), &options());
    let refused = set_size(&control, "17M");
    let message = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && message.contains("cache.size_max"), "{message}");
    let huge = genblk(&control, &["set", "d0", "cache.size=8T"]);
    let message = String::from_utf8_lossy(&huge.stderr).into_owned();
    assert!(!huge.status.success() && message.contains("available"), "{message}");
    let max = genblk(&control, &["set", "d0", "cache.size_max=64M"]);
    let text = String::from_utf8_lossy(&max.stderr);
    assert!(text.contains("cache.size_max"), "it takes effect after detach and attach: {max:?}");
    let config = stdout_of(&genblk(&control, &["config", "d0"]));
    assert!(config.contains("cache.size = \"4M\""), "{config}");
    await_memory(&daemon, 4);
}

/// Otherwise no later process of the disk could start.
#[test]
fn a_cache_size_is_checked_while_the_disk_has_no_process() {
    let (daemon, control) = start_prepared("size-dead", |_, directory| {
        let config = directory.join("genblk.toml");
        let text = fs::read_to_string(&config).expect("it was written") + "restart_burst = 0\n";
        fs::write(config, text).expect("it can be written");
    });
    let mut session = Session::open(&daemon.socket_of(0), &options());
    session.write(0, &Contents::bytes(7));
    send(daemon.disk_process("d0"), libc::SIGKILL);
    daemon.await_log("restart it with \"genblk resume d0\"");
    for (size, why) in [("17M", "cache.size_max"), ("8T", "available")] {
        let refused = set_size(&control, size);
        let message = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(!refused.status.success() && message.contains(why), "{message}");
    }
    stdout_of(&set_size(&control, "12M"));
    stdout_of(&genblk(&control, &["resume", "d0"]));
    session = session.reconnect(&daemon.socket_of(0));
    session.start_ring(0);
    assert!(session.read(0, 4096) == Contents::bytes(7));
    await_memory(&daemon, 12);
}

/// A host whose tasks wait for memory half of the time, while that is wanted: a file of PSI, which the daemon reads in
/// place of the kernel's. Its time is ten times as fast.
struct MemoryPressure {
    is_high: Arc<AtomicBool>,
    ends: Arc<AtomicBool>,
    writer: Option<thread::JoinHandle<()>>,
}

impl MemoryPressure {
    /// Starts with none. The directory of the file exists.
    fn start(file: PathBuf) -> Self {
        let (is_high, ends) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let flags = (Arc::clone(&is_high), Arc::clone(&ends));
        let mut total = Duration::ZERO;
        let mut write = move || {
            let text = format!("some avg10=0.00 avg60=0.00 avg300=0.00 total={}\n", total.as_micros());
            // A reader finds a whole file.
            let aside = file.with_extension("new");
            fs::write(&aside, text).and_then(|()| fs::rename(&aside, &file)).expect("a file can be written");
            let begun = Instant::now();
            thread::sleep(Duration::from_millis(5));
            if flags.0.load(Ordering::Relaxed) {
                total += begun.elapsed() * 5;
            }
            !flags.1.load(Ordering::Relaxed)
        };
        write();
        Self { is_high, ends, writer: Some(thread::spawn(move || while write() {})) }
    }

    fn set(&self, is_high: bool) {
        self.is_high.store(is_high, Ordering::Relaxed);
    }
}

impl Drop for MemoryPressure {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
    }
}

/// The sizes of the cache: configured, wanted and present, in MiB.
fn sizes(control: &Path) -> [u64; 3] {
    let listed = call(control, "List", &json!({}));
    let device = &listed["parameters"]["devices"][0];
    let sizes = ["cache_bytes", "cache_wanted_bytes", "cache_present_bytes"];
    sizes.map(|name| device[name].as_u64().unwrap_or_default() / MIB)
}

fn pressed(name: &str) -> (Daemon, PathBuf, MemoryPressure) {
    let mut pressure = None;
    let (daemon, control) = start_prepared(name, |command, directory| {
        let file = directory.join("pressure");
        pressure = Some(MemoryPressure::start(file.clone()));
        command.env("GENBLK_TEST_PRESSURE", file);
    });
    stdout_of(&genblk(&control, &["set", "d0", "cache.size=16M", "cache.size_min=4M"]));
    (daemon, control, pressure.expect("it was started"))
}

/// Uses the disk until the cache has these sizes.
#[track_caller]
fn use_until(contents: &mut Contents, session: &mut Session, control: &Path, expected: [u64; 3]) {
    poll_until(&format!("sizes of {expected:?}, not {:?}", sizes(control)), TIMEOUT, || {
        (0..50).for_each(|_| contents.step(session));
        (sizes(control) == expected).then_some(())
    });
}

/// Kinds of events of the daemon itself.
fn events(control: &Path) -> Vec<String> {
    let watched = Call::start(control, "Watch", &json!({"since": 0}), false).reply();
    let events = watched["parameters"]["events"].as_array().expect("an array").clone();
    events.iter().filter_map(|event| event["kind"].as_str().map(ToOwned::to_owned)).collect()
}

#[test]
fn a_cache_shrinks_under_memory_pressure_and_grows_back() {
    if !cfg!(debug_assertions) {
        return eprintln!("skipped: a released daemon takes indicators of memory pressure from the kernel alone");
    }
    let (mut daemon, control, pressure) = pressed("size-pressure");
    let mut session = Session::open(&daemon.socket_of(0), &options());
    let mut contents = Contents::new();
    use_until(&mut contents, &mut session, &control, [16, 16, 16]);
    pressure.set(true);
    use_until(&mut contents, &mut session, &control, [16, 4, 4]);
    await_memory(&daemon, 4);
    let shown = stdout_of(&genblk(&control, &["list"]));
    assert!(shown.contains("memory pressure: its cache is reduced to 4.0M for now"), "{shown}");
    // What the operator changes meanwhile does not give it its size again.
    stdout_of(&genblk(&control, &["set", "d0", "poll_us=0"]));
    // Nor does the death of its process.
    send(daemon.disk_process("d0"), libc::SIGKILL);
    session = session.reconnect(&daemon.socket_of(0));
    session.start_ring(0);
    use_until(&mut contents, &mut session, &control, [16, 4, 4]);
    contents.check_all(&mut session);
    assert!(daemon.log().contains("memory pressure: tasks wait for memory"), "{}", daemon.log());
    pressure.set(false);
    use_until(&mut contents, &mut session, &control, [16, 16, 16]);
    await_memory(&daemon, 16);
    daemon.await_log("memory pressure has ended");
    let events = events(&control);
    let of_pressure: Vec<_> = events.iter().filter(|kind| kind.starts_with("memory_pressure")).collect();
    assert_eq!(of_pressure, ["memory_pressure_began", "memory_pressure_ended"]);
    contents.check_all(&mut session);
    session.flush();
    drop(session);
    daemon.stop();
    for (page, number) in (0..).zip(&contents.numbers) {
        assert!(daemon.image_bytes(page * 4096, 4096) == Contents::bytes(*number), "page {page} of the image");
    }
}

#[test]
fn kills_during_resizes_by_memory_pressure_lose_no_data() {
    if !cfg!(debug_assertions) {
        return eprintln!("skipped: as above");
    }
    let (mut daemon, control, pressure) = pressed("size-pressure-kills");
    let mut session = Session::open(&daemon.socket_of(0), &options());
    let mut contents = Contents::new();
    for round in 0..8 {
        pressure.set(round % 2 == 0);
        let steps = contents.prng.below(2000);
        (0..steps).for_each(|_| contents.step(&mut session));
        if round % 3 == 0 {
            send(daemon.disk_process("d0"), libc::SIGKILL);
        } else {
            daemon.kill();
            daemon.restart();
        }
        session = session.reconnect(&daemon.socket_of(0));
        session.start_ring(0);
        contents.check_all(&mut session);
    }
    pressure.set(false);
    poll_until("the control socket", TIMEOUT, || genblk(&control, &["list"]).status.success().then_some(()));
    use_until(&mut contents, &mut session, &control, [16, 16, 16]);
    contents.check_all(&mut session);
}

#[test]
fn a_daemon_short_of_memory_serves_with_the_smaller_leftover_cache() {
    let (mut daemon, control) = start("size-short");
    let config = daemon.directory().path().join("genblk.toml");
    let text = fs::read_to_string(&config).expect("it was written");
    let write = |size: &str, more: &str| {
        let sizes = format!("cache.size = \"{size}\"\n{more}");
        fs::write(&config, text.replace("cache.size = \"4M\"\n", &sizes)).expect("it can be written");
    };
    for more in ["cache.size_max = \"1T\"\ncache.size_min = \"4M\"\n", "cache.size_max = \"1T\"\n", ""] {
        write("4M", more);
        daemon.stop();
        daemon.restart();
        let mut session = Session::open(&daemon.socket_of(0), &options());
        session.write(0, &Contents::bytes(7));
        daemon.kill();
        // No host that runs this has as much.
        write("1T", more);
        daemon.restart();
        session = session.reconnect(&daemon.socket_of(0));
        session.start_ring(0);
        assert!(session.read(0, 4096) == Contents::bytes(7), "{more}");
        poll_until("the control socket", TIMEOUT, || genblk(&control, &["list"]).status.success().then_some(()));
        poll_until(more, TIMEOUT, || (sizes(&control) == [1 << 20, 4, 4]).then_some(()));
        await_memory(&daemon, 4);
        // It gets its size as soon as there is memory for that.
        stdout_of(&set_size(&control, "6M"));
        poll_until(more, TIMEOUT, || (sizes(&control) == [6, 6, 6]).then_some(()));
        stdout_of(&set_size(&control, "4M"));
    }
}
