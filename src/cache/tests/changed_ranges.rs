//! What is noted of discarded ranges for the next daemon.

use std::sync::{Arc, Mutex};

use super::*;
use crate::prng::Prng;
use crate::units::Fault;

/// Memory that has the notes of changed ranges, and checks at every change that none is missing.
#[derive(Clone, Debug, Default)]
struct Notes(Arc<Mutex<NotesState>>);

#[derive(Debug, Default)]
struct NotesState {
    slots: [Option<SectorSpan>; 12],
    /// What the store may be discarding, or has discarded, and no Sync covers.
    unsynced: Vec<SectorSpan>,
}

impl NotesState {
    fn check(&self) {
        let is_noted = |no| self.slots.iter().flatten().any(|note| note.pages().contains(no));
        for span in &self.unsynced {
            assert!(span.pages().iter().all(is_noted), "{span:?} is not noted: {:?}", self.slots);
        }
    }
}

impl FrameMemory for Notes {
    fn copy_sectors(&self, _: FrameId, _: FrameId, _: SectorMask) {}
    fn zero_sectors(&self, _: FrameId, _: SectorMask) {}
    fn publish(&self, _: FrameId, _: FrameRecord) {}
    fn zero_slots(&self) -> usize {
        4
    }
    fn note_zero(&self, _: usize, _: Option<SectorSpan>) {}
    fn changed_slots(&self) -> usize {
        12
    }
    fn note_changed(&self, slot: usize, span: Option<SectorSpan>) {
        let mut state = self.0.lock().unwrap();
        assert!(span.is_none() || state.slots[slot].is_none(), "a note is overwritten");
        state.slots[slot] = span;
        state.check();
    }
}

impl Notes {
    fn count(&self) -> usize {
        self.0.lock().unwrap().slots.iter().flatten().count()
    }

    fn noted(&self) -> Vec<(usize, SectorSpan)> {
        let state = self.0.lock().unwrap();
        state.slots.iter().enumerate().filter_map(|(slot, span)| span.map(|span| (slot, span))).collect()
    }
}

const IMAGE_SECTORS: u64 = 1 << 16;

fn cache_over(notes: &Notes) -> PageCache {
    PageCache::new(Settings::of(256, IMAGE_SECTORS), Box::new(notes.clone()))
}

/// The discard is in flight, complete, covered by a Sync that fails, and by one that succeeds.
#[test]
fn a_discard_stays_recorded_from_before_its_start_until_a_sync_covers_it() {
    let notes = Notes::default();
    let mut cache = cache_over(&notes);
    let mut now = Tick::from_us(1);
    assert!(cache.discard(Ticket(9), SectorSpan::new(0, 64)));
    cache.pump(now);
    assert_eq!(notes.noted().iter().map(|(_, span)| *span).collect::<Vec<_>>(), [SectorSpan::new(0, 64)]);
    complete_all(&mut cache, now);
    for fault in [Some(Fault::Lost), None] {
        assert_eq!(notes.count(), 1);
        cache.flush(Ticket(10));
        cache.pump(now);
        let mut tags = Vec::new();
        cache.take_ops(|op| tags.push(op.tag));
        assert_eq!((tags.len(), notes.count()), (1, 1));
        cache.complete(tags[0], &fault.map_or(Outcome::Done, Outcome::Failed), now);
        now = now.plus_us(100_000_000);
    }
    assert_eq!(notes.count(), 0);
}

/// Discards at random places, more of them than there are slots, with Syncs that succeed or fail in between, and
/// daemons that die. `NotesState::check` judges each store to the slots.
#[test]
fn every_discard_not_yet_covered_by_a_sync_is_recorded() {
    let mut prng = Prng::new(3);
    for _ in 0..40 {
        let notes = Notes::default();
        let mut cache = cache_over(&notes);
        let mut now = Tick::from_us(1);
        // The discards that are complete, and those that the Sync in flight covers.
        let (mut in_flight, mut covered): (Vec<(u32, OpKind, SectorSpan)>, usize) = (Vec::new(), 0);
        for _ in 0..400 {
            now = now.plus_us(1_000_000);
            if prng.percent(40) {
                let start = prng.below(IMAGE_SECTORS / 8 - 40) * 8;
                let pages = prng.pick(&[1, 1, 4, 40]);
                cache.discard(Ticket(9), SectorSpan::new(start, pages * 8));
            }
            if prng.percent(10) {
                cache.flush(Ticket(10));
            }
            cache.pump(now);
            cache.take_ops(|op| {
                let mut state = notes.0.lock().unwrap();
                match op.kind {
                    OpKind::Discard => state.unsynced.push(op.span),
                    OpKind::Sync => {
                        let discarding = in_flight.iter().filter(|(_, kind, _)| *kind == OpKind::Discard).count();
                        covered = state.unsynced.len() - discarding;
                    }
                    _ => {}
                }
                state.check();
                in_flight.push((op.tag, op.kind, op.span));
            });
            if !in_flight.is_empty() && prng.percent(70) {
                let any: Vec<usize> = (0..in_flight.len()).collect();
                let (tag, kind, span) = in_flight.swap_remove(prng.pick(&any));
                let outcome = if prng.percent(10) { Outcome::Failed(Fault::Lost) } else { Outcome::Done };
                let mut state = notes.0.lock().unwrap();
                if kind == OpKind::Sync && outcome == Outcome::Done {
                    // Discards in flight may tell of a reset before the Sync: then all of it stays noted for longer.
                    state.unsynced.drain(..covered);
                } else if kind == OpKind::Discard {
                    // Complete ones come before those in flight.
                    let at = state.unsynced.iter().rposition(|unsynced| *unsynced == span).expect("it was submitted");
                    let done = state.unsynced.remove(at);
                    let discarding = in_flight.iter().filter(|(_, kind, _)| *kind == OpKind::Discard).count();
                    let at = state.unsynced.len() - discarding;
                    state.unsynced.insert(at, done);
                }
                drop(state);
                cache.complete(tag, &outcome, now);
            }
            if prng.percent(2) {
                // The next daemon: what is in flight has an unknown end.
                in_flight.clear();
                cache = cache_over(&notes);
                let noted = notes.noted();
                cache.restore([], [], noted);
            }
        }
    }
}

#[test]
fn changed_ranges_of_a_forged_ledger_are_clipped_to_the_image() {
    let notes = Notes::default();
    let forged = [(0, 8), (0, 8), (64, 8), (640, u64::from(u32::MAX)), (IMAGE_SECTORS, 8), (1 << 40, 8), (9, 1)];
    for (slot, (start, count)) in forged.into_iter().enumerate() {
        notes.0.lock().unwrap().slots[slot] = Some(SectorSpan::new(start, count));
    }
    for slot in forged.len()..12 {
        notes.0.lock().unwrap().slots[slot] = Some(SectorSpan::new(16_000 + 1000 * slot as u64, 8));
    }
    let mut cache = cache_over(&notes);
    let noted = notes.noted();
    cache.restore([], [], noted);
    let state = notes.0.lock().unwrap();
    let is_noted = |page| state.slots.iter().flatten().any(|note| note.pages().contains(PageNo(page)));
    assert!([0, 1, 8, 80, IMAGE_SECTORS / 8 - 1].into_iter().all(is_noted), "{:?}", state.slots);
    assert!(state.slots.iter().flatten().count() <= 3, "{:?}", state.slots);
}
