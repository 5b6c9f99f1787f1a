//! A peer of the guest's network, frame by frame.

use crate::agent::{Agent, Board};
use crate::link::{Host, add_checksum, be16, be32, finish_checksum};
use crate::tcp::{Buffers, PORT};

pub(crate) const GUEST_MAC: [u8; 6] = [2, 0xfc, 0, 0, 0, 5];
const PEER_MAC: [u8; 6] = [2, 0xfc, 0, 0, 0, 6];
pub(crate) const GUEST: [u8; 4] = [169, 254, 0, 21];
const PEER: [u8; 4] = [169, 254, 0, 22];

pub(crate) const FIN: u8 = 1;
pub(crate) const SYN: u8 = 2;
pub(crate) const RST: u8 = 4;
pub(crate) const PSH: u8 = 8;
pub(crate) const ACK: u8 = 16;

/// A machine of one MiB with four pattern pages and a clock of one tick per microsecond.
pub(crate) struct PaperBoard {
    pub(crate) now: u64,
    pub(crate) read: u64,
    pub(crate) touched: Vec<u64>,
    pub(crate) words: [u64; 8],
}

impl Board for PaperBoard {
    fn ticks(&self) -> u64 {
        self.now
    }
    fn ticks_per_second(&self) -> u64 {
        1_000_000
    }
    fn ram_pages(&self) -> u64 {
        256
    }
    fn regions(&self) -> u64 {
        2
    }
    fn read_ram(&mut self, first: u64, count: u64) {
        assert_eq!(first, self.read);
        self.read += count;
        self.now += count;
    }
    fn pattern_pages(&self) -> u64 {
        4
    }
    fn touch_pattern(&mut self, page: u64) {
        self.touched.push(page);
    }
    fn checksum_pattern(&self, page: u64, sum: u64) -> u64 {
        sum * 10 + page + 1
    }
    fn ram_word(&mut self, page: u64, value: Option<u64>) -> Option<u64> {
        let word = self.words.get_mut(page as usize)?;
        *word = value.unwrap_or(*word);
        Some(*word)
    }
}

/// The guest without its hardware.
pub(crate) struct PaperGuest {
    host: Host<'static>,
    pub(crate) agent: Agent<PaperBoard>,
    seed: u32,
}

/// A segment from the guest.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) to: u16,
    pub(crate) sequence: u32,
    pub(crate) acknowledged: u32,
    pub(crate) flags: u8,
    pub(crate) payload: Vec<u8>,
}

impl PaperGuest {
    pub(crate) fn new() -> Self {
        let buffers = Box::leak(Box::new(Buffers::new()));
        let board = PaperBoard {
            now: 1000,
            read: 0,
            touched: Vec::new(),
            words: [0; 8],
        };
        Self {
            host: Host::new(GUEST_MAC, GUEST, buffers),
            agent: Agent::new(board, 0xabcd, 3),
            seed: 77,
        }
    }

    /// Hands a frame to the guest.
    pub(crate) fn send(&mut self, frame: &[u8]) -> Option<Vec<u8>> {
        let mut out = [0xee; 1514];
        self.seed = self
            .seed
            .wrapping_mul(1_664_525)
            .wrapping_add(1_013_904_223);
        let length = self
            .host
            .receive(frame, &mut out, &mut self.agent, self.seed);
        (length > 0).then(|| out[..length].to_vec())
    }

    /// Hands a segment to the guest and takes its answer apart, checksums included.
    pub(crate) fn segment(
        &mut self,
        from: u16,
        sequence: u32,
        acknowledged: u32,
        flags: u8,
        payload: &[u8],
    ) -> Option<Segment> {
        let reply = self.send(&tcp_frame(
            from,
            PORT,
            sequence,
            acknowledged,
            flags,
            payload,
        ))?;
        Some(read_segment(&reply))
    }

