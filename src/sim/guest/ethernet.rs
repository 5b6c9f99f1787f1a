//! The guest's network card: smoltcp on a real tap.

use std::collections::{HashSet, VecDeque};
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::time::Instant as StackInstant;
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpAddress, IpCidr};

use super::Answering;
use super::outlet::Outlet;
use crate::sim::envd::{Conversation, PORT};
use crate::wire::reactor::earliest;

/// The `virtio_net_hdr_v1` before each frame.
const VNET_HEADER: usize = 12;
/// Largest frame without offloads.
const MAX_FRAME: usize = 1514;
/// Connections the guest can have at once, those that wait to be accepted included.
const SOCKETS: usize = 64;
const BUFFER: usize = 8 << 10;
/// Announcements of a restored card: how many, and how far apart (v53).
const ANNOUNCEMENTS: u32 = 5;
const ANNOUNCE_PACE: Duration = Duration::from_millis(200);

/// What the guest knows about its network. Lives in its RAM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Identity {
    pub(super) mac: [u8; 6],
    pub(super) address: Ipv4Addr,
    pub(super) prefix: u8,
    pub(super) gateway: Ipv4Addr,
    /// The guest's cached neighbour entry for its gateway.
    pub(super) gateway_mac: Option<[u8; 6]>,
}

/// The tap with the filters between it and the stack.
struct Card {
    tap: File,
    frame: Vec<u8>,
    injected: VecDeque<Vec<u8>>,
    deaf: bool,
    syns_to_drop: u64,
    /// Peers whose connections the guest remembers from an earlier life.
    stale: HashSet<(Ipv4Addr, u16)>,
    gateway_mac: Option<[u8; 6]>,
}

impl Card {
    /// The next frame for the stack, without its virtio header.
    fn next_frame(&mut self) -> Option<Vec<u8>> {
        if let Some(frame) = self.injected.pop_front() {
            return Some(frame);
        }
        loop {
            match self.tap.read(&mut self.frame) {
                Ok(read) if read > VNET_HEADER => {
                    let frame = self.frame[VNET_HEADER..read].to_vec();
                    if self.lets_in(&frame) {
                        return Some(frame);
                    }
                }
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return None,
            }
        }
    }

    fn lets_in(&mut self, frame: &[u8]) -> bool {
        if self.deaf {
            return false;
        }
        let Some(segment) = Segment::of(frame) else {
            return true;
        };
        self.gateway_mac = Some(segment.source_mac);
        let peer = (segment.source, segment.source_port);
        if segment.is_syn {
            // The remembered connection gives way to a new one.
            self.stale.remove(&peer);
            if self.syns_to_drop > 0 {
                self.syns_to_drop -= 1;
                return false;
            }
        }
        // The old sequence numbers fit nothing: no answer, no RST.
        !self.stale.contains(&peer)
    }

    fn send(&mut self, frame: &[u8]) {
        let mut bytes = vec![0; VNET_HEADER];
        bytes.extend_from_slice(frame);
        // A full queue loses the frame, as any card may.
        let _lost = self.tap.write(&bytes);
    }
}

/// What matters about a TCP segment for the agent's port.
struct Segment {
    source_mac: [u8; 6],
    source: Ipv4Addr,
    source_port: u16,
    is_syn: bool,
}

impl Segment {
    fn of(frame: &[u8]) -> Option<Self> {
        let source_mac: [u8; 6] = frame.get(6..12)?.try_into().ok()?;
        if frame.get(12..14)? != [0x08, 0x00] {
            return None;
        }
        let packet = frame.get(14..)?;
        let header = usize::from(packet.first()? & 0xf) * 4;
        if *packet.get(9)? != 6 {
            return None;
        }
        let source: [u8; 4] = packet.get(12..16)?.try_into().ok()?;
        let tcp = packet.get(header..)?;
        let port = |at: usize| Some(u16::from_be_bytes(tcp.get(at..at + 2)?.try_into().ok()?));
        let (source_port, target_port) = (port(0)?, port(2)?);
        let flags = *tcp.get(13)?;
        (target_port == PORT).then_some(Self {
            source_mac,
            source: source.into(),
            source_port,
            is_syn: flags & 0x02 != 0,
        })
    }
}

struct Received(Vec<u8>);
struct Sending<'a>(&'a mut Card);

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, use_frame: F) -> R {
        use_frame(&self.0)
    }
}

impl TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, fill: F) -> R {
        let mut frame = vec![0; len];
        let result = fill(&mut frame);
        self.0.send(&frame);
        result
    }
}

impl Device for Card {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sending<'a>;

    fn receive(&mut self, _at: StackInstant) -> Option<(Received, Sending<'_>)> {
        let frame = self.next_frame()?;
        Some((Received(frame), Sending(self)))
    }

