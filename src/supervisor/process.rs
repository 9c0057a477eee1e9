//! The supervisor's side of a disk process: starts the process, sends it commands, and receives its events. Each
//! process has a thread here that reads its messages and its log.

use std::env;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::thread;

use log::{debug, error, warn};

use super::log_pipe::LogPipe;
use crate::disk_process;
use crate::disk_protocol::{Channel, DeviceReply, DeviceRequest, DeviceSettings, FromDisk, Received, ToDisk};
use crate::disk_stats::StatsPage;
use crate::error::{Error, ErrorKind, Result};
use crate::store::file::IoLock;
use crate::sys::poll::wait_any_readable;
use crate::sys::process::wait_without_reaping;

mod subscribers;

pub(super) use subscribers::{DeathCause, EventSink, Exit, ProcessEvent};

use subscribers::{ImageOutcome, Subscriber, Subscribers};

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
    use std::os::unix::process::ExitStatusExt;
    use std::sync::mpsc::Sender;

    use super::*;
    use crate::disk_protocol::ErrorText;
    use crate::disk_stats::TruncatedMemory;

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
