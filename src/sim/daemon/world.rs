//! One simulated world: a guest, a front-end, daemons one after the other, and a disk, all driven by one seed on one
//! thread.

mod control;
mod drain;
mod growth;
mod limits;
mod requests;
mod server_deaths;
mod turns;
mod warming;

use std::ops::Range;
use std::sync::Arc;

use vm_memory::GuestMemoryMmap;

use super::super::Counts;
use super::guest::{GuestAction, Ring, guest_memory};
use super::life::{Configuration, Directory, Life, in_daemon};
use super::oracle::{Oracle, RequestId};
use super::scenario::{Scenario, budget, settings};
use super::store::SimulatedImage;
use crate::cache::Settings;
use crate::config::Survive;
use crate::device::budget::Budget;
use crate::fault_injection::crash_after;
use crate::prng::Prng;
use crate::units::Tick;

use control::{FrontEndConnection, LAST_FLUSHES_MAX};
use growth::Growth;
use limits::LimitedRate;
use server_deaths::ServerDeaths;
use warming::Warming;

/// Consecutive turns of a worker at one time, each with work but without progress, after which it counts as spinning.
/// Fewer are legitimate: a background sweep that makes room for delayed writes passes all dirty groups twice, in 64
/// turns each.
const IDLE_TURNS_MAX: u32 = 200;

/// See the documentation of the module.
#[derive(Debug)]
pub(super) struct World {
    pub prng: Prng,
    pub scenario: Scenario,
    pub settings: Settings,
    pub budget: Budget,
    pub directory: Directory,
    pub image: SimulatedImage,
    pub memory: Arc<GuestMemoryMmap<()>>,
    pub rings: Vec<Ring>,
    pub oracle: Oracle,
    /// The daemon, while it lives.
    pub life: Option<Life>,
    session: FrontEndConnection,
    pub now_us: u64,
    /// The present period in write-through mode.
    pub write_through: Option<u64>,
    pub periods: u64,
    /// Actions of the front-end and the operator that started or advanced.
    control_steps: u64,
    /// The daemon is stopped for this many steps.
    frozen_steps: u64,
    /// The daemon serves the image read-only.
    pub is_reader: bool,
    /// The last daemon lost completed writes with its cache.
    lost_data: bool,
    /// By worker: the state of progress after its last turn, and the number of turns since without progress.
    last_progress: Vec<([u64; 6], u32)>,
    /// Writes that were lost together with their daemon.
    lost: Vec<RequestId>,
    pub next_id: RequestId,
    /// Number of completed requests.
    pub completed: u64,
    /// Number of daemons that have died.
    pub deaths: u64,
    /// Backups of the image are restored between daemons; it has a random generator of its own.
    restores: Option<Prng>,
    /// The image grows. Not in worlds in which backups are restored, because only a sample distinguishes an image of
    /// another size from a restored one.
    growth: Option<Growth>,
    /// The operator warms the cache, and lists what is in it.
    warming: Option<Warming>,
    /// The image is on a server that dies with the daemon.
    server_deaths: Option<ServerDeaths>,
    /// The contents of the image at some time.
    pub backup: Option<Vec<u64>>,
    /// The backup was restored, and no daemon has started since.
    is_restored: bool,
    /// The guest's rate is limited.
    limited: Option<LimitedRate>,
    /// Number of completed requests that limits count.
    pub limited_completed: u64,
}

impl World {
    /// The counts of all events so far.
    pub fn counts(&self) -> Counts {
        Counts {
            requests: self.completed,
            operations: self.image.submitted(),
            deaths: self.deaths,
            ..Counts::default()
        }
    }

