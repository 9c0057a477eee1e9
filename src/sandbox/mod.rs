//! The sandbox of a process that serves disks: it limits the abilities of an attacker who controls a thread.
//!
//! A guest or a front-end that exploits a memory-safety bug in genblk runs code in the process. Once the image, memory,
//! sockets and eventfds are open, the process needs few rights. So it drops the rest before it serves:
//!
//! - It cannot gain privileges (no_new_privs), has no capabilities, and runs as a different user if the configuration
//!   names one. No process of that user can trace it, and it leaves no core file.
//! - Landlock refuses every path, TCP, and signals and abstract sockets to other processes.
//! - Each thread has a system call filter for its kind (`filter.rs`). A call that the filter does not allow ends the
//!   process, with a log line that names the call, the thread and the device.
//! - No system call filter covers the operations of a ring; io_uring itself restricts these
//!   (`store/restricted_ring.rs`).
//!
//! The fences are independent: if the kernel lacks one, a line is logged once, and the others still hold.
//!
//! A confined thread gets further information about the host from a broker ([`crate::broker`]).
//!
//! [`prepare`] confines the process as a whole. Each thread calls [`confine`] when it starts, the main thread when
//! everything is open. Until [`prepare`], and with `sandbox = "off"`, [`confine`] does nothing.

mod filter;
#[cfg(debug_assertions)]
mod probe;

use std::fmt;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use landlock::{
    ABI, Access, AccessFs, AccessNet, LandlockStatus, Ruleset, RulesetAttr, RulesetError, RulesetStatus, Scope,
};
use log::{debug, warn};

use crate::error::{Error, ErrorKind, Result};
use crate::sys::privileges;
use crate::sys::privileges::User;
use crate::sys::{memory, violation};

/// The newest version of Landlock that genblk uses; on newer kernels it drops the same rights.
const LANDLOCK: ABI = ABI::V7;

/// The kind of a thread, which determines the system calls that it needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThreadKind {
    /// The main thread of a process whose devices are open: waits, and ends them.
    Main,
    /// A thread that creates devices, with their rings, from descriptors that were opened elsewhere.
    Opener,
    /// A worker: vrings, a ring or a pool of threads, guest memory.
    Worker,
    /// A worker of an image on a server: as a worker, and messages on connected sockets.
    RemoteWorker,
    /// A thread of the control plane: accepts front-ends and handles their messages.
    Control,
    /// Blocking operations on an image.
    Store,
    /// Populates the cache's memory, and frees its unused part.
    Memory,
    /// Writes the log.
    Log,
    /// Interrupts writes that block.
    Watchdog,
}

impl ThreadKind {
    /// Whether threads of this kind start others.
    fn starts_threads(self) -> bool {
        matches!(self, Self::Main | Self::Opener | Self::Control)
    }

    /// Whether code that threads of this kind call may use paths.
    fn may_call_with_paths(self) -> bool {
        matches!(self, Self::Main | Self::Opener)
    }
}

/// A fence, for messages and for tests that remove one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Confinement {
    Capabilities,
    Dumping,
    Landlock,
    Seccomp,
}

impl fmt::Display for Confinement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Capabilities => "capabilities",
            Self::Dumping => "dumping",
            Self::Landlock => "landlock",
            Self::Seccomp => "seccomp",
        })
    }
}

/// Whether threads are confined.
static IS_ON: AtomicBool = AtomicBool::new(false);

/// Whether the calling process confines its threads.
pub fn is_on() -> bool {
    IS_ON.load(Ordering::Acquire)
}

