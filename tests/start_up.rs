//! Start-up: the daemon refuses what it cannot serve, with a clear message and exit status, and the attempt damages
//! nothing. Each served disk is announced in one line.

mod common;

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, symlink};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use common::daemon::{Daemon, DaemonOptions, Ended, TempDir, run_to_end, server_binary};
use common::prng::Prng;
use common::request::{assert_serves, pattern};
use common::session::{Session, SessionOptions};
use common::wait::{TIMEOUT, is_listening, poll_until};
use genblk::cli::CAPABILITIES;
use genblk::store::file::{FileImage, OpenOptions};

const IMAGE_BYTES: usize = 1 << 20;

/// A directory with an image of random bytes.
struct Fixture {
    directory: TempDir,
    content: Vec<u8>,
}

impl Fixture {
    fn new() -> Self {
        let directory = TempDir::new("start");
        let content = Prng::new(1).bytes(IMAGE_BYTES);
        fs::write(directory.path().join("image"), &content).expect("an image can be written");
        Self { directory, content }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Runs genblk on `image` and `socket` with more options; it must exit.
    #[track_caller]
    fn serve(&self, image: &str, socket: &str, options: &[&str]) -> Ended {
        let mut command = Command::new(server_binary());
        command.arg("--socket-path").arg(self.path(socket)).arg("--blk-file").arg(self.path(image)).args(options);
        run_to_end(&mut command)
    }

    /// Runs genblk on a configuration file with this text; it must exit.
    #[track_caller]
    fn serve_config(&self, text: &str, options: &[&str]) -> Ended {
        fs::write(self.path("genblk.toml"), text).expect("a configuration can be written");
        run_to_end(Command::new(server_binary()).arg("--config").arg(self.path("genblk.toml")).args(options))
    }

    /// A device's table of the configuration.
    fn table(&self, name: &str, image: &str, rest: &str) -> String {
        let (image, socket) = (self.path(image), self.path(&format!("{name}.sock")));
        format!("[[device]]\nname = {name:?}\nsocket = {socket:?}\nimage = {image:?}\n{rest}\n")
    }

    /// Fails the test if the image has changed.
    #[track_caller]
    fn assert_undamaged(&self) {
        assert!(fs::read(self.path("image")).expect("the image exists") == self.content, "the image has changed");
    }
}

impl Ended {
    /// Fails the test unless the exit status is `status` and the message contains all of `words`.
    #[track_caller]
    fn assert_refused(&self, status: i32, words: &[&str]) {
        assert_eq!(self.status.code(), Some(status), "{self:?}");
        assert_eq!(self.stdout, "", "an error message is not for standard output");
        assert!(self.stderr.starts_with("genblk: "), "{self:?}");
        assert!(!self.stderr.contains("panicked"), "{self:?}");
        for word in words {
            assert!(self.stderr.contains(word), "{word:?} is not in {self:?}");
        }
    }
}

fn exists(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok()
}

#[test]
fn an_unusable_image_is_refused() {
    let fixture = Fixture::new();
    fs::create_dir(fixture.path("directory")).expect("a directory can be created");
    fs::write(fixture.path("empty"), "").expect("a file can be written");
    fs::write(fixture.path("odd"), [7; 1000]).expect("a file can be written");
    let cases = [
        ("missing", "No such file or directory"),
        ("directory", "neither a regular file nor a block device"),
        ("empty", "is empty"),
        ("odd", "1000 bytes, which is not a multiple of 512"),
    ];
    for (name, reason) in cases {
        for read_only in [&[][..], &["--read-only"]] {
            let ended = fixture.serve(name, "socket", read_only);
            ended.assert_refused(1, &[fixture.path(name).to_str().expect("UTF-8"), reason]);
            assert_eq!(ended.stderr.lines().count(), 1, "{ended:?}");
            assert!(!exists(&fixture.path("socket")), "{name}: no socket is created");
        }
    }
    assert!(!exists(&fixture.path("missing")), "a missing image is not created");
    assert_eq!(fs::read(fixture.path("odd")).expect("the file exists"), [7; 1000]);
}

#[test]
fn an_image_in_use_is_refused_after_two_seconds() {
    let fixture = Fixture::new();
    let image = fixture.path("image");
    let held = FileImage::open(&image, &OpenOptions::default()).expect("the image can be opened");
    for read_only in [&[][..], &["--read-only"]] {
        let started = Instant::now();
        let ended = fixture.serve("image", "socket", read_only);
        ended.assert_refused(1, &[image.to_str().expect("UTF-8"), "is in use"]);
        assert!(started.elapsed() >= Duration::from_secs(2), "the daemon waits for the lock");
        assert!(!exists(&fixture.path("socket")));
    }
    drop(held);
    fixture.assert_undamaged();
}

#[test]
fn an_image_released_within_two_seconds_is_served() {
    let fixture = Fixture::new();
    let held = FileImage::open(&fixture.path("image"), &OpenOptions::default()).expect("the image can be opened");
    let release = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(300));
        drop(held);
    });
    let mut daemon = Daemon::start_in(fixture.directory, &DaemonOptions::default());
    release.join().expect("the thread ends");
    assert_serves(&daemon.socket(), 0);
    daemon.stop();
}

