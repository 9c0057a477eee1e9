//! The service manager that started the daemon, if one did: it is told how the daemon fares, and it keeps descriptors for
//! the daemon that comes next (sd_notify(3), sd_listen_fds(3), <https://systemd.io/FILE_DESCRIPTOR_STORE/>).
//!
//! Our own code, because of what there is `sd-notify` reaches no abstract socket and has no barrier, and `libsystemd` brings
//! hashes and a parser with it; the one thing that is hard, a descriptor in a message, is in a crate that we have.

use std::env;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixStream};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use log::warn;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::error::{Error, ErrorKind, Result};

/// Where the descriptors that it hands over begin (SD_LISTEN_FDS_START).
const FIRST: RawFd = 3;
/// How long it may take to read what it is told.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long it may take to close a descriptor that it does not keep: it does so in the background.
const CLOSING: Duration = Duration::from_millis(50);

/// See the module. The default is the one of a daemon that was started by hand: it hears nothing and keeps nothing.
#[derive(Debug, Default)]
pub struct ServiceManager {
    /// Where it listens.
    socket: Option<UnixDatagram>,
    /// What it handed over and nobody has taken, by name.
    handed_over: Mutex<Vec<(String, RawFd)>>,
}

impl ServiceManager {
    /// The one that the environment speaks of.
    ///
    /// # Errors
    /// [`ErrorKind::System`] when it speaks of descriptors in a way that is not to be understood: what they hold may be
    /// all that there is of a guest's data, so nothing is served without them.
    pub fn from_environment() -> Result<Self> {
        let socket = env::var_os("NOTIFY_SOCKET").and_then(|address| {
            let unheard = |e: &io::Error| warn!("nobody listens at $NOTIFY_SOCKET, {}: {e}", address.display());
            connect(&address).inspect_err(unheard).ok()
        });
        let is_ours = env::var("LISTEN_PID").is_ok_and(|pid| pid == std::process::id().to_string());
        let handed_over = match env::var("LISTEN_FDS") {
            Ok(count) if is_ours => named(&count, env::var("LISTEN_FDNAMES").ok().as_deref())?,
            _ => Vec::new(),
        };
        Ok(Self { socket, handed_over: Mutex::new(handed_over) })
    }

    /// Tells it a state, such as `READY=1`; whether anybody hears it makes no difference to us.
    pub fn notify(&self, state: &str) {
        if let Some(socket) = &self.socket
            && let Err(e) = socket.send(state.as_bytes())
        {
            warn!("the service manager can't be told {state:?}: {e}");
        }
    }

    /// Gives it a file to keep under a name until [`ServiceManager::fdstore_remove`], or until its unit is stopped.
    ///
    /// => When this returns, it has the file: whatever becomes of the daemon then, the next one gets it.
    ///
    /// Nothing tells whether it keeps what it is given, and a unit without a store is the default. So what it gets is
    /// another opening of the file, which is locked: as long as it stays locked, somebody has it.
    ///
    /// # Errors
    /// Nobody listens, or nobody keeps it.
    pub fn fdstore_push(&self, name: &str, file: &File) -> io::Result<()> {
        let Some(socket) = &self.socket else {
            return Err(io::Error::other("no service manager has started the daemon ($NOTIFY_SOCKET)"));
        };
        let given = File::options().read(true).write(true).open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
        given.lock()?;
        send(socket, &format!("FDSTORE=1\nFDNAME={name}"), &given)?;
        drop(given);
        barrier(socket)?;
        let until = Instant::now() + CLOSING;
        while Instant::now() < until {
            if file.try_lock().is_ok() {
                file.unlock()?;
                let why = "the service manager does not keep it (FileDescriptorStoreMax= of the unit is too small)";
                return Err(io::Error::other(why));
            }
            std::thread::sleep(CLOSING / 10);
        }
        Ok(())
    }

    /// It need not keep what has this name any more.
    pub fn fdstore_remove(&self, name: &str) {
        self.notify(&format!("FDSTOREREMOVE=1\nFDNAME={name}"));
    }

