//! Datagrams of the kernel, taken apart.

use rtnetlink::packet_core::NetlinkHeader;
use rtnetlink::packet_route::RouteNetlinkMessage;
use rustix::io::Errno;

use super::error::Refusal;
use super::{HEADER, NLMSG_DONE, NLMSG_ERROR};

const NLM_F_CAPPED: u16 = 0x100;
pub(super) const NLM_F_ACK_TLVS: u16 = 0x200;
const NLMSGERR_ATTR_MSG: u16 = 1;
const NLMSGERR_ATTR_OFFS: u16 = 2;
const NLA_TYPE_MASK: u16 = 0x3fff;
/// The kernel's own texts are one short line.
pub(super) const TEXT_BYTES: usize = 256;

/// Parses one rtnetlink object as [`Socket::dump`] hands it out.
///
/// # Errors
/// A short word where the message is not well-formed.
pub fn parse_route(kind: u16, payload: &[u8]) -> Result<RouteNetlinkMessage, &'static str> {
    use rtnetlink::packet_core::NetlinkDeserializable;
    let mut header = NetlinkHeader::default();
    header.message_type = kind;
    RouteNetlinkMessage::deserialize(&header, payload).map_err(|_| "an unreadable rtnetlink object")
}

/// Walks netlink attributes: kind without its flag bits, and the value. Ends at the first
/// attribute that does not fit.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let (length, kind) = (read_u16(bytes, 0)?, read_u16(bytes, 2)?);
        let value = bytes.get(4..usize::from(length))?;
        bytes = bytes
            .get(usize::from(length).next_multiple_of(4)..)
            .unwrap_or(&[]);
        Some((kind & NLA_TYPE_MASK, value))
    })
}

/// One message of a datagram.
pub(super) struct Message<'a> {
    pub(super) kind: u16,
    pub(super) flags: u16,
    pub(super) sequence: u32,
    pub(super) payload: &'a [u8],
}

impl Message<'_> {
    /// The error number and text of `NLMSG_ERROR` or `NLMSG_DONE`.
    pub(super) fn verdict(&self, step: &str) -> Result<Result<(), Refusal>, &'static str> {
        let code = match read_u32(self.payload, 0) {
            Some(code) => code.cast_signed(),
            None if self.kind == NLMSG_DONE => 0,
            None => return Err("an acknowledgement without a code"),
        };
        if code >= 0 {
            return Ok(Ok(()));
        }
        let mut refusal = Refusal {
            step: step.to_owned(),
            errno: Errno::from_raw_os_error(code.wrapping_neg()),
            text: None,
            offset: None,
        };
        if self.flags & NLM_F_ACK_TLVS != 0 {
            let mut skip = 4;
            if self.kind == NLMSG_ERROR {
                // The refused request is echoed first: its header alone, or all of it.
                let echoed = read_u32(self.payload, 4).unwrap_or(0) as usize;
                skip += if self.flags & NLM_F_CAPPED != 0 {
                    HEADER
                } else {
                    echoed.next_multiple_of(4)
                };
            }
            for (kind, value) in attributes(self.payload.get(skip..).unwrap_or(&[])) {
                match kind {
                    NLMSGERR_ATTR_MSG => {
                        let end = value.iter().position(|b| *b == 0).unwrap_or(value.len());
                        let text = &value[..end.min(TEXT_BYTES)];
                        refusal.text = Some(text.escape_ascii().to_string());
                    }
                    NLMSGERR_ATTR_OFFS => refusal.offset = read_u32(value, 0),
                    _ => {}
                }
            }
        }
        Ok(Err(refusal))
    }
}

/// Splits a datagram into messages; an error ends it.
pub(super) fn messages(
    mut bytes: &[u8],
) -> impl Iterator<Item = Result<Message<'_>, &'static str>> {
    std::iter::from_fn(move || {
        if bytes.is_empty() {
            return None;
        }
        let message = read_u32(bytes, 0)
            .map(|length| length as usize)
            .filter(|length| *length >= HEADER)
            .and_then(|length| Some((length, bytes.get(..length)?)));
        let Some((length, message)) = message else {
            bytes = &[];
            return Some(Err("a message that does not fit its datagram"));
        };
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or(&[]);
        Some(Ok(Message {
            kind: u16::from_ne_bytes([message[4], message[5]]),
            flags: u16::from_ne_bytes([message[6], message[7]]),
            sequence: u32::from_ne_bytes([message[8], message[9], message[10], message[11]]),
            payload: &message[HEADER..],
        }))
    })
}

fn read_u16(bytes: &[u8], at: usize) -> Option<u16> {
    let bytes = bytes.get(at..at + 2)?;
    Some(u16::from_ne_bytes([bytes[0], bytes[1]]))
}

fn read_u32(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at + 4)?;
    Some(u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
}