    /// Opens a connection: the guest's next sequence number.
    pub(crate) fn connect(&mut self, from: u16, sequence: u32) -> u32 {
        let reply = self
            .segment(from, sequence, 0, SYN, b"")
            .expect("an answer to SYN");
        assert_eq!(
            (reply.flags, reply.acknowledged),
            (SYN | ACK, sequence.wrapping_add(1))
        );
        let next = reply.sequence.wrapping_add(1);
        assert_eq!(
            self.segment(from, sequence.wrapping_add(1), next, ACK, b""),
            None
        );
        next
    }

    /// One request on a connection of its own, from the first SYN to the last ACK: the answer.
    pub(crate) fn exchange(&mut self, from: u16, request: &str) -> String {
        let next = self.connect(from, 9000);
        let request = request.replace("\r\n\r\n", "\r\nConnection: close\r\n\r\n");
        let answer = self
            .segment(from, 9001, next, PSH | ACK, request.as_bytes())
            .expect("an answer");
        assert_eq!(answer.flags, PSH | ACK | FIN, "{answer:?}");
        let end = answer
            .sequence
            .wrapping_add(answer.payload.len() as u32 + 1);
        let sent = 9001 + request.len() as u32;
        let last = self
            .segment(from, sent, end, FIN | ACK, b"")
            .expect("an acknowledgement");
        assert_eq!(
            (last.flags, last.acknowledged, last.sequence),
            (ACK, sent + 1, end)
        );
        String::from_utf8(answer.payload).unwrap()
    }
}

pub(crate) fn ipv4_frame(protocol: u8, to: [u8; 4], body: &[u8]) -> Vec<u8> {
    let mut header = vec![0x45, 0, 0, 0, 0, 7, 0x40, 0, 64, protocol, 0, 0];
    header[2..4].copy_from_slice(&(20 + body.len() as u16).to_be_bytes());
    header.extend(PEER);
    header.extend(to);
    let checksum = finish_checksum(add_checksum(0, &header));
    header[10..12].copy_from_slice(&checksum);
    [&GUEST_MAC[..], &PEER_MAC, &[8, 0], &header, body].concat()
}

pub(crate) fn tcp_frame(
    from: u16,
    to: u16,
    sequence: u32,
    acknowledged: u32,
    flags: u8,
    payload: &[u8],
) -> Vec<u8> {
    let mut segment = Vec::new();
    segment.extend(from.to_be_bytes());
    segment.extend(to.to_be_bytes());
    segment.extend(sequence.to_be_bytes());
    segment.extend(acknowledged.to_be_bytes());
    segment.extend([5 << 4, flags, 0xff, 0xff, 0, 0, 0, 0]);
    segment.extend(payload);
    ipv4_frame(6, GUEST, &segment)
}

/// The body of an IPv4 frame from the guest; headers and lengths are checked.
pub(crate) fn read_ipv4(frame: &[u8], protocol: u8) -> &[u8] {
    assert_eq!(frame[..14], [&PEER_MAC[..], &GUEST_MAC, &[8, 0]].concat());
    let packet = &frame[14..];
    assert_eq!(usize::from(be16(packet, 2)), packet.len(), "total length");
    assert_eq!((packet[0], packet[9]), (0x45, protocol));
    assert_eq!(packet[12..20], [GUEST, PEER].concat());
    assert_eq!(slow_checksum(&packet[..20]), 0, "header checksum");
    &packet[20..]
}

pub(crate) fn read_segment(frame: &[u8]) -> Segment {
    let bytes = read_ipv4(frame, 6);
    let mut pseudo = [GUEST, PEER].concat();
    pseudo.extend([0, 6]);
    pseudo.extend((bytes.len() as u16).to_be_bytes());
    pseudo.extend(bytes);
    assert_eq!(slow_checksum(&pseudo), 0, "segment checksum");
    let header = usize::from(bytes[12] >> 4) * 4;
    Segment {
        to: be16(bytes, 2),
        sequence: be32(bytes, 4),
        acknowledged: be32(bytes, 8),
        flags: bytes[13],
        payload: bytes[header..].to_vec(),
    }
}

/// RFC 1071 as it is written there, against which the guest's own is checked.
pub(crate) fn slow_checksum(bytes: &[u8]) -> u16 {
    let mut sum = 0_u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}
