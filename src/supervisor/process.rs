//! The supervisor's side of a disk process: starts the process, sends it commands, and receives its events. Each
//! process has a thread here that reads its messages and its log.

use std::collections::BTreeMap;
use std::env;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::thread;

use log::{debug, error, warn};

use super::log_pipe::LogPipe;
use crate::disk_process;
use crate::disk_protocol::{
    Channel, DeviceReply, DeviceRequest, DeviceSettings, ErrorText, FromDisk, Received, ToDisk,
};
use crate::error::{Error, ErrorKind, Result};
use crate::store::file::IoLock;
use crate::sys::poll::wait_any_readable;
use crate::sys::process::wait_without_reaping;
use crate::sys::signal;

/// Name of the hidden command of a disk process.
pub(super) const COMMAND: &str = "disk-process";

/// Environment variables that concern only the supervisor and are not passed on.
const OWN_VARIABLES: [&str; 6] =
    ["NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "WATCHDOG_USEC", "WATCHDOG_PID"];

/// Where disks are served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hosting {
    /// In one process per image.
    Processes,
    /// In threads of this process.
    Threads,
}

/// How a disk process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Exit {
    /// `None` for one that was a thread, or if it is not known yet.
    status: Option<ExitStatus>,
    /// It reported that it has released its image and its cache.
    is_released: bool,
    /// Everything is written to the image, and the cache's file can be removed.
    pub is_cache_removed: bool,
}

impl Exit {
    /// Whether it ended on command.
    pub fn is_clean(&self) -> bool {
        self.is_released
    }

    /// Whether SIGBUS ended it.
    pub fn is_bus_error(&self) -> bool {
        self.status.and_then(|status| status.signal()) == Some(libc::SIGBUS)
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(status) = self.status else { return f.write_str("its thread has ended") };
        match (status.signal(), status.code()) {
            (Some(libc::SIGKILL), _) => {
                f.write_str("killed by SIGKILL (by a user, or by the kernel for lack of memory)")
            }
            (Some(signal), _) => write!(f, "killed by {}", signal::name_of(signal)),
            (None, Some(code)) => write!(f, "exited with status {code}"),
            (None, None) => write!(f, "{status}"),
        }
    }
}

/// Events of a device in its process, for the device's keeper.
#[derive(Debug)]
pub(super) enum ProcessEvent {
    Served,
    Failed(Error),
    Quiesced,
    Ended(Result<()>),
    /// The process has ended.
    Exited(Exit),
}

/// Receives the events of a device.
pub(super) struct EventSink(pub Box<dyn Fn(IoLock, ProcessEvent) + Send>);

impl EventSink {
    fn send(&self, io_lock: IoLock, event: ProcessEvent) {
        (self.0)(io_lock, event);
    }
}

impl fmt::Debug for EventSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("EventSink")
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Process {
    /// The name of its first device, for messages.
    name: String,
    io_lock: IoLock,
    channel: Channel<ToDisk, FromDisk>,
    /// The process; `None` for a thread, and once it has ended.
    child: Mutex<Option<Child>>,
    hosting: Hosting,
    subscribers: Mutex<Subscribers>,
}

/// The disk process of a group, if it has one.
pub(super) type SharedProcess = Arc<Mutex<Weak<Process>>>;

/// Receivers of the events and replies of the process.
#[derive(Debug, Default)]
struct Subscribers {
    by_device: BTreeMap<u32, Subscriber>,
    /// Its images, by the number of the device for which each was opened.
    images: BTreeMap<u32, ImageOutcome>,
    exit: Option<Exit>,
    /// Receivers of the replies to requests, by number of the request.
    requesters: BTreeMap<u64, Sender<DeviceReply>>,
    last_request: u64,
}

/// The receiver of a device's events.
#[derive(Debug)]
struct Subscriber {
    /// Number of the device for which its image was opened.
    image_of: u32,
    sink: EventSink,
}

/// The state of an image in the process.
#[derive(Debug, Default)]
struct ImageOutcome {
    /// Why it cannot be served.
    failure: Option<ErrorText>,
    /// Once it was released.
    exit: Option<Exit>,
}

impl Process {
    /// Starts a process without an image; [`Process::open`] must follow. `name` is that of its first device.
    ///
    /// # Errors
    /// [`ErrorKind::System`] if a process, a thread or a descriptor cannot be created.
    pub fn start(name: &str, hosting: Hosting, io_lock: IoLock) -> Result<Arc<Self>> {
        let failed = |e| Error::io(ErrorKind::System, format!("{name}: cannot start a disk process"), e);
        let (channel, theirs) = Channel::pair().map_err(failed)?;
        let (child, log) = match hosting {
            Hosting::Processes => spawn_child(name, theirs.into_socket()).map_err(failed)?,
            Hosting::Threads => {
                let (theirs, of_device) = (Arc::new(theirs), name.to_owned());
                let run = move || {
                    if let Err(error) = disk_process::run(&theirs) {
                        error!("{of_device}: {error}");
                    }
                    theirs.close();
                };
                thread::Builder::new().name(format!("control {name}")).spawn(run).map_err(failed)?;
                (None, None)
            }
        };
        let child = Mutex::new(child);
        let process =
            Arc::new(Self { name: name.to_owned(), io_lock, channel, child, hosting, subscribers: Mutex::default() });
        let (reader, log) = (Arc::clone(&process), log.map(|pipe| LogPipe::new(name, pipe)));
        let thread = thread::Builder::new().name(format!("process {name}"));
        thread.spawn(move || reader.read_until_end(log)).inspect_err(|_| process.kill()).map_err(failed)?;
        Ok(process)
    }

