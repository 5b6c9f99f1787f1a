//! Becoming root in a user namespace of one's own (`user_namespaces(7)`), so that an
//! unprivileged user can make network and mount namespaces.

use std::fs;

use rustix::thread::UnshareFlags;

use crate::error::{CallError, Named};

/// Moves the process into fresh user and mount namespaces, in which the caller is root.
///
/// # Errors
/// `EINVAL` where the process has more than one thread, `EPERM` or `ENOSPC` where the system
/// does not let users do this, and what writing the id maps says.
#[doc(alias = "CLONE_NEWUSER")]
pub fn enter() -> Result<(), CallError> {
    let uid = rustix::process::getuid().as_raw();
    let gid = rustix::process::getgid().as_raw();
    // SAFETY: neither flag unshares the descriptor table, the one thing that would invalidate
    // descriptors held by other code of this thread.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWUSER | UnshareFlags::NEWNS) }
        .named("unshare")?;
    fs::write("/proc/self/setgroups", "deny").named("write /proc/self/setgroups")?;
    fs::write("/proc/self/uid_map", format!("0 {uid} 1")).named("write /proc/self/uid_map")?;
    fs::write("/proc/self/gid_map", format!("0 {gid} 1")).named("write /proc/self/gid_map")
}
