//! What an attacker in control of a thread of the daemon can still do. A binary with debug assertions trespasses
//! when it is asked to (`src/sandbox/probe.rs`), so each fence is tested by the real process, and each test also shows
//! that the trespass succeeds where its fence is missing.

mod common;

use std::fs::{self, File};
use std::os::unix::net::UnixListener;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use common::daemon::{Daemon, DaemonOptions, TempDir, server_binary};
use common::session::{Session, SessionOptions};
use common::wait::{TIMEOUT, poll_until};

/// Every fence, for a process without a sandbox that trespasses anyway.
const ALL_FENCES: &str = "capabilities dumping landlock seccomp";

fn new_image(directory: &TempDir) {
    let image = File::create(directory.path().join("image")).expect("a file can be created");
    image.set_len(1 << 20).expect("a file can be sized");
}

/// How a daemon ended that trespassed.
#[derive(Debug)]
struct Trespass {
    /// The signal that ended it; `None` if it went on serving.
    signal: Option<i32>,
    log: String,
}

impl Trespass {
    /// Starts a daemon whose first thread of `kind` performs `action`, without some fences.
    fn new(kind: &str, action: &str, without: &str) -> Self {
        let directory = TempDir::new("sandbox");
        let path = directory.path();
        new_image(&directory);
        let target = path.join("target");
        let _listener = UnixListener::bind(&target).expect("a socket can be bound");
        if action == "unlink" {
            File::create(path.join("target.file")).expect("a file can be created");
        }
        let mut command = Command::new(server_binary());
        command.arg("--socket-path").arg(path.join("socket")).arg("--blk-file").arg(path.join("image"));
        command.args(["--cache-size", "4M", "--num-queues", "1", "--memory-dir"]).arg(directory.memory());
        command.env("GENBLK_SANDBOX_TRY", format!("{kind} {action}"));
        command.env("GENBLK_SANDBOX_WITHOUT", without).env("GENBLK_SANDBOX_SOCKET", &target);
        command.env("GENBLK_SANDBOX_VICTIM", std::process::id().to_string());
        let log = File::create(path.join("log")).expect("a file can be created");
        let child =
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().expect("the binary can be started");
        Self::wait(child, &directory)
    }

    fn wait(mut child: Child, directory: &TempDir) -> Self {
        let log = || fs::read_to_string(directory.path().join("log")).unwrap_or_default();
        let status = poll_until("the daemon to trespass", TIMEOUT, || {
            match child.try_wait().expect("the child can be waited for") {
                Some(status) => Some(Some(status)),
                None if log().contains("trespass: ") => Some(None),
                None => None,
            }
        });
        if status.is_none() {
            child.kill().expect("the child can be killed");
            child.wait().expect("the child can be waited for");
        }
        Self { signal: status.and_then(|status| status.signal()), log: log() }
    }

    /// Whether the daemon died of a system call that its log names.
    #[track_caller]
    fn assert_died_of(&self, call: &str) {
        assert_eq!(self.signal, Some(libc::SIGSYS), "{call}: {}", self.log);
        let lines: Vec<_> = self.log.lines().filter(|line| line.contains("is not allowed; the process ends")).collect();
        assert!(lines.len() == 1 && lines[0].contains(&format!("system call {call} (")), "{call}: {}", self.log);
    }

    /// Whether the trespass failed with this error while the daemon went on.
    #[track_caller]
    fn assert_failed_with(&self, errno: i32) {
        let expected = format!("failed: {}", std::io::Error::from_raw_os_error(errno));
        assert!(self.signal.is_none() && self.log.contains(&expected), "{expected}: {}", self.log);
    }

    #[track_caller]
    fn assert_succeeded(&self) {
        assert!(self.log.contains(" succeeded"), "{}", self.log);
    }

    /// Whether the host lacks a fence, as the daemon says.
    fn lacks(&self, fence: &str) -> bool {
        self.log.contains(&format!("{fence} is only partly available"))
    }
}

/// Whether this binary can trespass at all, and as root, who may do everything without a sandbox.
fn can_trespass() -> bool {
    // SAFETY: plain system call.
    let is_root = unsafe { libc::geteuid() } == 0;
    let can = cfg!(debug_assertions) && is_root;
    if !can {
        println!("SKIPPED: a trespass takes a binary with debug assertions, and root");
    }
    can
}

/// Whether the host has a fence; says so if not.
fn has(fence: &str) -> bool {
    let lacks = Trespass::new("worker", "open", ALL_FENCES.replace(fence, "").as_str()).lacks(fence);
    if lacks {
        println!("SKIPPED: this host has no {fence}");
    }
    !lacks
}

