//! A daemon with a control socket and two disks, and the commands that look at it.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use super::daemon::{Daemon, TempDir, server_binary};
use super::wait::{TIMEOUT, poll_until};

/// Size of each disk.
pub const IMAGE_BYTES: u64 = 8 << 20;

/// Starts a daemon with the disks `d0` and `d1`; `d1` has no image if `is_broken`. Returns its control socket, too.
pub fn start(name: &str, is_broken: bool) -> (Daemon, PathBuf) {
    let directory = TempDir::new(name);
    let paths = directory.path().to_path_buf();
    let control = paths.join("control.sock");
    let mut text = format!("[control]\nsocket = {control:?}\n");
    for disk in ["d0", "d1"] {
        let (image, socket) = (paths.join(format!("{disk}.img")), paths.join(format!("{disk}.sock")));
        if !(is_broken && disk == "d1") {
            fs::File::create(&image).and_then(|file| file.set_len(IMAGE_BYTES)).expect("an image can be created");
        }
        text += &format!(
            "[[device]]\nname = \"{disk}\"\nsocket = {socket:?}\nimage = {image:?}\ncache.size = \"4M\"\n\
             cache.memory_dir = {:?}\n",
            directory.memory()
        );
    }
    let config = paths.join("genblk.toml");
    fs::write(&config, text).expect("a configuration can be written");
    let mut command = Command::new(server_binary());
    command.arg("--config").arg(config);
    let served: &[&str] = if is_broken { &["d0"] } else { &["d0", "d1"] };
    let sockets = served.iter().map(|disk| paths.join(format!("{disk}.sock"))).collect();
    let daemon = Daemon::launch(directory, command, sockets);
    poll_until("the control socket", TIMEOUT, || UnixStream::connect(&control).ok());
    (daemon, control)
}

/// Runs `genblk` with these arguments, against the control socket.
pub fn genblk(control: &Path, arguments: &[&str]) -> Output {
    Command::new(server_binary()).args(arguments).arg("--socket").arg(control).output().expect("genblk runs")
}

/// What a command that succeeded has printed.
#[track_caller]
pub fn stdout_of(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout.clone()).expect("text")
}
