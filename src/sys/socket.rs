//! Functions for Unix domain sockets that std lacks.

use std::fs::{File, Permissions};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use super::process::{Limit, describe_limit};
use super::retry_eintr;

/// Whether a descriptor is a socket on which listen(2) was called.
///
/// # Errors
/// ENOTSOCK for a descriptor that is not a socket.
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

/// Makes a listener refuse connections, even if another descriptor of this process keeps it open.
pub fn stop_listening(listener: &UnixListener) {
    // SAFETY: a plain system call on an open descriptor. It fails only for a descriptor that does not listen.
    unsafe { libc::shutdown(listener.as_raw_fd(), libc::SHUT_RDWR) };
}

/// Connects to an abstract name without waiting; the resulting stream is in blocking mode.
///
/// # Errors
/// EAGAIN if the listener's queue is full, ECONNREFUSED if no process listens, EINVAL if the name is too long.
pub fn connect_without_waiting(abstract_name: &[u8]) -> io::Result<UnixStream> {
    // A path that begins with a NUL byte is an abstract name.
    connect_to(&[&[0], abstract_name].concat())
}

/// Like [`connect_without_waiting`], to a path.
///
/// # Errors
/// As [`connect_without_waiting`]; ENOENT and EACCES for the path.
pub fn connect_to_path_without_waiting(path: &Path) -> io::Result<UnixStream> {
    connect_to(&zero_terminated(path))
}

fn connect_to(name: &[u8]) -> io::Result<UnixStream> {
    let stream = UnixStream::from(stream_socket(libc::SOCK_NONBLOCK)?);
    let (address, len) = unix_address(name)?;
    // SAFETY: `address` has at least `len` bytes, all of them initialised.
    retry_eintr(|| unsafe { libc::connect(stream.as_raw_fd(), (&raw const address).cast(), len) })?;
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// Creates a socket at `path` that accepts no connection yet: [`listen`] follows. Its file never has more permissions
/// than `mode`, and fewer if the umask removes some.
///
/// # Errors
/// EADDRINUSE if the path exists, and the errors of creating a file.
pub fn bind_without_listening(path: &Path, mode: u32) -> io::Result<OwnedFd> {
    let socket = File::from(stream_socket(0)?);
    // On Linux the mode of the unbound socket is that of the file which bind() creates, less the umask (unix(7)).
    socket.set_permissions(Permissions::from_mode(mode))?;
    let (address, len) = unix_address(&zero_terminated(path))?;
    // SAFETY: `address` has at least `len` bytes, all of them initialised.
    retry_eintr(|| unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) })?;
    Ok(socket.into())
}

/// Starts to listen on a socket of [`bind_without_listening`], with the kernel's longest queue of connections.
///
/// # Errors
/// Errors of listen(2).
pub fn listen(socket: OwnedFd) -> io::Result<UnixListener> {
    // SAFETY: a plain system call on an open descriptor.
    retry_eintr(|| unsafe { libc::listen(socket.as_raw_fd(), libc::SOMAXCONN) })?;
    Ok(socket.into())
}

fn stream_socket(flags: libc::c_int) -> io::Result<OwnedFd> {
    new_socket(libc::AF_UNIX, libc::SOCK_STREAM | flags, 0)
}

/// A new socket (socket(2)), which is closed at exec().
pub(super) fn new_socket(family: libc::c_int, kind: libc::c_int, protocol: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: a plain system call.
    let fd = retry_eintr(|| unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) })?;
    // SAFETY: socket() returned a new descriptor, which nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn zero_terminated(path: &Path) -> Vec<u8> {
    [path.as_os_str().as_bytes(), &[0]].concat()
}

