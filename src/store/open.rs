//! Opens an image by its name, in whatever store it is.

use std::path::Path;
use std::sync::Arc;

use super::file::FileImage;
use super::named::NamedImage;
use super::nbd::NbdImage;
use super::options::OpenOptions;
use crate::error::Result;
use crate::nbd_uri::NbdUri;

/// Whether a name of an image is that of an export at a server, and not a path.
pub fn is_remote(name: &Path) -> bool {
    NbdUri::is_meant_by(name)
}

/// Opens and locks the image of this name, for the device called `device`: log lines about it begin with that; without
/// a device they begin with the image. Blocks: not for a worker's thread.
///
/// # Errors
/// As [`FileImage::open`] and [`NbdImage::open`].
pub fn open(device: Option<&str>, name: &Path, options: &OpenOptions) -> Result<Arc<dyn NamedImage>> {
    if is_remote(name) {
        return Ok(NbdImage::open(device, name, options)?);
    }
    Ok(match device {
        Some(device) => FileImage::open_for(device, name, options)?,
        None => FileImage::open(name, options)?,
    })
}
