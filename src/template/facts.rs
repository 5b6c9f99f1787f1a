//! What a machine offers to templates.

use std::path::Path;
use std::process::{Command, Stdio};

use rewake_sys::kvm;

use super::cpu::Cpu;
use crate::snapshot::CpuidEntry;
use crate::vmm::api::Version;
use crate::vmm::launch::LaunchSpec;
use crate::wire::excerpt::excerpt;

/// What is known of this machine. What is not known is not held against a template.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HostFacts {
    /// The kernel's release (`uname -r`).
    pub kernel: String,
    /// The processor: as KVM would show it to a guest, or as the kernel describes it where
    /// there is no KVM.
    pub cpu: Option<Cpu>,
    /// The version of Cloud Hypervisor that is going to be used.
    pub vmm: Option<Version>,
}

impl HostFacts {
    /// Looks at the kernel and the processor. Takes about a millisecond.
    #[must_use]
    pub fn of_machine() -> Self {
        let kernel = rustix::system::uname();
        let kernel = excerpt(kernel.release().to_bytes());
        Self {
            kernel,
            cpu: cpu_of_kvm().or_else(cpu_of_kernel),
            vmm: None,
        }
    }

    /// The same, with the version that this Cloud Hypervisor prints. Starts it once.
    #[must_use]
    pub fn gather(vmm: &LaunchSpec) -> Self {
        Self {
            vmm: printed_version(vmm),
            ..Self::of_machine()
        }
    }
}

fn cpu_of_kvm() -> Option<Cpu> {
    let table = match kvm::supported_cpuid() {
        Ok(table) => table,
        Err(error) => {
            log::debug!("KVM does not say what it can show of the processor: {error}");
            return None;
        }
    };
    let table: Vec<CpuidEntry> = table
        .into_iter()
        .map(|entry| CpuidEntry {
            function: entry.function,
            index: entry.index,
            eax: entry.eax,
            ebx: entry.ebx,
            ecx: entry.ecx,
            edx: entry.edx,
        })
        .collect();
    Cpu::of_table(&table)
}

fn cpu_of_kernel() -> Option<Cpu> {
    let text = std::fs::read_to_string(Path::new("/proc/cpuinfo")).ok()?;
    Cpu::of_cpuinfo(&text)
}

/// Runs `PROGRAM --version` and reads the version out of its first line.
fn printed_version(vmm: &LaunchSpec) -> Option<Version> {
    use std::os::unix::process::CommandExt;
    let mut command = Command::new(&vmm.program);
    if let Some(name) = &vmm.name {
        command.arg0(name);
    }
    command.args(&vmm.args).arg("--version").env_clear();
    let output = command.stdin(Stdio::null()).output();
    let output = output.inspect_err(|error| log::debug!("{}: {error}", vmm.program.display()));
    let text = String::from_utf8_lossy(&output.ok()?.stdout).into_owned();
    version_in(text.lines().next()?)
}

/// The first word that is a version: 53.0.0 of `cloud-hypervisor v53.0`.
fn version_in(line: &str) -> Option<Version> {
    line.split_ascii_whitespace()
        .find_map(|word| word.strip_prefix('v')?.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_what_the_binary_prints() {
        for (line, version) in [
            ("cloud-hypervisor v53.0", Some(Version::V53)),
            ("cloud-hypervisor v52.0-12-gabc-dirty", Some(Version::V52)),
            (
                "cloud-hypervisor v53.0 (stand-in, rewake 0.1.0)",
                Some(Version::V53),
            ),
            ("version unknown", None),
        ] {
            assert_eq!(version_in(line), version, "{line}");
        }
    }

    #[test]
    fn this_machine_runs_what_it_froze_itself() {
        let facts = HostFacts::of_machine();
        assert!(!facts.kernel.is_empty());
        if let Some(cpu) = &facts.cpu {
            cpu.can_run_on(cpu).unwrap();
        }
    }
}
