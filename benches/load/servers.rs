//! The servers under comparison. Each runs as its own process.

use std::ffi::CString;
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use genblk::tenure::record::ATTRIBUTE;

use crate::wait::{is_listening, try_poll};

/// How long a server may take until it listens.
const LISTEN_TIMEOUT: Duration = Duration::from_secs(20);
/// How long to wait for the previous server's lock on the image.
const LOCK_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a server that exits with its client may take to do so.
const EXIT_GRACE: Duration = Duration::from_millis(200);
/// How long the processes of a killed server may take until their memory is free.
const EXIT_TIMEOUT: Duration = Duration::from_secs(20);
/// A server that used no CPU time for this long is idle.
const IDLE_WINDOW: Duration = Duration::from_millis(30);
/// The copy server's buffer: as large as the region of the cached rows.
pub const LIMIT_BUFFER_BYTES: usize = 128 << 20;

/// How a server is started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServerKind {
    /// genblk with its defaults, and with these lines in the tables of its device and its cache.
    Genblk { binary: PathBuf, device: String, cache: String },
    /// qemu-storage-daemon with an I/O thread, as its manual recommends.
    Qemu { aio: &'static str, direct: bool },
    /// The copy server of `limit.rs`.
    Limit,
    /// A command line with {sock}, {img}, and {queues} for a server that must be told the number of queues.
    Other(String),
}

/// A named server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerSpec {
    pub name: String,
    pub kind: ServerKind,
    /// Whether a completed FLUSH means that the data is on the device. A server that ignores FLUSH does less work in
    /// rows with a FLUSH, and is no peer there.
    pub honours_flush: bool,
}

impl ServerSpec {
    fn new(name: &str, kind: ServerKind) -> Self {
        Self { name: name.to_string(), kind, honours_flush: true }
    }

    pub fn genblk() -> Self {
        Self::genblk_with("genblk", "", "")
    }

    pub fn genblk_with(name: &str, device: &str, cache: &str) -> Self {
        let binary = PathBuf::from(env!("CARGO_BIN_EXE_genblk"));
        Self::new(name, ServerKind::Genblk { binary, device: device.to_string(), cache: cache.to_string() })
    }

    /// Another build of genblk, with its defaults.
    pub fn genblk_base(binary: &Path) -> Self {
        let (device, cache) = (String::new(), String::new());
        Self::new("genblk base", ServerKind::Genblk { binary: binary.to_path_buf(), device, cache })
    }

    pub fn limit() -> Self {
        Self::new("limit", ServerKind::Limit)
    }

    pub fn qemu() -> Vec<Self> {
        vec![
            Self::new("qsd io_uring", ServerKind::Qemu { aio: "io_uring", direct: false }),
            Self::new("qsd threads", ServerKind::Qemu { aio: "threads", direct: false }),
            Self::new("qsd direct", ServerKind::Qemu { aio: "io_uring", direct: true }),
        ]
    }

    /// From `name=command with {sock} {img}`.
    ///
    /// # Errors
    /// The text has another form.
    pub fn peer(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((name, command)) if command.contains("{sock}") && command.contains("{img}") => {
                Ok(Self::new(name.trim(), ServerKind::Other(command.to_string())))
            }
            _ => Err(format!("a peer is 'name=command with {{sock}} {{img}}', not {text:?}")),
        }
    }

    fn command(&self, socket: &Path, images: &[PathBuf], queues: usize) -> io::Result<Command> {
        let (sock, image) = (socket.display(), &images[0]);
        Ok(match &self.kind {
            ServerKind::Genblk { binary, device, cache } => {
                let config = socket.with_extension("toml");
                fs::write(&config, genblk_config(socket, images, device, cache))?;
                let mut command = Command::new(binary);
                command.arg("--config").arg(config);
                command
            }
            ServerKind::Qemu { aio, direct } => {
                let is_device = fs::metadata(image)?.file_type().is_block_device();
                let driver = if is_device { "host_device" } else { "file" };
                let direct = if *direct { "on" } else { "off" };
                let file = image.display();
                let mut command = Command::new("qemu-storage-daemon");
                command.args(["--object", "iothread,id=thread"]).arg("--blockdev").arg(format!(
                    "driver={driver},node-name=disk,filename={file},cache.direct={direct},aio={aio},discard=unmap"
                ));
                command.arg("--export").arg(format!(
                    "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={sock},writable=on,\
                     iothread=thread,num-queues={queues}"
                ));
                command
            }
            ServerKind::Limit => {
                let bytes = size_of(image)?;
                let mut command = Command::new(std::env::current_exe()?);
                command.arg("serve-limit").arg(socket).arg(bytes.to_string()).arg(LIMIT_BUFFER_BYTES.to_string());
                command
            }
            ServerKind::Other(line) => {
                let line = line.replace("{sock}", &sock.to_string()).replace("{img}", &image.display().to_string());
                let line = line.replace("{queues}", &queues.to_string());
                let mut words = line.split_whitespace();
                let mut command = Command::new(words.next().unwrap_or_default());
                command.args(words);
                command
            }
        })
    }
}

