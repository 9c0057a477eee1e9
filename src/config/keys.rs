//! The table of keys: each key's name, valid values, default, and the field it sets.
//!
//! Defaults, checks, messages, suggestions for misspelt keys and the test of configs/default.toml all read this table.

use super::problem::nearest;
use super::values::{Value, ValueKind, parse_mode};
use super::{
    Allocate, CacheMode, DeviceConfig, Discard, Engine, ImageFormat, NbdFlush, OnError, Policy, SIZE_BYTES_MAX,
    SIZE_BYTES_MIN, Sandbox, Survive,
};

/// A key of a `[[device]]` table; those of its `[device.cache]` begin with `cache.`, and so on.
#[derive(Debug)]
pub(crate) struct Key {
    /// Path from the device's table.
    pub name: &'static str,
    /// Its value if it is left out.
    pub default: DefaultValue,
    /// Its valid values, and the field they set.
    pub kind: ValueKind,
}

/// The value of a key that is left out.
#[derive(Debug)]
pub(crate) enum DefaultValue {
    /// None: the key is required.
    Required,
    /// This value.
    Is(Value<'static>),
    /// Derived from the name of the device.
    FromName(fn(&mut DeviceConfig)),
}

use DefaultValue::{FromName, Is, Required};
use Value::{Flag, Integer, Text};

/// Bytes of a virtio-blk serial (virtio 1.2, section 5.2.6: GET_ID).
const SERIAL_BYTES_MAX: usize = 20;

/// Every key of a device.
pub(crate) const KEYS: &[Key] = &[
    Key {
        name: "name",
        default: Required,
        kind: ValueKind::Text {
            wanted: "1 to 64 letters, digits, '.', '_' and '-'",
            fits: |text| {
                (1..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
            },
            set: |device, text| device.name = text.to_string(),
        },
    },
    Key { name: "socket", default: Required, kind: ValueKind::Socket { set: |device, socket| device.socket = socket } },
    Key {
        name: "socket_mode",
        default: Is(Text("0600")),
        kind: ValueKind::Text {
            wanted: "an octal mode such as \"0660\"",
            fits: |text| parse_mode(text).is_some(),
            set: |device, text| device.socket_mode = parse_mode(text).expect("it fits"),
        },
    },
    Key {
        name: "socket_group",
        default: Is(Text("")),
        kind: ValueKind::Text {
            wanted: "the name or number of a group, or \"\" for the daemon's own",
            fits: |text| text.len() <= 64 && text.bytes().all(|b| b.is_ascii_graphic() && b != b':'),
            set: |device, text| device.socket_group = text.to_string(),
        },
    },
    Key { name: "image", default: Required, kind: ValueKind::Image { set: |device, image| device.image = image } },
    Key {
        name: "format",
        default: Is(Text("auto")),
        kind: ValueKind::Choice { words: ImageFormat::WORDS, set: |device, i| device.format = ImageFormat::ALL[i] },
    },
    Key {
        name: "read_only",
        default: Is(Flag(false)),
        kind: ValueKind::Flag { set: |device, on| device.read_only = on },
    },
    Key { name: "isolate", default: Is(Flag(false)), kind: ValueKind::Flag { set: |device, on| device.isolate = on } },
    Key {
        name: "serial",
        default: FromName(|device| device.serial = device.name.chars().take(SERIAL_BYTES_MAX).collect()),
        kind: ValueKind::Text {
            wanted: "at most 20 printable ASCII characters",
            fits: |text| text.len() <= SERIAL_BYTES_MAX && text.bytes().all(|b| b.is_ascii_graphic() || b == b' '),
            set: |device, text| device.serial = text.to_string(),
        },
    },
    // QEMU requests one queue per vCPU and refuses a back-end with fewer, and an unused queue costs little. So the
    // default is the maximum: vhost-user messages have eight bits for a queue's index.
    Key {
        name: "num_queues",
        default: Is(Integer(256)),
        kind: ValueKind::Count { min: 1, max: 256, set: |device, n| device.num_queues = narrow(n) },
    },
    Key {
        name: "workers",
        default: Is(Integer(1)),
        kind: ValueKind::Count { min: 1, max: 8, set: |device, n| device.workers = narrow(n) },
    },
    // The front-end chooses the queue size; this bounds it, and so the requests in flight of one queue. 1024 is QEMU's
    // own maximum (VIRTQUEUE_MAX_SIZE), so no front-end is refused.
    Key {
        name: "queue_size",
        default: Is(Integer(1024)),
        kind: ValueKind::PowerOfTwo { min: 2, max: 1024, set: |device, n| device.queue_size = narrow(n) },
    },
    Key {
        name: "restart_burst",
        default: Is(Integer(5)),
        kind: ValueKind::Count { min: 0, max: 1000, set: |device, n| device.restart_burst = n },
    },
    Key {
        name: "poll_us",
        default: Is(Integer(50)),
        kind: ValueKind::Count { min: 0, max: 10_000, set: |device, n| device.poll_us = n },
    },
    Key {
        name: "engine",
        default: Is(Text("auto")),
        kind: ValueKind::Choice { words: Engine::WORDS, set: |device, i| device.engine = Engine::ALL[i] },
    },
    Key { name: "direct", default: Is(Flag(true)), kind: ValueKind::Flag { set: |device, on| device.direct = on } },
    Key {
        name: "discard",
        default: Is(Text("unmap")),
        kind: ValueKind::Choice { words: Discard::WORDS, set: |device, i| device.discard = Discard::ALL[i] },
    },
    Key {
        name: "sandbox",
        default: Is(Text("on")),
        kind: ValueKind::Choice { words: Sandbox::WORDS, set: |device, i| device.sandbox = Sandbox::ALL[i] },
    },
    Key {
        name: "user",
        default: Is(Text("")),
        kind: ValueKind::Text {
            wanted: "the name of a user, or \"\" for the daemon's own",
            fits: |text| text.len() <= 64 && text.bytes().all(|b| b.is_ascii_graphic() && b != b':'),
            set: |device, text| device.user = text.to_string(),
        },
    },
    Key {
        name: "group",
        default: Is(Text("")),
        kind: ValueKind::Text {
            wanted: "at most 64 printable ASCII characters without spaces, or \"\" for no group",
            fits: |text| text.len() <= 64 && text.bytes().all(|b| b.is_ascii_graphic()),
            set: |device, text| device.group = text.to_string(),
        },
    },
    Key {
        name: "nbd_flush",
        default: Is(Text("required")),
        kind: ValueKind::Choice { words: NbdFlush::WORDS, set: |device, i| device.nbd.flush = NbdFlush::ALL[i] },
    },
    Key {
        name: "nbd_give_up_ms",
        default: Is(Integer(0)),
        kind: ValueKind::Count { min: 0, max: 86_400_000, set: |device, n| device.nbd.give_up_ms = n },
    },
    Key {
        name: "nbd_quarantine_ms",
        default: Is(Integer(5000)),
        kind: ValueKind::Count { min: 0, max: 600_000, set: |device, n| device.nbd.quarantine_ms = n },
    },
    // Below 4M one large request could pin every page. A frame number is a u32, so 16T would be the limit.
    Key {
        name: "cache.size",
        default: Is(Text("256M")),
        kind: ValueKind::Size {
            min: SIZE_BYTES_MIN,
            max: SIZE_BYTES_MAX,
            set: |device, bytes| device.cache.size_bytes = bytes,
        },
    },
    // Room to grow takes addresses, but no memory. 0: four times the size.
    Key {
        name: "cache.size_max",
        default: Is(Integer(0)),
        kind: ValueKind::Size { min: 0, max: 8 << 40, set: |device, bytes| device.cache.size_max_bytes = bytes },
    },
    // 0: memory pressure does not change the size.
    Key {
        name: "cache.size_min",
        default: Is(Integer(0)),
        kind: ValueKind::Size { min: 0, max: 8 << 40, set: |device, bytes| device.cache.size_min_bytes = bytes },
    },
    Key {
        name: "cache.mode",
        default: Is(Text("writeback")),
        kind: ValueKind::Choice { words: CacheMode::WORDS, set: |device, i| device.cache.mode = CacheMode::ALL[i] },
    },
    Key {
        name: "cache.policy",
        default: Is(Text("s3fifo")),
        kind: ValueKind::Choice { words: Policy::WORDS, set: |device, i| device.cache.policy = Policy::ALL[i] },
    },
    Key {
        name: "cache.readahead_max",
        default: Is(Text("2M")),
        kind: ValueKind::Size { min: 0, max: 16 << 20, set: |device, bytes| device.cache.readahead_max_bytes = bytes },
    },
    Key {
        name: "cache.flush_target_ms",
        default: Is(Integer(250)),
        kind: ValueKind::Count { min: 10, max: 10_000, set: |device, n| device.cache.flush_target_ms = n },
    },
    Key {
        name: "cache.dirty_max_percent",
        default: Is(Integer(25)),
        kind: ValueKind::Count { min: 1, max: 50, set: |device, n| device.cache.dirty_max_percent = narrow(n) },
    },
    Key {
        name: "cache.dirty_age_max_ms",
        default: Is(Integer(5000)),
        kind: ValueKind::Count { min: 100, max: 600_000, set: |device, n| device.cache.dirty_age_max_ms = n },
    },
    Key {
        name: "cache.allocate",
        default: Is(Text("on-write")),
        kind: ValueKind::Choice { words: Allocate::WORDS, set: |device, i| device.cache.allocate = Allocate::ALL[i] },
    },
    Key {
        name: "cache.on_error",
        default: Is(Text("report")),
        kind: ValueKind::Choice { words: OnError::WORDS, set: |device, i| device.cache.on_error = OnError::ALL[i] },
    },
    Key {
        name: "cache.on_full",
        default: Is(Text("report")),
        kind: ValueKind::Choice { words: OnError::WORDS, set: |device, i| device.cache.on_full = OnError::ALL[i] },
    },
    Key {
        name: "cache.hold_max_ms",
        default: Is(Integer(20_000)),
        kind: ValueKind::Count { min: 100, max: 600_000, set: |device, n| device.cache.hold_max_ms = n },
    },
    Key {
        name: "cache.survive",
        default: Is(Text("auto")),
        kind: ValueKind::Choice { words: Survive::WORDS, set: |device, i| device.cache.survive = Survive::ALL[i] },
    },
    Key {
        name: "cache.warm_dir",
        default: Is(Text("")),
        kind: ValueKind::Text {
            wanted: "an absolute path, or \"\" for none",
            fits: |text| text.is_empty() || text.starts_with('/') && text.len() < 4000 && !text.contains('\0'),
            set: |device, text| device.cache.warm_dir = text.to_string(),
        },
    },
    Key {
        name: "cache.memory_dir",
        default: Is(Text("/dev/shm")),
        kind: ValueKind::MemoryDir { set: |device, memory_dir| device.cache.memory_dir = memory_dir },
    },
    Key {
        name: "limits.read_iops",
        default: Is(Integer(0)),
        kind: ValueKind::Count { min: 0, max: 100_000_000, set: |device, n| device.limits.read_iops = n },
    },
    Key {
        name: "limits.write_iops",
        default: Is(Integer(0)),
        kind: ValueKind::Count { min: 0, max: 100_000_000, set: |device, n| device.limits.write_iops = n },
    },
    Key {
        name: "limits.total_iops",
        default: Is(Integer(0)),
        kind: ValueKind::Count { min: 0, max: 100_000_000, set: |device, n| device.limits.total_iops = n },
    },
    Key {
        name: "limits.read_bytes_per_second",
        default: Is(Integer(0)),
        kind: ValueKind::Size {
            min: 0,
            max: 1 << 40,
            set: |device, bytes| device.limits.read_bytes_per_second = bytes,
        },
    },
    Key {
        name: "limits.write_bytes_per_second",
        default: Is(Integer(0)),
        kind: ValueKind::Size {
            min: 0,
            max: 1 << 40,
            set: |device, bytes| device.limits.write_bytes_per_second = bytes,
        },
    },
    Key {
        name: "limits.total_bytes_per_second",
        default: Is(Integer(0)),
        kind: ValueKind::Size {
            min: 0,
            max: 1 << 40,
            set: |device, bytes| device.limits.total_bytes_per_second = bytes,
        },
    },
    Key {
        name: "limits.burst_ms",
        default: Is(Integer(1000)),
        kind: ValueKind::Count { min: 10, max: 600_000, set: |device, n| device.limits.burst_ms = n },
    },
];

/// The tables inside that of a device.
pub(super) const TABLES: [&str; 2] = ["cache", "limits"];

/// A key as shown in its documentation.
#[cfg(test)]
pub(crate) struct DocumentedKey {
    pub name: &'static str,
    /// Its valid values, in words.
    pub values: String,
    /// Its value if it is left out; `None` if it is required.
    pub default: Option<String>,
}

/// Every key of a device, for its documentation.
#[cfg(test)]
pub(crate) fn documented_keys() -> impl Iterator<Item = DocumentedKey> {
    KEYS.iter().map(|key| DocumentedKey {
        name: key.name,
        values: key.kind.valid_values(),
        default: match key.default {
            Required => None,
            Is(value) => Some(value.shown()),
            FromName(_) => Some("derived from the name".to_owned()),
        },
    })
}

/// The key called `name`.
pub(crate) fn key(name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.name == name)
}

/// The key, or the table of keys, that `name` was probably meant to be; `name` is a path from the device's table.
pub(super) fn suggestion(name: &str) -> Option<&'static str> {
    let (table, leaf) = split(name);
    let paths = || KEYS.iter().map(|key| key.name).chain(TABLES);
    let called = |leaf: &str| paths().find(|path| split(path).1 == leaf);
    let joined = leaf.replacen(['_', '-'], ".", 1);
    // The right word in the wrong table, then the table's name joined to the word, then a typo: first in the table
    // where the word is, then anywhere.
    called(leaf)
        .or_else(|| paths().find(|path| *path == joined))
        .or_else(|| {
            nearest(leaf, paths().map(split).filter(|near| near.0 == table).map(|near| near.1)).and_then(called)
        })
        .or_else(|| nearest(leaf, paths().map(|path| split(path).1)).and_then(called))
}

