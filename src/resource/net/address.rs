//! Which names and addresses belong to a slot. Pure: nothing here asks the kernel.

use std::fmt;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::ids::{IfName, NameError, SlotIndex};

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

impl TryFrom<String> for Mac {
    type Error = AddressError;
    fn try_from(text: String) -> Result<Self, AddressError> {
        text.parse()
    }
}

impl FromStr for Mac {
    type Err = AddressError;
    fn from_str(text: &str) -> Result<Self, AddressError> {
        let refused = || AddressError::Syntax(text.chars().take(64).collect());
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|p| p.len() == 2).ok_or_else(refused)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| refused())?;
        }
        match parts.next() {
            None => Ok(Self(bytes)),
            Some(_) => Err(refused()),
        }
    }
}

/// A range of IPv4 addresses with a common prefix.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Ipv4Range {
    base: Ipv4Addr,
    prefix: u8,
}

impl Ipv4Range {
    /// The range of `prefix` leading bits that begins at `base`.
    ///
    /// # Errors
    /// [`AddressError::Range`] where `base` has bits set behind the prefix, or the prefix
    /// is longer than 32.
    pub fn new(base: Ipv4Addr, prefix: u8) -> Result<Self, AddressError> {
        let range = Self { base, prefix };
        if prefix > 32 || u32::from(base) & !range.mask() != 0 {
            return Err(AddressError::Range(base, prefix));
        }
        Ok(range)
    }

    /// The range of `prefix` leading bits around `address`; a prefix above 32 counts as 32.
    #[must_use]
    pub fn around(address: Ipv4Addr, prefix: u8) -> Self {
        let prefix = prefix.min(32);
        let mask = mask(prefix);
        Self {
            base: Ipv4Addr::from(u32::from(address) & mask),
            prefix,
        }
    }

    /// The first address.
    #[must_use]
    pub const fn base(self) -> Ipv4Addr {
        self.base
    }

    /// The last address.
    #[must_use]
    pub fn last(self) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.base) | !self.mask())
    }

    /// The number of leading bits that all addresses share.
    #[must_use]
    pub const fn prefix(self) -> u8 {
        self.prefix
    }

    /// Whether `address` lies in the range.
    #[must_use]
    pub fn contains(self, address: Ipv4Addr) -> bool {
        u32::from(address) & self.mask() == u32::from(self.base)
    }

    /// Whether all of `other` lies in this range.
    #[must_use]
    pub fn covers(self, other: Self) -> bool {
        self.prefix <= other.prefix && self.contains(other.base)
    }

    /// Whether the two ranges share an address.
    #[must_use]
    pub fn overlaps(self, other: Self) -> bool {
        self.covers(other) || other.covers(self)
    }

    fn mask(self) -> u32 {
        mask(self.prefix.min(32))
    }

    /// The address `offset` above the base; the caller has checked that it is in the range.
    fn nth(self, offset: u32) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.base).wrapping_add(offset))
    }

    fn size(self) -> u64 {
        1 << (32 - self.prefix)
    }
}

fn mask(prefix: u8) -> u32 {
    u32::MAX
        .checked_shl(32 - u32::from(prefix))
        .unwrap_or_default()
}

impl fmt::Display for Ipv4Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.base, self.prefix)
    }
}

impl fmt::Debug for Ipv4Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl From<Ipv4Range> for String {
    fn from(range: Ipv4Range) -> Self {
        range.to_string()
    }
}

impl TryFrom<String> for Ipv4Range {
    type Error = AddressError;
    fn try_from(text: String) -> Result<Self, AddressError> {
        text.parse()
    }
}

impl FromStr for Ipv4Range {
    type Err = AddressError;
    fn from_str(text: &str) -> Result<Self, AddressError> {
        let refused = || AddressError::Syntax(text.chars().take(64).collect());
        let (base, prefix) = text.split_once('/').ok_or_else(refused)?;
        let base = base.parse().map_err(|_| refused())?;
        let prefix = prefix.parse().map_err(|_| refused())?;
        Self::new(base, prefix)
    }
}

