//! Keys that change while a disk is served, by `genblk set` and by `genblk reload`.

#[path = "common/mod.rs"]
mod common;

use std::fs;
use std::path::Path;
use std::thread;

use serde_json::json;

use common::daemon::{Daemon, send};
use common::operator::{call, genblk, names, start, state, stdout_of, table};
use common::session::{Session, SessionOptions};
use common::wait::{TIMEOUT, poll_until};

/// The current value of a key of `d0`.
#[track_caller]
fn value(control: &Path, key: &str) -> String {
    let text = stdout_of(&genblk(control, &["config", "d0"]));
    let line = text.lines().find(|line| line.starts_with(&format!("{key} = "))).map(ToOwned::to_owned);
    line.unwrap_or_else(|| panic!("{key} in {text}")).split_once(" = ").expect("it has a value").1.to_owned()
}

/// Replaces the configuration file.
fn configure(daemon: &Daemon, control: &Path, tables: &str) {
    let text = format!("[control]\nsocket = {control:?}\n{tables}");
    fs::write(daemon.config(), text).expect("a configuration can be written");
}

#[test]
fn a_setting_takes_effect_at_once_and_survives_a_crash() {
    let (mut daemon, control) = start("reload-set");
    let mut session = Session::open(&daemon.socket_of(0), &SessionOptions::default());
    session.write(0, &[1; 4096]);
    let set = genblk(&control, &["set", "d0", "cache.mode=writethrough", "poll_us=7"]);
    assert_eq!(stdout_of(&set), "d0: set poll_us, cache.mode\n");
    assert_eq!(daemon.image_bytes(0, 4096), vec![1; 4096], "the switch makes durable what was written before");
    session.write(8, &[2; 4096]);
    assert_eq!(daemon.image_bytes(4096, 4096), vec![2; 4096], "a write is durable when it completes");
    assert_eq!(
        (value(&control, "cache.mode").as_str(), value(&control, "poll_us").as_str()),
        ("\"writethrough\"", "7")
    );
    send(daemon.disk_process("d0"), libc::SIGKILL);
    let mut session = session.reconnect(&daemon.socket_of(0));
    session.start_ring(0);
    session.write(16, &[3; 4096]);
    assert_eq!(daemon.image_bytes(8192, 4096), vec![3; 4096], "its next process has the mode, too");
    drop(session);
    daemon.kill();
    daemon.restart();
    poll_until("the control socket", TIMEOUT, || genblk(&control, &["list"]).status.success().then_some(()));
    assert_eq!(value(&control, "cache.mode"), "\"writethrough\"");
    let back = genblk(&control, &["set", "d0", "cache.mode=writeback"]);
    assert!(back.status.success(), "{back:?}");
    let mut session = Session::open(&daemon.socket_of(0), &SessionOptions::default());
    session.write(24, &[4; 4096]);
    assert_eq!(daemon.image_bytes(12288, 4096), vec![0; 4096], "a write stays in the cache again");
    session.flush();
    drop(session);
    daemon.stop();
}

#[test]
fn a_guest_that_chose_write_through_keeps_it_when_the_operator_changes_the_mode() {
    let (daemon, control) = start("reload-guest-mode");
    let mut session = Session::open(&daemon.socket_of(0), &SessionOptions::default());
    session.set_writeback(false);
    for (sector, mode) in [(8, "writethrough"), (16, "writeback")] {
        stdout_of(&genblk(&control, &["set", "d0", &format!("cache.mode={mode}")]));
        session.write(sector, &[1; 4096]);
        let found = daemon.image_bytes(sector * 512, 4096);
        assert_eq!(found, vec![1; 4096], "{mode}: a completed write is on the image");
    }
}

#[test]
fn concurrent_settings_of_two_operators_all_take_effect() {
    let (mut daemon, control) = start("reload-two");
    let set = |key: &str| {
        for number in 101..=140 {
            let config = json!({"device": "d0", "config": {key: number}});
            poll_until("the other change to end", TIMEOUT, || {
                let reply = call(&control, "Set", &config);
                let is_busy = reply["error"] == json!("io.genblk.Control.Busy");
                assert!(is_busy || reply["error"].is_null(), "{reply}");
                (!is_busy).then_some(())
            });
            assert_eq!(value(&control, key), number.to_string(), "{key} was answered");
        }
    };
    thread::scope(|scope| {
        scope.spawn(|| set("poll_us"));
        scope.spawn(|| set("cache.hold_max_ms"));
    });
    daemon.kill();
    daemon.restart();
    poll_until("the control socket", TIMEOUT, || genblk(&control, &["list"]).status.success().then_some(()));
    assert_eq!((value(&control, "poll_us").as_str(), value(&control, "cache.hold_max_ms").as_str()), ("140", "140"));
}

