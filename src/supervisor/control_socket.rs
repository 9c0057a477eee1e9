//! The control socket. If another daemon still holds it, binding is retried until that daemon ends. Meanwhile this
//! daemon serves its disks without it.

use std::os::unix::net::UnixListener;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use log::{error, info, warn};

use super::SupervisorEvent;
use crate::config::ControlConfig;
use crate::control::server::{self, Host};
use crate::error::{Error, ErrorKind, Result};
use crate::listener::{BoundSocket, SocketAccess, bind};

/// Pauses between attempts to bind the socket.
const RETRY_MIN: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(2);

/// See the module. Dropping it unlinks the socket.
#[derive(Debug)]
pub(super) struct ControlListener {
    config: ControlConfig,
    /// The socket of the first attempt, until it is served.
    listener: Option<UnixListener>,
    file: Arc<Mutex<SocketFile>>,
}

/// The socket's file.
#[derive(Debug)]
enum SocketFile {
    /// Another daemon holds the socket.
    Wanted,
    Bound(#[expect(dead_code, reason = "dropping it removes the file")] BoundSocket),
    /// The daemon has ended.
    Closed,
}

fn lock(file: &Mutex<SocketFile>) -> MutexGuard<'_, SocketFile> {
    file.lock().expect("no thread panics with the socket's file locked")
}

fn open(config: &ControlConfig) -> Result<(UnixListener, BoundSocket)> {
    let mode = if config.group.is_empty() { 0o600 } else { 0o660 };
    bind("control", &config.socket, SocketAccess::new(mode, &config.group)?)
}

impl ControlListener {
    /// Binds the socket, if no other daemon holds it. Connections wait for [`ControlListener::serve`].
    pub fn bind(config: &ControlConfig) -> Self {
        let (listener, file) = match open(config) {
            Ok((listener, bound)) => (Some(listener), SocketFile::Bound(bound)),
            Err(e) => {
                error!(
                    "cannot open the control socket: {e}; disks are served, but the operator's commands do not work \
                     until it opens; retrying"
                );
                (None, SocketFile::Wanted)
            }
        };
        Self { config: config.clone(), listener, file: Arc::new(Mutex::new(file)) }
    }

    /// Whether this daemon holds the socket.
    pub fn is_bound(&self) -> bool {
        self.listener.is_some()
    }

    /// Starts the thread that binds the socket and serves it. `events` gets a message if this thread binds the socket.
    pub fn serve(&mut self, host: Arc<dyn Host>, events: &Sender<SupervisorEvent>) {
        let (first, config, file, events) =
            (self.listener.take(), self.config.clone(), Arc::clone(&self.file), events.clone());
        let serve = move || {
            let Some(listener) = first.or_else(|| bind_when_free(&config, &file, &events)) else { return };
            if let Err(e) = server::serve(&listener, &host) {
                warn!("the control socket accepts no more connections: {e}");
            }
        };
        if let Err(e) = thread::Builder::new().name("control socket".to_owned()).spawn(serve) {
            let error = Error::io(ErrorKind::System, "cannot start a thread", e);
            error!("the control socket is not served: {error}; the operator's commands do not work");
        }
    }
}

impl Drop for ControlListener {
    fn drop(&mut self) {
        *lock(&self.file) = SocketFile::Closed;
    }
}

/// Retries until the socket is bound. `None`: the daemon has ended first.
fn bind_when_free(
    config: &ControlConfig,
    file: &Mutex<SocketFile>,
    events: &Sender<SupervisorEvent>,
) -> Option<UnixListener> {
    let mut pause = RETRY_MIN;
    loop {
        thread::sleep(pause);
        pause = (pause * 2).min(RETRY_MAX);
        // Bind under the lock, so that a daemon that ends meanwhile removes the file.
        let mut file = lock(file);
        if matches!(*file, SocketFile::Closed) {
            return None;
        }
        if let Ok((listener, bound)) = open(config) {
            *file = SocketFile::Bound(bound);
            info!("the control socket {} is open", config.socket.display());
            // Before the first change, which is sent through the same channel.
            return events.send(SupervisorEvent::ControlBound).is_ok().then_some(listener);
        }
    }
}
