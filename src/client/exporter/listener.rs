//! The socket on which the exporter listens: a TCP address, a Unix domain socket, or a socket passed by systemd.

use std::env;
use std::fmt;
use std::fs::{self, Permissions};
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use crate::error::{Error, ErrorKind, Result};
use crate::sys::fd::take_inherited;

/// The first descriptor that systemd passes (sd_listen_fds(3)).
const FIRST_PASSED: RawFd = 3;
/// Mode of a Unix domain socket's file: access is controlled by its directory.
const SOCKET_MODE: u32 = 0o666;

/// The address to listen on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListenAddress {
    /// A host and a port.
    Tcp(String),
    /// The path of a Unix domain socket.
    Unix(PathBuf),
    /// The socket that systemd has passed.
    Systemd,
}

impl FromStr for ListenAddress {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        if text == "systemd" {
            return Ok(Self::Systemd);
        }
        let path = text.strip_prefix("unix:").unwrap_or(text);
        if path.starts_with('/') {
            return Ok(Self::Unix(path.into()));
        }
        match text.rsplit_once(':').map(|(host, port)| (host, port.parse::<u16>())) {
            Some((host, Ok(_))) if !host.is_empty() && !text.starts_with("unix:") => Ok(Self::Tcp(text.to_owned())),
            _ => {
                Err("an address is HOST:PORT (127.0.0.1:9950, [::1]:9950), an absolute path, or \"systemd\"".to_owned())
            }
        }
    }
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => f.write_str(address),
            Self::Unix(path) => write!(f, "{}", path.display()),
            Self::Systemd => f.write_str("the socket of the unit"),
        }
    }
}

/// A socket that accepts connections.
#[derive(Debug)]
pub(super) enum ScrapeListener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl ScrapeListener {
    /// Listens at an address.
    ///
    /// # Errors
    /// [`ErrorKind::System`] if it cannot be listened on.
    pub fn open(address: &ListenAddress) -> Result<Self> {
        let opened = match address {
            ListenAddress::Tcp(address) => TcpListener::bind(address.as_str()).map(Self::Tcp),
            ListenAddress::Unix(path) => bind(path).map(Self::Unix),
            ListenAddress::Systemd => passed(),
        };
        opened.map_err(|e| Error::io(ErrorKind::System, format!("cannot listen on {address}"), e))
    }

    /// The next connection.
    ///
    /// # Errors
    /// Errors of accept(2).
    pub fn accept(&self) -> io::Result<Box<dyn ScrapeStream>> {
        match self {
            Self::Tcp(listener) => listener.accept().map(|(stream, _)| Box::new(stream) as _),
            Self::Unix(listener) => listener.accept().map(|(stream, _)| Box::new(stream) as _),
        }
    }
}

/// A connection of a scraper.
pub(super) trait ScrapeStream: Read + Write + Send {
    /// Sets how long each read or write may wait.
    fn set_timeouts(&self, timeout: Duration) -> io::Result<()>;
    /// Signals the end of the reply to the other end.
    fn end_writing(&self) -> io::Result<()>;
}

impl ScrapeStream for TcpStream {
    fn set_timeouts(&self, timeout: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(timeout)).and_then(|()| self.set_write_timeout(Some(timeout)))
    }

    fn end_writing(&self) -> io::Result<()> {
        self.shutdown(std::net::Shutdown::Write)
    }
}

impl ScrapeStream for UnixStream {
    fn set_timeouts(&self, timeout: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(timeout)).and_then(|()| self.set_write_timeout(Some(timeout)))
    }

    fn end_writing(&self) -> io::Result<()> {
        self.shutdown(std::net::Shutdown::Write)
    }
}

/// Listens at a path; replaces the socket of an exporter that has ended.
fn bind(path: &Path) -> io::Result<UnixListener> {
    let is_socket = fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
    let nobody_listens = || matches!(UnixStream::connect(path), Err(e) if e.kind() == io::ErrorKind::ConnectionRefused);
    if is_socket && nobody_listens() {
        fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    fs::set_permissions(path, Permissions::from_mode(SOCKET_MODE))?;
    Ok(listener)
}

/// The socket that systemd has passed.
fn passed() -> io::Result<ScrapeListener> {
    let is_for_us = env::var("LISTEN_PID").is_ok_and(|pid| pid == std::process::id().to_string());
    if !is_for_us || env::var("LISTEN_FDS").as_deref() != Ok("1") {
        return Err(io::Error::other("systemd has not passed one socket ($LISTEN_PID, $LISTEN_FDS)"));
    }
    listener_of(take_inherited(FIRST_PASSED)?)
}

fn listener_of(socket: OwnedFd) -> io::Result<ScrapeListener> {
    if !crate::sys::socket::is_listening(&socket)? {
        return Err(io::Error::other("the socket does not listen: the unit needs Accept=no"));
    }
    let tcp = TcpListener::from(socket);
    // The standard library has no other way to get the family of a socket.
    Ok(match tcp.local_addr() {
        Ok(_) => ScrapeListener::Tcp(tcp),
        Err(_) => ScrapeListener::Unix(OwnedFd::from(tcp).into()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_host_and_a_port_or_a_path() {
        let parse = |text: &str| text.parse::<ListenAddress>();
        assert_eq!(parse("127.0.0.1:9950"), Ok(ListenAddress::Tcp("127.0.0.1:9950".to_owned())));
        assert_eq!(parse("[::1]:9950"), Ok(ListenAddress::Tcp("[::1]:9950".to_owned())));
        assert_eq!(parse("unix:/run/e.sock"), Ok(ListenAddress::Unix("/run/e.sock".into())));
        assert_eq!(parse("/run/e.sock"), Ok(ListenAddress::Unix("/run/e.sock".into())));
        assert_eq!(parse("systemd"), Ok(ListenAddress::Systemd));
        for wrong in ["", "9950", ":9950", "localhost", "localhost:http", "h:65536", "unix:e.sock", "unix:9950"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_listener_is_recognised_by_its_address_family() {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        assert!(matches!(listener_of(tcp.into()).unwrap(), ScrapeListener::Tcp(_)));
        let (stream, _other) = UnixStream::pair().unwrap();
        assert!(listener_of(stream.into()).unwrap_err().to_string().contains("Accept=no"));
    }
}
