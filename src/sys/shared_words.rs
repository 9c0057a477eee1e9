//! A few words of memory that two processes share: one writes them, the other reads them, and neither waits.

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::memfd;
use super::memory::exclude_from_dumps;

/// A mapping of words; the file exists as long as a descriptor or a mapping of it.
#[derive(Debug)]
pub struct SharedWords {
    base: *mut AtomicU64,
    count: usize,
}

// SAFETY: the mapping lives as long as the value, and its words are accessed as atomics only.
unsafe impl Send for SharedWords {}
// SAFETY: as above.
unsafe impl Sync for SharedWords {}

impl SharedWords {
    /// A new file of `count` words, all 0. Its length is sealed: no process can make an access raise SIGBUS.
    ///
    /// # Errors
    /// Errors of memfd_create(2), ftruncate(2) and mmap(2).
    pub fn create(count: usize) -> io::Result<(Self, File)> {
        let file = memfd::create(c"genblk-statistics")?;
        file.set_len((count * size_of::<AtomicU64>()) as u64)?;
        memfd::freeze_size(&file)?;
        Ok((Self::map(&file, count)?, file))
    }

    /// Maps the first `count` words of a file of [`SharedWords::create`].
    ///
    /// # Errors
    /// Errors of mmap(2); [`io::ErrorKind::UnexpectedEof`] if the file is shorter.
    pub fn map(file: &File, count: usize) -> io::Result<Self> {
        let bytes = count * size_of::<AtomicU64>();
        if file.metadata()?.len() < bytes as u64 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let (protection, fd) = (libc::PROT_READ | libc::PROT_WRITE, file.as_raw_fd());
        // SAFETY: a new mapping at an address that the kernel chooses replaces no other mapping.
        match unsafe { libc::mmap(ptr::null_mut(), bytes, protection, libc::MAP_SHARED, fd, 0) } {
            libc::MAP_FAILED => Err(io::Error::last_os_error()),
            base => {
                // A kernel without the advice is built without core dumps.
                let _ = exclude_from_dumps(base.addr()..base.addr() + bytes);
                Ok(Self { base: base.cast(), count })
            }
        }
    }

    /// The word with this index.
    ///
    /// # Panics
    /// If there is no such word.
    fn word(&self, index: usize) -> &AtomicU64 {
        &self.words()[index]
    }

    /// All words.
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping has this many words, is aligned to pages, and outlives the reference.
        unsafe { std::slice::from_raw_parts(self.base, self.count) }
    }

    /// Loads a word.
    pub fn load(&self, index: usize) -> u64 {
        self.word(index).load(Ordering::Acquire)
    }

    /// Stores a word, after all earlier stores.
    pub fn store(&self, index: usize, value: u64) {
        self.word(index).store(value, Ordering::Release);
    }
}

impl Drop for SharedWords {
    fn drop(&mut self) {
        // SAFETY: base and length are those of the mapping; nothing uses it after the value is dropped.
        unsafe { libc::munmap(self.base.cast(), self.count * size_of::<AtomicU64>()) };
    }
}

/// `N` adjacent words, with a cached address.
#[derive(Clone, Debug)]
pub struct WordBlock<const N: usize> {
    words: *const [AtomicU64; N],
    _mapping: Arc<SharedWords>,
}

// SAFETY: the mapping lives as long as the value, and its words are accessed as atomics only.
unsafe impl<const N: usize> Send for WordBlock<N> {}
// SAFETY: as above.
unsafe impl<const N: usize> Sync for WordBlock<N> {}

impl<const N: usize> WordBlock<N> {
    /// The words from index `first` on.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn new(mapping: &Arc<SharedWords>, first: usize) -> Self {
        let words: *const [AtomicU64] = &raw const mapping.words()[first..first + N];
        Self { words: words.cast(), _mapping: Arc::clone(mapping) }
    }
}

impl<const N: usize> Deref for WordBlock<N> {
    type Target = [AtomicU64; N];
    #[inline]
    fn deref(&self) -> &[AtomicU64; N] {
        // SAFETY: the words are in the mapping (new), which lives as long as the value.
        unsafe { &*self.words }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_mappings_of_the_words_share_their_contents() {
        let (writer, file) = SharedWords::create(8).unwrap();
        let reader = SharedWords::map(&file, 8).unwrap();
        writer.store(7, 42);
        assert_eq!((reader.load(7), reader.load(0)), (42, 0));
        assert!(file.set_len(0).is_err(), "the file cannot be truncated");
        assert!(SharedWords::map(&file, 9).is_err());
    }

    #[test]
    fn a_word_block_aliases_its_part_of_the_words() {
        let (words, _) = SharedWords::create(8).unwrap();
        let words = Arc::new(words);
        let block = WordBlock::<3>::new(&words, 5);
        words.store(7, 42);
        drop(words);
        assert_eq!(block[2].load(Ordering::Relaxed), 42);
    }
}
