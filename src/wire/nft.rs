//! Builders of `nf_tables` transactions over nfnetlink, as far as network slots need them.
//!
//! Facts: include/uapi/linux/netfilter/{nfnetlink,nf_tables}.h. Numbers in attributes are
//! big-endian; what is compared with packets and metadata is in the byte order it has there.

use std::net::Ipv4Addr;

use super::netlink::{Batch, CREATE};

const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFNL_MSG_BATCH_BEGIN: u16 = 0x10;
const NFNL_MSG_BATCH_END: u16 = 0x11;
const NLA_F_NESTED: u16 = 0x8000;

/// Address family IPv4 (`NFPROTO_IPV4`).
pub const IPV4: u8 = 2;

/// `NFT_MSG_GETCHAIN` with its subsystem, for dumps.
pub const GET_CHAIN: u16 = message(4);
/// `NFT_MSG_GETTABLE` with its subsystem.
pub const GET_TABLE: u16 = message(1);
const NEW_TABLE: u16 = message(0);
const DEL_TABLE: u16 = message(2);
const NEW_CHAIN: u16 = message(3);
const NEW_RULE: u16 = message(6);
const DEL_RULE: u16 = message(8);
const NEW_SET: u16 = message(9);
const NEW_ELEMENTS: u16 = message(12);
const DEL_ELEMENTS: u16 = message(14);

const fn message(number: u16) -> u16 {
    NFNL_SUBSYS_NFTABLES << 8 | number
}

/// First 32-bit register (`NFT_REG32_00`); the following ones are consecutive.
const REGISTER: u32 = 8;
const REGISTER_VERDICT: u32 = 0;

/// Where a base chain hangs (`enum nf_inet_hooks`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    /// Before routing.
    Prerouting = 0,
    /// To the host itself.
    Input = 1,
    /// From one link to another.
    Forward = 2,
    /// After routing.
    Postrouting = 4,
}

/// What a rule does in the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict<'a> {
    /// Lets the packet through this chain.
    Accept,
    /// Throws the packet away.
    Drop,
    /// Continues in another chain and comes back.
    Jump(&'a str),
}

/// What the kernel keeps of each packet besides its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Meta {
    /// Index of the link it came in by, 4 bytes of the host's order.
    InputIndex = 4,
    /// Index of the link it goes out by.
    OutputIndex = 5,
    /// Name of the link it came in by, 16 bytes.
    InputName = 6,
    /// Name of the link it goes out by.
    OutputName = 7,
}

/// A transaction on one table: applied whole or not at all.
#[derive(Debug)]
pub struct Transaction<'a> {
    batch: Batch,
    family: u8,
    table: &'a str,
}

impl<'a> Transaction<'a> {
    /// Begins a transaction on a table of a family.
    #[must_use]
    pub fn on(family: u8, table: &'a str) -> Self {
        let mut batch = Batch::transaction();
        batch.push_silent("begin", NFNL_MSG_BATCH_BEGIN, 0, |bytes| {
            bytes.extend_from_slice(&subsystem());
        });
        Self {
            batch,
            family,
            table,
        }
    }

    /// The finished transaction.
    #[must_use]
    pub fn finish(mut self) -> Batch {
        self.batch
            .push_silent("end", NFNL_MSG_BATCH_END, 0, |bytes| {
                bytes.extend_from_slice(&subsystem());
            });
        self.batch
    }

    /// Makes the table, if it is not there.
    pub fn add_table(&mut self) {
        let step = format!("add table {}", self.table);
        self.push(step, NEW_TABLE, CREATE, |it| {
            it.number(2, 0);
        });
    }

    /// Removes the table with all that is in it.
    pub fn remove_table(&mut self) {
        let step = format!("remove table {}", self.table);
        self.push(step, DEL_TABLE, 0, |_| {});
    }

    /// Makes a chain that other chains jump to, if it is not there, and empties it.
    pub fn add_chain(&mut self, name: &str) {
        self.push(format!("add chain {name}"), NEW_CHAIN, CREATE, |it| {
            it.text(3, name);
        });
        self.empty_chain(name);
    }

