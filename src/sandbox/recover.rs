//! Recover: what became of every sandbox while nobody watched.
//!
//! Journals are read, and each sandbox that nobody is at work with is brought into a state
//! that it can be used from: adopted where it runs, kept where it is paused, undone where it
//! was half made, noted as lost where its VM died. What cannot be proven ours is left alone
//! and named.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::context::Context;
use super::dir::{self, SandboxDir};
use super::error::{Cause, Error, Operation, Remains, file};
use super::hold::{Hold, is_gone};
use super::journal::is_blank;
use super::kept::{forget_snapshots, keep_slot, put_back};
use super::live::Live;
use super::pause::release;
use super::state::{RunningVm, State, Status};
use super::untouched::Ran;
use rustix::fs::OFlags;

use crate::deadline::Deadline;
use crate::envd::init::Init;
use crate::ids::SandboxId;
use crate::plan::MemoryMode;
use crate::resource::disk::DiskStock;
use crate::resource::ledger::Step;
use crate::resource::slot::ProcessIdentity;
use crate::restore::kit;
use crate::snapshot::{SnapshotDir, memory_of};
use crate::vmm::api::{Client, Version, VmState};
use crate::vmm::launch::FIRST_INHERITED;
use crate::vmm::orphan;

/// For each question to a VM or its agent.
const ASK_BUDGET: Duration = Duration::from_secs(2);
/// Sandboxes looked at at the same time: most of the time is spent waiting for guests.
const THREADS: usize = 16;

/// Why a sandbox is lost whose snapshot was in the page cache only.
const RESTARTED_TOO_EARLY: &str = "the machine restarted before its memory was on the disk";

/// What was found. Every sandbox is in exactly one of the lists of ids.
#[derive(Debug, Default)]
pub struct Census {
    /// They run, and their agents answer.
    pub adopted: Vec<SandboxId>,
    /// They are paused.
    pub paused: Vec<SandboxId>,
    /// They were half made, or half removed, and are gone now.
    pub reclaimed: Vec<SandboxId>,
    /// Their VMs ended without a snapshot: found now, or noted before.
    pub lost: Vec<SandboxId>,
    /// Somebody is at work with them.
    pub under_way: Vec<SandboxId>,
    /// They could not be brought into a state to be used from, and why.
    pub stuck: Vec<(SandboxId, Error)>,
    /// They run, but their agents do not answer; left alone.
    pub silent: Vec<SandboxId>,
    /// Other things of ours that nobody needed any more, gone now.
    pub swept: Vec<String>,
    /// Things that look like ours and are not proven to be; left alone.
    pub foreign: Vec<String>,
    /// Things of ours that could not be removed.
    pub remains: Vec<Remains>,
}

impl Census {
    /// Whether nothing is left that somebody should look at.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.stuck.is_empty() && self.remains.is_empty()
    }
}

/// What became of one sandbox.
enum Fate {
    Adopted,
    Silent,
    Paused,
    Reclaimed,
    Lost,
    UnderWay,
    Gone,
}

/// Looks at every sandbox, and sweeps what belongs to none.
pub(crate) fn recover(ctx: &Arc<Context>, asked: Deadline) -> Result<Census, Error> {
    let deadline = ctx.deadline(asked);
    let root = &ctx.config.root;
    let listing = dir::list(root)
        .map_err(|error| Error::of_host(Operation::Recover, file("list", dir::all(root))(error)))?;
    let census = Mutex::new(Census::default());
    let next = Mutex::new(listing.ids.iter());
    std::thread::scope(|scope| {
        for _ in 0..THREADS.min(listing.ids.len()) {
            scope.spawn(|| {
                loop {
                    let id = next.lock().unwrap_or_else(PoisonError::into_inner).next();
                    let Some(id) = id else { break };
                    let fate = one(ctx, id, deadline);
                    let mut census = census.lock().unwrap_or_else(PoisonError::into_inner);
                    census.note(id, fate);
                }
            });
        }
    });
    let mut census = census.into_inner().unwrap_or_else(PoisonError::into_inner);
    census.sort();
    for path in listing.unnamed {
        match dir::remove_unnamed(&path) {
            Ok(true) => census.swept.push(format!("directory {}", path.display())),
            Ok(false) => {}
            Err(error) => census.remains.push(Remains::File(path, error)),
        }
    }
    let foreign = listing.foreign.iter();
    census
        .foreign
        .extend(foreign.map(|path| format!("file {}", path.display())));
    sweep(ctx, &mut census, deadline)?;
    Ok(census)
}

