//! An NBD server in this process that breaks the protocol, or the client's trust: that costs a connection and never a
//! byte.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

mod fake;
#[path = "../common/nbd_protocol.rs"]
mod nbd_protocol;
#[path = "../store_kit/mod.rs"]
mod store_kit;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use genblk::error::ErrorKind;
use genblk::store::file::{NbdOptions, OpenOptions};
use genblk::store::nbd::NbdImage;
use genblk::store::{Backing, Event, Extent, IoRequest};
use genblk::units::{ExtentKind, Fault, OpKind, Urgency};

use fake::{Act, BLOCK_STATUS, FakeServer, Offer, chunk, is_read, is_status, is_write};
use nbd_protocol::{FLAG_MULTI_CONN, FLAG_TRIM, FLAGS, Request};
use store_kit::{Buffer, Driver, pattern};

const SIZE: u64 = 1 << 20;

/// What the server does in place of a reply.
type Answer = dyn Fn(Request) -> Act + Send + Sync;

/// A path for the socket of a test.
fn socket_named(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}.{}", std::process::id()))
}

fn open(server: &FakeServer, nbd: NbdOptions) -> Arc<dyn Backing> {
    // The image before this one releases the lock when its threads have ended.
    let options = OpenOptions { nbd, lock_timeout: Duration::from_secs(5), ..OpenOptions::default() };
    NbdImage::open(None, Path::new(&server.uri()), &options).unwrap()
}

/// Does `first` with the first matching request of all, and serves everything else.
fn once(
    matches: fn(&Request) -> bool,
    first: impl Fn(Request) -> Act + Send + Sync,
) -> impl Fn(Request) -> Act + Send + Sync {
    let seen = AtomicUsize::new(0);
    move |request| {
        // The image is opened with reads of its own, at both ends.
        let counts = matches(&request) && request.offset >= 64 << 10 && request.offset < SIZE - (64 << 10);
        if counts && seen.fetch_add(1, Ordering::Relaxed) == 0 { first(request) } else { Act::Serve }
    }
}

#[test]
fn invalid_replies_cost_the_connection_but_no_operation() {
    let cases: Vec<(&str, Box<Answer>)> = vec![
        ("garbage", Box::new(|_| Act::Send(vec![0x5a; 64]))),
        ("nothing but the end", Box::new(|_| Act::SendAndClose(Vec::new()))),
        ("an unknown cookie", Box::new(|r| Act::Send(chunk(1, 0, r.cookie ^ 1 << 40, &[])))),
        ("a read that is complete without data", Box::new(|r| Act::Send(chunk(1, 0, r.cookie, &[])))),
        (
            "data beyond the read",
            Box::new(|r| {
                let data = [&(r.offset + 4096).to_be_bytes()[..], &[7; 4096]].concat();
                Act::Send(chunk(1, 1, r.cookie, &data))
            }),
        ),
        (
            "the same data twice",
            Box::new(|r| {
                let data = [&r.offset.to_be_bytes()[..], &[7; 2048]].concat();
                Act::Send([chunk(0, 1, r.cookie, &data), chunk(1, 1, r.cookie, &data)].concat())
            }),
        ),
        (
            "a part of the data",
            Box::new(|r| {
                let data = [&r.offset.to_be_bytes()[..], &[7; 512]].concat();
                Act::Send(chunk(1, 1, r.cookie, &data))
            }),
        ),
        (
            "a hole of no bytes",
            Box::new(|r| Act::Send(chunk(1, 2, r.cookie, &[&r.offset.to_be_bytes()[..], &[0; 4]].concat()))),
        ),
        (
            "an endless chunk",
            Box::new(|r| {
                let mut bytes = chunk(0, 0x8001, r.cookie, &[]);
                bytes[16..20].copy_from_slice(&u32::MAX.to_be_bytes());
                Act::Send(bytes)
            }),
        ),
        ("an unknown chunk", Box::new(|r| Act::Send(chunk(1, 77, r.cookie, &[])))),
        ("an error without a number", Box::new(|r| Act::Send(chunk(1, 0x8001, r.cookie, &[0; 6])))),
        ("a shutdown", Box::new(|_| Act::Fail(108))),
        (
            "half a reply",
            Box::new(|r| {
                let mut bytes = chunk(1, 1, r.cookie, &[0; 4104]);
                bytes.truncate(1000);
                bytes[20..28].copy_from_slice(&r.offset.to_be_bytes());
                Act::SendAndClose(bytes)
            }),
        ),
        ("a half-closed connection", Box::new(|_| Act::HalfClose)),
    ];
    let socket = socket_named("nbd-hostile");
    for (name, act) in cases {
        println!("{name}");
        let server = FakeServer::start(&socket, SIZE, once(is_read, act));
        let want = pattern(4096, 5);
        server.memory.lock().unwrap()[128 << 10..][..4096].copy_from_slice(&want);
        let image = open(&server, NbdOptions::default());
        let mut driver = Driver::new(&image);
        assert!(driver.read(128 << 10, 4096) == want, "{name}: the read is repeated on the next connection");
        // The connection was not the first one: the server may have forgotten.
        let event = driver.try_run(OpKind::Sync, 0, 0, Vec::new());
        assert!(matches!(event, Event::Failed { fault: Fault::Lost, .. }), "{name}: {event:?}");
        driver.run(OpKind::Sync, 0, 0, Vec::new());
    }
}