/// A configuration with a device for each image. The first device listens on `socket`, the others next to it.
fn genblk_config(socket: &Path, images: &[PathBuf], device: &str, cache: &str) -> String {
    let memory = memory_dir(socket);
    let table = |(i, image): (usize, &PathBuf)| {
        let (socket, image) = (socket_of(socket, i), image.display());
        format!(
            "[[device]]\nname = \"disk{i}\"\nsocket = {socket:?}\nimage = \"{image}\"\n{device}\n\
             [device.cache]\nmemory_dir = {memory:?}\n{cache}\n"
        )
    };
    images.iter().enumerate().map(table).collect()
}

/// The directory of a server's caches. They survive a killed server, so they are removed: the next one must start cold.
fn memory_dir(socket: &Path) -> PathBuf {
    let name = socket.parent().and_then(Path::file_name).unwrap_or_default();
    Path::new("/dev/shm").join(name)
}

/// The socket of device `index`, if the first device listens on `socket`.
fn socket_of(socket: &Path, index: usize) -> PathBuf {
    if index == 0 { socket.to_path_buf() } else { socket.with_extension(index.to_string()) }
}

/// Size of a file or a block device.
///
/// # Errors
/// The system's.
pub fn size_of(path: &Path) -> io::Result<u64> {
    use std::io::{Seek, SeekFrom};
    File::open(path)?.seek(SeekFrom::End(0))
}

/// A running server; dropping the value kills it.
#[derive(Debug)]
pub struct Server {
    spec: ServerSpec,
    command: Command,
    child: Child,
    socket: PathBuf,
    /// The socket of its last device, which it opens last.
    last_socket: PathBuf,
    log: PathBuf,
    images: Vec<PathBuf>,
}

impl Server {
    /// Starts a server on an image, or genblk on several; returns when it listens.
    ///
    /// => The image stays locked until the kernel has finished the I/O of the previous, killed server. So a server that
    ///    exits is started again until the timeout.
    ///
    /// # Errors
    /// The server cannot be started or exits; with its log.
    pub fn start(spec: &ServerSpec, directory: &Path, images: &[PathBuf], queues: usize) -> Result<Self, String> {
        let deadline = Instant::now() + LOCK_TIMEOUT;
        loop {
            match Self::start_once(spec, directory, images, queues) {
                Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(100)),
                result => return result,
            }
        }
    }

    fn start_once(spec: &ServerSpec, directory: &Path, images: &[PathBuf], queues: usize) -> Result<Self, String> {
        let failed = |e: io::Error| format!("{}: {e}", spec.name);
        let socket = directory.join("sock");
        for index in 0..images.len() {
            let _ = fs::remove_file(socket_of(&socket, index));
        }
        let log_path = directory.join("server.log");
        let log = File::create(&log_path).map_err(failed)?;
        let mut command = spec.command(&socket, images, queues).map_err(failed)?;
        command.stdin(Stdio::null()).stdout(log.try_clone().map_err(failed)?).stderr(log);
        die_with_parent(&mut command, spec);
        let child = command.spawn().map_err(failed)?;
        let last_socket = socket_of(&socket, images.len() - 1);
        let mut server =
            Self { spec: spec.clone(), command, child, socket, last_socket, log: log_path, images: images.to_vec() };
        server.await_listening()?;
        Ok(server)
    }

    /// Restarts a server that exited with its last client; some do.
    ///
    /// # Errors
    /// As [`Server::start`].
    pub fn restart_if_exited(&mut self) -> Result<(), String> {
        let may_exit = matches!(self.spec.kind, ServerKind::Other(_));
        if !may_exit || try_poll(EXIT_GRACE, || self.child.try_wait().ok().flatten()).is_none() {
            return Ok(());
        }
        self.child = self.command.spawn().map_err(|e| format!("{}: {e}", self.spec.name))?;
        self.await_listening()
    }

    fn await_listening(&mut self) -> Result<(), String> {
        let listening = try_poll(LISTEN_TIMEOUT, || match self.child.try_wait() {
            Ok(None) => is_listening(&self.last_socket).then_some(true),
            _ => Some(false),
        });
        if listening == Some(true) {
            return Ok(());
        }
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        Err(format!("{} does not listen: {}", self.spec.name, log.trim_end()))
    }

    /// Waits until the server is idle, so that its start-up work is not measured.
    pub fn wait_until_idle(&self) {
        let mut before = -1.0;
        try_poll(LISTEN_TIMEOUT, || {
            std::thread::sleep(IDLE_WINDOW);
            (std::mem::replace(&mut before, self.cpu_us()) >= self.cpu_us()).then_some(())
        });
    }

    /// The socket of device `index`.
    pub fn socket(&self, index: usize) -> PathBuf {
        socket_of(&self.socket, index)
    }

    /// The files in /proc of each thread of the server and of the processes that it has started.
    fn threads(&self) -> Vec<PathBuf> {
        let (mut processes, mut threads) = (vec![self.child.id()], Vec::new());
        while let Some(pid) = processes.pop() {
            for thread in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
                let children = fs::read_to_string(thread.path().join("children")).unwrap_or_default();
                processes.extend(children.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
                threads.push(thread.path());
            }
        }
        threads
    }

    /// CPU time of all its threads so far.
    pub fn cpu_us(&self) -> f64 {
        // In nanoseconds, which /proc/PID/stat rounds to ticks of 10 ms.
        let of = |thread: PathBuf| -> Option<f64> {
            let schedstat = fs::read_to_string(thread.join("schedstat")).ok()?;
            schedstat.split_whitespace().next()?.parse().ok()
        };
        self.threads().into_iter().filter_map(of).sum::<f64>() / 1000.0
    }

    /// Memory of its processes that belongs to no file, in KiB.
    pub fn anonymous_kib(&self) -> u64 {
        self.threads().iter().filter(|thread| is_main(thread)).map(|thread| number_in_status(thread, "RssAnon")).sum()
    }

    /// Voluntary context switches of all its threads.
    pub fn sleeps(&self) -> u64 {
        self.threads().iter().map(|thread| number_in_status(thread, "voluntary_ctxt_switches")).sum()
    }
}

