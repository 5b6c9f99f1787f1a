//! `rewake doctor`.

use std::path::PathBuf;

use clap::Args;
use rewake::doctor::{self, Status};

use super::{Failure, Global, report};

#[derive(Debug, Args)]
pub(super) struct DoctorArgs {
    /// The cloud-hypervisor binary [default: looked up on PATH]
    #[arg(long, value_name = "PATH")]
    vmm: Option<PathBuf>,
}

pub(super) fn run(args: &DoctorArgs, global: Global) -> Result<(), Failure> {
    print(&doctor::examine(args.vmm.as_deref()), global)
}

/// Prints findings; one that is missing is a failure.
pub(super) fn print(findings: &[doctor::Finding], global: Global) -> Result<(), Failure> {
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