/// Why an address plan was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// Neither an address nor a range.
    #[error("Not an address: {0:?}")]
    Syntax(String),
    /// The prefix does not fit the base address.
    #[error("Not a range: {0}/{1}")]
    Range(Ipv4Addr, u8),
    /// A range has no room for all slots.
    #[error("{range} has no room for {needed} {what}")]
    TooSmall {
        /// The range.
        range: Ipv4Range,
        /// What it is for.
        what: &'static str,
        /// How many addresses all slots need.
        needed: u64,
    },
    /// Two ranges of the plan share addresses.
    #[error("{0} and {1} overlap")]
    Overlap(Ipv4Range, Ipv4Range),
    /// The guest and its tap are not two hosts of one network.
    #[error("Guest {guest} is not a neighbour of tap {tap}/{prefix}")]
    NotNeighbours {
        /// The guest's address.
        guest: Ipv4Addr,
        /// The tap's address.
        tap: Ipv4Addr,
        /// The tap's prefix length.
        prefix: u8,
    },
    /// A name made from the prefix would be invalid.
    #[error("Invalid name prefix")]
    Name(#[from] NameError),
    /// The guest and the tap have the same Ethernet address, or one that is a group's.
    #[error("{0} is no Ethernet address for one interface of its own")]
    Mac(Mac),
}

/// Names, addresses and options that all slots of a host share.
///
/// [`NetConfig::default`] is the addressing of design section 7.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NetConfig {
    /// First part of all names: namespaces are `<prefix>-<i>`, host links `<prefix>v<i>`.
    pub prefix: String,
    /// Pairs of addresses between host and namespace, 2 per slot from the base.
    pub veth_range: Ipv4Range,
    /// Addresses under which the host reaches the guests, 1 per slot from the base.
    pub host_range: Ipv4Range,
    /// Name of the link inside a namespace that leads to the host.
    pub inside_name: IfNameText,
    /// Name of the tap inside a namespace.
    pub tap_name: IfNameText,
    /// The tap's address: the guest's gateway.
    pub tap_address: Ipv4Addr,
    /// Prefix length of the network between tap and guest.
    pub tap_prefix: u8,
    /// The tap's Ethernet address, the same in every slot: a guest keeps it in mind.
    pub tap_mac: Mac,
    /// The guest's address.
    pub guest_address: Ipv4Addr,
    /// The guest's Ethernet address.
    pub guest_mac: Mac,
    /// Whether the tap has several queues; CH asks for that above one pair.
    pub multi_queue: bool,
    /// MTU of veth pair and tap; the kernel's default where missing.
    pub mtu: Option<u32>,
    /// Whether the namespaces speak IPv6. No addresses are given out either way.
    pub ipv6: bool,
    /// Host links have the interface index `index_base` + i, far above what the kernel
    /// hands out by itself, so that one message can make a link and the next ones name it.
    pub index_base: u32,
    /// The host's link to the outside. Where missing, that of its default route.
    pub uplink: Option<IfNameText>,
    /// What guests may reach in spite of [`NetConfig::blocked`].
    pub allowed: Vec<Ipv4Range>,
    /// What guests must not reach: by default all that is not public, cloud metadata
    /// included.
    pub blocked: Vec<Ipv4Range>,
    /// The highest slot index in use.
    pub slot_max: u16,
    /// Where lock files and records live; gone after a reboot, like the kernel's objects.
    pub runtime_dir: PathBuf,
    /// Where namespaces are pinned; `ip netns` looks into `/run/netns` only.
    pub netns_dir: PathBuf,
}

/// An interface name in a configuration file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct IfNameText(pub IfName);

impl TryFrom<String> for IfNameText {
    type Error = NameError;
    fn try_from(text: String) -> Result<Self, NameError> {
        IfName::new(text).map(Self)
    }
}

