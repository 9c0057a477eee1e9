//! `genblk --check`: finds everything that would prevent a device from being served, without serving any.
//!
//! A daemon with the same configuration may be running. Resources that it uses are inspected only as far as that does
//! not disturb it, and are not reported as problems.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use crate::arena::check_memory;
use crate::config::{Config, DeviceConfig, Engine, ImageFormat, MemoryDir, Socket, Survive};
use crate::error::{Error, ErrorKind, Result};
use crate::listener::SocketAccess;
use crate::recover::{self, check_memory_dir, file_system_of};
use crate::store::file::KnownRaw;
use crate::store::{self, file};
use crate::sys::dir::may_create_in;
use crate::systemd::ServiceManager;
use crate::units::counted;

/// The results of the checks.
#[derive(Debug, Default)]
struct Findings {
    /// Problems that would prevent a device from being served.
    problems: Vec<String>,
    kind: Option<ErrorKind>,
    /// Further notes for the operator.
    notes: Vec<String>,
}

impl Findings {
    /// Records the error of a check, if it is one.
    fn record<T>(&mut self, device: &str, result: Result<T>) -> Option<T> {
        result.inspect_err(|_| {}).map_err(|error| self.add(device, &error)).ok()
    }

    fn add(&mut self, device: &str, error: &Error) {
        self.kind.get_or_insert(error.kind());
        let (prefix, text) = (format!("{device}: "), error.to_string());
        self.problems.push(if text.starts_with(&prefix) { text } else { prefix + &text });
    }
}

/// Opens images, sockets and memory directories as a daemon with this configuration would, and closes them again.
/// Returns a text for the operator. `source` is the origin of the configuration.
///
/// # Errors
/// One error with every problem, of the kind of the first one.
pub fn check(source: &str, config: &Config) -> Result<String> {
    let mut findings = Findings::default();
    let manager = ServiceManager::default().into();
    let mut unused = Vec::new();
    for device in &config.devices {
        let name = &device.name;
        if !check_image(device, &manager, &mut findings) {
            unused.push(device);
        }
        let socket = check_socket(&device.socket);
        if findings.record(name, socket) == Some(Usage::InUse) {
            findings
                .notes
                .push(format!("{name}: another process listens on {}; stop that process first", device.socket));
        }
        findings.record(name, SocketAccess::new(device.socket_mode, &device.socket_group));
        match check_memory_dir(device) {
            // As at a start.
            Err(error) if device.cache.survive == Survive::Auto => {
                findings.notes.push(format!("{error}; its cache would not survive a crash"));
            }
            checked => drop(findings.record(name, checked)),
        }
        if let MemoryDir::Path(memory_dir) = &device.cache.memory_dir {
            findings.record(name, recover::check_cache_dir(memory_dir));
        }
        if device.engine == Engine::IoUring {
            let failed = |e| Error::io(ErrorKind::System, "io_uring is not available", e);
            findings.record(name, file::check_uring().map_err(failed));
        }
    }
    check_space(&unused, &mut findings);
    let Findings { problems, kind, notes } = findings;
    let notes: String = notes.iter().map(|note| format!("\n{note}")).collect();
    match kind {
        None => {
            let devices = counted(config.devices.len() as u64, "device");
            Ok(format!("{source}: no problems, {devices}{notes}\n"))
        }
        Some(kind) => {
            let count = counted(problems.len() as u64, "problem");
            let text = format!("{count} in {source}\n{}{notes}", problems.join("\n"));
            Err(Error::new(kind, text))
        }
    }
}

/// Whether a process uses a resource.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Usage {
    Free,
    InUse,
}

/// Checks a device's image; returns whether a process uses it.
fn check_image(device: &DeviceConfig, manager: &std::sync::Arc<ServiceManager>, findings: &mut Findings) -> bool {
    let (name, image) = (&device.name, &device.image);
    if store::is_remote(image) {
        return check_export(device, manager, findings);
    }
    let Some(found) = findings.record(name, file::inspect(image, device.read_only)) else { return false };
    if found.is_in_use {
        findings
            .notes
            .push(format!("{name}: image {} is in use by another process; stop that process first", image.display()));
        return true;
    }
    if let Some((format, refusal)) = found.format_refusal
        && device.format == ImageFormat::Auto
        && !recover::has_kept_cache(device, &found.identity, format, manager)
    {
        findings.add(name, &refusal);
    }
    false
}

/// Checks a device's export on a server; returns whether a daemon of this host writes to it. Daemons on other hosts
/// cannot be detected.
fn check_export(device: &DeviceConfig, manager: &std::sync::Arc<ServiceManager>, findings: &mut Findings) -> bool {
    let nbd = recover::nbd_options(device);
    let options = file::OpenOptions { read_only: device.read_only, nbd, ..file::OpenOptions::default() };
    let opened = store::open(Some(&device.name), &device.image, &options);
    if let Err(e) = &opened
        && e.kind() == ErrorKind::Locked
    {
        findings.notes.push(format!("{}: {e}; it must end first", device.name));
        return true;
    }
    let Some(export) = findings.record(&device.name, opened) else { return false };
    findings.record(&device.name, export.check_workers(device.workers));
    let known_raw = match (device.format, export.found_format()) {
        (ImageFormat::Raw, _) => Some(KnownRaw::Configured),
        (ImageFormat::Auto, Some(format)) => {
            let is_kept = recover::has_kept_cache(device, &export.identity(), format, manager);
            is_kept.then_some(KnownRaw::KeptCache)
        }
        (ImageFormat::Auto, None) => None,
    };
    findings.record(&device.name, export.check_format(known_raw));
    false
}

