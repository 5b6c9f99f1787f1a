//! Checksums, and the digest of a memory layout.

use std::fmt;
use std::io::{self, Read};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use sha2::{Digest, Sha256};

use crate::snapshot::MemoryState;
use crate::vm_config::VmConfig;

/// A SHA-256, printed as 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Sha256Hex([u8; 32]);

/// The text is no SHA-256.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("A SHA-256 has 64 hexadecimal digits in lower case")]
pub struct DigestError;

impl Sha256Hex {
    /// The digest of these bytes.
    #[must_use]
    pub fn of_bytes(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// The digest of all that can be read, and how much that was. Blocks.
    ///
    /// # Errors
    /// What reading says.
    pub fn of_reader(mut reader: impl Read) -> io::Result<(Self, u64)> {
        let mut hash = Sha256::new();
        let mut buffer = vec![0; 1 << 18];
        let mut length = 0;
        loop {
            match reader.read(&mut buffer) {
                Ok(0) => return Ok((Self(hash.finalize().into()), length)),
                Ok(count) => {
                    hash.update(&buffer[..count]);
                    length += count as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// What tells two memory layouts apart: the zones with their sizes, what was saved, and
    /// where each RAM mapping is. Two snapshots with the same digest have each byte of guest
    /// memory at the same place of their memory files.
    #[must_use]
    pub fn of_layout(config: &VmConfig, memory: &MemoryState) -> Self {
        let mut hash = Sha256::new();
        let mut line = |text: String| {
            hash.update(text.as_bytes());
            hash.update(b"\n");
        };
        line(format!("size {}", config.memory.size));
        for zone in config.memory.zones.iter().flatten() {
            line(format!("zone {:?} {}", zone.id, zone.size));
        }
        for range in memory.ranges() {
            line(format!("saved {} {}", range.gpa, range.length));
        }
        for mapping in memory.mappings() {
            let zone = &mapping.zone_id;
            let (gpa, size, offset) = (mapping.gpa, mapping.size, mapping.file_offset);
            let hotplugged = mapping.virtio_mem;
            line(format!("ram {zone:?} {gpa} {size} {offset} {hotplugged}"));
        }
        Self(hash.finalize().into())
    }
}

impl fmt::Display for Sha256Hex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Sha256Hex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Sha256Hex {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, DigestError> {
        let digit = |byte: u8| match byte {
            b'0'..=b'9' => Ok(byte - b'0'),
            b'a'..=b'f' => Ok(byte - b'a' + 10),
            _ => Err(DigestError),
        };
        if text.len() != 64 {
            return Err(DigestError);
        }
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
            *byte = digit(pair[0])? << 4 | digit(pair[1])?;
        }
        Ok(Self(bytes))
    }
}

impl Serialize for Sha256Hex {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Sha256Hex {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_the_standards_and_read_back() {
        // FIPS 180-2, appendix B.1.
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        let digest = Sha256Hex::of_bytes(b"abc");
        assert_eq!(digest.to_string(), abc);
        assert_eq!(abc.parse(), Ok(digest));
        assert_eq!(Sha256Hex::of_reader(&b"abc"[..]).unwrap(), (digest, 3));
        for bad in ["", "ba", &abc.to_uppercase(), &format!("{abc}00")] {
            assert_eq!(bad.parse::<Sha256Hex>(), Err(DigestError), "{bad}");
        }
    }
}
