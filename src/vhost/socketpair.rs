//! A connected pair of sockets, of which one end is still to be accepted: the crate takes its connection from a listener
//! and from nothing else.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

/// A listener in whose queue there is one connection, and its other end.
///
/// => The queue is one place long and the connection was made without waiting: had anybody else come first, ours would
///    have been refused. So what is accepted is ours, although every process of the host can see the name.
///
/// # Errors
/// What the system says.
pub(super) fn private_listener() -> io::Result<(UnixListener, UnixStream)> {
    let name = unguessable_name()?;
    let name = name.as_bytes();
    let listener = UnixListener::bind_addr(&SocketAddr::from_abstract_name(name)?)?;
    // SAFETY: a plain system call on our own descriptor; listening again sets the length of the queue.
    if unsafe { libc::listen(listener.as_raw_fd(), 0) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let stream = connect_at_once(name)?;
    stream.set_nonblocking(false)?;
    Ok((listener, stream))
}

/// A name that nobody can have taken before us: any process of the host could, to keep front-ends from attaching.
fn unguessable_name() -> io::Result<String> {
    let mut bytes = [0; 16];
    // SAFETY: the buffer is ours, and as long as we say.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    if got != bytes.len().cast_signed() {
        return Err(io::Error::last_os_error());
    }
    Ok(format!("genblk.{:032x}", u128::from_ne_bytes(bytes)))
}

/// Connects to an abstract name, or fails: never waits for room in the listener's queue.
fn connect_at_once(name: &[u8]) -> io::Result<UnixStream> {
    // SAFETY: a plain system call.
    let fd = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: socket() returned a new descriptor that nobody else owns.
    let stream = unsafe { UnixStream::from_raw_fd(fd) };
    let mut path = [0; 108];
    // An abstract name begins with a NUL byte.
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
    fn who_comes_second_is_refused() {
        let (listener, ours) = private_listener().unwrap();
        let address = listener.local_addr().unwrap();
        let name = address.as_abstract_name().unwrap();
        assert_eq!(connect_at_once(name).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        let (accepted, _) = listener.accept().unwrap();
        drop(ours);
        assert_eq!(io::Read::read(&mut &accepted, &mut [0]).unwrap(), 0, "the other end was ours");
    }
}
