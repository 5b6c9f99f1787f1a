//! A client that blocks.

use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

use log::warn;

use super::body::{
    Counters, PciDeviceInfo, Ping, ReceiveMigration, Resize, ResizeDisk, ResizeZone, RestoreConfig,
    SendMigration, VmInfo,
};
use super::call::{Answer, Call, PREFERRED_BODY_BYTES};
use super::error::ApiError;
use super::operation::Operation;
use super::version::{Features, Support, Version};
use crate::deadline::Deadline;
use crate::vm_config::{
    DeviceConfig, DiskConfig, FsConfig, GenericVhostUserConfig, NetConfig, PmemConfig,
    UserDeviceConfig, VdpaConfig, VmConfig, VsockConfig,
};
use crate::wire::conn::{Address, ConnError, Connection, Peer, Stream};
use crate::wire::excerpt::excerpt;
use crate::wire::http::Response;

/// A connection to one Cloud Hypervisor process.
///
/// Every call blocks until its answer is complete or its deadline has passed. The connection
/// is kept between calls and made anew after an error, and after the answers behind which
/// CH's HTTP server may have lost its place (400, 503). A request is never sent twice.
#[derive(Debug)]
pub struct Client {
    socket: PathBuf,
    connection: Option<Connection>,
    version: Version,
}

impl Client {
    /// Connects to the API socket and asks for the version.
    ///
    /// # Errors
    /// [`ApiError::NoAnswer`], [`ApiError::Refused`], [`ApiError::UnreadableAnswer`],
    /// [`ApiError::UnreadableVersion`].
    pub fn connect(socket: impl Into<PathBuf>, deadline: Deadline) -> Result<Self, ApiError> {
        let mut client = Self::assuming(socket, Version::V53);
        let ping = client.ping(deadline)?;
        client.version = ping
            .parsed_version()
            .map_err(|_| ApiError::UnreadableVersion {
                text: excerpt(&ping.version),
            })?;
        match client.version.support() {
            Support::Known => {}
            Support::Newer => warn!(
                "Cloud Hypervisor {} is newer than any known version; treated like {}",
                client.version,
                Version::V53
            ),
            Support::TooOld => warn!(
                "Cloud Hypervisor {} is older than any known version; treated like {}",
                client.version,
                Version::V50
            ),
        }
        Ok(client)
    }

    /// A client for a process whose version is known. Nothing is sent before the first call.
    #[must_use]
    pub fn assuming(socket: impl Into<PathBuf>, version: Version) -> Self {
        Self {
            socket: socket.into(),
            connection: None,
            version,
        }
    }

    /// The same with a connection that an earlier exchange left.
    ///
    /// # Errors
    /// [`ApiError::NoAnswer`] where `epoll` cannot be set up.
    pub fn adopt(
        socket: impl Into<PathBuf>,
        version: Version,
        stream: Stream,
    ) -> Result<Self, ApiError> {
        let mut client = Self::assuming(socket, version);
        let connection = Connection::over(stream, Peer::VMM).map_err(|source| {
            let operation = Operation::Ping;
            ApiError::NoAnswer { operation, source }
        })?;
        client.connection = Some(connection.returning_to(client.address()));
        Ok(client)
    }

    /// The API socket.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The version of the process.
    #[must_use]
    pub const fn version(&self) -> Version {
        self.version
    }

    /// What that version can do.
    #[must_use]
    pub const fn features(&self) -> Features {
        Features::of(self.version)
    }

    /// Closes the connection, to make room for another client. The next call makes a new one.
    pub fn disconnect(&mut self) {
        self.connection = None;
    }

