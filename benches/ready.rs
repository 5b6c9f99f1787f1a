//! Readiness: hedged probes against a poll every 10 ms and a ticker of 100 ms, interleaved.
//!
//!     cargo bench --bench ready [-- ROUNDS]
//!
//! A service appears on loopback at a random moment after probing has begun. Before that its
//! port refuses, or drops every SYN without a word, as a tap does whose carrier is not up
//! yet. What counts is the time from its appearance to the answer in hand. Every answer is
//! checked. Beside it: `/init` on the connection that won, against one of its own.

#![allow(clippy::unwrap_used, reason = "a benchmark may panic")]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rewake::deadline::Deadline;
use rewake::envd::client::{Client, ClientOptions, Incarnation};
use rewake::envd::hedge::Hedge;
use rewake::envd::init::Init;
use rewake::envd::ready::{Prober, await_ready};
use rewake::envd::socket::CurrentNetns;
use rewake::envd::watch::drive_while_alive;
use rewake::ids::SandboxId;
use rewake::wire::reactor::TokenRange;

const HEALTH: &[u8] =
    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 19\r\n\
    connection: close\r\n\r\n{\"version\":\"0.2.0\"}";
const HEALTH_KEEP: &[u8] =
    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 19\r\n\r\n{\"version\":\"0.2.0\"}";
const INIT: &[u8] = b"HTTP/1.1 204 No Content\r\ncache-control: no-store\r\n\r\n";

/// How the port behaves before the service appears.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Before {
    Refuses,
    Drops,
}

/// Waits until the agent at the address is ready.
type Wait = fn(SocketAddr);

fn hedged(address: SocketAddr) {
    let deadline = Deadline::after(Duration::from_secs(20));
    let sockets = Arc::new(CurrentNetns);
    let ready = await_ready(address, sockets, Hedge::default(), deadline, None).unwrap();
    assert_eq!(ready.agent.version.unwrap().as_str(), "0.2.0");
}

/// One probe after the other, each with the patience of a usual HTTP client.
fn probe(address: SocketAddr) -> bool {
    let Ok(mut stream) = TcpStream::connect_timeout(&address, Duration::from_secs(10)) else {
        return false;
    };
    stream.set_nodelay(true).unwrap();
    let request = b"GET /health HTTP/1.1\r\nHost: guest\r\nConnection: close\r\n\r\n";
    let mut answer = Vec::new();
    stream.write_all(request).is_ok()
        && stream.read_to_end(&mut answer).is_ok()
        && answer.starts_with(b"HTTP/1.1 200")
        && answer.ends_with(b"{\"version\":\"0.2.0\"}")
}

fn every_10_ms(address: SocketAddr) {
    while !probe(address) {
        thread::sleep(Duration::from_millis(10));
    }
}

/// The first probe comes after the first tick.
fn ticker_of_100_ms(address: SocketAddr) {
    let mut next = Instant::now();
    loop {
        next += Duration::from_millis(100);
        thread::sleep(next.saturating_duration_since(Instant::now()));
        if probe(address) {
            return;
        }
        next = next.max(Instant::now() - Duration::from_millis(100));
    }
}

const RIVALS: [(&str, Wait); 3] = [
    ("hedged", hedged),
    ("poll 10 ms", every_10_ms),
    ("ticker 100 ms", ticker_of_100_ms),
];

/// A service that answers until it is stopped.
struct Service {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    worker: JoinHandle<()>,
}

impl Service {
    fn serve(listener: TcpListener) -> Self {
        let address = listener.local_addr().unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = Arc::clone(&stop);
        let worker = thread::spawn(move || {
            for stream in listener.incoming() {
                if stopping.load(Ordering::SeqCst) {
                    return;
                }
                answer(stream.unwrap());
            }
        });
        Self {
            address,
            stop,
            worker,
        }
    }

    fn end(self) {
        self.stop.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
        self.worker.join().unwrap();
    }
}

fn answer(mut stream: TcpStream) {
    stream.set_nodelay(true).unwrap();
    let mut request = [0; 4096];
    loop {
        let Ok(length @ 1..) = stream.read(&mut request) else {
            return;
        };
        let request = &request[..length];
        let closing = request.windows(17).any(|w| w == b"Connection: close");
        let answer = match request.starts_with(b"POST /init") {
            true => INIT,
            false if closing => HEALTH,
            false => HEALTH_KEEP,
        };
        if stream.write_all(answer).is_err() || closing {
            return;
        }
    }
}

/// A listener with a backlog of nothing, and the connection that fills it.
fn deaf_listener() -> (TcpListener, TcpStream) {
    use rustix::net::{AddressFamily, SocketType, bind, listen, socket};
    let socket = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    bind(&socket, &SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    listen(&socket, 0).unwrap();
    let listener = TcpListener::from(socket);
    let filler = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (listener, filler)
}

/// From the service's appearance to the answer in hand.
fn round(before: Before, delay: Duration, wait: Wait) -> Duration {
    let (address, appear): (_, Box<dyn FnOnce() -> TcpListener + Send>) = match before {
        Before::Refuses => {
            let reserved = TcpListener::bind("127.0.0.1:0").unwrap();
            let address = reserved.local_addr().unwrap();
            drop(reserved);
            (
                address,
                Box::new(move || TcpListener::bind(address).unwrap()),
            )
        }
        Before::Drops => {
            let (listener, filler) = deaf_listener();
            let address = listener.local_addr().unwrap();
            let appear = move || {
                drop(filler);
                rustix::net::listen(&listener, 128).unwrap();
                // The connection that filled the queue.
                drop(listener.accept());
                listener
            };
            (address, Box::new(appear))
        }
    };
    let guest = thread::spawn(move || {
        thread::sleep(delay);
        let listener = appear();
        let up = Instant::now();
        (Service::serve(listener), up)
    });
    wait(address);
    let ready = Instant::now();
    let (service, up) = guest.join().unwrap();
    service.end();
    ready.saturating_duration_since(up)
}

/// `/init` behind a readiness probe: from ready to acknowledged.
fn init_round(service: &Service, keep: bool) -> Duration {
    let deadline = Deadline::after(Duration::from_secs(20));
    let tokens = TokenRange::new(0, Prober::TOKENS);
    let sockets = Arc::new(CurrentNetns);
    let hedge = Hedge::default();
    let prober = Prober::new(service.address, sockets, hedge, keep, deadline, tokens);
    let ready = drive_while_alive(&mut prober.unwrap(), None)
        .unwrap()
        .unwrap();
    assert_eq!(ready.connection.is_some(), keep);
    let init = Init::new();
    let incarnation = Incarnation {
        sandbox: SandboxId::random(),
        lifecycle: init.lifecycle,
    };
    let client = Client::new(service.address, incarnation, ClientOptions::default());
    let begun = Instant::now();
    let call = client.begin_init(&init, ready.connection, deadline, tokens);
    let done = drive_while_alive(&mut call.unwrap(), None)
        .unwrap()
        .unwrap();
    assert_eq!(done.attempts, 1);
    done.at - begun
}

fn main() {
    let rounds = std::env::args().find_map(|argument| argument.parse().ok());
    let rounds: usize = rounds.unwrap_or(60);
    let build = if cfg!(debug_assertions) {
        "debug"
    } else {
        "release"
    };
    println!(
        "{rounds} rounds, {build} build, delays 5 to 64 ms, times in ms after the service appeared"
    );
    println!(
        "{:<16}{:<16}{:>10}{:>10}{:>10}",
        "before", "prober", "p50", "p99", "max"
    );
    for before in [Before::Refuses, Before::Drops] {
        let mut samples = [const { Vec::new() }; RIVALS.len()];
        for round_number in 0..rounds {
            // The same delays for all rivals, spread evenly and out of step with any tick.
            let delay = Duration::from_micros(5_000 + (round_number as u64 * 7_919) % 59_000);
            for (index, (_, wait)) in RIVALS.iter().enumerate() {
                samples[index].push(round(before, delay, *wait));
            }
        }
        for ((name, _), samples) in RIVALS.iter().zip(samples) {
            print_row(&format!("{before:?}"), name, samples);
        }
    }
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let service = Service::serve(listener);
    let mut samples = [Vec::new(), Vec::new()];
    for _ in 0..rounds * 4 {
        for (index, keep) in [true, false].into_iter().enumerate() {
            samples[index].push(init_round(&service, keep));
        }
    }
    service.end();
    let [kept, fresh] = samples;
    print_row("/init", "kept", kept);
    print_row("/init", "fresh", fresh);
}

fn print_row(before: &str, name: &str, mut samples: Vec<Duration>) {
    samples.sort_unstable();
    let at = |share: f64| samples[((samples.len() - 1) as f64 * share) as usize];
    let [p50, p99, max] = [at(0.5), at(0.99), at(1.0)].map(|time| time.as_secs_f64() * 1e3);
    println!("{before:<16}{name:<16}{p50:>10.3}{p99:>10.3}{max:>10.3}");
}
