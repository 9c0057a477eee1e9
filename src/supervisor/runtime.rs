//! The runtime file: the changes that the operator has made since the daemon started. The file is rewritten and renamed
//! before the reply to a change is sent, so the next daemon after a crash serves everything that was confirmed. A clean
//! stop removes the file at its end, once every cache was written to its image: until then the next daemon needs the
//! file to find the disks that were attached.
//!
//! The daemon that holds the control socket owns the file, and no other one writes or removes it. A daemon that starts
//! while another one hands over reads the file immediately, because guests wait for its disks. It takes the file over
//! together with the control socket. Then it reads the file again and applies the changes that the other daemon has
//! confirmed meanwhile.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use log::{error, info, warn};

use crate::config::{Config, RuntimeConfig};
use crate::sys::process::effective_uid;
use crate::units::counted;

/// The host's boot ID (random(4)); empty if the kernel does not report it.
fn boot_name() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// Reads a file that decides which disks are served. Rejects symbolic links, and files that anyone but this user or
/// root may have written.
fn read_trusted(path: &Path) -> io::Result<String> {
    // O_NONBLOCK: a FIFO must not hold up the start.
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let mut file = File::options().read(true).custom_flags(flags).open(path)?;
    let metadata = file.metadata()?;
    let (uid, mode) = (metadata.uid(), metadata.mode() & 0o7777);
    if !metadata.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    if uid != 0 && uid != effective_uid() {
        return Err(io::Error::other(format!("it belongs to another user (uid {uid})")));
    }
    if mode & 0o022 != 0 {
        return Err(io::Error::other(format!("other users can write to it (mode {mode:o})")));
    }
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    Ok(text)
}

/// Creates a file that only its owner can access. Anything that already has the name, such as the file of a daemon that
/// was killed while writing, or a planted link, is removed and never written to.
fn replace_file(path: &Path) -> io::Result<File> {
    if let Err(e) = fs::remove_file(path)
        && e.kind() != io::ErrorKind::NotFound
    {
        return Err(e);
    }
    // O_EXCL does not follow links either.
    File::options().write(true).create_new(true).mode(0o600).open(path)
}

/// See the module.
#[derive(Debug)]
pub(super) struct RuntimeFile {
    path: PathBuf,
    pub changes: RuntimeConfig,
    /// Names of the devices in the configuration files, when these were last read.
    in_files: Vec<String>,
    /// Whether this daemon holds the control socket.
    is_owned: bool,
}

impl RuntimeFile {
    /// The file of the daemon with this control socket, in the socket's directory.
    fn path_for(control: &Path) -> PathBuf {
        match control.file_name().and_then(|name| name.to_str()) {
            Some("control.sock") | None => control.with_file_name("runtime.toml"),
            Some(name) => control.with_file_name(format!("{name}.runtime.toml")),
        }
    }

    /// Reads the file that an earlier daemon with the same control socket left. `is_owned`: this daemon holds that
    /// socket.
    pub fn open(control: &Path, is_owned: bool) -> Self {
        let (path, changes) = (Self::path_for(control), RuntimeConfig::default());
        let mut runtime = Self { path, changes, in_files: Vec::new(), is_owned };
        runtime.changes = runtime.read().unwrap_or_default();
        runtime
    }

    /// The content of the file. If it cannot be read, the owner renames it.
    fn read(&self) -> Option<RuntimeConfig> {
        let shown = self.path.display();
        let found = match read_trusted(&self.path) {
            Ok(text) => RuntimeConfig::read(&text, &boot_name()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e.to_string()),
        };
        found.unwrap_or_else(|why| {
            let aside = self.path.with_extension("toml.bad");
            let kept = match self.is_owned.then(|| fs::rename(&self.path, &aside)) {
                None => "another daemon owns the file".to_owned(),
                Some(Ok(())) => format!("renamed to {}", aside.display()),
                Some(Err(e)) => e.to_string(),
            };
            error!("cannot read {shown}, the record of changes at run time: {why}; {kept}");
            None
        })
    }

    /// Whether this daemon holds the control socket, so that the file is its own.
    pub fn is_owned(&self) -> bool {
        self.is_owned
    }

    /// Takes the file over: this daemon holds the control socket from now on. Returns whether the previous daemon has
    /// made changes since this one started; the caller applies them.
    pub fn take_over(&mut self) -> bool {
        self.is_owned = true;
        match self.read() {
            Some(found) => std::mem::replace(&mut self.changes, found) != self.changes,
            None => {
                // The previous daemon's clean stop has removed the file, but this daemon serves what it contained.
                if self.changes != RuntimeConfig::default()
                    && let Err(e) = self.save()
                {
                    error!(
                        "cannot write {}: changes at run time would be lost with this daemon: {e}",
                        self.path.display()
                    );
                }
                false
            }
        }
    }

    /// Records which devices the configuration files have.
    pub fn note_files(&mut self, files: &Config) {
        self.in_files = files.devices.iter().map(|device| device.name.clone()).collect();
    }

    /// Records that a device was detached.
    pub fn record_detached(&mut self, name: &str) {
        let is_in_files = self.in_files.iter().any(|other| other == name);
        self.changes.record_detached(name, is_in_files);
    }

