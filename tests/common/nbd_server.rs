//! An NBD server on a Unix socket: nbdkit, qemu-nbd, or that of the tests (`forgetful_nbd.rs`). It is killed by its
//! process ID, and never outlives its test.

#![allow(dead_code, reason = "each test binary uses its part")]

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// A server that runs, or was killed and can be started again.
#[derive(Debug)]
pub struct NbdServer {
    child: Option<Child>,
    socket: PathBuf,
    arguments: Vec<String>,
    /// The image of a server of the tests.
    image: Option<PathBuf>,
}

/// The variables with socket and image that a server of the tests gets.
pub const SERVER_VARIABLES: [&str; 2] = ["GENBLK_TEST_NBD_SOCKET", "GENBLK_TEST_NBD_IMAGE"];

/// Whether a program can be started; if not, says that a test is skipped.
pub fn is_installed(program: &str) -> bool {
    let found = Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok();
    if !found {
        println!("skipped: {program} is not installed");
    }
    found
}

impl NbdServer {
    /// Starts `arguments` (program first; `SOCKET` stands for the socket's path). `None`: it is not installed.
    pub fn start(socket: &Path, arguments: &[&str]) -> Option<Self> {
        if !is_installed(arguments[0]) {
            return None;
        }
        let socket = socket.to_path_buf();
        let shown = socket.to_str().expect("test paths are UTF-8");
        let arguments = arguments.iter().map(|argument| argument.replace("SOCKET", shown)).collect();
        let mut server = Self { child: None, socket, arguments, image: None };
        server.restart();
        Some(server)
    }

    /// A server that forgets what was not flushed when it is killed, discards included. `test` is the name of the test
    /// that calls `forgetful_nbd::serve_if_requested`, in the same test binary.
    pub fn start_test_server(socket: &Path, image: &Path, test: &str) -> Self {
        let program = std::env::current_exe().expect("the path of the test");
        let program = program.to_str().expect("test paths are UTF-8").to_owned();
        let arguments = vec![program, test.to_owned(), "--exact".to_owned(), "--nocapture".to_owned()];
        let (socket, image) = (socket.to_path_buf(), Some(image.to_path_buf()));
        let mut server = Self { child: None, socket, arguments, image };
        server.restart();
        server
    }

    /// nbdkit in the foreground with these further arguments.
    pub fn nbdkit(socket: &Path, arguments: &[&str]) -> Option<Self> {
        Self::start(socket, &[&["nbdkit", "-f", "-U", "SOCKET"], arguments].concat())
    }

    /// nbdkit on a file, with a write cache that is lost when it is killed.
    pub fn forgetful(socket: &Path, image: &Path) -> Option<Self> {
        let image = image.to_str().expect("test paths are UTF-8");
        Self::nbdkit(socket, &["--filter=cache", "file", image, "cache=writeback"])
    }

    /// Starts it again, after [`NbdServer::kill`].
    ///
    /// => The calling thread must outlive the server: nbdkit ends with it.
    pub fn restart(&mut self) {
        assert!(self.child.is_none(), "it runs");
        let _ = std::fs::remove_file(&self.socket);
        let mut command = Command::new(&self.arguments[0]);
        if let Some(image) = &self.image {
            let [socket_name, image_name] = SERVER_VARIABLES;
            command.env(socket_name, &self.socket).env(image_name, image);
        }
        command.args(&self.arguments[1..]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        self.child = Some(command.spawn().expect("it is installed"));
        let until = Instant::now() + Duration::from_secs(20);
        while UnixStream::connect(&self.socket).is_err() {
            let child = self.child.as_mut().expect("it was just started");
            let status = child.try_wait().expect("the child can be waited for");
            assert!(status.is_none(), "{:?} ended: {status:?}", self.arguments);
            assert!(Instant::now() < until, "{:?} does not listen", self.arguments);
            sleep(Duration::from_millis(5));
        }
    }

    /// As [`NbdServer::restart`], with other arguments after the program.
    pub fn restart_with(&mut self, arguments: &[&str]) {
        let shown = self.socket.to_str().expect("test paths are UTF-8").to_owned();
        self.arguments.truncate(1);
        self.arguments.extend(arguments.iter().map(|argument| argument.replace("SOCKET", &shown)));
        self.restart();
    }

    /// Starts it again if it has ended by itself: nbdkit 1.32 aborts (connections.c, `raw_send_socket`) when a client
    /// dies in the middle of a write.
    pub fn restart_if_aborted(&mut self) {
        sleep(Duration::from_millis(20));
        let child = self.child.as_mut().expect("it was started");
        if child.try_wait().expect("the child can be waited for").is_some() {
            self.child = None;
            self.restart();
        }
    }

    /// Kills it with SIGKILL.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().expect("it runs");
            child.wait().expect("the child can be waited for");
        }
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: i32) {
        let pid = libc::pid_t::try_from(self.child.as_ref().expect("it runs").id()).expect("process ids are small");
        // SAFETY: plain system call; the child has not been reaped, so the id is still its own.
        assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
    }

    /// The URI of its export.
    pub fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket.display())
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        self.kill();
        let _ = std::fs::remove_file(&self.socket);
    }
}
