//! Kills, upgrades, orderly ends, recoveries, backups and restores in random order, under load: whatever comes after
//! what, the guest finds what it wrote, and a restored image is never overwritten.
//!
//! On a host that lets all threads of a daemon wait for seconds, a write that was in flight at its death can change the
//! image long after its last heartbeat. The next daemon cannot distinguish that from a change by another process, and
//! refuses the cache. Then the test does what the operator does, who knows better: it runs the command in the message.
//!
//! `GENBLK_EVENTS` sets the number of events (`make soak`: 300).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use super::common::daemon::{Daemon, Ended, run_to_end, server_binary};
use super::common::prng::{Prng, seed};
use super::common::wait::{TIMEOUT, poll_until};
use super::guest::{FrontEnd, Guest, Memory};
use super::{IMAGE_BYTES, IMAGE_SECTORS, start};

const DEVICE: &str = "num_queues = 4\ncache.size = \"6M\"\ncache.dirty_age_max_ms = 200";

/// A little longer than a change of the image may be the last daemon's own, after its last heartbeat.
const IN_FLIGHT_SLACK: Duration = Duration::from_millis(2100);

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

fn genblk(arguments: &[&str]) -> Ended {
    run_to_end(Command::new(server_binary()).args(arguments))
}

fn run(program: &str, arguments: &[&str]) {
    let ended = run_to_end(Command::new(program).args(arguments));
    assert!(ended.status.success(), "{program} {arguments:?}: {ended:?}");
}

/// The refusal of a cache because of the time of the image's last modification, which may be that of a last write of
/// the daemon that died.
const MODIFIED_LATE: &str = "after the last heartbeat of the daemon, which died while it was writing";

/// Writes a cache that was refused to its image, by the command that the refusal names.
#[track_caller]
fn follow_way_out(refusal: &str) {
    assert!(refusal.contains(MODIFIED_LATE), "{refusal}");
    let (_, command) = refusal.split_once("overwrite the current image with the cache, run \"genblk ").expect(refusal);
    let (command, _) = command.split_once('"').expect("a quoted command");
    println!("a cache was refused: genblk {command}");
    let ended = genblk(&command.split(' ').collect::<Vec<_>>());
    assert!(ended.status.success(), "{ended:?}");
}

/// Starts the next daemon on an image that no other process has changed.
#[track_caller]
fn start_next(daemon: &mut Daemon) {
    if let Err(refusal) = daemon.try_restart() {
        follow_way_out(&refusal);
        daemon.restart();
    }
}

/// The world outside the guest.
struct Host {
    daemon: Daemon,
    prng: Prng,
    /// The copy of the image in a file, with what the guest knew of its disk then.
    backup: Option<Memory>,
}

impl Host {
    fn backup_path(&self) -> PathBuf {
        self.daemon.directory().path().join("backup")
    }

    /// The caches that a daemon has left.
    fn caches(&self) -> Vec<PathBuf> {
        let is_cache = |path: &PathBuf| path.file_name().is_some_and(|name| !name.to_string_lossy().starts_with('.'));
        self.daemon.directory().left().into_iter().filter(is_cache).collect()
    }

    /// Ends the daemon under load. The guest goes on with the next one, which starts after `between`.
    fn replace(&mut self, guest: &mut Guest, signal: i32, between: impl FnOnce(&mut Daemon)) {
        guest.run(Instant::now() + Duration::from_micros(self.prng.below(120_000)));
        self.daemon.signal(signal);
        guest.reconnect(&mut self.daemon, |daemon| {
            let status = daemon.wait();
            assert_eq!(status.success(), signal != libc::SIGKILL, "{}", daemon.log());
            between(daemon);
            start_next(daemon);
        });
        guest.check_everything();
    }

    /// The operator writes the cache of a killed daemon to its image.
    fn recover(&mut self, guest: &mut Guest) {
        self.replace(guest, libc::SIGKILL, |daemon| {
            let left = daemon.directory().left();
            for cache in left.iter().filter(|path| !text(path).contains("/.")) {
                // The kernel keeps the lock of a daemon that was killed until it has finished that daemon's I/O.
                let ended = poll_until("the image's lock", TIMEOUT, || {
                    let ended = genblk(&["recover", text(cache)]);
                    (!ended.stderr.contains(" is in use: ")).then_some(ended)
                });
                if !ended.status.success() {
                    follow_way_out(&ended.stderr);
                }
            }
        });
    }

    /// Somebody prunes caches while the image has another name.
    fn rename_and_prune(&mut self, guest: &mut Guest) {
        self.replace(guest, libc::SIGKILL, |daemon| {
            let (image, other) = (daemon.image(), daemon.image().with_extension("renamed"));
            fs::rename(&image, &other).expect("the image can be renamed");
            let ended = genblk(&["recover", "--prune", "--memory-dir", text(&daemon.directory().memory())]);
            assert!(ended.status.success(), "{ended:?}");
            fs::rename(&other, &image).expect("the image can be renamed back");
        });
    }

