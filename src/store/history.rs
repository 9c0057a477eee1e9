//! The recorded history of an image: the record of its last tenure, its change token, and a name that a block device
//! keeps when it is attached again.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::sys::block::LoopFile;
use crate::sys::{self, xattr};
use crate::tenure::record::{ATTRIBUTE, BYTES_MAX, Record};
use crate::tenure::token::{ChangeToken, MAY_MISS_WRITES};
use crate::units::SECTOR_BYTES;

const NANOS_PER_SECOND: u64 = 1_000_000_000;
/// The suffix that sysfs appends to the path of a loop device's deleted file.
const DELETED: &str = " (deleted)";

/// The record of an image's last tenure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LastTenure {
    /// The image cannot carry a record (it is a block device, or its file system has no attributes), and this host has
    /// no place for it.
    NoRecords,
    /// No tenure was ever recorded.
    None,
    /// The record.
    Recorded(Record),
    /// The record cannot be read, for this reason.
    Unreadable(String),
}

/// Reads the record of an image that is a regular file.
///
/// # Errors
/// Errors of fgetxattr(2), except those of a file system without attributes.
pub(super) fn last_tenure(file: &File) -> io::Result<LastTenure> {
    Ok(match xattr::get(file, ATTRIBUTE, BYTES_MAX) {
        Ok(Some(bytes)) => match Record::decode(&bytes) {
            Ok(record) => LastTenure::Recorded(record),
            Err(why) => LastTenure::Unreadable(why),
        },
        Ok(None) => LastTenure::None,
        Err(error) => match error.raw_os_error() {
            Some(libc::E2BIG | libc::ERANGE) => LastTenure::Unreadable(format!("it is longer than {BYTES_MAX} bytes")),
            Some(errno) if sys::is_unsupported(errno) => LastTenure::NoRecords,
            _ => return Err(error),
        },
    })
}

/// Writes the record of an image that is a regular file, and makes it durable.
///
/// # Errors
/// Errors of fsetxattr(2) and fsync(2).
pub(super) fn write_record(file: &File, record: &Record) -> io::Result<()> {
    xattr::set(file, ATTRIBUTE, &record.encode())?;
    file.sync_all()
}

/// The change token of an image of `size_bytes` bytes. `counts_sectors`: the device counts exactly the sectors that
/// genblk writes, so that its counter can be compared.
///
/// # Errors
/// Errors of fstat(2).
pub(super) fn change_token(
    file: &File,
    size_bytes: u64,
    device: Option<u64>,
    counts_sectors: bool,
) -> io::Result<ChangeToken> {
    let Some(device) = device else { return Ok(token_of_file(&file.metadata()?)) };
    let backing_file = loop_file(device).and_then(|path| fs::metadata(path).ok()).map(|found| token_of_file(&found));
    let sectors_written = if counts_sectors { sectors_written(device).unwrap_or(0) } else { 0 };
    let disk_sequence = sys::block::disk_sequence(file);
    Ok(ChangeToken { size_bytes, disk_sequence, sectors_written, ..backing_file.unwrap_or_default() })
}

/// The sequence number and the change token of a block device, read from sysfs without opening the device.
pub(super) fn read_device_token(device: u64) -> (u64, ChangeToken) {
    let number = |names: [&str; 2]| names.iter().find_map(|name| attribute(device, name)?.parse::<u64>().ok());
    let disk_sequence = number(["diskseq", "../diskseq"]).unwrap_or(0);
    let size_bytes = number(["size", "size"]).unwrap_or(0).saturating_mul(SECTOR_BYTES);
    let backing_file = loop_file(device).and_then(|path| fs::metadata(path).ok()).map(|found| token_of_file(&found));
    (disk_sequence, ChangeToken { size_bytes, disk_sequence, ..backing_file.unwrap_or_default() })
}

/// The change token of a regular file.
pub(super) fn token_of_file(metadata: &fs::Metadata) -> ChangeToken {
    let nanoseconds = |seconds: i64, nanoseconds: i64| {
        let [seconds, nanoseconds] = [seconds, nanoseconds].map(|n| u64::try_from(n).unwrap_or(0));
        seconds.wrapping_mul(NANOS_PER_SECOND).wrapping_add(nanoseconds)
    };
    ChangeToken {
        size_bytes: metadata.len(),
        modified_ns: nanoseconds(metadata.mtime(), metadata.mtime_nsec()),
        changed_ns: nanoseconds(metadata.ctime(), metadata.ctime_nsec()),
        blocks: metadata.blocks(),
        ..ChangeToken::default()
    }
}

