//! What follows the header in a buffer: targets, lists and dependencies, as bytes.

use rustix::io::Errno;

use super::{Listed, Target};
use crate::error::CallError;

const TYPE_LEN: usize = 16;
/// `struct dm_target_spec`: start, length, status, next, type; the parameters follow.
const SPEC: usize = 40;
const _: () = assert!(8 + 8 + 4 + 4 + TYPE_LEN == SPEC);

/// Longest parameters of a target.
const TEXT_MAX: usize = 16 << 10;
/// A record of the list has a uuid (`DM_NAME_LIST_FLAG_HAS_UUID`).
const HAS_UUID: u32 = 1;

/// Writes a text with its closing zero.
pub(super) fn fill(field: &mut [u8], text: &str) -> Result<(), CallError> {
    let bytes = text.as_bytes();
    if bytes.len() >= field.len() || bytes.contains(&0) {
        return Err(CallError::new("dm ioctl", Errno::NAMETOOLONG));
    }
    field[..bytes.len()].copy_from_slice(bytes);
    Ok(())
}

pub(super) fn encode_target(data: &mut Vec<u8>, target: &Target) -> Result<(), CallError> {
    let text = target.text.as_bytes();
    if text.contains(&0) || text.len() > TEXT_MAX {
        return Err(CallError::new("DM_TABLE_LOAD", Errno::INVAL));
    }
    let next = (SPEC + text.len() + 1).next_multiple_of(8);
    let start = data.len();
    data.extend_from_slice(&target.start.to_ne_bytes());
    data.extend_from_slice(&target.length.to_ne_bytes());
    data.extend_from_slice(&0i32.to_ne_bytes());
    data.extend_from_slice(&u32::try_from(next).unwrap_or(u32::MAX).to_ne_bytes());
    let mut kind = [0; TYPE_LEN];
    fill(&mut kind, &target.kind)?;
    data.extend_from_slice(&kind);
    data.extend_from_slice(text);
    data.resize(start + next, 0);
    Ok(())
}

/// Targets as the kernel lists them; `next` counts from the first one.
pub(super) fn parse_targets(data: &[u8], count: u32) -> Option<Vec<Target>> {
    let mut targets = Vec::new();
    let mut at = 0usize;
    for _ in 0..count {
        let spec = data.get(at..at.checked_add(SPEC)?)?;
        targets.push(Target {
            start: read_u64(spec, 0)?,
            length: read_u64(spec, 8)?,
            kind: text(&spec[24..])?,
            text: text(&data[at + SPEC..])?,
        });
        let next = read_u32(spec, 20)? as usize;
        // Always forward, so a wrong answer ends.
        if next <= at && targets.len() < count as usize {
            return None;
        }
        at = next;
    }
    Some(targets)
}

/// `struct dm_name_list`, each with a number of bytes to the next one.
pub(super) fn parse_list(data: &[u8]) -> Option<Vec<Listed>> {
    let mut list = Vec::new();
    let mut rest = data;
    while rest.len() > 12 {
        let device = read_u64(rest, 0)?;
        let next = read_u32(rest, 8)? as usize;
        // An empty list is one record of zeros.
        if device == 0 {
            break;
        }
        let record = if next == 0 { rest } else { rest.get(..next)? };
        let name = text(&record[12..])?;
        // Behind the name, aligned to 8: event number, flags, uuid. Older kernels have the
        // event number only, and no flag.
        let behind = (12 + name.len() + 1).next_multiple_of(8);
        let uuid = match read_u32(record, behind + 4) {
            Some(flags) if flags & HAS_UUID != 0 => Some(text(record.get(behind + 8..)?)?),
            _ => None,
        };
        list.push(Listed {
            device,
            name,
            uuid,
            event: read_u32(record, behind),
        });
        if next == 0 {
            break;
        }
        rest = rest.get(next.max(12)..)?;
    }
    Some(list)
}

