//! The operator's changes at run time: attached and detached devices, and keys that were set. The daemon keeps them in
//! a file, because guests outlive a daemon, and so must the disks that they use.

use super::device_builder::{DeviceBuilder, Origin, Setting, check_against, check_sizes};
use super::keys::{TABLES, key, suggestion};
use super::shown::{device_table, value_of};
use super::values::Value;
use super::{Config, DeviceConfig, Problem, differing_keys};

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RuntimeConfig {
    /// Devices that were attached, in their order.
    pub attached: Vec<DeviceConfig>,
    /// Names of the files' devices that were detached.
    pub detached: Vec<String>,
    /// Names of those devices of `attached` that the files no longer list but that were in use at the last reload.
    pub kept: Vec<String>,
    /// Keys that were set: the device, the key, and its value as TOML.
    pub set: Vec<[String; 3]>,
}

/// The keys that may change while a device is served. The mode "none" is an exception.
pub const LIVE_KEYS: &[&str] = &[
    "poll_us",
    "cache.size",
    "cache.size_min",
    "cache.mode",
    "cache.readahead_max",
    "cache.flush_target_ms",
    "cache.dirty_max_percent",
    "cache.dirty_age_max_ms",
    "cache.allocate",
    "cache.on_error",
    "cache.on_full",
    "cache.hold_max_ms",
    "limits.read_iops",
    "limits.write_iops",
    "limits.total_iops",
    "limits.read_bytes_per_second",
    "limits.write_bytes_per_second",
    "limits.total_bytes_per_second",
    "limits.burst_ms",
];

impl RuntimeConfig {
    /// Records that a device is kept although the files no longer list it. No effect for a device that the operator has
    /// attached.
    pub fn record_kept(&mut self, device: &DeviceConfig) {
        if self.attached.iter().all(|other| other.name != device.name) {
            self.attached.push(device.clone());
            self.kept.push(device.name.clone());
        }
    }

    /// Records that a device is no longer kept; returns whether it was.
    pub fn forget_kept(&mut self, name: &str) -> bool {
        let was_kept = self.is_kept(name);
        if was_kept {
            self.attached.retain(|other| other.name != name);
            self.kept.retain(|other| other != name);
        }
        was_kept
    }

    fn is_kept(&self, name: &str) -> bool {
        self.kept.iter().any(|other| other == name)
    }

    /// The changes without the devices that are kept: only what the files and the operator request.
    pub fn without_kept(&self) -> Self {
        let mut changes = self.clone();
        changes.attached.retain(|device| !self.is_kept(&device.name));
        changes.kept.clear();
        changes
    }

    /// Records that a device was attached.
    pub fn record_attached(&mut self, device: &DeviceConfig) {
        self.kept.retain(|other| *other != device.name);
        self.detached.retain(|other| *other != device.name);
        self.attached.retain(|other| other.name != device.name);
        self.attached.push(device.clone());
    }

    /// Records that keys of a device were set.
    pub fn record_set(&mut self, device: &DeviceConfig, keys: &[&str]) {
        for &name in keys {
            self.set.retain(|[other, key, _]| (other, key.as_str()) != (&device.name, name));
            let value = value_of(name, device).expect("a key that may change has a value");
            self.set.push([device.name.clone(), name.to_owned(), value]);
        }
    }

    /// How these changes override the devices of the files, by device: the keys in which one of `wanted`, the devices
    /// with the changes, differs, or "attached" or "detached" for a whole device.
    pub fn overridden(&self, files: &[DeviceConfig], wanted: &[DeviceConfig]) -> Vec<(String, Vec<&'static str>)> {
        let is_attached = |device: &DeviceConfig| self.attached.iter().any(|other| other.name == device.name);
        let is_set =
            |device: &DeviceConfig, key: &str| self.set.iter().any(|[name, set, _]| *name == device.name && set == key);
        let keys = |device: &DeviceConfig| match files.iter().find(|file| file.name == device.name) {
            Some(file) => {
                let keys = differing_keys(file, device).into_iter();
                keys.filter(|key| is_attached(device) || is_set(device, key)).collect()
            }
            None if is_attached(device) => vec!["attached"],
            None => Vec::new(),
        };
        let is_detached = |file: &&DeviceConfig| !wanted.iter().any(|device| device.name == file.name);
        let detached = files.iter().filter(is_detached).map(|file| (file.name.clone(), vec!["detached"]));
        let changed = wanted.iter().map(|device| (device.name.clone(), keys(device)));
        changed.filter(|(_, keys)| !keys.is_empty()).chain(detached).collect()
    }

