//! `genblk resident`, which lists what of a disk is in memory, and `genblk warm`, which reads in such a list.

use std::cell::RefCell;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::ControlClient;
use super::table::Numbers;
use crate::control::wire::{ByteExtent, FlushProgress, ResidentExtents, Warmed};
use crate::error::{Error, ErrorKind, Result};

/// Extents of one call: less than half of the longest message.
const EXTENTS_PER_CALL: usize = 8192;
/// The longest list.
const LIST_BYTES_MAX: u64 = 1 << 30;

/// What `genblk warm` does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WarmOptions {
    /// The device.
    pub device: String,
    /// The list; `-`: standard input; without it, the whole disk.
    pub from: Option<PathBuf>,
    /// Print the replies as they came.
    pub as_json: bool,
}

fn unsupported(e: serde_json::Error) -> Error {
    Error::io(ErrorKind::Control, "an unsupported reply", e.into())
}

/// What of a device is in memory: a line for each extent, or the daemon's replies.
///
/// # Errors
/// The errors of [`ControlClient::call`].
pub fn resident(client: &mut ControlClient, device: &str, as_json: bool) -> Result<String> {
    let text = RefCell::new(String::new());
    let take = |results: &Value| {
        if as_json {
            *text.borrow_mut() += &format!("{results}\n");
            return Ok(true);
        }
        let ResidentExtents { extents } = serde_json::from_value(results.clone()).map_err(unsupported)?;
        for ByteExtent { offset, bytes } in extents {
            *text.borrow_mut() += &format!("{offset}+{bytes}\n");
        }
        Ok(true)
    };
    client.stream("Resident", &json!({ "device": device }), true, take)?;
    Ok(text.into_inner())
}

/// Reads a list into the cache of a device; `report` gets the progress. Returns the text to print.
///
/// # Errors
/// [`ErrorKind::Config`] for a list that cannot be read or is wrong; those of [`ControlClient::call`].
pub fn warm(client: &mut ControlClient, options: &WarmOptions, report: impl Fn(&str)) -> Result<String> {
    let WarmOptions { device, from, as_json } = options;
    let extents = from.as_deref().map(read_list).transpose()?;
    let total = extents.as_deref().map(bytes_of);
    let parts: Vec<Option<&[ByteExtent]>> = match extents.as_deref() {
        Some(extents) => extents.chunks(EXTENTS_PER_CALL).map(Some).collect(),
        None => vec![None],
    };
    let (text, mut done, mut is_full) = (RefCell::new(String::new()), 0, false);
    for part in parts {
        let parameters = json!({ "device": device, "extents": part });
        let results = client.call_long("Warm", &parameters, |results| {
            if *as_json {
                return *text.borrow_mut() += &format!("{results}\n");
            }
            let warmed = serde_json::from_value::<Warmed>(results.clone());
            if let Ok(Warmed { progress: Some(FlushProgress { done_bytes, total_bytes }), .. }) = warmed {
                let [done, total] = [done + done_bytes, total.unwrap_or(total_bytes)];
                let [done, total] = [done, total].map(|bytes| Numbers::Short.bytes(bytes));
                report(&format!("{device}: {done} of {total}\n"));
            }
        })?;
        if *as_json {
            *text.borrow_mut() += &format!("{results}\n");
        }
        done += part.map_or(0, bytes_of);
        is_full = serde_json::from_value::<Warmed>(results).map_err(unsupported)?.full == Some(true);
        if is_full {
            break;
        }
    }
    let mut text = text.into_inner();
    if !as_json {
        text += &match is_full {
            true => format!("{device}: the cache is full\n"),
            false => format!("{device}: warmed\n"),
        };
    }
    Ok(text)
}

fn bytes_of(extents: &[ByteExtent]) -> u64 {
    extents.iter().fold(0, |sum: u64, extent| sum.saturating_add(extent.bytes))
}

/// Reads the list at a path; `-`: at standard input.
fn read_list(path: &Path) -> Result<Vec<ByteExtent>> {
    let shown = path.display();
    let mut text = String::new();
    let source: io::Result<Box<dyn Read>> = match path == Path::new("-") {
        true => Ok(Box::new(io::stdin())),
        false => fs::File::open(path).map(|file| Box::new(file) as Box<dyn Read>),
    };
    let read = source.and_then(|source| source.take(LIST_BYTES_MAX).read_to_string(&mut text));
    read.map_err(|e| Error::io(ErrorKind::Config, format!("cannot read {shown}"), e))?;
    parse(&text).map_err(|why| Error::new(ErrorKind::Config, format!("{shown}:{why}")))
}

/// The extents of a list, as `genblk resident` prints it. Empty lines and lines that begin with `#` are ignored.
fn parse(text: &str) -> std::result::Result<Vec<ByteExtent>, String> {
    let is_extent = |(_, line): &(usize, &str)| !line.is_empty() && !line.starts_with('#');
    let lines = text.lines().map(str::trim).enumerate().filter(is_extent);
    let extents = lines.map(|(index, line)| {
        let extent = line.split_once('+').and_then(|(offset, bytes)| {
            let (offset, bytes): (u64, u64) = (offset.parse().ok()?, bytes.parse().ok()?);
            // The numbers of JSON, and of varlink, have a sign.
            let end = offset.checked_add(bytes).and_then(|end| i64::try_from(end).ok());
            end.filter(|_| bytes > 0).map(|_| ByteExtent { offset, bytes })
        });
        let shown: String = line.chars().take(40).filter(|char| !char.is_control()).collect();
        let wanted = "OFFSET+BYTES, as \"genblk resident\" prints it";
        extent.ok_or_else(|| format!("{}: {shown:?} is not {wanted}", index + 1))
    });
    extents.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_extents_has_one_per_line() {
        let list = parse("# vm1\n\n0+4096\n 8192+12288 \n").unwrap();
        assert_eq!(list, [ByteExtent { offset: 0, bytes: 4096 }, ByteExtent { offset: 8192, bytes: 12_288 }]);
        assert_eq!(bytes_of(&list), 16_384);
        assert_eq!(parse(""), Ok(Vec::new()));
    }

    #[test]
    fn an_invalid_list_of_extents_is_refused_with_its_line_number() {
        for wrong in ["x", "1", "1+", "+1", "-1+2", "1+0", "1+2+3", "0x1+2", "9223372036854775807+1", "1 + 2"] {
            let why = parse(&format!("0+4096\n{wrong}\n")).unwrap_err();
            assert!(why.starts_with("2: ") && why.contains("is not OFFSET+BYTES"), "{why}");
        }
        let why = parse("genblk warm list 2 \"/srv/\u{1b}[2J.img\" tenure 7/ab\n0+1\n").unwrap_err();
        assert!(why.starts_with("1: ") && !why.contains('\u{1b}') && why.len() < 120, "{why}");
    }
}