#[test]
fn a_refused_setting_changes_nothing() {
    let (_daemon, control) = start("reload-refused");
    let before = stdout_of(&genblk(&control, &["config"]));
    for (setting, words) in [
        ("cache.size_max=8M", "cache.size_max takes effect after detach and attach"),
        ("cache.mode=none", "detach and attach"),
        ("cache.mode=fast", "takes \"writeback\""),
        ("image=/x", "detach and attach"),
        ("speed=7", "unknown key"),
    ] {
        let refused = genblk(&control, &["set", "d0", "poll_us=7", setting]);
        assert!(!refused.status.success(), "{setting}");
        assert!(String::from_utf8_lossy(&refused.stderr).contains(words), "{setting}: {refused:?}");
        assert_eq!(stdout_of(&genblk(&control, &["config"])), before, "{setting}");
    }
    assert!(!control.with_file_name("runtime.toml").exists(), "nothing was recorded");
}

#[test]
fn the_commands_suggested_for_a_pending_key_apply_it() {
    let (mut daemon, control) = start("reload-advice");
    poll_until("the disk to be served", TIMEOUT, || (state(&control) == json!("serving")).then_some(()));
    let refused = genblk(&control, &["set", "d0", "workers=2"]);
    let advice = String::from_utf8_lossy(&refused.stderr).into_owned();
    for command in ["\"genblk detach d0\"", "\"genblk attach FILE d0\""] {
        assert!(advice.contains(command), "{advice}");
    }
    let config = daemon.config().display().to_string();
    stdout_of(&genblk(&control, &["detach", "d0"]));
    let directory = daemon.directory();
    let other = table(directory, "d1", "none.img", "");
    configure(&daemon, &control, &format!("{}{other}", table(directory, "d0", "image", "workers = 2\n")));
    assert_eq!(stdout_of(&genblk(&control, &["attach", &config, "d0"])), "d0: attached\n");
    assert_eq!(value(&control, "workers"), "2");
    // The file's disk is not detached for the next daemon.
    configure(&daemon, &control, &table(directory, "d0", "image", "workers = 2\n"));
    assert_eq!(stdout_of(&genblk(&control, &["reload"])), "nothing has changed\n");
    let runtime = fs::read_to_string(control.with_file_name("runtime.toml")).expect("it was recorded");
    assert!(runtime.contains("detached = []"), "{runtime}");
    daemon.stop();
}

#[test]
fn a_reload_reports_pending_keys_and_keys_set_by_command() {
    let (daemon, control) = start("reload-told");
    stdout_of(&genblk(&control, &["set", "d0", "poll_us=7"]));
    configure(&daemon, &control, &table(daemon.directory(), "d0", "image", "poll_us = 9\nworkers = 2\n"));
    let text = stdout_of(&genblk(&control, &["reload"]));
    assert!(text.contains("d0: pending until detach and attach: workers\n"), "{text}");
    assert!(text.contains("d0: set by a command, which overrides the file until a clean stop: poll_us\n"), "{text}");
    let pending = || call(&control, "List", &json!({}))["parameters"]["devices"][0]["pending"].clone();
    assert_eq!(pending(), json!(["workers"]));
    assert!(stdout_of(&genblk(&control, &["list"])).contains("d0: pending until detach and attach: workers"));
    let metrics = stdout_of(&genblk(&control, &["exporter", "--once"]));
    assert!(metrics.contains("genblk_device_pending_keys{device=\"d0\"} 1\n"), "{metrics}");
    configure(&daemon, &control, &table(daemon.directory(), "d0", "image", ""));
    stdout_of(&genblk(&control, &["reload"]));
    assert_eq!(pending(), json!([]), "the file has the current value");
}

#[test]
fn a_reload_reports_disks_attached_and_detached_by_command() {
    let (daemon, control) = start("reload-overridden");
    let directory = daemon.directory();
    for image in ["d1.img", "d2.img"] {
        fs::write(directory.path().join(image), vec![7; 1 << 20]).expect("an image");
    }
    let [d0, d1, d2] =
        [("d0", "image"), ("d1", "d1.img"), ("d2", "d2.img")].map(|(name, image)| table(directory, name, image, ""));
    configure(&daemon, &control, &(d0.clone() + &d1));
    let reload = || stdout_of(&genblk(&control, &["reload"]));
    assert_eq!(reload(), "d1: attached\n");
    let file = directory.path().join("d2.toml");
    fs::write(&file, &d2).expect("a file can be written");
    stdout_of(&genblk(&control, &["attach", &file.display().to_string()]));
    stdout_of(&genblk(&control, &["detach", "d1"]));
    let overrides = "by a command, which overrides the file until a clean stop";
    assert_eq!(reload(), format!("nothing has changed\nd2: attached {overrides}\nd1: detached {overrides}\n"));
    // It was never in the file, so nothing is left of it.
    stdout_of(&genblk(&control, &["detach", "d2"]));
    assert_eq!(reload(), format!("nothing has changed\nd1: detached {overrides}\n"));
    configure(&daemon, &control, &(d0 + &d1 + &d2));
    assert_eq!(reload(), format!("d2: attached\nd1: detached {overrides}\n"));
}

