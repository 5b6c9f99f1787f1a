//! The host's side: the namespace that slots hang off, and its netlink sockets.

use std::net::Ipv4Addr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rewake_sys::netns;
use rtnetlink::RouteMessageBuilder;
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteType};

use super::error::NetError;
use super::walls::{self, ForwardDrop};
use super::{Ipv4Range, NetConfig, link, namespace};
use crate::deadline::Deadline;
use crate::fault::Faults;
use crate::ids::SlotIndex;
use crate::resource::slot::Slots;
use crate::wire::netlink::{NetlinkError, Protocol, Socket};

/// A listing that another process disturbs is asked for again, this often at most.
const LIST_ATTEMPTS: usize = 16;
const FORWARDING: &str = "/proc/sys/net/ipv4/ip_forward";

/// The namespace that slots are connected to, normally the machine's first.
///
/// Everything acts in the namespace of the netlink sockets, so that a test can make a
/// "host" of its own. Shared by threads: the kernel does link changes one at a time anyway
/// (`rtnl_lock`), so one pair of sockets behind a lock costs nothing.
#[derive(Debug)]
pub struct HostNet {
    pub(super) config: NetConfig,
    pub(super) slots: Slots,
    pub(super) netns: OwnedFd,
    pub(super) faults: Faults,
    /// For questions that an `ioctl` answers without the kernel's network locks.
    pub(super) socket: OwnedFd,
    sockets: Mutex<Sockets>,
}

/// The two netlink sockets of one namespace.
#[derive(Debug)]
pub(super) struct Sockets {
    pub(super) route: Socket,
    pub(super) netfilter: Socket,
}

impl Sockets {
    /// Opens both in the calling thread's namespace.
    pub(super) fn open(faults: &Faults) -> Result<Self, NetlinkError> {
        Ok(Self {
            route: Socket::open(Protocol::Route, faults.clone())?,
            netfilter: Socket::open(Protocol::Netfilter, faults.clone())?,
        })
    }
}

/// A route of the host that goes to one of our ranges and is none of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RouteOverlap {
    /// The range of the address plan.
    pub range: Ipv4Range,
    /// Where the host's route leads.
    pub route: Ipv4Range,
}

impl RouteOverlap {
    /// Whether the route only surrounds our range. Slots then work, their routes being more
    /// specific, but hosts in that part of the route's range cannot be reached any more.
    #[must_use]
    pub fn is_shadowed(&self) -> bool {
        self.route.prefix() < self.range.prefix() && self.route.covers(self.range)
    }
}

/// Where the host's traffic to the outside goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uplink {
    /// Interface name.
    pub name: String,
    /// Interface index.
    pub index: u32,
}

impl HostNet {
    /// Works in the calling thread's namespace. Blocks only for file operations.
    ///
    /// # Errors
    /// [`NetError::Address`] for a plan that contradicts itself, else what the sockets, the
    /// namespace file or the runtime directory say.
    pub fn open(config: NetConfig, faults: Faults) -> Result<Self, NetError> {
        config.validate()?;
        let slots = Slots::open(
            &config.runtime_dir,
            SlotIndex::new(config.slot_max).map_err(super::AddressError::from)?,
            faults.clone(),
        )?;
        let netns = netns::current().map_err(|source| NetError::Call {
            step: "open the host's namespace".to_owned(),
            source,
        })?;
        let socket = netns::tcp_socket().map_err(|source| NetError::Call {
            step: "open a socket".to_owned(),
            source,
        })?;
        Ok(Self {
            sockets: Mutex::new(Sockets::open(&faults)?),
            socket,
            config,
            slots,
            netns,
            faults,
        })
    }

    /// Works in the given namespace.
    ///
    /// # Errors
    /// Those of [`HostNet::open`], and what `setns` says.
    pub fn open_in(
        host: BorrowedFd<'_>,
        config: NetConfig,
        faults: Faults,
    ) -> Result<Self, NetError> {
        netns::run_in(host, || Self::open(config, faults)).map_err(|source| NetError::Call {
            step: "enter the host's namespace".to_owned(),
            source,
        })?
    }

