//! A real kernel on genblk's disk: Linux in a virtual machine formats, writes, trims, reboots, loses power, and the
//! host looks at the image afterwards with tools that know nothing of genblk.
//!
//! The guest is made by mkinitramfs.sh and does what `init` says; both are in this directory. Under TCG a boot takes
//! about four seconds on two cores. Without QEMU or a kernel these tests fail rather than pass unseen; `make setup`
//! installs both. To tell a fault of genblk from one of the guest, run the control:
//! `GENBLK_BIN=tests/guest/control.sh cargo test --test guest`.

// All of this is a test; clippy.toml's exception reaches only the functions marked so.
#![allow(clippy::unwrap_used)]

mod host;
mod image;
mod power_cut;
#[path = "../common/prng.rs"]
#[allow(dead_code, reason = "shared with the other tests, which use more of it")]
mod prng;
mod recorder;
mod server;
mod vm;

use std::path::Path;
use std::thread;
use std::time::Duration;

use host::{Boot, Scratch, place};
use image::Entry;
use server::Server;
use vm::Vm;

const MIB: u64 = 1 << 20;

/// Small enough that the guest's files do not fit: the cache has to evict and to write back all the time.
const SMALL_CACHE: [&str; 2] = ["--cache-size", "16M"];

/// A seed that no other run has had, so that data left over from one can't pass for this one's.
fn seed(test: &str) -> String {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    format!("{test}-{}", since.as_micros())
}

/// What the job `format` leaves behind, so that an empty manifest can't pass.
fn assert_complete(files: &[Entry]) {
    let total: usize = files.iter().map(|file| file.size).sum();
    assert_eq!(files.len(), 38, "files in the manifest");
    assert!(total > 30 << 20, "the manifest names only {total} bytes");
    assert!(files.iter().any(|file| file.generation == "2/7+3"), "no file was patched");
}

#[test]
fn files_survive_reboots_and_a_restart_of_the_daemon() {
    let _place = place();
    let boot = Boot::get();
    let scratch = Scratch::new("reboot");
    let (disk, socket, seed) = (scratch.file("disk.img"), scratch.socket(), seed("reboot"));
    image::create(&disk, 256 * MIB);

    let server = Server::start(&socket, &disk, &SMALL_CACHE);
    let mut vm = Vm::qemu(boot, &socket, "format", &seed);
    let geometry = vm.wait_for("disk:");
    assert!(geometry.starts_with("268435456 bytes"), "{geometry}");
    assert!(geometry.ends_with(" 2 queues"), "{geometry}");
    let written = image::manifest(&vm.finish());
    assert_complete(&written);

    let again = image::manifest(&Vm::qemu(boot, &socket, "verify", &seed).finish());
    assert_eq!(again, written, "the second boot sees other files, with the same daemon");
    server.stop();

    let server = Server::start(&socket, &disk, &SMALL_CACHE);
    let again = image::manifest(&Vm::qemu(boot, &socket, "verify", &seed).finish());
    assert_eq!(again, written, "the third boot sees other files, with a new daemon");
    server.stop();

    image::assert_clean(&disk);
    image::assert_holds(&disk, &scratch.file("tree"), &written, &seed);
}

/// The plug is pulled while the guest writes and syncs. `then` decides the daemon's fate and returns the one that the
/// guest finds when it comes up again.
fn pull_the_plug(name: &str, then: impl FnOnce(Server, &Path, &Path) -> Server) {
    let boot = Boot::get();
    let scratch = Scratch::new(name);
    let (disk, socket, seed) = (scratch.file("disk.img"), scratch.socket(), seed(name));
    std::fs::create_dir(scratch.file("empty")).unwrap();
    image::create_ext4(&disk, 128 * MIB, &scratch.file("empty"));

    let server = Server::start(&socket, &disk, &SMALL_CACHE);
    let mut vm = Vm::qemu(boot, &socket, "crash", &seed);
    for _ in 0..60 {
        vm.wait_for("synced ");
    }
    let synced = image::reported(&vm.kill(), "synced");
    assert!(synced.len() >= 60, "the guest synced {} files", synced.len());

    let server = then(server, &socket, &disk);
    let found = image::reported(&Vm::qemu(boot, &socket, "recover", &seed).finish(), "found");
    for (file, state) in &synced {
        assert_eq!(found.get(file), Some(state), "{file} was synced before the crash");
    }
    server.stop();

    image::assert_clean(&disk);
    let tree = scratch.file("tree");
    image::extract(&disk, &tree);
    for (file, (size, _)) in &synced {
        image::assert_same(&tree.join(file), &image::contents(&seed, file, "1", *size));
    }
}

