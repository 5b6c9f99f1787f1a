//! Operations as data: the request to send, and how to read its answer.

use std::fmt;
use std::marker::PhantomData;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::body::{
    Counters, Destination, MemoryRestoreMode, PciDeviceInfo, Ping, ReceiveMigration, RemoveDevice,
    Resize, ResizeDisk, ResizeZone, RestoreConfig, SendMigration, VmInfo,
};
use super::error::{ApiError, Chain};
use super::operation::Operation;
use super::version::{Features, Version};
use crate::vm_config::{
    DeviceConfig, DiskConfig, FsConfig, GenericVhostUserConfig, NetConfig, PmemConfig,
    UserDeviceConfig, VdpaConfig, VmConfig, VsockConfig,
};
use crate::wire::http::{EncodedRequest, Request, Response};
use crate::wire::json::{self, JsonLimits};

/// The longest body that CH's server takes (micro-http, `src/server.rs`).
pub const MAX_BODY_BYTES: usize = 51_200;

/// The longest body after which a CH built with glibc is known to exit in good order. After
/// longer ones its HTTP thread may call `open` while it ends, which its seccomp filter traps.
pub const PREFERRED_BODY_BYTES: usize = 33 * 1024;

/// `file://` and `path`, which CH takes literally: nothing is percent-encoded.
///
/// # Errors
/// [`ApiError::Path`] unless the path is absolute and UTF-8.
pub fn file_url(path: &Path) -> Result<String, ApiError> {
    match path.to_str() {
        Some(text) if path.is_absolute() => Ok(format!("file://{text}")),
        _ => Err(ApiError::Path { path: path.into() }),
    }
}

/// One operation, ready to be sent, whose answer is a `T`.
///
/// It is plain data: [`Client`](super::Client) sends it and blocks; an
/// [`Exchange`](crate::wire::conn::Exchange) sends [`encode`](Call::encode) without blocking,
/// and [`decode`](Call::decode) reads what it brings.
pub struct Call<T> {
    operation: Operation,
    request: Request,
    answer: PhantomData<fn() -> T>,
}

impl<T> Clone for Call<T> {
    fn clone(&self) -> Self {
        Self {
            operation: self.operation,
            request: self.request.clone(),
            answer: PhantomData,
        }
    }
}

impl<T> fmt::Debug for Call<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.request.body.len();
        write!(f, "Call({}, {bytes} bytes)", self.operation)
    }
}

/// What an operation brings.
///
/// Implemented for the answers of CH; it cannot be implemented elsewhere.
pub trait Answer: Sized + sealed::Sealed {
    #[doc(hidden)]
    fn read(operation: Operation, response: &Response) -> Result<Self, ApiError>;
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for () {}
    impl Sealed for super::Ping {}
    impl Sealed for super::VmInfo {}
    impl Sealed for super::Counters {}
    impl Sealed for Option<super::PciDeviceInfo> {}
}

impl<T: Answer> Call<T> {
    fn new(operation: Operation) -> Self {
        Self {
            operation,
            request: Request::new(operation.method(), operation.target()),
            answer: PhantomData,
        }
    }

    fn with_body(operation: Operation, body: &impl Serialize) -> Result<Self, ApiError> {
        let body =
            serde_json::to_vec(body).map_err(|source| ApiError::Body { operation, source })?;
        if body.len() > MAX_BODY_BYTES {
            return Err(ApiError::BodyTooLarge {
                operation,
                bytes: body.len(),
                limit: MAX_BODY_BYTES,
            });
        }
        let mut call = Self::new(operation);
        call.request = call.request.json(body);
        Ok(call)
    }

    /// Which operation it is.
    #[must_use]
    pub const fn operation(&self) -> Operation {
        self.operation
    }

    /// The request.
    #[must_use]
    pub const fn request(&self) -> &Request {
        &self.request
    }

    /// The request as bytes.
    ///
    /// # Errors
    /// [`ApiError::Request`], which the constructors here rule out.
    pub fn encode(&self) -> Result<EncodedRequest, ApiError> {
        self.request.encode().map_err(|source| ApiError::Request {
            operation: self.operation,
            source,
        })
    }

    /// Reads the answer.
    ///
    /// # Errors
    /// [`ApiError::Refused`] unless the status is 2xx, [`ApiError::UnreadableAnswer`] where
    /// the body is not what this operation brings.
    pub fn decode(&self, response: &Response) -> Result<T, ApiError> {
        if !response.is_success() {
            return Err(ApiError::Refused {
                operation: self.operation,
                status: response.status,
                chain: Chain::decode(&response.body),
            });
        }
        T::read(self.operation, response)
    }
}

/// The whole configuration and device tree of a large VM.
const ANSWER_LIMITS: JsonLimits = JsonLimits {
    bytes: 8 << 20,
    depth: 12,
};

fn read_json<T: DeserializeOwned>(
    operation: Operation,
    response: &Response,
) -> Result<T, ApiError> {
    json::from_slice_bounded(&response.body, ANSWER_LIMITS).map_err(|source| {
        ApiError::UnreadableAnswer {
            operation,
            status: response.status,
            source,
        }
    })
}