    /// Sends a call, with descriptors, and reads its answer.
    ///
    /// # Errors
    /// [`ApiError::NoAnswer`], and what [`Call::decode`] reports.
    pub fn call<T: Answer>(
        &mut self,
        call: &Call<T>,
        fds: &[BorrowedFd<'_>],
        deadline: Deadline,
    ) -> Result<T, ApiError> {
        let bytes = call.request().body.len();
        if bytes > PREFERRED_BODY_BYTES {
            warn!(
                "{} has {bytes} bytes: Cloud Hypervisor may hang at its exit",
                call.operation()
            );
        }
        let request = call.encode()?;
        let answered = self.connection(deadline).and_then(|connection| {
            let finished = connection.exchange_encoded(request, fds, deadline)?;
            Ok(finished.response)
        });
        let unfit = |response: &Response| matches!(response.status, 400 | 503);
        if answered.as_ref().map_or(true, unfit) {
            self.connection = None;
        }
        let response = answered.map_err(|source| ApiError::NoAnswer {
            operation: call.operation(),
            source,
        })?;
        call.decode(&response)
    }

    fn connection(&mut self, deadline: Deadline) -> Result<&mut Connection, ConnError> {
        // It looks after its stream by itself: one that CH has closed is made anew.
        let connection = match self.connection.take() {
            Some(connection) => connection,
            None => Connection::connect(&self.address(), Peer::VMM, deadline)?,
        };
        Ok(self.connection.insert(connection))
    }

    fn address(&self) -> Address {
        Address::Unix(self.socket.clone())
    }
}

macro_rules! calls {
    ($($(#[$doc:meta])* $name:ident($($arg:ident: $type:ty),*) -> $answer:ty = $call:expr;)*) => {
        /// One method per operation. Unless more is said, each blocks until CH has done it,
        /// and fails with [`ApiError::Refused`], [`ApiError::NoAnswer`], or before anything is
        /// sent as the constructor of [`Call`] with the same name.
        impl Client {
            $($(#[$doc])*
            ///
            /// # Errors
            /// [`ApiError`], as said at this `impl`.
            pub fn $name(&mut self, $($arg: $type,)* deadline: Deadline) -> Result<$answer, ApiError> {
                self.call(&$call, &[], deadline)
            })*
        }
    };
}

calls! {
    /// `vmm.ping`: who is there? Waits behind whatever CH is doing.
    ping() -> Ping = Call::ping();
    /// `vmm.shutdown`: ends the VM and the process. The answer comes before the process has
    /// gone, and a build with glibc may hang on its way out: have SIGKILL behind it.
    shutdown_vmm() -> () = Call::shutdown_vmm();
    /// `vm.info`: configuration, state, memory the guest has. Fails with
    /// [`ApiError::is_vm_missing`] where there is no VM.
    info() -> VmInfo = Call::info();
    /// `vm.counters`: what the devices count.
    counters() -> Counters = Call::counters();
    /// `vm.create`: gives CH a configuration. Console files are made (and truncated) now,
    /// everything else at [`boot`](Self::boot). Descriptors in it are ignored: taps come by
    /// name here.
    create(config: &VmConfig) -> () = Call::create(config)?;
    /// `vm.boot`: the vCPUs run when it answers.
    boot() -> () = Call::boot();
    /// `vm.pause`: vCPUs and device threads are parked when it answers. A paused VM refuses
    /// ([`ApiError::is_invalid_transition`]).
    pause() -> () = Call::pause();
    /// `vm.resume`: the guest has usually run for a while when it answers. A running VM
    /// refuses.
    resume() -> () = Call::resume();
    /// `vm.shutdown`: takes the VM down without telling the guest; the configuration stays,
    /// and its state is [`VmState::Created`](super::VmState::Created).
    shutdown() -> () = Call::shutdown();
    /// `vm.reboot`: takes it down and boots it again.
    reboot() -> () = Call::reboot();
    /// `vm.delete`: takes the VM down and forgets it. Succeeds where there is none.
    delete() -> () = Call::delete();
    /// `vm.power-button`: tells the guest by ACPI. What it does about it is its own affair.
    power_button() -> () = Call::power_button();
    /// `vm.nmi`: a non-maskable interrupt for the guest.
    nmi() -> () = Call::nmi();
    /// `vm.snapshot` of a paused VM into an existing, absolute directory. CH writes
    /// `config.json`, `state.json` and where needed `memory-ranges`, without `fsync`; a short
    /// write of the first two goes unnoticed. Whatever comes of it, the directory is used up.
    snapshot(directory: &Path) -> () = Call::snapshot(directory)?;
    /// `vm.coredump` of a paused VM into a file that CH makes. Only in builds with
    /// `guest_debug`: elsewhere [`ApiError::is_unknown_operation`].
    coredump(file: &Path) -> () = Call::coredump(file)?;
    /// `vm.resize`. Answers when the guest has been told, not when it has complied: watch
    /// `memory_actual_size` of [`info`](Self::info) for a balloon.
    resize(to: &Resize) -> () = Call::resize(to)?;
    /// `vm.resize-zone`. Answers when the guest has been told.
    resize_zone(to: &ResizeZone) -> () = Call::resize_zone(to)?;
    /// `vm.resize-disk`: a raw image is made larger or smaller, and the guest is told.
    resize_disk(to: &ResizeDisk) -> () = Call::resize_disk(to)?;
    /// `vm.add-disk`. Before boot only the configuration changes, and there is no answer.
    add_disk(config: &DiskConfig) -> Option<PciDeviceInfo> = Call::add_disk(config)?;
    /// `vm.add-fs`; see [`add_disk`](Self::add_disk).
    add_fs(config: &FsConfig) -> Option<PciDeviceInfo> = Call::add_fs(config)?;
    /// `vm.add-pmem`; see [`add_disk`](Self::add_disk).
    add_pmem(config: &PmemConfig) -> Option<PciDeviceInfo> = Call::add_pmem(config)?;
    /// `vm.add-vsock`; see [`add_disk`](Self::add_disk).
    add_vsock(config: &VsockConfig) -> Option<PciDeviceInfo> = Call::add_vsock(config)?;
    /// `vm.add-vdpa`; see [`add_disk`](Self::add_disk).
    add_vdpa(config: &VdpaConfig) -> Option<PciDeviceInfo> = Call::add_vdpa(config)?;
    /// `vm.add-user-device`; see [`add_disk`](Self::add_disk).
    add_user_device(config: &UserDeviceConfig) -> Option<PciDeviceInfo> =
        Call::add_user_device(config)?;
    /// `vm.remove-device`. Answers when the guest has been asked to let go; when it has, the
    /// event `vm/device-removed` comes. A guest without a driver never does.
    remove_device(id: &str) -> () = Call::remove_device(id)?;
    /// `vm.send-migration`. In v53 it answers at once, and events tell the outcome; before,
    /// it answers when the VM has moved.
    send_migration(migration: &SendMigration) -> () = Call::send_migration(migration)?;
    /// `vm.receive-migration`. Answers when the VM has arrived, and blocks CH until then.
    receive_migration(migration: &ReceiveMigration) -> () = Call::receive_migration(migration)?;
}

/// Operations that depend on the version, or take descriptors. The descriptors are copied:
/// the caller's own may be closed as soon as the call returns.
impl Client {
    /// `vm.restore`, with the descriptors that `net_fds` speaks of, in its order. The VM is
    /// paused when it answers, unless `resume` is set: a version that does not know that is
    /// sent `vm.resume` after it.
    ///
    /// A failed restore leaves no VM, and a process that can be used again.
    ///
    /// # Errors
    /// As [`Call::restore`]; [`ApiError::Refused`], [`ApiError::NoAnswer`].
    pub fn restore(
        &mut self,
        config: &RestoreConfig,
        fds: &[BorrowedFd<'_>],
        deadline: Deadline,
    ) -> Result<(), ApiError> {
        let restore = Call::restore(config, fds.len(), self.version)?;
        self.call(&restore.call, fds, deadline)?;
        match restore.then {
            Some(resume) => self.call(&resume, &[], deadline),
            None => Ok(()),
        }
    }

    /// `vm.add-net`, with one descriptor per queue pair of an opened tap, or none where it is
    /// named. The tap must have been opened with the vnet header: CH does not check.
    ///
    /// # Errors
    /// As [`Call::add_net`]; [`ApiError::Refused`], [`ApiError::NoAnswer`].
    pub fn add_net(
        &mut self,
        config: &NetConfig,
        fds: &[BorrowedFd<'_>],
        deadline: Deadline,
    ) -> Result<Option<PciDeviceInfo>, ApiError> {
        self.call(&Call::add_net(config, fds.len())?, fds, deadline)
    }

    /// `vm.add-device`, with an opened VFIO device in place of its path (v53).
    ///
    /// # Errors
    /// As [`Call::add_device`]; [`ApiError::Refused`], [`ApiError::NoAnswer`].
    pub fn add_device(
        &mut self,
        config: &DeviceConfig,
        fd: Option<BorrowedFd<'_>>,
        deadline: Deadline,
    ) -> Result<Option<PciDeviceInfo>, ApiError> {
        let fds = fd.as_slice();
        let call = Call::add_device(config, fds.len(), self.version)?;
        self.call(&call, fds, deadline)
    }

    /// `vm.add-generic-vhost-user` (v52); see [`add_disk`](Self::add_disk).
    ///
    /// # Errors
    /// As [`Call::add_generic_vhost_user`]; [`ApiError::Refused`], [`ApiError::NoAnswer`].
    pub fn add_generic_vhost_user(
        &mut self,
        config: &GenericVhostUserConfig,
        deadline: Deadline,
    ) -> Result<Option<PciDeviceInfo>, ApiError> {
        let call = Call::add_generic_vhost_user(config, self.version)?;
        self.call(&call, &[], deadline)
    }
}
