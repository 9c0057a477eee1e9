//! One device, as the main thread sees it: how far it is, what it waits for, and when to wait no longer.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use log::{error, info, warn};

use crate::config::DeviceConfig;
use crate::device::Untracked;
use crate::error::{Error, ErrorKind, Result};
use crate::service::{Context, Handle};

use super::Event;
use super::reminder::{FIRST, Reminder};
use super::supervisor::{Command, Ending, Supervisor};

/// How long a device whose cache is kept may take to leave it to the next daemon. Then it is left as a crash would
/// leave it, which loses nothing.
const HAND_OVER_PATIENCE: Duration = Duration::from_secs(2);
/// The same, while a request is in flight that the next daemon cannot repeat: its guest would wait for it without end.
const UNTRACKED_PATIENCE: Duration = Duration::from_secs(30);
/// The same, if the image completes nothing meanwhile: that guest waits in any case, and the other guests must not.
const UNTRACKED_STALL_MAX: Duration = Duration::from_secs(5);
/// How long a device that ends waits for an image that completes nothing: as long as Linux gives a SCSI disk for a
/// command.
const STALL_MAX: Duration = Duration::from_secs(30);
/// How long to wait for the threads of a device after it was abandoned.
const DETACH_PATIENCE: Duration = Duration::from_secs(2);

/// How far a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Phase {
    /// It is being opened, for the first time.
    Opening,
    /// It could not be opened, and is tried again.
    Failed,
    /// It is open, and not served yet.
    Open,
    /// It is served.
    Served,
    /// It completes its requests.
    Ending,
    /// Its rings have stopped.
    Quiesced,
    /// It ends.
    Finishing,
    /// It has ended.
    Ended,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Disk {
    name: String,
    image: PathBuf,
    supervisor: Supervisor,
    phase: Phase,
    /// Once it is served.
    handle: Option<Handle>,
    /// Why it is not served.
    failure: Option<Failure>,
    /// Lines about the step that the supervisor is in.
    step_reminder: Reminder,
    /// Lines about the oldest operation in flight.
    op_reminder: Reminder,
    /// Since when another front-end waits, and the lines about it.
    waiting: Option<(Instant, Reminder)>,
    /// When the image was last seen to complete something, by [`Handle::progress`].
    progress: (Instant, Option<[u64; 4]>),
    /// When it was abandoned.
    abandoned: Option<(Instant, Untracked)>,
    /// The error with which it ended.
    error: Option<Error>,
}

/// An error at the start, of possibly many attempts.
#[derive(Debug)]
struct Failure {
    text: String,
    since: Instant,
    reminder: Reminder,
}

