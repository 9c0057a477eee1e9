//! Log lines about an image's health.

use log::{error, info};

use crate::cache::{Health, HealthEvent};
use crate::units::{Fault, counted};

/// Reports a change of the image's health to the operator: which requests are affected, what is kept, what to do.
pub(super) fn report_health(name: &str, event: HealthEvent, dirty_pages: u64) {
    let errors = |fault| match fault {
        // On a full image, requests that need no new space still succeed, including FLUSHes.
        Fault::NoSpace => "requests that need new space return errors",
        _ => "FLUSH returns errors",
    };
    let remedy = |fault| match fault {
        Fault::NoSpace => "free space on the image's file system",
        _ => "check the disk",
    };
    let kept = format!("{} kept", counted(dirty_pages, "dirty page"));
    match event {
        HealthEvent::NoReservations => info!(
            "{name}: the image's file system does not support fallocate; FLUSH, not the write, will report a full disk"
        ),
        HealthEvent::Health(Health::Healthy) => info!("{name}: write-back recovered"),
        HealthEvent::Health(Health::Reporting(fault)) => {
            error!("{name}: write-back failing ({fault}); {}; {kept} and retried; {}", errors(fault), remedy(fault));
        }
        HealthEvent::Health(Health::Holding(fault)) => error!(
            "{name}: write-back failing ({fault}); requests that need the image wait; {kept} and retried; {}",
            remedy(fault)
        ),
        HealthEvent::Health(Health::Stopped(fault)) => error!(
            "{name}: write-back stopped ({fault}); only cached data can be read; {kept}; {}, then run \"genblk resume \
             {name}\", or send SIGHUP if there is no control socket",
            remedy(fault)
        ),
    }
}
