//! Shared by the store tests: images of every kind with clean-up, aligned memory, a test pattern, and a driver of a
//! queue.

#![allow(dead_code, reason = "each test file uses its part")]
#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

#[path = "../common/nbd_server.rs"]
pub mod nbd_server;
#[path = "../common/prng.rs"]
mod prng;

use std::alloc::{Layout, alloc, dealloc};
use std::collections::HashMap;
use std::fs::File;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use genblk::store::faulty::FaultyImage;
use genblk::store::file::{FileImage, IoEngine, OpenOptions};
use genblk::store::nbd::NbdImage;
use genblk::store::{Backing, Event, IoRequest, Segment, StoreQueue};
use genblk::units::{OpKind, Urgency};
use nbd_server::NbdServer;
use prng::Prng;

pub const MIB: u64 = 1 << 20;

/// An image that is deleted with the value, with its loop device, if any.
#[derive(Debug)]
pub struct Image {
    pub path: PathBuf,
    file: PathBuf,
    is_loop: bool,
}

impl Image {
    /// A sparse regular file in cargo's directory for tests.
    pub fn file(name: &str, size: u64) -> Self {
        Self::create(Path::new(env!("CARGO_TARGET_TMPDIR")), name, size)
    }

    /// A file on tmpfs; `None` without /dev/shm.
    pub fn tmpfs(name: &str, size: u64) -> Option<Self> {
        let directory = Path::new("/dev/shm");
        if !directory.is_dir() {
            println!("skipped: no /dev/shm");
            return None;
        }
        Some(Self::create(directory, name, size))
    }

    /// A loop device with logical blocks of `block` bytes; `None` if the host does not allow it.
    pub fn loop_device(name: &str, size: u64, block: u32) -> Option<Self> {
        let mut image = Self::file(name, size);
        let block = block.to_string();
        let output = losetup().args(["--find", "--show", "--sector-size", &block]).arg(&image.file).output();
        match output {
            Ok(output) if output.status.success() => {
                image.path = PathBuf::from(String::from_utf8(output.stdout).unwrap().trim());
                image.is_loop = true;
                Some(image)
            }
            other => {
                println!("skipped: no loop device: {other:?}");
                None
            }
        }
    }

    fn create(directory: &Path, name: &str, size: u64) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = directory.join(format!("genblk-{}-{number}-{name}.img", std::process::id()));
        File::create(&path).unwrap().set_len(size).unwrap();
        Self { file: path.clone(), path, is_loop: false }
    }
}

fn losetup() -> Command {
    let mut command = Command::new("losetup");
    command.env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    command
}

impl Drop for Image {
    fn drop(&mut self) {
        if self.is_loop {
            let result = losetup().arg("--detach").arg(&self.path).status();
            if !result.as_ref().is_ok_and(std::process::ExitStatus::success) {
                println!("cannot detach {}: {result:?}", self.path.display());
            }
        }
        if let Err(error) = std::fs::remove_file(&self.file) {
            println!("cannot delete {}: {error}", self.file.display());
        }
    }
}

/// An image of one kind, served by one I/O engine.
#[derive(Debug)]
pub struct Setting {
    pub label: String,
    pub backing: Arc<dyn Backing>,
    // Dropped after the backing.
    _server: Option<NbdServer>,
    _image: Image,
}

/// Every engine on every kind of image that this machine has, and a faulty image without faults.
pub fn settings(name: &str, size: u64) -> Vec<Setting> {
    let mut all = Vec::new();
    for engine in [IoEngine::Uring, IoEngine::Threads] {
        for direct in [true, false] {
            let mut images = vec![("file", Image::file(name, size))];
            images.extend(Image::tmpfs(name, size).map(|image| ("tmpfs", image)));
            images.extend(Image::loop_device(name, size, 512).map(|image| ("loop", image)));
            if size.is_multiple_of(4096) {
                images.extend(Image::loop_device(name, size, 4096).map(|image| ("loop of 4096", image)));
            }
            for (kind, image) in images {
                let options = OpenOptions { read_only: false, engine, direct, ..OpenOptions::default() };
                let opened = FileImage::open(&image.path, &options).unwrap();
                assert!(direct || !opened.direct());
                let mode = if opened.direct() { "direct" } else { "buffered" };
                let label = format!("{engine:?}, {kind}, direct requested: {direct}, opened {mode}");
                all.push(Setting { label, backing: opened, _server: None, _image: image });
            }
        }
    }
    let image = Image::file(name, size);
    let opened = FileImage::open(&image.path, &OpenOptions::default()).unwrap();
    let (faulty, _faults) = FaultyImage::new(opened);
    all.push(Setting {
        label: "a faulty image without faults".to_owned(),
        backing: faulty,
        _server: None,
        _image: image,
    });
    all.extend(nbd_settings(name, size));
    all
}

/// The servers that this machine has, each on a file.
fn nbd_settings(name: &str, size: u64) -> Vec<Setting> {
    let commands: [&[&str]; 3] = [
        &["nbdkit", "-f", "-U", "SOCKET", "file", "IMAGE"],
        &["nbdkit", "-f", "-U", "SOCKET", "--no-sr", "file", "IMAGE"],
        &["qemu-nbd", "-k", "SOCKET", "-t", "-f", "raw", "-e", "8", "--discard=unmap", "IMAGE"],
    ];
    let start = |command: &&[&str]| {
        let image = Image::file(name, size);
        let shown = image.path.to_str().expect("test paths are UTF-8");
        let command: Vec<&str> = command.iter().map(|word| if *word == "IMAGE" { shown } else { word }).collect();
        let server = NbdServer::start(&image.path.with_extension("sock"), &command)?;
        let backing = NbdImage::open(None, Path::new(&server.uri()), &OpenOptions::default()).unwrap();
        let label = format!("NBD, {}", command[..6].join(" "));
        Some(Setting { label, backing, _server: Some(server), _image: image })
    };
    commands.iter().filter_map(start).collect()
}

