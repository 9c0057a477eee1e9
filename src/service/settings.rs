//! Derives the settings of a device's cache and of its virtio-blk device from its configuration.

use std::sync::Arc;

use crate::cache::{ErrorPolicy, PolicyKind, REGION_PAGES, Settings};
use crate::cached_image::CachedImage;
use crate::config::{Allocate, CacheMode, Discard, OnError, Policy};
use crate::counters::worker::Counters;
use crate::device::Device;
use crate::device::limits::{RateLimit, RateLimits};
use crate::disk_protocol::DeviceSettings;
use crate::error::{Error, ErrorKind, Result};
use crate::store::Limits;
use crate::sys::random;
use crate::units::{PAGE_BYTES, SECTOR_BYTES, low_u8, low_u32};
use crate::virtio::config_space::{DiscardLimits, DiskParameters};
use crate::virtio::request::{RequestLimits, serial};

/// The settings of a device's cache.
///
/// => With these settings the cache respects the limits.
///
/// # Errors
/// [`ErrorKind::Image`] for limits that no cache could respect.
pub(super) fn settings(config: &DeviceSettings, limits: &Limits) -> Result<Settings> {
    let refused = |obstacle| Error::new(ErrorKind::Image, format!("image {}: {obstacle}", config.image));
    limits.check().map_err(refused)?;
    let cache = &config.cache;
    let pages = |bytes: u64| u32::try_from(bytes / PAGE_BYTES).unwrap_or(u32::MAX);
    let frames = pages(cache.size_bytes);
    let retain = cache.mode != CacheMode::None;
    let io_pages = pages(limits.io_max_bytes.into()).min(limits.segments_max.into());
    Ok(Settings {
        frames,
        frames_max: frames,
        image_sectors: limits.size_bytes.get() / SECTOR_BYTES,
        block_sectors: low_u8(u64::from(limits.transfer_block_bytes()) / SECTOR_BYTES),
        holes: limits.holes,
        cluster_pages_max: io_pages.clamp(1, low_u32(REGION_PAGES)),
        retain,
        policy: match cache.policy {
            Policy::S3Fifo => PolicyKind::S3Fifo,
            Policy::Lru => PolicyKind::Lru,
        },
        readahead_pages_max: if retain { pages(cache.readahead_max_bytes) } else { 0 },
        flush_target_us: u64::from(cache.flush_target_ms) * 1000,
        dirty_pages_max: low_u32(u64::from(frames) * u64::from(cache.dirty_max_percent) / 100),
        dirty_age_us: u64::from(cache.dirty_age_max_ms) * 1000,
        allocate: cache.allocate == Allocate::OnWrite,
        unmap: config.discard == Discard::Unmap,
        on_error: error_policy(cache.on_error),
        on_full: error_policy(cache.on_full),
        page_key: random::bytes().map(u64::from_ne_bytes).map_err(|e| Error::io(ErrorKind::System, "getrandom", e))?,
        hold_us: u64::from(cache.hold_max_ms) * 1000,
    })
}

fn error_policy(configured: OnError) -> ErrorPolicy {
    match configured {
        OnError::Report => ErrorPolicy::Report,
        OnError::Hold => ErrorPolicy::Hold,
        OnError::Stop => ErrorPolicy::Stop,
    }
}

/// The rate limits of a device.
pub(super) fn rate_limits(config: &DeviceSettings) -> RateLimits {
    let config = config.limits.unwrap_or_default();
    let limit = |requests: u32, bytes| RateLimit { requests: requests.into(), bytes };
    RateLimits {
        read: limit(config.read_iops, config.read_bytes_per_second),
        write: limit(config.write_iops, config.write_bytes_per_second),
        total: limit(config.total_iops, config.total_bytes_per_second),
        burst_ms: config.burst_ms,
    }
}

/// The virtio-blk device with this configuration, on `image`.
pub(super) fn device_of(config: &DeviceSettings, image: &CachedImage, counters: Counters) -> Arc<Device> {
    let limits = image.limits();
    let parameters = DiskParameters {
        capacity_sectors: limits.size_bytes.get() / SECTOR_BYTES,
        block_bytes: 512,
        physical_block_bytes: limits.physical_block_bytes,
        optimal_io_bytes: limits.optimal_io_bytes,
        discard: DiscardLimits::new(limits.discard_granularity, limits.discard_max_bytes),
        num_queues: config.num_queues,
        read_only: config.read_only,
        can_discard: limits.can_discard,
        can_zero: limits.can_zero,
        zero_may_unmap: limits.can_zero,
    };
    let disk = RequestLimits {
        capacity_sectors: parameters.capacity_sectors.into(),
        read_only: config.read_only,
        can_discard: limits.can_discard,
        max_discard_sectors: parameters.discard.max_sectors,
        can_zero: limits.can_zero,
        serial: serial(&config.serial),
    };
    let writeback = config.cache.mode == CacheMode::Writeback;
    let (name, arena) = (config.name.clone(), Arc::clone(image.arena()));
    let device = Device::new(name, arena, disk, parameters, writeback, config.poll_us, counters);
    device.limiter.set(&rate_limits(config));
    device
}
