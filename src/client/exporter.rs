//! `genblk exporter`: the daemon's statistics as Prometheus metrics (text format 0.0.4,
//! <https://prometheus.io/docs/instrumenting/exposition_formats/>), once or over HTTP. It is a process of its own, so
//! that the daemon has neither an HTTP parser nor a TCP socket.

use std::fmt::{self, Write as _};
use std::io::{self, Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::time::{Duration, Instant};

use super::ControlClient;
use crate::control::wire::{
    Description, DeviceState, DeviceStatistics, DeviceStatus, Devices, Latency, ListParameters, Statistics,
    StatisticsParameters,
};
use crate::counters::latency::{Latencies, bound_of};
use crate::error::{Error, ErrorKind, Result};
use crate::units::PAGE_BYTES;

/// The upper bounds of the histograms, in nanoseconds: powers of two, which are bounds of genblk's own buckets, so that
/// the counts are exact. From 1 us to 17 s.
const BOUNDS_NS: [u64; 13] = {
    let (mut bounds, mut at) = ([1 << 10; 13], 1);
    while at < bounds.len() {
        bounds[at] = bounds[at - 1] * 4;
        at += 1;
    }
    bounds
};

/// How long a client may take to send its request and to read the reply.
const HTTP_TIMEOUT: Duration = Duration::from_secs(2);
/// Longest request.
const REQUEST_BYTES_MAX: usize = 8 << 10;

/// Metrics at this moment. A daemon that cannot be asked is a metric, too (`genblk_up 0`).
pub fn metrics(socket: &Path) -> String {
    let mut text = MetricsText::default();
    match ask(socket) {
        Ok((description, devices, statistics)) => {
            text.family("genblk_up", "gauge", "Whether the daemon replied to the exporter.");
            text.sample("genblk_up", &[], 1);
            about_daemon(&mut text, &description);
            about_devices(&mut text, &devices.devices);
            about_requests(&mut text, &statistics.devices);
            about_caches(&mut text, &statistics.devices);
            about_store(&mut text, &statistics.devices);
        }
        Err(_) => {
            text.family("genblk_up", "gauge", "Whether the daemon replied to the exporter.");
            text.sample("genblk_up", &[], 0);
        }
    }
    text.0
}

fn ask(socket: &Path) -> Result<(Description, Devices, Statistics)> {
    let mut client = ControlClient::connect(socket)?;
    let description = client.call("Describe", &serde_json::json!({}))?;
    let devices = client.call("List", &ListParameters::default())?;
    Ok((description, devices, client.call("Statistics", &StatisticsParameters::default())?))
}

/// Serves `GET /metrics` on a TCP address until the process is killed.
///
/// # Errors
/// [`ErrorKind::System`] if the address cannot be listened on.
pub fn serve(address: &str, socket: &Path) -> Result<()> {
    let failed = |e| Error::io(ErrorKind::System, format!("cannot listen on {address}"), e);
    let listener = TcpListener::bind(address).map_err(failed)?;
    loop {
        match listener.accept() {
            // One after the other: a scrape takes a millisecond, and a client that stalls is cut off.
            Ok((mut stream, _)) => {
                let timeout = Some(HTTP_TIMEOUT);
                if stream.set_read_timeout(timeout).and_then(|()| stream.set_write_timeout(timeout)).is_ok() {
                    // A client that hangs up needs no reply.
                    let _ = reply(&mut stream, socket);
                }
            }
            // The process has no descriptor left, or the client has gone.
            Err(_) => std::thread::sleep(Duration::from_millis(100)),
        }
    }
}

fn reply(stream: &mut (impl Read + Write), socket: &Path) -> io::Result<()> {
    let (status, body) = match request_target(stream)?.as_deref() {
        Some("/metrics") => ("200 OK", metrics(socket)),
        Some(_) => ("404 Not Found", "the metrics are at /metrics\n".to_owned()),
        None => ("400 Bad Request", "the exporter takes GET requests\n".to_owned()),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: {}\r\n\
         Connection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes())?;
    stream.write_all(body.as_bytes())
}

/// The target of a GET request, once its head has been read; `None` for any other request.
fn request_target(stream: &mut impl Read) -> io::Result<Option<String>> {
    let (mut head, until) = (Vec::new(), Instant::now() + HTTP_TIMEOUT);
    while !head.windows(4).any(|end| end == b"\r\n\r\n") {
        let mut chunk = [0; 1024];
        let count = stream.read(&mut chunk)?;
        head.extend_from_slice(&chunk[..count]);
        if count == 0 || head.len() > REQUEST_BYTES_MAX || Instant::now() > until {
            return Ok(None);
        }
    }
    let head = String::from_utf8_lossy(&head);
    let mut words = head.lines().next().unwrap_or_default().split(' ');
    let target = (words.next() == Some("GET")).then(|| words.next()).flatten();
    // Scrapers may add parameters.
    Ok(target.map(|target| target.split('?').next().unwrap_or_default().to_owned()))
}

/// Metrics in the text format.
#[derive(Default)]
struct MetricsText(String);

impl MetricsText {
    /// Begins the samples of a metric.
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _ = write!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl fmt::Display) {
        self.0 += name;
        for (index, (label, text)) in labels.iter().enumerate() {
            let quoted = text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            let _ = write!(self.0, "{}{label}=\"{quoted}\"", if index == 0 { '{' } else { ',' });
        }
        let _ = writeln!(self.0, "{} {value}", if labels.is_empty() { "" } else { "}" });
    }

    fn histogram(&mut self, name: &str, labels: &[(&str, &str)], latency: &Latency) {
        let latencies = Latencies::from(latency);
        let below = |bound| -> u64 {
            let counts = latencies.counts.iter().enumerate();
            counts.filter(|(bucket, _)| bound_of(*bucket) <= bound).map(|(_, count)| count).sum()
        };
        let bucket = format!("{name}_bucket");
        for bound in BOUNDS_NS {
            let le = seconds(bound).to_string();
            self.sample(&bucket, &[labels, &[("le", &le)]].concat(), below(bound));
        }
        self.sample(&bucket, &[labels, &[("le", "+Inf")]].concat(), latency.count);
        self.sample(&format!("{name}_sum"), labels, seconds(latency.sum_ns));
        self.sample(&format!("{name}_count"), labels, latency.count);
    }

    /// A metric with one sample for each device.
    fn of_devices(
        &mut self,
        devices: &[DeviceStatistics],
        name: &str,
        kind: &str,
        help: &str,
        value: fn(&DeviceStatistics) -> u64,
    ) {
        self.family(name, kind, help);
        for device in devices {
            self.sample(name, &[("device", &device.name)], value(device));
        }
    }
}

