//! Whether an earlier daemon has left a cache of an image.

use std::sync::Arc;
use std::time::Duration;

use crate::arena::ArenaFile;
use crate::config::{DeviceConfig, MemoryDir};
use crate::image_id::ImageId;
use crate::systemd::ServiceManager;

/// Whether an earlier daemon has left a cache with pages of the image: in the fd store, or below the configured
/// directory. A file that cannot be read counts as none.
pub fn has_kept_cache(config: &DeviceConfig, identity: &ImageId, manager: &Arc<ServiceManager>) -> bool {
    if ArenaFile::is_named_in_fdstore(manager, identity) {
        return true;
    }
    let MemoryDir::Path(directory) = &config.cache.memory_dir else { return false };
    let file = ArenaFile::find_for(directory, identity, Duration::ZERO).ok().flatten();
    file.and_then(|file| file.header().ok().flatten()).is_some_and(|header| header.frames > 0)
}
