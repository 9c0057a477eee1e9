//! What the operator's commands share with the start of a daemon: the proof that a cache belongs to an image, and the
//! end of a tenure at the image.

use std::sync::Arc;

use log::warn;

use super::left::{record_of, refusal};
use super::proof::{Likeness, Proof, prove};
use super::search::{Search, facts_of};
use super::write_back::Unwritten;
use crate::arena::{Arena, Header, TenureFacts};
use crate::config::MemoryDir;
use crate::error::{Error, ErrorKind, Result};
use crate::store::file::LastTenure;
use crate::store::named::NamedImage;
use crate::systemd::ServiceManager;
use crate::tenure::record::{Record, State};

/// Checks that a cache belongs to an image as it is now, as the next daemon would.
///
/// # Errors
/// [`ErrorKind::Ledger`] with the reason and the ways out, when that is not shown.
pub(super) fn check_belongs(arena: &Arena, header: &Header, image: &dyn NamedImage) -> Result<()> {
    let facts = facts_of(image);
    let record = record_of("genblk recover", image, &facts)?;
    let (memory_dir, manager) = (&MemoryDir::Systemd, &Arc::new(ServiceManager::default()));
    let search = Search { image, facts: &facts, record: record.as_ref(), memory_dir, manager };
    let Some(likeness) = search.likeness(header) else {
        let (file, shown) = (arena.file().expect(super::HAS_FILE), image.path().display());
        let context = format!("{file} belongs to an image that {shown} has replaced");
        let hint = format!(
            "to throw the cache away: \"genblk recover --discard {file}\"; to write it to {shown} all the same: \
             \"genblk recover --force --image {shown} {file}\""
        );
        return Err(Error::new(ErrorKind::Ledger, format!("{context}; {hint}")));
    };
    match prove(arena, header, likeness, image, record.as_ref()) {
        Proof::Proven => Ok(()),
        // The operator names the cache and the image: that counts for more than a path.
        Proof::Unproven(_) if likeness == Likeness::Similar => Ok(()),
        Proof::Unproven(why) | Proof::Refuted(why) | Proof::Overtaken(why) => {
            let file = arena.file().expect(super::HAS_FILE);
            Err(refusal(image, file, Unwritten::of(arena), header.last_seen.heartbeat_ns, &why))
        }
    }
}

/// Records at the image that the tenure of a cache has ended: in state [`State::Clean`] if everything in it is on the
/// image, [`State::Forfeited`] if it was thrown away. Does nothing if the image's record is of another tenure.
pub(super) fn settle(image: &dyn NamedImage, tenure: Option<TenureFacts>, state: State) {
    let Ok(LastTenure::Recorded(record)) = image.last_tenure() else { return };
    if record.state != State::Open || Some(record.tenure) != tenure.map(|tenure| tenure.id) {
        return;
    }
    if let Err(e) = image.write_record(&Record { state, ..record }) {
        warn!("cannot record at image {} that its tenure has ended: {e}", image.path().display());
    }
}
