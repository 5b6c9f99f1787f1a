//! Loop devices: a file as a block device (`linux/loop.h`, `drivers/block/loop.c`).
//!
//! A device bound with [`LoopOptions::autoclear`] is unbound by the kernel when its last
//! opener closes it. A device-mapper table that uses it counts as an opener, and so does a
//! descriptor of a process that dies: nothing has to be counted, or undone after a crash.

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::io::Errno;
use rustix::ioctl::{self, NoArg, Opcode, Setter, Updater};

use crate::error::{CallError, Named};

const LOOP_CLR_FD: Opcode = 0x4C01;
const LOOP_GET_STATUS64: Opcode = 0x4C05;
const LOOP_SET_CAPACITY: Opcode = 0x4C07;
const LOOP_CONFIGURE: Opcode = 0x4C0A;
const LOOP_CTL_GET_FREE: Opcode = 0x4C82;

const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_DIRECT_IO: u32 = 16;

/// Major number of loop devices (`linux/major.h`).
pub const LOOP_MAJOR: u32 = 7;
/// How often another process may be quicker at taking the device that was free.
const RACES: usize = 256;
const NAME_LEN: usize = 64;

/// `struct loop_info64`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Info {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; NAME_LEN],
    crypt_name: [u8; NAME_LEN],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config`.
#[repr(C)]
struct Config {
    fd: u32,
    block_size: u32,
    info: Info,
    reserved: [u64; 8],
}

const _: () = {
    assert!(size_of::<Info>() == 232);
    assert!(std::mem::offset_of!(Info, number) == 40);
    assert!(std::mem::offset_of!(Info, flags) == 52);
    assert!(std::mem::offset_of!(Info, file_name) == 56);
    assert!(std::mem::offset_of!(Info, init) == 216);
    assert!(size_of::<Config>() == 304);
    assert!(std::mem::offset_of!(Config, info) == 8);
    assert!(std::mem::offset_of!(Config, reserved) == 240);
};

impl Info {
    const EMPTY: Self = Self {
        device: 0,
        inode: 0,
        rdevice: 0,
        offset: 0,
        size_limit: 0,
        number: 0,
        encrypt_type: 0,
        encrypt_key_size: 0,
        flags: 0,
        file_name: [0; NAME_LEN],
        crypt_name: [0; NAME_LEN],
        encrypt_key: [0; 32],
        init: [0; 2],
    };
}

/// How a file is bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LoopOptions {
    /// Writes are refused.
    pub read_only: bool,
    /// Unbound by the kernel once nobody has it open any more.
    pub autoclear: bool,
    /// Past the page cache of the file. A wish: files that cannot are read and written
    /// through their page cache, see [`LoopStatus::direct_io`].
    pub direct_io: bool,
    /// Logical block size in bytes: a power of two from 512 to the page size, 0 for the
    /// kernel's choice.
    pub block_size: u32,
}

/// What the kernel says of a bound device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoopStatus {
    /// The device's number: N of `/dev/loopN`.
    pub number: u32,
    /// Device number of the file system that the file is on, as `st_dev`.
    pub device: u64,
    /// Inode number of the file.
    pub inode: u64,
    /// Where in the file the device begins, in bytes.
    pub offset: u64,
    /// The device's length in bytes, 0 for the file's.
    pub size_limit: u64,
    /// Writes are refused.
    pub read_only: bool,
    /// Unbound by the kernel once nobody has it open any more.
    pub autoclear: bool,
    /// Past the page cache of the file.
    pub direct_io: bool,
}

/// An open loop device. Closing it leaves the binding to the kernel's rules.
#[derive(Debug)]
pub struct LoopDevice {
    file: File,
    number: u32,
}

impl LoopDevice {
    /// Binds the file to a free device. Blocks only on the kernel's own locks.
    ///
    /// # Errors
    /// `ENOENT` and `EPERM` where loop devices cannot be had, `EBUSY` where others were
    /// quicker too often, else what the ioctl says.
    #[doc(alias = "LOOP_CONFIGURE")]
    #[doc(alias = "LOOP_CTL_GET_FREE")]
    pub fn bind(file: BorrowedFd<'_>, options: LoopOptions) -> Result<Self, CallError> {
        Self::bind_by(file, options, |number| Self::open(number, false))
    }

    /// The same where `/dev` may have no node of the device, see [`LoopDevice::open_in`].
    ///
    /// # Errors
    /// As [`LoopDevice::bind`].
    pub fn bind_in(
        file: BorrowedFd<'_>,
        options: LoopOptions,
        nodes: &Path,
    ) -> Result<Self, CallError> {
        Self::bind_by(file, options, |number| Self::open_in(number, false, nodes))
    }

    fn bind_by(
        file: BorrowedFd<'_>,
        options: LoopOptions,
        open: impl Fn(u32) -> Result<Self, CallError>,
    ) -> Result<Self, CallError> {
        let control = open_control()?;
        let mut raced = CallError::new("LOOP_CONFIGURE", Errno::BUSY);
        for _ in 0..RACES {
            let number = get_free(&control)?;
            let device = match open(number) {
                Ok(device) => device,
                // Taken away between the two calls.
                Err(error) if error.is_gone() => {
                    raced = error;
                    continue;
                }
                Err(error) => return Err(error),
            };
            match device.configure(file, options) {
                Ok(()) => return Ok(device),
                Err(error) if error.is_busy() => raced = error,
                Err(error) => return Err(error),
            }
        }
        Err(raced)
    }

    /// Opens the device of this number, bound or not.
    ///
    /// # Errors
    /// `ENOENT` or `ENXIO` where it does not exist or is being unbound.
    pub fn open(number: u32, read_only: bool) -> Result<Self, CallError> {
        let path = format!("/dev/loop{number}");
        Self::open_node(path.as_ref(), number, read_only)
    }

    /// The same where `/dev` may have no node of a device that exists, as in a container whose
    /// `/dev` was filled when it started: one is made in the directory `nodes` then, and removed
    /// as soon as it has been opened.
    ///
    /// # Errors
    /// As [`LoopDevice::open`], and what `mknod` says.
    #[doc(alias = "mknod")]
    pub fn open_in(number: u32, read_only: bool, nodes: &Path) -> Result<Self, CallError> {
        match Self::open(number, read_only) {
            // Opening a node of a device that does not exist would make the device.
            Err(error) if error.is_gone() && is_there(number) => {
                Self::open_own_node(number, read_only, nodes)
            }
            other => other,
        }
    }

    /// The name is the same for all: what somebody leaves who dies in between goes with the
    /// next one.
    fn open_own_node(number: u32, read_only: bool, nodes: &Path) -> Result<Self, CallError> {
        let path = nodes.join(format!("loop{number}"));
        let device = rustix::fs::makedev(LOOP_MAJOR, number);
        let mut outcome = Err(CallError::new("mknod", Errno::NOENT));
        for _ in 0..RACES {
            std::fs::create_dir_all(nodes).named("mkdir")?;
            let mode = Mode::RUSR | Mode::WUSR;
            match mknodat(CWD, &path, FileType::BlockDevice, mode, device) {
                Ok(()) | Err(Errno::EXIST) => {}
                other => other.named("mknod")?,
            }
            outcome = Self::open_node(&path, number, read_only);
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    return Err(error).named("unlink");
                }
                _ => {}
            }
            match &outcome {
                // Somebody else has removed the node before it was opened.
                Err(error) if error.is_gone() && is_there(number) => {}
                _ => break,
            }
        }
        outcome
    }

    fn open_node(path: &Path, number: u32, read_only: bool) -> Result<Self, CallError> {
        let file = OpenOptions::new()
            .read(true)
            .write(!read_only)
            .open(path)
            .named("open /dev/loop")?;
        let found = file.metadata().named("fstat")?;
        let expected = rustix::fs::makedev(LOOP_MAJOR, number);
        if !found.file_type().is_block_device() || found.rdev() != expected {
            return Err(CallError::new("open /dev/loop", Errno::NODEV));
        }
        Ok(Self { file, number })
    }

    fn configure(&self, file: BorrowedFd<'_>, options: LoopOptions) -> Result<(), CallError> {
        let flag = |wanted, flag| if wanted { flag } else { 0 };
        let config = Config {
            // A descriptor is never negative.
            fd: file.as_raw_fd().unsigned_abs(),
            block_size: options.block_size,
            info: Info {
                flags: flag(options.read_only, LO_FLAGS_READ_ONLY)
                    | flag(options.autoclear, LO_FLAGS_AUTOCLEAR)
                    | flag(options.direct_io, LO_FLAGS_DIRECT_IO),
                ..Info::EMPTY
            },
            reserved: [0; 8],
        };
        // SAFETY: LOOP_CONFIGURE reads one `struct loop_config`; the type has its size and
        // layout (asserted above), every byte of it is initialised, it outlives the call.
        // The descriptor in it is open for the length of the borrow.
        let outcome = unsafe { ioctl::ioctl(&self.file, Setter::<LOOP_CONFIGURE, _>::new(config)) };
        match outcome {
            Err(Errno::INVAL) if options.direct_io => self.configure(
                file,
                LoopOptions {
                    direct_io: false,
                    ..options
                },
            ),
            other => other.named("LOOP_CONFIGURE"),
        }
    }

    /// The device's number: N of `/dev/loopN`.
    #[must_use]
    pub const fn number(&self) -> u32 {
        self.number
    }

    /// Its node as devtmpfs makes it.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        format!("/dev/loop{}", self.number).into()
    }

    /// Its device number, as `st_rdev`.
    #[must_use]
    pub fn device(&self) -> u64 {
        rustix::fs::makedev(LOOP_MAJOR, self.number)
    }

    /// What it is bound to, `None` where it is not bound.
    ///
    /// # Errors
    /// What the ioctl says.
    #[doc(alias = "LOOP_GET_STATUS64")]
    pub fn status(&self) -> Result<Option<LoopStatus>, CallError> {
        let mut info = Info::EMPTY;
        // SAFETY: LOOP_GET_STATUS64 writes one `struct loop_info64`; the type has its size
        // and layout (asserted above), any bytes are valid for it, it outlives the call.
        let outcome =
            unsafe { ioctl::ioctl(&self.file, Updater::<LOOP_GET_STATUS64, _>::new(&mut info)) };
        match outcome {
            Err(Errno::NXIO) => return Ok(None),
            other => other.named("LOOP_GET_STATUS64")?,
        }
        Ok(Some(LoopStatus {
            number: info.number,
            device: info.device,
            inode: info.inode,
            offset: info.offset,
            size_limit: info.size_limit,
            read_only: info.flags & LO_FLAGS_READ_ONLY != 0,
            autoclear: info.flags & LO_FLAGS_AUTOCLEAR != 0,
            direct_io: info.flags & LO_FLAGS_DIRECT_IO != 0,
        }))
    }

    /// Takes over the present size of the file.
    ///
    /// # Errors
    /// What the ioctl says.
    #[doc(alias = "LOOP_SET_CAPACITY")]
    pub fn refresh_size(&self) -> Result<(), CallError> {
        // SAFETY: LOOP_SET_CAPACITY takes no argument.
        unsafe { ioctl::ioctl(&self.file, NoArg::<LOOP_SET_CAPACITY>::new()) }
            .named("LOOP_SET_CAPACITY")
    }

    /// Unbinds the file, at once or when the last opener has closed the device.
    ///
    /// # Errors
    /// `ENXIO` where nothing is bound.
    #[doc(alias = "LOOP_CLR_FD")]
    pub fn unbind(&self) -> Result<(), CallError> {
        // SAFETY: LOOP_CLR_FD takes no argument.
        unsafe { ioctl::ioctl(&self.file, NoArg::<LOOP_CLR_FD>::new()) }.named("LOOP_CLR_FD")
    }
}

impl AsFd for LoopDevice {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Whether the kernel has the device, whatever nodes there are.
fn is_there(number: u32) -> bool {
    Path::new(&format!("/sys/block/loop{number}")).exists()
}

/// The numbers of all devices that are bound to a file at this moment, from sysfs.
///
/// # Errors
/// What reading `/sys/block` says.
pub fn bound() -> Result<Vec<u32>, CallError> {
    let mut numbers = Vec::new();
    for entry in std::fs::read_dir("/sys/block").named("read /sys/block")? {
        let entry = entry.named("read /sys/block")?;
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix("loop"));
        let Some(number) = number.and_then(|text| text.parse().ok()) else {
            continue;
        };
        // The directory `loop` is there while a file is bound.
        if entry.path().join("loop/backing_file").exists() {
            numbers.push(number);
        }
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// Whether loop devices can be had by this process.
///
/// # Errors
/// `ENOENT` without the driver, `EACCES` or `EPERM` without the right.
pub fn available() -> Result<(), CallError> {
    open_control().map(drop)
}

fn open_control() -> Result<File, CallError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/loop-control")
        .named("open /dev/loop-control")
}

fn get_free(control: &File) -> Result<u32, CallError> {
    /// LOOP_CTL_GET_FREE answers by its return value.
    struct GetFree;

    // SAFETY: LOOP_CTL_GET_FREE takes no argument and touches no memory of ours; its return
    // value is a number or an error.
    unsafe impl ioctl::Ioctl for GetFree {
        type Output = u32;
        const IS_MUTATING: bool = false;
        fn opcode(&self) -> Opcode {
            LOOP_CTL_GET_FREE
        }
        fn as_ptr(&mut self) -> *mut libc::c_void {
            std::ptr::null_mut()
        }
        unsafe fn output_from_ptr(
            out: ioctl::IoctlOutput,
            _: *mut libc::c_void,
        ) -> rustix::io::Result<u32> {
            u32::try_from(out).map_err(|_| Errno::INVAL)
        }
    }

    // SAFETY: see the implementation.
    unsafe { ioctl::ioctl(control, GetFree) }.named("LOOP_CTL_GET_FREE")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Write as _};

    fn missing(test: &str) -> bool {
        match available() {
            Ok(()) => false,
            Err(error) => {
                eprintln!("SKIP {test}: {error}");
                true
            }
        }
    }

    fn backing_file(name: &str) -> (PathBuf, File) {
        let name = format!("rewake-loop-{}-{name}", std::process::id());
        let path = std::env::temp_dir().join(name);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .unwrap();
        file.write_all(&[7; 8192]).unwrap();
        (path, file)
    }

    #[test]
    fn root_a_bound_file_reads_back_and_is_let_go_of_on_close() {
        if missing("root_a_bound_file_reads_back_and_is_let_go_of_on_close") {
            return;
        }
        let (path, file) = backing_file("close");
        std::fs::remove_file(&path).unwrap();
        let options = LoopOptions {
            read_only: true,
            autoclear: true,
            direct_io: true,
            block_size: 512,
        };
        let device = LoopDevice::bind(file.as_fd(), options).unwrap();
        let status = device.status().unwrap().unwrap();
        let metadata = file.metadata().unwrap();
        assert_eq!(
            (status.device, status.inode),
            (metadata.dev(), metadata.ino())
        );
        assert!(status.read_only && status.autoclear);
        assert_eq!(status.number, device.number());
        assert!(bound().unwrap().contains(&device.number()));
        let mut bytes = Vec::new();
        File::open(device.path())
            .unwrap()
            .read_to_end(&mut bytes)
            .unwrap();
        assert_eq!(bytes, [7; 8192]);
        let number = device.number();
        drop(device);
        let again = LoopDevice::open(number, true).unwrap().status().unwrap();
        assert!(
            again.is_none_or(|it| it.inode != metadata.ino()),
            "still bound to the file"
        );
    }

    #[test]
    fn root_a_device_without_a_node_is_opened_all_the_same() {
        let test = "root_a_device_without_a_node_is_opened_all_the_same";
        if missing(test) {
            return;
        }
        let (path, file) = backing_file("node");
        let nodes = path.with_extension("nodes");
        std::fs::remove_file(&path).unwrap();
        let options = LoopOptions {
            autoclear: true,
            ..LoopOptions::default()
        };
        let device = LoopDevice::bind_in(file.as_fd(), options, &nodes).unwrap();
        assert!(!nodes.exists(), "devtmpfs has made a node");
        let number = device.number();
        // All at once: each removes the node that another may be about to open.
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        let own = LoopDevice::open_own_node(number, true, &nodes).unwrap();
                        assert_eq!(own.status().unwrap(), device.status().unwrap());
                    }
                });
            }
        });
        assert_eq!(
            std::fs::read_dir(&nodes).unwrap().count(),
            0,
            "nodes are left"
        );
        // A node that a process left which died.
        let mode = Mode::RUSR | Mode::WUSR;
        let left = nodes.join(format!("loop{number}"));
        mknodat(CWD, &left, FileType::BlockDevice, mode, device.device()).unwrap();
        LoopDevice::open_own_node(number, true, &nodes).unwrap();
        assert!(!left.exists());
        // What the kernel has not is not made by looking for it.
        let none = LoopDevice::open_in(99_999, true, &nodes).unwrap_err();
        assert!(none.is_gone() && !is_there(99_999), "{none}");
        std::fs::remove_dir(&nodes).unwrap();
    }

    /// Mounts a file system that needs no device; `None` where that cannot be done here.
    fn mounted(kind: &str, test: &str) -> Option<PathBuf> {
        let at = std::env::temp_dir().join(format!("rewake-{kind}-{}", std::process::id()));
        std::fs::create_dir(&at).unwrap();
        let output = std::process::Command::new("mount")
            .args(["-t", kind, "none"])
            .arg(&at)
            .output()
            .unwrap();
        if output.status.success() {
            return Some(at);
        }
        std::fs::remove_dir(&at).unwrap();
        eprintln!("SKIP {test}: {}", String::from_utf8_lossy(&output.stderr));
        None
    }

    #[test]
    fn root_direct_io_is_used_where_the_file_allows_it() {
        let test = "root_direct_io_is_used_where_the_file_allows_it";
        if missing(test) {
            return;
        }
        let options = LoopOptions {
            autoclear: true,
            direct_io: true,
            block_size: 512,
            ..LoopOptions::default()
        };
        let bind = |file: &File| {
            let device = LoopDevice::bind(file.as_fd(), options).unwrap();
            let status = device.status().unwrap().unwrap();
            let mut bytes = Vec::new();
            let mut node = File::open(device.path()).unwrap();
            node.read_to_end(&mut bytes).unwrap();
            assert_eq!(bytes, [7; 8192]);
            status.direct_io
        };
        let (path, file) = backing_file("direct");
        // The same question as the kernel's: can the file be read past the page cache, by
        // sectors of 512 bytes?
        let direct = rustix::fs::open(
            &path,
            rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECT,
            Mode::empty(),
        );
        std::fs::remove_file(&path).unwrap();
        let flags = rustix::fs::StatxFlags::from_bits_retain(0x2000); // STATX_DIOALIGN
        let found = rustix::fs::statx(&file, "", rustix::fs::AtFlags::EMPTY_PATH, flags);
        match (direct, found) {
            (Ok(_), Ok(found)) if found.stx_mask & 0x2000 != 0 => {
                let allowed = (1..=512).contains(&found.stx_dio_offset_align);
                assert_eq!(
                    bind(&file),
                    allowed,
                    "aligned to {}",
                    found.stx_dio_offset_align
                );
            }
            _ => eprintln!("SKIP {test}: the temporary files' alignment is not known"),
        }
        // Page cache only: bound and read all the same.
        let Some(at) = mounted("ramfs", test) else {
            return;
        };
        let path = at.join("file");
        std::fs::write(&path, [7; 8192]).unwrap();
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .unwrap();
        let through_the_cache = !bind(&file);
        drop(file);
        // Lazily: the kernel may still be about to let go of the file.
        let unmounted = std::process::Command::new("umount")
            .arg("-l")
            .arg(&at)
            .status();
        assert!(unmounted.unwrap().success());
        std::fs::remove_dir(&at).unwrap();
        assert!(through_the_cache, "the status tells what came of the wish");
    }

    #[test]
    fn root_many_at_once_get_a_device_each() {
        if missing("root_many_at_once_get_a_device_each") {
            return;
        }
        let (path, file) = backing_file("many");
        std::fs::remove_file(&path).unwrap();
        let options = LoopOptions {
            autoclear: true,
            ..LoopOptions::default()
        };
        let devices: Vec<LoopDevice> = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..8)
                .map(|_| scope.spawn(|| LoopDevice::bind(file.as_fd(), options).unwrap()))
                .collect();
            workers.into_iter().map(|it| it.join().unwrap()).collect()
        });
        let mut numbers: Vec<u32> = devices.iter().map(LoopDevice::number).collect();
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len(), 8);
    }

    #[test]
    fn root_a_grown_file_grows_its_device() {
        use std::io::{Seek as _, SeekFrom};
        if missing("root_a_grown_file_grows_its_device") {
            return;
        }
        let (path, file) = backing_file("grown");
        std::fs::remove_file(&path).unwrap();
        let options = LoopOptions {
            autoclear: true,
            ..LoopOptions::default()
        };
        let device = LoopDevice::bind(file.as_fd(), options).unwrap();
        file.set_len(65536).unwrap();
        device.refresh_size().unwrap();
        let mut node = File::open(device.path()).unwrap();
        assert_eq!(node.seek(SeekFrom::End(0)).unwrap(), 65536);
        drop(node);
        device.unbind().unwrap();
    }
}
