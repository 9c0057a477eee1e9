//! The broker serves requests of the control plane that need access to the host: the name of a front-end's process,
//! whether it shares the guest's memory, and a connection of the process to itself. The thread that communicates with
//! front-ends is confined (`sandbox`): it can neither open a file nor connect.
//!
//! The broker replies over a socket pair. It runs in another process, or, in a daemon without disk processes, on a
//! thread of the same process. Each question and each answer is one message of fixed size. The broker does not trust
//! the questions: in every case it opens only files of /proc, and returns a name, a yes or no, or new sockets.

mod memory_map;
mod self_connection;

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use log::{debug, warn};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::sys::process::name_of;
use crate::sys::socket::receive_with_files;

/// How long a question waits for its answer.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Most descriptors with a message: the two ends of a connection.
const FILES_MAX: usize = 2;
/// Longest name of a process in bytes (TASK_COMM_LEN).
const NAME_BYTES_MAX: usize = 16;

/// A query: its kind, a byte of padding, its number, a process ID, and an address.
const QUERY_BYTES: usize = 16;
/// A response: its kind, the length of a name, the number of the query, and the name.
const RESPONSE_BYTES: usize = NAME_AT + NAME_BYTES_MAX;
/// Where the number is in a query and in a response.
const NUMBER_AT: std::ops::Range<usize> = 2..4;
/// Where the name is in a response.
const NAME_AT: usize = 4;

/// Kinds of questions.
const NAME_OF: u8 = 1;
const IS_PRIVATE: u8 = 2;
const CONNECTION: u8 = 3;
const IS_EVENTFD: u8 = 4;

/// Kinds of answers.
const NO: u8 = 0;
const YES: u8 = 1;

/// The end of the control plane.
#[derive(Debug)]
pub struct Broker {
    /// The device of the control plane; the prefix of log lines.
    name: String,
    /// `None` after a failure.
    link: Mutex<Option<BrokerLink>>,
}

/// The connection to the broker.
#[derive(Debug)]
struct BrokerLink {
    socket: UnixStream,
    /// Number of the last question. A broker that was stopped answers late, and its answer is not for a later question.
    number: u16,
}

impl Broker {
    /// A broker on a thread of this process, `broker NAME`.
    ///
    /// # Errors
    /// Errors of socketpair(2) and pthread_create(3).
    pub fn start(name: &str) -> io::Result<Self> {
        spawn(name).map(|socket| Self::new(name, socket))
    }

    /// The broker of device `name` at the other end of this socket; see [`spawn`].
    pub fn new(name: &str, socket: OwnedFd) -> Self {
        let socket = UnixStream::from(socket);
        // Without a timeout, a question would wait as long as the broker is stopped.
        if let Err(e) = socket.set_read_timeout(Some(TIMEOUT)).and_then(|()| socket.set_write_timeout(Some(TIMEOUT))) {
            debug!("{name}: cannot bound the wait for answers about front-ends: {e}");
        }
        Self { name: name.to_owned(), link: Mutex::new(Some(BrokerLink { socket, number: 0 })) }
    }

    /// The name of a process; `None` if there is no such process, or if the name cannot be determined.
    pub fn name_of(&self, pid: u32) -> Option<String> {
        let answer = self.query(&encode_query(NAME_OF, pid, 0), None).ok()?;
        let name = answer.bytes.get(NAME_AT..NAME_AT + usize::from(answer.bytes[1]))?;
        answer.is_yes().then(|| String::from_utf8_lossy(name).into_owned())
    }

    /// Whether process `pid` has mapped `file` privately at `address`: its writes then do not reach the file, and the
    /// contents of the file are not the guest's memory.
    ///
    /// => False if that cannot be determined: the process is in another PID namespace or belongs to another user, or
    ///    the front-end has no mapping at the address that it sent.
    pub fn is_private(&self, pid: u32, address: u64, file: &File) -> bool {
        self.query(&encode_query(IS_PRIVATE, pid, address), Some(file.as_raw_fd())).is_ok_and(|answer| answer.is_yes())
    }

    /// Whether a descriptor is that of an eventfd.
    ///
    /// # Errors
    /// The broker did not reply.
    pub fn is_eventfd(&self, file: &impl AsRawFd) -> io::Result<bool> {
        self.query(&encode_query(IS_EVENTFD, 0, 0), Some(file.as_raw_fd())).map(|answer| answer.is_yes())
    }

