//! What the operator sees of the caches that earlier daemons left, and the commands that end them.

mod commands;
mod folders;
mod leftovers;
mod list;
mod terminal;

pub use commands::{Consent, Recovery, discard, prune, recover};
pub use leftovers::{bytes_kept_for, check_folder, hint_for, warn_unclaimed, warn_unheld};
pub use list::list;

pub(super) use leftovers::caches_below;

use crate::arena::{GuestData, GuestState};

/// What a file records of its guest, for the operator.
fn remembered(guest: GuestState) -> &'static str {
    match (guest.data, guest.write_through) {
        (GuestData::Lost, _) => "completed writes were lost",
        (GuestData::Intact, true) => "the guest selected write-through",
        (GuestData::Intact, false) => "no data was lost",
    }
}
