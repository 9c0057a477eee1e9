//! The socket that a device listens on: bound by the daemon, or inherited.

use std::io;
use std::os::fd::RawFd;
use std::os::unix::net::UnixListener;

use crate::config::{DeviceConfig, Socket};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::fd::take_inherited;
use crate::sys::socket::is_listening;
use crate::vhost::{BoundSocket, SocketAccess, bind};

/// A listening socket. Dropping it removes its file, if the daemon bound it.
#[derive(Debug)]
pub(super) struct ListenSocket {
    pub listener: UnixListener,
    _bound: Option<BoundSocket>,
}

impl ListenSocket {
    /// The socket that the configuration of a device names.
    ///
    /// # Errors
    /// [`ErrorKind::Socket`] when the path cannot be bound, or when the descriptor is not a listening socket.
    pub fn open(device: &DeviceConfig) -> Result<Self> {
        match &device.socket {
            Socket::Path(path) => {
                let access = SocketAccess::new(device.socket_mode, &device.socket_group)?;
                let (listener, bound) = bind(&device.name, path, access)?;
                Ok(Self { listener, _bound: Some(bound) })
            }
            Socket::Fd(fd) => Ok(Self { listener: inherited(*fd)?, _bound: None }),
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
