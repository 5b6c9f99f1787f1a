//! What a sandbox reaches through its slot, and what it does not.

mod netlab;

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::os::fd::AsFd;
use std::time::Duration;

use netlab::guest::{self, Guest};
use netlab::{HOST, Lab, METADATA, PRIVATE, PUBLIC, soon};
use rewake::fault::Faults;
use rewake::resource::net::{HostNet, NetConfig, Slot, conntrack};
use rewake::wire::netlink::{Protocol, Socket};
use rewake_sys::netns;

/// How long a connection is given that must not come about: far more than any here takes.
const BLOCKED: Duration = Duration::from_millis(400);

fn v4(address: SocketAddr) -> SocketAddrV4 {
    match address {
        SocketAddr::V4(address) => address,
        SocketAddr::V6(_) => unreachable!("the lab has no IPv6"),
    }
}

fn nft_or_skip(test: &str) -> bool {
    let there = std::process::Command::new("nft").arg("-v").output().is_ok();
    if !there {
        netlab::skip(test, "no nft command");
    }
    there
}

fn nft(lab: &Lab, arguments: &str) -> String {
    let arguments: Vec<&str> = arguments.split_whitespace().collect();
    netlab::run(&lab.host, "nft", &arguments)
}

fn table(host: &HostNet) -> String {
    format!("rewake_{}", host.config().prefix)
}

#[test]
fn root_host_and_guest_reach_each_other_and_the_guest_reaches_the_internet() {
    let test = "root_host_and_guest_reach_each_other_and_the_guest_reaches_the_internet";
    let Some(lab) = Lab::new(test) else { return };
    let host = lab.open(Faults::NONE);
    let slot = host.create("test", soon()).unwrap();
    let guest = Guest::start(&slot, host.config());
    let at = SocketAddr::from((slot.host_address(), guest::PORT));
    let seen = lab.fetch_from_host(at).unwrap();
    assert_eq!(seen, slot.plan().veth_address.to_string(), "host to guest");
    let server = lab.serve_on_internet(PUBLIC);
    let seen = guest.fetch(v4(server.address)).unwrap();
    assert_eq!(seen, HOST.to_string(), "guest to internet, masqueraded");
    drop(guest);
    host.destroy(slot, soon()).unwrap();
    host.retire(soon()).unwrap();
}

/// Everything a sandbox must not reach, and one thing it must.
struct Targets {
    public: netlab::Server,
    forbidden: Vec<(&'static str, SocketAddrV4, Vec<netlab::Server>)>,
}

impl Targets {
    fn new(lab: &Lab, own: &Slot, other: &Slot) -> Self {
        let server = |name, server: netlab::Server| (name, v4(server.address), vec![server]);
        Self {
            public: lab.serve_on_internet(PUBLIC),
            forbidden: vec![
                server("metadata", lab.serve_on_internet(METADATA)),
                server("private range", lab.serve_on_internet(PRIVATE)),
                server("host, uplink address", lab.serve_on_host(HOST)),
                server("host, own link", lab.serve_on_host(own.plan().veth_address)),
                (
                    "another sandbox",
                    SocketAddrV4::new(other.host_address(), guest::PORT),
                    Vec::new(),
                ),
            ],
        }
    }

    fn reached(&self, guest: &Guest) -> Vec<&'static str> {
        let reached = self
            .forbidden
            .iter()
            .filter(|(_, address, _)| guest.fetch_within(*address, BLOCKED).is_ok());
        reached.map(|(name, ..)| *name).collect()
    }
}

