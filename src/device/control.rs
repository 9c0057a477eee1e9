//! The control plane's commands to the workers. A command with a reply has been executed when the reply arrives: the
//! control plane can rely on a stopped ring taking no more requests.

use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use log::error;

use super::Device;
use super::inflight::InflightTracker;
use crate::cache::{Settings, WarmStep};
use crate::fault_injection::{PlantedBug, planted};
use crate::units::{Fault, PageNo, PageSpan};
use crate::virtio::GuestRam;
use crate::virtio::split::{QueueLayout, QueuePosition};
use crate::waker::Waker;

/// Most flushes without a waiting caller that are in progress at a time.
const STARTED_FLUSHES_MAX: usize = 16;

/// The resources that a ring needs to run.
#[derive(Debug)]
pub struct RingSetup {
    /// The position of the queue in guest memory.
    pub layout: QueueLayout,
    /// The position at which the device continues.
    pub position: QueuePosition,
    /// The kick descriptor: readable after the driver has made heads available.
    pub kick: File,
    /// The call descriptor, which interrupts the driver; `None`: the driver polls.
    pub call_fd: Option<File>,
    /// The error descriptor, which reports to the front-end that the ring is broken.
    pub err_fd: Option<File>,
    /// The guest's memory.
    pub memory: Arc<GuestRam>,
    /// The ring's part of the inflight region, if the front-end uses one.
    pub tracker: Option<InflightTracker>,
}

/// A command to a worker. Each but the last two has a reply, sent when the command has been executed.
#[derive(Debug)]
pub enum WorkerCommand {
    /// Start the ring with this index.
    Start(u16, Box<RingSetup>, Sender<()>),
    /// Stop the ring: take no more requests, and complete those that were taken. Replies with the ring's last position;
    /// `None`: it was not running.
    Stop(u16, Sender<Option<QueuePosition>>),
    /// Use this call descriptor for the ring.
    SetCallFd(u16, Option<File>, Sender<()>),
    /// Use this error descriptor for the ring.
    SetErrFd(u16, Option<File>, Sender<()>),
    /// Complete the requests that were taken from every ring, then use this memory.
    Memory(Arc<GuestRam>, Sender<()>),
    /// Make every completed write durable.
    Flush(Sender<Result<(), Fault>>),
    /// The operator resumes the image: retry failed operations immediately.
    Resume(Sender<()>),
    /// Apply those of these settings that may change while the cache is used.
    Reconfigure(Box<Settings>, Sender<()>),
    /// Evict clean pages in a part of the page table, starting at this slot. Replies with the number of evicted pages,
    /// and the next slot.
    DropClean(u32, Sender<(u32, Option<u32>)>),
    /// Read in pages, with a lower priority than the guest's requests. Replies with the page from which to continue.
    Warm(PageSpan, Sender<(PageNo, WarmStep)>),
    /// List the pages in memory of a part of the page table, starting at this slot. Also replies with the next slot.
    Resident(u32, Sender<(Vec<PageNo>, Option<u32>)>),
    /// Reply when no request for sectors at or after this one is in progress. The device accepts no new ones.
    DrainBeyond(u64, Sender<()>),
    /// Freeze the cache for at most this long. Replies when it is frozen.
    Freeze(Duration, HeldRequests, Sender<Result<(), Fault>>),
    /// End a freeze. Replies whether the cache was frozen.
    Thaw(Sender<bool>),
    /// End the thread, whose rings have stopped. Store operations in flight get this long to complete.
    Exit(Duration),
    /// End the thread as a crash would, with requests in flight.
    Abandon(Untracked),
}

/// Which requests of guests wait while the cache is frozen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeldRequests {
    /// Those that change the image.
    Changes,
    /// Reads too.
    All,
}

/// How abandoned workers handle requests in flight that no inflight region records: the next daemon cannot repeat them,
/// and the guest would wait for them forever.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Untracked {
    /// Their worker continues until they complete.
    Wait,
    /// They are lost.
    Lose,
}

