//! The sandbox of a process that serves disks: it limits what an attacker in control of a thread can do.
//!
//! A guest or a front-end that finds a hole in genblk's memory safety runs code in the process. The process needs
//! little after that: its image, memory, sockets and eventfds are open. So it gives up the rest before it serves:
//!
//! - It cannot gain privileges (no_new_privs), has no capabilities, and runs as a user of its own if the configuration
//!   names one. No process of that user can trace it, and it leaves no core file.
//! - Landlock refuses every path, TCP, and signals and abstract sockets to other processes.
//! - Each thread has a filter of system calls for its kind (`filter.rs`). A call that is not in it ends the process,
//!   with a line that names the call, the thread and the device.
//! - What a ring does, which no filter sees, io_uring itself restricts (`store/restricted_ring.rs`).
//!
//! Each fence stands alone: where a kernel lacks one, a line says so once, and the others stand.
//!
//! What a confined thread still wants of the host it asks of a broker ([`crate::broker`]).
//!
//! [`prepare`] does what concerns the whole process. Each thread calls [`confine`] when it starts, and the main thread
//! when everything is open. Until [`prepare`], and with `sandbox = "off"`, [`confine`] does nothing.

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

/// The newest version of Landlock whose rights genblk gives up: a newer kernel gives up the same ones.
const LANDLOCK: ABI = ABI::V7;

/// What a thread does, and so which system calls it needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThreadKind {
    /// The main thread of a process whose devices are open: waits, and ends them.
    Main,
    /// A thread that makes devices of what was opened elsewhere, their rings among it.
    Opener,
    /// A worker: vrings, a ring or a pool of threads, guest memory.
    Worker,
    /// A worker of an image at a server: what a worker does, and messages on sockets that are connected.
    RemoteWorker,
    /// A thread of the control plane: accepts front-ends, and their messages.
    Control,
    /// Blocking operations on an image.
    Store,
    /// Populates the cache's memory, and frees what the cache does not use.
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

    /// Whether what threads of this kind call may name a path.
    fn meets_paths(self) -> bool {
        matches!(self, Self::Main | Self::Opener)
    }
}

/// A fence, for messages and for tests that take one away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fence {
    Capabilities,
    Dumping,
    Landlock,
    Seccomp,
}

impl fmt::Display for Fence {
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

/// Prepares the process: the user it runs as, its limits, and what others may do to it. From now on threads confine
/// themselves.
///
/// => Called once, before the threads of devices start.
///
/// # Errors
/// [`ErrorKind::System`] when the process cannot become `user`.
pub fn prepare(user: Option<&User>) -> Result<()> {
    // The pages that rings pin count as locked memory, as soon as the process has no CAP_IPC_LOCK.
    privileges::lift_locked_memory_limit();
    if let Some(user) = user {
        let context = || format!("cannot become user {} (user)", user.uid);
        privileges::become_user(user).map_err(|e| Error::io(ErrorKind::System, context(), e))?;
    }
    memory::prepare_allocator();
    if is_wanted(Fence::Dumping)
        && let Err(e) = privileges::forbid_dumping()
    {
        warn_once(Fence::Dumping, &e);
    }
    violation::report_violations().map_err(|e| Error::io(ErrorKind::System, "cannot set the handler of SIGSYS", e))?;
    IS_ON.store(true, Ordering::Release);
    Ok(())
}

/// Confines the calling thread to what threads of its kind need. That cannot be undone, and holds for the threads that
/// it starts.
pub fn confine(kind: ThreadKind) {
    if !is_on() {
        return;
    }
    violation::name_thread(thread::current().name().unwrap_or("without a name"));
    if is_wanted(Fence::Capabilities)
        && let Err(e) = privileges::forbid_new_privileges().and_then(|()| privileges::drop_capabilities())
    {
        warn_once(Fence::Capabilities, &e);
    }
    if is_wanted(Fence::Landlock) {
        match forbid_paths() {
            Ok(lacks) => lacks.into_iter().for_each(|lacks| warn_once(Fence::Landlock, &lacks)),
            Err(e) => warn_once(Fence::Landlock, &e),
        }
    }
    if is_wanted(Fence::Seccomp)
        && let Err(e) = filter_calls(kind)
    {
        warn_once(Fence::Seccomp, &e);
    }
    debug!("the thread is confined ({kind:?})");
    #[cfg(debug_assertions)]
    probe::run(kind);
}

/// Whether a fence is to be put up: always, except in a test that takes one away to see the others.
fn is_wanted(fence: Fence) -> bool {
    #[cfg(debug_assertions)]
    if probe::takes_away(fence) {
        return false;
    }
    let _ = fence;
    true
}

/// Says once for each fence that the kernel lacks it, or a part of it.
fn warn_once(fence: Fence, why: &dyn fmt::Display) {
    static WARNINGS: [Once; 4] = [const { Once::new() }; 4];
    WARNINGS[fence as usize].call_once(|| {
        warn!("sandbox: {fence} is only partly available on this host: {why}; the other layers stay active");
    });
}

/// Gives up every right on paths, TCP, signals and abstract sockets that the kernel's Landlock knows. Returns what it
/// lacks.
fn forbid_paths() -> std::result::Result<Option<String>, RulesetError> {
    let ruleset = Ruleset::default()
        .handle_access(AccessFs::from_all(LANDLOCK))?
        .handle_access(AccessNet::from_all(LANDLOCK))?
        .scope(Scope::from_all(LANDLOCK))?;
    let status = ruleset.create()?.restrict_self()?;
    Ok(match (status.ruleset, status.landlock) {
        (RulesetStatus::FullyEnforced, _) => None,
        (_, LandlockStatus::Available { effective_abi, .. }) => {
            Some(format!("its version is {}, and {} restricts more", effective_abi as u8, LANDLOCK as u8))
        }
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
    fn a_process_without_a_sandbox_confines_no_thread() {
        thread::spawn(|| {
            confine(ThreadKind::Memory);
            std::fs::read_to_string("/proc/thread-self/status").unwrap();
        })
        .join()
        .unwrap();
        assert!(!is_on());
    }
}
