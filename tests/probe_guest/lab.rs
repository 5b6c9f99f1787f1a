//! A network namespace with a tap, and real Cloud Hypervisors with the probe guest on it.

#[path = "../support/real_vmm.rs"]
mod real_vmm;

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use real_vmm::RealVmm;
use rewake::deadline::Deadline;
use rewake::envd::hedge::Hedge;
use rewake::envd::ready::{Prober, Ready};
use rewake::envd::socket::{CurrentNetns, InNetns};
use rewake::envd::watch::drive_while_alive;
use rewake::plan::{MemoryPolicy, RestoreInputs};
use rewake::probe_guest::{self, Settings};
use rewake::resource::ledger::Ledger;
use rewake::restore::{RestoreSpec, Restored, restore};
use rewake::vmm::launch::{ApiSocket, LaunchSpec, StopLimits, Vmm, launch};
use rewake::wire::conn::{Address, Connection, Peer, Stream};
use rewake::wire::http::{Method, Request, Response};
use rewake::wire::reactor::TokenRange;
use rewake_sys::netns;
use rewake_sys::tun::{Tap, TapOptions};

const GUEST: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 21);

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(60))
}

/// A place for one test: its own network namespace, its own directory. Nothing is left.
pub(crate) struct Lab {
    netns: OwnedFd,
    dir: PathBuf,
    vmm: Option<RealVmm>,
    sockets: u32,
}

/// A Cloud Hypervisor with the guest, killed when dropped.
pub(crate) struct Machine {
    pub(crate) vmm: Vmm,
    api: Connection,
    ledger: Ledger,
    netns: OwnedFd,
    /// From before the launch to the guest's first answer.
    pub(crate) first_answer: Duration,
    pub(crate) ready: Ready,
}

impl Lab {
    /// The lab, or a loud skip where the machine lacks something.
    pub(crate) fn new(test: &str) -> Option<Self> {
        match Self::prepare(test) {
            Ok(lab) => Some(lab),
            Err(reason) => {
                eprintln!("SKIP {test}: {reason}");
                None
            }
        }
    }