/// The control plane's end of the commands to one worker.
#[derive(Clone, Debug)]
pub struct WorkerControl {
    device: String,
    commands: Sender<WorkerCommand>,
    waker: Arc<Waker>,
    /// A command could not be delivered, because the worker has ended.
    ended: Arc<AtomicBool>,
}

impl WorkerControl {
    /// Both ends of the commands to a worker of `device`, which `waker` wakes.
    pub fn new(device: &str, waker: Arc<Waker>) -> (Self, Receiver<WorkerCommand>) {
        let (commands, receiver) = channel();
        let ended = Arc::default();
        (Self { device: device.to_owned(), commands, waker, ended }, receiver)
    }

    /// Sends a command without waiting for a reply.
    pub fn send(&self, command: WorkerCommand) {
        // A worker ends only by `Exit` and `Abandon`, or by a panic, which ends the process. After the first two, no
        // reply is needed.
        let is_end = matches!(command, WorkerCommand::Exit(_) | WorkerCommand::Abandon(_));
        if self.commands.send(command).is_err() {
            self.ended.store(true, Ordering::Release);
        } else if let Err(e) = self.waker.notify()
            && !is_end
        {
            error!("{}: cannot wake a worker thread: {e}", self.device);
        }
    }

    /// Whether the worker has ended.
    fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// Sends a command whose reply arrives at the returned receiver, unless the worker ends before that.
    pub fn request<T>(&self, command: impl FnOnce(Sender<T>) -> WorkerCommand) -> Receiver<T> {
        let (reply, replied) = channel();
        self.send(command(reply));
        replied
    }

    /// Sends a command and waits for its reply. `None`: the worker has ended.
    pub fn call<T>(&self, command: impl FnOnce(Sender<T>) -> WorkerCommand) -> Option<T> {
        self.request(command).recv().inspect_err(|_| self.ended.store(true, Ordering::Release)).ok()
    }
}

/// The workers of a device. Ring `i` belongs to worker `i` modulo their number.
#[derive(Debug)]
pub struct Workers {
    controls: Vec<WorkerControl>,
    /// True once no more freezes may start. Locked while a freeze or the last thaw is sent, so that the thaw comes
    /// last.
    freezes_closed: Mutex<bool>,
    /// Held during a command to all workers, so that two of them do not interleave.
    serial: Mutex<()>,
    /// Replies to the flushes of [`Workers::start_flush`].
    started_flushes: Mutex<Vec<Receiver<Result<(), Fault>>>>,
}

impl Workers {
    /// The workers behind `controls`, at least one.
    pub fn new(controls: Vec<WorkerControl>) -> Self {
        assert!(!controls.is_empty(), "a device has at least one worker");
        Self { controls, freezes_closed: Mutex::default(), serial: Mutex::new(()), started_flushes: Mutex::default() }
    }

    /// The worker of a ring.
    pub fn worker_for(&self, ring: u16) -> &WorkerControl {
        &self.controls[usize::from(ring) % self.controls.len()]
    }

    /// Makes every worker use new guest memory. When this returns, no worker uses the old memory.
    pub fn set_memory(&self, memory: &Arc<GuestRam>) {
        let _serial = self.serial.lock();
        for control in &self.controls {
            control.call(|reply| WorkerCommand::Memory(Arc::clone(memory), reply));
        }
    }

    /// Whether a worker has ended.
    pub fn has_ended(&self) -> bool {
        self.controls.iter().any(WorkerControl::has_ended)
    }

    /// Makes every completed write durable.
    ///
    /// # Errors
    /// The store's fault.
    pub fn flush(&self) -> Result<(), Fault> {
        self.controls[0].call(WorkerCommand::Flush).unwrap_or(Err(Fault::Gone))
    }

