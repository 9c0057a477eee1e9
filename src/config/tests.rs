//! Whole documents: what is accepted, and for what is wrong the exact list of problems.

use std::fs;
use std::path::{Path, PathBuf};

use toml::de::DeTable;

use super::keys::KEYS;
use super::{CacheMode, Config, DeviceConfig, Discard, Engine, ImageFormat, LimitsConfig, MemoryDir, Policy, Socket};
use crate::error::ErrorKind;

const MINIMAL: &str = "[[device]]\nname = \"a\"\nsocket = \"/run/a\"\nimage = \"/a.img\"\n";

/// The problems of `text` as they are printed.
fn problems(text: &str) -> Vec<String> {
    Config::from_toml(text).expect_err(text).iter().map(ToString::to_string).collect()
}

fn device(name: &str, rest: &str) -> String {
    format!("[[device]]\nname = \"{name}\"\nsocket = \"/run/{name}\"\nimage = \"/{name}.img\"\n{rest}\n")
}

#[test]
fn name_socket_and_image_suffice_for_a_device() {
    let config = Config::from_toml(MINIMAL).unwrap();
    assert_eq!(config.devices, [DeviceConfig::new("a", Socket::Path("/run/a".into()), "/a.img")]);
}

#[test]
fn a_device_has_the_documented_defaults() {
    let device = DeviceConfig::new("a-name-of-more-than-twenty-bytes", Socket::Fd(3), "/a.img");
    assert_eq!(device.serial, "a-name-of-more-than-");
    assert_eq!((device.socket_mode, device.socket_group.as_str()), (0o600, ""));
    assert_eq!((device.num_queues, device.workers, device.queue_size, device.poll_us), (256, 1, 1024, 50));
    assert_eq!((device.engine, device.direct, device.read_only), (Engine::Auto, true, false));
    assert_eq!(device.discard, Discard::Unmap);
    let cache = device.cache;
    assert_eq!((cache.size_bytes, cache.readahead_max_bytes), (256 << 20, 2 << 20));
    assert_eq!((cache.mode, cache.policy), (CacheMode::Writeback, Policy::S3Fifo));
    assert_eq!((cache.flush_target_ms, cache.dirty_max_percent, cache.dirty_age_max_ms), (250, 25, 5000));
    assert_eq!(cache.memory_dir, MemoryDir::Path("/dev/shm".into()));
    assert!(!device.limits.is_set() && device.limits.burst_ms == 1000);
}

#[test]
fn every_key_reaches_its_field() {
    let text = r#"
        [[device]]
        name = "n"
        socket = "s"
        socket_mode = "0660"
        socket_group = "kvm"
        image = "i"
        format = "raw"
        read_only = true
        serial = "S 1"
        num_queues = 4
        workers = 3
        queue_size = 128
        poll_us = 0
        engine = "threads"
        direct = false
        discard = "ignore"
        [device.cache]
        size = 8_388_608
        mode = "writethrough"
        policy = "lru"
        readahead_max = 0
        flush_target_ms = 10
        dirty_max_percent = 50
        dirty_age_max_ms = 600_000
        [device.limits]
        read_iops = 1
        write_iops = 2
        total_iops = 100_000_000
        read_bytes_per_second = "4K"
        write_bytes_per_second = "50M"
        total_bytes_per_second = "1T"
        burst_ms = 10
    "#;
    let mut expected = DeviceConfig::new("n", Socket::Path("s".into()), "i");
    (expected.socket_mode, expected.socket_group) = (0o660, "kvm".to_string());
    (expected.read_only, expected.direct, expected.serial) = (true, false, "S 1".to_string());
    expected.format = ImageFormat::Raw;
    expected.discard = Discard::Ignore;
    (expected.num_queues, expected.workers, expected.queue_size, expected.poll_us) = (4, 3, 128, 0);
    (expected.engine, expected.cache.mode, expected.cache.policy) =
        (Engine::Threads, CacheMode::Writethrough, Policy::Lru);
    (expected.cache.size_bytes, expected.cache.readahead_max_bytes) = (8 << 20, 0);
    (expected.cache.flush_target_ms, expected.cache.dirty_max_percent, expected.cache.dirty_age_max_ms) =
        (10, 50, 600_000);
    expected.limits = LimitsConfig {
        read_iops: 1,
        write_iops: 2,
        total_iops: 100_000_000,
        read_bytes_per_second: 4096,
        write_bytes_per_second: 50 << 20,
        total_bytes_per_second: 1 << 40,
        burst_ms: 10,
    };
    assert_eq!(Config::from_toml(text).unwrap().devices, [expected]);
}