impl Census {
    fn note(&mut self, id: &SandboxId, fate: Result<Fate, Error>) {
        let list = match fate {
            Ok(Fate::Adopted) => &mut self.adopted,
            Ok(Fate::Silent) => &mut self.silent,
            Ok(Fate::Paused) => &mut self.paused,
            Ok(Fate::Reclaimed) => &mut self.reclaimed,
            Ok(Fate::Lost) => &mut self.lost,
            Ok(Fate::UnderWay) => &mut self.under_way,
            Ok(Fate::Gone) => return,
            Err(error) => return self.stuck.push((id.clone(), error)),
        };
        list.push(id.clone());
    }

    fn sort(&mut self) {
        for list in [
            &mut self.adopted,
            &mut self.silent,
            &mut self.paused,
            &mut self.reclaimed,
            &mut self.lost,
            &mut self.under_way,
        ] {
            list.sort_unstable();
        }
        self.stuck.sort_by(|(a, _), (b, _)| a.cmp(b));
    }
}

fn one(ctx: &Arc<Context>, id: &SandboxId, deadline: Deadline) -> Result<Fate, Error> {
    let failed = |cause| Error::new(id, Operation::Recover, cause);
    let dir = SandboxDir::of(&ctx.config.root, id);
    let doomed = dir.is_doomed();
    let lock = match dir.try_lock() {
        Ok(Some(lock)) => lock,
        Ok(None) => return Ok(Fate::UnderWay),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Fate::Gone),
        Err(error) => return Err(failed(file("lock", dir.path())(error))),
    };
    if is_blank(&dir.journal()) {
        // The power went while it was being launched, and with it all that it had but files.
        dir.remove()
            .map_err(|error| failed(file("remove", dir.path())(error)))?;
        return Ok(Fate::Reclaimed);
    }
    let hold = match Hold::locked(ctx, id, dir, lock) {
        Ok(hold) => hold,
        Err(Cause::Journal(error)) if is_gone(&error) => return Ok(Fate::Gone),
        Err(cause) => return Err(failed(cause)),
    };
    let status = hold.status();
    let state = if doomed {
        State::Destroying
    } else {
        status.state
    };
    match state {
        State::Launching | State::Destroying => {
            let left = hold.remove_all(deadline);
            if left.is_empty() {
                return Ok(Fate::Reclaimed);
            }
            Err(failed(Cause::LeftOver).with_leftovers(left))
        }
        State::Paused => paused(&hold, &status).map_err(failed),
        State::Lost => Ok(Fate::Lost),
        State::Running => running(&hold, &status).map_err(failed),
        State::Pausing => pausing(&hold, &status).map_err(failed),
        State::Resuming => resuming(&hold, &status).map_err(failed),
    }
}

/// A paused sandbox keeps its slot; one that was in the page cache only when the machine went
/// down is lost, since nobody can tell whether all of its memory got to the disk.
fn paused(hold: &Hold, status: &Status) -> Result<Fate, Cause> {
    if !status.durable && !status.is_of_this_boot() {
        let left = hold.lose(RESTARTED_TOO_EARLY);
        return settled(&left, Fate::Lost);
    }
    // A VM that should be gone may be left, where its maker died while it ended it.
    settled(&release(hold, status), Fate::Paused)
}

fn settled(left: &[Remains], fate: Fate) -> Result<Fate, Cause> {
    for remains in left {
        log::warn!("Left over: {remains}");
    }
    if left.is_empty() {
        Ok(fate)
    } else {
        Err(Cause::LeftOver)
    }
}

