//! QEMU's front-end in situations that a plain boot does not have.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use crate::host::{Boot, Scratch, guest_slot};
use crate::server::Server;
use crate::vm::{Machine, Vm};
use crate::{MIB, image, seed};

/// Sends a command to QEMU's monitor.
fn command(monitor: &Path, line: &str) {
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut connection = loop {
        match UnixStream::connect(monitor) {
            Ok(connection) => break connection,
            Err(error) => assert!(Instant::now() < deadline, "QEMU's monitor: {error}"),
        }
        thread::sleep(Duration::from_millis(50));
    };
    writeln!(connection, "{line}").unwrap();
    // QEMU drops what it has not read when the connection closes.
    thread::sleep(Duration::from_millis(500));
}

/// The second device starts a new session on the connection of the first (a second SET_OWNER).
#[test]
fn a_disk_can_be_unplugged_and_plugged_again() {
    const SLOT: &str = "pcie-root-port,id=rp0,chassis=1";
    let _slot = guest_slot();
    let boot = Boot::get();
    let scratch = Scratch::new("replug");
    let (disk, socket, seed) = (scratch.file("disk.img"), scratch.socket(), seed("replug"));
    let monitor = socket.with_extension("monitor");
    image::create(&disk, 8 * MIB);

    let server = Server::start(&socket, &disk, &[]);
    let machine = Machine { disk: SLOT, monitor: Some(monitor.clone()), ..Machine::default() };
    let mut vm = Vm::qemu_with(boot, &machine, &socket, "replug", &seed);
    let plug = "device_add vhost-user-blk-pci,chardev=blk,num-queues=2,bus=rp0,id=disk";
    command(&monitor, plug);
    vm.wait_for("written one");
    command(&monitor, "device_del disk");
    vm.wait_for("unplugged");
    command(&monitor, plug);
    vm.wait_for("written two");
    vm.finish();
    let log = server.log();
    assert_eq!(log.matches("front-end connected").count(), 1, "one connection: {log}");
    assert!(log.contains("starts a new session"), "{log}");
    server.stop();

    let mut expected = image::contents(&seed, "two", "2", 1 << 20);
    expected.resize(8 << 20, 0);
    image::assert_same(&disk, &expected);
}

/// The commonest mistake: QEMU has no memory that another process can map, or has mapped it privately. It reconnects
/// every second; the log says what to change, once.
#[test]
fn memory_that_is_not_shared_is_refused_with_advice_once() {
    let _slot = guest_slot();
    let boot = Boot::get();
    for (name, memory) in [("plain", ""), ("private", "memory-backend-memfd,id=ram,size=256M,share=off")] {
        let scratch = Scratch::new(name);
        let (disk, socket) = (scratch.file("disk.img"), scratch.socket());
        image::create(&disk, 8 * MIB);
        let server = Server::start(&socket, &disk, &[]);
        let machine = Machine { memory, ..Machine::default() };
        let vm = Vm::qemu_with(boot, &machine, &socket, "sum", "0");
        let deadline = Instant::now() + Duration::from_secs(60);
        while !server.log().contains("add share=on") {
            assert!(Instant::now() < deadline, "{name}: {}", server.log());
            thread::sleep(Duration::from_millis(100));
        }
        // Some more attempts of QEMU.
        thread::sleep(Duration::from_secs(4));
        let log = server.log();
        assert_eq!(log.matches("add share=on").count(), 1, "{name}: {log}");
        assert_eq!(log.matches("front-end").count(), 2, "{name}: connected, and refused: {log}");
        drop(vm);
        server.stop();
    }
}

/// QEMU asks for a queue for each processor. Here most of them are only possible: to boot them all takes minutes.
#[test]
fn a_guest_with_more_than_64_processors_has_a_queue_for_each() {
    let _slot = guest_slot();
    let boot = Boot::get();
    let scratch = Scratch::new("queues");
    let (disk, socket, seed) = (scratch.file("disk.img"), scratch.socket(), seed("queues"));
    image::create(&disk, 8 * MIB);
    let server = Server::start(&socket, &disk, &["--num-queues", "256"]);
    let disk_device = "vhost-user-blk-pci,chardev=blk,num-queues=72";
    let machine = Machine { processors: "cpus=2,maxcpus=72", disk: disk_device, ..Machine::default() };
    let mut vm = Vm::qemu_with(boot, &machine, &socket, "sum", &seed);
    let geometry = vm.wait_for("disk:");
    assert!(geometry.ends_with(" 72 queues"), "{geometry}");
    vm.finish();
    server.stop();
}
