//! Which agent is at the other end.

use std::fmt;

use super::text::GuestText;

/// The two projects whose agents answer on this port, told apart by `/health` alone: Wrenn
/// answers 200 with a JSON body, E2B 204 without one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Family {
    /// Wrenn's envd.
    Wrenn,
    /// E2B's envd.
    E2b,
}

impl Family {
    /// The family behind a status of `GET /health`, `None` where the agent is not ready.
    #[must_use]
    pub const fn of_health(status: u16) -> Option<Self> {
        match status {
            200 => Some(Self::Wrenn),
            204 => Some(Self::E2b),
            _ => None,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Wrenn => "Wrenn",
            Self::E2b => "E2B",
        })
    }
}

/// What an agent speaks. Telling the two Wrenn dialects apart takes a second request:
/// `GET /memory/preload`, 200 from the newer, 404 from the older.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dialect {
    /// Wrenn's envd of the Firecracker era: no memory preload, `/snapshot/prepare` undone by
    /// the next `/health`, timestamps understood as decimal seconds only.
    WrennFirecracker,
    /// Wrenn's envd of the Cloud Hypervisor era: lifecycle ids, memory preload.
    WrennCloudHypervisor,
    /// E2B's envd.
    E2b,
}

impl Dialect {
    /// The dialect, once it is known whether the agent offers the memory preload.
    #[must_use]
    pub const fn new(family: Family, has_preload: bool) -> Self {
        match (family, has_preload) {
            (Family::E2b, _) => Self::E2b,
            (Family::Wrenn, true) => Self::WrennCloudHypervisor,
            (Family::Wrenn, false) => Self::WrennFirecracker,
        }
    }

    /// Whether a `/health` or `/init` between `/snapshot/prepare` and the stop of the vCPUs
    /// would undo the prepare.
    #[must_use]
    pub const fn health_undoes_prepare(self) -> bool {
        matches!(self, Self::WrennFirecracker)
    }
}

impl fmt::Display for Dialect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::WrennFirecracker => "Wrenn (Firecracker era)",
            Self::WrennCloudHypervisor => "Wrenn (Cloud Hypervisor era)",
            Self::E2b => "E2B",
        })
    }
}

/// A healthy agent: who it is and what it calls itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Agent {
    /// The project behind it.
    pub family: Family,
    /// Its version: Wrenn's from the body of `/health`, E2B's from `X-Envd-Version`, which it
    /// sends with answers to `/init`.
    pub version: Option<GuestText>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_200_and_204_are_healthy() {
        for (status, family) in [
            (200, Some(Family::Wrenn)),
            (204, Some(Family::E2b)),
            (201, None),
            (302, None),
            (404, None),
            (503, None),
        ] {
            assert_eq!(Family::of_health(status), family, "{status}");
        }
    }
}
