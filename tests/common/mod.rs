//! Shared by the integration tests: the daemon under test, a driver that can build any descriptor chain, a random
//! workload with an oracle, and waits with a deadline.
#![allow(dead_code, reason = "each test binary compiles all of this and uses its own part")]
#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "sizes and indices here are chosen by the tests, small, and wrap on purpose in ring indices"
)]

pub mod control;
pub mod daemon;
pub mod faulty_device;
pub mod flood;
pub mod forgetful_nbd;
pub mod guest_memory;
pub mod nbd_protocol;
pub mod nbd_server;
pub mod operator;
pub mod prng;
pub mod raw_message;
pub mod raw_ring;
pub mod request;
pub mod session;
pub mod shadow;
pub mod wait;
pub mod workload;

/// Bytes in a virtio-blk sector; the device's block size does not change it.
pub const SECTOR_BYTES: usize = 512;
