//! A host of its own with the stand-in: root, runtime directory, network namespace; a template
//! built on it; and a count of everything that could be left behind.

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rewake::deadline::Deadline;
use rewake::envd::client::Client as Agent;
use rewake::fault::Faults;
use rewake::host::{Host, HostConfig, LaunchOptions, Limits, Sandbox};
use rewake::ids::{SandboxId, TemplateId};
use rewake::resource::disk::{DiskKind, DiskMode};
use rewake::template::{BuildSpec, Template};
use rewake::units::Bytes;
use rewake::vmm::launch::LaunchSpec;
use serde_json::Value;

use crate::netlab;

pub(crate) const STAND_IN: &str = env!("CARGO_BIN_EXE_rewake-sim");
pub(crate) const TEMPLATE: &str = "base";
/// The guest's RAM.
pub(crate) const MEMORY: Bytes = Bytes::mib(32);

pub(crate) fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(30))
}

/// A host that shares nothing with any other test's.
pub(crate) struct Lab {
    pub(crate) net: netlab::Lab,
    pub(crate) root: PathBuf,
}

impl Lab {
    /// `None`, said aloud, where no namespaces can be made.
    pub(crate) fn new(test: &str) -> Option<Self> {
        let net = netlab::Lab::new(test)?;
        let root = net.dir.join("root");
        fs::create_dir_all(&root).unwrap();
        Some(Self { net, root })
    }

    /// Its configuration; `sim` are orders for the stand-in.
    pub(crate) fn config(&self, sim: &[&str]) -> HostConfig {
        let host = format!(
            "/proc/{}/fd/{}",
            std::process::id(),
            self.net.host.as_raw_fd()
        );
        let mut config = config_of(&self.net.dir, host.as_ref(), sim);
        config.net.prefix = self.net.config().prefix;
        config
    }

    pub(crate) fn open(&self) -> Host {
        Host::open(self.config(&[])).unwrap()
    }

    pub(crate) fn open_with(&self, sim: &[&str], faults: Faults) -> Host {
        let mut config = self.config(sim);
        config.faults = faults;
        Host::open(config).unwrap()
    }

    /// Builds the template that everything is launched from.
    pub(crate) fn template(&self, host: &Host) -> Template {
        let (kernel, image) = (self.net.dir.join("kernel"), self.net.dir.join("image.raw"));
        fs::write(&kernel, "the stand-in does not read it").unwrap();
        let mut bytes = vec![0; 256 << 10];
        bytes[8192..12288].fill(7);
        fs::write(&image, bytes).unwrap();
        let name = TemplateId::new(TEMPLATE).unwrap();
        let spec = BuildSpec {
            rootfs: Some(image),
            disk_mode: DiskMode::Only(DiskKind::Copy),
            memory: MEMORY,
            runtime_dir: host.config().runtime_dir.clone(),
            ..BuildSpec::new(name, kernel, stand_in(&[]))
        };
        host.build(&spec, &mut |_| {}, soon()).unwrap()
    }

    /// The directory of a sandbox.
    pub(crate) fn sandbox(&self, id: &SandboxId) -> PathBuf {
        self.root.join("sandboxes").join(id.as_str())
    }

    /// What a restart of the machine does: no process, namespace, rule or file in memory is
    /// left, and every journal is of an earlier boot.
    pub(crate) fn restart(&self) {
        kill_all(&self.processes());
        let run = self.net.dir.join("run");
        while !self.processes().is_empty() {
            std::thread::sleep(Duration::from_millis(5));
        }
        let prefix = self.net.config().prefix;
        // A namespace goes in the kernel's own time, and only when nobody has it mounted: its
        // link with the host would stay as long.
        for line in netlab::ip(&self.net.host, "-o link show").lines() {
            let name = line.split([' ', ':', '@']).nth(2).unwrap();
            if name.starts_with(&prefix) {
                netlab::ip(&self.net.host, &format!("link del {name}"));
            }
        }
        for pin in fs::read_dir(rewake_sys::netns::RUN_DIR).unwrap().flatten() {
            let name = pin.file_name().into_string().unwrap();
            if name.starts_with(&format!("{prefix}-")) {
                netlab::ip(&self.net.host, &format!("netns del {name}"));
            }
        }
        netlab::run(&self.net.host, "nft", &["flush", "ruleset"]);
        fs::remove_dir_all(&run).unwrap();
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
        let boot = boot.trim();
        let earlier: String = boot.chars().rev().collect();
        for entry in fs::read_dir(self.root.join("sandboxes")).unwrap().flatten() {
            let path = entry.path().join("journal");
            let text = fs::read_to_string(&path).unwrap();
            assert!(text.contains(boot), "{}", path.display());
            fs::write(&path, text.replace(boot, &earlier)).unwrap();
        }
    }

