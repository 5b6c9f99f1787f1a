//! Tap interfaces: make, attach and configure them (`linux/if_tun.h`,
//! `Documentation/networking/tuntap.rst`).

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use rustix::ioctl::{self, IntegerSetter, Opcode, Setter};

use crate::error::{CallError, Named};

const TUNSETIFF: Opcode = ioctl::opcode::write::<libc::c_int>(b'T', 202);
const TUNSETPERSIST: Opcode = ioctl::opcode::write::<libc::c_int>(b'T', 203);
const TUNSETOWNER: Opcode = ioctl::opcode::write::<libc::c_int>(b'T', 204);
const TUNSETVNETHDRSZ: Opcode = ioctl::opcode::write::<libc::c_int>(b'T', 216);
const TUNSETOFFLOAD: Opcode = ioctl::opcode::write::<libc::c_uint>(b'T', 208);
// The driver answers these two of `linux/sockios.h` on its own descriptor.
const SIOCGIFHWADDR: Opcode = libc::SIOCGIFHWADDR as Opcode;
const SIOCSIFHWADDR: Opcode = libc::SIOCSIFHWADDR as Opcode;

/// `struct ifreq` of `linux/if.h`, as far as the tun driver reads it: name and flags.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; libc::IFNAMSIZ],
    flags: libc::c_short,
    padding: [u8; 22],
}

/// `struct ifreq` with a hardware address in it.
#[repr(C)]
struct AddressRequest {
    name: [u8; libc::IFNAMSIZ],
    family: libc::sa_family_t,
    address: [u8; 14],
    padding: [u8; 8],
}

const _: () = {
    assert!(size_of::<InterfaceRequest>() == size_of::<libc::ifreq>());
    assert!(std::mem::offset_of!(InterfaceRequest, flags) == 16);
    assert!(size_of::<AddressRequest>() == size_of::<libc::ifreq>());
    assert!(std::mem::offset_of!(AddressRequest, family) == 16);
    assert!(std::mem::offset_of!(AddressRequest, address) == 18);
};

/// How frames look on a tap's descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TapOptions {
    /// Each frame begins with a `virtio_net_hdr` (`IFF_VNET_HDR`). CH asks for it.
    pub vnet_header: bool,
    /// Several queues, one descriptor each (`IFF_MULTI_QUEUE`). CH asks for it above one
    /// pair of queues, and both sides must agree.
    pub multi_queue: bool,
}

/// One open queue of a tap interface.
#[derive(Debug)]
pub struct Tap {
    fd: OwnedFd,
    name: String,
}

impl Tap {
    /// Attaches to the tap `name` of the calling thread's namespace, or makes it.
    ///
    /// Always without the packet-information header (`IFF_NO_PI`). The descriptor is
    /// blocking; see [`Tap::into_fd`].
    ///
    /// # Errors
    /// `EBUSY` where another process has it open, `EINVAL` where the queue mode differs or
    /// the name is no tap, `EPERM` without `CAP_NET_ADMIN` where it does not exist.
    #[doc(alias = "TUNSETIFF")]
    pub fn open(name: &str, options: TapOptions) -> Result<Self, CallError> {
        let fd: OwnedFd = File::options()
            .read(true)
            .write(true)
            .open("/dev/net/tun")
            .named("open /dev/net/tun")?
            .into();
        let mut flags = libc::IFF_TAP | libc::IFF_NO_PI;
        if options.vnet_header {
            flags |= libc::IFF_VNET_HDR;
        }
        if options.multi_queue {
            flags |= libc::IFF_MULTI_QUEUE;
        }
        let mut request = InterfaceRequest {
            name: [0; libc::IFNAMSIZ],
            flags: flags as libc::c_short,
            padding: [0; 22],
        };
        if name.len() >= libc::IFNAMSIZ {
            return Err(CallError::new("TUNSETIFF", rustix::io::Errno::NAMETOOLONG));
        }
        request.name[..name.len()].copy_from_slice(name.as_bytes());
        // SAFETY: TUNSETIFF reads and writes one `struct ifreq`; the type has its size and
        // layout (asserted above) and outlives the call.
        unsafe { ioctl::ioctl(&fd, ioctl::Updater::<TUNSETIFF, _>::new(&mut request)) }
            .named("TUNSETIFF")?;
        let len = request.name.iter().position(|b| *b == 0).unwrap_or(0);
        let name = String::from_utf8_lossy(&request.name[..len]).into_owned();
        Ok(Self { fd, name })
    }

    /// The interface's name, as the kernel gave it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Keeps the interface when its last descriptor is closed, or no longer.
    ///
    /// # Errors
    /// What the ioctl says.
    #[doc(alias = "TUNSETPERSIST")]
    pub fn set_persistent(&self, persistent: bool) -> Result<(), CallError> {
        self.set::<TUNSETPERSIST>("TUNSETPERSIST", usize::from(persistent))
    }

    /// Lets this user attach without `CAP_NET_ADMIN`.
    ///
    /// # Errors
    /// What the ioctl says.
    #[doc(alias = "TUNSETOWNER")]
    pub fn set_owner(&self, uid: u32) -> Result<(), CallError> {
        self.set::<TUNSETOWNER>("TUNSETOWNER", uid as usize)
    }

    /// Which offloads the reader of this descriptor can take (`TUN_F_*`), 0 for none.
    ///
    /// # Errors
    /// What the ioctl says.
    #[doc(alias = "TUNSETOFFLOAD")]
    pub fn set_offload(&self, features: u32) -> Result<(), CallError> {
        self.set::<TUNSETOFFLOAD>("TUNSETOFFLOAD", features as usize)
    }

