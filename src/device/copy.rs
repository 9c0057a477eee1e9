//! Steps 4 and 5 of a turn: copies bytes between guest memory and pinned frames, without any lock, and then returns the
//! pieces to the cache.

use crate::cache::{CopyResult, PageCache, Piece};
use crate::cached_image::WorkerPort;
use crate::fault_injection::{PlantedBug, planted};
use crate::units::{PAGE_SIZE, SECTOR_BYTES, SECTOR_SIZE};
use crate::virtio::Status;
use crate::virtio::guest_copy::{BadAddress, GuestCursor};
use crate::virtio::request::RequestKind;

use super::pending::Pending;
use super::requests::{CopiedPiece, Requests};
use super::ring::Ring;

impl Requests {
    /// Copies every ready piece. A read is finished with its last piece: the driver need not wait for the cache.
    pub(super) fn copy_all(&mut self, port: &WorkerPort, rings: &[Option<Ring>]) {
        let Self { copies, pending, finished, unfinished, read, written, .. } = self;
        let mut following = copies.iter().map(|(_, piece)| port.memory(piece));
        let mut next = following.next().flatten();
        for of_one in copies.chunk_by(|(slot, _), (other, _)| slot == other) {
            let slot = of_one[0].0;
            let Pending { request, ring, status, .. } = &mut pending[slot];
            let mut settled = 0;
            let ring = rings[usize::from(*ring)].as_ref().expect("a ring stops only when it has no requests");
            let mut cursor = GuestCursor::new(&ring.memory, &request.data);
            for &(slot, piece) in of_one {
                let memory = std::mem::replace(&mut next, following.next().flatten());
                let result = if is_postponed(request.kind) {
                    #[cfg(test)]
                    self.postponed.push((slot, piece));
                    Ok(())
                } else {
                    copy(&mut cursor, request.kind, &piece, memory, next)
                };
                if request.kind == RequestKind::Write {
                    written.push(CopiedPiece { slot, piece, result });
                } else {
                    read.push(piece);
                    settled += u64::from(piece.count);
                    if result.is_err() && *status == Status::Ok {
                        *status = Status::IoErr;
                    }
                }
            }
            if request.kind != RequestKind::Write {
                pending.settle(slot, settled);
                if pending[slot].is_settled() {
                    finished.push(slot);
                } else {
                    unfinished.push(slot);
                }
            }
        }
        copies.clear();
        while let Some(slot) = self.unfinished.pop() {
            self.continue_if_due(slot);
        }
    }

    /// Copies the pieces whose copy a planted bug postpones until after their requests have completed.
    #[cfg(test)]
    pub(super) fn copy_postponed(&mut self, port: &WorkerPort, rings: &[Option<Ring>]) {
        for (slot, piece) in self.postponed.drain(..) {
            let Pending { request, ring, .. } = &self.pending[slot];
            let ring = rings[usize::from(*ring)].as_ref().expect("a ring stops only at the end of a turn");
            let mut cursor = GuestCursor::new(&ring.memory, &request.data);
            copy(&mut cursor, request.kind, &piece, port.memory(&piece), None).expect("the driver's buffers are valid");
        }
    }

    /// Returns the pieces of writes to the cache, under its lock. Only then may a write complete.
    pub(super) fn return_writes(&mut self, cache: &mut PageCache) {
        for at in 0..self.written.len() {
            let CopiedPiece { slot, piece, result } = self.written[at];
            cache.finish_write(&piece, if result.is_ok() { CopyResult::Complete } else { CopyResult::Incomplete });
            let pending = &mut self.pending[slot];
            if result.is_err() {
                pending.status = Status::IoErr;
            }
            self.pending.settle(slot, u64::from(piece.count));
            self.finish_if_settled(cache, slot);
        }
        self.written.clear();
    }

    /// Returns the pieces of reads to the cache, under its lock.
    pub(super) fn return_reads(&mut self, cache: &mut PageCache) {
        self.read.drain(..).for_each(|piece| cache.finish_read(&piece));
    }
}

/// Whether a planted bug postpones the copies of requests of this kind.
fn is_postponed(kind: RequestKind) -> bool {
    match kind {
        RequestKind::Write => planted(PlantedBug::LedgerBeforeCopy),
        _ => planted(PlantedBug::ReadCompletesBeforeCopy),
    }
}

/// Copies a piece between guest memory and `memory`, which points to its sectors in its frames; `None`: a read returns
/// zeros. `next` is the memory of the piece to be copied after this one.
fn copy(
    cursor: &mut GuestCursor,
    kind: RequestKind,
    piece: &Piece,
    memory: Option<*mut u8>,
    next: Option<*mut u8>,
) -> Result<(), BadAddress> {
    let offset = u64::from(piece.at) * SECTOR_BYTES;
    let len = piece.count as usize * SECTOR_SIZE;
    // For several pages the processor's own prefetcher does as well, and explicit hints slow it down.
    let next = next.filter(|_| len <= PAGE_SIZE).map(<*mut u8>::cast_const);
    match (memory, kind) {
        (None, _) => cursor.fill_zeros(offset, len),
        (Some(frames), RequestKind::Write) => {
            // SAFETY: the piece pins its frames, which hold these sectors: `len` bytes of the arena, which no reference
            // covers and which is mapped apart from guest memory. The cache marks the sectors as pending, so no read-in
            // and no write-back touches them. Other requests of the guest may read or write them at the same time, on
            // other workers; the callee allows that.
            unsafe { cursor.copy_from_guest(offset, frames, len, next) }
        }
        (Some(frames), _) => {
            // SAFETY: as above. Writes of the guest to these sectors may be copied in at the same time; the callee
            // allows that, and the guest reads old or new bytes, as on any disk.
            unsafe { cursor.copy_to_guest(offset, frames, len, next) }
        }
    }
}
