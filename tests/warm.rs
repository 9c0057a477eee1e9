//! A disk that was stopped cleanly is warm again soon after its next start, and one that is warmed by a list at once.

#[path = "common/mod.rs"]
mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;

use common::daemon::{Daemon, TempDir, server_binary};
use common::operator::{Call, call, genblk, stdout_of, table};
use common::prng::Prng;
use common::session::{Session, SessionOptions};
use common::wait::{TIMEOUT, poll_until};

const IMAGE_BYTES: usize = 8 << 20;
/// What the guest uses: of a cache of 4 MiB.
const HOT_BYTES: usize = 2 << 20;
const READ_BYTES: usize = 64 << 10;

fn byte_of(offset: usize) -> u8 {
    u8::try_from(offset / 512 % 251).expect("below 251") + 1
}

fn start(name: &str) -> (Daemon, PathBuf, PathBuf) {
    let directory = TempDir::new(name);
    let (control, warm) = (directory.path().join("control.sock"), directory.path().join("warm"));
    fs::create_dir(&warm).expect("a directory can be created");
    let bytes: Vec<u8> = (0..IMAGE_BYTES).map(byte_of).collect();
    fs::write(directory.path().join("image"), bytes).expect("an image can be written");
    let disk = table(&directory, "d0", "image", &format!("cache.warm_dir = {warm:?}\n"));
    let config = directory.path().join("genblk.toml");
    fs::write(&config, format!("[control]\nsocket = {control:?}\n{disk}")).expect("a configuration can be written");
    let socket = directory.path().join("d0.sock");
    let mut command = Command::new(server_binary());
    command.arg("--config").arg(config);
    (Daemon::launch(directory, command, vec![socket]), control, warm)
}

/// Reads the pages that the guest uses.
fn read_hot(daemon: &Daemon) {
    let mut session = Session::open(&daemon.socket_of(0), &SessionOptions::default());
    for offset in (0..HOT_BYTES).step_by(READ_BYTES) {
        let expected: Vec<u8> = (offset..offset + READ_BYTES).map(byte_of).collect();
        assert_eq!(session.read((offset / 512) as u64, READ_BYTES), expected);
    }
}

/// Pages that were read, and how many of them were in memory.
fn hits(control: &Path) -> (u64, u64) {
    let statistics = call(control, "Statistics", &json!({}));
    let cache = &statistics["parameters"]["devices"][0]["cache"];
    let pages = |name: &str| cache[name].as_u64().expect("a number");
    (pages("hit_pages") + pages("miss_pages"), pages("hit_pages"))
}

#[test]
fn a_disk_is_warm_again_after_an_orderly_stop() {
    let (mut daemon, control, warm) = start("warm-restart");
    read_hot(&daemon);
    daemon.stop();
    let lists: Vec<_> = fs::read_dir(&warm).expect("the directory").flatten().collect();
    assert_eq!(lists.len(), 1, "{lists:?}");
    let text = fs::read_to_string(lists[0].path()).expect("a list");
    assert!(text.starts_with("genblk warm list 2 ") && text.len() < 4096, "{text}");
    daemon.restart();
    poll_until("the control socket", TIMEOUT, || genblk(&control, &["list"]).status.success().then_some(()));
    daemon.await_log("d0: warmed after");
    read_hot(&daemon);
    // The counters follow within a moment.
    let (pages, hits) = poll_until("the statistics", TIMEOUT, || {
        Some(hits(&control)).filter(|(pages, _)| *pages >= (HOT_BYTES / 4096) as u64)
    });
    assert!(hits * 10 >= pages * 9, "{hits} of {pages} pages are in memory");
}

#[test]
fn a_foreign_or_corrupt_warm_list_is_not_used() {
    let (mut daemon, control, warm) = start("warm-rubbish");
    read_hot(&daemon);
    daemon.stop();
    let list = fs::read_dir(&warm).expect("the directory").flatten().next().expect("a list").path();
    fs::write(&list, "genblk warm list 2 \"/another\"\n0+99999999999\n").expect("it can be written");
    daemon.restart();
    daemon.await_log("it is not a list for this image");
    poll_until("the control socket", TIMEOUT, || genblk(&control, &["list"]).status.success().then_some(()));
    read_hot(&daemon);
}

/// Restarts a daemon and reads what the guest uses, from a cache that nothing has warmed.
fn restart_cold(daemon: &mut Daemon, control: &Path) {
    daemon.restart();
    daemon.await_log("is not used: it is not a list for this image, or the image was served since");
    poll_until("the control socket", TIMEOUT, || genblk(control, &["list"]).status.success().then_some(()));
    read_hot(daemon);
}

