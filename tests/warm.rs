//! A disk that was stopped cleanly is warm again soon after its next start.

#[path = "common/mod.rs"]
mod common;

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use serde_json::json;

use common::daemon::{Daemon, TempDir, server_binary};
use common::operator::{call, genblk, table};
use common::session::{Session, SessionOptions};
use common::wait::{PATIENCE, poll_until};

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
fn hits(control: &std::path::Path) -> (u64, u64) {
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
    assert!(text.starts_with("genblk warm list 1 ") && text.len() < 4096, "{text}");
    daemon.restart();
    poll_until("the control socket", PATIENCE, || genblk(&control, &["list"]).status.success().then_some(()));
    daemon.await_log("d0: warmed after");
    read_hot(&daemon);
    // The counters follow within a moment.
    let (pages, hits) = poll_until("the statistics", PATIENCE, || {
        Some(hits(&control)).filter(|(pages, _)| *pages >= (HOT_BYTES / 4096) as u64)
    });
    assert!(hits * 10 >= pages * 9, "{hits} of {pages} pages are in memory");
}

#[test]
fn a_list_of_another_image_or_of_rubbish_is_not_used() {
    let (mut daemon, control, warm) = start("warm-rubbish");
    read_hot(&daemon);
    daemon.stop();
    let list = fs::read_dir(&warm).expect("the directory").flatten().next().expect("a list").path();
    fs::write(&list, "genblk warm list 1 \"/another\"\n0+99999999999\n").expect("it can be written");
    daemon.restart();
    daemon.await_log("it is not a list for this image");
    poll_until("the control socket", PATIENCE, || genblk(&control, &["list"]).status.success().then_some(()));
    read_hot(&daemon);
}
