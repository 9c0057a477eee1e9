//! The host's limits and weather: locked memory, descriptors, file sizes, control groups, a full shared memory, a
//! standard error that takes nothing, core dumps, signals without a meaning. The daemon falls back, refuses with the
//! limit's name, or goes on.

#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "sizes are small")]

mod common;

use std::ffi::CString;
use std::fs::{self, File, Permissions};
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};

use common::daemon::{Daemon, DaemonOptions, TempDir, run_to_end, server_binary};
use common::request::{OK, Payload, assert_serves, pattern};
use common::session::{Session, SessionOptions};
use common::wait::{TIMEOUT, is_listening, poll_until};

const MIB: u64 = 1 << 20;

/// A command that serves the image `image` in `directory` on `socket` beside it.
fn command_with_cache(directory: &TempDir, size: &str) -> Command {
    let path = directory.path();
    let mut command = Command::new(server_binary());
    command.arg("--socket-path").arg(path.join("socket")).arg("--blk-file").arg(path.join("image"));
    command.args(["--cache-size", size, "--memory-dir"]).arg(directory.memory());
    command
}

/// A directory with an image of `bytes` bytes that has no holes.
fn directory(name: &str, bytes: u64) -> TempDir {
    let directory = TempDir::new(name);
    fs::write(directory.path().join("image"), vec![7; bytes as usize]).expect("an image can be written");
    directory
}

fn launch(directory: TempDir, command: Command) -> Daemon {
    let socket = directory.path().join("socket");
    Daemon::launch(directory, command, vec![socket])
}

/// Runs `limit` in the child, between fork and exec; it may only make system calls.
fn in_child(command: &mut Command, limit: impl Fn() -> i32 + Send + Sync + 'static) {
    let run = move || match limit() {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    };
    // SAFETY: callers make plain system calls, which are async-signal-safe.
    unsafe { command.pre_exec(run) };
}

/// Limits a resource of the child.
fn limit_child(command: &mut Command, resource: libc::__rlimit_resource_t, value: u64) {
    in_child(command, move || {
        let limit = libc::rlimit { rlim_cur: value, rlim_max: value };
        // SAFETY: the call reads one rlimit.
        unsafe { libc::setrlimit(resource, &raw const limit) }
    });
}

fn is_root() -> bool {
    // SAFETY: geteuid() has no preconditions.
    unsafe { libc::geteuid() == 0 }
}

/// A directory that every user can reach; removed at the end.
struct Reachable(PathBuf);

impl Reachable {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("genblk-{name}.{}", std::process::id()));
        fs::create_dir_all(&path).expect("a directory can be created");
        open_to_all(&path);
        Self(path)
    }
}

impl Drop for Reachable {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn open_to_all(path: &Path) {
    fs::set_permissions(path, Permissions::from_mode(0o777)).expect("a mode can be set");
}

/// The kernel counts the memory of io_uring against the limit only for a user without privileges.
#[test]
fn engine_auto_falls_back_to_threads_where_locked_memory_is_limited() {
    const DEVICES: usize = 8;
    if !is_root() {
        println!("SKIPPED: only root can start a daemon as another user");
        return;
    }
    let directory = TempDir::new("memlock");
    let memory = directory.memory();
    fs::create_dir_all(&memory).expect("a directory can be created");
    open_to_all(&memory);
    let place = Reachable::new("memlock");
    fs::copy(server_binary(), place.0.join("genblk")).expect("the binary can be copied");
    let mut text = String::new();
    for n in 0..DEVICES {
        let (image, socket) = (place.0.join(format!("image{n}")), place.0.join(format!("s{n}")));
        fs::write(&image, vec![7; MIB as usize]).expect("an image can be written");
        open_to_all(&image);
        text += &format!(
            "[[device]]\nname = \"d{n}\"\nsocket = {socket:?}\nimage = {image:?}\ncache.size = \"4M\"\n\
             cache.memory_dir = {memory:?}\n"
        );
    }
    fs::write(place.0.join("genblk.toml"), text).expect("a configuration can be written");
    let mut command = Command::new(place.0.join("genblk"));
    command.arg("--config").arg(place.0.join("genblk.toml")).uid(65534).gid(65534);
    limit_child(&mut command, libc::RLIMIT_MEMLOCK, 64 << 10);
    let sockets: Vec<_> = (0..DEVICES).map(|n| place.0.join(format!("s{n}"))).collect();
    let mut daemon = Daemon::launch(directory, command, sockets.clone());
    sockets.iter().for_each(|socket| assert_serves(socket, 0));
    let log = daemon.log();
    assert!(log.contains("using threads") && log.contains("RLIMIT_MEMLOCK is 65536 bytes"), "{log}");
    daemon.stop();
}

/// A mounted tmpfs of this size; unmounted at the end.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn new(path: PathBuf, options: &str) -> Option<Self> {
        fs::create_dir_all(&path).expect("a directory can be created");
        let target = CString::new(path.as_os_str().as_bytes()).expect("no path holds a NUL");
        let options = CString::new(options).expect("no NUL");
        // SAFETY: plain system call with NUL-terminated strings.
        let result =
            unsafe { libc::mount(c"none".as_ptr(), target.as_ptr(), c"tmpfs".as_ptr(), 0, options.as_ptr().cast()) };
        if result != 0 {
            println!("SKIPPED: a tmpfs cannot be mounted ({})", std::io::Error::last_os_error());
            return None;
        }
        Some(Self(path))
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let target = CString::new(self.0.as_os_str().as_bytes()).expect("no path holds a NUL");
        // SAFETY: plain system call with a NUL-terminated string.
        unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) };
    }
}

