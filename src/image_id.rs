//! The identity of an image, whatever path leads to it.

/// Identifies an image, so that a new image at an old path never gets the cache of the old image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ImageId {
    /// Device number of the file system, or of the block device itself.
    pub device: u64,
    /// Inode number; for a block device the kernel's sequence number of the disk behind it.
    pub inode: u64,
    /// Creation time in nanoseconds since 1970; 0 if the file system does not record it.
    pub born_ns: u64,
    /// Size of the image in bytes.
    pub size_bytes: u64,
}

impl ImageId {
    /// A file name that is unique to the image.
    pub fn file_name(&self) -> String {
        let Self { device, inode, born_ns, size_bytes } = self;
        format!("{device:x}-{inode:x}-{born_ns:x}-{size_bytes:x}")
    }

    /// Whether `name` has the form of [`ImageId::file_name`].
    pub fn is_file_name(name: &str) -> bool {
        let is_number = |field: &str| !field.is_empty() && field.chars().all(|digit| digit.is_ascii_hexdigit());
        name.split('-').count() == 4 && name.split('-').all(is_number)
    }
}
