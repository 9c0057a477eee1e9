//! The recorded state of the guest in an arena's file: a loss of completed writes, its choice of write-through, and the
//! formats whose headers it has written.

use std::sync::atomic::Ordering;

use super::Arena;
use super::ledger::field;
use super::lost_file::LossMarker;

impl Arena {
    /// Records that a previous daemon lost completed writes of the guest, for this daemon and for the next ones, until
    /// [`Arena::clear_data_loss`].
    pub fn set_data_loss(&self) {
        self.data_loss.store(true, Ordering::Release);
        self.store_in_header(field::UNWRITTEN, 1);
    }

    /// Whether the guest may rely on data that is lost.
    pub fn has_data_loss(&self) -> bool {
        self.data_loss.load(Ordering::Acquire)
    }

    /// Clears the data loss: the guest has reset the device, and relies only on the image.
    ///
    /// => Without a loss this changes nothing: the same word may indicate that the cache holds unwritten data, which
    ///    the guest still reads. With a loss there is no such data, because every request fails.
    pub fn clear_data_loss(&self) {
        if self.data_loss.swap(false, Ordering::AcqRel) {
            self.store_in_header(field::UNWRITTEN, 0);
        }
    }

    /// Records whether the guest has selected write-through, for this daemon and in the file for the next one: a
    /// front-end that reconnects does not repeat it.
    pub fn set_write_through(&self, write_through: bool) {
        self.write_through.store(write_through, Ordering::Release);
        self.store_in_header(field::WRITE_THROUGH, write_through.into());
    }

    /// Whether the guest has selected write-through.
    pub fn is_write_through(&self) -> bool {
        self.write_through.load(Ordering::Acquire)
    }

    /// Records that the guest has written the headers of these formats to its disk, which the image may not record
    /// itself.
    pub fn add_guest_formats(&self, formats: u64) {
        let before = self.formats.fetch_or(formats, Ordering::AcqRel);
        if before | formats != before {
            self.store_in_header(field::GUEST_FORMATS, before | formats);
        }
    }

    /// The image has recorded these formats: the next daemon need not find them here.
    pub fn remove_guest_formats(&self, formats: u64) {
        let before = self.formats.fetch_and(!formats, Ordering::AcqRel);
        if before & formats != 0 {
            self.store_in_header(field::GUEST_FORMATS, before & !formats);
        }
    }

    /// Formats whose headers the guest has written, and which the image may not have recorded.
    pub fn guest_formats(&self) -> u64 {
        self.formats.load(Ordering::Acquire)
    }

    /// Whether the guest's state must be kept for the next daemon even without pages, apart from a loss.
    pub(super) fn has_guest_choices(&self) -> bool {
        self.is_write_through() || self.guest_formats() != 0
    }

    /// Records that all data is on the image: a crash of the daemon would lose nothing.
    pub fn all_written(&self) {
        if let Some(LossMarker { marker, .. }) = self.marker()
            && marker.load(field::UNWRITTEN) != 0
            && !self.has_data_loss()
        {
            marker.store(field::UNWRITTEN, 0);
        }
    }
}
