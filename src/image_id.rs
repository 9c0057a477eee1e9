//! The identity of an image, independent of its path.

use serde::{Deserialize, Serialize};

/// Identifies an image, so that a new image at an old path never gets the cache of the old image.
///
/// => The size is not part of it: an image that grows stays the same image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ImageId {
    /// Device number of the file system, or of the block device itself.
    pub device: u64,
    /// Inode number; for a block device the kernel's sequence number of the disk behind it.
    pub inode: u64,
    /// Creation time in nanoseconds since 1970; 0 if the file system does not record it.
    pub born_ns: u64,
}

/// Fewest numbers in the name of a cache file.
const NAME_FIELDS_MIN: usize = 4;
/// Most numbers in the name of a cache file.
const NAME_FIELDS_MAX: usize = 5;

impl ImageId {
    /// A name for a cache file of the image, which has `size_bytes` bytes when the file is created. If a file of an
    /// earlier cache has the first name (`serial` 0), higher serials give further names.
    ///
    /// => Versions without tenures search for the first name. Such a version finds the file, does not support its
    /// layout, and refuses to serve the image.
    pub fn file_name(&self, size_bytes: u64, serial: u32) -> String {
        let Self { device, inode, born_ns } = self;
        let name = format!("{device:x}-{inode:x}-{born_ns:x}-{size_bytes:x}");
        if serial == 0 { name } else { format!("{name}-{serial:x}") }
    }

    /// Whether `name` has the form of [`ImageId::file_name`].
    pub fn is_file_name(name: &str) -> bool {
        let is_number = |field: &str| !field.is_empty() && field.chars().all(|digit| digit.is_ascii_hexdigit());
        (NAME_FIELDS_MIN..=NAME_FIELDS_MAX).contains(&name.split('-').count()) && name.split('-').all(is_number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_of_a_cache_file_is_recognized() {
        let identity = ImageId { device: 0xfd00, inode: 12, born_ns: 7 };
        assert_eq!(identity.file_name(4096, 0), "fd00-c-7-1000");
        assert_eq!(identity.file_name(4096, 17), "fd00-c-7-1000-11");
        for serial in [0, 1, 17] {
            assert!(ImageId::is_file_name(&identity.file_name(1 << 30, serial)));
        }
        for name in ["", "image", "1-2-3", "1-2-3-4-5-6", "1-2-3-g", "1-2--4"] {
            assert!(!ImageId::is_file_name(name), "{name:?}");
        }
    }
}