#[test]
fn a_forbidden_system_call_ends_the_daemon_with_a_line_that_names_it() {
    if !can_trespass() || !has("seccomp") {
        return;
    }
    let threads = [
        ("worker", "genblk disk0"),
        ("control", "accept disk0"),
        ("store", "store-"),
        ("memory", "memory disk0"),
        ("log", "log"),
    ];
    for (kind, thread) in threads {
        let trespass = Trespass::new(kind, "open", "");
        trespass.assert_died_of("openat");
        assert!(trespass.log.contains(&format!("sandbox: thread \"{thread}")), "{}", trespass.log);
        Trespass::new(kind, "open", ALL_FENCES).assert_succeeded();
    }
    for kind in ["opener", "main"] {
        let trespass = Trespass::new(kind, "connect", "");
        trespass.assert_died_of("socket");
        let threads = ["control disk0", "disk disk0"].map(|thread| format!("sandbox: thread \"{thread}\""));
        assert!(threads.iter().any(|thread| trespass.log.contains(thread)), "{}", trespass.log);
        // They look for files that they can do without.
        Trespass::new(kind, "open", "landlock").assert_failed_with(libc::EACCES);
        Trespass::new(kind, "open", "seccomp").assert_failed_with(libc::EACCES);
        Trespass::new(kind, "open", ALL_FENCES).assert_succeeded();
        Trespass::new(kind, "stat", "").assert_failed_with(libc::EACCES);
    }
}

#[test]
fn a_hijacked_thread_cannot_create_files_sockets_processes_or_code() {
    if !can_trespass() || !has("seccomp") {
        return;
    }
    let actions = [
        ("create", "openat"),
        ("unlink", "unlink"),
        ("connect", "socket"),
        ("exec", "execve"),
        ("fork", "clone"),
        ("ptrace", "ptrace"),
        ("kill", "kill"),
        ("tgkill", "tgkill"),
        ("setuid", "setresuid"),
        ("unshare", "unshare"),
        ("ring", "io_uring_setup"),
        ("code", "mmap"),
    ];
    for kind in ["worker", "control"] {
        for (action, call) in actions {
            Trespass::new(kind, action, "").assert_died_of(call);
        }
    }
    for (action, _) in actions {
        Trespass::new("worker", action, ALL_FENCES).assert_succeeded();
    }
}

#[test]
fn landlock_alone_denies_paths_tcp_and_signals_to_other_processes() {
    if !can_trespass() || !has("landlock") {
        return;
    }
    let actions = [
        ("open", libc::EACCES),
        ("create", libc::EACCES),
        ("unlink", libc::EACCES),
        ("tcp", libc::EACCES),
        ("kill", libc::EPERM),
        ("ptrace", libc::EPERM),
    ];
    for (action, errno) in actions {
        for kind in ["worker", "control"] {
            Trespass::new(kind, action, "seccomp capabilities").assert_failed_with(errno);
        }
        if action == "tcp" {
            // Nobody listens there.
            Trespass::new("worker", action, ALL_FENCES).assert_failed_with(libc::ECONNREFUSED);
        } else {
            Trespass::new("worker", action, ALL_FENCES).assert_succeeded();
        }
    }
}

#[test]
fn threads_have_no_capabilities_and_cannot_become_dumpable() {
    if !can_trespass() {
        return;
    }
    for kind in ["worker", "control", "store", "memory", "log"] {
        Trespass::new(kind, "setuid", "seccomp landlock").assert_failed_with(libc::EPERM);
    }
    Trespass::new("worker", "setuid", "seccomp landlock capabilities").assert_succeeded();
    Trespass::new("worker", "dump", "seccomp").assert_failed_with(libc::EPERM);
    Trespass::new("worker", "dump", "seccomp dumping").assert_succeeded();
}

#[test]
fn abort_works_in_a_confined_thread() {
    if !can_trespass() {
        return;
    }
    for kind in ["worker", "control", "store", "memory", "log"] {
        let trespass = Trespass::new(kind, "abort", "");
        assert_eq!(trespass.signal, Some(libc::SIGABRT), "{}", trespass.log);
    }
}

/// The GNU C library reads a file of proc when it does that for the first time.
#[test]
fn a_confined_thread_can_return_memory_to_the_system() {
    if !can_trespass() {
        return;
    }
    for kind in ["worker", "control", "store", "memory", "log"] {
        Trespass::new(kind, "free", "").assert_succeeded();
    }
}

#[test]
fn the_sandbox_allows_the_rare_system_calls_of_libraries() {
    if !can_trespass() {
        return;
    }
    for kind in ["opener", "main", "worker", "control", "store", "memory", "log", "watchdog"] {
        Trespass::new(kind, "runtime", "").assert_succeeded();
    }
}

/// The value of a field in the status of each thread of a process whose name begins with `name`.
fn statuses(pid: u32, name: &str, field: &str) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("the daemon runs").flatten();
    let texts = tasks.filter_map(|task| fs::read_to_string(task.path().join("status")).ok());
    texts
        .filter(|text| text.starts_with(&format!("Name:\t{name}")))
        .filter_map(|text| text.lines().find_map(|line| line.strip_prefix(&format!("{field}:\t")).map(str::to_owned)))
        .collect()
}

