//! The daemons of a simulated world, one after the other: the state that the next one finds, and the requests in
//! flight.

use crate::cache::{Attempt, PageCache};
use crate::units::{OpKind, SectorSpan, Tick, Unmap};

use super::super::memory::SimulatedMemory;
use super::super::oracle::Oracle;
use super::super::scenario::{FRAMES, change_settings};
use super::{GuestOp, Reset, World};

/// Of 100 crashes in a world with power cuts, the number that are power cuts.
const POWER_CUT_PERCENT: u64 = 20;
/// A long stop: longer than any hold, and than any pause before a retry.
const STOP_US: u64 = 60_000_000;
/// Of 100 successors in a world in which they differ, the number that have a cache of another size, or are read-only.
const DIFFERENT_SUCCESSOR_PERCENT: u64 = 30;

impl World {
    /// Replaces a daemon that crashed. Its operations in flight still reach the disk, but their results are lost; the
    /// next daemon restores its memory, and the front-end submits the requests in flight again.
    pub(super) fn start_next_daemon(&mut self) {
        self.counts.deaths += 1;
        self.memory.restore_crash_image();
        self.trace(SectorSpan::new(0, 0), || {
            let records = self.memory.records();
            let page = self.traced_sector.map(|sector| (self.base + sector) / 8);
            let of_page: Vec<_> = records.iter().filter(|(_, record)| Some(record.page.0) == page).collect();
            format!("crash: {of_page:?}, zeroes {:?}", self.memory.pending_zeroes())
        });
        for op in std::mem::take(&mut self.operations).into_values() {
            let failed = op.failed.unwrap_or_else(|| {
                let failed = self.draw_failure(&op);
                self.apply_to_disk(&op, failed);
                failed
            });
            self.failed_unreported |= failed && op.kind == OpKind::Sync;
        }
        self.reset = self.reset.map(|_| Reset::Reported(self.step));
        self.copies.clear();
        self.resumable.clear();
        self.pending_completions.clear();
        if let Some(memory) = self.memory_of_writer.take() {
            // The crashed daemon was read-only: its memory is not restored.
            self.memory = memory;
        }
        self.check_records();
        self.grow_between_lives();
        if self.scenario.power_cuts && self.reset.is_none() && self.prng.percent(POWER_CUT_PERCENT) {
            return self.cut_power();
        }
        if self.scenario.settings_change {
            change_settings(&mut self.settings, &mut self.prng);
        }
        if self.scenario.resizes && self.prng.percent(DIFFERENT_SUCCESSOR_PERCENT) {
            self.write_back_and_resize();
        }
        if self.scenario.readers && self.prng.percent(DIFFERENT_SUCCESSOR_PERCENT) && self.is_clean() {
            return self.start_reader();
        }
        self.start_writer();
        if !self.scenario.resubmits {
            self.lose_requests();
        }
        for ticket in self.requests.keys().copied().collect::<Vec<_>>() {
            self.requests.get_mut(&ticket).expect("a request in flight").restart();
            self.admit(ticket, Attempt::New);
        }
    }

    /// The daemon is stopped for some time; the disk is not.
    pub(super) fn stop_daemon(&mut self) {
        let before = Tick::from_us(self.now_us);
        let stopped_us = self.prng.pick(&[1000, STOP_US]);
        self.now_us += stopped_us;
        if stopped_us == STOP_US {
            self.failures.record_sigstop(before, &self.settings, Tick::from_us(self.now_us));
        }
    }

    /// Starts a daemon that restores the memory.
    pub(super) fn start_writer(&mut self) {
        self.shrinks.daemons += 1;
        self.cache = PageCache::new(self.settings.clone(), Box::new(self.memory.clone()));
        self.cache.restore(self.memory.records(), self.memory.pending_zeroes(), self.memory.changed_ranges());
    }

    /// Checks that no record marks a sector beyond the end of the image as dirty.
    fn check_records(&self) {
        let end = self.settings.image_sectors;
        for (_, record) in self.memory.records() {
            let dirty_end = record.page.0 * 8 + u64::from(8 - record.dirty.0.leading_zeros().min(8) as u8);
            let is_within = record.dirty.is_empty() || dirty_end <= end;
            assert!(is_within, "{record:?} is dirty beyond the image's {end} sectors");
        }
    }

