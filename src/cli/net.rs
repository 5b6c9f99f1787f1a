//! `rewake net`: network slots by hand.

use std::time::Duration;

use clap::{Args, Subcommand};
use rewake::deadline::Deadline;
use rewake::fault::Faults;
use rewake::ids::SlotIndex;
use rewake::resource::net::{HostNet, NetConfig};
use rewake::resource::slot::{SlotError, SlotRecord};
use serde_json::json;

use super::doctor::FINDING_KEYS;
use super::{Failure, Global, report};

const SHOW_KEYS: &str = "\
JSON: slots, a list of
  slot: its index
  record: null, or token, owner, holder and vmm (null, or pid and start_time), parked (kept for
    a sandbox that is paused), steps (what exists in the kernel because of it)";
const SWEEP_KEYS: &str = "\
JSON: reclaimed, in_use and parked (indices), stuck (what could not be removed, in words),
  foreign (what is there and nobody's)";

/// The owner in the records of slots made here.
const OWNER: &str = "by-hand";

#[derive(Debug, Args)]
pub(super) struct NetArgs {
    /// A JSON file with the address plan [default: the built-in one]
    #[arg(long, value_name = "FILE")]
    config: Option<std::path::PathBuf>,
    /// Give up after this many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    timeout: u64,
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Build a slot and leave it standing
    #[command(
        after_long_help = "JSON: slot, netns, veth, host_address, inside_address, milliseconds"
    )]
    Create {
        /// Its index [default: the next free one]
        index: Option<u16>,
    },
    /// List the slots and what is on record about them
    #[command(after_long_help = SHOW_KEYS)]
    Show {
        /// One slot only
        index: Option<u16>,
    },
    /// Look whether the host and its slots are as they should be
    #[command(after_long_help = FINDING_KEYS)]
    Check,
    /// Remove a slot that nobody uses
    #[command(after_long_help = "JSON: removed: the index")]
    Remove {
        /// Its index
        index: u16,
        /// Even if it is kept for a paused sandbox
        #[arg(long)]
        force: bool,
    },
    /// Remove all slots whose owner and VMM are dead
    #[command(after_long_help = SWEEP_KEYS)]
    Sweep,
}

pub(super) fn run(args: &NetArgs, global: Global) -> Result<(), Failure> {
    let config: NetConfig = match &args.config {
        Some(path) => serde_json::from_slice(&std::fs::read(path)?)?,
        None => NetConfig::default(),
    };
    let host = HostNet::open(config, Faults::NONE)?;
    let deadline = Deadline::after(Duration::from_secs(args.timeout));
    match &args.action {
        Action::Create { index } => create(&host, *index, deadline, global),
        Action::Show { index } => show(&host, *index, global),
        Action::Check => check(&host, deadline, global),
        Action::Remove { index, force } => remove(&host, *index, *force, deadline, global),
        Action::Sweep => sweep(&host, deadline, global),
    }
}

fn create(
    host: &HostNet,
    index: Option<u16>,
    deadline: Deadline,
    global: Global,
) -> Result<(), Failure> {
    host.prepare(deadline)?;
    let started = std::time::Instant::now();
    let mut slot = match index {
        Some(index) => host.create_at(SlotIndex::new(index)?, OWNER, deadline)?,
        None => host.create(OWNER, deadline)?,
    };
    let elapsed = started.elapsed();
    host.check(&slot, deadline)?;
    // Nobody holds it when this process has ended, and yet it is not stale.
    slot.lease().set_parked(true)?;
    let plan = slot.plan();
    if global.json {
        report::json(&json!({
            "slot": plan.index.get(),
            "netns": plan.netns,
            "veth": plan.veth,
            "host_address": plan.host_address,
            "inside_address": plan.inside_address,
            "milliseconds": elapsed.as_secs_f64() * 1e3,
        }))
    } else {
        println!(
            "slot {} built in {:.1} ms: namespace {}, link {}, guest at {}",
            plan.index,
            elapsed.as_secs_f64() * 1e3,
            plan.netns,
            plan.veth,
            plan.host_address
        );
        Ok(())
    }
}

fn remove(
    host: &HostNet,
    index: u16,
    force: bool,
    deadline: Deadline,
    global: Global,
) -> Result<(), Failure> {
    let lease = host.slots().adopt(SlotIndex::new(index)?)?;
    let kept = lease.record().filter(|it| it.parked && it.owner != OWNER);
    if let Some(record) = kept
        && !force
    {
        return Err(SlotError::Parked {
            index: lease.index(),
            owner: record.owner.clone(),
        }
        .into());
    }
    host.reclaim(lease, deadline)?;
    if global.json {
        report::json(&json!({ "removed": index }))
    } else {
        println!("slot {index} removed");
        Ok(())
    }
}

fn show(host: &HostNet, index: Option<u16>, global: Global) -> Result<(), Failure> {
    let indices = match index {
        Some(index) => vec![SlotIndex::new(index)?],
        None => host.slots().list()?,
    };
    let mut records: Vec<(SlotIndex, Option<SlotRecord>)> = Vec::new();
    for slot in indices {
        match host.slots().record(slot) {
            Ok(record) => records.push((slot, record)),
            Err(SlotError::Free(_)) if index.is_none() => {}
            Err(error) => return Err(error.into()),
        }
    }
    if global.json {
        let slots: Vec<_> = records
            .iter()
            .map(|(index, record)| json!({ "slot": index.get(), "record": record }))
            .collect();
        return report::json(&json!({ "slots": slots }));
    }
    let row = |(index, record): &(SlotIndex, Option<SlotRecord>)| {
        let plan = host.config().slot(*index);
        let of = |pick: &dyn Fn(&SlotRecord) -> String| record.as_ref().map_or(String::new(), pick);
        vec![
            index.to_string(),
            of(&|it| it.owner.clone()),
            of(&|it| it.vmm.map_or(String::new(), |vmm| vmm.pid.to_string())),
            of(&|it| if it.parked { "kept" } else { "in use" }.to_owned()),
            plan.netns,
            plan.host_address.to_string(),
        ]
    };
    let rows: Vec<_> = records.iter().map(row).collect();
    report::table(
        &["slot", "owner", "vmm", "state", "namespace", "guest at"],
        &rows,
    )
}

fn check(host: &HostNet, deadline: Deadline, global: Global) -> Result<(), Failure> {
    let mut findings = host.examine(deadline);
    findings.extend(host.examine_slots(deadline)?);
    super::doctor::print(&findings, global)
}

fn sweep(host: &HostNet, deadline: Deadline, global: Global) -> Result<(), Failure> {
    let swept = host.sweep(deadline)?;
    let numbers = |list: &[SlotIndex]| list.iter().map(|it| it.get()).collect::<Vec<_>>();
    if global.json {
        let stuck: Vec<_> = swept.stuck.iter().map(ToString::to_string).collect();
        report::json(&json!({
            "reclaimed": numbers(&swept.reclaimed),
            "in_use": numbers(&swept.in_use),
            "parked": numbers(&swept.parked),
            "stuck": stuck,
            "foreign": swept.foreign,
        }))?;
    } else {
        println!(
            "{} reclaimed, {} in use, {} kept, {} stuck, {} of others",
            swept.reclaimed.len(),
            swept.in_use.len(),
            swept.parked.len(),
            swept.stuck.len(),
            swept.foreign.len()
        );
    }
    match swept.stuck.into_iter().next() {
        Some(failure) => Err(failure.into()),
        None => Ok(()),
    }
}
