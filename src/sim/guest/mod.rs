//! The guest: what a VM would be if there were one.
//!
//! Its state lives in guest RAM, so that it goes wherever the RAM goes: a page with a magic
//! word, a nonce made at boot and a counter that grows with every tick and every request,
//! after it the agent's memory as JSON, and pages with a pattern spread over all of RAM. A
//! guest that was restored has the nonce it had; one that booted has another. A page that got
//! lost on the way is counted by `GET /sim/state`.

mod ethernet;
mod loopback;
mod outlet;

use std::collections::HashSet;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::{Duration, Instant};

use mio::Registry;
use mio::event::Event;
use mio::net::TcpListener;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::envd::{Agent, Conversation, Dialect, Disturb, World};
use super::fault::{Faults, What};
use super::ram::{PAGE, Ram};
use crate::wire::reactor::{TokenRange, earliest};
use ethernet::{Ethernet, Identity};
use loopback::Loopback;

/// Tokens that a guest needs.
pub(super) const LINK_TOKENS: usize = 65;
const MAGIC: &[u8; 16] = b"rewake-sim guest";
const HEADER_AT: u64 = 0x1000;
const MEMORY_AT: u64 = 0x2000;
const MEMORY_MAX: usize = 256 << 10;
/// Pattern pages begin behind the guest's own memory.
const FIRST_PATTERN_PAGE: u64 = 128;
const TICK: Duration = Duration::from_millis(50);

/// Where a guest's network comes from.
pub(super) enum Wire {
    None,
    Tap(OwnedFd),
    Loopback(Rc<TcpListener>),
}

/// What the kernel command line and the configuration tell a guest that boots.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct BootWords {
    pub(super) mac: Option<[u8; 6]>,
    pub(super) dialect: Dialect,
    pub(super) pattern_pages: u64,
    address: Option<(Ipv4Addr, u8, Ipv4Addr)>,
}

impl BootWords {
    /// Reads `ip=CLIENT:SERVER:GATEWAY:NETMASK:...` (`Documentation/admin-guide/nfs/nfsroot.rst`)
    /// and `sim.envd=DIALECT`.
    pub(super) fn of(cmdline: &str, mac: Option<[u8; 6]>) -> Self {
        let mut words = Self {
            mac,
            ..Self::default()
        };
        for word in cmdline.split_whitespace() {
            if let Some(dialect) = word.strip_prefix("sim.envd=") {
                words.dialect = dialect.parse().unwrap_or_default();
            } else if let Some(value) = word.strip_prefix("ip=") {
                words.address = parse_ip(value).or(words.address);
            }
        }
        words
    }

    fn identity(&self) -> Option<Identity> {
        // What images use that configure their address themselves.
        let design = (
            Ipv4Addr::new(169, 254, 0, 21),
            30,
            Ipv4Addr::new(169, 254, 0, 22),
        );
        let (address, prefix, gateway) = self.address.unwrap_or(design);
        self.mac.map(|mac| Identity {
            mac,
            address,
            prefix,
            gateway,
            gateway_mac: None,
        })
    }
}

fn parse_ip(value: &str) -> Option<(Ipv4Addr, u8, Ipv4Addr)> {
    let mut parts = value.split(':');
    let client: Ipv4Addr = parts.next()?.parse().ok()?;
    let _server = parts.next()?;
    let gateway: Ipv4Addr = parts.next()?.parse().ok()?;
    let mask: Ipv4Addr = parts.next()?.parse().ok()?;
    Some((client, mask.to_bits().leading_ones() as u8, gateway))
}

/// What the guest keeps in RAM besides nonce and counter.
#[derive(Debug, Serialize, Deserialize)]
struct Memory {
    agent: Agent,
    network: Option<Identity>,
    /// Peers of connections that were open when the guest was last stopped.
    peers: Vec<(Ipv4Addr, u16)>,
    /// Guest clock minus host clock.
    clock_skew_ns: i64,
    /// Host clock when the guest was last stopped.
    stopped_at_ns: Option<i64>,
    pattern_pages: u64,
    restores: u64,
}