#[test]
fn the_socket_of_a_running_daemon_is_refused() {
    let fixture = Fixture::new();
    let mut daemon = Daemon::start("live", 1 << 20, &DaemonOptions::default());
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    session.write(8, &pattern(1, 8, 4096));
    let ended = fixture.serve("image", daemon.socket().to_str().expect("UTF-8"), &[]);
    ended.assert_refused(1, &[daemon.socket().to_str().expect("UTF-8"), "another process already does"]);
    assert_eq!(session.read(8, 4096), pattern(1, 8, 4096), "the other daemon still serves its guest");
    drop(session);
    assert_serves(&daemon.socket(), 0);
    daemon.stop();
    fixture.assert_undamaged();
}

#[test]
fn a_path_that_is_not_a_socket_is_refused_and_unchanged() {
    let fixture = Fixture::new();
    fs::write(fixture.path("file"), "precious").expect("a file can be written");
    fs::create_dir(fixture.path("directory")).expect("a directory can be created");
    symlink("nowhere", fixture.path("link")).expect("a link can be created");
    for name in ["file", "directory", "link"] {
        let ended = fixture.serve("image", name, &[]);
        ended.assert_refused(1, &[fixture.path(name).to_str().expect("UTF-8"), "exists and is not a socket"]);
    }
    assert_eq!(fs::read_to_string(fixture.path("file")).expect("the file exists"), "precious");
    assert!(fixture.path("directory").is_dir());
    assert_eq!(fs::read_link(fixture.path("link")).expect("the link exists"), Path::new("nowhere"));
    let ended = fixture.serve("image", "no-such-directory/socket", &[]);
    ended.assert_refused(1, &["no-such-directory/socket", "No such file or directory"]);
    fixture.assert_undamaged();
}

#[test]
fn the_stale_socket_of_a_killed_daemon_is_replaced() {
    let mut daemon = Daemon::start("stale", 1 << 20, &DaemonOptions::default());
    daemon.kill();
    assert!(exists(&daemon.socket()), "a killed daemon leaves its socket");
    daemon.restart();
    daemon.await_log(": removed stale socket");
    assert_serves(&daemon.socket(), 0);
    daemon.stop();
    assert!(!exists(&daemon.socket()), "an orderly end removes the socket");
}

/// A cache larger than the host's memory is refused before any memory is allocated.
#[test]
fn a_cache_too_small_or_too_large_is_refused() {
    let fixture = Fixture::new();
    for size in ["0", "4095K", "9T", "64MB"] {
        let ended = fixture.serve("image", "socket", &["--cache-size", size]);
        ended.assert_refused(2, &["--cache-size: takes a size from 4M to 8T", size]);
    }
    let started = Instant::now();
    let ended = fixture.serve("image", "socket", &["--cache-size", "8T"]);
    ended.assert_refused(1, &["cannot allocate a cache of 8796093022208 bytes", "available"]);
    assert!(started.elapsed() < Duration::from_secs(2), "the refusal takes no time");
    assert!(!exists(&fixture.path("socket")));
    fixture.assert_undamaged();
}

