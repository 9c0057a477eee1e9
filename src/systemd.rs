//! The service manager that started the daemon: reports the daemon's state to it (sd_notify(3)), and keeps descriptors
//! in its fd store for the next daemon (sd_listen_fds(3), <https://systemd.io/FILE_DESCRIPTOR_STORE/>).
//!
//! Hand-written: the `sd-notify` crate supports neither abstract sockets nor barriers, `libsystemd` pulls in hashing
//! and parsing crates, and `vmm-sys-util`, which genblk uses anyway, already sends descriptors in messages
//! (SCM_RIGHTS).

use std::env;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixStream};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use log::warn;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::error::{Error, ErrorKind, Result};
use crate::sys::fd::take_inherited;

/// Number of the first descriptor that the service manager passes (SD_LISTEN_FDS_START).
const FIRST_FD: RawFd = 3;
/// How long the service manager may take to process a message.
const REPLY_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the service manager may take to close a descriptor that it does not keep: it does so in the background,
/// after it has processed the message.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(50);
/// How often to check whether it has closed the descriptor.
const CLOSE_POLL: Duration = Duration::from_millis(5);

/// The connection to the service manager; see the module. The default is for a daemon that no service manager started:
/// notifications have no effect, and there is no fd store.
#[derive(Debug, Default)]
pub struct ServiceManager {
    /// Connected to $NOTIFY_SOCKET.
    socket: Option<UnixDatagram>,
    /// The descriptors that it passed.
    passed: Mutex<Vec<Passed>>,
}

/// A descriptor that the service manager passed.
#[derive(Debug)]
struct Passed {
    name: String,
    fd: RawFd,
    /// `Some` once it was taken. It stays until it is removed, because a device that cannot be served takes it again.
    file: Option<File>,
}

impl ServiceManager {
    /// The service manager that the environment names.
    ///
    /// # Errors
    /// [`ErrorKind::System`] when the environment describes the passed descriptors inconsistently. Without them nothing
    /// must be served: they may hold the only copy of a guest's data.
    pub fn from_environment() -> Result<Self> {
        let socket = env::var_os("NOTIFY_SOCKET").and_then(|address| {
            let warn_of = |e: &io::Error| warn!("cannot connect to $NOTIFY_SOCKET ({}): {e}", address.display());
            connect(&address).inspect_err(warn_of).ok()
        });
        let is_for_us = env::var("LISTEN_PID").is_ok_and(|pid| pid == std::process::id().to_string());
        let passed = match env::var("LISTEN_FDS") {
            Ok(count) if is_for_us => named_descriptors(&count, env::var("LISTEN_FDNAMES").ok().as_deref())?,
            _ => Vec::new(),
        };
        let passed = passed.into_iter().map(|(name, fd)| Passed { name, fd, file: None });
        Ok(Self { socket, passed: Mutex::new(passed.collect()) })
    }

    /// Sends a state, such as `READY=1`. A failure is only logged, because the daemon works anyway.
    pub fn notify(&self, state: &str) {
        if let Some(socket) = &self.socket
            && let Err(e) = socket.send(state.as_bytes())
        {
            warn!("cannot send {state:?} to the service manager: {e}");
        }
    }

    /// Puts a file into the fd store under a name, where it stays until [`ServiceManager::fdstore_remove`] or until the
    /// unit is stopped.
    ///
    /// => When this returns, the service manager has the file: from now on the next daemon gets it, however this one
    ///    ends.
    ///
    /// The service manager does not report whether it keeps a descriptor, and by default a unit has no fd store. So it
    /// gets a second open file description that holds a lock: as long as the lock is held, the service manager still
    /// has the description open.
    ///
    /// # Errors
    /// There is no service manager, it does not reply, or it does not keep the file.
    pub fn fdstore_push(&self, name: &str, file: &File) -> io::Result<()> {
        let Some(socket) = &self.socket else {
            return Err(io::Error::other("the daemon was not started by a service manager ($NOTIFY_SOCKET)"));
        };
        let copy = File::options().read(true).write(true).open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
        copy.lock()?;
        send(socket, &format!("FDSTORE=1\nFDNAME={name}"), &copy)?;
        drop(copy);
        barrier(socket)?;
        let until = Instant::now() + CLOSE_TIMEOUT;
        while Instant::now() < until {
            if file.try_lock().is_ok() {
                file.unlock()?;
                return Err(io::Error::other(
                    "the fd store is full or disabled (see FileDescriptorStoreMax= of the unit)",
                ));
            }
            std::thread::sleep(CLOSE_POLL);
        }
        Ok(())
    }

    /// Removes the files with this name from the fd store.
    pub fn fdstore_remove(&self, name: &str) {
        self.passed().retain(|passed| passed.name != name || passed.file.is_none());
        self.notify(&format!("FDSTOREREMOVE=1\nFDNAME={name}"));
    }