    /// Readies the host: checks the address plan against its routes, makes the directory of
    /// namespaces, puts up the walls and, behind them, switches forwarding on. Repeating it is harmless.
    ///
    /// # Errors
    /// [`NetError::RouteConflict`] where a foreign route leads into a range of the plan, and
    /// those of the calls.
    pub fn prepare(&self, deadline: Deadline) -> Result<(), NetError> {
        for overlap in self.overlaps(deadline)? {
            if !overlap.is_shadowed() {
                return Err(NetError::RouteConflict {
                    range: overlap.range,
                    route: overlap.route,
                });
            }
        }
        namespace::make_directory(&self.config.netns_dir, &self.faults)?;
        let uplink = self.uplink(deadline)?;
        let ruleset = walls::host(&self.config, uplink.as_ref().map(|it| it.name.as_str()));
        self.sockets().netfilter.commit(&ruleset, deadline)?;
        if !self.forwarding()? {
            self.inside_host(|| namespace::write_setting(&self.faults, FORWARDING, "1"))??;
        }
        Ok(())
    }

    /// Takes down what [`HostNet::prepare`] put up, once there are no slots any more.
    /// Forwarding stays as it is: others may rely on it.
    ///
    /// # Errors
    /// [`NetError::Netlink`]. Walls that are not there are no error.
    pub fn retire(&self, deadline: Deadline) -> Result<(), NetError> {
        let ruleset = walls::remove_host(&self.config);
        match self.sockets().netfilter.commit(&ruleset, deadline) {
            Err(error) if error.is_missing() => Ok(()),
            other => other.map_err(NetError::from),
        }
    }

    /// Chains of others that drop what slots send and receive.
    ///
    /// # Errors
    /// [`NetError::Netlink`].
    pub fn forward_drops(&self, deadline: Deadline) -> Result<Vec<ForwardDrop>, NetError> {
        let table = walls::host_table(&self.config);
        walls::foreign_forward_drops(&mut self.sockets().netfilter, &table, deadline)
            .map_err(NetError::from)
    }

    /// The configuration.
    #[must_use]
    pub const fn config(&self) -> &NetConfig {
        &self.config
    }

    /// The slot files.
    #[must_use]
    pub const fn slots(&self) -> &Slots {
        &self.slots
    }