/// Answers requests on behalf of a guest.
trait Answering {
    fn answer(&mut self, conversation: &mut Conversation, bytes: &[u8]) -> Vec<u8>;
    fn answer_faults(&mut self) -> Vec<What>;
    fn is_deaf(&self) -> bool;
}

enum Link {
    None,
    Ethernet(Box<Ethernet>),
    Loopback(Loopback),
}

/// A guest that can run.
pub(super) struct Guest {
    nonce: u128,
    counter: u64,
    memory: Memory,
    link: Link,
    tokens: TokenRange,
    next_tick: Instant,
    was_restored: bool,
}

impl Guest {
    /// Boots: makes a nonce, writes the pattern, configures the network.
    pub(super) fn boot(
        ram: &mut Ram,
        words: &BootWords,
        wire: Wire,
        registry: &Registry,
        tokens: TokenRange,
    ) -> io::Result<Self> {
        let memory = Memory {
            agent: Agent::new(words.dialect),
            network: words.identity(),
            peers: Vec::new(),
            clock_skew_ns: 0,
            stopped_at_ns: None,
            pattern_pages: words.pattern_pages,
            restores: 0,
        };
        let nonce = uuid::Uuid::new_v4().as_u128();
        let guest = Self {
            link: link(wire, &memory, registry, tokens)?,
            nonce,
            counter: 0,
            memory,
            tokens,
            next_tick: Instant::now(),
            was_restored: false,
        };
        for index in pattern_indices(ram, guest.memory.pattern_pages) {
            if let Some(gpa) = ram.page_address(index) {
                ram.write(gpa, &pattern_page(nonce, index))?;
            }
        }
        guest.store(ram)?;
        Ok(guest)
    }

    /// Takes up the life that is in RAM; `None` where there is none, as in RAM of zeros.
    pub(super) fn restore(
        ram: &mut Ram,
        wire: Wire,
        registry: &Registry,
        tokens: TokenRange,
    ) -> io::Result<Option<Self>> {
        let mut header = [0; 44];
        ram.read(HEADER_AT, &mut header)?;
        let (magic, rest) = header.split_at(16);
        let (nonce, rest) = rest.split_at(16);
        let (counter, length) = rest.split_at(8);
        let length = u32::from_le_bytes(length.try_into().unwrap_or_default()) as usize;
        if magic != MAGIC || length > MEMORY_MAX {
            return Ok(None);
        }
        let mut text = vec![0; length];
        ram.read(MEMORY_AT, &mut text)?;
        let Ok(mut memory) = serde_json::from_slice::<Memory>(&text) else {
            return Ok(None);
        };
        memory.restores += 1;
        Ok(Some(Self {
            link: link(wire, &memory, registry, tokens)?,
            nonce: u128::from_le_bytes(nonce.try_into().unwrap_or_default()),
            counter: u64::from_le_bytes(counter.try_into().unwrap_or_default()),
            memory,
            tokens,
            next_tick: Instant::now(),
            was_restored: true,
        }))
    }

    /// The vCPUs stop: what the guest holds goes to RAM.
    pub(super) fn stop(&mut self, ram: &mut Ram) -> io::Result<()> {
        self.memory.stopped_at_ns = Some(host_clock_ns());
        if let Link::Ethernet(ethernet) = &self.link {
            self.memory.peers = ethernet.peers();
            self.memory.network = Some(ethernet.identity());
        }
        self.store(ram)
    }

    /// The vCPUs run (again). Without `catch_up` the guest's clock has stood still.
    pub(super) fn start(&mut self, ram: &mut Ram, catch_up: bool, now: Instant) -> io::Result<()> {
        if let Some(stopped) = self.memory.stopped_at_ns.take()
            && !catch_up
        {
            self.memory.clock_skew_ns -= host_clock_ns() - stopped;
        }
        if let Link::Ethernet(ethernet) = &mut self.link
            && self.was_restored
            && catch_up
        {
            ethernet.announce(now);
        }
        self.was_restored = false;
        self.next_tick = now;
        self.store(ram)
    }

