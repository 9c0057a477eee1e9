//! Starting: what cannot be served is refused at once, with a clear message and exit status, and nothing is damaged by the
//! attempt; what can be served is, and says so in one line.

mod common;

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::symlink;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use common::daemon::{Daemon, DaemonOptions, Ended, TempDir, run_to_end, server_binary};
use common::prng::Prng;
use common::request::{assert_serves, pattern};
use common::session::{Session, SessionOptions};
use common::wait::{PATIENCE, poll_until};
use genblk::cli::CAPABILITIES;
use genblk::store::file::{FileImage, OpenOptions};

const IMAGE_BYTES: usize = 1 << 20;

/// A directory with an image of noise and room for a socket.
struct Place {
    directory: TempDir,
    content: Vec<u8>,
}

impl Place {
    fn new() -> Self {
        let directory = TempDir::new("start");
        let content = Prng::new(1).bytes(IMAGE_BYTES);
        fs::write(directory.path().join("image"), &content).expect("an image can be written");
        Self { directory, content }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Runs genblk on `image` and `socket` with more options; it must end.
    #[track_caller]
    fn serve(&self, image: &str, socket: &str, options: &[&str]) -> Ended {
        let mut command = Command::new(server_binary());
        command.arg("--socket-path").arg(self.path(socket)).arg("--blk-file").arg(self.path(image)).args(options);
        run_to_end(&mut command)
    }

    /// Runs genblk on a configuration file with this text; it must end.
    #[track_caller]
    fn serve_config(&self, text: &str, options: &[&str]) -> Ended {
        fs::write(self.path("genblk.toml"), text).expect("a configuration can be written");
        run_to_end(Command::new(server_binary()).arg("--config").arg(self.path("genblk.toml")).args(options))
    }

    /// The lines of a device's table.
    fn table(&self, name: &str, image: &str, rest: &str) -> String {
        let (image, socket) = (self.path(image), self.path(&format!("{name}.sock")));
        format!("[[device]]\nname = {name:?}\nsocket = {socket:?}\nimage = {image:?}\n{rest}\n")
    }

    /// The image is as it was.
    #[track_caller]
    fn assert_undamaged(&self) {
        assert!(fs::read(self.path("image")).expect("the image is there") == self.content, "the image has changed");
    }
}

impl Ended {
    /// The exit status is `status`, and one message holds all of `words`.
    #[track_caller]
    fn assert_refused(&self, status: i32, words: &[&str]) {
        assert_eq!(self.status.code(), Some(status), "{self:?}");
        assert_eq!(self.stdout, "", "a refusal is not on standard output");
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
fn what_is_no_image_is_refused() {
    let place = Place::new();
    fs::create_dir(place.path("directory")).expect("a directory can be made");
    fs::write(place.path("empty"), "").expect("a file can be written");
    fs::write(place.path("odd"), [7; 1000]).expect("a file can be written");
    let cases = [
        ("missing", "No such file or directory"),
        ("directory", "neither a regular file nor a block device"),
        ("empty", "is empty"),
        ("odd", "1000 bytes, which is not a multiple of 512"),
    ];
    for (name, reason) in cases {
        for read_only in [&[][..], &["--read-only"]] {
            let ended = place.serve(name, "socket", read_only);
            ended.assert_refused(1, &[place.path(name).to_str().expect("UTF-8"), reason]);
            assert_eq!(ended.stderr.lines().count(), 1, "{ended:?}");
            assert!(!exists(&place.path("socket")), "{name}: nobody listens, so there is no socket");
        }
    }
    assert!(!exists(&place.path("missing")), "a missing image is not made");
    assert_eq!(fs::read(place.path("odd")).expect("it is there"), [7; 1000]);
}

/// The other one goes on, and its guest notices nothing.
#[test]
fn an_image_in_use_is_refused_after_a_while() {
    let place = Place::new();
    let image = place.path("image");
    let held = FileImage::open(&image, &OpenOptions::default()).expect("nobody else has the image");
    for read_only in [&[][..], &["--read-only"]] {
        let started = Instant::now();
        let ended = place.serve("image", "socket", read_only);
        ended.assert_refused(1, &[image.to_str().expect("UTF-8"), "is in use"]);
        assert!(started.elapsed() >= Duration::from_secs(2), "a predecessor's end is waited for");
        assert!(!exists(&place.path("socket")));
    }
    drop(held);
    place.assert_undamaged();
}

#[test]
fn an_image_that_is_let_go_in_time_is_served() {
    let place = Place::new();
    let held = FileImage::open(&place.path("image"), &OpenOptions::default()).expect("nobody else has the image");
    let release = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(300));
        drop(held);
    });
    let mut daemon = Daemon::start_in(place.directory, &DaemonOptions::default());
    release.join().expect("the lock was let go");
    assert_serves(&daemon.socket(), 0);
    daemon.stop();
}

