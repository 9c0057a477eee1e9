//! Images that grow while a guest uses them: by command, and because another process made the file grow.

#[path = "common/mod.rs"]
mod common;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::json;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};

use common::daemon::send;
use common::operator::{IMAGE_BYTES, call, genblk, start, stdout_of, table};
use common::raw_message::{FLAG_NEED_REPLY, exchange};
use common::request::{OK, Payload};
use common::session::{Session, SessionOptions};
use common::wait::{PATIENCE, poll_until};

const SET_BACKEND_REQ_FD: u32 = 21;
/// VHOST_USER_BACKEND_CONFIG_CHANGE_MSG, version 1 and no flag, no payload.
const CONFIG_CHANGE: [u8; 12] = [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];
/// First sector beyond the old end.
const OLD_END: u64 = IMAGE_BYTES / 512;

/// Opens the channel on which the back-end sends messages; returns the front-end's end.
fn open_channel(session: &Session) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
    let reply = exchange(&session.socket, SET_BACKEND_REQ_FD, FLAG_NEED_REPLY, &[], &[theirs.as_raw_fd()]);
    assert!(reply.is_acknowledged(), "{reply:?}");
    ours.set_read_timeout(Some(PATIENCE)).expect("a timeout can be set");
    ours
}

#[track_caller]
fn await_change(mut channel: &UnixStream) {
    let mut message = [0; 12];
    channel.read_exact(&mut message).expect("the front-end is told");
    assert_eq!(message, CONFIG_CHANGE);
}

fn grow(control: &Path, size: &str) {
    stdout_of(&genblk(control, &["resize", "d0", size]));
}

#[test]
fn a_disk_that_grows_is_told_to_its_guest_which_uses_it_at_once() {
    let (daemon, control) = start("resize-command");
    let mut session = Session::open(&daemon.socket_of(0), &SessionOptions::default());
    let channel = open_channel(&session);
    assert_eq!(session.capacity_sectors(), OLD_END);
    session.write(OLD_END - 8, &[1; 4096]);
    let beyond = session.run(0, VIRTIO_BLK_T_OUT, OLD_END, Payload::Send(&[2; 4096]));
    assert_ne!(beyond.status, OK, "it is not that large yet");
    assert_eq!(stdout_of(&genblk(&control, &["resize", "d0", "16M"])), "d0: the guest's disk has 16777216 bytes\n");
    await_change(&channel);
    assert_eq!(session.capacity_sectors(), 2 * OLD_END);
    assert_eq!(session.read(OLD_END, 4096), vec![0; 4096]);
    session.write(OLD_END, &[2; 4096]);
    session.write(2 * OLD_END - 8, &[3; 4096]);
    session.flush();
    assert_eq!(daemon.image_bytes(IMAGE_BYTES - 4096, 8192), [[1; 4096], [2; 4096]].concat());
    assert_eq!(daemon.image_bytes(2 * IMAGE_BYTES - 4096, 4096), vec![3; 4096]);
    assert_ne!(session.run(0, VIRTIO_BLK_T_IN, 2 * OLD_END, Payload::Receive(512)).status, OK);
    // Again: nothing has changed, and it is no error.
    grow(&control, "16M");
    let image_bytes = &call(&control, "List", &json!({}))["parameters"]["devices"][0]["image_bytes"];
    assert_eq!(image_bytes, &json!(2 * IMAGE_BYTES));
}

#[test]
fn a_file_that_somebody_makes_grow_is_followed() {
    let (daemon, control) = start("resize-file");
    let mut session = Session::open(&daemon.socket_of(0), &SessionOptions::default());
    let channel = open_channel(&session);
    session.capacity_sectors();
    let image = File::options().write(true).open(daemon.image()).expect("the image exists");
    image.set_len(3 * IMAGE_BYTES).expect("it can grow");
    await_change(&channel);
    assert_eq!(session.capacity_sectors(), 3 * OLD_END);
    session.write(2 * OLD_END, &[5; 4096]);
    assert_eq!(session.read(2 * OLD_END, 4096), vec![5; 4096]);
    image.set_len(4 * IMAGE_BYTES).expect("it can grow");
    let told = stdout_of(&genblk(&control, &["resize", "d0"]));
    assert_eq!(told, format!("d0: the guest's disk has {} bytes\n", 4 * IMAGE_BYTES));
    assert_eq!(session.capacity_sectors(), 4 * OLD_END);
}

