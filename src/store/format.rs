//! Formats that are not raw, recognised by their magic numbers.
//!
//! genblk presents the bytes of an image to the guest unchanged: it never interprets a format. A qcow2 or gzip file
//! served that way is a disk of garbage, and the guest's first mkfs destroys the contents of the file. So such an image
//! is rejected unless the configuration declares it as raw. A guest may write such a magic number to its own raw disk
//! (a disk that is encrypted as a whole begins with a LUKS header); `raw_record.rs` records that.
//!
//! Offsets and values are those of QEMU's drivers (block/*.c), of the specifications (VHDX: MS-VHDX; UDIF), and of
//! file(1).

use std::fmt;
use std::path::{Path, PathBuf};

use crate::units::SECTOR_BYTES;

/// Number of bytes at the start of an image that suffice to recognise a format.
pub const HEAD_BYTES: usize = 4096;
/// Number of bytes needed at the end: a VHD footer, or a UDIF trailer.
pub const TAIL_BYTES: usize = 512;

/// A format that is not raw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// A disk image that qemu-img converts, by QEMU's name of the driver.
    Disk { name: &'static str, driver: &'static str },
    /// A LUKS container: qemu-img converts it with its key.
    Luks,
    /// A compressed file, with the command that unpacks it to standard output.
    Packed { name: &'static str, unpack: &'static str },
    /// An archive, which may hold several files, with the command that unpacks them.
    Archive { name: &'static str, unpack: &'static str },
    /// An Android sparse image.
    AndroidSparse,
}

use Format::{AndroidSparse, Archive, Disk, Luks, Packed};

const QCOW2: Format = Disk { name: "qcow2", driver: "qcow2" };
const QCOW1: Format = Disk { name: "qcow (version 1)", driver: "qcow" };
const QED: Format = Disk { name: "QED", driver: "qed" };
const VMDK: Format = Disk { name: "VMDK", driver: "vmdk" };
const VHDX: Format = Disk { name: "VHDX", driver: "vhdx" };
const VHD: Format = Disk { name: "VHD", driver: "vpc" };
const VDI: Format = Disk { name: "VDI", driver: "vdi" };
const PARALLELS: Format = Disk { name: "Parallels", driver: "parallels" };
const CLOOP: Format = Disk { name: "cloop", driver: "cloop" };
const BOCHS: Format = Disk { name: "Bochs", driver: "bochs" };
const DMG: Format = Disk { name: "Apple disk (DMG)", driver: "dmg" };
const TAR: Format = Archive { name: "tar", unpack: "tar -xvf" };

/// Formats that are identified by a fixed string at or near the start: offset, string, format.
const MAGICS: &[(usize, &[u8], Format)] = &[
    (0, b"QFI\xfb\0\0\0\x01", QCOW1),
    (0, b"QFI\xfb", QCOW2),
    (0, b"QED\0", QED),
    (0, b"KDMV", VMDK),
    (0, b"COWD", VMDK),
    // SESparse: the constant magic number, little-endian.
    (0, b"\xbe\xba\xfe\xca\0\0\0\0", VMDK),
    (0, b"vhdxfile", VHDX),
    (0, b"conectix", VHD),
    (0x40, b"\x7f\x10\xda\xbe", VDI),
    (0, b"WithoutFreeSpace", PARALLELS),
    (0, b"WithouFreSpacExt", PARALLELS),
    (0, b"#!/bin/sh\n#V2.0 Format\n", CLOOP),
    (0, b"Bochs Virtual HD Image", BOCHS),
    (0, b"encrcdsa", DMG),
    (0, b"LUKS\xba\xbe", Luks),
    // The copy of the LUKS2 header, which cryptsetup uses when the first one is damaged.
    (0, b"SKUL\xba\xbe", Luks),
    (0, b"\x3a\xff\x26\xed\x01\0", AndroidSparse),
    (0, b"\x1f\x8b\x08", Packed { name: "gzip", unpack: "gzip -dc" }),
    (0, b"\x1f\x9d\x90", Packed { name: "compress", unpack: "gzip -dc" }),
    (0, b"\xfd7zXZ\0", Packed { name: "xz", unpack: "xz -dc" }),
    (0, b"\x28\xb5\x2f\xfd", Packed { name: "zstd", unpack: "zstd -dc" }),
    (0, b"\x04\x22\x4d\x18", Packed { name: "lz4", unpack: "lz4 -dc" }),
    (0, b"\x89LZO\0\r\n\x1a\n", Packed { name: "lzop", unpack: "lzop -dc" }),
    (0, b"LZIP\x01", Packed { name: "lzip", unpack: "lzip -dc" }),
    (0, b"PK\x03\x04", Archive { name: "zip", unpack: "unzip" }),
    (0, b"7z\xbc\xaf\x27\x1c", Archive { name: "7z", unpack: "7z x" }),
    (0, b"Rar!\x1a\x07", Archive { name: "rar", unpack: "unrar x" }),
    (257, b"ustar\0", TAR),
    (257, b"ustar  \0", TAR),
];

