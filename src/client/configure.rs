//! `genblk set`, `genblk reload` and `genblk config`.

use serde_json::{Map, Value, json};

use super::ControlClient;
use crate::control::wire::{ChangeKind, DeviceChange, DeviceKeys};
use crate::error::{Error, ErrorKind, Result};

/// Sets keys of a device, each written KEY=VALUE; returns the text to print.
///
/// # Errors
/// [`ErrorKind::Config`] for a setting that is not of this form, and those of [`ControlClient::call`].
pub fn set(client: &mut ControlClient, device: &str, settings: &[String], as_json: bool) -> Result<String> {
    let config = object_of(settings).map_err(|why| Error::new(ErrorKind::Config, why))?;
    let results = client.call_long("Set", &json!({ "device": device, "config": config }), |_| {})?;
    if as_json {
        return Ok(format!("{results}\n"));
    }
    let changed = super::joined(&results["changed"]);
    Ok(if changed.is_empty() { format!("{device}: unchanged\n") } else { format!("{device}: set {changed}\n") })
}

/// Converts settings KEY=VALUE to an object. A value that reads as a number or a boolean becomes one.
fn object_of(settings: &[String]) -> std::result::Result<Value, String> {
    let mut object = Map::new();
    for setting in settings {
        let (key, value) =
            setting.split_once('=').ok_or_else(|| format!("{setting:?} is not of the form KEY=VALUE"))?;
        let value = match (value.parse::<i64>(), value.parse::<bool>()) {
            (Ok(number), _) => json!(number),
            (_, Ok(flag)) => json!(flag),
            _ => json!(value),
        };
        object.insert(key.to_owned(), value);
    }
    Ok(Value::Object(object))
}

/// Makes the daemon reload its configuration file; returns the text to print.
///
/// # Errors
/// The errors of [`ControlClient::call`].
pub fn reload(client: &mut ControlClient, dry_run: bool, as_json: bool) -> Result<String> {
    let results = client.call_long("Reload", &json!({ "dry_run": dry_run }), |_| {})?;
    if as_json {
        return Ok(format!("{results}\n"));
    }
    let unknown = |e: serde_json::Error| Error::io(ErrorKind::Control, "an unsupported reply to Reload", e.into());
    let changes: Vec<DeviceChange> = serde_json::from_value(results["changes"].clone()).map_err(unknown)?;
    let overridden: Vec<DeviceKeys> = serde_json::from_value(results["overridden"].clone()).unwrap_or_default();
    let overridden: String = overridden.iter().map(|keys| super::visible(&keys.in_words()) + "\n").collect();
    if changes.is_empty() {
        return Ok(format!("nothing has changed\n{overridden}"));
    }
    Ok(changes.iter().map(|change| change_line(change, dry_run)).collect::<String>() + &overridden)
}

fn change_line(DeviceChange { device, what, detail }: &DeviceChange, dry_run: bool) -> String {
    let detail = super::visible(&detail.join(", "));
    let text = match what {
        ChangeKind::Attached => "attached".to_owned(),
        ChangeKind::Detached if detail.is_empty() => "detached".to_owned(),
        ChangeKind::Detached => format!("detached: {detail}"),
        ChangeKind::Changed => format!("changed {detail}"),
        ChangeKind::Pending => format!("pending until detach and attach: {detail}"),
        ChangeKind::Kept => format!("kept, although it is no longer in the file: {detail}"),
    };
    format!("{device}: {}{text}\n", if dry_run { "would be " } else { "" })
}

/// The current configuration.
///
/// # Errors
/// The errors of [`ControlClient::call`].
pub fn config(client: &mut ControlClient, device: Option<&str>, as_json: bool) -> Result<String> {
    let results = client.call_raw("Configuration", &json!({ "device": device }))?;
    Ok(if as_json { format!("{results}\n") } else { results["toml"].as_str().unwrap_or_default().to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_setting_is_a_key_with_a_number_a_boolean_or_a_word() {
        let settings = ["poll_us=7", "cache.mode=writethrough", "x=true"].map(ToOwned::to_owned);
        assert_eq!(object_of(&settings), Ok(json!({"poll_us": 7, "cache.mode": "writethrough", "x": true})));
        assert!(object_of(&["poll_us".to_owned()]).unwrap_err().contains("KEY=VALUE"));
    }

    #[test]
    fn each_change_of_a_reload_has_a_line() {
        let change = |what, detail: &[&str]| {
            DeviceChange::of("db", what, detail.iter().map(|text| (*text).to_owned()).collect())
        };
        assert_eq!(change_line(&change(ChangeKind::Changed, &["poll_us"]), false), "db: changed poll_us\n");
        assert_eq!(change_line(&change(ChangeKind::Attached, &[]), true), "db: would be attached\n");
        assert!(
            change_line(&change(ChangeKind::Kept, &["in use by pid 7"]), false)
                .ends_with("no longer in the file: in use by pid 7\n")
        );
    }
}
