//! What this machine has and lacks for restoring sandboxes, and how to mend it.

mod storage;

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rewake_sys::{kvm, uffd};
use serde::Serialize;

pub use storage::examine_root;

use crate::wire::excerpt::excerpt;

/// How a check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// As it should be.
    Good,
    /// Something works less well, or not at all that is not always needed.
    Degraded,
    /// Without this no VM can be restored here.
    Missing,
}

/// One check of the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at, in a word or two.
    pub name: &'static str,
    /// How it came out.
    pub status: Status,
    /// What was found.
    pub detail: String,
    /// What to do about it; empty where there is nothing to do.
    pub remedy: String,
}

impl Finding {
    /// A check that came out well.
    #[must_use]
    pub fn good(name: &'static str, detail: impl Into<String>) -> Self {
        Self {
            name,
            status: Status::Good,
            detail: detail.into(),
            remedy: String::new(),
        }
    }

    /// A check that did not, and what to do about it.
    #[must_use]
    pub fn bad(
        name: &'static str,
        status: Status,
        detail: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self {
            name,
            status,
            detail: detail.into(),
            remedy: remedy.into(),
        }
    }
}

/// The oldest kernel with everything that rewake uses: `close_range(2)` came with 5.9.
const OLDEST_KERNEL: (u32, u32) = (5, 9);
/// The oldest and the newest Cloud Hypervisor that rewake knows.
const KNOWN_VERSIONS: std::ops::RangeInclusive<u32> = 50..=53;
const CAP_NET_ADMIN: u32 = 12;
const CAP_SYS_ADMIN: u32 = 21;

/// Looks at the kernel, the devices, the privileges and Cloud Hypervisor. Starts
/// `cloud-hypervisor --version`; changes nothing.
///
/// `vmm` names the binary; otherwise it is looked up on `PATH`.
#[must_use]
pub fn examine(vmm: Option<&Path>) -> Vec<Finding> {
    vec![
        kernel(),
        kvm_device(),
        tun_device(),
        userfaultfd(),
        capability("network admin", CAP_NET_ADMIN, "CAP_NET_ADMIN"),
        capability("system admin", CAP_SYS_ADMIN, "CAP_SYS_ADMIN"),
        cloud_hypervisor(vmm),
        runtime_directory(Path::new("/run")),
    ]
}

