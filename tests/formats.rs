//! Images that are not raw are refused with the way out, and a guest that makes its raw disk look like another format
//! is served again.

mod common;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::daemon::{Daemon, Ended, TempDir, run_to_end, server_binary};
use common::request::{assert_serves, pattern};
use common::session::{Session, SessionOptions};

const MIB: u64 = 1 << 20;

/// A directory of a test with an image of `bytes` zeros that begins with `head`.
fn image(head: &[u8], bytes: u64) -> TempDir {
    let directory = TempDir::new("format");
    let file = File::create(directory.path().join("image")).expect("an image can be created");
    file.set_len(bytes).and_then(|()| file.write_all_at(head, 0)).expect("an image can be written");
    directory
}

/// Runs the daemon on the image in `directory`; it must exit.
fn serve(directory: &TempDir, options: &[&str]) -> Ended {
    let path = |name: &str| directory.path().join(name);
    let mut command = Command::new(server_binary());
    command.arg("--socket-path").arg(path("socket")).arg("--blk-file").arg(path("image"));
    run_to_end(command.arg("--memory-dir").arg(directory.memory()).args(options))
}

#[track_caller]
fn assert_refused(directory: &TempDir, words: &[&str]) {
    let path = directory.path().join("image");
    let content = fs::read(&path).expect("the image can be read");
    for options in [&[][..], &["--read-only"]] {
        let ended = serve(directory, options);
        assert_eq!(ended.status.code(), Some(1), "{ended:?}");
        for word in words.iter().chain(&["format = \"raw\"", "--format raw"]) {
            assert!(ended.stderr.contains(word), "{word:?} is not in {ended:?}");
        }
        assert!(directory.left().is_empty(), "nothing is left in memory");
        assert!(!directory.path().join("socket").exists(), "no socket is created");
    }
    assert!(fs::read(&path).expect("the image can be read") == content, "the image is unchanged");
}

/// The command that the refusal suggests, run as it stands.
fn run_suggestion(directory: &TempDir) -> PathBuf {
    let refused = serve(directory, &[]).stderr;
    let (_, rest) = refused.split_once(" it with \"").expect("the refusal names a command");
    let (command, _) = rest.split_once("\", and serve").expect("the command ends");
    let ended = run_to_end(Command::new("sh").args(["-c", command]));
    assert!(ended.status.success(), "{command}: {ended:?}");
    directory.path().join("image.raw")
}

fn has(tool: &str) -> bool {
    let found = Command::new("sh").args(["-c", &format!("command -v {tool}")]).output();
    let found = found.is_ok_and(|output| output.status.success());
    if !found {
        println!("skipped: {tool} is not installed");
    }
    found
}

#[test]
fn every_qemu_img_format_is_refused_with_a_working_command_to_convert_it() {
    if !has("qemu-img") {
        return;
    }
    let kinds = [
        ("qcow2", "", "qcow2"),
        ("qcow2", "compat=0.10", "qcow2"),
        ("qcow", "", "qcow (version 1)"),
        ("qed", "", "QED"),
        ("vmdk", "subformat=monolithicSparse", "VMDK"),
        ("vmdk", "subformat=monolithicFlat", "VMDK"),
        ("vmdk", "subformat=twoGbMaxExtentSparse", "VMDK"),
        ("vmdk", "subformat=streamOptimized", "VMDK"),
        ("vhdx", "subformat=dynamic", "VHDX"),
        ("vhdx", "subformat=fixed", "VHDX"),
        ("vdi", "", "VDI"),
        ("vpc", "subformat=dynamic,force_size=on", "VHD"),
        ("vpc", "subformat=fixed,force_size=on", "VHD"),
        ("parallels", "", "Parallels"),
    ];
    for (format, options, name) in kinds {
        let directory = image(b"", 0);
        let raw = directory.path().join("source.raw");
        let content = pattern(5, 0, 8 << 20);
        fs::write(&raw, &content).expect("a file can be written");
        let mut convert = Command::new("qemu-img");
        convert.args(["convert", "-f", "raw", "-O", format]);
        if !options.is_empty() {
            convert.args(["-o", options]);
        }
        let made = convert.arg(&raw).arg(directory.path().join("image")).output().expect("qemu-img runs");
        if !made.status.success() {
            println!("{format} {options}: not written by this qemu-img");
            continue;
        }
        let size = format!("is a {name} image (virtual size 8388608 bytes)");
        assert_refused(&directory, &[&size, "qemu-img convert -p -f "]);
        let converted = run_suggestion(&directory);
        assert!(fs::read(converted).expect("it was converted") == content, "{format} {options}");
    }
}

