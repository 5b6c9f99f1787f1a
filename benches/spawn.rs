//! Starting a process from a parent with much memory: the vfork-class spawn against
//! `std::process::Command` with a `pre_exec` closure (which has to `fork`), interleaved.
//!
//!     cargo bench --bench spawn [-- ROUNDS [GIB]]
//!
//! Every child must exit with 0 before its round counts. The time is that until the call
//! returns: the parent's thread is held up for that long.

#[path = "interleaved/mod.rs"]
mod interleaved;

use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Instant;

use interleaved::{Samples, numbers, print_machine};
use rewake_sys::process::{Exit, Spawn};

fn main() {
    let [rounds, gib] = numbers([200, 4]);
    print_machine();
    for resident_gib in [0, gib] {
        let ballast = ballast(resident_gib << 30);
        let (mut ours, mut theirs) = (Samples::default(), Samples::default());
        for _ in 0..rounds {
            ours.push(spawn());
            theirs.push(command_with_pre_exec());
        }
        println!("parent with {resident_gib} GiB more resident:");
        ours.print("vfork-class spawn");
        theirs.print("Command with pre_exec");
        println!(
            "ratio of medians {:.1}",
            theirs.median().as_secs_f64() / ours.median().as_secs_f64()
        );
        drop(ballast);
    }
}

/// Memory that is really there: every page is written.
fn ballast(bytes: usize) -> Vec<u8> {
    let mut memory = vec![0_u8; bytes];
    for page in memory.chunks_mut(4096) {
        page[0] = 1;
    }
    memory
}

fn spawn() -> std::time::Duration {
    let spawn = Spawn {
        program: c"/bin/true".into(),
        args: vec![c"true".into()],
        env: Vec::new(),
        fds: Vec::new(),
        netns: None,
        mounts: None,
        new_session: true,
    };
    let begun = Instant::now();
    let child = spawn.start().expect("/bin/true");
    let took = begun.elapsed();
    assert_eq!(child.wait().expect("waitid"), Some(Exit::Code(0)));
    took
}

#[allow(unsafe_code)]
fn command_with_pre_exec() -> std::time::Duration {
    let mut command = Command::new("/bin/true");
    command
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    // SAFETY: the closure makes one system call, which is async-signal-safe.
    unsafe { command.pre_exec(|| Ok(rustix::process::setsid().map(drop)?)) };
    let begun = Instant::now();
    let mut child = command.spawn().expect("/bin/true");
    let took = begun.elapsed();
    assert!(child.wait().expect("wait").success());
    took
}