    /// Records that a device was detached. `is_in_files`: the next daemon would attach it otherwise.
    pub fn record_detached(&mut self, name: &str, is_in_files: bool) {
        self.set.retain(|[other, ..]| other != name);
        self.kept.retain(|other| other != name);
        self.attached.retain(|other| other.name != name);
        if is_in_files && !self.detached.iter().any(|other| other == name) {
            self.detached.push(name.to_owned());
        }
    }

    /// As a document, for [`RuntimeConfig::read`]. `boot` names the boot of the host.
    pub fn write(&self, boot: &str) -> String {
        let head = "# Written by genblk: changes since its start. A clean stop removes this file.\n";
        let detached = toml::Value::from(self.detached.clone());
        let kept = toml::Value::from(self.kept.clone());
        let set = toml::Value::from(self.set.iter().map(|set| set.to_vec()).collect::<Vec<_>>());
        let tables: String = self.attached.iter().map(device_table).collect();
        format!("{head}boot = {boot:?}\ndetached = {detached}\nkept = {kept}\nset = {set}\n{tables}")
    }

    /// Reads a document of [`RuntimeConfig::write`]; `None` if it was written before the last boot of the host.
    ///
    /// # Errors
    /// The problem with the document.
    pub fn read(text: &str, boot: &str) -> Result<Option<Self>, String> {
        let mut document: toml::Table = text.parse().map_err(|e: toml::de::Error| e.to_string())?;
        let head = |document: &mut toml::Table, key: &str| document.remove(key).ok_or_else(|| format!("no {key}"));
        if head(&mut document, "boot")?.as_str() != Some(boot) {
            return Ok(None);
        }
        let detached = head(&mut document, "detached")?.try_into().map_err(|e: toml::de::Error| e.to_string())?;
        let set = match document.remove("set") {
            Some(set) => set.try_into().map_err(|e: toml::de::Error| e.to_string())?,
            None => Vec::new(),
        };
        let kept = match document.remove("kept") {
            Some(kept) => kept.try_into().map_err(|e: toml::de::Error| e.to_string())?,
            None => Vec::new(),
        };
        if document.is_empty() {
            return Ok(Some(Self { attached: Vec::new(), detached, kept: Vec::new(), set }));
        }
        let config = Config::from_toml(&document.to_string());
        let config = config.map_err(|problems| format!("{} ({} in all)", problems[0].message, problems.len()))?;
        Ok(Some(Self { attached: config.devices, detached, kept, set }))
    }

    /// The devices of a restarted daemon: those of the files, with these changes. Adds to `problems` why an attached
    /// device cannot be served together with the others.
    pub fn apply(&self, files: &[DeviceConfig], problems: &mut Vec<String>) -> Vec<DeviceConfig> {
        // For a kept device that is in the files again, the files count.
        let is_in_files = |device: &DeviceConfig| files.iter().any(|other| other.name == device.name);
        let mut attached = self.attached.clone();
        attached.retain(|device| !self.is_kept(&device.name) || !is_in_files(device));
        let is_attached = |device: &&DeviceConfig| attached.iter().any(|other| other.name == device.name);
        let mut devices: Vec<DeviceConfig> = files
            .iter()
            .filter(|device| !self.detached.contains(&device.name) && !is_attached(device))
            .cloned()
            .collect();
        let mut set = |device: &mut DeviceConfig| {
            let own = self.set.iter().filter(|[name, ..]| *name == device.name);
            for [name, key, value] in own.cloned().collect::<Vec<_>>() {
                if let Err(why) = set_value(device, &key, &value) {
                    problems.push(format!("{name}: {key}: {why}"));
                }
            }
        };
        devices.iter_mut().for_each(&mut set);
        attached.iter_mut().for_each(set);
        for device in &attached {
            match check_conflicts(device, &devices) {
                Ok(()) => devices.push(device.clone()),
                Err(found) => {
                    problems.extend(found.iter().map(|problem| format!("{}: {}", device.name, problem.message)));
                }
            }
        }
        devices
    }
}

/// Checks whether a device can be served together with others.
///
/// # Errors
/// Every problem.
pub fn check_conflicts(device: &DeviceConfig, others: &[DeviceConfig]) -> Result<(), Vec<Problem>> {
    let others: Vec<DeviceBuilder> = others.iter().map(DeviceBuilder::of).collect();
    let mut problems = Vec::new();
    check_against(&DeviceBuilder::of(device), &others, &mut problems);
    if problems.is_empty() { Ok(()) } else { Err(problems) }
}

