//! The servers that are compared, each as a process of its own.

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::wait::{is_listening, try_poll};

/// How long a server may take until it listens.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long a lock on the image is waited out.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);
/// How long a server may take to end with its client, if it does.
const LEAVES: Duration = Duration::from_millis(200);
/// A server that took no processor time for so long has come to rest.
const SETTLED: Duration = Duration::from_millis(30);
/// The limit server's buffer: as much as the cached rows use.
pub const LIMIT_BUFFER_BYTES: usize = 128 << 20;

/// Who is compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// genblk with its defaults, but for lines added to its device's table and to that of its cache.
    Genblk { device: String, cache: String },
    /// qemu-storage-daemon's export, with an I/O thread, as its manual advises.
    Qemu { aio: &'static str, direct: bool },
    /// The bare server of `limit.rs`.
    Limit,
    /// A command line with {sock} and {img}, and {queues} where the server must be told how many there are.
    Other(String),
}

/// A server with a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contestant {
    pub name: String,
    pub kind: Kind,
}

impl Contestant {
    fn new(name: &str, kind: Kind) -> Self {
        Self { name: name.to_string(), kind }
    }

    pub fn genblk() -> Self {
        Self::genblk_with("genblk", "", "")
    }

    pub fn genblk_with(name: &str, device: &str, cache: &str) -> Self {
        Self::new(name, Kind::Genblk { device: device.to_string(), cache: cache.to_string() })
    }

    pub fn limit() -> Self {
        Self::new("limit", Kind::Limit)
    }

    pub fn qemu() -> Vec<Self> {
        vec![
            Self::new("qsd io_uring", Kind::Qemu { aio: "io_uring", direct: false }),
            Self::new("qsd threads", Kind::Qemu { aio: "threads", direct: false }),
            Self::new("qsd direct", Kind::Qemu { aio: "io_uring", direct: true }),
        ]
    }

