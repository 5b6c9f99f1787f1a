//! A stand-in guest on a slot's tap: a TCP/IP stack of its own that serves and connects.

use std::collections::VecDeque;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant as Clock};

use rewake::resource::net::{NetConfig, Slot};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpAddress, IpCidr};

/// The port on which every guest answers with its client's address.
pub const PORT: u16 = 8080;
/// `virtio_net_hdr` without merged buffers.
const HEADER: usize = 10;
const LISTENERS: usize = 4;

/// A running guest; it stops when dropped.
pub struct Guest {
    requests: mpsc::Sender<Request>,
    stop: Arc<AtomicBool>,
    worker: Option<JoinHandle<()>>,
}

struct Request {
    to: SocketAddrV4,
    timeout: Duration,
    answer: mpsc::Sender<io::Result<String>>,
}

impl Guest {
    /// A well-behaved guest: address and Ethernet address as configured.
    pub fn start(slot: &Slot, config: &NetConfig) -> Self {
        Self::start_as(slot, config, config.guest_address)
    }

    /// A guest that sends from another source address.
    pub fn start_as(slot: &Slot, config: &NetConfig, address: Ipv4Addr) -> Self {
        Self::start_with(slot, config, address, None)
    }

    /// A well-behaved guest that gives every client this answer.
    pub fn start_answering(slot: &Slot, config: &NetConfig, answer: &'static [u8]) -> Self {
        Self::start_with(slot, config, config.guest_address, Some(answer))
    }

    fn start_with(
        slot: &Slot,
        config: &NetConfig,
        address: Ipv4Addr,
        answer: Option<&'static [u8]>,
    ) -> Self {
        let tap = slot.open_tap().unwrap().into_fd();
        rustix::io::ioctl_fionbio(&tap, true).unwrap();
        let mut wire = Wire {
            tap,
            received: VecDeque::new(),
        };
        let mac = HardwareAddress::Ethernet(EthernetAddress(config.guest_mac.0));
        let mut stack = Interface::new(Config::new(mac), &mut wire, now());
        let prefix = config.tap_prefix;
        stack.update_ip_addrs(|addresses| {
            let cidr = IpCidr::new(IpAddress::Ipv4(address), prefix);
            addresses.push(cidr).unwrap();
            if address != config.guest_address {
                // Still a neighbour of the gateway, or no packet would leave at all.
                let own = IpCidr::new(IpAddress::Ipv4(config.guest_address), prefix);
                addresses.push(own).unwrap();
            }
        });
        let gateway = config.tap_address;
        stack.routes_mut().add_default_ipv4_route(gateway).unwrap();
        let (requests, inbox) = mpsc::channel();
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = Arc::clone(&stop);
        let worker = std::thread::spawn(move || {
            Stack::new(wire, stack, answer).run(&inbox, &stopping, address);
        });
        Self {
            requests,
            stop,
            worker: Some(worker),
        }
    }

    /// What a TCP server says to a client inside the guest.
    pub fn fetch(&self, to: impl Into<SocketAddrV4>) -> io::Result<String> {
        self.fetch_within(to, Duration::from_secs(2))
    }

    /// The same with a limit of its own, for what is expected to be dropped.
    pub fn fetch_within(
        &self,
        to: impl Into<SocketAddrV4>,
        timeout: Duration,
    ) -> io::Result<String> {
        let (answer, outcome) = mpsc::channel();
        let request = Request {
            to: to.into(),
            timeout,
            answer,
        };
        self.requests.send(request).unwrap();
        outcome.recv().unwrap()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(worker) = self.worker.take() {
            let _ = worker.join();
        }
    }
}

struct Stack {
    wire: Wire,
    stack: Interface,
    sockets: SocketSet<'static>,
    listeners: Vec<SocketHandle>,
    clients: Vec<Client>,
    next_port: u16,
    answer: Option<&'static [u8]>,
}

struct Client {
    handle: SocketHandle,
    until: Clock,
    greeted: bool,
    text: Vec<u8>,
    answer: mpsc::Sender<io::Result<String>>,
}

impl Stack {
    fn new(wire: Wire, stack: Interface, answer: Option<&'static [u8]>) -> Self {
        let mut sockets = SocketSet::new(Vec::new());
        let listeners = (0..LISTENERS).map(|_| sockets.add(socket())).collect();
        Self {
            wire,
            stack,
            sockets,
            listeners,
            clients: Vec::new(),
            next_port: 40_000,
            answer,
        }
    }

