//! The server of the control socket: accepts connections and executes their calls. Each connection has a thread. The
//! number of connections, the length of a message, and the time in which a client must read a reply are bounded.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::mpsc::RecvTimeoutError;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use log::debug;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::change::{BegunChange, Change, ChangeReply, InvalidCall, READ_ONLY_METHODS, Refusal};
use super::connection::VarlinkConnection;
use super::events::EventLog;
use super::permits::{Caller, Permits};
use super::wire::{
    Description, DeviceStatistics, DeviceStatus, Devices, INTERFACE, ListParameters, MethodCall, MethodReply, NAME,
    Statistics, StatisticsParameters, WatchParameters, read_parameters, value,
};
use crate::sys::process::effective_uid;
use crate::sys::socket::peer;

/// After this time without a call, the connection of a client without the right to make changes is closed.
const IDLE_MAX: Duration = Duration::from_secs(30);
/// How long a client may take to read a reply.
const SEND_TIMEOUT: Duration = Duration::from_secs(10);
/// Bounds of the interval of `Statistics`, and its default.
const INTERVAL_MS: std::ops::RangeInclusive<u64> = 100..=3_600_000;
const INTERVAL_MS_DEFAULT: u64 = 1000;
/// How deep a message may be nested.
const DEPTH_MAX: usize = 16;
/// How often to check whether the client of a change has disconnected.
const DISCONNECT_POLL: Duration = Duration::from_millis(100);

/// The daemon, as the control socket shows and changes it. No method waits.
pub trait Host: Send + Sync + 'static {
    /// The daemon's description.
    fn describe(&self) -> Description;
    /// All devices, in the order of the configuration.
    fn devices(&self) -> Vec<DeviceStatus>;
    /// The current configuration of the devices for which `wanted` holds, as a document.
    fn configuration(&self, wanted: &dyn Fn(&str) -> bool) -> String;
    /// Begins a change on a separate thread. `accepts_progress`: the client accepts more than one reply.
    fn begin(&self, change: Change, accepts_progress: bool) -> BegunChange;
    /// The statistics of the devices for which `wanted` holds.
    fn statistics(&self, wanted: &dyn Fn(&str) -> bool) -> Vec<DeviceStatistics>;
    /// The log of events.
    fn events(&self) -> &EventLog;
}

/// Serves connections until the listener fails, which it does when the process shuts it down.
///
/// # Errors
/// Errors of accept(2).
pub fn serve(listener: &UnixListener, host: &Arc<dyn Host>) -> io::Result<()> {
    let permits = Arc::new(Permits::default());
    loop {
        let (stream, _) = match listener.accept() {
            Ok(accepted) => accepted,
            Err(e)
                if matches!(
                    e.raw_os_error(),
                    Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ECONNABORTED)
                ) =>
            {
                // The connection waits in the backlog until a descriptor is free.
                thread::sleep(Duration::from_millis(100));
                continue;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
        };
        let caller = caller(&stream);
        let Some(place) = permits.connection(caller) else {
            refuse(stream, caller);
            continue;
        };
        let permits = Arc::clone(&permits);
        let host = Arc::clone(host);
        let serving = move || {
            let _place = place;
            if let Err(e) = serve_connection(stream, &*host, (caller, &permits), IDLE_MAX) {
                debug!("a control connection ended: {e}");
            }
        };
        if let Err(e) = thread::Builder::new().name("control".to_owned()).spawn(serving) {
            debug!("cannot start a thread for a control connection: {e}");
        }
    }
}

/// Refuses a client because there are too many. It gets the reply before its first call.
fn refuse(stream: UnixStream, caller: Caller) {
    let (places, _) = caller.connection_limits();
    let _ = stream.set_nonblocking(true);
    let _ = VarlinkConnection::new(stream).send(&error("Busy", json!({ "connections": places })));
}

