//! \[1\] The socket: front-ends connect, and their vhost-user messages become commands to the device's workers.
//!
//! - `server.rs` accepts one front-end after another; `relay.rs` carries its messages, which `wire.rs` reads and
//!   writes;
//! - `backend.rs` implements `VhostUserBackend`: features, configuration space, memory;
//! - `vring.rs` implements `VringT`: it starts and stops each virtqueue on its worker;
//! - `inflight.rs` keeps the inflight region.
//!
//! vhost-user-backend runs only the control plane. It gets no worker threads (`queues_per_thread` is empty) and
//! genblk's own vring type, so every message calls one of genblk's hooks, and genblk's workers run the vrings. Its own
//! worker threads have four faults, seen with version 0.24: an error ends a thread silently while the control plane
//! keeps replying; a vring whose kick descriptor is replaced loses kicks; each connection leaks a descriptor; and the
//! threads end with the connection, so there would be no write-back between two front-ends.
//!
//! The threads of this module are confined. They request information about a front-end's process, and the private
//! connection to vhost-user-backend, from the broker ([`crate::broker`]).
//!
//! The relay adds what vhost-user-backend lacks: the inflight region, and memory tables in any order.

mod backend;
mod config_change;
mod inflight;
mod relay;
mod server;
mod vring;
mod wire;

pub use server::Server;

/// The type in which vhost-user-backend keeps guest memory.
type BackendMemory = vm_memory::GuestMemoryAtomic<vm_memory::GuestMemoryMmap<()>>;
