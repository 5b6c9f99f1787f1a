//! The directory that Cloud Hypervisor is given.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use rewake::snapshot::{RunDir, RunFiles};
use rewake::vm_config::VmConfig;

use crate::scratch::{Scratch, chain};

fn files<'a>(config: &'a VmConfig, state: &'a [u8]) -> RunFiles<'a> {
    RunFiles {
        config,
        state,
        memory: Some(Path::new("/proc/self/fd/77")),
    }
}

#[test]
fn writes_three_private_files_and_removes_them() {
    let (scratch, config) = (Scratch::new(), VmConfig::default());
    let path = scratch.path("run");
    let run = RunDir::create(&path, &files(&config, b"{}")).unwrap();
    assert_eq!(run.path(), path);
    let mode = |name: &str| {
        let meta = fs::symlink_metadata(path.join(name)).unwrap();
        meta.permissions().mode() & 0o7777
    };
    assert_eq!(mode("."), 0o700);
    assert_eq!(mode("config.json"), 0o600);
    assert_eq!(mode("state.json"), 0o600);
    assert_eq!(fs::read(path.join("state.json")).unwrap(), b"{}");
    let written = fs::read(path.join("config.json")).unwrap();
    assert_eq!(VmConfig::parse(&written).unwrap().0, config);
    let link = fs::read_link(path.join("memory-ranges")).unwrap();
    assert_eq!(link, Path::new("/proc/self/fd/77"));
    run.remove().unwrap();
    assert!(scratch.census().is_empty());
}

#[test]
fn leaves_what_was_there_before_alone() {
    let (scratch, config) = (Scratch::new(), VmConfig::default());
    let path = scratch.path("run");
    fs::create_dir(&path).unwrap();
    fs::write(path.join("config.json"), "mine").unwrap();
    let error = RunDir::create(&path, &files(&config, b"{}")).unwrap_err();
    assert!(error.is_taken(), "{}", chain(&error));
    assert_eq!(fs::read(path.join("config.json")).unwrap(), b"mine");
    assert!(error.left().is_empty());
}

#[test]
fn does_not_follow_a_link_in_its_place() {
    let (scratch, config) = (Scratch::new(), VmConfig::default());
    let path = scratch.path("run");
    std::os::unix::fs::symlink(scratch.path("elsewhere"), &path).unwrap();
    let error = RunDir::create(&path, &files(&config, b"{}")).unwrap_err();
    assert!(error.is_taken(), "{}", chain(&error));
    assert!(!scratch.path("elsewhere").exists());
}

#[test]
fn is_gone_again_when_a_file_cannot_be_made() {
    let (scratch, config) = (Scratch::new(), VmConfig::default());
    let path = scratch.path("run");
    // A link target longer than a path may be: the third and last file fails.
    let long = "x".repeat(5000);
    let files = RunFiles {
        memory: Some(Path::new(&long)),
        ..files(&config, b"{}")
    };
    let error = RunDir::create(&path, &files).unwrap_err();
    let text = chain(&error);
    assert!(text.starts_with("Cannot make memory-ranges in "), "{text}");
    assert!(error.left().is_empty());
    assert!(scratch.census().is_empty(), "{:?}", scratch.census());
}

#[test]
fn says_what_it_could_not_remove() {
    let (scratch, config) = (Scratch::new(), VmConfig::default());
    let path = scratch.path("run");
    let run = RunDir::create(&path, &files(&config, b"{}")).unwrap();
    fs::write(path.join("foreign"), "").unwrap();
    let text = chain(&run.remove().unwrap_err());
    assert!(text.starts_with("Cannot remove "), "{text}");
    assert!(path.join("foreign").exists());
}
