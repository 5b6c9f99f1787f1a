//! Finding Cloud Hypervisor processes whose maker died before it could write their pid down.
//!
//! Every process is started with one environment variable that names its VM's directory. That
//! directory's name has a random part and was written down before, so a process that bears it
//! is proven ours, however little its maker lived to say.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rewake_sys::process;

use crate::resource::slot::ProcessIdentity;

/// The variable.
const VARIABLE: &str = "REWAKE_VM_DIR";

/// The environment variable by which the process of a VM directory is found again.
#[must_use]
pub fn mark(vm_dir: &Path) -> (String, String) {
    (VARIABLE.to_owned(), vm_dir.display().to_string())
}

/// A process that was started for a VM directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Marked {
    /// The directory.
    pub vm_dir: PathBuf,
    /// The process.
    pub process: ProcessIdentity,
}

/// The living processes started for VM directories beneath `runtime_dir`.
///
/// Reads `/proc`, one file per process that the caller may look into; others cannot be ours,
/// since they would belong to another user. A few milliseconds for some hundred processes.
#[must_use]
pub fn list(runtime_dir: &Path) -> Vec<Marked> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter_map(|pid| marked(pid, runtime_dir)).collect()
}

fn marked(pid: u32, runtime_dir: &Path) -> Option<Marked> {
    let start_time = process::start_time(pid)?;
    let environment = std::fs::read(format!("/proc/{pid}/environ")).ok()?;
    let vm_dir = value(&environment)?;
    // The same process before and after its environment was read.
    (vm_dir.starts_with(runtime_dir) && process::start_time(pid) == Some(start_time)).then(|| {
        Marked {
            vm_dir: vm_dir.to_owned(),
            process: ProcessIdentity { pid, start_time },
        }
    })
}

fn value(environment: &[u8]) -> Option<&Path> {
    let mut variables = environment.split(|byte| *byte == 0);
    variables.find_map(|variable| {
        let value = variable.strip_prefix(VARIABLE.as_bytes())?;
        Some(Path::new(OsStr::from_bytes(value.strip_prefix(b"=")?)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_marked_process_is_found_by_its_directory_and_no_other() {
        let runtime = PathBuf::from(format!("/nowhere/rewake-orphan-{}", std::process::id()));
        let vm_dir = runtime.join("vm/a1.0123abcd");
        let (name, value) = mark(&vm_dir);
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .env(name, value)
            .spawn()
            .unwrap();
        let found = list(&runtime);
        child.kill().unwrap();
        child.wait().unwrap();
        let [one] = &found[..] else {
            panic!("{found:?}")
        };
        assert_eq!((one.process.pid, &one.vm_dir), (child.id(), &vm_dir));
        assert!(list(Path::new("/elsewhere")).is_empty());
        assert!(list(&runtime).is_empty());
    }

    #[test]
    fn the_variable_is_found_wherever_it_stands() {
        for (environment, expected) in [
            ("", None),
            ("REWAKE_VM_DIR", None),
            ("REWAKE_VM_DIRS=/a\0", None),
            ("A=REWAKE_VM_DIR=/a\0", None),
            ("A=1\0REWAKE_VM_DIR=/a b\0C=3\0", Some("/a b")),
        ] {
            let found = value(environment.as_bytes());
            assert_eq!(found, expected.map(Path::new), "{environment:?}");
        }
    }
}
