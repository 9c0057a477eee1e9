//! Signals that a thread waits for instead of handling them.

use std::io;
use std::sync::atomic::{AtomicPtr, Ordering};

/// Signals that are blocked in every thread, so that one thread can wait for them.
#[derive(Debug)]
pub struct BlockedSignals(libc::sigset_t);

impl BlockedSignals {
    /// Blocks signals, given by number, in the calling thread.
    ///
    /// => Call this before starting threads: they inherit the mask.
    ///
    /// # Errors
    /// EINVAL for a number that is not a signal.
    pub fn block(signals: &[libc::c_int]) -> io::Result<Self> {
        // SAFETY: all-zero bytes are a valid sigset_t, which sigemptyset initialises.
        let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
        // SAFETY: the call writes one sigset_t at the address given, and `set` is one. It cannot fail.
        unsafe { libc::sigemptyset(&raw mut set) };
        for &signal in signals {
            // SAFETY: as above; the call fails for a number that is no signal's.
            if unsafe { libc::sigaddset(&raw mut set, signal) } != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        // SAFETY: the call reads one sigset_t; with a null pointer it does not write the old mask.
        match unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) } {
            0 => Ok(Self(set)),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }

    /// Waits for one of the signals; returns its number.
    pub fn wait(&self) -> io::Result<libc::c_int> {
        let mut signal = 0;
        // SAFETY: block() initialised the set; the call writes the signal's number to a local.
        match unsafe { libc::sigwait(&raw const self.0, &raw mut signal) } {
            0 => Ok(signal),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }
}

/// Runs `act` with every signal blocked in the calling thread. A thread that it starts inherits that from its first
/// instruction on, so no signal for the process is delivered to it. The exception is SIGSYS, which a filter of system
/// calls raises in the thread itself.
pub fn with_all_blocked<R>(act: impl FnOnce() -> R) -> R {
    // SAFETY: all-zero bytes are a valid sigset_t, which the calls below initialise.
    let (mut all, mut before): (libc::sigset_t, libc::sigset_t) = unsafe { (std::mem::zeroed(), std::mem::zeroed()) };
    // SAFETY: the calls write and read one sigset_t each, and `all` and `before` are such. None can fail.
    unsafe {
        libc::sigfillset(&raw mut all);
        libc::sigdelset(&raw mut all, libc::SIGSYS);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const all, &raw mut before);
    }
    let result = act();
    // SAFETY: the call reads one sigset_t; with a null pointer it does not write the old mask.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut()) };
    result
}

/// Name of a signal, for messages.
pub fn name_of(signal: i32) -> String {
    let name = match signal {
        libc::SIGABRT => "SIGABRT",
        libc::SIGBUS => "SIGBUS",
        libc::SIGFPE => "SIGFPE",
        libc::SIGHUP => "SIGHUP",
        libc::SIGILL => "SIGILL",
        libc::SIGINT => "SIGINT",
        libc::SIGKILL => "SIGKILL",
        libc::SIGSEGV => "SIGSEGV",
        libc::SIGSYS => "SIGSYS",
        libc::SIGTERM => "SIGTERM",
        libc::SIGTRAP => "SIGTRAP",
        libc::SIGUSR1 => "SIGUSR1",
        signal => return format!("signal {signal}"),
    };
    name.to_owned()
}

/// The function that [`on_bus_error`] calls with the address whose access failed.
///
/// => It runs in a signal handler: it may load and store atomics, and nothing else.
pub type BusErrorHook = fn(usize);

static BUS_ERROR_HOOK: AtomicPtr<()> = AtomicPtr::new(std::ptr::null_mut());

/// Calls `hook` when an access to memory raises SIGBUS, and lets the signal end the process after that.
///
/// => The signal gets its default effect only after the hook has returned: if two threads access such memory at the
///    same time, the signal of one must not end the process before the hook has run for the other.
///
/// # Errors
/// Errors of sigaction(2).
pub fn on_bus_error(hook: BusErrorHook) -> io::Result<()> {
    extern "C" fn handle(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
        let hook = BUS_ERROR_HOOK.load(Ordering::Acquire);
        // SAFETY: the kernel passes a valid siginfo_t; for SIGBUS it has an address.
        let address = unsafe { (*info).si_addr() }.addr();
        // SAFETY: the only value stored, besides null, is a BusErrorHook.
        unsafe { std::mem::transmute::<*mut (), BusErrorHook>(hook)(address) };
        // SAFETY: all-zero bytes are a valid sigaction: SIG_DFL.
        let default: libc::sigaction = unsafe { std::mem::zeroed() };
        // SAFETY: may be called in a signal handler; with a null pointer nothing is written.
        unsafe { libc::sigaction(libc::SIGBUS, &raw const default, std::ptr::null_mut()) };
        // When this returns, the access is repeated, and the signal ends the process.
    }
    BUS_ERROR_HOOK.store(hook as *mut (), Ordering::Release);
    // SAFETY: all-zero bytes are a valid sigaction: no flags and an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handle as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: the handler has the signature that SA_SIGINFO requires; with a null pointer nothing is written.
    match unsafe { libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Ignores signals, given by number, in the whole process: a system call that would raise one fails instead, and a
/// signal that another process sends has no effect.
///
/// # Errors
/// EINVAL for a number that is not a signal, or is a signal that cannot be ignored.
pub fn ignore(signals: &[libc::c_int]) -> io::Result<()> {
    for &signal in signals {
        // SAFETY: SIG_IGN is a valid disposition for every signal that can be ignored, and installs no code.
        if unsafe { libc::signal(signal, libc::SIG_IGN) } == libc::SIG_ERR {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The signals that the calling thread blocks, a bit for each.
    fn blocked() -> u64 {
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let mask = status.lines().find_map(|line| line.strip_prefix("SigBlk:")).unwrap();
        u64::from_str_radix(mask.trim(), 16).unwrap()
    }

    #[test]
    fn only_the_spawned_thread_has_all_signals_blocked() {
        let before = blocked();
        let child = with_all_blocked(|| std::thread::spawn(blocked)).join().unwrap();
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGUSR1, libc::SIGALRM] {
            assert!(child >> (signal - 1) & 1 == 1, "{}", name_of(signal));
        }
        assert_eq!((child >> (libc::SIGSYS - 1) & 1, blocked()), (0, before));
    }
}
