//! The list of caches that earlier daemons left, and the commands that remove them.

mod cache_dirs;
mod commands;
mod leftovers;
mod list;
mod terminal;

pub use commands::{Consent, Recovery, discard, prune, recover};
pub use leftovers::{
    cache_memory_bytes, check_cache_dir, has_unwritten_cache, hint_for, warn_unused_fds, warn_unused_files,
};
pub use list::list;

pub(super) use leftovers::caches_below;

/// Makes a write beyond RLIMIT_FSIZE fail with EFBIG instead of ending the process in the middle of a write-back.
pub fn ignore_file_size_signal() {
    // It cannot fail: the signal exists, and can be ignored.
    let _ = crate::sys::signal::ignore(&[libc::SIGXFSZ]);
}

use crate::arena::{GuestData, GuestState};
use crate::error::{Error, ErrorKind, Result};

/// The report of a command that inspects many caches.
#[derive(Debug, Default)]
pub struct Report {
    /// The text to print.
    pub text: String,
    /// Failures to inspect or change a cache.
    failures: Vec<String>,
}

impl Report {
    /// Records a failure: `what`, and its error.
    fn fail(&mut self, what: &str, error: &Error) {
        self.failures.push(format!("{what}: {error}"));
    }

    /// All failures as one error.
    ///
    /// # Errors
    /// [`ErrorKind::Memory`], if there were failures.
    pub fn result(self) -> Result<()> {
        if self.failures.is_empty() { Ok(()) } else { Err(Error::new(ErrorKind::Memory, self.failures.join("\n"))) }
    }
}

/// The guest's state that a file records, in words.
fn describe_guest_state(guest: GuestState) -> &'static str {
    match (guest.data, guest.write_through) {
        (GuestData::Lost, _) => "completed writes were lost",
        (GuestData::Intact, true) => "the guest selected write-through",
        (GuestData::Intact, false) if guest.formats != 0 => "the guest wrote the header of another format",
        (GuestData::Intact, false) => "no data was lost",
    }
}
