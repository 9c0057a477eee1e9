//! Signals that a thread waits for instead of handling them.

use std::io;

/// Signals that are blocked in every thread, so that one thread can wait for them.
#[derive(Debug)]
pub struct BlockedSignals(libc::sigset_t);

impl BlockedSignals {
    /// Blocks signals, given by number, in the calling thread.
    ///
    /// => Call this before starting threads: they inherit the mask.
    ///
    /// # Errors
    /// EINVAL for a number that is no signal's.
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

/// Blocks every signal in the calling thread: another one gets it. Not SIGSYS, which a filter of system calls raises in
/// the thread itself.
pub fn block_all_in_this_thread() {
    // SAFETY: all-zero bytes are a valid sigset_t, which sigfillset initialises.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: the calls write and read one sigset_t, and `set` is one; with a null pointer the last does not write the
    // old mask. None can fail.
    unsafe {
        libc::sigfillset(&raw mut set);
        libc::sigdelset(&raw mut set, libc::SIGSYS);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
    }
}

/// Ignores signals, given by number, in the whole process: a system call that would raise one fails instead, and a
/// signal that another process sends has no effect.
///
/// # Errors
/// EINVAL for a number that is no signal's, or one of a signal that cannot be ignored.
pub fn ignore(signals: &[libc::c_int]) -> io::Result<()> {
    for &signal in signals {
        // SAFETY: SIG_IGN is a valid disposition for every signal that can be ignored, and installs no code.
        if unsafe { libc::signal(signal, libc::SIG_IGN) } == libc::SIG_ERR {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}
