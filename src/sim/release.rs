//! Which Cloud Hypervisor release is played, and what differs between them.

use std::fmt;
use std::str::FromStr;

/// An emulated release: v50 to v53. v52 and v53 follow captures of the real binaries; v50
/// and v51 follow their sources only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Release(u8);

impl Release {
    /// What is played when nothing else is asked for.
    pub(super) const DEFAULT: Self = Self(53);

    /// `vmm.ping.version`.
    pub(super) fn version(self) -> String {
        format!("{}.0.0", self.0)
    }

    /// `vmm.ping.build_version`: says what it is.
    pub(super) fn build_version(self) -> String {
        format!("v{}.0-rewake-sim (stand-in, not Cloud Hypervisor)", self.0)
    }

    pub(super) const fn number(self) -> u8 {
        self.0
    }

    /// v52 added `memory_restore_mode` and `resume` to vm.restore; older ones ignore both.
    pub(super) const fn knows_restore_mode(self) -> bool {
        self.0 >= 52
    }

    /// v53 answers 404 where a VM is missing; older ones 500.
    pub(super) const fn missing_vm_status(self) -> u16 {
        if self.0 >= 53 { 404 } else { 500 }
    }

    /// Up to v52 absent options are written as `null`.
    pub(super) const fn writes_nulls(self) -> bool {
        self.0 < 53
    }

    /// v53 fills an on-demand restore in the background and refuses snapshots meanwhile.
    pub(super) const fn fills_in_background(self) -> bool {
        self.0 >= 53
    }

    /// Up to v51 a copying restore reads a short memory file for ever.
    pub(super) const fn loops_on_short_memory(self) -> bool {
        self.0 < 52
    }

    /// v53 moves the guest's clock on by the age of the snapshot.
    pub(super) const fn advances_clock(self) -> bool {
        self.0 >= 53
    }

    /// Names the snapshot file in the error chain (v53), or only gives its cause.
    pub(super) const fn names_snapshot_files(self) -> bool {
        self.0 >= 53
    }
}

impl FromStr for Release {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse() {
            Ok(number @ 50..=53) => Ok(Self(number)),
            _ => Err(format!("version must be 50, 51, 52 or 53, not {text:?}")),
        }
    }
}

impl fmt::Display for Release {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "rewake-sim v{}.0 (stand-in, not Cloud Hypervisor)",
            self.0
        )
    }
}
