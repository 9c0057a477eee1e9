//! The identity of an image: what tells it from every other image, whatever path leads to it.

/// What tells one image from every other, so that a new image at an old path never meets an old ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ImageId {
    /// Device of the file system, or of the block device itself.
    pub device: u64,
    /// Inode; for a block device the kernel's sequence number of the disk behind it.
    pub inode: u64,
    /// Birth time in nanoseconds, 0 where the file system has none.
    pub born_ns: u64,
    /// Size of the image.
    pub size_bytes: u64,
}

impl ImageId {
    /// A file name of its own for each image.
    pub fn file_name(&self) -> String {
        let Self { device, inode, born_ns, size_bytes } = self;
        format!("{device:x}-{inode:x}-{born_ns:x}-{size_bytes:x}")
    }

    /// Whether a name is one that [`ImageId::file_name`] gives.
    pub fn is_file_name(name: &str) -> bool {
        let is_number = |field: &str| !field.is_empty() && field.chars().all(|digit| digit.is_ascii_hexdigit());
        name.split('-').count() == 4 && name.split('-').all(is_number)
    }
}