#[test]
fn survive_auto_falls_back_to_anonymous_memory_where_shm_is_full() {
    let directory = directory("full", MIB);
    let Some(shared) = Tmpfs::new(directory.path().join("shm"), "size=8M") else { return };
    // Not even a page is free.
    let filler = fs::write(shared.0.join("filler"), vec![1; 16 << 20]);
    assert!(filler.is_err(), "the tmpfs is full");
    let mut command = Command::new(server_binary());
    let path = directory.path();
    command.arg("--socket-path").arg(path.join("socket")).arg("--blk-file").arg(path.join("image"));
    command.args(["--cache-size", "16M", "--memory-dir"]).arg(&shared.0);
    let mut daemon = launch(directory, command);
    assert_serves(&daemon.socket(), 0);
    let log = daemon.log();
    assert!(log.contains("using a cache that does not survive a crash"), "{log}");
    let left = fs::read_dir(shared.0.join("genblk")).map_or(0, Iterator::count);
    assert_eq!(left, 0, "the attempt leaves no file behind");
    daemon.stop();
}

/// The memory control group of the test, of version 1 or 2; removed at the end.
struct Group {
    directory: PathBuf,
}

impl Group {
    fn new(limit: u64) -> Option<Self> {
        let name = format!("genblk-test.{}", std::process::id());
        for (root, file) in [("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")] {
            let directory = Path::new(root).join(&name);
            if fs::create_dir(&directory).is_ok() {
                if fs::write(directory.join(file), limit.to_string()).is_ok() {
                    return Some(Self { directory });
                }
                let _ = fs::remove_dir(&directory);
            }
        }
        println!("SKIPPED: this user cannot make a memory control group");
        None
    }

    /// Makes the child a member of a group below this one.
    fn put(&self, command: &mut Command) {
        let below = self.directory.join("below");
        fs::create_dir_all(&below).expect("a group can be made");
        let members = File::options().write(true).open(below.join("cgroup.procs")).expect("a group has members");
        in_child(command, move || {
            // SAFETY: plain system call; the kernel takes 0 as the writing process.
            let written = unsafe { libc::write(members.as_raw_fd(), c"0".as_ptr().cast(), 1) };
            i32::from(written != 1)
        });
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::remove_dir(self.directory.join("below"));
        let _ = fs::remove_dir(&self.directory);
    }
}

#[test]
fn a_cache_above_the_memory_limit_of_a_parent_control_group_is_refused_by_name() {
    let Some(group) = Group::new(64 * MIB) else { return };
    let directory = directory("cgroup", MIB);
    let mut refused = command_with_cache(&directory, "256M");
    group.put(&mut refused);
    let ended = run_to_end(&mut refused);
    assert_eq!(ended.status.code(), Some(1), "{ended:?}");
    let limit = format!("{}/memory.", group.directory.display());
    assert!(ended.stderr.contains(&limit) && ended.stderr.contains("limits memory to 67108864 bytes"), "{ended:?}");
    let left = directory.left();
    assert!(left.is_empty(), "nothing is left behind: {left:?}");
    let mut fits = command_with_cache(&directory, "16M");
    group.put(&mut fits);
    let mut daemon = launch(directory, fits);
    assert_serves(&daemon.socket(), 0);
    daemon.stop();
}

