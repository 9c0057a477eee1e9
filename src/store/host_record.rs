//! The records of tenures that images cannot carry: those of block devices, and of files on file systems without
//! extended attributes. Each is a file of this host, and is valid until the host's next boot.
//!
//! A user has several directories of records, below /run and /dev/shm, because each may be read-only or removed. Other
//! users can read them. Records are trusted that root, this user or the owner of the image wrote.

use std::fs::{self, File, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::history::{self, LastTenure};
use crate::image_id::ImageId;
use crate::sys;
use crate::sys::dir::{OpenMode, open_at, rename_at, unlink_at};
use crate::sys::process::effective_uid;
use crate::tenure::TenureId;
use crate::tenure::host::{Boot, BootRelation};
use crate::tenure::record::{BYTES_MAX, Record, TenureState};

/// Directory in which each user has a directory of records; hidden, because genblk's other names there are of caches.
const SHARED_MEMORY: &str = "/dev/shm";
/// Prefix of the names of these directories; the user's number follows.
const DIRECTORY_OF_USER: &str = ".genblk-tenures-";
/// The same for root, and for a user to whom this directory belongs.
const RUN: &str = "/run/genblk";
const DIRECTORY_IN_RUN: &str = "tenures-";
/// Mode bits by which group and others may write.
const WRITABLE_BY_OTHERS: u32 = 0o022;
/// Mode of a directory of records.
const LISTED_BY_ALL: u32 = 0o755;
/// Mode bit by which everyone may write.
const WRITABLE_BY_ALL: u32 = 0o002;
/// Most records in a directory, as long as some are of tenures that have ended.
const RECORDS_MAX: usize = 1000;

/// The place of an image's record among those of this host.
#[derive(Clone, Debug)]
pub(super) struct HostRecord {
    /// The name of the record.
    name: String,
    /// The identity of the image.
    identity: ImageId,
    /// Creation time of the file with the image's bytes in nanoseconds since 1970; 0 if it is unknown.
    born_ns: u64,
    owner: u32,
    /// Every user may write to the image.
    is_public: bool,
}

impl HostRecord {
    /// The place of the record of an open image; `path` has no symbolic links.
    pub(super) fn of(file: &File, identity: ImageId, path: &Path) -> io::Result<Self> {
        let metadata = file.metadata()?;
        let (owner, is_public) = (metadata.uid(), metadata.mode() & WRITABLE_BY_ALL != 0);
        if metadata.is_file() {
            let name = format!("{}@file", group_of_file(&identity, path));
            return Ok(Self { name, identity, born_ns: identity.born_ns, owner, is_public });
        }
        let device = metadata.rdev();
        let partition = history::partition(device).map_or_else(String::new, |number| format!("-part{number}"));
        let place = |name, born_ns| Self { name, identity, born_ns, owner, is_public };
        if let Some(on) = sys::block::loop_file(file) {
            let (born_ns, path) = match history::file_behind(device, on) {
                Some((behind, path)) => (sys::file::birth_ns(&behind), path),
                None => (0, PathBuf::new()),
            };
            let group = group_of_file(&ImageId { device: on.device, inode: on.inode, born_ns }, &path);
            return Ok(place(format!("{group}@loop-{:x}+{:x}{partition}", on.offset, on.size_limit), born_ns));
        }
        let group = match history::stable_name(device) {
            Some(name) => name_of_file(&name),
            // The sequence number of a partition is that of its disk.
            None if identity.inode != 0 => format!("disk-{:x}", identity.inode),
            None => return Ok(place(format!("device-{device:x}@disk"), 0)),
        };
        Ok(place(format!("{group}@disk{partition}"), 0))
    }

    /// The record of the image's last tenure on this host since its boot.
    pub(super) fn last(&self) -> LastTenure {
        let mut last: Option<Written> = None;
        for directory in self.trusted_directories() {
            match self.read(&directory, &self.name) {
                Ok(Some(found)) if last.as_ref().is_none_or(|last| last.rank() < found.rank()) => last = Some(found),
                Ok(_) => {}
                // The record of another user cannot be repaired by a take-over.
                Err(e) if e.kind() == io::ErrorKind::InvalidData && directory.owner == effective_uid() => {
                    return LastTenure::Unreadable(e.to_string());
                }
                Err(e) => log::debug!("record {}: {e}", self.name),
            }
        }
        // The identity of a device changes when it is attached again.
        let ImageId { inode, born_ns, .. } = self.identity;
        last.map_or(LastTenure::None, |last| LastTenure::Recorded(Record { inode, born_ns, ..last.record }))
    }

    /// The open tenures of other images that may share bytes with this one: a file and the loop devices on it, or a
    /// disk and its partitions. With the names of their records.
    fn overlapping(&self) -> Vec<(String, Record)> {
        let mut last: Vec<(String, Written)> = Vec::new();
        // The owner of a partition is not trusted with records of its disk.
        let is_trusted = |directory: &Directory| [0, effective_uid()].contains(&directory.owner);
        for directory in self.trusted_directories().filter(is_trusted) {
            for name in names_in(&directory.path).into_iter().filter(|name| may_overlap(name, &self.name)) {
                let Ok(Some(found)) = self.read(&directory, &name) else { continue };
                match last.iter_mut().find(|(known, _)| *known == name) {
                    Some((_, known)) if known.rank() < found.rank() => *known = found,
                    Some(_) => {}
                    None => last.push((name, found)),
                }
            }
        }
        let records = last.into_iter().map(|(name, last)| (name, last.record));
        records.filter(|(_, record)| record.state == TenureState::Open).collect()
    }

    /// The records of the open tenures of other images that may share bytes with this one.
    pub(super) fn overlapping_tenures(&self) -> Vec<Record> {
        self.overlapping().into_iter().map(|(_, record)| record).collect()
    }

    /// Ends those tenures in this state.
    ///
    /// # Errors
    /// As [`HostRecord::write`].
    pub(super) fn end_overlapping_tenures(&self, state: TenureState) -> io::Result<()> {
        self.overlapping().into_iter().try_for_each(|(name, record)| write(&name, &Record { state, ..record }))
    }

    /// Writes the record of a tenure.
    ///
    /// # Errors
    /// The last error, if it cannot be written to any directory of this user.
    pub(super) fn write(&self, record: &Record) -> io::Result<()> {
        write(&self.name, &Record { born_ns: self.born_ns, ..record.clone() })
    }

    /// A record of this boot, and of a file that was created at the same time.
    fn read(&self, directory: &Directory, name: &str) -> io::Result<Option<Written>> {
        let Some(found) = directory.read(name)? else { return Ok(None) };
        let born_ns = found.record.born_ns;
        Ok((born_ns == self.born_ns || born_ns == 0 || self.born_ns == 0).then_some(found))
    }

    fn trusted_directories(&self) -> impl Iterator<Item = Directory> {
        let users = [0, effective_uid(), self.owner];
        let found = directories().into_iter().filter_map(|path| Directory::open(&path).ok());
        found.filter(move |directory| self.is_public || users.contains(&directory.owner))
    }
}

/// Ends the open tenure with this ID in this state, if a record of this user has it. For an image that cannot be
/// opened. Returns whether there is one.
///
/// => Nothing is copied from the record of another user, who could have made it for any image.
///
/// # Errors
/// As [`HostRecord::write`].
pub(super) fn end(tenure: TenureId, state: TenureState) -> io::Result<bool> {
    for directory in own_directories().iter().filter_map(|path| Directory::open(path).ok()) {
        if directory.owner != effective_uid() {
            continue;
        }
        for name in names_in(&directory.path) {
            match directory.read(&name) {
                Ok(Some(Written { record, .. })) if record.tenure == tenure && record.state == TenureState::Open => {
                    return write(&name, &Record { state, ..record }).map(|()| true);
                }
                _ => {}
            }
        }
    }
    Ok(false)
}

/// A record, and when it was written.
struct Written {
    record: Record,
    at: SystemTime,
}

impl Written {
    /// Later records have higher ranks.
    ///
    /// => A tenure that has ended continues if a daemon restores its cache, and that daemon may not be able to write to
    ///    each directory in which the end is recorded (`ProtectSystem=strict`, another mount namespace).
    fn rank(&self) -> (u64, SystemTime, bool) {
        (self.record.tenure.generation, self.at, self.record.state == TenureState::Open)
    }
}

/// Whether records of these names are of two images that may share bytes.
fn may_overlap(one: &str, other: &str) -> bool {
    let (Some((first_group, first)), Some((second_group, second))) = (one.split_once('@'), other.split_once('@'))
    else {
        return false;
    };
    let are_partitions = [first, second].iter().all(|member| member.contains("-part"));
    let are_apart = match (range_of(first), range_of(second)) {
        (Some([start, len]), Some([other_start, other_len])) => {
            let ends_before = |len: u64, start: u64, other: u64| len > 0 && start.saturating_add(len) <= other;
            ends_before(len, start, other_start) || ends_before(other_len, other_start, start)
        }
        _ => false,
    };
    first_group == second_group && first != second && !are_partitions && !are_apart
}

/// First byte and length of a loop device in its file; length 0: up to the end of the file.
fn range_of(member: &str) -> Option<[u64; 2]> {
    let range = member.strip_prefix("loop-")?.split('-').next()?;
    let (start, len) = range.split_once('+')?;
    Some([u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(len, 16).ok()?])
}

/// The group of a file and the loop devices on it.
///
/// => Without creation times, a file of another file system soon has the same numbers: the next one that is mounted may
///    get the same device number. There the path takes the place of that number.
fn group_of_file(ImageId { device, inode, born_ns }: &ImageId, path: &Path) -> String {
    match born_ns {
        0 => format!("file-{}-{inode:x}", name_of_file(&path.to_string_lossy())),
        _ => format!("file-{device:x}-{inode:x}"),
    }
}

/// A name for files, which is different for each text.
fn name_of_file(text: &str) -> String {
    const CHARS_MAX: usize = 100;
    let shown: String = text.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).take(CHARS_MAX).collect();
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    for byte in text.bytes() {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    format!("{shown}-{hash:016x}")
}

/// For tests: a directory in place of /run and /dev/shm (`GENBLK_TEST_TENURES`). Only a binary with debug assertions
/// reads the variable.
fn test_directory() -> Option<PathBuf> {
    if cfg!(debug_assertions) { std::env::var_os("GENBLK_TEST_TENURES").map(PathBuf::from) } else { None }
}

/// The directories to which this user's records are written.
fn own_directories() -> Vec<PathBuf> {
    let user = effective_uid();
    if let Some(directory) = test_directory() {
        return vec![directory.join(format!("{DIRECTORY_OF_USER}{user}"))];
    }
    let shared = [(RUN, DIRECTORY_IN_RUN), (SHARED_MEMORY, DIRECTORY_OF_USER)];
    let shared = shared.map(|(parent, prefix)| Path::new(parent).join(format!("{prefix}{user}")));
    runtime_directory(user).into_iter().chain(shared).collect()
}

/// The directory of records in a user's runtime directory, if the user has one.
fn runtime_directory(user: u32) -> Option<PathBuf> {
    let directory = PathBuf::from(format!("/run/user/{user}"));
    directory.is_dir().then(|| directory.join("genblk/tenures"))
}

/// The directories of all users' records, as far as this user may list them.
fn directories() -> Vec<PathBuf> {
    let named = |parent: &Path, prefix: &str| -> Vec<PathBuf> {
        names_in(parent).iter().filter(|name| name.starts_with(prefix)).map(|name| parent.join(name)).collect()
    };
    if let Some(directory) = test_directory() {
        return named(&directory, DIRECTORY_OF_USER);
    }
    let users = names_in(Path::new("/run/user"));
    let runtime = users.iter().filter_map(|user| runtime_directory(user.parse().ok()?));
    let shared = [(RUN, DIRECTORY_IN_RUN), (SHARED_MEMORY, DIRECTORY_OF_USER)];
    runtime.chain(shared.iter().flat_map(|(parent, prefix)| named(Path::new(parent), prefix))).collect()
}

fn names_in(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

/// An open directory of records, in which only its owner can create files.
struct Directory {
    file: File,
    path: PathBuf,
    owner: u32,
}

impl Directory {
    fn open(path: &Path) -> io::Result<Self> {
        let flags = libc::O_DIRECTORY | libc::O_NOFOLLOW;
        let file = fs::OpenOptions::new().read(true).custom_flags(flags).open(path)?;
        let metadata = file.metadata()?;
        if metadata.mode() & WRITABLE_BY_OTHERS != 0 {
            return Err(io::Error::other(format!("other users can write to {}", path.display())));
        }
        Ok(Self { file, path: path.to_path_buf(), owner: metadata.uid() })
    }

    /// This user's directory at `path`, which is created if needed. Others may list it, whatever the umask.
    fn create(path: &Path) -> io::Result<Self> {
        for new in path.parent().into_iter().chain([path]).filter(|path| !path.exists()) {
            fs::create_dir_all(new)?;
            fs::set_permissions(new, Permissions::from_mode(LISTED_BY_ALL))?;
        }
        let directory = Self::open(path)?;
        if directory.owner != effective_uid() {
            return Err(io::Error::other(format!("{} belongs to user {}", path.display(), directory.owner)));
        }
        directory.file.set_permissions(Permissions::from_mode(LISTED_BY_ALL))?;
        Ok(directory)
    }

    /// A record of this boot; `None` if there is none of this name.
    fn read(&self, name: &str) -> io::Result<Option<Written>> {
        let file = match open_at(&self.file, name.as_ref(), OpenMode::Read) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            file => file?,
        };
        let metadata = file.metadata()?;
        if !metadata.is_file() || metadata.uid() != self.owner || metadata.mode() & WRITABLE_BY_OTHERS != 0 {
            return Err(io::Error::other("another user could have created or can change it"));
        }
        let (mut bytes, at) = (Vec::new(), metadata.modified()?);
        file.take(BYTES_MAX as u64 + 1).read_to_end(&mut bytes)?;
        let record = Record::decode(&bytes).map_err(|why| {
            let shown = self.path.join(name);
            io::Error::new(io::ErrorKind::InvalidData, format!("{}: {why}", shown.display()))
        })?;
        let is_of_this_boot = Boot::current().relation_to(record.boot) == BootRelation::SameBoot;
        Ok(is_of_this_boot.then_some(Written { record, at }))
    }

    /// Replaces a record. A daemon that dies meanwhile leaves the old one.
    fn write(&self, name: &str, record: &Record) -> io::Result<()> {
        self.make_room()?;
        let new = format!(".{name}");
        let _ = unlink_at(&self.file, new.as_ref());
        let mut file = open_at(&self.file, new.as_ref(), OpenMode::CreateNew)?;
        let written = file
            .write_all(&record.encode())
            .and_then(|()| file.set_permissions(Permissions::from_mode(0o644)))
            .and_then(|()| rename_at(&self.file, new.as_ref(), name.as_ref()));
        written.inspect_err(|_| drop(unlink_at(&self.file, new.as_ref())))
    }

    /// Removes old records of tenures that have ended, if there are too many.
    fn make_room(&self) -> io::Result<()> {
        let names = names_in(&self.path);
        if names.len() < RECORDS_MAX {
            return Ok(());
        }
        let has_ended = |name: &String| match self.read(name) {
            Ok(found) => found.is_none_or(|found| found.record.state == TenureState::Clean),
            Err(_) => false,
        };
        let changed = |name: &String| fs::metadata(self.path.join(name)).and_then(|found| found.modified()).ok();
        let mut ended: Vec<String> = names.into_iter().filter(has_ended).collect();
        ended.sort_by_key(changed);
        ended.iter().take(RECORDS_MAX / 10).try_for_each(|name| unlink_at(&self.file, name.as_ref()))
    }
}

/// Writes a record to each directory of this user, so that the loss of one does no harm.
fn write(name: &str, record: &Record) -> io::Result<()> {
    let mut result = Err(io::ErrorKind::NotFound.into());
    for path in own_directories() {
        let failed = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", path.display()));
        let written = Directory::create(&path).and_then(|directory| {
            // An older record of the tenure must not contradict the one in another directory.
            directory.write(name, record).inspect_err(|_| drop(unlink_at(&directory.file, name.as_ref())))
        });
        match written {
            Ok(()) => result = Ok(()),
            Err(e) => result = result.or(Err(failed(e))),
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(state: TenureState) -> Record {
        let tenure = TenureId { generation: 1, id: 2 };
        let cache = crate::tenure::record::CacheLocation::Memory;
        Record { tenure, state, since: 1, boot: Boot::current(), inode: 3, born_ns: 4, cache }
    }

    #[test]
    fn a_tenure_that_continues_is_open_although_its_end_is_recorded_elsewhere() {
        let at = |seconds| SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
        let written = |state, seconds| Written { record: record(state), at: at(seconds) };
        let (clean, open) = (written(TenureState::Clean, 10), written(TenureState::Open, 20));
        assert!(open.rank() > clean.rank());
        assert!(written(TenureState::Clean, 30).rank() > open.rank());
        let mut later = written(TenureState::Clean, 5);
        later.record.tenure.generation = 2;
        assert!(later.rank() > open.rank());
    }

    #[test]
    fn every_user_may_list_a_directory_of_records() {
        let parent = std::env::temp_dir().join(format!("genblk-records-{}", std::process::id()));
        let path = parent.join("of-user");
        for _ in 0..2 {
            let directory = Directory::create(&path).unwrap();
            directory.write("image", &record(TenureState::Open)).unwrap();
            assert_eq!(directory.read("image").unwrap().unwrap().record, record(TenureState::Open));
            for path in [&parent, &path] {
                assert_eq!(fs::metadata(path).unwrap().mode() & 0o777, LISTED_BY_ALL);
            }
            fs::set_permissions(&path, Permissions::from_mode(0o700)).unwrap();
        }
        fs::remove_dir_all(parent).unwrap();
    }

    #[test]
    fn images_overlap_if_they_share_bytes_of_a_file_or_of_a_disk() {
        for (one, other, expected) in [
            ("file-1-2@file", "file-1-2@loop-0+0", true),
            ("file-1-2@file", "file-1-2@loop-1000+0-part1", true),
            ("file-1-2@file", "file-1-3@loop-0+0", false),
            ("file-1-2@loop-0+0", "file-1-2@loop-0+0", false),
            ("file-1-2@loop-0+1000", "file-1-2@loop-1000+0", false),
            ("file-1-2@loop-0+1001", "file-1-2@loop-1000+0", true),
            ("disk-9@disk", "disk-9@disk-part1", true),
            ("disk-9@disk-part1", "disk-9@disk-part2", false),
        ] {
            assert_eq!((may_overlap(one, other), may_overlap(other, one)), (expected, expected), "{one} {other}");
        }
    }
}