impl From<IfNameText> for String {
    fn from(name: IfNameText) -> Self {
        name.0.as_str().to_owned()
    }
}

impl fmt::Display for IfNameText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl IfNameText {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        self.0.as_str()
    }

    fn fixed(name: &'static str) -> Self {
        // Invariant: called with the literal names of `Default` only, which a test checks.
        Self(IfName::new(name).unwrap_or_else(|_| unreachable!("a literal name is valid")))
    }
}

/// The ranges of the IANA special-purpose registry (RFC 6890) that are not reachable from
/// the public internet, and multicast. The documentation ranges are none of them: nothing
/// answers there.
const NOT_PUBLIC: [(u8, u8, u8, u8); 12] = [
    (0, 0, 0, 8),
    (10, 0, 0, 8),
    // Carriers' translators (RFC 6598).
    (100, 64, 0, 10),
    (127, 0, 0, 8),
    // Link-local, where clouds keep their metadata.
    (169, 254, 0, 16),
    (172, 16, 0, 12),
    (192, 0, 0, 24),
    (192, 88, 99, 24),
    (192, 168, 0, 16),
    // Benchmarks (RFC 2544).
    (198, 18, 0, 15),
    (224, 0, 0, 4),
    (240, 0, 0, 4),
];

impl Default for NetConfig {
    fn default() -> Self {
        let range = |a, b| Ipv4Range::around(Ipv4Addr::new(a, b, 0, 0), 16);
        Self {
            prefix: "rw".to_owned(),
            veth_range: range(10, 12),
            host_range: range(10, 11),
            inside_name: IfNameText::fixed("eth0"),
            tap_name: IfNameText::fixed("tap0"),
            tap_address: Ipv4Addr::new(169, 254, 0, 22),
            tap_prefix: 30,
            tap_mac: Mac([0x02, 0xfc, 0, 0, 0, 0x06]),
            guest_address: Ipv4Addr::new(169, 254, 0, 21),
            guest_mac: Mac([0x02, 0xfc, 0, 0, 0, 0x05]),
            multi_queue: false,
            mtu: None,
            ipv6: false,
            index_base: 0x4000_0000,
            uplink: None,
            allowed: Vec::new(),
            blocked: NOT_PUBLIC
                .map(|(a, b, c, prefix)| Ipv4Range::around(Ipv4Addr::new(a, b, c, 0), prefix))
                .to_vec(),
            slot_max: SlotIndex::MAX,
            runtime_dir: "/run/rewake".into(),
            netns_dir: rewake_sys::netns::RUN_DIR.into(),
        }
    }
}

impl NetConfig {
    /// Checks that every slot gets names and addresses of its own.
    ///
    /// # Errors
    /// [`AddressError`] with the rule that was broken.
    pub fn validate(&self) -> Result<(), AddressError> {
        // The longest names there can be.
        IfName::new(format!("{}v{}", self.prefix, SlotIndex::MAX))?;
        crate::ids::SandboxId::new(self.prefix.as_str())?;
        SlotIndex::new(self.slot_max)?;
        let slots = u64::from(SlotIndex::MAX) + 1;
        for (range, what, needed) in [
            (self.veth_range, "veth addresses", 2 * slots),
            (self.host_range, "host addresses", slots),
        ] {
            if range.size() < needed {
                return Err(AddressError::TooSmall {
                    range,
                    what,
                    needed,
                });
            }
        }
        let tap = Ipv4Range::around(self.tap_address, self.tap_prefix);
        let edges = [
            tap.base(),
            tap.nth(u32::try_from(tap.size() - 1).unwrap_or(0)),
        ];
        if self.guest_address == self.tap_address
            || self.tap_prefix > 31
            || !tap.contains(self.guest_address)
            || (self.tap_prefix < 31
                && (edges.contains(&self.tap_address) || edges.contains(&self.guest_address)))
        {
            return Err(AddressError::NotNeighbours {
                guest: self.guest_address,
                tap: self.tap_address,
                prefix: self.tap_prefix,
            });
        }
        for (a, b) in [
            (self.veth_range, self.host_range),
            (self.veth_range, tap),
            (self.host_range, tap),
        ] {
            if a.overlaps(b) {
                return Err(AddressError::Overlap(a, b));
            }
        }
        for mac in [self.tap_mac, self.guest_mac] {
            if mac.0[0] & 1 != 0 || mac.0 == [0; 6] || self.tap_mac == self.guest_mac {
                return Err(AddressError::Mac(mac));
            }
        }
        Ok(())
    }

