//! The daemon under test, as a process: started on a fresh image, stopped or killed by its own process id, never
//! left behind.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use super::wait::{PATIENCE, is_listening, poll_until};

/// How long a daemon may take to drain and leave after SIGTERM.
const STOP_LIMIT: Duration = Duration::from_secs(20);

/// A Unix socket's path must fit `sun_path` with its final NUL.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// A directory of this test's own, removed with the guard.
#[derive(Debug)]
pub struct TempDir(PathBuf);

impl TempDir {
    /// A new, empty directory whose name starts with `name`.
    pub fn new(name: &str) -> Self {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let serial = COUNTER.fetch_add(1, Ordering::Relaxed);
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}.{}.{serial}", std::process::id()));
        fs::create_dir_all(&path).expect("a temporary directory can be made");
        Self(path)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        // A left-over directory is untidy, not wrong: a test must not fail over it.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The options that tests vary; the rest stays at the daemon's defaults.
#[derive(Clone, Debug)]
pub struct DaemonOptions {
    pub read_only: bool,
    pub cache_size: &'static str,
    pub cache_mode: &'static str,
    pub num_queues: usize,
    pub serial: &'static str,
}

impl Default for DaemonOptions {
    fn default() -> Self {
        Self { read_only: false, cache_size: "16M", cache_mode: "writeback", num_queues: 1, serial: "genblk-test" }
    }
}

/// The command that serves `image` on `socket`. The one place that knows how the server is called.
///
/// `GENBLK_BIN` names another binary. If that is a `qemu-storage-daemon`, it gets its own options: with a server
/// that nobody here wrote, a failure tells whether the test or the daemon is at fault. (Some tests fail there by
/// design: they are about its bugs.)
fn server_command(socket: &Path, image: &Path, options: &DaemonOptions) -> Command {
    let binary = std::env::var("GENBLK_BIN").unwrap_or_else(|_| env!("CARGO_BIN_EXE_genblk").to_owned());
    let mut command = Command::new(&binary);
    let (socket, image) = (socket.display(), image.display());
    if binary.ends_with("qemu-storage-daemon") {
        let writable = if options.read_only { "off" } else { "on" };
        command
            .arg("--blockdev")
            .arg(format!("driver=file,node-name=disk,filename={image},discard=unmap"))
            .arg("--export")
            .arg(format!(
                "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={socket},\
                 writable={writable},num-queues={}",
                options.num_queues
            ));
        return command;
    }
    command
        .arg("--socket-path")
        .arg(socket.to_string())
        .arg("--blk-file")
        .arg(image.to_string())
        .args(["--cache-size", options.cache_size])
        .args(["--cache-mode", options.cache_mode])
        .args(["--num-queues", &options.num_queues.to_string()])
        .args(["--serial", options.serial]);
    if options.read_only {
        command.arg("--read-only");
    }
    command
}

/// A running daemon and its image. Dropping it kills the process.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    options: DaemonOptions,
    directory: TempDir,
}

impl Daemon {
    /// Starts a daemon on a new image of `image_bytes` zeros; `name` names its directory.
    pub fn start(name: &str, image_bytes: u64, options: &DaemonOptions) -> Self {
        let directory = TempDir::new(name);
        let image = File::create(directory.path().join("image")).expect("an image can be made");
        image.set_len(image_bytes).expect("an image can be sized");
        Self::start_in(directory, options)
    }

    /// Starts a daemon on the file `image` that is in `directory` already.
    pub fn start_in(directory: TempDir, options: &DaemonOptions) -> Self {
        let child = Self::spawn(directory.path(), options);
        Self { child, options: options.clone(), directory }
    }

    fn spawn(directory: &Path, options: &DaemonOptions) -> Child {
        let socket = directory.join("socket");
        assert!(
            socket.as_os_str().len() <= SOCKET_PATH_BYTES_MAX,
            "{} is too long for a socket: use a shorter CARGO_TARGET_DIR",
            socket.display()
        );
        // A socket left by a killed predecessor would be taken for a ready daemon by a person, if not by this code.
        let _ = fs::remove_file(&socket);
        let log = File::options()
            .create(true)
            .append(true)
            .open(directory.join("stderr.log"))
            .expect("a log file can be made");
        let mut child = server_command(&socket, &directory.join("image"), options)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a descriptor can be duplicated"))
            .stderr(log)
            .spawn()
            .expect("the server's binary can be started");
        poll_until("the daemon to listen on its socket", PATIENCE, || {
            if let Some(status) = child.try_wait().expect("the child can be waited for") {
                let log = fs::read_to_string(directory.join("stderr.log")).unwrap_or_default();
                panic!("the daemon left before it served ({status}):\n{log}");
            }
            is_listening(&socket).then_some(())
        });
        child
    }

    /// Where front-ends connect.
    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("socket")
    }

    /// The backing image.
    pub fn image(&self) -> PathBuf {
        self.directory.path().join("image")
    }

    /// What the daemon has said so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("stderr.log")).unwrap_or_default()
    }

    /// `len` bytes of the image at `offset`, as another process sees them.
    pub fn image_bytes(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let image = File::open(self.image()).expect("the image is there");
        image.read_exact_at(&mut bytes, offset).expect("the image is that long");
        bytes
    }

    /// Fails the test if the process is gone: no guest and no front-end may bring it down.
    #[track_caller]
    pub fn assert_alive(&mut self) {
        if let Some(status) = self.child.try_wait().expect("the child can be waited for") {
            panic!("the daemon died ({status}):\n{}", self.log());
        }
    }

    /// How many file descriptors the process holds.
    pub fn open_descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.child.id())).expect("the daemon lives").count()
    }

    /// Sends SIGTERM.
    pub fn terminate(&self) {
        let pid = libc::pid_t::try_from(self.child.id()).expect("process ids are small");
        // SAFETY: plain system call; the child has not been reaped, so the id is still its own.
        let sent = unsafe { libc::kill(pid, libc::SIGTERM) };
        assert_eq!(sent, 0, "SIGTERM: {}", io::Error::last_os_error());
    }

    /// Waits for the process to end.
    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        poll_until("the daemon to end", STOP_LIMIT, || self.child.try_wait().expect("the child can be waited for"))
    }

    /// Orderly stop: SIGTERM, then an exit status of 0.
    #[track_caller]
    pub fn stop(&mut self) {
        self.terminate();
        let status = self.wait();
        assert!(status.success(), "the daemon left with {status}:\n{}", self.log());
    }

    /// Starts the daemon again on the same image, after [`Daemon::stop`].
    #[track_caller]
    pub fn restart(&mut self) {
        self.child = Self::spawn(self.directory.path(), &self.options);
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- the daemon's log:\n{}", self.log());
        }
        // Both fail only if the process is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
