//! `genblk attach`: serves the disks of a file in addition to those that the daemon serves.

use std::env;
use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::ControlClient;
use crate::error::{Error, ErrorKind, Result};

/// Attaches devices of the TOML file at `path`: its `[[device]]` tables, or one device whose keys are at the top level.
/// `names` selects devices; empty: all. The file may be a daemon's configuration. Returns the text to print.
///
/// # Errors
/// [`ErrorKind::Config`] if the file cannot be read, and those of [`ControlClient::call`]. The devices before the one
/// that failed are attached.
pub fn attach(client: &mut ControlClient, path: &Path, names: &[String], as_json: bool) -> Result<String> {
    let shown = path.display();
    let wrong = |why: String| Error::new(ErrorKind::Config, format!("{shown}: {why}"));
    let text = fs::read_to_string(path).map_err(|e| Error::io(ErrorKind::Config, format!("cannot read {shown}"), e))?;
    let table: toml::Table = text.parse().map_err(|e: toml::de::Error| wrong(e.to_string()))?;
    let mut printed = String::new();
    for device in devices(&table).and_then(|devices| select_devices(devices, names)).map_err(wrong)? {
        let results = client.call_long("Attach", &json!({ "config": device }), |_| {})?;
        let name = device["name"].as_str().unwrap_or_default();
        printed += &match (as_json, results["attached"] == json!(true)) {
            (true, _) => format!("{results}\n"),
            (false, true) => format!("{name}: attached\n"),
            (false, false) => format!("{name}: already attached\n"),
        };
    }
    Ok(printed)
}

/// The devices of a document, as objects. Relative paths are those of this process.
fn devices(table: &toml::Table) -> std::result::Result<Vec<Value>, String> {
    let value = serde_json::to_value(table).map_err(|e| e.to_string())?;
    let mut devices = match value {
        Value::Object(mut object) => {
            // The file may be the daemon's own configuration, whose [control] table does not concern a device.
            let is_configuration = object.remove("control").is_some();
            match object.remove("device") {
                Some(_) if !object.is_empty() => {
                    let names: Vec<_> = object.keys().map(String::as_str).collect();
                    return Err(format!("{} must be in a [[device]] table", names.join(", ")));
                }
                Some(Value::Array(devices)) => devices,
                Some(_) => return Err("write [[device]] above each device".to_owned()),
                None if is_configuration => return Err("has no [[device]] table".to_owned()),
                None => vec![Value::Object(object)],
            }
        }
        _ => Vec::new(),
    };
    for device in &mut devices {
        for key in ["image", "socket"] {
            let is_relative = |name: &&str| Path::new(name).is_relative() && !name.contains("://");
            let Some(path) = device[key].as_str().filter(is_relative) else { continue };
            let absolute = env::current_dir().map_err(|e| e.to_string())?.join(path);
            device[key] = json!(absolute);
        }
    }
    Ok(devices)
}

/// The devices with these names, or all.
fn select_devices(mut devices: Vec<Value>, names: &[String]) -> std::result::Result<Vec<Value>, String> {
    if names.is_empty() {
        return Ok(devices);
    }
    let name_of = |device: &Value| device["name"].as_str().unwrap_or_default().to_owned();
    let there: Vec<String> = devices.iter().map(name_of).collect();
    if let Some(missing) = names.iter().find(|name| !there.contains(name)) {
        return Err(format!("has no device {missing:?}; it has: {}", there.join(", ")));
    }
    devices.retain(|device| names.contains(&name_of(device)));
    Ok(devices)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_attach_file_has_device_tables_or_the_keys_of_one_device() {
        let read = |text: &str| devices(&text.parse().unwrap());
        let one = read("name = \"db\"\nimage = \"/a\"\n[cache]\nsize = \"8M\"\n").unwrap();
        assert_eq!(one, [json!({"name": "db", "image": "/a", "cache": {"size": "8M"}})]);
        let two = read("[[device]]\nname = \"a\"\ncache.size = \"8M\"\n[[device]]\nname = \"b\"\n").unwrap();
        assert_eq!((two.len(), &two[1]["name"]), (2, &json!("b")));
        let here = env::current_dir().unwrap().join("a.img");
        assert_eq!(read("image = \"a.img\"").unwrap()[0]["image"], json!(here));
        assert_eq!(read("image = \"nbd://host/a\"").unwrap()[0]["image"], json!("nbd://host/a"));
        assert!(read("x = 1\n[[device]]\nname = \"a\"").unwrap_err().contains("x must be in"));
    }

    #[test]
    fn attach_selects_devices_of_a_configuration_file_by_name() {
        let read = |text: &str| devices(&text.parse().unwrap());
        let control = "[control]\nsocket = \"/s\"\n";
        assert!(read(control).unwrap_err().contains("no [[device]] table"));
        let both = read(&format!("{control}[[device]]\nname = \"a\"\n[[device]]\nname = \"b\"\n")).unwrap();
        assert_eq!(select_devices(both.clone(), &[]), Ok(both.clone()));
        assert_eq!(select_devices(both.clone(), &["b".to_owned()]), Ok(vec![json!({"name": "b"})]));
        let missing = select_devices(both, &["c".to_owned()]).unwrap_err();
        assert!(missing.contains("no device \"c\"; it has: a, b"), "{missing}");
    }
}