#[test]
fn synced_files_survive_the_death_of_the_machine() {
    let _place = place();
    pull_the_plug("vm-dies", |mut server, _, _| {
        server.assert_alive();
        server
    });
}

#[test]
fn synced_files_survive_the_death_of_the_machine_and_of_the_daemon() {
    let _place = place();
    pull_the_plug("both-die", |server, socket, disk| {
        server.kill();
        Server::start(socket, disk, &SMALL_CACHE)
    });
}

/// The guest formats, writes and verifies while `end` takes its disk's daemon away from it, again and again.
fn the_guest_lives_on(name: &str, start: fn(&Boot, &Path, &str, &str) -> Vm, end: fn(Server)) {
    const TIMES: u32 = 5;
    let _place = place();
    let boot = Boot::get();
    let scratch = Scratch::new(name);
    let (disk, socket, seed) = (scratch.file("disk.img"), scratch.socket(), seed(name));
    image::create(&disk, 256 * MIB);

    let mut server = Server::start(&socket, &disk, &SMALL_CACHE);
    let mut vm = start(boot, &socket, "format", &seed);
    vm.wait_for("disk:");
    let (written, server) = thread::scope(|scope| {
        let ending = scope.spawn(|| {
            for _ in 0..TIMES {
                thread::sleep(Duration::from_millis(1100));
                end(server);
                server = Server::start(&socket, &disk, &SMALL_CACHE);
            }
            server
        });
        let written = image::manifest(&vm.finish());
        assert!(ending.is_finished(), "the guest was ready before the daemon had gone {TIMES} times");
        (written, ending.join().unwrap())
    });
    assert_complete(&written);
    server.stop();
    image::assert_clean(&disk);
    image::assert_holds(&disk, &scratch.file("tree"), &written, &seed);
}

#[test]
fn a_guest_outlives_its_disks_daemon() {
    the_guest_lives_on("outlives", Vm::qemu_that_reconnects, Server::kill);
}

#[test]
fn a_guest_does_not_notice_that_the_daemon_is_upgraded() {
    the_guest_lives_on("upgrade", Vm::qemu_that_reconnects, Server::hand_over);
}

/// (What it says to the daemon when it reconnects is tried on every machine, in `tests/survival`.)
#[test]
fn a_guest_of_cloud_hypervisor_outlives_its_disks_daemon() {
    if cloud_hypervisor_runs() {
        the_guest_lives_on("ch-outlives", Vm::cloud_hypervisor, Server::kill);
        the_guest_lives_on("ch-upgrade", Vm::cloud_hypervisor, Server::hand_over);
    }
}

#[test]
fn a_read_only_disk_can_be_read_and_not_written() {
    let _place = place();
    let boot = Boot::get();
    let scratch = Scratch::new("readonly");
    let (disk, socket, seed) = (scratch.file("disk.img"), scratch.socket(), seed("readonly"));

    // This disk is made by the host, so the guest reads what no genblk has written.
    let tree = scratch.file("tree");
    std::fs::create_dir(&tree).unwrap();
    let (mut list, mut sums) = (String::new(), String::new());
    for (number, size) in [0, 1, 4095, 4096, 65537, 1 << 20, (5 << 20) + 1].into_iter().enumerate() {
        let name = format!("f{number}");
        std::fs::write(tree.join(&name), image::contents(&seed, &name, "1", size)).unwrap();
        sums += &format!("{}  {name}\n", image::sum(&tree.join(&name)));
        list += &format!("{name} 1 {size}\n");
    }
    std::fs::write(tree.join("MANIFEST"), list).unwrap();
    std::fs::write(tree.join("SHA256SUMS"), sums).unwrap();
    image::create_ext4(&disk, 64 * MIB, &tree);
    let before = image::sum(&disk);

    let server = Server::start(&socket, &disk, &["--read-only"]);
    let said = Vm::qemu(boot, &socket, "readonly", &seed).finish();
    assert!(said.contains(&"checked read-only: 7 files are intact".to_owned()), "{said:#?}");
    server.stop();
    assert_eq!(image::sum(&disk), before, "the image has changed");
}

