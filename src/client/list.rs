//! `genblk list`: the devices of a daemon, one per line.

use super::table::{Numbers, TextTable};
use super::{ControlClient, visible};
use crate::control::wire::{DeviceStatus, Devices, ListParameters};
use crate::error::Result;

/// The devices as a table, or the daemon's reply unchanged.
///
/// # Errors
/// The errors of [`ControlClient::call`].
pub fn list(client: &mut ControlClient, device: Option<String>, as_json: bool) -> Result<String> {
    let parameters = ListParameters { device };
    if as_json {
        return Ok(format!("{}\n", client.call_raw("List", &parameters)?));
    }
    Ok(table(&client.call::<Devices>("List", &parameters)?.devices))
}

/// An operation on the image that is at least this old gets a line; in microseconds.
const SLOW_US: u64 = 1_000_000;

/// A part in percent.
fn percent_of(part: u64, whole: u64) -> String {
    let percent = part.saturating_mul(100).checked_div(whole).unwrap_or(0);
    format!("{}%", percent.min(100))
}

fn table(devices: &[DeviceStatus]) -> String {
    let titles = ["disk", "state", "front-end", "image", "size", "cache", "used", "dirty", "mode"];
    let mut table = TextTable::new(&titles, 4);
    let mut reasons = String::new();
    for device in devices {
        let bytes = |bytes: Option<u64>| bytes.map_or_else(|| "-".to_owned(), |bytes| Numbers::Short.bytes(bytes));
        let mode = if device.read_only { "read-only" } else { &device.mode };
        table.row(vec![
            device.name.clone(),
            device.state.word().to_owned(),
            device.front_end.map_or_else(|| "-".to_owned(), |front_end| format!("pid {}", front_end.pid)),
            visible(&device.image),
            bytes(device.image_bytes),
            bytes(Some(device.cache_bytes)),
            device.resident_bytes.map_or_else(|| "-".to_owned(), |used| percent_of(used, device.cache_bytes)),
            if device.read_only { "-".to_owned() } else { bytes(device.dirty_bytes) },
            mode.to_owned(),
        ]);
        if let Some(why) = &device.why {
            reasons += &format!("{}: {}\n", device.name, visible(why));
        }
        if !device.pending.is_empty() {
            let keys = visible(&device.pending.join(", "));
            reasons += &format!("{}: pending until detach and attach: {keys}\n", device.name);
        }
        if let Some(wanted) = device.cache_wanted_bytes.filter(|wanted| *wanted < device.cache_bytes) {
            let wanted = Numbers::Short.bytes(wanted);
            reasons += &format!("{}: memory pressure: its cache is reduced to {wanted} for now\n", device.name);
        }
        if let Some(us) = device.oldest_operation_us.filter(|us| *us >= SLOW_US) {
            reasons += &format!("{}: its image has not answered for {} s\n", device.name, us / 1_000_000);
        }
    }
    table.render(true, false) + &reasons
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::wire::{DeviceState, FrontEnd};

    #[test]
    fn the_list_explains_each_unserved_device_below_the_table() {
        let served = DeviceStatus {
            name: "vm1".to_owned(),
            state: DeviceState::Serving,
            why: None,
            pid: Some(17),
            image: "/srv/vm1.img".to_owned(),
            socket: "/run/genblk/vm1.sock".to_owned(),
            read_only: false,
            serial: "vm1".to_owned(),
            mode: "writeback".to_owned(),
            front_end: Some(FrontEnd { pid: 4242, uid: 0 }),
            image_bytes: Some(20 << 30),
            cache_bytes: 256 << 20,
            cache_wanted_bytes: Some(256 << 20),
            cache_present_bytes: Some(256 << 20),
            resident_bytes: Some(128 << 20),
            dirty_bytes: Some(0),
            oldest_operation_us: None,
            limits: None,
            pending: Vec::new(),
        };
        let failed = DeviceStatus {
            name: "db".to_owned(),
            state: DeviceState::Failed,
            why: Some("no such \u{1b}[2Jfile".to_owned()),
            front_end: None,
            image_bytes: None,
            resident_bytes: None,
            dirty_bytes: None,
            ..served.clone()
        };
        let pending = vec!["workers".to_owned(), "cache.size".to_owned()];
        let slow = DeviceStatus {
            oldest_operation_us: Some(12_300_000),
            pending,
            cache_wanted_bytes: Some(64 << 20),
            ..served.clone()
        };
        let expected = "\
disk  state    front-end  image          size  cache  used  dirty       mode
vm1   serving  pid 4242   /srv/vm1.img  20.0G   256M   50%      0  writeback
db    failed   -          /srv/vm1.img      -   256M     -      -  writeback
vm1   serving  pid 4242   /srv/vm1.img  20.0G   256M   50%      0  writeback
db: no such ?[2Jfile
vm1: pending until detach and attach: workers, cache.size
vm1: memory pressure: its cache is reduced to 64.0M for now
vm1: its image has not answered for 12 s
";
        assert_eq!(table(&[served, failed, slow]), expected);
    }
}
