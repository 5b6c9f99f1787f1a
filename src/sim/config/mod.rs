//! VmConfig as the stand-in keeps it: completed with defaults and checked, still JSON.
//!
//! Written from tables rather than with rewake's own `vm_config` types on purpose: a mistake
//! there must not be made twice and cancel out. Keys, defaults and checks follow
//! `vmm/src/vm_config.rs` and `vmm/src/config.rs` of Cloud Hypervisor v53, and captures of
//! v52 for what is written as `null`.

mod tables;

use std::path::PathBuf;

use serde_json::{Map, Value, json};

use crate::sim::release::Release;
use tables::{Absent, DISK, Field, Kind, NET, VM};

/// Completes a VmConfig with every default of the release.
///
/// # Errors
/// What is wrong with it, in the words of the JSON library as far as they are known.
pub(super) fn complete(value: &Value, release: Release) -> Result<Value, String> {
    structure(VM, value, release)
}

/// Completes one network device.
pub(super) fn complete_net(value: &Value, release: Release) -> Result<Value, String> {
    structure(NET, value, release)
}

/// Completes one disk.
pub(super) fn complete_disk(value: &Value, release: Release) -> Result<Value, String> {
    structure(DISK, value, release)
}

fn structure(fields: &[Field], value: &Value, release: Release) -> Result<Value, String> {
    let Value::Object(given) = value else {
        return Err(format!(
            "invalid type: {}, expected struct",
            describe(value)
        ));
    };
    let mut complete = Map::new();
    for field in fields.iter().filter(|f| f.since <= release.number()) {
        let key = field.key;
        let value = match (given.get(key), &field.absent) {
            (Some(Value::Null), Absent::Nothing) | (None, Absent::Nothing) => {
                if release.writes_nulls() {
                    complete.insert(key.to_owned(), Value::Null);
                }
                continue;
            }
            (None | Some(Value::Null), Absent::Omitted) => continue,
            (None, Absent::Required) => return Err(format!("missing field `{key}`")),
            (None, Absent::Default(text)) => {
                let default = serde_json::from_str(text).map_err(|error| error.to_string())?;
                typed(&field.kind, &default, release)?
            }
            (Some(value), _) => typed(&field.kind, value, release)?,
        };
        if matches!(field.absent, Absent::Omitted) && value == Value::Bool(false) {
            continue;
        }
        complete.insert(key.to_owned(), value);
    }
    Ok(Value::Object(complete))
}

fn typed(kind: &Kind, value: &Value, release: Release) -> Result<Value, String> {
    let wrong = |expected: &str| format!("invalid type: {}, expected {expected}", describe(value));
    match kind {
        Kind::Any => Ok(value.clone()),
        Kind::Bool if value.is_boolean() => Ok(value.clone()),
        Kind::Bool => Err(wrong("a boolean")),
        Kind::Text if value.is_string() => Ok(value.clone()),
        Kind::Text => Err(wrong("a string")),
        Kind::Mac => {
            let text = value.as_str().ok_or_else(|| wrong("a string"))?;
            match mac(text) {
                Some(_) => Ok(value.clone()),
                None => Err(format!(
                    "The provided MAC address is invalid: parsing of {text} into a MAC address failed"
                )),
            }
        }
        Kind::Unsigned(max) => match value.as_u64() {
            Some(number) if number <= *max => Ok(value.clone()),
            _ => Err(wrong(match *max {
                0xff => "u8",
                0xffff => "u16",
                0xffff_ffff => "u32",
                _ => "u64",
            })),
        },
        Kind::OneOf(names) => {
            let name = value.as_str().ok_or_else(|| wrong("a string"))?;
            if names.contains(&name) {
                return Ok(value.clone());
            }
            let all: Vec<_> = names.iter().map(|n| format!("`{n}`")).collect();
            Err(format!(
                "unknown variant `{name}`, expected one of {}",
                all.join(", ")
            ))
        }
        Kind::Struct(fields) => structure(fields, value, release),
        Kind::List(fields) => {
            let list = value.as_array().ok_or_else(|| wrong("a sequence"))?;
            let items: Result<Vec<_>, _> = list
                .iter()
                .map(|item| structure(fields, item, release))
                .collect();
            items.map(Value::Array)
        }
    }
}

