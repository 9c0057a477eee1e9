//! A lock on an export among the daemons of one host, because NBD has none.
//!
//! A daemon that writes to the export holds an abstract Unix socket named after the export, and so does each of its
//! processes that may write. The kernel releases it when the last of them ends, and no file remains. The lock works
//! between daemons in the same network namespace.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::thread;
use std::time::{Duration, Instant};

use log::warn;

use crate::sys::process::{DEATH_TIMEOUT, effective_uid, is_dying, process_with_socket};
use crate::sys::socket::{Peer, connect_without_waiting, peer};
use crate::sys::unix_diag::{ListeningSocket, listener_of};

/// How often to check whether the lock is free.
const POLL: Duration = Duration::from_millis(10);

/// The same, if each check also searches for the processes that hold the lock.
const DEATH_POLL: Duration = Duration::from_millis(200);

/// If a name is taken although no process listens, another user has it, unless it is released within this time.
const ENDED_MAX: Duration = Duration::from_secs(1);

/// See the documentation of the module.
#[derive(Debug)]
pub(super) struct HostLock(UnixListener);

impl AsFd for HostLock {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The holder of the lock of this name.
#[derive(Debug)]
enum Holder {
    /// No process.
    None,
    /// A daemon of this user or of root.
    Daemon(Daemon),
    /// Another user. It must not be able to lock the owner out of the image by taking the name.
    Other,
}

/// The known identity of a daemon that holds the lock.
#[derive(Clone, Copy, Debug)]
enum Daemon {
    /// The inode of its socket.
    Inode(u32),
    /// Its process ID; 0 if that is unknown.
    Pid(u32),
}

impl Daemon {
    /// A process that holds the lock and is not dying; `None` if none is visible to this user.
    fn living(self) -> Option<u32> {
        match self {
            Self::Inode(inode) => process_with_socket(inode),
            Self::Pid(pid) => Some(pid).filter(|pid| *pid != 0 && !is_dying(*pid)),
        }
    }
}

/// Whether a daemon of user `uid` is a trusted holder.
fn is_trusted(uid: u32) -> bool {
    uid == 0 || uid == effective_uid()
}

fn holder(name: &str) -> io::Result<Holder> {
    match listener_of(name.as_bytes()) {
        Ok(Some(ListeningSocket { uid, inode })) if is_trusted(uid) => Ok(Holder::Daemon(Daemon::Inode(inode))),
        Ok(Some(_)) => Ok(Holder::Other),
        // The kernel does not report it, or its list of sockets changed meanwhile. A connection also identifies the
        // holder, but it stays in the listener's queue.
        Ok(None) | Err(_) => {
            holder_of_connection(connect_without_waiting(name.as_bytes()).and_then(|stream| peer(&stream)))
        }
    }
}

/// The holder, identified by the peer of a connection to its socket. Only two errors describe the holder. Any other is
/// an error of this process, and no reason to write without the lock.
fn holder_of_connection(peer: io::Result<Peer>) -> io::Result<Holder> {
    match peer {
        Ok(Peer { pid, uid }) if is_trusted(uid) => Ok(Holder::Daemon(Daemon::Pid(pid))),
        Ok(_) => Ok(Holder::Other),
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => Ok(Holder::None),
        // The queue is full. Two daemons that write would be worse than none.
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(Holder::Daemon(Daemon::Pid(0))),
        Err(e) => Err(e),
    }
}

impl HostLock {
    /// Takes the lock called `name` for writing. Waits for at most `timeout` until it is free, and longer if no living
    /// process can be found that holds it. `Ok(None)`: another user has taken the name, and the image is served without
    /// the lock.
    ///
    /// # Errors
    /// [`io::ErrorKind::AddrInUse`] with the holder; errors of socket(2) and of connect(2).
    pub fn acquire(name: &str, timeout: Duration) -> io::Result<Option<Self>> {
        let address = SocketAddr::from_abstract_name(name)?;
        let wait = Wait::new(timeout);
        loop {
            match UnixListener::bind_addr(&address) {
                Ok(listener) => return Ok(Some(Self(listener))),
                Err(e) if e.kind() == io::ErrorKind::AddrInUse => {}
                Err(e) => return Err(e),
            }
            if wait.elapsed() < timeout {
                thread::sleep(POLL);
                continue;
            }
            match holder(name)? {
                Holder::Daemon(holder) => wait.keep_waiting(|| holder.living())?,
                // The holder has just ended.
                Holder::None if wait.elapsed() < timeout + ENDED_MAX => thread::sleep(POLL),
                Holder::None | Holder::Other => {
                    warn!(
                        "NBD export lock @{name}: another user holds this socket name, so a second daemon could \
                         write to the export"
                    );
                    return Ok(None);
                }
            }
        }
    }

