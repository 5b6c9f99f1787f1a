//! Versions of Cloud Hypervisor and what they differ in.

use std::fmt;
use std::str::FromStr;

/// A version, as `vmm.ping` and `cloud-hypervisor --version` tell it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    /// 53 of v53.0.
    pub major: u32,
    /// 0 of v53.0.
    pub minor: u32,
    /// The third part, 0 where there is none.
    pub patch: u32,
}

/// The text is no version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("A version is two or three numbers between dots")]
pub struct VersionError;

impl Version {
    /// v50.0.
    pub const V50: Self = Self::release(50);
    /// v51.0.
    pub const V51: Self = Self::release(51);
    /// v52.0.
    pub const V52: Self = Self::release(52);
    /// v53.0, the newest whose behaviour is known here.
    pub const V53: Self = Self::release(53);

    const fn release(major: u32) -> Self {
        Self {
            major,
            minor: 0,
            patch: 0,
        }
    }

    /// How much is known of this version.
    #[must_use]
    pub const fn support(self) -> Support {
        match self.major {
            0..50 => Support::TooOld,
            50..=53 => Support::Known,
            _ => Support::Newer,
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

impl FromStr for Version {
    type Err = VersionError;

    /// Takes `53.0.0`, `v53.0`, and either with a suffix after `-` or `+`
    /// (`v53.0-12-g0123abc-dirty`).
    fn from_str(text: &str) -> Result<Self, VersionError> {
        let text = text.strip_prefix('v').unwrap_or(text);
        let numbers = text.split(['-', '+']).next().unwrap_or_default();
        let mut parts = numbers.split('.').map(|part| {
            let digits = !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
            part.parse().ok().filter(|_| digits).ok_or(VersionError)
        });
        let major = parts.next().ok_or(VersionError)??;
        let minor = parts.next().ok_or(VersionError)??;
        let patch = parts.next().transpose()?.unwrap_or(0);
        match parts.next() {
            None => Ok(Self {
                major,
                minor,
                patch,
            }),
            Some(_) => Err(VersionError),
        }
    }
}

/// How much is known of a version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Support {
    /// Older than v50: nothing is promised.
    TooOld,
    /// v50 to v53.
    Known,
    /// Newer than v53, and treated like it.
    Newer,
}

/// What a client or a caller of it must know to differ between versions.
///
/// CH ignores JSON keys that it does not know. A v51 told to restore on demand and to resume
/// would copy all memory, stay paused and report success; hence this table, and typed errors
/// before anything is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "a table of yes and no")]
pub struct Features {
    /// `vm.restore` knows `memory_restore_mode`. Since v52.
    pub restore_on_demand: bool,
    /// `vm.restore` knows `resume`. Since v52.
    pub restore_resume: bool,
    /// `memory_restore_mode` may be `CopyOnWrite`. In no release up to v53.
    pub restore_copy_on_write: bool,
    /// A restore skips the holes of a sparse memory file. Since v52.
    pub restore_skips_holes: bool,
    /// `vm.snapshot` is refused while an on-demand restore is filling memory. Before v53
    /// (where it fills on touch only) such a snapshot may hold zeros instead of pages.
    pub snapshot_waits_for_memory: bool,
    /// A private memory zone opens its file read-only. Since v51; v50 opens it for writing,
    /// and a balloon then punches holes into it.
    pub private_zone_is_read_only: bool,
    /// A restored guest's kvm-clock is moved on to the present. Since v53.
    pub clock_catches_up: bool,
    /// A call without a VM is answered with 404 instead of 500. Since v53.
    pub missing_vm_is_404: bool,
    /// `vm.add-generic-vhost-user`. Since v52.
    pub generic_vhost_user: bool,
    /// `vm.add-device` takes a descriptor. Since v53.
    pub add_device_fd: bool,
    /// `vm.send-migration` returns at once; events tell the outcome. Since v53.
    pub send_migration_returns_at_once: bool,
    /// Disks know `image_type`. Since v51.
    pub image_type: bool,
    /// `cpus.core_scheduling`, and the option `--no-shutdown`. Since v52.
    pub core_scheduling: bool,
}

impl Features {
    /// Those of the newest known version, v53.
    pub const NEWEST: Self = Self::of(Version::V53);

    /// Those of a version. Newer ones than v53 are treated like v53, older ones than v50
    /// like v50.
    #[must_use]
    pub const fn of(version: Version) -> Self {
        let (v51, v52, v53) = (
            version.major >= 51,
            version.major >= 52,
            version.major >= 53,
        );
        Self {
            restore_on_demand: v52,
            restore_resume: v52,
            restore_copy_on_write: false,
            restore_skips_holes: v52,
            snapshot_waits_for_memory: v53,
            private_zone_is_read_only: v51,
            clock_catches_up: v53,
            missing_vm_is_404: v53,
            generic_vhost_user: v52,
            add_device_fd: v53,
            send_migration_returns_at_once: v53,
            image_type: v51,
            core_scheduling: v52,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_with_and_without_suffix() {
        for (text, version) in [
            ("53.0.0", Ok((53, 0, 0))),
            ("v53.0", Ok((53, 0, 0))),
            ("v53.0-dirty", Ok((53, 0, 0))),
            ("v50.1-12-g0123abc-dirty", Ok((50, 1, 0))),
            ("51.2.3+build.7", Ok((51, 2, 3))),
            ("53", Err(VersionError)),
            ("", Err(VersionError)),
            ("v", Err(VersionError)),
            ("53.", Err(VersionError)),
            ("53.0.0.0", Err(VersionError)),
            ("+53.0", Err(VersionError)),
            ("53.-1", Err(VersionError)),
            ("99999999999.0", Err(VersionError)),
            ("fifty.three", Err(VersionError)),
        ] {
            let read = text.parse::<Version>();
            let parts = read.map(|v| (v.major, v.minor, v.patch));
            assert_eq!(parts, version, "{text:?}");
        }
    }

    #[test]
    fn versions_compare_by_number() {
        let v = |text: &str| text.parse::<Version>().unwrap();
        assert!(v("v50.1") > v("v50.0"));
        assert!(v("100.0") > v("53.0"));
        assert_eq!(v("53.0.0").to_string(), "53.0.0");
    }

    #[test]
    fn features_follow_the_releases() {
        let at = |major| Features::of(Version::release(major));
        for (name, has, since) in [
            (
                "on demand",
                (|f| f.restore_on_demand) as fn(Features) -> bool,
                52,
            ),
            ("resume", |f| f.restore_resume, 52),
            ("holes", |f| f.restore_skips_holes, 52),
            ("read-only zones", |f| f.private_zone_is_read_only, 51),
            ("snapshot waits", |f| f.snapshot_waits_for_memory, 53),
            ("404", |f| f.missing_vm_is_404, 53),
            ("device by descriptor", |f| f.add_device_fd, 53),
            ("vhost-user", |f| f.generic_vhost_user, 52),
            ("image type", |f| f.image_type, 51),
        ] {
            for major in 49..=60 {
                assert_eq!(has(at(major)), major >= since, "{name} in v{major}");
            }
        }
        assert_eq!(at(54), Features::NEWEST);
        assert!(!at(54).restore_copy_on_write);
        assert_eq!(Version::release(49).support(), Support::TooOld);
        assert_eq!(Version::V53.support(), Support::Known);
        assert_eq!(Version::release(54).support(), Support::Newer);
    }
}