    /// Whether the disk has all data of the memory.
    fn is_clean(&self) -> bool {
        self.memory.pending_zeroes().is_empty()
            && self.memory.records().iter().all(|(_, record)| record.dirty.is_empty())
    }

    /// Writes the memory to the disk like recovery: the recorded zeros, then the dirty pages, then a Sync. Any of them
    /// may fail, or its daemon may die: then the next one finds the same memory. After a success the next one has an
    /// empty cache of another size.
    fn write_back_and_resize(&mut self) {
        let frames = self.prng.pick(&FRAMES);
        if frames == self.settings.frames || self.prng.percent(self.scenario.fault_percent) {
            return;
        }
        for (_, span) in self.memory.pending_zeroes() {
            if self.prng.percent(5) {
                return;
            }
            self.disk.zero((span.start - self.base) as usize, span.count as usize, Unmap::Forbidden);
        }
        for (frame, record) in self.memory.records() {
            for sector in (0..8).filter(|sector| record.dirty.0 >> sector & 1 == 1) {
                if self.prng.percent(1) {
                    return;
                }
                let at = record.page.0 * 8 + sector - self.base;
                self.disk.write(at as usize, self.memory.get(frame, sector as usize));
            }
        }
        let began = self.disk.begin_sync();
        if self.prng.percent(self.scenario.fault_percent) {
            return self.disk.fail_sync(began, self.scenario.sync_failure);
        }
        self.disk.complete_sync(began);
        self.settings.frames = frames;
        self.settings.frames_max = self.settings.frames_max.max(frames);
        self.settings.dirty_pages_max = self.prng.pick(&[frames / 4, frames / 2, frames]);
        self.memory = SimulatedMemory::new(self.settings.frames_max, self.scenario.zero_slots);
    }

    /// Starts a daemon that serves the image read-only, to another guest. That is only allowed if there is no dirty
    /// cache, and leaves the cache unchanged.
    fn start_reader(&mut self) {
        self.lose_requests();
        let memory = SimulatedMemory::new(self.settings.frames_max, self.scenario.zero_slots);
        self.shrinks.daemons += 1;
        self.cache = PageCache::new(self.settings.clone(), Box::new(memory.clone()));
        self.memory_of_writer = Some(std::mem::replace(&mut self.memory, memory));
    }

    /// Ends a read-only daemon; the next one is a writer again.
    pub(super) fn end_reader(&mut self) {
        if self.memory_of_writer.is_some() {
            self.scenario.readers = false;
            self.start_next_daemon();
        }
    }

    /// Whether the daemon serves the image read-only.
    pub(super) fn is_reader(&self) -> bool {
        self.memory_of_writer.is_some()
    }

    /// Checks that a reader's operations do not change the disk.
    pub(super) fn check_operation(&self, kind: OpKind) {
        let reads = matches!(kind, OpKind::Read | OpKind::Map | OpKind::Sync);
        assert!(reads || !self.is_reader(), "a read-only daemon submits {kind:?}");
    }

    /// Cuts the power: only the disk remains, and all caches start empty.
    fn cut_power(&mut self) {
        let left = self.check_power_cut();
        self.requests.clear();
        self.oracle = Oracle::of(&left);
        self.disk.cut_power(&left);
        self.memory = SimulatedMemory::new(self.settings.frames_max, self.scenario.zero_slots);
        self.start_writer();
    }

    /// The requests in flight never complete. Parts of their writes may have reached cache and disk; no further parts
    /// will.
    fn lose_requests(&mut self) {
        for request in std::mem::take(&mut self.requests).into_values() {
            match request.op {
                GuestOp::Write { version } => self.end_write(&request, version, false),
                GuestOp::Zero { .. } => self.end_write(&request, 0, false),
                GuestOp::Read | GuestOp::Discard | GuestOp::Flush | GuestOp::Freeze { .. } => {}
            }
        }
    }
}
