//! The VMM: its one VM, the states it can be in, and what every operation does to it.
//!
//! Errors are the chains that v53 answers with, reproduced from runs of the real binary;
//! where several are possible, the order of checks is that of `vmm/src/lib.rs`.

mod change;
mod restore;
mod save;

use std::fs::File;
use std::io;
use std::rc::Rc;
use std::time::{Duration, Instant};

use mio::Registry;
use mio::event::Event;
use mio::net::TcpListener;
use serde_json::{Value, json};

use crate::sim::cli::Tuning;
use crate::sim::config::{self, Memory};
use crate::sim::devices::{self, Devices, Kind, device_tree, pci_devices};
use crate::sim::fault::What;
use crate::sim::guest::{BootWords, Guest, Wire};
use crate::sim::ram::{Chain, Ram};
use crate::sim::report::{Level, Log, Monitor};
use crate::wire::reactor::{TokenRange, earliest};

/// Why a request is refused: its status and its chain, outermost first.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) status: u16,
    pub(super) chain: Chain,
}

pub(super) use change::Resize;
pub(super) use restore::{RestoreConfig, RestoreMode};

pub(super) type Outcome = Result<Option<Value>, Refusal>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Created,
    Running,
    Paused,
}

/// A VM that exists.
struct Vm {
    state: State,
    ram: Ram,
    guest: Option<Guest>,
    devices: Devices,
    active: Vec<String>,
    device_ids: u64,
    /// Events that the guest's drivers cause once it runs.
    activating: Vec<String>,
    catch_up: bool,
}

/// The VMM of one process.
pub(super) struct Vmm {
    pub(super) tuning: Tuning,
    pub(super) log: Rc<Log>,
    pub(super) monitor: Rc<Monitor>,
    registry: Registry,
    tokens: TokenRange,
    loopback: Option<Rc<TcpListener>>,
    config: Option<Value>,
    vm: Option<Vm>,
    /// The status to end with, once it is time.
    pub(super) exit: Option<u8>,
    filled_at: Instant,
    /// The last operation never comes back.
    pub(super) stuck: bool,
}

impl Vmm {
    pub(super) fn new(
        tuning: Tuning,
        log: Rc<Log>,
        monitor: Rc<Monitor>,
        registry: Registry,
        tokens: TokenRange,
        loopback: Option<TcpListener>,
    ) -> io::Result<Self> {
        let mut loopback = loopback;
        if let Some(listener) = &mut loopback {
            registry.register(listener, tokens.token(0), mio::Interest::READABLE)?;
        }
        Ok(Self {
            tuning,
            log,
            monitor,
            registry,
            tokens,
            loopback: loopback.map(Rc::new),
            config: None,
            vm: None,
            exit: None,
            filled_at: Instant::now(),
            stuck: false,
        })
    }

    fn refuse<T>(&self, what: &str, chain: Chain) -> Result<T, Refusal> {
        let missing = matches!(
            chain.last().map(String::as_str),
            Some("VM is not created" | "VM config is missing")
        );
        let mut full = vec!["Error from API".to_owned(), what.to_owned()];
        full.extend(chain);
        Err(Refusal {
            status: if missing {
                self.tuning.release.missing_vm_status()
            } else {
                500
            },
            chain: full,
        })
    }

    fn refuse_with<T>(&self, what: &str, reason: &str) -> Result<T, Refusal> {
        self.refuse(what, vec![reason.to_owned()])
    }

    pub(super) fn on_event(&mut self, event: &Event) {
        if let Some(guest) = self.vm.as_mut().and_then(|vm| vm.guest.as_mut()) {
            guest.on_event(event);
        }
    }

