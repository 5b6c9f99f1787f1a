//! Real Cloud Hypervisor with the probe guest, on machines that have what they need.

#![allow(dead_code, reason = "every test takes what it needs")]

use std::path::{Path, PathBuf};
use std::process::Command;

use rewake::{doctor, probe_guest};

/// Names the library that is preloaded, where there is one already.
const SHIM: &str = "REWAKE_NESTED_STATE_SHIM";

/// How Cloud Hypervisor is started here.
pub(crate) struct RealVmm {
    /// The binary.
    pub(crate) program: PathBuf,
    shim: PathBuf,
}

impl RealVmm {
    /// What stands in the way, else the way; what that needs is made in `dir`, with the
    /// machine's C compiler.
    pub(crate) fn find(dir: &Path) -> Result<Self, String> {
        if probe_guest::ELF.is_none() {
            return Err("the probe guest was not built".into());
        }
        if !rustix::process::geteuid().is_root() {
            return Err("not root".into());
        }
        std::fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .map_err(|error| format!("/dev/kvm: {error}"))?;
        let program = doctor::find_program("cloud-hypervisor")
            .ok_or("there is no cloud-hypervisor on PATH")?;
        let shim = match std::env::var_os(SHIM) {
            Some(given) => given.into(),
            None => compile(dir)?,
        };
        Ok(Self { program, shim })
    }

    /// The variable that lets it take snapshots where KVM announces nested virtualisation and
    /// has none. Where KVM is sound it changes nothing.
    pub(crate) fn variable(&self) -> (String, String) {
        ("LD_PRELOAD".to_owned(), self.shim.display().to_string())
    }

    /// The same as `NAME=VALUE`, for command lines.
    pub(crate) fn assignment(&self) -> String {
        format!("LD_PRELOAD={}", self.shim.display())
    }
}

fn compile(dir: &Path) -> Result<PathBuf, String> {
    let library = dir.join("nested-state-shim.so");
    let source = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/support/nested-state-shim.c"
    );
    let made = Command::new("cc")
        .args(["-O2", "-shared", "-fPIC", "-o"])
        .arg(&library)
        .arg(source)
        .output()
        .map_err(|error| format!("cc: {error}"))?;
    if made.status.success() {
        return Ok(library);
    }
    Err(format!("cc: {}", String::from_utf8_lossy(&made.stderr)))
}