#[test]
fn replies_split_into_single_bytes_are_reassembled() {
    let socket = socket_named("nbd-dribble");
    let server = FakeServer::start(&socket, SIZE, |_| Act::Dribble);
    let image = open(&server, NbdOptions::default());
    let mut driver = Driver::new(&image);
    let want = pattern(20_480, 6);
    driver.write(128 << 10, &mut Buffer::copy_of(&want));
    driver.run(OpKind::Sync, 0, 0, Vec::new());
    assert!(driver.read(128 << 10, want.len()) == want);
}

#[test]
fn server_errors_become_the_errors_of_their_operations() {
    let socket = socket_named("nbd-errors");
    for (error, fault) in [
        (5, Fault::Media),
        (28, Fault::NoSpace),
        (22, Fault::Invalid),
        (95, Fault::Unsupported),
        (1, Fault::Media),
        (12, Fault::Media),
        (u32::MAX, Fault::Media),
    ] {
        let server = FakeServer::start(&socket, SIZE, once(is_write, move |_| Act::Fail(error)));
        let image = open(&server, NbdOptions::default());
        let mut driver = Driver::new(&image);
        let mut buffer = Buffer::filled(4096, 1);
        let event = driver.try_run(OpKind::Write, 128 << 10, 4096, vec![buffer.segment(0, 4096)]);
        assert!(matches!(event, Event::Failed { fault: found, .. } if found == fault), "error {error}: {event:?}");
        driver.write(128 << 10, &mut buffer);
    }
}

/// The connection of a write breaks, the write is repeated, and a newer one follows. The server executes the first one
/// half a second after the break.
fn newest_after_a_zombie_write(name: &str, quarantine: Duration) -> (u8, Duration) {
    let socket = socket_named(name);
    let zombie = Duration::from_millis(500);
    let act = move |_| Act::CloseAndServeLater(zombie);
    let server = FakeServer::start(&socket, SIZE, once(is_write, act));
    let image = open(&server, NbdOptions { quarantine, ..NbdOptions::default() });
    let mut driver = Driver::new(&image);
    let started = Instant::now();
    driver.write(128 << 10, &mut Buffer::filled(4096, 1));
    let repeated = started.elapsed();
    assert!(repeated < zombie, "the repetition does not wait: {repeated:?}");
    // Elsewhere nothing waits.
    driver.write(256 << 10, &mut Buffer::filled(4096, 9));
    assert!(started.elapsed() < zombie, "{:?}", started.elapsed());
    driver.write(128 << 10, &mut Buffer::filled(4096, 2));
    let written = started.elapsed();
    driver.try_run(OpKind::Sync, 0, 0, Vec::new());
    std::thread::sleep(zombie * 2);
    let newest = server.memory.lock().unwrap()[128 << 10];
    (newest, written)
}

#[test]
fn a_late_write_of_a_dead_connection_overtakes_no_newer_one() {
    let (newest, _) = newest_after_a_zombie_write("nbd-zombie-none", Duration::ZERO);
    assert_eq!(newest, 1, "without a quarantine the zombie wins, or this test proves nothing");
    let quarantine = Duration::from_millis(1200);
    let (newest, written) = newest_after_a_zombie_write("nbd-zombie", quarantine);
    assert_eq!(newest, 2);
    assert!(written >= quarantine, "{written:?}");
}