    /// Checks that no daemon holds the lock called `name`. Waits like [`HostLock::acquire`].
    ///
    /// # Errors
    /// As [`HostLock::acquire`].
    pub fn check_free(name: &str, timeout: Duration) -> io::Result<()> {
        let wait = Wait::new(timeout);
        while let Holder::Daemon(holder) = holder(name)? {
            wait.keep_waiting(|| holder.living())?;
        }
        Ok(())
    }
}

/// The wait for a daemon that holds the lock.
#[derive(Debug)]
struct Wait {
    began: Instant,
    timeout: Duration,
}

impl Wait {
    fn new(timeout: Duration) -> Self {
        Self { began: Instant::now(), timeout }
    }

    fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    /// Waits for another interval. As with the lock of a file, an invisible holder is most likely a killed daemon.
    ///
    /// # Errors
    /// [`io::ErrorKind::AddrInUse`] when the wait has lasted long enough.
    fn keep_waiting(&self, holder: impl FnOnce() -> Option<u32>) -> io::Result<()> {
        if self.elapsed() < self.timeout {
            thread::sleep(POLL);
            return Ok(());
        }
        let holder = holder();
        if holder.is_none() && !self.timeout.is_zero() && self.elapsed() < DEATH_TIMEOUT {
            thread::sleep(DEATH_POLL);
            return Ok(());
        }
        let who = match holder {
            Some(pid) => format!("process {pid}"),
            None => "a daemon that this user cannot see".to_owned(),
        };
        Err(io::Error::new(io::ErrorKind::AddrInUse, format!("{who} on this host writes to it")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_lock_excludes_other_writers_until_its_holder_ends() {
        let name = format!("genblk/test/{}", std::process::id());
        HostLock::check_free(&name, Duration::ZERO).unwrap();
        let lock = HostLock::acquire(&name, Duration::ZERO).unwrap().expect("the name is free");
        let copy = lock.as_fd().try_clone_to_owned().unwrap();
        for refused in [HostLock::acquire(&name, Duration::ZERO).map(drop), HostLock::check_free(&name, Duration::ZERO)]
        {
            let error = refused.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
            assert!(error.to_string().contains(&std::process::id().to_string()), "{error}");
        }
        drop(lock);
        assert!(HostLock::acquire(&name, Duration::ZERO).is_err(), "another process still has it");
        drop(copy);
        assert!(HostLock::acquire(&name, Duration::from_secs(5)).unwrap().is_some());
    }

    #[test]
    fn a_local_error_is_not_mistaken_for_another_users_lock() {
        for errno in [libc::EMFILE, libc::ENFILE, libc::ENOMEM, libc::EACCES, libc::EPERM] {
            let error = holder_of_connection(Err(io::Error::from_raw_os_error(errno))).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(errno));
        }
        let other = Peer { pid: 1, uid: effective_uid() + 1 };
        assert!(matches!(holder_of_connection(Ok(other)), Ok(Holder::Other)));
    }

    #[test]
    fn waiting_for_the_host_lock_leaves_no_connection_in_its_backlog() {
        let name = format!("genblk/test/queue/{}", std::process::id());
        let lock = HostLock::acquire(&name, Duration::ZERO).unwrap().expect("the name is free");
        for _ in 0..10 {
            HostLock::check_free(&name, Duration::from_millis(50)).unwrap_err();
        }
        lock.0.set_nonblocking(true).unwrap();
        assert_eq!(lock.0.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn a_lock_holder_with_a_full_backlog_is_still_named() {
        let name = format!("genblk/test/full/{}", std::process::id());
        let lock = HostLock::acquire(&name, Duration::ZERO).unwrap().expect("the name is free");
        crate::sys::socket::set_backlog(&lock.0, 0).unwrap();
        let _queued: Vec<_> = (0..2).map_while(|_| connect_without_waiting(name.as_bytes()).ok()).collect();
        let error = HostLock::check_free(&name, Duration::ZERO).unwrap_err();
        assert!(error.to_string().contains(&std::process::id().to_string()), "{error}");
        let wait = Wait { began: Instant::now() - Duration::from_secs(3), timeout: Duration::from_secs(2) };
        assert!(wait.keep_waiting(|| None).is_ok(), "a killed daemon's");
        assert!(wait.keep_waiting(|| Some(1)).is_err(), "a living daemon's");
    }
}
