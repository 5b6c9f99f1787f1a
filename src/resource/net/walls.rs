//! NAT and walls: what a slot may talk to, and under which address.
//!
//! Inside each namespace a small table of its own translates between the guest's address,
//! the same in every slot, and the slot's. On the host one constant table serves all slots:
//! building a slot adds elements to a set, never rules, so its cost does not grow with the
//! number of sandboxes.
//!
//! The translation is stateful. A stateless rewrite cannot tell a guest's answer to the host
//! (which must bear the host-reachable address) from a connection the guest opens itself
//! (which must bear the inside address): only connection tracking knows.

use std::net::Ipv4Addr;

use rustix::io::Errno;

use super::{Ipv4Range, NetConfig, SlotPlan};
use crate::deadline::Deadline;
use crate::wire::netlink::{Batch, NetlinkError, Socket, attributes};
use crate::wire::nft::{GET_CHAIN, Hook, IPV4, Meta, Rule, Transaction, Verdict};

/// The table inside a namespace.
const INSIDE: &str = "rewake";
/// The set of the host's table with the sources that each slot's link may send from.
const SOURCES: &str = "sources";
const ALLOWED: &str = "allowed";
const BLOCKED: &str = "blocked";

const FILTER: i32 = 0;
const SOURCE_NAT: i32 = 100;
const DESTINATION_NAT: i32 = -100;

/// A pair of the host's set: the slot's link and an address it may send from.
pub(super) type Source = (u32, Ipv4Addr);

/// Name of the host's table.
pub(super) fn host_table(config: &NetConfig) -> String {
    format!("rewake_{}", config.prefix)
}

/// The pairs of one slot: the address its guest's connections leave as, and the one under
/// which it answers the host.
pub(super) fn sources(plan: &SlotPlan) -> Vec<Source> {
    vec![
        (plan.veth_index, plan.inside_address),
        (plan.veth_index, plan.host_address),
    ]
}

/// The table inside a namespace.
pub(super) fn inside(config: &NetConfig, plan: &SlotPlan) -> Batch {
    let (tap, outside) = (config.tap_name.as_str(), config.inside_name.as_str());
    let guest = config.guest_address;
    let mut it = Transaction::on(IPV4, INSIDE);
    it.add_table();
    it.add_base_chain("prerouting", "nat", Hook::Prerouting, DESTINATION_NAT);
    it.add_base_chain("forward", "filter", Hook::Forward, FILTER);
    it.add_base_chain("postrouting", "nat", Hook::Postrouting, SOURCE_NAT);
    let rule = Rule::new()
        .link(Meta::InputName, outside)
        .destination(plan.host_address)
        .destination_nat(guest);
    it.add_rule("prerouting", &rule);
    // What is not the guest's own would pass the translation unchanged.
    let rule = Rule::new()
        .link(Meta::InputName, tap)
        .source(guest, false)
        .verdict(Verdict::Drop);
    it.add_rule("forward", &rule);
    let rule = Rule::new()
        .link(Meta::OutputName, outside)
        .source(guest, true)
        .source_nat(plan.inside_address);
    it.add_rule("postrouting", &rule);
    it.finish()
}

/// The host's table. Applying it again replaces the rules and the lists of ranges at once
/// and leaves the slots' elements alone.
pub(super) fn host(config: &NetConfig, uplink: Option<&str>) -> Batch {
    let table = host_table(config);
    let slots = format!("{}v", config.prefix);
    let mut it = Transaction::on(IPV4, &table);
    it.add_table();
    it.add_link_set(SOURCES);
    it.add_range_set(ALLOWED);
    it.add_range_set(BLOCKED);
    it.add_ranges(ALLOWED, &merged(&config.allowed));
    it.add_ranges(BLOCKED, &merged(&config.blocked));
    // Chains that are jumped to must be there before the rule that jumps.
    it.add_chain("from_slot");
    it.add_chain("to_slot");
    it.add_chain("to_host");
    it.add_base_chain("input", "filter", Hook::Input, FILTER);
    it.add_base_chain("forward", "filter", Hook::Forward, FILTER);
    it.add_base_chain("postrouting", "nat", Hook::Postrouting, SOURCE_NAT);

    let to = |verdict| Rule::new().verdict(verdict);
    let spoofed = Rule::new().foreign_source(SOURCES).verdict(Verdict::Drop);
    let established = Rule::new().established().verdict(Verdict::Accept);
    let from_slots = |chain| {
        Rule::new()
            .link_prefix(Meta::InputName, &slots)
            .verdict(Verdict::Jump(chain))
    };
    let to_slots = |verdict| {
        Rule::new()
            .link_prefix(Meta::OutputName, &slots)
            .verdict(verdict)
    };
    it.add_rule("input", &from_slots("to_host"));
    it.add_rule("forward", &from_slots("from_slot"));
    it.add_rule("forward", &to_slots(Verdict::Jump("to_slot")));

    it.add_rule("to_host", &spoofed);
    it.add_rule("to_host", &established);
    it.add_rule("to_host", &to(Verdict::Drop));

    it.add_rule("from_slot", &spoofed);
    it.add_rule("from_slot", &to_slots(Verdict::Drop));
    it.add_rule("from_slot", &established);
    let allowed = Rule::new().destination_in(ALLOWED).verdict(Verdict::Accept);
    let blocked = Rule::new().destination_in(BLOCKED).verdict(Verdict::Drop);
    it.add_rule("from_slot", &allowed);
    it.add_rule("from_slot", &blocked);
    if let Some(uplink) = uplink {
        let out = Rule::new().link(Meta::OutputName, uplink);
        it.add_rule("from_slot", &out.verdict(Verdict::Accept));
        let masquerade = Rule::new()
            .link_prefix(Meta::InputName, &slots)
            .link(Meta::OutputName, uplink)
            .masquerade();
        it.add_rule("postrouting", &masquerade);
    }
    it.add_rule("from_slot", &to(Verdict::Drop));

    it.add_rule("to_slot", &established);
    it.add_rule("to_slot", &to(Verdict::Drop));
    it.finish()
}