/// As nbdkit's cache filter, which describes the file below its write cache.
#[test]
fn a_map_that_reports_unflushed_writes_as_a_hole_is_overruled() {
    let socket = socket_named("nbd-map");
    let is_hole = |request: Request| match request.command {
        BLOCK_STATUS => Act::Send(chunk(1, 5, request.cookie, &[1u32, request.len, 3].map(u32::to_be_bytes).concat())),
        _ => Act::Serve,
    };
    let server = FakeServer::start(&socket, SIZE, is_hole);
    let image = open(&server, NbdOptions::default());
    let mut driver = Driver::new(&image);
    let holes = |driver: &mut Driver| match driver.try_run(OpKind::Map, 0, 1 << 20, Vec::new()) {
        Event::Mapped { extents, .. } => {
            extents.iter().filter(|extent| extent.kind == ExtentKind::Hole).map(|extent| extent.len).sum::<u64>()
        }
        event => panic!("{event:?}"),
    };
    driver.write(128 << 10, &mut Buffer::filled(4096, 1));
    assert!(holes(&mut driver) < 1 << 20, "a read of what was written must not be answered with zeros");
    driver.try_run(OpKind::Sync, 0, 0, Vec::new());
    assert_eq!(holes(&mut driver), 1 << 20, "after a FLUSH the server knows");
}

#[test]
fn what_a_broken_connection_told_of_a_map_is_forgotten() {
    let socket = socket_named("nbd-half-map");
    let half = AtomicUsize::new(0);
    let is_hole = move |request: Request| match request.command {
        BLOCK_STATUS if half.fetch_add(1, Ordering::Relaxed) == 0 => {
            let data = [1u32, request.len / 2, 0].map(u32::to_be_bytes).concat();
            Act::SendAndClose(chunk(0, 5, request.cookie, &data))
        }
        BLOCK_STATUS => Act::Send(chunk(1, 5, request.cookie, &[1u32, request.len, 3].map(u32::to_be_bytes).concat())),
        _ => Act::Serve,
    };
    let server = FakeServer::start(&socket, SIZE, is_hole);
    let image = open(&server, NbdOptions::default());
    let mut driver = Driver::new(&image);
    match driver.try_run(OpKind::Map, 0, SIZE, Vec::new()) {
        Event::Mapped { extents, .. } => assert_eq!(extents, [Extent { len: SIZE, kind: ExtentKind::Hole }]),
        event => panic!("{event:?}"),
    }
}

#[test]
fn a_silent_server_blocks_no_call() {
    let socket = socket_named("nbd-silent");
    let ignore = |request: Request| if is_write(&request) { Act::Ignore } else { Act::Serve };
    let server = FakeServer::start(&socket, SIZE, ignore);
    let image = open(&server, NbdOptions::default());
    let mut queue = image.attach().unwrap();
    let mut buffers: Vec<Buffer> = (0..64).map(|_| Buffer::filled(64 << 10, 3)).collect();
    let started = Instant::now();
    for (n, buffer) in buffers.iter_mut().enumerate() {
        let segments = vec![buffer.segment(0, 64 << 10)];
        let (offset, len) = ((n as u64 % 8) << 16, 64 << 10);
        let request = IoRequest { tag: n as u64, op: OpKind::Write, offset, len, urgency: Urgency::Demand, segments };
        queue.submit(request).unwrap();
        queue.kick();
        queue.reap(&mut Vec::new());
    }
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    assert!(!queue.drain(Duration::from_millis(100)), "64 writes are in flight");
}

/// More data than the kernel holds is in flight, so the server accepts none for longer than a dead one would be given.
#[test]
fn a_server_that_is_slow_to_accept_data_keeps_its_tcp_connection() {
    const BYTES: usize = 256 << 10;
    let is_slow = AtomicBool::new(true);
    let script = move |request: Request| {
        if is_write(&request) && is_slow.swap(false, Ordering::Relaxed) {
            std::thread::sleep(Duration::from_secs(14));
        }
        Act::Serve
    };
    let server = FakeServer::start_tcp(32 << 20, script);
    let image = open(&server, NbdOptions::default());
    let mut queue = image.attach().unwrap();
    let mut buffers: Vec<Buffer> = (0..128).map(|_| Buffer::filled(BYTES, 3)).collect();
    for (n, buffer) in (0..).zip(&mut buffers) {
        let segments = vec![buffer.segment(0, BYTES)];
        let (offset, len, urgency) = (n * BYTES as u64, BYTES as u64, Urgency::Demand);
        queue.submit(IoRequest { tag: n, op: OpKind::Write, offset, len, urgency, segments }).unwrap();
    }
    assert!(queue.drain(Duration::from_secs(60)), "the server executes them in the end");
    assert_eq!(server.connections.load(Ordering::Relaxed), 1, "a slow server is never disconnected");
    assert!(server.memory.lock().unwrap().iter().all(|byte| *byte == 3));
}

