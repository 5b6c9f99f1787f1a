//! `config.json`: what can be read is written back as the same configuration.

use rewake::vm_config::VmConfig;

/// The input is a `config.json`.
pub fn run(data: &[u8]) {
    let Ok((config, _)) = VmConfig::parse(data) else {
        return;
    };
    let written = serde_json::to_vec(&config).expect("what came from JSON is JSON");
    let (again, unknown) = VmConfig::parse(&written).expect("own output can be read");
    assert!(unknown.is_empty(), "own output is known: {unknown}");
    assert_eq!(again, config, "round trip");
}
