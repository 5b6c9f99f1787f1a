//! Netlink over plain sockets: batched requests, every acknowledgement checked, the kernel's
//! extended-ack text in the error.
//!
//! One layer serves rtnetlink and nfnetlink. The kernel works on a request inside the sending
//! call and queues the answers before that call returns (`netlink_rcv_skb`, net/netlink/
//! af_netlink.c), so several requests travel in one datagram and their answers are read
//! back without waiting. A socket keeps the network namespace it was opened in and may be
//! moved to another thread.
//!
//! Facts: include/uapi/linux/netlink.h (header, `nlmsgerr_attrs`, flags),
//! net/netfilter/nfnetlink.c (transactions).

mod batch;
mod error;
mod message;

use std::fmt;
use std::io;
use std::ops::Range;

use netlink_sys::SocketAddr;
use rtnetlink::packet_core::NetlinkSerializable;
use rtnetlink::packet_route::RouteNetlinkMessage;
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;

use self::batch::{append_numbered, datagram_end};
use self::message::messages;
use crate::deadline::Deadline;
use crate::fault::Faults;

pub use self::batch::Batch;
pub use self::error::{NetlinkError, Refusal};
pub use self::message::{attributes, parse_route};

/// `NLM_F_REQUEST`: set on every message by [`Batch`].
pub const REQUEST: u16 = 0x1;
/// `NLM_F_ACK`: set on every message by [`Batch::push`].
pub const ACK: u16 = 0x4;
/// `NLM_F_DUMP`: all objects.
pub const DUMP: u16 = 0x300;
/// `NLM_F_REPLACE`: replace an existing object.
pub const REPLACE: u16 = 0x100;
/// `NLM_F_EXCL`: fail if the object exists.
pub const EXCL: u16 = 0x200;
/// `NLM_F_CREATE`: create the object if it is missing.
pub const CREATE: u16 = 0x400;
/// `NLM_F_APPEND`: add at the end of a list.
pub const APPEND: u16 = 0x800;

const HEADER: usize = 16;
const NLMSG_NOOP: u16 = 1;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_MULTI: u16 = 0x2;
const NLM_F_DUMP_INTR: u16 = 0x10;
const MSG_TRUNC: i32 = 0x20;
const MSG_DONTWAIT: i32 = 0x40;

/// One read takes at most this much: the kernel fills dumps up to 32 KiB a datagram.
const RECEIVE_BYTES: usize = 32 << 10;
/// Room for the answers to a large transaction: a limit, not an allocation.
const RECEIVE_QUEUE_BYTES: usize = 4 << 20;

/// The netlink family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// `NETLINK_ROUTE`: links, addresses, routes, neighbours.
    Route,
    /// `NETLINK_NETFILTER`: `nf_tables` and conntrack.
    Netfilter,
}

/// The outcome of each request of a batch, in order. `None` where the request was part of a
/// transaction that failed elsewhere.
pub type Outcomes = Vec<Option<Result<(), Refusal>>>;

/// A netlink socket of the namespace it was opened in.
pub struct Socket {
    inner: netlink_sys::Socket,
    sequence: u32,
    buffer: Vec<u8>,
    faults: Faults,
}

impl fmt::Debug for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Socket")
            .field("sequence", &self.sequence)
            .finish_non_exhaustive()
    }
}

impl Socket {
    /// Opens a socket in the calling thread's network namespace, with extended acks.
    ///
    /// # Errors
    /// [`NetlinkError::Open`].
    pub fn open(protocol: Protocol, faults: Faults) -> Result<Self, NetlinkError> {
        let failed = |call| {
            move |source| NetlinkError::Open {
                protocol,
                call,
                source,
            }
        };
        let number = match protocol {
            Protocol::Route => netlink_sys::protocols::NETLINK_ROUTE,
            Protocol::Netfilter => netlink_sys::protocols::NETLINK_NETFILTER,
        };
        let inner = faults
            .call("open a netlink socket", || netlink_sys::Socket::new(number))
            .map_err(failed("socket"))?;
        inner
            .set_ext_ack(true)
            .map_err(failed("setsockopt NETLINK_EXT_ACK"))?;
        inner
            .set_cap_ack(true)
            .map_err(failed("setsockopt NETLINK_CAP_ACK"))?;
        if protocol == Protocol::Route {
            // The kernel then honours filters in dumps. Kernels before 4.20 do not know it,
            // and the callers check what they get anyway.
            let _ = inner.set_netlink_get_strict_chk(true);
        }
        // A privileged limit: without it large transactions may lose answers, which is
        // then reported as ENOBUFS.
        let _ =
            rustix::net::sockopt::set_socket_recv_buffer_size_force(&inner, RECEIVE_QUEUE_BYTES);
        Ok(Self {
            inner,
            sequence: 0,
            buffer: vec![0; RECEIVE_BYTES],
            faults,
        })
    }

