//! Servers to ping, and the two clients that ping them.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

use cloud_hypervisor_client::apis::DefaultApi;
use cloud_hypervisor_client::{SocketBasedApiClient, socket_based_api_client};
use rewake::deadline::Deadline;
use rewake::vmm::api::Client;
use tokio::runtime::{Builder, Runtime};

/// What a real v53.0 answered.
const ANSWER: &[u8] = include_bytes!("../../../fixtures/ch-v53/http/01-ping.response");

/// Something that answers `vmm.ping` on a Unix socket.
pub struct Server {
    /// What it is.
    pub name: &'static str,
    directory: PathBuf,
    kind: Kind,
}

enum Kind {
    Responder(Option<JoinHandle<()>>),
    CloudHypervisor(Child),
}

impl Server {
    /// A thread that reads requests and answers each with captured bytes.
    pub fn responder() -> Self {
        let directory = directory("responder");
        let listener = UnixListener::bind(directory.join("api.sock")).expect("socket can be bound");
        let thread = std::thread::spawn(move || respond(&listener));
        Self {
            name: "in-process responder",
            directory,
            kind: Kind::Responder(Some(thread)),
        }
    }

    /// The real one, or why there is none.
    pub fn cloud_hypervisor() -> Result<Self, String> {
        let directory = directory("cloud-hypervisor");
        let socket = directory.join("api.sock");
        let log = File::create(directory.join("log")).expect("file can be made");
        let spawned = Command::new("cloud-hypervisor")
            .arg("--api-socket")
            .arg(format!("path={}", socket.display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn();
        let child = match spawned {
            Ok(child) => child,
            Err(error) => {
                let _ = fs::remove_dir_all(&directory);
                return Err(format!("cloud-hypervisor: {error}"));
            }
        };
        let mut server = Self {
            name: "cloud-hypervisor",
            directory,
            kind: Kind::CloudHypervisor(child),
        };
        let begin = Instant::now();
        while UnixStream::connect(&socket).is_err() {
            let Kind::CloudHypervisor(child) = &mut server.kind else {
                unreachable!("made above")
            };
            let exited = child.try_wait().expect("own child can be waited for");
            if exited.is_some() || begin.elapsed() > Duration::from_secs(5) {
                return Err("cloud-hypervisor does not start".to_owned());
            }
            sleep(Duration::from_millis(1));
        }
        Ok(server)
    }

    /// Its socket.
    pub fn socket(&self) -> PathBuf {
        self.directory.join("api.sock")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        match &mut self.kind {
            Kind::Responder(thread) => {
                // A connection without a request ends it.
                drop(UnixStream::connect(self.directory.join("api.sock")));
                if let Some(thread) = thread.take() {
                    let _ = thread.join();
                }
            }
            Kind::CloudHypervisor(child) => {
                let _ = child.kill();
                let _ = child.wait();
            }
        }
        let _ = fs::remove_dir_all(&self.directory);
    }
}

fn directory(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("rewake-rivals-{}-{name}", std::process::id()));
    fs::create_dir(&path).expect("directory can be made");
    path
}

/// One thread per connection, so that both clients can keep theirs.
fn respond(listener: &UnixListener) {
    let mut threads = Vec::new();
    loop {
        let (mut stream, _) = listener.accept().expect("connection can be accepted");
        let mut buffer = [0; 4096];
        let mut used = stream.read(&mut buffer).expect("request can be read");
        if used == 0 {
            break;
        }
        threads.push(std::thread::spawn(move || {
            loop {
                while !buffer[..used].ends_with(b"\r\n\r\n") {
                    match stream.read(&mut buffer[used..]) {
                        Ok(0) | Err(_) => return,
                        Ok(count) => used += count,
                    }
                }
                used = 0;
                if stream.write_all(ANSWER).is_err() {
                    return;
                }
            }
        }));
    }
    for thread in threads {
        let _ = thread.join();
    }
}

/// rewake's client.
pub struct Ours {
    client: Client,
}

impl Ours {
    /// Connects.
    pub fn connect(socket: &Path) -> Self {
        let client = Client::connect(socket, deadline()).expect("server answers");
        Self { client }
    }

    /// One call; the answer is checked.
    pub fn ping(&mut self) {
        let ping = self.client.ping(deadline()).expect("server answers");
        assert!(!ping.version.is_empty() && ping.pid != 0);
    }
}

fn deadline() -> Deadline {
    Deadline::after(Duration::from_secs(10))
}

/// The rival.
pub struct Theirs {
    client: SocketBasedApiClient,
}

impl Theirs {
    /// Makes the client; it connects at the first call.
    pub fn new(socket: &Path) -> Self {
        let client = socket_based_api_client(socket);
        Self { client }
    }

    /// One call; the answer is checked.
    pub async fn ping(&self) {
        let ping = self.client.vmm_ping_get().await.expect("server answers");
        assert!(!ping.version.is_empty() && ping.pid.is_some());
    }
}

/// The runtime under the rival: the calling thread.
pub fn runtime() -> Runtime {
    let built = Builder::new_current_thread().enable_all().build();
    built.expect("runtime can be made")
}
