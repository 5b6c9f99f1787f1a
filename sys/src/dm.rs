//! Device-mapper by its ioctls (`linux/dm-ioctl.h`, `drivers/md/dm-ioctl.c`).
//!
//! Every call sends one buffer: `struct dm_ioctl`, then what the command takes, aligned to 8
//! bytes; the kernel answers in the same buffer. No udev and no libdevmapper: the kernel
//! makes `/dev/dm-N` by itself.

use std::ffi::c_void;
use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::ioctl::{self, Opcode};

mod layout;

use crate::error::{CallError, Named};
use layout::{encode_target, fill, parse_deps, parse_list, parse_targets, read_u32, text};

/// What this client speaks (`DM_VERSION_MAJOR`); the kernel refuses another major version.
const VERSION: [u32; 3] = [4, 0, 0];
const NAME_LEN: usize = 128;
const UUID_LEN: usize = 129;
const HEADER: usize = 312;
/// Where a command's data begins: the header, whose last 7 bytes are padding.
const DATA_START: u32 = 312;
/// What most answers fit into.
const SMALL: usize = 16 << 10;
/// No list or table that we read is longer.
const LARGEST: usize = 16 << 20;

const READONLY: u32 = 1;
const SUSPEND: u32 = 1 << 1;
const STATUS_TABLE: u32 = 1 << 4;
const ACTIVE_PRESENT: u32 = 1 << 5;
const BUFFER_FULL: u32 = 1 << 8;
const NOFLUSH: u32 = 1 << 11;
/// Asks a list for uuids, too (`DM_UUID_FLAG`, since Linux 5.11).
const WITH_UUID: u32 = 1 << 14;
const DEFERRED_REMOVE: u32 = 1 << 17;

/// `struct dm_ioctl`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Header {
    version: [u32; 3],
    data_size: u32,
    data_start: u32,
    target_count: u32,
    open_count: i32,
    flags: u32,
    event_nr: u32,
    padding: u32,
    dev: u64,
    name: [u8; NAME_LEN],
    uuid: [u8; UUID_LEN],
    data: [u8; 7],
}

const _: () = {
    assert!(size_of::<Header>() == HEADER);
    assert!(std::mem::offset_of!(Header, data_size) == 12);
    assert!(std::mem::offset_of!(Header, flags) == 28);
    assert!(std::mem::offset_of!(Header, dev) == 40);
    assert!(std::mem::offset_of!(Header, name) == 48);
    assert!(std::mem::offset_of!(Header, uuid) == 176);
    assert!(std::mem::offset_of!(Header, data) == 305);
};

/// The commands, by their number (`enum` of `linux/dm-ioctl.h`).
#[derive(Clone, Copy)]
enum Command {
    Version = 0,
    ListDevices = 2,
    Create = 3,
    Remove = 4,
    Rename = 5,
    Suspend = 6,
    Status = 7,
    Wait = 8,
    Load = 9,
    Clear = 10,
    Deps = 11,
    TableStatus = 12,
    ArmPoll = 16,
    TargetVersion = 17,
}

impl Command {
    const fn name(self) -> &'static str {
        match self {
            Self::Version => "DM_VERSION",
            Self::ListDevices => "DM_LIST_DEVICES",
            Self::Create => "DM_DEV_CREATE",
            Self::Remove => "DM_DEV_REMOVE",
            Self::Rename => "DM_DEV_RENAME",
            Self::Suspend => "DM_DEV_SUSPEND",
            Self::Status => "DM_DEV_STATUS",
            Self::Wait => "DM_DEV_WAIT",
            Self::Load => "DM_TABLE_LOAD",
            Self::Clear => "DM_TABLE_CLEAR",
            Self::Deps => "DM_TABLE_DEPS",
            Self::TableStatus => "DM_TABLE_STATUS",
            Self::ArmPoll => "DM_DEV_ARM_POLL",
            Self::TargetVersion => "DM_GET_TARGET_VERSION",
        }
    }

    /// `_IOWR(0xfd, number, struct dm_ioctl)`.
    const fn opcode(self) -> Opcode {
        ioctl::opcode::read_write::<Header>(0xfd, self as u8)
    }
}

