//! What tests inside the test machine (`tests/vm`) stand on: a namespace with a tap, a
//! Linux guest under real Cloud Hypervisor started by hand, and a look into the guest.
//!
//! What a test judges by is done with the tools an operator would use (`ip`, the command line
//! of Cloud Hypervisor, plain HTTP) and not with the code under test.
#![allow(dead_code, reason = "each test binary uses its part of it")]

pub(crate) mod restored;

use std::ffi::OsStr;
use std::fs;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rewake::vm_config::{
    BalloonConfig, ConsoleConfig, CpusConfig, DiskConfig, MemoryConfig, NetConfig, PayloadConfig,
    SerialConfig, VmConfig, VsockConfig,
};
use serde_json::Value;

/// The address of the guest, its gateway on the tap, and the ports in it.
pub(crate) const GUEST: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 21);
pub(crate) const GATEWAY: &str = "169.254.0.22/30";
pub(crate) const GUEST_MAC: &str = "02:fc:00:00:00:05";
pub(crate) const AGENT_PORT: u16 = 49983;
pub(crate) const SHELL_PORT: u16 = 8080;

pub(crate) const GUEST_KERNEL: &str = "/guest/vmlinuz";
pub(crate) const GUEST_INITRD: &str = "/guest/initrd";
pub(crate) const GUEST_MEMORY_BYTES: u64 = 256 << 20;

/// The processor is emulated twice over: limits that would be generous on any other machine.
pub(crate) const BOOT_LIMIT: Duration = Duration::from_secs(90);
pub(crate) const STEP_LIMIT: Duration = Duration::from_secs(30);

/// Whether this is the test machine; says aloud that the test is skipped where it is not.
#[must_use]
pub(crate) fn inside(test: &str) -> bool {
    let inside = std::env::var_os("REWAKE_TEST_MACHINE").is_some();
    if !inside {
        eprintln!("SKIP {test}: not inside the test machine (tests/vm/run-tests)");
    }
    inside
}

/// The same for tests that need Cloud Hypervisor and a guest for it.
#[must_use]
pub(crate) fn inside_with_vmm(test: &str) -> bool {
    if !inside(test) {
        return false;
    }
    let missing = [
        vmm_path().as_path(),
        Path::new(GUEST_KERNEL),
        Path::new("/dev/kvm"),
    ]
    .into_iter()
    .find(|path| !path.exists())
    .map(Path::to_owned);
    if let Some(missing) = &missing {
        eprintln!("SKIP {test}: the test machine has no {}", missing.display());
    }
    missing.is_none()
}

#[must_use]
pub(crate) fn vmm_path() -> PathBuf {
    "/usr/local/bin/cloud-hypervisor".into()
}

/// Runs a command to its end; its output, or a panic that shows all of it.
pub(crate) fn run<S: AsRef<OsStr>>(
    program: &str,
    arguments: impl IntoIterator<Item = S>,
) -> String {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null());
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn words(line: &str) -> Vec<&str> {
    line.split_whitespace().collect()
}

