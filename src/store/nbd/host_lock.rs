//! The lock of an export among the daemons of one host: NBD has none.
//!
//! A daemon that writes to the export holds an abstract Unix socket with the export's name, and so does each of its
//! processes that may write. The kernel releases it with the last of them, and no file is left behind. It is seen by
//! daemons in the same network namespace.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::thread;
use std::time::{Duration, Instant};

use log::warn;

use crate::sys::process::effective_uid;
use crate::sys::socket::{Peer, connect_without_waiting, peer};

/// How often to look whether the lock is free.
const POLL: Duration = Duration::from_millis(10);

/// A name that is taken, although nobody listens, is free after this time, or another user has it.
const ENDED_MAX: Duration = Duration::from_secs(1);

/// See the module.
#[derive(Debug)]
pub(super) struct HostLock(UnixListener);

impl AsFd for HostLock {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Who holds the lock of this name.
#[derive(Debug)]
enum Holder {
    /// Nobody.
    None,
    /// A daemon of this user or of root.
    Daemon(Peer),
    /// Another user, who must not be able to keep the image from its owner by taking the name.
    Other,
}

fn holder(name: &str) -> Holder {
    let holder = match connect_without_waiting(name.as_bytes()) {
        Ok(stream) => peer(&stream),
        // Its queue is full of those who have asked.
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(Peer { pid: 0, uid: effective_uid() }),
        Err(e) => Err(e),
    };
    match holder {
        Ok(holder) if holder.uid == 0 || holder.uid == effective_uid() => Holder::Daemon(holder),
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => Holder::None,
        _ => Holder::Other,
    }
}

impl HostLock {
    /// Takes the lock called `name` for writing. Waits for at most `patience` until it is free. `Ok(None)`: another
    /// user has taken the name, and the image is served without the lock.
    ///
    /// # Errors
    /// [`io::ErrorKind::AddrInUse`] with the holder; those of socket(2).
    pub fn acquire(name: &str, patience: Duration) -> io::Result<Option<Self>> {
        let address = SocketAddr::from_abstract_name(name)?;
        let until = Instant::now() + patience;
        loop {
            match UnixListener::bind_addr(&address) {
                Ok(listener) => return Ok(Some(Self(listener))),
                Err(e) if e.kind() == io::ErrorKind::AddrInUse => {}
                Err(e) => return Err(e),
            }
            if Instant::now() < until {
                thread::sleep(POLL);
                continue;
            }
            match holder(name) {
                Holder::Daemon(holder) => return Err(in_use(&holder)),
                // It has just ended.
                Holder::None if Instant::now() < until + ENDED_MAX => thread::sleep(POLL),
                _ => {
                    warn!("the name @{name} is taken by another user: no other daemon is kept from the export");
                    return Ok(None);
                }
            }
        }
    }

    /// Checks that no daemon holds the lock called `name`. Waits for at most `patience` until it is free.
    ///
    /// # Errors
    /// As [`HostLock::acquire`].
    pub fn check_free(name: &str, patience: Duration) -> io::Result<()> {
        let until = Instant::now() + patience;
        while let Holder::Daemon(holder) = holder(name) {
            if Instant::now() >= until {
                return Err(in_use(&holder));
            }
            thread::sleep(POLL);
        }
        Ok(())
    }
}

fn in_use(holder: &Peer) -> io::Error {
    let who = match holder.pid {
        0 => "a process of another PID namespace".to_owned(),
        pid => format!("process {pid}"),
    };
    io::Error::new(io::ErrorKind::AddrInUse, format!("{who} on this host writes to it"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_writer_holds_the_lock_and_its_end_releases_it() {
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
}