#[test]
fn an_export_may_lose_what_is_not_needed() {
    let socket = socket_named("nbd-lost-unneeded");
    let server = FakeServer::start(&socket, SIZE, once(is_status, |_| Act::SendAndClose(vec![])));
    *server.later.lock().unwrap() = Offer { size: SIZE, flags: FLAGS & !FLAG_MULTI_CONN, has_extents: false };
    let image = open(&server, NbdOptions::default());
    let mut driver = Driver::new(&image);
    for _ in 0..2 {
        let event = driver.try_run(OpKind::Map, 128 << 10, 64 << 10, Vec::new());
        let Event::Mapped { extents, .. } = event else { panic!("{event:?}") };
        assert_eq!(extents, [Extent { len: 64 << 10, kind: ExtentKind::Data }]);
    }
    driver.write(128 << 10, &mut Buffer::filled(4096, 1));
}

#[test]
fn requests_wait_while_an_export_lacks_what_its_guest_needs() {
    let socket = socket_named("nbd-lost-needed");
    let server = FakeServer::start(&socket, SIZE, once(is_read, |_| Act::SendAndClose(vec![])));
    server.later.lock().unwrap().flags = FLAGS & !FLAG_TRIM;
    let image = open(&server, NbdOptions::default());
    let later = Arc::clone(&server.later);
    let restored = Duration::from_millis(500);
    let restarts = std::thread::spawn(move || {
        std::thread::sleep(restored);
        later.lock().unwrap().flags = FLAGS;
    });
    let started = Instant::now();
    assert_eq!(Driver::new(&image).read(128 << 10, 4096), [0; 4096]);
    assert!(started.elapsed() >= restored, "{:?}", started.elapsed());
    restarts.join().unwrap();
}

#[test]
fn queues_may_come_and_go_without_limit() {
    let socket = socket_named("nbd-queues");
    let server = FakeServer::start(&socket, SIZE, |_| Act::Serve);
    let image = open(&server, NbdOptions::default());
    for n in 0..1100 {
        drop(image.attach().unwrap_or_else(|e| panic!("queue {n}: {e}")));
    }
}

#[test]
fn opening_an_export_whose_server_answers_no_read_fails_in_time() {
    let socket = socket_named("nbd-mute");
    let server = FakeServer::start(&socket, SIZE, |_| Act::Ignore);
    let started = Instant::now();
    let error = NbdImage::open(None, Path::new(&server.uri()), &OpenOptions::default()).unwrap_err();
    assert!(error.to_string().contains("has not answered a read of 4096 bytes at byte 0 for 30 s"), "{error}");
    assert!(started.elapsed() < Duration::from_secs(60), "{:?}", started.elapsed());
}

#[test]
fn the_lock_of_an_export_does_not_depend_on_the_path_to_its_socket() {
    let (socket, link) = (socket_named("nbd-linked"), socket_named("nbd-link"));
    std::os::unix::fs::symlink(socket.parent().unwrap(), &link).unwrap();
    let server = FakeServer::start(&socket, SIZE, |_| Act::Serve);
    let image = open(&server, NbdOptions::default());
    let uri = format!("nbd+unix:///?socket={}", link.join(socket.file_name().unwrap()).display());
    let error = NbdImage::open(None, Path::new(&uri), &OpenOptions::default()).unwrap_err();
    std::fs::remove_file(&link).unwrap();
    assert_eq!(error.kind(), ErrorKind::Locked, "{error}");
    drop(image);
}

#[test]
fn an_export_that_shrank_fails_all_operations() {
    let socket = socket_named("nbd-shrunk");
    let server = FakeServer::start(&socket, SIZE, once(is_read, |_| Act::SendAndClose(vec![])));
    server.later.lock().unwrap().size = SIZE / 2;
    let image = open(&server, NbdOptions::default());
    let mut driver = Driver::new(&image);
    let mut buffer = Buffer::filled(4096, 0);
    for _ in 0..2 {
        let event = driver.try_run(OpKind::Read, 128 << 10, 4096, vec![buffer.segment(0, 4096)]);
        assert!(matches!(event, Event::Failed { fault: Fault::Gone, .. }), "{event:?}");
    }
}