    /// The names and addresses of one slot.
    #[must_use]
    pub fn slot(&self, index: SlotIndex) -> SlotPlan {
        let i = u32::from(index.get());
        let [high, low] = index.get().to_be_bytes();
        SlotPlan {
            index,
            netns: format!("{}-{index}", self.prefix),
            veth: format!("{}v{index}", self.prefix),
            veth_index: self.index_base + i,
            veth_mac: Mac([0x02, 0xfd, 0, 0, high, low]),
            veth_address: self.veth_range.nth(2 * i),
            inside_address: self.veth_range.nth(2 * i + 1),
            host_address: self.host_range.nth(i),
        }
    }

    /// The slot that a host link of this name belongs to, `None` for names of others.
    #[must_use]
    pub fn slot_of_veth(&self, name: &str) -> Option<SlotIndex> {
        parse_index(name.strip_prefix(self.prefix.as_str())?.strip_prefix('v')?)
    }

    /// The slot that a namespace of this name belongs to, `None` for names of others.
    #[must_use]
    pub fn slot_of_netns(&self, name: &str) -> Option<SlotIndex> {
        parse_index(name.strip_prefix(self.prefix.as_str())?.strip_prefix('-')?)
    }
}

/// A slot index in the one spelling that names use: no sign, no leading zero.
fn parse_index(text: &str) -> Option<SlotIndex> {
    let index: u16 = text.parse().ok()?;
    (index.to_string() == text)
        .then(|| SlotIndex::new(index).ok())
        .flatten()
}

