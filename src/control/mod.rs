//! The control socket of a daemon: varlink (<https://varlink.org>) over a Unix domain socket, through which other
//! programs observe and change its devices.
//!
//! The interface is `io.genblk.Control.varlink`, in this directory. `wire.rs` has its types, [`connection`] sends and
//! receives messages, [`events`] keeps the latest events, and [`server`] calls the methods, within the bounds of
//! `permits.rs`. A [`server::Host`], the supervisor, provides the data and executes each [`change::Change`].
//!
//! The framing is hand-written: 40 lines on top of `serde_json`. The varlink crates bring an asynchronous runtime, or
//! close the connection at an unknown method, for which varlink has an error.

pub mod change;
pub mod connection;
pub mod events;
mod permits;
pub mod server;
pub mod wire;