/// Serves a connection until the client closes it. A client without the right to make changes is disconnected after
/// `idle_max` without a complete call.
fn serve_connection(
    stream: UnixStream,
    host: &dyn Host,
    (caller, permits): (Caller, &Arc<Permits>),
    idle_max: Duration,
) -> io::Result<()> {
    let may_change = caller.may_change;
    let mut connection = VarlinkConnection::new(stream);
    loop {
        connection.set_deadline((!may_change).then(|| Instant::now() + idle_max))?;
        let Some(message) = connection.receive::<Value>()? else { return Ok(()) };
        connection.set_deadline(None)?;
        connection.stream().set_write_timeout(Some(SEND_TIMEOUT))?;
        let call = match parse_call(&message) {
            Ok(call) => call,
            Err(error) => {
                connection.send(&error)?;
                continue;
            }
        };
        let oneway = call.oneway == Some(true);
        let more = call.more == Some(true);
        match (method(host, &call, may_change), more) {
            (Ok(Method::Change(change)), _) => send_replies(&mut connection, &host.begin(change, more), oneway)?,
            _ if oneway => {}
            (Ok(Method::Once(results)), _) => {
                connection.send(&MethodReply { parameters: results, ..MethodReply::default() })?;
            }
            (Ok(Method::Statistics(parameters)), false) => {
                connection
                    .send(&MethodReply { parameters: statistics(host, &parameters), ..MethodReply::default() })?;
            }
            (Ok(Method::Watch(parameters)), false) => {
                let (watched, _) = host.events().since(parameters.since.unwrap_or(0), parameters.device.as_deref());
                connection.send(&MethodReply { parameters: value(&watched), ..MethodReply::default() })?;
            }
            (Ok(stream), true) => {
                // Hold the permit as long as replies are sent.
                let Some(_permit) = permits.stream(caller) else {
                    connection.send(&error("Busy", json!({ "what": "as many streams as a user may have" })))?;
                    continue;
                };
                return match stream {
                    Method::Watch(parameters) => stream_events(&mut connection, host, &parameters),
                    Method::Statistics(parameters) => stream_statistics(&mut connection, host, &parameters),
                    Method::Once(_) | Method::Change(_) => unreachable!("they have their own arms"),
                };
            }
            (Err(error), _) => connection.send(&error)?,
        }
    }
}

/// The call in a message.
fn parse_call(message: &Value) -> Result<MethodCall, MethodReply> {
    if depth(message) > DEPTH_MAX {
        return Err(invalid_parameter(&format!("the message is nested more than {DEPTH_MAX} levels deep")));
    }
    read_parameters(message).map_err(|parameter| invalid_parameter(&parameter))
}

/// How deep a value is nested.
fn depth(value: &Value) -> usize {
    let within = match value {
        Value::Array(values) => values.iter().map(depth).max(),
        Value::Object(members) => members.values().map(depth).max(),
        _ => return 0,
    };
    within.unwrap_or(0) + 1
}

/// A method with valid parameters.
enum Method {
    /// A method with one reply: its results.
    Once(Value),
    Statistics(StatisticsParameters),
    Watch(WatchParameters),
    Change(Change),
}

/// The client of a connection. Root and the daemon's own user may make changes.
fn caller(stream: &UnixStream) -> Caller {
    let uid = peer(stream).map_or(u32::MAX, |peer| peer.uid);
    Caller { uid, may_change: uid == 0 || uid == effective_uid() }
}

/// Sends the replies to a change, until the last one or until the client disconnects.
fn send_replies(connection: &mut VarlinkConnection, begun: &BegunChange, is_oneway: bool) -> io::Result<()> {
    loop {
        let reply = match begun.steps.recv_timeout(DISCONNECT_POLL) {
            Ok(ChangeReply::More(parameters)) => MethodReply { parameters, continues: Some(true), error: None },
            Ok(ChangeReply::Last(Ok(parameters))) => MethodReply { parameters, ..MethodReply::default() },
            Ok(ChangeReply::Last(Err(Refusal { error: name, parameters }))) => error(name, parameters),
            Err(RecvTimeoutError::Timeout) if connection.has_ended() => return Err(io::ErrorKind::BrokenPipe.into()),
            Err(RecvTimeoutError::Timeout) => continue,
            Err(RecvTimeoutError::Disconnected) => return Err(io::Error::other("a change ended without a reply")),
        };
        let is_last = reply.continues.is_none();
        if !is_oneway {
            connection.send(&reply)?;
        }
        if is_last {
            return Ok(());
        }
    }
}

