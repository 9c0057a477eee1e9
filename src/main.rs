//! The `genblk` command.
fn main() {}
