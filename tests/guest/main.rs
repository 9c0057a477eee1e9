//! A Linux guest on genblk's disk: it formats, writes, trims, reboots and loses power. Then the host checks the image
//! with independent tools.
//!
//! mkinitramfs.sh builds the guest, and its `init` runs the jobs; both are in this directory. Under TCG a boot takes
//! about four seconds on two cores. Without QEMU or a kernel these tests fail; `make setup` installs both. To tell a
//! bug of genblk from one of the guest, run the control: `GENBLK_BIN=tests/guest/control.sh cargo test --test guest`.

// All of this is test code, but clippy.toml's exception covers only functions with #[test].
#![allow(clippy::unwrap_used)]

mod front_ends;
mod host;
mod image;
mod libvirt;
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

use host::{Boot, Scratch, guest_slot};
use image::GuestFile;
use server::Server;
use vm::Vm;

const MIB: u64 = 1 << 20;

/// Less than the guest's files: the cache must evict and write back all the time.
const SMALL_CACHE: [&str; 2] = ["--cache-size", "16M"];

/// A seed that is unique to this run, so that data of an earlier run cannot pass for this one's.
fn seed(test: &str) -> String {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    format!("{test}-{}", since.as_micros())
}

/// Checks that the job `format` has created all its files: an empty manifest must not pass.
fn assert_complete(files: &[GuestFile]) {
    let total: usize = files.iter().map(|file| file.size).sum();
    assert_eq!(files.len(), 38, "files in the manifest");
    assert!(total > 30 << 20, "the manifest names only {total} bytes");
    assert!(files.iter().any(|file| file.generation == "2/7+3"), "no file has a patch of generation 2");
}

#[test]
fn files_survive_reboots_and_a_restart_of_the_daemon() {
    let _slot = guest_slot();
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
    assert_eq!(again, written, "the second boot, with the same daemon");
    server.stop();

    let server = Server::start(&socket, &disk, &SMALL_CACHE);
    let again = image::manifest(&Vm::qemu(boot, &socket, "verify", &seed).finish());
    assert_eq!(again, written, "the third boot, with a new daemon");
    server.stop();

    image::assert_clean(&disk);
    image::assert_holds(&disk, &scratch.file("tree"), &written, &seed);
}

