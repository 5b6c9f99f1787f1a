//! The transport against real sockets: well-behaved servers and hostile ones.
//!
//! Servers are threads of the test on a Unix socket or on loopback TCP. Every exchange has a
//! deadline, so a broken transport fails a test instead of hanging it.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::fs::File;
use std::io::{ErrorKind, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::ops::ControlFlow;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mio::{Events, Poll};
use rewake::deadline::Deadline;
use rewake::wire::conn::{
    Address, ConnError, Connecting, Connection, Exchange, Finished, Pace, Peer, Phase, Stream,
};
use rewake::wire::http::{Bound, EncodedRequest, Method, Request, Rule};
use rewake::wire::reactor::{Machine, TokenRange, drive};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

const TOKENS: TokenRange = TokenRange::new(7, 1);
const PING: &[u8] = b"HTTP/1.1 200 \r\nContent-Length: 2\r\n\r\n{}";
/// How much later than its deadline an error may come.
const SLACK: Duration = Duration::from_millis(100);

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(10))
}

fn get() -> EncodedRequest {
    Request::new(Method::Get, "/health").encode().unwrap()
}

/// Reads one request without a body.
fn read_head(stream: &mut impl Read) -> Vec<u8> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).unwrap_or(0) == 1 {
        head.push(byte[0]);
    }
    head
}

/// Writes until the other side has had enough.
fn write_for_ever(stream: &mut impl Write, bytes: &[u8]) {
    while stream.write_all(bytes).is_ok() {}
}

/// A server for one connection on loopback TCP.
fn tcp_server(serve: impl FnOnce(TcpStream) + Send + 'static) -> (Address, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = Address::Tcp(listener.local_addr().unwrap());
    let server = std::thread::spawn(move || serve(listener.accept().unwrap().0));
    (address, server)
}

/// A directory of its own, removed when dropped.
struct Dir(PathBuf);

impl Dir {
    fn new() -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("rewake-conn-{}-{count}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn socket(&self) -> PathBuf {
        self.0.join("api.sock")
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Drives an exchange to its end, and tells how long that took.
fn run(mut exchange: Exchange) -> (Result<Finished, ConnError>, Duration) {
    let mut poll = Poll::new().unwrap();
    let start = Instant::now();
    let result = drive(&mut poll, &mut exchange).unwrap();
    (result, start.elapsed())
}

/// One exchange with a server that does this to its connection.
fn against(
    peer: Peer,
    deadline: Deadline,
    serve: impl FnOnce(TcpStream) + Send + 'static,
) -> (Result<Finished, ConnError>, Duration) {
    let (address, server) = tcp_server(serve);
    let outcome = run(Exchange::connect(&address, get(), peer, deadline, TOKENS));
    server.join().unwrap();
    outcome
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
        assert_eq!(theirs.read(&mut [0]).unwrap(), 0, "closed, not half-closed");
    });
    let stream = Stream::from_connected(ours).unwrap();
    let mut connection = Connection::over(stream, Peer::VMM).unwrap();
    for _ in 0..3 {
        let request = Request::new(Method::Get, "/api/v1/vmm.ping");
        let response = connection.exchange(&request, &[], soon()).unwrap();
        assert_eq!((response.status, &response.body[..]), (200, &b"{}"[..]));
    }
    drop(connection);
    server.join().unwrap();
}

#[test]
fn exchanges_over_tcp_note_their_moments_in_order() {
    let (outcome, _) = against(Peer::GUEST, soon(), |mut stream| {
        assert_eq!(
            read_head(&mut stream),
            b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        );
        stream.write_all(b"HTTP/1.1 200 OK\r\n").unwrap();
        std::thread::sleep(Duration::from_millis(20));
        stream.write_all(b"Content-Length: 2\r\n\r\n{}").unwrap();
    });
    let finished = outcome.unwrap();
    assert!(finished.stream.is_some());
    let times = finished.times;
    assert!(times.connected.unwrap() <= times.sent.unwrap());
    assert!(times.sent.unwrap() <= times.first_byte.unwrap());
    assert!(times.first_byte.unwrap() + Duration::from_millis(10) <= times.complete.unwrap());
}

#[test]
fn a_socket_that_is_still_connecting_is_taken_over() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let server = std::thread::spawn(move || {
        let mut stream = listener.accept().unwrap().0;
        read_head(&mut stream);
        stream.write_all(PING).unwrap();
    });
    let socket: OwnedFd = mio::net::TcpStream::connect(address).unwrap().into();
    let (outcome, _) = run(Exchange::over_socket(
        socket,
        get(),
        Peer::GUEST,
        soon(),
        TOKENS,
    ));
    assert_eq!(outcome.unwrap().response.body, b"{}");
    server.join().unwrap();
}

