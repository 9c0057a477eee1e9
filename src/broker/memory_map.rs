//! Determines how a process has mapped a file, from its memory map (proc_pid_maps(5)).

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::fs::MetadataExt;

/// Most bytes of a memory map that are read. QEMU's takes some 100 KiB; a process that wants to occupy the supervisor
/// can have 65 530 mappings with paths of 4 KiB each.
const MAP_BYTES_MAX: u64 = 4 << 20;

/// Whether process `pid` has mapped `file` privately at `address`: its writes then do not reach the file, and the
/// contents of the file are not the guest's memory.
///
/// => False if that cannot be determined: the process is in another PID namespace or belongs to another user, the
///    front-end has no mapping at the address that it sent, or too many before it.
pub(super) fn is_private(pid: u32, address: u64, file: &File) -> bool {
    let mapping = File::open(format!("/proc/{pid}/maps")).and_then(|maps| find(maps, address));
    let (Ok(Some(mapping)), Ok(metadata)) = (mapping, file.metadata()) else { return false };
    mapping.identity == (metadata.dev(), metadata.ino()) && mapping.private
}

/// The mapping at an address, if it is in the first [`MAP_BYTES_MAX`] bytes of a memory map.
fn find(maps: impl Read, address: u64) -> io::Result<Option<MappedRange>> {
    let mut lines = BufReader::new(maps.take(MAP_BYTES_MAX));
    let mut line = Vec::new();
    while lines.read_until(b'\n', &mut line)? > 0 {
        let mapping = str::from_utf8(&line).ok().and_then(MappedRange::parse);
        if let Some(mapping) = mapping.filter(|mapping| mapping.range.end > address) {
            // The lines are in the order of the addresses.
            return Ok(mapping.range.contains(&address).then_some(mapping));
        }
        line.clear();
    }
    Ok(None)
}

/// A line of /proc/PID/maps.
#[derive(Debug, PartialEq, Eq)]
struct MappedRange {
    range: std::ops::Range<u64>,
    private: bool,
    /// Device and inode of the file.
    identity: (u64, u64),
}

impl MappedRange {
    /// Parses `START-END PERMISSIONS OFFSET MAJOR:MINOR INODE PATH` (proc_pid_maps(5)).
    fn parse(line: &str) -> Option<Self> {
        let mut words = line.split_ascii_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let private = words.next()?.ends_with('p');
        let (major, minor) = words.nth(1)?.split_once(':')?;
        let inode = words.next()?.parse().ok()?;
        let hex = |text: &str| u64::from_str_radix(text, 16).ok();
        let number = |text: &str| u32::from_str_radix(text, 16).ok();
        Some(Self {
            range: hex(start)?..hex(end)?,
            private,
            identity: (libc::makedev(number(major)?, number(minor)?), inode),
        })
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

    use super::*;
    use crate::sys::memfd;

    #[test]
    fn private_and_shared_mappings_are_distinguished() {
        const BYTES: usize = 1 << 20;
        let (memory, other) = (memfd::create(c"test").unwrap(), memfd::create(c"other").unwrap());
        [&memory, &other].into_iter().for_each(|file| file.set_len(BYTES as u64).unwrap());
        let file = |file: &File| Some(FileOffset::new(file.try_clone().unwrap(), 0));
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let pid = std::process::id();
        for (flags, private) in [(libc::MAP_SHARED, false), (libc::MAP_PRIVATE, true)] {
            let region: MmapRegion<()> = MmapRegion::build(file(&memory), BYTES, protection, flags).unwrap();
            let slice = region.get_slice(BYTES / 2, 1).unwrap();
            let address = slice.ptr_guard().as_ptr().addr() as u64;
            assert_eq!(is_private(pid, address, &memory), private);
            assert!(!is_private(pid, address, &other), "another file: the address is not that of its mapping");
        }
        assert!(!is_private(pid, 16, &memory) && !is_private(0, 16, &memory));
    }

    #[test]
    fn a_long_memory_map_is_read_only_in_part() {
        let line = |n: u64| format!("{:x}-{:x} rw-p 0 00:01 {n} /{}\n", n << 12, (n + 1) << 12, "x".repeat(4000));
        let map: String = (1..3000).map(line).collect();
        let inode = |page: u64| find(map.as_bytes(), page << 12).unwrap().map(|mapping| mapping.identity.1);
        assert_eq!([1, 1000].map(inode), [Some(1), Some(1000)]);
        assert_eq!([0, 2000].map(inode), [None, None]);
    }

    #[test]
    fn a_line_of_proc_maps_is_parsed() {
        let line = "7f00c0000000-7f00d0000000 rw-p 00001000 00:01 4242                 /memfd:my ram (deleted)";
        let range = 0x7f00_c000_0000..0x7f00_d000_0000;
        assert_eq!(MappedRange::parse(line), Some(MappedRange { range, private: true, identity: (1, 4242) }));
        for line in ["", "7f00", "7f00-8000 rw-s", "x-y rw-p 0 00:00 0"] {
            assert_eq!(MappedRange::parse(line), None, "{line}");
        }
    }
}
