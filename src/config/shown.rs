//! Devices as TOML: each key with its current value. Reading the text again gives the same device.

use super::keys::KEYS;
use super::size::format_size;
use super::values::SYSTEMD;
use super::{DeviceConfig, MemoryDir, Socket};

/// The value of the key called `name`, as TOML; `None` for a value that a file cannot contain: an inherited descriptor.
pub(crate) fn value_of(name: &str, device: &DeviceConfig) -> Option<String> {
    let (cache, limits) = (&device.cache, &device.limits);
    let text = |text: &str| toml::Value::from(text).to_string();
    let word = |word: &dyn std::fmt::Display| text(&word.to_string());
    let path = |path: &std::path::Path| path.to_str().map(text);
    Some(match name {
        "name" => text(&device.name),
        "socket" => match &device.socket {
            Socket::Path(socket) => path(socket)?,
            Socket::Fd(_) => return None,
        },
        "socket_mode" => text(&format!("{:04o}", device.socket_mode)),
        "socket_group" => text(&device.socket_group),
        "image" => path(&device.image)?,
        "nbd_flush" => word(&device.nbd.flush),
        "nbd_give_up_ms" => device.nbd.give_up_ms.to_string(),
        "nbd_quarantine_ms" => device.nbd.quarantine_ms.to_string(),
        "format" => word(&device.format),
        "read_only" => device.read_only.to_string(),
        "isolate" => device.isolate.to_string(),
        "serial" => text(&device.serial),
        "num_queues" => device.num_queues.to_string(),
        "workers" => device.workers.to_string(),
        "queue_size" => device.queue_size.to_string(),
        "restart_burst" => device.restart_burst.to_string(),
        "poll_us" => device.poll_us.to_string(),
        "engine" => word(&device.engine),
        "direct" => device.direct.to_string(),
        "discard" => word(&device.discard),
        "sandbox" => word(&device.sandbox),
        "user" => text(&device.user),
        "group" => text(&device.group),
        "cache.size" => text(&format_size(cache.size_bytes)),
        "cache.size_max" => text(&format_size(cache.size_max_bytes)),
        "cache.size_min" => text(&format_size(cache.size_min_bytes)),
        "cache.mode" => word(&cache.mode),
        "cache.policy" => word(&cache.policy),
        "cache.readahead_max" => text(&format_size(cache.readahead_max_bytes)),
        "cache.flush_target_ms" => cache.flush_target_ms.to_string(),
        "cache.dirty_max_percent" => cache.dirty_max_percent.to_string(),
        "cache.dirty_age_max_ms" => cache.dirty_age_max_ms.to_string(),
        "cache.allocate" => word(&cache.allocate),
        "cache.on_error" => word(&cache.on_error),
        "cache.on_full" => word(&cache.on_full),
        "cache.hold_max_ms" => cache.hold_max_ms.to_string(),
        "cache.survive" => word(&cache.survive),
        "cache.warm_dir" => text(&cache.warm_dir),
        "cache.memory_dir" => match &cache.memory_dir {
            MemoryDir::Path(directory) => path(directory)?,
            MemoryDir::Systemd => text(SYSTEMD),
        },
        "limits.read_iops" => limits.read_iops.to_string(),
        "limits.write_iops" => limits.write_iops.to_string(),
        "limits.total_iops" => limits.total_iops.to_string(),
        "limits.read_bytes_per_second" => text(&format_size(limits.read_bytes_per_second)),
        "limits.write_bytes_per_second" => text(&format_size(limits.write_bytes_per_second)),
        "limits.total_bytes_per_second" => text(&format_size(limits.total_bytes_per_second)),
        "limits.burst_ms" => limits.burst_ms.to_string(),
        _ => return None,
    })
}

/// The keys in which two devices differ.
pub fn differing_keys(one: &DeviceConfig, other: &DeviceConfig) -> Vec<&'static str> {
    let differs = |name: &&str| value_of(name, one) != value_of(name, other);
    KEYS.iter().map(|key| key.name).filter(differs).collect()
}

/// The `[[device]]` table of a device, with every key.
pub fn device_table(device: &DeviceConfig) -> String {
    let line = |name: &'static str| value_of(name, device).map(|value| format!("{name} = {value}\n"));
    let lines: String = KEYS.iter().filter_map(|key| line(key.name)).collect();
    format!("[[device]]\n{lines}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{CacheMode, Config, Engine, OnError, Sandbox};

    #[test]
    fn a_written_device_reads_back_unchanged() {
        let mut device = DeviceConfig::new("db", Socket::Path("/run/a \"b\".sock".into()), "/srv/db.img");
        let default = Config::from_toml(&device_table(&device)).expect("it is valid");
        assert_eq!(default.devices, [device.clone()]);
        (device.socket_mode, device.socket_group) = (0o660, "kvm".to_owned());
        (device.read_only, device.workers, device.engine, device.sandbox) = (true, 2, Engine::Threads, Sandbox::Off);
        device.cache.size_bytes = (64 << 20) + 4096;
        (device.cache.mode, device.cache.on_full) = (CacheMode::Writethrough, OnError::Hold);
        device.cache.memory_dir = MemoryDir::Systemd;
        (device.limits.total_iops, device.limits.write_bytes_per_second) = (1000, 50 << 20);
        let read = Config::from_toml(&device_table(&device)).expect("it is valid");
        assert_eq!(read.devices, [device]);
    }

    #[test]
    fn differing_keys_lists_exactly_the_changed_keys() {
        let device = DeviceConfig::new("db", Socket::Path("/run/db.sock".into()), "/srv/db.img");
        assert!(KEYS.iter().all(|key| value_of(key.name, &device).is_some()));
        let mut other = device.clone();
        (other.poll_us, other.cache.hold_max_ms) = (7, 100);
        assert_eq!(differing_keys(&device, &other), ["poll_us", "cache.hold_max_ms"]);
        assert!(differing_keys(&device, &device).is_empty());
    }
}