/// A directory of the test's own on the scratch disk, removed in the end.
#[derive(Debug)]
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    pub(crate) fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("rewake-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    #[must_use]
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    #[must_use]
    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// A raw image of this size with an empty ext4 in it.
    pub(crate) fn disk(&self, name: &str, bytes: u64) -> PathBuf {
        let path = self.join(name);
        fs::File::create(&path).unwrap().set_len(bytes).unwrap();
        run(
            "mke2fs",
            [
                OsStr::new("-q"),
                OsStr::new("-t"),
                OsStr::new("ext4"),
                path.as_os_str(),
            ],
        );
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A named network namespace with `tap0` in it, as a slot has it.
#[derive(Debug)]
pub(crate) struct Namespace(String);

impl Namespace {
    pub(crate) fn new(name: &str) -> Self {
        let _ = Command::new("ip")
            .args(["netns", "del", name])
            .stderr(Stdio::null())
            .status();
        run("ip", ["netns", "add", name]);
        let namespace = Self(name.to_owned());
        for line in [
            "link set lo up".to_owned(),
            "tuntap add tap0 mode tap vnet_hdr".to_owned(),
            "link set tap0 address 02:fc:00:00:00:06".to_owned(),
            format!("address add {GATEWAY} dev tap0"),
            "link set tap0 up".to_owned(),
            format!("neighbour replace {GUEST} lladdr {GUEST_MAC} nud permanent dev tap0"),
        ] {
            run("ip", ["-n", name].into_iter().chain(words(&line)));
        }
        namespace
    }

    /// One that somebody else made, and removes.
    pub(crate) fn existing(name: &str) -> std::mem::ManuallyDrop<Self> {
        std::mem::ManuallyDrop::new(Self(name.to_owned()))
    }

    #[must_use]
    pub(crate) fn name(&self) -> &str {
        &self.0
    }

    /// Connects to the guest from inside the namespace.
    pub(crate) fn connect(&self, port: u16) -> io::Result<TcpStream> {
        let netns = rewake_sys::netns::open(&rewake_sys::netns::named_path(&self.0)).unwrap();
        let address = SocketAddr::from((GUEST, port));
        let limit = Duration::from_secs(2);
        rewake_sys::netns::run_in(netns.as_fd(), || {
            TcpStream::connect_timeout(&address, limit)
        })
        .unwrap()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}

/// One HTTP exchange on a connection of its own; status and body.
fn exchange(
    mut stream: impl Read + Write,
    method: &str,
    target: &str,
    body: &[u8],
) -> io::Result<(u16, Vec<u8>)> {
    let head = format!(
        "{method} {target} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(&[head.as_bytes(), body].concat())?;
    let mut answer = Vec::new();
    let mut chunk = [0; 4096];
    // Cloud Hypervisor never closes: the answer ends where its length says.
    loop {
        if let Some((status, from, length)) = parsed_head(&answer) {
            let complete =
                length.is_some_and(|length| answer.len() >= from + length) || status == 204;
            if complete {
                return Ok((status, answer.split_off(from)));
            }
        }
        match stream.read(&mut chunk)? {
            0 => break,
            read => answer.extend_from_slice(&chunk[..read]),
        }
    }
    match parsed_head(&answer) {
        Some((status, from, _)) => Ok((status, answer.split_off(from))),
        None => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "no answer")),
    }
}

fn parsed_head(answer: &[u8]) -> Option<(u16, usize, Option<usize>)> {
    let from = answer.windows(4).position(|window| window == b"\r\n\r\n")? + 4;
    let head = String::from_utf8_lossy(&answer[..from]).to_ascii_lowercase();
    let status = head.split_whitespace().nth(1)?.parse().ok()?;
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("content-length:"))
        .and_then(|value| value.trim().parse().ok());
    Some((status, from, length))
}

/// A look into the guest behind a namespace's tap.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Guest<'a>(pub(crate) &'a Namespace);

impl Guest<'_> {
    /// One request to a port of the guest.
    pub(crate) fn request(
        &self,
        port: u16,
        method: &str,
        target: &str,
        body: &[u8],
    ) -> io::Result<(u16, Vec<u8>)> {
        let stream = self.0.connect(port)?;
        stream.set_read_timeout(Some(STEP_LIMIT))?;
        exchange(stream, method, target, body)
    }

    /// Waits until a GET is answered with 200 or 204 and something in the body or not.
    pub(crate) fn await_answer(&self, port: u16, target: &str, limit: Duration) -> Vec<u8> {
        let start = Instant::now();
        loop {
            match self.request(port, "GET", target, b"") {
                Ok((200 | 204, body)) => return body,
                other => assert!(
                    start.elapsed() < limit,
                    "no answer to {target} on port {port}: {other:?}; log of the agent: {:?}",
                    self.request(SHELL_PORT, "GET", "/agent.log", b"")
                        .map(|(_, body)| String::from_utf8_lossy(&body).into_owned())
                ),
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn text(&self, target: &str) -> String {
        let body = self.await_answer(SHELL_PORT, target, STEP_LIMIT);
        String::from_utf8(body).unwrap().trim().to_owned()
    }

    /// Made from random bytes when the guest booted, kept in memory only.
    #[must_use]
    pub(crate) fn nonce(&self) -> String {
        let nonce = self.text("/nonce");
        assert_eq!(nonce.len(), 16, "the guest's nonce: {nonce:?}");
        nonce
    }

    /// Ten times a second one more since the boot, in memory only.
    #[must_use]
    pub(crate) fn counter(&self) -> u64 {
        // The file is empty for the moment between truncation and write.
        for _ in 0..100 {
            if let Ok(count) = self.text("/counter").parse() {
                return count;
            }
        }
        panic!("the guest's counter cannot be read");
    }

    /// Waits until the counter is above `count`.
    pub(crate) fn await_counter_above(&self, count: u64) -> u64 {
        let start = Instant::now();
        loop {
            let now = self.counter();
            if now > count {
                return now;
            }
            assert!(
                start.elapsed() < STEP_LIMIT,
                "the guest's counter stands at {now}"
            );
        }
    }

    /// Runs a script in the guest; its output, or a panic that shows it.
    pub(crate) fn shell(&self, script: &str) -> String {
        let (status, body) = self
            .request(SHELL_PORT, "POST", "/cgi-bin/sh", script.as_bytes())
            .unwrap();
        let text = String::from_utf8_lossy(&body).into_owned();
        let (output, code) = text
            .trim_end()
            .rsplit_once("\nexit ")
            .unwrap_or((&text, "unknown"));
        assert!(
            status == 200 && code == "0",
            "{script}\nin the guest: {status}, exit {code}\n{output}"
        );
        output.trim_end().to_owned()
    }

    /// Four MiB of random bytes in memory still have the checksum of the boot.
    pub(crate) fn check_pattern(&self) {
        let wanted = self.text("/pattern");
        assert_eq!(
            self.shell("sha256sum /run/pattern").trim(),
            wanted,
            "memory of the guest was lost"
        );
    }
}

/// A request to the API of a Cloud Hypervisor, spoken by hand; the body on success.
pub(crate) fn api(socket: &Path, method: &str, operation: &str, body: &str) -> Value {
    let stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(STEP_LIMIT)).unwrap();
    let (status, answer) = exchange(
        stream,
        method,
        &format!("/api/v1/{operation}"),
        body.as_bytes(),
    )
    .unwrap();
    let text = String::from_utf8_lossy(&answer);
    assert!((200..300).contains(&status), "{operation}: {status} {text}");
    serde_json::from_str(&text).unwrap_or(Value::Null)
}

/// A Cloud Hypervisor started by hand with these options, in a namespace.
#[derive(Debug)]
pub(crate) struct Vm {
    child: Child,
    socket: PathBuf,
    log: PathBuf,
}

impl Vm {
    /// Starts it and waits for the API.
    pub(crate) fn start(namespace: &Namespace, scratch: &Scratch, options: &[String]) -> Self {
        let socket = scratch.join("by-hand.sock");
        let log = scratch.join("by-hand.log");
        let _ = fs::remove_file(&socket);
        let mut command = Command::new("ip");
        command
            .args(["netns", "exec", namespace.name()])
            .arg(vmm_path());
        command.arg("--api-socket").arg(&socket).args(options);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(fs::File::create(&log).unwrap());
        let child = command.spawn().unwrap();
        let mut vm = Self { child, socket, log };
        let start = Instant::now();
        while UnixStream::connect(&vm.socket).is_err() {
            let ended = vm.child.try_wait().unwrap();
            assert!(
                ended.is_none() && start.elapsed() < STEP_LIMIT,
                "no API, {ended:?}: {}",
                vm.log()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        vm
    }

    #[must_use]
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    #[must_use]
    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    pub(crate) fn api(&self, method: &str, operation: &str, body: &str) -> Value {
        api(&self.socket, method, operation, body)
    }

    /// Pauses it and writes a snapshot into a fresh directory.
    pub(crate) fn snapshot(&self, directory: &Path) {
        fs::create_dir_all(directory).unwrap();
        self.api("PUT", "vm.pause", "");
        let body =
            serde_json::json!({ "destination_url": format!("file://{}", directory.display()) });
        self.api("PUT", "vm.snapshot", &body.to_string());
    }

    /// Ends it as an operator would.
    pub(crate) fn shut_down(mut self) {
        self.api("PUT", "vmm.shutdown", "");
        let start = Instant::now();
        while self.child.try_wait().unwrap().is_none() {
            assert!(
                start.elapsed() < STEP_LIMIT,
                "still there after vmm.shutdown: {}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("log of Cloud Hypervisor:\n{}", self.log());
        }
    }
}

/// The kernel command line of the guest.
pub(crate) const GUEST_COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1 rdinit=/init";

/// The plain options with which somebody who never heard of rewake starts such a VM.
#[must_use]
pub(crate) fn plain_options(disk: &Path, scratch: &Scratch) -> Vec<String> {
    let scratch = scratch.path().display();
    [
        ["--kernel", GUEST_KERNEL],
        ["--initramfs", GUEST_INITRD],
        ["--cmdline", GUEST_COMMAND_LINE],
        ["--cpus", "boot=1"],
        ["--memory", "size=256M"],
        ["--disk", &format!("path={}", disk.display())],
        ["--net", &format!("tap=tap0,mac={GUEST_MAC}")],
        ["--balloon", "size=32M"],
        ["--vsock", &format!("cid=3,socket={scratch}/vsock")],
        ["--serial", &format!("file={scratch}/serial")],
        ["--console", "off"],
    ]
    .concat()
    .into_iter()
    .map(str::to_owned)
    .collect()
}

/// The same VM as rewake's own types say it: image type given, consoles off, balloon empty.
pub(crate) fn guest_config(disk: &Path, scratch: &Scratch) -> VmConfig {
    VmConfig {
        cpus: CpusConfig {
            boot_vcpus: 1,
            max_vcpus: 1,
            ..CpusConfig::default()
        },
        memory: MemoryConfig {
            size: GUEST_MEMORY_BYTES,
            ..MemoryConfig::default()
        },
        payload: Some(PayloadConfig {
            kernel: Some(GUEST_KERNEL.into()),
            initramfs: Some(GUEST_INITRD.into()),
            cmdline: Some(GUEST_COMMAND_LINE.to_owned()),
            ..PayloadConfig::default()
        }),
        disks: Some(vec![DiskConfig::raw(disk)]),
        net: Some(vec![NetConfig {
            tap: Some("tap0".to_owned()),
            mac: Some(GUEST_MAC.parse().unwrap()),
            ..NetConfig::default()
        }]),
        balloon: Some(BalloonConfig::default()),
        vsock: Some(VsockConfig {
            id: None,
            iommu: false,
            pci_segment: 0,
            pci_device_id: None,
            cid: 3,
            socket: scratch.join("vsock"),
        }),
        serial: SerialConfig::OFF,
        console: ConsoleConfig::OFF,
        ..VmConfig::default()
    }
}
