//! What command lines mean, and how wrong ones are refused.

use clap::CommandFactory;

use super::*;
use crate::config::{CacheMode, DeviceConfig, ImageFormat, MemoryDir, Sandbox, Socket};

fn run(line: &str) -> Result<Action> {
    action(["genblk"].into_iter().chain(line.split_whitespace()).map(OsString::from))
}

fn failure(line: &str) -> String {
    let error = run(line).unwrap_err();
    assert_eq!((error.kind(), error.exit_status()), (ErrorKind::Config, 2), "{line}");
    error.to_string()
}

#[test]
fn the_command_line_definition_passes_claps_own_checks() {
    Cli::command().debug_assert();
}

#[test]
fn a_socket_and_an_image_are_enough() {
    let expected = DeviceConfig::new("disk0", Socket::Path("/run/s".into()), "/a.img");
    assert_eq!(
        run("--socket-path /run/s --blk-file=/a.img").unwrap(),
        Action::ServeOne(Config { devices: vec![expected], control: None, source: None })
    );
}

#[test]
fn every_option_reaches_its_field() {
    let line = "--fd 3 --blk-file a --format raw --read-only --cache-size 4G --cache-mode none --num-queues 2 \
                --serial s1 --memory-dir /run/m --sandbox off";
    let mut expected = DeviceConfig::new("disk0", Socket::Fd(3), "a");
    expected.format = ImageFormat::Raw;
    expected.read_only = true;
    expected.cache.size_bytes = 4 << 30;
    expected.cache.mode = CacheMode::None;
    expected.num_queues = 2;
    expected.serial = "s1".to_string();
    expected.cache.memory_dir = MemoryDir::Path("/run/m".into());
    expected.sandbox = Sandbox::Off;
    assert_eq!(run(line).unwrap(), Action::ServeOne(Config { devices: vec![expected], control: None, source: None }));
}

#[test]
fn a_socket_has_a_mode_and_a_group() {
    let line = "--socket-path /run/s --blk-file a --socket-mode 0660 --socket-group kvm";
    let mut expected = DeviceConfig::new("disk0", Socket::Path("/run/s".into()), "a");
    (expected.socket_mode, expected.socket_group) = (0o660, "kvm".to_string());
    assert_eq!(run(line).unwrap(), Action::ServeOne(Config { devices: vec![expected], control: None, source: None }));
    assert!(failure("--fd 3 --blk-file a --socket-mode 0660").contains("cannot be used with"));
    let problem = failure("--socket-path s --blk-file a --socket-mode rw");
    assert!(problem.contains("--socket-mode: takes an octal mode such as \"0660\""), "{problem}");
}

#[test]
fn every_problem_names_its_option() {
    let text =
        failure("--blk-file a --cache-size 4095 --cache-mode writebak --num-queues -1 --serial 123456789012345678901");
    let expected = [
        "5 problems in the command line",
        "--socket-path: is missing",
        "--serial: takes at most 20 printable ASCII characters, not \"123456789012345678901\"",
        "--num-queues: takes an integer from 1 to 256, not -1",
        "--cache-size: takes a size from 4M to 8T (in steps of 4K), not \"4095\"",
        "--cache-mode: takes \"writeback\", \"writethrough\" or \"none\", not \"writebak\"; \
         did you mean \"writeback\"?",
    ];
    assert_eq!(text.lines().collect::<Vec<_>>(), expected);
}

#[test]
fn config_file_and_device_options_exclude_each_other() {
    for option in [
        "--socket-path s",
        "--fd 3",
        "--socket-mode 0660",
        "--socket-group kvm",
        "--blk-file a",
        "--format raw",
        "--read-only",
        "--cache-size 4M",
        "--cache-mode none",
        "--num-queues 1",
        "--serial s",
        "--memory-dir d",
        "--sandbox on",
    ] {
        let text = failure(&format!("--config c.toml {option}"));
        assert!(text.contains("cannot be used with") && text.contains("--config"), "{text}");
    }
    assert!(failure("--socket-path s --fd 3 --blk-file a").contains("cannot be used with"));
}

