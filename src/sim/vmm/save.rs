//! vm.snapshot: config.json, state.json, memory-ranges, in this order.

use std::io;

use serde_json::Value;

use super::{Outcome, State, Vm, Vmm};
use crate::sim::fault::What;
use crate::sim::ram::Chain;
use crate::sim::release::Release;
use crate::sim::report::Log;
use crate::sim::snapshot;

impl Vmm {
    pub(in crate::sim) fn snapshot(&mut self, url: &str) -> Outcome {
        const WHAT: &str = "The VM could not be snapshotted";
        let release = self.tuning.release;
        let (Some(vm), Some(config)) = (&mut self.vm, &self.config) else {
            return self.refuse_with(WHAT, "VM is not running");
        };
        if vm.ram.is_incomplete() && release.fills_in_background() {
            return self.refuse_with(WHAT, "VM on-demand memory restore is still in progress");
        }
        self.monitor.vm("snapshotting");
        if vm.state != State::Paused {
            let chain = [
                "Cannot snapshot VM",
                "Failed to snapshot migratable component",
                "Trying to snapshot while VM is running",
            ];
            return self.refuse(WHAT, chain.map(str::to_owned).to_vec());
        }
        let state = snapshot::state(config, &vm.ram, &vm.active, vm.device_ids, release);
        self.monitor.vm("snapshotted");
        let mid = self.tuning.faults.strike("mid-snapshot");
        let written = write_snapshot(vm, config, &state, url, release, || {
            disturb_midway(&mid, &self.log)
        });
        match written {
            Ok(()) => Ok(None),
            Err(chain) => {
                let chain = std::iter::once("Cannot send VM snapshot".to_owned()).chain(chain);
                self.refuse(WHAT, chain.collect())
            }
        }
    }
}

fn write_snapshot(
    vm: &mut Vm,
    config: &Value,
    state: &Value,
    url: &str,
    release: Release,
    midway: impl FnOnce() -> Result<(), Chain>,
) -> Result<(), Chain> {
    let failed = |what: &str, error: io::Error| {
        let outer = "Failed to send migratable component snapshot".to_owned();
        vec![outer, what.to_owned(), error.to_string()]
    };
    let dir = snapshot::directory(url)?;
    let file = snapshot::create(&dir, "config.json", "config", release)?;
    snapshot::write_json(&file, config)
        .map_err(|error| failed("Error writing VM config snapshot", error))?;
    midway()?;
    let file = snapshot::create(&dir, "state.json", "state", release)?;
    snapshot::write_json(&file, state)
        .map_err(|error| failed("Error writing VM state snapshot", error))?;
    let ranges = vm.ram.saved_ranges();
    if ranges.is_empty() {
        return Ok(());
    }
    let file = snapshot::create(&dir, "memory-ranges", "memory", release)?;
    let saved = vm.ram.save(&file, &ranges);
    saved.map_err(|error| failed("Error writing dense memory snapshot region", error))
}

fn disturb_midway(struck: &[What], log: &Log) -> Result<(), Chain> {
    for what in struck {
        match what {
            What::Die => crate::sim::die(),
            What::Exit(status) => std::process::exit(i32::from(*status)),
            What::Flood(bytes) => log.flood(*bytes),
            _ => return Err(vec!["rewake-sim: error as ordered".to_owned()]),
        }
    }
    Ok(())
}