    /// What a daemon before this one had it keep under a name. It goes on keeping it.
    pub fn fdstore_take(&self, name: &str) -> Option<File> {
        let mut handed_over = self.handed_over();
        let at = handed_over.iter().position(|(found, _)| found == name)?;
        let (_, fd) = handed_over.swap_remove(at);
        // SAFETY: it was passed to this process for us, is taken once, and is no socket that the configuration names: those
        // have other names than ours.
        Some(unsafe { File::from_raw_fd(fd) })
    }

    /// The names of what it handed over and nobody has taken; `used` are descriptors that the configuration names.
    pub fn fdstore_unclaimed(&self, used: &[RawFd]) -> Vec<String> {
        let handed_over = self.handed_over();
        let unused = handed_over.iter().filter(|(_, fd)| !used.contains(fd));
        unused.map(|(name, _)| name.clone()).collect()
    }

    fn handed_over(&self) -> MutexGuard<'_, Vec<(String, RawFd)>> {
        self.handed_over.lock().expect("nobody panics holding the list")
    }
}

/// A socket connected to an address of sd_notify(3): a path, or `@` and an abstract name.
fn connect(address: &OsStr) -> io::Result<UnixDatagram> {
    let address = match address.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(address)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&address)?;
    socket.set_write_timeout(Some(PATIENCE))?;
    Ok(socket)
}

fn send(socket: &UnixDatagram, state: &str, descriptor: &impl AsRawFd) -> io::Result<()> {
    socket
        .send_with_fd(state.as_bytes(), descriptor.as_raw_fd())
        .map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
    Ok(())
}

/// Waits until everything that was sent before has been dealt with: it closes the barrier's descriptor in its turn.
fn barrier(socket: &UnixDatagram) -> io::Result<()> {
    let (mut ours, theirs) = UnixStream::pair()?;
    send(socket, "BARRIER=1", &theirs)?;
    drop(theirs);
    ours.set_read_timeout(Some(PATIENCE))?;
    ours.read(&mut [0]).map_err(|e| io::Error::new(e.kind(), format!("the service manager does not answer: {e}")))?;
    Ok(())
}

/// The descriptors that it hands over with their names (sd_listen_fds_with_names(3)).
fn named(count: &str, names: Option<&str>) -> Result<Vec<(String, RawFd)>> {
    let refused = |why: String| Error::new(ErrorKind::System, format!("the service manager hands over {why}"));
    let count: u16 = count.parse().map_err(|_| refused(format!("{count:?} descriptors ($LISTEN_FDS)")))?;
    let names: Vec<String> = match names {
        _ if count == 0 => Vec::new(),
        Some(names) => names.split(':').map(str::to_owned).collect(),
        None => vec!["unknown".to_owned(); count.into()],
    };
    if names.len() != usize::from(count) {
        return Err(refused(format!("{count} descriptors and {} names ($LISTEN_FDNAMES)", names.len())));
    }
    Ok(names.into_iter().zip(FIRST..).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_have_the_names_they_were_given() {
        let two = vec![("a".to_owned(), 3), ("b".to_owned(), 4)];
        assert_eq!(named("2", Some("a:b")).unwrap(), two);
        assert_eq!(named("1", None).unwrap(), [("unknown".to_owned(), 3)]);
        assert_eq!(named("0", Some("")).unwrap(), []);
    }

    #[test]
    fn descriptors_that_cannot_be_told_apart_are_an_error() {
        for (count, names) in [("2", "a"), ("1", "a:b"), ("-1", ""), ("many", "a")] {
            assert_eq!(named(count, Some(names)).unwrap_err().kind(), ErrorKind::System, "{count}, {names}");
        }
    }

    #[test]
    fn an_abstract_socket_is_reached() {
        let name = format!("genblk-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let listener = UnixDatagram::bind_addr(&address).unwrap();
        connect(OsStr::new(&format!("@{name}"))).unwrap().send(b"READY=1").unwrap();
        let mut heard = [0; 16];
        let length = listener.recv(&mut heard).unwrap();
        assert_eq!(&heard[..length], b"READY=1");
    }
}