/// Whether a thread is the first one of its process, by its files in /proc.
fn is_main(thread: &Path) -> bool {
    thread.file_name() == thread.ancestors().nth(2).and_then(Path::file_name)
}

/// Whether a process has ended, by the files in /proc of its first thread. What waits for its parent has.
fn has_ended(main_thread: &Path) -> bool {
    let stat = fs::read_to_string(main_thread.join("stat")).unwrap_or_default();
    stat.rsplit(')').next().is_none_or(|rest| rest.is_empty() || rest.trim_start().starts_with('Z'))
}

/// A number of /proc/PID/task/TID/status, in the unit of that file.
fn number_in_status(thread: &Path, key: &str) -> u64 {
    let status = fs::read_to_string(thread.join("status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    line.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

/// Makes the kernel kill the server when the benchmark dies. genblk gets a SIGTERM, so that it removes its cache from
/// shared memory; others get a SIGKILL, because they might wait for their client forever.
fn die_with_parent(command: &mut Command, spec: &ServerSpec) {
    let signal = if matches!(spec.kind, ServerKind::Genblk { .. }) { libc::SIGTERM } else { libc::SIGKILL };
    // SAFETY: prctl is async-signal-safe and affects only the new process.
    unsafe {
        command.pre_exec(move || {
            libc::prctl(libc::PR_SET_PDEATHSIG, signal);
            Ok(())
        });
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // The processes that it has started would go on for a while, beside the next measurement.
        let processes: Vec<PathBuf> = self.threads().into_iter().filter(|thread| is_main(thread)).collect();
        for pid in processes.iter().filter_map(|thread| thread.file_name()?.to_str()?.parse().ok()) {
            // SAFETY: sends a signal to a process that this one has started, directly or not.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
        // It fails only if the process has exited.
        let _ = self.child.wait();
        try_poll(EXIT_TIMEOUT, || processes.iter().all(|process| has_ended(process)).then_some(()));
        let _ = fs::remove_dir_all(memory_dir(&self.socket));
        self.images.iter().for_each(|image| forget_cache(image));
    }
}

/// Removes the record by which the next genblk would miss the cache of the killed one.
fn forget_cache(image: &Path) {
    let Ok(image) = CString::new(image.as_os_str().as_bytes()) else { return };
    // SAFETY: both strings end with a NUL byte. An image without the record is no failure.
    unsafe { libc::removexattr(image.as_ptr(), ATTRIBUTE.as_ptr()) };
}

impl fmt::Display for ServerSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}