    /// Takes a file with this name that an earlier daemon put into the fd store; `None` if there is none. The fd store
    /// keeps it as well, and it can be taken again until [`ServiceManager::fdstore_remove`].
    ///
    /// # Errors
    /// EBADF if the descriptor that the environment names is not an inherited one.
    pub fn fdstore_take(&self, name: &str) -> io::Result<Option<File>> {
        let mut passed = self.passed();
        let Some(found) = passed.iter_mut().find(|passed| passed.name == name) else { return Ok(None) };
        let file = match found.file.take() {
            Some(file) => file,
            None => take_inherited(found.fd)?.into(),
        };
        found.file.insert(file).try_clone().map(Some)
    }

    /// A file with this name that an earlier daemon put into the fd store, for reading; it can still be taken. `None`
    /// if there is none.
    ///
    /// # Errors
    /// Errors of open(2).
    pub fn fdstore_peek(&self, name: &str) -> io::Result<Option<File>> {
        let passed = self.passed();
        let Some(found) = passed.iter().find(|passed| passed.name == name) else { return Ok(None) };
        let fd = found.file.as_ref().map_or(found.fd, AsRawFd::as_raw_fd);
        File::open(format!("/proc/self/fd/{fd}")).map(Some)
    }

    /// Names of the passed descriptors, taken or not.
    pub fn fdstore_names(&self) -> Vec<String> {
        self.passed().iter().map(|passed| passed.name.clone()).collect()
    }

    /// Names of the passed descriptors that have not been taken, without those in `used`, which the configuration
    /// names.
    pub fn fdstore_unclaimed(&self, used: &[RawFd]) -> Vec<String> {
        let passed = self.passed();
        let unused = passed.iter().filter(|passed| passed.file.is_none() && !used.contains(&passed.fd));
        unused.map(|passed| passed.name.clone()).collect()
    }

    fn passed(&self) -> MutexGuard<'_, Vec<Passed>> {
        self.passed.lock().expect("no thread panics with the list locked")
    }
}

/// A socket connected to an address as sd_notify(3) describes it: a path, or `@` and an abstract name.
fn connect(address: &OsStr) -> io::Result<UnixDatagram> {
    let address = match address.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(address)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&address)?;
    socket.set_write_timeout(Some(REPLY_TIMEOUT))?;
    Ok(socket)
}

fn send(socket: &UnixDatagram, state: &str, descriptor: &impl AsRawFd) -> io::Result<()> {
    socket
        .send_with_fd(state.as_bytes(), descriptor.as_raw_fd())
        .map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
    Ok(())
}

/// Waits until the service manager has processed every message sent before: it processes messages in order, and closes
/// the barrier's descriptor when it gets to it.
fn barrier(socket: &UnixDatagram) -> io::Result<()> {
    let (mut ours, theirs) = UnixStream::pair()?;
    send(socket, "BARRIER=1", &theirs)?;
    drop(theirs);
    ours.set_read_timeout(Some(REPLY_TIMEOUT))?;
    ours.read(&mut [0]).map_err(|e| io::Error::new(e.kind(), format!("the service manager does not reply: {e}")))?;
    Ok(())
}

/// The passed descriptors with their names (sd_listen_fds_with_names(3)), from $LISTEN_FDS and $LISTEN_FDNAMES.
fn named_descriptors(count: &str, names: Option<&str>) -> Result<Vec<(String, RawFd)>> {
    let error = |why: String| {
        Error::new(ErrorKind::System, format!("cannot use the descriptors that the service manager passed: {why}"))
    };
    let count: u16 = count.parse().map_err(|_| error(format!("$LISTEN_FDS is not a number: {count:?}")))?;
    let names: Vec<String> = match names {
        _ if count == 0 => Vec::new(),
        Some(names) => names.split(':').map(str::to_owned).collect(),
        None => vec!["unknown".to_owned(); count.into()],
    };
    if names.len() != usize::from(count) {
        let found = names.len();
        return Err(error(format!("$LISTEN_FDS is {count}, but the number of names in $LISTEN_FDNAMES is {found}")));
    }
    Ok(names.into_iter().zip(FIRST_FD..).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_get_their_names_in_order() {
        let two = vec![("a".to_owned(), 3), ("b".to_owned(), 4)];
        assert_eq!(named_descriptors("2", Some("a:b")).unwrap(), two);
        assert_eq!(named_descriptors("1", None).unwrap(), [("unknown".to_owned(), 3)]);
        assert_eq!(named_descriptors("0", Some("")).unwrap(), []);
    }

    #[test]
    fn a_mismatch_of_descriptor_and_name_counts_is_an_error() {
        for (count, names) in [("2", "a"), ("1", "a:b"), ("-1", ""), ("many", "a")] {
            assert_eq!(
                named_descriptors(count, Some(names)).unwrap_err().kind(),
                ErrorKind::System,
                "{count}, {names}"
            );
        }
    }

    #[test]
    fn an_abstract_notify_socket_is_supported() {
        let name = format!("genblk-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let listener = UnixDatagram::bind_addr(&address).unwrap();
        connect(OsStr::new(&format!("@{name}"))).unwrap().send(b"READY=1").unwrap();
        let mut received = [0; 16];
        let length = listener.recv(&mut received).unwrap();
        assert_eq!(&received[..length], b"READY=1");
    }
}
