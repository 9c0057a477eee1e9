//! Operations shared by the operator's commands and the start of a daemon: the proof that a cache belongs to an image,
//! and ending a tenure.

use std::io;
use std::sync::Arc;

use log::warn;

use super::left::{record_of, refusal};
use super::proof::{MatchStrength, Proof, prove};
use super::search::{Search, facts_of};
use super::write_back::Unwritten;
use crate::arena::{Arena, ArenaFile, Header, TenureFacts};
use crate::config::MemoryDir;
use crate::error::{Error, ErrorKind, Result};
use crate::store::file::{LastTenure, end_recorded_tenure};
use crate::store::named::NamedImage;
use crate::systemd::ServiceManager;
use crate::tenure::record::{Record, TenureState};

/// Checks that a cache belongs to an image in its present state, as the next daemon would. With `force` the image may
/// have changed since, but it must be the cache's image: a path may lead to another file than the operator expects.
///
/// # Errors
/// [`ErrorKind::Ledger`] with the reason and the operator's choices, if it does not.
pub(super) fn check_belongs(arena: &Arena, header: &Header, image: &dyn NamedImage, force: bool) -> Result<()> {
    let facts = facts_of(image);
    let record = match record_of("genblk recover", image, &facts) {
        Err(_) if force => None,
        record => record?,
    };
    let (memory_dir, manager) = (&MemoryDir::Systemd, &Arc::new(ServiceManager::default()));
    let search = Search { image, facts: &facts, record: record.as_ref(), overlapping: &[], memory_dir, manager };
    // A partition has the bytes of its disk at other offsets.
    let is_same_size = header.image.size_bytes == image.limits().size_bytes.get();
    let match_strength = search.match_strength(header);
    let Some(match_strength) = match_strength.filter(|found| is_same_size || *found != MatchStrength::OtherAccess)
    else {
        let (file, shown) = (arena.file().expect(super::HAS_FILE), image.path().display());
        let context = format!("{file} belongs to an image that {shown} has replaced");
        let hint = format!(
            "to delete the cache: \"genblk recover --discard {file}\"; to write it to {shown} anyway: \
             \"genblk recover --force --image {shown} {file}\""
        );
        return Err(Error::new(ErrorKind::Ledger, format!("{context}; {hint}")));
    };
    if force {
        return Ok(());
    }
    match prove(arena, header, match_strength, image, record.as_ref()) {
        Proof::Proven => Ok(()),
        // The operator has named both the cache and the image, which is stronger evidence than a path.
        Proof::Unproven(_) if match_strength == MatchStrength::Similar => Ok(()),
        Proof::Unproven(why) | Proof::Refuted(why) | Proof::Overtaken(why) => {
            let file = arena.file().expect(super::HAS_FILE);
            Err(refusal(image, file, Unwritten::of(arena), header.last_seen.heartbeat_ns, &why))
        }
    }
}

/// Ends the tenure of an image on which everything is, if its process had no right to: the image may be another user's.
///
/// # Errors
/// Errors of fgetxattr(2), fsetxattr(2) and fsync(2).
pub fn end_open_tenure(image: &dyn NamedImage) -> io::Result<()> {
    match image.last_tenure()? {
        LastTenure::Recorded(Record { state: TenureState::Open, .. }) => image.end_tenure().map(drop),
        _ => Ok(()),
    }
}

/// Ends the tenure of a cache that is about to be removed: in state [`TenureState::Clean`] if everything in it is on
/// the image, [`TenureState::Forfeited`] if it is discarded. `image` is the image, if it can be opened. If its record
/// cannot be changed, the end is recorded next to the cache.
///
/// => The next daemon of the image does not report the cache as missing.
///
/// # Errors
/// [`ErrorKind::Memory`] or [`ErrorKind::Ledger`] if both fail: then the cache must stay.
pub(super) fn end_tenure(
    file: &ArenaFile,
    image: Option<&dyn NamedImage>,
    tenure: Option<TenureFacts>,
    state: TenureState,
) -> Result<()> {
    // Without a record, no daemon will report the cache as missing.
    let Some(tenure) = tenure.filter(|tenure| tenure.is_recorded && !tenure.is_over) else { return Ok(()) };
    match image.map(|image| (image, image.last_tenure())) {
        Some((image, Ok(LastTenure::Recorded(record)))) if record.tenure == tenure.id => {
            if record.state != TenureState::Open {
                return Ok(());
            }
            match image.write_record(&Record { state, ..record }) {
                Ok(()) => Ok(()),
                Err(e) => {
                    warn!("cannot record that image {} was released: {e}", image.path().display());
                    file.record_tenure_end(tenure.id, state)
                }
            }
        }
        _ => match end_recorded_tenure(tenure.id, state) {
            Ok(true) => Ok(()),
            _ => file.record_tenure_end(tenure.id, state),
        },
    }
}