    pub fn new(seed: u64) -> Self {
        let mut prng = Prng::new(seed);
        let (settings, limits) = settings(&mut prng);
        let settings = Settings { page_key: Prng::new(seed ^ 1 << 63).next_u64(), ..settings };
        let scenario = Scenario::new(&mut prng, settings.image_sectors, settings.holes);
        let memory = guest_memory(scenario.rings);
        let ring = |index| Ring::new(&memory, index, scenario.queue_size, scenario.event_idx);
        let rings = (0..scenario.rings).map(ring).collect();
        let disk_prng = Prng::new(prng.next_u64());
        let image_sectors = settings.image_sectors;
        Self {
            budget: budget(&mut Prng::new(!seed)),
            directory: Directory::new(limits.size_bytes.get()),
            image: SimulatedImage::new(limits, scenario.behaviour, disk_prng, scenario.hole_percent),
            oracle: Oracle::new((0..settings.image_sectors).map(|_| 0)),
            write_through: (!scenario.writeback).then_some(0),
            control_steps: 0,
            frozen_steps: 0,
            is_reader: false,
            lost_data: false,
            last_progress: vec![Default::default(); scenario.workers],
            prng,
            scenario,
            settings,
            memory,
            rings,
            life: None,
            session: FrontEndConnection::default(),
            now_us: 0,
            periods: 0,
            lost: Vec::new(),
            next_id: 1,
            completed: 0,
            deaths: 0,
            restores: Some(Prng::new(seed ^ 0xbac4)).filter(|_| (seed / 4).is_multiple_of(2)),
            growth: Some(Growth::new(seed, image_sectors)).filter(|_| seed / 4 % 4 == 1),
            warming: Warming::new(seed),
            server_deaths: ServerDeaths::new(seed),
            backup: None,
            is_restored: false,
            limited: LimitedRate::new(seed),
            limited_completed: 0,
        }
    }

    /// Runs `steps` random steps; after them nothing fails any more, and everything must complete.
    pub fn run(&mut self, steps: u64) {
        for _ in 0..steps {
            self.step();
        }
        self.scenario.crash_points_max = None;
        crash_after(None);
        self.image.heal();
        if std::mem::take(&mut self.scenario.reader_percent) > 0 && self.is_reader && self.life.is_some() {
            self.daemon_died();
        }
        self.complete_all_requests();
        self.resume();
        self.complete_all_requests();
        self.read_everything();
        // The daemon may still report earlier failures, which may also have stopped the device.
        let flushed = (0..LAST_FLUSHES_MAX).any(|_| {
            let flushed = self.flush();
            if !flushed {
                self.resume();
                self.complete_all_requests();
            }
            flushed
        });
        assert!(flushed, "a FLUSH fails on a healthy image");
        self.check_power_cut();
        for (sector, value) in self.image.values().into_iter().enumerate() {
            self.oracle.check_quiet(sector, value);
        }
        // A successor finds the same state.
        self.daemon_died();
        self.complete_all_requests();
        self.read_everything();
    }

    fn step(&mut self) {
        self.image.advance(self.now_us);
        self.control_steps += u64::from(self.poll_control());
        if self.prng.below(1000) < self.scenario.control_permille {
            self.start_control_action();
            self.control_steps += 1;
        }
        self.grow_or_apply();
        self.change_limits();
        self.warm_or_list();
        self.kill_server_and_daemon();
        self.frozen_steps = self.frozen_steps.saturating_sub(1);
        match self.prng.below(100) {
            0..40 if self.frozen_steps > 0 => {}
            0..40 => {
                let worker = self.prng.below(self.scenario.workers as u64) as usize;
                self.step_worker(worker);
            }
            40..65 => self.submit_random_request(),
            65..85 => {
                let ring = self.prng.below(self.scenario.rings as u64) as usize;
                self.handle_interrupt(ring);
            }
            85..95 if self.scenario.freezes && self.prng.percent(2) => {
                // SIGSTOP: the disk and the guest continue.
                self.frozen_steps = self.prng.below(100);
                self.now_us += self.prng.pick(&[0, 1000, 1_000_000, 100_000_000]);
            }
            85..95 => self.now_us += self.prng.below(100),
            _ => {
                if let Some(at) = self.next_event() {
                    self.now_us = self.now_us.max(at);
                }
            }
        }
    }

    /// When the next event is due without any further action.
    fn next_event(&self) -> Option<u64> {
        let due = self.life.as_ref().and_then(Life::next_due).map(|due| due.since_us(Tick::ZERO));
        [self.image.next_event(), due].into_iter().flatten().min()
    }