    /// The configuration with the changes.
    pub fn apply(&self, config: &Config) -> Config {
        let RuntimeConfig { attached, detached, set, .. } = &self.changes;
        if self.changes == RuntimeConfig::default() {
            return config.clone();
        }
        let (path, attached, set) =
            (self.path.display(), counted(attached.len() as u64, "disk"), counted(set.len() as u64, "key"));
        info!("from {path}: {attached} attached, {} detached, {set} set by an operator", detached.len());
        let mut problems = Vec::new();
        let devices = self.changes.apply(&config.devices, &mut problems);
        problems.iter().for_each(|problem| error!("{problem}; the disk was attached at run time and is skipped"));
        Config { devices, ..config.clone() }
    }

    /// Writes the changes.
    ///
    /// # Errors
    /// Errors of the file system. The file is unchanged then.
    pub fn save(&self) -> io::Result<()> {
        if !self.is_owned {
            return Err(io::Error::other("another daemon holds the control socket"));
        }
        let aside = self.path.with_extension("toml.new");
        let written = replace_file(&aside).and_then(|mut file| {
            file.write_all(self.changes.write(&boot_name()).as_bytes())?;
            file.sync_all()
        });
        written.and_then(|()| fs::rename(&aside, &self.path)).inspect_err(|_| drop(fs::remove_file(&aside)))
    }

    /// Keeps the file after a stop that was not clean.
    pub fn keep(&self) {
        if self.is_owned && self.changes != RuntimeConfig::default() {
            let path = self.path.display();
            warn!("{path} is kept for the next daemon: not all disks stopped cleanly");
        }
    }

    /// Removes the file, so that the next daemon starts from its configuration alone.
    pub fn remove(&self) {
        if self.is_owned
            && let Err(e) = fs::remove_file(&self.path)
            && e.kind() != io::ErrorKind::NotFound
        {
            error!("cannot remove {}: the next daemon starts with the changes of this one: {e}", self.path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;
    use crate::config::{DeviceConfig, Socket};

    /// The path of a control socket in a directory of the test's own, removed at its end.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(test: &str) -> Self {
            let path = std::env::temp_dir().join(format!("genblk-runtime-{test}-{}", std::process::id()));
            fs::create_dir(&path).unwrap();
            Self(path)
        }

        fn file(&self, name: &str) -> PathBuf {
            self.0.join(name)
        }

        fn open(&self) -> RuntimeFile {
            RuntimeFile::open(&self.file("control.sock"), true)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).unwrap();
        }
    }

    fn save_with_a_device(runtime: &mut RuntimeFile) {
        runtime.changes.record_attached(&DeviceConfig::new("db", Socket::Path("/run/db.sock".into()), "/srv/db.img"));
        runtime.save().unwrap();
    }

    #[test]
    fn a_runtime_file_writable_by_others_is_set_aside() {
        let scratch = Scratch::new("foreign");
        let (path, aside, other) =
            (scratch.file("runtime.toml"), scratch.file("runtime.toml.bad"), scratch.file("other"));
        save_with_a_device(&mut scratch.open());
        let good = fs::read(&path).unwrap();
        assert_eq!(scratch.open().changes.attached.len(), 1);
        for mode in [0o602, 0o660, 0o622] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(scratch.open().changes, RuntimeConfig::default(), "mode {mode:o}");
            assert!(aside.exists() && !path.exists(), "mode {mode:o}");
            fs::rename(&aside, &path).unwrap();
        }
        fs::rename(&path, &other).unwrap();
        fs::set_permissions(&other, fs::Permissions::from_mode(0o600)).unwrap();
        symlink(&other, &path).unwrap();
        assert_eq!(scratch.open().changes, RuntimeConfig::default(), "a link");
        assert!(fs::symlink_metadata(&aside).unwrap().is_symlink() && fs::read(&other).unwrap() == good);
        if effective_uid() == 0 {
            fs::rename(&other, &path).unwrap();
            std::os::unix::fs::chown(&path, Some(65534), None).unwrap();
            assert_eq!(scratch.open().changes, RuntimeConfig::default(), "another user's");
        }
    }

    #[test]
    fn a_symlink_at_the_path_is_replaced_without_writing_its_target() {
        let scratch = Scratch::new("links");
        let target = scratch.file("target");
        fs::write(&target, "precious").unwrap();
        symlink(&target, scratch.file("runtime.toml.new")).unwrap();
        let mut runtime = scratch.open();
        symlink(&target, scratch.file("runtime.toml")).unwrap();
        save_with_a_device(&mut runtime);
        assert_eq!(fs::read(&target).unwrap(), b"precious");
        let metadata = fs::symlink_metadata(scratch.file("runtime.toml")).unwrap();
        assert!(metadata.is_file() && metadata.mode() & 0o077 == 0, "it is for its owner alone");
        assert_eq!(scratch.open().changes.attached.len(), 1);
    }

    #[test]
    fn only_the_owner_of_the_control_socket_writes_the_runtime_file() {
        let scratch = Scratch::new("owner");
        let path = scratch.file("runtime.toml");
        let mut first = scratch.open();
        save_with_a_device(&mut first);
        let mut second = RuntimeFile::open(&scratch.file("control.sock"), false);
        assert_eq!(second.changes, first.changes, "it serves the same disks at once");
        assert!(second.save().is_err());
        second.remove();
        assert!(path.exists());
        first.changes.record_detached("vm1", true);
        first.save().unwrap();
        assert!(second.take_over(), "there is something to do");
        assert_eq!(second.changes, first.changes);
        let mut third = RuntimeFile::open(&scratch.file("control.sock"), false);
        second.remove();
        assert!(!third.take_over());
        assert!(path.exists() && third.changes == first.changes, "what it serves is there for the next daemon");
    }
}
