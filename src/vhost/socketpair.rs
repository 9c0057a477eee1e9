//! A private connection with one end not yet accepted: vhost-user-backend takes its connection only from a listener.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

/// A listener with one connection in its backlog, and the other end of that connection.
///
/// => The accepted connection is ours, although every process on the host can see the abstract name: the backlog has room
///    for one connection, and ours was made without waiting, so it fails if another came first.
///
/// # Errors
/// The error of a system call; [`io::ErrorKind::WouldBlock`] if another process connected first.
pub(super) fn private_listener() -> io::Result<(UnixListener, UnixStream)> {
    let name = unguessable_name()?;
    let name = name.as_bytes();
    let listener = UnixListener::bind_addr(&SocketAddr::from_abstract_name(name)?)?;
    // SAFETY: a plain system call on our own descriptor; a second listen(2) sets the length of the backlog.
    if unsafe { libc::listen(listener.as_raw_fd(), 0) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let stream = connect_at_once(name)?;
    stream.set_nonblocking(false)?;
    Ok((listener, stream))
}

/// A random name: any process on the host could bind a predictable one first, and so keep front-ends from connecting.
fn unguessable_name() -> io::Result<String> {
    let mut bytes = [0; 16];
    // SAFETY: `bytes` is writable and of the given length.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    if got != bytes.len().cast_signed() {
        return Err(io::Error::last_os_error());
    }
    Ok(format!("genblk.{:032x}", u128::from_ne_bytes(bytes)))
}

/// Connects to an abstract name without waiting for room in the listener's backlog.
fn connect_at_once(name: &[u8]) -> io::Result<UnixStream> {
    // SAFETY: a plain system call.
    let fd = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: socket() returned a new descriptor, which nothing else owns.
    let stream = unsafe { UnixStream::from_raw_fd(fd) };
    let mut path = [0; 108];
    // An abstract name starts with a NUL byte.
    for (to, &from) in path[1..].iter_mut().zip(name) {
        *to = from.cast_signed() as libc::c_char;
    }
    let family = libc::sa_family_t::try_from(libc::AF_UNIX).expect("a small number");
    let address = libc::sockaddr_un { sun_family: family, sun_path: path };
    let len = libc::socklen_t::try_from(size_of_val(&family) + 1 + name.len()).expect("a short name");
    // SAFETY: the address is ours, and `len` bytes of it are initialised.
    if unsafe { libc::connect(fd, (&raw const address).cast(), len) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_connection_is_refused() {
        let (listener, ours) = private_listener().unwrap();
        let address = listener.local_addr().unwrap();
        let name = address.as_abstract_name().unwrap();
        assert_eq!(connect_at_once(name).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        let (accepted, _) = listener.accept().unwrap();
        drop(ours);
        assert_eq!(io::Read::read(&mut &accepted, &mut [0]).unwrap(), 0, "the accepted connection is ours");
    }
}