/// The format found in an image, if it is not raw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// Its format.
    pub format: Format,
    /// Size of the disk in it, in bytes, if its header contains that.
    pub virtual_bytes: Option<u64>,
}

/// The format of an image of `bytes` bytes with these first bytes ([`HEAD_BYTES`] of them, or all) and these last bytes
/// ([`TAIL_BYTES`]); `None`: no other format is recognised, so it counts as raw. `read` returns eight-byte words
/// elsewhere in the image.
pub fn detect(bytes: u64, head: &[u8], tail: &[u8], read: &dyn Fn(u64) -> Option<u64>) -> Option<Found> {
    let format = at_start(head).or_else(|| at_end(tail))?;
    let size = match format {
        Luks => luks_bytes(head, bytes),
        _ => virtual_bytes(format, head, tail, read),
    };
    Some(Found { format, virtual_bytes: size.filter(|size| *size > 0) })
}

/// The number of its `bytes` that a LUKS container of version 1 has for data. Version 2 stores that in a text that is
/// not parsed.
fn luks_bytes(head: &[u8], bytes: u64) -> Option<u64> {
    let payload = (read_be(head, 6, 2)? == 1).then(|| read_be(head, 104, 4))??;
    bytes.checked_sub(payload * SECTOR_BYTES)
}

/// The format according to the first bytes of an image.
pub fn at_start(head: &[u8]) -> Option<Format> {
    let is_at = |at: usize, magic: &[u8]| head.get(at..).is_some_and(|rest| rest.starts_with(magic));
    if let Some((_, _, format)) = MAGICS.iter().find(|(at, magic, _)| is_at(*at, magic)) {
        return Some(*format);
    }
    // "BZh", the block size, and the first block's magic number (or that of an empty file).
    let is_bzip2 = is_at(0, b"BZh") && (is_at(4, b"1AY&SY") || is_at(4, b"\x17\x72\x45\x38\x50\x90"));
    if is_bzip2 {
        return Some(Packed { name: "bzip2", unpack: "bzip2 -dc" });
    }
    is_vmdk_descriptor(head).then_some(VMDK)
}

/// The format according to the last bytes of an image: a fixed VHD has a footer and no header, a DMG a trailer.
pub fn at_end(tail: &[u8]) -> Option<Format> {
    if tail.len() < TAIL_BYTES {
        return None;
    }
    // Old versions of Virtual PC wrote a footer of 511 bytes.
    if (0..=1).any(|at| is_vhd_footer(&tail[at..])) {
        return Some(VHD);
    }
    // The length of the trailer follows its magic number.
    (tail.starts_with(b"koly") && read_be(tail, 8, 4) == Some(512)).then_some(DMG)
}

/// Whether a VHD footer starts here: its cookie, and a type from fixed (2) to differencing (4).
fn is_vhd_footer(bytes: &[u8]) -> bool {
    bytes.starts_with(b"conectix") && matches!(read_be(bytes, 60, 4), Some(2..=4))
}

/// Whether it is the text file that describes a VMDK: its first line after comments and empty lines is the version.
fn is_vmdk_descriptor(head: &[u8]) -> bool {
    let lines = head.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii);
    let mut lines = lines.skip_while(|line| line.is_empty() || line.starts_with(b"#"));
    let is_version = |line: &[u8]| matches!(line, b"version=1" | b"version=2" | b"version=3");
    head.starts_with(b"# Disk DescriptorFile") || head.starts_with(b"#") && lines.next().is_some_and(is_version)
}