/// What a device is addressed by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceRef<'a> {
    /// Its name.
    Name(&'a str),
    /// Its uuid.
    Uuid(&'a str),
}

/// One line of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// First sector of 512 bytes.
    pub start: u64,
    /// Sectors.
    pub length: u64,
    /// The target's type, such as `snapshot`.
    pub kind: String,
    /// Its parameters, or its status, in the type's own words.
    pub text: String,
}

/// What the kernel says of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Device number, as `st_rdev`.
    pub device: u64,
    /// Name.
    pub name: String,
    /// Uuid, empty where it has none.
    pub uuid: String,
    /// How many have it open.
    pub open_count: i32,
    /// Counts the events of the device.
    pub event: u32,
    /// I/O is held back.
    pub suspended: bool,
    /// Writes are refused.
    pub read_only: bool,
    /// It has a table in use.
    pub active: bool,
    /// It vanishes when its last opener closes it.
    pub deferred_remove: bool,
}

impl DeviceInfo {
    /// N of `/dev/dm-N`.
    #[must_use]
    pub fn minor(&self) -> u32 {
        rustix::fs::minor(self.device)
    }
}

/// A device in the list of all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// Device number, as `st_rdev`.
    pub device: u64,
    /// Name.
    pub name: String,
    /// Uuid, `None` where it has none or the kernel is older than 5.11 and does not say.
    pub uuid: Option<String>,
    /// Counts its events, `None` before Linux 4.13.
    pub event: Option<u32>,
}

/// An open `/dev/mapper/control`.
#[derive(Debug)]
pub struct Control {
    file: File,
}