#[test]
fn a_live_daemons_socket_is_left_to_it() {
    let place = Place::new();
    let mut daemon = Daemon::start("live", 1 << 20, &DaemonOptions::default());
    let mut session = Session::open(&daemon.socket(), &SessionOptions::default());
    session.write(8, &pattern(1, 8, 4096));
    let ended = place.serve("image", daemon.socket().to_str().expect("UTF-8"), &[]);
    ended.assert_refused(1, &[daemon.socket().to_str().expect("UTF-8"), "another process already does"]);
    assert_eq!(session.read(8, 4096), pattern(1, 8, 4096), "its guest goes on");
    drop(session);
    assert_serves(&daemon.socket(), 0);
    daemon.stop();
    place.assert_undamaged();
}

#[test]
fn what_is_no_socket_is_left_alone() {
    let place = Place::new();
    fs::write(place.path("file"), "precious").expect("a file can be written");
    fs::create_dir(place.path("directory")).expect("a directory can be made");
    symlink("nowhere", place.path("link")).expect("a link can be made");
    for name in ["file", "directory", "link"] {
        let ended = place.serve("image", name, &[]);
        ended.assert_refused(1, &[place.path(name).to_str().expect("UTF-8"), "exists and is not a socket"]);
    }
    assert_eq!(fs::read_to_string(place.path("file")).expect("it is there"), "precious");
    assert!(place.path("directory").is_dir());
    assert_eq!(fs::read_link(place.path("link")).expect("it is there"), Path::new("nowhere"));
    let ended = place.serve("image", "no-such-directory/socket", &[]);
    ended.assert_refused(1, &["no-such-directory/socket", "No such file or directory"]);
    place.assert_undamaged();
}

#[test]
fn the_socket_of_a_killed_daemon_is_taken_over() {
    let mut daemon = Daemon::start("stale", 1 << 20, &DaemonOptions::default());
    daemon.kill();
    assert!(exists(&daemon.socket()), "a killed daemon leaves its socket behind");
    daemon.restart();
    assert!(daemon.log().contains("removed stale socket"), "{}", daemon.log());
    assert_serves(&daemon.socket(), 0);
    daemon.stop();
    assert!(!exists(&daemon.socket()), "an orderly end takes it away");
}

/// The absurd size is refused before any of it is touched.
#[test]
fn a_cache_too_small_or_too_large_is_refused() {
    let place = Place::new();
    for size in ["0", "4095K", "9T", "64MB"] {
        let ended = place.serve("image", "socket", &["--cache-size", size]);
        ended.assert_refused(2, &["--cache-size: takes a size from 4M to 8T", size]);
    }
    let started = Instant::now();
    let ended = place.serve("image", "socket", &["--cache-size", "8T"]);
    ended.assert_refused(1, &["no memory for a cache of 8796093022208 bytes", "available"]);
    assert!(started.elapsed() < Duration::from_secs(2), "asking for memory takes no time");
    assert!(!exists(&place.path("socket")));
    place.assert_undamaged();
}