    /// Lets the guest and the background fill go on; when to be called again.
    pub(super) fn run(&mut self, now: Instant) -> Option<Instant> {
        let Some(vm) = &mut self.vm else { return None };
        let mut wake = None;
        if vm.ram.is_incomplete() && self.tuning.release.fills_in_background() {
            let pace = Duration::from_millis(1);
            let passed = now.saturating_duration_since(self.filled_at).as_millis() as u64;
            if passed > 0 {
                self.filled_at = now;
                let pages = self.tuning.fill_pages_per_ms * passed.min(100);
                if let Err(error) = vm.ram.fetch_some(pages) {
                    self.log.say(
                        Level::Warn,
                        &format!("uffd: background prefault given up: {error}"),
                    );
                }
            }
            wake = Some(now + pace);
        }
        if vm.state != State::Running {
            return wake;
        }
        for id in std::mem::take(&mut vm.activating) {
            self.monitor
                .emit("virtio-device", "activated", json!({"id": id}));
            vm.active.push(id);
        }
        let guest = vm.guest.as_mut()?;
        let faults = &self.tuning.faults;
        if faults.standing("guest").contains(&What::Crash) {
            self.log
                .say(Level::Error, "VCPU generated error: ordered to crash");
            self.exit = Some(0);
            return None;
        }
        match guest.run(&mut vm.ram, faults, &self.registry, now) {
            Ok(next) => earliest([wake, next]),
            Err(error) => {
                // A vCPU that cannot read its memory ends the process, with status 0.
                self.log
                    .say(Level::Error, &format!("VCPU generated error: {error}"));
                self.exit = Some(0);
                None
            }
        }
    }

    pub(super) fn ping(&self) -> Value {
        json!({
            "build_version": self.tuning.release.build_version(),
            "version": self.tuning.release.version(),
            "pid": std::process::id(),
            "features": ["io_uring", "kvm"],
        })
    }

    pub(super) fn info(&self) -> Outcome {
        let Some(config) = &self.config else {
            return self.refuse_with("The VM info is not available", "VM is not created");
        };
        // A guest without the driver gives nothing up.
        let inflated = |vm: &Vm| vm.active.iter().any(|id| id == "__balloon");
        let balloon = match self.vm.as_ref().filter(|vm| inflated(vm)) {
            Some(_) => config["balloon"]["size"].as_u64().unwrap_or(0),
            None => 0,
        };
        let total = self
            .vm
            .as_ref()
            .map_or_else(|| Memory::of(config).total(), |vm| vm.ram.total());
        let state = self.vm.as_ref().map_or(State::Created, |vm| vm.state);
        let mut info = json!({
            "config": config,
            "state": format!("{state:?}"),
            "memory_actual_size": total.saturating_sub(balloon),
        });
        if self.vm.is_some() {
            info["device_tree"] = device_tree(config, self.tuning.release);
        } else if self.tuning.release.writes_nulls() {
            info["device_tree"] = Value::Null;
        }
        Ok(Some(info))
    }

    pub(super) fn counters(&self) -> Outcome {
        let (Some(config), Some(_)) = (&self.config, &self.vm) else {
            return self.refuse_with("The VM info is not available", "VM is not running");
        };
        let mut counters = serde_json::Map::new();
        for device in pci_devices(config) {
            let zeros = |names: &[&str]| -> Value {
                names
                    .iter()
                    .map(|name| ((*name).to_owned(), json!(0)))
                    .collect::<serde_json::Map<_, _>>()
                    .into()
            };
            let values = match device.kind {
                Kind::Disk => zeros(&["read_bytes", "read_ops", "write_bytes", "write_ops"]),
                Kind::Net => zeros(&["rx_bytes", "rx_frames", "tx_bytes", "tx_frames"]),
                _ => continue,
            };
            counters.insert(device.id, values);
        }
        Ok(Some(Value::Object(counters)))
    }

    pub(super) fn create(&mut self, body: &Value) -> Outcome {
        const WHAT: &str = "The VM could not be created";
        let mut config = match config::complete(body, self.tuning.release) {
            Ok(config) => config,
            Err(reason) => {
                let chain = vec!["Failed to deserialize JSON".to_owned(), reason];
                return Err(Refusal { status: 400, chain });
            }
        };
        if self.config.is_some() {
            return self.refuse_with(WHAT, "VM is already created");
        }
        // Descriptors in the JSON mean nothing here.
        for net in config::list_mut(&mut config, "net") {
            if let Some(net) = net.as_object_mut() {
                net.remove("fds");
            }
        }
        if let Err(chain) = devices::open_consoles(&config) {
            return self.refuse(WHAT, chain);
        }
        self.config = Some(config);
        Ok(None)
    }

