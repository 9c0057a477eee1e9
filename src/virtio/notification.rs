//! Suppression of notifications between device and driver (virtio 1.2, sections 2.7.7 and 2.7.10).
//!
//! Each side publishes its index, then reads whether the other side requests a notification; or it publishes its own
//! request, then reads the other side's index. With a sequentially consistent fence between the two steps on either
//! side, at least one side sees the other's store, so neither waits for a notification that never comes. `loom/` checks
//! that.

use crate::sync::{Ordering, fence};

/// VRING_AVAIL_F_NO_INTERRUPT: the driver requests no interrupts.
const NO_INTERRUPT: u16 = 1;

/// A word of a ring, which the other side accesses at the same time.
pub trait RingWord {
    /// Its value.
    fn load(&self, order: Ordering) -> u16;
    /// Stores a value.
    fn store(&self, value: u16, order: Ordering);
}

/// Moves the used index from `old` to `new`. Returns whether the driver requests an interrupt for that. `wanted` is the
/// word with its request: used_event with `event_idx`, otherwise its flags.
#[inline]
pub fn publish(used_idx: &impl RingWord, wanted: &impl RingWord, event_idx: bool, old: u16, new: u16) -> bool {
    used_idx.store(new, Ordering::Release);
    fence(Ordering::SeqCst);
    let wanted = wanted.load(Ordering::Relaxed);
    if event_idx {
        new.wrapping_sub(wanted).wrapping_sub(1) < new.wrapping_sub(old)
    } else {
        wanted & NO_INTERRUPT == 0
    }
}

/// Requests a kick from the driver at the available index `next`. Returns whether the driver has already passed that
/// index, in which case it may not kick. `wanted` is the word with the device's request: avail_event with `event_idx`,
/// otherwise its flags.
#[inline]
pub fn enable(avail_idx: &impl RingWord, wanted: &impl RingWord, event_idx: bool, next: u16) -> bool {
    wanted.store(if event_idx { next } else { 0 }, Ordering::Relaxed);
    fence(Ordering::SeqCst);
    avail_idx.load(Ordering::Acquire) != next
}