/// Removal of the host's table.
pub(super) fn remove_host(config: &NetConfig) -> Batch {
    let table = host_table(config);
    let mut it = Transaction::on(IPV4, &table);
    it.remove_table();
    it.finish()
}

/// Lets a slot's link send from its addresses.
pub(super) fn admit(table: &str, sources: &[Source]) -> Batch {
    let mut it = Transaction::on(IPV4, table);
    it.add_links(SOURCES, sources);
    it.finish()
}

/// Takes back what [`admit`] gave. What is not there counts as taken back.
pub(super) fn dismiss(
    socket: &mut Socket,
    table: &str,
    sources: &[Source],
    deadline: Deadline,
) -> Result<(), NetlinkError> {
    let mut remove = |sources: &[Source]| {
        let mut it = Transaction::on(IPV4, table);
        it.remove_links(SOURCES, sources);
        socket.commit(&it.finish(), deadline)
    };
    match remove(sources) {
        Err(error) if error.is_missing() => {}
        other => return other,
    }
    // One of them was missing, and the transaction took none: each by itself.
    for source in sources {
        match remove(std::slice::from_ref(source)) {
            Err(error) if !error.is_missing() => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// A base chain on the forward hook that drops what its rules do not accept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForwardDrop {
    /// Its table.
    pub table: String,
    /// Its name.
    pub chain: String,
}

/// Chains of others that drop forwarded packets unless a rule of theirs accepts them. Our
/// own accepting does not help there: a packet must pass every chain of a hook.
pub(super) fn foreign_forward_drops(
    socket: &mut Socket,
    own_table: &str,
    deadline: Deadline,
) -> Result<Vec<ForwardDrop>, NetlinkError> {
    const NFPROTO_INET: u8 = 1;
    let mut found = Vec::new();
    let outcome = socket.dump(
        "list chains",
        GET_CHAIN,
        |bytes| bytes.extend_from_slice(&[0; 4]),
        deadline,
        |_, message| {
            let family = *message.first().ok_or("a chain without a header")?;
            let body = message.get(4..).ok_or("a chain without a header")?;
            if [NFPROTO_INET, IPV4].contains(&family)
                && let Some(drop) = forward_drop(body)
                && drop.table != own_table
            {
                found.push(drop);
            }
            Ok(())
        },
    );
    match outcome {
        // `nfnetlink_rcv_msg` knows no such subsystem: there are no chains.
        Err(error) if error.errno() == Some(Errno::INVAL) => Ok(Vec::new()),
        other => other.map(|()| found),
    }
}

fn forward_drop(body: &[u8]) -> Option<ForwardDrop> {
    const NF_DROP: [u8; 4] = [0; 4];
    let (mut table, mut chain, mut forward, mut drops) = (None, None, false, false);
    for (kind, value) in attributes(body) {
        let text = || {
            let value = value.strip_suffix(&[0]).unwrap_or(value);
            Some(value.escape_ascii().to_string())
        };
        match kind {
            1 => table = text(),
            3 => chain = text(),
            4 => {
                let hook = attributes(value).find(|(kind, _)| *kind == 1);
                forward = hook.is_some_and(|(_, it)| it == (Hook::Forward as u32).to_be_bytes());
            }
            5 => drops = value == NF_DROP,
            _ => {}
        }
    }
    (forward && drops).then_some(ForwardDrop {
        table: table?,
        chain: chain?,
    })
}

/// Ranges as first and last address, in order, without overlaps and gapless neighbours.
fn merged(ranges: &[Ipv4Range]) -> Vec<(Ipv4Addr, Ipv4Addr)> {
    let mut bounds: Vec<(u32, u32)> = ranges
        .iter()
        .map(|range| (range.base().into(), range.last().into()))
        .collect();
    bounds.sort_unstable();
    let mut merged: Vec<(u32, u32)> = Vec::new();
    for (first, last) in bounds {
        match merged.last_mut() {
            Some((_, end)) if first <= end.saturating_add(1) => *end = (*end).max(last),
            _ => merged.push((first, last)),
        }
    }
    let address = |(first, last): (u32, u32)| (first.into(), last.into());
    merged.into_iter().map(address).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_that_touch_become_one() {
        let ranges: Vec<Ipv4Range> = ["10.1.0.0/16", "10.0.0.0/16", "10.0.7.0/24", "255.0.0.0/8"]
            .iter()
            .map(|text| text.parse().unwrap())
            .collect();
        let ip = |a, b, c, d| Ipv4Addr::new(a, b, c, d);
        assert_eq!(
            merged(&ranges),
            [
                (ip(10, 0, 0, 0), ip(10, 1, 255, 255)),
                (ip(255, 0, 0, 0), ip(255, 255, 255, 255))
            ]
        );
    }
}
