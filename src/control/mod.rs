//! The control socket of a daemon: varlink (<https://varlink.org>) over a Unix domain socket, by which other programs
//! see what its devices do.
//!
//! The interface is `io.genblk.Control.varlink`, beside this file. `wire.rs` has its types, [`connection`] sends and
//! receives messages, [`events`] keeps what has happened, and [`server`] calls the methods, within the bounds of
//! `permits.rs`. What they show comes from a [`server::Host`], the supervisor, which also carries out each
//! [`change::Change`].
//!
//! The framing is hand-written: 40 lines over `serde_json`, where a varlink crate brings an asynchronous runtime, or
//! closes the connection at an unknown method, where varlink has an error for that.

pub mod change;
pub mod connection;
pub mod events;
mod permits;
pub mod server;
pub mod wire;