#[test]
fn compressed_images_are_refused_with_a_working_command_to_unpack_them() {
    for (tool, name) in [("gzip", "gzip"), ("xz", "xz"), ("zstd", "zstd"), ("bzip2", "bzip2")] {
        if !has(tool) {
            continue;
        }
        let directory = image(b"", 0);
        let (raw, packed) = (directory.path().join("source.raw"), directory.path().join("image"));
        let content = pattern(6, 0, 1 << 20);
        fs::write(&raw, &content).expect("a file can be written");
        let output = Command::new(tool).args(["-c", "-q"]).arg(&raw).output().expect("the tool runs");
        assert!(output.status.success(), "{output:?}");
        fs::write(&packed, &output.stdout).expect("a file can be written");
        assert_refused(&directory, &[&format!("is a {name} file, and genblk")]);
        assert!(fs::read(run_suggestion(&directory)).expect("it was unpacked") == content, "{name}");
    }
}

#[test]
fn a_luks_container_made_on_the_host_is_refused() {
    assert_refused(&image(b"LUKS\xba\xbe\0\x02", 4 * MIB), &["is a LUKS container, and", "key-secret=key"]);
}

#[test]
fn format_raw_serves_the_bytes_of_any_image() {
    let directory = image(b"QFI\xfb\0\0\0\x03", 4 * MIB);
    let daemon = Daemon::start_configured(directory, &["format = \"raw\""]);
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    assert_eq!(&session.read(0, 512)[..4], b"QFI\xfb");
    daemon.await_log("looks like qcow2; served as raw, because format = \"raw\" is set");
}

#[test]
fn a_memory_directory_on_a_disk_is_refused_with_its_file_system_type() {
    let directory = image(b"", 4 * MIB);
    let on_disk = directory.path().join("memory");
    let output = Command::new("stat").args(["-f", "-c", "%T"]).arg(directory.path()).output().expect("stat runs");
    if output.stdout.starts_with(b"tmpfs") {
        println!("skipped: the test's directory is in memory");
        return;
    }
    let text = format!(
        "[[device]]\nname = \"disk\"\nsocket = \"socket\"\nimage = \"image\"\n\
         cache.memory_dir = {on_disk:?}\ncache.survive = \"always\"\n"
    );
    fs::write(directory.path().join("disk.toml"), &text).expect("a file can be written");
    let mut command = Command::new(server_binary());
    let ended = run_to_end(command.current_dir(directory.path()).args(["--config", "disk.toml"]));
    assert_eq!(ended.status.code(), Some(2), "{ended:?}");
    for word in [on_disk.to_str().expect("UTF-8"), " is on ", "which is not memory; use a tmpfs such as /dev/shm"] {
        assert!(ended.stderr.contains(word), "{word}: {ended:?}");
    }
    assert!(!on_disk.exists() && !directory.path().join("socket").exists(), "nothing is created");

    // A cache that may as well die with the daemon is served.
    fs::write(directory.path().join("disk.toml"), text.replace("always", "auto")).expect("a file can be written");
    let mut command = Command::new(server_binary());
    let checked = run_to_end(command.current_dir(directory.path()).args(["--config", "disk.toml", "--check"]));
    assert!(checked.status.success() && checked.stdout.contains("no problems, 1 device"), "{checked:?}");
    assert!(checked.stdout.contains("which is not memory"), "{checked:?}");
    let device = format!("cache.memory_dir = {on_disk:?}\ncache.survive = \"auto\"");
    let daemon = Daemon::start_configured(directory, &[&device]);
    daemon.await_log("which is not memory; use a tmpfs such as /dev/shm, or a mounted hugetlbfs; using a cache that");
    assert_serves(&daemon.socket(), 0);
}

/// The first sector of a disk that the guest has encrypted as a whole.
fn luks() -> Vec<u8> {
    let mut sector = vec![0; 512];
    sector[..8].copy_from_slice(b"LUKS\xba\xbe\0\x02");
    sector
}

