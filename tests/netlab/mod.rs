//! A network of namespaces for tests: a "host", an "internet" beyond its uplink, guests on
//! taps, and a census of everything that could be left behind.
//!
//! Nothing here touches the machine's own interfaces: the host, its uplink and what lies
//! beyond are namespaces made for the test, and they vanish with their descriptors.

#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    reason = "shared by test binaries that each use a part of it"
)]

pub mod census;
pub mod faults;
pub mod guest;
pub mod hold;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rewake::deadline::Deadline;
use rewake::fault::Faults;
use rewake::resource::net::{HostNet, NetConfig};
use rewake_sys::netns;

/// The pretend host's address on the uplink (TEST-NET-3).
pub const HOST: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 2);
/// The pretend internet's end of the uplink.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
/// A server of the pretend internet (TEST-NET-2).
pub const PUBLIC: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
/// What guests must not reach, present in the pretend internet all the same.
pub const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// A private address beyond the uplink, present as well.
pub const PRIVATE: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 1);
/// The pretend uplink's name in the pretend host.
pub const UPLINK: &str = "up0";

/// A deadline for calls that take milliseconds.
pub fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(20))
}

/// Says why a test cannot run here, and that it was left out.
pub fn skip(test: &str, reason: impl std::fmt::Display) {
    eprintln!("SKIP {test}: {reason}");
}

/// A host and an internet.
pub struct Lab {
    pub host: OwnedFd,
    pub internet: OwnedFd,
    pub dir: PathBuf,
    prefix: String,
}

impl Lab {
    /// Makes the namespaces, the uplink and its routes; `None`, said aloud, where that is
    /// not possible here.
    pub fn new(test: &str) -> Option<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let make = || netns::run_in_new(|fd| fd);
        let (host, internet) = match (make(), make()) {
            (Ok(host), Ok(internet)) => (host, internet),
            (Err(error), _) | (_, Err(error)) => {
                skip(test, format_args!("no network namespaces: {error}"));
                return None;
            }
        };
        if Command::new("ip").arg("-V").output().is_err() {
            skip(test, "no ip command");
            return None;
        }
        // Short and unlike any other test's, as names of links are: 36^3 pids times 36.
        let digit = |n: u32| char::from_digit(n % 36, 36).unwrap();
        let (pid, count) = (std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let prefix: String = [pid / 1296, pid / 36, pid, count / 36, count]
            .map(digit)
            .iter()
            .collect();
        let prefix = format!("t{prefix}");
        let lab = Self {
            dir: std::env::temp_dir().join(format!("rw-net-{prefix}")),
            host,
            internet,
            prefix,
        };
        std::fs::create_dir_all(&lab.dir).unwrap();
        lab.wire();
        lab.settle();
        Some(lab)
    }

    fn wire(&self) {
        for netns in [&self.host, &self.internet] {
            // Link-local addresses come and go by themselves and would disturb a census.
            netns::run_in(netns.as_fd(), || {
                for scope in ["all", "default"] {
                    let path = format!("/proc/sys/net/ipv6/conf/{scope}/disable_ipv6");
                    let _ = std::fs::write(path, "1");
                }
            })
            .unwrap();
        }
        let peer = format!("/proc/{}/fd/{}", std::process::id(), raw(&self.internet));
        self.on_host(&format!(
            "link add {UPLINK} type veth peer name wan0 netns {peer}"
        ));
        for line in [
            "link set lo up",
            &format!("link set {UPLINK} up"),
            &format!("addr add {HOST}/24 dev {UPLINK}"),
            &format!("route add default via {GATEWAY}"),
        ] {
            self.on_host(line);
        }
        for line in [
            "link set lo up",
            "link set wan0 up",
            &format!("addr add {GATEWAY}/24 dev wan0"),
            &format!("addr add {PUBLIC}/32 dev lo"),
            &format!("addr add {METADATA}/32 dev lo"),
            &format!("addr add {PRIVATE}/32 dev lo"),
        ] {
            ip(&self.internet, line);
        }
    }