#[test]
fn a_refused_connect_is_told_apart() {
    // A port that was ours a moment ago, and has no listener now.
    let address = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let (outcome, _) = run(Exchange::connect(
        &address.into(),
        get(),
        Peer::GUEST,
        soon(),
        TOKENS,
    ));
    let error = outcome.unwrap_err();
    assert!(
        matches!(error, ConnError::Connect { .. }) && error.is_refused(),
        "{error:?}"
    );
    assert!(!error.may_have_been_seen() && !error.is_timeout());

    let socket: OwnedFd = mio::net::TcpStream::connect(address).unwrap().into();
    let (outcome, _) = run(Exchange::over_socket(
        socket,
        get(),
        Peer::GUEST,
        soon(),
        TOKENS,
    ));
    let error = outcome.unwrap_err();
    assert!(
        matches!(error, ConnError::NotConnected(_)) && error.is_refused(),
        "{error:?}"
    );

    let dir = Dir::new();
    let missing = Address::Unix(dir.socket());
    let error = Connection::connect(&missing, Peer::VMM, soon()).unwrap_err();
    assert!(error.is_refused(), "{error:?}");
    drop(UnixListener::bind(dir.socket()).unwrap());
    let error = Connection::connect(&missing, Peer::VMM, soon()).unwrap_err();
    assert!(error.is_refused(), "a socket without a listener: {error:?}");

    let long = Address::Unix(PathBuf::from("/tmp").join("x".repeat(200)));
    let error = Connection::connect(&long, Peer::VMM, soon()).unwrap_err();
    assert!(
        matches!(error, ConnError::Connect { .. }) && !error.is_refused(),
        "{error:?}"
    );
}

#[test]
fn descriptors_arrive_with_the_first_byte_and_once() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = std::thread::spawn(move || {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut first = [0; 1];
        let mut parts = [IoSliceMut::new(&mut first)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        rustix::net::recvmsg(&theirs, &mut parts, &mut control, flags).unwrap();
        let mut fds: Vec<OwnedFd> = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                fds.extend(received);
            }
        }
        let mut theirs = theirs;
        let mut rest = vec![0; 4096];
        // The body is large enough for several writes; no descriptor comes with the others.
        let mut total = 1;
        while total < 300_000 {
            total += theirs.read(&mut rest).unwrap();
        }
        theirs.write_all(PING).unwrap();
        fds.into_iter()
            .map(|fd| {
                let mut text = String::new();
                File::from(fd).read_to_string(&mut text).unwrap();
                text
            })
            .collect::<Vec<_>>()
    });
    let stream = Stream::from_connected(ours).unwrap();
    let mut connection = Connection::over(stream, Peer::VMM).unwrap();
    let (reader_a, mut a) = std::io::pipe().unwrap();
    let (reader_b, mut b) = std::io::pipe().unwrap();
    a.write_all(b"first").unwrap();
    b.write_all(b"second").unwrap();
    drop((a, b));
    let mut request = Request::new(Method::Put, "/api/v1/vm.restore");
    request.body = vec![b'x'; 300_000];
    let fds = [reader_a.as_fd(), reader_b.as_fd()];
    let response = connection.exchange(&request, &fds, soon()).unwrap();
    assert_eq!(response.status, 200);
    assert_eq!(server.join().unwrap(), ["first", "second"]);
}

#[test]
fn too_many_descriptors_are_refused_before_anything_is_sent() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let stream = Stream::from_connected(ours).unwrap();
    let mut connection = Connection::over(stream, Peer::VMM).unwrap();
    let fds = vec![theirs.as_fd(); 254];
    let request = Request::new(Method::Put, "/");
    let error = connection.exchange(&request, &fds, soon()).unwrap_err();
    assert!(
        matches!(error, ConnError::TooManyDescriptors(254)),
        "{error:?}"
    );
    assert!(!error.may_have_been_seen() && connection.is_open());
}

