//! What a VM holds on the host: disks with their locks, taps, sockets, console files.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use rewake_sys::tun::{Tap, TapOptions};
use serde_json::{Value, json};

use super::config::{mac, mac_text};
use super::ram::Chain;
use super::release::Release;

/// Length of the virtio header that Cloud Hypervisor sets on its taps.
const VNET_HEADER: u32 = 12;

/// A disk that is open.
#[derive(Debug)]
struct Disk {
    file: File,
    path: String,
    readonly: bool,
    whole: bool,
}

/// A vsock socket in the file system, removed on an orderly end.
#[derive(Debug)]
struct Vsock {
    path: PathBuf,
    _listener: UnixListener,
}

impl Drop for Vsock {
    fn drop(&mut self) {
        // Somebody else may have removed it.
        let _gone = std::fs::remove_file(&self.path);
    }
}

/// Everything that is open on behalf of one VM.
#[derive(Debug, Default)]
pub(super) struct Devices {
    disks: Vec<Disk>,
    _vsock: Option<Vsock>,
    /// The tap of the first network device; taken by the guest.
    pub(super) tap: Option<OwnedFd>,
    _other_taps: Vec<OwnedFd>,
}

fn chain(parts: &[&str], error: &io::Error) -> Chain {
    let mut chain: Chain = parts.iter().map(|part| (*part).to_owned()).collect();
    chain.push(error.to_string());
    chain
}

impl Devices {
    /// Opens everything in the order of the original: disks, network, rng, vsock.
    ///
    /// `fds` are descriptors for network devices, in order. The MAC addresses of taps are
    /// noted in `config`, as the original does.
    pub(super) fn open(
        config: &mut Value,
        fds: Vec<(String, Vec<OwnedFd>)>,
    ) -> Result<Self, Chain> {
        let mut devices = Self::default();
        for disk in config["disks"].as_array().into_iter().flatten() {
            devices.disks.push(open_disk(disk)?);
        }
        let mut fds = fds;
        for net in super::config::list_mut(config, "net") {
            let id = net["id"].as_str().unwrap_or_default().to_owned();
            let own = fds.iter().position(|(owner, _)| *owner == id);
            let own = own
                .map(|index| fds.swap_remove(index).1)
                .unwrap_or_default();
            let taps = open_net(net, own)?;
            for tap in taps {
                if devices.tap.is_none() {
                    devices.tap = Some(tap);
                } else {
                    devices._other_taps.push(tap);
                }
            }
        }
        if let Some(source) = config["rng"]["src"].as_str() {
            File::open(source).map_err(|error| {
                chain(
                    &[
                        "Error from device manager",
                        "Cannot create virtio-rng device",
                    ],
                    &error,
                )
            })?;
        }
        if let Some(path) = config["vsock"]["socket"].as_str() {
            let listener = UnixListener::bind(path).map_err(|error| {
                let parts = [
                    "Error from device manager",
                    "Cannot create virtio-vsock backend",
                    "Error binding to the host-side Unix socket",
                ];
                chain(&parts, &error)
            })?;
            let path = path.into();
            devices._vsock = Some(Vsock {
                path,
                _listener: listener,
            });
        }
        Ok(devices)
    }

    /// Takes the advisory locks (`virtio-devices/src/block.rs`): of the open file
    /// description, exclusive for writable disks.
    pub(super) fn lock_disks(&self) -> Result<(), Chain> {
        for disk in &self.disks {
            lock(disk).map_err(|_| {
                let kind = if disk.readonly { "Read" } else { "Write" };
                vec![
                    "Error locking disk images: Another instance likely holds a lock".to_owned(),
                    "Cannot lock images of all block devices".to_owned(),
                    format!("Failed to get {kind} lock for disk image: {}", disk.path),
                    "The file is already locked".to_owned(),
                ]
            })?;
        }
        Ok(())
    }