    /// The injector that this socket asks.
    #[must_use]
    pub const fn faults(&self) -> &Faults {
        &self.faults
    }

    /// Sends a batch and fails with the first request that was refused. The other requests
    /// of an ordinary batch are done nevertheless.
    ///
    /// # Errors
    /// [`NetlinkError::Refused`] and what [`Socket::execute`] returns.
    pub fn commit(&mut self, batch: &Batch, deadline: Deadline) -> Result<(), NetlinkError> {
        for outcome in self.execute(batch, deadline)?.into_iter().flatten() {
            outcome.map_err(NetlinkError::Refused)?;
        }
        Ok(())
    }

    /// Sends a batch and returns the kernel's verdict on each request. Blocks only if the
    /// kernel does not answer inside the sending call, and then until `deadline`.
    ///
    /// # Errors
    /// All variants but [`NetlinkError::Refused`], which is part of the result.
    pub fn execute(&mut self, batch: &Batch, deadline: Deadline) -> Result<Outcomes, NetlinkError> {
        let mut outcomes: Outcomes = vec![None; batch.requests.len()];
        let mut first = 0;
        while first < batch.requests.len() {
            let end = datagram_end(batch, first);
            self.exchange(batch, first..end, &mut outcomes, deadline)?;
            first = end;
        }
        Ok(outcomes)
    }

    /// Sends one request that the kernel answers with one object.
    ///
    /// # Errors
    /// As [`Socket::dump`].
    pub fn get(
        &mut self,
        step: &str,
        message_type: u16,
        payload: impl FnOnce(&mut Vec<u8>),
        deadline: Deadline,
    ) -> Result<Vec<u8>, NetlinkError> {
        let mut found = None;
        self.query(step, message_type, 0, payload, deadline, |_, bytes| {
            found = Some(bytes.to_vec());
            Ok(())
        })?;
        found.ok_or_else(|| NetlinkError::Malformed {
            step: step.to_owned(),
            what: "no object in the answer",
        })
    }

    /// Lists objects. `each` gets the message type and what follows the netlink header.
    ///
    /// # Errors
    /// [`NetlinkError::Interrupted`] if the objects changed meanwhile, the first error of
    /// `each`, and what [`Socket::commit`] returns.
    pub fn dump(
        &mut self,
        step: &str,
        message_type: u16,
        payload: impl FnOnce(&mut Vec<u8>),
        deadline: Deadline,
        each: impl FnMut(u16, &[u8]) -> Result<(), &'static str>,
    ) -> Result<(), NetlinkError> {
        self.query(step, message_type, DUMP, payload, deadline, each)
    }

    /// Lists rtnetlink objects that answer `message`.
    ///
    /// # Errors
    /// As [`Socket::dump`].
    pub fn dump_route(
        &mut self,
        step: &str,
        message: &RouteNetlinkMessage,
        deadline: Deadline,
        mut each: impl FnMut(RouteNetlinkMessage),
    ) -> Result<(), NetlinkError> {
        let payload = |bytes: &mut Vec<u8>| {
            let start = bytes.len();
            bytes.resize(start + message.buffer_len(), 0);
            message.serialize(&mut bytes[start..]);
        };
        self.dump(
            step,
            message.message_type(),
            payload,
            deadline,
            |kind, bytes| {
                each(parse_route(kind, bytes)?);
                Ok(())
            },
        )
    }

