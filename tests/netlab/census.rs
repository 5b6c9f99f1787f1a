//! Everything that network code could leave behind, as text, so that two lists compare.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use rewake::deadline::Deadline;
use rewake::fault::Faults;
use rewake::resource::net::conntrack;
use rewake::wire::netlink::{Protocol, Socket};
use rewake_sys::netns;

/// One line per object of a namespace: links, addresses, routes, rules, neighbours, the
/// packet filter with its sets, tracked connections; and of the machine: namespaces pinned
/// under `prefix`, files of `dir`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Census(pub BTreeSet<String>);

impl Census {
    pub fn take(host: &OwnedFd, prefix: &str, dir: &Path) -> Self {
        let mut lines = BTreeSet::new();
        for (kind, arguments) in [
            ("link", &["-o", "link"][..]),
            ("address", &["-o", "-4", "addr"]),
            ("address", &["-o", "-6", "addr"]),
            ("route", &["-4", "route", "show", "table", "all"]),
            ("route", &["-6", "route", "show", "table", "all"]),
            ("rule", &["rule"]),
            ("neighbour", &["neigh", "show", "nud", "permanent"]),
        ] {
            for line in super::run(host, "ip", arguments).lines() {
                lines.insert(format!("{kind} {line}"));
            }
        }
        let filter = netns::run_in(host.as_fd(), || {
            Command::new("nft").args(["-s", "list", "ruleset"]).output()
        })
        .unwrap();
        if let Ok(output) = filter {
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            lines.extend(
                text.lines()
                    .enumerate()
                    .map(|(i, l)| format!("nft {i} {l}")),
            );
        }
        let mut socket = netns::run_in(host.as_fd(), || {
            Socket::open(Protocol::Netfilter, Faults::NONE).unwrap()
        })
        .unwrap();
        let deadline = Deadline::after(Duration::from_secs(10));
        for connection in conntrack::list(&mut socket, deadline).unwrap() {
            lines.insert(format!("conntrack {:?}", connection.addresses));
        }
        for (kind, dir) in [
            ("netns", Path::new(netns::RUN_DIR)),
            ("slot", &dir.join("slots")),
        ] {
            for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                if (kind == "netns" && name.starts_with(prefix))
                    || (kind == "slot" && name != "next")
                {
                    lines.insert(format!("{kind} {name}"));
                }
            }
        }
        Self(lines)
    }

    /// Waits until a new census equals this one; the kernel finishes some removals in the
    /// background. Fails the test with the difference.
    pub fn assert_again(&self, case: &str, again: impl Fn() -> Self) {
        let until = Instant::now() + Duration::from_secs(10);
        loop {
            let now = again();
            if now == *self {
                return;
            }
            if Instant::now() >= until {
                let more: Vec<_> = now.0.difference(&self.0).collect();
                let less: Vec<_> = self.0.difference(&now.0).collect();
                panic!("{case}: left behind {more:#?}, missing {less:#?}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