#[test]
fn cache_sizes_must_be_in_ascending_order() {
    let sizes = |size: &str, min: &str, max: &str| {
        device("a", &format!("cache.size = \"{size}\"\ncache.size_min = \"{min}\"\ncache.size_max = \"{max}\""))
    };
    for (size, min, max) in [("8M", "0", "0"), ("8M", "4M", "16M"), ("8M", "8M", "8M")] {
        assert!(Config::from_toml(&sizes(size, min, max)).is_ok(), "{min} {size} {max}");
    }
    let wrong = [
        ("8M", "0", "4M", "7: device[0].cache.size_max: 4M is less than cache.size, which is 8M"),
        ("8M", "12M", "0", "6: device[0].cache.size_min: 12M is more than cache.size, which is 8M"),
        ("8M", "2M", "0", "6: device[0].cache.size_min: takes 0 or at least 4M, not 2M"),
    ];
    for (size, min, max, expected) in wrong {
        assert_eq!(problems(&sizes(size, min, max)), [expected]);
    }
}

#[test]
fn memory_dir_takes_an_absolute_path_or_systemd() {
    let memory_dir = |value: &str| device("a", &format!("cache.memory_dir = \"{value}\""));
    for (value, expected) in [("/dev/shm", MemoryDir::Path("/dev/shm".into())), ("systemd", MemoryDir::Systemd)] {
        assert_eq!(Config::from_toml(&memory_dir(value)).unwrap().devices[0].cache.memory_dir, expected);
    }
    for wrong in ["shm", "Systemd", "./systemd", ""] {
        let expected = format!("5: device[0].cache.memory_dir: takes an absolute path or \"systemd\", not {wrong:?}");
        assert_eq!(problems(&memory_dir(wrong)), [expected]);
    }
}

#[test]
fn dotted_inline_and_array_tables_are_equivalent() {
    let dotted = format!("{MINIMAL}cache.size = \"8M\"\n");
    let inline = format!("{MINIMAL}cache = {{ size = 0x80_0000 }}\n");
    let array = "device = [{ name = \"a\", socket = \"/run/a\", image = \"/a.img\", cache.size = \"8192K\" }]";
    let configs = [dotted.as_str(), &inline, array].map(|text| Config::from_toml(text).expect(text));
    assert_eq!(configs[0].devices[0].cache.size_bytes, 8 << 20);
    assert!(configs.iter().all(|config| *config == configs[0]));
}

#[test]
fn all_problems_are_reported_at_once_with_their_lines() {
    let text = r#"title = 1
num_queue = 2

[[device]]
socket = 7
image = ""
read_only = "yes"
serial = "123456789012345678901"
num_queues = 257
workers = 0
queue_size = 96
poll_us = -1
engine = "IO_uring"
direct = 1
colour = "red"

[[device]]
name = "b c"
socket = "/run/b"
imgae = "/b.img"

[device.cache]
size = "64MB"
mode = ["none"]
policy = "arc"
readahead_max = 1000
flush_target_ms = 2.5
dirty_max_percent = 51
dirty_age_max_ms = 99
sise = "4M"
name = "b"
"#;
    let expected = [
        "1: title: unknown key: the file has [[device]] tables, [control] and nothing else",
        "2: num_queue: unknown key; did you mean \"num_queues\", below [[device]]?",
        "4: device[0].name: is missing",
        "5: device[0].socket: takes a path of 1 to 107 bytes, not 7",
        "6: device[0].image: takes a path or the URI of an NBD export, not \"\"",
        "7: device[0].read_only: takes true or false, not \"yes\"",
        "8: device[0].serial: takes at most 20 printable ASCII characters, not \"123456789012345678901\"",
        "9: device[0].num_queues: takes an integer from 1 to 256, not 257",
        "10: device[0].workers: takes an integer from 1 to 8, not 0",
        "11: device[0].queue_size: takes a power of two from 2 to 1024, not 96",
        "12: device[0].poll_us: takes an integer from 0 to 10000, not -1",
        "13: device[0].engine: takes \"auto\", \"io_uring\" or \"threads\", not \"IO_uring\"; \
         did you mean \"io_uring\"?",
        "14: device[0].direct: takes true or false, not 1",
        "15: device[0].colour: unknown key",
        "17: device[1].image: is missing",
        "18: device[1].name: takes 1 to 64 letters, digits, '.', '_' and '-', not \"b c\"",
        "20: device[1].imgae: unknown key; did you mean \"image\"?",
        "23: device[1].cache.size: takes a size from 4M to 8T (in steps of 4K), not \"64MB\"; did you mean \"64M\"?",
        "24: device[1].cache.mode: takes \"writeback\", \"writethrough\" or \"none\", not an array",
        "25: device[1].cache.policy: takes \"s3fifo\" or \"lru\", not \"arc\"",
        "26: device[1].cache.readahead_max: takes a size from 0 to 16M (in steps of 4K), not 1000",
        "27: device[1].cache.flush_target_ms: takes an integer from 10 to 10000, not a fraction",
        "28: device[1].cache.dirty_max_percent: takes an integer from 1 to 50, not 51",
        "29: device[1].cache.dirty_age_max_ms: takes an integer from 100 to 600000, not 99",
        "30: device[1].cache.sise: unknown key; did you mean \"cache.size\"?",
        "31: device[1].cache.name: unknown key; did you mean \"name\"?",
    ];
    assert_eq!(problems(text), expected);
}