#[allow(clippy::cast_precision_loss, reason = "a double has 53 bits: exact for 104 days")]
fn seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}

fn about_daemon(text: &mut MetricsText, description: &Description) {
    text.family("genblk_build_info", "gauge", "The version that serves; always 1.");
    text.sample("genblk_build_info", &[("version", &description.version)], 1);
    text.family("genblk_start_time_seconds", "gauge", "When the daemon started, in seconds since 1970.");
    text.sample("genblk_start_time_seconds", &[], description.since_us / 1_000_000);
}

fn about_devices(text: &mut MetricsText, devices: &[DeviceStatus]) {
    let states = [
        ("opening", DeviceState::Opening),
        ("failed", DeviceState::Failed),
        ("serving", DeviceState::Serving),
        ("ending", DeviceState::Ending),
        ("ended", DeviceState::Ended),
    ];
    text.family("genblk_device_info", "gauge", "What does not change while a device is served; always 1.");
    for device in devices {
        text.sample("genblk_device_info", &[("device", &device.name), ("image", &device.image)], 1);
    }
    text.family("genblk_device_state", "gauge", "1 for the state that the device is in, 0 for the others.");
    for device in devices {
        for (word, state) in states {
            let labels = [("device", device.name.as_str()), ("state", word)];
            text.sample("genblk_device_state", &labels, u8::from(device.state == state));
        }
    }
    text.family("genblk_device_size_bytes", "gauge", "Size of the disk.");
    for device in devices {
        if let Some(bytes) = device.image_bytes {
            text.sample("genblk_device_size_bytes", &[("device", &device.name)], bytes);
        }
    }
    text.family("genblk_device_front_end", "gauge", "Whether a virtual machine monitor is connected.");
    for device in devices {
        let connected = u8::from(device.front_end.is_some());
        text.sample("genblk_device_front_end", &[("device", &device.name)], connected);
    }
}