/// Submits operations to a queue, kicks it, and waits for all events.
pub struct Driver {
    pub queue: Box<dyn StoreQueue>,
    tag: u64,
}

impl Driver {
    pub fn new(backing: &Arc<dyn Backing>) -> Self {
        Self { queue: backing.attach().unwrap(), tag: 0 }
    }

    pub fn request(&mut self, op: OpKind, offset: u64, len: u64, segments: Vec<Segment>) -> IoRequest {
        self.tag += 1;
        IoRequest { tag: self.tag, op, offset, len, urgency: Urgency::Demand, segments }
    }

    pub fn start(&mut self, op: OpKind, offset: u64, len: u64, segments: Vec<Segment>) -> u64 {
        let request = self.request(op, offset, len, segments);
        self.queue.submit(request).expect("admissible and not full");
        self.tag
    }

    /// Kicks once and collects every event, by tag.
    pub fn finish(&mut self) -> HashMap<u64, Event> {
        self.queue.kick();
        let mut found = HashMap::new();
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.queue.in_flight() > 0 {
            assert!(Instant::now() < deadline, "{} operations did not complete", self.queue.in_flight());
            assert!(readable(self.queue.wake_fd(), 30_000), "{} in flight, but no wake-up", self.queue.in_flight());
            let mut events = Vec::new();
            self.queue.reap(&mut events);
            for event in events {
                assert!(found.insert(tag_of(&event), event).is_none(), "two events with one tag");
            }
        }
        found
    }

    /// Runs one operation.
    pub fn try_run(&mut self, op: OpKind, offset: u64, len: u64, segments: Vec<Segment>) -> Event {
        let tag = self.start(op, offset, len, segments);
        self.finish().remove(&tag).expect("an event for the operation")
    }

    /// Runs one operation that must succeed.
    pub fn run(&mut self, op: OpKind, offset: u64, len: u64, segments: Vec<Segment>) -> Event {
        let event = self.try_run(op, offset, len, segments);
        assert!(!matches!(event, Event::Failed { .. }), "{op:?} at {offset}+{len}: {event:?}");
        event
    }

    pub fn write(&mut self, offset: u64, bytes: &mut Buffer) {
        self.run(OpKind::Write, offset, bytes.len() as u64, vec![bytes.segment(0, bytes.len())]);
    }

    pub fn read(&mut self, offset: u64, len: usize) -> Vec<u8> {
        let mut buffer = Buffer::filled(len, 0xee);
        self.run(OpKind::Read, offset, len as u64, vec![buffer.segment(0, len)]);
        buffer.bytes().to_vec()
    }
}

pub fn tag_of(event: &Event) -> u64 {
    match event {
        Event::Done { tag } | Event::Mapped { tag, .. } | Event::Failed { tag, .. } => *tag,
    }
}

/// Owned memory, aligned to 4096 bytes.
#[derive(Debug)]
pub struct Buffer {
    base: *mut u8,
    len: usize,
}

// SAFETY: the buffer owns its memory.
unsafe impl Send for Buffer {}

impl Buffer {
    pub fn filled(len: usize, byte: u8) -> Self {
        assert!(len > 0);
        // SAFETY: the layout is not empty.
        let base = unsafe { alloc(Self::layout(len)) };
        assert!(!base.is_null());
        let mut buffer = Self { base, len };
        buffer.fill(byte);
        buffer
    }

    pub fn copy_of(bytes: &[u8]) -> Self {
        let buffer = Self::filled(bytes.len(), 0);
        // SAFETY: both have that length, and a new allocation overlaps nothing.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), buffer.base, bytes.len()) };
        buffer
    }

    pub fn fill(&mut self, byte: u8) {
        // SAFETY: the buffer owns `len` bytes from `base`.
        unsafe { std::ptr::write_bytes(self.base, byte, self.len) };
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the buffer owns `len` initialised bytes from `base`.
        unsafe { std::slice::from_raw_parts(self.base, self.len) }
    }

    /// A segment of the memory. The range is not checked, for tests of inadmissible requests.
    pub fn segment(&mut self, offset: usize, len: usize) -> Segment {
        Segment { base: self.base.wrapping_add(offset), len }
    }

    fn layout(len: usize) -> Layout {
        Layout::from_size_align(len, 4096).unwrap()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: `base` was allocated with the same layout.
        unsafe { dealloc(self.base, Self::layout(self.len)) };
    }
}

/// Pseudo-random bytes, none of them zero.
pub fn pattern(len: usize, seed: u64) -> Vec<u8> {
    Prng::new(seed).bytes(len).into_iter().map(|byte| byte | 1).collect()
}

/// Whether a descriptor is or becomes readable within `timeout_ms`.
pub fn readable(fd: RawFd, timeout_ms: i32) -> bool {
    let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: poll reads and writes one pollfd at the address given, and this one is a local.
    unsafe { libc::poll(&raw mut poll, 1, timeout_ms) == 1 }
}
