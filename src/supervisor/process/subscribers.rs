//! What a disk process reports, and who receives it: the keepers of its devices, and the requesters of the operator's
//! changes. A process can send anything, so each message is checked against what the supervisor has sent to it.

use std::collections::BTreeMap;
use std::fmt;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::Arc;
use std::sync::mpsc::Sender;

use crate::disk_protocol::{DeviceReply, ErrorText, FromDisk};
use crate::disk_stats::{StatsPage, TruncatedMemory};
use crate::error::{Error, Result};
use crate::store::file::IoLock;
use crate::sys::signal;

/// How a disk process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// `None` for one that was a thread, or if it is not known yet.
    pub status: Option<ExitStatus>,
    /// It reported that it has released its image and its cache.
    pub is_released: bool,
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
pub enum DeathCause {
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
pub enum ProcessEvent {
    Served,
    Failed(Error),
    Quiesced,
    Ended(Result<()>),
    /// The process has ended.
    Exited(Exit, DeathCause),
}

/// Receives the events of a device.
pub struct EventSink(pub Box<dyn Fn(IoLock, ProcessEvent) + Send>);

impl EventSink {
    pub fn send(&self, io_lock: IoLock, event: ProcessEvent) {
        (self.0)(io_lock, event);
    }
}

impl fmt::Debug for EventSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("EventSink")
    }
}

/// Receivers of the events and replies of the process.
#[derive(Debug, Default)]
pub struct Subscribers {
    pub by_device: BTreeMap<u32, Subscriber>,
    /// Its images, by the number of the device for which each was opened.
    pub images: BTreeMap<u32, ImageOutcome>,
    pub exit: Option<Exit>,
    /// Why it has ended, for a device that it did not serve yet.
    pub cause: DeathCause,
    /// Receivers of the replies to requests, by number of the request.
    pub requesters: BTreeMap<u64, Sender<DeviceReply>>,
    pub last_request: u64,
}

/// The receiver of a device's events.
#[derive(Debug)]
pub struct Subscriber {
    /// The device's name.
    pub name: String,
    /// Number of the device for which its image was opened.
    pub image_of: u32,
    /// Its statistics page.
    page: Arc<StatsPage>,
    stage: ReportedStage,
    sink: EventSink,
}

/// The state of an image in the process.
#[derive(Debug, Default)]
pub struct ImageOutcome {
    /// Why it cannot be served.
    pub failure: Option<ErrorText>,
    /// Once it was released.
    pub exit: Option<Exit>,
}

impl Subscriber {
    pub fn new(name: String, image_of: u32, page: Arc<StatsPage>, sink: EventSink) -> Self {
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
pub struct Unexpected {
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
    pub fn accept(&mut self, io_lock: IoLock, message: FromDisk) -> std::result::Result<(), Unexpected> {
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
    pub fn report_exit(&mut self, io_lock: IoLock, exit: Exit) {
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