#[test]
fn every_problem_of_a_configuration_is_told_and_nothing_is_started() {
    let place = Place::new();
    let wrong = "num_queues = 0\ncolour = \"red\"\nengine = \"iouring\"\n[device.cache]\nsize = \"1M\"\nmode = 7";
    let text = place.table("good", "image", "") + &place.table("bad", "missing", wrong);
    let ended = place.serve_config(&text, &[]);
    let file = place.path("genblk.toml").display().to_string();
    let told = |line: u32, key: &str| format!("{file}:{line}: device[1].{key}: ");
    let places = [told(10, "num_queues"), told(11, "colour"), told(12, "engine"), told(14, "cache.size")];
    ended.assert_refused(2, &places.each_ref().map(String::as_str));
    ended.assert_refused(2, &[&told(15, "cache.mode"), "5 problems in"]);
    assert!(!exists(&place.path("good.sock")), "not even the good device is started");
    place.assert_undamaged();
    place.serve_config("[[device]\n", &[]).assert_refused(2, &[&format!("{file}:1:")]);
    let missing = place.path("no-such.toml");
    let ended = run_to_end(Command::new(server_binary()).arg("--config").arg(&missing));
    ended.assert_refused(2, &[missing.to_str().expect("UTF-8"), "No such file or directory"]);
}

#[test]
fn a_check_starts_nothing() {
    let place = Place::new();
    let ended = place.serve_config(&place.table("good", "missing", ""), &["--check"]);
    assert_eq!((ended.status.code(), ended.stderr.as_str()), (Some(0), ""), "{ended:?}");
    assert!(ended.stdout.ends_with("genblk.toml: no problems, 1 device\n"), "{ended:?}");
    assert!(!exists(&place.path("good.sock")));
    place.serve_config(&place.table("bad", "image", "workers = 9"), &["--check"]).assert_refused(2, &["workers"]);
}

/// All or nothing: a device that can't be served takes back what was opened for the others.
#[test]
fn one_device_that_fails_keeps_the_others_from_starting() {
    let place = Place::new();
    let text = place.table("first", "image", "cache.size = \"4M\"") + &place.table("second", "missing", "");
    place.serve_config(&text, &[]).assert_refused(1, &["missing", "No such file or directory"]);
    assert!(!exists(&place.path("first.sock")), "its socket is gone again");
    let free = FileImage::open(&place.path("image"), &OpenOptions::default());
    assert!(free.is_ok(), "its image is free again");
    place.assert_undamaged();
}

#[test]
fn an_image_with_a_writer_has_no_readers() {
    let place = Place::new();
    let small = "cache.size = \"4M\"\n";
    let text =
        place.table("writer", "image", small) + &place.table("reader", "image", &format!("read_only = true\n{small}"));
    place.serve_config(&text, &[]).assert_refused(2, &["device[1].image", "device[0]", "read_only"]);
    assert!(!exists(&place.path("writer.sock")));
    place.assert_undamaged();
}

#[test]
fn capabilities_are_printed_whatever_else_is_asked() {
    let mut command = Command::new(server_binary());
    let ended = run_to_end(command.args(["--print-capabilities", "--blk-file", "/nonexistent", "--no-such-option"]));
    assert_eq!((ended.status.code(), ended.stderr.as_str()), (Some(0), ""), "{ended:?}");
    assert_eq!(ended.stdout, CAPABILITIES);
}

/// The descriptor that the daemon finds what it inherits under.
const INHERITED: i32 = 100;

/// A command that serves what `descriptor` is on the socket that it inherits.
fn with_inherited(descriptor: &impl AsRawFd, image: &Path) -> Command {
    let fd = descriptor.as_raw_fd();
    let mut command = Command::new(server_binary());
    command.args(["--cache-size", "4M", "--fd", &INHERITED.to_string()]).arg("--blk-file").arg(image);
    // SAFETY: between fork and exec only dup2, which is async-signal-safe.
    unsafe {
        command.pre_exec(move || match libc::dup2(fd, INHERITED) {
            -1 => Err(std::io::Error::last_os_error()),
            _ => Ok(()),
        })
    };
    command
}

