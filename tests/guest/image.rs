//! The disk image from the host's side, without guest and daemon: expected and actual contents.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use crate::host::{run, tool};

/// The bytes that the guest writes to a file, as contents() in tests/guest/init does. Each 512-byte sector names its
/// file and its position at both ends.
pub fn contents(seed: &str, name: &str, generation: &str, size: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(size.next_multiple_of(512));
    for sector in 0..size.div_ceil(512) {
        let head = format!("{seed} {name} {generation} {sector}");
        bytes.extend(format!("{head:<255}\n{head:>255}\n").as_bytes());
    }
    bytes.truncate(size);
    bytes
}

/// A file on the guest's disk, according to the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestFile {
    pub sum: String,
    /// "1"; or "2/7+3": generation 1, but every seventh sector from the third is of generation 2.
    pub generation: String,
    pub size: usize,
    pub name: String,
}

impl GuestFile {
    pub fn contents(&self, seed: &str) -> Vec<u8> {
        let Some(generation) = self.generation.strip_suffix("/7+3") else {
            return contents(seed, &self.name, &self.generation, self.size);
        };
        let mut bytes = contents(seed, &self.name, "1", self.size);
        let patch = contents(seed, &self.name, generation, self.size);
        let sectors = bytes.chunks_exact_mut(512).zip(patch.chunks_exact(512));
        for (sector, patch) in sectors.skip(3).step_by(7) {
            sector.copy_from_slice(patch);
        }
        bytes
    }
}

/// Parses the lines "file SUM GENERATION SIZE NAME" of a guest's messages.
pub fn manifest(messages: &[String]) -> Vec<GuestFile> {
    let files = messages.iter().filter_map(|message| message.strip_prefix("file "));
    files
        .map(|line| {
            let [sum, generation, size, name] = words(line);
            let size = size.parse().unwrap();
            GuestFile { sum: sum.into(), generation: generation.into(), size, name: name.into() }
        })
        .collect()
}

/// Parses the lines "VERB NAME SIZE SUM": name -> (size, sum).
pub fn reported(messages: &[String], verb: &str) -> BTreeMap<String, (usize, String)> {
    let lines = messages.iter().filter_map(|message| message.strip_prefix(verb)?.strip_prefix(' '));
    lines
        .map(|line| {
            let [name, size, sum] = words(line);
            (name.to_owned(), (size.parse().unwrap(), sum.to_owned()))
        })
        .collect()
}

fn words<const N: usize>(line: &str) -> [&str; N] {
    let words: Vec<&str> = line.split(' ').collect();
    words.try_into().unwrap_or_else(|_| panic!("the guest's line \"{line}\" does not have {N} words"))
}

/// Creates a sparse image.
pub fn create(path: &Path, size: u64) {
    File::create(path).unwrap().set_len(size).unwrap();
}

/// Creates an ext4 image with the files of `tree`.
pub fn create_ext4(path: &Path, size: u64, tree: &Path) {
    create(path, size);
    run(tool("mke2fs").args(["-t", "ext4", "-q", "-F", "-b", "4096", "-d"]).arg(tree).arg(path));
}

/// Checks that the file system is consistent, with nothing to replay.
pub fn assert_clean(image: &Path) {
    let output = run(tool("e2fsck").arg("-fn").arg(image));
    let output = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.contains("Pass 5"), "e2fsck did not check everything:\n{output}");
    assert!(!output.contains("skipping journal recovery"), "the guest did not unmount:\n{output}");
}

/// Extracts the files of the image to `tree`.
pub fn extract(image: &Path, tree: &Path) {
    std::fs::create_dir_all(tree).unwrap();
    let request = format!("rdump / \"{}\"", tree.display());
    run(tool("debugfs").args(["-R", &request]).arg(image));
}

/// Checks that every file of the manifest is on the image, byte for byte, and that guest and host compute the same
/// checksum.
pub fn assert_holds(image: &Path, tree: &Path, files: &[GuestFile], seed: &str) {
    extract(image, tree);
    for file in files {
        let path = tree.join(&file.name);
        assert_same(&path, &file.contents(seed));
        assert_eq!(sum(&path), file.sum, "checksum of {}", file.name);
    }
}

/// Compares a file with its expected contents; panics with the first sector that differs.
pub fn assert_same(path: &Path, expected: &[u8]) {
    let found = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    assert_eq!(found.len(), expected.len(), "length of {}", path.display());
    let sectors = found.chunks(512).zip(expected.chunks(512));
    for (sector, (found, expected)) in sectors.enumerate() {
        if found != expected {
            let (found, expected) = (String::from_utf8_lossy(found), String::from_utf8_lossy(expected));
            panic!("{} differs from sector {sector}: found {found:?}, expected {expected:?}", path.display());
        }
    }
}

/// SHA-256 in hex, by an independent program.
pub fn sum(path: &Path) -> String {
    let output = run(tool("sha256sum").arg("--").arg(path));
    String::from_utf8(output.stdout).unwrap()[..64].to_owned()
}