/// The address with this `sun_path`, and its length.
fn unix_address(sun_path: &[u8]) -> io::Result<(libc::sockaddr_un, libc::socklen_t)> {
    // SAFETY: all-zero bytes are a valid sockaddr_un.
    let mut address: libc::sockaddr_un = unsafe { MaybeUninit::zeroed().assume_init() };
    address.sun_family = libc::sa_family_t::try_from(libc::AF_UNIX).expect("a small constant");
    let Some(name) = address.sun_path.get_mut(..sun_path.len()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    for (to, &from) in name.iter_mut().zip(sun_path) {
        *to = from.cast_signed() as libc::c_char;
    }
    Ok((address, socklen(size_of_val(&address.sun_family) + sun_path.len())))
}

/// The process at the other end of a connection, at the time when it connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its process ID; 0 if this process cannot see it (another PID namespace).
    pub pid: u32,
    /// Its user ID.
    pub uid: u32,
}

/// The process at the other end of a connection (SO_PEERCRED).
///
/// # Errors
/// Errors of getsockopt(2).
pub fn peer(stream: &UnixStream) -> io::Result<Peer> {
    let mut credentials = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len = socklen(size_of_val(&credentials));
    let (fd, value) = (stream.as_raw_fd(), (&raw mut credentials).cast());
    // SAFETY: the call writes at most `len` bytes to `credentials`, whose size that is.
    retry_eintr(|| unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_PEERCRED, value, &raw mut len) })?;
    Ok(Peer { pid: u32::try_from(credentials.pid).unwrap_or(0), uid: credentials.uid })
}

/// A connected pair of sockets that keep the boundaries of messages (SOCK_SEQPACKET).
///
/// # Errors
/// Errors of socketpair(2).
pub fn message_pair() -> io::Result<(UnixStream, UnixStream)> {
    let mut pair: [RawFd; 2] = [-1; 2];
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
    // SAFETY: the call writes two descriptors at the address given, and `pair` has room for two.
    retry_eintr(|| unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, pair.as_mut_ptr()) })?;
    // SAFETY: socketpair() returned two new descriptors, which nothing else owns.
    let [one, other] = pair.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
    Ok((one.into(), other.into()))
}

/// Sends a message of [`message_pair`] with descriptors, without waiting for space in the other end's queue.
///
/// # Errors
/// EAGAIN if the queue has no space, EPIPE if the other end is closed, EMSGSIZE for a message that is too long for any
/// queue.
pub fn send_with_files(socket: &UnixStream, bytes: &[u8], files: &[BorrowedFd<'_>]) -> io::Result<()> {
    let numbers: Vec<RawFd> = files.iter().map(AsRawFd::as_raw_fd).collect();
    let numbers_bytes = size_of_val(numbers.as_slice());
    let data_bytes = u32::try_from(numbers_bytes).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: the macro only computes a length.
    let space = unsafe { libc::CMSG_SPACE(data_bytes) } as usize;
    // Words, because a control message's header is aligned to one.
    let mut control = vec![0u64; space.div_ceil(8)];
    let mut vector = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: all-zero bytes are a valid msghdr.
    let mut message: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    message.msg_iov = &raw mut vector;
    message.msg_iovlen = 1;
    if !numbers.is_empty() {
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = space;
        // SAFETY: the control buffer has room for a header with `numbers_bytes` bytes of data, by CMSG_SPACE.
        unsafe {
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(data_bytes) as usize;
            std::ptr::copy_nonoverlapping(numbers.as_ptr().cast(), libc::CMSG_DATA(header), numbers_bytes);
        }
    }
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: the vector covers `bytes`, which sendmsg() only reads, and the control buffer outlives the call.
    retry_eintr(|| unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, flags) }).map(drop)
}

