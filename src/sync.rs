//! The atomics, fences and eventfds that synchronize threads with each other, and a device with its driver.
//!
//! `loom/` compiles the modules that import them from here with loom's versions instead, and explores every order of
//! their steps.

pub use std::sync::atomic::{AtomicBool, Ordering, fence};

pub use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
