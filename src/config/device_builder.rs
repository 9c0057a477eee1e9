//! From checked values to devices, and the rules that no key can keep alone: between the keys of a device, and between
//! devices.

use std::collections::BTreeMap;

use super::keys::{DefaultValue, KEYS, Key, Value};
use super::{Config, DeviceConfig, Problem, Socket};

/// Where something was said, for messages.
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

/// A device whose own values have been looked at.
#[derive(Debug)]
pub(crate) struct DeviceBuilder {
    device: DeviceConfig,
    /// Where the device as a whole stands.
    whole: Origin,
    /// The keys that hold a good value: rules between keys look at no others, or one mistake would be reported twice.
    good: BTreeMap<&'static str, Origin>,
}

impl DeviceBuilder {
    /// A device of `entries` and, for the keys left out, defaults. `label` names a key that nobody gave.
    pub(crate) fn new(
        entries: &[Setting<'_>],
        whole: Origin,
        label: impl Fn(&Key) -> String,
        problems: &mut Vec<Problem>,
    ) -> Self {
        let mut builder = Self { device: DeviceConfig::unset(), whole, good: BTreeMap::new() };
        for key in KEYS {
            let given = entries.iter().find(|entry| entry.key.name == key.name);
            let absent = || Origin { label: label(key), line: builder.whole.line };
            let origin = given.map_or_else(absent, |entry| entry.origin.clone());
            let result = match (given, &key.default) {
                (Some(entry), _) => key.kind.set(&mut builder.device, entry.value),
                (None, DefaultValue::Is(value)) => key.kind.set(&mut builder.device, *value),
                (None, DefaultValue::Required) => Err("is missing".to_string()),
                // The name comes first in the table, so it is there by now.
                (None, DefaultValue::FromName(derive)) => {
                    derive(&mut builder.device);
                    Ok(())
                }
            };
            match result {
                Ok(()) => drop(builder.good.insert(key.name, origin)),
                Err(message) => problems.push(origin.problem(message)),
            }
        }
        builder.check_workers(problems);
        builder
    }

    fn check_workers(&self, problems: &mut Vec<Problem>) {
        if let (Some(origin), Some(_)) = (self.good.get("workers"), self.good.get("num_queues"))
            && self.device.workers > self.device.num_queues
        {
            let (workers, queues) = (self.device.workers, self.device.num_queues);
            problems.push(origin.problem(format!("{workers} workers have only {queues} queues to serve")));
        }
    }

    /// The first of `others` that holds a good `name` and, by `same`, the same value as `self` does.
    fn twin<'a>(
        &self,
        others: &'a [Self],
        name: &str,
        same: impl Fn(&DeviceConfig, &DeviceConfig) -> bool,
    ) -> Option<&'a Self> {
        self.good.get(name)?;
        others.iter().find(|other| other.good.contains_key(name) && same(&other.device, &self.device))
    }
}

/// The configuration, or every problem in the order of the lines.
pub(crate) fn finish(builders: Vec<DeviceBuilder>, mut problems: Vec<Problem>) -> Result<Config, Vec<Problem>> {
    for (i, builder) in builders.iter().enumerate() {
        check_against(builder, &builders[..i], &mut problems);
    }
    if problems.is_empty() {
        return Ok(Config { devices: builders.into_iter().map(|builder| builder.device).collect() });
    }
    problems.sort_by_key(|problem| (problem.line, problem.column));
    Err(problems)
}

/// What a device must not have in common with an earlier one, and what it must.
fn check_against(builder: &DeviceBuilder, earlier: &[DeviceBuilder], problems: &mut Vec<Problem>) {
    let mut report = |name: &str, message: String| problems.push(builder.good[name].problem(message));

    if let Some(twin) = builder.twin(earlier, "name", |a, b| a.name == b.name) {
        report("name", format!("{:?} is the name of {} too", builder.device.name, twin.whole.label));
    }
    let same_socket = |a: &DeviceConfig, b: &DeviceConfig| matches!(a.socket, Socket::Path(_)) && a.socket == b.socket;
    if let Some(twin) = builder.twin(earlier, "socket", same_socket) {
        report("socket", format!("{} is the socket of {} too", builder.device.socket, twin.whole.label));
    }

    let Some(twin) = builder.twin(earlier, "image", |a, b| a.image == b.image) else {
        return;
    };
    let image = builder.device.image.display();
    if !builder.device.read_only || !twin.device.read_only {
        // A second writer would destroy the image, and a reader would see it change under its feet.
        let advice = "a device that writes an image has it alone: make both of them read_only";
        report("image", format!("{image} is the image of {} too, and {advice}", twin.whole.label));
        return;
    }
    // One copy of each page serves every device on an image, so there is one cache and one way to the image.
    let (this, that) = (&builder.device, &twin.device);
    let settings_good =
        |builder: &DeviceBuilder| KEYS.iter().all(|key| !is_shared(key) || builder.good.contains_key(key.name));
    let differ = this.cache != that.cache || this.engine != that.engine || this.direct != that.direct;
    if settings_good(builder) && settings_good(twin) && differ {
        let advice = "engine, direct and every key of the cache must be the same in both";
        report("image", format!("{} serves {image} too, from one cache: {advice}", twin.whole.label));
    }
}

/// Whether devices on one image share the key's value.
fn is_shared(key: &Key) -> bool {
    key.name.starts_with("cache.") || key.name == "engine" || key.name == "direct"
}
