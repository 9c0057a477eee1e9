//! The bytes: copied between the guest's memory and pinned frames, without any lock.

use crate::cache::{PageCache, Piece};
use crate::object::Port;
use crate::units::{SECTOR_BYTES, SECTOR_SIZE};
use crate::virtio::STATUS_IOERR;
use crate::virtio::request::Kind;
use crate::virtio::segments::{BadAddress, GuestCursor};

use super::pending::{Pending, Slot};
use super::ring::Ring;
use super::worker::Traffic;

/// Pieces ahead of the one being copied whose memory is called for already, where a request begins: a frame that was not
/// used lately is in no cache of the processor's, and to wait for its first bytes takes longer than to copy the rest.
/// Along a request the processor looks ahead by itself, and is hindered if it is told to.
const AHEAD: usize = 4;

/// A piece that was copied: its request, and whether all of it could be.
pub(super) type Copied = (Slot, Piece, bool);

impl Traffic {
    /// Copies every piece that is ready.
    pub(super) fn copy_all(&mut self, port: &Port, rings: &[Option<Ring>]) {
        for at in 0..self.copies.len() {
            if let Some((_, ahead)) = self.copies.get(at + AHEAD).filter(|(_, ahead)| ahead.at == 0) {
                port.memory(ahead).into_iter().for_each(prefetch);
            }
            let (slot, piece) = self.copies[at];
            let pending = &self.pending[slot];
            let ring = rings[usize::from(pending.ring)].as_ref().expect("a ring with requests out is there");
            let copied = copy(port, ring, pending, &piece).is_ok();
            self.copied.push((slot, piece, copied));
        }
        self.copies.clear();
    }

    /// Gives the copied pieces back to the cache, under its lock.
    pub(super) fn give_back_all(&mut self, cache: &mut PageCache) {
        for at in 0..self.copied.len() {
            let (slot, piece, good) = self.copied[at];
            let pending = &mut self.pending[slot];
            match pending.request.kind {
                Kind::Write => cache.finish_write(&piece, good),
                _ => cache.finish_read(&piece),
            }
            pending.settled += u64::from(piece.count);
            if !good {
                pending.failure = Some(STATUS_IOERR);
            }
            self.finish_if_settled(cache, slot);
        }
        self.copied.clear();
    }
}

/// Calls for the first bytes of a frame; the processor sees the pattern and fetches the rest by itself.
#[cfg_attr(not(target_arch = "x86_64"), allow(unused_variables, reason = "there is no portable way to say it"))]
fn prefetch(frame: *mut u8) {
    #[cfg(target_arch = "x86_64")]
    for line in 0..4 {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch is a hint: it reads nothing that the program could see, and no address makes it fail.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(frame.wrapping_add(line * 64).cast()) };
    }
}

fn copy(port: &Port, ring: &Ring, pending: &Pending, piece: &Piece) -> Result<(), BadAddress> {
    let mut cursor = GuestCursor::new(&ring.memory, &pending.request.data);
    let offset = u64::from(piece.at) * SECTOR_BYTES;
    let len = usize::from(piece.count) * SECTOR_SIZE;
    match (port.memory(piece), pending.request.kind) {
        (None, _) => cursor.fill_zeros(offset, len),
        (Some(frame), Kind::Write) => {
            // SAFETY: the piece pins the frame, of which these sectors are this request's to fill: the cache marks them
            // pending, so no read-in and no write-back touches them. Guest memory and arena are different mappings.
            unsafe { cursor.copy_from_guest(offset, frame, len) }
        }
        (Some(frame), _) => {
            // SAFETY: the piece pins the frame. A guest that writes these sectors in another request at the same time
            // may find old or new bytes in this one, as on any disk; whatever the bytes are, they are plain data.
            unsafe { cursor.copy_to_guest(offset, frame, len) }
        }
    }
}
