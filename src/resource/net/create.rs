//! Building a slot, and what a built one offers.

use std::net::Ipv4Addr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use rewake_sys::CallError;
use rewake_sys::netns;
use rewake_sys::tun::{Tap, TapOptions};

use super::error::{NetError, NetLeftover, SlotFailure};
use super::host::{HostNet, Sockets};
use super::{NetStep, SlotPlan, link, namespace, walls};
use crate::deadline::Deadline;
use crate::ids::SlotIndex;
use crate::resource::ledger::Step;
use crate::resource::slot::{ProcessIdentity, SlotError, SlotLease};

/// A slot that stands: namespace, links, addresses, routes.
///
/// Dropping it keeps everything in the kernel, with a record by which a later sweep finds it.
/// To remove it, hand it to [`HostNet::destroy`].
#[derive(Debug)]
#[must_use = "a dropped slot stays in the kernel"]
pub struct Slot {
    pub(super) lease: SlotLease,
    pub(super) plan: SlotPlan,
    pub(super) netns: OwnedFd,
    pub(super) steps: Vec<NetStep>,
    path: PathBuf,
    tap: (String, TapOptions),
}

impl Slot {
    /// The slot's index.
    #[must_use]
    pub const fn index(&self) -> SlotIndex {
        self.plan.index
    }

    /// Its names and addresses.
    #[must_use]
    pub const fn plan(&self) -> &SlotPlan {
        &self.plan
    }

    /// The address under which the host reaches the guest.
    #[must_use]
    pub const fn host_address(&self) -> Ipv4Addr {
        self.plan.host_address
    }

    /// Its namespace: the VMM starts in it, probe sockets are made in it.
    #[must_use]
    pub fn netns(&self) -> BorrowedFd<'_> {
        self.netns.as_fd()
    }

    /// The file that pins the namespace.
    #[must_use]
    pub fn netns_path(&self) -> &std::path::Path {
        &self.path
    }

    /// What stands in the kernel because of the slot, oldest first, for a journal.
    #[must_use]
    pub fn steps(&self) -> &[NetStep] {
        &self.steps
    }

    /// The same as steps of a ledger, the slot's index first. The slot itself must be dropped
    /// before they are undone.
    #[must_use]
    pub fn ledger_steps(&self) -> Vec<Step> {
        let index = self.lease.record().map(|record| Step::Slot {
            path: self.lease.path().to_owned(),
            token: record.token.clone(),
        });
        let steps = self.steps.iter().cloned().map(|net| Step::Net { net });
        index.into_iter().chain(steps).collect()
    }

    /// The lock and record behind the slot.
    pub const fn lease(&mut self) -> &mut SlotLease {
        &mut self.lease
    }

    /// Notes the VMM that is about to run on the slot.
    ///
    /// # Errors
    /// [`SlotError::File`].
    pub fn set_vmm(&mut self, vmm: Option<ProcessIdentity>) -> Result<(), SlotError> {
        self.lease.set_vmm(vmm)
    }

    /// Whether its namespace is the one on record.
    fn is_recorded(&self) -> Result<(), NetError> {
        let pin = self.steps.iter().find_map(|step| match step {
            NetStep::Netns { device, inode, .. } => Some((*device, *inode)),
            _ => None,
        });
        let found = netns::identity(self.netns.as_fd()).map_err(|source| NetError::Call {
            step: "identify the namespace".to_owned(),
            source,
        })?;
        if pin == Some(found) {
            return Ok(());
        }
        Err(NetError::Damaged {
            index: self.index(),
            what: "another namespace is pinned".to_owned(),
        })
    }

    /// Opens non-blocking TCP sockets inside the namespace; they can be connected to the
    /// guest from anywhere. Starts a thread.
    ///
    /// # Errors
    /// What `setns` or `socket` say.
    pub fn probe_sockets(&self, count: usize) -> Result<Vec<OwnedFd>, CallError> {
        netns::tcp_sockets(self.netns.as_fd(), count)
    }

    /// Attaches to the tap, as the VMM would. Starts a thread.
    ///
    /// # Errors
    /// `EBUSY` where the VMM or somebody else has it open.
    pub fn open_tap(&self) -> Result<Tap, CallError> {
        netns::run_in(self.netns.as_fd(), || Tap::open(&self.tap.0, self.tap.1))?
    }
}

