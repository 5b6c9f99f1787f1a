//! Forgetting tracked connections of an address that gets a new owner.
//!
//! Facts: include/uapi/linux/netfilter/nfnetlink_conntrack.h,
//! net/netfilter/nf_conntrack_netlink.c.

use std::net::Ipv4Addr;

use rustix::io::Errno;

use crate::deadline::Deadline;
use crate::wire::netlink::{Batch, NetlinkError, Socket, attributes};

const CTNETLINK: u16 = 1 << 8;
const IPCTNL_MSG_CT_GET: u16 = CTNETLINK | 1;
const IPCTNL_MSG_CT_DELETE: u16 = CTNETLINK | 2;
const AF_INET: u8 = 2;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_ID: u16 = 12;
const CTA_ZONE: u16 = 18;
const CTA_TUPLE_IP: u16 = 1;
const CTA_IP_V4_SRC: u16 = 1;
const CTA_IP_V4_DST: u16 = 2;
const NLA_F_NESTED: u16 = 0x8000;
const NFGENMSG: usize = 4;
/// A dump that the table's changes interrupt is repeated this often at most.
const ATTEMPTS: usize = 16;

/// One tracked connection, as far as it is looked at here.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Connection {
    /// Source and destination of both directions.
    pub addresses: [Ipv4Addr; 4],
    /// The attributes that name it for the kernel, encoded.
    key: Vec<u8>,
}

/// Lists the IPv4 connections tracked in the socket's namespace. Without the kernel's
/// conntrack there are none.
///
/// # Errors
/// [`NetlinkError`].
pub fn list(socket: &mut Socket, deadline: Deadline) -> Result<Vec<Connection>, NetlinkError> {
    let mut attempts = 0;
    loop {
        let mut found = Vec::new();
        let outcome = socket.dump(
            "list tracked connections",
            IPCTNL_MSG_CT_GET,
            |bytes| bytes.extend_from_slice(&[AF_INET, 0, 0, 0]),
            deadline,
            |_, message| {
                let body = message
                    .get(NFGENMSG..)
                    .ok_or("a connection without a header")?;
                found.extend(connection(body));
                Ok(())
            },
        );
        attempts += 1;
        match outcome {
            Ok(()) => return Ok(found),
            Err(NetlinkError::Interrupted { .. })
                if attempts < ATTEMPTS && !deadline.has_passed() => {}
            // `nfnetlink_rcv_msg` knows no such subsystem: nothing is tracked.
            Err(error) if error.errno() == Some(Errno::INVAL) => return Ok(Vec::new()),
            Err(error) => return Err(error),
        }
    }
}

/// Forgets all connections that have one of these addresses at an end.
///
/// # Errors
/// [`NetlinkError`]. What vanished by itself meanwhile is no error.
pub fn forget(
    socket: &mut Socket,
    addresses: &[Ipv4Addr],
    deadline: Deadline,
) -> Result<(), NetlinkError> {
    let mut batch = Batch::new();
    for connection in list(socket, deadline)? {
        if connection.addresses.iter().any(|it| addresses.contains(it)) {
            batch.push("forget a connection", IPCTNL_MSG_CT_DELETE, 0, |bytes| {
                bytes.extend_from_slice(&[AF_INET, 0, 0, 0]);
                bytes.extend_from_slice(&connection.key);
            });
        }
    }
    for outcome in socket.execute(&batch, deadline)?.into_iter().flatten() {
        match outcome {
            Err(refusal) if !refusal.is_missing() => return Err(NetlinkError::Refused(refusal)),
            _ => {}
        }
    }
    Ok(())
}

fn connection(body: &[u8]) -> Option<Connection> {
    let mut key = Vec::new();
    let mut addresses = [Ipv4Addr::UNSPECIFIED; 4];
    for (kind, value) in attributes(body) {
        match kind {
            CTA_TUPLE_ORIG => {
                addresses[..2].copy_from_slice(&ends(value)?);
                append(&mut key, CTA_TUPLE_ORIG | NLA_F_NESTED, value);
            }
            CTA_TUPLE_REPLY => addresses[2..].copy_from_slice(&ends(value)?),
            // The id guards against a new connection with the same ends.
            CTA_ID | CTA_ZONE => append(&mut key, kind, value),
            _ => {}
        }
    }
    (!key.is_empty()).then_some(Connection { addresses, key })
}

fn ends(tuple: &[u8]) -> Option<[Ipv4Addr; 2]> {
    let (_, ip) = attributes(tuple).find(|(kind, _)| *kind == CTA_TUPLE_IP)?;
    let mut ends = [None, None];
    for (kind, value) in attributes(ip) {
        let octets: Option<[u8; 4]> = value.try_into().ok();
        match kind {
            CTA_IP_V4_SRC => ends[0] = octets,
            CTA_IP_V4_DST => ends[1] = octets,
            _ => {}
        }
    }
    Some([ends[0]?.into(), ends[1]?.into()])
}

fn append(bytes: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
    bytes.extend_from_slice(&length.to_ne_bytes());
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}