fn running(hold: &Hold, status: &Status) -> Result<Fate, Cause> {
    let mut live = match Live::of(&hold.ctx, &hold.id, status) {
        Err(Cause::Ended) => {
            let left = hold.lose("its Cloud Hypervisor has ended");
            return settled(&left, Fate::Lost);
        }
        other => other?,
    };
    // What an attempt to freeze it left behind.
    if let Err(cause) = forget_snapshots(hold, status.generation.checked_sub(1)) {
        log::warn!("Sandbox {}: {cause}", hold.id);
    }
    let ask = Deadline::after(ASK_BUDGET);
    match live.state(ask) {
        Ok(VmState::Running) => {}
        Ok(VmState::Paused) => return wake(hold, status, live),
        Ok(_) | Err(_) if live.has_ended() => {
            let left = hold.lose("its Cloud Hypervisor has ended");
            return settled(&left, Fate::Lost);
        }
        Ok(_) | Err(_) => return Ok(Fate::Silent),
    }
    match live.agent.health(ask) {
        Ok(_) => Ok(Fate::Adopted),
        Err(_) if live.has_ended() => {
            let left = hold.lose("its Cloud Hypervisor has ended");
            settled(&left, Fate::Lost)
        }
        Err(error) => {
            log::warn!("Sandbox {}: {error}", hold.id);
            Ok(Fate::Silent)
        }
    }
}

/// A VM that stands still because its pause or snapshot was not finished goes on, with a new
/// life: its agent may have prepared itself for the snapshot.
fn wake(hold: &Hold, status: &Status, mut live: Live) -> Result<Fate, Cause> {
    let deadline = Deadline::after(ASK_BUDGET);
    if let Err(error) = live.api.resume(deadline)
        && !error.is_invalid_transition()
    {
        let what = "let the vCPUs run on";
        let source = error;
        return Err(Cause::Api { what, source });
    }
    renew(hold, status, live)
}

/// Gives the agent of a VM that runs a new life, and notes that it runs.
fn renew(hold: &Hold, status: &Status, mut live: Live) -> Result<Fate, Cause> {
    let deadline = Deadline::after(ASK_BUDGET);
    let mut init = Init::new();
    init.sandbox_id = Some(hold.id.to_string());
    let answered = live.agent.reborn(init.lifecycle).init(&init, deadline);
    let fate = match answered {
        Ok(_) => {
            live.vm.lifecycle = init.lifecycle;
            Fate::Adopted
        }
        Err(error) => {
            log::warn!("Sandbox {}: {error}", hold.id);
            Fate::Silent
        }
    };
    let mut running = status.now(State::Running);
    running.vm = Some(live.vm);
    hold.change(running)?;
    Ok(fate)
}

/// Whoever paused it died. Where its snapshot is in place, that counts; else it goes on.
fn pausing(hold: &Hold, status: &Status) -> Result<Fate, Cause> {
    let place = hold.dir.snapshot(status.generation);
    // A snapshot gets its name when it is complete. After a restart of the machine that may
    // not be so any more.
    let complete = status.is_of_this_boot()
        && place.exists()
        && SnapshotDir::open(&place, &hold.ctx.config.snapshot_limits).is_ok();
    if complete {
        let paused = status.paused(false);
        hold.change(paused.clone())?;
        return settled(&release(hold, &paused), Fate::Paused);
    }
    running(hold, status).and_then(|fate| match fate {
        // It runs though nobody let it run on: its pause had not come that far.
        Fate::Adopted => {
            let live = Live::of(&hold.ctx, &hold.id, status)?;
            renew(hold, status, live)
        }
        other => Ok(other),
    })
}