#[test]
fn a_configuration_without_device_or_control_table_is_refused() {
    let missing =
        "1: device: is missing: nothing to serve; write a [[device]] table, or [control] for \"genblk attach\"";
    assert_eq!(problems(""), [missing]);
    assert_eq!(problems("device = []"), [missing]);
    assert_eq!(problems("\n[[devices]]"), [missing, "2: devices: unknown key; did you mean [[device]]?"]);
}

#[test]
fn a_configuration_with_only_a_control_socket_is_valid() {
    let shipped = include_str!("../../packaging/deb/genblk.toml");
    for text in [shipped, "[control]\nsocket = \"/run/c.sock\"", "device = []\ncontrol.socket = \"/run/c.sock\""] {
        let config = Config::from_toml(text).expect("it is valid");
        assert!(config.devices.is_empty() && config.control.is_some(), "{text}");
    }
}

#[test]
fn a_key_of_the_wrong_type_is_named() {
    assert_eq!(problems("[device]\nname = 1"), ["1: device: must be an array of tables: write [[device]] above each"]);
    assert_eq!(problems("device = [3]"), ["1: device[0]: takes a table: write [[device]] above it"]);
    let cache = format!("{MINIMAL}cache = \"64M\"");
    assert_eq!(problems(&cache), ["5: device[0].cache: takes a table: write [device.cache] above its keys"]);
    let name = MINIMAL.replace("\"a\"", "{ first = 1 }");
    assert_eq!(problems(&name), ["2: device[0].name: takes 1 to 64 letters, digits, '.', '_' and '-', not a table"]);
}

#[test]
fn control_characters_in_a_key_are_escaped() {
    let text = format!("{MINIMAL}\"\\u001b[31m\\n\" = 1");
    assert_eq!(problems(&text), ["5: device[0].\\u{1b}[31m\\n: unknown key"]);
}

#[test]
fn more_workers_than_queues_are_refused() {
    let text = device("a", "num_queues = 2\nworkers = 3");
    assert_eq!(problems(&text), ["6: device[0].workers: 3 workers are more than the 2 queues they would serve"]);
    // A wrong value is reported as such, and not once more by the rule.
    let text = device("a", "num_queues = 0\nworkers = 3");
    assert_eq!(problems(&text), ["5: device[0].num_queues: takes an integer from 1 to 256, not 0"]);
}

#[test]
fn names_and_sockets_are_unique() {
    let text = device("a", "") + &device("b", "").replace("\"b\"", "\"a\"").replace("/run/b", "/run//./a");
    let expected = [
        "7: device[1].name: \"a\" is also the name of device[0]",
        "8: device[1].socket: /run//./a is also the socket of device[0]",
    ];
    assert_eq!(problems(&text), expected);
}

#[test]
fn devices_of_a_group_run_as_one_user_in_one_sandbox() {
    let two = |first: &str, second: &str| device("a", first) + &device("b", second);
    let advice = "and they share a process; user and sandbox must be the same in both";
    for differ in ["user = \"nobody\"", "sandbox = \"off\""] {
        let text = two("group = \"g\"", &format!("group = \"g\"\n{differ}"));
        let [problem] = &problems(&text)[..] else { panic!("{:?}", problems(&text)) };
        assert!(problem.ends_with(&format!("device[1].group: device[0] is in it too, {advice}")), "{problem}");
        assert!(Config::from_toml(&two("group = \"g\"", &format!("group = \"h\"\n{differ}"))).is_ok());
        assert!(Config::from_toml(&two("", differ)).is_ok());
    }
}

#[test]
fn devices_that_share_an_image_must_all_be_read_only() {
    let two = |first: &str, second: &str| device("a", first) + &device("b", second).replace("/b.img", "/a.img");
    let advice = "devices that share an image must all be read_only";
    for (first, second) in [("", ""), ("", "read_only = true"), ("read_only = true", "")] {
        let expected = format!("9: device[1].image: /a.img is also the image of device[0]; {advice}");
        assert_eq!(problems(&two(first, second)), [expected], "{first:?}, {second:?}");
    }
    assert_eq!(Config::from_toml(&two("read_only = true", "read_only = true")).unwrap().devices.len(), 2);
}

