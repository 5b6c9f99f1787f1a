//! The `rewake` command.
#![forbid(unsafe_code)]

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    // One binary is enough for a trial run: under the stand-in's name it is the stand-in.
    #[cfg(feature = "sim")]
    if is_called("rewake-sim") {
        return rewake::sim::main(std::env::args_os());
    }
    cli::main()
}

/// Whether the first word of the command line ends in this name.
#[cfg(feature = "sim")]
fn is_called(name: &str) -> bool {
    let first = std::env::args_os().next().unwrap_or_default();
    std::path::Path::new(&first).file_name() == Some(name.as_ref())
}
