//! What is missing on a host for its slots to work, and how to mend it.

use std::os::unix::fs::MetadataExt;

use super::NetStep;
use super::error::NetError;
use super::host::HostNet;
use crate::deadline::Deadline;
use crate::doctor::{Finding, Status};
use crate::resource::slot::SlotError;

impl HostNet {
    /// Looks at forwarding, the uplink, routes in the way, packet filters in the way and
    /// leftovers of nobody. Changes nothing.
    #[must_use]
    pub fn examine(&self, deadline: Deadline) -> Vec<Finding> {
        let mut findings = vec![self.examine_forwarding(), self.examine_uplink(deadline)];
        findings.extend(self.examine_routes(deadline));
        findings.extend(self.examine_filters(deadline));
        findings.extend(self.examine_legacy_filter());
        findings.extend(self.examine_foreign(deadline));
        findings
    }

    /// Looks at every slot on record: its namespace is pinned, its link is there.
    ///
    /// # Errors
    /// Where slots cannot be listed.
    pub fn examine_slots(&self, deadline: Deadline) -> Result<Vec<Finding>, NetError> {
        let mut findings = Vec::new();
        for index in self.slots.list()? {
            let record = match self.slots.record(index) {
                Ok(Some(record)) => record,
                Ok(None) | Err(SlotError::Free(_)) => continue,
                Err(error) => {
                    findings.push(unknown("slot", &error.into()));
                    continue;
                }
            };
            let damage = self.damage(&record.steps, deadline)?;
            findings.push(if damage.is_empty() {
                Finding::good("slot", format!("{index} of {} stands", record.owner))
            } else {
                Finding::bad(
                    "slot",
                    Status::Degraded,
                    format!("{index} of {}: missing {}", record.owner, damage.join(", ")),
                    format!("rewake net remove {index}, once nothing uses it"),
                )
            });
        }
        Ok(findings)
    }

    /// The objects of a record that are not there as recorded.
    fn damage(&self, steps: &[NetStep], deadline: Deadline) -> Result<Vec<String>, NetError> {
        let mut missing = Vec::new();
        for step in steps {
            let there = match step {
                NetStep::Netns {
                    path,
                    device,
                    inode,
                    ..
                } => std::fs::symlink_metadata(path)
                    .is_ok_and(|it| (it.dev(), it.ino()) == (*device, *inode)),
                NetStep::Link { name, index, mac } => self
                    .link(*index, deadline)?
                    .is_some_and(|it| it.name == *name && it.mac == Some(*mac) && it.up),
                NetStep::Walls { .. } | NetStep::Conntrack { .. } => true,
            };
            if !there {
                missing.push(step.to_string());
            }
        }
        Ok(missing)
    }

    fn examine_forwarding(&self) -> Finding {
        match self.forwarding() {
            Ok(true) => Finding::good("forwarding", "the host forwards IPv4"),
            Ok(false) => Finding::bad(
                "forwarding",
                Status::Degraded,
                "the host does not forward IPv4",
                "nothing by hand: it is switched on with the first slot \
                 (sysctl -w net.ipv4.ip_forward=1 keeps it on)",
            ),
            Err(error) => unknown("forwarding", &error),
        }
    }

    fn examine_uplink(&self, deadline: Deadline) -> Finding {
        match self.uplink(deadline) {
            Ok(Some(uplink)) => Finding::good("uplink", uplink.name),
            Ok(None) => Finding::bad(
                "uplink",
                Status::Degraded,
                "no default route, so guests reach nothing outside",
                "add a default route or name the uplink in the configuration",
            ),
            Err(error) => unknown("uplink", &error),
        }
    }