/// Names and addresses of one slot, following from its index alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotPlan {
    /// The slot.
    pub index: SlotIndex,
    /// Name of the namespace: `rw-<i>`.
    pub netns: String,
    /// Name of the host's end of the veth pair: `rwv<i>`.
    pub veth: String,
    /// Interface index of the host's end.
    pub veth_index: u32,
    /// Ethernet address of the host's end.
    pub veth_mac: Mac,
    /// The host's address on the pair (/31).
    pub veth_address: Ipv4Addr,
    /// The namespace's address on the pair (/31): what the guest's traffic leaves as.
    pub inside_address: Ipv4Addr,
    /// The address under which the host reaches the guest.
    pub host_address: Ipv4Addr,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_plan_is_valid_and_follows_the_design() {
        let config = NetConfig::default();
        config.validate().unwrap();
        let plan = config.slot(SlotIndex::new(1).unwrap());
        assert_eq!(plan.netns, "rw-1");
        assert_eq!(plan.veth, "rwv1");
        assert_eq!(plan.veth_address, Ipv4Addr::new(10, 12, 0, 2));
        assert_eq!(plan.inside_address, Ipv4Addr::new(10, 12, 0, 3));
        assert_eq!(plan.host_address, Ipv4Addr::new(10, 11, 0, 1));
        let last = config.slot(SlotIndex::new(32767).unwrap());
        assert_eq!(last.inside_address, Ipv4Addr::new(10, 12, 255, 255));
        assert_eq!(last.host_address, Ipv4Addr::new(10, 11, 127, 255));
        assert_eq!(last.veth, "rwv32767");
    }

    #[test]
    fn only_own_names_lead_back_to_a_slot() {
        let config = NetConfig::default();
        for index in [1, 9, 255, 32767] {
            let plan = config.slot(SlotIndex::new(index).unwrap());
            assert_eq!(config.slot_of_veth(&plan.veth), Some(plan.index));
            assert_eq!(config.slot_of_netns(&plan.netns), Some(plan.index));
        }
        for foreign in [
            "rwv0", "rwv01", "rwv+1", "rwv32768", "rwv", "rwx1", "eth0", "rw-1",
        ] {
            assert_eq!(config.slot_of_veth(foreign), None, "{foreign}");
        }
        assert_eq!(config.slot_of_netns("rw-"), None);
        assert_eq!(config.slot_of_netns("rwv1"), None);
    }

    #[test]
    fn plans_that_would_share_an_address_are_refused() {
        let range = |text: &str| text.parse::<Ipv4Range>().unwrap();
        let base = NetConfig::default();
        let cases: [(&str, NetConfig); 9] = [
            (
                "veth too small",
                NetConfig {
                    veth_range: range("10.12.0.0/17"),
                    ..base.clone()
                },
            ),
            (
                "host too small",
                NetConfig {
                    host_range: range("10.11.0.0/18"),
                    ..base.clone()
                },
            ),
            (
                "overlap",
                NetConfig {
                    host_range: range("10.12.0.0/16"),
                    ..base.clone()
                },
            ),
            (
                "guest elsewhere",
                NetConfig {
                    guest_address: Ipv4Addr::new(10, 0, 0, 1),
                    ..base.clone()
                },
            ),
            (
                "guest is tap",
                NetConfig {
                    guest_address: base.tap_address,
                    ..base.clone()
                },
            ),
            (
                "guest is broadcast",
                NetConfig {
                    guest_address: Ipv4Addr::new(169, 254, 0, 23),
                    ..base.clone()
                },
            ),
            (
                "long prefix",
                NetConfig {
                    prefix: "tenletters".to_owned(),
                    ..base.clone()
                },
            ),
            (
                "slash in prefix",
                NetConfig {
                    prefix: "a/b".to_owned(),
                    ..base.clone()
                },
            ),
            (
                "same mac",
                NetConfig {
                    guest_mac: base.tap_mac,
                    ..base.clone()
                },
            ),
        ];
        for (name, config) in cases {
            assert!(config.validate().is_err(), "{name}");
        }
    }

    #[test]
    fn ranges_know_what_they_cover() {
        let range = |text: &str| text.parse::<Ipv4Range>().unwrap();
        assert!(range("10.0.0.0/8").covers(range("10.12.0.0/16")));
        assert!(!range("10.12.0.0/16").covers(range("10.0.0.0/8")));
        assert!(range("10.12.0.0/16").overlaps(range("10.0.0.0/8")));
        assert!(!range("10.11.0.0/16").overlaps(range("10.12.0.0/16")));
        assert!(range("0.0.0.0/0").contains(Ipv4Addr::new(255, 255, 255, 255)));
        for bad in [
            "10.0.0.1/8",
            "10.0.0.0/33",
            "10.0.0.0",
            "x/8",
            "10.0.0.0/-1",
        ] {
            assert!(bad.parse::<Ipv4Range>().is_err(), "{bad}");
        }
    }

    #[test]
    fn macs_are_read_strictly() {
        let mac: Mac = "02:fc:00:00:00:05".parse().unwrap();
        assert_eq!(mac, NetConfig::default().guest_mac);
        for bad in [
            "",
            "02:fc:00:00:00",
            "02:fc:00:00:00:05:06",
            "2:fc:00:00:00:05",
            "02-fc-00-00-00-05",
        ] {
            assert!(bad.parse::<Mac>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_configuration_survives_json() {
        let config = NetConfig::default();
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<NetConfig>(&text).unwrap(), config);
        assert!(serde_json::from_str::<NetConfig>(r#"{"no_such": 1}"#).is_err());
    }
}