    /// Waits until the kernel has noticed that both ends of the uplink are up, which it does
    /// in the background: a census taken before would differ from every later one.
    fn settle(&self) {
        let until = std::time::Instant::now() + Duration::from_secs(10);
        let is_up = |netns, link| ip(netns, &format!("-o link show {link}")).contains("state UP");
        while !(is_up(&self.host, UPLINK) && is_up(&self.internet, "wan0")) {
            assert!(std::time::Instant::now() < until, "the uplink comes up");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// A configuration that shares no name and no directory with any other test.
    pub fn config(&self) -> NetConfig {
        NetConfig {
            prefix: self.prefix.clone(),
            runtime_dir: self.dir.clone(),
            ..NetConfig::default()
        }
    }

    /// A ready host.
    pub fn open(&self, faults: Faults) -> HostNet {
        self.open_with(self.config(), faults)
    }

    /// A ready host of another configuration.
    pub fn open_with(&self, config: NetConfig, faults: Faults) -> HostNet {
        let host = HostNet::open_in(self.host.as_fd(), config, faults).unwrap();
        host.prepare(soon()).unwrap();
        host
    }

    /// Runs `ip` in the pretend host; it must succeed.
    pub fn on_host(&self, arguments: &str) -> String {
        ip(&self.host, arguments)
    }

    /// What a TCP server says to a client in the pretend host.
    pub fn fetch_from_host(&self, to: SocketAddr) -> std::io::Result<String> {
        fetch(&self.host, to)
    }

    /// Starts a TCP server in the pretend host. It answers with its client's address.
    pub fn serve_on_host(&self, address: Ipv4Addr) -> Server {
        Server::start(&self.host, address)
    }

    /// Starts a TCP server in the pretend internet. It answers with its client's address.
    pub fn serve_on_internet(&self, address: Ipv4Addr) -> Server {
        Server::start(&self.internet, address)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
        // A failed test must not leave its namespaces pinned.
        if std::thread::panicking() {
            let pins = std::fs::read_dir(netns::RUN_DIR).into_iter().flatten();
            for pin in pins.flatten() {
                let name = pin.file_name();
                if name
                    .to_string_lossy()
                    .starts_with(&format!("{}-", self.prefix))
                {
                    let _ = Command::new("ip").args(["netns", "del"]).arg(name).status();
                }
            }
        }
    }
}

fn raw(fd: &OwnedFd) -> i32 {
    use std::os::fd::AsRawFd;
    fd.as_raw_fd()
}

/// Runs a command in a namespace and returns what it printed; it must succeed.
pub fn run(netns: &OwnedFd, program: &str, arguments: &[&str]) -> String {
    let output = netns::run_in(netns.as_fd(), || {
        Command::new(program).args(arguments).output().unwrap()
    })
    .unwrap();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// Runs `ip` in a namespace; it must succeed.
pub fn ip(netns: &OwnedFd, arguments: &str) -> String {
    let arguments: Vec<&str> = arguments.split_whitespace().collect();
    run(netns, "ip", &arguments)
}

/// What a TCP server says to a client in this namespace.
pub fn fetch(netns: &OwnedFd, to: SocketAddr) -> std::io::Result<String> {
    netns::run_in(netns.as_fd(), || {
        let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(2))?;
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        stream.write_all(b"hello\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    })
    .unwrap()
}

/// A TCP server that answers each client with the client's own address and closes.
pub struct Server {
    pub address: SocketAddr,
    stop: Arc<AtomicBool>,
    worker: Option<JoinHandle<()>>,
}

impl Server {
    pub fn start(netns: &OwnedFd, address: Ipv4Addr) -> Self {
        let listener = netns::run_in(netns.as_fd(), || TcpListener::bind((address, 0)))
            .unwrap()
            .unwrap();
        let address = listener.local_addr().unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = Arc::clone(&stop);
        listener.set_nonblocking(true).unwrap();
        let worker = std::thread::spawn(move || {
            while !stopping.load(Ordering::Relaxed) {
                let Ok((mut stream, client)) = listener.accept() else {
                    std::thread::sleep(Duration::from_millis(2));
                    continue;
                };
                let _ = stream.set_nonblocking(false);
                // Closing with the greeting unread would reset the connection and could
                // take the answer with it.
                let _ = stream.set_read_timeout(Some(Duration::from_secs(2)));
                let _ = stream.read(&mut [0; 64]);
                let _ = stream.write_all(client.ip().to_string().as_bytes());
            }
        });
        Self {
            address,
            stop,
            worker: Some(worker),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(worker) = self.worker.take() {
            let _ = worker.join();
        }
    }
}
