//! The daemon under test, as a process. It starts on a new image, is stopped or killed by its process ID, and never
//! outlives its test.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use super::wait::{TIMEOUT, is_listening, poll_until, try_poll};

/// How long a daemon may take to drain and exit after SIGTERM.
const STOP_LIMIT: Duration = Duration::from_secs(20);

/// How long killed processes may take to vanish.
const KILL_LIMIT: Duration = Duration::from_secs(2);

/// A Unix socket's path must fit into `sun_path` with its final NUL.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// Removes what tests of processes that were killed have left, here and in shared memory.
fn remove_stale_directories() {
    for folder in [Path::new(env!("CARGO_TARGET_TMPDIR")), Path::new("/dev/shm")] {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let parts: Vec<&str> = name.split('.').collect();
            let [_, pid, serial] = parts[..] else { continue };
            let is_ours = pid.parse::<u32>().is_ok() && serial.parse::<u32>().is_ok();
            let holds_caches_alone = fs::read_dir(entry.path())
                .is_ok_and(|mut held| held.all(|held| held.is_ok_and(|held| held.file_name() == "genblk")));
            let may_go = folder != Path::new("/dev/shm") || holds_caches_alone;
            if is_ours && may_go && !Path::new("/proc").join(pid).exists() {
                // Another test may remove it at the same time, and something may be mounted on it.
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }
}

/// A directory of one test, removed on drop.
#[derive(Debug)]
pub struct TempDir(PathBuf);

impl TempDir {
    /// Creates an empty directory whose name starts with `name`.
    pub fn new(name: &str) -> Self {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        static CLEAN_UP: Once = Once::new();
        CLEAN_UP.call_once(remove_stale_directories);
        let serial = COUNTER.fetch_add(1, Ordering::Relaxed);
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}.{}.{serial}", std::process::id()));
        fs::create_dir_all(&path).expect("a temporary directory can be created");
        Self(path)
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The directory in shared memory that holds the caches of this test's daemons; it is removed too.
    pub fn memory(&self) -> PathBuf {
        Path::new("/dev/shm").join(self.0.file_name().expect("the directory has a name"))
    }

    /// Another such directory, for daemons that do not know of the first one.
    pub fn other_memory(&self, name: &str) -> PathBuf {
        let own = self.0.file_name().expect("the directory has a name").to_str().expect("a name in UTF-8");
        Path::new("/dev/shm").join(format!("{name}-{own}"))
    }

    /// The cache files that daemons left in [`TempDir::memory`].
    pub fn left(&self) -> Vec<PathBuf> {
        let folder = fs::read_dir(self.memory().join("genblk")).into_iter().flatten();
        folder.map(|entry| entry.expect("a directory can be listed").path()).collect()
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        // A test must not fail because its directory cannot be removed.
        let _ = fs::remove_dir_all(self.memory());
        let others = self.other_memory("");
        let suffix = others.file_name().expect("it has a name").as_encoded_bytes();
        for entry in fs::read_dir("/dev/shm").into_iter().flatten().flatten() {
            if entry.file_name().as_encoded_bytes().ends_with(suffix) {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The options that tests change; the others keep the daemon's defaults.
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

/// The binary under test, or the one that `GENBLK_BIN` names.
pub fn server_binary() -> String {
    std::env::var("GENBLK_BIN").unwrap_or_else(|_| env!("CARGO_BIN_EXE_genblk").to_owned())
}

/// The exit status and output of a server that did not serve.
#[derive(Debug)]
pub struct Ended {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

/// Runs a server that must exit without a signal. Its output must fit into a pipe's buffer.
#[track_caller]
pub fn run_to_end(command: &mut Command) -> Ended {
    let piped = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = piped.spawn().expect("the server's binary can be started");
    let ended = try_poll(TIMEOUT, || child.try_wait().expect("the child can be waited for"));
    if ended.is_none() {
        child.kill().expect("the child can be killed");
    }
    let output = child.wait_with_output().expect("the child can be waited for");
    let [stdout, stderr] = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    assert!(ended.is_some(), "the server serves, but should exit:\n{stderr}");
    Ended { status: output.status, stdout, stderr }
}

/// The command that serves `image` on `socket`. Only this function and [`Daemon::start_configured`] know the server's
/// command line.
///
/// If `GENBLK_BIN` names a `qemu-storage-daemon`, it gets its own options. A run against this independent server tells
/// whether the test or the daemon is at fault. Some tests fail there because they test for its bugs.
fn server_command(directory: &TempDir, options: &DaemonOptions) -> Command {
    let (socket, image) = (directory.path().join("socket"), directory.path().join("image"));
    let binary = server_binary();
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
        .args(["--serial", options.serial])
        .arg("--memory-dir")
        .arg(directory.memory());
    if options.read_only {
        command.arg("--read-only");
    }
    command
}

/// Sends a signal to a process.
pub fn send(pid: u32, signal: i32) {
    let pid = libc::pid_t::try_from(pid).expect("process ids are small");
    // SAFETY: a plain system call.
    let sent = unsafe { libc::kill(pid, signal) };
    let error = io::Error::last_os_error();
    assert!(sent == 0 || error.raw_os_error() == Some(libc::ESRCH), "signal {signal}: {error}");
}

/// Whether a process has ended: its descriptors are closed.
pub fn has_ended(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // "1234 (name) S ...", and Z for one that nobody has waited for yet; its first thread may end before the others.
    let threads = fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
    stat.rsplit_once(") ").is_none_or(|(_, state)| state.starts_with(['Z', 'X']) && threads <= 1)
}

/// Kills a daemon that is not a [`Daemon`], with its disk processes, and waits for it.
pub fn kill_all(child: &mut Child) {
    send(child.id(), libc::SIGSTOP);
    let disks = children_of(child.id());
    disks.iter().for_each(|pid| send(*pid, libc::SIGKILL));
    try_poll(KILL_LIMIT, || disks.iter().all(|pid| has_ended(*pid)).then_some(()));
    child.kill().and_then(|()| child.wait()).expect("the daemon can be killed");
}

/// The children of a process.
fn children_of(pid: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let lists = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    let pids = |list: String| list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>();
    let mut found: Vec<u32> = lists.flat_map(pids).collect();
    found.sort_unstable();
    found
}

/// Writes a configuration file for `devices`; returns their sockets.
fn configure(directory: &TempDir, devices: &[&str]) -> Vec<PathBuf> {
    let path = directory.path();
    let sockets: Vec<_> = (0..devices.len()).map(|n| path.join(format!("socket{n}"))).collect();
    let (image, memory) = (path.join("image"), directory.memory());
    let tables = devices.iter().zip(&sockets).enumerate().map(|(n, (rest, socket))| {
        let memory = if rest.contains("memory_dir") { String::new() } else { format!("cache.memory_dir = {memory:?}") };
        let image = if rest.contains("image =") { String::new() } else { format!("image = {image:?}") };
        format!("[[device]]\nname = \"disk{n}\"\nsocket = {socket:?}\n{image}\n{rest}\n{memory}\n")
    });
    fs::write(config_of(directory), tables.collect::<String>()).expect("the configuration can be written");
    sockets
}

fn config_of(directory: &TempDir) -> PathBuf {
    directory.path().join("genblk.toml")
}

/// A running daemon and its image. Dropping it kills the process.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    command: Command,
    /// The sockets on which its devices listen.
    sockets: Vec<PathBuf>,
    directory: TempDir,
}

impl Daemon {
    /// Starts a daemon on a new image of `image_bytes` zeros, in a directory whose name starts with `name`.
    pub fn start(name: &str, image_bytes: u64, options: &DaemonOptions) -> Self {
        let directory = TempDir::new(name);
        let image = File::create(directory.path().join("image")).expect("an image can be created");
        image.set_len(image_bytes).expect("an image can be sized");
        Self::start_in(directory, options)
    }

    /// Starts a daemon on the existing file `image` in `directory`.
    pub fn start_in(directory: TempDir, options: &DaemonOptions) -> Self {
        let socket = directory.path().join("socket");
        let command = server_command(&directory, options);
        Self::launch(directory, command, vec![socket])
    }

    /// Starts a daemon with a configuration file: a device for each of `devices`, all on the existing file `image` in
    /// `directory`. Each of `devices` is the TOML of its table except name (`disk0`, `disk1` ...), socket and image.
    pub fn start_configured(directory: TempDir, devices: &[&str]) -> Self {
        Self::start_by(directory, devices, Command::new(server_binary()))
    }

    /// As [`Daemon::start_configured`], with `command` in place of the binary; the binary's arguments are appended to
    /// it.
    pub fn start_by(directory: TempDir, devices: &[&str], mut command: Command) -> Self {
        let sockets = configure(&directory, devices);
        command.arg("--config").arg(config_of(&directory));
        Self::launch(directory, command, sockets)
    }

    /// The command that [`Daemon::restart`] runs.
    pub fn command(&mut self) -> &mut Command {
        &mut self.command
    }

    /// Replaces the configuration by one with `device` as its only device; it takes effect at the next start.
    pub fn configure(&self, device: &str) {
        configure(&self.directory, &[device]);
    }

    /// Restarts the daemon with another device, after [`Daemon::stop`] or [`Daemon::kill`].
    pub fn reconfigure(&mut self, device: &str) {
        self.configure(device);
        self.restart();
    }

    /// Starts a daemon with any command that serves the file `image` in `directory` on `sockets`.
    pub fn launch(directory: TempDir, mut command: Command, sockets: Vec<PathBuf>) -> Self {
        for socket in &sockets {
            let shown = socket.display();
            let fits = socket.as_os_str().len() <= SOCKET_PATH_BYTES_MAX;
            assert!(fits, "the socket path {shown} is too long: use a shorter CARGO_TARGET_DIR");
        }
        let log = File::options()
            .create(true)
            .append(true)
            .open(directory.path().join("stderr.log"))
            .expect("a log file can be created");
        // SAFETY: plain system call.
        if unsafe { libc::geteuid() } != 0 {
            // Only root may look at the descriptors of a process that cannot be dumped, and tests count them.
            command.env("GENBLK_SANDBOX_WITHOUT", "dumping");
        }
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("a descriptor can be duplicated")).stderr(log);
        let child = Self::spawn(&mut command, &sockets, directory.path());
        Self { child, command, sockets, directory }
    }

    fn spawn(command: &mut Command, sockets: &[PathBuf], directory: &Path) -> Child {
        Self::try_spawn(command, sockets).unwrap_or_else(|status| {
            let log = fs::read_to_string(directory.join("stderr.log")).unwrap_or_default();
            panic!("the daemon exited before it served ({status}):\n{log}");
        })
    }

    /// An error: the daemon has exited before it served.
    fn try_spawn(command: &mut Command, sockets: &[PathBuf]) -> Result<Child, ExitStatus> {
        let mut child = command.spawn().expect("the server's binary can be started");
        let exited = poll_until("the daemon to listen on its sockets", TIMEOUT, || {
            let exited = child.try_wait().expect("the child can be waited for");
            (exited.is_some() || sockets.iter().all(|socket| is_listening(socket))).then_some(exited)
        });
        exited.map_or(Ok(child), Err)
    }

    /// The directory of the daemon's files.
    pub fn directory(&self) -> &TempDir {
        &self.directory
    }

    /// The socket of the first device.
    pub fn socket(&self) -> PathBuf {
        self.socket_of(0)
    }

    /// The socket of device `device`.
    pub fn socket_of(&self, device: usize) -> PathBuf {
        self.sockets[device].clone()
    }

    /// The image's path.
    pub fn image(&self) -> PathBuf {
        self.directory.path().join("image")
    }

    /// The path of the configuration file, for a daemon that has one.
    pub fn config(&self) -> PathBuf {
        config_of(&self.directory)
    }

    /// The daemon's log so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("stderr.log")).unwrap_or_default()
    }

    /// Waits until the log contains a text: a thread of the daemon writes it.
    #[track_caller]
    pub fn await_log(&self, text: &str) {
        let found = try_poll(TIMEOUT, || self.log().contains(text).then_some(()));
        assert!(found.is_some(), "{text:?} is not in the log:\n{}", self.log());
    }

    /// `len` bytes of the image at `offset`, as another process sees them.
    pub fn image_bytes(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let image = File::open(self.image()).expect("the image exists");
        image.read_exact_at(&mut bytes, offset).expect("the image is that long");
        bytes
    }

    /// Fails the test if the process has exited: no guest and no front-end may crash it.
    #[track_caller]
    pub fn assert_alive(&mut self) {
        if let Some(status) = self.child.try_wait().expect("the child can be waited for") {
            panic!("the daemon exited ({status}):\n{}", self.log());
        }
    }

    /// The processes of the daemon: the first one, and its disk processes.
    pub fn processes(&self) -> Vec<u32> {
        [self.id()].into_iter().chain(self.disk_processes()).collect()
    }

    /// The disk processes, in the order of their start.
    pub fn disk_processes(&self) -> Vec<u32> {
        children_of(self.id())
    }

    /// The disk process of the device with this name.
    #[track_caller]
    pub fn disk_process(&self, device: &str) -> u32 {
        let is_its = |pid: &u32| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.ends_with(format!("\0{device}\0").as_bytes())
        };
        let found = try_poll(TIMEOUT, || self.disk_processes().into_iter().find(is_its));
        found.unwrap_or_else(|| panic!("{device} has no process:\n{}", self.log()))
    }

    /// Number of open file descriptors of its processes.
    pub fn open_descriptors(&self) -> usize {
        self.proc_entries("fd").len()
    }

    /// Number of io_uring instances of its processes.
    pub fn io_urings(&self) -> usize {
        let targets = self.proc_entries("fd").into_iter().filter_map(|entry| fs::read_link(entry).ok());
        targets.filter(|target| target.ends_with("anon_inode:[io_uring]")).count()
    }

    /// Number of threads of its processes with the name `name` (at most 15 bytes).
    pub fn threads(&self, name: &str) -> usize {
        let names = self.proc_entries("task").into_iter().filter_map(|task| fs::read_to_string(task.join("comm")).ok());
        names.filter(|found| found.trim_end() == name).count()
    }

    /// The paths in `directory` of its processes' directories in /proc.
    fn proc_entries(&self, directory: &str) -> Vec<PathBuf> {
        let of_process = |pid| {
            let entries = fs::read_dir(format!("/proc/{pid}/{directory}")).expect("the daemon runs");
            entries.map(|entry| entry.expect("the daemon runs").path()).collect::<Vec<_>>()
        };
        self.processes().into_iter().flat_map(of_process).collect()
    }

    /// Number of cache arenas that its processes have mapped.
    pub fn mapped_caches(&self) -> usize {
        let maps = |pid| fs::read_to_string(format!("/proc/{pid}/maps")).expect("the daemon runs");
        let caches = |maps: String| maps.lines().filter(|line| line.contains("/memfd:genblk-cache")).count();
        self.processes().into_iter().map(maps).map(caches).sum()
    }

    /// Sends SIGTERM.
    pub fn terminate(&self) {
        self.signal(libc::SIGTERM);
    }

    /// Sends a signal: SIGKILL, SIGSTOP and SIGCONT to all its processes, as a control group does, others to the first.
    pub fn signal(&self, signal: i32) {
        if matches!(signal, libc::SIGKILL | libc::SIGSTOP | libc::SIGCONT) {
            // A supervisor that runs would start a disk process again.
            send(self.id(), if signal == libc::SIGCONT { signal } else { libc::SIGSTOP });
            let disks = self.disk_processes();
            disks.iter().for_each(|pid| send(*pid, signal));
            if signal == libc::SIGKILL {
                // One whose image hangs stays until that answers.
                try_poll(KILL_LIMIT, || disks.iter().all(|pid| has_ended(*pid)).then_some(()));
            }
        }
        // The child has not been reaped, so the id is still its own.
        send(self.id(), signal);
    }

    /// Kills all processes of the daemon with SIGKILL, as the service manager does; files and memory that they leave
    /// stay.
    pub fn kill(&mut self) {
        self.signal(libc::SIGKILL);
        self.child.wait().expect("the child can be waited for");
    }

    /// Kills the first process alone with SIGKILL.
    pub fn kill_supervisor(&mut self) {
        self.child.kill().expect("the daemon runs");
        self.child.wait().expect("the child can be waited for");
    }

    /// Waits for the process to exit.
    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        poll_until("the daemon to exit", STOP_LIMIT, || self.child.try_wait().expect("the child can be waited for"))
    }

    /// Stops the daemon with SIGTERM; it must exit with status 0.
    #[track_caller]
    pub fn stop(&mut self) {
        self.terminate();
        let status = self.wait();
        assert!(status.success(), "the daemon exited with {status}:\n{}", self.log());
    }

    /// Restarts the daemon on the same image, after [`Daemon::stop`] or [`Daemon::kill`].
    #[track_caller]
    pub fn restart(&mut self) {
        self.child = Self::spawn(&mut self.command, &self.sockets, self.directory.path());
    }
}

impl Daemon {
    /// As [`Daemon::restart`]; the last line of its log, if it exits before it serves.
    #[track_caller]
    pub fn try_restart(&mut self) -> Result<(), String> {
        match Self::try_spawn(&mut self.command, &self.sockets) {
            Ok(child) => self.child = child,
            Err(_) => return Err(self.log().lines().last().unwrap_or_default().to_owned()),
        }
        Ok(())
    }

    /// As [`Daemon::restart`], but returns when it listens on these sockets.
    #[track_caller]
    pub fn restart_for(&mut self, sockets: &[PathBuf]) {
        self.child = Self::spawn(&mut self.command, sockets, self.directory.path());
    }

    /// The process's id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- the daemon's log:\n{}", self.log());
        }
        // Its disk processes end by themselves when it has died, unless they are stopped or their images hang.
        let left = self.disk_processes();
        // Both fail only if the process has already exited.
        let _ = self.child.kill();
        let _ = self.child.wait();
        left.into_iter().for_each(|pid| send(pid, libc::SIGKILL));
    }
}