    /// Like [`Workers::flush`], without waiting for the result. If it fails, the log reports the image's health. Does
    /// nothing while many such flushes are in progress: a front-end that keeps reconnecting to an image that hangs must
    /// not queue an unlimited number of them.
    pub fn start_flush(&self) {
        let mut started = self.started_flushes.lock().expect("no thread panics with the flushes locked");
        started.retain(|flush| matches!(flush.try_recv(), Err(TryRecvError::Empty)));
        if started.len() < STARTED_FLUSHES_MAX {
            started.push(self.controls[0].request(WorkerCommand::Flush));
        }
    }

    /// The guest chooses the cache mode. A switch to write-through makes every completed write durable; the receiver
    /// gets the result.
    ///
    /// => Writes that are taken after a switch to write-through are stable when they complete.
    pub fn choose_writeback(&self, device: &Device, writeback: bool) -> Option<Receiver<Result<(), Fault>>> {
        device.choose_writeback(writeback);
        let must_flush = !writeback && !planted(PlantedBug::SwitchNotFlushed);
        must_flush.then(|| self.controls[0].request(WorkerCommand::Flush))
    }

    /// Retries failed operations immediately: the operator resumes the image.
    pub fn resume(&self) {
        self.controls[0].call(WorkerCommand::Resume);
    }

    /// Applies those of these settings that may change while the cache is used.
    pub fn reconfigure(&self, settings: Settings) {
        self.controls[0].call(|reply| WorkerCommand::Reconfigure(Box::new(settings), reply));
    }

    /// Evicts every clean page, a part of the page table in each turn. Returns the number of evicted pages.
    pub fn drop_clean(&self) -> u64 {
        let (mut dropped, mut from) = (0, Some(0));
        while let Some(slot) = from {
            let Some((pages, next)) = self.controls[0].call(|reply| WorkerCommand::DropClean(slot, reply)) else {
                break;
            };
            dropped += u64::from(pages);
            from = next;
        }
        dropped
    }

    /// Makes the workers read the limits again, which are changed without a command.
    pub fn wake(&self) {
        for control in &self.controls {
            if let Err(e) = control.waker.notify() {
                error!("{}: cannot wake a worker thread: {e}", control.device);
            }
        }
    }

    /// Reads in as many pages as fit now, with a lower priority than the guest's requests. Returns the page from which
    /// to continue; `None`: the worker has ended.
    pub fn warm(&self, pages: PageSpan) -> Option<(PageNo, WarmStep)> {
        self.controls[0].call(|reply| WorkerCommand::Warm(pages, reply))
    }

    /// The pages in memory of a part of the page table, starting at a slot, and the next slot; `None`: the worker has
    /// ended.
    pub fn resident(&self, from: u32) -> Option<(Vec<PageNo>, Option<u32>)> {
        self.controls[0].call(|reply| WorkerCommand::Resident(from, reply))
    }

    /// Waits until no request for sectors at or after `end` is in progress, at most for `timeout`. Returns whether
    /// that is so.
    ///
    /// => The device has a capacity of at most `end` sectors: it accepts no new ones.
    pub fn drain_beyond(&self, end: u64, timeout: Duration) -> bool {
        let until = Instant::now() + timeout;
        let drains: Vec<_> = self
            .controls
            .iter()
            .map(|control| control.request(|reply| WorkerCommand::DrainBeyond(end, reply)))
            .collect();
        drains.iter().all(|drained| drained.recv_timeout(until.saturating_duration_since(Instant::now())).is_ok())
    }

    /// Makes all completed writes durable, and does not change the image from then on until [`Workers::thaw`], at most
    /// for `time`, counted from now.
    ///
    /// # Errors
    /// The store's fault; [`Fault::TimedOut`] if the time was over before that, or a ring could not stop otherwise;
    /// [`Fault::Invalid`] if it is already frozen; [`Fault::Gone`] after [`Workers::close_freezes`].
    pub fn freeze(&self, time: Duration, held: HeldRequests) -> Result<(), Fault> {
        let replied = {
            let ends = self.freezes_closed.lock().expect("no thread panics with the freezes locked");
            if *ends {
                return Err(Fault::Gone);
            }
            self.controls[0].request(|reply| WorkerCommand::Freeze(time, held, reply))
        };
        replied.recv().unwrap_or(Err(Fault::Gone))
    }