/// Whoever resumed it died. A VM that runs is adopted; else it is paused as before, where its
/// snapshot still goes with its disk. After a restart of the machine only the journal tells:
/// times and counters prove nothing about what got to the disk.
fn resuming(hold: &Hold, status: &Status) -> Result<Fate, Cause> {
    if !status.is_of_this_boot() && (status.consumed || !status.durable) {
        let why = if status.consumed {
            "the machine restarted after its memory had been used"
        } else {
            RESTARTED_TOO_EARLY
        };
        return settled(&hold.lose(why), Fate::Lost);
    }
    if status.consumed
        && let Some(found) = half_resumed(hold, status)
    {
        return Ok(found);
    }
    let left = put_back(hold, None, None, Ran::Perhaps);
    let fate = match hold.status().state {
        State::Lost => Fate::Lost,
        _ => {
            let status = hold.status();
            keep_slot(hold, &status)?;
            Fate::Paused
        }
    };
    settled(&left, fate)
}

/// A VM that was resumed while its maker died: adopted, where it runs and its agent answers.
fn half_resumed(hold: &Hold, status: &Status) -> Option<Fate> {
    let steps = hold.journal.story().steps;
    let process = steps.iter().find_map(|step| match step {
        Step::Process { pid, start_time } => Some((*pid, *start_time)),
        _ => None,
    })?;
    let vm_dir = steps.iter().find_map(|step| match step {
        Step::Directory { path } => Some(path.clone()),
        _ => None,
    })?;
    let mut status = status.clone();
    let deadline = Deadline::after(ASK_BUDGET);
    let mut api = Client::assuming(vm_dir.join("api.sock"), Version::V53);
    let ping = api.ping(deadline).ok()?;
    let (pid, start_time) = process;
    let mode = memory_mode_of(pid);
    status.vm = Some(RunningVm {
        process: ProcessIdentity { pid, start_time },
        vm_dir,
        // Whichever it was: asked of the process itself, which knows its mappings.
        memory_mode: mode.name().to_owned(),
        lifecycle: Init::new().lifecycle,
        lazy: mode == MemoryMode::OnDemand,
        vmm: ping.build_version,
        notes: vec!["It was adopted: whoever resumed it died".to_owned()],
    });
    let mut live = Live::of(&hold.ctx, &hold.id, &status).ok()?;
    if live.state(deadline).ok()? != VmState::Running {
        return None;
    }
    match renew(hold, &status, live) {
        Ok(fate) => Some(fate),
        Err(cause) => {
            log::warn!("Sandbox {}: {cause}", hold.id);
            None
        }
    }
}

/// How the memory of a process came back: it writes to the file that it inherited, maps it
/// privately, or has read it. The latter counts as lazily filled, which is only slower to
/// freeze again.
fn memory_mode_of(pid: u32) -> MemoryMode {
    let info = std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{FIRST_INHERITED}"));
    if is_writable(&info.unwrap_or_default()) {
        return MemoryMode::Shared;
    }
    let image = memory_of(pid)
        .ok()
        .and_then(|file| rustix::fs::fstat(file).ok());
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    match image {
        Some(image) if is_mapped(&maps, (image.st_dev, image.st_ino)) => MemoryMode::Map,
        _ => MemoryMode::OnDemand,
    }
}

/// Whether `/proc/PID/fdinfo/N` is of a descriptor that may be written to.
fn is_writable(info: &str) -> bool {
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = flags.and_then(|flags| u32::from_str_radix(flags.trim(), 8).ok());
    flags.is_some_and(|flags| flags & OFlags::RWMODE.bits() == OFlags::RDWR.bits())
}

/// Looks for a file in `/proc/PID/maps`
/// (`Documentation/filesystems/proc.rst`: address, permissions, offset, device, inode, path).
fn is_mapped(maps: &str, (device, inode): (u64, u64)) -> bool {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let device = format!("{major:02x}:{minor:02x}");
    let inode = inode.to_string();
    maps.lines().any(|line| {
        let mut fields = line.split_ascii_whitespace().skip(3);
        fields.next() == Some(&device) && fields.next() == Some(&inode)
    })
}