#[test]
fn a_completed_write_is_in_the_image_when_writing_through() {
    let _place = place();
    let boot = Boot::get();
    let scratch = Scratch::new("through");
    let (disk, socket, seed) = (scratch.file("disk.img"), scratch.socket(), seed("through"));
    image::create(&disk, 8 * MIB);

    let server = Server::start(&socket, &disk, &["--cache-mode", "writethrough"]);
    let mut vm = Vm::qemu(boot, &socket, "raw", &seed);
    assert_eq!(vm.wait_for("write cache:"), "write through", "what the guest thinks of its disk");
    assert_eq!(vm.wait_for("written raw"), "3145728");
    // The guest has not asked for a flush, and neither of the two gets a chance to tidy up.
    server.kill();
    vm.kill();

    let mut expected = image::contents(&seed, "raw", "1", 3 << 20);
    expected.resize(8 << 20, 0);
    image::assert_same(&disk, &expected);
}

#[test]
fn the_last_sectors_of_an_odd_disk_are_read() {
    let _place = place();
    let boot = Boot::get();
    let scratch = Scratch::new("tail");
    let (disk, socket, seed) = (scratch.file("disk.img"), scratch.socket(), seed("tail"));
    // Three sectors more than whole pages.
    std::fs::write(&disk, image::contents(&seed, "disk", "1", (8 << 20) + 3 * 512)).unwrap();

    let server = Server::start(&socket, &disk, &["--read-only", "--serial", "odd-disk"]);
    let mut vm = Vm::qemu(boot, &socket, "sum", &seed);
    let geometry = vm.wait_for("disk:");
    assert!(geometry.starts_with("8390144 bytes"), "{geometry}");
    assert_eq!(vm.wait_for("sum "), image::sum(&disk));
    vm.finish();
    server.stop();
    // Last, because the control has a serial number of its own and fails here, rightly.
    assert!(geometry.contains("serial \"odd-disk\""), "{geometry}");
}

/// Whether this machine has cloud-hypervisor and what it needs.
fn cloud_hypervisor_runs() -> bool {
    if !Boot::get().kvm {
        eprintln!("skipped: cloud-hypervisor needs KVM, which does not work here");
        return false;
    }
    let found = host::tool("cloud-hypervisor").arg("--version").output().is_ok();
    if !found {
        eprintln!("skipped: cloud-hypervisor is not on PATH");
    }
    found
}

#[test]
fn cloud_hypervisor_finds_the_same_disk() {
    if !cloud_hypervisor_runs() {
        return;
    }
    let _place = place();
    let boot = Boot::get();
    let scratch = Scratch::new("ch");
    let (disk, socket, seed) = (scratch.file("disk.img"), scratch.socket(), seed("ch"));
    image::create(&disk, 256 * MIB);

    let server = Server::start(&socket, &disk, &SMALL_CACHE);
    let written = image::manifest(&Vm::cloud_hypervisor(boot, &socket, "format", &seed).finish());
    assert_complete(&written);
    // The disk goes from one hypervisor to the other with the daemon's cache still warm.
    let again = image::manifest(&Vm::qemu(boot, &socket, "verify", &seed).finish());
    assert_eq!(again, written, "QEMU's guest sees other files than cloud-hypervisor's");
    server.stop();
    image::assert_clean(&disk);
    image::assert_holds(&disk, &scratch.file("tree"), &written, &seed);
}
