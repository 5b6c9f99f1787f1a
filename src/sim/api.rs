//! The routes of the API: from a request to an operation, from its outcome to an answer.

use std::time::Instant;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::fault::What;
use super::http::{Method, Request};
use super::report::Level;
use super::server::{Delivery, Handler, Reply};
use super::vmm::{Outcome, Refusal, Resize, RestoreConfig, Vmm};

const PREFIX: &str = "/api/v1/";

/// Endpoints whose answer has no body rather than `["Bad Request"]` to a missing one, and the
/// other way round to PATCH (`vmm/src/api/http/http_endpoint.rs`).
const GET_ONLY: &[&str] = &["vm.info", "vmm.ping", "vm.counters"];
const WITHOUT_BODY: &[&str] = &[
    "vm.boot",
    "vm.delete",
    "vm.nmi",
    "vm.pause",
    "vm.power-button",
    "vm.reboot",
    "vm.resume",
    "vm.shutdown",
    "vmm.shutdown",
];
const WITH_BODY: &[&str] = &[
    "vm.add-device",
    "vm.add-disk",
    "vm.add-fs",
    "vm.add-generic-vhost-user",
    "vm.add-net",
    "vm.add-pmem",
    "vm.add-user-device",
    "vm.add-vdpa",
    "vm.add-vsock",
    "vm.create",
    "vm.receive-migration",
    "vm.remove-device",
    "vm.resize",
    "vm.resize-disk",
    "vm.resize-zone",
    "vm.restore",
    "vm.send-migration",
    "vm.snapshot",
];

#[derive(Deserialize)]
struct SnapshotConfig {
    destination_url: String,
}

#[derive(Deserialize)]
struct RemoveDevice {
    id: String,
}

impl Handler for Vmm {
    fn handle(&mut self, request: Request, now: Instant) -> Reply {
        self.log.say(
            Level::Info,
            &format!("API request {:?} {}", request.method, request.path),
        );
        let Some(endpoint) = request.path.strip_prefix(PREFIX).map(str::to_owned) else {
            return not_found();
        };
        let (before, after) = phases(&endpoint);
        let mut delivery = Delivery::Now;
        if let Some(reply) = self.disturb(before, &mut delivery) {
            return reply;
        }
        let mut reply = self.route(&endpoint, request, now);
        if std::mem::take(&mut self.stuck) {
            delivery = Delivery::Never;
        }
        if reply.status < 300
            && let Some(reply) = self.disturb(after, &mut delivery)
        {
            return reply;
        }
        reply.delivery = delivery;
        reply
    }
}

/// The fault phases before and after an endpoint's work.
fn phases(endpoint: &str) -> (&'static str, &'static str) {
    match endpoint {
        "vmm.ping" => ("on-ping", ""),
        "vm.info" => ("on-info", ""),
        "vm.counters" => ("on-counters", ""),
        "vm.create" => ("on-create", ""),
        "vm.boot" => ("on-boot", ""),
        "vm.restore" => ("on-restore", "after-restored"),
        "vm.resume" => ("on-resume", "after-resumed"),
        "vm.pause" => ("on-pause", "after-paused"),
        "vm.snapshot" => ("on-snapshot", "after-snapshot"),
        "vm.resize" => ("on-resize", ""),
        "vm.delete" => ("on-delete", ""),
        "vm.shutdown" => ("on-shutdown", ""),
        "vmm.shutdown" => ("on-vmm-shutdown", ""),
        _ if endpoint.starts_with("vm.add-") => ("on-add", ""),
        _ => ("", ""),
    }
}

impl Vmm {
    /// Lets the faults of a phase strike. An answer means that the work is not done.
    fn disturb(&mut self, phase: &str, delivery: &mut Delivery) -> Option<Reply> {
        for what in self.tuning.faults.strike(phase) {
            self.log.say(
                Level::Warn,
                &format!("fault at {phase}: {what:?}, as ordered"),
            );
            match what {
                What::Die => super::die(),
                What::Exit(status) => std::process::exit(i32::from(status)),
                What::Flood(bytes) => self.log.flood(bytes),
                What::Late(by) => *delivery = Delivery::Late(by),
                What::Garbage => *delivery = Delivery::Garbage,
                What::Truncated => *delivery = Delivery::Truncated,
                What::Drop => *delivery = Delivery::Drop,
                What::Hang => {
                    let mut reply = Reply::new(500, None);
                    reply.delivery = Delivery::Never;
                    return Some(reply);
                }
                What::Error => {
                    let chain = ["Error from API", "rewake-sim: error as ordered"];
                    return Some(chain_reply(500, &chain.map(str::to_owned)));
                }
                _ => {}
            }
        }
        None
    }