    /// Makes a chain on a hook, if it is not there, and empties it. `kind` is `filter` or
    /// `nat`; lower priorities see a packet earlier. What no rule decides is let through.
    pub fn add_base_chain(&mut self, name: &str, kind: &str, hook: Hook, priority: i32) {
        self.push(format!("add chain {name}"), NEW_CHAIN, CREATE, |it| {
            it.text(3, name).text(7, kind).nest(4, |it| {
                it.number(1, hook as u32)
                    .number(2, priority.cast_unsigned());
            });
        });
        self.empty_chain(name);
    }

    /// Makes a set of pairs of a link's index and an IPv4 address, if it is not there.
    pub fn add_link_set(&mut self, name: &str) {
        // How `nft` prints the keys: iface_index . ipv4_addr.
        self.add_set(name, 0, (20 << 6) | 7, 8);
    }

    /// Makes a set of ranges of IPv4 addresses, if it is not there, and empties it.
    pub fn add_range_set(&mut self, name: &str) {
        const NFT_SET_INTERVAL: u32 = 4;
        self.add_set(name, NFT_SET_INTERVAL, 7, 4);
        self.push(format!("empty set {name}"), DEL_ELEMENTS, 0, |it| {
            it.text(2, name);
        });
    }

    /// Adds pairs of link index and address to a set; those it has already may repeat.
    pub fn add_links(&mut self, set: &str, pairs: &[(u32, Ipv4Addr)]) {
        self.elements(
            format!("add to set {set}"),
            NEW_ELEMENTS,
            CREATE,
            set,
            pairs,
        );
    }

    /// Removes pairs from a set. All must be there.
    pub fn remove_links(&mut self, set: &str, pairs: &[(u32, Ipv4Addr)]) {
        self.elements(
            format!("remove from set {set}"),
            DEL_ELEMENTS,
            0,
            set,
            pairs,
        );
    }

    /// Adds ranges, first and last address, to a set of ranges. They must not touch.
    pub fn add_ranges(&mut self, set: &str, ranges: &[(Ipv4Addr, Ipv4Addr)]) {
        const NFT_SET_ELEM_INTERVAL_END: u32 = 1;
        if ranges.is_empty() {
            return;
        }
        self.push(format!("add to set {set}"), NEW_ELEMENTS, CREATE, |it| {
            it.text(2, set).nest(3, |it| {
                for (first, last) in ranges {
                    it.nest(1, |it| {
                        it.nest(1, |it| {
                            it.put(1, &first.octets());
                        });
                    });
                    // The end is the first address behind; the last of all has none.
                    let Some(end) = u32::from(*last).checked_add(1) else {
                        continue;
                    };
                    it.nest(1, |it| {
                        it.number(3, NFT_SET_ELEM_INTERVAL_END).nest(1, |it| {
                            it.put(1, &end.to_be_bytes());
                        });
                    });
                }
            });
        });
    }

    /// Adds a rule at the end of a chain.
    pub fn add_rule(&mut self, chain: &str, rule: &Rule) {
        const APPEND: u16 = super::netlink::APPEND;
        let step = format!("add rule to {chain}");
        self.push(step, NEW_RULE, CREATE | APPEND, |it| {
            it.text(2, chain).nest(4, |it| {
                it.bytes.extend_from_slice(&rule.expressions);
            });
        });
    }

    fn empty_chain(&mut self, name: &str) {
        self.push(format!("empty chain {name}"), DEL_RULE, 0, |it| {
            it.text(2, name);
        });
    }

    fn add_set(&mut self, name: &str, flags: u32, key_type: u32, key_bytes: u32) {
        self.push(format!("add set {name}"), NEW_SET, CREATE, |it| {
            it.text(2, name)
                .number(3, flags)
                .number(4, key_type)
                .number(5, key_bytes)
                // An id of its own in the transaction, required even where unused.
                .number(10, 1);
        });
    }

    fn elements(
        &mut self,
        step: String,
        kind: u16,
        flags: u16,
        set: &str,
        pairs: &[(u32, Ipv4Addr)],
    ) {
        self.push(step, kind, flags, |it| {
            it.text(2, set).nest(3, |it| {
                for (index, address) in pairs {
                    let mut key = [0; 8];
                    key[..4].copy_from_slice(&index.to_ne_bytes());
                    key[4..].copy_from_slice(&address.octets());
                    it.nest(1, |it| {
                        it.nest(1, |it| {
                            it.put(1, &key);
                        });
                    });
                }
            });
        });
    }

