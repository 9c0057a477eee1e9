//! The commands that query (`genblk list`, `genblk stat`, `genblk exporter`) or change a running daemon through its
//! control socket. They use only the interface of [`crate::control`].

mod attach;
mod change;
mod configure;
mod diagnosis;
mod events;
pub mod exporter;
mod freeze;
mod interval;
mod list;
mod sample;
mod stat;
mod table;
mod top;
mod warm;

use std::io;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::control::connection::VarlinkConnection;
use crate::control::wire::{MethodCall, MethodReply, NAME};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::socket::connect_to_path_without_waiting;

pub use attach::attach;
pub use change::{DeviceAction, change};
pub use configure::{config, reload, set};
pub use events::{EventOptions, events};
pub use freeze::{FreezeOptions, freeze};
pub use list::list;
pub use stat::{Numbers, StatOptions, View, stat};
pub use top::{TopOptions, top};
pub use warm::{WarmOptions, resident, warm};

/// How long the daemon may take to reply to a query, for which it never waits.
const REPLY_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest reply: the statistics of thousands of disks.
const REPLY_BYTES_MAX: usize = 64 << 20;
/// How often to try to connect to a daemon whose queue of connections is full.
const CONNECT_POLL: Duration = Duration::from_millis(20);

/// A connection to a daemon.
#[derive(Debug)]
pub struct ControlClient {
    connection: VarlinkConnection,
    shown: String,
}

impl ControlClient {
    /// Connects to the control socket at `path`.
    ///
    /// # Errors
    /// [`ErrorKind::NoDaemon`] if no daemon listens there, and [`ErrorKind::Control`] if it cannot be connected to.
    pub fn connect(path: &Path) -> Result<Self> {
        let client = Self::open(path, Instant::now() + REPLY_TIMEOUT)?;
        let set = client.connection.stream().set_read_timeout(Some(REPLY_TIMEOUT));
        set.map_err(|e| client.failed("cannot wait for replies", e))?;
        Ok(client)
    }

    /// As [`ControlClient::connect`], but every call ends at `until`, whatever the daemon does.
    ///
    /// # Errors
    /// As [`ControlClient::connect`].
    pub fn connect_until(path: &Path, until: Instant) -> Result<Self> {
        let Self { connection, shown } = Self::open(path, until)?;
        Ok(Self { connection: connection.with_deadline(until), shown })
    }

