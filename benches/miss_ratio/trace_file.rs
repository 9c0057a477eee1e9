//! A user's trace: a text file with lines of four comma-separated fields: time, op, sector, count.
//!
//! Time is a number in any unit and is not used: the order of the lines counts. The op is r, read, w or write; lines
//! with f, flush, d, discard or trim are skipped. A sector has 512 bytes. Blank lines, lines that start with #, and a
//! first line with column names are skipped.

use std::collections::HashMap;
use std::io::BufRead;

use super::trace::Access;

const SECTORS_PER_PAGE: u64 = 8;
/// A larger request (512 MiB) is considered a mistake.
const COUNT_MAX: u64 = 1 << 20;

/// Reads a whole trace. The pages are numbered in the order of their first access.
///
/// # Errors
/// The first bad line: its number, and what is wrong.
pub fn read(source: impl BufRead) -> Result<Vec<Access>, String> {
    let mut numbers = HashMap::new();
    let mut accesses = Vec::new();
    for (at, line) in source.lines().enumerate() {
        let line = line.map_err(|e| format!("line {}: {e}", at + 1))?;
        if at == 0 && names_columns(&line) {
            continue;
        }
        let request = parse(&line).map_err(|fault| format!("line {}: {fault}", at + 1))?;
        let Some(TraceLine { write, sector, count }) = request else {
            continue;
        };
        for page in sector / SECTORS_PER_PAGE..(sector + count).div_ceil(SECTORS_PER_PAGE) {
            let next = numbers.len() as u32;
            if next == u32::MAX {
                return Err(format!("line {}: more than 2^32 pages", at + 1));
            }
            accesses.push(Access { page: *numbers.entry(page).or_insert(next), write });
        }
    }
    if accesses.is_empty() { Err("no line reads or writes anything".to_string()) } else { Ok(accesses) }
}

struct TraceLine {
    write: bool,
    sector: u64,
    count: u64,
}

/// Whether a line has column names.
fn names_columns(line: &str) -> bool {
    let mut fields = line.split(',').map(str::trim);
    fields.clone().count() == 4 && fields.all(|field| field.starts_with(|c: char| c.is_ascii_alphabetic()))
}

/// The request of a line; `None` if the line reads or writes nothing.
fn parse(line: &str) -> Result<Option<TraceLine>, String> {
    let line = line.trim();
    if line.is_empty() || line.starts_with('#') {
        return Ok(None);
    }
    let fields: Vec<&str> = line.split(',').map(str::trim).collect();
    let [time, op, sector, count] = fields[..] else {
        return Err(format!("{} fields; there have to be 4: time, op, sector, count", fields.len()));
    };
    if !time.parse::<f64>().is_ok_and(f64::is_finite) {
        return Err(format!("the time {time:?} is not a number"));
    }
    let whole =
        |name: &str, text: &str| text.parse::<u64>().map_err(|_| format!("the {name} {text:?} is not a whole number"));
    let (sector, count) = (whole("sector", sector)?, whole("count", count)?);
    let write = match op.to_ascii_lowercase().as_str() {
        "r" | "read" => false,
        "w" | "write" => true,
        "f" | "flush" | "d" | "discard" | "trim" => return Ok(None),
        _ => return Err(format!("the op {op:?} is not one of read, write, flush, discard")),
    };
    if count == 0 || count > COUNT_MAX {
        return Err(format!("the count {count} is not from 1 to {COUNT_MAX}"));
    }
    if sector.checked_add(count).is_none() {
        return Err(format!("the sector {sector} is too large"));
    }
    Ok(Some(TraceLine { write, sector, count }))
}