#[test]
fn usage_errors_are_configuration_errors() {
    assert!(failure("").contains("give --config FILE"));
    assert!(failure("--check").contains("give --config FILE"));
    assert!(failure("--blk-fil a").contains("--blk-file"));
    assert!(failure("--fd -1 --blk-file a").contains("-1 is not in 3.."));
    assert!(failure("--fd 2 --blk-file a").contains("2 is not in 3.."));
    assert!(failure("--config").contains("a value is required"));
    assert!(failure("stray").contains("stray"));
    assert!(failure("--config /nonexistent/genblk.toml").contains("cannot read the configuration /nonexistent"));
}

#[test]
fn print_capabilities_overrides_all_other_options() {
    for line in ["--print-capabilities", "--fd 1 --print-capabilities --config x", "--no-such --print-capabilities"] {
        assert_eq!(run(line).unwrap(), Action::Print(CAPABILITIES.to_string()), "{line}");
    }
}

#[test]
fn capabilities_match_their_schema() {
    let compact: String = CAPABILITIES.split_whitespace().collect();
    assert_eq!(compact, r#"{"type":"block","features":["read-only","blk-file"]}"#);
}

#[test]
fn help_and_version_exit_successfully() {
    let Ok(Action::Print(help)) = run("--help") else { panic!("--help failed") };
    for word in ["Limitations:", "configs/default.toml", "GENBLK_LOG", "--config", "--blk-file"] {
        assert!(help.contains(word), "{word}");
    }
    assert_eq!(run("--version").unwrap(), Action::Print(format!("genblk {}\n", env!("CARGO_PKG_VERSION"))));
}

#[test]
fn the_help_shows_the_actual_defaults() {
    let default = DeviceConfig::new(DEVICE_NAME, Socket::Fd(3), "a");
    let Ok(Action::Print(help)) = run("--help") else { panic!("--help failed") };
    let flat = help.split_whitespace().collect::<Vec<_>>().join(" ");
    let mib = default.cache.size_bytes >> 20;
    for shown in [mib.to_string() + "M", default.cache.mode.to_string(), default.num_queues.to_string(), default.serial]
    {
        assert!(flat.contains(&format!("[default: {shown}]")), "{shown}");
    }
}

#[test]
fn recover_takes_one_action_at_a_time() {
    let recover =
        |image: Option<&str>, force| Action::Recover { caches: vec!["f".into()], image: image.map(Into::into), force };
    assert_eq!(run("recover").unwrap(), Action::ListCaches("/dev/shm".into()));
    assert_eq!(run("recover --memory-dir /m").unwrap(), Action::ListCaches("/m".into()));
    assert_eq!(run("recover /").unwrap(), Action::ListCaches("/".into()));
    assert_eq!(run("recover f").unwrap(), recover(None, false));
    assert_eq!(run("recover f --image i --force").unwrap(), recover(Some("i"), true));
    assert_eq!(run("recover --discard f").unwrap(), Action::Discard { caches: vec!["f".into()], force: false });
    assert_eq!(run("recover --discard --force f").unwrap(), Action::Discard { caches: vec!["f".into()], force: true });
    assert_eq!(run("recover --prune --memory-dir /m").unwrap(), Action::Prune("/m".into()));
    for line in [
        "--discard",
        "f --memory-dir /m",
        "--force",
        "--image i",
        "--prune f",
        "f --discard --image i",
        "f g --image i",
    ] {
        failure(&format!("recover {line}"));
    }
    assert!(failure("recover --memory-dir systemd").contains("reachable only from its unit"));
}

#[test]
fn check_is_an_action_that_serves_no_device() {
    let Ok(Action::Check { source, config }) = run("--check --socket-path s --blk-file a") else { panic!("--check") };
    assert_eq!((source.as_str(), config.devices.len()), ("the command line", 1));
}
