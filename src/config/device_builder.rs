//! Builds devices from checked values, and checks the rules between the keys of a device and between devices.

use std::collections::BTreeMap;

use super::keys::{DefaultValue, KEYS, Key};
use super::size::format_size;
use super::values::Value;
use super::{CacheConfig, Config, DeviceConfig, Problem, SIZE_BYTES_MIN, Socket};

/// The origin of a value, for messages.
#[derive(Clone, Debug)]
pub(crate) struct Origin {
    /// Full path of the key, or the option.
    pub label: String,
    /// Line of the file.
    pub line: Option<usize>,
}

impl Origin {
    /// A problem here.
    pub(crate) fn problem(&self, message: impl Into<String>) -> Problem {
        Problem { line: self.line, column: None, key: self.label.clone(), message: message.into() }
    }
}

/// A key that was given a value.
#[derive(Debug)]
pub(crate) struct Setting<'a> {
    pub key: &'static Key,
    pub value: Value<'a>,
    pub origin: Origin,
}

/// A device whose own values have been checked.
#[derive(Debug)]
pub(crate) struct DeviceBuilder {
    device: DeviceConfig,
    /// The start of the device's table.
    table_origin: Origin,
    /// The keys with a valid value. Rules between keys check only these, so that one mistake is reported once.
    valid_keys: BTreeMap<&'static str, Origin>,
}

impl DeviceBuilder {
    /// A device from `entries`, with defaults for the other keys. `label` names a key that has no entry.
    pub(crate) fn new(
        entries: &[Setting<'_>],
        table_origin: Origin,
        label: impl Fn(&Key) -> String,
        problems: &mut Vec<Problem>,
    ) -> Self {
        let mut builder = Self { device: DeviceConfig::unset(), table_origin, valid_keys: BTreeMap::new() };
        for key in KEYS {
            let given = entries.iter().find(|entry| entry.key.name == key.name);
            let absent = || Origin { label: label(key), line: builder.table_origin.line };
            let origin = given.map_or_else(absent, |entry| entry.origin.clone());
            let result = match (given, &key.default) {
                (Some(entry), _) => key.kind.set(&mut builder.device, entry.value),
                (None, DefaultValue::Is(value)) => key.kind.set(&mut builder.device, *value),
                (None, DefaultValue::Required) => Err("is missing".to_string()),
                // The name is the first key of the table, so it is already set.
                (None, DefaultValue::FromName(derive)) => {
                    derive(&mut builder.device);
                    Ok(())
                }
            };
            match result {
                Ok(()) => drop(builder.valid_keys.insert(key.name, origin)),
                Err(message) => problems.push(origin.problem(message)),
            }
        }
        builder.check_workers(problems);
        let sizes_good =
            ["cache.size", "cache.size_max", "cache.size_min"].iter().all(|key| builder.valid_keys.contains_key(key));
        if sizes_good && let Some((key, message)) = check_sizes(&builder.device) {
            problems.push(builder.valid_keys[key].problem(message));
        }
        builder
    }

    /// A device whose keys have all been checked before.
    pub(super) fn of(device: &DeviceConfig) -> Self {
        let table_origin = Origin { label: device.name.clone(), line: None };
        let key = |key: &'static Key| (key.name, Origin { label: key.name.to_owned(), line: None });
        Self { device: device.clone(), table_origin, valid_keys: KEYS.iter().map(key).collect() }
    }

    fn check_workers(&self, problems: &mut Vec<Problem>) {
        if let (Some(origin), Some(_)) = (self.valid_keys.get("workers"), self.valid_keys.get("num_queues"))
            && self.device.workers > self.device.num_queues
        {
            let (workers, queues) = (self.device.workers, self.device.num_queues);
            problems
                .push(origin.problem(format!("{workers} workers are more than the {queues} queues they would serve")));
        }
    }

    /// The first of `others` with a valid `name` and, by `same`, the same value as `self`.
    fn conflicting<'a>(
        &self,
        others: &'a [Self],
        name: &str,
        same: impl Fn(&DeviceConfig, &DeviceConfig) -> bool,
    ) -> Option<&'a Self> {
        self.valid_keys.get(name)?;
        others.iter().find(|other| other.valid_keys.contains_key(name) && same(&other.device, &self.device))
    }
}