/// Kills the machine while the guest writes and syncs. `then` may kill the daemon too; it returns the daemon for the
/// next boot.
fn check_synced_files_after_a_kill(name: &str, then: impl FnOnce(Server, &Path, &Path) -> Server) {
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
fn synced_files_survive_a_kill_of_the_machine() {
    let _slot = guest_slot();
    check_synced_files_after_a_kill("vm-killed", |mut server, _, _| {
        server.assert_alive();
        server
    });
}

#[test]
fn synced_files_survive_a_kill_of_machine_and_daemon() {
    let _slot = guest_slot();
    check_synced_files_after_a_kill("both-killed", |server, socket, disk| {
        server.kill();
        Server::start(socket, disk, &SMALL_CACHE)
    });
}

/// The guest formats, writes and verifies while its daemon is ended with `end` and restarted, several times.
fn check_guest_across_restarts(name: &str, start: fn(&Boot, &Path, &str, &str) -> Vm, end: fn(Server)) {
    const RESTARTS: u32 = 5;
    let _slot = guest_slot();
    let boot = Boot::get();
    let scratch = Scratch::new(name);
    let (disk, socket, seed) = (scratch.file("disk.img"), scratch.socket(), seed(name));
    image::create(&disk, 256 * MIB);

    let mut server = Server::start(&socket, &disk, &SMALL_CACHE);
    let mut vm = start(boot, &socket, "format", &seed);
    vm.wait_for("disk:");
    let (written, server) = thread::scope(|scope| {
        let restarts = scope.spawn(|| {
            for _ in 0..RESTARTS {
                thread::sleep(Duration::from_millis(1100));
                end(server);
                server = Server::start(&socket, &disk, &SMALL_CACHE);
            }
            server
        });
        let written = image::manifest(&vm.finish());
        assert!(restarts.is_finished(), "the guest finished before {RESTARTS} restarts");
        (written, restarts.join().unwrap())
    });
    assert_complete(&written);
    server.stop();
    image::assert_clean(&disk);
    image::assert_holds(&disk, &scratch.file("tree"), &written, &seed);
}

#[test]
fn a_guest_survives_kills_of_its_daemon() {
    check_guest_across_restarts("outlives", Vm::qemu_that_reconnects, Server::kill);
}

#[test]
fn a_guest_survives_upgrades_of_its_daemon() {
    check_guest_across_restarts("upgrade", Vm::qemu_that_reconnects, Server::hand_over);
}

/// Needs KVM. `tests/survival` sends the messages of cloud-hypervisor's reconnection on every machine.
#[test]
fn a_cloud_hypervisor_guest_survives_kills_of_its_daemon() {
    if cloud_hypervisor_runs() {
        check_guest_across_restarts("ch-outlives", Vm::cloud_hypervisor, Server::kill);
        check_guest_across_restarts("ch-upgrade", Vm::cloud_hypervisor, Server::hand_over);
    }
}

#[test]
fn a_guest_can_read_but_not_write_a_read_only_disk() {
    let _slot = guest_slot();
    let boot = Boot::get();
    let scratch = Scratch::new("readonly");
    let (disk, socket, seed) = (scratch.file("disk.img"), scratch.socket(), seed("readonly"));

    // The host makes this disk: the guest reads data that genblk has not written.
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
fn a_completed_write_is_on_the_image_of_a_writethrough_disk() {
    let _slot = guest_slot();
    let boot = Boot::get();
    let scratch = Scratch::new("through");
    let (disk, socket, seed) = (scratch.file("disk.img"), scratch.socket(), seed("through"));
    image::create(&disk, 8 * MIB);

    let server = Server::start(&socket, &disk, &["--cache-mode", "writethrough"]);
    let mut vm = Vm::qemu(boot, &socket, "raw", &seed);
    assert_eq!(vm.wait_for("write cache:"), "write through", "the cache mode that the guest sees");
    assert_eq!(vm.wait_for("written raw"), "3145728");
    // The guest has not flushed, and neither daemon nor guest can write anything back.
    server.kill();
    vm.kill();

    let mut expected = image::contents(&seed, "raw", "1", 3 << 20);
    expected.resize(8 << 20, 0);
    image::assert_same(&disk, &expected);
}

#[test]
fn the_last_sectors_of_an_unaligned_disk_can_be_read() {
    let _slot = guest_slot();
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
    // Last, because the control has another serial: it fails here.
    assert!(geometry.contains("serial \"odd-disk\""), "{geometry}");
}

/// Whether cloud-hypervisor runs on this machine.
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
fn cloud_hypervisor_and_qemu_read_the_same_disk() {
    if !cloud_hypervisor_runs() {
        return;
    }
    let _slot = guest_slot();
    let boot = Boot::get();
    let scratch = Scratch::new("ch");
    let (disk, socket, seed) = (scratch.file("disk.img"), scratch.socket(), seed("ch"));
    image::create(&disk, 256 * MIB);

    let server = Server::start(&socket, &disk, &SMALL_CACHE);
    let written = image::manifest(&Vm::cloud_hypervisor(boot, &socket, "format", &seed).finish());
    assert_complete(&written);
    // The daemon runs on: QEMU's guest finds its cache warm.
    let again = image::manifest(&Vm::qemu(boot, &socket, "verify", &seed).finish());
    assert_eq!(again, written, "the files that QEMU's guest sees");
    server.stop();
    image::assert_clean(&disk);
    image::assert_holds(&disk, &scratch.file("tree"), &written, &seed);
}

#[test]
fn a_running_guest_uses_its_grown_disk() {
    let _slot = guest_slot();
    let boot = Boot::get();
    let scratch = Scratch::new("grow");
    let (disk, socket, seed) = (scratch.file("disk.img"), scratch.socket(), seed("grow"));
    image::create(&disk, 64 * MIB);

    let server = Server::start(&socket, &disk, &SMALL_CACHE);
    let mut vm = Vm::qemu(boot, &socket, "grow", &seed);
    vm.wait_for("ready to grow");
    std::fs::File::options().write(true).open(&disk).unwrap().set_len(96 * MIB).unwrap();
    assert_eq!(vm.wait_for("grown to"), (96 * MIB).to_string());
    vm.finish();
    server.stop();

    let bytes = std::fs::read(&disk).unwrap();
    let new = usize::try_from(64 * MIB).unwrap();
    assert!(bytes[new..new + (1 << 20)] == image::contents(&seed, "end", "1", 1 << 20), "what the guest wrote");
}