    fn open(path: &Path, until: Instant) -> Result<Self> {
        let shown = path.display().to_string();
        let stream = loop {
            match connect_to_path_without_waiting(path) {
                // The daemon's queue of connections is full.
                Err(e) if e.kind() == io::ErrorKind::WouldBlock && Instant::now() < until => {
                    thread::sleep(CONNECT_POLL);
                }
                connected => break connected,
            }
        };
        let failed = |e: io::Error| match e.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Error::io(
                ErrorKind::NoDaemon,
                format!(
                    "no daemon listens on {shown} (its configuration needs a [control] table with a socket; --socket \
                     or $GENBLK_CONTROL names another one)"
                ),
                e,
            ),
            io::ErrorKind::PermissionDenied => Error::io(
                ErrorKind::Control,
                format!(
                    "cannot connect to the daemon's control socket {shown} (root, the daemon's user and the group of \
                     its [control] table may)"
                ),
                e,
            ),
            _ => Error::io(ErrorKind::Control, format!("cannot connect to the daemon's control socket {shown}"), e),
        };
        let connection = VarlinkConnection::new(stream.map_err(failed)?).with_longest_message(REPLY_BYTES_MAX);
        Ok(Self { connection, shown })
    }

    /// Calls a method and returns its results.
    ///
    /// # Errors
    /// [`ErrorKind::Control`] if the daemon does not reply, or replies with an error.
    pub fn call<T: DeserializeOwned>(&mut self, method: &str, parameters: &impl Serialize) -> Result<T> {
        let results = self.call_raw(method, parameters)?;
        let other = |e: serde_json::Error| self.failed(&format!("an unsupported reply to {method}"), e.into());
        serde_json::from_value(results).map_err(other)
    }

    /// As [`ControlClient::call`], but returns the results unparsed.
    ///
    /// # Errors
    /// As [`ControlClient::call`].
    pub fn call_raw(&mut self, method: &str, parameters: &impl Serialize) -> Result<Value> {
        let parameters = serde_json::to_value(parameters).expect("the types of the interface are JSON");
        self.start_call(method, parameters, None)
    }

    /// Calls a method that may take long, and returns its last results; `report` gets the earlier ones.
    ///
    /// # Errors
    /// As [`ControlClient::call`].
    pub fn call_long(&mut self, method: &str, parameters: &Value, report: impl Fn(&Value)) -> Result<Value> {
        let stream = self.connection.stream();
        stream.set_read_timeout(None).map_err(|e| self.failed("cannot wait for replies", e))?;
        // With `more`, a freeze would send another reply at its end.
        let more = (method != "Freeze").then_some(true);
        let mut reply = self.send_call(method, parameters.clone(), more)?;
        while reply.continues == Some(true) {
            report(&reply.parameters);
            reply = self.next_reply(Ok(()))?;
        }
        Ok(reply.parameters)
    }

    /// Calls a method; `take` gets the results of its reply, or with `more` of each of its replies, until it returns
    /// false or the daemon ends.
    ///
    /// # Errors
    /// As [`ControlClient::call`], and those of `take`.
    pub fn stream(
        &mut self,
        method: &str,
        parameters: &Value,
        more: bool,
        take: impl Fn(&Value) -> Result<bool>,
    ) -> Result<()> {
        let waits = self.connection.stream().set_read_timeout(if more { None } else { Some(REPLY_TIMEOUT) });
        waits.map_err(|e| self.failed("cannot wait for replies", e))?;
        let mut reply = self.send_call(method, parameters.clone(), more.then_some(true))?;
        while take(&reply.parameters)? && reply.continues == Some(true) {
            reply = self.next_reply(Ok(()))?;
        }
        Ok(())
    }

    /// Calls a method that has more than one reply, and returns the results of the first. The method ends with this
    /// connection.
    ///
    /// # Errors
    /// As [`ControlClient::call`].
    pub fn call_first(&mut self, method: &str, parameters: &Value) -> Result<Value> {
        self.connection.stream().set_read_timeout(None).map_err(|e| self.failed("cannot wait for replies", e))?;
        self.start_call(method, parameters.clone(), Some(true))
    }

    fn start_call(&mut self, method: &str, parameters: Value, more: Option<bool>) -> Result<Value> {
        self.send_call(method, parameters, more).map(|reply| reply.parameters)
    }

    fn send_call(&mut self, method: &str, parameters: Value, more: Option<bool>) -> Result<MethodReply> {
        let call = MethodCall { method: format!("{NAME}.{method}"), parameters: Some(parameters), more, oneway: None };
        // A daemon that refuses the connection has sent the reason and closed it.
        let sent = self.connection.send(&call);
        self.next_reply(sent)
    }

    /// The next reply to a call; `sent` is the result of sending it.
    fn next_reply(&mut self, sent: io::Result<()>) -> Result<MethodReply> {
        let reply: Option<MethodReply> = match (self.connection.receive(), sent) {
            (Ok(reply), _) => reply,
            (Err(e), Ok(())) | (Err(_), Err(e)) => return Err(self.failed("no reply", e)),
        };
        let reply = reply.ok_or_else(|| self.failed("no reply", io::ErrorKind::UnexpectedEof.into()))?;
        match reply.error {
            None => Ok(reply),
            Some(error) => {
                let is_configuration = error.strip_prefix(NAME) == Some(".Invalid");
                let kind = if is_configuration { ErrorKind::Config } else { ErrorKind::Control };
                Err(Error::new(kind, in_words(&error, &reply.parameters)))
            }
        }
    }

    fn failed(&self, what: &str, e: io::Error) -> Error {
        if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) {
            return Error::new(ErrorKind::Control, format!("the daemon at {} does not reply", self.shown));
        }
        Error::io(ErrorKind::Control, format!("the daemon at {}: {what}", self.shown), e)
    }
}

