//! Creates a ring that can only do I/O on its image.
//!
//! A seccomp filter sees that a thread enters a ring, but not the operations of the ring: it could open files, connect,
//! send, or read any descriptor of the process. So io_uring itself restricts the ring. It starts disabled, gets its
//! file and its eventfd, and then a list of allowed operations, which cannot be revoked. From then on an operation must
//! use a registered file, and the image is the only one.

use std::io;
use std::os::fd::RawFd;
use std::sync::Once;

use io_uring::register::Restriction;
use io_uring::squeue::Flags;
use io_uring::{IoUring, Probe, opcode};

/// Operations that a ring must support.
const NEEDED: [u8; 6] = [
    opcode::Read::CODE,
    opcode::Write::CODE,
    opcode::Readv::CODE,
    opcode::Writev::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
];
/// Operations that are used if the kernel supports them.
const OPTIONAL: [u8; 4] =
    [opcode::ReadFixed::CODE, opcode::WriteFixed::CODE, opcode::ReadvFixed::CODE, opcode::WritevFixed::CODE];

/// Requests of io_uring_register(2) that follow after the restriction: they add memory of the process to a ring, and
/// remove memory and the file from it. From <linux/io_uring.h>; the io-uring crate does not export them.
const REGISTER_REQUESTS: [u8; 4] = [
    1,  // IORING_UNREGISTER_BUFFERS
    3,  // IORING_UNREGISTER_FILES
    15, // IORING_REGISTER_BUFFERS2
    16, // IORING_REGISTER_BUFFERS_UPDATE
];

/// Most kernel threads that do the blocking part of a worker's operations (buffered reads, fallocate, syncs): for files
/// and block devices, and for all other files, which no image is. The kernel's own bound is four for each processor.
const KERNEL_THREADS_MAX: [u32; 2] = [32, 1];

/// A ring with `file` as its registered file 0, which notifies `eventfd`, and the operations that the kernel supports.
///
/// # Errors
/// ENOSYS if the kernel lacks a necessary operation, otherwise the error of the system call that failed. A kernel
/// without restrictions (before Linux 5.10) is not an error: a warning is logged.
pub(super) fn new_ring(entries: u32, file: RawFd, eventfd: RawFd) -> io::Result<(IoUring, Probe)> {
    let (ring, starts_disabled) = build(entries)?;
    let submitter = ring.submitter();
    let mut probe = Probe::new();
    submitter.register_probe(&mut probe)?;
    if !NEEDED.iter().all(|&code| probe.is_supported(code)) {
        return Err(io::Error::from_raw_os_error(libc::ENOSYS));
    }
    submitter.register_files(&[file])?;
    submitter.register_eventfd(eventfd)?;
    if let Err(error) = submitter.register_iowq_max_workers(&mut KERNEL_THREADS_MAX.clone()) {
        log::debug!("cannot limit io_uring's kernel threads ({error}); the kernel has a limit of its own");
    }
    if starts_disabled {
        if let Err(error) = submitter.register_restrictions(&mut restrictions(&probe)) {
            warn_once(&error);
        }
        submitter.register_enable_rings()?;
    }
    Ok((ring, probe))
}

/// A new ring, and whether it starts disabled.
///
/// => It posts completions at the worker's next system call, if the kernel supports that (Linux 5.19); otherwise it
///    interrupts the worker's processor for each. A flag in the ring (taskrun) shows the worker that completions are
///    pending.
fn build(entries: u32) -> io::Result<(IoUring, bool)> {
    let is_unknown = |error: &io::Error| error.raw_os_error() == Some(libc::EINVAL);
    match IoUring::builder().setup_r_disabled().setup_coop_taskrun().setup_taskrun_flag().build(entries) {
        Err(error) if is_unknown(&error) => {}
        result => return result.map(|ring| (ring, true)),
    }
    match IoUring::builder().setup_r_disabled().build(entries) {
        Err(error) if is_unknown(&error) => warn_once(&error),
        result => return result.map(|ring| (ring, true)),
    }
    IoUring::new(entries).map(|ring| (ring, false))
}

fn warn_once(error: &io::Error) {
    static WARNING: Once = Once::new();
    WARNING.call_once(|| {
        log::warn!(
            "io_uring restrictions are not available ({error}; Linux 5.10 or newer has them); io_uring is used without \
             them"
        );
    });
}