/// SIGXFSZ would end the process.
#[test]
fn a_write_past_the_file_size_limit_fails_without_ending_the_daemon() {
    let directory = directory("fsize", 16 * MIB);
    let mut command = Command::new(server_binary());
    limit_child(&mut command, libc::RLIMIT_FSIZE, 6 * MIB);
    let mut daemon = Daemon::start_by(directory, &["cache.size = \"4M\""], command);
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    session.write(8, &pattern(1, 8, 4096));
    session.flush();
    let far = session.run(0, VIRTIO_BLK_T_OUT, 14 * MIB / 512, Payload::Send(&pattern(2, 0, 4096)));
    let flush = session.run(0, VIRTIO_BLK_T_FLUSH, 0, Payload::Empty);
    assert!(far.status != OK || flush.status != OK, "there is no space beyond the limit");
    daemon.assert_alive();
    poll_until("the reason in the log", TIMEOUT, || daemon.log().contains("no space").then_some(()));
    assert_eq!(session.read(8, 4096), pattern(1, 8, 4096));
    drop(session);
    daemon.kill();
}

#[test]
fn unused_signals_do_not_end_the_daemon() {
    let mut daemon = Daemon::start("signals", MIB, &DaemonOptions::default());
    for signal in
        [libc::SIGPIPE, libc::SIGUSR2, libc::SIGALRM, libc::SIGVTALRM, libc::SIGPROF, libc::SIGIO, libc::SIGXFSZ]
    {
        daemon.signal(signal);
        assert_serves(&daemon.socket(), 0);
        daemon.assert_alive();
    }
    daemon.stop();
}

/// What the process maps of shared memory: the cache in an anonymous memfd, and the guest's memory.
#[test]
fn core_dumps_exclude_cache_and_guest_memory() {
    let directory = directory("dump", MIB);
    let mut daemon = Daemon::start_configured(directory, &["cache.survive = \"never\"\ncache.size = \"16M\""]);
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    session.write(0, &pattern(1, 0, 4096));
    let smaps = |pid: u32| fs::read_to_string(format!("/proc/{pid}/smaps")).expect("the daemon runs");
    let maps: String = daemon.processes().into_iter().map(smaps).collect();
    let (mut large, mut region) = (0, String::new());
    for line in maps.lines() {
        if line.contains("/memfd:") || line.contains("/dev/shm/") {
            line.clone_into(&mut region);
        } else if let Some(flags) = line.strip_prefix("VmFlags:")
            && !region.is_empty()
        {
            large += 1;
            assert!(flags.split_whitespace().any(|flag| flag == "dd"), "{region}: {flags}");
            region.clear();
        }
    }
    assert!(large >= 3, "the cache and two regions of guest memory are mapped:\n{maps}");
    drop(session);
    daemon.stop();
}

/// Thousands of reads beyond the end of a truncated image: some lines with an offset each, then a count once a second.
#[test]
fn a_device_that_fails_every_read_does_not_flood_the_log() {
    let directory = directory("flood", 16 * MIB);
    let mut daemon = Daemon::start_configured(directory, &["cache.size = \"4M\""]);
    // A test's request takes new guest memory.
    let options = SessionOptions { region_bytes: 128 << 20, ..SessionOptions::default() };
    let mut session = Session::open(&daemon.socket(), &options);
    File::options().write(true).open(daemon.image()).expect("the image exists").set_len(MIB).expect("it shrinks");
    let started = Instant::now();
    let mut reads = 0u64;
    while started.elapsed() < Duration::from_secs(3) && reads < 25_000 {
        let outcome = session.run(0, VIRTIO_BLK_T_IN, (4 * MIB / 512) + reads % 1024 * 8, Payload::Receive(4096));
        assert_ne!(outcome.status, OK);
        reads += 1;
    }
    drop(session);
    let lines = || daemon.log().lines().filter(|line| line.contains("failed on the image")).count();
    poll_until("the last count", TIMEOUT, || daemon.log().contains("like this in the last second").then_some(()));
    assert!(reads > 1000 && lines() <= 24, "{} lines about {reads} reads:\n{}", lines(), daemon.log());
    daemon.kill();
}

/// A guest can also make lines: by turning its write cache on and off.
#[test]
fn toggling_the_cache_mode_does_not_flood_the_log() {
    let mut daemon = Daemon::start("mind", MIB, &DaemonOptions::default());
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    (0..500).for_each(|n| session.set_writeback(n % 2 == 0));
    let lines = daemon.log().lines().filter(|line| line.contains("the guest selected")).count();
    assert!((2..60).contains(&lines), "{lines} lines:\n{}", daemon.log());
    drop(session);
    daemon.stop();
}

/// A daemon whose standard error is a pipe without a reader.
fn with_blocked_stderr(directory: &TempDir) -> Child {
    let mut command = command_with_cache(directory, "16M");
    command.env("GENBLK_LOG", "trace").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let child = command.spawn().expect("the daemon can be started");
    let pipe = child.stderr.as_ref().expect("it is piped");
    // SAFETY: plain system call on an open descriptor.
    assert!(unsafe { libc::fcntl(pipe.as_raw_fd(), libc::F_SETPIPE_SZ, 4096) } > 0, "the pipe can be made small");
    child
}