    pub fn step_worker(&mut self, worker: usize) -> bool {
        if self.life.is_none() {
            self.start_daemon();
            return true;
        }
        let now = Tick::from_us(self.now_us);
        let stepped = self.life.as_mut().map(|life| life.step(worker, now));
        match stepped.expect("the daemon lives") {
            Ok(stepped) => {
                self.check_progress(worker, stepped);
                stepped
            }
            Err(_) => {
                self.daemon_died();
                true
            }
        }
    }

    /// A worker that `stepped` must soon make progress or find no more work at this time.
    fn check_progress(&mut self, worker: usize, stepped: bool) {
        let used = self.rings.iter().map(|ring| u64::from(ring.used_idx())).sum();
        let state = [self.now_us, self.image.activity(), self.next_id, self.deaths, self.control_steps, used];
        let (last, idle_turns) = &mut self.last_progress[worker];
        *idle_turns = if stepped && *last == state { *idle_turns + 1 } else { 0 };
        *last = state;
        let spins = *idle_turns >= IDLE_TURNS_MAX;
        assert!(!spins, "liveness: worker {worker} spins: {:?}", self.life.as_ref().map(Life::describe));
    }

    /// Starts the next daemon; it may die before it serves anything.
    fn start_daemon(&mut self) {
        if self.scenario.resizes && self.prng.percent(30) {
            self.settings.frames = self.prng.pick(&[32, 48, 96, 128]);
            self.settings.dirty_pages_max = self.settings.dirty_pages_max.min(self.settings.frames);
        }
        self.find_growth();
        crash_after(self.scenario.crash_points_max.map(|max| self.prng.below(max)));
        if self.scenario.reader_percent > 0 {
            // A reader fails writes; a writer does not.
            self.judge_completed();
        }
        self.is_reader = self.prng.percent(self.scenario.reader_percent);
        self.image.forbid_changes(self.is_reader);
        let configuration = Configuration {
            directory: &self.directory,
            settings: &self.settings,
            workers: self.scenario.workers,
            writeback: self.scenario.writeback,
            survive: if self.scenario.survives { Survive::Always } else { Survive::Never },
            read_only: self.is_reader,
            budget: self.budget,
            is_restored: self.is_restored,
            has_grown: self.has_grown(),
            has_forgotten: self.server_deaths.as_ref().is_some_and(|deaths| deaths.has_forgotten),
        };
        match Life::start(&configuration, &self.image) {
            Ok(None) => {
                crash_after(None);
                if std::mem::take(&mut self.is_restored) {
                    // The operator discards the cache, which no longer belongs to the image.
                    self.directory.remove_arena();
                } else if self.has_grown() && !self.is_reader {
                    self.undo_growth();
                }
                // The operator retries.
            }
            Ok(Some(life)) => {
                self.is_restored = false;
                self.server_deaths.iter_mut().for_each(|deaths| deaths.has_forgotten = false);
                self.record_served();
                if self.restores.as_mut().is_some_and(|prng| prng.percent(50)) {
                    self.backup = Some(self.image.values());
                }
                self.check_loss_marker(&life);
                // A guest whose data may be lost resets the device.
                let reset = || life.cached.arena().clear_data_loss();
                let alive = self.scenario.survives || in_daemon(reset).is_ok();
                self.life = Some(life);
                self.set_limits();
                if !alive {
                    return self.daemon_died();
                }
                let lost = std::mem::take(&mut self.lost);
                self.oracle.lose_writes(&lost);
                self.connect();
            }
            Err(_) => {
                crash_after(None);
                self.image.end_operations(false);
                self.deaths += 1;
            }
        }
    }

    /// The daemon has died between two stores to memory that outlives it.
    pub fn daemon_died(&mut self) {
        self.deaths += 1;
        if let Some(life) = self.life.take() {
            life.dispose(&self.image);
        }
        self.server_may_die();
        let keeps_requests = self.session.has_inflight_region();
        self.session.disconnect();
        if !self.scenario.survives {
            self.lose_cache();
        } else if keeps_requests {
            self.expect_repetition();
        } else {
            self.reset_guest();
        }
        self.restore_backup();
    }