    /// Everything that sandboxes could leave behind: what the network has, files under root
    /// and runtime directory but for templates, processes of this lab.
    pub(crate) fn census(&self) -> BTreeSet<String> {
        let mut lines = netlab::census::Census::take(
            &self.net.host,
            &self.net.config().prefix,
            &self.net.dir.join("run"),
        )
        .0;
        for dir in [
            "root/sandboxes",
            "root/disks",
            "root/templates",
            "run/vm",
            "run/slots",
        ] {
            let entries = fs::read_dir(self.net.dir.join(dir)).into_iter().flatten();
            for entry in entries.flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                if name != "next" {
                    lines.insert(format!("file {dir}/{name}"));
                }
            }
        }
        lines.extend(self.processes().iter().map(|pid| format!("process {pid}")));
        lines
    }

    /// The processes that were started for VMs of this lab.
    pub(crate) fn processes(&self) -> Vec<u32> {
        let found = rewake::vmm::orphan::list(&self.net.dir.join("run"));
        found.into_iter().map(|it| it.process.pid).collect()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // Sandboxes outlive everybody, but not a test that failed.
        kill_all(&self.processes());
    }
}

fn kill_all(pids: &[u32]) {
    for pid in pids {
        let pid = i32::try_from(*pid).ok();
        if let Some(pid) = pid.and_then(rustix::process::Pid::from_raw) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
}

/// The configuration of the host in a directory.
pub(crate) fn config_of(dir: &Path, netns: &Path, sim: &[&str]) -> HostConfig {
    let mut config = HostConfig::new(dir.join("root")).with_runtime_dir(dir.join("run"));
    config.netns = Some(netns.to_owned());
    config.vmm = stand_in(sim);
    config.disk_mode = DiskMode::Only(DiskKind::Copy);
    config.limits = Limits {
        sandboxes: None,
        memory_reserve: Bytes(0),
    };
    config
}

pub(crate) fn stand_in(orders: &[&str]) -> LaunchSpec {
    let args = orders.iter().flat_map(|it| ["--sim", it]);
    LaunchSpec {
        program: STAND_IN.into(),
        args: args.map(str::to_owned).collect(),
        ..LaunchSpec::default()
    }
}

/// What the stand-in's guest says of itself.
pub(crate) fn memory_of(sandbox: &Sandbox) -> Memory {
    recall(&sandbox.agent().unwrap())
}

pub(crate) fn recall(agent: &Agent) -> Memory {
    let answer = agent.get_other("/sim/state", soon()).unwrap();
    let value: Value = serde_json::from_slice(&answer.body).unwrap();
    Memory {
        nonce: value["nonce"].as_str().unwrap().to_owned(),
        counter: value["counter"].as_u64().unwrap(),
    }
}

/// What only lives in the guest's memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Memory {
    pub(crate) nonce: String,
    pub(crate) counter: u64,
}

impl Memory {
    /// The same guest, later.
    pub(crate) fn goes_on_in(&self, later: &Self) {
        assert_eq!(self.nonce, later.nonce, "another guest");
        assert!(self.counter < later.counter, "{self:?} became {later:?}");
    }
}

/// The sandbox's disk, as the stand-in's guest would write to it.
pub(crate) fn disk_of(sandbox: &Sandbox) -> PathBuf {
    sandbox.disk().unwrap().unwrap().path.unwrap()
}

pub(crate) fn write_disk(path: &Path, at: u64, byte: u8) {
    use std::os::unix::fs::FileExt;
    let file = fs::OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(&[byte; 512], at).unwrap();
}

pub(crate) fn read_disk(path: &Path, at: u64) -> u8 {
    use std::os::unix::fs::FileExt;
    let mut byte = [0];
    fs::File::open(path)
        .unwrap()
        .read_exact_at(&mut byte, at)
        .unwrap();
    byte[0]
}

/// An error with all its causes.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

pub(crate) fn launch(host: &Host, template: &Template) -> Sandbox {
    host.launch(template, LaunchOptions::default())
        .unwrap_or_else(|error| panic!("{}", chain(&error)))
}
