//! What every command about a host's sandboxes and templates understands.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use rewake::deadline::Deadline;
use rewake::host::{Durability, Host, HostConfig, Limits};
use rewake::units::Bytes;

use super::Failure;
use super::restore::{BadTimeout, VmmArgs};

/// Which host: where its data lies, and what it is connected to.
#[derive(Debug, Clone, Args)]
pub(super) struct HostArgs {
    /// Where templates and sandboxes live
    #[arg(
        long,
        value_name = "DIR",
        default_value = "/var/lib/rewake",
        global = true,
        help_heading = "Host"
    )]
    pub(super) root: PathBuf,
    /// Where running VMs have their sockets and network slots their records
    #[arg(
        long,
        value_name = "DIR",
        default_value = "/run/rewake",
        global = true,
        help_heading = "Host"
    )]
    pub(super) runtime_dir: PathBuf,
    /// The network namespace that sandboxes are connected to, as `ip netns` shows it or as a
    /// path [default: this one]
    #[arg(long, value_name = "NAME", global = true, help_heading = "Host")]
    netns: Option<String>,
    /// A JSON file with the address plan [default: the built-in one]
    #[arg(long, value_name = "FILE", global = true, help_heading = "Host")]
    net_config: Option<PathBuf>,
    /// Give up after this many seconds [default: 180; for templates 3600]
    #[arg(long, value_name = "SECONDS", global = true, help_heading = "Host")]
    timeout: Option<f64>,
}

/// How much a host takes on.
#[derive(Debug, Clone, Copy, Args)]
pub(super) struct LimitArgs {
    /// Let no more sandboxes run than this [default: as many as there are network slots]
    #[arg(long, value_name = "N", help_heading = "Host")]
    max_running: Option<usize>,
    /// MiB of memory that must stay available to the machine; 0: do not look
    #[arg(long, value_name = "MIB", default_value_t = 256, help_heading = "Host")]
    memory_reserve: u64,
}

impl From<LimitArgs> for Limits {
    fn from(args: LimitArgs) -> Self {
        Self {
            sandboxes: args.max_running,
            memory_reserve: Bytes(args.memory_reserve.saturating_mul(1 << 20)),
        }
    }
}

impl HostArgs {
    /// How the host is set up. A command ends when it is done, so nothing may be left to a
    /// thread of it: what it froze is on the disk by then.
    pub(super) fn config(&self) -> Result<HostConfig, Failure> {
        let mut config = HostConfig::new(std::path::absolute(&self.root)?);
        if let Some(path) = &self.net_config {
            let failed = |source| BadConfig {
                path: path.clone(),
                source,
            };
            let text = std::fs::read(path).map_err(&failed)?;
            let net = serde_json::from_slice(&text);
            config.net = net.map_err(|error| failed(error.into()))?;
        }
        config = config.with_runtime_dir(std::path::absolute(&self.runtime_dir)?);
        config.netns = self.netns.as_deref().map(|name| {
            if name.contains('/') {
                PathBuf::from(name)
            } else {
                rewake_sys::netns::named_path(name)
            }
        });
        config.durability = Durability::Synced;
        Ok(config)
    }

    /// The host, as it is.
    pub(super) fn open(&self) -> Result<Host, Failure> {
        // Looking must not make the root of a path that was mistyped.
        if !self.root.exists() {
            return Err(NoRoot(self.root.clone()).into());
        }
        Ok(Host::open_as_it_is(self.config()?)?)
    }

    /// The same for starting VMs.
    pub(super) fn open_with(&self, vmm: &VmmArgs, limits: LimitArgs) -> Result<Host, Failure> {
        let mut config = self.config()?;
        config.vmm = vmm.launch_spec()?;
        config.limits = limits.into();
        if !self.root.exists() {
            return Err(NoRoot(self.root.clone()).into());
        }
        Ok(Host::open_as_it_is(config)?)
    }

    /// When to give up.
    pub(super) fn deadline(&self) -> Result<Deadline, Failure> {
        self.deadline_or(Deadline::NEVER)
    }

    /// The same, with what holds where nothing was said.
    pub(super) fn deadline_or(&self, usual: Deadline) -> Result<Deadline, Failure> {
        self.timeout.map_or(Ok(usual), |seconds| {
            let budget = Duration::try_from_secs_f64(seconds).map_err(|_| BadTimeout(seconds))?;
            Ok(Deadline::after(budget))
        })
    }

    /// Whether there has ever been anything.
    pub(super) fn is_there(&self) -> bool {
        Path::new(&self.root).exists()
    }
}

/// The address plan cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("Cannot use the address plan {}", .path.display())]
struct BadConfig {
    path: PathBuf,
    source: std::io::Error,
}

/// There is no host to look at.
#[derive(Debug, thiserror::Error)]
#[error("{} does not exist: nothing was ever launched or built there; see --root", .0.display())]
struct NoRoot(PathBuf);
