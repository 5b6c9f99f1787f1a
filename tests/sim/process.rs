//! A process under test, and the few lines of HTTP to talk to it.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// The longest that anything here may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// A directory that goes away with its owner.
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    pub(crate) fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("rewake-sim-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// A fresh directory inside, as a `file://` URL.
    pub(crate) fn url(&self, name: &str) -> String {
        let path = self.path(name);
        std::fs::create_dir_all(&path).unwrap();
        format!("file://{}", path.display())
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).ok();
    }
}

/// An answer: status and body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: String,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

/// Reads one response that has a `Content-Length` or no body.
pub(crate) fn read_response(stream: &mut impl Read) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut byte = [0];
    while !bytes.ends_with(b"\r\n\r\n") {
        if stream.read(&mut byte)? == 0 {
            return Ok(bytes);
        }
        bytes.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&bytes).to_ascii_lowercase();
    let length = head
        .lines()
        .find_map(|l| l.strip_prefix("content-length: "));
    let mut body = vec![0; length.map_or(0, |l| l.trim().parse().unwrap())];
    stream.read_exact(&mut body)?;
    bytes.extend(body);
    Ok(bytes)
}

pub(crate) fn parse(bytes: &[u8]) -> Answer {
    let text = String::from_utf8_lossy(bytes);
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let status = head
        .split(' ')
        .nth(1)
        .and_then(|word| word.trim().parse().ok());
    Answer {
        status: status.unwrap_or(0),
        body: body.to_owned(),
    }
}

/// A VMM under test: the stand-in or the real one.
pub(crate) struct Vmm {
    pub(crate) child: Child,
    pub(crate) scratch: Scratch,
    socket: PathBuf,
    pub(crate) events: PathBuf,
    pub(crate) log: PathBuf,
}

impl Vmm {
    /// The stand-in with a guest agent on loopback.
    pub(crate) fn start(settings: &[&str]) -> Self {
        let scratch = Scratch::new();
        let mut command = Command::new(env!("CARGO_BIN_EXE_rewake-sim"));
        command.env_remove("REWAKE_SIM");
        for setting in settings {
            command.args(["--sim", setting]);
        }
        command.args(["--sim", "envd=tcp:127.0.0.1:0"]);
        command
            .arg("--sim-envd-addr-file")
            .arg(scratch.path("envd"));
        Self::spawn(scratch, command)
    }

    pub(crate) fn spawn(scratch: Scratch, mut command: Command) -> Self {
        let socket = scratch.path("api");
        let events = scratch.path("events");
        let log = scratch.path("log");
        command.arg("--api-socket").arg(&socket);
        command
            .arg("--event-monitor")
            .arg(format!("path={}", events.display()));
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(std::fs::File::create(&log).unwrap());
        let child = command.spawn().unwrap();
        Self {
            child,
            scratch,
            socket,
            events,
            log,
        }
    }

    pub(crate) fn connect(&mut self) -> UnixStream {
        let until = Instant::now() + PATIENCE;
        loop {
            if let Ok(stream) = UnixStream::connect(&self.socket) {
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                return stream;
            }
            let ended = self.child.try_wait().unwrap();
            assert!(ended.is_none(), "ended with {ended:?}: {}", self.log_text());
            assert!(Instant::now() < until, "no API socket");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    pub(crate) fn call(&mut self, method: &str, endpoint: &str, body: Option<&Value>) -> Answer {
        let mut stream = self.connect();
        let body = body.map(Value::to_string).unwrap_or_default();
        let length = if body.is_empty() {
            String::new()
        } else {
            format!("Content-Length: {}\r\n", body.len())
        };
        let request =
            format!("{method} /api/v1/{endpoint} HTTP/1.1\r\nHost: l\r\n{length}\r\n{body}");
        stream.write_all(request.as_bytes()).unwrap();
        parse(&read_response(&mut stream).unwrap())
    }

    pub(crate) fn put(&mut self, endpoint: &str) -> Answer {
        self.call("PUT", endpoint, None)
    }

    pub(crate) fn put_json(&mut self, endpoint: &str, body: &Value) -> Answer {
        self.call("PUT", endpoint, Some(body))
    }

    /// A PUT that has to succeed.
    pub(crate) fn must(&mut self, endpoint: &str, body: Option<&Value>) {
        let answer = self.call("PUT", endpoint, body);
        assert_eq!(
            answer.status,
            204,
            "{endpoint}: {answer:?}\n{}",
            self.log_text()
        );
    }

    pub(crate) fn create_and_boot(&mut self, extra: &Value) {
        let kernel = self.scratch.path("kernel");
        std::fs::write(&kernel, "never read").unwrap();
        let mut config = json!({
            "payload": {"kernel": kernel}, "memory": {"size": 32 << 20},
            "serial": {"mode": "Off"}, "console": {"mode": "Off"},
        });
        for (key, value) in extra.as_object().unwrap() {
            config[key] = value.clone();
        }
        self.must("vm.create", Some(&config));
        self.must("vm.boot", None);
    }

    /// Pauses and writes a snapshot into a fresh directory.
    pub(crate) fn pause_and_snapshot(&mut self, name: &str) -> PathBuf {
        self.must("vm.pause", None);
        let url = self.scratch.url(name);
        self.must("vm.snapshot", Some(&json!({"destination_url": url})));
        self.scratch.path(name)
    }

    pub(crate) fn log_text(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// The names of all events so far, as `source/event`.
    pub(crate) fn event_names(&self) -> Vec<String> {
        event_names(&std::fs::read_to_string(&self.events).unwrap())
    }

    pub(crate) fn guest_address(&self) -> SocketAddr {
        let until = Instant::now() + PATIENCE;
        loop {
            if let Ok(text) = std::fs::read_to_string(self.scratch.path("envd")) {
                return text.trim().parse().unwrap();
            }
            assert!(Instant::now() < until, "no address file");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    pub(crate) fn guest(&self, method: &str, path: &str, body: Option<&Value>) -> Answer {
        guest(self.guest_address(), method, path, body).unwrap()
    }

    pub(crate) fn guest_state(&self) -> Value {
        self.guest("GET", "/sim/state", None).json()
    }

    pub(crate) fn wait(&mut self) -> std::process::ExitStatus {
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < until, "does not end: {}", self.log_text());
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

pub(crate) fn event_names(text: &str) -> Vec<String> {
    let records = text
        .split("\n\n")
        .filter(|record| !record.trim().is_empty());
    records
        .map(|record| {
            let record: Value = serde_json::from_str(record).unwrap();
            format!(
                "{}/{}",
                record["source"].as_str().unwrap(),
                record["event"].as_str().unwrap()
            )
        })
        .collect()
}

/// One request to a guest agent on a connection of its own.
pub(crate) fn guest(
    address: SocketAddr,
    method: &str,
    path: &str,
    body: Option<&Value>,
) -> std::io::Result<Answer> {
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let body = body.map(Value::to_string).unwrap_or_default();
    let content = if body.is_empty() {
        String::new()
    } else {
        format!(
            "Content-Type: application/json\r\nContent-Length: {}\r\n",
            body.len()
        )
    };
    let request =
        format!("{method} {path} HTTP/1.1\r\nHost: g\r\nConnection: close\r\n{content}\r\n{body}");
    stream.write_all(request.as_bytes())?;
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes)?;
    Ok(parse(&bytes))
}
