//! System calls that std does not wrap, each behind one small function.

pub mod file;