/// An error of the interface in words.
fn in_words(error: &str, parameters: &Value) -> String {
    let text = |name: &str| visible(parameters[name].as_str().unwrap_or_default());
    match error.strip_prefix(NAME).and_then(|rest| rest.strip_prefix('.')) {
        Some("NoSuchDevice") => {
            format!("{}: no such device; devices: {}", text("device"), joined(&parameters["devices"]))
        }
        Some("Busy") if parameters["what"].is_string() => format!("{}: in progress; try again", text("what")),
        Some("Busy") => format!("the daemon has {} control connections already; try again", parameters["connections"]),
        Some("DeviceExists") => {
            format!("{}: already exists with different {}", text("device"), joined(&parameters["differs"]))
        }
        Some("NeedsReattach") => format!(
            "{}: {} takes effect after detach and attach: \"genblk detach {0}\", change the file, and \"genblk \
             attach FILE {0}\"",
            text("device"),
            joined(&parameters["keys"])
        ),
        Some("InUse") => format!("{}: in use by {}; --force detaches it anyway", text("device"), text("by")),
        Some("Invalid") => {
            let problems = parameters["problems"].as_array().map(Vec::as_slice).unwrap_or_default();
            problems.iter().filter_map(Value::as_str).map(visible).collect::<Vec<_>>().join("\n")
        }
        Some("NotWritten") => format!(
            "{}: dirty data cannot be written to the image ({}); the disk is still attached; --force detaches it and \
             keeps the cache for \"genblk recover\"",
            text("device"),
            text("fault")
        ),
        Some("Frozen") => format!("{}: is frozen; \"genblk thaw {0}\" ends that", text("device")),
        Some("ImageFault") => {
            format!("{}: the image failed ({}); {}", text("device"), text("fault"), text("detail"))
        }
        Some("Refused") => format!("{}: {}", text("what"), text("why")),
        Some("PermissionDenied") => format!("{} requires {}", text("method"), text("needs")),
        _ => format!("the daemon replied with {}: {}", visible(error), visible(&parameters.to_string())),
    }
}

/// The texts of an array, in one line.
fn joined(array: &Value) -> String {
    let texts = array.as_array().map(Vec::as_slice).unwrap_or_default();
    texts.iter().filter_map(Value::as_str).map(visible).collect::<Vec<_>>().join(", ")
}

/// A text of the daemon without control characters of terminals: a disk process, which a guest may control, may have
/// written it.
fn visible(text: &str) -> String {
    text.chars().map(|char| if char.is_control() { '?' } else { char }).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn errors_of_the_daemon_print_as_sentences() {
        let text = in_words("io.genblk.Control.NoSuchDevice", &json!({"device": "vm1", "devices": ["db", "golden"]}));
        assert_eq!(text, "vm1: no such device; devices: db, golden");
        let text = in_words("org.varlink.service.MethodNotFound", &json!({"method": "x"}));
        assert_eq!(text, "the daemon replied with org.varlink.service.MethodNotFound: {\"method\":\"x\"}");
    }

    #[test]
    fn control_characters_in_texts_of_the_daemon_are_escaped() {
        let trick = "a\u{1b}[2J\r\u{9b}31m";
        let replies = [
            ("io.genblk.Control.Refused", json!({"what": trick, "why": trick})),
            ("io.genblk.Control.ImageFault", json!({"device": "vm1", "fault": trick, "detail": trick})),
            ("io.genblk.Control.NoSuchDevice", json!({"device": trick, "devices": [trick]})),
            ("io.genblk.Control.Invalid", json!({"problems": [trick]})),
            (trick, json!({"x": trick})),
        ];
        for (error, parameters) in replies {
            let text = in_words(error, &parameters);
            assert!(text.contains("a?[2J") && !text.chars().any(char::is_control), "{text:?}");
        }
    }
}
