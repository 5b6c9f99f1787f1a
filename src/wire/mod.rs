//! Bytes on sockets: a sans-IO HTTP/1.1 codec, its transport, and the event loop they run on.

pub mod conn;
pub mod excerpt;
pub mod http;
pub mod json;
pub mod netlink;
pub mod nft;
pub mod reactor;