    fn exchange(
        &mut self,
        batch: &Batch,
        part: Range<usize>,
        outcomes: &mut Outcomes,
        deadline: Deadline,
    ) -> Result<(), NetlinkError> {
        let requests = &batch.requests[part.clone()];
        let base = self.next_sequences(requests.len());
        let mut datagram = Vec::new();
        let mut waiting = 0;
        for (i, request) in requests.iter().enumerate() {
            if let Err(errno) = self.faults.before(&request.step) {
                outcomes[part.start + i] = Some(Err(injected(&request.step, errno)));
                if batch.transaction {
                    return Ok(());
                }
                continue;
            }
            append_numbered(&mut datagram, &batch.bytes[request.range.clone()], base, i);
            waiting += usize::from(request.acked);
        }
        if datagram.is_empty() {
            return Ok(());
        }
        self.send(&datagram, &requests[0].step)?;
        let mut refused = false;
        while waiting > 0 {
            let Some(length) = self.receive(&requests[0].step)? else {
                // A transaction that failed as a whole leaves its parts unanswered.
                if refused && batch.transaction {
                    break;
                }
                let pending = |i: &usize| requests[*i].acked && outcomes[part.start + i].is_none();
                let missing = (0..requests.len()).find(pending).unwrap_or(0);
                self.wait(&requests[missing].step, deadline)?;
                continue;
            };
            let buffer = &self.buffer[..length];
            for message in messages(buffer) {
                let message = message.map_err(|what| malformed(&requests[0].step, what))?;
                let i = message.sequence.wrapping_sub(base) as usize;
                let Some(request) = requests.get(i) else {
                    continue;
                };
                if message.kind != NLMSG_ERROR {
                    continue;
                }
                let verdict = message
                    .verdict(&request.step)
                    .map_err(|what| malformed(&request.step, what))?;
                refused |= verdict.is_err();
                let slot = &mut outcomes[part.start + i];
                if slot.is_none() && request.acked {
                    waiting -= 1;
                }
                *slot = Some(verdict);
            }
        }
        if self.faults.active() {
            for (i, request) in requests.iter().enumerate() {
                let slot = &mut outcomes[part.start + i];
                if !matches!(slot, Some(Err(_)))
                    && let Err(errno) = self.faults.after(&request.step)
                {
                    *slot = Some(Err(injected(&request.step, errno)));
                }
            }
        }
        Ok(())
    }

    fn query(
        &mut self,
        step: &str,
        message_type: u16,
        flags: u16,
        payload: impl FnOnce(&mut Vec<u8>),
        deadline: Deadline,
        mut each: impl FnMut(u16, &[u8]) -> Result<(), &'static str>,
    ) -> Result<(), NetlinkError> {
        let mut batch = Batch::new();
        batch.push_silent(step.to_owned(), message_type, flags, payload);
        let base = self.next_sequences(1);
        let injected = |errno| NetlinkError::Refused(injected(step, errno));
        self.faults.before(step).map_err(injected)?;
        let mut datagram = Vec::new();
        append_numbered(&mut datagram, &batch.bytes, base, 0);
        self.send(&datagram, step)?;
        let mut interrupted = false;
        loop {
            let Some(length) = self.receive(step)? else {
                self.wait(step, deadline)?;
                continue;
            };
            for message in messages(&self.buffer[..length]) {
                let message = message.map_err(|what| malformed(step, what))?;
                if message.sequence != base {
                    continue;
                }
                interrupted |= message.flags & NLM_F_DUMP_INTR != 0;
                let last = match message.kind {
                    NLMSG_NOOP => false,
                    NLMSG_ERROR | NLMSG_DONE => {
                        let verdict = message.verdict(step);
                        verdict
                            .map_err(|what| malformed(step, what))?
                            .map_err(NetlinkError::Refused)?;
                        true
                    }
                    kind => {
                        each(kind, message.payload).map_err(|what| malformed(step, what))?;
                        message.flags & NLM_F_MULTI == 0
                    }
                };
                if last && interrupted {
                    return Err(NetlinkError::Interrupted {
                        step: step.to_owned(),
                    });
                }
                if last {
                    return self.faults.after(step).map_err(injected);
                }
            }
        }
    }

    fn next_sequences(&mut self, count: usize) -> u32 {
        let base = self.sequence.wrapping_add(1);
        self.sequence = self
            .sequence
            .wrapping_add(u32::try_from(count).unwrap_or(u32::MAX));
        base
    }

    fn send(&self, datagram: &[u8], step: &str) -> Result<(), NetlinkError> {
        let kernel = SocketAddr::new(0, 0);
        loop {
            match self.inner.send_to(datagram, &kernel, 0) {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => {
                    return Err(NetlinkError::Send {
                        step: step.to_owned(),
                        source,
                    });
                }
            }
        }
    }