    fn transmit(&mut self, _at: StackInstant) -> Option<Sending<'_>> {
        Some(Sending(self))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = MAX_FRAME;
        // The host may leave the checksum to the card.
        capabilities.checksum.tcp = Checksum::Tx;
        capabilities
    }
}

struct Socket {
    handle: SocketHandle,
    conversation: Conversation,
    outlet: Outlet,
}

/// The card and the TCP stack behind it.
pub(super) struct Ethernet {
    card: Card,
    interface: Interface,
    set: SocketSet<'static>,
    sockets: Vec<Socket>,
    identity: Identity,
    started: Instant,
    announcements: u32,
    announce_at: Option<Instant>,
}

impl Ethernet {
    /// A card on an open tap: with vnet header of 12 bytes, without offloads.
    pub(super) fn new(
        tap: OwnedFd,
        identity: Identity,
        stale: HashSet<(Ipv4Addr, u16)>,
        registry: &Registry,
        token: Token,
    ) -> io::Result<Self> {
        let flags = rustix::fs::fcntl_getfl(&tap)?;
        rustix::fs::fcntl_setfl(&tap, flags | OFlags::NONBLOCK)?;
        registry.register(&mut SourceFd(&tap.as_raw_fd()), token, Interest::READABLE)?;
        let mut card = Card {
            tap: tap.into(),
            frame: vec![0; 64 << 10],
            injected: VecDeque::new(),
            deaf: false,
            syns_to_drop: 0,
            stale,
            gateway_mac: identity.gateway_mac,
        };
        card.injected.extend(remembered_gateway(&identity));
        let started = Instant::now();
        let mac = HardwareAddress::Ethernet(EthernetAddress(identity.mac));
        let mut config = Config::new(mac);
        config.random_seed = uuid::Uuid::new_v4().as_u64_pair().0;
        let mut interface = Interface::new(config, &mut card, StackInstant::ZERO);
        interface.update_ip_addrs(|addresses| {
            let address = IpCidr::new(IpAddress::Ipv4(identity.address), identity.prefix);
            // The list is empty and has room for one.
            let _fits = addresses.push(address);
        });
        let _fits = interface
            .routes_mut()
            .add_default_ipv4_route(identity.gateway);
        let mut set = SocketSet::new(Vec::new());
        let sockets = (0..SOCKETS).map(|_| listening(&mut set)).collect();
        Ok(Self {
            card,
            interface,
            set,
            sockets,
            identity,
            started,
            announcements: 0,
            announce_at: None,
        })
    }

    /// Tells the network where the card is now, a few times.
    pub(super) fn announce(&mut self, now: Instant) {
        self.announcements = ANNOUNCEMENTS;
        self.announce_at = Some(now);
    }

    pub(super) fn set_faults(&mut self, deaf: bool, syns_to_drop: Option<u64>) {
        self.card.deaf = deaf;
        if let Some(count) = syns_to_drop {
            self.card.syns_to_drop = count;
        }
    }

    /// What the guest knows about its network now.
    pub(super) fn identity(&self) -> Identity {
        Identity {
            gateway_mac: self.card.gateway_mac,
            ..self.identity.clone()
        }
    }

    /// Peers of connections that are open, and of those it remembers from earlier lives.
    pub(super) fn peers(&self) -> Vec<(Ipv4Addr, u16)> {
        let mut peers: Vec<_> = self.card.stale.iter().copied().collect();
        for socket in &self.sockets {
            let socket = self.set.get::<tcp::Socket<'_>>(socket.handle);
            let open = matches!(
                socket.state(),
                tcp::State::Established | tcp::State::CloseWait
            );
            if let Some(remote) = socket.remote_endpoint().filter(|_| open) {
                let IpAddress::Ipv4(address) = remote.addr;
                peers.push((address, remote.port));
            }
        }
        peers
    }

    /// Does what can be done now; when to be called again.
    pub(super) fn advance(&mut self, guest: &mut dyn Answering, now: Instant) -> Option<Instant> {
        if let Some(at) = self.announce_at.filter(|at| now >= *at) {
            self.card.send(&reverse_arp(self.identity.mac));
            self.announcements -= 1;
            self.announce_at = (self.announcements > 0).then(|| at + ANNOUNCE_PACE);
        }
        let mut wake;
        loop {
            let at = self.stack_time(now);
            self.interface.poll(at, &mut self.card, &mut self.set);
            wake = None;
            let mut moved = false;
            for socket in &mut self.sockets {
                moved |= serve(socket, &mut self.set, guest, now);
                wake = earliest([wake, socket.outlet.wake_at()]);
            }
            if !moved {
                break;
            }
        }
        let delay = self.interface.poll_delay(self.stack_time(now), &self.set);
        let stack_wake = delay.map(|d| now + Duration::from_micros(d.total_micros()));
        earliest([wake, stack_wake, self.announce_at])
    }