#[test]
fn root_a_sandbox_reaches_the_public_internet_and_nothing_else() {
    let test = "root_a_sandbox_reaches_the_public_internet_and_nothing_else";
    if !nft_or_skip(test) {
        return;
    }
    let Some(lab) = Lab::new(test) else { return };
    let host = lab.open(Faults::NONE);
    let (a, b) = (
        host.create("a", soon()).unwrap(),
        host.create("b", soon()).unwrap(),
    );
    let guest_a = Guest::start(&a, host.config());
    let guest_b = Guest::start(&b, host.config());
    let targets = Targets::new(&lab, &a, &b);
    assert!(guest_a.fetch(v4(targets.public.address)).is_ok());
    let at_b = SocketAddr::from((b.host_address(), guest::PORT));
    assert!(lab.fetch_from_host(at_b).is_ok(), "B is there");
    assert_eq!(targets.reached(&guest_a), [""; 0]);

    // The same must fail without the walls, or it proves nothing.
    for chain in ["from_slot", "to_slot", "to_host"] {
        nft(&lab, &format!("flush chain ip {} {chain}", table(&host)));
    }
    let all: Vec<_> = targets.forbidden.iter().map(|(name, ..)| *name).collect();
    assert_eq!(targets.reached(&guest_a), all, "without walls");

    // And they come back with the next preparation.
    host.prepare(soon()).unwrap();
    assert_eq!(targets.reached(&guest_a), [""; 0]);
    assert!(guest_a.fetch(v4(targets.public.address)).is_ok());
    drop((guest_a, guest_b));
    let failures = host.destroy_all(vec![a, b], soon());
    assert!(failures.is_empty(), "{failures:?}");
}

#[test]
fn root_a_sandbox_cannot_send_from_another_address() {
    let test = "root_a_sandbox_cannot_send_from_another_address";
    if !nft_or_skip(test) {
        return;
    }
    let Some(lab) = Lab::new(test) else { return };
    let host = lab.open(Faults::NONE);
    let slot = host.create("test", soon()).unwrap();
    let server = lab.serve_on_internet(PUBLIC);
    let stranger = Ipv4Addr::new(172, 30, 0, 5);
    let name = slot.plan().netns.clone();
    // The reverse-path check of the kernel would hide what our walls do.
    for scope in ["all", "tap0", "eth0"] {
        let file = format!("/proc/sys/net/ipv4/conf/{scope}/rp_filter");
        netlab::run(
            &lab.host,
            "ip",
            &[
                "netns",
                "exec",
                &name,
                "sh",
                "-c",
                &format!("echo 0 > {file}"),
            ],
        );
        if scope == "all" {
            netlab::run(&lab.host, "sh", &["-c", &format!("echo 0 > {file}")]);
        }
    }
    let link = &slot.plan().veth;
    netlab::run(
        &lab.host,
        "sh",
        &[
            "-c",
            &format!("echo 0 > /proc/sys/net/ipv4/conf/{link}/rp_filter"),
        ],
    );
    let escaped = |guest: &Guest| {
        let _ = guest.fetch_within(v4(server.address), BLOCKED);
        let mut socket = netns::run_in(lab.host.as_fd(), || {
            Socket::open(Protocol::Netfilter, Faults::NONE).unwrap()
        })
        .unwrap();
        conntrack::list(&mut socket, soon())
            .unwrap()
            .iter()
            .any(|it| it.addresses[0] == stranger)
    };
    let guest = Guest::start_as(&slot, host.config(), stranger);
    assert!(!escaped(&guest), "both walls up");
    let inside = [
        "netns", "exec", &name, "nft", "flush", "chain", "ip", "rewake", "forward",
    ];
    netlab::run(&lab.host, "ip", &inside);
    assert!(!escaped(&guest), "the host's wall alone");
    nft(&lab, &format!("flush chain ip {} from_slot", table(&host)));
    assert!(escaped(&guest), "without walls it would get out");
    drop(guest);
    let honest = Guest::start(&slot, host.config());
    assert!(honest.fetch(v4(server.address)).is_ok());
    drop(honest);
    host.destroy(slot, soon()).unwrap();
}

#[test]
fn root_allowed_ranges_open_the_wall_and_nothing_more() {
    let test = "root_allowed_ranges_open_the_wall_and_nothing_more";
    let Some(lab) = Lab::new(test) else { return };
    let config = NetConfig {
        allowed: vec!["10.99.0.0/24".parse().unwrap()],
        ..lab.config()
    };
    let host = lab.open_with(config, Faults::NONE);
    let slot = host.create("test", soon()).unwrap();
    let guest = Guest::start(&slot, host.config());
    let private = lab.serve_on_internet(PRIVATE);
    let metadata = lab.serve_on_internet(METADATA);
    // An allowed range is reached with the slot's own address if not through the uplink's
    // translation; here it is through it.
    assert!(guest.fetch(v4(private.address)).is_ok());
    assert!(guest.fetch_within(v4(metadata.address), BLOCKED).is_err());
    drop(guest);
    host.destroy(slot, soon()).unwrap();
}