    /// Reads one datagram of the kernel into the buffer; `None` if there is none yet.
    fn receive(&mut self, step: &str) -> Result<Option<usize>, NetlinkError> {
        loop {
            let mut room = &mut self.buffer[..];
            match self.inner.recv_from(&mut room, MSG_DONTWAIT | MSG_TRUNC) {
                // Only the kernel has port 0: other processes may write to this socket too.
                Ok((_, from)) if from.port_number() != 0 => {}
                Ok((length, _)) if length > RECEIVE_BYTES => {
                    return Err(malformed(step, "a datagram above 32 KiB"));
                }
                Ok((length, _)) => return Ok(Some(length)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(source) => {
                    return Err(NetlinkError::Receive {
                        step: step.to_owned(),
                        source,
                    });
                }
            }
        }
    }

    fn wait(&self, step: &str, deadline: Deadline) -> Result<(), NetlinkError> {
        let mut watched = [PollFd::new(&self.inner, PollFlags::IN)];
        let timeout = deadline
            .remaining()
            .and_then(|left| rustix::event::Timespec::try_from(left).ok());
        match rustix::event::poll(&mut watched, timeout.as_ref()) {
            Ok(0) => Err(NetlinkError::NoAnswer {
                step: step.to_owned(),
            }),
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(errno) => Err(NetlinkError::Receive {
                step: step.to_owned(),
                source: errno.into(),
            }),
        }
    }
}

fn injected(step: &str, errno: Errno) -> Refusal {
    Refusal {
        step: step.to_owned(),
        errno,
        text: None,
        offset: None,
    }
}

fn malformed(step: &str, what: &'static str) -> NetlinkError {
    NetlinkError::Malformed {
        step: step.to_owned(),
        what,
    }
}

#[cfg(test)]
mod tests {
    use super::message::{NLM_F_ACK_TLVS, TEXT_BYTES};
    use super::*;
    use std::sync::Arc;

    const NLM_F_CAPPED: u16 = 0x100;
    const NLMSGERR_ATTR_MSG: u16 = 1;
    const NLMSGERR_ATTR_OFFS: u16 = 2;

    fn soon() -> Deadline {
        Deadline::after(std::time::Duration::from_secs(5))
    }

    /// `RTM_GETLINK` with an index, as a body.
    fn ifinfo(index: i32) -> impl FnOnce(&mut Vec<u8>) {
        move |bytes| {
            bytes.extend_from_slice(&[0; 4]);
            bytes.extend_from_slice(&index.to_ne_bytes());
            bytes.extend_from_slice(&[0; 8]);
        }
    }

    const RTM_NEWLINK: u16 = 16;
    const RTM_GETLINK: u16 = 18;

    #[test]
    fn the_loopback_link_answers_and_a_missing_one_is_missing() {
        let mut socket = Socket::open(Protocol::Route, Faults::NONE).unwrap();
        let bytes = socket
            .get("read lo", RTM_GETLINK, ifinfo(1), soon())
            .unwrap();
        let lo = parse_route(RTM_NEWLINK, &bytes).unwrap();
        assert!(matches!(lo, RouteNetlinkMessage::NewLink(link) if link.header.index == 1));
        let error = socket
            .get("read nothing", RTM_GETLINK, ifinfo(0x7000_0000), soon())
            .unwrap_err();
        assert!(error.is_missing(), "{error:?}");
        assert!(error.to_string().contains("read nothing"), "{error}");
    }

    #[test]
    fn a_dump_lists_the_loopback_link() {
        let mut socket = Socket::open(Protocol::Route, Faults::NONE).unwrap();
        let mut seen = Vec::new();
        socket
            .dump(
                "list links",
                RTM_GETLINK,
                ifinfo(0),
                soon(),
                |kind, bytes| {
                    seen.push(parse_route(kind, bytes)?);
                    Ok(())
                },
            )
            .unwrap();
        assert!(
            seen.iter()
                .any(|m| matches!(m, RouteNetlinkMessage::NewLink(link) if link.header.index == 1))
        );
    }

    #[test]
    fn each_request_of_a_batch_gets_its_own_verdict() {
        let mut socket = Socket::open(Protocol::Route, Faults::NONE).unwrap();
        let mut batch = Batch::new();
        // Asking for lo is harmless for anybody; the others are refused. More than one
        // datagram's worth, so the split is exercised as well.
        for i in 0..300 {
            let index = if i % 3 == 0 { 1 } else { 0x7000_0000 };
            batch.push(format!("read {i}"), RTM_GETLINK, 0, ifinfo(index));
        }
        let outcomes = socket.execute(&batch, soon()).unwrap();
        for (i, outcome) in outcomes.iter().enumerate() {
            let outcome = outcome.as_ref().unwrap();
            assert_eq!(outcome.is_ok(), i % 3 == 0, "{i}: {outcome:?}");
            if let Err(refusal) = outcome {
                assert_eq!(refusal.step, format!("read {i}"));
                assert_eq!(refusal.errno, Errno::NODEV);
            }
        }
        let error = socket.commit(&batch, soon()).unwrap_err();
        assert!(error.to_string().contains("read 1"), "{error}");
    }

