//! Walks a TOML document: visits every key once, with its line, and does not stop at a problem.
//!
//! serde's derive would be shorter, but stops at the first unknown key or wrong type, so the operator would need one
//! attempt per mistake.

use std::ops::Range;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::ControlConfig;
use super::device_builder::{DeviceBuilder, Origin, Setting};
use super::keys::{TABLES, key, suggestion};
use super::problem::Problem;
use super::values::Value;

/// Returns the devices and the control socket of `text`; adds problems to `problems`.
pub(super) fn parse(text: &str, problems: &mut Vec<Problem>) -> (Vec<DeviceBuilder>, Option<ControlConfig>) {
    let (root, errors) = DeTable::parse_recoverable(text);
    let mut reader = DocumentReader { text, problems };
    if !errors.is_empty() {
        for error in errors {
            reader.syntax(error.message(), error.span());
        }
        return (Vec::new(), None);
    }
    reader.root(root.get_ref())
}

struct DocumentReader<'a> {
    text: &'a str,
    problems: &'a mut Vec<Problem>,
}

impl DocumentReader<'_> {
    fn root(&mut self, root: &DeTable<'_>) -> (Vec<DeviceBuilder>, Option<ControlConfig>) {
        let (mut builders, mut control) = (Vec::new(), None);
        for (name, value) in root {
            let origin = self.origin(name.get_ref().to_string(), name);
            match (name.get_ref().as_ref(), value.get_ref()) {
                ("device", DeValue::Array(devices)) => {
                    for (i, device) in devices.iter().enumerate() {
                        builders.extend(self.device(i, device));
                    }
                }
                ("device", _) => {
                    self.problems.push(origin.problem("must be an array of tables: write [[device]] above each"));
                }
                ("control", DeValue::Table(table)) => control = self.control(table, &origin),
                ("control", _) => self.problems.push(origin.problem("takes a table: write [control] above its keys")),
                (unknown, _) => {
                    let below = |key| format!("unknown key; did you mean {key:?}, below [[device]]?");
                    let message = match suggestion(unknown) {
                        _ if matches!(unknown, "devices" | "Device") => {
                            "unknown key; did you mean [[device]]?".to_string()
                        }
                        Some(key) => below(key),
                        None => "unknown key: the file has [[device]] tables, [control] and nothing else".to_string(),
                    };
                    self.problems.push(quoted(&origin).problem(message));
                }
            }
        }
        let none = match root.get("device").map(Spanned::get_ref) {
            None => true,
            Some(DeValue::Array(devices)) => devices.is_empty(),
            Some(_) => false,
        };
        // A daemon with a control socket can get its devices while it runs.
        if none && !root.contains_key("control") {
            let origin = Origin { label: "device".to_string(), line: Some(1) };
            let message = "is missing: nothing to serve; write a [[device]] table, or [control] for \"genblk attach\"";
            self.problems.push(origin.problem(message));
        }
        (builders, control)
    }

    /// The `[control]` table.
    fn control(&mut self, table: &DeTable<'_>, origin: &Origin) -> Option<ControlConfig> {
        let (mut socket, mut group) = (None, String::new());
        let mut is_good = true;
        for (name, value) in table {
            let origin = self.origin(format!("control.{}", name.get_ref()), name);
            let problem = match (name.get_ref().as_ref(), to_value(value.get_ref())) {
                ("socket", Value::Text(path)) if path.starts_with('/') => {
                    socket = Some(path.into());
                    continue;
                }
                ("group", Value::Text(text)) if !text.is_empty() => {
                    text.clone_into(&mut group);
                    continue;
                }
                ("socket", _) => origin.problem("takes an absolute path, such as \"/run/genblk/control.sock\""),
                ("group", _) => origin.problem("takes the name or the number of a group"),
                _ => quoted(&origin).problem("unknown key; [control] has socket and group"),
            };
            is_good = false;
            self.problems.push(problem);
        }
        if socket.is_none() && is_good {
            self.problems.push(origin.problem("has no socket, such as socket = \"/run/genblk/control.sock\""));
        }
        Some(ControlConfig { socket: socket?, group })
    }

    fn device(&mut self, i: usize, device: &Spanned<DeValue<'_>>) -> Option<DeviceBuilder> {
        let label = format!("device[{i}]");
        let origin = self.origin(label.clone(), device);
        let Some(table) = device.get_ref().as_table() else {
            self.problems.push(origin.problem("takes a table: write [[device]] above it"));
            return None;
        };
        let mut entries = Vec::new();
        self.entries(table, &label, "", &mut entries);
        Some(DeviceBuilder::new(&entries, origin, |key| format!("{label}.{}", key.name), self.problems))
    }

    /// Collects the keys of `table`, which is the device's own table (`prefix` empty) or one inside it.
    fn entries<'v>(&mut self, table: &'v DeTable<'_>, device: &str, prefix: &str, entries: &mut Vec<Setting<'v>>) {
        for (name, value) in table {
            let path = format!("{prefix}{}", name.get_ref());
            let origin = self.origin(format!("{device}.{path}"), name);
            match (key(&path), value.get_ref()) {
                (Some(key), value) => entries.push(Setting { key, value: to_value(value), origin }),
                (None, DeValue::Table(inner)) if TABLES.contains(&path.as_str()) => {
                    self.entries(inner, device, &format!("{path}."), entries);
                }
                (None, _) if TABLES.contains(&path.as_str()) => {
                    let message = format!("takes a table: write [device.{path}] above its keys");
                    self.problems.push(origin.problem(message));
                }
                (None, _) => {
                    let meant = suggestion(&path).map_or_else(String::new, |near| format!("; did you mean {near:?}?"));
                    self.problems.push(quoted(&origin).problem(format!("unknown key{meant}")));
                }
            }
        }
    }

    fn origin<T>(&self, label: String, at: &Spanned<T>) -> Origin {
        Origin { label, line: Some(self.line_column(at.span().start).0) }
    }

    fn syntax(&mut self, message: &str, span: Option<Range<usize>>) {
        // An error without a span refers to the end of the text.
        let (line, column) = self.line_column(span.map_or(self.text.len(), |span| span.start));
        let (key, message) = (String::new(), message.to_string());
        self.problems.push(Problem { line: Some(line), column: Some(column), key, message });
    }

    /// Line and column, both from 1, of the byte at `offset`.
    fn line_column(&self, offset: usize) -> (usize, usize) {
        let before = self.text.get(..offset).unwrap_or(self.text);
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
    }
}

/// A label with its control characters escaped, safe to print on a terminal.
fn quoted(origin: &Origin) -> Origin {
    Origin { label: origin.label.escape_debug().to_string(), line: origin.line }
}

/// A TOML value, converted for the table of keys.
fn to_value<'v>(value: &'v DeValue<'_>) -> Value<'v> {
    match value {
        DeValue::String(text) => Value::Text(text),
        DeValue::Boolean(flag) => Value::Flag(*flag),
        DeValue::Integer(integer) => i128::from_str_radix(integer.as_str(), integer.radix())
            .map_or(Value::Other("an integer of more than 127 bits"), Value::Integer),
        DeValue::Float(_) => Value::Other("a fraction"),
        DeValue::Datetime(_) => Value::Other("a date"),
        DeValue::Array(_) => Value::Other("an array"),
        DeValue::Table(_) => Value::Other("a table"),
    }
}
