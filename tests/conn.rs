//! The transport against real sockets: well-behaved servers and hostile ones.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rewake::deadline::Deadline;
use rewake::wire::conn::{Connection, Peer, Stream};
use rewake::wire::http::{Method, Request};

const PING: &[u8] = b"HTTP/1.1 200 \r\nContent-Length: 2\r\n\r\n{}";

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(10))
}

/// Reads one request without a body.
fn read_head(stream: &mut impl Read) -> Vec<u8> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).unwrap() == 1 {
        head.push(byte[0]);
    }
    head
}

#[test]
fn a_kept_connection_serves_one_exchange_after_the_other() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let server = std::thread::spawn(move || {
        for _ in 0..3 {
            let head = read_head(&mut theirs);
            assert!(head.starts_with(b"GET /api/v1/vmm.ping HTTP/1.1\r\n"));
            theirs.write_all(PING).unwrap();
        }
    });
    let stream = Stream::from_connected(ours).unwrap();
    let mut connection = Connection::over(stream, Peer::VMM).unwrap();
    for _ in 0..3 {
        let request = Request::new(Method::Get, "/api/v1/vmm.ping");
        let response = connection.exchange(&request, &[], soon()).unwrap();
        assert_eq!((response.status, &response.body[..]), (200, &b"{}"[..]));
    }
    server.join().unwrap();
}
