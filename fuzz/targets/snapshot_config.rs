//! `config.json` of a snapshot: whatever it says, a rewritten configuration names nothing of
//! the host but what the caller gave, is written and read back the same, and is not changed
//! by rewriting it again.

use std::path::PathBuf;

use rewake::ids::IfName;
use rewake::snapshot::{
    ConfigOverrides, DiskOverride, HostItemKind, MemoryBacking, TapOverride, TapSource, review,
    rewrite,
};
use rewake::vm_config::VmConfig;
use serde_json::Value;

use super::Choices;

/// A configuration with every field that there is.
const EVERYTHING: &[u8] = include_bytes!("../seeds/snapshot_config/every-field");
const DISK: &str = "/given/disk";
const SOCKET: &str = "/given/vsock";
const TAP: &str = "given0";

/// The input is a `config.json`. Some of the many fields are then taken from another one.
pub fn run(data: &[u8]) {
    check(data);
    let mut choices = Choices::from_bytes(data);
    let (Ok(Value::Object(mut value)), Ok(Value::Object(everything))) =
        (serde_json::from_slice(data), serde_json::from_slice(EVERYTHING))
    else {
        return;
    };
    for (key, other) in everything {
        if choices.below(12) == 0 {
            value.insert(key, other);
        }
    }
    check(&Value::Object(value).to_string().into_bytes());
}

fn check(bytes: &[u8]) {
    let Ok((config, _)) = VmConfig::parse(bytes) else {
        return;
    };
    let _ = review(&config);
    let given = ConfigOverrides {
        disks: each_id(config.disks.iter().flatten().map(|d| d.id.clone()))
            .map(|disk| DiskOverride {
                disk,
                path: PathBuf::from(DISK),
                image_type: None,
            })
            .collect(),
        taps: each_id(config.net.iter().flatten().map(|n| n.id.clone()))
            .map(|device| TapOverride {
                device,
                tap: TapSource::Name(IfName::new(TAP).expect("a valid name")),
            })
            .collect(),
        vsock_socket: Some(PathBuf::from(SOCKET)),
        memory: MemoryBacking::Anonymous,
        ..ConfigOverrides::default()
    };
    for overrides in [ConfigOverrides::default(), given] {
        let rebuilt = match rewrite(&config, &overrides) {
            Ok(rebuilt) => rebuilt,
            Err(refusal) => {
                assert!(!refusal.items.is_empty(), "a refusal without reason");
                continue;
            }
        };
        for item in review(&rebuilt) {
            let expected = match item.kind {
                HostItemKind::Disk => item.value == DISK,
                HostItemKind::Tap => item.value == TAP,
                HostItemKind::ListeningSocket => item.value == SOCKET,
                HostItemKind::RandomSource => item.value.starts_with("/dev/"),
                HostItemKind::BootImage => item.at != "payload.igvm",
                HostItemKind::GuestMac | HostItemKind::Identity => true,
                _ => false,
            };
            assert!(expected, "a reference to the host is left: {item}");
        }
        let written = serde_json::to_vec(&rebuilt).expect("a configuration is JSON");
        let (read, unknown) = VmConfig::parse(&written).expect("it reads what it wrote");
        assert_eq!(read, rebuilt, "round trip");
        assert!(unknown.is_empty(), "{unknown}");
        assert_eq!(rewrite(&rebuilt, &overrides), Ok(rebuilt), "rewritten twice");
    }
}

/// `None` for the only one, as that needs no name.
fn each_id(ids: impl Iterator<Item = Option<String>>) -> impl Iterator<Item = Option<String>> {
    let ids: Vec<_> = ids.collect();
    let only = ids.len() == 1;
    ids.into_iter().map(move |id| if only { None } else { id })
}
