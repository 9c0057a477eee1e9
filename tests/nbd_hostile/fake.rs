//! An NBD server in this process that does what no decent server does.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const READ: u16 = 0;
const WRITE: u16 = 1;
const DISCONNECT: u16 = 2;
pub const BLOCK_STATUS: u16 = 7;

/// A request.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    pub command: u16,
    pub cookie: u64,
    pub offset: u64,
    pub len: u32,
}

/// What the server does with a request.
#[derive(Clone, Debug)]
pub enum Act {
    /// Executes it and replies.
    Serve,
    /// Replies with this error.
    Fail(u32),
    /// Sends these bytes in place of a reply.
    Send(Vec<u8>),
    /// Sends these bytes, then closes the connection.
    SendAndClose(Vec<u8>),
    /// Sends the reply one byte at a time.
    Dribble,
    /// Closes its sending side, and reads on.
    HalfClose,
    /// Closes the connection, and executes the request this much later.
    CloseAndServeLater(Duration),
    /// Does nothing at all.
    Ignore,
}

type Script = dyn Fn(Request) -> Act + Send + Sync;

/// See the module.
pub struct FakeServer {
    pub memory: Arc<Mutex<Vec<u8>>>,
    /// Size that connections after the first one are told.
    pub size_later: Arc<Mutex<u64>>,
    socket: PathBuf,
}

pub fn is_write(request: &Request) -> bool {
    request.command == WRITE
}

pub fn is_read(request: &Request) -> bool {
    request.command == READ
}

impl FakeServer {
    /// A server of zeros that follows a script.
    pub fn start(socket: &Path, size: u64, script: impl Fn(Request) -> Act + Send + Sync + 'static) -> Self {
        let _ = std::fs::remove_file(socket);
        let listener = UnixListener::bind(socket).unwrap();
        let memory = Arc::new(Mutex::new(vec![0; usize::try_from(size).unwrap()]));
        let size_later = Arc::new(Mutex::new(size));
        let script: Arc<Script> = Arc::new(script);
        let (shared, sizes) = (Arc::clone(&memory), Arc::clone(&size_later));
        // It ends with the process, or when its socket is shut down.
        thread::spawn(move || {
            for (number, stream) in listener.incoming().enumerate() {
                let Ok(stream) = stream else { return };
                let (memory, script) = (Arc::clone(&shared), Arc::clone(&script));
                let size = if number == 0 { size } else { *sizes.lock().unwrap() };
                thread::spawn(move || drop(serve(stream, size, &memory, &*script)));
            }
        });
        Self { memory, size_later, socket: socket.to_path_buf() }
    }

    pub fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket.display())
    }
}

impl Drop for FakeServer {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.socket);
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn negotiate(stream: &mut UnixStream, size: u64) -> std::io::Result<()> {
    stream.write_all(b"NBDMAGICIHAVEOPT\0\x03")?;
    let mut flags = [0; 4];
    stream.read_exact(&mut flags)?;
    loop {
        let mut header = [0; 16];
        stream.read_exact(&mut header)?;
        let (option, len) = (word(&header, 8), word(&header, 12));
        let mut data = vec![0; len as usize];
        stream.read_exact(&mut data)?;
        let mut reply = |kind: u32, data: &[u8]| {
            let mut bytes = OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
            bytes.extend(option.to_be_bytes());
            bytes.extend(kind.to_be_bytes());
            bytes.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
            bytes.extend(data);
            stream.write_all(&bytes)
        };
        match option {
            // Structured replies.
            8 => reply(1, &[])?,
            // A context, and it is base:allocation.
            10 => {
                reply(4, &[&1u32.to_be_bytes()[..], b"base:allocation"].concat())?;
                reply(1, &[])?;
            }
            7 => {
                // FLUSH, TRIM, WRITE_ZEROES, multi-conn.
                let flags: u16 = 1 | 1 << 2 | 1 << 5 | 1 << 6 | 1 << 8;
                reply(3, &[&[0, 0][..], &size.to_be_bytes(), &flags.to_be_bytes()].concat())?;
                return reply(1, &[]);
            }
            _ => reply(1 << 31 | 1, &[])?,
        }
    }
}

/// A chunk of a structured reply.
pub fn chunk(flags: u16, kind: u16, cookie: u64, data: &[u8]) -> Vec<u8> {
    let mut bytes = 0x668e_33efu32.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
    bytes.extend(data);
    bytes
}

fn execute(memory: &Mutex<Vec<u8>>, request: Request, payload: &[u8]) -> Vec<u8> {
    let mut memory = memory.lock().unwrap();
    let (start, len) = (usize::try_from(request.offset).unwrap(), request.len as usize);
    match request.command {
        READ => {
            let data = [&request.offset.to_be_bytes()[..], &memory[start..start + len]].concat();
            return chunk(1, 1, request.cookie, &data);
        }
        WRITE => memory[start..start + len].copy_from_slice(payload),
        BLOCK_STATUS => {
            let data = [1u32, request.len, 0].map(u32::to_be_bytes).concat();
            return chunk(1, 5, request.cookie, &data);
        }
        // WRITE_ZEROES
        6 => memory[start..start + len].fill(0),
        _ => {}
    }
    chunk(1, 0, request.cookie, &[])
}

fn serve(mut stream: UnixStream, size: u64, memory: &Arc<Mutex<Vec<u8>>>, script: &Script) -> std::io::Result<()> {
    negotiate(&mut stream, size)?;
    loop {
        let mut header = [0; 28];
        stream.read_exact(&mut header)?;
        let command = u16::from_be_bytes([header[6], header[7]]);
        let (cookie, offset, len) = (long(&header, 8), long(&header, 16), word(&header, 24));
        let request = Request { command, cookie, offset, len };
        let mut payload = vec![0; if command == WRITE { len as usize } else { 0 }];
        stream.read_exact(&mut payload)?;
        if command == DISCONNECT {
            return Ok(());
        }
        match script(request) {
            Act::Serve => stream.write_all(&execute(memory, request, &payload))?,
            Act::Fail(error) => {
                let mut reply = 0x6744_6698u32.to_be_bytes().to_vec();
                reply.extend(error.to_be_bytes());
                reply.extend(cookie.to_be_bytes());
                stream.write_all(&reply)?;
            }
            Act::Send(bytes) => stream.write_all(&bytes)?,
            Act::SendAndClose(bytes) => return stream.write_all(&bytes),
            Act::Dribble => {
                for byte in execute(memory, request, &payload) {
                    stream.write_all(&[byte])?;
                    if byte % 64 == 0 {
                        thread::sleep(Duration::from_micros(50));
                    }
                }
            }
            Act::HalfClose => stream.shutdown(std::net::Shutdown::Write)?,
            Act::CloseAndServeLater(later) => {
                let memory = Arc::clone(memory);
                thread::spawn(move || {
                    thread::sleep(later);
                    execute(&memory, request, &payload);
                });
                return Ok(());
            }
            Act::Ignore => {}
        }
    }
}
