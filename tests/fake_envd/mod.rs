//! A scripted guest agent: it answers the n-th request of a path as it was told, bad manners
//! included, and remembers what it was asked.

#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    reason = "each test binary uses a part of it, and fails where it fails"
)]

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// What to do with one request.
#[derive(Debug, Clone)]
pub enum Act {
    /// Send these bytes and close.
    Send(Vec<u8>),
    /// Send these bytes and keep the connection for another request.
    SendAndKeep(Vec<u8>),
    /// Wait, then do something else.
    After(Duration, Box<Act>),
    /// Send these bytes, then reset the connection.
    SendAndReset(Vec<u8>),
    /// Send a head, then bytes without end.
    Endless(Vec<u8>),
    /// One byte now and then.
    Trickle(Vec<u8>, Duration),
    /// Close without a word.
    Close,
    /// Say nothing, keep the connection.
    Silence,
}

impl Act {
    pub fn status(line: &str) -> Self {
        Self::Send(
            format!("HTTP/1.1 {line}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n").into(),
        )
    }
    pub fn no_content() -> Self {
        Self::Send(
            b"HTTP/1.1 204 No Content\r\ncache-control: no-store\r\nconnection: close\r\n\r\n"
                .to_vec(),
        )
    }
    pub fn json(body: &str) -> Self {
        Self::Send(json_answer(body, "close"))
    }
    pub fn after(self, time: Duration) -> Self {
        Self::After(time, Box::new(self))
    }
    /// An answer of `/memory/preload` for 1 GiB.
    pub fn walk(state: &str, pages: u64) -> Self {
        Self::json(&format!(
            r#"{{"state":"{state}","regions":0,"pages":{pages},"bytes":{},"elapsed_sec":0.0,"source":"","error":null}}"#,
            pages * 4096
        ))
    }
}

/// The pages of 1 GiB.
pub const ALL_PAGES: u64 = (1 << 30) / 4096;

pub fn json_answer(body: &str, connection: &str) -> Vec<u8> {
    format!(
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncache-control: no-store\r\n\
         content-length: {}\r\nconnection: {connection}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

/// One request as it came.
#[derive(Debug, Clone)]
pub struct Asked {
    pub at: Instant,
    pub line: String,
    pub head: String,
    pub body: Vec<u8>,
    /// Which connection it came on, from 0.
    pub connection: usize,
}

impl Asked {
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap()
    }
    pub fn has_header(&self, header: &str) -> bool {
        self.head
            .lines()
            .any(|line| line.eq_ignore_ascii_case(header))
    }
}

type Scripts = HashMap<String, Vec<Act>>;

struct Shared {
    scripts: Mutex<Scripts>,
    asked: Mutex<Vec<Asked>>,
    accepted: Mutex<Vec<Instant>>,
    /// Connections whose client was seen to send FIN or RST.
    stopped: AtomicBool,
}

/// The agent. Its threads end when it is dropped.
pub struct FakeEnvd {
    pub address: SocketAddr,
    shared: Arc<Shared>,
    acceptor: Option<thread::JoinHandle<()>>,
}

impl FakeEnvd {
    /// An agent on a free port of loopback that answers as scripted: the n-th request of a
    /// `METHOD /path` gets the n-th act, the last act serves all further ones. A request
    /// without script gets 404.
    pub fn start(scripts: &[(&str, &[Act])]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        Self::serve(listener, scripts)
    }

    pub fn serve(listener: TcpListener, scripts: &[(&str, &[Act])]) -> Self {
        let address = listener.local_addr().unwrap();
        let scripts = scripts
            .iter()
            .map(|(path, acts)| ((*path).to_owned(), acts.iter().rev().cloned().collect()))
            .collect();
        let shared = Arc::new(Shared {
            scripts: Mutex::new(scripts),
            asked: Mutex::new(Vec::new()),
            accepted: Mutex::new(Vec::new()),
            stopped: AtomicBool::new(false),
        });
        let acceptor = thread::spawn({
            let shared = Arc::clone(&shared);
            move || accept_all(&listener, &shared)
        });
        let acceptor = Some(acceptor);
        Self {
            address,
            shared,
            acceptor,
        }
    }

    /// Everything asked so far.
    pub fn asked(&self) -> Vec<Asked> {
        self.shared.asked.lock().unwrap().clone()
    }

    /// The request lines so far, without the version.
    pub fn lines(&self) -> Vec<String> {
        self.asked().into_iter().map(|asked| asked.line).collect()
    }

    /// What was asked of one `METHOD /path`.
    pub fn asked_of(&self, line: &str) -> Vec<Asked> {
        let asked = self.asked();
        asked.into_iter().filter(|a| a.line == line).collect()
    }

    /// Number of connections taken.
    pub fn connections(&self) -> usize {
        self.shared.accepted.lock().unwrap().len()
    }
}

impl Drop for FakeEnvd {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::SeqCst);
        // Wakes the acceptor.
        let _ = TcpStream::connect(self.address);
        if let Some(acceptor) = self.acceptor.take() {
            acceptor.join().unwrap();
        }
    }
}