/// Removes slots that belong to nobody, and names the VMs that no journal speaks of: they
/// were restored by hand, or belong to another root.
fn sweep(ctx: &Arc<Context>, census: &mut Census, deadline: Deadline) -> Result<(), Error> {
    let failed = |cause| Error::of_host(Operation::Recover, cause);
    let runtime_dir = &ctx.config.runtime_dir;
    let kits = kit::sweep(runtime_dir, deadline)
        .map_err(|error| failed(file("list the VMs in", runtime_dir)(error)))?;
    let ended = kits.reclaimed.iter().map(|dir| dir.display());
    census.swept.extend(ended.map(|dir| format!("kit {dir}")));
    census
        .remains
        .extend(kits.stuck.into_iter().map(Remains::Step));
    sweep_stock(ctx, census, deadline)?;
    let found = orphan::list(runtime_dir);
    let mut known = known_vm_dirs(ctx);
    known.extend(kits.in_use);
    let strangers = found.iter().filter(|it| !known.contains(&it.vm_dir));
    census.foreign.extend(strangers.map(|it| {
        let (pid, dir) = (it.process.pid, it.vm_dir.display());
        format!("process {pid} of {dir}")
    }));
    let report = ctx
        .net
        .sweep(deadline)
        .map_err(|error| failed(Cause::Network(error)))?;
    let reclaimed = report.reclaimed.iter();
    census
        .swept
        .extend(reclaimed.map(|index| format!("network slot {index}")));
    census.foreign.extend(report.foreign);
    census
        .remains
        .extend(report.stuck.into_iter().map(Remains::Slot));
    Ok(())
}

/// Removes the disks that somebody kept ready who has died.
fn sweep_stock(ctx: &Context, census: &mut Census, deadline: Deadline) -> Result<(), Error> {
    let home = DiskStock::home_under(&ctx.config.root);
    let swept = DiskStock::sweep(&ctx.disks, &home, deadline).map_err(|error| {
        Error::of_host(
            Operation::Recover,
            file("list the prepared disks in", &home)(error),
        )
    })?;
    let gone = swept.reclaimed.iter();
    census
        .swept
        .extend(gone.map(|id| format!("prepared disk {id}")));
    let stuck = swept.stuck.into_iter().map(Box::new);
    census.remains.extend(stuck.map(Remains::Disk));
    Ok(())
}

/// The VM directories that journals speak of.
fn known_vm_dirs(ctx: &Context) -> BTreeSet<PathBuf> {
    let listing = dir::list(&ctx.config.root).unwrap_or_default();
    let mut known = BTreeSet::new();
    for id in &listing.ids {
        let dir = SandboxDir::of(&ctx.config.root, id);
        let Ok(story) = super::journal::Journal::story_of(&dir.journal()) else {
            continue;
        };
        known.extend(story.steps.iter().filter_map(|step| match step {
            Step::Directory { path } => Some(path.clone()),
            _ => None,
        }));
        known.extend(story.status.vm.map(|vm| vm.vm_dir));
    }
    known
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapping_is_known_by_its_file_whatever_that_is_called_now() {
        let maps = "\
7f00-7f10 r--p 00000000 fe:00 12 /usr/lib/x.so
7f20-7f90 rw-s 00000000 fe:00 4711 /root/snapshot.1/memory (deleted)
7fa0-7fb0 rw-p 00000000 00:00 0
";
        let device = rustix::fs::makedev(0xfe, 0);
        for (inode, mapped) in [(4711, true), (12, true), (5, false)] {
            assert_eq!(is_mapped(maps, (device, inode)), mapped, "{inode}");
        }
        assert!(!is_mapped(maps, (device + 1, 4711)));
    }

    #[test]
    fn a_descriptor_for_writing_is_told_from_one_for_reading() {
        for (info, writable) in [
            ("pos:\t0\nflags:\t0100002\nmnt_id:\t29\n", true),
            ("pos:\t0\nflags:\t0100000\nmnt_id:\t29\n", false),
            ("pos:\t0\n", false),
            ("flags:\tx\n", false),
        ] {
            assert_eq!(is_writable(info), writable, "{info:?}");
        }
    }
}
