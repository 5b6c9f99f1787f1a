//! The `rewake` command.

fn main() {}
