//! Tenures: spans of time in which one daemon holds an image for writing.
//!
//! A tenure has a generation, which increases with each tenure of an image, and a random ID. The image carries the
//! record of its last tenure ([`record`]), and the cache file (the ledger's header) names its tenure. So an outdated
//! cache can be distinguished from the newest one.
//!
//! If the image cannot carry a record, and for changes by other programs, there is the change token ([`token`]): the
//! host's information about the last change of the image.

pub mod host;
pub mod record;
pub mod token;

use std::fmt;

use crate::error::{Error, ErrorKind, Result};
use crate::sys::random;

/// Identifies a tenure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TenureId {
    /// Number of the tenure among those of its image, from 1.
    pub generation: u64,
    /// Random bits, which distinguish it from a tenure of the same generation of a copy of the image.
    pub id: u128,
}

impl TenureId {
    /// A new tenure of this generation.
    ///
    /// # Errors
    /// [`ErrorKind::System`] when the kernel returns no random bytes.
    pub fn new(generation: u64) -> Result<Self> {
        let bytes = random::bytes().map_err(|e| Error::io(ErrorKind::System, "cannot get random bytes", e))?;
        Ok(Self { generation, id: u128::from_le_bytes(bytes) })
    }
}

impl fmt::Display for TenureId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{:032x}", self.generation, self.id)
    }
}