/// The threads that face guests, front-ends and images.
const CONFINED: [&str; 5] = ["genblk disk0", "accept disk0", "vhost disk0", "store-", "log"];

#[test]
fn every_thread_that_handles_untrusted_input_is_confined() {
    let daemon = Daemon::start("sandbox", 1 << 20, &DaemonOptions::default());
    let _session = Session::open(&daemon.socket(), &SessionOptions::default());
    for thread in CONFINED.into_iter().chain(["control disk0", "watchdog"]) {
        // The thread of the log confines itself a moment later than the others.
        poll_until("a filter", TIMEOUT, || (statuses(daemon.id(), thread, "Seccomp").first()? == "2").then_some(()));
        let none = "0000000000000000";
        for (field, value) in
            [("NoNewPrivs", "1"), ("Seccomp", "2"), ("CapPrm", none), ("CapEff", none), ("CapBnd", none)]
        {
            let found = statuses(daemon.id(), thread, field);
            // Without privileges the bounding set stays, and means nothing with NoNewPrivs.
            let is_bound = field == "CapBnd" && !can_trespass();
            assert!(
                is_bound || !found.is_empty() && found.iter().all(|found| found == value),
                "{thread}: {field} {found:?}"
            );
        }
    }
}

#[test]
fn a_daemon_without_sandbox_support_serves_with_a_warning() {
    let directory = TempDir::new("sandbox");
    new_image(&directory);
    let daemon = Daemon::start_configured(directory, &["sandbox = \"off\""]);
    let _session = Session::open(&daemon.socket(), &SessionOptions::default());
    daemon.await_log("WARN  disk0: sandbox = \"off\"");
    for thread in CONFINED {
        let found = statuses(daemon.disk_process("disk0"), thread, "Seccomp");
        assert!(!found.is_empty() && found.iter().all(|found| found == "0"), "{thread}: {found:?}");
    }
}

/// The user of the disk process in the next test.
const NOBODY: u32 = 65534;

#[test]
fn every_thread_of_a_disk_process_is_confined_and_unprivileged() {
    if !can_trespass() {
        return;
    }
    for (user, uid) in [("", 0), ("nobody", NOBODY)] {
        let directory = TempDir::new("sandbox");
        new_image(&directory);
        std::os::unix::fs::chown(directory.path().join("image"), Some(uid), None).unwrap();
        let mut daemon = Daemon::start_configured(directory, &[&format!("user = \"{user}\"")]);
        let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
        session.write(0, &[7; 4096]);
        let &[process] = daemon.disk_processes().as_slice() else { panic!("one disk, one process") };
        poll_until("filters", TIMEOUT, || {
            let found = statuses(process, "", "Seccomp");
            (found.len() > 5 && found.iter().all(|found| found == "2")).then_some(())
        });
        for thread in CONFINED.iter().chain(&["disk disk0", "watchdog"]) {
            assert!(!statuses(process, thread, "Seccomp").is_empty(), "{thread}");
        }
        let ids = format!("{uid}\t{uid}\t{uid}\t{uid}");
        let none = "0000000000000000";
        for (field, value) in [("NoNewPrivs", "1"), ("CapPrm", none), ("CapEff", none), ("Uid", &ids)] {
            let found = statuses(process, "", field);
            assert!(found.iter().all(|found| found == value), "{field}: {found:?}");
        }
        drop(session);
        daemon.stop();
        assert_eq!(daemon.image_bytes(0, 4096), [7; 4096]);
        assert!(daemon.directory().left().is_empty(), "everything is on the image: {}", daemon.log());
    }
}

#[test]
fn a_disk_process_that_violates_its_filter_is_logged_and_restarted() {
    if !can_trespass() || !has("seccomp") {
        return;
    }
    let directory = TempDir::new("sandbox");
    new_image(&directory);
    let mut command = Command::new(server_binary());
    command.env("GENBLK_SANDBOX_TRY", "control exec");
    let daemon = Daemon::start_by(directory, &[""], command);
    daemon.await_log("system call execve (");
    daemon.await_log("killed by SIGSYS");
}

/// Computed by `systemd-analyze`, which does not need a running systemd.
#[test]
fn the_unit_file_has_a_low_systemd_exposure_score() {
    let unit = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/genblk.service");
    let Ok(output) =
        Command::new("systemd-analyze").args(["security", "--offline=true", "--no-pager"]).arg(unit).output()
    else {
        println!("SKIPPED: this host has no systemd-analyze");
        return;
    };
    let text = String::from_utf8_lossy(&output.stdout);
    let Some(line) = text.lines().find(|line| line.contains("Overall exposure level")) else {
        println!("SKIPPED: systemd-analyze of this host cannot judge a unit file: {text}");
        return;
    };
    let level: Option<f64> = line.split_whitespace().find_map(|word| word.parse().ok());
    assert!(level.is_some_and(|level| level <= 2.0), "{line}");
}
