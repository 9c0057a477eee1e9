//! Guest memory for the tests: one file, usually a memfd, shared with the daemon in any number of regions.
//!
//! The three addresses of a byte (offset in the memfd, guest address, front-end address) always differ. A daemon that
//! confuses them finds no memory there.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::Mutex;
use std::sync::atomic::AtomicU16;

use vhost::VhostUserMemoryRegionInfo;

/// Guest address of the first region of [`GuestMemory::standard`].
pub const LOW_GUEST_ADDR: u64 = 0x1000_0000;
/// Guest address of the second region of [`GuestMemory::standard`]. There is a hole between the regions.
pub const HIGH_GUEST_ADDR: u64 = 0x9000_0000;
/// Added to a guest address, it gives the front-end address, which the vhost-user protocol treats as opaque.
const USER_ADDR_BIAS: u64 = 0x7000_0000_0000;

/// One range of guest-physical addresses backed by a range of the memfd.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    pub guest_addr: u64,
    pub offset: u64,
    pub len: u64,
}

/// A guest's memory with a bump allocator.
#[derive(Debug)]
pub struct GuestMemory {
    file: File,
    base: *mut u8,
    len: usize,
    regions: Vec<Region>,
    /// Number of allocated bytes, by region.
    allocated: Mutex<Vec<u64>>,
}

// SAFETY: the value owns the mapping, which lives as long as the value. Ring indices are accessed atomically; they
// order all other accesses of test and daemon.
unsafe impl Send for GuestMemory {}
// SAFETY: as above.
unsafe impl Sync for GuestMemory {}

impl GuestMemory {
    /// Memory of `regions`, whose offsets must not overlap.
    pub fn new(regions: Vec<Region>) -> Self {
        // SAFETY: plain system call with a NUL-terminated name.
        let fd = unsafe { libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC) };
        assert!(fd >= 0, "memfd_create: {}", std::io::Error::last_os_error());
        // SAFETY: the descriptor is new and has no other owner.
        Self::in_file(unsafe { File::from_raw_fd(fd) }, regions)
    }

    /// As [`GuestMemory::new`], in this file.
    pub fn in_file(file: File, regions: Vec<Region>) -> Self {
        let len = regions.iter().map(|region| region.offset + region.len).max().expect("a guest has memory");
        let len = len as usize;
        file.set_len(len as u64).expect("guest memory can be sized");
        // SAFETY: a new shared mapping of a file that is `len` long; the kernel chooses the place.
        let base = unsafe {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(std::ptr::null_mut(), len, protection, libc::MAP_SHARED, file.as_raw_fd(), 0)
        };
        assert_ne!(base, libc::MAP_FAILED, "mmap: {}", std::io::Error::last_os_error());
        let allocated = Mutex::new(vec![0; regions.len()]);
        Self { file, base: base.cast(), len, regions, allocated }
    }

    /// Two regions of `region_bytes` each with a hole between them.
    pub fn standard(region_bytes: u64) -> Self {
        Self::new(Self::standard_regions(region_bytes))
    }

    /// The regions of [`GuestMemory::standard`].
    pub fn standard_regions(region_bytes: u64) -> Vec<Region> {
        vec![
            Region { guest_addr: LOW_GUEST_ADDR, offset: 0, len: region_bytes },
            Region { guest_addr: HIGH_GUEST_ADDR, offset: region_bytes, len: region_bytes },
        ]
    }

    /// Cuts the file short, as a hostile front-end does: whoever touches the memory gets SIGBUS.
    pub fn cut_short(&self) {
        self.file.set_len(0).expect("a memfd without seals can be cut short");
    }

    /// The regions, in the order given.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// A region in the form that vhost-user messages need.
    pub fn region_info(&self, region: Region) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: region.guest_addr,
            memory_size: region.len,
            userspace_addr: Self::user_addr(region.guest_addr),
            mmap_offset: region.offset,
            mmap_handle: self.file.as_raw_fd(),
        }
    }

    /// All regions in the form that vhost-user messages need.
    pub fn region_infos(&self) -> Vec<VhostUserMemoryRegionInfo> {
        self.regions.iter().map(|&region| self.region_info(region)).collect()
    }

    /// The front-end address of a guest address; messages give ring addresses in this form.
    pub fn user_addr(guest_addr: u64) -> u64 {
        guest_addr + USER_ADDR_BIAS
    }

    /// Allocates `len` bytes at a multiple of `align` in the first region; returns their guest address.
    pub fn alloc(&self, len: usize, align: u64) -> u64 {
        self.alloc_in(0, len, align)
    }

    /// Allocates `len` bytes at a multiple of `align` in region `region`; returns their guest address.
    pub fn alloc_in(&self, region: usize, len: usize, align: u64) -> u64 {
        let mut allocated = self.allocated.lock().expect("no test panics while it allocates");
        let start = allocated[region].next_multiple_of(align);
        let end = start + len as u64;
        assert!(end <= self.regions[region].len, "the region is large enough for the test");
        allocated[region] = end;
        self.regions[region].guest_addr + start
    }

    /// Frees all allocations of region `region`.
    pub fn free_all_in(&self, region: usize) {
        self.allocated.lock().expect("no test panics while it allocates")[region] = 0;
    }

    /// The host's pointer to `len` bytes at a guest address, all in one region.
    fn pointer(&self, guest_addr: u64, len: usize) -> *mut u8 {
        let region = self
            .regions
            .iter()
            .find(|region| guest_addr >= region.guest_addr && guest_addr - region.guest_addr < region.len)
            .expect("the address is in guest memory");
        let within = guest_addr - region.guest_addr;
        assert!(within + len as u64 <= region.len, "an access stays in its region");
        // SAFETY: offset and length are inside the region, and the region is inside the mapping.
        unsafe { self.base.add((region.offset + within) as usize) }
    }

    /// Copies `bytes` to guest memory.
    pub fn write(&self, guest_addr: u64, bytes: &[u8]) {
        let target = self.pointer(guest_addr, bytes.len());
        // SAFETY: `pointer` checked the range; the source is a live slice elsewhere.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), target, bytes.len()) }
    }

    /// Copies `len` bytes from guest memory.
    pub fn read(&self, guest_addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let source = self.pointer(guest_addr, len);
        // SAFETY: `pointer` checked the range; the target is a live buffer elsewhere.
        unsafe { std::ptr::copy_nonoverlapping(source, bytes.as_mut_ptr(), len) }
        bytes
    }

    /// Reads one byte of guest memory.
    pub fn byte(&self, guest_addr: u64) -> u8 {
        self.read(guest_addr, 1)[0]
    }

    /// A 16-bit word that the daemon also reads or writes: a ring's index or flags.
    pub fn word(&self, guest_addr: u64) -> &AtomicU16 {
        assert_eq!(guest_addr % 2, 0, "ring words are aligned");
        let pointer = self.pointer(guest_addr, 2).cast::<u16>();
        // SAFETY: aligned, inside the mapping, which lives as long as `self`; both sides access it atomically.
        unsafe { AtomicU16::from_ptr(pointer) }
    }
}

impl Drop for GuestMemory {
    fn drop(&mut self) {
        // SAFETY: `new` created the mapping with this length, and no reference into it outlives `self`.
        unsafe { libc::munmap(self.base.cast(), self.len) };
    }
}
