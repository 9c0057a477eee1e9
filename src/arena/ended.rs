//! The ended tenures of removed caches in a directory, whose images could not be updated.
//!
//! An image's record names its cache until the tenure ends. If the cache is removed while the image is under another
//! name, the record stays open, and the next daemon would report the cache as missing. So the end of the tenure is
//! recorded in the directory of the removed cache, where that daemon looks for it.
//!
//! The file has a line of fixed length for each tenure, appended by one write(2).

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::trust::{AllowedOwner, TrustedDir};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::dir::OpenMode;
use crate::tenure::TenureId;
use crate::tenure::record::TenureState;

/// Name of the file.
const NAME: &str = ".ended-tenures";
/// Bytes of a line: two numbers, a letter, two spaces and the line's end.
const LINE_BYTES: usize = 16 + 1 + 32 + 1 + 1 + 1;
/// Most bytes of the file (20 000 tenures since the host was booted).
const BYTES_MAX: u64 = 1 << 20;

/// The line of a tenure.
fn line_of(tenure: TenureId, state: TenureState) -> String {
    let letter = if state == TenureState::Clean { 'c' } else { 'f' };
    format!("{:016x} {:032x} {letter}\n", tenure.generation, tenure.id)
}

/// Records in the directory `dir` that a tenure has ended: in [`TenureState::Clean`] if all data is on the image.
///
/// # Errors
/// [`ErrorKind::Memory`] when the file cannot be written; [`ErrorKind::Ledger`] as [`TrustedDir::open_file`].
pub(super) fn record(dir: &TrustedDir, shown: &Path, tenure: TenureId, state: TenureState) -> Result<()> {
    let shown = shown.with_file_name(NAME);
    let failed = |e| Error::io(ErrorKind::Memory, format!("cannot write {}", shown.display()), e);
    let name = OsStr::new(NAME);
    dir.create_file(name).map_err(failed)?;
    let mut file = dir.open_file(name, OpenMode::Append, &shown)?;
    let metadata = file.metadata().map_err(failed)?;
    if metadata.len() >= BYTES_MAX {
        return Err(failed(io::Error::other("it has reached its maximum of 1 MiB")));
    }
    file.write_all(line_of(tenure, state).as_bytes()).map_err(failed)
}

/// How a tenure whose cache was at `cache` has ended, if that was recorded in the cache's directory.
pub(super) fn state_of(cache: &Path, allowed: AllowedOwner, tenure: TenureId) -> Option<TenureState> {
    let (shown, name) = (cache.with_file_name(NAME), OsStr::new(NAME));
    let file = TrustedDir::open(cache.parent()?, allowed).and_then(|dir| dir.open_file(name, OpenMode::Read, &shown));
    let bytes = read(&file.ok()?).ok()?;
    let is = |state| bytes.chunks_exact(LINE_BYTES).any(|line| line == line_of(tenure, state).as_bytes());
    // A loss takes precedence.
    [TenureState::Forfeited, TenureState::Clean].into_iter().find(|&state| is(state))
}

fn read(file: &File) -> io::Result<Vec<u8>> {
    let len = file.metadata()?.len().min(BYTES_MAX);
    let mut bytes = vec![0; usize::try_from(len).map_err(io::Error::other)?];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::super::crash_tests::Directory;
    use super::*;
    use crate::tenure::record::CacheLocation;

    #[test]
    fn a_recorded_loss_takes_precedence_over_a_clean_end() {
        let dir = Directory::new(&[]);
        let file = dir.file();
        let CacheLocation::Path(cache) = file.cache_location() else { unreachable!("it has a path") };
        let tenure = TenureId { generation: 3, id: 7 };
        let found = |tenure| state_of(&cache, AllowedOwner::Own, tenure);
        for (recorded, expected) in [
            (TenureState::Clean, TenureState::Clean),
            (TenureState::Forfeited, TenureState::Forfeited),
            (TenureState::Clean, TenureState::Forfeited),
        ] {
            file.record_tenure_end(tenure, recorded).unwrap();
            assert_eq!(found(tenure), Some(expected));
        }
        assert_eq!(found(TenureId { id: 8, ..tenure }), None);
    }
}
