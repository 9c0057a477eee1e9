//! The record of an image's last tenure, in the image's extended attribute `user.genblk.tenure`.
//!
//! It is text, with a key and a value per line, in a fixed order. Every daemon on every host that can open the image
//! reads it before serving the image. A record that cannot be read completely is an error, never "no record": with an
//! open tenure, some cache may hold writes that are not on the image.

use std::ffi::{CStr, OsString};
use std::fmt::Write;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use super::TenureId;
use super::host::Boot;

/// Name of the attribute.
pub const ATTRIBUTE: &CStr = c"user.genblk.tenure";
/// Longest record in bytes: some file systems store all attributes of a file in one block of 4 KiB.
pub const BYTES_MAX: usize = 2048;
/// Longest path of a cache in a record, in bytes.
const PATH_BYTES_MAX: usize = 1024;
/// First line of a record in this version of the format.
const VERSION_LINE: &str = "genblk-tenure 1";
/// Prefix of the place of a cache in the service manager's fd store.
const FDSTORE_PREFIX: &[u8] = b"fdstore:";

/// Whether a tenure has ended cleanly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TenureState {
    /// It has not: its cache may hold completed writes that are not on the image.
    Open,
    /// It has ended: everything is on the image.
    Clean,
    /// The operator has ended it: completed writes may be lost, and a guest that is still running must get errors.
    Forfeited,
}

impl TenureState {
    const ALL: [Self; 3] = [Self::Open, Self::Clean, Self::Forfeited];

    /// The word in the record. All words have the same length, so a change of state needs no space on a full disk.
    fn word(self) -> &'static str {
        match self {
            Self::Open => "open-----",
            Self::Clean => "clean----",
            Self::Forfeited => "forfeited",
        }
    }
}

/// The place of a tenure's cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CacheLocation {
    /// In a file at this path.
    Path(PathBuf),
    /// In the service manager's fd store under this name.
    FdStore(String),
    /// In memory that does not outlive the daemon.
    Memory,
}

/// The record of a tenure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The tenure.
    pub tenure: TenureId,
    /// Whether it has ended.
    pub state: TenureState,
    /// The time of its start, in seconds since 1970.
    pub since: u64,
    /// The host and boot on which its daemon ran.
    pub boot: Boot,
    /// Inode number of the image, because a copy of the image has the record too.
    pub inode: u64,
    /// Creation time of the image in nanoseconds since 1970; 0 if its file system does not record it.
    pub born_ns: u64,
    /// The place of its cache.
    pub cache: CacheLocation,
}

impl Record {
    /// The record as bytes.
    pub fn encode(&self) -> Vec<u8> {
        let Self { tenure, state, since, boot, inode, born_ns, cache } = self;
        let mut text = format!("{VERSION_LINE}\n");
        let mut line = |key: &str, value: String| writeln!(text, "{key} {value}").expect("a String takes any text");
        line("generation", tenure.generation.to_string());
        line("id", format!("{:032x}", tenure.id));
        line("state", state.word().to_owned());
        line("since", since.to_string());
        line("host", format!("{:032x}", boot.machine));
        line("boot", format!("{:032x}", boot.boot));
        line("inode", inode.to_string());
        line("born", born_ns.to_string());
        let mut bytes = text.into_bytes();
        bytes.extend(b"cache ");
        match cache {
            CacheLocation::Path(path) => {
                let path = path.as_os_str().as_bytes();
                bytes.extend(&path[..path.len().min(PATH_BYTES_MAX)]);
            }
            CacheLocation::FdStore(name) => bytes.extend([FDSTORE_PREFIX, name.as_bytes()].concat()),
            CacheLocation::Memory => bytes.extend(b"memory"),
        }
        // Last, because a path may contain any byte.
        bytes.push(b'\n');
        bytes
    }

    /// Reads a record.
    ///
    /// # Errors
    /// The problem with it.
    pub fn decode(bytes: &[u8]) -> Result<Self, String> {
        let mut lines = Lines(bytes);
        let version = lines.next()?;
        if version != VERSION_LINE.as_bytes() {
            let version = String::from_utf8_lossy(version);
            return Err(format!("it begins with {version:?}, but this version supports only {VERSION_LINE:?}"));
        }
        let generation = lines.decimal("generation")?;
        let id = lines.hexadecimal("id")?;
        let state = lines.value("state")?;
        let state =
            TenureState::ALL.into_iter().find(|known| known.word().as_bytes() == state).ok_or("unknown state")?;
        let since = lines.decimal("since")?;
        let boot = Boot { machine: lines.hexadecimal("host")?, boot: lines.hexadecimal("boot")? };
        let (inode, born_ns) = (lines.decimal("inode")?, lines.decimal("born")?);
        let place = lines.0.strip_prefix(b"cache ").and_then(|rest| rest.strip_suffix(b"\n"));
        let place = place.ok_or("it does not end with a line for the cache")?;
        let cache = if let Some(name) = place.strip_prefix(FDSTORE_PREFIX) {
            let name = std::str::from_utf8(name).map_err(|_| "the name of an fd-store entry is not UTF-8")?;
            CacheLocation::FdStore(name.to_owned())
        } else if place == b"memory" {
            CacheLocation::Memory
        } else if place.starts_with(b"/") && !place.contains(&0) {
            CacheLocation::Path(OsString::from_vec(place.to_vec()).into())
        } else {
            return Err("the cache is neither an absolute path nor an fd-store entry nor \"memory\"".to_owned());
        };
        let tenure = TenureId { generation, id };
        Ok(Self { tenure, state, since, boot, inode, born_ns, cache })
    }
}