    /// A listener with one connection in its backlog, and the other end of that connection.
    ///
    /// # Errors
    /// The error of the system call that failed here; [`io::ErrorKind::Other`] if one failed in the broker.
    pub fn connection(&self) -> io::Result<(UnixListener, UnixStream)> {
        let answer = self.query(&encode_query(CONNECTION, 0, 0), None)?;
        match <[File; 2]>::try_from(answer.files) {
            Ok([listener, stream]) => Ok((OwnedFd::from(listener).into(), OwnedFd::from(stream).into())),
            Err(_) => Err(io::Error::other("the broker could not establish the connection")),
        }
    }

    fn query(&self, question: &[u8; QUERY_BYTES], file: Option<RawFd>) -> io::Result<Answer> {
        let mut link = self.link.lock().unwrap_or_else(PoisonError::into_inner);
        let answer = link.as_mut().ok_or(io::ErrorKind::NotConnected)?.query(*question, file);
        match &answer {
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                warn!(
                    "{}: the broker thread does not reply (the daemon was stopped, or starved of CPU time); a \
                     front-end request fails",
                    self.name
                );
            }
            Err(e) => {
                warn!(
                    "{}: the broker thread has ended ({e}): no further front-end can be served; restart the daemon",
                    self.name
                );
                *link = None;
            }
            Ok(_) => {}
        }
        answer
    }
}

impl BrokerLink {
    /// Sends a query, and waits for its response. Skips late responses to earlier queries.
    fn query(&mut self, mut question: [u8; QUERY_BYTES], file: Option<RawFd>) -> io::Result<Answer> {
        self.number = self.number.wrapping_add(1);
        question[NUMBER_AT].copy_from_slice(&self.number.to_ne_bytes());
        send(&self.socket, &question, file.as_slice())?;
        loop {
            let mut bytes = [0; RESPONSE_BYTES];
            let (received, files) = receive_with_files::<FILES_MAX>(&self.socket, &mut bytes)?;
            if received != RESPONSE_BYTES {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if bytes[NUMBER_AT] == question[NUMBER_AT] {
                return Ok(Answer { bytes, files });
            }
        }
    }
}

fn send(socket: &UnixStream, message: &[u8], files: &[RawFd]) -> io::Result<()> {
    match socket.send_with_fds(&[message], files) {
        Ok(sent) if sent == message.len() => Ok(()),
        Ok(_) => Err(io::ErrorKind::WriteZero.into()),
        Err(e) => Err(io::Error::from_raw_os_error(e.errno())),
    }
}

fn encode_query(kind: u8, pid: u32, address: u64) -> [u8; QUERY_BYTES] {
    let mut bytes = [0; QUERY_BYTES];
    bytes[0] = kind;
    bytes[4..8].copy_from_slice(&pid.to_ne_bytes());
    bytes[8..].copy_from_slice(&address.to_ne_bytes());
    bytes
}

#[derive(Debug)]
struct Answer {
    bytes: [u8; RESPONSE_BYTES],
    files: Vec<File>,
}

impl Answer {
    fn is_yes(&self) -> bool {
        self.bytes[0] == YES
    }

    fn of(is_yes: bool) -> Self {
        let mut bytes = [0; RESPONSE_BYTES];
        bytes[0] = if is_yes { YES } else { NO };
        Self { bytes, files: Vec::new() }
    }

