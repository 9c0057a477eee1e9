//! Opens an image by its name, in any store.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use super::Backing;
use super::file::FileImage;
use super::handed::ImageParts;
use super::named::NamedImage;
use super::nbd::{NbdBacking, NbdImage};
use super::options::OpenOptions;
use crate::error::Result;
use crate::nbd_uri::NbdUri;

/// Whether an image's name is that of an export on a server, as opposed to a path.
pub fn is_remote(name: &Path) -> bool {
    NbdUri::is_uri(name)
}

/// Opens and locks the image of this name, for the device called `device`: log lines about it begin with the device, or
/// without one with the image. Blocks: not for a worker's thread.
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

/// An image that another process of the daemon has opened and passed on, and the mode in which it is read and written,
/// for the log.
///
/// # Errors
/// [`crate::error::ErrorKind::System`] for a record of a tenure that this genblk cannot read.
pub fn received(file: File, parts: ImageParts) -> Result<(Arc<dyn Backing>, &'static str)> {
    match parts {
        ImageParts::File(parts) => {
            let image = FileImage::received(file, parts)?;
            let io_mode = if image.direct() { "O_DIRECT" } else { "buffered I/O" };
            Ok((image, io_mode))
        }
        ImageParts::Nbd(parts) => {
            let image = NbdBacking::received(file, parts);
            let io_mode = image.io_mode();
            Ok((image, io_mode))
        }
    }
}
