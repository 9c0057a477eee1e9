//! The disk image as the host sees it, without the guest and without the daemon: what should be in it, and what is.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use crate::host::{run, tool};

/// The bytes that the guest writes for a file: contents() of tests/guest/init. Sectors of 512 bytes which say at both
/// ends whose they are and where they belong.
pub fn contents(seed: &str, name: &str, generation: &str, size: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(size.next_multiple_of(512));
    for sector in 0..size.div_ceil(512) {
        let head = format!("{seed} {name} {generation} {sector}");
        bytes.extend(format!("{head:<255}\n{head:>255}\n").as_bytes());
    }
    bytes.truncate(size);
    bytes
}

/// A file that the guest says is on its disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub sum: String,
    /// "1"; or "2/7+3": as generation 1, but every seventh sector from the third is of generation 2.
    pub generation: String,
    pub size: usize,
    pub name: String,
}

impl Entry {
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

/// The lines "file SUM GENERATION SIZE NAME" among what a guest said.
pub fn manifest(messages: &[String]) -> Vec<Entry> {
    let files = messages.iter().filter_map(|message| message.strip_prefix("file "));
    files
        .map(|line| {
            let [sum, generation, size, name] = words(line);
            let size = size.parse().unwrap();
            Entry { sum: sum.into(), generation: generation.into(), size, name: name.into() }
        })
        .collect()
}

/// The lines "VERB NAME SIZE SUM": name -> (size, sum).
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
    words.try_into().unwrap_or_else(|_| panic!("the guest said \"{line}\", which is not {N} words"))
}

/// Makes a sparse image.
pub fn create(path: &Path, size: u64) {
    File::create(path).unwrap().set_len(size).unwrap();
}

/// Makes an ext4 image with the files of `tree` in it.
pub fn create_ext4(path: &Path, size: u64, tree: &Path) {
    create(path, size);
    run(tool("mke2fs").args(["-t", "ext4", "-q", "-F", "-b", "4096", "-d"]).arg(tree).arg(path));
}

/// The file system must be in order, with nothing to replay.
pub fn assert_clean(image: &Path) {
    let output = run(tool("e2fsck").arg("-fn").arg(image));
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(said.contains("Pass 5"), "e2fsck did not check everything:\n{said}");
    assert!(!said.contains("skipping journal recovery"), "the guest did not unmount:\n{said}");
}

/// Reads the files of the image into `tree`.
pub fn extract(image: &Path, tree: &Path) {
    std::fs::create_dir_all(tree).unwrap();
    let request = format!("rdump / \"{}\"", tree.display());
    run(tool("debugfs").args(["-R", &request]).arg(image));
}

/// Every file of the manifest is in the image, byte for byte, and the guest's checksums are those of the host.
pub fn assert_holds(image: &Path, tree: &Path, files: &[Entry], seed: &str) {
    extract(image, tree);
    for file in files {
        let path = tree.join(&file.name);
        assert_same(&path, &file.contents(seed));
        assert_eq!(sum(&path), file.sum, "checksum of {}", file.name);
    }
}

/// Compares a file with what it should contain, and names the first sector that differs.
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

/// SHA-256 in hex, by a program that nobody here wrote.
pub fn sum(path: &Path) -> String {
    let output = run(tool("sha256sum").arg("--").arg(path));
    String::from_utf8(output.stdout).unwrap()[..64].to_owned()
}
