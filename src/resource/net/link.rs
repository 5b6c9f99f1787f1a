//! The rtnetlink requests that make a slot. Pure: plan in, messages out.
//!
//! Facts: include/uapi/linux/{if_link,rtnetlink,neighbour,veth}.h, drivers/net/veth.c.

use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, BorrowedFd};

use rtnetlink::packet_core::Emitable;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoVeth, LinkAttribute, LinkMessage,
};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use rtnetlink::{
    AddressMessageBuilder, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder,
};

use super::{Mac, NetConfig, SlotPlan};
use crate::deadline::Deadline;
use crate::wire::netlink::{Batch, CREATE, EXCL, NetlinkError, REPLACE, Socket, parse_route};

const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;

/// Both addresses of a veth pair share a /31 (RFC 3021).
const PAIR_PREFIX: u8 = 31;
/// `lo` is the first link of every namespace (`LOOPBACK_IFINDEX`).
const LOOPBACK: u32 = 1;

/// The pair itself, across both namespaces. Neither end is up yet: the kernel cannot open
/// an end of a pair that is still being made (`veth_open`).
pub(super) fn pair(config: &NetConfig, plan: &SlotPlan, inside: BorrowedFd<'_>) -> Batch {
    let mut batch = Batch::new();
    let pair = RouteNetlinkMessage::NewLink(veth_pair(config, plan, inside));
    batch.route(format!("create veth {}", plan.veth), CREATE | EXCL, &pair);
    batch
}

/// The host's half, after the inside is up: opening the second end raises the carrier of
/// this one at once, so its first packet is not lost.
///
/// The kernel works through a batch in order, and the link's index was chosen beforehand, so
/// all of it fits into one datagram.
pub(super) fn host_side(plan: &SlotPlan) -> Batch {
    let name = &plan.veth;
    let index = plan.veth_index;
    let mut batch = Batch::new();
    // Address generation can only be switched off on a link that exists, and must be before
    // it comes up, or the link would get an IPv6 address and announce it.
    batch.route(format!("set up {name}"), 0, &closed_to_ipv6(index));
    batch.route(
        format!("add address {} to {name}", plan.veth_address),
        CREATE | EXCL,
        &address(index, plan.veth_address, PAIR_PREFIX),
    );
    batch.route(
        format!("add neighbour {} to {name}", plan.inside_address),
        CREATE | REPLACE,
        &neighbour(index, plan.inside_address, inside_mac(plan)),
    );
    let route = RouteMessageBuilder::<Ipv4Addr>::new()
        .destination_prefix(plan.host_address, 32)
        .gateway(plan.inside_address)
        .output_interface(index)
        .build();
    batch.route(
        format!("add route to {} through {name}", plan.host_address),
        CREATE | EXCL,
        &RouteNetlinkMessage::NewRoute(route),
    );
    batch
}

/// The half inside the namespace, for a socket of that namespace.
pub(super) fn inside_side(config: &NetConfig, plan: &SlotPlan, tap_index: u32) -> Batch {
    let mut batch = Batch::new();
    let up = |index| LinkUnspec::new_with_index(index).up();
    let new_link =
        |link: LinkMessageBuilder<LinkUnspec>| RouteNetlinkMessage::NewLink(link.build());
    let (inside, tap) = (config.inside_name.as_str(), config.tap_name.as_str());
    let index = inside_index(plan);
    batch.route("set up lo", 0, &new_link(up(LOOPBACK)));
    batch.route(format!("set up {inside}"), 0, &new_link(up(index)));
    batch.route(
        format!("add address {} to {inside}", plan.inside_address),
        CREATE | EXCL,
        &address(index, plan.inside_address, PAIR_PREFIX),
    );
    batch.route(
        format!("add neighbour {} to {inside}", plan.veth_address),
        CREATE | REPLACE,
        &neighbour(index, plan.veth_address, plan.veth_mac),
    );
    let mut link = up(tap_index).address(config.tap_mac.0.to_vec());
    if let Some(mtu) = config.mtu {
        link = link.mtu(mtu);
    }
    batch.route(format!("set up {tap}"), 0, &new_link(link));
    batch.route(
        format!("add address {} to {tap}", config.tap_address),
        CREATE | EXCL,
        &address(tap_index, config.tap_address, config.tap_prefix),
    );
    batch.route(
        format!("add neighbour {} to {tap}", config.guest_address),
        CREATE | REPLACE,
        &neighbour(tap_index, config.guest_address, config.guest_mac),
    );
    let route = RouteMessageBuilder::<Ipv4Addr>::new()
        .gateway(plan.veth_address)
        .output_interface(index)
        .build();
    batch.route(
        format!("add default route through {inside}"),
        CREATE | EXCL,
        &RouteNetlinkMessage::NewRoute(route),
    );
    batch
}

/// Removal of a link by index, with all its addresses, neighbours and routes.
pub(super) fn remove(batch: &mut Batch, name: &str, index: u32) {
    let link = LinkUnspec::new_with_index(index).build();
    batch.route(
        format!("remove link {name}"),
        0,
        &RouteNetlinkMessage::DelLink(link),
    );
}

/// Puts a link into a group.
pub(super) fn regroup(batch: &mut Batch, name: &str, index: u32, group: u32) {
    let link = LinkUnspec::new_with_index(index).link_group(group).build();
    batch.route(
        format!("group link {name}"),
        0,
        &RouteNetlinkMessage::SetLink(link),
    );
}

