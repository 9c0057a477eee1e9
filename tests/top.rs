//! `genblk top` on a terminal (tmux), as one picture, and where there is no terminal.

mod common;

use std::path::Path;
use std::process::{Command, Output};

use common::control::{genblk, start, stdout_of};
use common::daemon::server_binary;
use common::session::{Session, SessionOptions};
use common::wait::{TIMEOUT, poll_until};

#[test]
fn top_once_prints_one_screen_as_text() {
    let (daemon, control) = start("top-once", true);
    let mut session = Session::open(&daemon.socket_of(0), &SessionOptions::default());
    session.write(0, &[1; 4096]);
    let text = stdout_of(&genblk(&control, &["top", "--once", "0.1"]));
    assert_eq!(text.lines().count(), 24, "{text}");
    assert!(text.starts_with(concat!("genblk ", env!("CARGO_PKG_VERSION"), " up ")), "{text}");
    assert!(text.contains("\n> d0 ") && text.contains("\n  d1 ") && text.contains("failed"), "{text}");
    assert!(!text.contains('\u{1b}'), "no escape sequence is in a text: {text}");
}

#[test]
fn top_without_a_terminal_or_a_daemon_prints_advice() {
    let (_daemon, control) = start("top-pipe", false);
    let piped = genblk(&control, &["top"]);
    assert_eq!(piped.status.code(), Some(2));
    let said = String::from_utf8_lossy(&piped.stderr).into_owned();
    assert!(said.starts_with("genblk: genblk top needs a terminal") && said.lines().count() == 1, "{said}");
    assert_eq!(genblk(Path::new("/nonexistent"), &["top", "--once"]).status.code(), Some(3));
    assert_eq!(genblk(&control, &["top", "--once", "0"]).status.code(), Some(2));
}

/// A tmux server of its own, with one window.
struct Tmux(std::path::PathBuf);

impl Tmux {
    fn run(&self, arguments: &[&str]) -> Output {
        let mut tmux = Command::new("tmux");
        tmux.arg("-S").arg(&self.0).args(["-f", "/dev/null"]).args(arguments).output().expect("tmux runs")
    }

    fn screen(&self) -> String {
        String::from_utf8_lossy(&self.run(&["capture-pane", "-p", "-t", "top"]).stdout).into_owned()
    }

    #[track_caller]
    fn await_screen(&self, what: &str, shows: impl Fn(&str) -> bool) -> String {
        poll_until(what, TIMEOUT, || Some(self.screen()).filter(|screen| shows(screen)))
    }
}

impl Drop for Tmux {
    fn drop(&mut self) {
        self.run(&["kill-server"]);
    }
}

#[test]
fn top_restores_the_terminal_when_it_ends() {
    if !Command::new("tmux").arg("-V").output().is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: there is no tmux");
        return;
    }
    let (mut daemon, control) = start("top-tmux", false);
    let tmux = Tmux(daemon.directory().path().join("tmux"));
    let shell = ["new-session", "-d", "-s", "top", "-x", "80", "-y", "24", "sh"];
    assert!(tmux.run(&shell).status.success(), "tmux starts a session");
    let line = format!("{} top 0.2 --socket {}; echo status $?", server_binary(), control.display());
    tmux.run(&["send-keys", "-t", "top", &line, "Enter"]);
    tmux.await_screen("the list", |screen| screen.contains("\n> d0 ") && screen.contains("q quit"));
    tmux.run(&["send-keys", "-t", "top", "Down"]);
    tmux.await_screen("the other disk is selected", |screen| screen.contains("\n> d1 "));
    tmux.run(&["send-keys", "-t", "top", "h"]);
    tmux.await_screen("the help", |screen| screen.contains("99th percentile"));
    tmux.run(&["send-keys", "-t", "top", "h"]);
    tmux.run(&["resize-window", "-t", "top", "-x", "200", "-y", "60"]);
    tmux.await_screen("bars on a wide screen", |screen| screen.contains(" .........."));
    daemon.kill();
    tmux.await_screen("that the daemon is gone", |screen| screen.contains("no daemon listens"));
    tmux.run(&["send-keys", "-t", "top", "q"]);
    let screen = tmux.await_screen("the shell", |screen| screen.contains("status 0"));
    assert!(!screen.contains("> d1 "), "the terminal shows what it showed before: {screen}");
}
