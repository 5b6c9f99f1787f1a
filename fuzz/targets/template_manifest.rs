//! `rewake.json`: what can be read is written back as the same manifest, and everything in it
//! is within its bounds and fit to be printed.

use rewake::template::{DiskPath, Manifest, ManifestError, TemplateDisk};

/// The input is a `rewake.json`.
pub fn run(data: &[u8]) {
    let manifest = match Manifest::parse(data) {
        Ok(manifest) => manifest,
        Err(ManifestError::Newer { found, known }) => {
            assert!(found > known, "an old format is not newer");
            return;
        }
        Err(_) => return,
    };
    assert!(manifest.memory.length % 4096 == 0 && manifest.memory.bytes > 0);
    for text in [&manifest.vmm.build, &manifest.host.kernel] {
        assert!(!text.chars().any(char::is_control), "{text:?}");
    }
    if let Some(TemplateDisk::Base(base)) = &manifest.disk {
        assert!(base.path.is_absolute() && base.bytes % 512 == 0);
    }
    if let DiskPath::Recorded { sandbox_dir } = &manifest.disk_path {
        assert!(sandbox_dir.is_absolute() && manifest.disk.is_some());
    }
    let written = manifest.to_bytes().expect("what was read can be written");
    let again = Manifest::parse(&written).expect("own output can be read");
    assert_eq!(again, manifest, "round trip");
}