    /// Like [`Workers::thaw`], and rejects later freezes, so that a vring that stops can complete its requests.
    pub fn close_freezes(&self) {
        let thawed = {
            let mut ends = self.freezes_closed.lock().expect("no thread panics with the freezes locked");
            *ends = true;
            self.controls[0].request(WorkerCommand::Thaw)
        };
        // A worker that has ended delays nothing.
        let _ = thawed.recv();
    }

    /// Ends a freeze. Returns whether the cache was still frozen.
    pub fn thaw(&self) -> bool {
        self.controls[0].call(WorkerCommand::Thaw).unwrap_or(false)
    }

    /// Ends the threads. Waits up to `timeout` for store operations in flight, then leaves them to the kernel.
    pub fn exit(&self, timeout: Duration) {
        for control in &self.controls {
            control.send(WorkerCommand::Exit(timeout));
        }
    }

    /// Ends the threads as a crash would: requests in flight do not complete, and store operations in flight are left
    /// to the kernel. The ledger and the inflight region stay as after a crash, so the next daemon repeats both.
    pub fn abandon(&self, untracked: Untracked) {
        for control in &self.controls {
            control.send(WorkerCommand::Abandon(untracked));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_closed_device_is_not_frozen_again() {
        let (control, commands) = WorkerControl::new("disk0", Arc::new(Waker::new().unwrap()));
        let workers = Workers::new(vec![control]);
        std::thread::scope(|scope| {
            scope.spawn(|| workers.close_freezes());
            let Ok(WorkerCommand::Thaw(reply)) = commands.recv() else { panic!("a thaw") };
            reply.send(true).unwrap();
        });
        assert_eq!(workers.freeze(Duration::from_secs(1), HeldRequests::All), Err(Fault::Gone));
        assert!(commands.try_recv().is_err(), "no command was sent");
    }

    #[test]
    fn a_shrink_waits_for_the_requests_of_every_worker() {
        for replies in [[true, false], [false, true], [true, true]] {
            let new = || WorkerControl::new("disk0", Arc::new(Waker::new().unwrap()));
            let (controls, commands): (Vec<_>, Vec<_>) = [new(), new()].into_iter().unzip();
            let workers = Workers::new(controls);
            let drained = std::thread::scope(|scope| {
                let drained = scope.spawn(|| workers.drain_beyond(64, Duration::from_millis(200)));
                let waiting: Vec<_> = commands
                    .iter()
                    .zip(replies)
                    .filter_map(|(commands, replies)| {
                        let Ok(WorkerCommand::DrainBeyond(64, reply)) = commands.recv() else { panic!("a drain") };
                        if replies { reply.send(()).map(|()| None).unwrap() } else { Some(reply) }
                    })
                    .collect();
                let drained = drained.join().unwrap();
                drop(waiting);
                drained
            });
            assert_eq!(drained, replies == [true, true], "{replies:?}");
        }
    }

    #[test]
    fn a_flush_that_was_started_is_forgotten_when_it_has_ended() {
        let (control, commands) = WorkerControl::new("disk0", Arc::new(Waker::new().unwrap()));
        let workers = Workers::new(vec![control]);
        for _ in 0..3 * STARTED_FLUSHES_MAX {
            workers.start_flush();
            let Ok(WorkerCommand::Flush(reply)) = commands.try_recv() else { panic!("a flush") };
            reply.send(Ok(())).unwrap();
        }
        let waiting: Vec<_> = (0..3 * STARTED_FLUSHES_MAX)
            .filter_map(|_| {
                workers.start_flush();
                commands.try_recv().ok()
            })
            .collect();
        assert_eq!(waiting.len(), STARTED_FLUSHES_MAX, "no more than that wait for an image that hangs");
    }
}