    fn route(&mut self, endpoint: &str, request: Request, now: Instant) -> Reply {
        let (method, body) = (request.method, request.body);
        if GET_ONLY.contains(&endpoint) {
            return match method {
                Method::Get => self.get(endpoint),
                _ => bad_request(),
            };
        }
        if WITHOUT_BODY.contains(&endpoint) {
            return match (method, body) {
                (Method::Put, None) => self.act(endpoint, now),
                _ => bad_request(),
            };
        }
        if !WITH_BODY.contains(&endpoint) {
            return not_found();
        }
        match (method, body) {
            (Method::Put, Some(body)) => match self.put(endpoint, &body, request.fds, now) {
                Ok(outcome) => answer(outcome),
                Err(reply) => reply,
            },
            (Method::Put, None) if endpoint == "vm.create" => Reply::new(400, Some(Vec::new())),
            (Method::Patch, _) if endpoint != "vm.create" => Reply::new(400, Some(Vec::new())),
            _ => bad_request(),
        }
    }

    fn get(&mut self, endpoint: &str) -> Reply {
        match endpoint {
            "vmm.ping" => json_reply(&self.ping()),
            "vm.info" => answer(self.info()),
            _ => answer(self.counters()),
        }
    }

    fn act(&mut self, endpoint: &str, now: Instant) -> Reply {
        answer(match endpoint {
            "vm.boot" => self.boot(now),
            "vm.delete" => self.delete(),
            "vm.nmi" => self.needs_running("Error triggering NMI"),
            "vm.power-button" => self.needs_running("Error triggering power button"),
            "vm.pause" => self.pause(),
            "vm.reboot" => self.reboot(now),
            "vm.resume" => self.resume(now),
            "vm.shutdown" => self.shutdown(),
            _ => {
                self.shut_down();
                return Reply::new(200, Some(Vec::new()));
            }
        })
    }

    fn put(
        &mut self,
        endpoint: &str,
        body: &[u8],
        fds: Vec<std::os::fd::OwnedFd>,
        now: Instant,
    ) -> Result<Outcome, Reply> {
        Ok(match endpoint {
            "vm.create" => {
                let config: Value = parse(body)?;
                self.create(&config)
            }
            "vm.restore" => {
                let config: RestoreConfig = parse(body)?;
                let wanted: Option<usize> = config
                    .net_fds
                    .as_ref()
                    .map(|nets| nets.iter().map(|net| net.num_fds).sum());
                let fds = match wanted {
                    Some(count) if count != fds.len() => return Err(bad_request()),
                    Some(_) => fds,
                    None => Vec::new(),
                };
                self.restore(&config, fds, now)
            }
            "vm.snapshot" => {
                let config: SnapshotConfig = parse(body)?;
                self.snapshot(&config.destination_url)
            }
            "vm.resize" => {
                let resize: Resize = parse(body)?;
                self.resize(&resize)
            }
            "vm.remove-device" => {
                let remove: RemoveDevice = parse(body)?;
                self.remove(&remove.id)
            }
            "vm.resize-disk" => {
                parse::<Value>(body)?;
                self.not_played(
                    "The disk could not be resized",
                    "Failed resizing a disk image",
                )
            }
            "vm.resize-zone" => {
                parse::<Value>(body)?;
                let what = "The memory zone could not be resized";
                self.not_played(what, "Failed resizing a memory zone")
            }
            "vm.send-migration" | "vm.receive-migration" => {
                parse::<Value>(body)?;
                self.not_played(
                    "Error dispatching the migration worker",
                    "rewake-sim does not migrate",
                )
            }
            _ => {
                let device: Value = parse(body)?;
                let (what, key) = addition(endpoint);
                self.add(what, key, &device, fds)
            }
        })
    }
}

/// What an addition is called when it fails, and where it goes in the configuration.
fn addition(endpoint: &str) -> (&'static str, &'static str) {
    match endpoint {
        "vm.add-disk" => ("The disk could not be added to the VM", "disks"),
        "vm.add-net" => ("The network device could not be added to the VM", "net"),
        "vm.add-fs" => ("The fs could not be added to the VM", "fs"),
        "vm.add-pmem" => ("The pmem device could not be added to the VM", "pmem"),
        "vm.add-vsock" => ("The vsock device could not be added to the VM", "vsock"),
        "vm.add-vdpa" => ("The vDPA device could not be added to the VM", "vdpa"),
        "vm.add-user-device" => (
            "The user device could not be added to the VM",
            "user_devices",
        ),
        _ => ("The device could not be added to the VM", "devices"),
    }
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Reply> {
    serde_json::from_slice(body).map_err(|error| {
        chain_reply(
            400,
            &["Failed to deserialize JSON".to_owned(), error.to_string()],
        )
    })
}

fn answer(outcome: Outcome) -> Reply {
    match outcome {
        Ok(None) => Reply::new(204, None),
        Ok(Some(value)) => json_reply(&value),
        Err(Refusal { status, chain }) => chain_reply(status, &chain),
    }
}

fn json_reply(value: &Value) -> Reply {
    Reply::new(200, Some(value.to_string().into_bytes()))
}

fn chain_reply(status: u16, chain: &[String]) -> Reply {
    Reply::new(status, Some(Value::from(chain).to_string().into_bytes()))
}

fn bad_request() -> Reply {
    chain_reply(400, &["Bad Request".to_owned()])
}

fn not_found() -> Reply {
    chain_reply(404, &["Not Found".to_owned()])
}