/// A name that a block device keeps when it is attached again, under another number; empty if none is known.
pub(super) fn alias(device: u64) -> String {
    let partition = partition(device).map_or_else(String::new, |number| format!(":{number}"));
    if let Some(path) = loop_file(device) {
        let offset = attribute(device, "loop/offset").unwrap_or_default();
        return format!("loop:{}:{offset}{partition}", path.display());
    }
    stable_name(device).map_or_else(String::new, |name| format!("{name}{partition}"))
}

/// The name that a block device which is not a loop device, or the disk of a partition, keeps when it is attached
/// again: the UUID of a device-mapper device or an MD array, or the WWID of a disk.
pub(super) fn stable_name(device: u64) -> Option<String> {
    let first = |names: &[&str]| names.iter().find_map(|name| attribute(device, name)).filter(|name| !name.is_empty());
    let uuid = |kind: &str, uuid: String| format!("{kind}:{uuid}");
    first(&["dm/uuid"])
        .map(|found| uuid("dm", found))
        .or_else(|| first(&["md/uuid", "../md/uuid"]).map(|found| uuid("md", found)))
        .or_else(|| first(&["wwid", "device/wwid", "../wwid", "../device/wwid"]).map(|found| uuid("wwid", found)))
}

/// The number of a partition; `None` for any other block device.
pub(super) fn partition(device: u64) -> Option<String> {
    attribute(device, "partition")
}

/// Whether a block device is a partition.
pub(super) fn is_partition(device: u64) -> bool {
    partition(device).is_some()
}

/// The file behind a loop device, or a partition of one, opened for reading, and its path; `None` if no path leads to
/// that file.
pub(super) fn file_behind(device: u64, on: LoopFile) -> Option<(File, PathBuf)> {
    let path = loop_file(device)?;
    let file = fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path).ok()?;
    let metadata = file.metadata().ok()?;
    ((metadata.dev(), metadata.ino()) == (on.device, on.inode)).then_some((file, path))
}

/// A loop device on a file; `None` if there is none.
pub(super) fn loop_device_on(file: &Path) -> Option<PathBuf> {
    let file = file.canonicalize().ok()?;
    let is_on_it = |device: &fs::DirEntry| {
        let behind = fs::read_to_string(device.path().join("loop/backing_file"));
        behind.is_ok_and(|behind| Path::new(behind.trim_end()) == file)
    };
    let device = fs::read_dir("/sys/block").ok()?.flatten().find(is_on_it)?;
    Some(Path::new("/dev").join(device.file_name()))
}

/// The file behind a loop device or a partition of one.
fn loop_file(device: u64) -> Option<PathBuf> {
    let names = ["loop/backing_file", "../loop/backing_file"];
    let path = names.iter().find_map(|name| attribute(device, name))?;
    if path.ends_with(DELETED) { None } else { Some(PathBuf::from(path)) }
}

/// [`ChangeToken::sectors_written`] of a block device, of written and of discarded sectors; `None` if it is not known.
fn sectors_written(device: u64) -> Option<u64> {
    let accounting = ["queue/iostats", "../queue/iostats"].iter().find_map(|name| attribute(device, name))?;
    let may_miss = if accounting == "0" { MAY_MISS_WRITES } else { 0 };
    // Documentation/block/stat.rst: the seventh number counts sectors written, the fourteenth sectors discarded.
    Some((written_or_discarded(&attribute(device, "stat")?)? + 1) | may_miss)
}

/// See [`sectors_written`]; `stat` is the device's file of that name. Kernels before Linux 4.18 count no discards.
fn written_or_discarded(stat: &str) -> Option<u64> {
    let numbers: Vec<u64> = stat.split_whitespace().map_while(|number| number.parse().ok()).collect();
    Some(numbers.get(6)? + numbers.get(13).unwrap_or(&0))
}

/// An attribute of a block device in sysfs.
fn attribute(device: u64, name: &str) -> Option<String> {
    let (major, minor) = (libc::major(device), libc::minor(device));
    let path = format!("/sys/dev/block/{major}:{minor}");
    let text = fs::read_to_string(Path::new(&path).canonicalize().ok()?.join(name)).ok()?;
    Some(text.trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sectors_that_were_written_and_discarded_are_counted() {
        let stat = " 101 102 103 104 105 106 107 108 109 110 111 112 113 20000 115 116 117\n";
        assert_eq!(written_or_discarded(stat), Some(20_107));
        assert_eq!(written_or_discarded("1 2 3 4 5 6 7 8 9 10 11\n"), Some(7), "before Linux 4.18");
        assert_eq!(written_or_discarded("1 2 3\n"), None);
    }
}
