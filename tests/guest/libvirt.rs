//! A guest under libvirt, from the domain of configs/libvirt-domain.xml.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use crate::host::{Boot, Scratch, guest_slot, memory_of, run, tool};
use crate::server::Server;
use crate::vm::{MARK, command_line};
use crate::{MIB, image, seed};

const NAME: &str = "genblk-example";

/// The longest wait: libvirt may have to find out first what QEMU can do.
const TIMEOUT: Duration = Duration::from_secs(300);

/// A command of libvirt's client.
fn virsh(arguments: &[&str]) -> std::process::Command {
    let mut command = tool("virsh");
    command.args(["--connect", "qemu:///system"]).args(arguments);
    command
}

/// A running domain, ended on drop.
struct Domain {
    console: PathBuf,
}

impl Domain {
    /// Starts the domain of the example, with a kernel and a job for it.
    fn start(boot: &Boot, scratch: &Scratch, job: &str, seed: &str) -> Self {
        let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/libvirt-domain.xml");
        let mut xml = std::fs::read_to_string(example).unwrap();
        let name = format!("{NAME}-{}", std::process::id());
        let console = scratch.file("console.log");
        let mut replace = |old: &str, new: &str| {
            assert_eq!(xml.matches(old).count(), 1, "{old} in the example");
            xml = xml.replace(old, new);
        };
        replace(&format!("<name>{NAME}</name>"), &format!("<name>{name}</name>"));
        replace("'/run/genblk/disk0.sock'", &format!("'{}'", scratch.socket().display()));
        let serial = format!("<serial type='file'><source path='{}'/></serial>", console.display());
        replace("<serial type='pty'/>", &serial);
        replace("<domain type='kvm'>", if boot.kvm { "<domain type='kvm'>" } else { "<domain type='qemu'>" });
        let kernel = format!(
            "</type><kernel>{}</kernel><initrd>{}</initrd><cmdline>{}</cmdline>",
            boot.kernel.display(),
            boot.initramfs.display(),
            command_line(job, seed)
        );
        replace("</type>", &kernel);
        let file = scratch.file("domain.xml");
        std::fs::write(&file, xml).unwrap();
        run(virsh(&["create"]).arg(&file));
        Self { console }
    }

    /// The guest's messages so far that start with `what`.
    fn messages(&self, what: &str) -> Vec<String> {
        let text = std::fs::read(&self.console).unwrap_or_default();
        let text = String::from_utf8_lossy(&text).into_owned();
        let messages = text.lines().filter_map(|line| line.split_once(MARK)).map(|(_, message)| message.to_owned());
        messages.filter(|message| message.starts_with(what)).collect()
    }

    /// Waits until the guest has sent `count` messages that start with `what`.
    fn wait_for(&self, what: &str, count: usize) {
        let deadline = Instant::now() + TIMEOUT;
        while self.messages(what).len() < count {
            let in_time = Instant::now() < deadline && self.messages("FAILED").is_empty();
            assert!(in_time, "{count} times {what}: {:#?}", self.messages(""));
            thread::sleep(Duration::from_millis(100));
        }
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        // It fails if the guest has powered off.
        let _ = virsh(&["destroy", &format!("{NAME}-{}", std::process::id())]).output();
    }
}

/// Why the test cannot run here, if it cannot.
fn obstacle() -> Option<&'static str> {
    if !virsh(&["version"]).output().is_ok_and(|output| output.status.success()) {
        return Some("libvirt's daemon does not run here");
    }
    if !tool("getent").args(["group", "kvm"]).output().is_ok_and(|output| output.status.success()) {
        return Some("there is no group kvm, to which QEMU belongs under libvirt");
    }
    let group = tool("id").arg("-Gn").output().unwrap().stdout;
    let is_member = String::from_utf8_lossy(&group).split_whitespace().any(|name| name == "root" || name == "kvm");
    (!is_member).then_some("this user is not a member of group kvm")
}

/// QEMU runs as another user, whom `socket_group` lets in. The guest goes on over a kill and an upgrade of the daemon.
#[test]
fn a_libvirt_guest_survives_restarts_of_its_daemon() {
    if let Some(obstacle) = obstacle() {
        eprintln!("skipped: {obstacle}");
        return;
    }
    let _slot = guest_slot();
    let boot = Boot::get();
    let scratch = Scratch::new("libvirt");
    let (disk, socket, seed) = (scratch.file("disk.img"), scratch.socket(), seed("libvirt"));
    std::fs::create_dir(scratch.file("empty")).unwrap();
    image::create_ext4(&disk, 128 * MIB, &scratch.file("empty"));
    let config = scratch.file("genblk.toml");
    let text = format!(
        "[[device]]\nname = \"disk0\"\nsocket = {socket:?}\nsocket_mode = \"0660\"\nsocket_group = \"kvm\"\n\
         image = {disk:?}\ncache.size = \"16M\"\ncache.memory_dir = {:?}\n",
        memory_of(&socket)
    );
    std::fs::write(&config, text).unwrap();

    let server = Server::start_from(&config, &socket, &disk);
    let domain = Domain::start(boot, &scratch, "crash", &seed);
    domain.wait_for("synced ", 10);
    server.kill();
    let server = Server::start_from(&config, &socket, &disk);
    domain.wait_for("synced ", domain.messages("synced ").len() + 10);
    server.hand_over();
    let server = Server::start_from(&config, &socket, &disk);
    domain.wait_for("synced ", domain.messages("synced ").len() + 10);
    drop(domain);
    server.stop();
}