/// The table and the word of a path.
fn split(path: &str) -> (&str, &str) {
    path.rsplit_once('.').unwrap_or(("", path))
}

/// Sets every key that has a default.
pub(super) fn set_defaults(device: &mut DeviceConfig) {
    for key in KEYS {
        match key.default {
            Required => {}
            Is(value) => key.kind.set(device, value).expect("a test sets every default"),
            FromName(derive) => derive(device),
        }
    }
}

/// `number` as the type of its field.
fn narrow<T: TryFrom<u32>>(number: u32) -> T {
    T::try_from(number).ok().expect("a test sets the ends of every range")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_default_and_both_ends_of_every_range_fit_their_fields() {
        let mut device = DeviceConfig::unset();
        set_defaults(&mut device);
        for key in KEYS {
            let ends = match key.kind {
                ValueKind::Count { min, max, .. } | ValueKind::PowerOfTwo { min, max, .. } => {
                    [i128::from(min), i128::from(max)]
                }
                ValueKind::Size { min, max, .. } => [i128::from(min), i128::from(max)],
                _ => continue,
            };
            for end in ends {
                assert_eq!(key.kind.set(&mut device, Integer(end)), Ok(()), "{} = {end}", key.name);
            }
            for outside in [ends[0] - 1, ends[1] + 1] {
                assert!(key.kind.set(&mut device, Integer(outside)).is_err(), "{} = {outside}", key.name);
            }
        }
    }

    #[test]
    fn every_choice_word_round_trips_through_its_value() {
        let mut device = DeviceConfig::unset();
        for (name, shown) in [
            ("engine", (|d| d.engine.to_string()) as fn(&DeviceConfig) -> String),
            ("format", |d| d.format.to_string()),
            ("discard", |d| d.discard.to_string()),
            ("nbd_flush", |d| d.nbd.flush.to_string()),
            ("cache.mode", |d| d.cache.mode.to_string()),
            ("cache.policy", |d| d.cache.policy.to_string()),
            ("cache.survive", |d| d.cache.survive.to_string()),
            ("cache.allocate", |d| d.cache.allocate.to_string()),
            ("cache.on_error", |d| d.cache.on_error.to_string()),
            ("cache.on_full", |d| d.cache.on_full.to_string()),
        ] {
            let Some(Key { kind: kind @ ValueKind::Choice { words, .. }, .. }) = key(name) else {
                panic!("{name} is no choice")
            };
            for word in *words {
                kind.set(&mut device, Text(word)).unwrap();
                assert_eq!(shown(&device), *word);
            }
        }
    }

    #[test]
    fn a_misspelt_or_misplaced_key_gets_a_suggestion() {
        let cases = [
            ("sokcet", Some("socket")),
            ("read-only", Some("read_only")),
            ("num_queue", Some("num_queues")),
            ("cache.sise", Some("cache.size")),
            ("cache_size", Some("cache.size")),
            ("readahead_max", Some("cache.readahead_max")),
            ("cache.serial", Some("serial")),
            ("cahce", Some("cache")),
            ("colour", None),
        ];
        for (written, meant) in cases {
            assert_eq!(suggestion(written), meant, "{written}");
        }
    }

    #[test]
    fn no_two_keys_share_a_name() {
        for (i, one) in KEYS.iter().enumerate() {
            assert!(KEYS[i + 1..].iter().all(|other| other.name != one.name), "{}", one.name);
        }
    }
}