fn describe(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(b) => format!("boolean `{b}`"),
        Value::Number(n) => format!("integer `{n}`"),
        Value::String(s) => format!("string {s:?}"),
        Value::Array(_) => "sequence".to_owned(),
        Value::Object(_) => "map".to_owned(),
    }
}

/// Six bytes of a MAC address, `None` where it is none.
pub(super) fn mac(text: &str) -> Option<[u8; 6]> {
    let mut bytes = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut bytes {
        let part = parts.next().filter(|p| p.len() == 2)?;
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    parts.next().is_none().then_some(bytes)
}

/// A MAC address as text.
pub(super) fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|b| format!("{b:02x}")).join(":")
}

/// The checks of `VmConfig::validate` that the stand-in makes, in its order.
pub(super) fn validate(config: &Value) -> Result<(), Vec<String>> {
    let one = |text: String| Err(vec![text]);
    let payload = &config["payload"];
    if payload["kernel"].is_null() && payload["firmware"].is_null() {
        return Err(vec![
            "Payload configuration is not bootable".to_owned(),
            "No bootitem provided: neither firmware nor kernel".to_owned(),
        ]);
    }
    let boot = config["cpus"]["boot_vcpus"].as_u64().unwrap_or(1);
    let max = config["cpus"]["max_vcpus"].as_u64().unwrap_or(1);
    if max < boot {
        return one(format!("Max CPUs ({max}) lower than boot CPUs ({boot})"));
    }
    let list = |key: &str| config[key].as_array().into_iter().flatten();
    let queues = |device: &Value| device["num_queues"].as_u64().unwrap_or(1);
    let too_many = list("disks")
        .map(|disk| (queues(disk), queues(disk)))
        .chain(list("net").map(|net| (queues(net), queues(net) / 2)))
        .find(|(_, needed)| *needed > boot);
    if let Some((count, _)) = too_many {
        return one(format!(
            "Queue count ({count}) must not exceed boot vCPUs ({boot})"
        ));
    }
    let mut ids: Vec<&str> = Vec::new();
    for id in devices(config).filter_map(|device| device["id"].as_str()) {
        if ids.contains(&id) {
            return one(format!("Identifier {id} is not unique"));
        }
        ids.push(id);
    }
    let ram = Memory::of(config).total();
    if let Some(size) = config["balloon"]["size"].as_u64()
        && size >= ram
    {
        return one(format!("Balloon size ({size}) greater than RAM ({ram})"));
    }
    match config["vsock"]["cid"].as_u64() {
        Some(cid @ (0..=2 | 0xffff_ffff)) => one(format!("{cid} is a special VSOCK CID")),
        _ => Ok(()),
    }
}

fn devices(config: &Value) -> impl Iterator<Item = &Value> {
    let list = |key: &str| config[key].as_array().into_iter().flatten();
    list("disks")
        .chain(list("net"))
        .chain(["vsock", "balloon", "rng", "console"].map(|key| &config[key]))
}

/// A zone of guest memory as configured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Zone {
    pub(super) id: String,
    pub(super) size: u64,
    pub(super) file: Option<PathBuf>,
    pub(super) shared: bool,
}

/// The memory part of a configuration.
#[derive(Debug, Clone)]
pub(super) struct Memory {
    /// The zones, or one called `mem0` for a guest without zones.
    pub(super) zones: Vec<Zone>,
    pub(super) hotplug_size: u64,
    /// `size` beside `zones`: bytes that contradict them. Refused at boot.
    pub(super) beside_zones: u64,
}

impl Memory {
    /// Reads it from a completed configuration.
    pub(super) fn of(config: &Value) -> Self {
        let memory = &config["memory"];
        let size = memory["size"].as_u64().unwrap_or(0);
        let huge = |value: &Value| value["hugepages"].as_bool().unwrap_or(false);
        let zones: Vec<Zone> = match memory["zones"].as_array() {
            Some(zones) => zones
                .iter()
                .map(|zone| Zone {
                    id: zone["id"].as_str().unwrap_or_default().to_owned(),
                    size: zone["size"].as_u64().unwrap_or(0),
                    file: zone["file"].as_str().map(PathBuf::from),
                    shared: zone["shared"].as_bool().unwrap_or(false) || huge(zone),
                })
                .collect(),
            None if size == 0 => Vec::new(),
            None => vec![Zone {
                id: "mem0".to_owned(),
                size,
                file: None,
                shared: memory["shared"].as_bool().unwrap_or(false) || huge(memory),
            }],
        };
        Self {
            zones,
            hotplug_size: memory["hotplug_size"].as_u64().unwrap_or(0),
            beside_zones: if memory["zones"].is_array() { size } else { 0 },
        }
    }

