//! Ends a disk process whose supervisor has died.
//!
//! The process has everything that it needs to continue. But no other process would restart it, shut it down cleanly or
//! report its state, and the next supervisor would have to find it and trust it. So it ends as after SIGUSR1, within
//! milliseconds: a surviving cache is left for the next supervisor to restore. If the cache is volatile, the process
//! first writes everything to the image.

use std::thread;
use std::time::{Duration, Instant};

use super::Control;
use super::device::DeviceControl;
use crate::device::Untracked;
use crate::disk_protocol::Ending;
use crate::error::{Error, ErrorKind, Result};

/// How often to check the progress of the devices.
const TICK: Duration = Duration::from_millis(10);
/// How long requests in flight may take if the cache is kept. After that, the next daemon resubmits them.
const HAND_OVER_TIMEOUT: Duration = Duration::from_secs(2);
/// The same for requests that the next daemon cannot resubmit.
const UNTRACKED_TIMEOUT: Duration = Duration::from_secs(5);
/// How long to wait for an image that completes nothing if the cache is volatile.
const STALL_MAX: Duration = Duration::from_secs(30);
/// How long the threads of an abandoned device may take to end.
const EXIT_TIMEOUT: Duration = Duration::from_secs(2);

/// Ends every device. Returns when all have ended, or hang. Logs nothing: the reader of the log has died.
///
/// # Errors
/// [`ErrorKind::Image`] if a device hangs.
pub(super) fn end_all(mut control: Control) -> Result<()> {
    if control.devices.is_empty() {
        control.end();
        return Ok(());
    }
    let begun = Instant::now();
    let (mut progress, mut abandoned) = ((begun, 0), None);
    control.devices().for_each(DeviceControl::quiesce);
    let mut is_finishing = false;
    while !control.devices().all(DeviceControl::has_ended) {
        thread::sleep(TICK);
        control.check();
        if !is_finishing && control.devices().all(DeviceControl::has_quiesced) {
            is_finishing = true;
            control.devices().for_each(|device| device.finish(Ending::HandOver));
        }
        let completed = control.devices().map(|device| device.state().cache.completed_ops).sum::<u64>();
        if completed != progress.1 {
            progress = (Instant::now(), completed);
        }
        let is_kept = !control.devices().any(|device| device.state().has_volatile_dirty_data);
        let (age, stalled) = (begun.elapsed(), progress.0.elapsed());
        let untracked = match () {
            () if stalled >= STALL_MAX || is_kept && age >= UNTRACKED_TIMEOUT => Some(Untracked::Lose),
            () if is_kept && age >= HAND_OVER_TIMEOUT => Some(Untracked::Wait),
            () => None,
        };
        if let Some(untracked) = untracked
            && abandoned.is_none_or(|(_, before)| before != untracked)
        {
            abandoned = Some((Instant::now(), untracked));
            control.devices().for_each(|device| device.abandon(untracked));
        }
        if abandoned.is_some_and(|(at, untracked)| untracked == Untracked::Lose && at.elapsed() >= EXIT_TIMEOUT) {
            control.devices().for_each(DeviceControl::force_close);
            return Err(Error::new(ErrorKind::Image, "a disk ended while its image did not answer"));
        }
    }
    control.end();
    Ok(())
}
