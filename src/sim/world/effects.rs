//! The effects of store operations on the disk of a simulated world, and the choice of those that fail.

use crate::units::{OpKind, Unmap};

use super::super::memory::GARBAGE;
use super::super::operations::DiskOp;
use super::super::scenario::FailureClass;
use super::{Reset, World};

impl World {
    /// The world for a seed, with a disk that is a server which is occasionally restarted.
    pub fn with_restarts(seed: u64) -> Self {
        let world = Self::new(seed);
        Self { scenario: world.scenario.with_restarts(), ..world }
    }

    /// Decides whether an operation fails.
    pub(super) fn draw_failure(&mut self, op: &DiskOp) -> bool {
        if self.scenario.restarts {
            return op.kind == OpKind::Sync && self.prng.percent(30);
        }
        let percent = match self.scenario.fault_percent {
            // Syncs are rare and their failures matter most, so they fail more often.
            1.. if op.kind == OpKind::Sync => 30,
            percent => percent,
        };
        let is_broken = FailureClass::of(op.kind).is_some_and(|class| self.scenario.broken.contains(&class));
        is_broken || self.prng.percent(percent)
    }

    /// Performs the effect of an operation on disk and memory, even if its daemon has crashed.
    pub(super) fn apply_to_disk(&mut self, op: &DiskOp, failed: bool) {
        let (first, count) = (op.span.start as usize, op.span.count as usize);
        match op.kind {
            OpKind::Read => {
                for n in 0..count {
                    let (frame, at) = op.frame_sector(n);
                    // After a failed read the memory may have any contents.
                    self.memory.set(frame, at, if failed { GARBAGE } else { self.disk.read(first + n) });
                }
            }
            OpKind::Write => {
                for (n, &version) in op.content.iter().enumerate() {
                    let (frame, at) = op.frame_sector(n);
                    assert_eq!(self.memory.get(frame, at), version, "a frame changed during its write-back");
                    // A failed write is torn.
                    if !failed || self.prng.percent(50) {
                        self.disk.write(first + n, version);
                    }
                }
                if failed && self.scenario.failed_write_resets {
                    self.reset_disk();
                }
            }
            OpKind::Sync if failed => self.disk.fail_sync(op.began, self.scenario.sync_failure),
            OpKind::Sync => self.disk.complete_sync(op.began),
            OpKind::Zero { unmap } if !failed => self.disk.zero(first, count, unmap),
            OpKind::Discard if !failed && self.prng.percent(50) => self.disk.zero(first, count, Unmap::Allowed),
            OpKind::Allocate if !failed => self.disk.allocate(first, count),
            OpKind::Zero { .. } | OpKind::Discard if failed && self.scenario.failed_write_resets => self.reset_disk(),
            OpKind::Zero { .. } | OpKind::Discard if failed => {
                // A failed operation is torn.
                for sector in first..first + count {
                    if self.prng.percent(50) {
                        self.disk.tear(sector);
                    }
                }
            }
            OpKind::Zero { .. } | OpKind::Discard | OpKind::Map | OpKind::Allocate => {}
        }
    }

    fn reset_disk(&mut self) {
        self.disk.reset();
        self.reset = Some(Reset::Unreported);
    }

    /// Whether the operation in flight has reset the disk.
    pub(super) fn has_reset(&self, op: &DiskOp) -> bool {
        let may_reset = matches!(op.kind, OpKind::Write | OpKind::Zero { .. } | OpKind::Discard);
        may_reset && self.scenario.failed_write_resets && op.failed == Some(true)
    }
}