    /// One request; the table's name is the first attribute of all of them.
    fn push(
        &mut self,
        step: String,
        kind: u16,
        flags: u16,
        body: impl FnOnce(&mut Attributes<'_>),
    ) {
        let (family, table) = (self.family, self.table);
        self.batch.push(step, kind, flags, |bytes| {
            bytes.extend_from_slice(&[family, 0, 0, 0]);
            let mut attributes = Attributes { bytes };
            attributes.text(1, table);
            body(&mut attributes);
        });
    }
}

/// `struct nfgenmsg` of a transaction's ends: family, version, subsystem in network order.
fn subsystem() -> [u8; 4] {
    let [high, low] = NFNL_SUBSYS_NFTABLES.to_be_bytes();
    [0, 0, high, low]
}

/// The expressions of one rule, in the order in which the kernel runs them: matches, then
/// one of [`Rule::verdict`], [`Rule::source_nat`], [`Rule::destination_nat`],
/// [`Rule::masquerade`].
#[derive(Debug, Clone, Default)]
pub struct Rule {
    expressions: Vec<u8>,
}

impl Rule {
    /// A rule that matches everything.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Only packets whose link name is this one.
    #[must_use]
    pub fn link(self, meta: Meta, name: &str) -> Self {
        let mut padded = [0; 16];
        let length = name.len().min(15);
        padded[..length].copy_from_slice(&name.as_bytes()[..length]);
        self.load_meta(meta, 0).compare(0, true, &padded)
    }

    /// Only packets whose link name begins like this.
    #[must_use]
    pub fn link_prefix(self, meta: Meta, prefix: &str) -> Self {
        self.load_meta(meta, 0).compare(0, true, prefix.as_bytes())
    }

    /// Only packets with this source address, or only those without.
    #[must_use]
    pub fn source(self, address: Ipv4Addr, equal: bool) -> Self {
        self.load_header(12, 0).compare(0, equal, &address.octets())
    }

    /// Only packets with this destination address.
    #[must_use]
    pub fn destination(self, address: Ipv4Addr) -> Self {
        self.load_header(16, 0).compare(0, true, &address.octets())
    }

    /// Only packets whose destination is in this set of ranges.
    #[must_use]
    pub fn destination_in(self, set: &str) -> Self {
        self.load_header(16, 0).lookup(set, false)
    }

    /// Only packets whose pair of input link and source address is not in this set.
    #[must_use]
    pub fn foreign_source(self, set: &str) -> Self {
        self.load_meta(Meta::InputIndex, 0)
            .load_header(12, 1)
            .lookup(set, true)
    }

    /// Only packets of connections that exist, or that such a connection has caused.
    #[must_use]
    pub fn established(self) -> Self {
        const NFT_CT_STATE: u32 = 0;
        const ESTABLISHED_OR_RELATED: u32 = 2 | 4;
        let mask = ESTABLISHED_OR_RELATED.to_ne_bytes();
        self.expression("ct", |it| {
            it.number(1, REGISTER).number(2, NFT_CT_STATE);
        })
        .expression("bitwise", |it| {
            it.number(1, REGISTER).number(2, REGISTER).number(3, 4);
            it.nest(4, |it| {
                it.put(1, &mask);
            });
            it.nest(5, |it| {
                it.put(1, &[0; 4]);
            });
        })
        .compare(0, false, &[0; 4])
    }

    /// Ends with a verdict.
    #[must_use]
    pub fn verdict(self, verdict: Verdict<'_>) -> Self {
        let (code, chain) = match verdict {
            Verdict::Drop => (0, None),
            Verdict::Accept => (1, None),
            Verdict::Jump(chain) => (-3_i32, Some(chain)),
        };
        self.expression("immediate", |it| {
            it.number(1, REGISTER_VERDICT).nest(2, |it| {
                it.nest(2, |it| {
                    it.number(1, code.cast_unsigned());
                    if let Some(chain) = chain {
                        it.text(2, chain);
                    }
                });
            });
        })
    }

    /// Rewrites the source address of the connection.
    #[must_use]
    pub fn source_nat(self, address: Ipv4Addr) -> Self {
        self.nat(0, address)
    }