#[test]
fn a_warm_list_is_not_used_after_another_daemon_served_the_image() {
    let (mut daemon, control, warm) = start("warm-tenure");
    read_hot(&daemon);
    daemon.stop();
    let list = fs::read_dir(&warm).expect("the directory").flatten().next().expect("a list").path();
    let old = fs::read(&list).expect("it can be read");
    // Another one, whose list is lost.
    daemon.restart();
    daemon.await_log("d0: warmed after");
    daemon.stop();
    assert!(fs::read(&list).expect("it can be read") != old, "each tenure has a list of its own");
    fs::write(&list, old).expect("it can be written");
    restart_cold(&mut daemon, &control);
}

#[test]
fn a_warm_list_is_not_used_for_a_replaced_image() {
    let (mut daemon, control, _) = start("warm-replaced");
    read_hot(&daemon);
    daemon.stop();
    let (image, copy) = (daemon.image(), daemon.directory().path().join("copy"));
    // The bytes without the attributes.
    fs::write(&copy, fs::read(&image).expect("it can be read")).expect("it can be written");
    fs::rename(&copy, &image).expect("it can be replaced");
    restart_cold(&mut daemon, &control);
}

/// Extents of a disk in memory, and the bytes of all of them.
fn resident(control: &Path) -> (String, usize) {
    let list = stdout_of(&genblk(control, &["resident", "d0"]));
    let bytes = list.lines().map(|line| line.split_once('+').expect("an extent").1.parse::<usize>().expect("a number"));
    let sum = bytes.sum();
    (list, sum)
}

fn started(name: &str) -> (Daemon, PathBuf, PathBuf) {
    let (daemon, control, _) = start(name);
    poll_until("the disk", TIMEOUT, || genblk(&control, &["resident", "d0"]).status.success().then_some(()));
    let list = daemon.directory().path().join("list");
    (daemon, control, list)
}

#[test]
fn a_disk_is_warmed_from_a_list_of_resident_extents() {
    let (daemon, control, list) = started("warm-from");
    assert_eq!(resident(&control).1, 0);
    read_hot(&daemon);
    let (text, bytes) = resident(&control);
    assert!(bytes >= HOT_BYTES, "{text}");
    fs::write(&list, format!("# what the guest used\n{text}")).expect("it can be written");
    poll_until("a cold cache", TIMEOUT, || {
        stdout_of(&genblk(&control, &["drop", "d0"]));
        (resident(&control).1 == 0).then_some(())
    });
    let warmed = stdout_of(&genblk(&control, &["warm", "d0", "--from", &list.display().to_string()]));
    assert_eq!(warmed, "d0: warmed\n");
    poll_until("what was warmed", TIMEOUT, || (resident(&control).0 == text).then_some(()));
    read_hot(&daemon);
}

#[test]
fn warming_a_whole_disk_stops_when_the_cache_is_full() {
    let (daemon, control, _) = started("warm-whole");
    let warmed = stdout_of(&genblk(&control, &["warm", "d0"]));
    assert_eq!(warmed, "d0: the cache is full\n");
    let bytes = resident(&control).1;
    assert!((2 << 20..4 << 20).contains(&bytes), "{bytes} of a cache of 4 MiB");
    read_hot(&daemon);
}

#[test]
fn an_invalid_warm_list_is_refused_with_the_reason() {
    let (daemon, control, list) = started("warm-wrong");
    let path = list.display().to_string();
    let refused = |text: &str| {
        fs::write(&list, text).expect("it can be written");
        let output = genblk(&control, &["warm", "d0", "--from", &path]);
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        String::from_utf8(output.stderr).expect("text")
    };
    let message = refused("0+4096\nrubbish\n");
    assert_eq!(
        message,
        format!("genblk: {path}:2: \"rubbish\" is not OFFSET+BYTES, as \"genblk resident\" prints it\n")
    );
    let message = refused(&format!("0+4096\n{IMAGE_BYTES}+4096\n"));
    assert!(message.contains("extents[1]: 8388608+4096 is beyond the end of the image"), "{message}");
    assert_eq!(resident(&control).1, 0, "nothing was read");
    let refused = call(&control, "Warm", &json!({"device": "d0", "extents": [{"offset": -1, "bytes": 1}]}));
    assert_eq!(refused["error"], "org.varlink.service.InvalidParameter", "{refused}");
    let refused = call(&control, "Warm", &json!({"device": "d0", "bytes_per_second": 0}));
    assert_eq!(refused["error"], "org.varlink.service.InvalidParameter", "{refused}");
    read_hot(&daemon);
}