fn kernel() -> Finding {
    let uname = rustix::system::uname();
    let release = uname.release().to_string_lossy().into_owned();
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map_while(|part| part.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version >= OLDEST_KERNEL {
        Finding::good("kernel", format!("Linux {release}"))
    } else {
        let (major, minor) = OLDEST_KERNEL;
        Finding::bad(
            "kernel",
            Status::Missing,
            format!("Linux {release} is too old"),
            format!("boot Linux {major}.{minor} or newer (close_range, openat2, pidfds)"),
        )
    }
}

fn kvm_device() -> Finding {
    match kvm::api_version() {
        Ok(12) => Finding::good("kvm", "/dev/kvm answers, API version 12"),
        Ok(other) => Finding::bad(
            "kvm",
            Status::Missing,
            format!("/dev/kvm answers with API version {other}, not 12"),
            "use a kernel with the stable KVM API",
        ),
        Err(error) if error.is_denied() => Finding::bad(
            "kvm",
            Status::Missing,
            format!("{error}"),
            "run as root, or add your user to the group of /dev/kvm",
        ),
        Err(error) => Finding::bad(
            "kvm",
            Status::Missing,
            format!("{error}"),
            "enable virtualisation in the firmware and load kvm_intel or kvm_amd \
             (on a virtual machine: nested virtualisation)",
        ),
    }
}

fn tun_device() -> Finding {
    let opened = fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun");
    match opened {
        Ok(_) => Finding::good("tun", "/dev/net/tun can be opened"),
        Err(error) => Finding::bad(
            "tun",
            Status::Missing,
            format!("/dev/net/tun: {error}"),
            "modprobe tun, and allow your user to open /dev/net/tun",
        ),
    }
}

fn userfaultfd() -> Finding {
    match uffd::probe() {
        Ok(uffd::Access::Device) => Finding::good(
            "userfaultfd",
            "through /dev/userfaultfd: on-demand restore works",
        ),
        Ok(uffd::Access::Syscall) => Finding::good(
            "userfaultfd",
            "through the system call: on-demand restore works",
        ),
        Err(error) => Finding::bad(
            "userfaultfd",
            Status::Degraded,
            format!("{error}: on-demand restore fails, copying works"),
            "allow your user to open /dev/userfaultfd (Linux 6.1), or run with \
             CAP_SYS_PTRACE, or set vm.unprivileged_userfaultfd=1",
        ),
    }
}

fn capability(name: &'static str, number: u32, spelling: &str) -> Finding {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or(0);
    if effective >> number & 1 == 1 {
        Finding::good(name, format!("{spelling} is there"))
    } else {
        Finding::bad(
            name,
            Status::Degraded,
            format!("{spelling} is missing: no namespaces, taps or disks can be made"),
            "run as root, or give the binary the capability",
        )
    }
}

fn cloud_hypervisor(vmm: Option<&Path>) -> Finding {
    const NAME: &str = "cloud-hypervisor";
    let Some(path) = vmm.map(Path::to_owned).or_else(|| find_program(NAME)) else {
        return Finding::bad(
            NAME,
            Status::Missing,
            "not on PATH",
            "install Cloud Hypervisor v53, or name the binary with --vmm; \
             `rewake demo` works without it, on the stand-in",
        );
    };
    match version_line(&path) {
        Ok(line) => match major_version(&line) {
            Some(major) if KNOWN_VERSIONS.contains(&major) => {
                Finding::good(NAME, format!("{} ({line})", path.display()))
            }
            Some(major) if major > *KNOWN_VERSIONS.end() => Finding::bad(
                NAME,
                Status::Degraded,
                format!(
                    "{} ({line}) is newer than this rewake knows",
                    path.display()
                ),
                "expect it to work; report what does not",
            ),
            _ => Finding::bad(
                NAME,
                Status::Missing,
                format!("{} says {line:?}", path.display()),
                format!(
                    "use v{} to v{}",
                    KNOWN_VERSIONS.start(),
                    KNOWN_VERSIONS.end()
                ),
            ),
        },
        Err(error) => Finding::bad(
            NAME,
            Status::Missing,
            format!("{}: {error}", path.display()),
            "name a binary that runs here with --vmm",
        ),
    }
}

fn version_line(path: &Path) -> std::io::Result<String> {
    let output = Command::new(path).arg("--version").env_clear().output()?;
    let first = output.stdout.split(|byte| *byte == b'\n').next();
    Ok(excerpt(first.unwrap_or_default()))
}

/// The first number after a `v`: 53 of `cloud-hypervisor v53.0`.
fn major_version(line: &str) -> Option<u32> {
    line.split_ascii_whitespace().find_map(|word| {
        let digits = word.strip_prefix('v')?;
        let end = digits
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(digits.len());
        digits[..end].parse().ok()
    })
}

/// The first executable file of this name on `PATH`.
#[must_use]
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    find_in(&path, name)
}

fn find_in(path: &OsStr, name: &str) -> Option<PathBuf> {
    std::env::split_paths(path)
        .filter(|dir| dir.is_absolute())
        .map(|dir| dir.join(name))
        .find(|file| {
            fs::metadata(file)
                .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
        })
}

fn runtime_directory(run: &Path) -> Finding {
    match rustix::fs::access(run, rustix::fs::Access::WRITE_OK) {
        Ok(()) => Finding::good(
            "runtime directory",
            format!("{} is writable", run.display()),
        ),
        Err(error) => Finding::bad(
            "runtime directory",
            Status::Degraded,
            format!("{}: {error}", run.display()),
            "run as root, or name a directory of yours with --runtime-dir",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_what_the_binary_prints() {
        for (line, major) in [
            ("cloud-hypervisor v53.0", Some(53)),
            ("cloud-hypervisor v53.0-dirty", Some(53)),
            ("cloud-hypervisor v50", Some(50)),
            ("something else", None),
            ("version vx", None),
        ] {
            assert_eq!(major_version(line), major, "{line}");
        }
    }

    #[test]
    fn every_bad_finding_comes_with_a_remedy() {
        for finding in examine(Some(Path::new("/nonexistent/vmm"))) {
            assert_eq!(
                finding.remedy.is_empty(),
                finding.status == Status::Good,
                "{finding:?}"
            );
        }
    }

    #[test]
    fn programs_are_found_only_where_they_can_be_run() {
        let path = OsStr::new("/etc:/bin:/usr/bin");
        assert!(find_in(path, "sh").is_some());
        assert_eq!(find_in(path, "passwd-that-is-not-there"), None);
        assert_eq!(find_in(OsStr::new("/etc"), "passwd"), None);
    }
}
