//! The privileges of the process beyond its user's rights, and how to drop them: capabilities, set-user-ID programs,
//! the user itself, and the rights of other processes on this one.

use std::ffi::CString;
use std::io;
use std::mem::MaybeUninit;

use serde::{Deserialize, Serialize};

use super::process::GROUP_BYTES_MAX;

/// Highest capability that a kernel could have: their sets have 64 bits.
const CAPABILITY_MAX: libc::c_ulong = 63;
/// _LINUX_CAPABILITY_VERSION_3 of <linux/capability.h>.
const CAPABILITY_VERSION: u32 = 0x2008_0522;

fn prctl(option: libc::c_int, argument: libc::c_ulong) -> io::Result<libc::c_int> {
    let zero: libc::c_ulong = 0;
    // SAFETY: the options that this module uses take numbers, so the kernel accesses no memory of the process.
    match unsafe { libc::prctl(option, argument, zero, zero, zero) } {
        result if result >= 0 => Ok(result),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Makes execve(2) in the calling thread, and in those that it starts, grant no privileges that the thread lacks
/// (PR_SET_NO_NEW_PRIVS). This is irreversible.
pub fn forbid_new_privileges() -> io::Result<()> {
    prctl(libc::PR_SET_NO_NEW_PRIVS, 1).map(drop)
}

/// Allows only root to trace and read the process, and disables its core file (PR_SET_DUMPABLE). A change of the user
/// resets that.
pub fn forbid_dumping() -> io::Result<()> {
    prctl(libc::PR_SET_DUMPABLE, 0).map(drop)
}

/// Drops all capabilities of the calling thread and of the threads that it starts, including those that execve(2) could
/// restore.
///
/// # Errors
/// Errors of prctl(2) and capset(2).
pub fn drop_capabilities() -> io::Result<()> {
    for capability in 0..=CAPABILITY_MAX {
        match prctl(libc::PR_CAPBSET_READ, capability) {
            Ok(0) => {}
            Ok(_) => match prctl(libc::PR_CAPBSET_DROP, capability) {
                // A thread without privileges cannot reduce its bounding set, and cannot gain capabilities either.
                Err(error) if error.raw_os_error() == Some(libc::EPERM) => break,
                result => drop(result?),
            },
            // The kernel has no more capabilities.
            Err(_) => break,
        }
    }
    let clear_all = libc::c_ulong::try_from(libc::PR_CAP_AMBIENT_CLEAR_ALL).expect("a small constant");
    prctl(libc::PR_CAP_AMBIENT, clear_all)?;
    /// struct __user_cap_header_struct
    #[repr(C)]
    struct CapabilityHeader {
        version: u32,
        pid: libc::c_int,
    }
    let header = CapabilityHeader { version: CAPABILITY_VERSION, pid: 0 };
    // Two of struct __user_cap_data_struct: the lower and the upper 32 bits of three sets.
    let none = [0u32; 6];
    // SAFETY: the call reads a header and two structures of three u32, and `header` and `none` are those.
    match unsafe { libc::syscall(libc::SYS_capset, &raw const header, none.as_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A user of the host, with the groups that it belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    /// The user ID.
    pub uid: u32,
    /// The ID of its first group.
    pub gid: u32,
    /// The IDs of all its groups.
    pub groups: Vec<u32>,
}

/// The user called `name`; `None` if there is no such user.
///
/// # Errors
/// Errors of getpwnam_r(3); EINVAL for a name with a NUL byte.
pub fn look_up_user(name: &str) -> io::Result<Option<User>> {
    let name = CString::new(name).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    let mut buffer = vec![0; 4096];
    loop {
        let mut user = MaybeUninit::<libc::passwd>::uninit();
        let mut found = std::ptr::null_mut();
        // SAFETY: the name ends with a NUL byte; the call writes one passwd, one pointer, and at most `buffer.len()`
        // bytes of `buffer`.
        let errno = unsafe {
            let (buffer, len) = (buffer.as_mut_ptr(), buffer.len());
            libc::getpwnam_r(name.as_ptr(), user.as_mut_ptr(), buffer, len, &raw mut found)
        };
        match errno {
            0 if found.is_null() => return Ok(None),
            0 => {
                // SAFETY: the call succeeded and found the user, so it has written `user`.
                let user = unsafe { user.assume_init() };
                return Ok(Some(User { uid: user.pw_uid, gid: user.pw_gid, groups: groups_of(&name, user.pw_gid) }));
            }
            libc::ERANGE if buffer.len() < GROUP_BYTES_MAX => buffer.resize(buffer.len() * 4, 0),
            libc::EINTR => {}
            // Some resolvers report "the given name was not found" that way.
            libc::ENOENT | libc::ESRCH => return Ok(None),
            errno => return Err(io::Error::from_raw_os_error(errno)),
        }
    }
}

/// The groups of a user whose first group is `gid`.
fn groups_of(name: &CString, gid: u32) -> Vec<u32> {
    let mut groups = vec![0; 64];
    loop {
        let mut count = libc::c_int::try_from(groups.len()).unwrap_or(libc::c_int::MAX);
        // SAFETY: the name ends with a NUL byte; the call writes at most `count` IDs to `groups`, which has room for
        // them, and then their number to `count`.
        let result = unsafe { libc::getgrouplist(name.as_ptr(), gid, groups.as_mut_ptr(), &raw mut count) };
        let found = usize::try_from(count).unwrap_or(0);
        if result >= 0 || found <= groups.len() {
            groups.truncate(found);
            return groups;
        }
        groups.resize(found, 0);
    }
}

/// Makes the whole process run as `user`. This is irreversible.
///
/// => Call this before a thread has a filter of system calls: the C library changes the user of every thread by a
///    signal, in whose handler each makes the system call.
///
/// # Errors
/// EPERM without CAP_SETUID and CAP_SETGID, unless the process already runs as that user.
pub fn become_user(user: &User) -> io::Result<()> {
    let (uid, gid) = (user.uid, user.gid);
    // SAFETY: geteuid(2) has no preconditions and cannot fail.
    if unsafe { libc::geteuid() } == uid && uid != 0 {
        return Ok(());
    }
    // SAFETY: setgroups reads as many IDs as `groups` has; the others are plain system calls.
    let results = unsafe {
        [
            libc::setgroups(user.groups.len(), user.groups.as_ptr()),
            libc::setresgid(gid, gid, gid),
            libc::setresuid(uid, uid, uid),
        ]
    };
    if results == [0; 3] { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Raises the limit of locked memory as far as the process may: pinned memory of rings counts against it as soon as the
/// process no longer has CAP_IPC_LOCK.
pub fn lift_locked_memory_limit() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the call writes one rlimit at the address given, and `limit` is one.
    if unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &raw mut limit) } != 0 {
        return;
    }
    let unlimited = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    let own_maximum = libc::rlimit { rlim_cur: limit.rlim_max, ..limit };
    for limit in [unlimited, own_maximum] {
        // SAFETY: the call reads one rlimit at the address given.
        if unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const limit) } == 0 {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_name_resolves_to_its_ids_and_groups() {
        let root = look_up_user("root").unwrap().unwrap();
        assert_eq!((root.uid, root.gid), (0, 0));
        assert!(root.groups.contains(&0), "{root:?}");
        assert_eq!(look_up_user("no-such-user-of-genblk").unwrap(), None);
        assert!(look_up_user("a\0b").is_err());
    }

    #[test]
    fn a_thread_drops_its_capabilities() {
        std::thread::spawn(|| {
            drop_capabilities().unwrap();
            let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
            for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
                assert!(status.contains(&format!("{set}:\t0000000000000000\n")), "{set} in {status}");
            }
            // The second call has nothing to drop.
            drop_capabilities().unwrap();
        })
        .join()
        .unwrap();
    }
}