#[test]
fn a_blocked_standard_error_stops_no_device() {
    let directory = directory("blocked", 16 * MIB);
    let socket = directory.path().join("socket");
    let mut child = with_blocked_stderr(&directory);
    poll_until("the daemon to listen", TIMEOUT, || is_listening(&socket).then_some(()));
    // Each connection logs two lines; the pipe holds some forty.
    for n in 0..200 {
        assert_serves(&socket, n % 16 * 8);
    }
    let mut session = Session::open(&socket, &SessionOptions::default());
    session.write(8, &pattern(1, 8, 4096));
    session.flush();
    assert_eq!(session.read(8, 4096), pattern(1, 8, 4096));
    drop(session);
    // Then somebody reads: the lines that were kept, and how many were not.
    let mut pipe = child.stderr.take().expect("it is piped");
    let reader = thread::spawn(move || {
        let mut text = String::new();
        pipe.read_to_string(&mut text).expect("the log is UTF-8");
        text
    });
    // SAFETY: plain system call; the child has not been reaped.
    assert_eq!(unsafe { libc::kill(child.id().cast_signed(), libc::SIGTERM) }, 0);
    let status = poll_until("the daemon to end", TIMEOUT, || child.try_wait().expect("it is a child"));
    assert!(status.success(), "{status}");
    let log = reader.join().expect("no thread panics");
    assert!(log.contains("disk0: serving"), "{log}");
    assert!(log.contains("SIGTERM: stopping"), "the lines after the jam are complete:\n{log}");
}

#[test]
fn a_daemon_with_a_blocked_standard_error_still_stops() {
    let directory = directory("jammed", MIB);
    let socket = directory.path().join("socket");
    let mut child = with_blocked_stderr(&directory);
    poll_until("the daemon to listen", TIMEOUT, || is_listening(&socket).then_some(()));
    (0..60).for_each(|_| assert_serves(&socket, 0));
    // SAFETY: plain system call; the child has not been reaped.
    assert_eq!(unsafe { libc::kill(child.id().cast_signed(), libc::SIGTERM) }, 0);
    let status = poll_until("the daemon to end", TIMEOUT, || child.try_wait().expect("it is a child"));
    assert!(status.success(), "{status}");
}

/// Sets the soft limit of a process's descriptors while it runs; `None`: as high as it was at the start.
fn limit_descriptors(pid: u32, limit: Option<usize>) {
    let pid = pid.cast_signed();
    let mut found = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the call writes one rlimit.
    assert_eq!(unsafe { libc::prlimit(pid, libc::RLIMIT_NOFILE, std::ptr::null(), &raw mut found) }, 0);
    found.rlim_cur = limit.map_or(found.rlim_max, |limit| limit as u64);
    // SAFETY: the call reads one rlimit.
    assert_eq!(unsafe { libc::prlimit(pid, libc::RLIMIT_NOFILE, &raw const found, std::ptr::null_mut()) }, 0);
}

/// Processor time of a process so far, in ticks of 10 ms.
fn processor_ticks(pid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("the daemon runs");
    let fields: Vec<_> = stat.rsplit(')').next().expect("the name ends").split_whitespace().collect();
    [11, 12].map(|at: usize| fields[at].parse::<u64>().expect("a number")).iter().sum()
}

#[test]
fn running_out_of_descriptors_is_logged_and_disturbs_no_other_guest() {
    let directory = directory("nofile", MIB);
    let device = "cache.size = \"4M\"\nread_only = true";
    let mut daemon = Daemon::start_configured(directory, &[device, device]);
    let mut first = Session::open(&daemon.socket_of(0), &SessionOptions::default());
    assert_eq!(first.read(0, 512), [7; 512]);
    let process = daemon.disk_processes()[0];
    let used = fs::read_dir(format!("/proc/{process}/fd")).expect("the daemon runs").count();
    limit_descriptors(process, Some(used));
    let waiting = UnixStream::connect(daemon.socket_of(1)).expect("the socket listens");
    poll_until("the log to name the limit", TIMEOUT, || {
        daemon.log().contains(&format!("RLIMIT_NOFILE is {used}")).then_some(())
    });
    let before = processor_ticks(process);
    thread::sleep(Duration::from_secs(1));
    assert!(processor_ticks(process) - before < 30, "the daemon must not spin");
    assert_eq!(first.read(64, 512), [7; 512], "the other guest is served");
    drop(waiting);
    limit_descriptors(process, None);
    let mut second = Session::open(&daemon.socket_of(1), &SessionOptions::default());
    assert_eq!(second.read(0, 512), [7; 512], "the device is served again");
    drop((first, second));
    daemon.stop();
}
