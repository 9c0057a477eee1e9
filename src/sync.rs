//! The atomics, fences and eventfds by which threads, and a device and its driver, wait for each other.
//!
//! `loom/` compiles the modules that take them from here with loom's in their place, and tries every order of their
//! steps.

pub use std::sync::atomic::{AtomicBool, Ordering, fence};

pub use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