/// The configuration, or every problem, sorted by line.
pub(crate) fn finish(builders: Vec<DeviceBuilder>, mut problems: Vec<Problem>) -> Result<Config, Vec<Problem>> {
    for (i, builder) in builders.iter().enumerate() {
        check_against(builder, &builders[..i], &mut problems);
    }
    if problems.is_empty() {
        return Ok(Config {
            devices: builders.into_iter().map(|builder| builder.device).collect(),
            control: None,
            source: None,
        });
    }
    problems.sort_by_key(|problem| (problem.line, problem.column));
    Err(problems)
}

/// Why a cache cannot have these sizes: the key that is wrong, and what is.
pub(super) fn check_sizes(device: &DeviceConfig) -> Option<(&'static str, String)> {
    let CacheConfig { size_bytes, size_max_bytes: max, size_min_bytes: min, .. } = device.cache;
    let size = format_size(size_bytes);
    if max != 0 && size_bytes > max {
        return Some(("cache.size_max", format!("{} is less than cache.size, which is {size}", format_size(max))));
    }
    if min > size_bytes {
        return Some(("cache.size_min", format!("{} is more than cache.size, which is {size}", format_size(min))));
    }
    let least = format_size(SIZE_BYTES_MIN);
    let is_too_small = (1..SIZE_BYTES_MIN).contains(&min);
    is_too_small.then(|| ("cache.size_min", format!("takes 0 or at least {least}, not {}", format_size(min))))
}

/// Checks the keys that must differ between a device and an earlier one, and those that must be equal.
pub(super) fn check_against(builder: &DeviceBuilder, earlier: &[DeviceBuilder], problems: &mut Vec<Problem>) {
    let mut report = |name: &str, message: String| problems.push(builder.valid_keys[name].problem(message));

    if let Some(conflicting) = builder.conflicting(earlier, "name", |a, b| a.name == b.name) {
        report("name", format!("{:?} is also the name of {}", builder.device.name, conflicting.table_origin.label));
    }
    let same_socket = |a: &DeviceConfig, b: &DeviceConfig| matches!(a.socket, Socket::Path(_)) && a.socket == b.socket;
    if let Some(conflicting) = builder.conflicting(earlier, "socket", same_socket) {
        report("socket", format!("{} is also the socket of {}", builder.device.socket, conflicting.table_origin.label));
    }

    let in_group = |a: &DeviceConfig, b: &DeviceConfig| !a.group.is_empty() && a.group == b.group;
    if let Some(conflicting) = builder.conflicting(earlier, "group", in_group)
        && ["user", "sandbox"]
            .iter()
            .all(|key| builder.valid_keys.contains_key(key) && conflicting.valid_keys.contains_key(key))
        && (builder.device.user != conflicting.device.user || builder.device.sandbox != conflicting.device.sandbox)
    {
        let advice = "user and sandbox must be the same in both";
        report("group", format!("{} is in it too, and they share a process; {advice}", conflicting.table_origin.label));
    }

    let Some(conflicting) = builder.conflicting(earlier, "image", |a, b| a.image == b.image) else {
        return;
    };
    let image = builder.device.image.display();
    if !builder.device.read_only || !conflicting.device.read_only {
        // A second writer would destroy the image, and a reader would see it change.
        let advice = "devices that share an image must all be read_only";
        report("image", format!("{image} is also the image of {}; {advice}", conflicting.table_origin.label));
        return;
    }
    if builder.device.isolate || conflicting.device.isolate {
        return;
    }
    // Devices on one image share one cache, and therefore one way to access the image.
    let (this, that) = (&builder.device, &conflicting.device);
    let are_settings_valid =
        |builder: &DeviceBuilder| KEYS.iter().all(|key| !is_shared(key) || builder.valid_keys.contains_key(key.name));
    let differ = this.cache != that.cache || this.engine != that.engine || this.direct != that.direct;
    if are_settings_valid(builder) && are_settings_valid(conflicting) && differ {
        let advice = "engine, direct and every cache key must be the same in both";
        report(
            "image",
            format!("{} serves {image} too, and they share its cache; {advice}", conflicting.table_origin.label),
        );
    }
}

/// Whether devices on one image share the key's value.
fn is_shared(key: &Key) -> bool {
    key.name.starts_with("cache.") || key.name == "engine" || key.name == "direct"
}
