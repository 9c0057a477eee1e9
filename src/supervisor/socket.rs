//! The socket that a device listens on: bound by the daemon, or inherited.

use std::collections::HashMap;
use std::io;
use std::os::fd::RawFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use crate::config::{Config, DeviceConfig, Socket};
use crate::error::{Error, ErrorKind, Result};
use crate::listener::{BoundSocket, SocketAccess, bind};
use crate::sys::fd::take_inherited;
use crate::sys::socket::is_listening;

/// A listening socket. Dropping it removes its file, if the daemon bound it.
#[derive(Debug)]
pub(super) struct ListenSocket {
    pub listener: UnixListener,
    pub bound: Option<Arc<BoundSocket>>,
}

impl ListenSocket {
    /// Opens the socket that the configuration of a device names.
    ///
    /// # Errors
    /// [`ErrorKind::Socket`] when the path cannot be bound, or when the descriptor is not a listening socket.
    pub fn open(device: &DeviceConfig, inherited: &InheritedSockets) -> Result<Self> {
        match &device.socket {
            Socket::Path(path) => {
                let access = SocketAccess::new(device.socket_mode, &device.socket_group)?;
                let (listener, bound) = bind(&device.name, path, access)?;
                Ok(Self { listener, bound: Some(Arc::new(bound)) })
            }
            Socket::Fd(fd) => Ok(Self { listener: inherited.get(*fd)?, bound: None }),
        }
    }
}

/// The sockets that the daemon inherited, or why they cannot be used.
#[derive(Debug, Default)]
pub(super) struct InheritedSockets(HashMap<RawFd, std::result::Result<UnixListener, String>>);

impl InheritedSockets {
    /// Takes the inherited sockets that `config` names.
    ///
    /// => Call this before the process receives descriptors through a socket: if an inherited one was closed, a
    ///    received one could get its number.
    pub fn take(config: &Config) -> Self {
        let descriptors = config.devices.iter().filter_map(|device| match device.socket {
            Socket::Fd(fd) => Some(fd),
            Socket::Path(_) => None,
        });
        Self(descriptors.map(|fd| (fd, inherited(fd).map_err(|e| e.to_string()))).collect())
    }

    /// The listening socket that the daemon inherited as descriptor `fd`.
    ///
    /// # Errors
    /// [`ErrorKind::Socket`] when it is not a listening socket.
    fn get(&self, fd: RawFd) -> Result<UnixListener> {
        match self.0.get(&fd) {
            Some(Ok(listener)) => listener
                .try_clone()
                .map_err(|e| Error::io(ErrorKind::Socket, format!("cannot duplicate descriptor {fd}"), e)),
            Some(Err(why)) => Err(Error::new(ErrorKind::Socket, why.clone())),
            None => inherited(fd),
        }
    }
}

/// Takes the listening socket that the daemon inherited as descriptor `fd`.
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
