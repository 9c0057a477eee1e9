//! Properties of the process and of its threads: user, limits, priority.

use std::io;

/// The process's effective user ID.
pub fn effective_uid() -> u32 {
    // SAFETY: geteuid() has no preconditions and cannot fail.
    unsafe { libc::geteuid() }
}

/// Raises the soft limit of open descriptors to the hard limit.
pub fn raise_descriptor_limit() -> io::Result<()> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the call writes one rlimit at the address given, and `limit` is one.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: the call reads one rlimit at the address given.
    match unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Gives the calling thread the lowest priority that a normal thread can have (setpriority(2); on Linux each thread has
/// its own).
pub fn set_lowest_thread_priority() {
    const LOWEST: libc::c_int = 19;
    // SAFETY: a plain system call on the calling thread. A thread may always lower its own priority.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, LOWEST) };
}