#[test]
fn devices_on_one_image_agree_on_its_cache() {
    let other = |rest: &str| device("b", rest).replace("/b.img", "/a.img");
    for setting in ["direct = false", "engine = \"threads\"", "cache.size = \"8M\"", "cache.policy = \"lru\""] {
        let text = device("a", "read_only = true") + &other(&format!("read_only = true\n{setting}"));
        let advice = "engine, direct and every cache key must be the same in both";
        let expected = format!("9: device[1].image: device[0] serves /a.img too, and they share its cache; {advice}");
        assert_eq!(problems(&text), [expected], "{setting}");
    }
    let isolated = device("a", "read_only = true") + &other("read_only = true\nisolate = true\ncache.size = \"8M\"");
    assert!(Config::from_toml(&isolated).is_ok(), "a cache of its own may differ");
    let free = device("a", "read_only = true") + &other("read_only = true\nnum_queues = 1\npoll_us = 0");
    assert!(Config::from_toml(&free).is_ok());
}

#[test]
fn a_syntax_error_has_a_line_and_a_column() {
    let one = problems("[[device]]\nname = \"a\"\nimage = /a.img\n");
    assert!(one[0].starts_with("3:9: "), "{one:?}");
    let twice = problems(&format!("{MINIMAL}name = \"b\"\n"));
    assert_eq!(twice.len(), 1, "{twice:?}");
    assert!(twice[0].starts_with("5:1: duplicate key"), "{twice:?}");
    let several = problems("a = \nb = [\n");
    assert!(several.len() >= 2 && several[0].starts_with("1:5: "), "{several:?}");
}

#[test]
fn a_number_of_any_length_is_reported_as_out_of_range() {
    let text = device("a", "poll_us = 999999999999999999999999999999999999999999");
    let expected = "5: device[0].poll_us: takes an integer from 0 to 10000, not an integer of more than 127 bits";
    assert_eq!(problems(&text), [expected]);
    assert_eq!(problems(&device("a", "poll_us = 18446744073709551616")).len(), 1);
}

#[test]
fn load_errors_start_with_the_file_name() {
    let path = std::env::temp_dir().join(format!("genblk-config-{}.toml", std::process::id()));
    fs::write(&path, "[[device]]\nname = \"a\"\n").unwrap();
    let error = Config::load(&path).unwrap_err();
    fs::remove_file(&path).unwrap();
    let file = path.display();
    let expected =
        format!("2 problems in {file}\n{file}:1: device[0].socket: is missing\n{file}:1: device[0].image: is missing");
    assert_eq!((error.to_string(), error.kind()), (expected, ErrorKind::Config));
}

fn configs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("configs")
}

#[test]
fn the_default_file_shows_every_key_with_its_default() {
    let text = fs::read_to_string(configs().join("default.toml")).unwrap();
    let devices = Config::from_toml(&text).unwrap().devices;
    let [device] = devices.as_slice() else { panic!("default.toml shows one device") };
    assert_eq!(*device, DeviceConfig::new(device.name.clone(), device.socket.clone(), device.image.clone()));

    let document = DeTable::parse(&text).unwrap();
    let table = &document.get_ref()["device"].get_ref()[0];
    for key in KEYS {
        let value = key.name.split('.').try_fold(table, |table, part| table.get_ref().get(part));
        assert!(value.is_some(), "default.toml does not show {}", key.name);
    }
}

#[test]
fn every_shipped_configuration_file_is_accepted() {
    let mut count = 0;
    for entry in fs::read_dir(configs()).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "toml") {
            Config::load(&path).unwrap_or_else(|error| panic!("{error}"));
            count += 1;
        }
    }
    assert!(count >= 4, "only {count} files in configs");
}

#[test]
fn the_control_table_sets_a_socket_and_a_group() {
    let device = "[[device]]\nname = \"a\"\nsocket = \"/s\"\nimage = \"/i\"\n";
    let parse = |control: &str| Config::from_toml(&format!("{control}\n{device}"));
    assert_eq!(parse("").unwrap().control, None);
    let both = parse("[control]\nsocket = \"/run/c.sock\"\ngroup = \"kvm\"").unwrap().control.unwrap();
    assert_eq!((both.socket.to_str(), both.group.as_str()), (Some("/run/c.sock"), "kvm"));
    for (wrong, told) in [
        ("[control]", "has no socket"),
        ("[control]\nsocket = \"c.sock\"", "takes an absolute path"),
        ("[control]\nsocket = 7", "takes an absolute path"),
        ("[control]\nsocket = \"/c\"\ngroup = \"\"", "takes the name or the number of a group"),
        ("[control]\nsocket = \"/c\"\nport = 80", "unknown key; [control] has socket and group"),
        ("control = 1", "takes a table"),
    ] {
        let problems = parse(wrong).unwrap_err();
        let [problem] = problems.as_slice() else { panic!("{wrong}: {problems:?}") };
        assert!(problem.to_string().contains(told), "{wrong}: {problem}");
    }
}
