//! `rewake doctor`.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use rewake::deadline::Deadline;
use rewake::doctor::{self, Finding, Status};
use rewake::fault::Faults;
use rewake::ids::SandboxId;
use rewake::resource::net::{HostNet, NetConfig};

use super::{Failure, Global, report};

/// What `--json` prints of findings.
pub(super) const FINDING_KEYS: &str = "\
JSON: findings, a list of
  name, status (good, degraded, missing), detail (what was found),
  remedy (how to mend it; empty where there is nothing to mend)";

#[derive(Debug, Args)]
#[command(after_long_help = FINDING_KEYS)]
pub(super) struct DoctorArgs {
    /// The cloud-hypervisor binary [default: looked up on PATH]
    #[arg(long, value_name = "PATH")]
    vmm: Option<PathBuf>,
    /// Where templates and sandboxes live, or shall
    #[arg(long, value_name = "DIR", default_value = "/var/lib/rewake")]
    root: PathBuf,
}

pub(super) fn run(args: &DoctorArgs, global: Global) -> Result<(), Failure> {
    let mut findings = doctor::examine(args.vmm.as_deref());
    findings.extend(doctor::examine_root(&std::path::absolute(&args.root)?));
    findings.extend(network());
    print(&findings, global)
}

/// Prints findings; one that is missing is a failure.
pub(super) fn print(findings: &[Finding], global: Global) -> Result<(), Failure> {
    if global.json {
        report::json(&serde_json::json!({ "findings": findings }))?;
    } else {
        let rows: Vec<Vec<String>> = findings
            .iter()
            .map(|finding| {
                let word = match finding.status {
                    Status::Good => "ok",
                    Status::Degraded => "degraded",
                    Status::Missing => "missing",
                };
                vec![word.into(), finding.name.into(), finding.detail.clone()]
            })
            .collect();
        report::table(&["", "what", "found"], &rows)?;
        for finding in findings.iter().filter(|f| !f.remedy.is_empty()) {
            println!("mend {}: {}", finding.name, finding.remedy);
        }
    }
    if findings.iter().any(|f| f.status == Status::Missing) {
        return Err(Failure::Missing);
    }
    Ok(())
}

/// What stands in the way of network slots. Looking needs the privileges that making them
/// does; without them that is the finding.
fn network() -> Vec<Finding> {
    let mut config = NetConfig::default();
    // Where nothing has run yet, looking must not leave a directory behind.
    let scratch = (!config.runtime_dir.exists()).then(|| {
        let name = format!("rewake-doctor-{}", SandboxId::random());
        std::env::temp_dir().join(name)
    });
    if let Some(scratch) = &scratch {
        config.runtime_dir.clone_from(scratch);
    }
    let findings = match HostNet::open(config, Faults::default()) {
        Ok(net) => net.examine(Deadline::after(Duration::from_secs(5))),
        Err(error) => vec![Finding::bad(
            "network slots",
            Status::Degraded,
            error.to_string(),
            "run as root",
        )],
    };
    if let Some(scratch) = scratch {
        // It may not have been made.
        let _ = std::fs::remove_dir_all(scratch);
    }
    findings
}
