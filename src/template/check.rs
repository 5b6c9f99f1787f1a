//! Whether a template is whole, and whether it can run here.

use std::fs::File;
use std::path::Path;

use rewake_sys::error::Named;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::Template;
use super::digest::Sha256Hex;
use super::error::{Damage, Incompatible, TemplateError, about, call};
use super::facts::HostFacts;
use super::manifest::{ROOTFS_FILE, TemplateDisk};
use crate::fault::Faults;
use crate::snapshot::dir::{CONFIG_FILE, STATE_FILE};
use crate::units::Bytes;

impl Template {
    /// Refuses a template early that is damaged or cannot run here: the version of Cloud
    /// Hypervisor, the processor, the files and their lengths, the checksums of the two
    /// small ones. Memory and disk are not read. Blocks for about a millisecond.
    ///
    /// # Errors
    /// [`TemplateError::Incompatible`], [`TemplateError::Damaged`], else what the calls say.
    pub fn check(&self, host: &HostFacts) -> Result<(), TemplateError> {
        self.check_host(host)?;
        self.check_lengths(&Faults::NONE)?;
        self.check_contents(&Faults::NONE)
    }

    /// Only whether it can run here, by the manifest alone.
    ///
    /// # Errors
    /// [`TemplateError::Incompatible`].
    pub fn check_host(&self, host: &HostFacts) -> Result<(), TemplateError> {
        let refused = |source| {
            Err(TemplateError::Incompatible {
                id: self.id().clone(),
                source,
            })
        };
        let manifest = self.manifest();
        if let (Some(template), Some(here)) = (manifest.vmm.version, host.vmm)
            && template.major != here.major
        {
            return refused(Incompatible::Vmm {
                template,
                host: here,
            });
        }
        if let (Some(template), Some(here)) = (&manifest.host.cpu, &host.cpu) {
            if let Err(other) = template.can_run_on(here) {
                return refused(Incompatible::Cpu(other));
            }
            if template.model != here.model {
                let id = self.id();
                log::warn!("Template {id}: it is of {template}, this machine has {here}");
            }
        }
        Ok(())
    }

    /// Only whether every file is there, with its length.
    pub(super) fn check_lengths(&self, faults: &Faults) -> Result<(), TemplateError> {
        let manifest = self.manifest();
        let image = manifest.memory.image.file_name();
        self.expect_length(image, manifest.memory.length, faults)?;
        match &manifest.disk {
            Some(TemplateDisk::Own { bytes }) => self.expect_length(ROOTFS_FILE, *bytes, faults),
            Some(TemplateDisk::Base(base)) => {
                let changed = std::fs::metadata(&base.path).ok().is_none_or(|found| {
                    use std::os::unix::fs::MetadataExt;
                    let seconds = found.mtime().saturating_mul(1_000_000_000);
                    let modified = seconds.saturating_add(found.mtime_nsec());
                    (found.ino(), found.len(), modified)
                        != (base.inode, base.bytes, base.modified_ns)
                });
                if changed {
                    let path = base.path.clone();
                    return Err(self.damaged(Damage::BaseChanged { path }));
                }
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// Only whether configuration and state are those of the manifest.
    fn check_contents(&self, faults: &Faults) -> Result<(), TemplateError> {
        let manifest = self.manifest();
        for (name, expected) in [
            (CONFIG_FILE, manifest.config_sha256),
            (STATE_FILE, manifest.state_sha256),
        ] {
            let path = self.dir().join(name);
            if length(&path, faults)?.is_none() {
                return Err(self.damaged(Damage::Missing { file: name.into() }));
            }
            let actual = checksum(&path, faults)?;
            if actual != expected {
                return Err(self.damaged(Damage::Checksum {
                    file: name.into(),
                    expected,
                    actual,
                }));
            }
        }
        Ok(())
    }

    fn expect_length(
        &self,
        name: &str,
        expected: u64,
        faults: &Faults,
    ) -> Result<(), TemplateError> {
        let file = name.into();
        match length(&self.dir().join(name), faults)? {
            None => Err(self.damaged(Damage::Missing { file })),
            Some(actual) if actual != expected => Err(self.damaged(Damage::Length {
                file,
                expected: Bytes(expected),
                actual: Bytes(actual),
            })),
            Some(_) => Ok(()),
        }
    }

    fn damaged(&self, source: Damage) -> TemplateError {
        TemplateError::Damaged {
            id: self.id().clone(),
            source,
        }
    }
}

/// The length of a regular file, `None` where there is none under this name.
pub(super) fn length(path: &Path, faults: &Faults) -> Result<Option<u64>, TemplateError> {
    let found = call(
        faults,
        about("look at", path),
        || match std::fs::symlink_metadata(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            other => other.map(Some).named("lstat"),
        },
    )?;
    Ok(found
        .filter(std::fs::Metadata::is_file)
        .map(|found| found.len()))
}

/// The checksum of a regular file.
pub(super) fn checksum(path: &Path, faults: &Faults) -> Result<Sha256Hex, TemplateError> {
    digest(path, faults).map(|(digest, _)| digest)
}

/// The checksum of a regular file, and its length.
pub(super) fn digest(path: &Path, faults: &Faults) -> Result<(Sha256Hex, u64), TemplateError> {
    call(faults, about("read", path), || {
        let file = open_regular(path)?;
        Sha256Hex::of_reader(file).named("read")
    })
}

/// Opens a regular file for reading. To open anything else could itself have an effect.
pub(super) fn open_regular(path: &Path) -> Result<File, rewake_sys::CallError> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty()).named("open")?);
    if !file.metadata().named("fstat")?.is_file() {
        return Err(Errno::INVAL).named("open");
    }
    Ok(file)
}