fn method(host: &dyn Host, call: &MethodCall, may_change: bool) -> Result<Method, MethodReply> {
    let once = |results: Value| Ok(Method::Once(results));
    match call.method.as_str() {
        "org.varlink.service.GetInfo" => once(json!({
            "vendor": "genblk", "product": "genblk", "version": env!("CARGO_PKG_VERSION"), "url": "",
            "interfaces": ["org.varlink.service", NAME],
        })),
        "org.varlink.service.GetInterfaceDescription" => {
            let wanted: InterfaceParameters = parameters(call)?;
            match wanted.interface.as_str() {
                NAME => once(json!({ "description": INTERFACE })),
                "org.varlink.service" => once(json!({ "description": SERVICE_INTERFACE })),
                other => Err(service_error("InterfaceNotFound", json!({ "interface": other }))),
            }
        }
        "io.genblk.Control.Describe" => once(value(&host.describe())),
        "io.genblk.Control.List" => {
            let ListParameters { device } = parameters(call)?;
            let mut devices = host.devices();
            if let Some(wanted) = &device {
                check_device(host, wanted)?;
                devices.retain(|device| device.name == *wanted);
            }
            once(value(&Devices { devices }))
        }
        "io.genblk.Control.Configuration" => {
            let ListParameters { device } = parameters(call)?;
            if let Some(wanted) = &device {
                check_device(host, wanted)?;
            }
            let wanted = |name: &str| device.as_deref().is_none_or(|device| device == name);
            once(json!({ "toml": host.configuration(&wanted) }))
        }
        "io.genblk.Control.Statistics" => {
            let wanted: StatisticsParameters = parameters(call)?;
            if let Some(device) = &wanted.device {
                check_device(host, device)?;
            }
            if wanted.interval_ms.is_some_and(|interval| !INTERVAL_MS.contains(&interval)) {
                return Err(invalid_parameter("interval_ms"));
            }
            Ok(Method::Statistics(wanted))
        }
        // Also for a device that was detached.
        "io.genblk.Control.Watch" => parameters(call).map(Method::Watch),
        other => {
            let interface = other.rsplit_once('.').map_or("", |(interface, _)| interface);
            if interface == NAME {
                return parse_change(call, may_change).map(Method::Change);
            }
            if interface == "org.varlink.service" {
                Err(service_error("MethodNotFound", json!({ "method": other })))
            } else {
                Err(service_error("InterfaceNotFound", json!({ "interface": interface })))
            }
        }
    }
}

/// The change that a call of the interface requests.
fn parse_change(call: &MethodCall, may_change: bool) -> Result<Change, MethodReply> {
    // For a client without the right to make changes, check only whether the method exists, not its parameters.
    let name = call.method.rsplit_once('.').map_or("", |(_, name)| name);
    let may_change = may_change || READ_ONLY_METHODS.contains(&name);
    let given = call.parameters.clone().filter(|given| may_change && !given.is_null()).unwrap_or_else(|| json!({}));
    match Change::of(name, &given) {
        Err(InvalidCall::Unknown) => Err(service_error("MethodNotFound", json!({ "method": call.method }))),
        _ if !may_change => {
            let needs = "root or the user of the daemon";
            Err(error("PermissionDenied", json!({ "method": name, "needs": needs })))
        }
        Err(InvalidCall::Invalid(parameter)) => Err(invalid_parameter(&parameter)),
        Ok(change) => Ok(change),
    }
}

/// Parameters of GetInterfaceDescription.
#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct InterfaceParameters {
    interface: String,
}

/// The description of varlink's own interface (<https://varlink.org/Service>).
const SERVICE_INTERFACE: &str = "\
interface org.varlink.service

method GetInfo() -> (vendor: string, product: string, version: string, url: string, interfaces: []string)
method GetInterfaceDescription(interface: string) -> (description: string)

error InterfaceNotFound (interface: string)
error MethodNotFound (method: string)
error MethodNotImplemented (method: string)
error InvalidParameter (parameter: string)
";

fn parameters<T: DeserializeOwned>(call: &MethodCall) -> Result<T, MethodReply> {
    let given = call.parameters.clone().filter(|given| !given.is_null()).unwrap_or_else(|| json!({}));
    read_parameters(&given).map_err(|parameter| invalid_parameter(&parameter))
}

fn check_device(host: &dyn Host, wanted: &str) -> Result<(), MethodReply> {
    let devices: Vec<String> = host.devices().into_iter().map(|device| device.name).collect();
    if devices.iter().any(|name| name == wanted) {
        return Ok(());
    }
    Err(error("NoSuchDevice", json!({ "device": wanted, "devices": devices })))
}

fn statistics(host: &dyn Host, parameters: &StatisticsParameters) -> Value {
    let wanted = |name: &str| parameters.device.as_deref().is_none_or(|device| device == name);
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let time_us = u64::try_from(since_epoch.as_micros()).unwrap_or(u64::MAX);
    value(&Statistics { time_us, devices: host.statistics(&wanted) })
}

/// Sends statistics at each interval, until the client closes the connection.
fn stream_statistics(
    connection: &mut VarlinkConnection,
    host: &dyn Host,
    parameters: &StatisticsParameters,
) -> io::Result<()> {
    let interval = Duration::from_millis(parameters.interval_ms.unwrap_or(INTERVAL_MS_DEFAULT));
    loop {
        let parameters = statistics(host, parameters);
        connection.send(&MethodReply { parameters, continues: Some(true), error: None })?;
        // This read notices a disconnected client immediately; a client that sends a call ends the stream.
        connection.stream().set_read_timeout(Some(interval))?;
        match connection.receive::<MethodCall>() {
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {}
            Ok(_) => return Ok(()),
            Err(e) => return Err(e),
        }
    }
}