/// A big-endian number of `len` bytes.
fn read_be(bytes: &[u8], at: usize, len: usize) -> Option<u64> {
    Some(bytes.get(at..at + len)?.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)))
}

/// A little-endian number of `len` bytes.
fn read_le(bytes: &[u8], at: usize, len: usize) -> Option<u64> {
    Some(bytes.get(at..at + len)?.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
}

/// The size of the disk in an image, if its header contains that.
fn virtual_bytes(format: Format, head: &[u8], tail: &[u8], read: &dyn Fn(u64) -> Option<u64>) -> Option<u64> {
    let sectors = |count: Option<u64>| count?.checked_mul(SECTOR_BYTES);
    match format {
        QCOW2 | QCOW1 => read_be(head, 24, 8),
        QED => read_le(head, 48, 8),
        VMDK if head.starts_with(b"KDMV") => sectors(read_le(head, 12, 8)),
        VMDK if head.starts_with(b"COWD") => sectors(read_le(head, 12, 4)),
        VMDK if head.starts_with(b"#") => sectors(vmdk_sectors(head)),
        VMDK => sectors(read_le(head, 16, 8)),
        VHDX => vhdx_bytes(read),
        // The current size, in the footer or its copy at the start. An old footer of 511 bytes starts one byte later.
        VHD if head.starts_with(b"conectix") => read_be(head, 48, 8),
        VHD => read_be(tail, if tail.starts_with(b"conectix") { 48 } else { 49 }, 8),
        VDI => read_le(head, 0x170, 8),
        // Only the newer variant has more than 32 bits.
        PARALLELS => sectors(read_le(head, 36, if head.starts_with(b"WithouFreSpacExt") { 8 } else { 4 })),
        CLOOP => read_be(head, 128, 4)?.checked_mul(read_be(head, 132, 4)?),
        BOCHS => read_le(head, if read_le(head, 64, 4)? == 0x1_0000 { 84 } else { 88 }, 8),
        DMG if tail.starts_with(b"koly") => sectors(read_be(tail, 492, 8)),
        AndroidSparse => read_le(head, 12, 4)?.checked_mul(read_le(head, 16, 4)?),
        Disk { .. } | Luks | Packed { .. } | Archive { .. } => None,
    }
}

/// The sum of the extents that a VMDK descriptor lists ("RW 4192256 SPARSE ...").
fn vmdk_sectors(head: &[u8]) -> Option<u64> {
    let text = String::from_utf8_lossy(head);
    let mut extents = text.lines().filter_map(|line| {
        let mut words = line.split_ascii_whitespace();
        matches!(words.next(), Some("RW" | "RDONLY" | "NOACCESS")).then(|| words.next()?.parse::<u64>().ok())?
    });
    extents.try_fold(0, u64::checked_add)
}

/// The size in the metadata region of a VHDX, which the region table locates. All numbers are little-endian.
fn vhdx_bytes(read: &dyn Fn(u64) -> Option<u64>) -> Option<u64> {
    const REGION_TABLE: u64 = 192 << 10;
    /// Most regions and metadata items that a table can have; its memory has room for more.
    const ENTRIES_MAX: u64 = 64;
    // The identifiers as two words each, as stored in the file.
    let metadata_region = (0x4b9a_4790_8b7c_a206, 0x6e88_0f05_5f57_feb8);
    let disk_size = (0x4876_cd1b_2fa5_4224, 0xb8f4_3bd8_be5d_11b2);
    let find = |table: u64, (low, high): (u64, u64)| {
        let mut entries = (0..ENTRIES_MAX).map(|n| table + n * 32);
        entries.find(|at| (read(*at), read(*at + 8)) == (Some(low), Some(high)))
    };
    let region = read(find(REGION_TABLE + 16, metadata_region)? + 16)?;
    let item = read(find(region.checked_add(32)?, disk_size)? + 16)? & 0xffff_ffff;
    read(region.checked_add(item)?)
}

/// The names of all formats, each at the index of its bit in a ledger: append only.
const NAMES: [&str; 25] = [
    "qcow2",
    "qcow (version 1)",
    "QED",
    "VMDK",
    "VHDX",
    "VHD",
    "VDI",
    "Parallels",
    "cloop",
    "Bochs",
    "Apple disk (DMG)",
    "tar",
    "LUKS",
    "gzip",
    "compress",
    "xz",
    "zstd",
    "lz4",
    "lzop",
    "lzip",
    "zip",
    "7z",
    "rar",
    "bzip2",
    "Android sparse",
];

/// The bit of the format with this name ([`Format::bit`]); `None`: no format has it.
pub(super) fn bit_of(name: &str) -> Option<u64> {
    NAMES.iter().position(|known| *known == name).map(|place| 1 << place)
}

impl Format {
    /// A number with one bit set, for a set of formats in one word.
    pub fn bit(self) -> u64 {
        bit_of(self.name()).expect("each format has a place")
    }

    /// The format's name.
    pub fn name(self) -> &'static str {
        match self {
            Disk { name, .. } | Packed { name, .. } | Archive { name, .. } => name,
            Luks => "LUKS",
            AndroidSparse => "Android sparse",
        }
    }

    /// The command that makes a raw image `target` of the image `source`.
    fn conversion(self, source: &Path, target: &Path) -> String {
        let (from, to) = (quoted(source), quoted(target));
        match self {
            Disk { driver, .. } => format!("qemu-img convert -p -f {driver} -O raw {from} {to}"),
            // A comma in the name of a file is doubled in QEMU's options.
            Luks => {
                let file = source.display().to_string().replace(',', ",,");
                let options = quoted(Path::new(&format!("driver=luks,key-secret=key,file.filename={file}")));
                format!("qemu-img convert -p --object secret,id=key,file=KEYFILE --image-opts {options} -O raw {to}")
            }
            Packed { unpack, .. } => format!("{unpack} {from} > {to}"),
            Archive { unpack, .. } => format!("{unpack} {from}"),
            AndroidSparse => format!("simg2img {from} {to}"),
        }
    }
}

