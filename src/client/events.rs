//! `genblk events`: events of a daemon and its disks, one per line.

use serde_json::{Value, json};

use super::{ControlClient, stat, visible};
use crate::control::wire::{ControlEvent, Watched};
use crate::error::{Error, ErrorKind, Result};

/// Options of `genblk events`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EventOptions {
    /// One device; `None`: all devices and the daemon itself.
    pub device: Option<String>,
    /// Whether to keep printing events as they occur.
    pub follow: bool,
    /// Whether to print the replies unchanged.
    pub as_json: bool,
}

/// Prints the events that the daemon has kept; then, if requested, new ones until the daemon ends.
///
/// # Errors
/// Those of [`ControlClient::call`]; [`ErrorKind::System`] if standard output cannot be written to, except for a closed
/// pipe.
pub fn events(client: &mut ControlClient, options: &EventOptions) -> Result<()> {
    let parameters = json!({ "since": 0, "device": options.device });
    client.stream("Watch", &parameters, options.follow, |results| {
        if options.as_json {
            return stat::print(&format!("{results}\n"));
        }
        let watched: Watched = serde_json::from_value(results.clone())
            .map_err(|e| Error::io(ErrorKind::Control, "an unsupported reply to Watch", e.into()))?;
        stat::print(&text_of(&watched))
    })
}

fn text_of(watched: &Watched) -> String {
    let lost = match watched.lost {
        true => format!("({} earlier events were dropped)\n", watched.lost_events),
        false => String::new(),
    };
    lost + &watched.events.iter().map(line_of).collect::<String>()
}

fn line_of(event: &ControlEvent) -> String {
    let ControlEvent { time_us, device, kind, detail, .. } = event;
    let about = device.as_ref().map_or_else(String::new, |device| format!("{}: ", visible(device)));
    let details = detail.as_object().into_iter().flatten().filter(|(_, value)| !value.is_null());
    let details: String = details.map(|(name, value)| format!(" {}={}", visible(name), display_value(value))).collect();
    format!("{} {about}{}{details}\n", utc(*time_us), visible(kind))
}

fn display_value(value: &Value) -> String {
    match value {
        Value::String(text) if !text.is_empty() && !text.contains([' ', '=', '"']) => visible(text),
        other => visible(&other.to_string()),
    }
}

/// A time in UTC, in RFC 3339 format.
fn utc(time_us: u64) -> String {
    let (seconds, ms) = (time_us / 1_000_000, time_us / 1000 % 1000);
    let (days, of_day) = (seconds / 86_400, seconds % 86_400);
    // Days to civil date, by Howard Hinnant's algorithm: years begin in March, and an era has 400 years.
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{ms:03}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_prints_as_one_line_with_control_characters_escaped() {
        let event = |device: Option<&str>, detail| ControlEvent {
            sequence: 1,
            time_us: 1_795_970_651_042_000,
            device: device.map(ToOwned::to_owned),
            kind: "state".to_owned(),
            detail,
        };
        let one =
            event(Some("vm1"), json!({"from": "opening", "to": "failed", "why": "no \u{1b}[2Jfile", "pid": null}));
        let watched = Watched { events: vec![one, event(None, json!({}))], lost: true, lost_events: 3 };
        let expected = "\
(3 earlier events were dropped)
2026-11-29T16:44:11.042Z vm1: state from=opening to=failed why=\"no \\u001b[2Jfile\"
2026-11-29T16:44:11.042Z state
";
        assert_eq!(text_of(&watched), expected);
    }

    #[test]
    fn times_print_as_calendar_dates() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_399, "2000-02-28T23:59:59.000Z"),
            (951_782_400, "2000-02-29T00:00:00.000Z"),
            (1_709_251_200, "2024-03-01T00:00:00.000Z"),
            (4_102_444_799, "2099-12-31T23:59:59.000Z"),
        ] {
            assert_eq!(utc(seconds * 1_000_000), text);
        }
    }
}
