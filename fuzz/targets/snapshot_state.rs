//! `state.json` of a snapshot: where memory can be mapped from a file, the rewritten state is
//! a state again, differs in nothing but the memory's place, and every mapping has a place of
//! its own inside the file.

use rewake::snapshot::{MemoryLayout, MemorySource, State, StateLimits};
use rewake::units::Bytes;
use rewake::vm_config::{MemoryZoneConfig, VmConfig};
use serde_json::Value;

/// The input is a `state.json`.
pub fn run(data: &[u8]) {
    let limits = StateLimits::default();
    let Ok(state) = State::parse(data.to_vec(), &limits) else {
        return;
    };
    assert_eq!(state.as_bytes(), data, "kept as it was");
    // They may refuse, and must not panic.
    let _ = (state.cpu(), state.has_clock());
    for id in state.device_ids() {
        let _ = state.guest_mac(id);
    }
    let memory = state.memory();
    for config in configs(&memory.mappings()[0].zone_id, memory.ram()) {
        let Ok(layout) = MemoryLayout::analyse(&config, memory) else {
            continue;
        };
        let mut places: Vec<_> = layout
            .offsets()
            .iter()
            .zip(memory.mappings())
            .map(|(offset, mapping)| (*offset, offset + mapping.size))
            .collect();
        places.sort_unstable();
        assert!(places.windows(2).all(|pair| pair[0].1 <= pair[1].0), "aliased");
        assert!(places.iter().all(|(_, end)| *end <= layout.file_size().0));
        if *layout.source() == MemorySource::Saved {
            assert_eq!(layout.file_size(), memory.saved(), "all of the file, and no more");
        }

        let bytes = state.mapped_from_file(&layout).expect("its own layout");
        let again = State::parse(bytes.clone(), &limits).expect("it reads what it wrote");
        assert_eq!(again.memory().saved(), Bytes(0), "nothing to copy");
        for (index, mapping) in again.memory().mappings().iter().enumerate() {
            let mut before = memory.mappings()[index].clone();
            before.file_offset = layout.offsets()[index];
            assert_eq!(*mapping, before, "only the offset differs");
        }
        assert_eq!(again.mapped_from_file(&layout).expect("same layout"), bytes);
        assert_eq!(without_memory(&bytes), without_memory(data), "all else is the same");
    }
}

/// One without zones, and one with a zone whose file was not saved.
fn configs(zone: &str, ram: Bytes) -> [VmConfig; 2] {
    let mut plain = VmConfig::default();
    plain.memory.size = ram.0;
    let mut zoned = VmConfig::default();
    zoned.memory.size = 0;
    zoned.memory.zones = Some(vec![MemoryZoneConfig {
        id: zone.to_owned(),
        size: ram.0,
        file: Some("/ram".into()),
        shared: true,
        ..MemoryZoneConfig::default()
    }]);
    [plain, zoned]
}

/// `None` where a general JSON reader has other bounds.
fn without_memory(state: &[u8]) -> Option<Value> {
    let mut tree: Value = serde_json::from_slice(state).ok()?;
    tree["snapshots"]["memory-manager"]["snapshot_data"] = Value::Null;
    Some(tree)
}