    /// Length in bytes of the `virtio_net_hdr` before each frame: 10 or 12.
    ///
    /// # Errors
    /// What the ioctl says.
    #[doc(alias = "TUNSETVNETHDRSZ")]
    pub fn set_vnet_header_len(&self, len: u32) -> Result<(), CallError> {
        // SAFETY: TUNSETVNETHDRSZ reads one int through its pointer argument.
        unsafe {
            ioctl::ioctl(
                &self.fd,
                Setter::<TUNSETVNETHDRSZ, libc::c_int>::new(len as _),
            )
        }
        .named("TUNSETVNETHDRSZ")
    }

    /// A tap that somebody else has opened and passed on.
    #[must_use]
    pub fn adopt(fd: OwnedFd) -> Self {
        let name = String::new();
        Self { fd, name }
    }

    /// The MAC address of the interface.
    ///
    /// # Errors
    /// What the ioctl says; `EBADFD` where the descriptor is attached to no interface.
    #[doc(alias = "SIOCGIFHWADDR")]
    pub fn hardware_address(&self) -> Result<[u8; 6], CallError> {
        let mut request = AddressRequest {
            name: [0; libc::IFNAMSIZ],
            family: 0,
            address: [0; 14],
            padding: [0; 8],
        };
        // SAFETY: SIOCGIFHWADDR reads and writes one `struct ifreq`; the type has its size
        // and layout (asserted above) and outlives the call.
        unsafe {
            ioctl::ioctl(
                &self.fd,
                ioctl::Updater::<SIOCGIFHWADDR, _>::new(&mut request),
            )
        }
        .named("SIOCGIFHWADDR")?;
        let mut address = [0; 6];
        address.copy_from_slice(&request.address[..6]);
        Ok(address)
    }

    /// Gives the interface another MAC address.
    ///
    /// # Errors
    /// What the ioctl says; `EPERM` without `CAP_NET_ADMIN`.
    #[doc(alias = "SIOCSIFHWADDR")]
    pub fn set_hardware_address(&self, address: [u8; 6]) -> Result<(), CallError> {
        let mut request = AddressRequest {
            name: [0; libc::IFNAMSIZ],
            family: libc::ARPHRD_ETHER,
            address: [0; 14],
            padding: [0; 8],
        };
        request.address[..6].copy_from_slice(&address);
        // SAFETY: SIOCSIFHWADDR reads one `struct ifreq`; the type has its size and layout
        // (asserted above) and outlives the call.
        unsafe {
            ioctl::ioctl(
                &self.fd,
                ioctl::Updater::<SIOCSIFHWADDR, _>::new(&mut request),
            )
        }
        .named("SIOCSIFHWADDR")
    }

    /// Brings the interface up, unless it is up already.
    ///
    /// # Errors
    /// What the ioctls say; `EPERM` without `CAP_NET_ADMIN`.
    #[doc(alias = "SIOCSIFFLAGS")]
    pub fn bring_up(&self) -> Result<(), CallError> {
        let socket = crate::netns::tcp_socket()?;
        let mut request = InterfaceRequest {
            name: [0; libc::IFNAMSIZ],
            flags: 0,
            padding: [0; 22],
        };
        request.name[..self.name.len()].copy_from_slice(self.name.as_bytes());
        // SAFETY: SIOCGIFFLAGS reads and writes one `struct ifreq`; the type has its size and
        // layout (asserted above) and outlives the call.
        unsafe {
            const GET: Opcode = libc::SIOCGIFFLAGS as Opcode;
            ioctl::ioctl(&socket, ioctl::Updater::<GET, _>::new(&mut request))
        }
        .named("SIOCGIFFLAGS")?;
        let up = libc::IFF_UP as libc::c_short;
        if request.flags & up != 0 {
            return Ok(());
        }
        request.flags |= up;
        // SAFETY: SIOCSIFFLAGS reads one `struct ifreq`; as above.
        unsafe {
            const SET: Opcode = libc::SIOCSIFFLAGS as Opcode;
            ioctl::ioctl(&socket, ioctl::Updater::<SET, _>::new(&mut request))
        }
        .named("SIOCSIFFLAGS")
    }

    /// The descriptor.
    #[must_use]
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }

    fn set<const OPCODE: Opcode>(&self, call: &'static str, value: usize) -> Result<(), CallError> {
        // SAFETY: these calls of the tun driver take an integer by value and touch no memory.
        unsafe { ioctl::ioctl(&self.fd, IntegerSetter::<OPCODE>::new_usize(value)) }.named(call)
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_a_persistent_tap_outlives_its_descriptor_and_refuses_a_second_reader() {
        let outcome = crate::netns::run_in_new(|_netns| {
            let options = TapOptions {
                vnet_header: true,
                multi_queue: false,
            };
            let tap = Tap::open("tap0", options)?;
            assert_eq!(tap.name(), "tap0");
            tap.set_persistent(true)?;
            tap.set_vnet_header_len(12)?;
            tap.set_offload(0)?;
            tap.set_hardware_address([2, 0, 0, 0, 0, 9])?;
            assert_eq!(tap.hardware_address()?, [2, 0, 0, 0, 0, 9]);
            tap.bring_up()?;
            tap.bring_up()?;
            let second = Tap::open("tap0", options).unwrap_err();
            assert!(second.is_busy(), "{second}");
            drop(tap);
            let again = Tap::open("tap0", options)?;
            again.set_persistent(false)?;
            let multi = TapOptions {
                multi_queue: true,
                ..options
            };
            drop(again);
            Tap::open("tap0", multi).map(drop)
        });
        match outcome {
            Ok(result) => result.unwrap(),
            Err(error) => eprintln!(
                "SKIP root_a_persistent_tap_outlives_its_descriptor_and_refuses_a_second_reader: {error}"
            ),
        }
    }
}