fn accept_all(listener: &TcpListener, shared: &Arc<Shared>) {
    let mut workers = Vec::new();
    for stream in listener.incoming() {
        if shared.stopped.load(Ordering::SeqCst) {
            break;
        }
        let Ok(stream) = stream else { break };
        let number = {
            let mut accepted = shared.accepted.lock().unwrap();
            accepted.push(Instant::now());
            accepted.len() - 1
        };
        let shared = Arc::clone(shared);
        workers.push(thread::spawn(move || serve(stream, number, &shared)));
    }
    for worker in workers {
        worker.join().unwrap();
    }
}

fn serve(mut stream: TcpStream, connection: usize, shared: &Shared) {
    stream
        .set_read_timeout(Some(Duration::from_millis(20)))
        .unwrap();
    stream
        .set_write_timeout(Some(Duration::from_millis(500)))
        .unwrap();
    stream.set_nodelay(true).unwrap();
    while let Some((line, head, body)) = read_request(&mut stream, shared) {
        let asked = Asked {
            at: Instant::now(),
            line: line.clone(),
            head,
            body,
            connection,
        };
        shared.asked.lock().unwrap().push(asked);
        let act = next_act(shared, &line);
        if !perform(act, &mut stream, shared) {
            break;
        }
    }
}

fn next_act(shared: &Shared, line: &str) -> Act {
    let mut scripts = shared.scripts.lock().unwrap();
    match scripts.get_mut(line) {
        Some(acts) if acts.len() > 1 => acts.pop().unwrap(),
        Some(acts) => acts.last().cloned().unwrap_or(Act::Close),
        None => Act::status("404 Not Found"),
    }
}

/// Whether the connection takes another request.
fn perform(act: Act, stream: &mut TcpStream, shared: &Shared) -> bool {
    match act {
        Act::Send(bytes) => {
            let _ = stream.write_all(&bytes);
            let _ = stream.shutdown(Shutdown::Write);
            drain(stream, shared);
            false
        }
        Act::SendAndKeep(bytes) => stream.write_all(&bytes).is_ok(),
        Act::After(time, act) => {
            pause(time, shared);
            perform(*act, stream, shared)
        }
        Act::SendAndReset(bytes) => {
            let _ = stream.write_all(&bytes);
            thread::sleep(Duration::from_millis(5));
            rustix::net::sockopt::set_socket_linger(&*stream, Some(Duration::ZERO)).unwrap();
            false
        }
        Act::Endless(head) => {
            let _ = stream.write_all(&head);
            let chunk = [b'x'; 4096];
            loop {
                let stopped = shared.stopped.load(Ordering::SeqCst);
                if stopped || stream.write_all(&chunk).is_err() {
                    break;
                }
            }
            false
        }
        Act::Trickle(bytes, gap) => {
            for byte in bytes {
                if shared.stopped.load(Ordering::SeqCst) || stream.write_all(&[byte]).is_err() {
                    break;
                }
                thread::sleep(gap);
            }
            false
        }
        Act::Close => false,
        Act::Silence => {
            drain(stream, shared);
            false
        }
    }
}

fn pause(time: Duration, shared: &Shared) {
    let until = Instant::now() + time;
    while Instant::now() < until && !shared.stopped.load(Ordering::SeqCst) {
        let left = until.saturating_duration_since(Instant::now());
        thread::sleep(left.min(Duration::from_millis(10)));
    }
}

/// Reads until the client has closed.
fn drain(stream: &mut TcpStream, shared: &Shared) {
    let mut sink = [0; 4096];
    while !shared.stopped.load(Ordering::SeqCst) {
        match stream.read(&mut sink) {
            Ok(0) => break,
            Ok(_) => {}
            Err(error) if timed_out(&error) => {}
            Err(_) => break,
        }
    }
}

fn timed_out(error: &std::io::Error) -> bool {
    use std::io::ErrorKind;
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

fn read_request(stream: &mut TcpStream, shared: &Shared) -> Option<(String, String, Vec<u8>)> {
    let mut bytes = Vec::new();
    let head_end = loop {
        if let Some(at) = bytes.windows(4).position(|w| w == b"\r\n\r\n") {
            break at + 4;
        }
        read_some(stream, &mut bytes, shared)?;
    };
    let head = String::from_utf8(bytes[..head_end].to_vec()).unwrap();
    let length = head
        .lines()
        .find_map(|line| {
            line.to_ascii_lowercase()
                .strip_prefix("content-length: ")?
                .parse()
                .ok()
        })
        .unwrap_or(0);
    while bytes.len() < head_end + length {
        read_some(stream, &mut bytes, shared)?;
    }
    let first = head.lines().next()?;
    let line = first.strip_suffix(" HTTP/1.1")?.to_owned();
    Some((line, head, bytes[head_end..].to_vec()))
}

fn read_some(stream: &mut TcpStream, bytes: &mut Vec<u8>, shared: &Shared) -> Option<()> {
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return None,
            Ok(count) => {
                bytes.extend_from_slice(&buffer[..count]);
                return Some(());
            }
            Err(error) if timed_out(&error) && !shared.stopped.load(Ordering::SeqCst) => {}
            Err(_) => return None,
        }
    }
}