#[test]
fn a_format_header_written_by_the_guest_does_not_lock_it_out() {
    let directory = image(b"", 4 * MIB);
    let mut daemon = Daemon::start_configured(directory, &["cache.dirty_age_max_ms = 600000"]);
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    session.write(0, &luks());
    session.flush();
    drop(session);
    daemon.await_log("its guest writes a LUKS header; recorded, and still served");
    daemon.stop();
    daemon.restart();
    daemon.await_log("looks like LUKS; served as raw, because its guest has written the header");
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    assert_eq!(session.read(0, 512), luks());
    drop(session);
    daemon.stop();
    // Another format at the same place is not what the guest wrote.
    let file = File::options().write(true).open(daemon.image()).expect("the image can be opened");
    file.write_all_at(b"QFI\xfb\0\0\0\x03", 0).expect("the image can be written");
    assert_refused(daemon.directory(), &["is a qcow2 image"]);
}

#[test]
fn a_format_footer_written_by_the_guest_does_not_lock_it_out() {
    let directory = image(b"", 4 * MIB);
    let mut daemon = Daemon::start_configured(directory, &[""]);
    let mut footer = vec![0; 512];
    footer[..8].copy_from_slice(b"conectix");
    footer[63] = 2;
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    session.write(4 * MIB / 512 - 1, &footer);
    drop(session);
    daemon.stop();
    daemon.await_log("its guest writes a VHD header");
    daemon.restart();
}

#[test]
fn a_kept_cache_proves_its_image_raw() {
    let directory = image(b"", 4 * MIB);
    let mut daemon = Daemon::start_configured(directory, &["cache.dirty_age_max_ms = 600000"]);
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    session.write(0, &luks());
    daemon.kill();
    daemon.restart();
    let mut session = session.reconnect(&daemon.socket());
    session.start_ring(0);
    assert_eq!(session.read(0, 512), luks());
}

#[test]
fn a_kept_cache_does_not_prove_a_replaced_image_raw() {
    let directory = image(b"", 4 * MIB);
    let mut daemon = Daemon::start_configured(directory, &[""]);
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    // The cache has the first sector, which looks like no format.
    session.write(0, &pattern(3, 0, 4096));
    session.write(80, &pattern(4, 80, 4096));
    session.flush();
    daemon.kill();
    let file = File::options().write(true).open(daemon.image()).expect("the image can be opened");
    file.write_all_at(b"QFI\xfb\0\0\0\x03", 0).expect("the image can be written");
    let ended = serve(daemon.directory(), &[]);
    assert!(ended.stderr.contains("is a qcow2 image"), "{ended:?}");
}

