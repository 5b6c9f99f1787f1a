//! The fuzz targets: functions over bytes that panic when a property is broken.
//!
//! This file is compiled into the libFuzzer binary and into the replay test,
//! `tests/fuzz_replay.rs`.

/// One target.
pub struct Target {
    /// Its name, and that of its directories of seeds and regressions.
    pub name: &'static str,
    /// What to do with one input.
    pub run: fn(&[u8]),
}

macro_rules! targets {
    ($($name:ident)*) => {
        $(pub mod $name;)*
        /// All of them.
        pub const TARGETS: &[Target] = &[
            $(Target { name: stringify!($name), run: $name::run },)*
        ];
    };
}

// One line per target.
targets! {
    api_error
    canary
    chunked
    envd_json
    http_response
    smaps
    snapshot_config
    snapshot_state
    template_manifest
    vm_config
    vmm_events
    working_set
}

/// A small generator for choices that must depend on nothing but the input.
pub struct Choices(u64);

impl Choices {
    /// Seeded with a hash of the bytes (FNV-1a).
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
        });
        Self(hash | 1)
    }

    /// The next number (xorshift64*).
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `end`, zero where `end` is.
    pub fn below(&mut self, end: usize) -> usize {
        match end as u64 {
            0 => 0,
            end => ((self.next() >> 16) % end) as usize,
        }
    }

    /// The bytes in pieces of random length.
    pub fn pieces<'a>(&mut self, mut bytes: &'a [u8], longest: usize) -> Vec<&'a [u8]> {
        let mut pieces = Vec::new();
        while !bytes.is_empty() {
            let len = (1 + self.below(longest)).min(bytes.len());
            let (piece, rest) = bytes.split_at(len);
            pieces.push(piece);
            bytes = rest;
        }
        pieces
    }
}