    /// Makes the process use an image, which was opened for the device with this number, and its cache.
    ///
    /// # Errors
    /// Errors of sendmsg(2).
    pub fn open(&self, image_of: u32, open: &ToDisk, image: &File, cache: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.subscribers().images.insert(image_of, ImageOutcome::default());
        let files: Vec<BorrowedFd<'_>> = [image.as_fd()].into_iter().chain(cache.iter().copied()).collect();
        self.send(open, &files)
    }

    /// Held by all of this process's I/O in the kernel.
    pub fn io_lock(&self) -> IoLock {
        self.io_lock
    }

    /// Whether the process runs.
    pub fn is_running(&self) -> bool {
        self.subscribers().exit.is_none()
    }

    /// How the process released the image of this device, or ended; `None` while it uses the image.
    pub fn exit_of(&self, image_of: u32) -> Option<Exit> {
        let subscribers = self.subscribers();
        subscribers.images.get(&image_of).and_then(|image| image.exit).or(subscribers.exit)
    }

    /// Its process ID; `None` if it is a thread, or has ended.
    pub fn pid(&self) -> Option<u32> {
        self.child().as_ref().map(Child::id)
    }

    /// Whether it can be killed.
    pub fn is_killable(&self) -> bool {
        self.hosting == Hosting::Processes
    }

