//! A private connection with one end not yet accepted: vhost-user-backend accepts its connection only from a listener.

use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

use crate::sys::random;
use crate::sys::socket::{connect_without_waiting, set_backlog};

/// A listener with one connection in its backlog, and the other end of that connection.
///
/// => The accepted connection is this one, although every process on the host can see the abstract name: the backlog
///    has room for one connection, and this one is made without waiting, so it fails if another process connected
///    first.
///
/// # Errors
/// The error of a system call; [`io::ErrorKind::WouldBlock`] if another process connected first.
pub(super) fn listener_and_stream() -> io::Result<(UnixListener, UnixStream)> {
    let name = unguessable_name()?;
    let name = name.as_bytes();
    let listener = UnixListener::bind_addr(&SocketAddr::from_abstract_name(name)?)?;
    set_backlog(&listener, 0)?;
    let stream = connect_without_waiting(name)?;
    Ok((listener, stream))
}

/// A random name: any process on the host could bind a predictable one first, and thus prevent front-ends from being
/// served.
fn unguessable_name() -> io::Result<String> {
    Ok(format!("genblk.{:032x}", u128::from_ne_bytes(random::bytes()?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_private_listener_accepts_only_its_own_connection() {
        let (listener, ours) = listener_and_stream().unwrap();
        let address = listener.local_addr().unwrap();
        let name = address.as_abstract_name().unwrap();
        assert_eq!(connect_without_waiting(name).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        let (accepted, _) = listener.accept().unwrap();
        drop(ours);
        assert_eq!(io::Read::read(&mut &accepted, &mut [0]).unwrap(), 0, "the accepted connection is ours");
    }
}
