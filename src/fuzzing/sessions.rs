//! What a front-end controls: the bytes, descriptors and messages of its connection, and through them the guest memory
//! and the rings of a device that serves.
//!
//! Both targets talk to a device with everything that serves it. Whatever one front-end does, the next one is served.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::input::Input;
use crate::config::{DeviceConfig, MemoryDir, Socket, Survive};
use crate::service::{Running, Service};
use crate::store::file::{FileImage, IoEngine, OpenOptions};
use crate::sys::memfd;

const IMAGE_BYTES: u64 = 1 << 20;
const MEMORY_BYTES: u64 = 0x1_0000;
/// How long a device may take to serve the next front-end.
const TIMEOUT: Duration = Duration::from_secs(10);

const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_OWNER: u32 = 3;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_BASE: u32 = 10;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const SET_PROTOCOL_FEATURES: u32 = 16;
const SET_VRING_ENABLE: u32 = 18;
const GET_CONFIG: u32 = 24;
const SET_CONFIG: u32 = 25;
const GET_INFLIGHT_FD: u32 = 31;
const SET_INFLIGHT_FD: u32 = 32;
const ADD_MEM_REG: u32 = 37;
const REM_MEM_REG: u32 = 38;

/// The device that all inputs of a process talk to. One input at a time: a second front-end waits for the first.
static DEVICE: Mutex<Option<TestDevice>> = Mutex::new(None);

/// A device with its files.
struct TestDevice {
    directory: PathBuf,
    running: Option<Running>,
}

impl TestDevice {
    fn new() -> Self {
        let directory = PathBuf::from(format!("/dev/shm/genblk-fuzz-device-{}", std::process::id()));
        fs::create_dir_all(&directory).expect("a directory in shared memory");
        let image = directory.join("image");
        File::create(&image).and_then(|file| file.set_len(IMAGE_BYTES)).expect("an image");
        let mut config = DeviceConfig::new("fuzzed", Socket::Path(directory.join("socket")), image);
        config.num_queues = 2;
        config.workers = 1;
        config.poll_us = 0;
        config.cache.size_bytes = 64 << 10;
        config.cache.survive = Survive::Never;
        config.cache.memory_dir = MemoryDir::Path(directory.clone());
        let options = OpenOptions { engine: IoEngine::Threads, direct: false, ..OpenOptions::default() };
        let image = FileImage::open(&config.image, &options).expect("the image opens");
        let service = Service::with_image(&config, image).expect("the device opens");
        Self { directory, running: Some(service.start().expect("the device starts")) }
    }

    fn connect(&self) -> UnixStream {
        let socket = UnixStream::connect(self.directory.join("socket")).expect("the device listens");
        socket.set_read_timeout(Some(TIMEOUT)).expect("a socket has a time limit");
        socket.set_write_timeout(Some(TIMEOUT)).expect("a socket has a time limit");
        socket
    }

    /// A front-end without fault is served.
    fn check(&self) {
        let began = Instant::now();
        let mut socket = self.connect();
        send(&socket, GET_FEATURES, 1, &[], &[]).expect("the device reads");
        let mut reply = [0; 20];
        socket.read_exact(&mut reply).expect("the device serves the next front-end");
        assert_eq!(reply[..4], GET_FEATURES.to_le_bytes(), "another reply");
        assert!(began.elapsed() < TIMEOUT, "the device served the next front-end after {:?}", began.elapsed());
    }
}

impl Drop for TestDevice {
    fn drop(&mut self) {
        if let Some(running) = self.running.take() {
            running.shutdown().expect("the device ends");
        }
        // What cannot be removed stays.
        let _ = fs::remove_dir_all(&self.directory);
    }
}

fn with_device(act: impl FnOnce(&TestDevice)) {
    let mut device = DEVICE.lock().unwrap_or_else(PoisonError::into_inner);
    let device = device.get_or_insert_with(TestDevice::new);
    act(device);
    device.check();
}

