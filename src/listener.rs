//! The socket file of a device: created with the configured access, and removed when the daemon ends.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use log::warn;

use crate::error::{Error, ErrorKind, Result};
use crate::sys::process::{effective_uid, group_id, name_of};
use crate::sys::socket::{bind_without_listening, connect_to_path_without_waiting, listen, peer};

/// The part of a mode that concerns the file's owner.
const OWNER_RIGHTS: u32 = 0o700;

/// The users who may connect to a socket, apart from root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketAccess {
    /// Mode of the socket's file. Connecting needs write permission.
    pub mode: u32,
    /// Group of the file; `None`: the daemon's own.
    pub group: Option<u32>,
}

impl SocketAccess {
    /// Only the daemon's own user may connect.
    pub const OWNER: Self = Self { mode: 0o600, group: None };

    /// The access that a configuration describes: `group` is a name or a number, or empty for the daemon's own group.
    ///
    /// # Errors
    /// [`ErrorKind::Socket`] if there is no such group.
    pub fn new(mode: u32, group: &str) -> Result<Self> {
        let refused = |why: &str| Error::new(ErrorKind::Socket, format!("socket_group {group:?}: {why}"));
        let group = match (group, group.parse()) {
            ("", _) => None,
            (_, Ok(number)) => Some(number),
            (name, Err(_)) => {
                let found = group_id(name).map_err(|e| refused(&format!("cannot look it up: {e}")))?;
                Some(found.ok_or_else(|| refused("there is no such group"))?)
            }
        };
        Ok(Self { mode, group })
    }
}

/// A socket that a daemon listens on. Dropping it removes its file, unless another process has replaced the file.
#[derive(Debug)]
pub struct BoundSocket {
    path: PathBuf,
    /// The file, which stays open so that no other file gets its inode number.
    file: File,
}

