//! Functions for stream sockets to a server that std lacks: scattered transfers that never wait, and detection of a
//! lost peer.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use super::file::Segment;
use super::poll::wait_readable;
use super::retry_eintr;

/// Idle seconds before the kernel probes a TCP connection, seconds between probes, and number of unanswered probes.
const KEEP_ALIVE: [(libc::c_int, libc::c_int); 3] =
    [(libc::TCP_KEEPIDLE, 5), (libc::TCP_KEEPINTVL, 2), (libc::TCP_KEEPCNT, 3)];
/// TCP_RTO_MAX_MS (Linux 6.15), which the libc crate does not have: the longest interval between retransmissions, and
/// between probes of a peer that accepts no data.
const TCP_RTO_MAX_MS: libc::c_int = 44;
const RTO_MAX_MS: libc::c_int = 2000;
/// SO_PEERPIDFD (Linux 6.5), which the libc crate does not have.
const SO_PEERPIDFD: libc::c_int = 77;

/// One sendmsg(2) that neither waits nor raises SIGPIPE; returns the number of bytes that the kernel accepted.
///
/// # Errors
/// EAGAIN if it accepted none; errors of a broken connection.
///
/// # Safety
/// The segments must name memory that this thread may read.
pub unsafe fn send(socket: RawFd, segments: &[Segment]) -> io::Result<usize> {
    let message = message_of(segments);
    let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
    // SAFETY: a Segment is an iovec (asserted next to it); the caller guarantees that the memory is valid.
    retry_eintr(|| unsafe { libc::sendmsg(socket, &raw const message, flags) }).map(isize::cast_unsigned)
}

/// One recvmsg(2) that does not wait; returns the number of bytes, 0 at the end of the stream.
///
/// # Errors
/// EAGAIN if no bytes are available; errors of a broken connection.
///
/// # Safety
/// The segments must name memory that this thread may write.
pub unsafe fn receive(socket: RawFd, segments: &[Segment]) -> io::Result<usize> {
    let mut message = message_of(segments);
    // SAFETY: as in send().
    retry_eintr(|| unsafe { libc::recvmsg(socket, &raw mut message, libc::MSG_DONTWAIT) }).map(isize::cast_unsigned)
}

fn message_of(segments: &[Segment]) -> libc::msghdr {
    // SAFETY: all-zero bytes are a valid msghdr.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = segments.as_ptr().cast_mut().cast();
    message.msg_iovlen = segments.len() as _;
    message
}

/// Makes the kernel detect within some seconds that the other end of a TCP connection is unreachable while all sent
/// data is acknowledged. See [`acknowledgement`] for other data.
///
/// => TCP_USER_TIMEOUT would also end the connection of a peer that is reachable, but too slow to accept more data.
///
/// # Errors
/// Errors of setsockopt(2).
pub fn keep_alive(socket: impl AsFd) -> io::Result<()> {
    set(&socket, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1)?;
    for (option, value) in KEEP_ALIVE {
        set(&socket, libc::IPPROTO_TCP, option, value)?;
    }
    // Older kernels retry after up to two minutes.
    let _ = set(&socket, libc::IPPROTO_TCP, TCP_RTO_MAX_MS, RTO_MAX_MS);
    Ok(())
}

/// What the other end of a TCP connection has acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Acknowledgement {
    /// Sent segments that it has not acknowledged.
    pub unacknowledged: u32,
    /// Probes since its last answer, if it accepts no data at present.
    pub probes: u8,
    /// The time since its last acknowledgement, of whatever data.
    pub age: Duration,
}