#[test]
fn an_inherited_socket_is_served_and_left_where_it_is() {
    let place = Place::new();
    let (socket, image) = (place.path("inherited"), place.path("image"));
    let listener = UnixListener::bind(&socket).expect("a socket can be bound");
    let command = with_inherited(&listener, &image);
    let mut daemon = Daemon::launch(place.directory, command, vec![socket.clone()]);
    assert_serves(&socket, 0);
    assert_serves(&socket, 64);
    daemon.stop();
    assert!(exists(&socket), "whoever made the socket takes it away");
    // He may give it to another daemon, for front-ends that came meanwhile.
    let waits = UnixStream::connect(&socket).expect("the socket is still listened on");
    daemon.restart();
    drop(waits);
    assert_serves(&socket, 0);
    drop(listener);
    daemon.stop();
}

#[test]
fn an_inherited_descriptor_that_is_no_listening_socket_is_refused() {
    let place = Place::new();
    let image = place.path("image");
    let file = File::open(&image).expect("the image is there");
    let (connected, _other_end) = UnixStream::pair().expect("sockets can be made");
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").expect("a port is free");
    for mut command in [with_inherited(&file, &image), with_inherited(&connected, &image), with_inherited(&tcp, &image)]
    {
        run_to_end(&mut command).assert_refused(1, &["descriptor 100 is no listening socket"]);
    }
    let mut closed = Command::new(server_binary());
    closed.args(["--fd", "100", "--blk-file"]).arg(&image);
    run_to_end(&mut closed).assert_refused(1, &["descriptor 100 is no listening socket"]);
    place.assert_undamaged();
}

#[test]
fn a_log_level_that_is_none_is_refused() {
    let place = Place::new();
    for wish in ["verbose", "", "genblk::cache=debug"] {
        let mut command = Command::new(server_binary());
        command.arg("--socket-path").arg(place.path("socket")).arg("--blk-file").arg(place.path("image"));
        command.env("GENBLK_LOG", wish);
        run_to_end(&mut command).assert_refused(2, &["GENBLK_LOG: ", wish, "error, warn, info, debug and trace"]);
    }
    place.assert_undamaged();
}

/// What a daemon logs from its start to its end, with one front-end in between, at `level`.
fn log_at(level: Option<&str>) -> Vec<String> {
    let place = Place::new();
    let (socket, image) = (place.path("socket"), place.path("image"));
    let mut command = Command::new(server_binary());
    command.arg("--socket-path").arg(&socket).arg("--blk-file").arg(image).args(["--cache-size", "4M"]);
    match level {
        Some(level) => command.env("GENBLK_LOG", level),
        None => command.env_remove("GENBLK_LOG"),
    };
    let mut daemon = Daemon::launch(place.directory, command, vec![socket.clone()]);
    assert_serves(&socket, 0);
    if level != Some("warn") {
        poll_until("the front-end's end to be noticed", PATIENCE, || {
            daemon.log().contains("disconnected").then_some(())
        });
    }
    daemon.stop();
    daemon.log().lines().map(ToOwned::to_owned).collect()
}

/// ARCHITECTURE.md says which lines there are at `info`.
#[test]
fn the_log_has_one_line_for_each_event() {
    let quiet = log_at(Some("warn"));
    assert!(quiet.is_empty(), "all is well: {quiet:#?}");
    for level in [None, Some("info")] {
        let lines = log_at(level);
        let events = [
            "disk0: /",
            "disk0: front-end connected",
            "disk0: front-end disconnected",
            "signal 15: stopping",
            "disk0: reads: ",
            "disk0: read-ahead: ",
            "disk0: write-back: ",
            "disk0: stopped",
        ];
        assert_eq!(lines.len(), events.len(), "{lines:#?}");
        for (line, event) in lines.iter().zip(events) {
            let (stamp, message) = line.split_once(" INFO  ").expect("a time, the level and the message");
            assert!(stamp.ends_with('Z') && message.starts_with(event), "{event:?} is not {line:?}");
        }
    }
}
