//! The list of caches.

use std::path::Path;
use std::time::Duration;

use super::cache_dirs::{CacheFile, CacheNeed, ImageState, caches_in};
use super::terminal::visible;
use super::{Report, describe_guest_state};
use crate::arena::{FileSummary, GuestData, Survey};
use crate::error::Result;
use crate::units::counted;

/// Bytes of a mebibyte.
const MIB: u64 = 1 << 20;

/// The caches in `directory`, a memory directory or a folder of caches itself: one line each, and the possible
/// commands. For root those of all users.
///
/// # Errors
/// [`crate::error::ErrorKind::Memory`] when the directory cannot be read.
pub fn list(directory: &Path) -> Result<Report> {
    let mut rows: Vec<[String; 6]> = Vec::new();
    let mut report = Report::default();
    let (mut is_any_dirty, mut is_any_prunable) = (false, false);
    for (path, cache) in caches_in(directory, &mut report)? {
        match cache {
            Ok(cache) => {
                is_any_dirty |= !cache.summary.is_locked && surveyed(&cache).is_some_and(Survey::is_dirty);
                is_any_prunable |= cache.needed() == CacheNeed::None;
                rows.push(row(&cache));
            }
            Err(e) => report.fail(&visible(&path), &e),
        }
    }
    if !rows.is_empty() {
        report.text = table(&rows);
    } else if report.failures.is_empty() {
        report.text = format!("no cache in {}\n", visible(directory));
    }
    if is_any_dirty {
        report.text.push_str(
            "To write a cache to its image: genblk recover CACHE; to discard it: genblk recover --discard CACHE\n",
        );
    }
    if is_any_prunable {
        report.text.push_str("To remove all caches without unwritten data: genblk recover --prune\n");
    }
    Ok(report)
}

fn surveyed(cache: &CacheFile) -> Option<&Survey> {
    cache.summary.survey.as_ref().ok()?.as_ref()
}

/// The columns of a cache.
fn row(cache: &CacheFile) -> [String; 6] {
    let survey = surveyed(cache);
    let dash = || "-".to_owned();
    [
        visible(&cache.path),
        survey.map_or_else(dash, |survey| visible(&survey.header.image.path)),
        survey.map_or_else(dash, |survey| survey.memory_bytes.div_ceil(MIB).to_string()),
        survey.filter(|survey| survey.is_of_this_boot).map_or_else(dash, |survey| survey.dirty_pages.to_string()),
        survey.map_or_else(dash, |survey| age(survey.age)),
        state(cache),
    ]
}

/// The state of a cache in words.
fn state(cache: &CacheFile) -> String {
    let FileSummary { is_locked, holder, survey, .. } = &cache.summary;
    let mut parts = Vec::new();
    if *is_locked {
        let pid = holder.map_or_else(String::new, |pid| format!(" (pid {pid})"));
        parts.push(format!("in use by a daemon{pid}"));
    }
    match survey {
        Ok(None) => parts.push("empty".to_owned()),
        Err(e) => parts.push(e.to_string()),
        Ok(Some(survey)) if !survey.is_of_this_boot => parts.push("of an earlier boot: discard it".to_owned()),
        Ok(Some(survey)) => {
            let guest = survey.header.guest;
            if survey.header.frames == 0 {
                parts.push(format!("no pages, {}", describe_guest_state(guest)));
            } else if !survey.is_dirty() {
                parts.push("clean".to_owned());
            }
            if survey.header.frames > 0 && guest.data == GuestData::Lost {
                parts.push(describe_guest_state(guest).to_owned());
            }
            if survey.zero_ranges > 0 {
                parts.push(format!("{} to be zeroed", counted(survey.zero_ranges, "range")));
            }
            if survey.header.is_set_aside {
                parts.push("set aside".to_owned());
            }
            // The daemon that uses it changes the image.
            let note = if *is_locked { None } else { image_note(cache.image()) };
            parts.extend(note.map(str::to_owned));
        }
    }
    if parts.is_empty() { "ready to be written".to_owned() } else { parts.join(", ") }
}

fn image_note(image: ImageState) -> Option<&'static str> {
    match image {
        ImageState::Present => None,
        ImageState::Changed => Some("image was changed since"),
        ImageState::Deleted => Some("image no longer exists"),
        ImageState::Unmounted => Some("image is not mounted"),
        ImageState::Replaced => Some("image was replaced"),
        ImageState::Overtaken => Some("overtaken: a later daemon has used the image"),
        ImageState::Unknown => Some("image cannot be inspected"),
    }
}

/// A duration in its largest unit.
fn age(age: Duration) -> String {
    let seconds = age.as_secs();
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds / 60),
        3600..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

/// Rows in columns under headings; numbers are aligned to the right.
fn table(rows: &[[String; 6]]) -> String {
    let headings = ["CACHE", "IMAGE", "MIB", "DIRTY PAGES", "AGE", "STATE"].map(str::to_owned);
    let is_number = |column: usize| matches!(column, 2..=4);
    let width = |column: usize| {
        let cells = rows.iter().chain([&headings]).map(|row| row[column].chars().count());
        cells.max().unwrap_or(0)
    };
    let widths: [usize; 6] = std::array::from_fn(width);
    let mut text = String::new();
    for row in [&headings].into_iter().chain(rows) {
        let cells = row.iter().enumerate().map(|(column, cell)| {
            let width = widths[column];
            if is_number(column) { format!("{cell:>width$}") } else { format!("{cell:width$}") }
        });
        let line = cells.collect::<Vec<_>>().join("  ");
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_columns_of_the_list_are_aligned() {
        let row = |cells: [&str; 6]| cells.map(str::to_owned);
        let rows =
            [row(["/a", "/srv/x.img", "256", "7", "3 h", "clean"]), row(["/bcd", "-", "1", "-", "12 min", "x, y"])];
        let expected = "\
CACHE  IMAGE       MIB  DIRTY PAGES     AGE  STATE
/a     /srv/x.img  256            7     3 h  clean
/bcd   -             1            -  12 min  x, y
";
        assert_eq!(table(&rows), expected);
    }

    #[test]
    fn an_age_is_printed_in_one_unit() {
        let shown = [5, 60, 3599, 3600, 86_400, 172_800].map(|seconds| age(Duration::from_secs(seconds)));
        assert_eq!(shown, ["5 s", "1 min", "59 min", "1 h", "24 h", "2 d"]);
    }
}
