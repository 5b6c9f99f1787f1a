//! Where the demo takes place: the way to its guest.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rewake::deadline::Deadline;
use rewake::envd;
use rewake::envd::socket::{CurrentNetns, InNetns, Sockets};
use rewake::fault::Faults;
use rewake::resource::net::{CreateError, HostNet, NetConfig, NetError, Slot};
use rewake::vm_config::{MacAddr, NetConfig as VmNet};
use rewake_sys::{CallError, netns};
use rustix::mount::UnmountFlags;

use super::super::Failure;
use super::{Actor, BUDGET, Kernel};

/// The way to the guest.
pub(super) enum Network {
    /// A real slot: namespace, tap, links; in a host of its own, so that nothing of this
    /// machine's network is touched.
    Slot {
        net: Box<HostNet>,
        /// Gone once it was taken down.
        slot: Option<Box<Slot>>,
    },
    /// The stand-in's agent on a port of this machine, where no namespace may be made.
    Loopback { guest: SocketAddr },
}

/// Why there is no network slot for the demo.
#[derive(Debug, thiserror::Error)]
enum SlotProblem {
    #[error("Cannot make a network namespace")]
    Namespace(#[source] CallError),
    #[error("Cannot use the namespace as a host")]
    Host(#[source] NetError),
    #[error("Cannot make a network slot")]
    Create(#[source] CreateError),
}

impl Network {
    pub(super) fn make(actor: &Actor, dir: &Path, deadline: Deadline) -> Result<Self, Failure> {
        match Self::slot(dir, deadline) {
            Ok(slot) => Ok(slot),
            Err(error) if actor.kernel == Kernel::Played => {
                log::info!("No network slot: {error}");
                // The port is free again at once; the stand-in takes it.
                let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
                Ok(Self::Loopback {
                    guest: free.local_addr()?,
                })
            }
            Err(error) => Err(error.into()),
        }
    }

    fn slot(dir: &Path, deadline: Deadline) -> Result<Self, SlotProblem> {
        let host = netns::run_in_new(|netns| netns).map_err(SlotProblem::Namespace)?;
        let config = NetConfig {
            runtime_dir: dir.join("slots"),
            netns_dir: dir.join("netns"),
            ..NetConfig::default()
        };
        let net =
            HostNet::open_in(host.as_fd(), config, Faults::default()).map_err(SlotProblem::Host)?;
        let slot = net
            .prepare(deadline)
            .map_err(SlotProblem::Host)
            .and_then(|()| net.create("demo", deadline).map_err(SlotProblem::Create));
        let slot = slot.inspect_err(|_| {
            // Where it was not mounted yet there is nothing to unmount.
            let _ = unmount_namespaces(&net);
        })?;
        Ok(Self::Slot {
            slot: Some(Box::new(slot)),
            net: Box::new(net),
        })
    }

    /// Takes it down; the result is what is left.
    pub(super) fn remove(&mut self) -> Option<String> {
        let Self::Slot { net, slot } = self else {
            return None;
        };
        let failure = net.destroy(*slot.take()?, Deadline::after(BUDGET)).err();
        let mounted = unmount_namespaces(net).err();
        let mounted = mounted.map(|error| format!("the mount of namespaces: {error}"));
        failure.map(|failure| failure.to_string()).or(mounted)
    }

    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Slot { .. } => "slot",
            Self::Loopback { .. } => "loopback",
        }
    }

    pub(super) fn place(&self) -> &'static str {
        match self {
            Self::Slot { .. } => "in a network slot of its own",
            Self::Loopback { .. } => "on a loopback port (no namespace may be made here)",
        }
    }

    pub(super) fn guest(&self) -> SocketAddr {
        match self {
            Self::Slot { net, .. } => SocketAddr::from((net.config().guest_address, envd::PORT)),
            Self::Loopback { guest } => *guest,
        }
    }

    pub(super) fn netns_path(&self) -> Option<PathBuf> {
        match self {
            Self::Slot { slot, .. } => slot.as_ref().map(|slot| slot.netns_path().to_owned()),
            Self::Loopback { .. } => None,
        }
    }

    pub(super) fn sockets(&self) -> Sockets {
        if let Self::Slot {
            slot: Some(slot), ..
        } = self
            && let Ok(netns) = slot.netns().try_clone_to_owned()
        {
            return Arc::new(InNetns::new(netns));
        }
        Arc::new(CurrentNetns)
    }

    pub(super) fn device(&self) -> Option<VmNet> {
        let Self::Slot { net, .. } = self else {
            return None;
        };
        Some(VmNet {
            tap: Some(net.config().tap_name.as_str().to_owned()),
            mac: Some(MacAddr(net.config().guest_mac.0)),
            ..VmNet::default()
        })
    }

    /// The stand-in is told where its guest listens if there is no tap.
    pub(super) fn instruct(&self, actor: &mut Actor) {
        if let Self::Loopback { guest } = self {
            actor
                .spec
                .args
                .extend(["--sim".to_owned(), format!("envd=tcp:{guest}")]);
        }
    }
}

/// The directory of namespaces is a mount of its own, as `ip netns` makes it.
fn unmount_namespaces(net: &HostNet) -> rustix::io::Result<()> {
    rustix::mount::unmount(&net.config().netns_dir, UnmountFlags::DETACH)
}