/// `struct dm_target_deps`.
pub(super) fn parse_deps(data: &[u8]) -> Option<Vec<u64>> {
    let count = read_u32(data, 0)? as usize;
    let devices = data.get(8..count.checked_mul(8)?.checked_add(8)?)?;
    (0..count).map(|i| read_u64(devices, i * 8)).collect()
}

pub(super) fn text(bytes: &[u8]) -> Option<String> {
    let len = bytes.iter().position(|byte| *byte == 0)?;
    Some(String::from_utf8_lossy(&bytes[..len]).into_owned())
}

pub(super) fn read_u32(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_ne_bytes(bytes.try_into().ok()?))
}

pub(super) fn read_u64(bytes: &[u8], at: usize) -> Option<u64> {
    let bytes = bytes.get(at..at.checked_add(8)?)?;
    Some(u64::from_ne_bytes(bytes.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_aligned_and_linked() {
        let target = Target {
            start: 0,
            length: 2048,
            kind: "snapshot".into(),
            text: "7:0 7:1 PO 8".into(),
        };
        let mut data = Vec::new();
        encode_target(&mut data, &target).unwrap();
        assert_eq!(data.len(), 56);
        assert_eq!(read_u32(&data, 20), Some(56));
        assert_eq!(&data[24..32], b"snapshot");
        encode_target(&mut data, &target).unwrap();
        assert_eq!(data.len(), 112);
        // Sent, each counts from itself; received, from the first one.
        data[56 + 20..56 + 24].copy_from_slice(&112u32.to_ne_bytes());
        assert_eq!(
            parse_targets(&data, 2).unwrap(),
            [target.clone(), target.clone()]
        );
        for (name, kind, text) in [
            ("a zero inside", "snapshot", "7:0\0"),
            ("a type too long", "sixteen-bytes-xx", ""),
        ] {
            let target = Target {
                kind: kind.into(),
                text: text.into(),
                ..target.clone()
            };
            assert!(encode_target(&mut Vec::new(), &target).is_err(), "{name}");
        }
    }

    #[test]
    fn lists_are_read_with_and_without_uuids() {
        let record = |next: u32, name: &[u8], uuid: Option<&[u8]>| {
            let mut bytes = 0xfd00u64.to_ne_bytes().to_vec();
            bytes.extend_from_slice(&next.to_ne_bytes());
            bytes.extend_from_slice(name);
            bytes.push(0);
            bytes.resize(bytes.len().next_multiple_of(8), 0);
            bytes.extend_from_slice(&3u32.to_ne_bytes());
            bytes.extend_from_slice(&if uuid.is_some() { 1u32 } else { 2 }.to_ne_bytes());
            if let Some(uuid) = uuid {
                bytes.extend_from_slice(uuid);
                bytes.push(0);
            }
            bytes.resize(bytes.len().next_multiple_of(8), 0);
            bytes
        };
        let first = record(32, b"one", Some(b"U-1"));
        assert_eq!(first.len(), 32);
        let data = [first, record(0, b"two", None)].concat();
        let list = parse_list(&data).unwrap();
        assert_eq!(list[0].uuid.as_deref(), Some("U-1"));
        assert_eq!((list[1].name.as_str(), &list[1].uuid), ("two", &None));
        assert_eq!([list[0].event, list[1].event], [Some(3); 2]);
        assert_eq!(parse_list(&[0; 16]), Some(Vec::new()));
        assert_eq!(parse_list(&[]), Some(Vec::new()));
    }

    #[test]
    fn refuses_answers_that_point_outside() {
        let mut data = Vec::new();
        let target = Target {
            start: 0,
            length: 8,
            kind: "zero".into(),
            text: String::new(),
        };
        encode_target(&mut data, &target).unwrap();
        assert!(parse_targets(&data, 1).is_some());
        assert!(parse_targets(&data, 2).is_none(), "beyond the end");
        assert!(parse_targets(&data[..SPEC - 1], 1).is_none(), "cut");
        data[20..24].copy_from_slice(&0u32.to_ne_bytes());
        assert!(parse_targets(&data, 2).is_none(), "backwards");
        assert!(parse_deps(&[255; 16]).is_none(), "more than there is");
    }
}
