//! The process: opens everything, starts the threads, waits for a signal, and ends in order: rings stopped, and then
//! either everything written and one Sync (SIGTERM, SIGINT), or the caches left for the daemon that comes next (SIGUSR1).

use std::collections::HashMap;
use std::sync::Arc;

use log::{info, warn};

use crate::config::Config;
use crate::error::{Error, ErrorKind, Result};
use crate::recover;
use crate::service::{Running, Service, shutdown_all};
use crate::systemd::ServiceManager;

/// Serves the devices of a configuration until SIGTERM, SIGINT or SIGUSR1. SIGHUP resumes images that are left alone after
/// an error.
///
/// # Errors
/// What kept a device from being served (nothing is served then, and nothing has been changed), or the image's fault
/// when at the end not everything could be written.
pub fn run(config: &Config) -> Result<()> {
    let signals = Signals::block()?;
    raise_descriptor_limit();
    let manager = Arc::new(ServiceManager::from_environment()?);
    let mut images = HashMap::new();
    let open = |device| Service::open(device, &mut images, &manager);
    let services = config.devices.iter().map(open).collect::<Result<Vec<_>>>()?;
    recover::warn_unclaimed(config, &manager);
    let running = services.into_iter().map(Service::start).collect::<Result<Vec<_>>>()?;
    manager.notify("READY=1");
    let signal = loop {
        match signals.wait()? {
            libc::SIGHUP => running.iter().for_each(Running::resume),
            signal => break signal,
        }
    };
    manager.notify("STOPPING=1");
    let end = if signal == libc::SIGUSR1 {
        info!("signal {signal}: stopping, the caches stay for the next daemon");
        Running::hand_over
    } else {
        info!("signal {signal}: stopping");
        Running::shutdown
    };
    shutdown_all(running, end)
}

/// Lets the process open as many descriptors as it may: each ring takes five, and the usual soft limit of 1024, which is
/// there for programs that call select(2), is soon reached.
fn raise_descriptor_limit() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: both calls read or write one rlimit of ours.
    let raised = unsafe {
        libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0 && {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) == 0
        }
    };
    if !raised {
        warn!("cannot raise the limit of open descriptors: {}", std::io::Error::last_os_error());
    }
}

/// The signals that end the daemon, blocked in every thread so that one can wait for them.
#[derive(Debug)]
struct Signals(libc::sigset_t);

impl Signals {
    /// => Call it before any thread is started: threads inherit the mask.
    fn block() -> Result<Self> {
        // SAFETY: an all-zero sigset_t is a valid value to initialise with sigemptyset.
        let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
        // SAFETY: the set is ours, and the signal numbers are valid.
        let failed = unsafe {
            libc::sigemptyset(&raw mut set);
            libc::sigaddset(&raw mut set, libc::SIGTERM);
            libc::sigaddset(&raw mut set, libc::SIGINT);
            libc::sigaddset(&raw mut set, libc::SIGUSR1);
            libc::sigaddset(&raw mut set, libc::SIGHUP);
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut())
        };
        match failed {
            0 => Ok(Self(set)),
            errno => Err(refused("cannot block signals", std::io::Error::from_raw_os_error(errno))),
        }
    }

    /// Waits for one of them; returns its number.
    fn wait(&self) -> Result<i32> {
        let mut signal = 0;
        // SAFETY: the set was initialised in block(), and the signal number is written to a local.
        match unsafe { libc::sigwait(&raw const self.0, &raw mut signal) } {
            0 => Ok(signal),
            errno => Err(refused("cannot wait for signals", std::io::Error::from_raw_os_error(errno))),
        }
    }
}

fn refused(context: &str, e: std::io::Error) -> Error {
    Error::io(ErrorKind::System, context, e)
}