#[test]
fn an_invalid_configuration_reports_all_problems_and_starts_no_device() {
    let fixture = Fixture::new();
    let wrong = "num_queues = 0\ncolour = \"red\"\nengine = \"iouring\"\n[device.cache]\nsize = \"1M\"\nmode = 7";
    let text = fixture.table("good", "image", "") + &fixture.table("bad", "missing", wrong);
    let ended = fixture.serve_config(&text, &[]);
    let file = fixture.path("genblk.toml").display().to_string();
    let prefix = |line: u32, key: &str| format!("{file}:{line}: device[1].{key}: ");
    let prefixes = [prefix(10, "num_queues"), prefix(11, "colour"), prefix(12, "engine"), prefix(14, "cache.size")];
    ended.assert_refused(2, &prefixes.each_ref().map(String::as_str));
    ended.assert_refused(2, &[&prefix(15, "cache.mode"), "5 problems in"]);
    assert!(!exists(&fixture.path("good.sock")), "not even the good device is started");
    fixture.assert_undamaged();
    fixture.serve_config("[[device]\n", &[]).assert_refused(2, &[&format!("{file}:1:")]);
    let missing = fixture.path("no-such.toml");
    let ended = run_to_end(Command::new(server_binary()).arg("--config").arg(&missing));
    ended.assert_refused(2, &[missing.to_str().expect("UTF-8"), "No such file or directory"]);
}

#[test]
fn check_starts_no_device() {
    let fixture = Fixture::new();
    let ended = fixture.serve_config(&fixture.table("good", "image", ""), &["--check"]);
    assert_eq!((ended.status.code(), ended.stderr.as_str()), (Some(0), ""), "{ended:?}");
    assert!(ended.stdout.ends_with("genblk.toml: no problems, 1 device\n"), "{ended:?}");
    assert!(!exists(&fixture.path("good.sock")));
    fixture.serve_config(&fixture.table("bad", "image", "workers = 9"), &["--check"]).assert_refused(2, &["workers"]);
    fixture.assert_undamaged();
}

#[test]
fn check_reports_every_problem_of_every_device_at_once() {
    let fixture = Fixture::new();
    fs::write(fixture.path("qcow2"), b"QFI\xfb\0\0\0\x03".repeat(512)).expect("a file can be written");
    fs::write(fixture.path("c.sock"), "in the way").expect("a file can be written");
    let text = fixture.table("a", "missing", "")
        + &fixture.table("b", "qcow2", "")
        + &fixture.table("c", "image", "")
        + &fixture.table("d", "e", "read_only = true\nsocket_mode = \"0600\"").replace("d.sock", "none/d.sock")
        + &fixture.table("e", "image2", "[device.cache]\nmemory_dir = \"/proc/genblk\"\nsurvive = \"always\"")
        + &fixture.table("f", "image3", "[device.cache]\nsize = \"8T\"\nsurvive = \"always\"");
    for name in ["e", "image2", "image3"] {
        fs::write(fixture.path(name), [0; 512]).expect("a file can be written");
    }
    let ended = fixture.serve_config(&text, &["--check"]);
    let words = [
        "a: cannot open image ",
        "b: image ",
        " is a qcow2 image",
        "c: cannot listen on ",
        "exists and is not a socket",
        "d: cannot listen on ",
        "none/d.sock: No such file or directory",
        "e: memory_dir /proc/genblk is on proc, which is not memory",
        "f: /dev/shm (tmpfs) has ",
        "all devices: cannot allocate caches of ",
        "7 problems in ",
    ];
    ended.assert_refused(1, &words);
    assert!(fixture.directory.left().is_empty());
    fixture.assert_undamaged();
}

#[test]
fn check_passes_beside_a_running_daemon_without_disturbing_it() {
    let fixture = Fixture::new();
    let memory = fixture.directory.memory();
    let text = fixture.table("a", "image", &format!("[device.cache]\nmemory_dir = {memory:?}"));
    fs::write(fixture.path("genblk.toml"), &text).expect("a configuration can be written");
    let (config, socket) = (fixture.path("genblk.toml"), fixture.path("a.sock"));
    let mut command = Command::new(server_binary());
    command.arg("--config").arg(&config);
    let mut daemon = Daemon::launch(fixture.directory, command, vec![socket.clone()]);
    let mut session = Session::open(&socket, &SessionOptions::default());
    session.write(8, &pattern(1, 8, 4096));
    let ended = run_to_end(Command::new(server_binary()).arg("--check").arg("--config").arg(&config));
    assert!(ended.status.success(), "{ended:?}");
    for word in ["no problems, 1 device", "is in use by another process", "a: another process listens on "] {
        assert!(ended.stdout.contains(word), "{word}: {ended:?}");
    }
    assert_eq!(session.read(8, 4096), pattern(1, 8, 4096));
    drop(session);
    daemon.stop();
}