    pub(super) fn boot(&mut self, now: Instant) -> Outcome {
        const WHAT: &str = "The VM could not boot";
        if self.vm.is_some() {
            return self.refuse_with(WHAT, "VM is already created");
        }
        self.monitor.vm("booting");
        let Some(mut config) = self.config.clone() else {
            return self.refuse_with(WHAT, "VM config is missing");
        };
        match self.build(&mut config) {
            Ok(vm) => {
                self.config = Some(config.clone());
                self.vm = Some(vm);
            }
            Err(chain) => return self.refuse(WHAT, chain),
        }
        for key in ["firmware", "kernel", "initramfs"] {
            let Some(path) = config["payload"][key].as_str() else {
                continue;
            };
            if let Err(error) = File::open(path) {
                // The VM stays, as in the original.
                let reason = format!("Cannot open {key} file");
                return self.refuse(WHAT, vec![reason, error.to_string()]);
            }
        }
        if let Err(error) = self.power_on(&config, now) {
            return self.refuse(WHAT, vec![error.to_string()]);
        }
        self.monitor.vm("booted");
        Ok(None)
    }

    fn build(&mut self, config: &mut Value) -> Result<Vm, Chain> {
        invalid(config::validate(config))?;
        let ram = Ram::fresh(&Memory::of(config))?;
        let random = || {
            let [a, b, c, ..] = *uuid::Uuid::new_v4().as_bytes();
            [a, b, c]
        };
        let device_ids = config::assign_ids(config, random);
        let devices = Devices::open(config, Vec::new())?;
        devices.lock_disks()?;
        Ok(Vm {
            state: State::Created,
            ram,
            guest: None,
            devices,
            active: Vec::new(),
            device_ids,
            activating: Vec::new(),
            catch_up: true,
        })
    }

    /// The guest's first instruction.
    fn power_on(&mut self, config: &Value, now: Instant) -> io::Result<()> {
        let cmdline = config["payload"]["cmdline"].as_str().unwrap_or_default();
        let mac = config["net"][0]["mac"].as_str().and_then(config::mac);
        let mut words = BootWords::of(cmdline, mac);
        words.pattern_pages = self.tuning.pattern_pages;
        words.dialect = self.tuning.dialect.unwrap_or(words.dialect);
        let wire = self.wire();
        let Some(vm) = &mut self.vm else {
            return Ok(());
        };
        let has_drivers = matches!(wire, Wire::Tap(_));
        let mut guest = Guest::boot(&mut vm.ram, &words, wire, &self.registry, self.tokens)?;
        guest.set_faults(&self.tuning.faults);
        guest.start(&mut vm.ram, true, now)?;
        vm.guest = Some(guest);
        vm.state = State::Running;
        if has_drivers {
            vm.activating = driven(config);
        }
        Ok(())
    }

    fn wire(&mut self) -> Wire {
        match self.vm.as_mut().and_then(|vm| vm.devices.tap.take()) {
            Some(tap) => Wire::Tap(tap),
            None => self.loopback.clone().map_or(Wire::None, Wire::Loopback),
        }
    }

    pub(super) fn pause(&mut self) -> Outcome {
        const WHAT: &str = "The VM could not be paused";
        let Some(vm) = &mut self.vm else {
            return self.refuse_with(WHAT, "VM is not running");
        };
        self.monitor.vm("pausing");
        if vm.state == State::Paused {
            return self.refuse(
                WHAT,
                transition(
                    "Cannot pause VM",
                    "Failed to pause migratable component",
                    "Paused",
                    "Paused",
                ),
            );
        }
        if let Some(guest) = &mut vm.guest
            && let Err(error) = guest.stop(&mut vm.ram)
        {
            return self.refuse(WHAT, vec![error.to_string()]);
        }
        vm.state = State::Paused;
        vm.catch_up = self.tuning.release.advances_clock();
        self.monitor.vm("paused");
        Ok(None)
    }