impl Control {
    /// Opens the control device.
    ///
    /// # Errors
    /// `ENOENT` or `ENODEV` without the driver, `EACCES` without the right.
    pub fn open() -> Result<Self, CallError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/mapper/control")
            .named("open /dev/mapper/control")?;
        Ok(Self { file })
    }

    /// The version of the interface that the kernel speaks.
    ///
    /// # Errors
    /// What the ioctl says.
    #[doc(alias = "DM_VERSION")]
    pub fn version(&self) -> Result<[u32; 3], CallError> {
        let answer = self.call(Command::Version, &Request::new(None)?)?;
        Ok(answer.header.version)
    }

    /// The version of a target type, whose module is loaded for it.
    ///
    /// # Errors
    /// `EINVAL` where the kernel has no such target, `ENOTTY` before Linux 5.4.
    #[doc(alias = "DM_GET_TARGET_VERSION")]
    pub fn target_version(&self, kind: &str) -> Result<[u32; 3], CallError> {
        let call = Command::TargetVersion;
        let answer = self.call(call, &Request::new(Some(DeviceRef::Name(kind)))?)?;
        // `struct dm_target_versions`: next, version, name.
        let data = answer.data(call)?;
        let word = |at| read_u32(data, at).ok_or_else(|| garbled(call));
        Ok([word(4)?, word(8)?, word(12)?])
    }

    /// All devices.
    ///
    /// # Errors
    /// What the ioctl says.
    #[doc(alias = "DM_LIST_DEVICES")]
    pub fn list(&self) -> Result<Vec<Listed>, CallError> {
        let call = Command::ListDevices;
        let mut request = Request::new(None)?;
        request.header.flags = WITH_UUID;
        let answer = self.call(call, &request)?;
        parse_list(answer.data(call)?).ok_or_else(|| garbled(call))
    }

    /// Makes a device without a table. Name and uuid are each taken by one device only.
    ///
    /// # Errors
    /// `EBUSY` where name or uuid is taken.
    #[doc(alias = "DM_DEV_CREATE")]
    pub fn create(&self, name: &str, uuid: &str) -> Result<DeviceInfo, CallError> {
        let mut request = Request::new(Some(DeviceRef::Name(name)))?;
        fill(&mut request.header.uuid, uuid)?;
        Ok(self.call(Command::Create, &request)?.info())
    }

    /// Removes a device; with `deferred` one that is in use goes when it is closed.
    ///
    /// # Errors
    /// `EBUSY` where it is open, `ENXIO` where there is none.
    #[doc(alias = "DM_DEV_REMOVE")]
    pub fn remove(&self, device: DeviceRef<'_>, deferred: bool) -> Result<(), CallError> {
        let mut request = Request::new(Some(device))?;
        request.header.flags = if deferred { DEFERRED_REMOVE } else { 0 };
        self.call(Command::Remove, &request).map(drop)
    }

    /// Gives a device another name. Its uuid, its number and whoever has it open stay.
    ///
    /// # Errors
    /// `EBUSY` where the new name is taken, `ENXIO` where there is no device of the old one.
    #[doc(alias = "DM_DEV_RENAME")]
    pub fn rename(&self, from: &str, to: &str) -> Result<(), CallError> {
        let mut request = Request::new(Some(DeviceRef::Name(from)))?;
        let mut name = [0; NAME_LEN];
        fill(&mut name, to)?;
        request.data.extend_from_slice(&name);
        self.call(Command::Rename, &request).map(drop)
    }

    /// Loads a table; it comes into use with [`Control::resume`].
    ///
    /// # Errors
    /// What the targets say, mostly `EINVAL`; the reason is in the kernel's log only.
    #[doc(alias = "DM_TABLE_LOAD")]
    pub fn load(
        &self,
        device: DeviceRef<'_>,
        targets: &[Target],
        read_only: bool,
    ) -> Result<(), CallError> {
        let mut request = Request::new(Some(device))?;
        request.header.flags = if read_only { READONLY } else { 0 };
        request.header.target_count =
            u32::try_from(targets.len()).map_err(|_| too_long(Command::Load))?;
        for target in targets {
            encode_target(&mut request.data, target)?;
        }
        self.call(Command::Load, &request).map(drop)
    }

    /// Drops a table that was loaded and is not in use yet.
    ///
    /// # Errors
    /// `ENXIO` where there is no device.
    #[doc(alias = "DM_TABLE_CLEAR")]
    pub fn clear(&self, device: DeviceRef<'_>) -> Result<(), CallError> {
        self.call(Command::Clear, &Request::new(Some(device))?)
            .map(drop)
    }

    /// Takes the loaded table into use and lets I/O through.
    ///
    /// # Errors
    /// What the targets say.
    #[doc(alias = "DM_DEV_SUSPEND")]
    pub fn resume(&self, device: DeviceRef<'_>) -> Result<DeviceInfo, CallError> {
        let request = Request::new(Some(device))?;
        Ok(self.call(Command::Suspend, &request)?.info())
    }

    /// Waits until all I/O is done, then holds further I/O back.
    ///
    /// # Errors
    /// `ENXIO` where there is no device.
    #[doc(alias = "DM_DEV_SUSPEND")]
    pub fn suspend(&self, device: DeviceRef<'_>) -> Result<DeviceInfo, CallError> {
        let mut request = Request::new(Some(device))?;
        request.header.flags = SUSPEND;
        Ok(self.call(Command::Suspend, &request)?.info())
    }

    /// What the kernel says of a device, `None` where there is none.
    ///
    /// # Errors
    /// What the ioctl says.
    #[doc(alias = "DM_DEV_STATUS")]
    pub fn info(&self, device: DeviceRef<'_>) -> Result<Option<DeviceInfo>, CallError> {
        match self.call(Command::Status, &Request::new(Some(device))?) {
            Ok(answer) => Ok(Some(answer.info())),
            Err(error) if error.is_gone() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The device's table.
    ///
    /// # Errors
    /// `ENXIO` where there is no device.
    #[doc(alias = "DM_TABLE_STATUS")]
    pub fn table(&self, device: DeviceRef<'_>) -> Result<Vec<Target>, CallError> {
        self.targets(device, STATUS_TABLE)
    }

    /// The status of each target, without flushing anything first.
    ///
    /// # Errors
    /// `ENXIO` where there is no device.
    #[doc(alias = "DM_TABLE_STATUS")]
    pub fn status(&self, device: DeviceRef<'_>) -> Result<Vec<Target>, CallError> {
        self.targets(device, NOFLUSH)
    }

    fn targets(&self, device: DeviceRef<'_>, flags: u32) -> Result<Vec<Target>, CallError> {
        let call = Command::TableStatus;
        let mut request = Request::new(Some(device))?;
        request.header.flags = flags;
        let answer = self.call(call, &request)?;
        parse_targets(answer.data(call)?, answer.header.target_count).ok_or_else(|| garbled(call))
    }

    /// The devices that the table in use stands on, as `st_rdev`.
    ///
    /// # Errors
    /// `ENXIO` where there is no device.
    #[doc(alias = "DM_TABLE_DEPS")]
    pub fn deps(&self, device: DeviceRef<'_>) -> Result<Vec<u64>, CallError> {
        let call = Command::Deps;
        let answer = self.call(call, &Request::new(Some(device))?)?;
        if !answer.info().active {
            return Ok(Vec::new());
        }
        parse_deps(answer.data(call)?).ok_or_else(|| garbled(call))
    }

    /// Waits until the device has had another event than number `event`. Blocks without a
    /// limit; [`Control::wait_any`] has one.
    ///
    /// # Errors
    /// `EINTR` after a signal, `ENXIO` where there is no device.
    #[doc(alias = "DM_DEV_WAIT")]
    pub fn wait(&self, device: DeviceRef<'_>, event: u32) -> Result<DeviceInfo, CallError> {
        let mut request = Request::new(Some(device))?;
        request.header.event_nr = event;
        Ok(self.call(Command::Wait, &request)?.info())
    }

    /// Makes the descriptor readable at the next event of any device. A caller with an event
    /// loop watches the descriptor itself.
    ///
    /// # Errors
    /// `ENOTTY` before Linux 4.14.
    #[doc(alias = "DM_DEV_ARM_POLL")]
    pub fn arm(&self) -> Result<(), CallError> {
        self.call(Command::ArmPoll, &Request::new(None)?).map(drop)
    }

    /// Waits for an event of any device since [`Control::arm`], for `limit` at most. Returns
    /// whether there was one.
    ///
    /// # Errors
    /// What `poll` says.
    pub fn wait_any(&self, limit: Duration) -> Result<bool, CallError> {
        let limit = Timespec::try_from(limit).map_err(|_| CallError::new("poll", Errno::INVAL))?;
        let mut fds = [PollFd::new(&self.file, PollFlags::IN)];
        match poll(&mut fds, Some(&limit)) {
            Err(Errno::INTR) => Ok(false),
            other => Ok(other.named("poll")? > 0),
        }
    }

    /// Sends a command, with a larger buffer as long as the answer does not fit.
    fn call(&self, command: Command, request: &Request) -> Result<Answer, CallError> {
        let mut size = (HEADER + request.data.len()).next_multiple_of(8).max(SMALL);
        loop {
            let answer = self.call_sized(command, request, size)?;
            if answer.header.flags & BUFFER_FULL == 0 {
                return Ok(answer);
            }
            size *= 4;
            if size > LARGEST {
                return Err(too_long(command));
            }
        }
    }

    fn call_sized(
        &self,
        command: Command,
        request: &Request,
        size: usize,
    ) -> Result<Answer, CallError> {
        let mut header = request.header;
        header.data_size = u32::try_from(size).map_err(|_| too_long(command))?;
        // Words of 8 bytes: the kernel's structures in the buffer are aligned so.
        let mut words = vec![0u64; size.div_ceil(8)];
        let buffer = Buffer {
            opcode: command.opcode(),
            words: &mut words,
            header,
            data: &request.data,
        };
        // SAFETY: see the implementation of `Ioctl` for `Buffer`.
        let header = unsafe { ioctl::ioctl(&self.file, buffer) }.named(command.name())?;
        Ok(Answer {
            header,
            words,
            size,
        })
    }
}

impl AsFd for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// What is sent: the header, and what follows it.
struct Request {
    header: Header,
    data: Vec<u8>,
}

impl Request {
    fn new(device: Option<DeviceRef<'_>>) -> Result<Self, CallError> {
        let mut header = Header {
            version: VERSION,
            data_size: 0,
            data_start: DATA_START,
            target_count: 0,
            open_count: 0,
            flags: 0,
            event_nr: 0,
            padding: 0,
            dev: 0,
            name: [0; NAME_LEN],
            uuid: [0; UUID_LEN],
            data: [0; 7],
        };
        match device {
            Some(DeviceRef::Name(name)) => fill(&mut header.name, name)?,
            Some(DeviceRef::Uuid(uuid)) => fill(&mut header.uuid, uuid)?,
            None => {}
        }
        Ok(Self {
            header,
            data: Vec::new(),
        })
    }
}

/// What came back, in the buffer that was sent.
struct Answer {
    header: Header,
    words: Vec<u64>,
    size: usize,
}

impl Answer {
    /// The data behind the header, as long as the kernel says.
    fn data(&self, call: Command) -> Result<&[u8], CallError> {
        let bytes = bytes_of(&self.words);
        let start = self.header.data_start as usize;
        let end = (self.header.data_size as usize).min(self.size);
        bytes
            .get(start..end.max(start))
            .ok_or_else(|| garbled(call))
    }

    fn info(&self) -> DeviceInfo {
        let header = &self.header;
        DeviceInfo {
            device: header.dev,
            name: text(&header.name).unwrap_or_default(),
            uuid: text(&header.uuid).unwrap_or_default(),
            open_count: header.open_count,
            event: header.event_nr,
            suspended: header.flags & SUSPEND != 0,
            read_only: header.flags & READONLY != 0,
            active: header.flags & ACTIVE_PRESENT != 0,
            deferred_remove: header.flags & DEFERRED_REMOVE != 0,
        }
    }
}

fn bytes_of(words: &[u64]) -> &[u8] {
    // SAFETY: the words are initialised memory of exactly this many bytes, any of which is a
    // valid u8, whose alignment is 1; the borrow keeps them in place and unchanged.
    unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), size_of_val(words)) }
}

