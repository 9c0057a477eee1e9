//! An NBD server in this process that does what no decent server does.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::io::Write;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

pub use super::nbd_protocol::{BLOCK_STATUS, chunk};
use super::nbd_protocol::{FLAGS, READ, Request, WRITE, WRITE_ZEROES, negotiate_as, receive};

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

/// An export as the server describes it.
#[derive(Clone, Copy, Debug)]
pub struct Offer {
    pub size: u64,
    pub flags: u16,
    pub has_extents: bool,
}

type Script = dyn Fn(Request) -> Act + Send + Sync;

/// See the module.
pub struct FakeServer {
    pub memory: Arc<Mutex<Vec<u8>>>,
    /// The export that connections after the first one are told of.
    pub later: Arc<Mutex<Offer>>,
    /// The number of connections so far.
    pub connections: Arc<AtomicUsize>,
    uri: String,
    socket: Option<PathBuf>,
}

pub fn is_write(request: &Request) -> bool {
    request.command == WRITE
}

pub fn is_status(request: &Request) -> bool {
    request.command == BLOCK_STATUS
}

pub fn is_read(request: &Request) -> bool {
    request.command == READ
}

impl FakeServer {
    /// A server of zeros that follows a script.
    pub fn start(socket: &Path, size: u64, script: impl Fn(Request) -> Act + Send + Sync + 'static) -> Self {
        let _ = std::fs::remove_file(socket);
        let listener = UnixListener::bind(socket).unwrap();
        let accept = move || Ok(listener.accept()?.0);
        let uri = format!("nbd+unix:///?socket={}", socket.display());
        let mut server = Self::serve(uri, accept, size, script);
        server.socket = Some(socket.to_path_buf());
        server
    }

    /// The same on a TCP port of this host.
    pub fn start_tcp(size: u64, script: impl Fn(Request) -> Act + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let uri = format!("nbd://127.0.0.1:{}/", listener.local_addr().unwrap().port());
        // Reading and writing do not depend on the family of a socket.
        let accept = move || Ok(OwnedFd::from(listener.accept()?.0).into());
        Self::serve(uri, accept, size, script)
    }

    fn serve(
        uri: String,
        accept: impl Fn() -> std::io::Result<UnixStream> + Send + 'static,
        size: u64,
        script: impl Fn(Request) -> Act + Send + Sync + 'static,
    ) -> Self {
        let memory = Arc::new(Mutex::new(vec![0; usize::try_from(size).unwrap()]));
        let first = Offer { size, flags: FLAGS, has_extents: true };
        let (later, connections) = (Arc::new(Mutex::new(first)), Arc::new(AtomicUsize::new(0)));
        let script: Arc<Script> = Arc::new(script);
        let (shared, offers, count) = (Arc::clone(&memory), Arc::clone(&later), Arc::clone(&connections));
        // It ends with the process, or when its socket is shut down.
        thread::spawn(move || {
            loop {
                let Ok(stream) = accept() else { return };
                let number = count.fetch_add(1, Ordering::Relaxed);
                let (memory, script) = (Arc::clone(&shared), Arc::clone(&script));
                let offer = if number == 0 { first } else { *offers.lock().unwrap() };
                thread::spawn(move || drop(serve(stream, offer, &memory, &*script)));
            }
        });
        Self { memory, later, connections, uri, socket: None }
    }

    pub fn uri(&self) -> String {
        self.uri.clone()
    }
}

impl Drop for FakeServer {
    fn drop(&mut self) {
        self.socket.take().map(std::fs::remove_file);
    }
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
        WRITE_ZEROES => memory[start..start + len].fill(0),
        _ => {}
    }
    chunk(1, 0, request.cookie, &[])
}

fn serve(mut stream: UnixStream, offer: Offer, memory: &Arc<Mutex<Vec<u8>>>, script: &Script) -> std::io::Result<()> {
    negotiate_as(&mut stream, offer.size, offer.flags, offer.has_extents)?;
    loop {
        let Some((request, payload)) = receive(&mut stream)? else { return Ok(()) };
        match script(request) {
            Act::Serve => stream.write_all(&execute(memory, request, &payload))?,
            Act::Fail(error) => {
                let mut reply = 0x6744_6698u32.to_be_bytes().to_vec();
                reply.extend(error.to_be_bytes());
                reply.extend(request.cookie.to_be_bytes());
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