/// Removal of all links of a group at once.
pub(super) fn remove_group(batch: &mut Batch, group: u32) {
    let link = LinkMessageBuilder::<LinkUnspec>::new()
        .link_group(group)
        .build();
    batch.route(
        "remove a group of links",
        0,
        &RouteNetlinkMessage::DelLink(link),
    );
}

/// A request that matches all links.
pub(super) fn any() -> LinkMessage {
    LinkMessageBuilder::<LinkUnspec>::new().build()
}

/// What the link of this index says of itself, `None` where there is none.
pub(super) fn lookup(
    socket: &mut Socket,
    index: u32,
    deadline: Deadline,
) -> Result<Option<LinkFacts>, NetlinkError> {
    let request = LinkUnspec::new_with_index(index).build();
    let body = |bytes: &mut Vec<u8>| {
        let start = bytes.len();
        bytes.resize(start + request.buffer_len(), 0);
        request.emit(&mut bytes[start..]);
    };
    let step = "look at a link";
    let malformed = |what| NetlinkError::Malformed {
        step: step.to_owned(),
        what,
    };
    match socket.get(step, RTM_GETLINK, body, deadline) {
        Ok(bytes) => match parse_route(RTM_NEWLINK, &bytes).map_err(malformed)? {
            RouteNetlinkMessage::NewLink(link) => Ok(Some(facts(&link))),
            _ => Err(malformed("not a link")),
        },
        Err(error) if error.is_missing() => Ok(None),
        Err(error) => Err(error),
    }
}

/// What a link says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LinkFacts {
    pub(super) name: String,
    pub(super) index: u32,
    pub(super) mac: Option<Mac>,
    pub(super) up: bool,
    pub(super) group: u32,
}

pub(super) fn facts(link: &LinkMessage) -> LinkFacts {
    use rtnetlink::packet_route::link::LinkFlags;
    let mut facts = LinkFacts {
        name: String::new(),
        index: link.header.index,
        mac: None,
        group: 0,
        up: link.header.flags.contains(LinkFlags::Up),
    };
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::Group(group) => facts.group = *group,
            LinkAttribute::IfName(name) => facts.name.clone_from(name),
            LinkAttribute::Address(bytes) => {
                facts.mac = bytes.as_slice().try_into().ok().map(Mac);
            }
            _ => {}
        }
    }
    facts
}

/// The Ethernet address of the namespace's end of the pair.
fn inside_mac(plan: &SlotPlan) -> Mac {
    let mut mac = plan.veth_mac;
    mac.0[1] = 0xfe;
    mac
}

/// The interface index of the namespace's end: not the host's, or the kernel would take the
/// pair for a link that leads to itself (`dev_get_iflink`).
fn inside_index(plan: &SlotPlan) -> u32 {
    plan.veth_index + (1 << 16)
}

fn veth_pair(config: &NetConfig, plan: &SlotPlan, inside: BorrowedFd<'_>) -> LinkMessage {
    let queues = |link: LinkMessageBuilder<LinkUnspec>| {
        // One queue: the default is one per possible CPU, on both ends of every slot.
        link.append_extra_attribute(LinkAttribute::NumTxQueues(1))
            .append_extra_attribute(LinkAttribute::NumRxQueues(1))
    };
    let mut peer = queues(LinkMessageBuilder::<LinkUnspec>::new())
        .name(config.inside_name.as_str())
        .index(inside_index(plan))
        .address(inside_mac(plan).0.to_vec())
        .setns_by_fd(inside.as_raw_fd());
    let mut link = LinkVeth::new(&plan.veth, config.inside_name.as_str())
        .index(plan.veth_index)
        .address(plan.veth_mac.0.to_vec())
        .append_extra_attribute(LinkAttribute::NumTxQueues(1))
        .append_extra_attribute(LinkAttribute::NumRxQueues(1));
    if let Some(mtu) = config.mtu {
        peer = peer.mtu(mtu);
        link = link.mtu(mtu);
    }
    link.set_info_data(InfoData::Veth(InfoVeth::Peer(peer.build())))
        .build()
}

fn closed_to_ipv6(index: u32) -> RouteNetlinkMessage {
    let none = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
    let link = LinkUnspec::new_with_index(index)
        .append_extra_attribute(LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(
            vec![none],
        )]))
        .up()
        .build();
    RouteNetlinkMessage::NewLink(link)
}

fn address(index: u32, address: Ipv4Addr, prefix: u8) -> RouteNetlinkMessage {
    let message = AddressMessageBuilder::<Ipv4Addr>::new()
        .index(index)
        .address(address, prefix)
        .build();
    RouteNetlinkMessage::NewAddress(message)
}

/// A permanent entry: no ARP before the first packet, and none of the kernel's limit on
/// learnt neighbours (`gc_thresh3`, 1024 by default) is used up by slots.
fn neighbour(index: u32, address: Ipv4Addr, mac: Mac) -> RouteNetlinkMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Inet;
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    message.attributes = vec![
        NeighbourAttribute::Destination(NeighbourAddress::Inet(address)),
        NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()),
    ];
    RouteNetlinkMessage::NewNeighbour(message)
}
