//! `genblk exporter`: the daemon's statistics as Prometheus metrics, once or over HTTP. It is a separate process, so
//! the daemon has neither an HTTP parser nor a TCP socket.

mod http;
mod listener;
mod metrics;
mod text;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::sample::DaemonSample;
use crate::error::Result;

use text::MetricsText;

pub use http::serve;
pub use listener::ListenAddress;
pub use text::TextFormat;

/// How long the daemon may take to reply to a scrape.
const SCRAPE_TIMEOUT: Duration = Duration::from_secs(2);

/// Options of `genblk exporter`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExporterOptions {
    /// The control socket.
    pub socket: PathBuf,
    /// Whether histograms have buckets, or only a sum and a count.
    pub with_buckets: bool,
}

/// The current metrics, and the error if the daemon could not be queried, which is also a metric (`genblk_up 0`).
pub fn metrics(options: &ExporterOptions, format: TextFormat) -> (String, Result<()>) {
    let sample = DaemonSample::take(&options.socket, Instant::now() + SCRAPE_TIMEOUT);
    let mut text = MetricsText::new(format);
    metrics::write(&mut text, sample.as_ref().ok(), options.with_buckets);
    (text.finish(), sample.map(drop))
}
