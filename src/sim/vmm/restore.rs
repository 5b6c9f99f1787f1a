//! vm.restore: in the order of `vmm/src/lib.rs` and `vmm/src/vm.rs`.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::Deserialize;
use serde_json::{Value, json};

use super::{Outcome, State, Vm, Vmm, invalid};
use crate::sim::config::{self, Memory};
use crate::sim::devices::{self, Devices};
use crate::sim::guest::{Guest, Wire};
use crate::sim::ram::{self, Chain, Ram};
use crate::sim::report::Level;
use crate::sim::snapshot;

/// Body of vm.restore.
#[derive(Debug, Default, Clone, Deserialize)]
pub(in crate::sim) struct RestoreConfig {
    pub(in crate::sim) source_url: String,
    #[serde(default)]
    pub(in crate::sim) prefault: bool,
    #[serde(default)]
    pub(in crate::sim) memory_restore_mode: RestoreMode,
    #[serde(default)]
    pub(in crate::sim) net_fds: Option<Vec<NetFds>>,
    #[serde(default)]
    pub(in crate::sim) resume: bool,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Deserialize)]
pub(in crate::sim) enum RestoreMode {
    #[default]
    Copy,
    OnDemand,
}

/// Descriptors meant for one network device.
#[derive(Debug, Clone, Deserialize)]
pub(in crate::sim) struct NetFds {
    pub(in crate::sim) id: String,
    #[serde(default)]
    pub(in crate::sim) num_fds: usize,
}

impl Vmm {
    pub(in crate::sim) fn restore(
        &mut self,
        request: &RestoreConfig,
        fds: Vec<OwnedFd>,
        now: Instant,
    ) -> Outcome {
        const WHAT: &str = "The VM could not be restored";
        if self.config.is_some() || self.vm.is_some() {
            return self.refuse_with(WHAT, "VM is already created");
        }
        let mut request = request.clone();
        if !self.tuning.release.knows_restore_mode() {
            request.memory_restore_mode = RestoreMode::Copy;
            request.resume = false;
        }
        let (dir, mut config, state) = match self.read_snapshot(&request) {
            Ok(read) => read,
            Err(chain) => return self.refuse(WHAT, chain),
        };
        match self.rebuild(&dir, &mut config, &state, &request, fds) {
            Ok(Some(vm)) => {
                self.vm = Some(vm);
                self.config = Some(config);
            }
            Ok(None) => {
                self.stuck = true;
                return Ok(None);
            }
            Err(chain) => {
                self.monitor.vm("deleted");
                return self.refuse(WHAT, chain);
            }
        }
        self.filled_at = now;
        self.monitor.vm("restoring");
        if let Err(chain) = self.take_locks() {
            self.delete_quietly();
            return self.refuse(WHAT, chain);
        }
        self.monitor.vm("restored");
        if request.resume {
            return self.resume(now);
        }
        Ok(None)
    }

    fn take_locks(&self) -> Result<(), Chain> {
        self.vm
            .as_ref()
            .map_or(Ok(()), |vm| vm.devices.lock_disks())
    }

    fn delete_quietly(&mut self) {
        self.vm = None;
        self.config = None;
        self.monitor.vm("deleted");
    }

    fn read_snapshot(&self, request: &RestoreConfig) -> Result<(PathBuf, Value, Value), Chain> {
        let cannot = |chain: Chain| -> Chain {
            std::iter::once("Cannot restore VM".to_owned())
                .chain(chain)
                .collect()
        };
        let dir = snapshot::directory(&request.source_url).map_err(cannot)?;
        let raw = snapshot::read(&dir, "config.json", "config").map_err(cannot)?;
        let config = config::complete(&raw, self.tuning.release).map_err(|reason| {
            cannot(vec![
                "Failed to receive migratable component snapshot".to_owned(),
                "Error deserialising VM config snapshot".to_owned(),
                reason,
            ])
        })?;
        invalid(request.validate(&config))?;
        let state = snapshot::read(&dir, "state.json", "state").map_err(cannot)?;
        Ok((dir, config, state))
    }

    /// Everything of a restore up to the locks. `None`: it never comes back.
    fn rebuild(
        &mut self,
        dir: &Path,
        config: &mut Value,
        state: &Value,
        request: &RestoreConfig,
        fds: Vec<OwnedFd>,
    ) -> Result<Option<Vm>, Chain> {
        devices::open_consoles(config)?;
        let memory_state = snapshot::state_of(state, &["memory-manager"]);
        let ranges = ram::ranges_of(&memory_state);
        let mut ram = Ram::restored(&Memory::of(config), &memory_state)?;
        let file = dir.join("memory-ranges");
        if request.memory_restore_mode == RestoreMode::OnDemand {
            ram.serve_lazily(&file, &ranges)?;
        } else if !ram.fill(&file, &ranges, self.tuning.release)? {
            return Ok(None);
        }
        invalid(config::validate(config))?;
        let mut fds = fds.into_iter();
        let given = request.net_fds.iter().flatten();
        let given = given.map(|net| (net.id.clone(), fds.by_ref().take(net.num_fds).collect()));
        let mut devices = Devices::open(config, given.collect())?;
        if let Some(path) = config["payload"]["initramfs"].as_str() {
            File::open(path).map_err(|error| {
                vec!["Cannot open initramfs file".to_owned(), error.to_string()]
            })?;
        }
        let active = snapshot::activated_devices(state);
        for id in &active {
            self.monitor
                .emit("virtio-device", "activated", json!({"id": id}));
        }
        let wire = match devices.tap.take() {
            Some(tap) => Wire::Tap(tap),
            None => self.loopback.clone().map_or(Wire::None, Wire::Loopback),
        };
        let guest = Guest::restore(&mut ram, wire, &self.registry, self.tokens);
        let mut guest = guest
            .map_err(|error| vec!["Cannot read guest memory".to_owned(), error.to_string()])?;
        match &mut guest {
            Some(guest) => guest.set_faults(&self.tuning.faults),
            None => self.log.say(
                Level::Warn,
                "no stand-in guest in this memory: it will never answer",
            ),
        }
        let counter = snapshot::state_of(state, &["device-manager"])["device_id_cnt"].as_u64();
        Ok(Some(Vm {
            state: State::Paused,
            ram,
            guest,
            devices,
            active,
            device_ids: counter.unwrap_or(0),
            activating: Vec::new(),
            catch_up: self.tuning.release.advances_clock() && snapshot::clock_catches_up(state),
        }))
    }
}

impl RestoreConfig {
    fn validate(&self, config: &Value) -> Result<(), Chain> {
        if self.prefault && self.memory_restore_mode == RestoreMode::OnDemand {
            return Err(vec![
                "'prefault' cannot be combined with 'memory_restore_mode=ondemand'".to_owned(),
            ]);
        }
        for net in config["net"].as_array().into_iter().flatten() {
            let Some(fds) = net["fds"].as_array() else {
                continue;
            };
            let id = net["id"].as_str().unwrap_or_default();
            let given = self.net_fds.iter().flatten().find(|given| given.id == id);
            match given {
                None => {
                    return Err(vec![format!(
                        "Net id {id} is associated with FDs and is required"
                    )]);
                }
                Some(given) if given.num_fds != fds.len() => {
                    return Err(vec![format!(
                        "Number of Net FDs passed for '{id}' during Restore: {}. Expected: {}",
                        given.num_fds,
                        fds.len()
                    )]);
                }
                Some(_) => {}
            }
        }
        Ok(())
    }
}