#[test]
fn a_reload_applies_every_difference_in_the_file() {
    let (mut daemon, control) = start("reload-all");
    let directory = daemon.directory();
    let old = table(directory, "d0", "image", "");
    fs::write(directory.path().join("d1.img"), vec![7; 1 << 20]).expect("an image");
    let new = table(directory, "d1", "d1.img", "");
    let changed = table(directory, "d0", "image", "poll_us = 9\nworkers = 2\n");
    configure(&daemon, &control, &format!("{changed}{new}"));
    let expected = "d1: would be attached\nd0: would be changed poll_us\nd0: would be pending until detach and attach: \
                    workers\n";
    assert_eq!(stdout_of(&genblk(&control, &["reload", "--dry-run"])), expected);
    assert_eq!(names(&control), ["d0"]);
    assert_eq!(stdout_of(&genblk(&control, &["reload"])), expected.replace("would be ", ""));
    assert_eq!((names(&control), value(&control, "poll_us")), (vec!["d0".to_owned(), "d1".to_owned()], "9".to_owned()));
    let mut session = Session::open(&directory.path().join("d1.sock"), &SessionOptions::default());
    assert_eq!(session.read(0, 512), vec![7; 512]);
    configure(&daemon, &control, &old);
    let pid = std::process::id().to_string();
    poll_until("the front-end is shown", TIMEOUT, || {
        stdout_of(&genblk(&control, &["list"])).contains(&format!("pid {pid}")).then_some(())
    });
    let kept = stdout_of(&genblk(&control, &["reload"]));
    assert!(kept.contains("d1: kept, although it is no longer in the file: in use by pid"), "{kept}");
    drop(session);
    poll_until("the end of the disk", TIMEOUT, || {
        genblk(&control, &["reload"]);
        (names(&control) == ["d0"]).then_some(())
    });
    assert_eq!(stdout_of(&genblk(&control, &["reload"])), "nothing has changed\n");
    daemon.stop();
}

#[test]
fn an_undetachable_disk_kept_by_a_reload_survives_a_restart() {
    let (mut daemon, control) = start("reload-kept");
    let directory = daemon.directory();
    let d1 = directory.path().join("d1.sock");
    fs::write(directory.path().join("d1.img"), vec![7; 1 << 20]).expect("an image");
    let old = table(directory, "d0", "image", "");
    configure(&daemon, &control, &(old.clone() + &table(directory, "d1", "d1.img", "")));
    stdout_of(&genblk(&control, &["reload"]));
    let mut session = Session::open(&d1, &SessionOptions::default());
    session.write(0, &[3; 4096]);
    configure(&daemon, &control, &old);
    let kept = |control: &Path| stdout_of(&genblk(control, &["reload"])).contains("d1: kept");
    let await_front_end = || {
        poll_until("the front-end is seen", TIMEOUT, || {
            stdout_of(&genblk(&control, &["list"])).contains(&format!("pid {}", std::process::id())).then_some(())
        });
    };
    await_front_end();
    assert!(kept(&control));
    daemon.kill();
    daemon.restart_for(&[daemon.socket_of(0), d1.clone()]);
    poll_until("the control socket", TIMEOUT, || genblk(&control, &["list"]).status.success().then_some(()));
    let mut session = session.reconnect(&d1);
    session.start_ring(0);
    assert_eq!(session.read(0, 4096), vec![3; 4096]);
    // Until a front-end was seen, a restarted disk waits for the one that it had.
    await_front_end();
    drop(session);
    poll_until("the end of the disk", TIMEOUT, || {
        genblk(&control, &["reload"]);
        (names(&control) == ["d0"]).then_some(())
    });
    daemon.kill();
    daemon.restart();
    poll_until("the control socket", TIMEOUT, || genblk(&control, &["list"]).status.success().then_some(()));
    assert_eq!(names(&control), ["d0"], "it is not kept any more");
}

