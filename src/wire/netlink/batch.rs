//! Requests, encoded back to back.

use std::borrow::Cow;
use std::ops::Range;

use rtnetlink::packet_core::NetlinkSerializable;
use rtnetlink::packet_route::RouteNetlinkMessage;

use super::{ACK, HEADER, REQUEST};

/// Independent requests per datagram: their answers must fit into the receive buffer.
const DATAGRAM_REQUESTS: usize = 128;
/// Bytes of independent requests per datagram, well below the default send buffer.
const DATAGRAM_BYTES: usize = 64 << 10;

/// Requests that travel together.
///
/// An ordinary batch holds independent requests: a refused one does not stop those behind it.
/// A [`Batch::transaction`] goes out as one datagram and the kernel does all of it or nothing.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    pub(super) bytes: Vec<u8>,
    pub(super) requests: Vec<Request>,
    pub(super) transaction: bool,
}

#[derive(Debug, Clone)]
pub(super) struct Request {
    pub(super) step: Cow<'static, str>,
    pub(super) range: Range<usize>,
    pub(super) acked: bool,
}

impl Batch {
    /// A batch of independent requests.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A batch that is applied whole or not at all (`NFNL_MSG_BATCH_BEGIN` to `_END`, which
    /// the caller pushes with [`Batch::push_silent`]).
    #[must_use]
    pub fn transaction() -> Self {
        Self {
            transaction: true,
            ..Self::default()
        }
    }

    /// Adds a request that must be acknowledged. `payload` appends what follows the netlink
    /// header; the header's length is set and the end padded to four bytes afterwards.
    pub fn push(
        &mut self,
        step: impl Into<Cow<'static, str>>,
        message_type: u16,
        flags: u16,
        payload: impl FnOnce(&mut Vec<u8>),
    ) {
        self.append(step.into(), message_type, flags | ACK, true, payload);
    }

    /// Adds a request that the kernel answers only when it fails, such as the begin and end
    /// of a transaction, which older kernels never acknowledge.
    pub fn push_silent(
        &mut self,
        step: impl Into<Cow<'static, str>>,
        message_type: u16,
        flags: u16,
        payload: impl FnOnce(&mut Vec<u8>),
    ) {
        self.append(step.into(), message_type, flags, false, payload);
    }

    /// Adds an rtnetlink request that must be acknowledged.
    pub fn route(
        &mut self,
        step: impl Into<Cow<'static, str>>,
        flags: u16,
        message: &RouteNetlinkMessage,
    ) {
        self.push(step, message.message_type(), flags, |bytes| {
            let start = bytes.len();
            bytes.resize(start + message.buffer_len(), 0);
            message.serialize(&mut bytes[start..]);
        });
    }

    /// How many requests the batch holds.
    #[must_use]
    pub fn len(&self) -> usize {
        self.requests.len()
    }

    /// Whether the batch holds nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }

    /// The encoded requests, sequence numbers still zero. For golden tests.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    fn append(
        &mut self,
        step: Cow<'static, str>,
        message_type: u16,
        flags: u16,
        acked: bool,
        payload: impl FnOnce(&mut Vec<u8>),
    ) {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; HEADER]);
        payload(&mut self.bytes);
        let length = u32::try_from(self.bytes.len() - start).unwrap_or(u32::MAX);
        let header = &mut self.bytes[start..start + HEADER];
        header[..4].copy_from_slice(&length.to_ne_bytes());
        header[4..6].copy_from_slice(&message_type.to_ne_bytes());
        header[6..8].copy_from_slice(&(flags | REQUEST).to_ne_bytes());
        let padded = self.bytes.len().next_multiple_of(4);
        self.bytes.resize(padded, 0);
        self.requests.push(Request {
            step,
            range: start..padded,
            acked,
        });
    }
}

/// The request behind the last one that fits into a datagram with request `first`.
pub(super) fn datagram_end(batch: &Batch, first: usize) -> usize {
    if batch.transaction {
        return batch.requests.len();
    }
    let start = batch.requests[first].range.start;
    let fits = batch.requests[first..]
        .iter()
        .take(DATAGRAM_REQUESTS)
        .take_while(|request| request.range.end - start <= DATAGRAM_BYTES)
        .count();
    first + fits.max(1)
}

/// Appends an encoded request with its sequence number.
pub(super) fn append_numbered(datagram: &mut Vec<u8>, request: &[u8], base: u32, index: usize) {
    let start = datagram.len();
    datagram.extend_from_slice(request);
    let sequence = base.wrapping_add(u32::try_from(index).unwrap_or(u32::MAX));
    datagram[start + 8..start + 12].copy_from_slice(&sequence.to_ne_bytes());
}
