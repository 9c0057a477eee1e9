//! The values that each sector may have: for a read, and on the platter after a power cut.

use std::ops::Range;

use crate::common::SECTOR_BYTES;
use crate::common::request::pattern;

/// What a sector holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value {
    /// The sector's pattern of this mark; mark 0 is zeros.
    Mark(u64),
    /// Any bytes: it was discarded.
    Any,
}

/// The value that a sector's bytes encode; `None` if they are torn, or belong to another sector.
fn value_of(sector: u64, bytes: &[u8]) -> Option<Value> {
    let word = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"));
    let mark = word >> 48;
    let expected = if mark == 0 { vec![0; SECTOR_BYTES] } else { pattern(mark, sector, SECTOR_BYTES) };
    (bytes == expected).then_some(Value::Mark(mark))
}

/// A value that a request gave to a sector.
#[derive(Clone, Copy, Debug)]
struct Change {
    value: Value,
    /// When the request succeeded; `None` while it is in flight, and if it failed.
    completed: Option<u64>,
}

/// The changes of a sector, oldest first. The first one is stable: the platter holds it or a later one. A read returns
/// the last one that succeeded, or a later one.
type History = Vec<Change>;

/// The oracle for a whole disk.
#[derive(Debug)]
pub struct Oracle {
    sectors: Vec<History>,
    /// Counts completions.
    now: u64,
}

impl Oracle {
    /// A disk whose platter holds `bytes`.
    pub fn new(bytes: &[u8]) -> Self {
        let stable = |(sector, bytes)| {
            let value = value_of(sector, bytes).expect("a test's image is made of patterns");
            vec![Change { value, completed: Some(0) }]
        };
        Self { sectors: (0..).zip(bytes.chunks(SECTOR_BYTES)).map(stable).collect(), now: 0 }
    }

    /// Number of sectors.
    pub fn sectors(&self) -> u64 {
        self.sectors.len() as u64
    }

    /// The time, in completed requests. A FLUSH that is submitted now covers them.
    pub fn now(&self) -> u64 {
        self.now
    }

    fn range(&mut self, first: u64, count: u64) -> &mut [History] {
        &mut self.sectors[first as usize..(first + count) as usize]
    }

    /// A request that changes sectors is submitted.
    pub fn submit(&mut self, first: u64, count: u64, value: Value) {
        self.range(first, count).iter_mut().for_each(|history| history.push(Change { value, completed: None }));
    }

    /// That request succeeded. In write-through mode it is stable then.
    pub fn complete(&mut self, first: u64, count: u64, is_write_through: bool) {
        self.now += 1;
        let now = self.now;
        for history in self.range(first, count) {
            let last = history.last_mut().expect("a sector has a stable value");
            last.completed = Some(now);
            if is_write_through && last.value != Value::Any {
                history.drain(..history.len() - 1);
            }
        }
    }

    /// A FLUSH succeeded that was submitted at the time `then`.
    pub fn flush(&mut self, then: u64) {
        for history in self.sectors.iter_mut().filter(|history| history.len() > 1) {
            let is_covered = |change: &Change| change.completed.is_some_and(|at| at <= then);
            let stable = history.iter().rposition(is_covered).unwrap_or(0);
            history.drain(..stable);
        }
    }

    /// Checks the bytes that a read returned. From now on its sectors have these values.
    ///
    /// => No request in flight changes these sectors.
    pub fn check_read(&mut self, first: u64, bytes: &[u8]) -> Result<(), String> {
        let now = self.now;
        for ((sector, bytes), history) in
            (first..).zip(bytes.chunks(SECTOR_BYTES)).zip(&mut self.sectors[first as usize..])
        {
            let latest = history.iter().rposition(|change| change.completed.is_some()).unwrap_or(0);
            check("read", sector, bytes, &history[latest..])?;
            let is_in_doubt = history.len() > latest + 1 && history[latest..].iter().all(|c| c.value != Value::Any);
            if is_in_doubt && let Some(value) = value_of(sector, bytes) {
                history.push(Change { value, completed: Some(now) });
            }
        }
        Ok(())
    }

    /// Checks the bytes on the platter.
    pub fn check_platter(&self, bytes: &[u8]) -> Result<(), String> {
        for ((sector, bytes), history) in (0..).zip(bytes.chunks(SECTOR_BYTES)).zip(&self.sectors) {
            check("platter", sector, bytes, history)?;
        }
        Ok(())
    }

    /// A power cut left the bytes `platter`: no other value is possible any more.
    pub fn power_cut(&mut self, platter: &[u8]) {
        let now = self.now;
        for ((sector, bytes), history) in (0..).zip(platter.chunks(SECTOR_BYTES)).zip(&mut self.sectors) {
            let value = value_of(sector, bytes).unwrap_or(Value::Any);
            *history = vec![Change { value, completed: Some(now) }];
        }
    }
}

fn check(place: &str, sector: u64, bytes: &[u8], possible: &[Change]) -> Result<(), String> {
    let found = value_of(sector, bytes);
    let fits = |change: &Change| change.value == Value::Any || Some(change.value) == found;
    if possible.iter().any(fits) {
        return Ok(());
    }
    Err(format!("{place}: sector {sector} has {found:?}, not one of {possible:?}"))
}

/// The bytes of a range of sectors.
pub fn byte_range(first: u64, count: u64) -> Range<usize> {
    first as usize * SECTOR_BYTES..(first + count) as usize * SECTOR_BYTES
}