    /// The host's namespace.
    #[must_use]
    pub fn netns(&self) -> BorrowedFd<'_> {
        self.netns.as_fd()
    }

    /// Whether the host forwards IPv4 at all.
    ///
    /// # Errors
    /// [`NetError::File`], or what `setns` says.
    pub fn forwarding(&self) -> Result<bool, NetError> {
        let text = self.inside_host(|| std::fs::read_to_string(FORWARDING))?;
        let text = text.map_err(|source| NetError::File {
            step: "read",
            path: FORWARDING.into(),
            source,
        })?;
        Ok(text.trim() == "1")
    }

    /// The configured uplink, or that of the default route with the lowest metric. `None`
    /// where the host has neither.
    ///
    /// # Errors
    /// [`NetError::Netlink`].
    pub fn uplink(&self, deadline: Deadline) -> Result<Option<Uplink>, NetError> {
        let links = self.links(deadline)?;
        let named = |wanted: &dyn Fn(&link::LinkFacts) -> bool| {
            links.iter().find(|link| wanted(link)).map(|link| Uplink {
                name: link.name.clone(),
                index: link.index,
            })
        };
        if let Some(name) = &self.config.uplink {
            return Ok(named(&|link| link.name == name.as_str()));
        }
        let mut best: Option<(u32, u32)> = None;
        for route in self.routes(deadline)? {
            let index = output(&route);
            if route.header.destination_prefix_length != 0 || index == 0 {
                continue;
            }
            let metric = route
                .attributes
                .iter()
                .find_map(|attribute| match attribute {
                    RouteAttribute::Priority(metric) => Some(*metric),
                    _ => None,
                });
            let candidate = (metric.unwrap_or(0), index);
            best = Some(best.map_or(candidate, |best| best.min(candidate)));
        }
        Ok(best.and_then(|(_, index)| named(&|link| link.index == index)))
    }

    /// Routes of the host that share addresses with the plan and are not a slot's. The
    /// default route is none of them.
    ///
    /// # Errors
    /// [`NetError::Netlink`].
    pub fn overlaps(&self, deadline: Deadline) -> Result<Vec<RouteOverlap>, NetError> {
        let first = self.config.index_base;
        let own = first..=first.saturating_add(u32::from(SlotIndex::MAX));
        let mut found = Vec::new();
        for message in self.routes(deadline)? {
            let prefix = message.header.destination_prefix_length;
            if prefix == 0 || own.contains(&output(&message)) {
                continue;
            }
            let Some(destination) = destination(&message) else {
                continue;
            };
            let route = Ipv4Range::around(destination, prefix);
            for range in [self.config.veth_range, self.config.host_range] {
                let overlap = RouteOverlap { range, route };
                if range.overlaps(route) && !found.contains(&overlap) {
                    found.push(overlap);
                }
            }
        }
        Ok(found)
    }

    /// All unicast, local and blocking IPv4 routes, of every table.
    pub(super) fn routes(&self, deadline: Deadline) -> Result<Vec<RouteMessage>, NetError> {
        let request = RouteNetlinkMessage::GetRoute({
            let mut message = RouteMessageBuilder::<Ipv4Addr>::new().build();
            // Under strict checking these would be filters.
            message.header.table = 0;
            message.header.protocol = 0.into();
            message.header.scope = 0.into();
            message.header.kind = RouteType::Unspec;
            message
        });
        let mut found = self.list("list routes", &request, deadline, |message| match message {
            RouteNetlinkMessage::NewRoute(route) => Some(route),
            _ => None,
        })?;
        found.retain(|route| {
            !matches!(
                route.header.kind,
                RouteType::Broadcast | RouteType::Multicast | RouteType::Anycast
            )
        });
        Ok(found)
    }

    /// All links.
    pub(super) fn links(&self, deadline: Deadline) -> Result<Vec<link::LinkFacts>, NetError> {
        let request = RouteNetlinkMessage::GetLink(link::any());
        self.list("list links", &request, deadline, |message| match message {
            RouteNetlinkMessage::NewLink(message) => Some(link::facts(&message)),
            _ => None,
        })
    }

    /// The link of this index, `None` where there is none.
    pub(super) fn link(
        &self,
        index: u32,
        deadline: Deadline,
    ) -> Result<Option<link::LinkFacts>, NetError> {
        link::lookup(&mut self.sockets().route, index, deadline).map_err(NetError::from)
    }

    /// The sockets, for as long as the guard lives.
    pub(super) fn sockets(&self) -> MutexGuard<'_, Sockets> {
        // A panic elsewhere leaves no half-done exchange that matters: answers that nobody
        // read carry old sequence numbers and are skipped.
        self.sockets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `work` on a thread in the host's namespace: `/proc/sys/net` shows each thread
    /// the settings of its own namespace.
    pub(super) fn inside_host<T: Send>(
        &self,
        work: impl FnOnce() -> T + Send,
    ) -> Result<T, NetError> {
        netns::run_in(self.netns.as_fd(), work).map_err(|source| NetError::Call {
            step: "enter the host's namespace".to_owned(),
            source,
        })
    }

    fn list<T>(
        &self,
        step: &str,
        request: &RouteNetlinkMessage,
        deadline: Deadline,
        mut pick: impl FnMut(RouteNetlinkMessage) -> Option<T>,
    ) -> Result<Vec<T>, NetError> {
        let mut attempts = 0;
        loop {
            let mut found = Vec::new();
            let each = |message| found.extend(pick(message));
            let outcome = self
                .sockets()
                .route
                .dump_route(step, request, deadline, each);
            attempts += 1;
            match outcome {
                Err(NetlinkError::Interrupted { .. })
                    if attempts < LIST_ATTEMPTS && !deadline.has_passed() => {}
                other => return other.map(|()| found).map_err(NetError::from),
            }
        }
    }
}

/// The interface a route leads out of; 0 where it names several or none.
fn output(route: &RouteMessage) -> u32 {
    let found = route
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Oif(index) => Some(*index),
            _ => None,
        });
    found.unwrap_or(0)
}

fn destination(route: &RouteMessage) -> Option<Ipv4Addr> {
    route
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(address)) => Some(*address),
            _ => None,
        })
}