    struct FailStep(&'static str, bool);
    impl crate::fault::Inject for FailStep {
        fn before(&self, step: &str) -> Result<(), Errno> {
            if step == self.0 && !self.1 {
                return Err(Errno::IO);
            }
            Ok(())
        }
        fn after(&self, step: &str) -> Result<(), Errno> {
            if step == self.0 && self.1 {
                return Err(Errno::IO);
            }
            Ok(())
        }
    }

    #[test]
    fn an_injected_fault_names_its_step() {
        for late in [false, true] {
            let faults = Faults::inject(Arc::new(FailStep("read b", late)));
            let mut socket = Socket::open(Protocol::Route, faults).unwrap();
            let mut batch = Batch::new();
            batch.push("read a", RTM_GETLINK, 0, ifinfo(1));
            batch.push("read b", RTM_GETLINK, 0, ifinfo(1));
            batch.push("read c", RTM_GETLINK, 0, ifinfo(1));
            let outcomes = socket.execute(&batch, soon()).unwrap();
            assert!(matches!(&outcomes[0], Some(Ok(()))), "late: {late}");
            assert!(
                matches!(&outcomes[1], Some(Err(refusal)) if refusal.errno == Errno::IO),
                "late: {late}"
            );
            assert!(matches!(&outcomes[2], Some(Ok(()))), "late: {late}");
            let mut transaction = Batch::transaction();
            transaction.push("read b", RTM_GETLINK, 0, ifinfo(1));
            let error = socket.commit(&transaction, soon()).unwrap_err();
            assert_eq!(error.to_string(), "Kernel refused: read b");
        }
    }

    /// A refusal as `netlink_ack` lays it out with capped acks: code, header, attributes.
    fn refusal(text: &[u8]) -> Vec<u8> {
        let mut body = (-22i32).to_ne_bytes().to_vec();
        body.extend_from_slice(&[0; HEADER]);
        for (kind, value) in [
            (NLMSGERR_ATTR_MSG, text),
            (NLMSGERR_ATTR_OFFS, &[20, 0, 0, 0]),
        ] {
            body.extend_from_slice(&u16::try_from(value.len() + 4).unwrap().to_ne_bytes());
            body.extend_from_slice(&kind.to_ne_bytes());
            body.extend_from_slice(value);
            body.resize(body.len().next_multiple_of(4), 0);
        }
        let mut bytes = u32::try_from(body.len() + HEADER)
            .unwrap()
            .to_ne_bytes()
            .to_vec();
        bytes.extend_from_slice(&NLMSG_ERROR.to_ne_bytes());
        bytes.extend_from_slice(&(NLM_F_ACK_TLVS | NLM_F_CAPPED).to_ne_bytes());
        bytes.extend_from_slice(&[0; 8]);
        bytes.extend_from_slice(&body);
        bytes
    }

    #[test]
    fn extended_ack_text_is_read_escaped_and_cut() {
        let bytes = refusal(b"Unknown device type\n\0");
        let message = messages(&bytes).next().unwrap().unwrap();
        let refused = message.verdict("s").unwrap().unwrap_err();
        assert_eq!(refused.text.as_deref(), Some("Unknown device type\\n"));
        assert_eq!(refused.offset, Some(20));
        assert_eq!(refused.errno, Errno::INVAL);
        let long = refusal(&[b'a'; 4000]);
        let message = messages(&long).next().unwrap().unwrap();
        let refused = message.verdict("s").unwrap().unwrap_err();
        assert_eq!(refused.text.unwrap().len(), TEXT_BYTES);
    }

    #[test]
    fn truncated_answers_are_refused_at_every_length() {
        let whole = refusal(b"text\0");
        for cut in 1..whole.len() {
            let first = messages(&whole[..cut]).next().unwrap();
            assert!(first.is_err(), "{cut}");
        }
        let mut short = whole[..HEADER + 2].to_vec();
        short[..4].copy_from_slice(&u32::try_from(HEADER + 2).unwrap().to_ne_bytes());
        let message = messages(&short).next().unwrap().unwrap();
        assert!(message.verdict("s").is_err());
    }
}
