//! Opens an image by its name, in whatever store it is.

use std::path::Path;
use std::sync::Arc;

use super::file::FileImage;
use super::named::NamedImage;
use super::options::OpenOptions;
use crate::error::Result;

/// Opens and locks the image of this name, for the device called `device`: log lines about it begin with that; without
/// a device they begin with the image. Blocks: not for a worker's thread.
///
/// # Errors
/// As [`FileImage::open`].
pub fn open(device: Option<&str>, name: &Path, options: &OpenOptions) -> Result<Arc<dyn NamedImage>> {
    Ok(match device {
        Some(device) => FileImage::open_for(device, name, options)?,
        None => FileImage::open(name, options)?,
    })
}