    fn subscribers(&self) -> MutexGuard<'_, Subscribers> {
        self.subscribers.lock().expect("no thread panics with the subscribers locked")
    }

    fn child(&self) -> MutexGuard<'_, Option<Child>> {
        self.child.lock().expect("no thread panics with the child locked")
    }

    /// Makes the process serve a device on the image that was opened for `image_of`. `keeper` gets its events.
    ///
    /// # Errors
    /// Errors of sendmsg(2).
    pub fn serve(
        &self,
        device: u32,
        image_of: u32,
        settings: DeviceSettings,
        files: [BorrowedFd<'_>; 3],
        keeper: EventSink,
    ) -> io::Result<()> {
        {
            let mut subscribers = self.subscribers();
            let (failure, exit) = match subscribers.images.get(&image_of) {
                Some(image) => (image.failure.clone(), image.exit.or(subscribers.exit)),
                None => (None, subscribers.exit),
            };
            if let Some(failure) = failure {
                keeper.send(self.io_lock, ProcessEvent::Failed(failure.into()));
            }
            if let Some(exit) = exit {
                // The other devices have already had this event.
                keeper.send(self.io_lock, ProcessEvent::Exited(exit));
                return Ok(());
            }
            subscribers.by_device.insert(device, Subscriber { image_of, sink: keeper });
        }
        let serve = ToDisk::Serve { device, image_of, settings: Box::new(settings) };
        match self.send(&serve, &files) {
            // It has died; its thread will report that.
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            sent => sent,
        }
    }

    /// Sends a message. Does not wait.
    ///
    /// # Errors
    /// EAGAIN if the process is stopped and too many messages wait for it, EPIPE if it has ended.
    pub fn send(&self, message: &ToDisk, files: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.channel.send(message, files)
    }

    /// Sends a message that may be lost if the process has ended.
    pub fn command(&self, message: &ToDisk) {
        if let Err(e) = self.send(message, &[]) {
            debug!("{}: cannot send a command to its disk process, which has ended or is stopped: {e}", self.name);
        }
    }

    /// Removes a device that has ended. Returns whether its image has others; if not, its keeper waits until the image
    /// is released.
    pub fn remove_device(&self, device: u32) -> bool {
        let mut subscribers = self.subscribers();
        let image_of = subscribers.by_device.get(&device).map(|subscriber| subscriber.image_of);
        let is_beside =
            |(other, subscriber): (&u32, &Subscriber)| *other != device && Some(subscriber.image_of) == image_of;
        let others = subscribers.by_device.iter().any(is_beside);
        if others {
            subscribers.by_device.remove(&device);
        }
        others
    }

    /// Sends a device a request of the operator. Does not wait: the receiver gets the reply, unless the process ends
    /// first.
    ///
    /// # Errors
    /// As [`Process::send`].
    pub fn request(&self, device: u32, request: DeviceRequest) -> io::Result<Receiver<DeviceReply>> {
        let (sender, receiver) = channel();
        let id = {
            let mut subscribers = self.subscribers();
            if subscribers.exit.is_some() {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            subscribers.last_request += 1;
            let id = subscribers.last_request;
            subscribers.requesters.insert(id, sender);
            id
        };
        let sent = self.send(&ToDisk::Request { device, id, request }, &[]);
        sent.inspect_err(|_| drop(self.subscribers().requesters.remove(&id)))?;
        Ok(receiver)
    }

    /// Kills it, if it is a process. It may take long to end: one of its threads may hang in the kernel.
    pub fn kill(&self) {
        if let Some(child) = &mut *self.child() {
            // It fails only if the process has ended.
            let _ = child.kill();
        }
    }

    /// Body of the process's thread: reads messages and log lines until the process has ended.
    fn read_until_end(&self, mut log: Option<LogPipe>) {
        let mut is_open = true;
        while is_open || log.is_some() {
            let ready = match &log {
                Some(pipe) if is_open => wait_any_readable([&self.channel, pipe]),
                Some(pipe) => wait_any_readable([pipe]).map(|[log]| [false, log]),
                None => wait_any_readable([&self.channel]).map(|[message]| [message, false]),
            };
            let Ok([message, line]) = ready else { break };
            if message {
                is_open = self.read_message();
            }
            if line && log.as_mut().is_some_and(|pipe| !pipe.forward()) {
                log = None;
            }
        }
        let status = self.reap();
        let exit = Exit { status, is_released: false, is_cache_removed: false };
        let mut subscribers = self.subscribers();
        subscribers.exit = Some(exit);
        subscribers.requesters.clear();
        for subscriber in std::mem::take(&mut subscribers.by_device).into_values() {
            subscriber.sink.send(self.io_lock, ProcessEvent::Exited(exit));
        }
    }

    /// Reports to the devices of an image that the process no longer uses it.
    fn report_release(&self, image_of: u32, exit: Exit) {
        let mut subscribers = self.subscribers();
        let devices = subscribers.by_device.extract_if(.., |_, subscriber| subscriber.image_of == image_of);
        for (_, subscriber) in devices.collect::<Vec<_>>() {
            subscriber.sink.send(self.io_lock, ProcessEvent::Exited(exit));
        }
        subscribers.images.entry(image_of).or_default().exit = Some(exit);
    }

    /// Reads a message; returns whether there may be another one.
    fn read_message(&self) -> bool {
        let message = match self.channel.receive() {
            Ok(Received::Message(message, _)) => message,
            Ok(Received::Closed) => return false,
            Err(e) => {
                error!("{}: cannot read what its process sends: {e}; killing the process", self.name);
                self.kill();
                self.channel.close();
                return false;
            }
        };
        let (device, event) = match message {
            FromDisk::Served { device } => (device, ProcessEvent::Served),
            FromDisk::Quiesced { device } => (device, ProcessEvent::Quiesced),
            FromDisk::Ended { device, error } => {
                (device, ProcessEvent::Ended(error.map_or(Ok(()), |error| Err(error.into()))))
            }
            FromDisk::Failed { device, error } => (device, ProcessEvent::Failed(error.into())),
            FromDisk::ImageFailed { image_of, error } => {
                let mut subscribers = self.subscribers();
                for subscriber in subscribers.by_device.values().filter(|subscriber| subscriber.image_of == image_of) {
                    let event = ProcessEvent::Failed(error.clone().into());
                    subscriber.sink.send(self.io_lock, event);
                }
                subscribers.images.entry(image_of).or_default().failure = Some(error);
                return true;
            }
            FromDisk::Reply { id, reply } => {
                if let Some(requester) = self.subscribers().requesters.remove(&id) {
                    // It fails if the requester does not wait for the reply.
                    let _ = requester.send(reply);
                }
                return true;
            }
            FromDisk::Released { image_of, is_cache_removed } => {
                // The image and the cache are released already, so do not wait until the process has freed its memory.
                self.report_release(image_of, Exit { status: None, is_released: true, is_cache_removed });
                return true;
            }
        };
        if let Some(subscriber) = self.subscribers().by_device.get(&device) {
            subscriber.sink.send(self.io_lock, event);
        }
        true
    }

    /// Reaps the process.
    fn reap(&self) -> Option<ExitStatus> {
        let pid = self.child().as_ref().map(Child::id)?;
        // Wait without the lock: another thread must be able to kill the process meanwhile.
        if let Err(e) = wait_without_reaping(pid) {
            warn!("{}: cannot wait for its process {pid}: {e}", self.name);
        }
        self.child().take()?.wait().ok()
    }
}

/// Starts a disk process with its end of the channel as standard input, and its log in a pipe.
fn spawn_child(name: &str, channel: OwnedFd) -> io::Result<(Option<Child>, Option<ChildStderr>)> {
    // The running executable, even if an upgrade has replaced its file.
    let mut command = Command::new("/proc/self/exe");
    command.arg0(env::args_os().next().unwrap_or_else(|| "genblk".into())).args([COMMAND, name]);
    for variable in OWN_VARIABLES {
        command.env_remove(variable);
    }
    // Not in the terminal's process group: a terminal's signals are for the supervisor.
    command.stdin(channel).stdout(Stdio::null()).stderr(Stdio::piped()).process_group(0);
    let mut child = command.spawn()?;
    let log = child.stderr.take();
    Ok((Some(child), log))
}
