//! HTTP for scrapers: only GET /metrics, one request per connection. The number of clients, the time that each may take
//! and the amount that each may send are bounded.

use std::io::{self, Read, Write};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use super::listener::{ListenAddress, ScrapeListener, ScrapeStream};
use super::text::TextFormat;
use super::{ExporterOptions, metrics};
use crate::error::Result;

/// Most connections at a time. Each may hold a connection to the daemon, which has 16.
const CONNECTIONS_MAX: usize = 8;
/// How long a client may take to send its request, and again to read the reply.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a client above the limit may take to read its refusal: the others wait meanwhile.
const BUSY_TIMEOUT: Duration = Duration::from_millis(20);
/// Longest head of a request.
const HEAD_BYTES_MAX: usize = 8 << 10;
/// Most header fields of a request.
const FIELDS_MAX: usize = 64;
/// How much more of a refused request is read, so that its client gets the reply and not a reset.
const REST_BYTES_MAX: u64 = 256 << 10;
/// How long reading that may take.
const REST_TIMEOUT: Duration = Duration::from_millis(500);

/// Serves metrics until the process is killed.
///
/// # Errors
/// [`crate::error::ErrorKind::System`] if the address cannot be listened on.
pub fn serve(address: &ListenAddress, options: &ExporterOptions) -> Result<()> {
    let listener = ScrapeListener::open(address)?;
    let exporter = Arc::new(Exporter { options: options.clone(), last_error: Mutex::default() });
    let open = Arc::new(AtomicUsize::new(0));
    loop {
        let Ok(stream) = listener.accept() else {
            // The process has no descriptor left, or the client has disconnected.
            thread::sleep(Duration::from_millis(100));
            continue;
        };
        let mut client = ScrapeClient { stream, until: Instant::now() + CLIENT_TIMEOUT };
        // Only this thread increments the count.
        if open.load(Ordering::Relaxed) >= CONNECTIONS_MAX {
            client.until = Instant::now() + BUSY_TIMEOUT;
            let _ = client.reply("503 Service Unavailable", "", "too many connections\n");
            continue;
        }
        open.fetch_add(1, Ordering::Relaxed);
        let (exporter, count) = (Arc::clone(&exporter), Arc::clone(&open));
        let serving = move || {
            // It fails if the client has disconnected.
            let _ = exporter.serve(&mut client);
            count.fetch_sub(1, Ordering::Relaxed);
        };
        if thread::Builder::new().name("scrape".to_owned()).spawn(serving).is_err() {
            open.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

struct Exporter {
    options: ExporterOptions,
    /// Why the last query of the daemon failed.
    last_error: Mutex<Option<String>>,
}

impl Exporter {
    fn serve(&self, client: &mut ScrapeClient) -> io::Result<()> {
        let format = match client.request()? {
            ScrapeRequest::Metrics(format) => format,
            ScrapeRequest::Other => return client.refuse("404 Not Found", "", "the metrics are at /metrics\n"),
            ScrapeRequest::Method => {
                return client.refuse(
                    "405 Method Not Allowed",
                    "Allow: GET\r\n",
                    "the exporter accepts only GET requests\n",
                );
            }
            ScrapeRequest::TooLong => {
                return client.refuse("431 Request Header Fields Too Large", "", "the request header is too long\n");
            }
            ScrapeRequest::Invalid => return client.refuse("400 Bad Request", "", "not an HTTP request\n"),
        };
        let (text, asked) = metrics(&self.options, format);
        self.report(asked.err().map(|e| e.to_string()));
        client.until = Instant::now() + CLIENT_TIMEOUT;
        client.reply("200 OK", &format!("Content-Type: {}\r\n", format.media_type()), &text)
    }

    /// Reports once on standard error why the daemon cannot be queried.
    fn report(&self, error: Option<String>) {
        let mut last = self.last_error.lock().expect("no thread panics with it locked");
        if *last != error {
            match &error {
                Some(why) => eprintln!("genblk: exporter: {why}"),
                None => eprintln!("genblk: exporter: the daemon replies again"),
            }
            *last = error;
        }
    }
}

/// A client's request.
#[derive(Debug, PartialEq, Eq)]
enum ScrapeRequest {
    Metrics(TextFormat),
    /// Another target.
    Other,
    /// Another method.
    Method,
    TooLong,
    Invalid,
}

/// A connection with a deadline.
struct ScrapeClient {
    stream: Box<dyn ScrapeStream>,
    until: Instant,
}

impl ScrapeClient {
    /// Bounds how long the next call may wait.
    fn bound_next_call(&self) -> io::Result<()> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.stream.set_timeouts(left)
    }

    fn request(&mut self) -> io::Result<ScrapeRequest> {
        let mut head = Vec::new();
        loop {
            if let Some(request) = parse(&head) {
                return Ok(request);
            }
            let mut chunk = [0; 1024];
            self.bound_next_call()?;
            match self.stream.read(&mut chunk)? {
                0 => return Ok(ScrapeRequest::Invalid),
                count => head.extend_from_slice(&chunk[..count]),
            }
        }
    }

    fn reply(&mut self, status: &str, fields: &str, body: &str) -> io::Result<()> {
        let head = format!("HTTP/1.1 {status}\r\n{fields}Content-Length: {}\r\nConnection: close\r\n\r\n", body.len());
        let bytes = [head.as_bytes(), body.as_bytes()].concat();
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            self.bound_next_call()?;
            match self.stream.write(rest) {
                Ok(count) => rest = &rest[count..],
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Replies with an error, and reads the rest of the request: if a connection is closed with unread bytes, the
    /// kernel drops the reply.
    fn refuse(&mut self, status: &str, fields: &str, why: &str) -> io::Result<()> {
        self.until = Instant::now() + REST_TIMEOUT;
        self.reply(status, &format!("Content-Type: text/plain; charset=utf-8\r\n{fields}"), why)?;
        self.stream.end_writing()?;
        let (mut read, mut chunk) = (0, [0; 4096]);
        while read < REST_BYTES_MAX {
            self.bound_next_call()?;
            match self.stream.read(&mut chunk)? {
                0 => break,
                count => read += count as u64,
            }
        }
        Ok(())
    }
}

/// The request at the start of `head`; `None` if it is incomplete.
fn parse(head: &[u8]) -> Option<ScrapeRequest> {
    let mut fields = [httparse::EMPTY_HEADER; FIELDS_MAX];
    let mut request = httparse::Request::new(&mut fields);
    match request.parse(head) {
        Ok(httparse::Status::Partial) if head.len() <= HEAD_BYTES_MAX => return None,
        Ok(httparse::Status::Partial) | Err(httparse::Error::TooManyHeaders) => return Some(ScrapeRequest::TooLong),
        Ok(httparse::Status::Complete(_)) => {}
        Err(_) => return Some(ScrapeRequest::Invalid),
    }
    // Scrapers may add parameters.
    let target = request.path.unwrap_or_default().split('?').next().unwrap_or_default();
    let accept = || {
        let lines = request.headers.iter().filter(|field| field.name.eq_ignore_ascii_case("accept"));
        lines.map(|field| String::from_utf8_lossy(field.value)).collect::<Vec<_>>().join(",")
    };
    Some(match (request.method, target) {
        (Some("GET"), "/metrics") => ScrapeRequest::Metrics(TextFormat::accepted(&accept())),
        (Some("GET"), _) => ScrapeRequest::Other,
        _ => ScrapeRequest::Method,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_get_request_for_the_metrics_path_returns_metrics() {
        let plain = ScrapeRequest::Metrics(TextFormat::Prometheus);
        assert_eq!(parse(b"GET /metrics?x=1 HTTP/1.1\r\nHost: a\r\n\r\n"), Some(plain));
        let open = b"GET /metrics HTTP/1.1\r\nACCEPT: a/b\r\nAccept: application/openmetrics-text\r\n\r\n";
        assert_eq!(parse(open), Some(ScrapeRequest::Metrics(TextFormat::OpenMetrics)));
        assert_eq!(parse(b"GET / HTTP/1.1\r\n\r\n"), Some(ScrapeRequest::Other));
        assert_eq!(parse(b"POST /metrics HTTP/1.1\r\n\r\n"), Some(ScrapeRequest::Method));
        assert_eq!(parse(b"GET /metrics"), None, "more may come");
        assert_eq!(parse(b"\x16\x03\x01 hello\r\n\r\n"), Some(ScrapeRequest::Invalid));
        let endless = [b"GET /metrics HTTP/1.1\r\nA: ".as_slice(), &[b'x'; HEAD_BYTES_MAX]].concat();
        assert_eq!(parse(&endless), Some(ScrapeRequest::TooLong));
        let many = format!("GET /metrics HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(FIELDS_MAX + 1));
        assert_eq!(parse(many.as_bytes()), Some(ScrapeRequest::TooLong));
    }
}
