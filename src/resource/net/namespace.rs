//! Inside a slot's namespace: everything here runs on the thread that was made for it.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use rewake_sys::CallError;
use rewake_sys::netns;
use rewake_sys::tun::{Tap, TapOptions};
use rustix::io::Errno;
use rustix::mount::{MountPropagationFlags, UnmountFlags};

use super::error::{NetError, call};
use super::{NetConfig, NetStep};
use crate::fault::Faults;

/// Makes the directory of named namespaces as `ip netns` does: mounted on itself and shared,
/// so that namespaces pinned in it show in other mount namespaces too, and go away in all.
pub(super) fn make_directory(dir: &Path, faults: &Faults) -> Result<(), NetError> {
    call(faults, format!("make {}", dir.display()), || {
        std::fs::create_dir_all(dir).map_err(|error| CallError::from_io("mkdir", &error))
    })?;
    let step = format!("share {}", dir.display());
    call(faults, step, || {
        let flags = MountPropagationFlags::SHARED | MountPropagationFlags::REC;
        match rustix::mount::mount_change(dir, flags) {
            // Not a mount point yet.
            Err(Errno::INVAL) => {
                rustix::mount::mount_bind_recursive(dir, dir)
                    .map_err(|errno| CallError::new("mount MS_BIND", errno))?;
                rustix::mount::mount_change(dir, flags)
            }
            other => other,
        }
        .map_err(|errno| CallError::new("mount MS_SHARED", errno))
    })
}

/// Gives the calling thread's namespace a name that outlives the thread.
pub(super) fn pin(path: &Path, faults: &Faults) -> Result<(), NetError> {
    let made = call(faults, format!("make {}", path.display()), || {
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o444)
            .open(path)
            .map_err(|error| CallError::from_io("open", &error))
    });
    match made {
        Err(NetError::Call { source, .. }) if source.errno() == Errno::EXIST.raw_os_error() => {
            return Err(NetError::Occupied {
                path: path.to_owned(),
            });
        }
        other => drop(other?),
    }
    call(faults, format!("pin namespace {}", path.display()), || {
        rustix::mount::mount_bind("/proc/thread-self/ns/net", path)
            .map_err(|errno| CallError::new("mount MS_BIND", errno))
    })
}

/// Removes a pin if the namespace on it is the one that the step names.
pub(super) fn unpin(path: &Path, identity: Identity, faults: &Faults) -> Result<(), NetError> {
    let failed = |step: &'static str| {
        move |source: io::Error| NetError::File {
            step,
            path: path.to_owned(),
            source,
        }
    };
    let found = match std::fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed("look at")(error)),
    };
    if (found.dev(), found.ino()) == (identity.device, identity.inode) {
        let ours = identity.has_cookie_of(path);
        let ours = ours.map_err(|source| NetError::Call {
            step: format!("identify namespace {}", path.display()),
            source,
        })?;
        if !ours {
            return Ok(());
        }
        call(
            faults,
            format!("unpin namespace {}", path.display()),
            || {
                rustix::mount::unmount(path, UnmountFlags::DETACH)
                    .map_err(|errno| CallError::new("umount2", errno))
            },
        )?;
    } else if !found.is_file() || found.len() != 0 || is_namespace(path) {
        // Somebody else's by now.
        return Ok(());
    }
    // What is left is the empty file that was made to mount on.
    let removed = call(faults, format!("remove {}", path.display()), || {
        std::fs::remove_file(path).map_err(|error| CallError::from_io("unlink", &error))
    });
    match removed {
        Err(NetError::Call { source, .. }) if source.is_gone() => Ok(()),
        other => other,
    }
}

/// Whether the file lies on the kernel's namespace file system.
fn is_namespace(path: &Path) -> bool {
    // NSFS_MAGIC, include/uapi/linux/magic.h.
    const NSFS: rustix::fs::FsWord = 0x6e73_6673;
    rustix::fs::statfs(path).is_ok_and(|stat| stat.f_type == NSFS)
}

/// Makes the tap and returns its interface index. Its descriptor is closed again: the VMM
/// opens the tap itself, and a second opener would be refused.
pub(super) fn make_tap(config: &NetConfig, faults: &Faults) -> Result<u32, NetError> {
    let name = config.tap_name.as_str();
    let options = TapOptions {
        vnet_header: true,
        multi_queue: config.multi_queue,
    };
    let tap = call(faults, format!("create tap {name}"), || {
        Tap::open(name, options)
    })?;
    call(faults, format!("keep tap {name}"), || {
        tap.set_persistent(true)
    })?;
    let socket = netns::tcp_socket().map_err(|source| NetError::Call {
        step: "open a socket".to_owned(),
        source,
    })?;
    call(faults, format!("read the index of {name}"), || {
        rustix::net::netdevice::name_to_index(&socket, name)
            .map_err(|errno| CallError::new("SIOCGIFINDEX", errno))
    })
}

/// Forwarding on, IPv6 off unless wanted: before there is any link, so that every link
/// begins with it.
pub(super) fn settings(config: &NetConfig, faults: &Faults) -> Result<(), NetError> {
    write_setting(faults, "/proc/sys/net/ipv4/ip_forward", "1")?;
    if !config.ipv6 {
        for scope in ["all", "default"] {
            let path = format!("/proc/sys/net/ipv6/conf/{scope}/disable_ipv6");
            match write_setting(faults, &path, "1") {
                // A kernel without IPv6 is closed to it anyway.
                Err(NetError::Call { source, .. })
                    if source.errno() == Errno::NOENT.raw_os_error() => {}
                other => other?,
            }
        }
    }
    Ok(())
}

/// Writes one file of `/proc/sys`, as the calling thread's namespace sees it.
pub(super) fn write_setting(faults: &Faults, path: &str, value: &str) -> Result<(), NetError> {
    call(faults, format!("write {value} to {path}"), || {
        OpenOptions::new()
            .write(true)
            .open(path)
            .and_then(|mut file| file.write_all(value.as_bytes()))
            .map_err(|error| CallError::from_io("write", &error))
    })
}

/// What identifies a namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) device: u64,
    pub(super) inode: u64,
    pub(super) cookie: Option<u64>,
}

impl Identity {
    /// That of the calling thread's namespace, which `namespace` is open on.
    pub(super) fn current(namespace: BorrowedFd<'_>) -> Result<Self, CallError> {
        let (device, inode) = netns::identity(namespace)?;
        Ok(Self {
            device,
            inode,
            cookie: netns::current_cookie()?,
        })
    }

    /// Whether the namespace pinned at `path` is this one. The file's own numbers have been
    /// compared already; they are used again once a namespace is gone, its cookie is not.
    fn has_cookie_of(self, path: &Path) -> Result<bool, CallError> {
        if self.cookie.is_none() {
            return Ok(true);
        }
        let pinned = netns::open(path)?;
        let cookie = netns::run_in(pinned.as_fd(), netns::current_cookie)??;
        Ok(cookie == self.cookie)
    }

    /// The pin of this namespace as an undo step.
    pub(super) fn step(self, path: &Path) -> NetStep {
        NetStep::Netns {
            path: path.to_owned(),
            device: self.device,
            inode: self.inode,
            cookie: self.cookie,
        }
    }
}
