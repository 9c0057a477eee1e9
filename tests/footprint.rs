//! What disk processes cost: the start of many disks, the memory of each, and the pause when one with a large cache
//! dies. The limits are those of a debug build on a loaded machine; with `GENBLK_STRICT=1` they are what genblk
//! promises.

#[path = "common/mod.rs"]
mod common;

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use common::daemon::{Daemon, TempDir, send, server_binary};
use common::request::pattern;
use common::session::{Session, SessionOptions};
use common::wait::{TIMEOUT, poll_until};

/// Starts a daemon with `count` disks, each with a sparse image of `image_bytes`. Returns how long it took until all
/// of them were served.
fn start(name: &str, count: usize, image_bytes: u64, cache: &str) -> (Daemon, Duration) {
    let directory = TempDir::new(name);
    let paths = directory.path().to_path_buf();
    let mut text = String::new();
    for disk in 0..count {
        let (image, socket) = (paths.join(format!("image{disk}")), paths.join(format!("d{disk}.sock")));
        fs::File::create(&image).and_then(|file| file.set_len(image_bytes)).expect("an image can be created");
        text += &format!(
            "[[device]]\nname = \"d{disk}\"\nsocket = {socket:?}\nimage = {image:?}\ncache.size = \"{cache}\"\n\
             cache.memory_dir = {:?}\ncache.dirty_age_max_ms = 600000\n",
            directory.memory()
        );
    }
    let config = paths.join("genblk.toml");
    fs::write(&config, text).expect("a configuration can be written");
    let mut command = Command::new(server_binary());
    command.arg("--config").arg(config);
    let sockets = (0..count).map(|disk| paths.join(format!("d{disk}.sock"))).collect();
    let begun = Instant::now();
    (Daemon::launch(directory, command, sockets), begun.elapsed())
}

/// `promised` with `GENBLK_STRICT=1`, otherwise `factor` times as much.
fn limit(promised: Duration, factor: u32) -> Duration {
    if std::env::var_os("GENBLK_STRICT").is_some() { promised } else { promised * factor }
}

/// Anonymous memory of a process in KiB: its own, without its cache, its statistics and the guest's memory.
fn own_kib(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the process runs");
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("Linux reports it");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

#[test]
fn forty_disks_start_within_seconds_with_6_mib_of_own_memory_each() {
    let (mut daemon, started) = start("many", 40, 8 << 20, "4M");
    let mut session = Session::open(&daemon.socket_of(39), &SessionOptions::default());
    session.write(8, &pattern(1, 8, 4096));
    let own: Vec<u64> = daemon.disk_processes().into_iter().map(own_kib).collect();
    let most = own.iter().max().copied();
    println!("40 disks start in {started:?}; own memory of a disk process: at most {most:?} KiB");
    assert_eq!(own.len(), 40);
    assert!(most <= Some(6 << 10), "{own:?} KiB");
    assert!(started <= limit(Duration::from_secs(2), 10), "{started:?}");
    drop(session);
    daemon.stop();
}

/// From the kill to the first request that completes.
#[test]
fn a_disk_process_with_1_gib_of_cache_is_replaced_within_a_short_pause() {
    const CHUNK: usize = 4 << 20;
    let (mut daemon, _) = start("large", 1, 1 << 30, "1G");
    let mut session = Session::open(&daemon.socket_of(0), &SessionOptions::default());
    for chunk in 0..48 {
        let sector = chunk * (CHUNK as u64 / 512);
        session.write(sector, &pattern(1, sector, CHUNK));
        session.memory.free_all_in(1);
    }
    let process = daemon.disk_process("d0");
    let begun = Instant::now();
    send(process, libc::SIGKILL);
    poll_until("the process to end", TIMEOUT, || (!daemon.disk_processes().contains(&process)).then_some(()));
    let mut session = session.reconnect(&daemon.socket_of(0));
    session.start_ring(0);
    let first = session.read(0, 4096);
    let pause = begun.elapsed();
    println!("the pause with 1 GiB of cache, of which 192 MiB are dirty: {pause:?}");
    assert!(first == pattern(1, 0, 4096));
    assert!(pause <= limit(Duration::from_millis(100), 50), "{pause:?}");
    drop(session);
    daemon.stop();
}