/// All or nothing: if one device cannot be served, the daemon closes what it opened for the others.
#[test]
fn with_strict_one_failed_device_stops_the_start() {
    let fixture = Fixture::new();
    let text = fixture.table("first", "image", "cache.size = \"4M\"") + &fixture.table("second", "missing", "");
    fixture.serve_config(&text, &["--strict"]).assert_refused(1, &["missing", "No such file or directory"]);
    assert!(!exists(&fixture.path("first.sock")), "the first device's socket is removed");
    let free = FileImage::open(&fixture.path("image"), &OpenOptions::default());
    assert!(free.is_ok(), "the first device's image is unlocked");
    fixture.assert_undamaged();
}

/// The socket is the last thing that is opened.
#[test]
fn a_late_start_failure_leaves_no_files_behind() {
    let fixture = Fixture::new();
    let memory = fixture.directory.memory();
    let options = ["--memory-dir", memory.to_str().expect("UTF-8"), "--cache-size", "4M"];
    let ended = fixture.serve("image", "no-such-directory/socket", &options);
    ended.assert_refused(1, &["no-such-directory/socket", "No such file or directory"]);
    assert!(fixture.directory.left().is_empty(), "the new cache file is removed");
    fixture.assert_undamaged();
}

#[test]
fn a_daemon_that_can_serve_no_device_ends_with_the_reasons() {
    let fixture = Fixture::new();
    let text = fixture.table("first", "missing", "") + &fixture.table("second", "also-missing", "");
    let ended = fixture.serve_config(&text, &[]);
    assert_eq!(ended.status.code(), Some(1), "{ended:?}");
    for word in ["missing", "also-missing", "not served", "genblk: "] {
        assert!(ended.stderr.contains(word), "{word:?} is not in {ended:?}");
    }
}

/// Also: it is served as soon as possible, and the service manager is notified.
#[test]
fn one_missing_image_does_not_stop_other_devices() {
    const DEVICES: usize = 8;
    let fixture = Fixture::new();
    let mut text = String::new();
    for n in 0..DEVICES {
        let image = format!("image{n}");
        fs::write(fixture.path(&image), vec![7; IMAGE_BYTES]).expect("an image can be written");
        text += &fixture.table(&format!("d{n}"), &image, "cache.size = \"4M\"");
    }
    fs::rename(fixture.path("image3"), fixture.path("elsewhere")).expect("a file can be renamed");
    fs::write(fixture.path("genblk.toml"), text).expect("a configuration can be written");
    let notified = UnixDatagram::bind(fixture.path("notify")).expect("a socket can be bound");
    notified.set_read_timeout(Some(TIMEOUT)).expect("a timeout can be set");
    let receive = || {
        let mut message = [0; 4096];
        let length = notified.recv(&mut message).expect("the daemon notifies its service manager");
        String::from_utf8_lossy(&message[..length]).into_owned()
    };
    let mut command = Command::new(server_binary());
    command.arg("--config").arg(fixture.path("genblk.toml")).env("NOTIFY_SOCKET", fixture.path("notify"));
    let sockets = (0..DEVICES).filter(|&n| n != 3).map(|n| fixture.path(&format!("d{n}.sock"))).collect();
    let (missing, elsewhere) = (fixture.path("image3"), fixture.path("elsewhere"));
    let socket = fixture.path("d3.sock");
    let mut daemon = Daemon::launch(fixture.directory, command, sockets);
    let ready = receive();
    assert!(ready.starts_with("READY=1\nSTATUS=serving 7 of 8 disks; not served: d3 ("), "{ready:?}");
    assert!(ready.contains("image3") && ready.contains("No such file"), "{ready:?}");
    daemon.await_log("d3: not served: ");
    assert_serves(&daemon.socket(), 0);
    fs::rename(elsewhere, missing).expect("a file can be renamed");
    daemon.signal(libc::SIGHUP);
    poll_until("the image that came back to be served", TIMEOUT, || is_listening(&socket).then_some(()));
    assert_serves(&socket, 0);
    // A reload comes with the signal.
    let status = std::iter::repeat_with(receive).find(|text| text.starts_with("STATUS=serving 8"));
    assert_eq!(status.as_deref(), Some("STATUS=serving 8 of 8 disks"));
    daemon.stop();
}

