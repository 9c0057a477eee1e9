//! The main thread's record of one device: its phase, what it waits for, and the deadlines of these waits.

mod change;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use log::{error, info, warn};

use crate::config::DeviceConfig;
use crate::control::wire::DeviceState;
use crate::disk_protocol::Ending;
use crate::disk_stats::{DiskState, OldestOp};
use crate::error::{Error, ErrorKind, Result};
use crate::recover;
use crate::store::file::IoLock;
use crate::sys::process::is_dying;
use crate::units::counted;

pub(super) use change::{Detaching, RemainingDevices};

use super::SupervisorEvent;
use super::context::Context;
use super::current_config::CurrentConfig;
use super::entry::{DeviceProgress, OverviewEntry};
use super::fleet_change::{Recorded, Requester};
use super::handle::DeviceHandle;
use super::keeper::{self, FENCING, Keeper, KeeperCommand};
use super::operator_state::OperatorState;
use super::pressure;
use super::reminder::{FIRST, Reminder};

/// How long a device may take to hand its cache over to the next daemon. After that the cache is left as a crash would
/// leave it, which loses nothing.
const HAND_OVER_TIMEOUT: Duration = Duration::from_secs(2);
/// The same, while a request is in flight that the next daemon cannot resubmit: its guest would wait for it forever.
const UNTRACKED_TIMEOUT: Duration = Duration::from_secs(30);
/// The same, while the image completes nothing: that guest waits anyway, but the other guests must not.
const UNTRACKED_STALL_MAX: Duration = Duration::from_secs(5);
/// How long a device that is ending waits for an image that completes nothing: Linux's timeout of a SCSI command.
const STALL_MAX: Duration = Duration::from_secs(30);
/// The same after a second signal, if the end loses completed writes; a third signal ends the wait.
const HURRIED_STALL_MAX: Duration = Duration::from_secs(5);
/// The longest wait after a second signal.
const HURRIED_TIMEOUT: Duration = Duration::from_secs(30);
/// How long after a restart a front-end may take to reconnect: QEMU tries once a second.
const RECONNECT_MAX: Duration = Duration::from_secs(30);
/// How long to wait for the threads of an abandoned device.
const ABANDON_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a disk process that hangs may take to close its connection before it is killed.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(200);
/// How long to wait for a disk process that was killed: a thread in uninterruptible sleep does not die.
const KILL_TIMEOUT: Duration = Duration::from_secs(1);

/// The phases of a device, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum DevicePhase {
    /// Being opened for the first time.
    Opening,
    /// Could not be opened; will be retried.
    Failed,
    /// Open but not yet served, or its process has died.
    Open,
    Served,
    /// Completing its requests.
    Ending,
    /// Its rings have stopped.
    Quiesced,
    /// Writing or handing over its cache and closing its image.
    Finishing,
    Ended,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Disk {
    name: String,
    /// The command or signal that resumes it, for messages.
    resume_by: String,
    image: PathBuf,
    current: CurrentConfig,
    keeper: Keeper,
    /// Changes by the operator that are in progress.
    operator: Arc<OperatorState>,
    phase: DevicePhase,
    /// `Some` while it is served.
    handle: Option<DeviceHandle>,
    /// It has been served, perhaps by a process that has died.
    was_served: bool,
    /// It had a front-end at the last check while it was served.
    had_front_end: bool,
    /// Until when that may reconnect, after a restart.
    may_reconnect_until: Option<Instant>,
    /// Why it is not served.
    failure: Option<StartFailure>,
    /// Schedules log lines about the keeper's current step.
    step_reminder: Reminder,
    /// Schedules log lines about the oldest operation in flight.
    op_reminder: Reminder,
    /// Since when another front-end has been waiting, and the schedule of log lines about it.
    waiting: Option<(Instant, Reminder)>,
    /// When the image last completed an operation, and how many it had completed by that time.
    last_completion: (Instant, u64),
    /// When it was abandoned, and whether it still waits for requests that the next daemon cannot resubmit.
    abandoned: Option<(Instant, bool)>,
    /// When the operator repeated the signal although the end would lose completed writes.
    hurried: Option<Instant>,
    /// How it ends, and since when.
    end: Option<(Ending, Instant)>,
    /// The requester of its attach, until it is served.
    attaching: Option<(Requester, Recorded)>,
    /// The detach in progress.
    detaching: Option<Detaching>,
    /// Since when its rings have stopped.
    quiesced: Option<Instant>,
    /// When the wait for its hung threads was given up, and whether its process was killed.
    abandoned_hung: Option<(Instant, bool)>,
    /// Schedules log lines about a process that does not run.
    silence_reminder: Reminder,
    /// Schedules log lines about waiting for the image because the cache is volatile.
    volatile_reminder: Reminder,
    /// The error with which it ended.
    error: Option<Error>,
}