    /// Bytes of RAM.
    pub(super) fn total(&self) -> u64 {
        let zones: u64 = self.zones.iter().map(|zone| zone.size).sum();
        zones + self.beside_zones
    }
}

/// The devices under a key, to be changed; none where the key is absent.
pub(super) fn list_mut<'a>(
    config: &'a mut Value,
    key: &str,
) -> impl Iterator<Item = &'a mut Value> {
    let list = config.get_mut(key).and_then(Value::as_array_mut);
    list.into_iter().flatten()
}

/// Gives every device of a VM that boots its id and MAC, as Cloud Hypervisor does at first
/// boot. Returns the next number for device ids.
pub(super) fn assign_ids(config: &mut Value, random: impl Fn() -> [u8; 3]) -> u64 {
    let mut next = 0;
    let mut give = |device: &mut Value, prefix: &str| {
        if device["id"].is_null() {
            device["id"] = json!(format!("_{prefix}{next}"));
            next += 1;
        }
    };
    for (key, prefix) in [("disks", "disk"), ("net", "net")] {
        for device in list_mut(config, key) {
            give(device, prefix);
        }
    }
    if let Some(vsock) = config.get_mut("vsock").filter(|v| v.is_object()) {
        give(vsock, "vsock");
    }
    for net in list_mut(config, "net") {
        if net["mac"].is_null() {
            let [a, b, c] = random();
            net["mac"] = json!(mac_text([0x02, 0x53, 0x49, a, b, c]));
        }
    }
    next
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_wrong_types_and_missing_fields() {
        let cases = [
            (
                json!({"memory": {"size": "x"}}),
                "invalid type: string \"x\", expected u64",
            ),
            (
                json!({"cpus": {"boot_vcpus": 1}}),
                "missing field `max_vcpus`",
            ),
            (
                json!({"net": [{"mac": "xx"}]}),
                "The provided MAC address is invalid: parsing of xx into a MAC address failed",
            ),
            (
                json!({"disks": {}}),
                "invalid type: map, expected a sequence",
            ),
        ];
        for (config, reason) in cases {
            assert_eq!(complete(&config, Release::DEFAULT).unwrap_err(), reason);
        }
    }

    #[test]
    fn unknown_keys_are_dropped_and_defaults_filled_in() {
        let config = complete(
            &json!({"payload": {"kernel": "k"}, "new_thing": 1}),
            Release::DEFAULT,
        )
        .unwrap();
        assert_eq!(config["memory"]["size"], 512 << 20);
        assert!(config.get("new_thing").is_none());
        assert!(config["payload"].get("initramfs").is_none());
        let old = complete(&json!({"payload": {"kernel": "k"}}), "52".parse().unwrap()).unwrap();
        assert!(old["payload"].get("initramfs").is_some_and(Value::is_null));
    }

    #[test]
    fn refuses_configurations_that_cannot_boot() {
        let kernel = json!({"kernel": "k"});
        let cases = [
            (
                "payload",
                json!({}),
                "Payload configuration is not bootable",
            ),
            (
                "cpus",
                json!({"payload": kernel, "cpus": {"boot_vcpus": 2, "max_vcpus": 1}}),
                "Max CPUs (1) lower than boot CPUs (2)",
            ),
            (
                "ids",
                json!({"payload": kernel, "disks": [{"id": "a"}, {"id": "a"}]}),
                "Identifier a is not unique",
            ),
            (
                "cid",
                json!({"payload": kernel, "vsock": {"cid": 2, "socket": "s"}}),
                "2 is a special VSOCK CID",
            ),
            (
                "queues",
                json!({"payload": kernel, "net": [{"mac": "02:00:00:00:00:01", "num_queues": 4}]}),
                "Queue count (4) must not exceed boot vCPUs (1)",
            ),
            (
                "balloon",
                json!({"payload": kernel, "balloon": {"size": 1_u64 << 40}}),
                "Balloon size (1099511627776) greater than RAM (536870912)",
            ),
        ];
        for (name, config, reason) in cases {
            let config = complete(&config, Release::DEFAULT).unwrap();
            assert_eq!(validate(&config).unwrap_err()[0], reason, "{name}");
        }
    }
}