fn about_requests(text: &mut MetricsText, devices: &[DeviceStatistics]) {
    let name = "genblk_request_duration_seconds";
    text.family(name, "histogram", "Time from taking a request from its ring to its completion.");
    for device in devices {
        for requests in &device.requests {
            let labels = |served| {
                [("device", device.name.as_str()), ("operation", requests.operation.as_str()), ("served", served)]
            };
            if matches!(requests.operation.as_str(), "read" | "write") {
                text.histogram(name, &labels("memory"), &requests.from_memory);
            }
            text.histogram(name, &labels("store"), &requests.waited);
        }
    }
    type Counter = fn(&crate::control::wire::RequestStatistics) -> u64;
    let metrics: [(&str, &str, &str, Counter); 2] = [
        ("genblk_request_errors_total", "counter", "Requests that completed with an error.", |requests| {
            requests.errors
        }),
        ("genblk_requests_in_flight", "gauge", "Requests that were taken and have not completed.", |requests| {
            requests.in_flight
        }),
    ];
    for (name, kind, help, value) in metrics {
        text.family(name, kind, help);
        for device in devices {
            for requests in &device.requests {
                text.sample(name, &[("device", &device.name), ("operation", &requests.operation)], value(requests));
            }
        }
    }
    let metrics = [
        ("genblk_read_bytes_total", "read", "Bytes that guests read."),
        ("genblk_written_bytes_total", "write", "Bytes that guests wrote."),
        ("genblk_discarded_bytes_total", "discard", "Bytes that guests discarded."),
        ("genblk_zeroed_bytes_total", "write_zeroes", "Bytes that guests had zeroed."),
    ];
    for (name, operation, help) in metrics {
        text.family(name, "counter", help);
        for device in devices {
            for requests in device.requests.iter().filter(|requests| requests.operation == operation) {
                text.sample(name, &[("device", &device.name)], requests.bytes);
            }
        }
    }
}

fn about_caches(text: &mut MetricsText, devices: &[DeviceStatistics]) {
    let mut of = |name, kind, help, value| text.of_devices(devices, name, kind, help, value);
    of("genblk_cache_lookup_pages_total", "counter", "Pages of 4 KiB that reads asked for.", |device| {
        device.cache.hit_pages + device.cache.miss_pages
    });
    of("genblk_cache_hit_pages_total", "counter", "Of those, pages that were in memory.", |device| {
        device.cache.hit_pages
    });
    of(
        "genblk_cache_hole_pages_total",
        "counter",
        "Pages of holes, which need neither memory nor the image.",
        |device| device.cache.hole_pages,
    );
    of("genblk_cache_evicted_pages_total", "counter", "Pages that were evicted.", |device| device.cache.evicted_pages);
    of("genblk_readahead_pages_total", "counter", "Pages that were read ahead.", |device| device.cache.readahead_pages);
    of("genblk_readahead_used_pages_total", "counter", "Of those, pages that were then asked for.", |device| {
        device.cache.readahead_used_pages
    });
    of(
        "genblk_readahead_wasted_pages_total",
        "counter",
        "Of those, pages that were dropped or overwritten unread.",
        |device| device.cache.readahead_wasted_pages,
    );
    of("genblk_cache_size_bytes", "gauge", "Memory for pages.", |device| device.cache.frames * PAGE_BYTES);
    of("genblk_cache_free_bytes", "gauge", "Of it, memory that holds nothing.", |device| {
        device.cache.frames_free * PAGE_BYTES
    });
    of("genblk_cache_dirty_bytes", "gauge", "Data that is newer than the image.", |device| {
        device.cache.dirty_pages * PAGE_BYTES
    });
    of("genblk_cache_dirty_limit_bytes", "gauge", "The present limit of that.", |device| {
        device.cache.dirty_limit_pages * PAGE_BYTES
    });
    of("genblk_cache_metadata_bytes", "gauge", "Memory beside the pages.", |device| device.cache.metadata_bytes);
    text.family("genblk_request_waits_total", "counter", "Requests that had to wait before they could be admitted.");
    for device in devices {
        for (reason, count) in [("space", device.cache.stalls), ("dirty_limit", device.cache.throttled)] {
            text.sample("genblk_request_waits_total", &[("device", &device.name), ("reason", reason)], count);
        }
    }
}