/// Ends the device.
#[cfg(test)]
pub(super) fn clean_up() {
    drop(DEVICE.lock().unwrap_or_else(PoisonError::into_inner).take());
}

/// Descriptors that a front-end passes.
struct Descriptors {
    memory: File,
    short: File,
    kick: EventFd,
    call: EventFd,
    null: File,
}

impl Descriptors {
    fn new() -> Self {
        let memory = |bytes: u64| {
            let file = memfd::create(c"fuzzed").expect("a memfd");
            file.set_len(bytes).expect("memory");
            file
        };
        Self {
            memory: memory(MEMORY_BYTES),
            short: memory(4096),
            kick: EventFd::new(0).expect("an eventfd"),
            call: EventFd::new(0).expect("an eventfd"),
            null: File::open("/dev/null").expect("it exists"),
        }
    }

    fn pick(&self, input: &mut Input<'_>) -> RawFd {
        match input.below(6) {
            0 | 1 => self.memory.as_raw_fd(),
            2 => self.kick.as_raw_fd(),
            3 => self.call.as_raw_fd(),
            4 => self.short.as_raw_fd(),
            _ => self.null.as_raw_fd(),
        }
    }
}

fn send(socket: &UnixStream, request: u32, flags: u32, payload: &[u8], fds: &[RawFd]) -> io::Result<()> {
    let size = u32::try_from(payload.len()).expect("a payload is small");
    let words = [request, flags, size].map(u32::to_le_bytes);
    send_bytes(socket, &[&words.concat(), payload].concat(), fds)
}

fn send_bytes(mut socket: &UnixStream, bytes: &[u8], fds: &[RawFd]) -> io::Result<()> {
    let sent = socket.send_with_fds(&[bytes], fds).map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
    socket.write_all(&bytes[sent..])
}

/// Reads what has arrived. A front-end that never reads would only fill its socket.
fn drain(mut socket: &UnixStream) {
    socket.set_nonblocking(true).expect("a socket");
    let mut bytes = [0; 4096];
    while matches!(socket.read(&mut bytes), Ok(count) if count > 0) {}
    socket.set_nonblocking(false).expect("a socket");
}

/// Any bytes, in any pieces, with any descriptors beside them.
///
/// Input: pieces, each with its length and descriptors.
pub(super) fn wire_relay(input: &[u8]) {
    let mut input = Input::new(input);
    with_device(|device| {
        let socket = device.connect();
        let descriptors = Descriptors::new();
        while !input.is_empty() {
            let (len, count) = (usize::from(input.u8()).max(1), input.below(4));
            let fds: Vec<RawFd> = (0..count).map(|_| descriptors.pick(&mut input)).collect();
            if send_bytes(&socket, input.take(len), &fds).is_err() {
                return;
            }
            drain(&socket);
        }
    });
}

/// Messages with fields that nearly make sense, over guest memory with requests in it.
///
/// Input: whether it begins with a sensible start; then messages, kicks and stores to guest memory.
pub(super) fn control_plane(input: &[u8]) {
    let mut input = Input::new(input);
    with_device(|device| {
        let socket = device.connect();
        let descriptors = Descriptors::new();
        if !input.u8().is_multiple_of(4) && start_sensibly(&socket, &descriptors).is_err() {
            return;
        }
        while !input.is_empty() {
            match input.below(8) {
                0 => {
                    let at = u64::from(input.u16()) % (MEMORY_BYTES - 64);
                    let len = input.below(64);
                    descriptors.memory.write_all_at(input.take(len), at).expect("our own memory");
                }
                1 => {
                    submit_request(&descriptors, &mut input);
                    descriptors.kick.write(1).expect("an eventfd takes a count");
                }
                _ => {
                    if send_message(&socket, &descriptors, &mut input).is_err() {
                        return;
                    }
                }
            }
            drain(&socket);
        }
    });
}

