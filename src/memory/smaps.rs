//! `/proc/PID/smaps`, read with bounds (Documentation/filesystems/proc.rst;
//! fs/proc/task_mmu.c, `show_smap`).

use crate::wire::excerpt::excerpt;

/// Most mappings of one process.
const MAX_MAPPINGS: usize = 65_536;
/// Longest line: a path of 4096 bytes, escaped, and what stands before it.
const MAX_LINE: usize = 20_000;

/// Something in `smaps` that is not what the kernel writes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SmapsError {
    /// A mapping's first line.
    #[error("Line {line} is no mapping: {text}")]
    Header {
        /// From 1.
        line: usize,
        /// The line, escaped and cut.
        text: String,
    },
    /// A value that is no size.
    #[error("Line {line} is no size: {text}")]
    Value {
        /// From 1.
        line: usize,
        /// The line, escaped and cut.
        text: String,
    },
    /// A value before the first mapping.
    #[error("Line {line} belongs to no mapping")]
    Stray {
        /// From 1.
        line: usize,
    },
    /// More mappings or longer lines than a process has.
    #[error("Line {line} exceeds the limit of {limit} {what}")]
    TooMuch {
        /// From 1.
        line: usize,
        /// Of what there is too much.
        what: &'static str,
        /// How much is accepted.
        limit: usize,
    },
}

/// One mapping of a process. Sizes are in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Mapping {
    /// The first address.
    pub start: u64,
    /// The first address after it.
    pub end: u64,
    /// Whether it is private: written pages are copies.
    pub is_private: bool,
    /// Where it begins in its file.
    pub offset: u64,
    /// The file's inode, 0 where there is none.
    pub inode: u64,
    /// The file's path or the mapping's name, as the kernel writes it; mostly for people.
    pub name: String,
    /// Present pages.
    pub resident: u64,
    /// Present pages, each divided by the processes that map it.
    pub proportional: u64,
    /// Pages without a file behind them: anonymous memory, and copies in a private mapping.
    pub anonymous: u64,
    /// Present pages that other processes map, too.
    pub shared: u64,
    /// Pages that were swapped out.
    pub swapped: u64,
    /// Whether it is left out of core dumps, and belongs to no device.
    dont_dump: bool,
}

impl Mapping {
    /// Its size.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.end.saturating_sub(self.start)
    }

    /// Whether CH has marked it as guest RAM.
    #[must_use]
    pub const fn is_guest_ram(&self) -> bool {
        self.dont_dump
    }

    /// Whether a file with a name is behind it, so that its pages are the page cache's.
    #[must_use]
    pub fn has_file(&self) -> bool {
        self.inode != 0 && !self.name.starts_with("/memfd:") && !self.name.starts_with("/dev/zero")
    }

    /// Pages that cost this process alone: without a file, or in one without a name.
    #[must_use]
    pub fn private(&self) -> u64 {
        let present = if self.has_file() {
            self.anonymous
        } else {
            self.resident.saturating_sub(self.shared)
        };
        present.saturating_add(self.swapped)
    }

    /// Pages of its file.
    #[must_use]
    pub fn file(&self) -> u64 {
        if self.has_file() {
            self.resident.saturating_sub(self.anonymous)
        } else {
            0
        }
    }
}

/// Reads all of `smaps`.
///
/// Keys that are not known are passed over, so that newer kernels are understood.
///
/// # Errors
/// [`SmapsError`]: the first line that no kernel writes.
pub fn parse(text: &[u8]) -> Result<Vec<Mapping>, SmapsError> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for (index, bytes) in text.split(|byte| *byte == b'\n').enumerate() {
        let line = index + 1;
        if bytes.is_empty() {
            continue;
        }
        let too_much = |what, limit| SmapsError::TooMuch { line, what, limit };
        if bytes.len() > MAX_LINE {
            return Err(too_much("bytes", MAX_LINE));
        }
        let row = String::from_utf8_lossy(bytes);
        match key_of(&row) {
            None => {
                if mappings.len() == MAX_MAPPINGS {
                    return Err(too_much("mappings", MAX_MAPPINGS));
                }
                let header = header(&row).ok_or_else(|| SmapsError::Header {
                    line,
                    text: excerpt(bytes),
                })?;
                mappings.push(header);
            }
            Some((key, value)) => {
                let mapping = mappings.last_mut().ok_or(SmapsError::Stray { line })?;
                note(mapping, key, value).ok_or_else(|| SmapsError::Value {
                    line,
                    text: excerpt(bytes),
                })?;
            }
        }
    }
    Ok(mappings)
}

/// `Rss:   8 kB` is a key and its value; a mapping's first line begins with hexadecimal digits.
fn key_of(row: &str) -> Option<(&str, &str)> {
    let (key, value) = row.split_once(':')?;
    let is_key = key
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    (is_key && !key.is_empty()).then_some((key, value.trim()))
}

