//! The file in which the daemon keeps what the operator has changed since its start. It is written whole and renamed
//! before a change is answered, so that the next daemon after a crash serves what was answered. An orderly stop
//! removes it.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use log::{error, info};

use crate::config::{Config, RuntimeConfig};
use crate::units::counted;

/// The host's boot ID (random(4)); empty if the kernel does not report it.
fn boot_name() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// See the module.
#[derive(Debug)]
pub(super) struct RuntimeFile {
    path: PathBuf,
    pub changes: RuntimeConfig,
}

impl RuntimeFile {
    /// The file of the daemon with this control socket: beside the socket.
    fn beside(control: &Path) -> PathBuf {
        match control.file_name().and_then(|name| name.to_str()) {
            Some("control.sock") | None => control.with_file_name("runtime.toml"),
            Some(name) => control.with_file_name(format!("{name}.runtime.toml")),
        }
    }

    /// Reads what an earlier daemon with the same control socket left. A file that cannot be read is set aside.
    pub fn open(control: &Path) -> Self {
        let path = Self::beside(control);
        let shown = path.display();
        let found = match fs::read_to_string(&path) {
            Ok(text) => RuntimeConfig::read(&text, &boot_name()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e.to_string()),
        };
        let changes = found.unwrap_or_else(|why| {
            let aside = path.with_extension("toml.bad");
            let kept =
                fs::rename(&path, &aside).map_or_else(|e| e.to_string(), |()| format!("it is now {}", aside.display()));
            error!("cannot read {shown}, which has what was attached and detached: {why}; {kept}");
            None
        });
        Self { path, changes: changes.unwrap_or_default() }
    }

    /// The configuration with the changes.
    pub fn apply(&self, config: &Config) -> Config {
        let RuntimeConfig { attached, detached, set } = &self.changes;
        if self.changes == RuntimeConfig::default() {
            return config.clone();
        }
        let (path, attached, set) =
            (self.path.display(), counted(attached.len() as u64, "disk"), counted(set.len() as u64, "key"));
        info!("from {path}: {attached} attached, {} detached, {set} set by an operator", detached.len());
        let mut problems = Vec::new();
        let devices = self.changes.apply(&config.devices, &mut problems);
        problems.iter().for_each(|problem| error!("{problem}; it was attached, and is not served"));
        Config { devices, ..config.clone() }
    }

    /// Writes the changes.
    ///
    /// # Errors
    /// Those of the file system. The file is as it was then.
    pub fn save(&self) -> io::Result<()> {
        let aside = self.path.with_extension("toml.new");
        let written = File::create(&aside).and_then(|mut file| {
            file.write_all(self.changes.write(&boot_name()).as_bytes())?;
            file.sync_all()
        });
        written.and_then(|()| fs::rename(&aside, &self.path)).inspect_err(|_| drop(fs::remove_file(&aside)))
    }

    /// Removes the file: the next daemon starts as its configuration says.
    pub fn remove(&self) {
        if let Err(e) = fs::remove_file(&self.path)
            && e.kind() != io::ErrorKind::NotFound
        {
            error!("cannot remove {}: the next daemon starts with the changes of this one: {e}", self.path.display());
        }
    }
}