const TABLE: u64 = 0;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
const BUFFERS: u64 = 0x4000;
/// Where the front-end has mapped its memory.
const USER: u64 = 0x7f00_0000_0000;

fn le64(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn ring_state(index: u32, value: u32) -> Vec<u8> {
    [index, value].iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn start_sensibly(socket: &UnixStream, descriptors: &Descriptors) -> io::Result<()> {
    let memory = [descriptors.memory.as_raw_fd()];
    let (call, kick) = ([descriptors.call.as_raw_fd()], [descriptors.kick.as_raw_fd()]);
    let addresses = [0, USER + TABLE, USER + USED, USER + AVAIL, 0];
    let messages: [(u32, Vec<u8>, &[RawFd]); 11] = [
        (SET_OWNER, Vec::new(), &[]),
        (SET_FEATURES, le64(&[1 << 32 | 1 << 30 | 1 << 28 | 1 << 9 | 1 << 11 | 1 << 13 | 1 << 14]), &[]),
        (SET_PROTOCOL_FEATURES, le64(&[1 << 0 | 1 << 3 | 1 << 9 | 1 << 12 | 1 << 13 | 1 << 15]), &[]),
        (SET_MEM_TABLE, le64(&[1, 0, MEMORY_BYTES, USER, 0]), &memory),
        (SET_VRING_NUM, ring_state(0, 8), &[]),
        (SET_VRING_BASE, ring_state(0, 0), &[]),
        (SET_VRING_ADDR, le64(&addresses), &[]),
        (SET_VRING_CALL, le64(&[0]), &call),
        (SET_VRING_KICK, le64(&[0]), &kick),
        (SET_VRING_ENABLE, ring_state(0, 1), &[]),
        (GET_CONFIG, [&[0; 4][..], &60u32.to_le_bytes(), &[0; 4], &[0; 60]].concat(), &[]),
    ];
    for (request, payload, fds) in messages {
        send(socket, request, 1, &payload, fds)?;
    }
    Ok(())
}

/// Makes a request available whose parts nearly make sense.
fn submit_request(descriptors: &Descriptors, input: &mut Input<'_>) {
    let put = |at: u64, bytes: &[u8]| descriptors.memory.write_all_at(bytes, at).expect("our own memory");
    let kind = input.pick(&[0u32, 1, 4, 8, 11, 13, 9]);
    put(BUFFERS, &[&kind.to_le_bytes()[..], &[0; 4], &u64::from(input.u16() % 2060).to_le_bytes()].concat());
    let len = input.pick(&[512u32, 16, 20, 4096, 0, 1024, u32::MAX]);
    let writable = if matches!(kind, 0 | 8) { 2u16 } else { 0 };
    let data = input.pick(&[BUFFERS + 0x1000, MEMORY_BYTES - 512, USED, 1 << 40]);
    for (index, (address, len, flags)) in
        (0u16..).zip([(BUFFERS, 16, 1), (data, len, 1 | writable), (BUFFERS + 0x800, 1, 2)])
    {
        let next = index + 1;
        let words = [&address.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()];
        put(TABLE + 16 * u64::from(index), &words.concat());
    }
    let mut index = [0; 2];
    descriptors.memory.read_exact_at(&mut index, AVAIL + 2).expect("our own memory");
    let index = u16::from_le_bytes(index);
    put(AVAIL + 4 + 2 * u64::from(index % 8), &[0; 2]);
    put(AVAIL + 2, &index.wrapping_add(u16::from(input.u8() != 1)).to_le_bytes());
}

fn send_message(socket: &UnixStream, descriptors: &Descriptors, input: &mut Input<'_>) -> io::Result<()> {
    const KNOWN: [u32; 26] = [
        GET_FEATURES,
        SET_FEATURES,
        SET_OWNER,
        4,
        SET_MEM_TABLE,
        6,
        SET_VRING_NUM,
        SET_VRING_ADDR,
        SET_VRING_BASE,
        GET_VRING_BASE,
        SET_VRING_KICK,
        SET_VRING_CALL,
        14,
        15,
        SET_PROTOCOL_FEATURES,
        17,
        SET_VRING_ENABLE,
        GET_CONFIG,
        SET_CONFIG,
        GET_INFLIGHT_FD,
        SET_INFLIGHT_FD,
        34,
        36,
        ADD_MEM_REG,
        REM_MEM_REG,
        40,
    ];
    let request = if input.u8() == 255 { u32::from(input.u8()) } else { input.pick(&KNOWN) };
    let flags = input.pick(&[1u32, 1 | 1 << 3, 1 | 1 << 3, 5, 0]);
    let payload = payload(request, input);
    let count = if matches!(request, SET_MEM_TABLE) && payload.len() > 8 { (payload.len() - 8) / 32 } else { 1 };
    let count = if input.u8() < 200 { count } else { input.below(9) };
    let fds: Vec<RawFd> = (0..count).map(|_| descriptors.pick(input)).collect();
    send(socket, request, flags, &payload, &fds)
}

/// A payload that nearly makes sense for the request.
fn payload(request: u32, input: &mut Input<'_>) -> Vec<u8> {
    let sizes = [0, 4096, MEMORY_BYTES, 1 << 20, u64::MAX - 4095, USER, USER + 4096, USER + TABLE, 1 << 40, 8];
    let number = |input: &mut Input<'_>| if input.u8() < 220 { input.pick(&sizes) } else { input.u64() };
    match request {
        SET_FEATURES | SET_PROTOCOL_FEATURES => le64(&[input.pick(&[u64::MAX, 0, 1 << 30 | 1 << 32, 0xb209])]),
        SET_MEM_TABLE => {
            let regions = input.below(4);
            let mut words = vec![regions as u64];
            words.extend((0..4 * regions).map(|_| number(input)));
            le64(&words)
        }
        ADD_MEM_REG | REM_MEM_REG => {
            let words: Vec<u64> = std::iter::once(0).chain((0..4).map(|_| number(input))).collect();
            le64(&words)
        }
        SET_VRING_ADDR => {
            let mut words = vec![u64::from(input.u8() % 3)];
            let places = [USER + TABLE, USER + AVAIL, USER + USED, USER + 1, u64::MAX, 0];
            words.extend((0..4).map(|_| input.pick(&places)));
            le64(&words)
        }
        SET_VRING_NUM | SET_VRING_BASE | SET_VRING_ENABLE | GET_VRING_BASE => {
            ring_state(u32::from(input.u8() % 3), input.pick(&[0u32, 1, 8, 128, 1024, 0xffff, u32::MAX, 3]))
        }
        SET_VRING_KICK | SET_VRING_CALL | 14 => le64(&[input.pick(&[0u64, 1, 2, 0x100, 0x101, u64::MAX])]),
        GET_CONFIG | SET_CONFIG => {
            let (offset, size) = (input.pick(&[0u32, 32, 56, 255, u32::MAX]), input.below(80));
            let head = [offset, u32::try_from(size).expect("it is small"), 1].map(u32::to_le_bytes);
            let bytes: Vec<u8> = input.take(size).iter().copied().chain(std::iter::repeat(0)).take(size).collect();
            [&head.concat(), &bytes[..]].concat()
        }
        GET_INFLIGHT_FD | SET_INFLIGHT_FD => {
            let shape = [input.pick(&[1u16, 2, 0, 1024, u16::MAX]), input.pick(&[8u16, 128, 0, 1024, 32768])];
            let fields = le64(&[number(input), number(input)]);
            [&fields[..], &shape.map(u16::to_le_bytes).concat()].concat()
        }
        _ => {
            let len = input.below(24);
            input.take(len).to_vec()
        }
    }
}