#[test]
fn a_large_request_is_written_in_parts() {
    let dir = Dir::new();
    let listener = UnixListener::bind(dir.socket()).unwrap();
    let server = std::thread::spawn(move || {
        let mut stream = listener.accept().unwrap().0;
        read_head(&mut stream);
        let mut body = vec![0; 4 << 20];
        let (front, back) = body.split_at_mut(100);
        stream.read_exact(front).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        stream.read_exact(back).unwrap();
        assert!(body.iter().enumerate().all(|(i, b)| *b == i as u8));
        stream.write_all(PING).unwrap();
    });
    let mut connection =
        Connection::connect(&Address::Unix(dir.socket()), Peer::VMM, soon()).unwrap();
    let mut request = Request::new(Method::Put, "/");
    request.body = (0..4 << 20).map(|i: u32| i as u8).collect();
    assert_eq!(
        connection.exchange(&request, &[], soon()).unwrap().status,
        200
    );
    server.join().unwrap();
}

#[test]
fn a_request_that_is_out_waits_for_nothing_but_the_answer() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let stream = Stream::from_connected(ours).unwrap();
    let (mut poll, mut events) = (Poll::new().unwrap(), Events::with_capacity(4));
    let mut exchange = Exchange::over_stream(stream, get(), Peer::VMM, soon(), TOKENS);
    assert!(
        exchange
            .advance(poll.registry(), Instant::now())
            .is_continue()
    );
    // A peer that takes the request makes room for more of it.
    assert!(read_head(&mut theirs).starts_with(b"GET /health "));
    poll.poll(&mut events, Some(Duration::ZERO)).unwrap();
    assert!(events.is_empty(), "{events:?}");
    theirs.write_all(PING).unwrap();
    poll.poll(&mut events, None).unwrap();
    for event in &events {
        exchange.on_event(poll.registry(), event);
    }
    let finished = exchange.advance(poll.registry(), Instant::now());
    assert!(
        matches!(finished, ControlFlow::Break(Ok(_))),
        "{finished:?}"
    );
}

#[test]
fn a_connection_is_kept_after_a_request_that_went_out_in_parts() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let server = std::thread::spawn(move || {
        for length in [0, 4 << 20, 0, 4 << 20, 0] {
            read_head(&mut theirs);
            let mut body = vec![0; length];
            theirs.read_exact(&mut body).unwrap();
            theirs.write_all(PING).unwrap();
        }
        assert_eq!(theirs.read(&mut [0]).unwrap(), 0);
    });
    let stream = Stream::from_connected(ours).unwrap();
    let mut connection = Connection::over(stream, Peer::VMM).unwrap();
    for length in [0, 4 << 20, 0, 4 << 20, 0] {
        let mut request = Request::new(Method::Put, "/");
        request.body = vec![0; length];
        let response = connection.exchange(&request, &[], soon()).unwrap();
        assert_eq!(response.body, b"{}");
    }
    drop(connection);
    server.join().unwrap();
}

#[test]
fn deadlines_are_kept_in_every_phase() {
    let budget = Duration::from_millis(150);
    let check = |name: &str, phase: Phase, outcome: (Result<Finished, ConnError>, Duration)| {
        let (result, took) = outcome;
        let error = result.expect_err(name);
        assert!(error.is_timeout(), "{name}: {error:?}");
        assert_eq!(error.phase(), Some(phase), "{name}");
        assert!(took >= budget, "{name}: too early, after {took:?}");
        assert!(took < budget + SLACK, "{name}: too late, after {took:?}");
    };
    // A server holds its end open until the exchange is over.
    let hold = |mut stream: TcpStream| {
        let _ = std::io::copy(&mut stream, &mut std::io::sink());
    };
    let deadline = || Deadline::after(budget);
    check(
        "silence",
        Phase::Waiting,
        against(Peer::GUEST, deadline(), hold),
    );
    check(
        "half an answer",
        Phase::Reading,
        against(Peer::GUEST, deadline(), move |mut stream| {
            stream.write_all(b"HTTP/1.1 200 OK\r\n").unwrap();
            hold(stream);
        }),
    );
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut request = Request::new(Method::Put, "/");
    request.body = vec![0; 4 << 20];
    let stream = Stream::from_connected(ours).unwrap();
    let request = request.encode().unwrap();
    let exchange = Exchange::over_stream(stream, request, Peer::VMM, deadline(), TOKENS);
    check("nobody reads the request", Phase::Sending, run(exchange));
    drop(theirs);

    // A Unix listener whose backlog is full: connect says EAGAIN, and is tried again.
    let dir = Dir::new();
    let listener = UnixListener::bind(dir.socket()).unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let _first = UnixStream::connect(dir.socket()).unwrap();
    let address = Address::Unix(dir.socket());
    let exchange = Exchange::connect(&address, get(), Peer::VMM, deadline(), TOKENS);
    check("full backlog", Phase::Connecting, run(exchange));
}