impl HostNet {
    /// Takes a free slot and builds it. `owner` goes into the slot's record. The host must
    /// have been readied ([`HostNet::prepare`]): without its walls no slot is built.
    ///
    /// Blocks for about a millisecond, on the kernel's own locks; the deadline bounds waits
    /// for netlink answers. Starts one thread, which ends with the call.
    ///
    /// # Errors
    /// [`SlotFailure`]; everything made so far has been undone, or is named in it.
    pub fn create(&self, owner: &str, deadline: Deadline) -> Result<Slot, CreateError> {
        let lease = self.slots.acquire(owner)?;
        self.build(lease, deadline).map_err(CreateError::Build)
    }

    /// Builds the slot of this index, which must be free or parked for `owner`.
    ///
    /// # Errors
    /// As [`HostNet::create`], and that the index is not to be had.
    pub fn create_at(
        &self,
        index: SlotIndex,
        owner: &str,
        deadline: Deadline,
    ) -> Result<Slot, CreateError> {
        let lease = self.slots.reserve(index, owner)?;
        self.build(lease, deadline).map_err(CreateError::Build)
    }

    /// Builds a slot on an index that is held already.
    ///
    /// # Errors
    /// [`SlotFailure`]; the index has been freed unless there are leftovers.
    pub fn build(&self, lease: SlotLease, deadline: Deadline) -> Result<Slot, SlotFailure> {
        self.build_with(lease, deadline, |_| {})
    }

