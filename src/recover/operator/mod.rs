//! What the operator sees of the caches that earlier daemons left, and the commands that end them.

mod commands;
mod folders;
mod leftovers;
mod list;
mod terminal;

pub use commands::{Consent, Recovery, discard, prune, recover};
pub use leftovers::{bytes_kept_for, check_folder, has_unwritten_cache, hint_for, warn_unused_fds, warn_unused_files};
pub use list::list;

pub(super) use leftovers::caches_below;

/// Makes a write beyond RLIMIT_FSIZE fail with EFBIG, in place of ending the process in the middle of a write-back.
pub fn ignore_file_size_signal() {
    // It cannot fail: the signal exists, and can be ignored.
    let _ = crate::sys::signal::ignore(&[libc::SIGXFSZ]);
}

use crate::arena::{GuestData, GuestState};
use crate::error::{Error, ErrorKind, Result};

/// The report of a command that inspects many caches.
#[derive(Debug, Default)]
pub struct Report {
    /// What it found and did.
    pub text: String,
    /// What it could not inspect or do.
    failures: Vec<String>,
}

impl Report {
    /// Something could not be inspected or done: `what`, because of an error.
    fn fail(&mut self, what: &str, error: &Error) {
        self.failures.push(format!("{what}: {error}"));
    }

    /// What could not be inspected or done, as one error.
    ///
    /// # Errors
    /// [`ErrorKind::Memory`], if there was something.
    pub fn result(self) -> Result<()> {
        if self.failures.is_empty() { Ok(()) } else { Err(Error::new(ErrorKind::Memory, self.failures.join("\n"))) }
    }
}

/// What a file records of its guest, for the operator.
fn remembered(guest: GuestState) -> &'static str {
    match (guest.data, guest.write_through) {
        (GuestData::Lost, _) => "completed writes were lost",
        (GuestData::Intact, true) => "the guest selected write-through",
        (GuestData::Intact, false) if guest.formats != 0 => "the guest wrote the header of another format",
        (GuestData::Intact, false) => "no data was lost",
    }
}