    /// The guest is shut down, the image is copied, the guest starts again.
    fn back_up(&mut self, guest: Guest, seed: u64) -> Guest {
        let memory = guest.shut_down();
        self.daemon.stop();
        fs::copy(self.daemon.image(), self.backup_path()).expect("the image can be copied");
        self.backup = Some(memory.clone());
        self.daemon.restart();
        Guest::boot(FrontEnd::Qemu, &self.daemon, memory, seed)
    }

    /// The daemon ends under load, and the backup is copied over its image. If its cache holds completed writes, the
    /// next daemon refuses to start until the operator has decided. Then the guest starts with the old disk.
    fn restore(&mut self, mut guest: Guest, mut memory: Memory, seed: u64) -> Guest {
        let signal = if self.prng.below(2) == 0 { libc::SIGKILL } else { libc::SIGUSR1 };
        guest.run(Instant::now() + Duration::from_micros(self.prng.below(120_000)));
        self.daemon.signal(signal);
        let _ = self.daemon.wait();
        Guest::continue_marks_of(&mut memory, &guest);
        drop(guest);
        let (image, backup) = (self.daemon.image(), self.backup_path());
        // Right after a kill, and with the times of a backup, the image's times may be those of the daemon's last
        // writes. Then only pages tell, and a backup may differ from the image in none that the cache knows.
        let is_late = self.prng.below(2) == 0;
        if is_late {
            thread::sleep(IN_FLIGHT_SLACK);
        }
        let kind = self.prng.below(3);
        match kind {
            0 => run("cp", &[text(&backup), text(&image)]),
            1 => {
                let (from, to) = (format!("if={}", text(&backup)), format!("of={}", text(&image)));
                run("dd", &[&from, &to, "bs=1M", "conv=notrunc,fsync", "status=none"]);
            }
            _ => run("cp", &["--preserve=timestamps", text(&backup), text(&image)]),
        }
        let restored = fs::read(&image).expect("the image can be read");
        if self.dirty_pages() > 0 {
            if is_late && kind < 2 {
                self.assert_refused(&image, &restored);
            }
            let memory_dir = self.daemon.directory().memory();
            if self.prng.below(2) == 0 {
                let ended = genblk(&["take-over", text(&image), "--memory-dir", text(&memory_dir)]);
                assert!(ended.status.success(), "{ended:?}");
            }
            for cache in self.caches() {
                let ended = genblk(&["recover", "--discard", "--force", text(&cache)]);
                assert!(ended.status.success(), "{ended:?}");
            }
        }
        self.daemon.restart();
        let mut guest = Guest::boot(FrontEnd::Qemu, &self.daemon, memory, seed);
        guest.check_everything();
        guest
    }

    /// The next daemon refuses the restored image, and leaves it alone.
    fn assert_refused(&self, image: &Path, restored: &[u8]) {
        let ended = run_to_end(Command::new(server_binary()).arg("--config").arg(self.daemon.config()));
        assert_eq!(ended.status.code(), Some(1), "a stale cache is used: {ended:?}");
        assert!(fs::read(image).expect("the image can be read") == restored, "the restored image is unchanged");
    }

    /// Dirty pages and ranges to be zeroed of the caches that were left.
    fn dirty_pages(&self) -> u64 {
        let listed = genblk(&["recover", "--memory-dir", text(&self.daemon.directory().memory())]);
        let rows = listed.stdout.lines().filter(|line| line.starts_with('/'));
        let dirty = rows.map(|row| {
            let cells: Vec<&str> = row.split("  ").map(str::trim).filter(|cell| !cell.is_empty()).collect();
            let zeroes = cells.last().is_some_and(|state| state.contains("to be zeroed"));
            cells[3].parse().unwrap_or(0) + u64::from(zeroes)
        });
        dirty.sum()
    }
}

#[test]
fn random_kills_upgrades_and_restores_lose_no_data() {
    let events = std::env::var("GENBLK_EVENTS").ok().and_then(|n| n.parse().ok()).unwrap_or(20);
    let seed = seed(229);
    let mut host = Host { daemon: start(DEVICE), prng: Prng::new(seed), backup: None };
    let mut guest = Guest::boot(FrontEnd::Qemu, &host.daemon, Memory::of_zeros(IMAGE_SECTORS), seed);
    for event in 0..events {
        match host.prng.below(12) {
            0..3 => host.replace(&mut guest, libc::SIGKILL, |_| {}),
            3..5 => host.replace(&mut guest, libc::SIGUSR1, |_| {}),
            5 => host.replace(&mut guest, libc::SIGTERM, |_| {}),
            6 => host.recover(&mut guest),
            7 => host.rename_and_prune(&mut guest),
            8 => guest = host.back_up(guest, seed + event),
            _ => match host.backup.clone() {
                Some(memory) => guest = host.restore(guest, memory, seed + event),
                None => guest = host.back_up(guest, seed + event),
            },
        }
    }
    let memory = guest.shut_down();
    host.daemon.stop();
    assert!(host.caches().is_empty(), "an orderly end leaves no cache in memory");
    host.daemon.restart();
    let guest = Guest::boot(FrontEnd::Qemu, &host.daemon, memory, seed);
    guest.assert_image(&host.daemon.image_bytes(0, IMAGE_BYTES as usize));
}
