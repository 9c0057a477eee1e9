//! The list of metrics, and the origin of their values. Times are in seconds, sizes in bytes; counters run from the
//! start of the daemon. A combination of labels that cannot occur has no series.

use super::super::sample::DaemonSample;
use super::text::{MetricType, MetricsText, seconds};
use crate::control::wire::{
    CacheStatistics, Description, DeviceState, DeviceStatistics, DeviceStatus, EventCount, RequestStatistics,
    StoreStatistics,
};
use crate::units::PAGE_BYTES;

use MetricType::{Counter, Gauge, Histogram, Summary};

/// Writes all metrics; for a daemon that did not reply, only that it is not up.
pub(super) fn write(text: &mut MetricsText, sample: Option<&DaemonSample>, with_buckets: bool) {
    text.family("genblk_up", Gauge, "Whether the daemon replied to the exporter.");
    text.sample("genblk_up", &[], u8::from(sample.is_some()));
    if let Some(DaemonSample { description, devices, statistics, .. }) = sample {
        about_daemon(text, description);
        about_devices(text, devices);
        about_requests(text, statistics, with_buckets);
        about_caches(text, statistics);
        about_store(text, statistics, with_buckets);
        about_workers(text, statistics);
    }
}

fn about_daemon(text: &mut MetricsText, description: &Description) {
    text.family("genblk_build_info", Gauge, "Version of the daemon; always 1.");
    text.sample("genblk_build_info", &[("version", &description.version)], 1);
    text.family("genblk_start_time_seconds", Gauge, "When the daemon started, in seconds since 1970.");
    text.sample("genblk_start_time_seconds", &[], seconds(description.since_us.saturating_mul(1000)));
    text.family("genblk_events_total", Counter, "Events by their kind.");
    for EventCount { kind, count } in &description.events {
        text.sample("genblk_events_total", &[("kind", kind)], *count);
    }
}

fn about_devices(text: &mut MetricsText, devices: &[DeviceStatus]) {
    text.family("genblk_device_info", Gauge, "Image and serial number of the device; always 1.");
    for device in devices {
        let labels =
            [("device", device.name.as_str()), ("image", device.image.as_str()), ("serial", device.serial.as_str())];
        text.sample("genblk_device_info", &labels, 1);
    }
    text.family("genblk_device_state", Gauge, "1 for the state that the device is in, 0 for the others.");
    for device in devices {
        for state in DeviceState::ALL {
            let labels = [("device", device.name.as_str()), ("state", state.word())];
            text.sample("genblk_device_state", &labels, u8::from(device.state == state));
        }
    }
    type Value = fn(&DeviceStatus) -> Option<u64>;
    let metrics: [(&str, &str, Value); 6] = [
        ("genblk_device_size_bytes", "Size of the disk.", |device| device.image_bytes),
        ("genblk_cache_configured_bytes", "Configured size of the cache.", |device| Some(device.cache_bytes)),
        ("genblk_cache_wanted_bytes", "Size that the cache is to have at present.", |device| device.cache_wanted_bytes),
        ("genblk_device_front_end", "Whether a front-end is connected.", |device| {
            Some(device.front_end.is_some().into())
        }),
        (
            "genblk_device_pending_keys",
            "Keys of the configuration file that take effect only after detach and attach.",
            |device| Some(device.pending.len() as u64),
        ),
        ("genblk_device_oldest_operation_seconds", "Age of the oldest operation in flight on the image.", |device| {
            device.oldest_operation_us
        }),
    ];
    for (name, help, value) in metrics {
        text.family(name, Gauge, help);
        for device in devices {
            let labels = [("device", device.name.as_str())];
            match value(device) {
                Some(us) if name.ends_with("_seconds") => {
                    text.sample(name, &labels, seconds(us.saturating_mul(1000)));
                }
                Some(number) => text.sample(name, &labels, number),
                None => {}
            }
        }
    }
}

fn about_requests(text: &mut MetricsText, devices: &[DeviceStatistics], with_buckets: bool) {
    let name = "genblk_request_duration_seconds";
    let kind = if with_buckets { Histogram } else { Summary };
    text.family(name, kind, "Time from taking a request from its ring to its completion.");
    for device in devices {
        for requests in &device.requests {
            let labels = |served| {
                [("device", device.name.as_str()), ("operation", requests.operation.as_str()), ("served", served)]
            };
            if matches!(requests.operation.as_str(), "read" | "write") {
                text.latencies(name, &labels("memory"), &requests.from_memory, with_buckets);
            }
            text.latencies(name, &labels("store"), &requests.waited, with_buckets);
        }
    }
    let name = "genblk_request_errors_total";
    text.family(name, Counter, "Requests that completed with an error.");
    for device in devices {
        for requests in &device.requests {
            let labels = [("device", device.name.as_str()), ("operation", requests.operation.as_str())];
            text.sample(name, &labels, requests.errors);
        }
    }
    let in_flight = |device: &DeviceStatistics| {
        device.requests.iter().fold(0, |sum: u64, requests| sum.saturating_add(requests.in_flight))
    };
    of_devices(text, devices, ("genblk_requests_in_flight", Gauge, "Requests in flight."), in_flight);
    let metrics = [
        ("genblk_read_bytes_total", "read", "Bytes that guests read."),
        ("genblk_written_bytes_total", "write", "Bytes that guests wrote."),
        ("genblk_discarded_bytes_total", "discard", "Bytes that guests discarded."),
        ("genblk_zeroed_bytes_total", "write_zeroes", "Bytes that guests had zeroed."),
    ];
    for (name, operation, help) in metrics {
        let bytes = |device: &DeviceStatistics| {
            let found: Option<&RequestStatistics> = device.requests.iter().find(|of| of.operation == operation);
            found.map_or(0, |requests| requests.bytes)
        };
        of_devices(text, devices, (name, Counter, help), bytes);
    }
}

