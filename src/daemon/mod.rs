//! The process: opens all devices, starts their threads, waits for a signal, and ends in order. First it stops all
//! rings; then it either flushes everything to the images (SIGTERM, SIGINT), or leaves the caches for the next daemon
//! (SIGUSR1).

use std::collections::HashMap;
use std::sync::Arc;

use log::{info, warn};

use crate::config::Config;
use crate::error::{Error, ErrorKind, Result};
use crate::recover;
use crate::service::{Running, Service, shutdown_all};
use crate::sys::process::raise_descriptor_limit;
use crate::sys::signal::{self, BlockedSignals};
use crate::systemd::ServiceManager;

/// Signals without a meaning here that would end the process: a write beyond RLIMIT_FSIZE and one to a closed pipe fail
/// instead, and the others must not cost a guest its disk if they are sent by mistake.
const IGNORED: [i32; 7] =
    [libc::SIGXFSZ, libc::SIGPIPE, libc::SIGUSR2, libc::SIGALRM, libc::SIGVTALRM, libc::SIGPROF, libc::SIGIO];

/// Serves the devices of a configuration until SIGTERM, SIGINT or SIGUSR1. SIGHUP resumes write-back that was stopped
/// after an error.
///
/// # Errors
/// Those of [`Service::open`] and [`Service::start`], in which case no device is served, and those of
/// [`Running::shutdown`].
pub fn run(config: &Config) -> Result<()> {
    let system = |context: &'static str| move |e| Error::io(ErrorKind::System, context, e);
    let signals = BlockedSignals::block(&[libc::SIGTERM, libc::SIGINT, libc::SIGUSR1, libc::SIGHUP])
        .map_err(system("cannot block signals"))?;
    signal::ignore(&IGNORED).map_err(system("cannot ignore signals"))?;
    // Each ring takes five descriptors, so many rings exceed the usual soft limit of 1024 (which exists for select(2)).
    if let Err(e) = raise_descriptor_limit() {
        warn!("cannot raise the limit of open descriptors: {e}");
    }
    let manager = Arc::new(ServiceManager::from_environment()?);
    let mut images = HashMap::new();
    let open = |device| Service::open(device, &mut images, &manager);
    let services = config.devices.iter().map(open).collect::<Result<Vec<_>>>()?;
    recover::warn_unclaimed(config, &manager);
    recover::warn_unheld(config);
    let running = services.into_iter().map(Service::start).collect::<Result<Vec<_>>>()?;
    manager.notify("READY=1");
    let signal = loop {
        match signals.wait().map_err(system("cannot wait for signals"))? {
            libc::SIGHUP => running.iter().for_each(Running::resume),
            signal => break signal,
        }
    };
    manager.notify("STOPPING=1");
    let end = if signal == libc::SIGUSR1 {
        info!("signal {signal}: stopping, leaving the caches for the next daemon");
        Running::hand_over
    } else {
        info!("signal {signal}: stopping");
        Running::shutdown
    };
    shutdown_all(running, end)
}
