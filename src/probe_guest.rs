//! The probe guest: a tiny virtual machine of our own that behaves like a sandbox.
//!
//! A few KiB of freestanding code that Cloud Hypervisor boots as a kernel (PVH). It answers
//! ARP, ICMP echo and the guest agent's HTTP, and proves that it was restored and not
//! rebooted. With it, "real CH, real KVM, real tap, real agent protocol" takes milliseconds
//! and no kernel image. `fixtures/guest/README.md` describes its endpoints; the build script
//! compiles it from `fixtures/guest/src`.

use std::fmt;
use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::path::Path;

/// The guest as an ELF file, or `None` where it was not built: another processor, the feature
/// `probe-guest` off, or a toolchain that could not.
#[cfg(probe_guest)]
pub const ELF: Option<&[u8]> = Some(include_bytes!(env!("REWAKE_PROBE_GUEST")));
/// The guest as an ELF file, or `None` where it was not built: another processor, the feature
/// `probe-guest` off, or a toolchain that could not.
#[cfg(not(probe_guest))]
pub const ELF: Option<&[u8]> = None;

/// The port its agent listens on, envd's.
pub const PORT: u16 = 49983;

/// The most pattern pages that [`expected_checksum`] is asked for in one go: 4 GiB.
pub const PATTERN_PAGES_MAX: u64 = 1 << 20;

/// What the guest is told when it boots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// The guest's address.
    pub address: Ipv4Addr,
    /// The address of the tap, for the record only: the guest answers whoever asks.
    pub gateway: Ipv4Addr,
    /// Pages of 4 KiB filled with a pattern at boot, above the first 4 MiB of RAM.
    pub fill_pages: u64,
    /// Pattern pages written to before the first answer to `/health` after
    /// `/snapshot/prepare`: the working set of a guest that wakes up.
    pub touch_pages: u64,
    /// Poll without end instead of sleeping until a frame comes: the quickest answer where the
    /// host has a processor to spare, and that processor busy for ever.
    pub poll: bool,
    /// The nonce, in place of one gathered at boot.
    pub nonce: Option<u64>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            address: Ipv4Addr::new(169, 254, 0, 21),
            gateway: Ipv4Addr::new(169, 254, 0, 22),
            fill_pages: 64,
            touch_pages: 0,
            poll: false,
            nonce: None,
        }
    }
}

/// The kernel command line.
impl fmt::Display for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            address,
            gateway,
            fill_pages,
            touch_pages,
            poll,
            nonce,
        } = self;
        write!(
            f,
            "ip={address}::{gateway}:255.255.255.252 fill={fill_pages} touch={touch_pages}"
        )?;
        if *poll {
            f.write_str(" idle=poll")?;
        }
        match nonce {
            Some(nonce) => write!(f, " nonce={nonce:x}"),
            None => Ok(()),
        }
    }
}

/// Writes the guest to `path`, a file that must not exist, for CH's `--kernel`.
///
/// # Errors
/// `Unsupported` where there is no guest, else what creating or writing the file says.
pub fn write_to(path: &Path) -> io::Result<()> {
    let elf = ELF.ok_or(io::ErrorKind::Unsupported)?;
    let mut file = fs::File::create_new(path)?;
    io::Write::write_all(&mut file, elf)
}

/// What `GET /probe/checksum?pages=N` must answer on a guest whose memory is whole.
///
/// `pages` beyond [`PATTERN_PAGES_MAX`] are not looked at.
#[must_use]
pub fn expected_checksum(nonce: u64, pages: u64) -> u64 {
    let mut sum = 0;
    for page in 0..pages.min(PATTERN_PAGES_MAX) {
        let first = mix(nonce ^ page);
        // A word in each line of 64 bytes, each one more than the last.
        for line in 0..64 {
            let word = first.wrapping_add(line);
            sum = add(sum, word);
        }
    }
    sum
}

/// What `POST /probe/word?page=P&pages=N&value=V` answers as its checksum, and `GET` for as
/// long as these pages are whole.
#[must_use]
pub fn checksum_of_words(value: u64, pages: u64) -> u64 {
    (0..pages.min(PATTERN_PAGES_MAX)).fold(0, |sum, page| add(sum, value.wrapping_add(page)))
}

fn add(sum: u64, word: u64) -> u64 {
    u64::rotate_left((sum ^ word).wrapping_mul(0x0000_0100_0000_01b3), 23)
}

/// SplitMix64's finisher, as in `fixtures/guest/src/agent.rs`.
fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spells_the_command_line_as_linux_would() {
        let line = "ip=169.254.0.21::169.254.0.22:255.255.255.252 fill=64 touch=0";
        assert_eq!(Settings::default().to_string(), line);
        let fixed = Settings {
            poll: true,
            nonce: Some(0xab),
            ..Settings::default()
        };
        assert_eq!(fixed.to_string(), format!("{line} idle=poll nonce=ab"));
    }
}
