//! What the integration tests share: the daemon under test, a driver of our own for every chain that a guest can
//! build, a random workload with an oracle, and waits that always end.
#![allow(dead_code, reason = "each test binary compiles all of this and uses its own part")]
#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "sizes and indices here are chosen by the tests, small, and wrap on purpose in ring indices"
)]

pub mod bench;
pub mod daemon;
pub mod guest_memory;
pub mod prng;
pub mod raw_message;
pub mod raw_ring;
pub mod request;
pub mod session;
pub mod shadow;
pub mod wait;
pub mod workload;

/// Bytes in a virtio-blk sector, whatever the device's block size.
pub const SECTOR_BYTES: usize = 512;
