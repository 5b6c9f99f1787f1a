//! What a slot left in the kernel, as data, and how each piece is recognised.

use std::fmt;
use std::net::Ipv4Addr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::Mac;

/// One kernel object of a slot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
#[non_exhaustive]
pub enum NetStep {
    /// A network namespace pinned by a bind mount. It is ours if the mounted namespace has
    /// this device, inode and cookie; these are known before it is pinned.
    Netns {
        /// The file it is mounted on.
        path: PathBuf,
        /// Device number of the namespace file.
        device: u64,
        /// Inode number of the namespace file. The next namespace may get it again.
        inode: u64,
        /// Cookie of the namespace, never used again; `None` before Linux 5.14.
        cookie: Option<u64>,
    },
    /// A link of the host's namespace with its addresses and routes. It is ours if name,
    /// index and Ethernet address all agree; all three are chosen before it is made.
    Link {
        /// Interface name.
        name: String,
        /// Interface index.
        index: u32,
        /// Ethernet address.
        mac: Mac,
    },
    /// The slot's entries in the host's packet filter.
    Walls {
        /// The table.
        table: String,
        /// Pairs of link index and address.
        sources: Vec<(u32, Ipv4Addr)>,
    },
    /// Tracked connections to or from these addresses.
    Conntrack {
        /// The addresses that the slot gives to its next sandbox.
        addresses: Vec<Ipv4Addr>,
    },
}

impl fmt::Display for NetStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Netns { path, .. } => write!(f, "namespace {}", path.display()),
            Self::Link { name, .. } => write!(f, "link {name}"),
            Self::Walls { table, sources } => {
                let address = sources.first().map(|(_, address)| address.to_string());
                write!(f, "entry {} of {table}", address.unwrap_or_default())
            }
            Self::Conntrack { addresses } => write!(f, "tracked connections of {addresses:?}"),
        }
    }
}