    fn examine_routes(&self, deadline: Deadline) -> Vec<Finding> {
        const NAME: &str = "slot addresses";
        let overlaps = match self.overlaps(deadline) {
            Ok(overlaps) => overlaps,
            Err(error) => return vec![unknown(NAME, &error)],
        };
        if overlaps.is_empty() {
            let config = self.config();
            let detail = format!("{} and {} are free", config.veth_range, config.host_range);
            return vec![Finding::good(NAME, detail)];
        }
        let finding = |overlap: super::RouteOverlap| {
            let super::RouteOverlap { range, route } = overlap;
            if overlap.is_shadowed() {
                Finding::bad(
                    NAME,
                    Status::Degraded,
                    format!("{range} hides a part of the host's route {route}"),
                    "choose another range if hosts in there must be reached",
                )
            } else {
                Finding::bad(
                    NAME,
                    Status::Missing,
                    format!("{range} overlaps the host's route {route}"),
                    "choose another range for the slots, or remove the route",
                )
            }
        };
        overlaps.into_iter().map(finding).collect()
    }

    fn examine_filters(&self, deadline: Deadline) -> Vec<Finding> {
        const NAME: &str = "foreign packet filter";
        let prefix = &self.config().prefix;
        match self.forward_drops(deadline) {
            Ok(drops) if drops.is_empty() => {
                vec![Finding::good(
                    NAME,
                    "no other chain drops forwarded packets",
                )]
            }
            Ok(drops) => drops
                .into_iter()
                .map(|drop| {
                    Finding::bad(
                        NAME,
                        Status::Degraded,
                        format!(
                            "chain {} of table {} drops forwarded packets by default, and \
                             what we accept must pass it too",
                            drop.chain, drop.table
                        ),
                        // Docker asks for rules of others in a chain of its own.
                        format!(
                            "accept the slots there: with Docker, iptables -I DOCKER-USER \
                             -i {prefix}v+ -j ACCEPT and -I DOCKER-USER -o {prefix}v+ -j \
                             ACCEPT; else the same with -I FORWARD"
                        ),
                    )
                })
                .collect(),
            Err(error) => vec![unknown(NAME, &error)],
        }
    }

    /// Chains of the legacy `iptables` are not visible over nfnetlink; that its filter table
    /// is in use is (net/ipv4/netfilter/ip_tables.c, `ip_tables_names`).
    fn examine_legacy_filter(&self) -> Option<Finding> {
        const TABLES: &str = "/proc/thread-self/net/ip_tables_names";
        let tables = self.inside_host(|| std::fs::read_to_string(TABLES));
        legacy_filter(&tables.ok()?.ok()?)
    }

    fn examine_foreign(&self, deadline: Deadline) -> Vec<Finding> {
        const NAME: &str = "unknown slots";
        match self.foreign(deadline) {
            Ok(foreign) if foreign.is_empty() => Vec::new(),
            Ok(foreign) => vec![Finding::bad(
                NAME,
                Status::Degraded,
                format!("named like slots, without a record: {}", foreign.join(", ")),
                "if nothing uses them, remove them by hand (ip netns del, ip link del)",
            )],
            Err(error) => vec![unknown(NAME, &error)],
        }
    }
}

fn unknown(name: &'static str, error: &NetError) -> Finding {
    let mut detail = format!("cannot tell: {error}");
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        detail = format!("{detail}: {cause}");
        source = cause.source();
    }
    Finding::bad(name, Status::Degraded, detail, "run as root")
}

fn legacy_filter(tables: &str) -> Option<Finding> {
    tables.lines().any(|table| table == "filter").then(|| {
        Finding::bad(
            "legacy packet filter",
            Status::Degraded,
            "iptables-legacy has a filter table, whose chains cannot be seen from here",
            "look at iptables-legacy -S FORWARD: where it drops, accept the slots there, or \
             move to iptables-nft",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_legacy_filter_table_is_pointed_out() {
        assert_eq!(legacy_filter(""), None);
        assert_eq!(legacy_filter("nat\nmangle\n"), None);
        let finding = legacy_filter("nat\nfilter\n").unwrap();
        assert_eq!(finding.status, Status::Degraded);
        assert!(finding.remedy.contains("iptables-legacy -S FORWARD"));
    }
}
