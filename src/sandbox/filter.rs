//! The system calls that each kind of thread may make: groups of calls by purpose, and for each kind its groups.
//!
//! A call is allowed with any arguments, or only if one argument has one of a few values. Frequent calls (futex, read,
//! write, epoll, io_uring_enter) have no condition: the kernel then allows them by their number alone, without running
//! the filter (Linux 5.11).
//!
//! => The lists cover glibc and musl. A call that a C library makes instead of another (epoll_pwait for epoll_wait,
//! ppoll for poll) is in the same group.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};

use super::ThreadKind;

/// A system call that is allowed.
#[derive(Clone, Copy, Debug)]
enum Call {
    /// With any arguments.
    Any(libc::c_long),
    /// If argument `argument`, masked with `mask`, is one of `values`.
    If { number: libc::c_long, argument: u8, mask: u64, values: &'static [u64] },
    /// If argument 1 is a path, and argument `flags` does not allow an empty one.
    OfPath { number: libc::c_long, flags: u8 },
    /// tgkill(2), if it sends one of these signals to a thread of this process.
    OwnThread { signals: &'static [u64] },
}

use Call::{Any, If, OfPath, OwnThread};

impl Call {
    fn number(&self) -> libc::c_long {
        match *self {
            Any(number) | If { number, .. } | OfPath { number, .. } => number,
            OwnThread { .. } => libc::SYS_tgkill,
        }
    }
}

/// A call that is allowed if argument `argument`, an int, is one of `values`.
const fn one_of(number: libc::c_long, argument: u8, values: &'static [u64]) -> Call {
    If { number, argument, mask: INT_MASK, values }
}

/// The bits of an argument that is an int.
const INT_MASK: u64 = 0xffff_ffff;

/// A constant of the C library as an argument's value.
const fn value(constant: libc::c_int) -> u64 {
    assert!(constant >= 0);
    constant.cast_unsigned() as u64
}

const PROT_EXEC: u64 = value(libc::PROT_EXEC);
/// PR_SET_VMA: glibc names the stacks of threads.
const NAME_MEMORY: u64 = 0x5356_4d41;
/// MADV_GUARD_INSTALL and MADV_GUARD_REMOVE: glibc guards the stacks of threads.
const GUARDS: [u64; 2] = [102, 103];
const EMPTY_PATH: u64 = value(libc::AT_EMPTY_PATH);
/// The flags of a new thread of this process. A new process or namespace differs in a flag of [`CLONE_MASK`].
const CLONE_THREAD: u64 = value(libc::CLONE_VM | libc::CLONE_FILES | libc::CLONE_SIGHAND | libc::CLONE_THREAD);
const CLONE_MASK: u64 = CLONE_THREAD | NAMESPACES;
const NAMESPACES: u64 = value(
    libc::CLONE_NEWNS
        | libc::CLONE_NEWCGROUP
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUSER
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWNET,
);
/// BLKDISCARD of <linux/fs.h>.
const BLKDISCARD: u64 = 0x1277;
/// FIONBIO, whose type differs between C libraries.
const FIONBIO: u64 = 0x5421;
/// The requests of `store/restricted_ring.rs`.
const RING_REQUESTS: [u64; 4] = [1, 3, 15, 16];
/// The requests before a ring is restricted: register its file, register its eventfd, probe the kernel's operations,
/// set the restrictions, enable the ring, and bound its kernel threads.
const RING_SETUP_REQUESTS: [u64; 6] = [2, 4, 8, 11, 12, 19];

/// Memory of the process, which is never made executable.
const MEMORY: &[Call] = &[
    If { number: libc::SYS_mmap, argument: 2, mask: PROT_EXEC, values: &[0] },
    If { number: libc::SYS_mprotect, argument: 2, mask: PROT_EXEC, values: &[0] },
    Any(libc::SYS_munmap),
    Any(libc::SYS_mremap),
    Any(libc::SYS_brk),
    one_of(
        libc::SYS_madvise,
        2,
        &[
            value(libc::MADV_DONTNEED),
            value(libc::MADV_FREE),
            value(libc::MADV_HUGEPAGE),
            value(libc::MADV_NOHUGEPAGE),
            value(libc::MADV_DONTDUMP),
            value(libc::MADV_POPULATE_WRITE),
            value(libc::MADV_COLLAPSE),
            GUARDS[0],
            GUARDS[1],
        ],
    ),
];

/// Locks, time, random numbers, and queries about the thread itself.
const RUNTIME: &[Call] = &[
    Any(libc::SYS_futex),
    Any(libc::SYS_sched_yield),
    Any(libc::SYS_sched_getaffinity),
    Any(libc::SYS_clock_gettime),
    Any(libc::SYS_clock_getres),
    Any(libc::SYS_clock_nanosleep),
    Any(libc::SYS_nanosleep),
    Any(libc::SYS_gettimeofday),
    #[cfg(target_arch = "x86_64")]
    Any(libc::SYS_time),
    Any(libc::SYS_getcpu),
    Any(libc::SYS_getrandom),
    Any(libc::SYS_getpid),
    Any(libc::SYS_gettid),
    Any(libc::SYS_restart_syscall),
    // Only to query a limit, not to set it.
    If { number: libc::SYS_prlimit64, argument: 2, mask: u64::MAX, values: &[0] },
    one_of(libc::SYS_prctl, 0, &[value(libc::PR_SET_NAME), value(libc::PR_GET_NAME), NAME_MEMORY]),
];

/// The end of a thread or of the process, including abort(3), and signal handlers. The handler of SIGSYS cannot be
/// replaced.
const END: &[Call] = &[
    Any(libc::SYS_exit),
    Any(libc::SYS_exit_group),
    Any(libc::SYS_rt_sigreturn),
    Any(libc::SYS_rt_sigprocmask),
    Any(libc::SYS_rt_sigtimedwait),
    Any(libc::SYS_sigaltstack),
    one_of(libc::SYS_rt_sigaction, 0, &[value(libc::SIGABRT), value(libc::SIGBUS), value(libc::SIGSEGV)]),
    OwnThread { signals: &[value(libc::SIGABRT), value(libc::SIGSYS)] },
];

/// The watchdog's signal to a thread whose write blocks (`sys/guarded.rs`): SIGRTMIN + 3, where the C library keeps the
/// first two or three real-time signals to itself.
const INTERRUPT: &[Call] =
    &[OwnThread { signals: &INTERRUPT_SIGNALS }, one_of(libc::SYS_rt_sigaction, 0, &INTERRUPT_SIGNALS)];
const INTERRUPT_SIGNALS: [u64; 2] = [37, 38];

/// Operations on open descriptors: transfers, waits, duplicates, flags, locks.
const DESCRIPTORS: &[Call] = &[
    Any(libc::SYS_read),
    Any(libc::SYS_readv),
    Any(libc::SYS_write),
    Any(libc::SYS_writev),
    Any(libc::SYS_close),
    #[cfg(target_arch = "x86_64")]
    Any(libc::SYS_poll),
    Any(libc::SYS_ppoll),
    one_of(
        libc::SYS_fcntl,
        1,
        &[
            value(libc::F_GETFD),
            value(libc::F_SETFD),
            value(libc::F_GETFL),
            value(libc::F_SETFL),
            value(libc::F_DUPFD_CLOEXEC),
            value(libc::F_ADD_SEALS),
            value(libc::F_GET_SEALS),
            value(libc::F_OFD_GETLK),
            value(libc::F_OFD_SETLK),
        ],
    ),
    Any(libc::SYS_fstat),
    Any(libc::SYS_fstatfs),
    // For an open file, with an empty path. The flag allows one and does not require it, and no filter can read a path:
    // a thread can also find out whether a file exists, its size, owner and times.
    If { number: libc::SYS_newfstatat, argument: 3, mask: EMPTY_PATH, values: &[EMPTY_PATH] },
    If { number: libc::SYS_statx, argument: 2, mask: EMPTY_PATH, values: &[EMPTY_PATH] },
    // Without a path, by which the standard library finds out whether the kernel has the call, after it has failed for
    // an open file (ESTALE of NFS, EIO). It fails with EFAULT.
    If { number: libc::SYS_statx, argument: 1, mask: u64::MAX, values: &[0] },
];

/// Waiting in epoll, and wakers.
const EVENTS: &[Call] = &[
    #[cfg(target_arch = "x86_64")]
    Any(libc::SYS_epoll_wait),
    Any(libc::SYS_epoll_pwait),
    Any(libc::SYS_epoll_pwait2),
    Any(libc::SYS_epoll_ctl),
    Any(libc::SYS_epoll_create1),
    Any(libc::SYS_eventfd2),
];

/// A ring that is set up; its restrictions limit its operations.
const RING: &[Call] = &[Any(libc::SYS_io_uring_enter), one_of(libc::SYS_io_uring_register, 1, &RING_REQUESTS)];

/// I/O on an image without a ring.
const IMAGE: &[Call] = &[
    Any(libc::SYS_pread64),
    Any(libc::SYS_pwrite64),
    Any(libc::SYS_preadv),
    Any(libc::SYS_pwritev),
    Any(libc::SYS_preadv2),
    Any(libc::SYS_pwritev2),
    Any(libc::SYS_lseek),
    Any(libc::SYS_fallocate),
    Any(libc::SYS_fdatasync),
    Any(libc::SYS_fsync),
    one_of(libc::SYS_ioctl, 1, &[BLKDISCARD]),
];

/// Memory of the cache, which is in a file.
const MEMORY_OF_FILES: &[Call] = &[Any(libc::SYS_fallocate)];

/// The records in an image's extended attributes.
const RECORDS: &[Call] = &[Any(libc::SYS_fsetxattr), Any(libc::SYS_fgetxattr)];

/// Messages over Unix sockets.
const MESSAGES: &[Call] = &[
    Any(libc::SYS_recvmsg),
    Any(libc::SYS_sendmsg),
    Any(libc::SYS_recvfrom),
    Any(libc::SYS_sendto),
    Any(libc::SYS_accept4),
    Any(libc::SYS_accept),
    Any(libc::SYS_shutdown),
    Any(libc::SYS_getsockopt),
    Any(libc::SYS_setsockopt),
    Any(libc::SYS_getsockname),
    Any(libc::SYS_getpeername),
    one_of(libc::SYS_ioctl, 1, &[FIONBIO]),
];

/// Setting up a ring. Before it is restricted, only its memory can be registered.
const RING_SETUP: &[Call] =
    &[Any(libc::SYS_io_uring_setup), one_of(libc::SYS_io_uring_register, 1, &RING_SETUP_REQUESTS)];

/// Calls with which a thread confines itself further.
const CONFINEMENT: &[Call] = &[
    one_of(
        libc::SYS_prctl,
        0,
        &[
            value(libc::PR_SET_NO_NEW_PRIVS),
            value(libc::PR_CAPBSET_READ),
            value(libc::PR_CAPBSET_DROP),
            value(libc::PR_CAP_AMBIENT),
        ],
    ),
    Any(libc::SYS_capset),
    Any(libc::SYS_landlock_create_ruleset),
    Any(libc::SYS_landlock_restrict_self),
    Any(libc::SYS_seccomp),
];

/// The connection of an image on a server: data, its state, and a timer.
const CONNECTION: &[Call] = &[
    Any(libc::SYS_sendmsg),
    Any(libc::SYS_recvmsg),
    one_of(libc::SYS_getsockopt, 2, &[value(libc::TCP_INFO)]),
    Any(libc::SYS_timerfd_settime),
];

/// The timer of such a connection.
const TIMER: &[Call] = &[Any(libc::SYS_timerfd_create)];

/// Memory that is shared with a front-end.
const SHARED_MEMORY: &[Call] = &[Any(libc::SYS_memfd_create), Any(libc::SYS_ftruncate)];

/// A new thread of the process; see [`failing`].
const THREADS: &[Call] = &[
    If { number: libc::SYS_clone, argument: 0, mask: CLONE_MASK, values: &[CLONE_THREAD] },
    Any(libc::SYS_clone3),
    Any(libc::SYS_set_robust_list),
    Any(libc::SYS_rseq),
];

/// Calls with paths, all of which fail; see [`failing`]. realpath(3) of an older C library asks for the status of each
/// part of a path.
const PATHS: &[Call] = &[
    Any(libc::SYS_openat),
    #[cfg(target_arch = "x86_64")]
    Any(libc::SYS_open),
    Any(libc::SYS_readlinkat),
    #[cfg(target_arch = "x86_64")]
    Any(libc::SYS_readlink),
    #[cfg(target_arch = "x86_64")]
    Any(libc::SYS_stat),
    #[cfg(target_arch = "x86_64")]
    Any(libc::SYS_lstat),
    OfPath { number: libc::SYS_newfstatat, flags: 3 },
    OfPath { number: libc::SYS_statx, flags: 2 },
    #[cfg(target_arch = "x86_64")]
    Any(libc::SYS_access),
    Any(libc::SYS_faccessat),
    Any(libc::SYS_faccessat2),
    Any(libc::SYS_getcwd),
];

/// Groups that are allowed for every thread.
const EVERY_THREAD: [&[Call]; 4] = [MEMORY, RUNTIME, END, DESCRIPTORS];

/// The groups of a kind, in addition to [`EVERY_THREAD`].
fn groups(kind: ThreadKind) -> &'static [&'static [Call]] {
    match kind {
        ThreadKind::Log => &[],
        ThreadKind::Memory => &[MEMORY_OF_FILES],
        ThreadKind::Store => &[IMAGE, RECORDS],
        ThreadKind::Watchdog => &[INTERRUPT],
        ThreadKind::Worker => &[EVENTS, RING, RECORDS, IMAGE],
        ThreadKind::RemoteWorker => &[EVENTS, RING, RECORDS, IMAGE, CONNECTION],
        ThreadKind::Control => &[EVENTS, MESSAGES, SHARED_MEMORY, THREADS],
        ThreadKind::Main => &[EVENTS, RING, RECORDS, IMAGE, MESSAGES, SHARED_MEMORY, THREADS, CONNECTION, PATHS],
        ThreadKind::Opener => &[
            EVENTS,
            RING,
            RING_SETUP,
            CONFINEMENT,
            RECORDS,
            IMAGE,
            MESSAGES,
            SHARED_MEMORY,
            THREADS,
            INTERRUPT,
            CONNECTION,
            TIMER,
            PATHS,
        ],
    }
}

/// The filter of a kind of thread: other calls raise SIGSYS.
///
/// # Errors
/// The text of seccompiler's error.
pub(super) fn program(kind: ThreadKind) -> Result<BpfProgram, String> {
    let mut rules: BTreeMap<i64, Option<Vec<SeccompRule>>> = BTreeMap::new();
    for call in EVERY_THREAD.iter().chain(groups(kind)).copied().flatten() {
        match *call {
            // Any arguments are allowed, even if another group has a condition.
            Any(number) => drop(rules.insert(number, None)),
            If { .. } | OfPath { .. } | OwnThread { .. } => {
                let alternatives = rules.entry(call.number()).or_insert_with(|| Some(Vec::new()));
                let Some(alternatives) = alternatives else { continue };
                alternatives.extend(conditions(call)?);
            }
        }
    }
    let rules = rules.into_iter().map(|(number, alternatives)| (number, alternatives.unwrap_or_default()));
    compile(rules.collect(), SeccompAction::Trap, SeccompAction::Allow)
}

/// Filters that make calls fail with an error, although the main filter allows them, instead of ending the process.
///
/// => The flags of clone3(2) are in memory, where no filter can read them. If clone3 fails, the C library uses
/// clone(2).
/// => Code that opens and ends devices reads limits in /proc and a device in /sys, but works without them.
///
/// # Errors
/// As [`program`].
pub(super) fn failing(kind: ThreadKind) -> Result<Vec<BpfProgram>, String> {
    let mut programs = Vec::new();
    let mut fail = |calls: &[Call], errno: i32| {
        let rules = calls.iter().map(|call| conditions(call).map(|rules| (call.number(), rules)));
        let action = SeccompAction::Errno(errno.cast_unsigned());
        let rules: Result<BTreeMap<_, _>, String> = rules.collect();
        compile(rules?, SeccompAction::Allow, action).map(|program| programs.push(program))
    };
    if kind.starts_threads() {
        fail(&[Any(libc::SYS_clone3)], libc::ENOSYS)?;
    }
    if kind.may_call_with_paths() {
        fail(PATHS, libc::EACCES)?;
    }
    Ok(programs)
}

/// The rules of a call, one of which is enough; empty: it has no condition.
fn conditions(call: &Call) -> Result<Vec<SeccompRule>, String> {
    let is = |argument, operator, value| SeccompCondition::new(argument, SeccompCmpArgLen::Qword, operator, value);
    let rules = match *call {
        Any(_) => Ok(Vec::new()),
        If { argument, mask, values, .. } => {
            let rule = |&value: &u64| SeccompRule::new(vec![is(argument, SeccompCmpOp::MaskedEq(mask), value)?]);
            values.iter().map(rule).collect()
        }
        OfPath { flags, .. } => is(1, SeccompCmpOp::Ne, 0)
            .and_then(|path| SeccompRule::new(vec![path, is(flags, SeccompCmpOp::MaskedEq(EMPTY_PATH), 0)?]))
            .map(|rule| vec![rule]),
        OwnThread { signals } => {
            let (process, equals) = (u64::from(std::process::id()), || SeccompCmpOp::MaskedEq(INT_MASK));
            let rule = |&signal: &u64| SeccompRule::new(vec![is(0, equals(), process)?, is(2, equals(), signal)?]);
            signals.iter().map(rule).collect()
        }
    };
    rules.map_err(|e: seccompiler::BackendError| e.to_string())
}

fn compile(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    matched: SeccompAction,
) -> Result<BpfProgram, String> {
    let text = |e: seccompiler::BackendError| e.to_string();
    let architecture = std::env::consts::ARCH.try_into().map_err(text)?;
    SeccompFilter::new(rules, otherwise, matched, architecture).map_err(text)?.try_into().map_err(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KINDS: [ThreadKind; 9] = [
        ThreadKind::Main,
        ThreadKind::Opener,
        ThreadKind::Worker,
        ThreadKind::RemoteWorker,
        ThreadKind::Control,
        ThreadKind::Store,
        ThreadKind::Memory,
        ThreadKind::Log,
        ThreadKind::Watchdog,
    ];

    #[test]
    fn every_seccomp_filter_compiles() {
        for kind in KINDS {
            assert!(program(kind).unwrap().len() > 50, "{kind:?}");
        }
        assert!(INTERRUPT_SIGNALS.contains(&value(libc::SIGRTMIN() + 3)));
        assert_eq!(KINDS.map(|kind| failing(kind).unwrap().len()), [2, 2, 0, 0, 1, 0, 0, 0, 0]);
    }

    #[test]
    fn no_seccomp_filter_allows_calls_that_reach_beyond_the_process() {
        let forbidden = [
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_ptrace,
            libc::SYS_process_vm_readv,
            libc::SYS_process_vm_writev,
            libc::SYS_pidfd_getfd,
            libc::SYS_kill,
            libc::SYS_setresuid,
            libc::SYS_mount,
            libc::SYS_unshare,
            libc::SYS_setns,
            libc::SYS_bpf,
            libc::SYS_userfaultfd,
            libc::SYS_unlinkat,
            libc::SYS_openat2,
            libc::SYS_socket,
            libc::SYS_connect,
            libc::SYS_bind,
            libc::SYS_keyctl,
        ];
        for kind in KINDS {
            let calls = EVERY_THREAD.iter().chain(groups(kind)).copied().flatten();
            let numbers: Vec<_> = calls.map(Call::number).collect();
            assert!(forbidden.iter().all(|number| !numbers.contains(number)), "{kind:?}");
            assert_eq!(numbers.contains(&libc::SYS_io_uring_setup), kind == ThreadKind::Opener, "{kind:?}");
            assert_eq!(numbers.contains(&libc::SYS_openat), kind.may_call_with_paths(), "{kind:?}");
            let has_connections = !matches!(
                kind,
                ThreadKind::Worker | ThreadKind::Store | ThreadKind::Memory | ThreadKind::Log | ThreadKind::Watchdog
            );
            assert_eq!(numbers.contains(&libc::SYS_sendmsg), has_connections, "{kind:?}");
        }
    }
}