#[test]
fn connects_as_soon_as_a_full_backlog_has_room() {
    let dir = Dir::new();
    let listener = UnixListener::bind(dir.socket()).unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let first = UnixStream::connect(dir.socket()).unwrap();
    let server = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(30));
        drop(listener.accept().unwrap());
        drop(first);
        let mut stream = listener.accept().unwrap().0;
        read_head(&mut stream);
        stream.write_all(PING).unwrap();
    });
    let address = Address::Unix(dir.socket());
    let (outcome, took) = run(Exchange::connect(
        &address,
        get(),
        Peer::VMM,
        soon(),
        TOKENS,
    ));
    assert_eq!(outcome.unwrap().response.status, 200);
    assert!(took >= Duration::from_millis(25) && took < Duration::from_millis(30) + SLACK);
    server.join().unwrap();
}

#[test]
fn nothing_is_sent_after_the_deadline() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    let stream = Stream::from_connected(ours).unwrap();
    let passed = Deadline::after(Duration::ZERO);
    let mut connection = Connection::over(stream, Peer::VMM).unwrap();
    let request = Request::new(Method::Put, "/api/v1/vm.delete");
    let error = connection.exchange(&request, &[], passed).unwrap_err();
    assert!(error.is_timeout(), "{error:?}");
    assert_eq!(
        theirs.read(&mut [0; 64]).unwrap(),
        0,
        "closed without a byte"
    );
}