/// Sets a key to a value that is written as TOML.
fn set_value(device: &mut DeviceConfig, name: &str, value: &str) -> Result<(), String> {
    let key = key(name).ok_or("unknown key")?;
    let parsed: toml::Table = format!("value = {value}").parse().map_err(|e: toml::de::Error| e.to_string())?;
    let value = match &parsed["value"] {
        toml::Value::String(text) => Value::Text(text),
        toml::Value::Integer(integer) => Value::Integer((*integer).into()),
        toml::Value::Boolean(flag) => Value::Flag(*flag),
        _ => Value::Other("another type"),
    };
    key.kind.set(device, value)
}

/// A device with these keys set to the values of another one.
pub fn with_keys_of(device: &DeviceConfig, other: &DeviceConfig, keys: &[&str]) -> DeviceConfig {
    let mut device = device.clone();
    for name in keys {
        let value = value_of(name, other).expect("a key that may change has a value");
        set_value(&mut device, name, &value).expect("it was valid in the other one");
    }
    device
}

/// A device with the keys of an object set.
///
/// # Errors
/// Every problem, with its key.
pub fn changed(device: &DeviceConfig, object: &serde_json::Value) -> Result<DeviceConfig, Vec<Problem>> {
    let (mut entries, mut problems, mut device) = (Vec::new(), Vec::new(), device.clone());
    match object.as_object() {
        Some(object) => flatten(object, "", &mut entries, &mut problems),
        None => problems.push(Origin { label: "config".to_owned(), line: None }.problem("takes an object")),
    }
    for Setting { key, value, origin } in entries {
        if let Err(why) = key.kind.set(&mut device, value) {
            problems.push(origin.problem(why));
        }
    }
    if let Some((key, why)) = check_sizes(&device) {
        problems.push(Origin { label: key.to_owned(), line: None }.problem(why));
    }
    if problems.is_empty() { Ok(device) } else { Err(problems) }
}

/// The device that an object with the keys of a `[[device]]` table describes.
///
/// # Errors
/// Every problem, with its key.
pub fn device_of(object: &serde_json::Value) -> Result<DeviceConfig, Vec<Problem>> {
    let (mut entries, mut problems) = (Vec::new(), Vec::new());
    let origin = Origin { label: "device".to_owned(), line: None };
    match object.as_object() {
        Some(object) => flatten(object, "", &mut entries, &mut problems),
        None => problems.push(origin.problem("takes an object")),
    }
    let builder = DeviceBuilder::new(&entries, origin, |key| key.name.to_owned(), &mut problems);
    super::finish(vec![builder], problems).map(|mut config| config.devices.remove(0))
}

/// Collects the keys of an object, which is the device's own (`prefix` empty) or one inside it.
fn flatten<'a>(
    object: &'a serde_json::Map<String, serde_json::Value>,
    prefix: &str,
    entries: &mut Vec<Setting<'a>>,
    problems: &mut Vec<Problem>,
) {
    for (name, value) in object {
        let path = format!("{prefix}{name}");
        let origin = Origin { label: path.escape_debug().to_string(), line: None };
        match (key(&path), value) {
            (Some(key), value) => entries.push(Setting { key, value: to_value(value), origin }),
            (None, serde_json::Value::Object(inner)) if TABLES.contains(&path.as_str()) => {
                flatten(inner, &format!("{path}."), entries, problems);
            }
            (None, _) => {
                let meant = suggestion(&path).map_or_else(String::new, |near| format!("; did you mean {near:?}?"));
                problems.push(origin.problem(format!("unknown key{meant}")));
            }
        }
    }
}