impl Found {
    /// Why the image at `path` is rejected, and every remedy.
    pub fn refusal(&self, path: &Path) -> String {
        let shown = path.display();
        let what = match self.format {
            Disk { name, .. } => format!("a {name} image"),
            Luks => "a LUKS container".to_owned(),
            Packed { name, .. } => format!("a {name} file"),
            Archive { name, .. } => format!("a {name} archive"),
            AndroidSparse => "an Android sparse image".to_owned(),
        };
        let size = self.virtual_bytes.map_or_else(String::new, |bytes| format!(" (virtual size {bytes} bytes)"));
        let mut target = path.as_os_str().to_owned();
        target.push(".raw");
        let convert = self.format.conversion(path, &PathBuf::from(target));
        let (verb, result) = match self.format {
            Archive { .. } => ("unpack", "serve or convert the disk image in it"),
            Packed { .. } => ("unpack", "serve the result"),
            _ => ("convert", "serve the result"),
        };
        format!(
            "image {shown} is {what}{size}, and genblk serves raw images only: {verb} it with \"{convert}\", and \
             {result}; or, if the guest is to see the bytes of this file as its disk, set format = \"raw\" \
             (option --format raw)"
        )
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A path as a word of a shell command.
fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:@%=,".contains(c);
    if !text.is_empty() && text.chars().all(is_plain) { text } else { format!("'{}'", text.replace('\'', "'\\''")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(head: &[u8], tail: &[u8]) -> Option<(&'static str, Option<u64>)> {
        let file = head.to_vec();
        let read = |at: u64| read_le(&file, usize::try_from(at).ok()?, 8);
        let head = &head[..head.len().min(HEAD_BYTES)];
        detect(1 << 30, head, tail, &read).map(|found| (found.format.name(), found.virtual_bytes))
    }

    /// `bytes` zeros with these pieces in them.
    fn file(bytes: usize, pieces: &[(usize, &[u8])]) -> Vec<u8> {
        let mut file = vec![0; bytes];
        for (at, piece) in pieces {
            file[*at..at + piece.len()].copy_from_slice(piece);
        }
        file
    }

    #[test]
    fn each_format_is_recognised_with_the_size_in_its_header() {
        let (big, little) = ((10u64 << 30).to_be_bytes(), (10u64 << 30).to_le_bytes());
        let sectors = (20u64 << 20).to_le_bytes();
        let cases: [(&str, Vec<u8>); 12] = [
            ("qcow2", file(4096, &[(0, b"QFI\xfb\0\0\0\x03"), (24, &big)])),
            ("qcow (version 1)", file(4096, &[(0, b"QFI\xfb\0\0\0\x01"), (24, &big)])),
            ("QED", file(4096, &[(0, b"QED\0"), (48, &little)])),
            ("VMDK", file(4096, &[(0, b"KDMV"), (12, &sectors)])),
            ("VMDK", file(4096, &[(0, b"COWD"), (12, &sectors[..4])])),
            ("VMDK", file(4096, &[(0, &0xcafe_babe_u64.to_le_bytes()), (16, &sectors)])),
            ("VDI", file(4096, &[(0x40, &0xbeda_107f_u32.to_le_bytes()), (0x170, &little)])),
            ("VHD", file(4096, &[(0, b"conectix"), (48, &big)])),
            ("Parallels", file(4096, &[(0, b"WithouFreSpacExt"), (36, &sectors)])),
            ("Bochs", file(4096, &[(0, b"Bochs Virtual HD Image"), (66, &[2]), (88, &little)])),
            ("cloop", file(4096, &[(0, b"#!/bin/sh\n#V2.0 Format\n"), (128, &[0, 1, 0, 0]), (132, &[0, 2, 0x80, 0])])),
            (
                "Android sparse",
                file(4096, &[(0, b"\x3a\xff\x26\xed\x01\0"), (12, &[0, 16]), (16, &(10u32 << 18).to_le_bytes())]),
            ),
        ];
        for (name, head) in cases {
            assert_eq!(found(&head, &[0; 512]), Some((name, Some(10 << 30))), "{name}");
        }
        let text = b"# Disk DescriptorFile\nversion=1\nRW 20971000 SPARSE \"a-s001.vmdk\"\nRW 520 SPARSE \"b\"\n";
        assert_eq!(found(&file(4096, &[(0, text)]), &[0; 512]), Some(("VMDK", Some(10 << 30))));
        assert_eq!(at_start(b"# a comment\n\n#\nversion=3\n"), Some(VMDK));
        assert_eq!(at_start(b"#!/bin/sh\nversion=9\n"), None);
    }

    #[test]
    fn each_format_has_its_own_bit() {
        let other = [QCOW2, QCOW1, Packed { name: "bzip2", unpack: "" }];
        let bits = MAGICS.iter().map(|(_, _, format)| format.bit()).chain(other.map(Format::bit));
        assert_eq!(bits.fold(0, |all, bit| all | bit), (1 << NAMES.len()) - 1);
    }

    #[test]
    fn formats_without_a_size_are_recognised_too() {
        let cases: [(&str, &[u8]); 12] = [
            ("LUKS", b"LUKS\xba\xbe\0\x02"),
            ("gzip", b"\x1f\x8b\x08\0"),
            ("xz", b"\xfd7zXZ\0\0"),
            ("zstd", b"\x28\xb5\x2f\xfd"),
            ("bzip2", b"BZh91AY&SY"),
            ("lz4", b"\x04\x22\x4d\x18"),
            ("lzop", b"\x89LZO\0\r\n\x1a\n"),
            ("lzip", b"LZIP\x01"),
            ("zip", b"PK\x03\x04"),
            ("7z", b"7z\xbc\xaf\x27\x1c"),
            ("rar", b"Rar!\x1a\x07"),
            ("Apple disk (DMG)", b"encrcdsa"),
        ];
        for (name, head) in cases {
            assert_eq!(found(&file(4096, &[(0, head)]), &[]), Some((name, None)), "{name}");
        }
        assert_eq!(found(&file(4096, &[(257, b"ustar\x0000")]), &[]), Some(("tar", None)));
    }

    #[test]
    fn the_data_offset_of_a_luks_1_container_is_parsed() {
        let luks = file(4096, &[(0, b"LUKS\xba\xbe\0\x01"), (104, &4096u32.to_be_bytes())]);
        assert_eq!(found(&luks, &[]), Some(("LUKS", Some((1 << 30) - (2 << 20)))));
    }

    #[test]
    fn a_fixed_vhd_and_a_dmg_are_recognised_by_their_footers() {
        let size = (10u64 << 30).to_be_bytes();
        let vhd = file(512, &[(0, b"conectix"), (48, &size), (63, &[2])]);
        assert_eq!(found(&[0; 4096], &vhd), Some(("VHD", Some(10 << 30))));
        let old = file(512, &[(1, b"conectix"), (49, &size), (64, &[2])]);
        assert_eq!(found(&[0; 4096], &old), Some(("VHD", Some(10 << 30))));
        let dmg = file(512, &[(0, b"koly"), (10, &[2, 0]), (492, &(20u64 << 20).to_be_bytes())]);
        assert_eq!(found(&[0; 4096], &dmg), Some(("Apple disk (DMG)", Some(10 << 30))));
        assert_eq!(found(&[0; 4096], &file(512, &[(0, b"conectix")])), None, "the cookie alone is not a footer");
        assert_eq!(found(&[0; 4096], &file(512, &[(0, b"koly")])), None);
    }

    #[test]
    fn the_size_of_a_vhdx_is_found_through_its_tables() {
        let region = [0x06, 0xa2, 0x7c, 0x8b, 0x90, 0x47, 0x9a, 0x4b, 0xb8, 0xfe, 0x57, 0x5f, 0x05, 0x0f, 0x88, 0x6e];
        let item = [0x24, 0x42, 0xa5, 0x2f, 0x1b, 0xcd, 0x76, 0x48, 0xb2, 0x11, 0x5d, 0xbe, 0xd8, 0x3b, 0xf4, 0xb8];
        let (table, metadata) = ((192 << 10) + 16 + 32, 512 << 10);
        let vhdx = file(
            1 << 20,
            &[
                (0, b"vhdxfile"),
                (table, &region),
                (table + 16, &(512u64 << 10).to_le_bytes()),
                (metadata + 32 + 64, &item),
                (metadata + 32 + 64 + 16, &(64u32 << 10).to_le_bytes()),
                (metadata + (64 << 10), &(10u64 << 30).to_le_bytes()),
            ],
        );
        assert_eq!(found(&vhdx, &[0; 512]), Some(("VHDX", Some(10 << 30))));
        assert_eq!(found(&file(1 << 20, &[(0, b"vhdxfile")]), &[0; 512]), Some(("VHDX", None)), "no tables");
    }

    #[test]
    fn raw_disks_match_no_format() {
        let boot = file(4096, &[(0, b"\xeb\x63\x90"), (510, &[0x55, 0xaa])]);
        let ext4 = file(4096, &[(1024 + 0x38, &[0x53, 0xef])]);
        let xfs = file(4096, &[(0, b"XFSB")]);
        let squashfs = file(4096, &[(0, b"hsqs")]);
        let lvm = file(4096, &[(512, b"LABELONE")]);
        for head in [boot, ext4, xfs, squashfs, lvm, vec![0; 4096], vec![0xff; 512], Vec::new()] {
            assert_eq!(found(&head, &[0; 512]), None);
        }
    }

    #[test]
    fn a_refused_format_is_reported_with_each_remedy() {
        let found = Found { format: QCOW2, virtual_bytes: Some(1 << 30) };
        let expected = "image /srv/my disk is a qcow2 image (virtual size 1073741824 bytes), and genblk serves raw \
                        images only: convert it with \"qemu-img convert -p -f qcow2 -O raw '/srv/my disk' '/srv/my \
                        disk.raw'\", and serve the result; or, if the guest is to see the bytes of this file as its \
                        disk, set format = \"raw\" (option --format raw)";
        assert_eq!(found.refusal(Path::new("/srv/my disk")), expected);
        let convert = |format: Format| format.conversion(Path::new("/a"), Path::new("/b"));
        assert_eq!(convert(VHD), "qemu-img convert -p -f vpc -O raw /a /b");
        let luks = "qemu-img convert -p --object secret,id=key,file=KEYFILE --image-opts \
                    driver=luks,key-secret=key,file.filename=/a -O raw /b";
        assert_eq!(convert(Luks), luks);
        assert_eq!(convert(at_start(b"\x1f\x8b\x08").unwrap()), "gzip -dc /a > /b");
        let tar = Found { format: TAR, virtual_bytes: None }.refusal(Path::new("/a.ova"));
        let expected = "image /a.ova is a tar archive, and genblk serves raw images only: unpack it with \"tar -xvf \
                        /a.ova\", and serve or convert the disk image in it; or,";
        assert!(tar.starts_with(expected), "{tar}");
        assert_eq!(quoted(Path::new("it's")), "'it'\\''s'");
    }
}
