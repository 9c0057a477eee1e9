//! The control socket: accepts connections, and calls methods for them. Each connection has a thread; their number,
//! the length of a message and the time that a client may take to read a reply are bounded.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use log::debug;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::connection::VarlinkConnection;
use super::wire::{
    Description, DeviceStatistics, DeviceStatus, Devices, INTERFACE, ListParameters, MethodCall, MethodReply, NAME,
    Statistics, StatisticsParameters,
};

/// Most connections at a time.
pub const CONNECTIONS_MAX: usize = 16;
/// How long a client may take to read a reply.
const SEND_TIMEOUT: Duration = Duration::from_secs(10);
/// Bounds of the interval of `Statistics`, and what it is unless given.
const INTERVAL_MS: std::ops::RangeInclusive<u64> = 100..=3_600_000;
const INTERVAL_MS_DEFAULT: u64 = 1000;

/// What the control socket shows. No method waits.
pub trait Host: Send + Sync + 'static {
    /// What serves.
    fn describe(&self) -> Description;
    /// All devices, in the order of the configuration.
    fn devices(&self) -> Vec<DeviceStatus>;
    /// The statistics of the devices for which `wanted` holds.
    fn statistics(&self, wanted: &dyn Fn(&str) -> bool) -> Vec<DeviceStatistics>;
}

/// Serves connections until the listener fails, which it does when the process shuts it down.
///
/// # Errors
/// Those of accept(2).
pub fn serve(listener: &UnixListener, host: &Arc<dyn Host>) -> io::Result<()> {
    let open = Arc::new(AtomicUsize::new(0));
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
        let Some(place) = ConnectionPermit::take(&open) else {
            refuse(stream);
            continue;
        };
        let host = Arc::clone(host);
        let serving = move || {
            let _place = place;
            if let Err(e) = serve_connection(stream, &*host) {
                debug!("a control connection ended: {e}");
            }
        };
        if let Err(e) = thread::Builder::new().name("control".to_owned()).spawn(serving) {
            debug!("cannot start a thread for a control connection: {e}");
        }
    }
}

/// One of the connections that may be open.
struct ConnectionPermit(Arc<AtomicUsize>);

impl ConnectionPermit {
    fn take(open: &Arc<AtomicUsize>) -> Option<Self> {
        // Only the accepting thread adds.
        if open.load(Ordering::Relaxed) >= CONNECTIONS_MAX {
            return None;
        }
        open.fetch_add(1, Ordering::Relaxed);
        Some(Self(Arc::clone(open)))
    }
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Tells a client that there are too many. It gets the reply before it has called anything.
fn refuse(stream: UnixStream) {
    let _ = stream.set_nonblocking(true);
    let _ = VarlinkConnection::new(stream).send(&error("Busy", json!({ "connections": CONNECTIONS_MAX })));
}

fn serve_connection(stream: UnixStream, host: &dyn Host) -> io::Result<()> {
    stream.set_write_timeout(Some(SEND_TIMEOUT))?;
    let mut connection = VarlinkConnection::new(stream);
    while let Some(call) = connection.receive::<MethodCall>()? {
        let oneway = call.oneway == Some(true);
        match (method(host, &call), call.more == Some(true)) {
            _ if oneway => {}
            (Ok(Method::Once(results)), _) => {
                connection.send(&MethodReply { parameters: results, ..MethodReply::default() })?;
            }
            (Ok(Method::Statistics(parameters)), false) => {
                connection
                    .send(&MethodReply { parameters: statistics(host, &parameters), ..MethodReply::default() })?;
            }
            (Ok(Method::Statistics(parameters)), true) => return stream_statistics(&mut connection, host, &parameters),
            (Err(error), _) => connection.send(&error)?,
        }
    }
    Ok(())
}

/// A method whose parameters are right.
enum Method {
    /// With its results.
    Once(Value),
    Statistics(StatisticsParameters),
}

fn method(host: &dyn Host, call: &MethodCall) -> Result<Method, MethodReply> {
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
        other => {
            let interface = other.rsplit_once('.').map_or("", |(interface, _)| interface);
            if interface == NAME || interface == "org.varlink.service" {
                Err(service_error("MethodNotFound", json!({ "method": other })))
            } else {
                Err(service_error("InterfaceNotFound", json!({ "interface": interface })))
            }
        }
    }
}

/// Parameters of GetInterfaceDescription.
#[derive(serde::Deserialize)]
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
    serde_path(&given).map_err(|parameter| invalid_parameter(&parameter))
}

/// Reads parameters; an error names the one that is wrong, as far as that is known.
fn serde_path<T: DeserializeOwned>(given: &Value) -> Result<T, String> {
    let names: Vec<String> = given.as_object().map(|object| object.keys().cloned().collect()).unwrap_or_default();
    serde_json::from_value(given.clone()).map_err(|e| {
        let alone = |name: &&String| {
            let mut object = given.clone();
            object.as_object_mut().is_some_and(|object| object.remove(*name).is_some())
                && serde_json::from_value::<T>(object).is_ok()
        };
        names.iter().find(alone).cloned().unwrap_or_else(|| e.to_string())
    })
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
        // A client that has hung up is noticed at once, and one that sends a call ends the stream.
        connection.stream().set_read_timeout(Some(interval))?;
        match connection.receive::<MethodCall>() {
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {}
            Ok(_) => return Ok(()),
            Err(e) => return Err(e),
        }
    }
}

fn value(results: &impl Serialize) -> Value {
    serde_json::to_value(results).expect("the types of the interface are JSON")
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
