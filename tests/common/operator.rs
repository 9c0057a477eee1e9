//! A daemon with a control socket, and an operator who uses it.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};

use super::daemon::{Daemon, TempDir, server_binary};
use super::wait::{TIMEOUT, poll_until};

pub const IMAGE_BYTES: u64 = 8 << 20;

/// The table of a disk with this image in `directory`.
pub fn table(directory: &TempDir, name: &str, image: &str, more: &str) -> String {
    let (image, socket) = (directory.path().join(image), directory.path().join(format!("{name}.sock")));
    let memory = directory.memory();
    format!(
        "[[device]]\nname = \"{name}\"\nsocket = {socket:?}\nimage = {image:?}\ncache.size = \"4M\"\n\
         cache.dirty_age_max_ms = 600000\ncache.memory_dir = {memory:?}\n{more}"
    )
}

/// Starts a daemon with the disk `d0` and a control socket. Nothing is written back unless somebody asks.
pub fn start(name: &str) -> (Daemon, PathBuf) {
    start_prepared(name, |_, _| {})
}

/// As [`start`], with a daemon whose command `prepare` has changed.
pub fn start_prepared(name: &str, prepare: impl FnOnce(&mut Command, &Path)) -> (Daemon, PathBuf) {
    let directory = TempDir::new(name);
    let paths = directory.path().to_path_buf();
    let (control, image, socket) = (paths.join("control.sock"), paths.join("image"), paths.join("d0.sock"));
    fs::File::create(&image).and_then(|file| file.set_len(IMAGE_BYTES)).expect("an image can be created");
    let text = format!("[control]\nsocket = {control:?}\n{}", table(&directory, "d0", "image", ""));
    let config = paths.join("genblk.toml");
    fs::write(&config, text).expect("a configuration can be written");
    let mut command = Command::new(server_binary());
    command.arg("--config").arg(config);
    prepare(&mut command, &paths);
    let daemon = Daemon::launch(directory, command, vec![socket]);
    poll_until("the control socket", TIMEOUT, || UnixStream::connect(&control).ok());
    // The socket of a disk is there before the disk is served.
    poll_until("the disk", TIMEOUT, || (state(&control) == "serving").then_some(()));
    (daemon, control)
}

/// Runs `genblk` with these arguments, against the control socket.
pub fn genblk(control: &Path, arguments: &[&str]) -> Output {
    Command::new(server_binary()).env("GENBLK_CONTROL", control).args(arguments).output().expect("genblk runs")
}

#[track_caller]
pub fn stdout_of(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout.clone()).expect("text")
}

/// A varlink connection that has made a call.
pub struct Call(BufReader<UnixStream>);

impl Call {
    pub fn start(control: &Path, method: &str, parameters: &Value, more: bool) -> Self {
        let mut stream = UnixStream::connect(control).expect("the daemon listens");
        stream.set_read_timeout(Some(TIMEOUT)).expect("a timeout can be set");
        let call = json!({"method": format!("io.genblk.Control.{method}"), "parameters": parameters, "more": more});
        stream.write_all(&[call.to_string().as_bytes(), &[0]].concat()).expect("the daemon reads");
        Self(BufReader::new(stream))
    }

    #[track_caller]
    pub fn reply(&mut self) -> Value {
        let mut bytes = Vec::new();
        let count = self.0.read_until(0, &mut bytes).expect("a reply");
        serde_json::from_slice(&bytes[..count - 1]).expect("a reply is JSON")
    }
}

#[track_caller]
pub fn call(control: &Path, method: &str, parameters: &Value) -> Value {
    Call::start(control, method, parameters, false).reply()
}

#[track_caller]
pub fn state(control: &Path) -> Value {
    call(control, "List", &json!({"device": "d0"}))["parameters"]["devices"][0]["state"].clone()
}

pub fn names(control: &Path) -> Vec<String> {
    let listed = call(control, "List", &json!({}));
    let devices = listed["parameters"]["devices"].as_array().expect("an array").clone();
    devices.iter().filter_map(|device| device["name"].as_str().map(ToOwned::to_owned)).collect()
}
