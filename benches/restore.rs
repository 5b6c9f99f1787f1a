//! From spawning Cloud Hypervisor to a running VM: `rewake` against a minimal loop that only
//! spawns it and queues one request, interleaved, with the probe guest on real KVM.
//!
//!     cargo bench --bench restore [-- ROUNDS]
//!
//! The minimal loop begins with everything laid out and measures spawn to answer. rewake
//! begins with nothing but the template: it checks, plans, rewrites, makes its directory,
//! and then does the same. Both end with CH's answer to `vm.restore`; every guest must then
//! answer with the nonce of the template before its round counts.

#[path = "interleaved/mod.rs"]
mod interleaved;
// Shared with the tests, which use more of it.
#[allow(dead_code, clippy::unwrap_used)]
#[path = "../tests/probe_guest/lab.rs"]
mod lab;

use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use interleaved::{Samples, numbers, print_machine};
use lab::Lab;
use rewake::deadline::Deadline;
use rewake::ids::SandboxId;
use rewake::plan::{MemoryMode, RestoreInputs};
use rewake::probe_guest::Settings;
use rewake::restore::{RestoreSpec, restore};
use rewake::timeline::Phase;
use rewake_sys::netns;
use rustix::io::{FdFlags, fcntl_setfd};

fn main() {
    let [rounds] = numbers([50]);
    let Some(mut lab) = Lab::new("bench-restore") else {
        return;
    };
    print_machine();
    let template = lab.dir().join("template");
    let machine = lab.boot(&Settings::default());
    let nonce = machine.probe()["nonce"].clone();
    machine.freeze(&template);

    for mode in [MemoryMode::OnDemand, MemoryMode::Copy] {
        let mut minimal = Samples::default();
        let mut variants = [
            Variant::new("with events", false),
            Variant::new("no events", true),
        ];
        for round in 0..rounds {
            minimal.push(minimal_loop(&lab, &template, mode, round));
            for variant in &mut variants {
                let mut spec = spec(&lab, &template, mode);
                spec.vmm.without_events = variant.without_events;
                let restored = restore(&spec, soon()).expect("a running VM");
                assert_eq!(
                    lab.probe()["nonce"],
                    nonce,
                    "another guest than the template's"
                );
                let at = |phase| {
                    restored
                        .timeline
                        .at(phase)
                        .expect("a phase that was passed")
                };
                let answer = at(Phase::ApiAccepted);
                variant.from_template.push(answer);
                variant.from_spawn.push(answer - at(Phase::Planned));
                variant.ready.push(at(Phase::Ready));
                assert!(restored.destroy(soon()).is_empty());
            }
        }
        println!("{}:", mode.name());
        minimal.print("minimal loop, spawn to answer");
        for variant in &variants {
            variant.print(&minimal);
        }
    }
}

/// One way in which rewake restores, and what it took.
struct Variant {
    name: &'static str,
    without_events: bool,
    from_spawn: Samples,
    from_template: Samples,
    ready: Samples,
}

impl Variant {
    fn new(name: &'static str, without_events: bool) -> Self {
        Self {
            name,
            without_events,
            from_spawn: Samples::default(),
            from_template: Samples::default(),
            ready: Samples::default(),
        }
    }

    fn print(&self, minimal: &Samples) {
        println!("rewake, {}:", self.name);
        self.from_spawn.print("  spawn to answer");
        self.from_template.print("  template to answer");
        self.ready.print("  template to envd ready");
        let more = self.from_spawn.median().as_secs_f64() - minimal.median().as_secs_f64();
        println!(
            "  spawn to answer minus the minimal loop, medians: {:.3} ms",
            more * 1e3
        );
    }
}

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(60))
}

fn spec(lab: &Lab, template: &Path, mode: MemoryMode) -> RestoreSpec {
    let mut inputs = RestoreInputs::new(SandboxId::random(), template);
    inputs.memory_mode = mode.into();
    let mut spec = RestoreSpec::new(inputs, lab.program(), lab.guest());
    spec.runtime_dir = lab.dir().join("run");
    spec.netns = Some(lab.netns_path().into());
    spec
}

/// Spawns CH on a listening socket with one request queued, and reads one answer.
fn minimal_loop(lab: &Lab, template: &Path, mode: MemoryMode, round: usize) -> Duration {
    let path = lab
        .dir()
        .join(format!("minimal-{round}-{}.sock", mode.name()));
    let listener = UnixListener::bind(&path).expect("bind");
    fcntl_setfd(&listener, FdFlags::empty()).expect("F_SETFD");
    let fd = std::os::fd::AsRawFd::as_raw_fd(&listener);
    let mut stream = UnixStream::connect(&path).expect("connect");
    let mode = match mode {
        MemoryMode::OnDemand => "OnDemand",
        _ => "Copy",
    };
    let body = format!(
        r#"{{"source_url":"file://{}","memory_restore_mode":"{mode}","resume":true}}"#,
        template.display()
    );
    let request = format!(
        "PUT /api/v1/vm.restore HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let namespace = netns::open(&lab.netns_path()).expect("the namespace");
    let (took, mut child) = netns::run_in(namespace.as_fd(), || {
        let begun = Instant::now();
        let child = Command::new(lab.program())
            .args(["--api-socket", &format!("fd={fd}")])
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("Cloud Hypervisor");
        stream.write_all(request.as_bytes()).expect("write");
        let mut answer = [0; 512];
        let count = stream.read(&mut answer).expect("read");
        let took = begun.elapsed();
        assert!(
            answer[..count].starts_with(b"HTTP/1.1 204"),
            "vm.restore was refused"
        );
        (took, child)
    })
    .expect("setns");
    end(&mut child);
    fs::remove_file(&path).expect("remove");
    took
}

fn end(child: &mut Child) {
    child.kill().expect("kill");
    child.wait().expect("wait");
}