    fn stack_time(&self, now: Instant) -> StackInstant {
        let since = now.saturating_duration_since(self.started);
        StackInstant::from_micros(since.as_micros() as i64 + 1)
    }
}

fn listening(set: &mut SocketSet<'static>) -> Socket {
    let buffer = || tcp::SocketBuffer::new(vec![0; BUFFER]);
    let mut socket = tcp::Socket::new(buffer(), buffer());
    socket.set_nagle_enabled(false);
    socket.set_ack_delay(None);
    // A fresh socket can always listen.
    let _listens = socket.listen(PORT);
    Socket {
        handle: set.add(socket),
        conversation: Conversation::default(),
        outlet: Outlet::default(),
    }
}

/// Moves bytes of one connection. Whether the stack has to be polled again.
fn serve(
    entry: &mut Socket,
    set: &mut SocketSet<'static>,
    guest: &mut dyn Answering,
    now: Instant,
) -> bool {
    let socket = set.get_mut::<tcp::Socket<'_>>(entry.handle);
    let mut moved = false;
    while socket.can_recv() {
        let bytes = socket.recv(|bytes| (bytes.len(), bytes.to_vec()));
        let Ok(bytes) = bytes else { break };
        moved = true;
        let answer = guest.answer(&mut entry.conversation, &bytes);
        if !answer.is_empty() {
            let faults = guest.answer_faults();
            entry.outlet.push(answer, &faults, now);
        }
    }
    while socket.can_send() {
        let room = socket.send_capacity() - socket.send_queue();
        let bytes = entry.outlet.take(room, now);
        if bytes.is_empty() {
            break;
        }
        moved = true;
        let sent = socket.send_slice(&bytes).unwrap_or(0);
        entry.outlet.give_back(&bytes[sent..]);
    }
    if entry.outlet.must_reset() && socket.is_active() && socket.send_queue() == 0 {
        socket.abort();
        return true;
    }
    let peer_done = socket.state() == tcp::State::CloseWait;
    if socket.may_send() && entry.outlet.is_empty() && (entry.conversation.closing || peer_done) {
        socket.close();
        moved = true;
    }
    // A real kernel has many more TIME_WAIT entries than this has sockets.
    if matches!(socket.state(), tcp::State::Closed | tcp::State::TimeWait) {
        set.remove(entry.handle);
        *entry = listening(set);
    }
    moved
}

/// An ARP answer that fills the stack's cache with what the guest had in its own.
fn remembered_gateway(identity: &Identity) -> Option<Vec<u8>> {
    let gateway_mac = identity.gateway_mac?;
    let mut frame = Vec::with_capacity(42);
    frame.extend_from_slice(&identity.mac);
    frame.extend_from_slice(&gateway_mac);
    frame.extend_from_slice(&[0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, 2]);
    frame.extend_from_slice(&gateway_mac);
    frame.extend_from_slice(&identity.gateway.octets());
    frame.extend_from_slice(&identity.mac);
    frame.extend_from_slice(&identity.address.octets());
    Some(frame)
}

/// The announcement that v53 sends for a restored card.
fn reverse_arp(mac: [u8; 6]) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend_from_slice(&mac);
    frame.extend_from_slice(&[0x80, 0x35, 0, 1, 0x08, 0, 6, 4, 0, 3]);
    frame.extend_from_slice(&mac);
    frame.extend_from_slice(&[0; 4]);
    frame.extend_from_slice(&mac);
    frame.extend_from_slice(&[0; 4]);
    frame.resize(60, 0);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_segment_in_a_frame() {
        let mut frame = vec![0xaa; 6];
        frame.extend_from_slice(&[0xbb; 6]);
        frame.extend_from_slice(&[0x08, 0x00]);
        let mut packet = vec![
            0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
        ];
        packet.extend_from_slice(&4000_u16.to_be_bytes());
        packet.extend_from_slice(&PORT.to_be_bytes());
        packet.extend_from_slice(&[0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x02, 0, 0, 0, 0, 0, 0]);
        frame.extend_from_slice(&packet);
        let segment = Segment::of(&frame).unwrap();
        assert!(segment.is_syn);
        assert_eq!(segment.source, Ipv4Addr::new(10, 0, 0, 1));
        assert_eq!(segment.source_port, 4000);
        assert_eq!(segment.source_mac, [0xbb; 6]);
        for cut in 0..frame.len() - 7 {
            assert!(Segment::of(&frame[..cut]).is_none(), "cut at {cut}");
        }
    }
}