/// Prepares the process: its user, its limits, and protection from other processes. From now on threads confine
/// themselves.
///
/// => Called once, before the threads of devices start.
///
/// # Errors
/// [`ErrorKind::System`] when the process cannot become `user`.
pub fn prepare(user: Option<&User>) -> Result<()> {
    // Without CAP_IPC_LOCK, pages pinned by rings count as locked memory.
    privileges::lift_locked_memory_limit();
    if let Some(user) = user {
        let context = || format!("cannot change to user {} (key user)", user.uid);
        privileges::become_user(user).map_err(|e| Error::io(ErrorKind::System, context(), e))?;
    }
    memory::prepare_allocator();
    if is_applied(Confinement::Dumping)
        && let Err(e) = privileges::forbid_dumping()
    {
        warn_once(Confinement::Dumping, &e);
    }
    violation::report_violations().map_err(|e| Error::io(ErrorKind::System, "cannot set the handler of SIGSYS", e))?;
    IS_ON.store(true, Ordering::Release);
    Ok(())
}

/// Confines the calling thread to the system calls that threads of its kind need. That cannot be undone, and also
/// applies to threads that it starts.
pub fn confine(kind: ThreadKind) {
    if !is_on() {
        return;
    }
    violation::name_thread(thread::current().name().unwrap_or("without a name"));
    if is_applied(Confinement::Capabilities)
        && let Err(e) = privileges::forbid_new_privileges().and_then(|()| privileges::drop_capabilities())
    {
        warn_once(Confinement::Capabilities, &e);
    }
    if is_applied(Confinement::Landlock) {
        match forbid_paths() {
            Ok(lacks) => lacks.into_iter().for_each(|lacks| warn_once(Confinement::Landlock, &lacks)),
            Err(e) => warn_once(Confinement::Landlock, &e),
        }
    }
    if is_applied(Confinement::Seccomp)
        && let Err(e) = filter_calls(kind)
    {
        warn_once(Confinement::Seccomp, &e);
    }
    debug!("the thread is confined ({kind:?})");
    #[cfg(debug_assertions)]
    probe::run(kind);
}

/// Whether to apply a fence: always, except in a test that removes one to test the others.
fn is_applied(fence: Confinement) -> bool {
    #[cfg(debug_assertions)]
    if probe::is_disabled_by_test(fence) {
        return false;
    }
    let _ = fence;
    true
}

/// Logs once for each fence that the kernel lacks it, or a part of it.
fn warn_once(fence: Confinement, why: &dyn fmt::Display) {
    static WARNINGS: [Once; 4] = [const { Once::new() }; 4];
    WARNINGS[fence as usize].call_once(|| {
        warn!("sandbox: {fence} is only partly available on this host: {why}; the other layers stay active");
    });
}

/// Drops every right to paths, TCP, signals and abstract sockets that the kernel's Landlock supports. Returns a
/// description of missing support.
fn forbid_paths() -> std::result::Result<Option<String>, RulesetError> {
    let ruleset = Ruleset::default()
        .handle_access(AccessFs::from_all(LANDLOCK))?
        .handle_access(AccessNet::from_all(LANDLOCK))?
        .scope(Scope::from_all(LANDLOCK))?;
    let status = ruleset.create()?.restrict_self()?;
    Ok(match (status.ruleset, status.landlock) {
        (RulesetStatus::FullyEnforced, _) => None,
        (_, LandlockStatus::Available { effective_abi, .. }) => Some(format!(
            "the kernel has version {}, and version {} restricts more",
            effective_abi as u8, LANDLOCK as u8
        )),
        _ => Some("it is not built in, or not in lsm= of the kernel's command line".to_owned()),
    })
}

fn filter_calls(kind: ThreadKind) -> std::result::Result<(), String> {
    let install = |program: &seccompiler::BpfProgram| seccompiler::apply_filter(program).map_err(|e| e.to_string());
    filter::failing(kind)?.iter().try_for_each(install)?;
    install(&filter::program(kind)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unsandboxed_process_confines_no_thread() {
        thread::spawn(|| {
            confine(ThreadKind::Memory);
            std::fs::read_to_string("/proc/thread-self/status").unwrap();
        })
        .join()
        .unwrap();
        assert!(!is_on());
    }
}