#[test]
fn a_reload_does_not_detach_a_disk_whose_process_has_died() {
    let (daemon, control) = start("reload-died");
    let directory = daemon.directory();
    let d1 = directory.path().join("d1.sock");
    fs::write(directory.path().join("d1.img"), vec![7; 1 << 20]).expect("an image");
    let old = table(directory, "d0", "image", "");
    configure(&daemon, &control, &(old.clone() + &table(directory, "d1", "d1.img", "restart_burst = 0\n")));
    stdout_of(&genblk(&control, &["reload"]));
    let mut session = Session::open(&d1, &SessionOptions::default());
    session.write(0, &[3; 4096]);
    send(daemon.disk_process("d1"), libc::SIGKILL);
    daemon.await_log("restart it with \"genblk resume d1\"");
    configure(&daemon, &control, &old);
    let text = stdout_of(&genblk(&control, &["reload"]));
    assert!(text.starts_with("d1: kept, although it is no longer in the file: "), "{text}");
    stdout_of(&genblk(&control, &["resume", "d1"]));
    let mut session = session.reconnect(&d1);
    session.start_ring(0);
    assert_eq!(session.read(0, 4096), vec![3; 4096]);
}

#[test]
fn a_reload_of_an_invalid_file_changes_nothing() {
    let (daemon, control) = start("reload-wrong");
    let directory = daemon.directory();
    let good = table(directory, "d0", "image", "poll_us = 9\n");
    let pid = || call(&control, "List", &json!({}))["parameters"]["devices"][0]["pid"].clone();
    let before = poll_until("the disk to be served", TIMEOUT, || Some(pid()).filter(|pid| !pid.is_null()));
    for wrong in [
        "[[device]]\nname = \"x\"\n".to_owned(),
        table(directory, "x", "missing.img", ""),
        table(directory, "x", "image", ""),
        "[[device]".to_owned(),
    ] {
        configure(&daemon, &control, &format!("{good}{wrong}"));
        let refused = genblk(&control, &["reload"]);
        assert!(!refused.status.success() && !refused.stderr.is_empty(), "{wrong}: {refused:?}");
        poll_until("nothing is left of it", TIMEOUT, || (names(&control) == ["d0"]).then_some(()));
        assert_eq!(value(&control, "poll_us"), "50", "{wrong}");
    }
    fs::remove_file(daemon.config()).expect("it exists");
    assert!(!genblk(&control, &["reload"]).status.success());
    assert_eq!(pid(), before, "its process goes on");
}

#[test]
fn sighup_reloads_the_configuration_without_resuming_devices() {
    let (daemon, control) = start("reload-sighup");
    let directory = daemon.directory();
    fs::write(directory.path().join("d1.img"), vec![7; 1 << 20]).expect("an image");
    let changed = table(directory, "d0", "image", "poll_us = 9\nrestart_burst = 0\n");
    configure(&daemon, &control, &(changed + &table(directory, "d1", "d1.img", "restart_burst = 0\n")));
    daemon.signal(libc::SIGHUP);
    daemon.await_log("d1: attached by a reload");
    daemon.await_log("d0: changed by a reload: poll_us");
    daemon.await_log("d0: takes effect after detach and attach: restart_burst");
    assert_eq!(value(&control, "poll_us"), "9");
    send(daemon.disk_process("d1"), libc::SIGKILL);
    daemon.await_log("restart it with \"genblk resume d1\"");
    daemon.signal(libc::SIGHUP);
    let again = "d0: takes effect after detach and attach: restart_burst";
    poll_until("the second reload", TIMEOUT, || (daemon.log().matches(again).count() == 2).then_some(()));
    assert_eq!(call(&control, "List", &json!({"device": "d1"}))["parameters"]["devices"][0]["state"], json!("failed"));
    stdout_of(&genblk(&control, &["resume", "d1"]));
    let mut session = Session::open(&directory.path().join("d1.sock"), &SessionOptions::default());
    assert_eq!(session.read(0, 512), vec![7; 512]);
}

#[test]
fn sighup_with_an_invalid_configuration_logs_the_problems_and_changes_nothing() {
    let (daemon, control) = start("reload-sighup-wrong");
    let wrong = table(daemon.directory(), "d0", "image", "poll_us = 9\nworkers = 0\n");
    configure(&daemon, &control, &wrong);
    daemon.signal(libc::SIGHUP);
    daemon.await_log("reload failed: the configuration has errors; nothing has changed");
    assert!(daemon.log().contains("device[0].workers: takes an integer"), "{}", daemon.log());
    assert_eq!(value(&control, "poll_us"), "50");
}
