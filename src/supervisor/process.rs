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
use crate::disk_stats::{StatsPage, TruncatedMemory};
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

/// Why a process has died, as one of its devices sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum DeathCause {
    /// The front-end of this device has truncated this memory.
    OwnFrontEnd(TruncatedMemory),
    /// The front-end of another device of the process, with this name, has truncated its memory.
    OtherFrontEnd(String),
    /// The cache's file was truncated, or its memory could not be read.
    Cache,
    /// That is not known.
    #[default]
    Unknown,
}

impl fmt::Display for DeathCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OwnFrontEnd(memory) => write!(f, ": {}", memory.name()),
            Self::OtherFrontEnd(name) => {
                write!(f, ": the front-end of {name}, which shares the process, truncated memory")
            }
            Self::Cache => write!(f, ": {}", TruncatedMemory::Cache.name()),
            Self::Unknown => Ok(()),
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
    Exited(Exit, DeathCause),
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
    /// Why it has ended, for a device that it did not serve yet.
    cause: DeathCause,
    /// Receivers of the replies to requests, by number of the request.
    requesters: BTreeMap<u64, Sender<DeviceReply>>,
    last_request: u64,
}

/// The receiver of a device's events.
#[derive(Debug)]
struct Subscriber {
    /// The device's name.
    name: String,
    /// Number of the device for which its image was opened.
    image_of: u32,
    /// Its statistics page.
    page: Arc<StatsPage>,
    stage: ReportedStage,
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

impl Subscriber {
    fn new(name: String, image_of: u32, page: Arc<StatsPage>, sink: EventSink) -> Self {
        Self { name, image_of, page, stage: ReportedStage::Starting, sink }
    }
}

/// The stages of a device that its process reports, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum ReportedStage {
    Starting,
    Served,
    Quiesced,
    Ended,
}

/// A message that the protocol does not allow at this time: its process is taken over, or faulty.
#[derive(Debug)]
struct Unexpected {
    what: &'static str,
    /// Number of the device, of the image or of the request.
    number: u64,
}

impl fmt::Display for Unexpected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}, which is not expected", self.what, self.number)
    }
}

impl Subscribers {
    /// Passes a message of the process to its receivers.
    ///
    /// => A process can send anything. Each message is accepted at most once for a device, an image or a request that
    ///    the supervisor has sent, so the process cannot fill the supervisor's memory, or make it work without end.
    fn accept(&mut self, io_lock: IoLock, message: FromDisk) -> std::result::Result<(), Unexpected> {
        use ReportedStage::{Ended, Quiesced, Served};
        // The device, the stage that it must not have reached, and the one that it reaches.
        let (device, before, reached, what, event) = match message {
            FromDisk::Served { device } => (device, Served, Served, "\"served\" for device", ProcessEvent::Served),
            FromDisk::Quiesced { device } => {
                (device, Quiesced, Quiesced, "\"quiesced\" for device", ProcessEvent::Quiesced)
            }
            FromDisk::Ended { device, error } => {
                let event = ProcessEvent::Ended(error.map_or(Ok(()), |error| Err(error.into())));
                (device, Ended, Ended, "\"ended\" for device", event)
            }
            FromDisk::Failed { device, error } => {
                (device, Served, Ended, "\"failed\" for device", ProcessEvent::Failed(error.into()))
            }
            FromDisk::ImageFailed { image_of, error } => {
                let image = self.images.get_mut(&image_of).filter(|image| image.failure.is_none());
                let image = image.ok_or(Unexpected { what: "\"failed\" for image", number: image_of.into() })?;
                image.failure = Some(error.clone());
                for subscriber in self.by_device.values().filter(|subscriber| subscriber.image_of == image_of) {
                    subscriber.sink.send(io_lock, ProcessEvent::Failed(error.clone().into()));
                }
                return Ok(());
            }
            FromDisk::Reply { id, reply } => {
                match self.requesters.remove(&id) {
                    // It fails if the requester does not wait for the reply.
                    Some(requester) => drop(requester.send(reply)),
                    // No thread waits for the reply to request 0.
                    None if id == 0 => {}
                    None => return Err(Unexpected { what: "a reply to request", number: id }),
                }
                return Ok(());
            }
            FromDisk::Released { image_of, is_cache_removed } => {
                let image = self.images.get_mut(&image_of).filter(|image| image.exit.is_none());
                let image = image.ok_or(Unexpected { what: "\"released\" for image", number: image_of.into() })?;
                // The image and the cache are released already, so do not wait until the process has freed its memory.
                let exit = Exit { status: None, is_released: true, is_cache_removed };
                image.exit = Some(exit);
                let devices = self.by_device.extract_if(.., |_, subscriber| subscriber.image_of == image_of);
                for (_, subscriber) in devices {
                    subscriber.sink.send(io_lock, ProcessEvent::Exited(exit, DeathCause::Unknown));
                }
                return Ok(());
            }
        };
        let subscriber = self.by_device.get_mut(&device).filter(|subscriber| subscriber.stage < before);
        let subscriber = subscriber.ok_or(Unexpected { what, number: device.into() })?;
        subscriber.stage = reached;
        subscriber.sink.send(io_lock, event);
        Ok(())
    }

