//! A FUSE file system whose file `image` is the disk.
//!
//! All I/O on the file reaches the disk. The host's page cache must not be used: after a reset, it would hide the loss.
//!
//! For root, the mount is in a mount namespace of the test's thread. So it ends with the test and its daemon, even if
//! they are killed.

use std::ffi::{CString, OsStr};
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    InitFlags, KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen,
    ReplyWrite, Request, Session, WriteFlags,
};

use crate::common::daemon::TempDir;
use crate::common::wait::{TIMEOUT, try_poll};
use crate::disk::Disk;

const IMAGE: INodeNo = INodeNo(2);
/// How long the kernel may remember names and attributes: they never change.
const TTL: Duration = Duration::from_secs(3600);
/// Unit of holes, as of a file system's blocks.
const BLOCK_BYTES: usize = 4096;

/// A mounted disk. Dropping it unmounts it, even if it is in use.
#[derive(Debug)]
pub struct Mount {
    session: Option<BackgroundSession>,
    mount_point: PathBuf,
    _directory: TempDir,
}

impl Mount {
    /// Mounts `disk`. The error says why this host cannot.
    pub fn new(disk: Arc<Disk>) -> Result<Self, String> {
        if let Err(error) = File::options().read(true).write(true).open("/dev/fuse") {
            return Err(format!("/dev/fuse cannot be opened ({error})"));
        }
        // Any other user mounts with fusermount3, in the namespace of all processes.
        let _ = enter_own_mount_namespace();
        let directory = TempDir::new("disk");
        let mount_point = directory.path().join("mounted");
        fs::create_dir(&mount_point).expect("a directory can be made");
        let session = Session::new(ImageFile(disk), &mount_point, &Config::default()).and_then(Session::spawn);
        match session {
            Ok(session) => Ok(Self { session: Some(session), mount_point, _directory: directory }),
            Err(error) => Err(format!("this user cannot mount FUSE file systems ({error})")),
        }
    }

    /// The image.
    pub fn image(&self) -> PathBuf {
        self.mount_point.join("image")
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if detach(&self.mount_point).is_err() {
            let fusermount = ["-u", "-q", "-z", "--"];
            let _ = std::process::Command::new("fusermount3").args(fusermount).arg(&self.mount_point).status();
        }
        // The session ends when the kernel drops the file system. The wait is bounded: a process may keep it in use.
        let session = self.session.take().expect("a mount has a session");
        let _ = try_poll(TIMEOUT, || session.guard.is_finished().then_some(()));
    }
}

/// Gives this thread, and the processes that it starts from now on, a mount namespace of their own.
fn enter_own_mount_namespace() -> io::Result<()> {
    let flags = libc::MS_REC | libc::MS_PRIVATE;
    // SAFETY: plain system calls with NUL-terminated strings; the other pointers are not used for this operation.
    let result = unsafe {
        match libc::unshare(libc::CLONE_NEWNS) {
            0 => libc::mount(std::ptr::null(), c"/".as_ptr(), std::ptr::null(), flags, std::ptr::null()),
            failed => failed,
        }
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Unmounts a file system that may be in use. Operations in flight fail.
fn detach(mount_point: &Path) -> io::Result<()> {
    let path = CString::new(mount_point.as_os_str().as_bytes()).expect("no path holds a NUL");
    // SAFETY: plain system call with a NUL-terminated string.
    let result = unsafe { libc::umount2(path.as_ptr(), libc::MNT_FORCE | libc::MNT_DETACH) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The file system: a directory with one file.
#[derive(Debug)]
struct ImageFile(Arc<Disk>);

impl ImageFile {
    fn attributes(&self, inode: INodeNo) -> FileAttr {
        let (kind, perm, size) = match inode {
            IMAGE => (FileType::RegularFile, 0o666, self.0.len() as u64),
            _ => (FileType::Directory, 0o777, 0),
        };
        let changed_at = self.0.changed_at();
        FileAttr {
            ino: inode,
            size,
            blocks: size / 512,
            atime: UNIX_EPOCH,
            mtime: changed_at,
            ctime: changed_at,
            crtime: UNIX_EPOCH,
            kind,
            perm,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: BLOCK_BYTES as u32,
            flags: 0,
        }
    }
}

/// Replies to an operation that returns no data.
fn send(reply: ReplyEmpty) -> impl FnOnce(Result<(), i32>) + Send {
    move |result| match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(Errno::from_i32(error)),
    }
}

impl Filesystem for ImageFile {
    /// With asynchronous direct I/O, the writes of an io_uring do not lock the file until they complete.
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let _ = config.add_capabilities(InitFlags::FUSE_ASYNC_DIO);
        let _ = config.set_max_background(128);
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if parent == INodeNo::ROOT && name == "image" {
            reply.entry(&TTL, &self.attributes(IMAGE), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&TTL, &self.attributes(inode));
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let start = offset as usize;
        self.0.read(start..start + size as usize, move |result| match result {
            Ok(bytes) => reply.data(&bytes),
            Err(error) => reply.error(Errno::from_i32(error)),
        });
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let count = data.len();
        if offset as usize + count > self.0.len() {
            return reply.error(Errno::EFBIG);
        }
        let completion = move |result| match result {
            Ok(()) => reply.written(count as u32),
            Err(error) => reply.error(Errno::from_i32(error)),
        };
        self.0.write(offset as usize, data.to_vec(), Box::new(completion));
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        self.0.close(Box::new(send(reply)));
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        self.0.sync(Box::new(send(reply)));
    }

    /// Zeroed blocks are holes. There is always space, so a reservation does nothing.
    fn fallocate(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let start = (offset as usize).min(self.0.len());
        let end = (offset as usize + length as usize).min(self.0.len());
        let zeroes = mode & (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE) != 0;
        if zeroes && start < end {
            self.0.write(start, vec![0; end - start], Box::new(send(reply)));
        } else {
            reply.ok();
        }
    }

    fn lseek(&self, _: &Request, _: INodeNo, _: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        let (start, end) = (offset as usize, self.0.len());
        let found = match whence {
            libc::SEEK_DATA => self.0.seek(start, BLOCK_BYTES, false),
            libc::SEEK_HOLE if start < end => Some(self.0.seek(start, BLOCK_BYTES, true).unwrap_or(end)),
            _ => None,
        };
        match found {
            Some(at) => reply.offset(at as i64),
            None => reply.error(Errno::ENXIO),
        }
    }
}
