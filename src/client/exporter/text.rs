//! Metrics as text, in both formats that scrapers request: the Prometheus text format 0.0.4
//! (<https://prometheus.io/docs/instrumenting/exposition_formats/>) and OpenMetrics 1.0
//! (<https://prometheus.io/docs/specs/om/open_metrics_spec/>). They differ in the name of a counter's family, in what
//! is escaped in a help text, and in the last line.

use std::fmt::{self, Write as _};

use crate::control::wire::Latency;
use crate::counters::latency::{Latencies, bound_of};

/// The upper bounds of the histograms in nanoseconds, from 1 us to 17 s. They are powers of two, which are also bounds
/// of genblk's own buckets, so the counts are exact.
const BOUNDS_NS: [u64; 13] = {
    let (mut bounds, mut at) = ([1 << 10; 13], 1);
    while at < bounds.len() {
        bounds[at] = bounds[at - 1] * 4;
        at += 1;
    }
    bounds
};

/// A text format.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TextFormat {
    /// Prometheus text format 0.0.4.
    #[default]
    Prometheus,
    /// OpenMetrics 1.0.
    OpenMetrics,
}

impl TextFormat {
    /// Its media type.
    pub fn media_type(self) -> &'static str {
        match self {
            Self::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }

    /// The format for a client that sent this Accept header (RFC 9110, section 12.5.1): the one with the greater
    /// weight; OpenMetrics if both have the same.
    pub fn accepted(header: &str) -> Self {
        let (mut open_metrics, mut plain) = (0.0f64, 0.0f64);
        for range in header.split(',') {
            let mut parts = range.split(';').map(str::trim);
            let media_type = parts.next().unwrap_or_default().to_ascii_lowercase();
            let (mut weight, mut version) = (1.0, None);
            for (name, value) in parts.filter_map(|part| part.split_once('=')) {
                match name.trim().to_ascii_lowercase().as_str() {
                    "q" => weight = value.trim().parse().unwrap_or(0.0),
                    "version" => version = Some(value.trim().trim_matches('"')),
                    _ => {}
                }
            }
            match media_type.as_str() {
                "application/openmetrics-text" if matches!(version, None | Some("1.0.0")) => {
                    open_metrics = open_metrics.max(weight);
                }
                "text/plain" | "text/*" | "*/*" => plain = plain.max(weight),
                _ => {}
            }
        }
        if open_metrics > 0.0 && open_metrics >= plain { Self::OpenMetrics } else { Self::Prometheus }
    }
}

/// The type of a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum MetricType {
    Counter,
    Gauge,
    Histogram,
    /// A sum and a count.
    Summary,
}

impl MetricType {
    fn word(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
            Self::Summary => "summary",
        }
    }
}

/// The labels of a sample: names and values.
pub(super) type Labels<'a> = &'a [(&'a str, &'a str)];

/// The text of the metrics, written one after another.
#[derive(Debug, Default)]
pub(super) struct MetricsText {
    text: String,
    format: TextFormat,
}

impl MetricsText {
    /// An empty text in this format.
    pub fn new(format: TextFormat) -> Self {
        Self { text: String::new(), format }
    }

    /// Begins the samples of a metric.
    pub fn family(&mut self, name: &str, kind: MetricType, help: &str) {
        let mut help = help.replace('\\', "\\\\").replace('\n', "\\n");
        let mut family = name;
        if self.format == TextFormat::OpenMetrics {
            help = help.replace('"', "\\\"");
            if kind == MetricType::Counter {
                family = name.strip_suffix("_total").expect("the name of a counter ends so");
            }
        }
        let _ = write!(self.text, "# HELP {family} {help}\n# TYPE {family} {}\n", kind.word());
    }

    /// Adds a sample.
    pub fn sample(&mut self, name: &str, labels: Labels<'_>, value: impl fmt::Display) {
        self.text += name;
        for (index, (label, value)) in labels.iter().enumerate() {
            let escaped = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            let _ = write!(self.text, "{}{label}=\"{escaped}\"", if index == 0 { '{' } else { ',' });
        }
        let _ = writeln!(self.text, "{} {value}", if labels.is_empty() { "" } else { "}" });
    }