    /// Reports to all devices that the process has ended. If it died of SIGBUS, the statistics pages show whose
    /// front-end had truncated memory.
    fn report_exit(&mut self, io_lock: IoLock, exit: Exit) {
        self.exit = Some(exit);
        self.requesters.clear();
        let devices = std::mem::take(&mut self.by_device);
        let taken = devices.into_values().map(|device| (device.page.take_truncated_memory(), device));
        let found: Vec<_> = taken.map(|(memory, device)| (memory.filter(|_| exit.is_bus_error()), device)).collect();
        let is_culprit =
            |memory: &Option<TruncatedMemory>| memory.is_some_and(|memory| memory != TruncatedMemory::Cache);
        if let Some((_, culprit)) = found.iter().find(|(memory, _)| is_culprit(memory)) {
            self.cause = DeathCause::OtherFrontEnd(culprit.name.clone());
        }
        for (memory, device) in found {
            let cause = match memory {
                Some(TruncatedMemory::Cache) => DeathCause::Cache,
                Some(memory) => DeathCause::OwnFrontEnd(memory),
                None => self.cause.clone(),
            };
            device.sink.send(io_lock, ProcessEvent::Exited(exit, cause));
        }
    }
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
        page: &Arc<StatsPage>,
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
                keeper.send(self.io_lock, ProcessEvent::Exited(exit, subscribers.cause.clone()));
                return Ok(());
            }
            let (name, page) = (settings.name.clone(), Arc::clone(page));
            subscribers.by_device.insert(device, Subscriber::new(name, image_of, page, keeper));
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
        self.subscribers().report_exit(self.io_lock, exit);
    }

    /// Reads a message; returns whether there may be another one.
    fn read_message(&self) -> bool {
        let refused = match self.channel.receive() {
            Ok(Received::Message(message, _)) => match self.subscribers().accept(self.io_lock, message) {
                Ok(()) => return true,
                Err(unexpected) => format!("its process has sent {unexpected}"),
            },
            Ok(Received::Closed) => return false,
            Err(e) => format!("cannot read what its process sends: {e}"),
        };
        error!("{}: {refused}; killing the process", self.disks());
        self.kill();
        self.channel.close();
        false
    }

    /// The names of its devices, for messages.
    fn disks(&self) -> String {
        let subscribers = self.subscribers();
        let names: Vec<&str> = subscribers.by_device.values().map(|subscriber| subscriber.name.as_str()).collect();
        if names.is_empty() { self.name.clone() } else { names.join(", ") }
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Number of the device that each process serves, and of its image.
    const DEVICE: u32 = 7;

    fn subscriber(name: &str, page: &Arc<StatsPage>, events: &Sender<ProcessEvent>) -> Subscriber {
        let events = events.clone();
        let sink = EventSink(Box::new(move |_, event| events.send(event).unwrap()));
        Subscriber::new(name.to_owned(), DEVICE, Arc::clone(page), sink)
    }

    /// A process that serves [`DEVICE`] sends messages. Returns the index of the one for which it is killed, if any,
    /// and the events that the device's keeper gets.
    fn send_all(messages: &[FromDisk]) -> (Option<usize>, Vec<String>) {
        let (channel, theirs) = Channel::pair().unwrap();
        let child = Mutex::new(Some(Command::new("sleep").arg("60").spawn().unwrap()));
        let (name, io_lock, hosting) = ("first".to_owned(), IoLock::unique(), Hosting::Processes);
        let process = Process { name, io_lock, channel, child, hosting, subscribers: Mutex::default() };
        let (events, received) = self::channel();
        let page = Arc::new(StatsPage::create(1).unwrap().0);
        process.subscribers().by_device.insert(DEVICE, subscriber("disk7", &page, &events));
        process.subscribers().images.insert(DEVICE, ImageOutcome::default());
        assert_eq!(process.disks(), "disk7");
        let killed_at = messages.iter().position(|message| {
            theirs.send(message, &[]).unwrap();
            !process.read_message()
        });
        if killed_at.is_none() {
            process.child().as_mut().unwrap().kill().unwrap();
        }
        assert_eq!(process.reap().unwrap().signal(), Some(libc::SIGKILL));
        assert_eq!(process.subscribers().images.len(), 1, "no other image was added");
        (killed_at, received.try_iter().map(|event| format!("{event:?}")).collect())
    }

    #[test]
    fn a_process_is_killed_for_a_message_that_is_not_due() {
        let (device, image_of) = (DEVICE, DEVICE);
        let (served, quiesced) = (FromDisk::Served { device }, FromDisk::Quiesced { device });
        let error = ErrorText::from(&Error::new(ErrorKind::Image, "text"));
        let ended = FromDisk::Ended { device, error: None };
        let failed = FromDisk::Failed { device, error: error.clone() };
        let image_failed = |image_of| FromDisk::ImageFailed { image_of, error: error.clone() };
        let released = |image_of| FromDisk::Released { image_of, is_cache_removed: true };
        let reply = |id| FromDisk::Reply { id, reply: DeviceReply::Done };
        let all = [served.clone(), reply(0), quiesced.clone(), ended.clone(), released(image_of)];
        let (killed_at, events) = send_all(&all);
        assert_eq!((killed_at, &events[..3]), (None, &["Served", "Quiesced", "Ended(Ok(()))"].map(str::to_owned)[..]));
        assert!(events[3].starts_with("Exited(") && events.len() == 4, "{events:?}");
        assert_eq!(send_all(&[image_failed(image_of), released(image_of)]).0, None);
        for not_due in [
            vec![served.clone(), served.clone()],
            vec![served.clone(), failed.clone()],
            vec![failed.clone(), failed],
            vec![quiesced.clone(), quiesced],
            vec![ended.clone(), ended],
            vec![released(image_of), released(image_of)],
            vec![released(image_of), served],
            vec![image_failed(image_of), image_failed(image_of)],
            vec![FromDisk::Served { device: 8 }],
            vec![image_failed(8)],
            vec![released(8)],
            vec![reply(1)],
        ] {
            let (killed_at, events) = send_all(&not_due);
            let last = not_due.len() - 1;
            assert_eq!((killed_at, events.len()), (Some(last), last), "{not_due:?}");
        }
    }

    #[test]
    fn truncated_memory_is_the_cause_of_its_own_device_only() {
        use TruncatedMemory::{Cache, Guest, Inflight};
        let causes = |signal, recorded: [Option<TruncatedMemory>; 2]| {
            let (events, received) = channel();
            let mut subscribers = Subscribers::default();
            for (device, memory) in (DEVICE..).zip(recorded) {
                let page = Arc::new(StatsPage::create(1).unwrap().0);
                memory.inspect(|memory| page.record_truncated_memory(*memory));
                subscribers.by_device.insert(device, subscriber(&format!("disk{device}"), &page, &events));
            }
            let exit = Exit { status: Some(ExitStatus::from_raw(signal)), is_released: false, is_cache_removed: false };
            subscribers.report_exit(IoLock::unique(), exit);
            let cause = |event| if let ProcessEvent::Exited(_, cause) = event { cause } else { panic!("{event:?}") };
            (received.try_iter().map(cause).collect::<Vec<_>>(), subscribers.cause)
        };
        let (own, other) = (DeathCause::OwnFrontEnd, |name: &str| DeathCause::OtherFrontEnd(name.to_owned()));
        let (unknown, bus) = (DeathCause::Unknown, libc::SIGBUS);
        assert_eq!(causes(bus, [Some(Guest), None]), (vec![own(Guest), other("disk7")], other("disk7")));
        assert_eq!(causes(bus, [None, Some(Inflight)]), (vec![other("disk8"), own(Inflight)], other("disk8")));
        assert_eq!(causes(bus, [Some(Guest), Some(Guest)]).0, [own(Guest), own(Guest)]);
        assert_eq!(
            causes(bus, [Some(Cache), Some(Cache)]),
            (vec![DeathCause::Cache, DeathCause::Cache], unknown.clone())
        );
        for (signal, recorded) in [(bus, [None, None]), (libc::SIGKILL, [Some(Guest), None])] {
            assert_eq!(causes(signal, recorded), (vec![unknown.clone(), unknown.clone()], unknown.clone()));
        }
    }
}
