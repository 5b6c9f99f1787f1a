//! A server on a Unix socket that does as a test tells it.

use std::io::{IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recv, recvmsg};

/// One request as it arrived.
#[derive(Debug)]
pub(crate) struct Received {
    /// Which connection it came on, counted from 0.
    pub(crate) connection: usize,
    /// `PUT /api/v1/vm.pause`.
    pub(crate) line: String,
    pub(crate) body: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
    /// Whether the client had closed its sending side when the request was complete.
    pub(crate) half_closed: bool,
}

/// What to do about a request.
pub(crate) enum Reply {
    /// Send these bytes.
    Bytes(Vec<u8>),
    /// Send these bytes and close.
    Last(Vec<u8>),
    /// Say nothing, and wait for the client to close.
    Silence,
}

pub(crate) const OK: &[u8] =
    b"HTTP/1.1 204 \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n\r\n";

/// An answer in the form of CH's server.
pub(crate) fn answer(status: u16, body: impl AsRef<[u8]>) -> Vec<u8> {
    let body = body.as_ref();
    let mut bytes = format!(
        "HTTP/1.1 {status} \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    )
    .into_bytes();
    bytes.extend(body);
    bytes
}

pub(crate) fn ping(version: &str) -> Vec<u8> {
    let body =
        format!(r#"{{"build_version":"v{version}","version":"{version}","pid":1,"features":[]}}"#);
    answer(200, body)
}

pub(crate) struct Server {
    socket: PathBuf,
    requests: Receiver<Received>,
    closed: Receiver<()>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves one connection after the other. `script` decides, given the number of requests
    /// before this one.
    pub(crate) fn start(
        socket: &Path,
        script: impl Fn(usize, &Received) -> Reply + Send + 'static,
    ) -> Self {
        let listener = UnixListener::bind(socket).unwrap();
        let (sender, requests) = channel();
        let (close, closed) = channel();
        let thread = std::thread::spawn(move || serve(&listener, &script, &sender, &close));
        Self {
            socket: socket.to_owned(),
            requests,
            closed,
            thread: Some(thread),
        }
    }

    /// What has been asked so far, since the last time.
    pub(crate) fn received(&self) -> Vec<Received> {
        self.requests.try_iter().collect()
    }

    /// Blocks until the server has closed a connection: no client can know that it is about
    /// to, and one that is quick would still send its next request there.
    pub(crate) fn await_close(&self) {
        self.closed.recv_timeout(Duration::from_secs(10)).unwrap();
    }

    /// The request lines with the connections they came on.
    pub(crate) fn lines(&self) -> Vec<(usize, String)> {
        let received = self.received();
        received
            .into_iter()
            .map(|r| (r.connection, r.line))
            .collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // A connection without a request ends the loop.
        drop(UnixStream::connect(&self.socket));
        let served = self.thread.take().unwrap().join();
        if !std::thread::panicking() {
            served.unwrap();
        }
    }
}

fn serve(
    listener: &UnixListener,
    script: &impl Fn(usize, &Received) -> Reply,
    sender: &Sender<Received>,
    close: &Sender<()>,
) {
    let mut count = 0;
    for connection in 0.. {
        let (mut stream, _) = listener.accept().unwrap();
        let mut first = true;
        while let Some(mut received) = read_request(&stream) {
            first = false;
            received.connection = connection;
            let reply = script(count, &received);
            count += 1;
            // Sent before the answer: whoever has the answer finds the request noted.
            let _ = sender.send(received);
            match reply {
                Reply::Bytes(bytes) => {
                    if stream.write_all(&bytes).is_err() {
                        break;
                    }
                }
                Reply::Last(bytes) => {
                    let _ = stream.write_all(&bytes);
                    break;
                }
                Reply::Silence => {}
            }
        }
        if first {
            return;
        }
        drop(stream);
        let _ = close.send(());
    }
}

/// One request with its descriptors; `None` at the end of the connection.
fn read_request(stream: &UnixStream) -> Option<Received> {
    let (mut bytes, mut fds) = (Vec::new(), Vec::new());
    loop {
        let head = bytes.windows(4).position(|w| w == b"\r\n\r\n");
        if let Some(end) = head {
            let text = String::from_utf8(bytes[..end].to_vec()).unwrap();
            let length = text
                .lines()
                .find_map(|line| line.strip_prefix("Content-Length: "))
                .map_or(0, |length| length.parse().unwrap());
            if bytes.len() == end + 4 + length {
                let line = text.lines().next().unwrap();
                return Some(Received {
                    connection: 0,
                    line: line.strip_suffix(" HTTP/1.1").unwrap().to_owned(),
                    body: bytes.split_off(end + 4),
                    fds,
                    half_closed: is_at_end(stream),
                });
            }
        }
        let mut buffer = [0; 4096];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut slices = [IoSliceMut::new(&mut buffer)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let count = recvmsg(stream, &mut slices, &mut ancillary, flags).map_or(0, |m| m.bytes);
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                fds.extend(received);
            }
        }
        if count == 0 {
            return None;
        }
        bytes.extend(&buffer[..count]);
    }
}

fn is_at_end(stream: &UnixStream) -> bool {
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    matches!(recv(stream, &mut [0_u8; 1], flags), Ok((0, _)))
}