    /// The next daemon executes the requests in flight again. The results of those that completed in this life are
    /// checked first.
    pub fn expect_repetition(&mut self) {
        self.judge_completed();
        let repeated: Vec<RequestId> =
            self.rings.iter().flat_map(Ring::not_completed).map(|request| request.id).collect();
        self.oracle.repeat_writes(&repeated);
    }

    /// These rings may have drained: then a long request that the device had started was ended early, and is executed
    /// again from its beginning.
    pub fn expect_long_requests_again(&mut self, rings: Range<usize>) {
        let budget = self.budget;
        let not_completed = self.rings[rings].iter().flat_map(Ring::not_completed);
        let long = not_completed.filter(|request| budget.is_long(request.span.pages().count));
        let repeated: Vec<RequestId> = long.map(|request| request.id).collect();
        self.oracle.may_repeat_writes(&repeated);
    }

    /// The driver reads every ring, as it may do at any time.
    fn judge_completed(&mut self) {
        for ring in 0..self.rings.len() {
            let completed = self.rings[ring].reap();
            self.rings[ring].awaits_interrupt |= !completed.is_empty();
            completed.into_iter().for_each(|completed| self.complete(completed));
        }
    }

    /// The cache is lost with its daemon, and all data that the disk has not made durable. (The disk may keep some of
    /// it, as after a power cut.)
    fn lose_cache(&mut self) {
        let left = self.check_power_cut();
        let lost = |(sector, value): (usize, &u64)| !self.oracle.may_hold(sector, *value);
        self.lost_data = left.iter().enumerate().any(lost);
        self.forget_all_but(&left);
    }

    /// A loss marker must report completed writes that the last daemon has lost.
    fn check_loss_marker(&mut self, life: &Life) {
        let has_data_loss = life.cached.arena().has_data_loss();
        assert!(has_data_loss || !self.lost_data, "a daemon lost completed writes, and no marker reports it");
        self.lost_data = false;
    }

    /// The guest resets the device. Its requests in flight are lost.
    fn reset_guest(&mut self) {
        for request in self.rings.iter_mut().flat_map(Ring::reset).collect::<Vec<_>>() {
            match request.action {
                GuestAction::Read => self.oracle.end_read(request.id, request.span, None),
                GuestAction::Flush(_) => {}
                GuestAction::Write(_) | GuestAction::Zero { .. } | GuestAction::Discard => self.lost.push(request.id),
            }
        }
    }

    /// Between two daemons a backup is copied over the image, and the guest starts with it.
    fn restore_backup(&mut self) {
        let is_due = self.scenario.survives && self.restores.as_mut().is_some_and(|prng| prng.percent(10));
        if let Some(backup) = self.backup.clone().filter(|_| is_due) {
            self.session.forget_inflight_region();
            self.forget_all_but(&backup);
            self.is_restored = true;
        }
    }

    /// Cuts the power: only the disk remains.
    pub fn cut_power(&mut self) {
        let left = self.check_power_cut();
        if let Some(life) = self.life.take() {
            life.dispose(&self.image);
        }
        self.session.disconnect();
        self.session.forget_inflight_region();
        self.directory.remove_arena();
        self.lost_data = false;
        self.forget_all_but(&left);
    }

    /// The disk has the contents `left`, and the guest restarts.
    fn forget_all_but(&mut self, left: &[u64]) {
        self.image.cut_power(left);
        self.rings.iter_mut().for_each(|ring| drop(ring.reset()));
        self.lost.clear();
        self.oracle = Oracle::new(left.iter().copied());
        self.periods += 1;
        self.write_through = (!self.scenario.writeback).then_some(self.periods);
    }

    /// Checks a state that may remain after a power cut now, and returns it.
    fn check_power_cut(&self) -> Vec<u64> {
        let left = self.image.after_power_cut();
        left.iter().enumerate().for_each(|(sector, &value)| self.oracle.check_survivor(sector, value));
        left
    }
}
