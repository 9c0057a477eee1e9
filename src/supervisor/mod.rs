//! The supervisor: opens all devices in parallel, starts a disk process for each image, waits for signals, and shuts
//! down cleanly. A shutdown first stops all rings. Then the disk processes either flush everything to the images
//! (SIGTERM, SIGINT) or leave the caches for the next daemon (SIGUSR1).
//!
//! The supervisor does everything that needs a path: configuration, sockets, opening and locking images, memory,
//! recovery of caches. It never touches guest memory, a front-end's messages, or an image that is served: a hostile
//! guest or front-end reaches only its disk process (`crate::disk_process`), and the supervisor restarts that process.
//!
//! Each device has its own thread (`keeper.rs`), which may block on the image. Each disk process has a thread that
//! reads its messages and its log (`process.rs`). The main thread (`fleet.rs`) waits for none of them, so an image that
//! does not answer holds up only its own device.

mod attach;
mod configure;
mod context;
mod control_socket;
mod current_config;
mod disk;
mod entry;
mod fleet;
mod fleet_change;
mod handle;
mod image_size;
mod keeper;
mod log_pipe;
mod observe;
mod operator;
mod operator_state;
mod overview;
mod pressure;
mod process;
mod reminder;
mod restarts;
mod runtime;
mod slot;
mod socket;
mod warm;
mod warm_list;
mod warm_pages;

use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread;

use log::warn;

use crate::config::{Config, Sandbox};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::process::raise_descriptor_limit;
use crate::sys::signal::{self, BlockedSignals};
use crate::systemd::ServiceManager;

pub use process::Hosting;

use context::Context;
use control_socket::ControlListener;
use fleet::Fleet;
use fleet_change::FleetChange;
use keeper::KeeperEvent;
use operator::Operator;
use runtime::RuntimeFile;

/// Signals that genblk does not use and whose default action ends the process. With SIGXFSZ and SIGPIPE ignored, a
/// write beyond RLIMIT_FSIZE or to a closed pipe fails instead. The others, sent by mistake, must not cost a guest its
/// disk.
const IGNORED: [i32; 7] =
    [libc::SIGXFSZ, libc::SIGPIPE, libc::SIGUSR2, libc::SIGALRM, libc::SIGVTALRM, libc::SIGPROF, libc::SIGIO];

/// What happens if a device cannot be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strictness {
    /// Serve the others and retry this one, as long as at least one is served.
    ServeTheOthers,
    /// Serve none.
    AllOrNone,
}

/// An event for the main thread.
#[derive(Debug)]
enum SupervisorEvent {
    /// A signal, by number.
    Signal(i32),
    /// An event of the device with this number.
    Keeper(usize, KeeperEvent),
    /// This daemon now holds the control socket, which another daemon held at the start.
    ControlBound,
    /// The operator attaches or detaches a device.
    Change(FleetChange),
}

/// Serves the devices of a configuration until SIGTERM, SIGINT or SIGUSR1. SIGHUP reloads the configuration file.
/// Without a control socket, SIGHUP also resumes write-back that stopped after an error, and retries devices that could
/// not be served.
///
/// # Errors
/// [`ErrorKind::Image`], [`ErrorKind::Locked`], [`ErrorKind::Memory`], [`ErrorKind::Ledger`] and [`ErrorKind::Socket`]
/// if no device can be served, or one of them with [`Strictness::AllOrNone`]; [`ErrorKind::Image`] if a device ends
/// while its image lacks completed writes.
pub fn run(config: &Config, strictness: Strictness, hosting: Hosting) -> Result<()> {
    let system = |context: &'static str| move |e| Error::io(ErrorKind::System, context, e);
    let signals = BlockedSignals::block(&[libc::SIGTERM, libc::SIGINT, libc::SIGUSR1, libc::SIGHUP])
        .map_err(system("cannot block signals"))?;
    signal::ignore(&IGNORED).map_err(system("cannot ignore signals"))?;
    // Each ring takes five descriptors, so many rings exceed the usual soft limit of 1024 (which exists for select(2)).
    if let Err(e) = raise_descriptor_limit() {
        warn!("cannot raise the limit of open descriptors: {e}");
    }
    for device in config.devices.iter().filter(|device| device.sandbox == Sandbox::Off) {
        warn!(
            "{}: sandbox = \"off\": a memory-safety bug in genblk gives a guest all privileges of the daemon; for \
             debugging only",
            device.name
        );
    }
    let manager = Arc::new(ServiceManager::from_environment()?);
    let mut control = config.control.as_ref().map(ControlListener::bind);
    let runtime = control.as_ref().zip(config.control.as_ref());
    let mut runtime = runtime.map(|(socket, control)| RuntimeFile::open(&control.socket, socket.is_bound()));
    if let Some(runtime) = &mut runtime {
        runtime.note_files(config);
    }
    let config = &runtime.as_ref().map_or_else(|| config.clone(), |runtime| runtime.apply(config));
    let context = Arc::new(Context::new(config, &manager, hosting));
    let (sender, events) = channel();
    wait_for_signals(signals, sender.clone())?;
    let mut fleet = Fleet::start(config, strictness, &context, manager, &sender, runtime)?;
    let operator = Operator::new(fleet.overview(), &sender, config.source.as_deref());
    fleet.reload_with(operator.clone());
    if let Some(control) = &mut control {
        control.serve(Arc::new(operator), &sender);
    }
    fleet.run(&events)
}

/// Starts the thread that waits for signals and sends them as events.
fn wait_for_signals(signals: BlockedSignals, events: Sender<SupervisorEvent>) -> Result<()> {
    let wait = move || {
        while let Ok(signal) = signals.wait() {
            if events.send(SupervisorEvent::Signal(signal)).is_err() {
                return;
            }
        }
    };
    let failed = |e| Error::io(ErrorKind::System, "cannot start the thread that waits for signals", e);
    thread::Builder::new().name("signals".to_owned()).spawn(wait).map_err(failed)?;
    Ok(())
}