/// The state of a TCP connection; `None` for other sockets.
pub fn acknowledgement(socket: impl AsFd) -> Option<Acknowledgement> {
    // SAFETY: all-zero bytes are a valid tcp_info.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut len = libc::socklen_t::try_from(size_of_val(&info)).expect("some hundred bytes");
    let (fd, value) = (socket.as_fd().as_raw_fd(), (&raw mut info).cast());
    // SAFETY: the call writes at most `len` bytes to `info`, whose size that is.
    retry_eintr(|| unsafe { libc::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO, value, &raw mut len) }).ok()?;
    let age = Duration::from_millis(info.tcpi_last_ack_recv.into());
    Some(Acknowledgement { unacknowledged: info.tcpi_unacked, probes: info.tcpi_probes, age })
}

/// Makes closing a TCP connection drop unsent data. Has no effect on other sockets.
pub fn drop_unsent_on_close(socket: impl AsFd) {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    let len = libc::socklen_t::try_from(size_of::<libc::linger>()).expect("a few bytes");
    // SAFETY: the call reads `len` bytes of `linger`, whose size that is. It fails for no open socket.
    unsafe {
        libc::setsockopt(socket.as_fd().as_raw_fd(), libc::SOL_SOCKET, libc::SO_LINGER, (&raw const linger).cast(), len)
    };
}

fn set(socket: &impl AsFd, level: libc::c_int, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
    let (fd, len) = (socket.as_fd().as_raw_fd(), libc::socklen_t::try_from(size_of_val(&value)).expect("four bytes"));
    // SAFETY: the call reads `len` bytes of `value`, whose size that is.
    retry_eintr(|| unsafe { libc::setsockopt(fd, level, option, (&raw const value).cast(), len) }).map(drop)
}

/// A descriptor of the process that listens at the other end of a Unix domain socket, readable once that process has
/// ended; `None` if the kernel does not report it, or the process has ended.
///
/// => That is the process which has called listen(2). A server that becomes a daemon after that call continues in
/// another one.
pub fn peer_process(socket: impl AsFd) -> Option<OwnedFd> {
    let mut process: libc::c_int = -1;
    let mut len = libc::socklen_t::try_from(size_of_val(&process)).expect("four bytes");
    let (fd, value) = (socket.as_fd().as_raw_fd(), (&raw mut process).cast());
    // SAFETY: the call writes at most `len` bytes to `process`, whose size that is.
    retry_eintr(|| unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, SO_PEERPIDFD, value, &raw mut len) }).ok()?;
    // SAFETY: the kernel installed a new descriptor, which nothing else owns.
    let process = (process >= 0).then(|| unsafe { OwnedFd::from_raw_fd(process) })?;
    // Since Linux 6.16 the kernel also reports a process that has ended.
    (!wait_readable(process.as_raw_fd(), Duration::ZERO)).then_some(process)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::os::unix::process::CommandExt;
    use std::process::Command;

    use super::*;

    #[test]
    fn a_live_listening_process_is_recognised() {
        let path = std::env::temp_dir().join(format!("genblk-peer-{}", std::process::id()));
        let listener = UnixListener::bind(&path).unwrap();
        let stream = UnixStream::connect(&path).unwrap();
        drop(listener);
        std::fs::remove_file(&path).unwrap();
        // Before Linux 6.5 the process is unknown.
        if let Some(process) = peer_process(&stream) {
            assert!(!wait_readable(process.as_raw_fd(), Duration::ZERO), "this process runs");
        }
    }

    #[test]
    fn a_listening_process_that_has_ended_is_not_taken_for_the_server() {
        let path = std::env::temp_dir().join(format!("genblk-peer-ended-{}", std::process::id()));
        let listener = UnixListener::bind(&path).unwrap();
        let fd = listener.as_raw_fd();
        // A server that listens, forks, and exits: this process is its child.
        let mut parent = Command::new("true");
        // SAFETY: listen(2) is async-signal-safe.
        unsafe { parent.pre_exec(move || retry_eintr(|| libc::listen(fd, 8)).map(drop)) };
        assert!(parent.status().unwrap().success());
        let stream = UnixStream::connect(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert!(peer_process(&stream).is_none());
    }
}