/// A JSON value, converted for the table of keys.
fn to_value(value: &serde_json::Value) -> Value<'_> {
    match value {
        serde_json::Value::String(text) => Value::Text(text),
        serde_json::Value::Bool(flag) => Value::Flag(*flag),
        serde_json::Value::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(integer), _) => Value::Integer(integer.into()),
            (None, Some(integer)) => Value::Integer(integer.into()),
            (None, None) => Value::Other("a fraction"),
        },
        serde_json::Value::Array(_) => Value::Other("an array"),
        serde_json::Value::Object(_) => Value::Other("an object"),
        serde_json::Value::Null => Value::Other("null"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::config::Socket;

    fn device(name: &str) -> DeviceConfig {
        DeviceConfig::new(name, Socket::Path(format!("/run/{name}.sock").into()), format!("/srv/{name}.img"))
    }

    #[test]
    fn runtime_changes_are_read_only_within_the_same_boot() {
        let mut runtime = RuntimeConfig::default();
        assert_eq!(RuntimeConfig::read(&runtime.write("b1"), "b1"), Ok(Some(runtime.clone())));
        runtime.record_attached(&device("db"));
        runtime.record_attached(&device("vm2"));
        runtime.record_detached("vm1", true);
        runtime.record_detached("vm2", true);
        runtime.record_detached("vm3", false);
        assert_eq!((runtime.attached.len(), runtime.detached.len()), (1, 2));
        runtime.record_attached(&device("vm1"));
        assert_eq!((runtime.attached.len(), &runtime.detached), (2, &vec!["vm2".to_owned()]), "it is there again");
        runtime.record_detached("vm1", true);
        let mut set = device("db");
        (set.poll_us, set.cache.hold_max_ms) = (7, 100);
        runtime.record_set(&set, &["poll_us", "cache.hold_max_ms"]);
        let text = runtime.write("b1");
        assert_eq!(RuntimeConfig::read(&text, "b1"), Ok(Some(runtime)));
        assert_eq!(RuntimeConfig::read(&text, "b2"), Ok(None));
        for wrong in ["", "boot = \"b1\"", "boot = \"b1\"\ndetached = 7", "boot = \"b1\"\ndetached = []\nx = 1"] {
            assert!(RuntimeConfig::read(wrong, "b1").is_err(), "{wrong}");
        }
    }

    #[test]
    fn runtime_changes_apply_on_top_of_the_configuration_files() {
        let (files, mut problems) = ([device("vm1"), device("vm2")], Vec::new());
        let mut runtime = RuntimeConfig::default();
        runtime.record_attached(&device("db"));
        runtime.record_detached("vm1", true);
        assert_eq!(runtime.apply(&files, &mut problems), [device("vm2"), device("db")]);
        let mut set = device("vm2");
        set.poll_us = 7;
        runtime.record_set(&set, &["poll_us"]);
        assert_eq!(runtime.apply(&files, &mut problems), [set, device("db")]);
        runtime.set.clear();
        runtime.record_kept(&device("db"));
        runtime.record_kept(&device("old"));
        assert_eq!(runtime.kept, ["old"], "the operator has attached the other one");
        assert_eq!(RuntimeConfig::read(&runtime.write("b1"), "b1"), Ok(Some(runtime.clone())));
        assert_eq!(runtime.apply(&files, &mut problems), [device("vm2"), device("db"), device("old")]);
        assert_eq!(runtime.without_kept().apply(&files, &mut problems), [device("vm2"), device("db")]);
        let again = [device("vm2"), DeviceConfig { poll_us: 9, ..device("old") }];
        assert_eq!(runtime.apply(&again, &mut problems), [again.as_slice(), &[device("db")]].concat());
        assert!(runtime.forget_kept("old") && !runtime.forget_kept("db"));
        let clash = DeviceConfig { name: "other".to_owned(), ..device("vm2") };
        runtime.record_attached(&clash);
        assert_eq!(runtime.apply(&files, &mut problems), [device("vm2"), device("db")]);
        assert!(problems[0].starts_with("other: ") && problems[0].contains("vm2"), "{problems:?}");
    }

    #[test]
    fn every_problem_of_a_device_object_is_reported() {
        let object = json!({"name": "db", "socket": "/run/db.sock", "image": "/srv/db.img", "cache": {"size": "8M"}});
        let mut expected = device("db");
        expected.cache.size_bytes = 8 << 20;
        assert_eq!(device_of(&object), Ok(expected));
        let wrong = device_of(&json!({"name": 7, "imgae": "/x", "cache": {"size": 1.5}})).unwrap_err();
        let keys: Vec<&str> = wrong.iter().map(|problem| problem.key.as_str()).collect();
        for key in ["name", "imgae", "cache.size", "socket", "image"] {
            assert!(keys.contains(&key), "{key} of {keys:?}");
        }
        assert!(device_of(&json!([])).is_err());
    }

    #[test]
    fn a_change_affects_only_the_given_keys() {
        let old = device("db");
        let new = changed(&old, &json!({"poll_us": 7, "cache.mode": "writethrough", "cache": {"hold_max_ms": 100}}));
        let new = new.expect("it is valid");
        assert_eq!(differing_keys(&old, &new), ["poll_us", "cache.mode", "cache.hold_max_ms"]);
        assert_eq!(differing_keys(&old, &with_keys_of(&old, &new, &["poll_us"])), ["poll_us"]);
        assert_eq!(changed(&old, &json!({"poll_us": -1, "x": 1})).unwrap_err().len(), 2);
        assert!(LIVE_KEYS.iter().all(|name| key(name).is_some()));
    }
}
