//! The thread of one device, `disk NAME`. It opens the device, serves it, and ends it. Each of these steps waits for
//! the image, which may not answer; so no thread waits for this one without a deadline.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use log::debug;

use crate::config::DeviceConfig;
use crate::error::{Error, ErrorKind, Result};
use crate::service::{Context, Handle, Running, Service};

use super::Event;

/// Pauses between attempts to open a device that could not be served.
const RETRY_MIN: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(30);

/// What the main thread tells a supervisor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// Serve the device that is open.
    Serve,
    /// Retry what failed: the operator says that the image works again.
    Resume,
    /// Complete the guest's requests, and accept no others. Then wait for `Finish`.
    End(Ending),
    /// End the device.
    Finish,
}

/// How a device ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// Everything dirty is written to the image.
    WriteBack,
    /// The cache stays for the next daemon.
    HandOver,
}

/// What a supervisor tells the main thread about its device.
#[derive(Debug)]
pub(super) enum News {
    /// It is open, and waits for [`Command::Serve`].
    Open,
    /// It is served.
    Served(Handle),
    /// It cannot be served; another attempt follows.
    Failed(Error),
    /// Its rings have stopped, and it waits for [`Command::Finish`].
    Quiesced,
    /// It has ended. Nothing of it is left in this process, unless it was abandoned.
    Ended(Result<()>),
}

/// What a supervisor is doing, and since when.
#[derive(Clone, Copy, Debug)]
pub(super) struct Step {
    /// In words, for messages.
    pub what: &'static str,
    pub since: Instant,
}

/// The main thread's end of a supervisor.
#[derive(Debug)]
pub(super) struct Supervisor {
    commands: Sender<Command>,
    step: Arc<Mutex<Step>>,
}

impl Supervisor {
    /// Starts the thread of device number `index`, which sends what happens to `events`.
    ///
    /// # Errors
    /// [`ErrorKind::System`] if the thread cannot be started.
    pub fn start(index: usize, config: &DeviceConfig, context: &Arc<Context>, events: &Sender<Event>) -> Result<Self> {
        let (commands, receiver) = channel();
        let step = Arc::new(Mutex::new(Step { what: "starting", since: Instant::now() }));
        let worker = Worker {
            index,
            config: config.clone(),
            context: Arc::clone(context),
            commands: receiver,
            events: events.clone(),
            step: Arc::clone(&step),
        };
        let name = format!("disk {}", config.name);
        let failed = |e| Error::io(ErrorKind::System, format!("{}: cannot start a thread", config.name), e);
        thread::Builder::new().name(name).spawn(move || worker.run()).map_err(failed)?;
        Ok(Self { commands, step })
    }

    /// Sends a command. A supervisor that has ended needs none.
    pub fn send(&self, command: Command) {
        if self.commands.send(command).is_err() {
            debug!("a device ended before {command:?}");
        }
    }

    /// What the supervisor is doing.
    pub fn step(&self) -> Step {
        *lock(&self.step)
    }
}

fn lock(step: &Mutex<Step>) -> MutexGuard<'_, Step> {
    step.lock().expect("no thread panics with the step locked")
}

/// The thread's side.
struct Worker {
    index: usize,
    config: DeviceConfig,
    context: Arc<Context>,
    commands: Receiver<Command>,
    events: Sender<Event>,
    step: Arc<Mutex<Step>>,
}

impl Worker {
    fn begin(&self, what: &'static str) {
        *lock(&self.step) = Step { what, since: Instant::now() };
    }

    /// The main thread may have ended the process's wait for this device.
    fn tell(&self, news: News) {
        let _ = self.events.send(Event::News(self.index, news));
    }

    fn run(self) {
        let ended = match self.start_when_possible() {
            Some(running) => self.serve(running),
            None => Ok(()),
        };
        self.tell(News::Ended(ended));
    }

    /// Opens and starts the device, in as many attempts as it takes. `None`: the daemon ends before that.
    fn start_when_possible(&self) -> Option<Running> {
        let mut pause = RETRY_MIN;
        loop {
            let error = match self.start() {
                Ok(started) => return started,
                Err(error) => error,
            };
            // A killed daemon releases the image when its I/O is over, which no pause predicts.
            pause = if error.kind() == ErrorKind::Locked { RETRY_MIN } else { pause };
            self.tell(News::Failed(error));
            self.begin("waiting to open the image again");
            match self.commands.recv_timeout(pause) {
                Ok(Command::End(_) | Command::Finish) | Err(RecvTimeoutError::Disconnected) => return None,
                Ok(Command::Resume | Command::Serve) => pause = RETRY_MIN,
                Err(RecvTimeoutError::Timeout) => pause = (pause * 2).min(RETRY_MAX),
            }
        }
    }

    /// One attempt; `None`: the daemon ends.
    fn start(&self) -> Result<Option<Running>> {
        self.begin("opening the image");
        let service = Service::open(&self.config, &self.context)?;
        self.begin("waiting for the other disks");
        self.tell(News::Open);
        loop {
            match self.commands.recv() {
                Ok(Command::Serve) => break,
                Ok(Command::Resume) => {}
                Ok(Command::End(_) | Command::Finish) | Err(_) => return Ok(None),
            }
        }
        self.begin("starting threads");
        service.start().map(Some)
    }

    /// Serves the device until the daemon ends.
    fn serve(&self, running: Running) -> Result<()> {
        self.begin("serving");
        self.tell(News::Served(running.handle()));
        loop {
            match self.commands.recv() {
                Ok(Command::Resume) => running.resume(),
                Ok(Command::End(ending)) => return self.end(running, ending),
                Ok(Command::Serve | Command::Finish) => {}
                Err(_) => return self.end(running, Ending::WriteBack),
            }
        }
    }

    fn end(&self, mut running: Running, ending: Ending) -> Result<()> {
        self.begin("completing the guest's requests");
        let quiesced = running.quiesce();
        self.tell(News::Quiesced);
        while !matches!(self.commands.recv(), Ok(Command::Finish) | Err(_)) {}
        self.begin(match ending {
            Ending::WriteBack => "writing dirty pages to the image",
            Ending::HandOver => "leaving the cache to the next daemon",
        });
        let ended = match ending {
            Ending::WriteBack => running.shutdown(),
            Ending::HandOver => running.hand_over(),
        };
        quiesced.and(ended)
    }
}