    /// Opens and locks one more disk.
    pub(super) fn add_disk(&mut self, disk: &Value) -> Result<(), Chain> {
        self.disks.push(open_disk(disk)?);
        self.lock_disks()
    }

    /// Opens one more network device, which nothing in the guest drives.
    pub(super) fn add_net(&mut self, net: &mut Value, fds: Vec<OwnedFd>) -> Result<(), Chain> {
        self._other_taps.extend(open_net(net, fds)?);
        Ok(())
    }
}

fn open_disk(disk: &Value) -> Result<Disk, Chain> {
    let path = disk["path"].as_str().unwrap_or_default().to_owned();
    let readonly = disk["readonly"].as_bool().unwrap_or(false);
    let failed = |error: io::Error| {
        let op = format!("I/O error (path={path} op=open)");
        chain(
            &["Error from device manager", "Cannot open disk path", &op],
            &error,
        )
    };
    let opened = File::options().read(true).write(!readonly).open(&path);
    let file = opened.map_err(failed)?;
    let meta = file.metadata().map_err(failed)?;
    if meta.is_file() && meta.len() == 0 {
        return Err(failed(io::ErrorKind::UnexpectedEof.into()));
    }
    Ok(Disk {
        whole: disk["lock_granularity"] == "Full" || meta.file_type().is_block_device(),
        file,
        path,
        readonly,
    })
}

fn lock(disk: &Disk) -> nix::Result<()> {
    let length = disk.file.metadata().map_or(0, |meta| meta.len());
    let flock = libc::flock {
        l_type: if disk.readonly {
            libc::F_RDLCK
        } else {
            libc::F_WRLCK
        } as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        // Zero: to the end, whatever that will be.
        l_len: if disk.whole { 0 } else { length as libc::off_t },
        l_pid: 0,
    };
    fcntl(disk.file.as_fd(), FcntlArg::F_OFD_SETLK(&flock)).map(drop)
}

/// Takes an exclusive lock on a whole file, as `--api-socket path=` does on its lock file.
pub(super) fn lock_file(file: &File) -> io::Result<()> {
    let flock = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&flock))?;
    Ok(())
}

fn open_net(net: &mut Value, fds: Vec<OwnedFd>) -> Result<Vec<OwnedFd>, Chain> {
    const PARTS: [&str; 4] = [
        "Error from device manager",
        "Cannot create virtio-net device",
        "Failed to open taps",
        "Open tap device failed",
    ];
    let os_error = |error: rewake_sys::CallError| io::Error::from_raw_os_error(error.errno());
    if !fds.is_empty() {
        let adopt = |fd: OwnedFd| {
            let tap = Tap::adopt(fd);
            // What is no tap shows itself later, as in the original.
            let _accepted = tap.set_vnet_header_len(VNET_HEADER);
            tap.into_fd()
        };
        return Ok(fds.into_iter().map(adopt).collect());
    }
    if net["vhost_user"] == true {
        return Ok(Vec::new());
    }
    let name = net["tap"].as_str().unwrap_or("vmtap%d").to_owned();
    let pairs = net["num_queues"].as_u64().unwrap_or(2) / 2;
    let options = TapOptions {
        vnet_header: true,
        multi_queue: pairs > 1,
    };
    let mut taps = Vec::new();
    for _ in 0..pairs.max(1) {
        let tap = Tap::open(&name, options).map_err(|error| {
            let parts = [&PARTS[..], &["Unable to configure tap interface"]].concat();
            chain(&parts, &os_error(error))
        })?;
        let configured = tap
            .set_vnet_header_len(VNET_HEADER)
            .and_then(|()| tap.set_offload(0))
            .and_then(|()| configure_mac(&tap, net))
            .and_then(|()| tap.bring_up());
        configured.map_err(|error| chain(&PARTS, &os_error(error)))?;
        taps.push(tap.into_fd());
    }
    Ok(taps)
}