#[test]
fn what_was_written_beyond_the_old_end_outlives_deaths_of_the_process_and_the_daemon() {
    let (mut daemon, control) = start("resize-kill");
    let mut session = Session::open(&daemon.socket_of(0), &SessionOptions::default());
    grow(&control, "16M");
    session.write(OLD_END, &[1; 4096]);
    send(daemon.disk_process("d0"), libc::SIGKILL);
    let mut session = session.reconnect(&daemon.socket_of(0));
    let channel = open_channel(&session);
    session.start_ring(0);
    await_change(&channel);
    assert_eq!(session.read(OLD_END, 4096), vec![1; 4096]);
    grow(&control, "24M");
    session.write(2 * OLD_END, &[2; 4096]);
    daemon.kill();
    daemon.restart();
    let mut session = session.reconnect(&daemon.socket_of(0));
    session.start_ring(0);
    assert_eq!(session.capacity_sectors(), 3 * OLD_END);
    assert_eq!((session.read(OLD_END, 4096), session.read(2 * OLD_END, 4096)), (vec![1; 4096], vec![2; 4096]));
    session.flush();
    assert_eq!(daemon.image_bytes(2 * IMAGE_BYTES, 4096), vec![2; 4096]);
}

#[test]
fn every_reader_of_an_image_follows_it() {
    let (daemon, control) = start("resize-readers");
    let directory = daemon.directory();
    fs::write(directory.path().join("r.img"), vec![6; 1 << 20]).expect("an image");
    let file = directory.path().join("r.toml");
    let tables = ["r1", "r2"].map(|name| table(directory, name, "r.img", "read_only = true\n")).concat();
    fs::write(&file, tables).expect("a file can be written");
    stdout_of(&genblk(&control, &["attach", &file.display().to_string()]));
    let mut readers = ["r1", "r2"]
        .map(|name| Session::open(&directory.path().join(format!("{name}.sock")), &SessionOptions::default()));
    let mut image = File::options().append(true).open(directory.path().join("r.img")).expect("the image exists");
    image.write_all(&vec![6; 1 << 20]).expect("the image can grow");
    for reader in &mut readers {
        poll_until("a reader to follow", PATIENCE, || (reader.capacity_sectors() == 4096).then_some(()));
        assert_eq!(reader.read(4088, 4096), vec![6; 4096]);
    }
}

#[test]
fn a_hundred_sizes_in_a_row_hold_nobody_up_though_the_front_end_reads_no_message() {
    let (daemon, control) = start("resize-storm");
    let mut session = Session::open(&daemon.socket_of(0), &SessionOptions::default());
    let _channel = open_channel(&session);
    for step in 1..=100_u8 {
        let bytes = IMAGE_BYTES + u64::from(step) * 65536;
        let reply = call(&control, "Resize", &json!({"device": "d0", "bytes": bytes}));
        assert_eq!(reply["parameters"]["image_bytes"], json!(bytes), "{reply}");
        session.write(bytes / 512 - 8, &[step; 4096]);
    }
    assert_eq!(session.capacity_sectors(), OLD_END + 100 * 128);
    session.flush();
    assert_eq!(daemon.image_bytes(IMAGE_BYTES + 65536 - 4096, 4096), vec![1; 4096]);
}

#[test]
fn a_size_that_makes_no_sense_changes_nothing() {
    let (daemon, control) = start("resize-refused");
    let mut session = Session::open(&daemon.socket_of(0), &SessionOptions::default());
    for (bytes, words) in [
        (json!(4 << 20), "does not shrink"),
        (json!(IMAGE_BYTES + 512), "multiple of 4096"),
        (json!(u64::MAX / 4096 * 4096), "must be below"),
    ] {
        let refused = call(&control, "Resize", &json!({"device": "d0", "bytes": bytes}));
        assert_eq!(refused["error"], json!("io.genblk.Control.Refused"), "{refused}");
        assert!(refused["parameters"]["why"].as_str().is_some_and(|why| why.contains(words)), "{refused}");
    }
    assert_eq!(genblk(&control, &["resize", "d0", "large"]).status.code(), Some(2));
    call(&control, "Freeze", &json!({"device": "d0", "timeout_ms": 60000}));
    let frozen = call(&control, "Resize", &json!({"device": "d0", "bytes": 2 * IMAGE_BYTES}));
    assert_eq!(frozen["error"], json!("io.genblk.Control.Frozen"), "{frozen}");
    call(&control, "Thaw", &json!({"device": "d0"}));
    assert_eq!(session.capacity_sectors(), OLD_END);
    assert_eq!(fs::metadata(daemon.image()).expect("it exists").len(), IMAGE_BYTES);
    let odd = File::options().write(true).open(daemon.image()).expect("the image exists");
    odd.set_len(IMAGE_BYTES + 512).expect("it can grow");
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(session.capacity_sectors(), OLD_END, "it is not followed to a size in a page");
    poll_until("it is served on", PATIENCE, || (session.read(0, 4096) == vec![0; 4096]).then_some(()));
}