    pub(super) fn resume(&mut self, now: Instant) -> Outcome {
        const WHAT: &str = "The VM could not resume";
        let Some(vm) = &mut self.vm else {
            return self.refuse_with(WHAT, "VM is not running");
        };
        self.monitor.vm("resuming");
        if vm.state != State::Paused {
            let from = format!("{:?}", vm.state);
            return self.refuse(
                WHAT,
                transition(
                    "Cannot resume VM",
                    "Failed to resume migratable component",
                    &from,
                    "Running",
                ),
            );
        }
        if let Some(guest) = &mut vm.guest
            && let Err(error) = guest.start(&mut vm.ram, vm.catch_up, now)
        {
            return self.refuse(WHAT, vec![error.to_string()]);
        }
        vm.state = State::Running;
        self.monitor.vm("resumed");
        Ok(None)
    }

    /// Operations of a VM that runs which have nothing to do here.
    pub(super) fn needs_running(&self, what: &str) -> Outcome {
        match self.vm {
            Some(_) => Ok(None),
            None => self.refuse_with(what, "VM is not running"),
        }
    }

    /// Operations that need a VM and are not played.
    pub(super) fn not_played(&self, what: &str, without_vm: &str) -> Outcome {
        match self.vm {
            Some(_) => self.refuse_with(what, "rewake-sim does not play this"),
            None if self.config.is_some() => self.refuse_with(what, without_vm),
            None => self.refuse_with(what, "VM is not created"),
        }
    }

    pub(super) fn reboot(&mut self, now: Instant) -> Outcome {
        const WHAT: &str = "The VM could not reboot";
        self.monitor.vm("rebooting");
        if self.vm.is_none() {
            return self.refuse_with(WHAT, "VM is not created");
        }
        let Some(mut config) = self.config.clone() else {
            return self.refuse_with(WHAT, "VM config is missing");
        };
        self.vm = None;
        match self.build(&mut config) {
            Ok(vm) => self.vm = Some(vm),
            Err(chain) => return self.refuse(WHAT, chain),
        }
        if let Err(error) = self.power_on(&config, now) {
            return self.refuse(WHAT, vec![error.to_string()]);
        }
        self.monitor.vm("rebooted");
        Ok(None)
    }

    pub(super) fn shutdown(&mut self) -> Outcome {
        if self.vm.take().is_none() {
            return self.refuse_with("The VM could not shutdown", "VM is not running");
        }
        self.monitor.vm("shutdown");
        Ok(None)
    }

    pub(super) fn delete(&mut self) -> Outcome {
        if self.vm.take().is_some() {
            self.monitor.vm("shutdown");
        }
        if self.config.take().is_some() {
            self.monitor.vm("deleted");
        }
        Ok(None)
    }

    /// The orderly end: of vmm.shutdown, SIGTERM and SIGINT.
    pub(super) fn shut_down(&mut self) {
        // Deleting never fails.
        let _deleted = self.delete();
        self.monitor.emit("vmm", "shutdown", Value::Null);
        self.exit = Some(0);
    }
}

fn invalid(checked: Result<(), Chain>) -> Result<(), Chain> {
    checked.map_err(|chain| {
        std::iter::once("Failed to validate config".to_owned())
            .chain(chain)
            .collect()
    })
}

fn transition(outer: &str, middle: &str, from: &str, to: &str) -> Chain {
    let inner = format!("Invalid transition: InvalidStateTransition({from}, {to})");
    vec![outer.to_owned(), middle.to_owned(), inner]
}

/// Devices that a Linux guest's drivers activate, in the order captured from one.
fn driven(config: &Value) -> Vec<String> {
    let devices = pci_devices(config);
    let order = [Kind::Net, Kind::Disk, Kind::Balloon];
    let of_kind = |kind| {
        devices
            .iter()
            .filter(move |d| d.kind == kind)
            .map(|d| d.id.clone())
    };
    order.into_iter().flat_map(of_kind).collect()
}