impl Answer for () {
    /// CH answers 204, `vmm.shutdown` an empty 200. A body would be news of a later version.
    fn read(_operation: Operation, _response: &Response) -> Result<Self, ApiError> {
        Ok(())
    }
}

impl Answer for Ping {
    fn read(operation: Operation, response: &Response) -> Result<Self, ApiError> {
        read_json(operation, response)
    }
}

impl Answer for VmInfo {
    fn read(operation: Operation, response: &Response) -> Result<Self, ApiError> {
        read_json(operation, response)
    }
}

impl Answer for Counters {
    fn read(operation: Operation, response: &Response) -> Result<Self, ApiError> {
        read_json(operation, response)
    }
}

impl Answer for Option<PciDeviceInfo> {
    /// 200 with the device where the VM has booted, else 204.
    fn read(operation: Operation, response: &Response) -> Result<Self, ApiError> {
        if response.body.is_empty() {
            return Ok(None);
        }
        read_json(operation, response).map(Some)
    }
}

impl Call<Ping> {
    /// `vmm.ping`.
    #[must_use]
    pub fn ping() -> Self {
        Self::new(Operation::Ping)
    }
}

impl Call<VmInfo> {
    /// `vm.info`.
    #[must_use]
    pub fn info() -> Self {
        Self::new(Operation::Info)
    }
}

impl Call<Counters> {
    /// `vm.counters`.
    #[must_use]
    pub fn counters() -> Self {
        Self::new(Operation::Counters)
    }
}

