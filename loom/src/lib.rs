//! The modules of genblk that wait without a lock, with loom's atomics in place of the processor's.

#[path = "../../src/virtio/notification.rs"]
pub mod notification;
pub mod sync;
#[path = "../../src/waker.rs"]
pub mod waker;
