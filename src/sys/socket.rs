//! Unix domain sockets, as far as std does not cover them.

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::retry_eintr;

/// Whether a descriptor is a socket on which listen(2) was called.
///
/// # Errors
/// ENOTSOCK for a descriptor that is no socket.
pub fn is_listening(socket: impl AsFd) -> io::Result<bool> {
    let mut listens: libc::c_int = 0;
    let mut len = socklen(size_of_val(&listens));
    let (fd, value) = (socket.as_fd().as_raw_fd(), (&raw mut listens).cast());
    // SAFETY: the call writes at most `len` bytes to `listens`, whose size that is.
    retry_eintr(|| unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_ACCEPTCONN, value, &raw mut len) })?;
    Ok(listens != 0)
}

/// Sets the length of a listener's queue of connections that wait to be accepted; the queue holds one more than `len`.
pub fn set_backlog(listener: &UnixListener, len: u16) -> io::Result<()> {
    // SAFETY: a plain system call on an open descriptor; a second listen() changes the queue's length.
    retry_eintr(|| unsafe { libc::listen(listener.as_raw_fd(), len.into()) }).map(drop)
}

/// Connects to an abstract name without waiting; the stream blocks afterwards.
///
/// # Errors
/// EAGAIN if the listener's queue is full, ECONNREFUSED if no process listens, EINVAL if the name is too long.
pub fn connect_without_waiting(abstract_name: &[u8]) -> io::Result<UnixStream> {
    let kind = libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: a plain system call.
    let fd = retry_eintr(|| unsafe { libc::socket(libc::AF_UNIX, kind, 0) })?;
    // SAFETY: socket() returned a new descriptor, which nothing else owns.
    let stream = UnixStream::from(unsafe { OwnedFd::from_raw_fd(fd) });
    // SAFETY: all-zero bytes are a valid sockaddr_un.
    let mut address: libc::sockaddr_un = unsafe { MaybeUninit::zeroed().assume_init() };
    address.sun_family = libc::sa_family_t::try_from(libc::AF_UNIX).expect("a small constant");
    // A path that begins with a NUL byte is an abstract name.
    let Some(path) = address.sun_path.get_mut(1..=abstract_name.len()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    for (to, &from) in path.iter_mut().zip(abstract_name) {
        *to = from.cast_signed() as libc::c_char;
    }
    let len = socklen(size_of_val(&address.sun_family) + 1 + abstract_name.len());
    // SAFETY: `address` has at least `len` bytes, all of them initialised.
    retry_eintr(|| unsafe { libc::connect(stream.as_raw_fd(), (&raw const address).cast(), len) })?;
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// Receives up to `bytes.len()` bytes, and up to `FILES_MAX` descriptors that came with them; returns the number of
/// bytes and the descriptors.
///
/// # Errors
/// Those of recvmsg(2), and an error if there are more descriptors.
pub fn receive_with_files<const FILES_MAX: usize>(
    socket: &UnixStream,
    bytes: &mut [u8],
) -> io::Result<(usize, Vec<File>)> {
    let mut fds = [-1; FILES_MAX];
    let mut vectors = [libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }];
    // SAFETY: the vector covers `bytes`, which is plain memory that outlives the call.
    let (received, count) = unsafe { socket.recv_with_fds(&mut vectors, &mut fds)? };
    // SAFETY: the kernel installed these descriptors for this call; nothing else in the process owns them.
    let files = fds[..count].iter().map(|&fd| unsafe { OwnedFd::from_raw_fd(fd) }.into()).collect();
    Ok((received, files))
}

fn socklen(bytes: usize) -> libc::socklen_t {
    libc::socklen_t::try_from(bytes).expect("an address or option has few bytes")
}
