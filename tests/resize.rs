//! Images that grow and shrink while a guest uses them: by command, and because another process made the file grow.

#[path = "common/mod.rs"]
mod common;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::json;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};

use common::daemon::{Daemon, send};
use common::operator::{IMAGE_BYTES, call, genblk, start, stdout_of, table};
use common::raw_message::{FLAG_NEED_REPLY, exchange};
use common::request::{OK, Payload, range};
use common::session::{Session, SessionOptions};
use common::wait::{TIMEOUT, poll_until};

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
    ours.set_read_timeout(Some(TIMEOUT)).expect("a timeout can be set");
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
fn a_guest_is_notified_of_a_grown_disk_and_can_use_it_at_once() {
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
fn a_file_grown_by_another_process_is_followed() {
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
fn data_past_the_old_end_survives_deaths_of_disk_process_and_daemon() {
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
fn every_reader_of_an_image_follows_its_size() {
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
        poll_until("a reader to follow", TIMEOUT, || (reader.capacity_sectors() == 4096).then_some(()));
        assert_eq!(reader.read(4088, 4096), vec![6; 4096]);
    }
}

#[test]
fn resizes_do_not_wait_for_a_front_end_that_reads_no_message() {
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
fn an_invalid_size_changes_nothing() {
    let (daemon, control) = start("resize-refused");
    let mut session = Session::open(&daemon.socket_of(0), &SessionOptions::default());
    for (bytes, words) in [
        (json!(4 << 20), "add --shrink"),
        (json!(IMAGE_BYTES + 512), "multiple of 4096"),
        (json!(u64::MAX / 4096 * 4096), "above 4 PiB"),
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
    poll_until("it is served on", TIMEOUT, || (session.read(0, 4096) == vec![0; 4096]).then_some(()));
}

/// On tmpfs, because it takes files of any length.
#[test]
fn a_size_that_the_cache_cannot_number_does_not_grow_the_image() {
    let image = Path::new("/dev/shm").join(format!("genblk-resize-{}", std::process::id()));
    let (daemon, control) = start("resize-huge");
    let made = File::create(&image).and_then(|file| file.set_len(IMAGE_BYTES));
    let attach = made.map(|()| {
        let file = daemon.directory().path().join("d1.toml");
        let text = table(daemon.directory(), "d1", "d1.img", "");
        let own = daemon.directory().path().join("d1.img");
        fs::write(&file, text.replace(&format!("{own:?}"), &format!("{image:?}"))).expect("a file can be written");
        genblk(&control, &["attach", &file.display().to_string()])
    });
    let refused = call(&control, "Resize", &json!({"device": "d1", "bytes": 1_u64 << 53}));
    let len = fs::metadata(&image).map(|metadata| metadata.len());
    fs::remove_file(&image).expect("it exists");
    stdout_of(&attach.expect("an image on tmpfs"));
    assert!(refused["parameters"]["why"].as_str().is_some_and(|why| why.contains("above 4 PiB")), "{refused}");
    assert_eq!(len.expect("it exists"), IMAGE_BYTES);
}

fn shrink(control: &Path, size: &str) -> String {
    stdout_of(&genblk(control, &["resize", "d0", size, "--shrink"]))
}

fn image_len(daemon: &Daemon) -> u64 {
    fs::metadata(daemon.image()).expect("the image exists").len()
}

fn is_readable(session: &mut Session, sector: u64) -> bool {
    session.run(0, VIRTIO_BLK_T_IN, sector, Payload::Receive(512)).status == OK
}

#[test]
fn a_shrinking_disk_keeps_exactly_the_data_up_to_its_new_end() {
    let (daemon, control) = start("shrink");
    let mut session = Session::open(&daemon.socket_of(0), &SessionOptions::default());
    let channel = open_channel(&session);
    let end = OLD_END / 2;
    assert_eq!(session.capacity_sectors(), OLD_END);
    session.write(0, &[1; 4096]);
    session.write(OLD_END - 8, &[4; 4096]);
    session.write_zeroes(&[range(end - 64, 128, 0)]);
    session.write(end - 8, &[[2; 4096], [3; 4096]].concat());
    assert_eq!(shrink(&control, "4M"), "d0: the guest's disk has 4194304 bytes\n");
    await_change(&channel);
    assert_eq!(session.capacity_sectors(), end);
    assert_eq!(image_len(&daemon), IMAGE_BYTES / 2);
    assert!(!is_readable(&mut session, end), "a read beyond the new end fails");
    let beyond = session.run(0, VIRTIO_BLK_T_OUT, end, Payload::Send(&[5; 512]));
    assert_ne!(beyond.status, OK, "a write beyond the new end fails");
    assert_eq!((session.read(0, 4096), session.read(end - 8, 4096)), (vec![1; 4096], vec![2; 4096]));
    // Again: nothing changes, and it is no error. A size that is not smaller needs no --shrink, and may have it.
    shrink(&control, "4M");
    assert_eq!(daemon.image_bytes(IMAGE_BYTES / 2 - 4096, 4096), vec![2; 4096]);
    shrink(&control, "8M");
    await_change(&channel);
    assert_eq!(session.capacity_sectors(), OLD_END);
    assert_eq!(session.read(end, 4096), vec![0; 4096], "what was cut does not come back");
    assert_eq!(session.read(OLD_END - 8, 4096), vec![0; 4096]);
    session.write(end, &[6; 4096]);
    session.flush();
    assert_eq!(daemon.image_bytes(IMAGE_BYTES / 2, 4096), vec![6; 4096]);
}

#[test]
fn a_shrunk_size_survives_deaths_of_disk_process_and_daemon() {
    let (mut daemon, control) = start("shrink-kill");
    let mut session = Session::open(&daemon.socket_of(0), &SessionOptions::default());
    session.write(0, &[1; 4096]);
    session.write(OLD_END - 8, &[2; 4096]);
    shrink(&control, "6M");
    session.write(8, &[3; 4096]);
    send(daemon.disk_process("d0"), libc::SIGKILL);
    let mut session = session.reconnect(&daemon.socket_of(0));
    session.start_ring(0);
    assert_eq!(session.capacity_sectors(), OLD_END / 4 * 3);
    assert_eq!(session.read(0, 8192), [[1; 4096], [3; 4096]].concat());
    session.write(OLD_END / 4 * 3 - 8, &[4; 4096]);
    shrink(&control, "5M");
    daemon.kill();
    daemon.restart();
    let mut session = session.reconnect(&daemon.socket_of(0));
    session.start_ring(0);
    assert_eq!(session.capacity_sectors(), OLD_END / 8 * 5);
    assert_eq!(session.read(0, 8192), [[1; 4096], [3; 4096]].concat());
    session.flush();
    assert_eq!((image_len(&daemon), daemon.image_bytes(4096, 4096)), (5 << 20, vec![3; 4096]));
}

/// The process that grew the file was told, but the one that is killed never executed the request.
#[test]
fn a_disk_process_that_starts_during_a_growth_serves_and_records_the_new_size() {
    let (mut daemon, control) = start("grow-midway");
    let session = Session::open(&daemon.socket_of(0), &SessionOptions::default());
    let process = daemon.disk_process("d0");
    send(process, libc::SIGSTOP);
    let growing = {
        let control = control.clone();
        std::thread::spawn(move || genblk(&control, &["resize", "d0", "16M"]))
    };
    poll_until("the file to grow", TIMEOUT, || (image_len(&daemon) == 2 * IMAGE_BYTES).then_some(()));
    send(process, libc::SIGKILL);
    let mut session = session.reconnect(&daemon.socket_of(0));
    session.start_ring(0);
    growing.join().expect("it ends");
    poll_until("the new size", TIMEOUT, || (session.capacity_sectors() == 2 * OLD_END).then_some(()));
    session.write(OLD_END, &[7; 4096]);
    daemon.kill();
    daemon.restart();
    let mut session = session.reconnect(&daemon.socket_of(0));
    session.start_ring(0);
    assert_eq!(session.read(OLD_END, 4096), vec![7; 4096]);
}

#[test]
fn a_file_that_cannot_be_cut_leaves_the_guest_the_whole_disk() {
    let (daemon, control) = start("shrink-denied");
    let mut session = Session::open(&daemon.socket_of(0), &SessionOptions::default());
    session.write(OLD_END - 8, &[1; 4096]);
    let attribute = |change| Command::new("chattr").arg(change).arg(daemon.image()).status();
    if !attribute("+a").is_ok_and(|status| status.success()) {
        println!("SKIPPED: files cannot be made append-only here");
        return;
    }
    let shrunk = genblk(&control, &["resize", "d0", "4M", "--shrink"]);
    assert!(attribute("-a").is_ok_and(|status| status.success()));
    assert!(!shrunk.status.success(), "{shrunk:?}");
    assert_eq!(session.capacity_sectors(), OLD_END);
    assert_eq!(session.read(OLD_END - 8, 4096), vec![1; 4096]);
    session.write(OLD_END - 8, &[2; 4096]);
    session.flush();
    assert_eq!(daemon.image_bytes(IMAGE_BYTES - 4096, 4096), vec![2; 4096]);
}

/// Shrinks a disk and kills the disk process, or the whole daemon, after every pause of a list.
#[test]
fn a_kill_during_a_shrink_leaves_the_old_or_the_new_size_intact() {
    let (mut daemon, control) = start("shrink-midway");
    let mut session = Session::open(&daemon.socket_of(0), &SessionOptions::default());
    let end = OLD_END / 2;
    let mut sizes = [0, 0];
    for (round, pause_us) in [0, 300, 600, 1000, 1500, 2000, 2500, 3000, 4000, 6000, 9000, 20_000].iter().enumerate() {
        let byte = u8::try_from(round).expect("a few rounds") + 1;
        grow(&control, "8M");
        for sector in [0, end - 8, end, OLD_END - 8] {
            session.write(sector, &[byte; 4096]);
        }
        let resizing = {
            let control = control.clone();
            std::thread::spawn(move || genblk(&control, &["resize", "d0", "4M", "--shrink"]).status.success())
        };
        std::thread::sleep(Duration::from_micros(*pause_us));
        if round.is_multiple_of(2) {
            daemon.kill();
            daemon.restart();
        } else {
            send(daemon.disk_process("d0"), libc::SIGKILL);
        }
        let has_shrunk = resizing.join().expect("it ends");
        session = session.reconnect(&daemon.socket_of(0));
        session.start_ring(0);
        poll_until("the disk", TIMEOUT, || {
            (call(&control, "List", &json!({}))["parameters"]["devices"][0]["state"] == "serving").then_some(())
        });
        let capacity = session.capacity_sectors();
        assert_eq!(capacity * 512, image_len(&daemon), "round {round}");
        assert!(capacity == end || capacity == OLD_END && !has_shrunk, "round {round}: {capacity}, {has_shrunk}");
        for sector in [0, end - 8, end, OLD_END - 8].into_iter().filter(|sector| *sector < capacity) {
            assert_eq!(session.read(sector, 4096), vec![byte; 4096], "round {round}, sector {sector} of {capacity}");
        }
        sizes[usize::from(capacity == end)] += 1;
    }
    println!("old size {}, new size {}", sizes[0], sizes[1]);
}

#[test]
fn a_shrink_under_load_fails_only_requests_past_the_new_end() {
    let (daemon, control) = start("shrink-load");
    let mut session = Session::open(&daemon.socket_of(0), &SessionOptions::default());
    let end = OLD_END / 2;
    let resizing = std::thread::spawn(move || {
        for _ in 0..10 {
            shrink(&control, "4M");
            grow(&control, "8M");
        }
    });
    let mut written = [0; 32];
    let mut step = 0_u8;
    let (mut failed, mut rounds) = (0, 0);
    while !resizing.is_finished() || rounds < 64 {
        rounds += 1;
        if rounds % 100 == 0 {
            // Its memory has room for so many requests.
            drop(session);
            session = Session::open(&daemon.socket_of(0), &SessionOptions::default());
        }
        step = step % 250 + 1;
        let page = usize::from(step) % 32;
        // Half of the pages are beyond the new end.
        let sector = (page as u64) * (OLD_END / 32);
        let status = session.run(0, VIRTIO_BLK_T_OUT, sector, Payload::Send(&[step; 4096])).status;
        assert!(status == OK || sector >= end, "a write below the new end fails: {sector}");
        if sector < end {
            written[page] = step;
        }
        failed += u32::from(status != OK);
        let page = usize::from(step) * 7 % 16;
        assert_eq!(session.read((page as u64) * (OLD_END / 32), 4096), vec![written[page]; 4096]);
    }
    resizing.join().expect("the operator succeeds");
    println!("{failed} of {rounds} writes failed");
    assert_eq!(session.capacity_sectors(), OLD_END);
    session.flush();
    assert_eq!(daemon.image_bytes(0, 4096), vec![written[0]; 4096]);
}

#[test]
fn an_invalid_shrink_changes_nothing() {
    let (daemon, control) = start("shrink-refused");
    let mut session = Session::open(&daemon.socket_of(0), &SessionOptions::default());
    session.write(OLD_END - 8, &[7; 4096]);
    for (bytes, words) in [(json!(IMAGE_BYTES / 2 + 512), "multiple of 4096"), (json!(0), "is empty")] {
        let refused = call(&control, "Resize", &json!({"device": "d0", "bytes": bytes, "shrink": true}));
        assert_eq!(refused["error"], json!("io.genblk.Control.Refused"), "{refused}");
        assert!(refused["parameters"]["why"].as_str().is_some_and(|why| why.contains(words)), "{refused}");
    }
    // Without a size there is nothing to shrink to.
    assert_eq!(genblk(&control, &["resize", "d0", "--shrink"]).status.code(), Some(2));
    call(&control, "Freeze", &json!({"device": "d0", "timeout_ms": 60000}));
    let frozen = call(&control, "Resize", &json!({"device": "d0", "bytes": 4 << 20, "shrink": true}));
    assert_eq!(frozen["error"], json!("io.genblk.Control.Frozen"), "{frozen}");
    call(&control, "Thaw", &json!({"device": "d0"}));
    let directory = daemon.directory();
    fs::write(directory.path().join("r.img"), vec![6; 1 << 20]).expect("an image");
    let file = directory.path().join("r.toml");
    fs::write(&file, table(directory, "r1", "r.img", "read_only = true\n")).expect("a file can be written");
    stdout_of(&genblk(&control, &["attach", &file.display().to_string()]));
    poll_until("the reader", TIMEOUT, || {
        let refused = call(&control, "Resize", &json!({"device": "r1", "bytes": 4096, "shrink": true}));
        refused["parameters"]["why"].as_str().is_some_and(|why| why.contains("read-only")).then_some(())
    });
    assert_eq!((session.capacity_sectors(), image_len(&daemon)), (OLD_END, IMAGE_BYTES));
    assert_eq!(session.read(OLD_END - 8, 4096), vec![7; 4096]);
}
