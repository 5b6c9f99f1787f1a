//! The HTTP codec: whole responses against httparse, and round trips over a Unix socket.
//!
//! The table at the top is the claim: rounds of A and B take turns in one process, medians
//! and 99th percentiles of the rounds, and a ratio. The criterion runs below it are for
//! comparing commits.
//!
//! The rival is the least a client can do with httparse: parse the head in place, find the
//! framing, copy the body. Our side does more: it takes the bytes as a stream, keeps the
//! headers for the caller, and checks every bound of `Limits`.

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

fn with_httparse(bytes: &[u8]) -> (u16, Vec<u8>) {
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
    (response.code.unwrap(), body.to_vec())
}

/// Nanoseconds per call, for each of `rounds` rounds of both sides, which take turns.
fn take_turns(
    rounds: usize,
    calls: u32,
    mut a: impl FnMut(),
    mut b: impl FnMut(),
) -> (Vec<f64>, Vec<f64>) {
    let mut times = (Vec::new(), Vec::new());
    let time = |side: &mut dyn FnMut()| {
        let start = Instant::now();
        for _ in 0..calls {
            side();
        }
        start.elapsed().as_secs_f64() * 1e9 / f64::from(calls)
    };
    for round in 0..rounds {
        // Who begins changes every round.
        if round % 2 == 0 {
            times.0.push(time(&mut a));
            times.1.push(time(&mut b));
        } else {
            times.1.push(time(&mut b));
            times.0.push(time(&mut a));
        }
    }
    times.0.sort_by(f64::total_cmp);
    times.1.sort_by(f64::total_cmp);
    times
}

fn percentile(sorted: &[f64], percent: usize) -> f64 {
    sorted[(sorted.len() - 1) * percent / 100]
}

fn claim() {
    const ROUNDS: usize = 301;
    const CALLS: u32 = 2000;
    println!("{ROUNDS} rounds of {CALLS} calls, ns per response: median (p99)");
    println!(
        "{:<14}{:>18}{:>18}{:>8}",
        "response", "rewake", "httparse", "ratio"
    );
    for (name, bytes, status, length) in CASES {
        let check = |(s, body): (u16, Vec<u8>)| assert_eq!((s, body.len()), (status, length));
        let (ours, theirs) = take_turns(
            ROUNDS,
            CALLS,
            || check(black_box(with_rewake(black_box(bytes)))),
            || check(black_box(with_httparse(black_box(bytes)))),
        );
        let cell = |times: &[f64]| {
            let (median, tail) = (percentile(times, 50), percentile(times, 99));
            format!("{median:.0} ({tail:.0})")
        };
        let ratio = percentile(&ours, 50) / percentile(&theirs, 50);
        println!(
            "{name:<14}{:>18}{:>18}{ratio:>8.2}",
            cell(&ours),
            cell(&theirs)
        );
    }
}

fn parse(c: &mut Criterion) {
    let mut group = c.benchmark_group("parse");
    group.measurement_time(Duration::from_secs(2));
    group.warm_up_time(Duration::from_millis(500));
    for (name, bytes, _, _) in CASES {
        group.throughput(Throughput::Bytes(bytes.len() as u64));
        group.bench_function(format!("{name}/rewake"), |b| {
            b.iter(|| with_rewake(black_box(bytes)));
        });
        group.bench_function(format!("{name}/httparse"), |b| {
            b.iter(|| with_httparse(black_box(bytes)));
        });
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
