//! One device of a disk process, and its thread `disk NAME`. The thread starts and ends the device, and may block on
//! the image while doing so; therefore no thread waits for this one without a deadline.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};

use super::{DiskChannel, send_event, spawn};
use crate::device::Untracked;
use crate::disk_protocol::{DeviceReply, DeviceRequest, Ending, ErrorText, FromDisk};
use crate::disk_stats::{DiskState, StatsPage};
use crate::error::{Error, Result};
use crate::sandbox::{self, ThreadKind};
use crate::service::{Running, Service, ServiceHandle};
use crate::waker::Waker;

/// Commands of the control thread to the device's thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DeviceCommand {
    Resume,
    Quiesce,
    Finish(Ending),
}

/// The stages of a device.
#[derive(Debug)]
enum DeviceStage {
    Starting,
    Served(ServiceHandle),
    Quiesced(ServiceHandle),
    Ended,
}

/// The control thread's side of a device.
#[derive(Debug)]
pub(super) struct DeviceControl {
    commands: Sender<DeviceCommand>,
    stage: Arc<Mutex<DeviceStage>>,
    page: &'static StatsPage,
    state: DiskState,
    /// Number of requests that were started.
    requests: AtomicU64,
}

impl DeviceControl {
    /// Starts the thread of device `number`, which serves it and reports events to the supervisor. `waker` is notified
    /// when the device has ended.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::System`] if the thread cannot be started.
    pub fn start(
        number: u32,
        name: &str,
        service: Service,
        page: &'static StatsPage,
        channel: &Arc<DiskChannel>,
        waker: &Arc<Waker>,
    ) -> Result<Self> {
        let (commands, receiver) = self::channel();
        let stage = Arc::new(Mutex::new(DeviceStage::Starting));
        let worker =
            DeviceThread { number, channel: Arc::clone(channel), commands: receiver, stage: Arc::clone(&stage) };
        let waker = Arc::clone(waker);
        spawn(&format!("disk {name}"), move || {
            worker.run(service);
            worker.set_stage(DeviceStage::Ended);
            // It fails only if the counter overflows.
            let _ = waker.notify();
        })?;
        Ok(Self { commands, stage, page, state: DiskState::default(), requests: AtomicU64::new(0) })
    }

    fn stage(&self) -> MutexGuard<'_, DeviceStage> {
        self.stage.lock().expect("no thread panics with the stage locked")
    }

    /// Whether its thread no longer needs the image.
    pub fn has_ended(&self) -> bool {
        matches!(*self.stage(), DeviceStage::Ended)
    }

    /// Whether its rings have stopped.
    pub fn has_quiesced(&self) -> bool {
        matches!(*self.stage(), DeviceStage::Quiesced(_) | DeviceStage::Ended)
    }

    fn send(&self, command: DeviceCommand) {
        // It fails if the device has ended, which needs no commands.
        let _ = self.commands.send(command);
    }

    pub fn resume(&self) {
        self.send(DeviceCommand::Resume);
    }

    pub fn quiesce(&self) {
        self.send(DeviceCommand::Quiesce);
    }

    pub fn finish(&self, ending: Ending) {
        self.send(DeviceCommand::Finish(ending));
    }

    /// Executes a request on a separate thread, which sends the reply: it may wait for the image, and no other thread
    /// may wait for it. The new thread inherits the caller's sandbox.
    pub fn request(&self, id: u64, request: DeviceRequest, channel: &Arc<DiskChannel>) {
        let mut served = None;
        self.with_handle(|handle| served = Some(handle.clone()));
        let reply = move |channel: &DiskChannel, reply| send_event(channel, &FromDisk::Reply { id, reply });
        let Some(handle) = served else { return reply(channel, DeviceReply::NotServed) };
        let order = self.requests.fetch_add(1, Ordering::Relaxed);
        let to_supervisor = Arc::clone(channel);
        let started = spawn("request", move || reply(&to_supervisor, handle.execute(&request, order)));
        if let Err(e) = started {
            send_event(channel, &FromDisk::Reply { id, reply: DeviceReply::Failed { fault: e.to_string() } });
        }
    }

    fn with_handle(&self, act: impl FnOnce(&ServiceHandle)) {
        if let DeviceStage::Served(handle) | DeviceStage::Quiesced(handle) = &*self.stage() {
            act(handle);
        }
    }

    pub fn abandon(&self, untracked: Untracked) {
        self.with_handle(|handle| handle.abandon(untracked));
    }

    pub fn force_close(&self) {
        self.with_handle(ServiceHandle::force_close);
    }

    /// The device's state, as of the last check.
    pub fn state(&self) -> &DiskState {
        &self.state
    }

    /// Reads the device's state and writes it to its statistics page.
    pub fn publish_state(&mut self) {
        let mut state = self.state;
        self.with_handle(|handle| state = handle.state(&state));
        self.state = state;
        self.page.publish(&state);
    }
}

/// The thread's side.
struct DeviceThread {
    number: u32,
    channel: Arc<DiskChannel>,
    commands: Receiver<DeviceCommand>,
    stage: Arc<Mutex<DeviceStage>>,
}

impl DeviceThread {
    fn set_stage(&self, stage: DeviceStage) {
        *self.stage.lock().expect("no thread panics with the stage locked") = stage;
    }

    fn run(&self, service: Service) {
        let device = self.number;
        let running = match service.start() {
            Ok(running) => running,
            Err(error) => {
                let error = ErrorText::from(&error);
                return send_event(&self.channel, &FromDisk::Failed { device, error });
            }
        };
        sandbox::confine(ThreadKind::Main);
        self.set_stage(DeviceStage::Served(running.handle()));
        send_event(&self.channel, &FromDisk::Served { device });
        let error = self.serve(running).err().map(|error: Error| ErrorText::from(&error));
        send_event(&self.channel, &FromDisk::Ended { device, error });
    }

    fn serve(&self, mut running: Running) -> Result<()> {
        let mut quiesced = Ok(());
        loop {
            match self.commands.recv() {
                Ok(DeviceCommand::Resume) => running.resume(),
                Ok(DeviceCommand::Quiesce) => {
                    quiesced = running.quiesce();
                    self.set_stage(DeviceStage::Quiesced(running.handle()));
                    send_event(&self.channel, &FromDisk::Quiesced { device: self.number });
                }
                Ok(DeviceCommand::Finish(Ending::HandOver)) => return quiesced.and(running.hand_over()),
                Ok(DeviceCommand::Finish(Ending::WriteBack)) | Err(_) => return quiesced.and(running.shutdown()),
            }
        }
    }
}