    /// Applies the faults that stand against the guest.
    pub(super) fn set_faults(&mut self, faults: &Faults) {
        let standing = faults.standing("guest");
        let syns = standing.iter().find_map(|what| match what {
            What::DropSyn(count) => Some(*count),
            _ => None,
        });
        if let Link::Ethernet(ethernet) = &mut self.link {
            ethernet.set_faults(standing.contains(&What::Never), syns);
        }
    }

    pub(super) fn on_event(&mut self, event: &Event) {
        if let Link::Loopback(loopback) = &mut self.link {
            loopback.on_event(self.tokens, event);
        }
    }

    /// Runs until there is nothing to do; when to run again at the latest.
    pub(super) fn run(
        &mut self,
        ram: &mut Ram,
        faults: &Faults,
        registry: &Registry,
        now: Instant,
    ) -> io::Result<Option<Instant>> {
        let before = self.counter;
        if now >= self.next_tick {
            self.counter += 1;
            self.next_tick = now + TICK;
        }
        let standing = faults.standing("guest");
        let disturb = Disturb {
            fail: standing.contains(&What::PreloadFail),
            stall: standing.contains(&What::PreloadStall),
        };
        let mut error = None;
        let mut inside = Inside {
            ram,
            nonce: self.nonce,
            counter: &mut self.counter,
            pattern_pages: self.memory.pattern_pages,
            restores: self.memory.restores,
            clock_skew_ns: &mut self.memory.clock_skew_ns,
            error: &mut error,
        };
        let agent = &mut self.memory.agent;
        let walk = agent.advance(&mut inside, disturb, now);
        let mut speaker = Speaker {
            agent,
            inside,
            faults,
            deaf: standing.contains(&What::Never),
        };
        let wire = match &mut self.link {
            Link::None => None,
            Link::Ethernet(ethernet) => ethernet.advance(&mut speaker, now),
            Link::Loopback(loopback) => loopback.advance(registry, self.tokens, &mut speaker, now),
        };
        if let Some(error) = error {
            return Err(error);
        }
        if self.counter != before || walk.is_some() {
            self.store(ram)?;
        }
        Ok(earliest([Some(self.next_tick), walk, wire]))
    }

    fn store(&self, ram: &mut Ram) -> io::Result<()> {
        let text = serde_json::to_vec(&self.memory)?;
        if text.len() > MEMORY_MAX {
            return Err(io::Error::other("the guest's memory is full"));
        }
        let mut header = Vec::with_capacity(44);
        header.extend_from_slice(MAGIC);
        header.extend_from_slice(&self.nonce.to_le_bytes());
        header.extend_from_slice(&self.counter.to_le_bytes());
        header.extend_from_slice(&(text.len() as u32).to_le_bytes());
        ram.write(HEADER_AT, &header)?;
        ram.write(MEMORY_AT, &text)
    }
}

fn link(wire: Wire, memory: &Memory, registry: &Registry, tokens: TokenRange) -> io::Result<Link> {
    Ok(match (wire, &memory.network) {
        (Wire::Tap(tap), Some(identity)) => {
            let stale: HashSet<_> = memory.peers.iter().copied().collect();
            let token = tokens.token(0);
            let ethernet = Ethernet::new(tap, identity.clone(), stale, registry, token)?;
            Link::Ethernet(Box::new(ethernet))
        }
        (Wire::Loopback(listener), _) => Link::Loopback(Loopback::new(listener)),
        (Wire::None | Wire::Tap(_), _) => Link::None,
    })
}

/// The agent's view of its machine.
struct Inside<'a> {
    ram: &'a mut Ram,
    nonce: u128,
    counter: &'a mut u64,
    pattern_pages: u64,
    restores: u64,
    clock_skew_ns: &'a mut i64,
    /// What made the "vCPU" stop: memory that cannot be read.
    error: &'a mut Option<io::Error>,
}