#[test]
fn a_slow_loris_is_refused_long_before_the_deadline() {
    let pace = Pace {
        grace: Duration::from_millis(100),
        bytes_per_second: 1000,
    };
    let peer = Peer {
        pace,
        ..Peer::GUEST
    };
    let (outcome, took) = against(peer, soon(), |mut stream| {
        read_head(&mut stream);
        for byte in b"HTTP/1.1 200 OK\r\nA: "
            .iter()
            .chain([b'a'].iter().cycle())
        {
            if stream.write_all(&[*byte]).is_err() {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    });
    let error = outcome.unwrap_err();
    assert!(
        matches!(error, ConnError::TooSlow { .. }) && error.is_timeout(),
        "{error:?}"
    );
    assert!(
        took >= pace.grace && took < pace.grace + SLACK,
        "after {took:?}"
    );
}

#[test]
fn a_peer_that_keeps_the_pace_may_take_long() {
    let pace = Pace {
        grace: Duration::from_millis(20),
        bytes_per_second: 100,
    };
    let peer = Peer {
        pace,
        ..Peer::GUEST
    };
    let (outcome, took) = against(peer, soon(), |mut stream| {
        read_head(&mut stream);
        stream
            .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n")
            .unwrap();
        for _ in 0..10 {
            std::thread::sleep(Duration::from_millis(20));
            stream.write_all(&[b'x'; 10]).unwrap();
        }
    });
    assert_eq!(outcome.unwrap().response.body.len(), 100);
    assert!(took >= Duration::from_millis(200));
}

#[test]
fn hostile_answers_are_refused_by_name() {
    type Serve = Box<dyn FnOnce(TcpStream) + Send>;
    type Check = fn(&ConnError) -> bool;
    fn bound(error: &ConnError) -> Option<Bound> {
        match error {
            ConnError::Protocol(error) => error.bound(),
            _ => None,
        }
    }
    fn rule(error: &ConnError) -> Option<Rule> {
        match error {
            ConnError::Protocol(error) => error.rule(),
            _ => None,
        }
    }
    let cases: Vec<(&str, Serve, Check)> = vec![
        (
            "garbage",
            Box::new(|mut s| write_for_ever(&mut s, b"\x00\xff garbage\r\n")),
            |e| rule(e) == Some(Rule::StatusLine),
        ),
        (
            "endless line",
            Box::new(|mut s| write_for_ever(&mut s, &[b'a'; 1000])),
            |e| bound(e) == Some(Bound::StatusLineBytes),
        ),
        (
            "endless headers",
            Box::new(|mut s| {
                let _ = s.write_all(b"HTTP/1.1 200 OK\r\n");
                write_for_ever(&mut s, b"A: b\r\n");
            }),
            |e| bound(e) == Some(Bound::HeaderLines),
        ),
        (
            "endless header",
            Box::new(|mut s| {
                let _ = s.write_all(b"HTTP/1.1 200 OK\r\nA: ");
                write_for_ever(&mut s, &[b'a'; 1000]);
            }),
            |e| bound(e) == Some(Bound::HeadBytes),
        ),
        (
            "endless body",
            Box::new(|mut s| {
                let _ = s.write_all(b"HTTP/1.1 200 OK\r\n\r\n");
                write_for_ever(&mut s, &[b'a'; 1000]);
            }),
            |e| bound(e) == Some(Bound::BodyBytes),
        ),
        (
            "endless chunks",
            Box::new(|mut s| {
                let _ = s.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n");
                write_for_ever(&mut s, &b"1\r\nx\r\n".repeat(100));
            }),
            |e| bound(e) == Some(Bound::BodyBytes),
        ),
        (
            "huge length",
            Box::new(|mut s| {
                let _ = s.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 9999999999\r\n\r\n");
                let _ = s.read(&mut [0; 512]);
            }),
            |e| bound(e) == Some(Bound::BodyBytes),
        ),
        (
            "flood of interim answers",
            Box::new(|mut s| write_for_ever(&mut s, b"HTTP/1.1 100 \r\n\r\n")),
            |e| bound(e) == Some(Bound::InterimAnswers),
        ),
        (
            "switch of protocols",
            Box::new(|mut s| {
                let _ = s.write_all(b"HTTP/1.1 101 Switching Protocols\r\n\r\n");
                let _ = s.read(&mut [0; 512]);
            }),
            |e| rule(e) == Some(Rule::Upgrade),
        ),
        (
            "close before the answer",
            Box::new(|mut s| drop(read_head(&mut s))),
            |e| {
                matches!(
                    e,
                    ConnError::ClosedEarly {
                        phase: Phase::Waiting,
                        received: 0
                    }
                )
            },
        ),
        (
            "close inside the body",
            Box::new(|mut s| {
                read_head(&mut s);
                let _ = s.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nx");
            }),
            |e| {
                matches!(
                    e,
                    ConnError::ClosedEarly {
                        phase: Phase::Reading,
                        ..
                    }
                )
            },
        ),
        (
            "reset inside the body",
            Box::new(|mut s| {
                read_head(&mut s);
                let _ = s.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nx");
                // A close with no lingering sends a reset.
                rustix::net::sockopt::set_socket_linger(&s, Some(Duration::ZERO)).unwrap();
            }),
            ConnError::is_closed,
        ),
    ];
    for (name, serve, expected) in cases {
        let (outcome, took) = against(Peer::GUEST, soon(), serve);
        let error = outcome.expect_err(name);
        assert!(expected(&error), "{name}: {error:?}");
        assert!(!error.is_timeout() && error.may_have_been_seen(), "{name}");
        assert!(took < Duration::from_secs(5), "{name}: after {took:?}");
    }
}

#[test]
fn a_stream_is_given_back_only_after_a_clean_keep_alive_answer() {
    let cases: [(&str, &[u8], bool); 5] = [
        ("keep-alive", PING, true),
        ("204", b"HTTP/1.1 204 \r\n\r\n", true),
        (
            "close",
            b"HTTP/1.1 204 \r\nConnection: close\r\n\r\n",
            false,
        ),
        ("bytes behind it", b"HTTP/1.1 204 \r\n\r\nhello", false),
        (
            "HTTP/1.0",
            b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n",
            false,
        ),
    ];
    for (name, answer, reusable) in cases {
        let (outcome, _) = against(Peer::GUEST, soon(), |mut stream| {
            read_head(&mut stream);
            stream.write_all(answer).unwrap();
        });
        assert_eq!(outcome.expect(name).stream.is_some(), reusable, "{name}");
    }
    let (outcome, _) = against(Peer::GUEST, soon(), |mut stream| {
        read_head(&mut stream);
        stream
            .write_all(b"HTTP/1.1 200 OK\r\n\r\nuntil the end")
            .unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
    });
    let finished = outcome.unwrap();
    assert_eq!(finished.response.body, b"until the end");
    assert!(finished.stream.is_none());
}

#[test]
fn an_early_answer_counts_but_ends_the_connection() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let server = std::thread::spawn(move || {
        read_head(&mut theirs);
        theirs
            .write_all(b"HTTP/1.1 413 \r\nContent-Length: 0\r\n\r\n")
            .unwrap();
        // Gone with megabytes unread.
    });
    let mut request = Request::new(Method::Put, "/");
    request.body = vec![0; 8 << 20];
    let stream = Stream::from_connected(ours).unwrap();
    let request = request.encode().unwrap();
    let (outcome, _) = run(Exchange::over_stream(
        stream,
        request,
        Peer::VMM,
        soon(),
        TOKENS,
    ));
    server.join().unwrap();
    match outcome {
        Ok(finished) => {
            assert_eq!(finished.response.status, 413);
            assert!(finished.stream.is_none());
        }
        // A Unix socket closed with data unread resets, and may lose what it had sent.
        Err(error) => assert!(error.is_closed(), "{error:?}"),
    }
}

#[test]
fn a_kept_stream_that_spoke_or_closed_is_not_used_again() {
    for (name, closes) in [("closed", true), ("spoke", false)] {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let stream = Stream::from_connected(ours).unwrap();
        if closes {
            drop(theirs);
        } else {
            theirs.write_all(PING).unwrap();
            // Keeps its end open for as long as the test needs it.
            std::mem::forget(theirs);
        }
        assert!(!stream.is_idle(), "{name}");
        let exchange = Exchange::over_stream(stream, get(), Peer::VMM, soon(), TOKENS);
        let error = run(exchange).0.expect_err(name);
        assert!(matches!(error, ConnError::Spent), "{name}: {error:?}");
        assert!(!error.may_have_been_seen(), "{name}");
    }
}

#[test]
fn a_connection_makes_a_new_stream_after_an_error_and_never_sends_twice() {
    let dir = Dir::new();
    let listener = UnixListener::bind(dir.socket()).unwrap();
    let server = std::thread::spawn(move || {
        let answers: [&[u8]; 4] = [b"nonsense\r\n", b"", b"HTTP/1.1 204 \r\n\r\nmore", PING];
        for answer in answers {
            let mut stream = listener.accept().unwrap().0;
            assert!(read_head(&mut stream).starts_with(b"GET /"));
            stream.write_all(answer).unwrap();
            if answer.is_empty() {
                continue;
            }
            assert_eq!(stream.read(&mut [0; 64]).unwrap(), 0, "a second request");
        }
    });
    let address = Address::Unix(dir.socket());
    let mut connection = Connection::connect(&address, Peer::VMM, soon()).unwrap();
    let request = Request::new(Method::Get, "/");
    let mut exchange = || connection.exchange(&request, &[], soon());
    assert!(matches!(exchange(), Err(ConnError::Protocol(_))));
    assert!(matches!(exchange(), Err(ConnError::ClosedEarly { .. })));
    assert_eq!(exchange().unwrap().status, 204);
    assert_eq!(exchange().unwrap().status, 200);
    drop(connection);
    server.join().unwrap();
}

#[test]
fn a_dropped_exchange_closes_its_connection() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let stream = Stream::from_connected(ours).unwrap();
    let poll = Poll::new().unwrap();
    let mut exchange = Exchange::over_stream(stream, get(), Peer::VMM, soon(), TOKENS);
    let step = exchange.advance(poll.registry(), Instant::now());
    assert!(step.is_continue());
    assert_eq!(exchange.phase(), Phase::Waiting);
    assert!(!read_head(&mut theirs).is_empty());
    drop(exchange);
    assert_eq!(theirs.read(&mut [0]).unwrap(), 0);
}

#[test]
fn a_connect_that_nobody_answers_times_out() {
    // A listener whose queue is full drops further SYNs on loopback, as a dead guest does.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let address = listener.local_addr().unwrap();
    let mut queued = Vec::new();
    let full =
        (0..64).any(
            |_| match TcpStream::connect_timeout(&address, Duration::from_millis(50)) {
                Ok(stream) => {
                    queued.push(stream);
                    false
                }
                Err(error) => error.kind() == ErrorKind::TimedOut,
            },
        );
    assert!(full, "the queue takes everything");
    let budget = Duration::from_millis(120);
    let deadline = Deadline::after(budget);
    let mut connecting = Connecting::to(&address.into(), deadline, TOKENS);
    let start = Instant::now();
    let outcome = drive(&mut Poll::new().unwrap(), &mut connecting).unwrap();
    let took = start.elapsed();
    let error = outcome.unwrap_err();
    assert!(
        error.is_timeout() && !error.may_have_been_seen(),
        "{error:?}"
    );
    assert!(took >= budget && took < budget + SLACK, "after {took:?}");
}