#[test]
fn warming_reports_progress_and_observes_its_rate_limit() {
    let (daemon, control, _) = started("warm-rate");
    let extents = json!([{"offset": 0, "bytes": HOT_BYTES}]);
    let parameters =
        json!({"device": "d0", "extents": extents, "bytes_max": HOT_BYTES / 2, "bytes_per_second": HOT_BYTES / 8});
    let mut warming = Call::start(&control, "Warm", &parameters, true);
    let first = warming.reply();
    let progress = &first["parameters"]["progress"];
    let [done, total] = ["done_bytes", "total_bytes"].map(|name| progress[name].as_u64().expect("a number"));
    assert!(0 < done && done < total && total == (HOT_BYTES / 2) as u64, "{first}");
    let last = std::iter::repeat_with(|| warming.reply()).find(|reply| reply["continues"] != json!(true));
    assert_eq!(last.expect("it ends")["parameters"], json!({"progress": null, "full": false}));
    poll_until("what was warmed", TIMEOUT, || (resident(&control).1 == HOT_BYTES / 2).then_some(()));
    read_hot(&daemon);
}

#[test]
fn warming_ends_when_its_client_disconnects() {
    let (daemon, control, _) = started("warm-gone");
    // All of it would take minutes.
    let parameters = json!({"device": "d0", "bytes_per_second": 65536});
    let mut warming = Call::start(&control, "Warm", &parameters, true);
    warming.reply();
    drop(warming);
    daemon.await_log("d0: warming has ended early: its client has disconnected");
    assert!(resident(&control).1 < HOT_BYTES, "it was far from its end");
    // The next one need not wait for it.
    let rest = json!({"device": "d0", "extents": [{"offset": 0, "bytes": HOT_BYTES}]});
    assert_eq!(call(&control, "Warm", &rest)["parameters"], json!({"progress": null, "full": false}));
    poll_until("what was warmed", TIMEOUT, || (resident(&control).1 >= HOT_BYTES).then_some(()));
    read_hot(&daemon);
}

/// Reads pages of a disk: four of five from its first part, which fits into the cache, the others from all of it.
fn read_randomly(daemon: &Daemon, prng: &mut Prng, count: usize) {
    let mut session = Session::open(&daemon.socket_of(0), &SessionOptions::default());
    for index in 1..=count {
        if index % 100 == 0 {
            // Its memory has room for so many requests.
            drop(session);
            session = Session::open(&daemon.socket_of(0), &SessionOptions::default());
        }
        let pages = if prng.below(5) < 4 { HOT_BYTES / 4096 } else { IMAGE_BYTES / 4096 };
        let offset = usize::try_from(prng.below(pages as u64)).expect("few pages") * 4096;
        let expected: Vec<u8> = (offset..offset + 4096).map(byte_of).collect();
        assert_eq!(session.read((offset / 512) as u64, 4096), expected);
    }
}

/// Hits and pages of `count` reads, in tenths of a percent.
fn hit_ratio(daemon: &Daemon, control: &Path, prng: &mut Prng, count: usize) -> u64 {
    let (pages_before, hits_before) = hits(control);
    read_randomly(daemon, prng, count);
    let wanted = pages_before + count as u64;
    let (pages, hits) =
        poll_until("the statistics", TIMEOUT, || Some(hits(control)).filter(|(pages, _)| *pages >= wanted));
    (hits - hits_before) * 1000 / (pages - pages_before)
}

#[test]
fn a_clean_restart_keeps_nine_tenths_of_the_hit_ratio() {
    let (mut daemon, control, _) = start("warm-ratio");
    poll_until("the disk", TIMEOUT, || genblk(&control, &["resident", "d0"]).status.success().then_some(()));
    let mut prng = Prng::new(7);
    hit_ratio(&daemon, &control, &mut prng, 3000);
    let before = hit_ratio(&daemon, &control, &mut prng, 2000);
    daemon.stop();
    daemon.restart();
    poll_until("the control socket", TIMEOUT, || genblk(&control, &["list"]).status.success().then_some(()));
    daemon.await_log("d0: warmed after");
    let after = hit_ratio(&daemon, &control, &mut prng, 2000);
    println!("hits: {before} of 1000 before the stop, {after} after it");
    assert!(before > 700 && after * 10 >= before * 9, "{before} and {after} of 1000 pages are in memory");
}
