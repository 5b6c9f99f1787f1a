//! The log of a VM whose starter may be gone.
//!
//! Cloud Hypervisor writes into a pipe of which it holds both ends, so that it neither blocks
//! nor dies when nobody reads. Who wants to read it opens the pipe by way of `/proc`; what was
//! read is kept in a file of bounded size, since a pipe gives every byte only once.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::error::{Cause, file};
use super::hold::Hold;
use super::live;
use crate::resource::ledger::Step;
use crate::resource::slot::ProcessIdentity;

/// More than this is cut at the front: a guest can make Cloud Hypervisor log.
const KEPT: usize = 1 << 20;

/// Reads what is new, and returns all that is kept.
pub(super) fn read(saved: &Path, pid: Option<u32>) -> Result<Vec<u8>, Cause> {
    save(saved, &pid.map(drain).unwrap_or_default())
}

/// Adds what somebody has read, and returns all that is kept.
pub(super) fn save(saved: &Path, fresh: &[u8]) -> Result<Vec<u8>, Cause> {
    let mut kept = match std::fs::read(saved) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        other => other.map_err(file("read", saved))?,
    };
    if fresh.is_empty() {
        return Ok(kept);
    }
    kept.extend_from_slice(fresh);
    let surplus = kept.len().saturating_sub(KEPT);
    kept.drain(..surplus);
    let write = || {
        OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(saved)?
            .write_all(&kept)
    };
    write().map_err(file("write", saved))?;
    Ok(kept)
}

/// Saves what the VM of a sandbox has logged: its pipe goes with it.
pub(super) fn rescue(hold: &Hold) {
    for step in hold.journal.story().steps {
        let Step::Process { pid, start_time } = step else {
            continue;
        };
        let lives = live::open(ProcessIdentity { pid, start_time }).is_ok();
        if lives && let Err(error) = read(&hold.dir.vmm_log(), Some(pid)) {
            log::warn!("Sandbox {}: {error}", hold.id);
        }
    }
}

/// What lies in the pipe now; nothing where the process is gone or its output is no pipe.
fn drain(pid: u32) -> Vec<u8> {
    let path = format!("/proc/{pid}/fd/1");
    let is_pipe =
        std::fs::read_link(&path).is_ok_and(|link| link.to_string_lossy().starts_with("pipe:"));
    if !is_pipe {
        return Vec::new();
    }
    let flags = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
    let Ok(mut pipe) = File::options().read(true).custom_flags(flags).open(&path) else {
        return Vec::new();
    };
    let mut text = Vec::new();
    let mut buffer = [0; 64 << 10];
    // A writer that never stops does not keep us for ever.
    while text.len() < KEPT {
        match pipe.read(&mut buffer) {
            Ok(count) if count > 0 => text.extend_from_slice(&buffer[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            _ => break,
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn what_was_read_once_is_kept_and_bounded() {
        let saved = std::env::temp_dir().join(format!("rewake-log-{}", std::process::id()));
        let (reader, writer) = io::pipe().unwrap();
        let mut child = Command::new("sh")
            .args(["-c", "echo first; sleep 60"])
            .stdout(Stdio::from(writer))
            .spawn()
            .unwrap();
        let until = std::time::Instant::now() + std::time::Duration::from_secs(10);
        let mut text = Vec::new();
        while text.is_empty() && std::time::Instant::now() < until {
            text = read(&saved, Some(child.id())).unwrap();
            std::thread::yield_now();
        }
        assert_eq!(text, b"first\n");
        assert_eq!(read(&saved, Some(child.id())).unwrap(), b"first\n");
        child.kill().unwrap();
        child.wait().unwrap();
        drop(reader);
        assert_eq!(read(&saved, None).unwrap(), b"first\n");
        std::fs::remove_file(&saved).unwrap();
    }
}