    /// Rewrites the destination address of the connection.
    #[must_use]
    pub fn destination_nat(self, address: Ipv4Addr) -> Self {
        self.nat(1, address)
    }

    /// Rewrites the source address to that of the link the packet leaves by.
    #[must_use]
    pub fn masquerade(self) -> Self {
        self.expression("masq", |_| {})
    }

    fn nat(self, kind: u32, address: Ipv4Addr) -> Self {
        self.expression("immediate", |it| {
            it.number(1, REGISTER).nest(2, |it| {
                it.put(1, &address.octets());
            });
        })
        .expression("nat", |it| {
            it.number(1, kind)
                .number(2, u32::from(IPV4))
                .number(3, REGISTER);
        })
    }

    /// Loads metadata into the register `slot` places behind the first.
    fn load_meta(self, meta: Meta, slot: u32) -> Self {
        self.expression("meta", |it| {
            it.number(2, meta as u32).number(1, REGISTER + slot);
        })
    }

    /// Loads 4 bytes of the IPv4 header.
    fn load_header(self, offset: u32, slot: u32) -> Self {
        const NFT_PAYLOAD_NETWORK_HEADER: u32 = 1;
        self.expression("payload", |it| {
            it.number(1, REGISTER + slot)
                .number(2, NFT_PAYLOAD_NETWORK_HEADER)
                .number(3, offset)
                .number(4, 4);
        })
    }

    fn compare(self, slot: u32, equal: bool, value: &[u8]) -> Self {
        self.expression("cmp", |it| {
            it.number(1, REGISTER + slot)
                .number(2, u32::from(!equal))
                .nest(3, |it| {
                    it.put(1, value);
                });
        })
    }

    fn lookup(self, set: &str, inverted: bool) -> Self {
        self.expression("lookup", |it| {
            it.text(1, set)
                .number(2, REGISTER)
                .number(5, u32::from(inverted));
        })
    }

    fn expression(mut self, name: &str, data: impl FnOnce(&mut Attributes<'_>)) -> Self {
        let mut attributes = Attributes {
            bytes: &mut self.expressions,
        };
        attributes.nest(1, |it| {
            it.text(1, name).nest(2, data);
        });
        self
    }
}

/// Appends netlink attributes.
struct Attributes<'a> {
    bytes: &'a mut Vec<u8>,
}

impl Attributes<'_> {
    fn put(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
        self.bytes.extend_from_slice(&length.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        self
    }

    fn number(&mut self, kind: u16, value: u32) -> &mut Self {
        self.put(kind, &value.to_be_bytes())
    }

    fn text(&mut self, kind: u16, value: &str) -> &mut Self {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.put(kind, &bytes)
    }

    fn nest(&mut self, kind: u16, body: impl FnOnce(&mut Attributes<'_>)) -> &mut Self {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 2]);
        self.bytes
            .extend_from_slice(&(kind | NLA_F_NESTED).to_ne_bytes());
        body(&mut Attributes { bytes: self.bytes });
        let length = u16::try_from(self.bytes.len() - start).unwrap_or(u16::MAX);
        self.bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::netlink::attributes;

    #[test]
    fn attributes_nest_and_pad() {
        let mut bytes = Vec::new();
        Attributes { bytes: &mut bytes }.nest(4, |it| {
            it.text(1, "ab").number(2, 7);
        });
        let (kind, inner) = attributes(&bytes).next().unwrap();
        assert_eq!(kind, 4);
        let inner: Vec<_> = attributes(inner).collect();
        assert_eq!(inner, [(1, &b"ab\0"[..]), (2, &[0, 0, 0, 7][..])]);
        assert_eq!(bytes.len() % 4, 0);
    }

    #[test]
    fn a_transaction_is_framed_by_its_subsystem() {
        let mut transaction = Transaction::on(IPV4, "t");
        transaction.add_table();
        let batch = transaction.finish();
        assert_eq!(batch.len(), 3);
        let bytes = batch.as_bytes();
        assert_eq!(bytes[4..6], NFNL_MSG_BATCH_BEGIN.to_ne_bytes());
        assert_eq!(bytes[16..20], [0, 0, 0, 10]);
        assert_eq!(bytes[24..26], NEW_TABLE.to_ne_bytes());
        assert_eq!(bytes[36..40], [IPV4, 0, 0, 0]);
    }
}
