//! The bytes: copied between the guest's memory and pinned frames, without any lock.

use crate::cache::{PageCache, Piece};
use crate::cached_image::WorkerPort;
use crate::units::{PAGE_SIZE, SECTOR_BYTES, SECTOR_SIZE};
use crate::virtio::Status;
use crate::virtio::guest_copy::{BadAddress, GuestCursor, LINE_BYTES, prefetch};
use crate::virtio::request::RequestKind;

use super::pending::Pending;
use super::requests::{Requests, Written};
use super::ring::Ring;

impl Requests {
    /// Copies every piece that is ready. With its last piece a read is finished: the cache need not know before the answer.
    pub(super) fn copy_all(&mut self, port: &WorkerPort, rings: &[Option<Ring>]) {
        let Self { copies, pending, finished, read, written, .. } = self;
        let mut following = copies[..].iter().skip(1);
        for of_one in copies.chunk_by(|(slot, _), (other, _)| slot == other) {
            let slot = of_one[0].0;
            let Pending { request, ring, settled, status, .. } = &mut pending[slot];
            let ring = rings[usize::from(*ring)].as_ref().expect("a ring with requests out is there");
            let mut cursor = GuestCursor::new(&ring.memory, &request.data);
            for &(_, piece) in of_one {
                let next = following.next().and_then(|(_, next)| port.memory(next));
                let copied = copy(&mut cursor, request.kind, &piece, port.memory(&piece), next);
                if request.kind == RequestKind::Write {
                    written.push(Written { slot, piece, copied });
                } else {
                    read.push(piece);
                    *settled += u64::from(piece.count);
                    if copied.is_err() && *status == Status::Ok {
                        *status = Status::IoErr;
                    }
                }
            }
            if request.kind != RequestKind::Write && pending[slot].is_settled() {
                finished.push(slot);
            }
        }
        copies.clear();
    }

    /// Gives what was written back to the cache, under its lock: only then may a write be answered.
    pub(super) fn give_back_written(&mut self, cache: &mut PageCache) {
        for at in 0..self.written.len() {
            let Written { slot, piece, copied } = self.written[at];
            cache.finish_write(&piece, copied.is_ok());
            let pending = &mut self.pending[slot];
            pending.settled += u64::from(piece.count);
            if copied.is_err() {
                pending.status = Status::IoErr;
            }
            self.finish_if_settled(cache, slot);
        }
        self.written.clear();
    }

    /// Gives what was read back to the cache, under its lock.
    pub(super) fn give_back_read(&mut self, cache: &mut PageCache) {
        self.read.drain(..).for_each(|piece| cache.finish_read(&piece));
    }
}

/// Copies a piece from or to `memory`, where it lies; none: it is zeros. `next` is where the next one lies.
fn copy(
    cursor: &mut GuestCursor,
    kind: RequestKind,
    piece: &Piece,
    memory: Option<*mut u8>,
    next: Option<*mut u8>,
) -> Result<(), BadAddress> {
    let offset = u64::from(piece.at) * SECTOR_BYTES;
    let len = piece.count as usize * SECTOR_SIZE;
    match (memory, kind) {
        (None, _) => cursor.fill_zeros(offset, len),
        (Some(frame), RequestKind::Write) => {
            next.into_iter().for_each(prefetch_beginning);
            // SAFETY: the piece pins its frames, of which these sectors are this request's to fill: the cache marks them
            // pending, so no read-in and no write-back touches them. Guest memory and arena are different mappings.
            unsafe { cursor.copy_from_guest(offset, frame, len) }
        }
        (Some(frame), _) => {
            // Along several pages the processor looks ahead by itself, and is hindered if it is told to.
            let next = next.filter(|_| len <= PAGE_SIZE).map(<*mut u8>::cast_const);
            // SAFETY: the piece pins its frames. A guest that writes these sectors in another request at the same time
            // may find old or new bytes in this one, as on any disk; whatever the bytes are, they are plain data.
            unsafe { cursor.copy_to_guest(offset, frame, len, next) }
        }
    }
}

/// Calls for the first bytes of a frame that is to be filled; the processor sees the pattern and fetches the rest by itself.
fn prefetch_beginning(frame: *mut u8) {
    (0..4).for_each(|line| prefetch(frame.wrapping_add(line * LINE_BYTES)));
}