#[test]
fn a_writer_and_a_reader_on_one_image_are_refused() {
    let fixture = Fixture::new();
    let small = "cache.size = \"4M\"\n";
    let text = fixture.table("writer", "image", small)
        + &fixture.table("reader", "image", &format!("read_only = true\n{small}"));
    fixture.serve_config(&text, &[]).assert_refused(2, &["device[1].image", "device[0]", "read_only"]);
    assert!(!exists(&fixture.path("writer.sock")));
    fixture.assert_undamaged();
}

#[test]
fn capabilities_are_printed_whatever_the_other_options() {
    let mut command = Command::new(server_binary());
    let ended = run_to_end(command.args(["--print-capabilities", "--blk-file", "/nonexistent", "--no-such-option"]));
    assert_eq!((ended.status.code(), ended.stderr.as_str()), (Some(0), ""), "{ended:?}");
    assert_eq!(ended.stdout, CAPABILITIES);
}

/// Number of the descriptor that the daemon inherits.
const INHERITED: i32 = 100;

/// A command that serves `image` on `descriptor`, which the daemon inherits.
fn with_inherited(descriptor: &impl AsRawFd, image: &Path) -> Command {
    let fd = descriptor.as_raw_fd();
    let mut command = Command::new(server_binary());
    command.args(["--cache-size", "4M", "--fd", &INHERITED.to_string()]).arg("--blk-file").arg(image);
    // SAFETY: between fork and exec the child calls only dup2, which is async-signal-safe.
    unsafe {
        command.pre_exec(move || match libc::dup2(fd, INHERITED) {
            -1 => Err(std::io::Error::last_os_error()),
            _ => Ok(()),
        })
    };
    command
}

#[test]
fn an_inherited_sockets_path_survives_the_daemon() {
    let fixture = Fixture::new();
    let (socket, image) = (fixture.path("inherited"), fixture.path("image"));
    let listener = UnixListener::bind(&socket).expect("a socket can be bound");
    let command = with_inherited(&listener, &image);
    let mut daemon = Daemon::launch(fixture.directory, command, vec![socket.clone()]);
    assert_serves(&socket, 0);
    assert_serves(&socket, 64);
    daemon.stop();
    assert!(exists(&socket), "the socket belongs to the process that bound it");
    // The next daemon that inherits the socket serves front-ends that connect in between.
    let waiting = UnixStream::connect(&socket).expect("the socket still listens");
    daemon.restart();
    drop(waiting);
    assert_serves(&socket, 0);
    drop(listener);
    daemon.stop();
}

#[test]
fn an_inherited_descriptor_that_is_not_a_listening_unix_socket_is_refused() {
    let fixture = Fixture::new();
    let image = fixture.path("image");
    let file = File::open(&image).expect("the image can be opened");
    let (connected, _other_end) = UnixStream::pair().expect("sockets can be created");
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").expect("a port is free");
    for mut command in [with_inherited(&file, &image), with_inherited(&connected, &image), with_inherited(&tcp, &image)]
    {
        run_to_end(&mut command).assert_refused(1, &["descriptor 100 is not a listening Unix domain socket"]);
    }
    let mut closed = Command::new(server_binary());
    closed.args(["--fd", "100", "--blk-file"]).arg(&image);
    run_to_end(&mut closed).assert_refused(1, &["descriptor 100 is not a listening Unix domain socket"]);
    fixture.assert_undamaged();
}

