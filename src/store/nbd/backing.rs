//! An export in the process that serves it.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use log::warn;

use super::connector::Connector;
use super::queue::NbdQueue;
use super::remote::Remote;
use super::wire::export_flag;
use crate::error::{Error, ErrorKind, Result};
use crate::store::format::at_start;
use crate::store::handed::NbdParts;
use crate::store::{Backing, Limits, StoreQueue};
use crate::tenure::token::ChangeToken;
use crate::units::{SECTOR_SIZE, SectorSpan};

/// Why an export whose FLUSH covers one connection cannot have a second queue.
pub(super) const NO_MULTI_CONN: &str =
    "its server does not promise that a FLUSH covers other connections (multi-conn); set workers = 1";

/// See the documentation of the module.
#[derive(Debug)]
pub(in crate::store) struct NbdBacking {
    pub(super) remote: Arc<Remote>,
    pub(super) limits: Limits,
    /// The canonical URI.
    pub(super) path: PathBuf,
    /// `None` until the process that opened the image also serves it.
    pub(super) connector: Mutex<Option<Arc<Connector>>>,
    /// Each queue has a clone, to be counted.
    attached: Arc<()>,
}

impl NbdBacking {
    /// An export without a connector.
    pub(super) fn new(remote: Arc<Remote>, limits: Limits, path: PathBuf) -> Self {
        Self { remote, limits, path, connector: Mutex::default(), attached: Arc::default() }
    }

    /// An export that another process of the daemon has opened; `connector` is its socket.
    pub(in crate::store) fn received(connector: File, parts: NbdParts) -> Arc<Self> {
        let remote = Remote::new(parts.label, parts.promised, Duration::from_millis(parts.quarantine_ms));
        remote.quarantine_earlier_writes(Duration::from_millis(parts.quarantined_ms));
        let backing = Self::new(Arc::new(remote), parts.limits, parts.uri.into());
        *backing.connector.lock().expect("no other thread has it yet") =
            Some(Arc::new(Connector::new(OwnedFd::from(connector))));
        Arc::new(backing)
    }

    /// The mode in which it is read and written, for the log.
    pub(in crate::store) fn io_mode(&self) -> &'static str {
        if self.remote.promised.has(export_flag::SEND_FLUSH) { "NBD with FLUSH" } else { "NBD without FLUSH" }
    }

    /// Whether this many queues can serve it.
    pub(super) fn allows(&self, queues: usize) -> bool {
        queues <= 1 || !self.limits.writable || self.remote.promised.has(export_flag::CAN_MULTI_CONN)
    }
}

impl Backing for NbdBacking {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn is_remote(&self) -> bool {
        true
    }

    fn shows_format(&self, span: SectorSpan) -> bool {
        span.start == 0
    }

    fn inspect_guest_write(&self, first: u64, bytes: &[u8]) -> u64 {
        let Some(format) = bytes.get(..SECTOR_SIZE).filter(|_| first == 0).and_then(at_start) else { return 0 };
        warn!(
            "{}: its guest writes a {} header, which cannot be recorded on the server: set format = \"raw\" \
             (--format raw), or the next start without the kept cache rejects the image",
            self.remote.label,
            format.name()
        );
        format.bit()
    }

    fn attach(&self) -> Result<Box<dyn StoreQueue>> {
        // This value has a clone itself.
        if !self.allows(Arc::strong_count(&self.attached)) {
            return Err(Error::new(ErrorKind::Config, format!("image {}: {NO_MULTI_CONN}", self.path.display())));
        }
        let failed =
            |e| Error::io(ErrorKind::System, format!("image {}: cannot create a queue", self.path.display()), e);
        let connector = self.connector.lock().expect("no thread panics with the connector locked").clone();
        let connector = connector.expect("an image that is served has a connector");
        let (reconnector, mut connection) = connector.attach().map_err(failed)?;
        if let Some(connection) = &mut connection {
            connection.may_have_lost |= self.remote.has_changed();
        }
        let (remote, limits) = (Arc::clone(&self.remote), self.limits.clone());
        let queue = NbdQueue::new(remote, limits, connection, Some(reconnector)).map_err(failed)?;
        Ok(Box::new(queue.counted_in(&self.attached)))
    }

    fn change_token(&self) -> Option<ChangeToken> {
        // A server reports nothing else. The image is not at rest while the server may still change it.
        let is_quarantined = self.remote.shared.suspects.has_any(self.remote.now());
        (!is_quarantined).then(|| ChangeToken { size_bytes: self.limits.size_bytes.get(), ..ChangeToken::default() })
    }

    fn idle_token(&self) -> Option<ChangeToken> {
        self.change_token()
    }
}
