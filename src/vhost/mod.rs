//! \[1\] The socket: front-ends come and go, their control messages become commands to the device's workers.
//!
//! vhost-user-backend is used for the control plane alone. With no worker threads of its own (`queues_per_thread` is
//! empty) and a ring type of ours, every message arrives in our hooks, and our workers run the rings. What that avoids,
//! seen with version 0.24: its worker threads end silently on any error while the control plane goes on answering, lose
//! the kicks of a ring whose descriptor is replaced, leak a descriptor with each connection, and live only as long as
//! one, so nothing would write back between two.
//!
//! Between socket and crate stands a relay (`relay.rs`) for what the crate can't carry: the inflight region, and memory
//! tables in any order.

mod backend;
mod inflight;
mod relay;
mod server;
mod socketpair;
mod vring;
mod wire;

pub use server::{Server, bind};

/// Guest memory as the crate keeps it.
type Memory = vm_memory::GuestMemoryAtomic<vm_memory::GuestMemoryMmap<()>>;