/// The buffer of one call while the kernel works on it.
struct Buffer<'a> {
    opcode: Opcode,
    words: &'a mut [u64],
    header: Header,
    data: &'a [u8],
}

// SAFETY: the kernel reads and writes `data_size` bytes at the pointer (`ctl_ioctl`,
// `copy_params`). `call_sized` sets `data_size` to at most the size of `words`, which is
// borrowed for as long as `self`; header and data are copied into it within its bounds.
unsafe impl ioctl::Ioctl for Buffer<'_> {
    type Output = Header;
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        self.opcode
    }

    fn as_ptr(&mut self) -> *mut c_void {
        assert!(HEADER + self.data.len() <= size_of_val(self.words));
        let to: *mut u8 = self.words.as_mut_ptr().cast();
        // SAFETY: the assertion says that header and data fit into `words`, which is aligned
        // to 8 as `Header` is; source and target are different allocations.
        unsafe {
            to.cast::<Header>().write(self.header);
            to.add(HEADER)
                .copy_from_nonoverlapping(self.data.as_ptr(), self.data.len());
        }
        to.cast()
    }

    unsafe fn output_from_ptr(
        _: ioctl::IoctlOutput,
        pointer: *mut c_void,
    ) -> rustix::io::Result<Header> {
        // SAFETY: the pointer is the one of `as_ptr`: aligned, and a header was written to it;
        // any bytes make a valid `Header`.
        Ok(unsafe { pointer.cast::<Header>().read() })
    }
}

fn too_long(call: Command) -> CallError {
    CallError::new(call.name(), Errno::MSGSIZE)
}

fn garbled(call: Command) -> CallError {
    CallError::new(call.name(), Errno::BADMSG)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_have_the_numbers_of_the_header() {
        // _IOWR(0xfd, n, 312 bytes).
        assert_eq!(Command::Version.opcode(), 0xc138_fd00);
        assert_eq!(Command::Load.opcode(), 0xc138_fd09);
        assert_eq!(Command::TargetVersion.opcode(), 0xc138_fd11);
    }
}