    fn run(&mut self, inbox: &mpsc::Receiver<Request>, stop: &AtomicBool, source: Ipv4Addr) {
        while !stop.load(Ordering::Relaxed) {
            while let Ok(request) = inbox.try_recv() {
                self.connect(request, source);
            }
            self.stack.poll(now(), &mut self.wire, &mut self.sockets);
            self.serve();
            self.collect();
            self.stack.poll(now(), &mut self.wire, &mut self.sockets);
            let mut watched = [PollFd::new(&self.wire.tap, PollFlags::IN)];
            let tick = Timespec {
                tv_sec: 0,
                tv_nsec: 2_000_000,
            };
            let _ = poll(&mut watched, Some(&tick));
        }
    }

    fn connect(&mut self, request: Request, source: Ipv4Addr) {
        let handle = self.sockets.add(socket());
        let port = self.next_port;
        self.next_port += 1;
        let remote = (IpAddress::Ipv4(*request.to.ip()), request.to.port());
        let local = (IpAddress::Ipv4(source), port);
        self.sockets
            .get_mut::<tcp::Socket<'_>>(handle)
            .connect(self.stack.context(), remote, local)
            .unwrap();
        self.clients.push(Client {
            handle,
            until: Clock::now() + request.timeout,
            greeted: false,
            text: Vec::new(),
            answer: request.answer,
        });
    }

    fn serve(&mut self) {
        for handle in &self.listeners {
            let socket = self.sockets.get_mut::<tcp::Socket<'_>>(*handle);
            if !socket.is_open() {
                socket.listen(PORT).unwrap();
            }
            if socket.can_recv() {
                let _ = socket.recv(|bytes| (bytes.len(), ()));
                if let Some(answer) = self.answer {
                    let _ = socket.send_slice(answer);
                } else if let Some(client) = socket.remote_endpoint() {
                    let _ = socket.send_slice(client.addr.to_string().as_bytes());
                }
                socket.close();
            }
        }
    }

    fn collect(&mut self) {
        let sockets = &mut self.sockets;
        self.clients.retain_mut(|client| {
            let socket = sockets.get_mut::<tcp::Socket<'_>>(client.handle);
            if socket.may_send() && !client.greeted {
                client.greeted = socket.send_slice(b"hello\n").is_ok();
            }
            if socket.can_recv() {
                let _ = socket.recv(|bytes| {
                    client.text.extend_from_slice(bytes);
                    (bytes.len(), ())
                });
            }
            let outcome = if !socket.may_recv() && !client.text.is_empty() {
                Ok(String::from_utf8_lossy(&client.text).into_owned())
            } else if socket.state() == tcp::State::Closed {
                Err(io::ErrorKind::ConnectionRefused.into())
            } else if Clock::now() >= client.until {
                Err(io::ErrorKind::TimedOut.into())
            } else {
                return true;
            };
            socket.abort();
            let _ = client.answer.send(outcome);
            false
        });
    }
}

fn socket() -> tcp::Socket<'static> {
    let buffer = || tcp::SocketBuffer::new(vec![0; 4096]);
    tcp::Socket::new(buffer(), buffer())
}

fn now() -> Instant {
    Instant::now()
}

/// The tap as a network device: whole frames behind an empty `virtio_net_hdr`.
struct Wire {
    tap: OwnedFd,
    received: VecDeque<Vec<u8>>,
}

impl Device for Wire {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sending<'a>;

    fn receive(&mut self, _now: Instant) -> Option<(Received, Sending<'_>)> {
        let mut frame = vec![0; 2048];
        let length = rustix::io::read(&self.tap, &mut frame).ok()?;
        frame.truncate(length);
        frame.drain(..HEADER.min(length));
        Some((Received(frame), Sending(&self.tap)))
    }

    fn transmit(&mut self, _now: Instant) -> Option<Sending<'_>> {
        Some(Sending(&self.tap))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        // The kernel leaves checksums to the reader's hardware, which is not there.
        capabilities.checksum.tcp = smoltcp::phy::Checksum::Tx;
        capabilities.checksum.ipv4 = smoltcp::phy::Checksum::Both;
        capabilities
    }
}

struct Received(Vec<u8>);
impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

struct Sending<'a>(&'a OwnedFd);
impl TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        let mut frame = vec![0; HEADER + length];
        let outcome = f(&mut frame[HEADER..]);
        // As on a real wire, a frame that cannot go out is lost.
        let _ = rustix::io::write(self.0, &frame);
        outcome
    }
}
