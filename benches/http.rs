//! The HTTP codec: whole responses against httparse, and round trips over a Unix socket.
//!
//! The table at the top is the claim: rounds of A and B take turns in one process, medians
//! and 99th percentiles of the rounds, and a ratio. The criterion runs below it are for
//! comparing commits.
//!
//! The rival comes in two forms. "borrowed" is the least a client can do with httparse: parse
//! the head in place, find the framing, copy the body; its headers die with the input. "owned"
//! keeps a copy of the head for the caller, as ours does. Our side does more than either: it
//! takes the bytes as a stream, and checks every bound of `Limits`.

#![allow(missing_docs, reason = "criterion's macros")]
#![allow(clippy::unwrap_used, reason = "a benchmark may panic")]

use std::hint::black_box;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group};
use rewake::deadline::Deadline;
use rewake::wire::conn::{Connection, Peer, Stream};
use rewake::wire::http::{Limits, Method, Progress, Request, ResponseParser};

/// Name, bytes of a captured answer, its status and the length of its body.
type Case = (&'static str, &'static [u8], u16, usize);

const CASES: [Case; 3] = [
    (
        "vm.info",
        include_bytes!("../fixtures/ch-v53/http/15-info-running.response"),
        200,
        1375,
    ),
    (
        "envd health",
        include_bytes!("../fixtures/http/envd-health.response"),
        200,
        19,
    ),
    (
        "vm.resume",
        include_bytes!("../fixtures/ch-v53/http/23-resume.response"),
        204,
        0,
    ),
];

fn with_rewake(bytes: &[u8]) -> (u16, Vec<u8>) {
    let mut parser = ResponseParser::new(Method::Get, Limits::VMM);
    let progress = parser.feed(bytes).unwrap();
    assert!(matches!(progress, Progress::Complete { consumed } if consumed == bytes.len()));
    let response = parser.finish().unwrap();
    (response.status, response.body)
}

/// Status, length of the head, body.
fn with_httparse(bytes: &[u8]) -> (u16, usize, Vec<u8>) {
    let mut headers = [httparse::EMPTY_HEADER; 16];
    let mut response = httparse::Response::new(&mut headers);
    let httparse::Status::Complete(head) = response.parse(bytes).unwrap() else {
        panic!("the head is not complete");
    };
    let mut length = 0;
    for header in &*response.headers {
        if header.name.eq_ignore_ascii_case("content-length") {
            let digits = std::str::from_utf8(header.value).unwrap();
            length = digits.parse().unwrap();
        }
        assert!(!header.name.eq_ignore_ascii_case("transfer-encoding"));
    }
    let body = &bytes[head..];
    assert_eq!(body.len(), length);
    (response.code.unwrap(), head, body.to_vec())
}

fn borrowed(bytes: &[u8]) -> (u16, Vec<u8>) {
    let (status, _, body) = with_httparse(bytes);
    (status, body)
}

fn owned(bytes: &[u8]) -> (u16, Vec<u8>) {
    let (status, head, body) = with_httparse(bytes);
    black_box(bytes[..head].to_vec());
    (status, body)
}

/// Who parses, and how.
type Side = (&'static str, fn(&[u8]) -> (u16, Vec<u8>));

const SIDES: [Side; 3] = [
    ("rewake", with_rewake),
    ("httparse, borrowed", borrowed),
    ("httparse, owned", owned),
];

/// Nanoseconds per call, sorted, for each of `rounds` rounds of all sides, which take turns.
fn take_turns(rounds: usize, calls: u32, case: Case) -> [Vec<f64>; SIDES.len()] {
    let (_, bytes, status, length) = case;
    let mut times = SIDES.map(|_| Vec::with_capacity(rounds));
    for round in 0..rounds {
        for turn in 0..SIDES.len() {
            // Who begins changes every round.
            let side = (round + turn) % SIDES.len();
            let start = Instant::now();
            for _ in 0..calls {
                let (got, body) = black_box(SIDES[side].1(black_box(bytes)));
                assert_eq!((got, body.len()), (status, length));
            }
            times[side].push(start.elapsed().as_secs_f64() * 1e9 / f64::from(calls));
        }
    }
    for times in &mut times {
        times.sort_by(f64::total_cmp);
    }
    times
}

fn percentile(sorted: &[f64], percent: usize) -> f64 {
    sorted[(sorted.len() - 1) * percent / 100]
}

fn claim() {
    const ROUNDS: usize = 301;
    const CALLS: u32 = 2000;
    println!("{ROUNDS} rounds of {CALLS} calls, ns per response: median (p99)");
    print!("{:<14}", "response");
    for (side, _) in SIDES {
        print!("{side:>20}");
    }
    println!("{:>22}", "rewake / each rival");
    for case in CASES {
        print!("{:<14}", case.0);
        let times = take_turns(ROUNDS, CALLS, case);
        for times in &times {
            let (median, tail) = (percentile(times, 50), percentile(times, 99));
            print!("{:>20}", format!("{median:.0} ({tail:.0})"));
        }
        let [ours, theirs @ ..] = times.map(|times| percentile(&times, 50));
        let ratios = theirs.map(|theirs| format!("{:.2}", ours / theirs));
        println!("{:>22}", ratios.join("  "));
    }
}

fn parse(c: &mut Criterion) {
    let mut group = c.benchmark_group("parse");
    group.measurement_time(Duration::from_secs(2));
    group.warm_up_time(Duration::from_millis(500));
    for (name, bytes, _, _) in CASES {
        group.throughput(Throughput::Bytes(bytes.len() as u64));
        for (side, parse) in SIDES {
            group.bench_function(format!("{name}/{side}"), |b| {
                b.iter(|| parse(black_box(bytes)));
            });
        }
    }
    group.finish();
}

/// A thread that answers every request on its end of a socket pair.
fn responder(answer: &'static [u8]) -> UnixStream {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 1024];
        while let Ok(1..) = theirs.read(&mut buffer) {
            if theirs.write_all(answer).is_err() {
                return;
            }
        }
    });
    ours
}

fn round_trip(c: &mut Criterion) {
    let (_, answer, status, length) = CASES[0];
    let mut group = c.benchmark_group("round trip");
    group.measurement_time(Duration::from_secs(3));
    let stream = Stream::from_connected(responder(answer)).unwrap();
    let mut connection = Connection::over(stream, Peer::VMM).unwrap();
    let request = Request::new(Method::Get, "/api/v1/vm.info")
        .encode()
        .unwrap();
    group.bench_function("vm.info/connection", |b| {
        b.iter(|| {
            let deadline = Deadline::after(Duration::from_secs(10));
            let finished = connection
                .exchange_encoded(request.clone(), &[], deadline)
                .unwrap();
            assert_eq!(finished.response.status, status);
            assert_eq!(finished.response.body.len(), length);
        });
    });
    // What the sockets and the thread switches cost by themselves.
    let mut raw = responder(answer);
    let mut buffer = [0; 16 * 1024];
    group.bench_function("vm.info/bare blocking read and write", |b| {
        b.iter(|| {
            raw.write_all(request.as_bytes()).unwrap();
            assert_eq!(raw.read(&mut buffer).unwrap(), answer.len());
        });
    });
    group.finish();
}

criterion_group!(benches, parse, round_trip);

fn main() {
    // `cargo test --benches` wants to know that it runs, not how fast.
    if std::env::args().any(|arg| arg == "--bench") {
        claim();
    }
    benches();
    Criterion::default().configure_from_args().final_summary();
}
