//! The stand-in for the `cloud-hypervisor` binary. See `rewake::sim`.

use std::process::ExitCode;

fn main() -> ExitCode {
    rewake::sim::main(std::env::args_os())
}
