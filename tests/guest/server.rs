//! The daemon under test as a process.

use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::host::{memory_of, run};

/// The limit for a start or a stop. A stop writes back all dirty pages.
const TIMEOUT: Duration = Duration::from_secs(30);

#[derive(Debug)]
pub struct Server {
    child: Child,
    log: PathBuf,
}

impl Server {
    /// Starts the daemon on `image` and returns when it listens on `socket`. `GENBLK_BIN` may name another program with
    /// the same options.
    pub fn start(socket: &Path, image: &Path, options: &[&str]) -> Self {
        let mut arguments: Vec<OsString> = vec!["--socket-path".into(), socket.into()];
        arguments.extend(["--blk-file".into(), image.into(), "--memory-dir".into(), memory_of(socket).into()]);
        arguments.extend(options.iter().map(OsString::from));
        if !options.contains(&"--num-queues") {
            arguments.extend(["--num-queues", "2"].map(OsString::from));
        }
        Self::start_with(socket, image, &arguments)
    }

    /// As [`Server::start`], with a configuration file that names the same socket and image.
    pub fn start_from(config: &Path, socket: &Path, image: &Path) -> Self {
        Self::start_with(socket, image, &["--config".into(), config.into()])
    }

    fn start_with(socket: &Path, image: &Path, arguments: &[OsString]) -> Self {
        let program = std::env::var_os("GENBLK_BIN").unwrap_or_else(|| env!("CARGO_BIN_EXE_genblk").into());
        let program = Path::new(env!("CARGO_MANIFEST_DIR")).join(program);
        let log = image.with_extension("log");
        let out = File::options().create(true).append(true).open(&log).unwrap();
        let child = Command::new(&program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(out.try_clone().unwrap())
            .stderr(out)
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}", program.display()));
        let mut server = Self { child, log };
        let deadline = Instant::now() + TIMEOUT;
        while !is_listening(socket) {
            if let Some(status) = server.child.try_wait().unwrap() {
                panic!("the daemon exited before it listened: {status}");
            }
            assert!(Instant::now() < deadline, "the daemon does not listen");
            thread::sleep(Duration::from_millis(10));
        }
        server
    }

    /// What the daemon has logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    /// Sends SIGTERM: the daemon must write everything back and exit with status 0.
    pub fn stop(self) {
        self.end("-TERM");
    }

    /// Sends SIGUSR1: the daemon must exit with status 0 and leave its cache for the next one.
    pub fn hand_over(self) {
        self.end("-USR1");
    }

    fn end(mut self, signal: &str) {
        self.assert_alive();
        let pid = self.child.id().to_string();
        run(Command::new("kill").args([signal, &pid]));
        let deadline = Instant::now() + TIMEOUT;
        let status: ExitStatus = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < deadline, "the daemon does not stop");
            thread::sleep(Duration::from_millis(10));
        };
        assert!(status.success(), "the daemon exited with {status}");
    }

    /// Sends SIGKILL.
    pub fn kill(mut self) {
        self.assert_alive();
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub fn assert_alive(&mut self) {
        if let Some(status) = self.child.try_wait().unwrap() {
            panic!("the daemon exited: {status}");
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Both fail if the process has been waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            let log = std::fs::read_to_string(&self.log).unwrap_or_default();
            eprintln!("the daemon's log:\n{log}");
        }
    }
}

/// Whether a process listens on `socket`. Asks the kernel: a test connection would count as a front-end, and the
/// socket's file may be left from a killed daemon, or not listen yet.
fn is_listening(socket: &Path) -> bool {
    const ACCEPTS: &str = "00010000";
    let table = std::fs::read_to_string("/proc/net/unix").unwrap();
    let path = socket.to_str().unwrap();
    table.lines().any(|line| {
        let mut words = line.split_whitespace();
        words.nth(3) == Some(ACCEPTS) && words.last() == Some(path)
    })
}