/// Sends events as they occur, from the requested one on, until the client closes the connection.
fn stream_events(connection: &mut VarlinkConnection, host: &dyn Host, parameters: &WatchParameters) -> io::Result<()> {
    let log = host.events();
    let mut since = parameters.since.unwrap_or_else(|| log.since(u64::MAX, None).1);
    let mut is_first = true;
    loop {
        let (watched, next) = log.since(since, parameters.device.as_deref());
        since = next;
        if std::mem::take(&mut is_first) || watched.lost || !watched.events.is_empty() {
            connection.send(&MethodReply { parameters: value(&watched), continues: Some(true), error: None })?;
        }
        while !log.wait_for(since, DISCONNECT_POLL) {
            if connection.has_ended() {
                return Ok(());
            }
        }
    }
}

fn error(name: &str, parameters: Value) -> MethodReply {
    MethodReply { parameters, continues: None, error: Some(format!("{NAME}.{name}")) }
}

fn service_error(name: &str, parameters: Value) -> MethodReply {
    MethodReply { parameters, continues: None, error: Some(format!("org.varlink.service.{name}")) }
}

fn invalid_parameter(name: &str) -> MethodReply {
    service_error("InvalidParameter", json!({ "parameter": name }))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    struct Empty;

    impl Host for Empty {
        fn describe(&self) -> Description {
            Description { version: String::new(), pid: 1, since_us: 0, events: Vec::new() }
        }

        fn events(&self) -> &EventLog {
            static NOTHING: std::sync::LazyLock<EventLog> = std::sync::LazyLock::new(EventLog::default);
            &NOTHING
        }

        fn devices(&self) -> Vec<DeviceStatus> {
            Vec::new()
        }

        fn configuration(&self, _: &dyn Fn(&str) -> bool) -> String {
            String::new()
        }

        fn begin(&self, change: Change, _: bool) -> BegunChange {
            panic!("nobody may change anything: {change:?}")
        }

        fn statistics(&self, _: &dyn Fn(&str) -> bool) -> Vec<DeviceStatistics> {
            Vec::new()
        }
    }

    fn call(method: &str, parameters: Value) -> MethodCall {
        MethodCall { method: format!("{NAME}.{method}"), parameters: Some(parameters), more: None, oneway: None }
    }

    #[test]
    fn an_idle_connection_is_closed_unless_its_client_is_an_operator() {
        for half in ["", "{\"method\""] {
            let (mut client, server) = UnixStream::pair().unwrap();
            client.write_all(half.as_bytes()).unwrap();
            let idle_max = Duration::from_millis(50);
            let permits = Arc::new(Permits::default());
            let looks = Caller { uid: 1, may_change: false };
            serve_connection(server, &Empty, (looks, &permits), idle_max).unwrap_err();
            assert_eq!(client.read(&mut [0; 64]).unwrap_or(0), 0, "it is closed");
            let (client, server) = UnixStream::pair().unwrap();
            let operator = Caller { uid: 0, may_change: true };
            let served =
                thread::spawn(move || serve_connection(server, &Empty, (operator, &permits), idle_max).is_ok());
            thread::sleep(4 * idle_max);
            let mut client = VarlinkConnection::new(client);
            client.send(&call("Describe", json!({}))).unwrap();
            assert!(client.receive::<MethodReply>().unwrap().is_some_and(|reply| reply.error.is_none()));
            drop(client);
            assert!(served.join().unwrap());
        }
    }

    #[test]
    fn parameters_of_a_change_are_not_parsed_for_a_client_without_permission() {
        let refused = |method: &str, parameters: Value, may_change: bool| {
            let refused = method_error(&call(method, parameters), may_change);
            refused.rsplit('.').next().unwrap_or_default().to_owned()
        };
        let wrong = || json!({ "device": 7 });
        assert_eq!(refused("Flush", wrong(), true), "InvalidParameter");
        assert_eq!(refused("Flush", wrong(), false), "PermissionDenied");
        assert_eq!(refused("Fly", wrong(), false), "MethodNotFound");
        // It changes nothing.
        assert_eq!(refused("Resident", wrong(), false), "InvalidParameter");
    }

    fn method_error(call: &MethodCall, may_change: bool) -> String {
        method(&Empty, call, may_change).err().and_then(|reply| reply.error).expect("it is refused")
    }
}