impl Disk {
    /// Starts the supervisor of device number `index`.
    ///
    /// # Errors
    /// [`ErrorKind::System`] if its thread cannot be started.
    pub fn start(index: usize, config: &DeviceConfig, context: &Arc<Context>, events: &Sender<Event>) -> Result<Self> {
        Ok(Self {
            name: config.name.clone(),
            image: config.image.clone(),
            supervisor: Supervisor::start(index, config, context, events)?,
            phase: Phase::Opening,
            handle: None,
            failure: None,
            step_reminder: Reminder::new(),
            op_reminder: Reminder::new(),
            waiting: None,
            progress: (Instant::now(), None),
            abandoned: None,
            error: None,
        })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn phase(&self) -> Phase {
        self.phase
    }

    pub fn set_phase(&mut self, phase: Phase) {
        // News that was on its way when the end began, or when the device was given up, changes nothing about that.
        if self.phase < Phase::Ending || phase > self.phase {
            self.phase = phase;
        }
    }

    pub fn send(&self, command: Command) {
        self.supervisor.send(command);
    }

    pub fn has_ended(&self) -> bool {
        self.phase == Phase::Ended
    }

    /// Whether its rings have stopped for good.
    pub fn has_quiesced(&self) -> bool {
        self.phase >= Phase::Quiesced
    }

    /// What devices on one image have in common; `None` before it is served.
    pub fn image_key(&self) -> Option<usize> {
        self.handle.as_ref().map(Handle::image_key)
    }

    /// The error with which it ended.
    pub fn into_error(self) -> Option<Error> {
        self.error
    }

    /// It is served.
    pub fn serve(&mut self, handle: Handle) {
        self.handle = Some(handle);
        self.failure = None;
        self.set_phase(Phase::Served);
    }

    /// An attempt to open it has failed. The log has each error once, and then ever more rarely.
    pub fn fail(&mut self, error: &Error) {
        self.set_phase(Phase::Failed);
        let text = error.to_string();
        let failure = match self.failure.take().filter(|failure| is_same(&failure.text, &text)) {
            Some(failure) => self.failure.insert(failure),
            None => {
                error!("{}: not served: {text}; trying again, SIGHUP tries at once", self.name);
                let failure = Failure { text, since: Instant::now(), reminder: Reminder::new() };
                return self.failure = Some(failure);
            }
        };
        let age = failure.since.elapsed();
        if failure.reminder.is_due(age) {
            error!("{}: not served for {} s: {}; trying again", self.name, age.as_secs(), failure.text);
        }
    }

    /// Whether it is served or will not be soon, so that the start of the daemon does not wait for it.
    pub fn is_settled(&self) -> bool {
        match self.phase {
            Phase::Opening => self.supervisor.step().since.elapsed() >= FIRST,
            Phase::Open => false,
            _ => true,
        }
    }

    /// Its name and why it is not served, for the service manager; `None` if it is served.
    pub fn why_not_served(&self) -> Option<String> {
        let why = match (&self.phase, &self.failure) {
            (Phase::Served, _) => return None,
            (_, Some(failure)) => &failure.text,
            (Phase::Opening, None) => "its image does not answer",
            _ => "it starts",
        };
        Some(format!("{} ({why})", self.name))
    }

    /// Logs what takes long, and a cache file that was removed.
    pub fn look_while_serving(&mut self) {
        if let Some(handle) = &self.handle {
            handle.look_at_cache_file();
        }
        if self.phase == Phase::Opening {
            let image = self.image.display();
            let step = self.supervisor.step();
            let age = step.since.elapsed();
            if self.step_reminder.is_due(age) {
                warn!(
                    "{}: image {image}: {} has taken {} s so far; no other disk waits for it",
                    self.name,
                    step.what,
                    age.as_secs()
                );
            }
            return;
        }
        self.look_for_waiting_front_end();
        let image = self.image.display();
        match self.handle.as_ref().and_then(Handle::oldest_op) {
            Some(Some((what, age))) if self.op_reminder.is_due(age) => {
                let seconds = age.as_secs();
                warn!("{}: image {image} does not answer: {what} has been in flight for {seconds} s", self.name);
            }
            Some(Some((_, age))) if age >= FIRST => {}
            Some(_) if self.op_reminder.was_due() => {
                info!("{}: image {image} answers again", self.name);
                self.op_reminder = Reminder::new();
            }
            _ => {}
        }
    }

    /// Logs who keeps a front-end waiting that has connected: the device serves one at a time.
    fn look_for_waiting_front_end(&mut self) {
        let Some(holder) = self.handle.as_ref().and_then(Handle::busy_with) else {
            self.waiting = None;
            return;
        };
        let (since, reminder) = self.waiting.get_or_insert_with(|| (Instant::now(), Reminder::new()));
        let age = since.elapsed();
        if reminder.is_due(age) {
            warn!("{}: a front-end has waited for {} s: the disk is busy with {holder}", self.name, age.as_secs());
        }
    }

    /// The end of the process begins.
    pub fn begin_end(&mut self, ending: Ending) {
        if self.phase < Phase::Ending {
            self.phase = Phase::Ending;
            self.progress = (Instant::now(), None);
            self.step_reminder = Reminder::new();
            self.send(Command::End(ending));
        }
    }

    /// Its rings have stopped, and those of all devices on its image.
    pub fn finish(&mut self) {
        self.phase = Phase::Finishing;
        self.send(Command::Finish);
    }

    /// It has ended.
    pub fn end(&mut self, result: Result<()>) {
        // A device that was given up has its error already.
        if self.phase != Phase::Ended {
            self.phase = Phase::Ended;
            self.error = result.err();
        }
    }

    /// The operator does not want to wait.
    pub fn hurry(&mut self) {
        if self.has_ended() {
            return;
        }
        if self.handle.as_ref().is_some_and(Handle::has_unkept_data) {
            warn!("{}: its cache does not outlive the daemon; waiting for the image even so", self.name);
        } else {
            self.abandon(Untracked::Lose);
        }
    }

    /// The process was stopped for this long.
    pub fn excuse(&mut self, stopped: Duration) {
        self.progress.0 += stopped;
        if let Some((since, _)) = &mut self.abandoned {
            *since += stopped;
        }
    }

    /// Ends it as a crash would.
    fn abandon(&mut self, untracked: Untracked) {
        if self.abandoned.is_some_and(|(_, before)| before == untracked || before == Untracked::Lose) {
            return;
        }
        self.abandoned = Some((Instant::now(), untracked));
        if let Some(handle) = &self.handle {
            handle.abandon(untracked);
        }
    }

    /// Logs what takes long, and ends the wait for an image that does not answer.
    pub fn look_while_ending(&mut self, ending: Ending, since: Instant, hurried: bool) {
        let (age, step) = (since.elapsed(), self.supervisor.step());
        let oldest = self.handle.as_ref().and_then(Handle::oldest_op).flatten();
        if self.step_reminder.is_due(age) {
            let waits_for = oldest
                .map_or_else(String::new, |(what, age)| format!("; {what} has been in flight for {} s", age.as_secs()));
            let advice = if hurried { "" } else { "; send the signal again to end without it" };
            warn!(
                "{}: image {}: {} has taken {} s so far{waits_for}{advice}",
                self.name,
                self.image.display(),
                step.what,
                step.since.elapsed().min(age).as_secs()
            );
        }
        let Some(handle) = &self.handle else {
            // Nothing was served, so nothing can be lost.
            if age >= HAND_OVER_PATIENCE {
                self.detach(ending);
            }
            return;
        };
        if let Some(progress) = handle.progress()
            && self.progress.1.replace(progress) != Some(progress)
        {
            self.progress.0 = Instant::now();
        }
        let stalled_for = self.progress.0.max(step.since).elapsed();
        let is_kept = ending == Ending::HandOver && !handle.has_unkept_data();
        if stalled_for >= STALL_MAX || is_kept && (stalled_for >= UNTRACKED_STALL_MAX || age >= UNTRACKED_PATIENCE) {
            self.abandon(Untracked::Lose);
        } else if is_kept && age >= HAND_OVER_PATIENCE {
            self.abandon(Untracked::Wait);
        }
        if let Some((at, untracked)) = self.abandoned
            && at.elapsed() >= DETACH_PATIENCE
            && (untracked == Untracked::Lose || self.has_quiesced())
        {
            self.detach(ending);
        }
    }

    /// Gives up a device whose threads hang in the kernel: closes what others wait for.
    fn detach(&mut self, ending: Ending) {
        let (name, image, step) = (&self.name, self.image.display(), self.supervisor.step().what);
        let context = format!("{name}: ended while {step}: image {image} does not answer");
        let loses = match &self.handle {
            None => false,
            Some(handle) => {
                handle.force_close();
                ending == Ending::WriteBack || handle.has_unkept_data()
            }
        };
        if loses {
            let hint = "a cache that outlives the daemon keeps what was not written: start the daemon again";
            self.error = Some(Error::new(ErrorKind::Image, format!("{context}; {hint}")));
        } else {
            warn!("{context}");
        }
        self.phase = Phase::Ended;
    }
}

/// Whether two messages differ in numbers only, such as an age.
fn is_same(one: &str, other: &str) -> bool {
    let without_digits = |text: &str| text.chars().filter(|char| !char.is_ascii_digit()).collect::<String>();
    without_digits(one) == without_digits(other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_the_same_if_only_its_age_has_changed() {
        assert!(is_same("in use for 5 s; try again", "in use for 12 s; try again"));
        assert!(!is_same("no such file", "permission denied"));
    }
}