    fn of_name(name: Option<String>) -> Self {
        let Some(name) = name else { return Self::of(false) };
        let mut answer = Self::of(true);
        let (room, len) = (&mut answer.bytes[NAME_AT..], name.len().min(NAME_BYTES_MAX));
        room[..len].copy_from_slice(&name.as_bytes()[..len]);
        answer.bytes[1] = u8::try_from(len).expect("at most NAME_BYTES_MAX");
        answer
    }
}

/// Starts a thread, `broker NAME`, that answers questions until the other end is closed; returns that end.
///
/// # Errors
/// Errors of socketpair(2) and pthread_create(3).
pub fn spawn(name: &str) -> io::Result<OwnedFd> {
    let (ours, theirs) = UnixStream::pair()?;
    let device = name.to_owned();
    let answer = move || while answer_next(&device, &ours).is_ok() {};
    thread::Builder::new().name(format!("broker {name}")).spawn(answer)?;
    Ok(theirs.into())
}

/// Answers one question of the control plane of a device.
fn answer_next(device: &str, socket: &UnixStream) -> io::Result<()> {
    let mut question = [0; QUERY_BYTES];
    let (received, files) = receive_with_files::<FILES_MAX>(socket, &mut question)?;
    if received != QUERY_BYTES {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let pid = u32::from_ne_bytes(question[4..8].try_into().expect("four bytes"));
    let address = u64::from_ne_bytes(question[8..].try_into().expect("eight bytes"));
    let mut answer = match (question[0], files.first()) {
        (NAME_OF, _) => Answer::of_name(name_of(pid)),
        (IS_PRIVATE, Some(file)) => Answer::of(memory_map::is_private(pid, address, file)),
        (IS_EVENTFD, Some(file)) => Answer::of(is_eventfd(file)),
        (CONNECTION, _) => match self_connection::listener_and_stream() {
            Ok((listener, stream)) => {
                let files = [OwnedFd::from(listener), OwnedFd::from(stream)].map(File::from);
                Answer { files: files.into(), ..Answer::of(true) }
            }
            Err(e) => {
                warn!("{device}: the broker cannot establish the connection to vhost-user-backend: {e}");
                Answer::of(false)
            }
        },
        _ => Answer::of(false),
    };
    answer.bytes[NUMBER_AT].copy_from_slice(&question[NUMBER_AT]);
    let files: Vec<RawFd> = answer.files.iter().map(AsRawFd::as_raw_fd).collect();
    send(socket, &answer.bytes, &files)
}

fn is_eventfd(file: &File) -> bool {
    let link = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()));
    link.is_ok_and(|target| target.as_os_str() == "anon_inode:[eventfd]")
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use vmm_sys_util::eventfd::EventFd;

    use super::*;
    use crate::sys::memfd;

    #[test]
    fn the_broker_answers_queries_that_the_sandbox_forbids() {
        let broker = Broker::start("test").unwrap();
        let own = std::process::id();
        assert_eq!(broker.name_of(own), name_of(own));
        assert_eq!(broker.name_of(0), None);
        let file = memfd::create(c"test").unwrap();
        assert!(!broker.is_private(own, 4096, &file), "nothing is mapped there");
        assert!(broker.is_eventfd(&EventFd::new(0).unwrap()).unwrap() && !broker.is_eventfd(&file).unwrap());
        for _ in 0..3 {
            let (listener, mut ours) = broker.connection().unwrap();
            let mut accepted = listener.accept().unwrap().0;
            ours.write_all(b"x").unwrap();
            let mut byte = [0];
            accepted.read_exact(&mut byte).unwrap();
            assert_eq!(&byte, b"x");
        }
    }

    #[test]
    fn queries_of_an_unknown_kind_or_without_their_file_are_denied() {
        let broker = Broker::start("test").unwrap();
        for (kind, file) in [(IS_PRIVATE, None), (77, Some(io::stdin().as_raw_fd()))] {
            let answer = broker.query(&encode_query(kind, 1, 2), file).unwrap();
            assert!(!answer.is_yes() && answer.files.is_empty());
        }
    }

    #[test]
    fn answers_to_queries_that_timed_out_are_skipped() {
        let (client, server) = UnixStream::pair().unwrap();
        let broker = Broker::new("test", client.try_clone().unwrap().into());
        client.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
        assert_eq!(broker.connection().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        assert_eq!(broker.name_of(std::process::id()), None, "the broker is stopped");
        client.set_read_timeout(Some(TIMEOUT)).unwrap();
        thread::scope(|scope| {
            // The two that nobody waits for any more, and one that asks now.
            scope.spawn(|| (0..3).for_each(|_| answer_next("test", &server).unwrap()));
            assert!(!broker.is_eventfd(&memfd::create(c"test").unwrap()).unwrap());
        });
        drop(server);
        assert_eq!(broker.connection().unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn queries_to_a_dead_broker_get_no_answer() {
        let (client, server) = UnixStream::pair().unwrap();
        drop(server);
        let broker = Broker::new("test", client.into());
        assert_eq!(broker.name_of(std::process::id()), None);
        assert_eq!(broker.connection().unwrap_err().kind(), io::ErrorKind::NotConnected);
    }
}
