//! Whether the cache of an earlier daemon shows that an image is raw.

use std::sync::Arc;

use super::operator::caches_below;
use crate::arena::{ArenaFile, Header};
use crate::config::{DeviceConfig, MemoryDir};
use crate::image_id::ImageId;
use crate::store::format::{Format, at_start};
use crate::systemd::ServiceManager;

/// Whether an earlier daemon has left a cache of the image that shows that its guest wrote the header of `format`: the
/// ledger records it, or the cache holds the first sector with that header. A cache with another first sector shows
/// nothing: the image may have been replaced since.
pub fn has_kept_cache(
    config: &DeviceConfig,
    identity: &ImageId,
    format: Format,
    manager: &Arc<ServiceManager>,
) -> bool {
    let is_noted = |header: &Header| header.image.identity == *identity && header.guest.formats & format.bit() != 0;
    let mut in_fdstore = manager.fdstore_names().into_iter().filter_map(|name| {
        let peeked = ArenaFile::peek_in_fdstore(manager, &name);
        peeked.ok().flatten()
    });
    // Only the header of such an entry can be read before it is taken; older layouts do not record formats.
    let vouches = |header: Header| is_noted(&header) || header.predates_format_records(identity);
    if in_fdstore.any(vouches) {
        return true;
    }
    let MemoryDir::Path(directory) = &config.cache.memory_dir else { return false };
    let summaries = caches_below(directory, |header| header.image.identity == *identity);
    summaries.into_iter().filter_map(|summary| summary.survey.ok().flatten()).any(|survey| {
        is_noted(&survey.header) || survey.first_sector.is_some_and(|sector| at_start(&sector) == Some(format))
    })
}