/// From the first moment at which the socket exists, and with every umask.
#[test]
fn the_socket_has_the_configured_mode_under_any_umask() {
    for umask in ["0000", "0022", "0177"] {
        for (keys, mode) in [("", 0o600), ("socket_mode = \"0666\"", 0o666), ("socket_mode = \"0660\"", 0o660)] {
            let fixture = Fixture::new();
            let socket = fixture.path("disk0.sock");
            let keys = format!("{keys}\ncache.size = \"4M\"\ncache.survive = \"never\"");
            let table = fixture.table("disk0", "image", &keys);
            fs::write(fixture.path("genblk.toml"), table).expect("a file can be written");
            let mut command = Command::new("sh");
            command.arg("-c").arg(format!("umask {umask}; exec \"$0\" --config \"$1\""));
            command.arg(server_binary()).arg(fixture.path("genblk.toml"));
            let watched = socket.clone();
            let watcher = std::thread::spawn(move || {
                poll_until("the socket", TIMEOUT, || fs::symlink_metadata(&watched).ok()).mode() & 0o7777
            });
            let mut daemon = Daemon::launch(fixture.directory, command, vec![socket.clone()]);
            let first_seen = watcher.join().expect("the socket appears");
            assert_eq!(first_seen & !mode, 0, "umask {umask}: {first_seen:o} at first");
            assert_eq!(fs::symlink_metadata(&socket).expect("it exists").mode() & 0o7777, mode, "umask {umask}");
            assert_serves(&socket, 0);
            daemon.stop();
        }
    }
    let fixture = Fixture::new();
    let text = fixture.table("disk0", "image", "socket_group = \"no-such-group-of-genblk\"");
    for options in [&["--check"][..], &[]] {
        fixture.serve_config(&text, options).assert_refused(1, &["socket_group", "there is no such group"]);
    }
}

#[test]
fn an_unknown_log_level_falls_back_to_info_with_a_warning() {
    for level in ["verbose", "genblk::cache=debug", "\u{1b}[31m"] {
        let lines = log_at(Some(level));
        assert!(lines[0].contains(" WARN  GENBLK_LOG: ") && lines[0].ends_with("; using info"), "{lines:#?}");
        assert!(!lines[0].contains('\u{1b}'), "control characters are escaped: {lines:#?}");
        assert!(lines[1].contains(" INFO  disk0: serving /"), "{lines:#?}");
        let ended = run_to_end(Command::new(server_binary()).arg("--help").env("GENBLK_LOG", level));
        assert!(ended.status.success() && ended.stdout.contains("--blk-file"), "{ended:?}");
    }
}

#[test]
fn an_empty_log_level_is_the_default() {
    let lines = log_at(Some(""));
    assert!(lines[0].contains(" INFO  disk0: serving /"), "{lines:#?}");
}

/// The log at `level` of a daemon from its start to its end, with one front-end in between.
fn log_at(level: Option<&str>) -> Vec<String> {
    let fixture = Fixture::new();
    let (socket, image) = (fixture.path("socket"), fixture.path("image"));
    let mut command = Command::new(server_binary());
    command.arg("--socket-path").arg(&socket).arg("--blk-file").arg(image).args(["--cache-size", "4M"]);
    // Of its own: the daemon warns of caches that others have left.
    command.arg("--memory-dir").arg(fixture.directory.memory());
    match level {
        Some(level) => command.env("GENBLK_LOG", level),
        None => command.env_remove("GENBLK_LOG"),
    };
    let mut daemon = Daemon::launch(fixture.directory, command, vec![socket.clone()]);
    assert_serves(&socket, 0);
    if level != Some("warn") {
        poll_until("the front-end's end to be noticed", TIMEOUT, || {
            daemon.log().contains("disconnected").then_some(())
        });
    }
    daemon.stop();
    daemon.log().lines().map(ToOwned::to_owned).collect()
}

/// ARCHITECTURE.md lists the lines at `info`.
#[test]
fn the_log_has_one_line_per_event() {
    let quiet = log_at(Some("warn"));
    assert!(quiet.is_empty(), "no warnings: {quiet:#?}");
    for level in [None, Some("info")] {
        let lines = log_at(level);
        let events = [
            "disk0: serving /",
            "disk0: front-end connected",
            "disk0: front-end disconnected",
            "SIGTERM: stopping",
            "disk0: reads: ",
            "disk0: read-ahead: ",
            "disk0: write-back: ",
            "disk0: stopped",
        ];
        assert_eq!(lines.len(), events.len(), "{lines:#?}");
        for (line, event) in lines.iter().zip(events) {
            let (stamp, message) = line.split_once(" INFO  ").expect("a line has a time, the level and a message");
            assert!(stamp.ends_with('Z') && message.starts_with(event), "{event:?} is not {line:?}");
        }
    }
}