impl BoundSocket {
    /// Removes the file, unless it was already replaced or removed.
    pub fn remove(&self) {
        let ours = self.file.metadata().map(|metadata| (metadata.dev(), metadata.ino()));
        let there = fs::symlink_metadata(&self.path).map(|metadata| (metadata.dev(), metadata.ino()));
        if ours.is_ok_and(|ours| there.is_ok_and(|there| ours == there)) {
            // It fails if the file is removed at the same time.
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Drop for BoundSocket {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Binds a listening socket for `device` at `path`, after removing a stale socket that no process listens on.
///
/// => No user excluded by `access` can connect at any time, whatever the umask: the file is created for its owner only,
/// then gets its group and its mode, and only then does the socket listen.
///
/// # Errors
/// [`ErrorKind::Socket`] if a process listens on the path, if it is not a socket, or if a system call fails: bind(2),
/// unlink(2), chown(2) of a group that the daemon is not a member of.
pub fn bind(device: &str, path: &Path, access: SocketAccess) -> Result<(UnixListener, BoundSocket)> {
    let shown = path.display();
    let refused = |e| Error::io(ErrorKind::Socket, format!("cannot listen on {shown}"), e);
    remove_stale(device, path)?;
    let socket = bind_without_listening(path, access.mode & OWNER_RIGHTS).map_err(refused)?;
    let bound = open_bound(path).map_err(refused)?;
    // Through the descriptor: in a directory that others can write to, the path may already lead to another file.
    let file = format!("/proc/self/fd/{}", bound.file.as_raw_fd());
    if let Some(group) = access.group {
        let context = || format!("cannot give {shown} to group {group} (socket_group)");
        chown(&file, None, Some(group)).map_err(|e| Error::io(ErrorKind::Socket, context(), e))?;
    }
    fs::set_permissions(&file, Permissions::from_mode(access.mode)).map_err(refused)?;
    Ok((listen(socket).map_err(refused)?, bound))
}

/// Removes the socket of a daemon that has ended without removing it.
fn remove_stale(device: &str, path: &Path) -> Result<()> {
    let shown = path.display();
    let error = |why: &str| Error::new(ErrorKind::Socket, format!("cannot listen on {shown}: {why}"));
    let Ok(metadata) = fs::symlink_metadata(path) else { return Ok(()) };
    if !metadata.file_type().is_socket() {
        return Err(error("it exists and is not a socket"));
    }
    match connect_to_path_without_waiting(path).map_err(|e| (e.kind(), e)) {
        Err((io::ErrorKind::ConnectionRefused, _)) => {
            warn!("{device}: removed stale socket {shown}");
            fs::remove_file(path)
                .map_err(|e| Error::io(ErrorKind::Socket, format!("cannot remove the stale socket {shown}"), e))
        }
        // Its daemon has removed it meanwhile.
        Err((io::ErrorKind::NotFound, _)) => Ok(()),
        // A process listens. If its queue of connections is full, connect(2) gives EAGAIN instead.
        Ok(connection) => {
            let holder = peer(&connection).map_or(0, |peer| peer.pid);
            let name = name_of(holder).unwrap_or_default();
            Err(error(&format!("another process already does (pid {holder}, {name})")))
        }
        Err((io::ErrorKind::WouldBlock, _)) => Err(error("another process already does")),
        Err((_, e)) => Err(Error::io(ErrorKind::Socket, format!("cannot listen on {shown}: the path exists"), e)),
    }
}

/// The socket's file that this process has just created at `path`.
fn open_bound(path: &Path) -> io::Result<BoundSocket> {
    // A socket can be opened only with O_PATH.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_NOFOLLOW).open(path)?;
    let metadata = file.metadata()?;
    if !metadata.file_type().is_socket() || metadata.uid() != effective_uid() {
        return Err(io::Error::other("another process replaced it"));
    }
    Ok(BoundSocket { path: path.to_owned(), file })
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    /// A directory of the test's own, removed at its end.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(test: &str) -> Self {
            let path = std::env::temp_dir().join(format!("genblk-listener-{test}-{}", std::process::id()));
            fs::create_dir(&path).unwrap();
            Self(path)
        }

        fn socket(&self) -> PathBuf {
            self.0.join("socket")
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).unwrap();
        }
    }

    fn mode_and_group(path: &Path) -> (u32, u32) {
        let metadata = fs::symlink_metadata(path).unwrap();
        (metadata.mode() & 0o7777, metadata.gid())
    }

    #[test]
    fn a_new_socket_is_accessible_only_to_its_owner() {
        let scratch = Scratch::new("owner");
        let socket = bind_without_listening(&scratch.socket(), 0o600).unwrap();
        assert_eq!(mode_and_group(&scratch.socket()).0 & !0o600, 0, "it never has more rights");
        assert!(UnixStream::connect(scratch.socket()).is_err(), "connect() fails before listen()");
        listen(socket).unwrap();
    }

    #[test]
    fn a_socket_gets_the_configured_mode_and_group() {
        let scratch = Scratch::new("mode");
        for mode in [0o600, 0o660, 0o666, 0o770] {
            let bound = bind("disk0", &scratch.socket(), SocketAccess { mode, group: None }).unwrap();
            assert_eq!(mode_and_group(&scratch.socket()).0, mode);
            drop(bound);
            assert!(!scratch.socket().exists(), "an orderly end removes it");
        }
        if effective_uid() == 0 {
            let access = SocketAccess::new(0o660, "1").unwrap();
            let _bound = bind("disk0", &scratch.socket(), access).unwrap();
            assert_eq!(mode_and_group(&scratch.socket()), (0o660, 1));
        }
    }

    #[test]
    fn a_socket_group_is_a_name_or_a_number() {
        assert_eq!(SocketAccess::new(0o600, "").unwrap(), SocketAccess::OWNER);
        assert_eq!(SocketAccess::new(0o660, "root").unwrap().group, Some(0));
        assert_eq!(SocketAccess::new(0o660, "64055").unwrap().group, Some(64055));
        let error = SocketAccess::new(0o660, "no-such-group-of-genblk").unwrap_err().to_string();
        assert_eq!(error, "socket_group \"no-such-group-of-genblk\": there is no such group");
    }

    #[test]
    fn a_socket_rebound_by_another_process_is_not_removed() {
        let scratch = Scratch::new("replaced");
        let first = bind("disk0", &scratch.socket(), SocketAccess::OWNER).unwrap();
        fs::remove_file(scratch.socket()).unwrap();
        let second = bind("disk0", &scratch.socket(), SocketAccess::OWNER).unwrap();
        drop(first);
        UnixStream::connect(scratch.socket()).unwrap();
        drop(second);
        assert!(!scratch.socket().exists());
    }

    #[test]
    fn a_socket_with_a_full_backlog_is_in_use() {
        let scratch = Scratch::new("full");
        let (listener, _bound) = bind("disk0", &scratch.socket(), SocketAccess::OWNER).unwrap();
        crate::sys::socket::set_backlog(&listener, 0).unwrap();
        let _waiting = UnixStream::connect(scratch.socket()).unwrap();
        let error = bind("disk0", &scratch.socket(), SocketAccess::OWNER).unwrap_err().to_string();
        assert!(error.ends_with(": another process already does"), "{error}");
    }
}
