//! Reports a system call that the filter does not allow (SIGSYS), in the last line of the process.

use std::cell::Cell;
use std::io;

use super::syscalls;

/// Longest name of a thread in that line.
const NAME_BYTES_MAX: usize = 96;
/// `si_code` of a signal that a filter raised (SYS_SECCOMP).
const BY_FILTER: libc::c_int = 1;
/// Offset of the number of the system call in siginfo_t: after three numbers, padding and an address.
const CALL_AT: usize = 24;
/// How long a blocked standard error may delay the end of the process, in milliseconds.
const TIMEOUT_MS: libc::c_int = 100;

/// A text of bounded length, which a signal handler can copy and extend.
#[derive(Clone, Copy, Debug)]
struct BoundedText<const MAX: usize> {
    bytes: [u8; MAX],
    len: usize,
}

impl<const MAX: usize> BoundedText<MAX> {
    const EMPTY: Self = Self { bytes: [0; MAX], len: 0 };

    /// Appends as many bytes as fit.
    fn push(&mut self, bytes: &[u8]) {
        for &byte in bytes.iter().take(MAX - self.len) {
            self.bytes[self.len] = byte;
            self.len += 1;
        }
    }

    fn push_number(&mut self, number: i64) {
        let mut digits = [0u8; 20];
        let (mut at, mut rest) = (digits.len(), number.unsigned_abs());
        while at == digits.len() || rest > 0 {
            at -= 1;
            digits[at] = b'0' + u8::try_from(rest % 10).unwrap_or(0);
            rest /= 10;
        }
        if number < 0 {
            self.push(b"-");
        }
        self.push(&digits[at..]);
    }

    fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

thread_local! {
    static THREAD: Cell<BoundedText<NAME_BYTES_MAX>> = const { Cell::new(BoundedText::EMPTY) };
}

/// Sets the name of the calling thread in that line.
pub fn name_thread(name: &str) {
    let mut text = BoundedText::EMPTY;
    text.push(name.as_bytes());
    THREAD.set(text);
}

/// Makes a violation end the process by SIGSYS after a line on standard error.
///
/// # Errors
/// Errors of sigaction(2).
pub fn report_violations() -> io::Result<()> {
    // SAFETY: all-zero bytes are a valid sigaction: no flags and an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_violation as *const () as usize;
    // One-shot: a violation within the handler ends the process immediately.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_RESETHAND | libc::SA_ONSTACK;
    // SAFETY: the handler has the signature that SA_SIGINFO requires; with a null pointer nothing is written.
    match unsafe { libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Writes the line and ends the process. Uses nothing that takes a lock or allocates.
extern "C" fn on_violation(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo_t, which has more than CALL_AT + 4 bytes.
    let (code, call) = unsafe { ((*info).si_code, info.cast::<u8>().add(CALL_AT).cast::<i32>().read()) };
    let mut line = BoundedText::<256>::EMPTY;
    line.push(b"genblk: sandbox: thread \"");
    line.push(THREAD.get().as_bytes());
    line.push(b"\": ");
    if code == BY_FILTER {
        line.push(b"system call ");
        line.push(syscalls::name_of(call.into()).unwrap_or("without a name").as_bytes());
        line.push(b" (");
        line.push_number(call.into());
        line.push(b") is not allowed; the process ends\n");
    } else {
        line.push(b"SIGSYS was sent to the process, which ends\n");
    }
    // SAFETY: system calls that are allowed in every thread, with a local pollfd and a local line. The signal is
    // blocked in its handler and has its default effect, so the process ends when the handler returns.
    unsafe {
        let mut stderr = libc::pollfd { fd: libc::STDERR_FILENO, events: libc::POLLOUT, revents: 0 };
        if libc::poll(&raw mut stderr, 1, TIMEOUT_MS) == 1 {
            libc::write(libc::STDERR_FILENO, line.as_bytes().as_ptr().cast(), line.len);
        }
        libc::syscall(libc::SYS_tgkill, libc::getpid(), libc::gettid(), libc::SIGSYS);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounded_text_never_exceeds_its_capacity() {
        let mut text = BoundedText::<12>::EMPTY;
        text.push_number(0);
        text.push(b" ");
        text.push_number(-450);
        text.push(b" and more than fits");
        assert_eq!(text.as_bytes(), b"0 -450 and m");
    }
}
