//! All fuzz targets in one libFuzzer binary; `FUZZ_TARGET` names the one to run.
#![no_main]

#[path = "../targets/mod.rs"]
mod targets;

use std::sync::OnceLock;

static TARGET: OnceLock<fn(&[u8])> = OnceLock::new();

libfuzzer_sys::fuzz_target!(
    init: {
        let name = std::env::var("FUZZ_TARGET").unwrap_or_default();
        let Some(target) = targets::TARGETS.iter().find(|t| t.name == name) else {
            let names: Vec<_> = targets::TARGETS.iter().map(|t| t.name).collect();
            eprintln!("FUZZ_TARGET must be one of: {}", names.join(" "));
            std::process::exit(2);
        };
        let _ = TARGET.set(target.run);
    },
    |data: &[u8]| {
        if let Some(run) = TARGET.get() {
            run(data);
        }
    }
);