/// Checks that a device could listen on its socket.
///
/// # Errors
/// [`ErrorKind::Socket`] when it could not.
fn check_socket(socket: &Socket) -> Result<Usage> {
    let failed = |e| Error::io(ErrorKind::Socket, format!("cannot listen on {socket}"), e);
    let path = match socket {
        Socket::Path(path) => path.clone(),
        Socket::Fd(fd) => {
            let kind = fs::metadata(format!("/proc/self/fd/{fd}")).map_err(failed)?.file_type();
            let not_a_socket = || failed(io::Error::other("it is not a socket"));
            return if kind.is_socket() { Ok(Usage::Free) } else { Err(not_a_socket()) };
        }
    };
    match fs::symlink_metadata(&path) {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(failed(io::Error::other("the path exists and is not a socket")));
        }
        Ok(_) if is_listened_on(&path) => return Ok(Usage::InUse),
        Ok(_) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(failed(e)),
    }
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    may_create_in(directory).map_err(failed)?;
    Ok(Usage::Free)
}

/// Whether a process listens on a socket (proc_net_unix(5)). Connecting would disturb it.
fn is_listened_on(path: &Path) -> bool {
    // A path may contain any bytes.
    let sockets = fs::read("/proc/net/unix").unwrap_or_default();
    let is_ours = |line: &[u8]| listening_path(line).is_some_and(|found| Path::new(OsStr::from_bytes(found)) == path);
    sockets.split(|byte| *byte == b'\n').any(is_ours)
}

/// The path of a listening socket, from a line of /proc/net/unix (proc_net_unix(5)).
fn listening_path(line: &[u8]) -> Option<&[u8]> {
    /// The flag of listening sockets (__SO_ACCEPTCON).
    const LISTENING: &[u8] = b"00010000";
    /// The columns before the path.
    const COLUMNS: usize = 7;
    // "0000000000000000: 00000002 00000000 00010000 0001 01    12 /run/x.sock": spaces before a number fill its column,
    // those in a path belong to it.
    let mut rest = line;
    let mut flags: &[u8] = &[];
    for column in 0..COLUMNS {
        rest = &rest[rest.iter().position(|byte| *byte != b' ')?..];
        let (word, after) = rest.split_at(rest.iter().position(|byte| *byte == b' ')?);
        if column == 3 {
            flags = word;
        }
        rest = after;
    }
    (flags == LISTENING).then(|| &rest[1..])
}

/// Checks that there is memory for the caches of `devices`, which no process serves.
fn check_space(devices: &[&DeviceConfig], findings: &mut Findings) {
    let images: BTreeSet<PathBuf> =
        devices.iter().map(|device| device.image.canonicalize().unwrap_or(device.image.clone())).collect();
    let mut dirs: BTreeMap<&Path, Vec<&DeviceConfig>> = BTreeMap::new();
    for device in devices.iter().filter(|device| !device.read_only && device.cache.survive != Survive::Never) {
        if let MemoryDir::Path(memory_dir) = &device.cache.memory_dir {
            dirs.entry(memory_dir).or_default().push(device);
        }
    }
    let mut kept = 0;
    let mut reserved: BTreeSet<&str> = BTreeSet::new();
    for (memory_dir, devices) in dirs {
        let kept_here = recover::cache_memory_bytes(memory_dir, &images);
        let file_system = file_system_of(memory_dir);
        if file_system.as_ref().is_ok_and(|found| found.is_hugetlbfs) {
            // hugetlbfs memory was reserved when the host was configured, and is not part of the available memory.
            reserved.extend(devices.iter().map(|device| device.name.as_str()));
        } else {
            kept += kept_here;
        }
        let Ok(file_system) = file_system else { continue };
        let wanted = bytes_of(devices.iter().copied()).saturating_sub(kept_here);
        if !file_system.is_memory() || wanted <= file_system.available_bytes {
            continue;
        }
        let (shown, name) = (memory_dir.display(), file_system.name());
        let available = file_system.available_bytes;
        let text = format!("{shown} ({name}) has {available} bytes available, and the caches there need {wanted}");
        if let Some(device) = devices.iter().find(|device| device.cache.survive == Survive::Always) {
            findings.add(&device.name, &Error::new(ErrorKind::Memory, text));
        } else {
            findings.notes.push(format!("{text}: some would not survive a crash"));
        }
    }
    let others = devices.iter().copied().filter(|device| !reserved.contains(device.name.as_str()));
    let wanted = bytes_of(others).saturating_sub(kept);
    if let Err(error) = check_memory(wanted) {
        findings.add("all devices", &error);
    }
}

/// Memory that the caches of devices take, in bytes. Read-only devices on one image share one.
fn bytes_of<'a>(devices: impl Iterator<Item = &'a DeviceConfig>) -> u64 {
    let mut shared = BTreeSet::new();
    devices
        .filter(|device| !device.read_only || shared.insert(&device.image))
        .map(|device| device.cache.size_bytes)
        .fold(0, u64::saturating_add)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listening_socket_path_may_contain_spaces() {
        let path = |line: &'static str| listening_path(line.as_bytes()).map(|path| std::str::from_utf8(path).unwrap());
        let line = "0000000000000000: 00000002 00000000 00010000 0001 01 12345 /run/my disks/ a.sock";
        assert_eq!(path(line), Some("/run/my disks/ a.sock"));
        assert_eq!(path("0000000000000000: 00000002 00000000 00010000 0001 01    12 /run/x.sock"), Some("/run/x.sock"));
        assert_eq!(path("0000000000000000: 00000003 00000000 00000000 0001 03 12345 /run/x.sock"), None, "connected");
        assert_eq!(path("0000000000000000: 00000002 00000000 00010000 0001 01 12345"), None, "without a name");
        assert_eq!(path("Num       RefCount Protocol Flags    Type St Inode Path"), None);
        assert_eq!(path(""), None);
    }
}