impl World for Inside<'_> {
    fn unix_ns(&self) -> i64 {
        host_clock_ns() + *self.clock_skew_ns
    }

    fn set_unix_ns(&mut self, ns: i64) {
        *self.clock_skew_ns = ns - host_clock_ns();
    }

    fn ram_pages(&self) -> u64 {
        self.ram.total() / PAGE
    }

    fn ram_regions(&self) -> u64 {
        self.ram.region_count()
    }

    fn touch(&mut self, first: u64, count: u64) -> Result<(), String> {
        self.ram.touch(first, count).map_err(|error| {
            let text = format!("/dev/mem: {error}; /proc/kcore: {error}");
            *self.error = Some(error);
            text
        })
    }

    fn state(&mut self) -> Value {
        let mut bad = 0;
        let indices = pattern_indices(self.ram, self.pattern_pages);
        let pages = indices.len();
        for index in indices {
            let mut page = [0; PAGE as usize];
            let read = self
                .ram
                .page_address(index)
                .map(|gpa| self.ram.read(gpa, &mut page));
            if !matches!(read, Some(Ok(()))) || page != pattern_page(self.nonce, index) {
                bad += 1;
            }
        }
        json!({
            "stand_in": "rewake-sim: not a virtual machine",
            "nonce": format!("{:032x}", self.nonce),
            "counter": *self.counter,
            "restores": self.restores,
            "pattern_pages": pages,
            "bad_pages": bad,
            "ram_bytes": self.ram.total(),
        })
    }
}

/// The agent together with what it needs to answer.
struct Speaker<'a> {
    agent: &'a mut Agent,
    inside: Inside<'a>,
    faults: &'a Faults,
    deaf: bool,
}

impl Answering for Speaker<'_> {
    fn answer(&mut self, conversation: &mut Conversation, bytes: &[u8]) -> Vec<u8> {
        let before = conversation.answered;
        *self.inside.counter += 1;
        let answer = conversation.feed(bytes, self.agent, &mut self.inside);
        *self.inside.counter += conversation.answered - before;
        answer
    }

    fn answer_faults(&mut self) -> Vec<What> {
        self.faults.strike("guest")
    }

    fn is_deaf(&self) -> bool {
        self.deaf
    }
}

fn host_clock_ns() -> i64 {
    let now = jiff::Timestamp::now().as_nanosecond();
    i64::try_from(now).unwrap_or(i64::MAX)
}

/// The pages that carry the pattern, evenly spread over all of RAM.
fn pattern_indices(ram: &Ram, wanted: u64) -> Vec<u64> {
    let total = ram.total() / PAGE;
    let room = total.saturating_sub(FIRST_PATTERN_PAGE);
    let count = wanted.min(room);
    (0..count)
        .map(|i| FIRST_PATTERN_PAGE + i * room / count)
        .collect()
}

/// The content of one pattern page: a stream seeded with nonce and index (SplitMix64).
pub(super) fn pattern_page(nonce: u128, index: u64) -> [u8; PAGE as usize] {
    let mut page = [0; PAGE as usize];
    let mut state =
        (nonce as u64) ^ ((nonce >> 64) as u64) ^ index.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    for word in page.chunks_exact_mut(8) {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word.copy_from_slice(&(mixed ^ (mixed >> 31)).to_le_bytes());
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_its_address_from_the_command_line() {
        let words = BootWords::of(
            "console=ttyS0 ip=10.0.0.2::10.0.0.1:255.255.255.0::eth0:off sim.envd=e2b",
            Some([2; 6]),
        );
        let identity = words.identity().unwrap();
        assert_eq!(identity.address, Ipv4Addr::new(10, 0, 0, 2));
        assert_eq!(identity.gateway, Ipv4Addr::new(10, 0, 0, 1));
        assert_eq!(identity.prefix, 24);
        assert_eq!(words.dialect, Dialect::E2b);
        let silent = BootWords::of("quiet ip=dhcp", Some([2; 6]))
            .identity()
            .unwrap();
        assert_eq!(silent.address, Ipv4Addr::new(169, 254, 0, 21));
        assert!(BootWords::of("", None).identity().is_none());
    }

    #[test]
    fn pattern_pages_differ_by_nonce_and_index() {
        assert_ne!(pattern_page(1, 1), pattern_page(1, 2));
        assert_ne!(pattern_page(1, 1), pattern_page(2, 1));
        assert_eq!(pattern_page(7, 9), pattern_page(7, 9));
    }
}