#[test]
fn root_nft_shows_the_rules_as_they_were_meant() {
    let test = "root_nft_shows_the_rules_as_they_were_meant";
    if !nft_or_skip(test) {
        return;
    }
    let Some(lab) = Lab::new(test) else { return };
    let host = lab.open(Faults::NONE);
    let slot = host.create("test", soon()).unwrap();
    let prefix = &host.config().prefix;
    let shown = nft(&lab, &format!("-s list table ip {}", table(&host)));
    let meant = include_str!("netlab/host.nft")
        .replace("@PREFIX@", prefix)
        .replace("@INDEX@", &slot.index().to_string());
    assert_eq!(normal(&shown), normal(&meant), "{shown}");
    let name = &slot.plan().netns;
    let inside = ["netns", "exec", name, "nft", "-s", "list", "ruleset"];
    let shown = netlab::run(&lab.host, "ip", &inside);
    let meant = include_str!("netlab/inside.nft")
        .replace("@INSIDE@", &slot.plan().inside_address.to_string())
        .replace("@REACH@", &slot.host_address().to_string());
    assert_eq!(normal(&shown), normal(&meant), "{shown}");
    host.destroy(slot, soon()).unwrap();
    let empty = nft(&lab, &format!("list set ip {} sources", table(&host)));
    assert!(!empty.contains("elements"), "{empty}");
}

/// Words without line breaks, elements of sets in order: versions of `nft` break lines
/// differently, and hashed sets have no order.
fn normal(text: &str) -> String {
    let words = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let mut parts = words.split("elements = {");
    let mut normal = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (elements, rest) = part.split_once('}').unwrap_or_default();
        let mut elements: Vec<_> = elements.split(',').map(str::trim).collect();
        elements.sort_unstable();
        normal += &format!("elements = {{ {} }}{rest}", elements.join(", "));
    }
    normal
}

#[test]
fn root_a_foreign_chain_that_drops_is_found() {
    let test = "root_a_foreign_chain_that_drops_is_found";
    if !nft_or_skip(test) {
        return;
    }
    let Some(lab) = Lab::new(test) else { return };
    let host = lab.open(Faults::NONE);
    assert!(host.forward_drops(soon()).unwrap().is_empty());
    nft(&lab, "add table ip filter");
    nft(
        &lab,
        "add chain ip filter FORWARD { type filter hook forward priority 0 ; policy drop ; }",
    );
    nft(
        &lab,
        "add chain ip filter INPUT { type filter hook input priority 0 ; policy drop ; }",
    );
    let found = host.forward_drops(soon()).unwrap();
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(
        (found[0].table.as_str(), found[0].chain.as_str()),
        ("filter", "FORWARD")
    );
}

#[test]
fn root_tracked_connections_do_not_outlive_their_slot() {
    let test = "root_tracked_connections_do_not_outlive_their_slot";
    let Some(lab) = Lab::new(test) else { return };
    let host = lab.open(Faults::NONE);
    let slot = host.create("test", soon()).unwrap();
    let guest = Guest::start(&slot, host.config());
    let at = SocketAddr::from((slot.host_address(), guest::PORT));
    lab.fetch_from_host(at).unwrap();
    let server = lab.serve_on_internet(PUBLIC);
    guest.fetch(v4(server.address)).unwrap();
    let tracked = || {
        let mut socket = netns::run_in(lab.host.as_fd(), || {
            Socket::open(Protocol::Netfilter, Faults::NONE).unwrap()
        })
        .unwrap();
        conntrack::list(&mut socket, soon()).unwrap().len()
    };
    assert!(tracked() >= 2, "both directions were tracked");
    drop(guest);
    host.destroy(slot, soon()).unwrap();
    assert_eq!(tracked(), 0);
}
