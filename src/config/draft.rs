//! From checked values to devices, and the rules that no key can keep alone: between the keys of a device, and between
//! devices.

use std::collections::BTreeMap;

use super::keys::{Fallback, KEYS, Key, Value};
use super::{Config, DeviceConfig, Problem, Socket};

/// Where something was said, for messages.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    /// Full path of the key, or the option.
    pub label: String,
    /// Line of the file.
    pub line: Option<usize>,
}

impl Place {
    /// A problem here.
    pub(crate) fn problem(&self, message: impl Into<String>) -> Problem {
        Problem { line: self.line, column: None, key: self.label.clone(), message: message.into() }
    }
}

/// A key that was given a value.
#[derive(Debug)]
pub(crate) struct Entry<'a> {
    pub key: &'static Key,
    pub value: Value<'a>,
    pub place: Place,
}

/// A device whose own values have been looked at.
#[derive(Debug)]
pub(crate) struct Draft {
    device: DeviceConfig,
    /// Where the device as a whole stands.
    whole: Place,
    /// The keys that hold a good value: rules between keys look at no others, or one mistake would be reported twice.
    good: BTreeMap<&'static str, Place>,
}

impl Draft {
    /// A device of `entries` and, for the keys left out, defaults. `label` names a key that nobody gave.
    pub(crate) fn new(
        entries: &[Entry<'_>],
        whole: Place,
        label: impl Fn(&Key) -> String,
        problems: &mut Vec<Problem>,
    ) -> Self {
        let mut draft = Self { device: DeviceConfig::unset(), whole, good: BTreeMap::new() };
        for key in KEYS {
            let given = entries.iter().find(|entry| entry.key.name == key.name);
            let absent = || Place { label: label(key), line: draft.whole.line };
            let place = given.map_or_else(absent, |entry| entry.place.clone());
            let result = match (given, &key.fallback) {
                (Some(entry), _) => key.kind.set(&mut draft.device, entry.value),
                (None, Fallback::Is(value)) => key.kind.set(&mut draft.device, *value),
                (None, Fallback::Required) => Err("is missing".to_string()),
                // The name comes first in the table, so it is there by now.
                (None, Fallback::FromName(derive)) => {
                    derive(&mut draft.device);
                    Ok(())
                }
            };
            match result {
                Ok(()) => drop(draft.good.insert(key.name, place)),
                Err(message) => problems.push(place.problem(message)),
            }
        }
        draft.check_workers(problems);
        draft
    }

    fn check_workers(&self, problems: &mut Vec<Problem>) {
        if let (Some(place), Some(_)) = (self.good.get("workers"), self.good.get("num_queues"))
            && self.device.workers > self.device.num_queues
        {
            let (workers, queues) = (self.device.workers, self.device.num_queues);
            problems.push(place.problem(format!("{workers} workers have only {queues} queues to serve")));
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
pub(crate) fn finish(drafts: Vec<Draft>, mut problems: Vec<Problem>) -> Result<Config, Vec<Problem>> {
    for (i, draft) in drafts.iter().enumerate() {
        check_against(draft, &drafts[..i], &mut problems);
    }
    if problems.is_empty() {
        return Ok(Config { devices: drafts.into_iter().map(|draft| draft.device).collect() });
    }
    problems.sort_by_key(|problem| (problem.line, problem.column));
    Err(problems)
}

/// What a device must not have in common with an earlier one, and what it must.
fn check_against(draft: &Draft, earlier: &[Draft], problems: &mut Vec<Problem>) {
    let mut report = |name: &str, message: String| problems.push(draft.good[name].problem(message));

    if let Some(twin) = draft.twin(earlier, "name", |a, b| a.name == b.name) {
        report("name", format!("{:?} is the name of {} too", draft.device.name, twin.whole.label));
    }
    let same_socket = |a: &DeviceConfig, b: &DeviceConfig| matches!(a.socket, Socket::Path(_)) && a.socket == b.socket;
    if let Some(twin) = draft.twin(earlier, "socket", same_socket) {
        report("socket", format!("{} is the socket of {} too", draft.device.socket, twin.whole.label));
    }

    let Some(twin) = draft.twin(earlier, "image", |a, b| a.image == b.image) else {
        return;
    };
    let image = draft.device.image.display();
    if !draft.device.read_only || !twin.device.read_only {
        // A second writer would destroy the image, and a reader would see it change under its feet.
        let advice = "a device that writes an image has it alone: make both of them read_only";
        report("image", format!("{image} is the image of {} too, and {advice}", twin.whole.label));
        return;
    }
    // One copy of each page serves every device on an image, so there is one cache and one way to the image.
    let (this, that) = (&draft.device, &twin.device);
    let settings_good = |draft: &Draft| KEYS.iter().all(|key| !is_shared(key) || draft.good.contains_key(key.name));
    let differ = this.cache != that.cache || this.engine != that.engine || this.direct != that.direct;
    if settings_good(draft) && settings_good(twin) && differ {
        let advice = "engine, direct and every key of the cache must be the same in both";
        report("image", format!("{} serves {image} too, from one cache: {advice}", twin.whole.label));
    }
}

/// Whether devices on one image share the key's value.
fn is_shared(key: &Key) -> bool {
    key.name.starts_with("cache.") || key.name == "engine" || key.name == "direct"
}