fn about_store(text: &mut MetricsText, devices: &[DeviceStatistics]) {
    let name = "genblk_store_duration_seconds";
    text.family(name, "histogram", "Time of operations on the image.");
    for device in devices {
        for store in &device.stores {
            text.histogram(name, &[("device", &device.name), ("operation", &store.operation)], &store.latency);
        }
    }
    text.family("genblk_store_errors_total", "counter", "Operations on the image that failed.");
    for device in devices {
        for store in &device.stores {
            let labels = [("device", device.name.as_str()), ("operation", store.operation.as_str())];
            text.sample("genblk_store_errors_total", &labels, store.errors);
        }
    }
    for (name, operation, help) in [
        ("genblk_store_read_bytes_total", "read", "Bytes read from the image."),
        ("genblk_store_written_bytes_total", "write", "Bytes written to the image."),
    ] {
        text.family(name, "counter", help);
        for device in devices {
            for store in device.stores.iter().filter(|store| store.operation == operation) {
                text.sample(name, &[("device", &device.name)], store.bytes);
            }
        }
    }
    text.family("genblk_worker_busy_seconds_total", "counter", "Time of the worker threads in turns that found work.");
    for device in devices {
        for (index, worker) in device.workers.iter().enumerate() {
            let labels = [("device", device.name.as_str()), ("worker", &index.to_string())];
            text.sample("genblk_worker_busy_seconds_total", &labels, seconds(worker.busy_ns));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::counters::latency::bucket_of;

    #[test]
    fn a_histogram_counts_exactly_below_each_bound() {
        let mut latencies = Latencies { sum_ns: 2_003_023, max_ns: 2_000_000, ..Latencies::default() };
        for ns in [1000, 1023, 1000, 2_000_000] {
            latencies.counts[bucket_of(ns)] += 1;
        }
        let mut text = MetricsText::default();
        text.histogram("t", &[("device", "a\"b")], &Latency::from(&latencies));
        let lines: Vec<&str> = text.0.lines().collect();
        assert_eq!(lines[0], "t_bucket{device=\"a\\\"b\",le=\"0.000001024\"} 3");
        assert_eq!(lines[5], "t_bucket{device=\"a\\\"b\",le=\"0.001048576\"} 3");
        assert_eq!(lines[6], "t_bucket{device=\"a\\\"b\",le=\"0.004194304\"} 4");
        assert_eq!(lines[13], "t_bucket{device=\"a\\\"b\",le=\"+Inf\"} 4");
        assert_eq!(lines[14..], ["t_sum{device=\"a\\\"b\"} 0.002003023", "t_count{device=\"a\\\"b\"} 4"]);
    }

    #[test]
    fn a_daemon_that_is_not_there_is_a_metric() {
        let text = metrics(Path::new("/nonexistent/control.sock"));
        assert_eq!(text.lines().last(), Some("genblk_up 0"));
    }

    #[test]
    fn only_get_requests_for_the_metrics_get_them() {
        let target = |request: &str| request_target(&mut request.as_bytes()).unwrap();
        assert_eq!(target("GET /metrics?x=1 HTTP/1.1\r\nHost: a\r\n\r\n").as_deref(), Some("/metrics"));
        assert_eq!(target("GET / HTTP/1.1\r\n\r\n").as_deref(), Some("/"));
        assert_eq!(target("POST /metrics HTTP/1.1\r\n\r\n"), None);
        assert_eq!(target("GET /metrics"), None, "the head never ends");
        assert_eq!(target(&"x".repeat(2 * REQUEST_BYTES_MAX)), None);
    }
}
