//! Properties of the process: user, limits, children.

use std::ffi::{CStr, CString};
use std::fs::{self, File};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Duration;

use super::retry_eintr;

/// Largest record of a group that is read, in bytes. It contains the name of each member.
pub(super) const GROUP_BYTES_MAX: usize = 1 << 20;

/// The process's effective user ID.
pub fn effective_uid() -> u32 {
    // SAFETY: geteuid() has no preconditions and cannot fail.
    unsafe { libc::geteuid() }
}

/// The ID of the group called `name`; `None` if there is no such group.
///
/// # Errors
/// Errors of getgrnam_r(3); EINVAL for a name with a NUL byte.
pub fn group_id(name: &str) -> io::Result<Option<u32>> {
    let name = CString::new(name).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    let mut buffer = vec![0; 4096];
    loop {
        let mut group = MaybeUninit::<libc::group>::uninit();
        let mut found = std::ptr::null_mut();
        // SAFETY: the name ends with a NUL byte; the call writes one group, one pointer, and at most `buffer.len()`
        // bytes of `buffer`.
        let errno = unsafe {
            let (buffer, len) = (buffer.as_mut_ptr(), buffer.len());
            libc::getgrnam_r(name.as_ptr(), group.as_mut_ptr(), buffer, len, &raw mut found)
        };
        match errno {
            // SAFETY: the call succeeded and found the group, so it has written `group`.
            0 => return Ok((!found.is_null()).then(|| unsafe { group.assume_init().gr_gid })),
            libc::ERANGE if buffer.len() < GROUP_BYTES_MAX => buffer.resize(buffer.len() * 4, 0),
            libc::EINTR => {}
            // Some resolvers report "the given name was not found" that way.
            libc::ENOENT | libc::ESRCH => return Ok(None),
            errno => return Err(io::Error::from_raw_os_error(errno)),
        }
    }
}

/// The name of a process (its first thread), without control characters; `None` if there is no such process.
pub fn name_of(pid: u32) -> Option<String> {
    let name = fs::read(format!("/proc/{pid}/comm")).ok()?;
    Some(String::from_utf8_lossy(&name).trim_end().chars().map(|c| if c.is_control() { '?' } else { c }).collect())
}

/// How long to wait for the locks of a process that is dying: the kernel keeps them until it has finished the process's
/// I/O, which takes long on a loaded host.
pub const DEATH_TIMEOUT: Duration = Duration::from_secs(10);

/// Whether a process is dying: SIGKILL is pending, or it has released its memory. The kernel soon releases its other
/// resources.
pub fn is_dying(pid: u32) -> bool {
    const KILLED: u64 = 1 << (libc::SIGKILL - 1);
    let Ok(status) = fs::read_to_string(format!("/proc/{pid}/status")) else { return true };
    let field = |key: &str| status.lines().find_map(|line| line.strip_prefix(key)).map(str::trim);
    let pending = |key| field(key).and_then(|mask| u64::from_str_radix(mask, 16).ok()).unwrap_or(0);
    (pending("SigPnd:") | pending("ShdPnd:")) & KILLED != 0 || field("VmSize:").is_none()
}

/// Another process, not a dying one, that has the same file open by the same path, with its name; `None` if none is
/// visible to this user. Does not access the file's file system, which may not respond.
pub fn other_process_with(file: &File) -> Option<(u32, String)> {
    let path = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).ok()?;
    let own = std::process::id();
    process_with(&path, |pid| pid != own)
}

/// A process, not a dying one, that has the socket with this inode open; `None` if none is visible to this user.
pub fn process_with_socket(inode: u32) -> Option<u32> {
    process_with(Path::new(&format!("socket:[{inode}]")), |_| true).map(|(pid, _)| pid)
}

fn process_with(link: &Path, is_wanted: impl Fn(u32) -> bool) -> Option<(u32, String)> {
    let has_it_open = |pid: &u32| {
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        descriptors.filter_map(|entry| fs::read_link(entry.path()).ok()).any(|target| target == link)
    };
    let processes = fs::read_dir("/proc").ok()?.flatten();
    let mut pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let pid = pids.find(|pid| is_wanted(*pid) && has_it_open(pid) && !is_dying(*pid))?;
    Some((pid, name_of(pid)?))
}

/// Waits until a child process has ended. Its process ID is not reused until it is reaped.
///
/// # Errors
/// Errors of waitid(2).
pub fn wait_without_reaping(pid: u32) -> io::Result<()> {
    // SAFETY: all-zero bytes are a valid siginfo_t.
    let mut info: libc::siginfo_t = unsafe { MaybeUninit::zeroed().assume_init() };
    let flags = libc::WEXITED | libc::WNOWAIT;
    // SAFETY: the call writes one siginfo_t at the address given, and `info` is one.
    retry_eintr(|| unsafe { libc::waitid(libc::P_PID, pid, &raw mut info, flags) }).map(drop)
}

/// A resource limit of the process (getrlimit(2)).
#[derive(Clone, Copy, Debug)]
pub enum Limit {
    /// RLIMIT_MEMLOCK.
    LockedMemory,
    /// RLIMIT_NOFILE.
    Descriptors,
}

/// The soft limit in words, for messages.
pub fn describe_limit(limit: Limit) -> String {
    let (resource, unit) = match limit {
        Limit::LockedMemory => (libc::RLIMIT_MEMLOCK, " bytes"),
        Limit::Descriptors => (libc::RLIMIT_NOFILE, ""),
    };
    let mut found = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the call writes one rlimit at the address given, and `found` is one.
    match unsafe { libc::getrlimit(resource, &raw mut found) } {
        0 if found.rlim_cur == libc::RLIM_INFINITY => "unlimited".to_owned(),
        0 => format!("{}{unit}", found.rlim_cur),
        _ => "unknown".to_owned(),
    }
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

/// Names the calling thread; a process has the name of its first thread. Names are truncated to 15 bytes.
pub fn set_thread_name(name: &CStr) {
    // SAFETY: the call reads a string that ends with a NUL byte. It cannot fail.
    unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_name_resolves_to_its_id() {
        assert_eq!(group_id("root").unwrap(), Some(0));
        assert_eq!(group_id("no-such-group-of-genblk").unwrap(), None);
        assert!(group_id("a\0b").is_err());
    }

    #[test]
    fn a_zombie_process_counts_as_dying() {
        assert!(!is_dying(std::process::id()));
        let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("sleep can be started");
        assert!(!is_dying(child.id()));
        child.kill().expect("it can be killed");
        wait_without_reaping(child.id()).expect("it ends");
        assert!(is_dying(child.id()));
        child.wait().expect("it can be reaped");
    }

    #[test]
    fn a_process_id_resolves_to_its_name() {
        assert!(name_of(std::process::id()).is_some_and(|name| !name.is_empty() && !name.contains('\n')));
        assert_eq!(name_of(0), None);
    }
}