/// The remaining lines of a record.
struct Lines<'a>(&'a [u8]);

impl<'a> Lines<'a> {
    fn next(&mut self) -> Result<&'a [u8], String> {
        let end = self.0.iter().position(|&byte| byte == b'\n').ok_or("it ends within a line")?;
        let line = &self.0[..end];
        self.0 = &self.0[end + 1..];
        Ok(line)
    }

    fn value(&mut self, key: &str) -> Result<&'a [u8], String> {
        let line = self.next()?;
        let value = line.strip_prefix(key.as_bytes()).and_then(|rest| rest.strip_prefix(b" "));
        value.ok_or_else(|| format!("found {:?} instead of the line {key:?}", String::from_utf8_lossy(line)))
    }

    fn decimal(&mut self, key: &str) -> Result<u64, String> {
        let value = self.value(key)?;
        let is_decimal = !value.is_empty() && value.iter().all(u8::is_ascii_digit);
        let number = std::str::from_utf8(value).ok().filter(|_| is_decimal).and_then(|text| text.parse().ok());
        number.ok_or_else(|| format!("{key} is not a number: {:?}", String::from_utf8_lossy(value)))
    }

    fn hexadecimal(&mut self, key: &str) -> Result<u128, String> {
        let value = self.value(key)?;
        let is_hexadecimal = value.len() == 32 && value.iter().all(u8::is_ascii_hexdigit);
        let text = std::str::from_utf8(value).ok().filter(|_| is_hexadecimal);
        let number = text.and_then(|text| u128::from_str_radix(text, 16).ok());
        number.ok_or_else(|| format!("{key} is not a number of 32 digits: {:?}", String::from_utf8_lossy(value)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(state: TenureState, cache: CacheLocation) -> Record {
        Record {
            tenure: TenureId { generation: 7, id: 0xabc },
            state,
            since: 1_764_459_600,
            boot: Boot { machine: 1, boot: u128::MAX },
            inode: 12,
            born_ns: u64::MAX,
            cache,
        }
    }

    #[test]
    fn an_encoded_tenure_record_decodes_to_itself() {
        let odd = PathBuf::from(OsString::from_vec(b"/dev/shm/\xff a\nb".to_vec()));
        for state in TenureState::ALL {
            for cache in
                [CacheLocation::Path(odd.clone()), CacheLocation::FdStore("a-b".to_owned()), CacheLocation::Memory]
            {
                let record = record(state, cache);
                assert_eq!(Record::decode(&record.encode()), Ok(record));
            }
        }
    }

    #[test]
    fn a_change_of_state_keeps_the_length_of_the_record() {
        let lengths = TenureState::ALL.map(|state| record(state, CacheLocation::Memory).encode().len());
        assert!(lengths.iter().all(|&length| length == lengths[0]), "{lengths:?}");
        let long = CacheLocation::Path(format!("/{}", "x".repeat(5000)).into());
        assert!(record(TenureState::Open, long).encode().len() <= BYTES_MAX);
    }

    /// Any damaged record is refused, or is another valid record: never "no record", and never a panic.
    #[test]
    fn damaged_records_are_refused() {
        let bytes = record(TenureState::Open, CacheLocation::Path("/dev/shm/genblk/1-2-3-4".into())).encode();
        for end in 0..bytes.len() {
            assert!(Record::decode(&bytes[..end]).is_err(), "the first {end} bytes");
        }
        for at in 0..bytes.len() {
            for value in [0, b'\n', b' ', b'/', b'9', b'z', 0xff] {
                let mut damaged = bytes.clone();
                damaged[at] = value;
                if let Ok(record) = Record::decode(&damaged) {
                    assert_eq!(record.encode(), damaged, "byte {at} changed to {value}");
                }
            }
        }
        let newer = String::from_utf8(bytes).unwrap().replace("genblk-tenure 1", "genblk-tenure 2");
        assert!(Record::decode(newer.as_bytes()).unwrap_err().contains("genblk-tenure 2"));
    }
}
