//! Sizes with their unit in the type.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A number of bytes. In JSON it is a plain number.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Bytes(pub u64);

impl Bytes {
    /// `n` MiB.
    #[must_use]
    pub const fn mib(n: u64) -> Self {
        Self(n << 20)
    }

    /// `n` GiB.
    #[must_use]
    pub const fn gib(n: u64) -> Self {
        Self(n << 30)
    }

    /// Whole sectors of 512 bytes that fit into this size.
    #[must_use]
    pub const fn sectors(self) -> Sectors {
        Sectors(self.0 >> 9)
    }

    /// GiB, rounded up.
    #[must_use]
    pub const fn gib_rounded_up(self) -> u64 {
        self.0.div_ceil(1 << 30)
    }
}

impl fmt::Display for Bytes {
    /// Binary units with at most one decimal: `512 B`, `1.5 KiB`, `4 GiB`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
        let mut unit = 0;
        while unit + 1 < UNITS.len() && self.0 >> (10 * (unit + 1)) != 0 {
            unit += 1;
        }
        let shift = 10 * unit;
        let whole = self.0 >> shift;
        let tenths = if unit == 0 {
            0
        } else {
            ((self.0 >> (shift - 10)) & 1023) * 10 / 1024
        };
        let text = if tenths == 0 {
            format!("{whole} {}", UNITS[unit])
        } else {
            format!("{whole}.{tenths} {}", UNITS[unit])
        };
        f.pad(&text)
    }
}

/// A number of 512-byte sectors, the unit of the kernel's block layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Sectors(pub u64);

impl Sectors {
    /// The size in bytes, `None` past `u64`.
    #[must_use]
    pub const fn bytes(self) -> Option<Bytes> {
        match self.0.checked_mul(512) {
            Some(bytes) => Some(Bytes(bytes)),
            None => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_print_in_binary_units() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1536, "1.5 KiB"),
            (128 << 20, "128 MiB"),
            (u64::MAX, "15.9 EiB"),
        ] {
            assert_eq!(Bytes(bytes).to_string(), text, "{bytes}");
        }
    }

    #[test]
    fn sectors_refuse_sizes_past_u64() {
        assert_eq!(Sectors(2).bytes(), Some(Bytes(1024)));
        assert_eq!(Sectors(u64::MAX).bytes(), None);
    }
}
