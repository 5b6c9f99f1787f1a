//! What changes a VM that exists: its size and its devices.

use std::os::fd::OwnedFd;

use serde::Deserialize;
use serde_json::{Value, json};

use super::{Outcome, Refusal, Vmm};
use crate::sim::config;
use crate::sim::devices::pci_devices;

/// Body of vm.resize.
#[derive(Debug, Default, Deserialize)]
pub(in crate::sim) struct Resize {
    desired_vcpus: Option<u64>,
    desired_ram: Option<u64>,
    desired_balloon: Option<u64>,
}

impl Vmm {
    pub(in crate::sim) fn resize(&mut self, body: &Resize) -> Outcome {
        const WHAT: &str = "The VM could not be resized";
        let Some(config) = &mut self.config else {
            return self.refuse_with(WHAT, "VM is not created");
        };
        if self.vm.is_some() {
            self.monitor.vm("resizing");
            let boot = config["cpus"]["boot_vcpus"].as_u64();
            let max = config["cpus"]["max_vcpus"].as_u64();
            if body
                .desired_vcpus
                .is_some_and(|n| Some(n) != boot && Some(n) > max)
            {
                return self.refuse_with(WHAT, "Desired vCPUs exceed the maximum");
            }
            let total = self.vm.as_ref().map_or(0, |vm| vm.ram.total());
            if body.desired_ram.is_some_and(|ram| ram != total) {
                let reason = "The requested hotplug memory addition is not a valid size";
                return self.refuse(
                    WHAT,
                    vec!["Memory manager error".to_owned(), reason.to_owned()],
                );
            }
            if body.desired_balloon.is_some() && !config["balloon"].is_object() {
                let reason = "Missing virtio-balloon, can't proceed as expected";
                return self.refuse(
                    WHAT,
                    vec!["Error from device manager".to_owned(), reason.to_owned()],
                );
            }
        }
        if let (Some(size), true) = (body.desired_balloon, config["balloon"].is_object()) {
            config["balloon"]["size"] = json!(size);
        }
        if self.vm.is_some() {
            self.monitor.vm("resized");
        }
        Ok(None)
    }

    pub(in crate::sim) fn add(
        &mut self,
        what: &str,
        key: &str,
        body: &Value,
        fds: Vec<OwnedFd>,
    ) -> Outcome {
        let Some(config) = &mut self.config else {
            return self.refuse_with(what, "VM is not created");
        };
        let completed = match key {
            "disks" => config::complete_disk(body, self.tuning.release),
            "net" => config::complete_net(body, self.tuning.release),
            _ => Ok(body.clone()),
        };
        let mut device = match completed {
            Ok(device) => device,
            Err(reason) => {
                let chain = vec!["Failed to deserialize JSON".to_owned(), reason];
                return Err(Refusal { status: 400, chain });
            }
        };
        let Some(vm) = &mut self.vm else {
            append(config, key, device);
            return Ok(None);
        };
        let (prefix, opened) = match key {
            "disks" => ("_disk", vm.devices.add_disk(&device)),
            "net" => ("_net", vm.devices.add_net(&mut device, fds)),
            _ => {
                let chain = ["Error from device manager", "rewake-sim has no such device"];
                return self.refuse(what, chain.map(str::to_owned).to_vec());
            }
        };
        if let Err(chain) = opened {
            return self.refuse(what, chain);
        }
        if device["id"].is_null() {
            device["id"] = json!(format!("{prefix}{}", vm.device_ids));
            vm.device_ids += 1;
        }
        let id = device["id"].clone();
        // Slot 0 is the host bridge.
        let bdf = format!("0000:00:{:02x}.0", pci_devices(config).len() + 1);
        append(config, key, device);
        Ok(Some(json!({"id": id, "bdf": bdf})))
    }

    pub(in crate::sim) fn remove(&mut self, id: &str) -> Outcome {
        const WHAT: &str = "The device could not be removed from the VM";
        let Some(config) = &mut self.config else {
            return self.refuse_with(WHAT, "VM is not created");
        };
        let mut removed = false;
        for key in ["disks", "net"] {
            if let Some(list) = config.get_mut(key).and_then(Value::as_array_mut) {
                let before = list.len();
                list.retain(|device| device["id"] != id);
                removed |= list.len() < before;
            }
        }
        if removed {
            if self.vm.is_some() {
                self.monitor.emit(
                    "vm",
                    "device-removed",
                    json!({"id": id, "bdf": Value::Null}),
                );
            }
            return Ok(None);
        }
        if self.vm.is_some() {
            let reason =
                format!("Failed to find device corresponding to the given identifier: {id}");
            return self.refuse(WHAT, vec!["Error from device manager".to_owned(), reason]);
        }
        self.refuse_with(WHAT, &format!("No device with id {id:?} to remove"))
    }
}

fn append(config: &mut Value, key: &str, device: Value) {
    match &mut config[key] {
        Value::Array(list) => list.push(device),
        slot => *slot = json!([device]),
    }
}