    /// The same. The namespace is shown to `pinned` once it has its name, by the thread that
    /// builds.
    pub(super) fn build_with(
        &self,
        lease: SlotLease,
        deadline: Deadline,
        pinned: impl FnOnce(BorrowedFd<'_>) + Send,
    ) -> Result<Slot, SlotFailure> {
        self.raise(lease, deadline, pinned).map_err(|failed| {
            let (lease, failure) = *failed;
            Self::unbuilt(lease, failure.source, failure.leftovers)
        })
    }

    /// Frees the index of a slot that could not be built, unless something is left of it.
    pub(super) fn unbuilt(
        lease: SlotLease,
        source: NetError,
        leftovers: Vec<NetLeftover>,
    ) -> SlotFailure {
        let index = lease.index();
        if leftovers.is_empty()
            && let Err(held) = lease.release()
        {
            log::warn!("Slot {index} stays out of use: {}", held.error);
        }
        SlotFailure {
            index,
            source,
            leftovers,
        }
    }

    /// Takes up a slot that was kept, as it stands; or removes what is left of it and builds
    /// it anew: after a restart of the machine, for one. The index stays with its owner
    /// whatever happens.
    ///
    /// # Errors
    /// [`SlotFailure`]; the index has been parked again.
    pub fn revive(&self, lease: SlotLease, deadline: Deadline) -> Result<Slot, SlotFailure> {
        let (lease, why) = match self.reopen(lease, deadline) {
            Ok(slot) => return Ok(slot),
            Err(other) => *other,
        };
        let index = lease.index();
        log::info!("Slot {index} is built anew: {why}");
        let record = lease.record();
        let mut steps = record.map_or_else(Vec::new, |record| record.steps.clone());
        let mut leftovers = self.unwind(&mut steps, deadline);
        let (lease, failure) = if leftovers.is_empty() {
            match self.raise(lease, deadline, |_| {}) {
                Ok(slot) => return Ok(slot),
                Err(failed) => *failed,
            }
        } else {
            let source = leftovers.remove(0).error;
            let failure = SlotFailure {
                index,
                source,
                leftovers,
            };
            (lease, failure)
        };
        if let Err(error) = lease.park() {
            log::warn!("Slot {index} is not marked as kept: {error}");
        }
        Err(failure)
    }

    /// Builds a slot; the lease comes back where that fails.
    fn raise(
        &self,
        mut lease: SlotLease,
        deadline: Deadline,
        pinned: impl FnOnce(BorrowedFd<'_>) + Send,
    ) -> Result<Slot, Box<(SlotLease, SlotFailure)>> {
        let plan = self.config.slot(lease.index());
        let mut steps = Vec::new();
        match self.assemble(&mut lease, &plan, &mut steps, deadline, pinned) {
            Ok((netns, path)) => Ok(Slot {
                lease,
                plan,
                netns,
                steps,
                path,
                tap: self.tap(),
            }),
            Err(source) => {
                let leftovers = self.unwind(&mut steps, deadline);
                let failure = SlotFailure {
                    index: lease.index(),
                    source,
                    leftovers,
                };
                Err(Box::new((lease, failure)))
            }
        }
    }

    /// Takes up a slot that was built before, by another process perhaps, and still stands as
    /// it was built. The lease comes back where it does not: the slot is to be built anew.
    ///
    /// # Errors
    /// The lease, and what is wrong with the slot.
    pub fn reopen(
        &self,
        lease: SlotLease,
        deadline: Deadline,
    ) -> Result<Slot, Box<(SlotLease, NetError)>> {
        let plan = self.config.slot(lease.index());
        let path = self.config.netns_dir.join(&plan.netns);
        let steps = lease.record().map(|record| record.steps.clone());
        let netns = match netns::open(&path) {
            Ok(netns) => netns,
            Err(source) => {
                let step = "open the pinned namespace".to_owned();
                return Err(Box::new((lease, NetError::Call { step, source })));
            }
        };
        let slot = Slot {
            lease,
            plan,
            netns,
            steps: steps.unwrap_or_default(),
            path,
            tap: self.tap(),
        };
        let checked = slot
            .is_recorded()
            .and_then(|()| self.check(&slot, deadline));
        match checked {
            Ok(()) => Ok(slot),
            Err(error) => Err(Box::new((slot.lease, error))),
        }
    }

    /// The tap of every slot.
    fn tap(&self) -> (String, TapOptions) {
        let options = TapOptions {
            vnet_header: true,
            multi_queue: self.config.multi_queue,
        };
        (self.config.tap_name.as_str().to_owned(), options)
    }

    /// Undoes steps, last first. Those that fail stay in `steps`.
    pub(super) fn unwind(&self, steps: &mut Vec<NetStep>, deadline: Deadline) -> Vec<NetLeftover> {
        let mut leftovers = Vec::new();
        for step in std::mem::take(steps).into_iter().rev() {
            if let Err(error) = self.undo(&step, deadline) {
                steps.insert(0, step.clone());
                leftovers.push(NetLeftover { step, error });
            }
        }
        leftovers
    }

    fn assemble(
        &self,
        lease: &mut SlotLease,
        plan: &SlotPlan,
        steps: &mut Vec<NetStep>,
        deadline: Deadline,
        pinned: impl FnOnce(BorrowedFd<'_>) + Send,
    ) -> Result<(OwnedFd, PathBuf), NetError> {
        let path = self.config.netns_dir.join(&plan.netns);
        let faults = &self.faults;
        let injected = |errno| NetError::Call {
            step: "create a namespace".to_owned(),
            source: CallError::new("unshare", errno),
        };
        faults.before("create a namespace").map_err(injected)?;
        let outcome = netns::run_in_new(|namespace| {
            faults.after("create a namespace").map_err(injected)?;
            let identity = namespace::Identity::current(namespace.as_fd()).map_err(|source| {
                NetError::Call {
                    step: "identify the namespace".to_owned(),
                    source,
                }
            })?;
            // On record before any of it has a name in the kernel.
            steps.extend(self.planned(plan, identity.step(&path)));
            lease.set_steps(steps.clone())?;
            namespace::pin(&path, faults)?;
            pinned(namespace.as_fd());
            let mut inside = Sockets::open(faults)?;
            namespace::settings(&self.config, faults)?;
            let tap = namespace::make_tap(&self.config, faults)?;
            inside
                .netfilter
                .commit(&walls::inside(&self.config, plan), deadline)?;
            // The walls stand before there is a link that they guard.
            let table = walls::host_table(&self.config);
            let admission = walls::admit(&table, &walls::sources(plan));
            self.sockets().netfilter.commit(&admission, deadline)?;
            let pair = link::pair(&self.config, plan, namespace.as_fd());
            self.sockets().route.commit(&pair, deadline)?;
            let inside_side = link::inside_side(&self.config, plan, tap);
            inside.route.commit(&inside_side, deadline)?;
            self.sockets()
                .route
                .commit(&link::host_side(plan), deadline)?;
            Ok::<_, NetError>(namespace)
        });
        let namespace = outcome.map_err(|source| NetError::Call {
            step: "create a namespace".to_owned(),
            source,
        })??;
        Ok((namespace, path))
    }

    /// The undo steps of a slot, oldest first.
    fn planned(&self, plan: &SlotPlan, pin: NetStep) -> [NetStep; 4] {
        [
            // Undone last: only when no packet can come any more, nothing is remembered
            // anew.
            NetStep::Conntrack {
                addresses: vec![plan.host_address, plan.inside_address],
            },
            pin,
            NetStep::Link {
                name: plan.veth.clone(),
                index: plan.veth_index,
                mac: plan.veth_mac,
            },
            NetStep::Walls {
                table: walls::host_table(&self.config),
                sources: walls::sources(plan),
            },
        ]
    }
}

/// Why there is no new slot.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// No index was to be had.
    #[error(transparent)]
    Slot(#[from] SlotError),
    /// The slot could not be built.
    #[error(transparent)]
    Build(#[from] SlotFailure),
}
