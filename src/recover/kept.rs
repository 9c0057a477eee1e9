//! Whether the cache of an earlier daemon shows that an image is raw.

use std::sync::Arc;

use super::operator::caches_below;
use crate::arena::ArenaFile;
use crate::config::{DeviceConfig, MemoryDir};
use crate::image_id::ImageId;
use crate::store::format::{Format, at_start};
use crate::systemd::ServiceManager;

/// Whether an earlier daemon has left a cache of the image with the first sector that makes the image look like
/// `format`: then a guest wrote that sector, or read it from its disk. A cache with another first sector shows nothing:
/// the image may have been replaced since. What is in the fd store is not looked into.
pub fn has_kept_cache(
    config: &DeviceConfig,
    identity: &ImageId,
    format: Format,
    manager: &Arc<ServiceManager>,
) -> bool {
    let mut in_fdstore = manager.fdstore_names().into_iter().filter_map(|name| {
        let peeked = ArenaFile::peek_in_fdstore(manager, &name);
        peeked.ok().flatten()
    });
    if in_fdstore.any(|header| header.frames > 0 && header.image.identity == *identity) {
        return true;
    }
    let MemoryDir::Path(directory) = &config.cache.memory_dir else { return false };
    let surveys = caches_below(directory).into_iter().filter_map(|seen| seen.survey.ok().flatten());
    surveys
        .filter(|survey| survey.header.image.identity == *identity)
        .any(|survey| survey.first_sector.is_some_and(|sector| at_start(&sector) == Some(format)))
}
