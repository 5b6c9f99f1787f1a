//! Raw Linux system calls for rewake, typed and checked.
//!
//! The only crate with `unsafe` code. Each function names the kernel call it makes in its
//! error ([`CallError`]); what object the call was about is for the layer above to say.

pub mod contain;
pub mod dm;
pub mod error;
pub mod inherited;
pub mod kvm;
pub mod loopdev;
pub mod mapped;
pub mod memslot;
pub mod netns;
pub mod process;
pub mod reflink;
pub mod tun;
pub mod uffd;
pub mod userns;

pub use error::CallError;