macro_rules! without_body {
    ($($(#[$doc:meta])* $name:ident = $operation:ident,)*) => {
        impl Call<()> {
            $($(#[$doc])*
            #[must_use]
            pub fn $name() -> Self {
                Self::new(Operation::$operation)
            })*
        }
    };
}

without_body! {
    /// `vmm.shutdown`.
    shutdown_vmm = ShutdownVmm,
    /// `vm.boot`.
    boot = Boot,
    /// `vm.pause`.
    pause = Pause,
    /// `vm.resume`.
    resume = Resume,
    /// `vm.shutdown`.
    shutdown = Shutdown,
    /// `vm.reboot`.
    reboot = Reboot,
    /// `vm.delete`.
    delete = Delete,
    /// `vm.power-button`.
    power_button = PowerButton,
    /// `vm.nmi`.
    nmi = Nmi,
}

macro_rules! with_body {
    ($($(#[$doc:meta])* $name:ident($body:ty) -> $answer:ty = $operation:ident,)*) => {
        $(impl Call<$answer> {
            $(#[$doc])*
            ///
            /// # Errors
            /// [`ApiError::Body`] and [`ApiError::BodyTooLarge`].
            pub fn $name(body: &$body) -> Result<Self, ApiError> {
                Self::with_body(Operation::$operation, body)
            }
        })*
    };
}

with_body! {
    /// `vm.create`.
    create(VmConfig) -> () = Create,
    /// `vm.resize`.
    resize(Resize) -> () = Resize,
    /// `vm.resize-zone`.
    resize_zone(ResizeZone) -> () = ResizeZone,
    /// `vm.resize-disk`.
    resize_disk(ResizeDisk) -> () = ResizeDisk,
    /// `vm.send-migration`.
    send_migration(SendMigration) -> () = SendMigration,
    /// `vm.receive-migration`.
    receive_migration(ReceiveMigration) -> () = ReceiveMigration,
    /// `vm.add-disk`.
    add_disk(DiskConfig) -> Option<PciDeviceInfo> = AddDisk,
    /// `vm.add-fs`.
    add_fs(FsConfig) -> Option<PciDeviceInfo> = AddFs,
    /// `vm.add-pmem`.
    add_pmem(PmemConfig) -> Option<PciDeviceInfo> = AddPmem,
    /// `vm.add-vsock`.
    add_vsock(VsockConfig) -> Option<PciDeviceInfo> = AddVsock,
    /// `vm.add-vdpa`.
    add_vdpa(VdpaConfig) -> Option<PciDeviceInfo> = AddVdpa,
    /// `vm.add-user-device`.
    add_user_device(UserDeviceConfig) -> Option<PciDeviceInfo> = AddUserDevice,
}

/// A restore, fit for one version of CH.
#[derive(Debug, Clone)]
pub struct Restore {
    /// `vm.restore`. The descriptors of `net_fds` travel with it.
    pub call: Call<()>,
    /// `vm.resume`, to be sent after it: `resume` was asked for, and this version does not
    /// know it.
    pub then: Option<Call<()>>,
}

impl Call<()> {
    /// `vm.snapshot` into an existing directory, which serves once only.
    ///
    /// # Errors
    /// [`ApiError::Path`], [`ApiError::BodyTooLarge`].
    pub fn snapshot(directory: &Path) -> Result<Self, ApiError> {
        let destination_url = file_url(directory)?;
        Self::with_body(Operation::Snapshot, &Destination { destination_url })
    }

    /// `vm.coredump` into a file.
    ///
    /// # Errors
    /// [`ApiError::Path`], [`ApiError::BodyTooLarge`].
    pub fn coredump(file: &Path) -> Result<Self, ApiError> {
        let destination_url = file_url(file)?;
        Self::with_body(Operation::Coredump, &Destination { destination_url })
    }

    /// `vm.remove-device`.
    ///
    /// # Errors
    /// [`ApiError::BodyTooLarge`].
    pub fn remove_device(id: &str) -> Result<Self, ApiError> {
        let body = RemoveDevice { id: id.to_owned() };
        Self::with_body(Operation::RemoveDevice, &body)
    }

    /// `vm.restore`, with `descriptors` travelling along.
    ///
    /// # Errors
    /// [`ApiError::Unsupported`] for a mode that this version would ignore,
    /// [`ApiError::Descriptors`] where `net_fds` speaks of another number of them,
    /// [`ApiError::BodyTooLarge`].
    pub fn restore(
        config: &RestoreConfig,
        descriptors: usize,
        version: Version,
    ) -> Result<Restore, ApiError> {
        let operation = Operation::Restore;
        let features = Features::of(version);
        let (known, what) = match config.memory_restore_mode {
            MemoryRestoreMode::Copy => (true, "memory_restore_mode Copy"),
            MemoryRestoreMode::OnDemand => {
                (features.restore_on_demand, "memory_restore_mode OnDemand")
            }
            MemoryRestoreMode::CopyOnWrite => (
                features.restore_copy_on_write,
                "memory_restore_mode CopyOnWrite",
            ),
        };
        if !known {
            return Err(ApiError::Unsupported {
                operation,
                what,
                version,
            });
        }
        let nets = config.net_fds.iter().flatten();
        let expected = nets.fold(0_usize, |sum, net| sum.saturating_add(net.num_fds));
        check_descriptors(operation, expected, descriptors)?;
        let then_resume = config.resume && !features.restore_resume;
        let body = RestoreConfig {
            resume: config.resume && features.restore_resume,
            ..config.clone()
        };
        Ok(Restore {
            call: Self::with_body(operation, &body)?,
            then: then_resume.then(Self::resume),
        })
    }
}

impl Call<Option<PciDeviceInfo>> {
    /// `vm.add-net`, with the descriptors of its tap queues travelling along, one per queue
    /// pair, or none where the tap is named.
    ///
    /// # Errors
    /// [`ApiError::Descriptors`] where their number is not half of `num_queues`,
    /// [`ApiError::Body`], [`ApiError::BodyTooLarge`].
    pub fn add_net(config: &NetConfig, descriptors: usize) -> Result<Self, ApiError> {
        let operation = Operation::AddNet;
        let by_descriptor = descriptors > 0 || config.fds.is_some();
        if by_descriptor {
            check_descriptors(operation, config.num_queues / 2, descriptors)?;
        }
        // The numbers are those of this process: CH puts its own in their place.
        let body = NetConfig {
            fds: None,
            ..config.clone()
        };
        Self::with_body(operation, &body)
    }

    /// `vm.add-device`, with the descriptor of an opened device travelling along where it has
    /// no path.
    ///
    /// # Errors
    /// [`ApiError::Unsupported`] for a descriptor before v53, [`ApiError::Descriptors`] for
    /// two, or none where there is no path; [`ApiError::Body`], [`ApiError::BodyTooLarge`].
    pub fn add_device(
        config: &DeviceConfig,
        descriptors: usize,
        version: Version,
    ) -> Result<Self, ApiError> {
        let operation = Operation::AddDevice;
        let by_descriptor = descriptors > 0 || config.path.is_none();
        if by_descriptor && !Features::of(version).add_device_fd {
            return Err(ApiError::Unsupported {
                operation,
                what: "vm.add-device with a descriptor",
                version,
            });
        }
        check_descriptors(operation, usize::from(by_descriptor), descriptors)?;
        let body = DeviceConfig {
            fd: None,
            ..config.clone()
        };
        Self::with_body(operation, &body)
    }

    /// `vm.add-generic-vhost-user`.
    ///
    /// # Errors
    /// [`ApiError::Unsupported`] before v52, [`ApiError::Body`], [`ApiError::BodyTooLarge`].
    pub fn add_generic_vhost_user(
        config: &GenericVhostUserConfig,
        version: Version,
    ) -> Result<Self, ApiError> {
        let operation = Operation::AddGenericVhostUser;
        if !Features::of(version).generic_vhost_user {
            return Err(ApiError::Unsupported {
                operation,
                what: "vm.add-generic-vhost-user",
                version,
            });
        }
        Self::with_body(operation, config)
    }
}

const fn check_descriptors(
    operation: Operation,
    expected: usize,
    given: usize,
) -> Result<(), ApiError> {
    if expected == given {
        return Ok(());
    }
    Err(ApiError::Descriptors {
        operation,
        expected,
        given,
    })
}
