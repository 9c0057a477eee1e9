//! How the control plane speaks to a worker: commands with answers, so that a ring is stopped when it says so.

use std::fs::File;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use log::error;

use super::inflight::InflightTracker;
use crate::units::Fault;
use crate::virtio::GuestRam;
use crate::virtio::split::{QueueLayout, QueuePosition};
use crate::waker::Waker;

/// Everything a ring needs to run.
#[derive(Debug)]
pub struct RingSetup {
    /// Where the ring lies.
    pub layout: QueueLayout,
    /// Where it goes on.
    pub position: QueuePosition,
    /// Readable when the guest has made something available.
    pub kick: File,
    /// Written when something has been used; none: the guest polls.
    pub call_fd: Option<File>,
    /// The guest's memory.
    pub memory: Arc<GuestRam>,
    /// Where the ring notes what it owes, if the front-end wants that.
    pub track: Option<InflightTracker>,
}

/// What a worker is told; each is answered when it is done.
#[derive(Debug)]
pub enum Command {
    /// Serve this ring from now on.
    Start(u16, Box<RingSetup>, Sender<()>),
    /// Finish what was taken from this ring and take no more. `None`: it did not run.
    Stop(u16, Sender<Option<QueuePosition>>),
    /// Use this to interrupt the guest.
    SetCallFd(u16, Option<File>, Sender<()>),
    /// Finish what was taken from every ring, then use this memory.
    Memory(Arc<GuestRam>, Sender<()>),
    /// Make everything written so far durable.
    Flush(Sender<Result<(), Fault>>),
    /// The image is well again: what failed is tried at once.
    Resume(Sender<()>),
    /// End the thread. Rings are stopped by then.
    Exit,
}

/// The control plane's end.
#[derive(Clone, Debug)]
pub struct Control {
    commands: Sender<Command>,
    waker: Arc<Waker>,
}

impl Control {
    /// Both ends; `waker` wakes the worker.
    pub fn new(waker: Arc<Waker>) -> (Self, Receiver<Command>) {
        let (commands, receiver) = channel();
        (Self { commands, waker }, receiver)
    }

    /// Sends a command that needs no answer.
    pub fn send(&self, command: Command) {
        // A worker ends only when it is told to, or when an invariant broke; then nobody listens any more.
        if self.commands.send(command).is_err() || self.waker.notify().is_err() {
            error!("a worker thread is gone");
        }
    }

    /// Sends a command and waits for its answer. `None`: the worker is gone.
    pub fn ask<T>(&self, command: impl FnOnce(Sender<T>) -> Command) -> Option<T> {
        let (answer, wait) = channel();
        self.send(command(answer));
        wait.recv().ok()
    }
}

/// The workers of a device, and which rings each serves: ring `i` belongs to worker `i` modulo their number.
#[derive(Debug)]
pub struct Workers {
    controls: Vec<Control>,
    /// The last command that changes many rings at a time is over before the next begins.
    serial: Mutex<()>,
}

impl Workers {
    /// At least one worker.
    pub fn new(controls: Vec<Control>) -> Self {
        assert!(!controls.is_empty(), "a device has a worker");
        Self { controls, serial: Mutex::new(()) }
    }

    /// The worker of a ring.
    pub fn of_ring(&self, ring: u16) -> &Control {
        &self.controls[usize::from(ring) % self.controls.len()]
    }

    /// Hands new guest memory to every worker; each has finished with the old one when this returns.
    pub fn set_memory(&self, memory: &Arc<GuestRam>) {
        let _serial = self.serial.lock();
        for control in &self.controls {
            control.ask(|answer| Command::Memory(Arc::clone(memory), answer));
        }
    }

    /// Makes everything written so far durable.
    ///
    /// # Errors
    /// The store's fault.
    pub fn flush(&self) -> Result<(), Fault> {
        self.controls[0].ask(Command::Flush).unwrap_or(Err(Fault::Gone))
    }

    /// As [`Workers::flush`], without waiting for the end. If it fails, the log tells of the image.
    pub fn start_flush(&self) {
        self.controls[0].send(Command::Flush(channel().0));
    }

    /// The operator says that the image is well again.
    pub fn resume(&self) {
        self.controls[0].ask(Command::Resume);
    }

    /// Ends the threads.
    pub fn exit(&self) {
        for control in &self.controls {
            control.send(Command::Exit);
        }
    }
}