/// Receives up to `bytes.len()` bytes, and up to `FILES_MAX` descriptors that came with them; returns the number of
/// bytes and the descriptors.
///
/// # Errors
/// Errors of recvmsg(2). [`io::ErrorKind::Other`] if descriptors are lost, because more were sent, or because this
/// process has reached its limit: the kernel passes on only some of them, and the message would be misinterpreted.
pub fn receive_with_files<const FILES_MAX: usize>(
    socket: &UnixStream,
    bytes: &mut [u8],
) -> io::Result<(usize, Vec<File>)> {
    let files_bytes = u32::try_from(FILES_MAX * size_of::<RawFd>()).expect("a few hundred descriptors");
    // SAFETY: the macro only computes a length.
    let space = unsafe { libc::CMSG_SPACE(files_bytes) } as usize;
    // Words, because a control message's header is aligned to one.
    let mut control = vec![0u64; space.div_ceil(8)];
    let mut vector = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // SAFETY: all-zero bytes are a valid msghdr.
    let mut message: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    message.msg_iov = &raw mut vector;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = space;
    // SAFETY: the vector covers `bytes`, the control buffer has `space` bytes, and both outlive the call.
    let received =
        retry_eintr(|| unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC) })?;
    let mut files = Vec::new();
    // SAFETY: the kernel has filled the control buffer and stored its length in `message`.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    while !header.is_null() {
        // SAFETY: the macros return null or a header within the control buffer, with its data after it.
        let (level, kind, len, data) = unsafe {
            ((*header).cmsg_level, (*header).cmsg_type, (*header).cmsg_len, libc::CMSG_DATA(header).cast::<RawFd>())
        };
        if (level, kind) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
            // SAFETY: the macro only computes a length.
            let count = (len - unsafe { libc::CMSG_LEN(0) } as usize) / size_of::<RawFd>();
            for at in 0..count {
                // SAFETY: the data holds `count` descriptors, which the kernel installed for this call; nothing else
                // in the process owns them.
                files.push(unsafe { OwnedFd::from_raw_fd(data.add(at).read_unaligned()) }.into());
            }
        }
        // SAFETY: as for the first header.
        header = unsafe { libc::CMSG_NXTHDR(&raw const message, header) };
    }
    if message.msg_flags & libc::MSG_CTRUNC != 0 {
        let limit = describe_limit(Limit::Descriptors);
        let why = format!("more than {FILES_MAX} were sent, or RLIMIT_NOFILE ({limit}) is reached");
        return Err(io::Error::other(format!("descriptors of a message are lost: {why}")));
    }
    Ok((received.cast_unsigned(), files))
}

fn socklen(bytes: usize) -> libc::socklen_t {
    libc::socklen_t::try_from(bytes).expect("an address or option has few bytes")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_message_keeps_its_boundaries_and_descriptors() {
        let (ours, theirs) = message_pair().unwrap();
        let file = File::open("/dev/null").unwrap();
        send_with_files(&theirs, b"one", &[]).unwrap();
        send_with_files(&theirs, b"three", &[file.as_fd(), file.as_fd()]).unwrap();
        let mut bytes = [0; 64];
        let (len, files) = receive_with_files::<4>(&ours, &mut bytes).unwrap();
        assert_eq!((&bytes[..len], files.len()), (&b"one"[..], 0));
        let (len, files) = receive_with_files::<4>(&ours, &mut bytes).unwrap();
        assert_eq!((&bytes[..len], files.len()), (&b"three"[..], 2));
        let full = (0..).find_map(|_| send_with_files(&theirs, &[0; 1024], &[]).err()).unwrap();
        assert_eq!(full.kind(), io::ErrorKind::WouldBlock, "a reader that does not read blocks no sender");
        drop(ours);
        // The first send reports that messages were left unread.
        let _ = send_with_files(&theirs, b"x", &[]);
        assert_eq!(send_with_files(&theirs, b"x", &[]).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn a_message_with_truncated_descriptors_is_an_error() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let file = File::open("/dev/null").unwrap();
        let send = |count: usize| {
            use vmm_sys_util::sock_ctrl_msg::ScmSocket;
            theirs.send_with_fds(&[&[1u8, 2, 3][..]], &vec![file.as_raw_fd(); count]).unwrap();
        };
        for count in [0, 1, 2] {
            send(count);
            let (received, files) = receive_with_files::<2>(&ours, &mut [0; 8]).unwrap();
            assert_eq!((received, files.len()), (3, count));
            assert!(files.iter().all(|file| file.metadata().is_ok()));
        }
        send(5);
        let error = receive_with_files::<2>(&ours, &mut [0; 8]).unwrap_err();
        assert!(error.to_string().contains("RLIMIT_NOFILE"), "{error}");
    }
}