/// The operations and requests that remain allowed on a ring of this kernel.
fn restrictions(probe: &Probe) -> Vec<Restriction> {
    let codes = NEEDED.into_iter().chain(OPTIONAL).filter(|&code| probe.is_supported(code));
    let operations = codes.map(Restriction::sqe_op);
    let requests = REGISTER_REQUESTS.into_iter().map(Restriction::register_op);
    let registered_file_only = Restriction::sqe_flags_required(Flags::FIXED_FILE.bits());
    operations.chain(requests).chain([registered_file_only]).collect()
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsRawFd;

    use io_uring::squeue::Entry;
    use io_uring::types::{Fd, Fixed};
    use vmm_sys_util::eventfd::EventFd;

    use super::*;

    const IMAGE: Fixed = Fixed(0);

    /// A ring on /dev/zero, or `None` if the host has no io_uring or no restrictions.
    fn ring() -> Option<(IoUring, File, EventFd)> {
        let (file, eventfd) = (File::open("/dev/zero").unwrap(), EventFd::new(0).unwrap());
        match (new_ring(8, file.as_raw_fd(), eventfd.as_raw_fd()), build(8)) {
            (Ok((ring, _)), Ok((_, true))) => Some((ring, file, eventfd)),
            _ => {
                println!("SKIPPED: this host has no io_uring that can be restricted");
                None
            }
        }
    }

    /// The result of one operation: the number of bytes moved, or its error number.
    fn run(ring: &mut IoUring, entry: &Entry) -> i32 {
        // SAFETY: the memory that the entry names outlives this call, which waits for the completion.
        unsafe { ring.submission().push(entry) }.unwrap();
        ring.submit_and_wait(1).unwrap();
        ring.completion().next().unwrap().result()
    }

    #[test]
    fn a_restricted_io_uring_reads_only_its_registered_image() {
        let Some((mut ring, file, _eventfd)) = ring() else { return };
        let mut byte = [7u8];
        let own = opcode::Read::new(IMAGE, byte.as_mut_ptr(), 1).build();
        assert_eq!((run(&mut ring, &own), byte), (1, [0]));
        let other = opcode::Read::new(Fd(file.as_raw_fd()), byte.as_mut_ptr(), 1).build();
        assert_eq!(run(&mut ring, &other), -libc::EACCES, "the image, named by its descriptor");
    }

    #[test]
    fn a_restricted_io_uring_refuses_unused_operations() {
        let Some((mut ring, _file, _eventfd)) = ring() else { return };
        let path = c"/etc/passwd".as_ptr();
        let entries = [
            opcode::Nop::new().build().flags(Flags::FIXED_FILE),
            opcode::OpenAt::new(Fd(libc::AT_FDCWD), path).build(),
            opcode::OpenAt::new(Fd(libc::AT_FDCWD), path).build().flags(Flags::FIXED_FILE),
            opcode::Socket::new(libc::AF_UNIX, libc::SOCK_STREAM, 0).build(),
            opcode::UnlinkAt::new(Fd(libc::AT_FDCWD), path).build(),
            opcode::PollAdd::new(IMAGE, 1).build(),
        ];
        for entry in entries {
            assert_eq!(run(&mut ring, &entry), -libc::EACCES, "{entry:?}");
        }
    }

    #[test]
    fn a_restricted_io_uring_accepts_no_new_files_or_restrictions() {
        let Some((ring, file, _eventfd)) = ring() else { return };
        let ring = ring.submitter();
        let refused = |result: io::Result<()>| result.unwrap_err().raw_os_error();
        assert_eq!(refused(ring.register_files_update(0, &[file.as_raw_fd()]).map(drop)), Some(libc::EACCES));
        assert_eq!(refused(ring.register_files(&[file.as_raw_fd()])), Some(libc::EACCES));
        assert_eq!(refused(ring.register_personality().map(drop)), Some(libc::EACCES));
        let wider = Restriction::sqe_op(opcode::OpenAt::CODE);
        assert_eq!(refused(ring.register_restrictions(&mut [wider])), Some(libc::EACCES));
        ring.register_buffers_sparse(4).unwrap();
        ring.unregister_buffers().unwrap();
    }
}