/// The first sector of a qcow2 image.
fn qcow2() -> Vec<u8> {
    let mut sector = vec![0; 512];
    sector[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    sector
}

#[test]
fn a_crash_between_several_header_writes_does_not_lock_the_guest_out() {
    let directory = image(b"", 4 * MIB);
    let mut daemon = Daemon::start_configured(directory, &["cache.dirty_age_max_ms = 600000"]);
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    for header in [luks(), qcow2()] {
        session.write(0, &header);
        session.flush();
    }
    drop(session);
    daemon.stop();
    for header in [luks(), qcow2()] {
        let file = File::options().write(true).open(daemon.image()).expect("the image can be opened");
        file.write_all_at(&header, 0).expect("the image can be written");
        daemon.restart();
        daemon.stop();
    }
}

#[test]
fn a_format_header_written_by_recover_does_not_lock_the_guest_out() {
    let directory = image(b"", 4 * MIB);
    let mut daemon = Daemon::start_configured(directory, &["cache.dirty_age_max_ms = 600000"]);
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    session.write(0, &qcow2());
    drop(session);
    daemon.kill();
    let cache = daemon.directory().left().remove(0);
    let ended = run_to_end(Command::new(server_binary()).arg("recover").arg(&cache));
    assert!(ended.status.success() && !cache.exists(), "{ended:?}");
    daemon.restart();
    daemon.await_log("looks like qcow2; served as raw, because its guest has written the header");
}

#[test]
fn a_format_header_completed_by_a_later_sector_does_not_lock_the_guest_out() {
    let directory = image(b"", 4 * MIB);
    let mut daemon = Daemon::start_configured(directory, &["cache.dirty_age_max_ms = 600000"]);
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    session.write(0, &[b'#'; 512]);
    session.flush();
    let mut second = vec![0; 512];
    second[..11].copy_from_slice(b"\nversion=1\n");
    session.write(1, &second);
    drop(session);
    daemon.stop();
    daemon.restart();
    daemon.await_log("looks like VMDK; served as raw, because its guest has written the header");
}

/// On a block device nothing can be recorded at the image: the cache file has the record, also after an orderly end,
/// and whether or not the cache holds the first page.
#[test]
fn a_header_on_a_block_device_does_not_lock_its_guest_out() {
    let directory = image(b"", 64 * MIB);
    let path = directory.path().join("image");
    let Some(device) = Loop::attach(&path, &[]) else { return };
    let socket = directory.path().join("socket");
    let launch = || {
        let mut command = Command::new(server_binary());
        command.arg("--socket-path").arg(&socket).args(["--blk-file", &device.0, "--cache-size", "4M"]);
        command.arg("--memory-dir").arg(directory.memory());
        Daemon::launch(TempDir::new("format"), command, vec![socket.clone()])
    };
    let mut daemon = launch();
    let mut session = Session::open(&socket, &SessionOptions::default());
    session.write(0, &qcow2());
    session.flush();
    for sector in (0..64 * MIB / 512).step_by(2048) {
        session.read(sector + 8, 64 << 10);
    }
    drop(session);
    for end in ["kill", "stop", "stop"] {
        if end == "kill" {
            daemon.kill();
        } else {
            daemon.stop();
        }
        daemon = launch();
        daemon.await_log("looks like qcow2; served as raw, because it was served before, and its cache was kept");
    }
    daemon.stop();
    // Another format is not what the guest wrote.
    File::options().write(true).open(&device.0).and_then(|file| file.write_all_at(b"KDMV", 0)).expect("a write");
    let mut command = Command::new(server_binary());
    command.arg("--socket-path").arg(&socket).args(["--blk-file", &device.0, "--memory-dir"]).arg(directory.memory());
    let ended = run_to_end(&mut command);
    assert!(ended.stderr.contains(" is a VMDK image, and genblk"), "{ended:?}");
}

/// A loop device on a file; detached on drop.
struct Loop(String);

impl Loop {
    /// `None`: this machine has no loop devices, or the user may not use them.
    fn attach(file: &Path, options: &[&str]) -> Option<Self> {
        let output = Command::new("losetup").args(["--show", "-f"]).args(options).arg(file).output().ok()?;
        if !output.status.success() {
            println!("skipped: {}", String::from_utf8_lossy(&output.stderr));
            return None;
        }
        Some(Self(String::from_utf8(output.stdout).ok()?.trim().to_owned()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        // A test must not fail because its device cannot be detached.
        let _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}

#[test]
fn a_read_only_block_device_is_refused_for_writing_and_served_read_only() {
    let directory = image(b"", 4 * MIB);
    let Some(device) = Loop::attach(&directory.path().join("image"), &["-r"]) else { return };
    let socket = directory.path().join("socket");
    let command = |options: &[&str]| {
        let mut command = Command::new(server_binary());
        command.arg("--socket-path").arg(&socket).args(["--blk-file", &device.0]).args(options);
        command.arg("--memory-dir").arg(directory.memory());
        command
    };
    let ended = run_to_end(&mut command(&[]));
    assert_eq!(ended.status.code(), Some(1), "{ended:?}");
    for word in [&device.0, "is a read-only block device", "blockdev --setrw", "read_only = true"] {
        assert!(ended.stderr.contains(word), "{word}: {ended:?}");
    }
    let command = command(&["--read-only"]);
    let mut daemon = Daemon::launch(TempDir::new("format"), command, vec![socket.clone()]);
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    session.read(0, 512);
    drop(session);
    daemon.stop();
}

#[test]
fn a_block_device_that_holds_another_format_is_refused_and_luks_is_served() {
    for (head, is_served) in [(&b"QFI\xfb\0\0\0\x03"[..], false), (b"LUKS\xba\xbe\0\x02", true)] {
        let directory = image(head, 4 * MIB);
        let Some(device) = Loop::attach(&directory.path().join("image"), &[]) else { return };
        let socket = directory.path().join("socket");
        let mut command = Command::new(server_binary());
        command.arg("--socket-path").arg(&socket).args(["--blk-file", &device.0]);
        command.arg("--memory-dir").arg(directory.memory());
        if is_served {
            let mut daemon = Daemon::launch(TempDir::new("format"), command, vec![socket]);
            daemon.await_log("begins with a LUKS header; served as raw, because it is a block device");
            daemon.stop();
        } else {
            let ended = run_to_end(&mut command);
            assert!(ended.stderr.contains(" is a qcow2 image, and genblk"), "{ended:?}");
        }
    }
}
