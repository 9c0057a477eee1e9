//! System calls that a confined process must not be able to make, for tests of the sandbox. Only a binary with debug
//! assertions contains them.

use std::collections::HashMap;
use std::env;
use std::fs::File;
use std::io;
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use super::memory;

/// The variable that names the Unix socket to connect to.
const SOCKET: &str = "GENBLK_SANDBOX_SOCKET";
/// The variable with the ID of the process to trace and to signal.
const VICTIM: &str = "GENBLK_SANDBOX_VICTIM";

fn victim() -> libc::pid_t {
    env::var(VICTIM).ok().and_then(|pid| pid.parse().ok()).unwrap_or_default()
}

/// A file next to the socket that the test names, so that each test has its own.
fn file() -> String {
    env::var(SOCKET).unwrap_or_default() + ".file"
}

/// Attempts an action.
///
/// # Errors
/// The error of the rejected system call; EINVAL for an unknown action.
pub fn attempt(action: &str) -> io::Result<()> {
    match action {
        "open" => File::open("/etc/passwd").map(drop),
        "create" => File::create(file()).map(drop),
        "unlink" => std::fs::remove_file(file()),
        "connect" => UnixStream::connect(env::var(SOCKET).unwrap_or_default()).map(drop),
        "tcp" => TcpStream::connect("127.0.0.1:9").map(drop),
        "exec" => exec(),
        // SAFETY: plain system calls. The child process of fork() ends immediately; PTRACE_SEIZE stops no process.
        "fork" => check(unsafe {
            let pid = libc::fork();
            if pid == 0 {
                libc::_exit(0);
            }
            pid.into()
        }),
        // SAFETY: as above.
        "ptrace" => check(unsafe { libc::ptrace(libc::PTRACE_SEIZE, victim(), 0, 0) }),
        // SAFETY: as above.
        "kill" => check(unsafe { libc::kill(victim(), 0) }.into()),
        "tgkill" => {
            // SAFETY: as above. No process has a thread with this number.
            let result = check(unsafe { libc::syscall(libc::SYS_tgkill, victim(), libc::c_int::MAX, libc::SIGABRT) });
            // The kernel has looked for the thread in the other process.
            result.or_else(|error| if error.raw_os_error() == Some(libc::ESRCH) { Ok(()) } else { Err(error) })
        }
        // SAFETY: as above.
        "setuid" => check(unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) }),
        // SAFETY: as above.
        "unshare" => check(unsafe { libc::unshare(libc::CLONE_NEWUTS) }.into()),
        // SAFETY: it creates a ring without using it, which ends with the process.
        "ring" => check(unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, [0u64; 16].as_mut_ptr()) }),
        "abort" => std::process::abort(),
        "free" => {
            memory::exercise_trimming();
            Ok(())
        }
        "runtime" => exercise_libraries(),
        "stat" => std::fs::metadata("/etc/passwd").map(drop),
        "code" => executable_memory(),
        // SAFETY: a plain system call.
        "dump" => match unsafe { libc::prctl(libc::PR_GET_DUMPABLE) } {
            0 => Err(io::Error::from_raw_os_error(libc::EPERM)),
            result => check(result.into()),
        },
        _ => Err(io::Error::from_raw_os_error(libc::EINVAL)),
    }
}

fn check(result: libc::c_long) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Uses those parts of the C library and the standard library that make further system calls late or rarely.
fn exercise_libraries() -> io::Result<()> {
    // Memory in blocks of every size, which grow: from the heap, from arenas, and in mappings of their own.
    for bits in 4..27 {
        let mut block: Vec<u8> = Vec::with_capacity(1 << bits);
        block.push(1);
        block.reserve_exact(3 << bits);
        block.shrink_to_fit();
        std::hint::black_box(block);
    }
    // A random key, locks that time out, clocks, and the text of an error.
    std::hint::black_box(HashMap::from([(1, 2)]));
    let (lock, condition) = (Mutex::new(()), Condvar::new());
    let locked = lock.lock().unwrap_or_else(PoisonError::into_inner);
    drop(condition.wait_timeout(locked, Duration::from_millis(1)));
    thread::park_timeout(Duration::from_millis(1));
    thread::sleep(Duration::from_millis(1));
    thread::yield_now();
    std::hint::black_box((Instant::now(), SystemTime::now(), io::Error::from_raw_os_error(libc::ESTALE).to_string()));
    // The status of an open file, and the calls that the standard library makes after that has failed for the first
    // time.
    io::stderr().as_fd().try_clone_to_owned().map(File::from)?.metadata()?;
    let (path, buffer) = (std::ptr::null::<libc::c_char>(), std::ptr::null_mut::<libc::statx>());
    // SAFETY: both pointers are null, so the kernel accesses no memory and returns EFAULT.
    let asked = check(unsafe { libc::syscall(libc::SYS_statx, 0, path, 0, libc::STATX_BASIC_STATS, buffer) });
    match asked {
        Err(e) if e.raw_os_error() == Some(libc::EFAULT) => Ok(()),
        other => other.and(Err(io::ErrorKind::Other.into())),
    }
}

/// Replaces the process by a shell that reports the success.
fn exec() -> io::Result<()> {
    let arguments = [c"/bin/sh".as_ptr(), c"-c".as_ptr(), c"echo trespass: exec succeeded >&2".as_ptr()];
    let (arguments, environment) = ([arguments[0], arguments[1], arguments[2], std::ptr::null()], [std::ptr::null()]);
    // SAFETY: both arrays end with a null pointer, and their strings with a NUL byte.
    check(unsafe { libc::execve(arguments[0], arguments.as_ptr(), environment.as_ptr()) }.into())
}

fn executable_memory() -> io::Result<()> {
    let (protection, flags) = (libc::PROT_READ | libc::PROT_EXEC, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping at an address that the kernel chooses replaces no other mapping.
    match unsafe { libc::mmap(std::ptr::null_mut(), 4096, protection, flags, -1, 0) } {
        libc::MAP_FAILED => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