    /// Adds the samples of a histogram, or only its sum and its count.
    pub fn latencies(&mut self, name: &str, labels: Labels<'_>, latency: &Latency, with_buckets: bool) {
        if with_buckets {
            let latencies = Latencies::from(latency);
            let below = |bound| -> u64 {
                let counts = latencies.counts.iter().enumerate();
                counts
                    .filter(|(bucket, _)| bound_of(*bucket) <= bound)
                    .fold(0, |sum: u64, (_, count)| sum.saturating_add(*count))
            };
            let bucket = format!("{name}_bucket");
            for bound in BOUNDS_NS {
                let le = seconds(bound).to_string();
                self.sample(&bucket, &[labels, &[("le", &le)]].concat(), below(bound));
            }
            self.sample(&bucket, &[labels, &[("le", "+Inf")]].concat(), latency.count);
        }
        self.sample(&format!("{name}_sum"), labels, seconds(latency.sum_ns));
        self.sample(&format!("{name}_count"), labels, latency.count);
    }

    /// The whole text.
    pub fn finish(mut self) -> String {
        if self.format == TextFormat::OpenMetrics {
            self.text += "# EOF\n";
        }
        self.text
    }
}

/// Nanoseconds in seconds.
#[allow(clippy::cast_precision_loss, reason = "a double has 53 bits: exact for 104 days")]
pub(super) fn seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::counters::latency::bucket_of;

    fn latency(times: &[u64]) -> Latency {
        let mut latencies = Latencies::default();
        for &ns in times {
            latencies.counts[bucket_of(ns)] += 1;
            latencies.sum_ns += ns;
            latencies.max_ns = latencies.max_ns.max(ns);
        }
        Latency::from(&latencies)
    }

    #[test]
    fn a_histogram_counts_exactly_below_each_bound() {
        let mut text = MetricsText::default();
        text.latencies("t", &[("device", "a\"b")], &latency(&[1000, 1023, 1000, 2_000_000]), true);
        let text = text.finish();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "t_bucket{device=\"a\\\"b\",le=\"0.000001024\"} 3");
        assert_eq!(lines[5], "t_bucket{device=\"a\\\"b\",le=\"0.001048576\"} 3");
        assert_eq!(lines[6], "t_bucket{device=\"a\\\"b\",le=\"0.004194304\"} 4");
        assert_eq!(lines[13], "t_bucket{device=\"a\\\"b\",le=\"+Inf\"} 4");
        assert_eq!(lines[14..], ["t_sum{device=\"a\\\"b\"} 0.002003023", "t_count{device=\"a\\\"b\"} 4"]);
    }

    #[test]
    fn a_histogram_without_buckets_has_only_a_sum_and_a_count() {
        let mut text = MetricsText::default();
        text.latencies("t", &[], &latency(&[1000, 2000]), false);
        assert_eq!(text.finish(), "t_sum 0.000003\nt_count 2\n");
    }

    #[test]
    fn the_metrics_formats_differ_in_counter_names_and_the_last_line() {
        let text = |format| {
            let mut text = MetricsText::new(format);
            text.family("a_total", MetricType::Counter, "What \"a\" did\\n.");
            text.sample("a_total", &[], 7);
            text.finish()
        };
        assert_eq!(
            text(TextFormat::Prometheus),
            "# HELP a_total What \"a\" did\\\\n.\n# TYPE a_total counter\na_total 7\n"
        );
        assert_eq!(
            text(TextFormat::OpenMetrics),
            "# HELP a What \\\"a\\\" did\\\\n.\n# TYPE a counter\na_total 7\n# EOF\n"
        );
    }

    #[test]
    fn the_accept_header_selects_the_metrics_format() {
        let prometheus = "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,\
                          text/plain;version=0.0.4;q=0.5,*/*;q=0.1";
        for header in [prometheus, "application/openmetrics-text", "text/plain, Application/OpenMetrics-Text; Q=1.0"] {
            assert_eq!(TextFormat::accepted(header), TextFormat::OpenMetrics, "{header}");
        }
        for header in [
            "",
            "*/*",
            "text/plain",
            "application/openmetrics-text;version=0.0.1",
            "application/openmetrics-text;version=2.0.0, */*",
            "application/openmetrics-text;q=0.3, text/plain;q=0.4",
            "application/openmetrics-text;q=0",
            "application/openmetrics-text;q=none",
            ";;;=,,q",
        ] {
            assert_eq!(TextFormat::accepted(header), TextFormat::Prometheus, "{header}");
        }
    }
}