    fn prepare(test: &str) -> Result<Self, String> {
        let dir = std::env::temp_dir().join(format!("rewake-{test}-{}", std::process::id()));
        fs::create_dir(&dir).map_err(|error| format!("{}: {error}", dir.display()))?;
        // From here on the directory is removed on every way out.
        let mut lab = Self {
            netns: netns::current().unwrap(),
            dir,
            vmm: None,
            sockets: 0,
        };
        lab.vmm = Some(RealVmm::find(&lab.dir)?);
        lab.netns = netns::run_in_new(|netns| {
            let options = TapOptions {
                vnet_header: true,
                multi_queue: false,
            };
            let tap = Tap::open("tap0", options).map_err(|error| format!("tap0: {error}"))?;
            tap.set_persistent(true).unwrap();
            for arguments in [
                "link set lo up",
                "link set tap0 address 02:fc:00:00:00:06",
                "addr add 169.254.0.22/30 dev tap0",
                "neigh add 169.254.0.21 lladdr 02:fc:00:00:00:05 dev tap0 nud permanent",
                "link set tap0 up",
            ] {
                run(Command::new("ip").args(arguments.split(' ')))?;
            }
            Ok::<_, String>(netns)
        })
        .map_err(|error| error.to_string())??;
        probe_guest::write_to(&lab.dir.join("guest")).unwrap();
        Ok(lab)
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Boots the guest with 128 MiB and waits for its first answer.
    pub(crate) fn boot(&mut self, settings: &Settings) -> Machine {
        self.boot_with(settings, "--memory size=128M")
    }

    /// Boots the guest with the memory that these arguments describe.
    pub(crate) fn boot_with(&mut self, settings: &Settings, memory: &str) -> Machine {
        let kernel = self.dir.join("guest").display().to_string();
        let arguments =
            ["--kernel", &kernel, "--cmdline", &settings.to_string()].map(str::to_owned);
        let machine = "--cpus boot=1 --console off --serial null \
                       --net tap=tap0,mac=02:FC:00:00:00:05";
        let machine = memory.split_whitespace().chain(machine.split_whitespace());
        let machine = machine.map(str::to_owned);
        self.start(arguments.into_iter().chain(machine).collect(), None)
    }

    /// Restores the snapshot in `source`, the request queued before Cloud Hypervisor starts.
    pub(crate) fn restore(&mut self, source: &Path, mode: &str) -> Machine {
        let body = format!(
            r#"{{"source_url":"file://{}","memory_restore_mode":"{mode}","resume":true}}"#,
            source.display()
        );
        let request = Request::new(Method::Put, "/api/v1/vm.restore").json(body);
        self.start(Vec::new(), Some(request))
    }

    /// Restores with the library, as a host program would.
    pub(crate) fn restore_with_rewake(
        &self,
        source: &Path,
        memory: impl Into<MemoryPolicy>,
    ) -> Restored {
        let spec = self.restore_spec(source, memory);
        restore(&spec, soon()).unwrap_or_else(|error| panic!("{error:#?}"))
    }

    /// A restore of the snapshot in `source` into this lab's namespace.
    pub(crate) fn restore_spec(
        &self,
        source: &Path,
        memory: impl Into<MemoryPolicy>,
    ) -> RestoreSpec {
        let id = format!("probe-{}", std::process::id());
        let inputs = RestoreInputs {
            memory_mode: memory.into(),
            ..RestoreInputs::new(id.parse().unwrap(), source)
        };
        let mut spec = RestoreSpec::new(inputs, self.program(), self.guest());
        spec.runtime_dir = self.dir.join("run");
        spec.netns = Some(self.netns_path().into());
        spec.vmm.env = self.environment();
        spec
    }

    /// Asks the guest on this lab's tap for JSON, whoever started it.
    pub(crate) fn json(&self, method: Method, target: &str) -> serde_json::Value {
        let response = send(&self.netns, &Request::new(method, target).closing());
        assert_eq!(response.status, 200, "{target}: {}", response.excerpt());
        serde_json::from_slice(&response.body).unwrap()
    }

    /// The `cloud-hypervisor` in use.
    pub(crate) fn program(&self) -> &Path {
        // Invariant: without one there is no lab.
        &self.vmm.as_ref().unwrap().program
    }

    /// Where the guest listens, seen from the lab's namespace.
    pub(crate) fn guest(&self) -> SocketAddr {
        SocketAddr::from((GUEST, probe_guest::PORT))
    }

    /// The namespace as a path, for as long as the lab lives.
    pub(crate) fn netns_path(&self) -> PathBuf {
        let number = std::os::fd::AsRawFd::as_raw_fd(&self.netns);
        format!("/proc/{}/fd/{number}", std::process::id()).into()
    }

    fn environment(&self) -> Vec<(String, String)> {
        self.vmm.iter().map(RealVmm::variable).collect()
    }

    /// Asks the guest on this lab's tap, whoever started it.
    pub(crate) fn probe(&self) -> serde_json::Value {
        let request = Request::new(Method::Get, "/probe").closing();
        let response = send(&self.netns, &request);
        serde_json::from_slice(&response.body).unwrap()
    }

    fn start(&mut self, args: Vec<String>, first: Option<Request>) -> Machine {
        self.sockets += 1;
        let begun = Instant::now();
        let path = self.dir.join(format!("api{}", self.sockets));
        let (socket, stream) = ApiSocket::bind(&path).unwrap();
        let spec = LaunchSpec {
            program: self.program().to_owned(),
            args,
            env: self.environment(),
            ..LaunchSpec::default()
        };
        let mut ledger = Ledger::new();
        let mut vmm = launch(&spec, socket, Some(self.netns.as_fd()), &[], &mut ledger).unwrap();
        let mut api = api_connection(stream);
        let ready = std::thread::scope(|scope| {
            let restored =
                scope.spawn(|| first.map(|request| api.exchange(&request, &[], soon()).unwrap()));
            let ready = self.ready(&vmm);
            let restored = restored.join().unwrap();
            if let Some(response) = restored {
                assert_eq!(response.status, 204, "vm.restore: {}", response.excerpt());
            }
            ready
        });
        let ready = ready.unwrap_or_else(|error| {
            vmm.drain_log();
            panic!("no answer: {error}; {:#?}", vmm.log.last_lines(30))
        });
        let first_answer = ready.at.duration_since(begun);
        let netns = self.netns.try_clone().unwrap();
        Machine {
            vmm,
            api,
            ledger,
            netns,
            first_answer,
            ready,
        }
    }

    fn ready(&self, vmm: &Vmm) -> Result<Ready, rewake::envd::ready::ReadyError> {
        let sockets = Arc::new(InNetns::new(self.netns.try_clone().unwrap()));
        let target = SocketAddr::from((GUEST, probe_guest::PORT));
        let tokens = TokenRange::new(0, Prober::TOKENS);
        let mut prober = Prober::new(target, sockets, Hedge::default(), false, soon(), tokens)?;
        drive_while_alive(&mut prober, Some(vmm.process().as_fd())).unwrap()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

impl Machine {
    /// One request to the guest on a connection of its own.
    pub(crate) fn ask(&self, method: Method, target: &str) -> Response {
        self.send(&Request::new(method, target).closing())
    }

    pub(crate) fn send(&self, request: &Request) -> Response {
        send(&self.netns, request)
    }

    /// What the guest says of itself.
    pub(crate) fn probe(&self) -> serde_json::Value {
        self.json(Method::Get, "/probe")
    }

    /// The JSON of an answer with status 200.
    pub(crate) fn json(&self, method: Method, target: &str) -> serde_json::Value {
        let response = self.ask(method, target);
        assert_eq!(response.status, 200, "{target}: {}", response.excerpt());
        serde_json::from_slice(&response.body).unwrap()
    }

    /// Begins `count` connections to the guest and drops them at once.
    pub(crate) fn abandon_connects(&self, count: usize) {
        use rewake::envd::socket::SocketSource as _;
        let target = SocketAddr::from((GUEST, probe_guest::PORT));
        netns::run_in(self.netns.as_fd(), || {
            for _ in 0..count {
                let socket = CurrentNetns.take().unwrap();
                let result = rustix::net::connect(&socket, &target);
                assert!(
                    matches!(result, Ok(()) | Err(rustix::io::Errno::INPROGRESS)),
                    "{result:?}"
                );
            }
        })
        .unwrap();
    }

    fn api(&mut self, action: &str, body: Option<String>) {
        let mut request = Request::new(Method::Put, format!("/api/v1/{action}"));
        if let Some(body) = body {
            request = request.json(body);
        }
        let response = self.api.exchange(&request, &[], soon()).unwrap();
        assert!(
            (200..300).contains(&response.status),
            "{action}: {} {}",
            response.status,
            response.excerpt()
        );
    }

    /// Pauses, writes a snapshot to `target`, ends Cloud Hypervisor.
    pub(crate) fn freeze(mut self, target: &Path) {
        fs::create_dir(target).unwrap();
        self.api("vm.pause", None);
        self.api(
            "vm.snapshot",
            Some(format!(
                r#"{{"destination_url":"file://{}"}}"#,
                target.display()
            )),
        );
        self.vmm
            .stop(StopLimits::default(), soon(), |_, _| {})
            .unwrap();
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let leftovers = self.ledger.unwind(soon());
        self.vmm.reap();
        if !std::thread::panicking() {
            assert!(leftovers.is_empty(), "{leftovers:?}");
        }
    }
}

fn send(netns: &OwnedFd, request: &Request) -> Response {
    let target = Address::Tcp(SocketAddr::from((GUEST, probe_guest::PORT)));
    netns::run_in(netns.as_fd(), || {
        let mut connection = Connection::connect(&target, Peer::GUEST, soon()).unwrap();
        connection.exchange(request, &[], soon()).unwrap()
    })
    .unwrap()
}

fn api_connection(stream: UnixStream) -> Connection {
    Connection::over(Stream::from_connected(stream).unwrap(), Peer::VMM).unwrap()
}

fn run(command: &mut Command) -> Result<(), String> {
    let output = command
        .output()
        .map_err(|error| format!("{}: {error}", command.get_program().display()))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!(
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    ))
}