    /// From `name=command with {sock} {img}`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn peer(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((name, command)) if command.contains("{sock}") && command.contains("{img}") => {
                Ok(Self::new(name.trim(), Kind::Other(command.to_string())))
            }
            _ => Err(format!("a peer is 'name=command with {{sock}} {{img}}', not {text:?}")),
        }
    }

    fn command(&self, socket: &Path, images: &[PathBuf], queues: usize) -> io::Result<Command> {
        let (sock, image) = (socket.display(), &images[0]);
        Ok(match &self.kind {
            Kind::Genblk { device, cache } => {
                let config = socket.with_extension("toml");
                fs::write(&config, genblk_config(socket, images, device, cache))?;
                let mut command = Command::new(env!("CARGO_BIN_EXE_genblk"));
                command.arg("--config").arg(config);
                command
            }
            Kind::Qemu { aio, direct } => {
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
            Kind::Limit => {
                let bytes = size_of(image)?;
                let mut command = Command::new(std::env::current_exe()?);
                command.arg("serve-limit").arg(socket).arg(bytes.to_string()).arg(LIMIT_BUFFER_BYTES.to_string());
                command
            }
            Kind::Other(line) => {
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

/// A configuration with a device for each image; the first listens on `socket`, the others beside it.
fn genblk_config(socket: &Path, images: &[PathBuf], device: &str, cache: &str) -> String {
    let memory = memory_of(socket);
    let table = |(i, image): (usize, &PathBuf)| {
        let (socket, image) = (socket_of(socket, i), image.display());
        format!(
            "[[device]]\nname = \"disk{i}\"\nsocket = {socket:?}\nimage = \"{image}\"\n{device}\n\
             [device.cache]\nmemory_dir = {memory:?}\n{cache}\n"
        )
    };
    images.iter().enumerate().map(table).collect()
}

/// Where the caches of a server lie. They outlive it, and must not: the next one is to start cold.
fn memory_of(socket: &Path) -> PathBuf {
    let folder = socket.parent().and_then(Path::file_name).unwrap_or_default();
    Path::new("/dev/shm").join(folder)
}

/// Where device `index` of a server listens whose first listens on `socket`.
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

/// A server that runs; killed with the value.
#[derive(Debug)]
pub struct Server {
    who: Contestant,
    command: Command,
    child: Child,
    socket: PathBuf,
    /// Where the last of its devices listens.
    last_socket: PathBuf,
    log: PathBuf,
}

impl Server {
    /// Starts a server on an image, or genblk on several; returns when it listens.
    ///
    /// => The image of a server that was killed stays locked until the kernel has ended its operations: a server that
    ///    leaves at once is started again, for a while.
    ///
    /// # Errors
    /// Why there is none, with the end of what it said.
    pub fn start(who: &Contestant, folder: &Path, images: &[PathBuf], queues: usize) -> Result<Self, String> {
        let until = Instant::now() + LOCK_PATIENCE;
        loop {
            match Self::start_once(who, folder, images, queues) {
                Err(_) if Instant::now() < until => std::thread::sleep(Duration::from_millis(100)),
                result => return result,
            }
        }
    }

    fn start_once(who: &Contestant, folder: &Path, images: &[PathBuf], queues: usize) -> Result<Self, String> {
        let failed = |e: io::Error| format!("{}: {e}", who.name);
        let socket = folder.join("sock");
        for index in 0..images.len() {
            let _ = fs::remove_file(socket_of(&socket, index));
        }
        let log_path = folder.join("server.log");
        let log = File::create(&log_path).map_err(failed)?;
        let mut command = who.command(&socket, images, queues).map_err(failed)?;
        command.stdin(Stdio::null()).stdout(log.try_clone().map_err(failed)?).stderr(log);
        die_with_us(&mut command, who);
        let child = command.spawn().map_err(failed)?;
        let last_socket = socket_of(&socket, images.len() - 1);
        let mut server = Self { who: who.clone(), command, child, socket, last_socket, log: log_path };
        server.await_listening()?;
        Ok(server)
    }

    /// Starts a server again that has ended with its last client, as some do.
    ///
    /// # Errors
    /// As [`Server::start`].
    pub fn revive(&mut self) -> Result<(), String> {
        let may_leave = matches!(self.who.kind, Kind::Other(_));
        if !may_leave || try_poll(LEAVES, || self.child.try_wait().ok().flatten()).is_none() {
            return Ok(());
        }
        self.child = self.command.spawn().map_err(|e| format!("{}: {e}", self.who.name))?;
        self.await_listening()
    }

    fn await_listening(&mut self) -> Result<(), String> {
        let listening = try_poll(PATIENCE, || match self.child.try_wait() {
            Ok(None) => is_listening(&self.last_socket).then_some(true),
            _ => Some(false),
        });
        if listening == Some(true) {
            return Ok(());
        }
        let said = fs::read_to_string(&self.log).unwrap_or_default();
        Err(format!("{} does not serve: {}", self.who.name, said.trim_end()))
    }

    /// Waits until the server has nothing to do: what it does for itself after its start is not what is measured.
    pub fn settle(&self) {
        let mut before = -1.0;
        try_poll(PATIENCE, || {
            std::thread::sleep(SETTLED);
            (std::mem::replace(&mut before, self.cpu_us()) >= self.cpu_us()).then_some(())
        });
    }

    /// Where device `index` listens.
    pub fn socket(&self, index: usize) -> PathBuf {
        socket_of(&self.socket, index)
    }

    /// Processor time of all its threads so far.
    pub fn cpu_us(&self) -> f64 {
        // Clock ticks of 10 ms, whatever the kernel's own: an ABI of Linux.
        const TICK_US: f64 = 10_000.0;
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap_or_default();
        // The second field is a name in parentheses, which may hold anything.
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
        (ticks(11) + ticks(12)) * TICK_US
    }

    /// A number from /proc/PID/status, in its own unit.
    pub fn status(&self, key: &str) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
        line.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or(0)
    }

    /// How often its threads went to sleep.
    pub fn sleeps(&self) -> u64 {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.child.id())).into_iter().flatten().flatten();
        let of = |path: PathBuf| {
            let status = fs::read_to_string(path.join("status")).unwrap_or_default();
            let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
            line.and_then(|count| count.trim().parse::<u64>().ok()).unwrap_or(0)
        };
        tasks.map(|task| of(task.path())).sum()
    }
}

/// A server must not outlive a benchmark that was interrupted. genblk is told in time to take away what it keeps in
/// memory; others might wait for their client for ever.
fn die_with_us(command: &mut Command, who: &Contestant) {
    let signal = if matches!(who.kind, Kind::Genblk { .. }) { libc::SIGTERM } else { libc::SIGKILL };
    // SAFETY: prctl is async-signal-safe, and touches nothing but the new process.
    unsafe {
        command.pre_exec(move || {
            libc::prctl(libc::PR_SET_PDEATHSIG, signal);
            Ok(())
        });
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Both fail only if the process is gone already. What it holds back is of no use to anybody.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(memory_of(&self.socket));
    }
}

impl fmt::Display for Contestant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}