/// `start-end rwxp offset major:minor inode   name`.
fn header(row: &str) -> Option<Mapping> {
    let mut rest = row;
    let mut next = || {
        let trimmed = rest.trim_start_matches(' ');
        let (field, after) = trimmed.split_once(' ').unwrap_or((trimmed, ""));
        rest = after;
        field
    };
    let hex = |digits: &str| u64::from_str_radix(digits, 16).ok();
    let (start, end) = next().split_once('-')?;
    let (start, end) = (hex(start)?, hex(end)?);
    let permissions = next();
    let is_private = match permissions.as_bytes() {
        [_, _, _, b'p'] => true,
        [_, _, _, b's'] => false,
        _ => return None,
    };
    let offset = hex(next())?;
    next().split_once(':')?;
    let inode = next().parse().ok()?;
    (start < end).then(|| Mapping {
        start,
        end,
        is_private,
        offset,
        inode,
        name: rest.trim_start_matches(' ').to_owned(),
        ..Mapping::default()
    })
}

/// Takes a value up, if it is one that counts.
fn note(mapping: &mut Mapping, key: &str, value: &str) -> Option<()> {
    let field = match key {
        "Rss" => &mut mapping.resident,
        "Pss" => &mut mapping.proportional,
        "Anonymous" => &mut mapping.anonymous,
        "Shared_Clean" | "Shared_Dirty" => {
            mapping.shared = mapping.shared.checked_add(kilobytes(value)?)?;
            return Some(());
        }
        "Swap" => &mut mapping.swapped,
        "VmFlags" => {
            let has = |flag: &str| value.split(' ').any(|known| known == flag);
            // Device memory and the kernel's own pages are not dumped either.
            mapping.dont_dump = has("dd") && !has("io") && !has("pf");
            return Some(());
        }
        _ => return Some(()),
    };
    *field = kilobytes(value)?;
    Some(())
}

fn kilobytes(value: &str) -> Option<u64> {
    let number = value.strip_suffix("kB")?.trim_end();
    let plain = number.bytes().all(|byte| byte.is_ascii_digit());
    number
        .parse::<u64>()
        .ok()
        .filter(|_| plain)?
        .checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO: &str = "\
7f0000000000-7f0008000000 rw-p c0000000 fe:00 77   /var/lib/a b/memory
Size:             131072 kB
Rss:                 400 kB
Pss:                 150 kB
Shared_Clean:        300 kB
Shared_Dirty:          0 kB
Private_Clean:        60 kB
Private_Dirty:        40 kB
Anonymous:            40 kB
Swap:                  8 kB
SomethingNew:  whatever it is
VmFlags: rd wr mr mw me nr dd hg 
7ffd00000000-7ffd00004000 r--p 00000000 00:00 0          [vvar]
Rss:                   0 kB
VmFlags: rd mr pf io de dd 
";

    #[test]
    fn mappings_are_read_with_what_counts() {
        let mappings = parse(TWO.as_bytes()).unwrap();
        let [ram, kernel] = &mappings[..] else {
            panic!("{mappings:?}")
        };
        assert!(ram.is_guest_ram() && !kernel.is_guest_ram());
        assert_eq!(
            (ram.size(), ram.offset, ram.inode),
            (128 << 20, 3 << 30, 77)
        );
        assert_eq!(ram.name, "/var/lib/a b/memory");
        assert_eq!(ram.private(), 48 << 10);
        assert_eq!(ram.file(), 360 << 10);
        assert_eq!(ram.shared, 300 << 10);
    }

    #[test]
    fn memory_in_a_file_without_a_name_is_private() {
        let text = TWO.replace("/var/lib/a b/memory", "/memfd:ch_ram (deleted)");
        let mappings = parse(text.as_bytes()).unwrap();
        assert_eq!(mappings[0].private(), 108 << 10);
        assert_eq!(mappings[0].file(), 0);
    }

    #[test]
    fn what_no_kernel_writes_is_refused_with_its_line() {
        for (from, to, line) in [
            ("7f0000000000-7f0008000000", "7f00", 1),
            ("7f0000000000-7f0008000000", "2-1", 1),
            ("rw-p", "rwp", 1),
            ("fe:00 77", "fe:00 -7", 1),
            ("400 kB", "400 MB", 3),
            ("400 kB", "+400 kB", 3),
            ("400 kB", "99999999999999999999 kB", 3),
            ("400 kB", "18446744073709551615 kB", 3),
        ] {
            let text = TWO.replacen(from, to, 1);
            let error = parse(text.as_bytes()).unwrap_err();
            let found = match error {
                SmapsError::Header { line, .. } | SmapsError::Value { line, .. } => line,
                other => panic!("{to}: {other:?}"),
            };
            assert_eq!(found, line, "{to}");
        }
        assert_eq!(parse(b"Rss: 1 kB\n"), Err(SmapsError::Stray { line: 1 }));
        let long = vec![b'a'; MAX_LINE + 1];
        assert!(matches!(parse(&long), Err(SmapsError::TooMuch { .. })));
    }
}