/// The latest error of the attempts to serve a device.
#[derive(Debug)]
struct StartFailure {
    text: String,
    since: Instant,
    reminder: Reminder,
}

impl Disk {
    /// Starts the keeper of device number `index`.
    ///
    /// # Errors
    /// [`ErrorKind::System`] if its thread cannot be started.
    pub fn start(
        index: usize,
        config: &DeviceConfig,
        context: &Arc<Context>,
        events: &Sender<SupervisorEvent>,
    ) -> Result<Self> {
        let current = CurrentConfig::new(config);
        Ok(Self {
            name: config.name.clone(),
            resume_by: context.resume_by(&config.name),
            image: config.image.clone(),
            operator: Arc::default(),
            keeper: Keeper::start(index, config, &current, context, events)?,
            current,
            phase: DevicePhase::Opening,
            handle: None,
            was_served: false,
            had_front_end: false,
            may_reconnect_until: None,
            failure: None,
            step_reminder: Reminder::new(),
            op_reminder: Reminder::new(),
            waiting: None,
            last_completion: (Instant::now(), 0),
            abandoned: None,
            hurried: None,
            end: None,
            attaching: None,
            detaching: None,
            quiesced: None,
            abandoned_hung: None,
            silence_reminder: Reminder::new(),
            volatile_reminder: Reminder::new(),
            error: None,
        })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn phase(&self) -> DevicePhase {
        self.phase
    }

    pub fn set_phase(&mut self, phase: DevicePhase) {
        // An event that was queued before the end began, or before the device was given up, does not undo that.
        if self.phase < DevicePhase::Ending || phase > self.phase {
            self.phase = phase;
        }
        if phase == DevicePhase::Quiesced {
            self.quiesced.get_or_insert_with(Instant::now);
        }
    }

    pub fn send(&self, command: KeeperCommand) {
        self.keeper.send(command);
    }

    pub fn has_ended(&self) -> bool {
        self.phase == DevicePhase::Ended
    }

    /// Whether its rings have stopped, and will not start again.
    pub fn has_quiesced(&self) -> bool {
        self.phase >= DevicePhase::Quiesced
    }

    /// Equal for two devices if they share one image and one process; `None` before it is served.
    pub fn image_key(&self) -> Option<(IoLock, u32)> {
        self.handle.as_ref().map(DeviceHandle::image_key)
    }

    /// Its published state; the default before it is served.
    fn state(&self) -> DiskState {
        self.handle.as_ref().map_or_else(DiskState::default, DeviceHandle::state)
    }

    /// Whether it has ended, and everything in its cache was written to its image.
    pub fn has_ended_cleanly(&self) -> bool {
        self.has_ended() && self.error.is_none()
    }

    /// The error with which it ended.
    pub fn into_error(self) -> Option<Error> {
        self.error
    }

    /// Records that it is served.
    pub fn serve(&mut self, handle: DeviceHandle) {
        let may_reconnect = self.had_front_end || !self.was_served && handle.is_restored;
        self.may_reconnect_until = may_reconnect.then(|| Instant::now() + RECONNECT_MAX);
        self.handle = Some(handle);
        self.was_served = true;
        self.failure = None;
        self.set_phase(DevicePhase::Served);
    }

    /// Records a failed attempt to open it. Logs each error once, then again at growing intervals.
    pub fn fail(&mut self, error: &Error) {
        self.set_phase(DevicePhase::Failed);
        let text = error.to_string();
        let failure = match self.failure.take().filter(|failure| differ_only_in_digits(&failure.text, &text)) {
            Some(failure) => self.failure.insert(failure),
            None => {
                error!("{}: not served: {text}; retrying; {} retries immediately", self.name, self.resume_by);
                let failure = StartFailure { text, since: Instant::now(), reminder: Reminder::new() };
                return self.failure = Some(failure);
            }
        };
        let age = failure.since.elapsed();
        if failure.reminder.is_due(age) {
            error!("{}: not served for {} s: {}; retrying", self.name, age.as_secs(), failure.text);
        }
    }

    /// Records that its process died and will be restarted after a pause.
    pub fn record_death(&mut self, why: &str, pause: Duration) {
        let then = match pause {
            Duration::ZERO => "restarting it".to_owned(),
            pause => format!("restarting it in {} ms", pause.as_millis()),
        };
        error!("{}: {why}; {then}", self.name);
        self.handle = None;
        (self.step_reminder, self.op_reminder) = (Reminder::new(), Reminder::new());
        self.set_phase(DevicePhase::Open);
    }

    /// Records that its process died too often and is not restarted.
    pub fn stop_restarting(&mut self, error: &Error) {
        let text = error.to_string();
        error!("{}: not served: {text}; restart it with {}", self.name, self.resume_by);
        self.handle = None;
        self.failure = Some(StartFailure { text, since: Instant::now(), reminder: Reminder::new() });
        self.set_phase(DevicePhase::Failed);
    }

    /// Whether it is served, or cannot be served soon: the start of the daemon need not wait for it.
    pub fn is_start_decided(&self) -> bool {
        match self.phase {
            DevicePhase::Opening => self.keeper.step().since.elapsed() >= FIRST,
            DevicePhase::Open => false,
            _ => true,
        }
    }

    /// Its name and the reason why it is not served, for the service manager; `None` if it is served.
    pub fn why_not_served(&self) -> Option<String> {
        let why = match (&self.phase, &self.failure) {
            (DevicePhase::Served, _) => return None,
            (phase, _) if *phase >= DevicePhase::Ending => "detaching",
            (_, Some(failure)) => &failure.text,
            (DevicePhase::Opening, None) => "its image does not answer",
            _ => "starting",
        };
        Some(format!("{} ({why})", self.name))
    }

    /// Whether its cache may have another size than the configured one, for lack of memory.
    pub fn follows_memory(&self) -> bool {
        pressure::may_shrink(&self.current.get()) || self.current.is_bounded()
    }

    /// Its entry for the control socket.
    pub fn entry(&self) -> OverviewEntry {
        OverviewEntry {
            config: self.current.get(),
            current: self.current.clone(),
            page: Arc::clone(self.keeper.page()),
            progress: self.progress(),
            link: self.handle.as_ref().map(DeviceHandle::link),
            operator: Arc::clone(&self.operator),
            commands: self.keeper.commands(),
        }
    }

    /// Its progress, and the reason if it is not served.
    fn progress(&self) -> DeviceProgress {
        let state = match self.phase {
            DevicePhase::Opening | DevicePhase::Open => DeviceState::Opening,
            DevicePhase::Failed => DeviceState::Failed,
            DevicePhase::Served => DeviceState::Serving,
            DevicePhase::Ending | DevicePhase::Quiesced | DevicePhase::Finishing => DeviceState::Ending,
            DevicePhase::Ended => DeviceState::Ended,
        };
        let why = self.failure.as_ref().filter(|_| state == DeviceState::Failed);
        DeviceProgress {
            state,
            why: why.map(|failure| failure.text.clone()),
            pid: self.handle.as_ref().and_then(DeviceHandle::pid),
            was_served: self.was_served,
            may_reconnect_until: self.may_reconnect_until,
            is_attaching: self.is_attaching(),
            needs_final_flush: self.needs_final_flush(),
        }
    }

    /// Its current configuration.
    pub fn config(&self) -> Arc<DeviceConfig> {
        self.current.get()
    }

    /// Replaces its current configuration.
    pub fn configure(&self, config: DeviceConfig) {
        self.current.set(Arc::new(config));
    }

    /// Logs waits that take long.
    fn check_while_serving(&mut self) {
        let step = self.keeper.step();
        if self.phase == DevicePhase::Opening || step.what == FENCING {
            let image = self.image.display();
            let age = step.since.elapsed();
            if self.step_reminder.is_due(age) {
                // For a process that died: what it last reported.
                let waits_for = in_flight(&self.keeper.page().read());
                warn!(
                    "{}: image {image}: {} has taken {} s so far{waits_for}; no other disk waits for it",
                    self.name,
                    step.what,
                    age.as_secs()
                );
            }
            return;
        }
        self.check_front_end();
        self.check_process();
        let image = self.image.display();
        if self.handle.is_none() {
            return;
        }
        match self.state().oldest {
            Some(oldest) if self.op_reminder.is_due(oldest.age) => {
                let (what, seconds) = (oldest.describe(), oldest.age.as_secs());
                warn!("{}: image {image} does not answer: {what} has been in flight for {seconds} s", self.name);
            }
            Some(OldestOp { age, .. }) if age >= FIRST => {}
            _ if self.op_reminder.was_due() => {
                info!("{}: image {image} answers again", self.name);
                self.op_reminder = Reminder::new();
            }
            _ => {}
        }
    }

    /// Logs a process that does not run: it is stopped, or it gets no processor.
    fn check_process(&mut self) {
        let Some(handle) = &self.handle else { return };
        let silent_for = handle.silent_for();
        if self.silence_reminder.is_due(silent_for) {
            let why = if handle.pid().is_some_and(is_dying) {
                "it was killed, and one of its threads hangs in the kernel"
            } else {
                "it may be stopped"
            };
            warn!("{}: its process has not run for {} s; {why}", self.name, silent_for.as_secs());
        } else if silent_for < FIRST && self.silence_reminder.was_due() {
            info!("{}: its process runs again", self.name);
            self.silence_reminder = Reminder::new();
        }
    }

    /// Notes whether a front-end is connected. Logs which one keeps another one waiting: the device serves one at a
    /// time.
    fn check_front_end(&mut self) {
        if self.phase == DevicePhase::Served {
            let has_front_end = self.state().front_end.is_some();
            self.may_reconnect_until =
                self.may_reconnect_until.filter(|until| !has_front_end && *until > Instant::now());
            self.had_front_end = has_front_end || self.may_reconnect_until.is_some();
        }
        let Some(holder) = self.handle.as_ref().and_then(DeviceHandle::busy_with) else {
            self.waiting = None;
            return;
        };
        let (since, reminder) = self.waiting.get_or_insert_with(|| (Instant::now(), Reminder::new()));
        let age = since.elapsed();
        if reminder.is_due(age) {
            warn!("{}: a front-end has waited for {} s: the disk is busy with {holder}", self.name, age.as_secs());
        }
    }

    /// Begins its end: a detach, or the end of the daemon.
    pub fn begin_shutdown(&mut self, ending: Ending) {
        if self.phase < DevicePhase::Ending {
            self.phase = DevicePhase::Ending;
            self.end = Some((ending, Instant::now()));
            self.last_completion = (Instant::now(), self.state().cache.completed_ops);
            self.step_reminder = Reminder::new();
            self.send(KeeperCommand::Quiesce(ending));
        }
    }

    /// Finishes its end. Its rings, and those of all devices on its image, have stopped.
    pub fn finish(&mut self) {
        self.phase = DevicePhase::Finishing;
        self.send(KeeperCommand::Finish);
    }

    /// Records that it has ended.
    pub fn record_end(&mut self, result: Result<()>) {
        // Also closes the handle's copy of the listening socket.
        self.handle = None;
        if self.phase != DevicePhase::Ended {
            self.phase = DevicePhase::Ended;
            // For a device that was given up, `abandon_hung` has set the error, or has left it out on purpose.
            if self.abandoned_hung.is_none() {
                self.error = result.err();
            }
        }
    }

    /// The operator repeated the signal: stops waiting for it. If that would lose completed writes, waits less long,
    /// and stops at the next signal.
    pub fn stop_waiting(&mut self) {
        if self.has_ended() {
            return;
        }
        let state = self.state();
        if state.has_volatile_dirty_data && self.hurried.is_none() {
            self.hurried = Some(Instant::now());
            warn!(
                "{}: its cache does not outlive the daemon and holds {}; waiting for at most {} s more, and {} s for \
                 each operation of the image; another signal loses these writes",
                self.name,
                unwritten(&state),
                HURRIED_TIMEOUT.as_secs(),
                HURRIED_STALL_MAX.as_secs()
            );
        } else {
            self.abandon(false);
        }
    }

    /// Excludes the time for which the daemon itself was stopped from all deadlines.
    pub fn exclude_stopped_time(&mut self, stopped: Duration) {
        self.last_completion.0 += stopped;
        let abandoned = self.abandoned.as_mut().map(|(since, _)| since);
        abandoned.into_iter().chain(&mut self.hurried).for_each(|since| *since += stopped);
    }

    /// Ends it as a crash would. `waits`: still wait for requests that the next daemon cannot resubmit.
    fn abandon(&mut self, waits: bool) {
        if self.abandoned.is_some_and(|(_, waited)| waited == waits || !waited) {
            return;
        }
        self.abandoned = Some((Instant::now(), waits));
        if let Some(handle) = &self.handle {
            handle.abandon(waits);
        }
    }

    /// Logs waits that take long, and ends the wait for an image that does not answer.
    pub fn check_while_ending(&mut self, ending: Ending, since: Instant, hurried: bool) {
        let advice = if hurried { "" } else { "; repeat the signal to exit without waiting" };
        self.check_shutdown(ending, since, Some(advice));
    }

    /// As [`Disk::check_while_ending`]. `advice`: how to end the wait, for the log; `None`: the wait has no deadline.
    fn check_shutdown(&mut self, ending: Ending, since: Instant, advice: Option<&str>) {
        if let Some((at, is_killed)) = self.abandoned_hung {
            return self.kill_hung(at, is_killed);
        }
        let (age, step, state) = (since.elapsed(), self.keeper.step(), self.state());
        if self.step_reminder.is_due(age) {
            let waits_for = in_flight(&state);
            warn!(
                "{}: image {}: {} has taken {} s so far{waits_for}{}",
                self.name,
                self.image.display(),
                step.what,
                step.since.elapsed().min(age).as_secs(),
                advice.unwrap_or_default()
            );
        }
        if self.handle.is_none() {
            // It is not served, so no request is lost.
            if age >= HAND_OVER_TIMEOUT {
                self.abandon_hung(ending);
            }
            return;
        }
        if advice.is_none() {
            return;
        }
        if state.cache.completed_ops != self.last_completion.1 {
            self.last_completion = (Instant::now(), state.cache.completed_ops);
        }
        let stalled_for = self.last_completion.0.max(step.since).elapsed();
        let is_kept = ending == Ending::HandOver && !state.has_volatile_dirty_data;
        if state.has_volatile_dirty_data && stalled_for < STALL_MAX && self.volatile_reminder.is_due(age) {
            warn!(
                "{}: its cache is volatile and holds {}; waiting as long as the image completes operations{}",
                self.name,
                unwritten(&state),
                if self.hurried.is_some() { "" } else { "; repeat the signal to wait less long" }
            );
        }
        let is_late = match self.hurried {
            Some(at) => stalled_for >= HURRIED_STALL_MAX || at.elapsed() >= HURRIED_TIMEOUT,
            None => stalled_for >= STALL_MAX,
        };
        if is_late || is_kept && (stalled_for >= UNTRACKED_STALL_MAX || age >= UNTRACKED_TIMEOUT) {
            self.abandon(false);
        } else if is_kept && age >= HAND_OVER_TIMEOUT {
            self.abandon(true);
        }
        if let Some((at, waits)) = self.abandoned
            && at.elapsed() >= ABANDON_TIMEOUT
            && (!waits || self.has_quiesced())
        {
            self.abandon_hung(ending);
        }
    }

    /// Gives up a device whose threads hang in the kernel: closes its connection and socket, which others wait for. Its
    /// process is killed afterwards.
    fn abandon_hung(&mut self, ending: Ending) {
        let (name, image, step) = (&self.name, self.image.display(), self.keeper.step().what);
        let context = match step {
            keeper::PREPARING => format!("{name}: ended without waiting any longer, while {step} of image {image}"),
            _ => format!("{name}: ended without waiting any longer for image {image}, while {step}"),
        };
        let has_volatile_dirty_data = self.state().has_volatile_dirty_data;
        let loses = match &self.handle {
            None => ending == Ending::WriteBack && recover::has_unwritten_cache(&self.current.get()),
            Some(handle) => {
                handle.force_close();
                ending == Ending::WriteBack || has_volatile_dirty_data
            }
        };
        if loses {
            let hint = match self.detaching {
                None => "a cache that outlives the daemon keeps what was not written: start the daemon again",
                Some(_) => {
                    "a cache that outlives the daemon keeps what was not written: attach the disk again, or run \
                     \"genblk recover\""
                }
            };
            self.error = Some(Error::new(ErrorKind::Image, format!("{context}; {hint}")));
        } else {
            warn!("{context}");
        }
        self.abandoned_hung = Some((Instant::now(), false));
    }

    /// Kills the process of a device that was given up, and waits briefly for its exit.
    fn kill_hung(&mut self, at: Instant, is_killed: bool) {
        if !is_killed && at.elapsed() >= CLOSE_TIMEOUT {
            let is_killed = self.handle.as_ref().is_some_and(DeviceHandle::kill);
            if is_killed {
                self.abandoned_hung = Some((Instant::now(), true));
            } else {
                self.phase = DevicePhase::Ended;
            }
        } else if is_killed && at.elapsed() >= KILL_TIMEOUT {
            // One of its threads hangs in the kernel. The image stays locked until that thread returns.
            self.phase = DevicePhase::Ended;
        }
    }
}

/// What a cache has not written to its image, for messages.
fn unwritten(state: &DiskState) -> String {
    match state.cache.dirty_pages {
        0 => "data in flight".to_owned(),
        pages => counted(pages, "dirty page"),
    }
}

/// The oldest operation in flight and its age, to append to a message.
fn in_flight(state: &DiskState) -> String {
    state.oldest.map_or_else(String::new, |oldest| {
        format!("; {} has been in flight for {} s", oldest.describe(), oldest.age.as_secs())
    })
}

/// Whether two messages differ only in numbers, such as an age.
fn differ_only_in_digits(one: &str, other: &str) -> bool {
    let without_digits = |text: &str| text.chars().filter(|char| !char.is_ascii_digit()).collect::<String>();
    without_digits(one) == without_digits(other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_that_differ_only_in_a_duration_are_equal() {
        assert!(differ_only_in_digits("in use for 5 s; try again", "in use for 12 s; try again"));
        assert!(!differ_only_in_digits("no such file", "permission denied"));
    }
}
