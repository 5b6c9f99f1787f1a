//! The directory of one running VM: its API socket, its vsock socket, and the snapshot that
//! CH is given.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use crate::ids::SandboxId;
use crate::resource::claim;
use crate::resource::ledger::{Ledger, Step};
use crate::resource::private::private;

/// Beneath the runtime directory: one directory per VM.
const VM_DIRS: &str = "vm";

/// A directory for one VM, readable by its owner only: `RUNTIME/vm/ID.RANDOM`.
///
/// On `/run` it lies in memory, so nothing in it is ever synced: after a crash of the
/// machine there is no VM that it could belong to.
#[derive(Debug, Clone)]
pub struct VmDir {
    path: PathBuf,
}

impl VmDir {
    /// Chooses the path; nothing is made yet.
    #[must_use]
    pub fn choose(runtime: &Path, id: &SandboxId) -> Self {
        let random = uuid::Uuid::new_v4().simple().to_string();
        let name = format!("{id}.{}", &random[..8]);
        Self {
            path: Self::parent_of_all(runtime).join(name),
        }
    }

    /// The directory in which the directories of all VMs lie.
    #[must_use]
    pub fn parent_of_all(runtime: &Path) -> PathBuf {
        runtime.join(VM_DIRS)
    }

    /// Makes the directory, and whatever of its parents is missing. The step that removes it
    /// is in the ledger before it exists.
    ///
    /// # Errors
    /// What `mkdir` says; nothing is left then.
    pub fn create(&self, ledger: &mut Ledger) -> io::Result<()> {
        self.make(ledger, || private().create(&self.path))
    }

    /// The same with a file in it that is locked for as long as the result is open.
    ///
    /// # Errors
    /// Those of [`VmDir::create`], and of the file; nothing is left then.
    pub(super) fn create_claimed(&self, claim: &str, ledger: &mut Ledger) -> io::Result<File> {
        self.make(ledger, || claim::make(&self.path, claim))
    }

    fn make<T>(&self, ledger: &mut Ledger, make: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        if let Some(parent) = self.path.parent() {
            private().recursive(true).create(parent)?;
        }
        let step = Step::Directory {
            path: self.path.clone(),
        };
        ledger.push(step.clone());
        make().inspect_err(|_| {
            // Whatever is there is not ours.
            ledger.forget(&step);
        })
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where CH's API socket goes.
    #[must_use]
    pub fn api_socket(&self) -> PathBuf {
        self.path.join("api.sock")
    }

    /// Where the host's end of a vsock device goes.
    #[must_use]
    pub fn vsock_socket(&self) -> PathBuf {
        self.path.join("vsock.sock")
    }

    /// Where a CH that was started ahead of its restore finds the memory file.
    #[must_use]
    pub(super) fn memory_link(&self) -> PathBuf {
        self.path.join("memory")
    }

    /// Where the snapshot goes that CH is told to restore.
    #[must_use]
    pub fn snapshot(&self) -> PathBuf {
        self.path.join("snapshot")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_vm_directory_is_private_and_the_ledger_removes_it() {
        let runtime = std::env::temp_dir().join(format!("rewake-vmdir-{}", std::process::id()));
        let id = SandboxId::new("a1").unwrap();
        let first = VmDir::choose(&runtime, &id);
        let second = VmDir::choose(&runtime, &id);
        assert_ne!(first.path(), second.path());
        let mut ledger = Ledger::new();
        first.create(&mut ledger).unwrap();
        let mode = first.path().metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        let taken = first.create(&mut ledger).unwrap_err();
        assert_eq!(taken.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(
            ledger.steps().len(),
            1,
            "somebody else's directory is not ours"
        );
        drop(ledger);
        assert!(!first.path().exists());
        std::fs::remove_dir_all(&runtime).unwrap();
    }
}
