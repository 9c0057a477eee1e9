//! The socket that a device listens on: bound by the daemon, or inherited.

use std::fs;
use std::io;
use std::os::fd::RawFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use crate::config::Socket;
use crate::error::{Error, ErrorKind, Result};
use crate::sys::fd::take_inherited;
use crate::sys::socket::is_listening;
use crate::vhost::bind;

/// A listening socket. Dropping it removes its path, if the daemon bound it.
#[derive(Debug)]
pub(super) struct ListenSocket {
    pub listener: UnixListener,
    path: Option<PathBuf>,
}

impl ListenSocket {
    /// The socket that the configuration names for `device`.
    ///
    /// # Errors
    /// [`ErrorKind::Socket`] when the path cannot be bound, or when the descriptor is not a listening socket.
    pub fn open(device: &str, socket: &Socket) -> Result<Self> {
        match socket {
            Socket::Path(path) => Ok(Self { listener: bind(device, path)?, path: Some(path.clone()) }),
            Socket::Fd(fd) => Ok(Self { listener: inherited(*fd)?, path: None }),
        }
    }
}

impl Drop for ListenSocket {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            // It may have been removed already.
            let _ = fs::remove_file(path);
        }
    }
}

/// The listening socket that the daemon inherited as descriptor `fd`.
fn inherited(fd: RawFd) -> Result<UnixListener> {
    let error = |e| Error::io(ErrorKind::Socket, format!("descriptor {fd} is not a listening Unix domain socket"), e);
    let socket = take_inherited(fd).map_err(error)?;
    if !is_listening(&socket).map_err(error)? {
        return Err(error(io::Error::other("listen() was not called on it")));
    }
    let listener = UnixListener::from(socket);
    // Fails for a socket of another family.
    listener.local_addr().map_err(error)?;
    Ok(listener)
}