/// Pushes `host_mac` onto the tap, or notes the tap's own.
fn configure_mac(tap: &Tap, net: &mut Value) -> Result<(), rewake_sys::CallError> {
    let present = tap.hardware_address()?;
    match net["host_mac"].as_str().and_then(mac) {
        Some(wanted) if wanted != present => tap.set_hardware_address(wanted),
        Some(_) => Ok(()),
        None => {
            net["host_mac"] = json!(mac_text(present));
            Ok(())
        }
    }
}

/// Creates or truncates the files of serial and console.
pub(super) fn open_consoles(config: &Value) -> Result<(), Chain> {
    for key in ["serial", "console", "debug_console"] {
        let device = &config[key];
        if device["mode"] != "File" {
            continue;
        }
        let path = Path::new(device["file"].as_str().unwrap_or_default());
        File::create(path).map_err(|error| {
            chain(
                &[
                    "Error creating console devices",
                    "Error creating console device",
                ],
                &error,
            )
        })?;
    }
    Ok(())
}

/// One entry of the device tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Device {
    pub(super) id: String,
    pub(super) kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Console,
    Disk,
    Net,
    Rng,
    Vsock,
    Balloon,
    Watchdog,
}

/// The PCI devices of a configuration, in the order of their slots.
pub(super) fn pci_devices(config: &Value) -> Vec<Device> {
    let mut devices = Vec::new();
    let mut push = |id: &str, kind| {
        let id = id.to_owned();
        devices.push(Device { id, kind });
    };
    if config["console"]["mode"] != "Off" {
        push("__console", Kind::Console);
    }
    for (key, kind) in [("disks", Kind::Disk), ("net", Kind::Net)] {
        for device in config[key].as_array().into_iter().flatten() {
            push(device["id"].as_str().unwrap_or_default(), kind);
        }
    }
    push("__rng", Kind::Rng);
    if let Some(id) = config["vsock"]["id"].as_str() {
        push(id, Kind::Vsock);
    }
    if config["balloon"].is_object() {
        push("__balloon", Kind::Balloon);
    }
    if config["watchdog"] == true {
        push("__watchdog", Kind::Watchdog);
    }
    devices
}

/// `device_tree` of `vm.info` and of the device manager's state.
pub(super) fn device_tree(config: &Value, release: Release) -> Value {
    // Where captures of v52 and v53 have the first BARs.
    let (mut base, step) = if release.number() >= 53 {
        (70_368_735_789_056_u64, 8_388_608)
    } else {
        (70_368_742_080_512, 524_288)
    };
    let mut low = 3_891_789_824_u64;
    let mut tree = serde_json::Map::new();
    let mut put = |node: Value| {
        let id = node["id"].as_str().unwrap_or_default().to_owned();
        tree.insert(id, node);
    };
    let nulls = release.writes_nulls();
    let node =
        |id: &str, resources: Value, parent: Option<&str>, children: Value, bdf: Option<String>| {
            let mut node = json!({"id": id, "resources": resources, "children": children});
            if parent.is_some() || nulls {
                node["parent"] = json!(parent);
            }
            if bdf.is_some() || nulls {
                node["pci_bdf"] = json!(bdf);
            }
            node
        };
    put(node("__ioapic", json!([]), None, json!([]), None));
    if config["serial"]["mode"] != "Off" {
        put(node("__serial", json!([]), None, json!([]), None));
    }
    for (index, device) in pci_devices(config).into_iter().enumerate() {
        let (at, kind) = if device.kind == Kind::Disk {
            low -= 524_288;
            (low + 524_288, "Mmio32")
        } else {
            base -= step;
            (base + step, "Mmio64")
        };
        let bar = json!([{"PciBar": {"index": 0, "base": at, "size": 524_288, "type_": kind, "prefetchable": false}}]);
        let id = &device.id;
        let function = format!("_virtio-pci-{id}");
        let bdf = format!("0000:00:{:02x}.0", index + 1);
        put(node(&function, bar, None, json!([id]), Some(bdf)));
        put(node(id, json!([]), Some(&function), json!([]), None));
    }
    Value::Object(tree)
}
