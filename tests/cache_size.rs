//! The size of a cache changes while a guest uses the disk: its memory follows, and no completed write is lost.

#[path = "common/mod.rs"]
mod common;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Output;
use std::thread;

use common::daemon::{Daemon, send};
use common::operator::{IMAGE_BYTES, genblk, start, stdout_of, table};
use common::prng::{Prng, seed};
use common::session::{Session, SessionOptions};
use common::wait::{PATIENCE, poll_until};

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
    poll_until(&format!("{mib} MiB of memory, not {}", cache_bytes(daemon)), PATIENCE, || {
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

/// What the guest has written: a number for each page.
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

    /// Writes a random page, or reads it and checks what it has.
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
fn a_cache_grows_and_shrinks_under_load_and_its_memory_follows() {
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
fn kills_in_the_middle_of_changes_of_size_lose_nothing() {
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
    poll_until("the control socket", PATIENCE, || set_size(&control, "4M").status.success().then_some(()));
    await_memory(&daemon, 4);
    contents.check_all(&mut session);
}

#[test]
fn a_size_that_was_set_outlives_a_crash_and_what_recover_finds_is_whole() {
    let (mut daemon, control) = start("size-recover");
    let mut session = Session::open(&daemon.socket_of(0), &options());
    stdout_of(&set_size(&control, "16M"));
    for page in 0..PAGES / 4 {
        session.write(page * 8, &Contents::bytes(page + 1));
    }
    stdout_of(&set_size(&control, "4M"));
    daemon.kill();
    daemon.restart();
    poll_until("the control socket", PATIENCE, || genblk(&control, &["list"]).status.success().then_some(()));
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
fn memory_that_comes_back_is_not_what_a_ring_had_pinned() {
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
        poll_until(size, PATIENCE, || (bytes..bytes + 4 * MIB + MIB / 2).contains(&cache_bytes(&daemon)).then_some(()));
        (0..3000).for_each(|_| contents.step(&mut session));
        contents.check_all(&mut session);
    }
}

#[test]
fn a_size_that_is_too_large_is_refused_and_changes_nothing() {
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