/// A metric with a sample for each device: its name, its type and its help.
type DeviceMetric<'a> = (&'a str, MetricType, &'a str);

fn of_devices(
    text: &mut MetricsText,
    devices: &[DeviceStatistics],
    (name, kind, help): DeviceMetric<'_>,
    value: impl Fn(&DeviceStatistics) -> u64,
) {
    text.family(name, kind, help);
    for device in devices {
        text.sample(name, &[("device", &device.name)], value(device));
    }
}

/// The value of a metric of a cache.
type CacheValue = fn(&CacheStatistics) -> u64;

/// Metrics of the cache.
const OF_CACHE: [(DeviceMetric<'static>, CacheValue); 12] = [
    (
        ("genblk_cache_lookup_pages_total", Counter, "Pages of 4 KiB that reads requested."),
        CacheStatistics::lookup_pages,
    ),
    (("genblk_cache_hit_pages_total", Counter, "Pages that reads requested and found in memory."), |cache| {
        cache.hit_pages
    }),
    (("genblk_cache_hole_pages_total", Counter, "Pages that reads requested in holes of the image."), |cache| {
        cache.hole_pages
    }),
    (("genblk_cache_evicted_pages_total", Counter, "Pages that were evicted."), |cache| cache.evicted_pages),
    (("genblk_readahead_pages_total", Counter, "Pages that were read ahead."), |cache| cache.readahead_pages),
    (("genblk_readahead_used_pages_total", Counter, "Pages that were read ahead and then requested."), |cache| {
        cache.readahead_used_pages
    }),
    (
        (
            "genblk_readahead_evicted_pages_total",
            Counter,
            "Pages that were read ahead and evicted or overwritten unread.",
        ),
        |cache| cache.readahead_wasted_pages,
    ),
    (("genblk_cache_size_bytes", Gauge, "Cache memory for pages."), |cache| bytes_of(cache.frames)),
    (("genblk_cache_free_bytes", Gauge, "Cache memory that holds no page."), |cache| bytes_of(cache.frames_free)),
    (("genblk_cache_dirty_bytes", Gauge, "Dirty data: not yet written to the image."), |cache| {
        bytes_of(cache.dirty_pages)
    }),
    (("genblk_cache_dirty_limit_bytes", Gauge, "Current limit on dirty data."), |cache| {
        bytes_of(cache.dirty_limit_pages)
    }),
    (("genblk_cache_metadata_bytes", Gauge, "Memory of the cache besides the pages."), |cache| cache.metadata_bytes),
];

fn bytes_of(pages: u64) -> u64 {
    pages.saturating_mul(PAGE_BYTES)
}

fn about_caches(text: &mut MetricsText, devices: &[DeviceStatistics]) {
    for (metric, value) in OF_CACHE {
        of_devices(text, devices, metric, |device| value(&device.cache));
    }
    let name = "genblk_request_waits_total";
    text.family(name, Counter, "How often a request had to wait before it was admitted.");
    for device in devices {
        let reasons =
            [("room", device.cache.stalls), ("dirty_limit", device.cache.throttled), ("rate_limit", device.limited)];
        for (reason, count) in reasons {
            text.sample(name, &[("device", &device.name), ("reason", reason)], count);
        }
    }
    let name = "genblk_rate_limited_seconds_total";
    text.family(name, Counter, "Time for which rate limits delayed requests at the head of their ring.");
    for device in devices {
        text.sample(name, &[("device", &device.name)], seconds(device.limited_us.saturating_mul(1000)));
    }
}

fn about_store(text: &mut MetricsText, devices: &[DeviceStatistics], with_buckets: bool) {
    let name = "genblk_store_duration_seconds";
    text.family(name, if with_buckets { Histogram } else { Summary }, "Time of operations on the image.");
    for device in devices {
        for store in &device.stores {
            let labels = [("device", device.name.as_str()), ("operation", store.operation.as_str())];
            text.latencies(name, &labels, &store.latency, with_buckets);
        }
    }
    type Value = fn(&StoreStatistics) -> u64;
    let metrics: [(&str, MetricType, &str, Value); 2] = [
        ("genblk_store_errors_total", Counter, "Operations on the image that failed.", |store| store.errors),
        ("genblk_store_in_flight", Gauge, "Operations on the image in flight.", |store| store.in_flight),
    ];
    for (name, kind, help, value) in metrics {
        text.family(name, kind, help);
        for device in devices {
            for store in &device.stores {
                let labels = [("device", device.name.as_str()), ("operation", store.operation.as_str())];
                text.sample(name, &labels, value(store));
            }
        }
    }
    for (name, operation, help) in [
        ("genblk_store_read_bytes_total", "read", "Bytes read from the image."),
        ("genblk_store_written_bytes_total", "write", "Bytes written to the image."),
    ] {
        let bytes = |device: &DeviceStatistics| {
            device.stores.iter().find(|store| store.operation == operation).map_or(0, |store| store.bytes)
        };
        of_devices(text, devices, (name, Counter, help), bytes);
    }
}

fn about_workers(text: &mut MetricsText, devices: &[DeviceStatistics]) {
    let name = "genblk_worker_busy_seconds_total";
    text.family(name, Counter, "Time that the worker threads spent in turns with work.");
    for device in devices {
        for (index, worker) in device.workers.iter().enumerate() {
            let labels = [("device", device.name.as_str()), ("worker", &index.to_string())];
            text.sample(name, &labels, seconds(worker.busy_ns));
        }
    }
}
