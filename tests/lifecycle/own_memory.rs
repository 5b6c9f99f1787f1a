//! Launches into memory of their own, whose blocks are the template's until they are written
//! to: on file systems that share blocks, and where they cannot or there is no room.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use rewake::fault::{Faults, Inject};
use rewake::host::{Host, LaunchOptions, ResumeOptions, Sandbox};
use rewake::plan::MemoryMode;
use rewake::template::Template;
use rewake::timeline::Phase;
use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::lab::{Lab, chain, memory_of};
use super::real::{self, Ledger};
use crate::netlab::skip;

/// XFS refuses to be smaller.
const BYTES: u64 = 512 << 20;

/// A file system of its own under a lab's root, unmounted when dropped.
struct Ground {
    root: PathBuf,
    image: PathBuf,
}

impl Ground {
    fn new(test: &str, lab: &Lab, kind: &str) -> Option<Self> {
        let ground = Self {
            root: lab.root.clone(),
            image: lab.net.dir.join("ground.img"),
        };
        File::create(&ground.image).unwrap().set_len(BYTES).unwrap();
        let (image, root) = (ground.image.as_os_str(), ground.root.as_os_str());
        let attempt = |program: &str, arguments: &[&std::ffi::OsStr]| {
            let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
            let output = Command::new(program)
                .args(arguments)
                .env("PATH", path)
                .output();
            let output = output.map_err(|error| format!("{program}: {error}"))?;
            let errors = String::from_utf8_lossy(&output.stderr);
            let done = output.status.success();
            done.then_some(()).ok_or(format!("{program}: {errors}"))
        };
        let made = attempt(&format!("mkfs.{kind}"), &["-q".as_ref(), image]).and_then(|()| {
            let words = ["-t", kind, "-o", "loop"].map(str::as_ref);
            attempt("mount", &[&words[..], &[image, root]].concat())
        });
        if let Err(reason) = made {
            skip(test, reason);
            let _ = fs::remove_file(&ground.image);
            std::mem::forget(ground);
            return None;
        }
        Some(ground)
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        // Lazily: a test that failed half-way may still have files open.
        let _ = Command::new("umount").arg("-l").arg(&self.root).status();
        let _ = fs::remove_file(&self.image);
    }
}

fn wish(mode: Option<MemoryMode>) -> LaunchOptions {
    LaunchOptions {
        memory_mode: mode,
        own_memory: true,
        ..LaunchOptions::default()
    }
}

fn inode(path: &Path) -> u64 {
    path.metadata().unwrap().ino()
}

fn mode_of(sandbox: &Sandbox) -> String {
    sandbox.story().unwrap().status.vm.unwrap().memory_mode
}

/// Launches, pauses and resumes; the guest is looked at by the caller after each.
fn lives(lab: &Lab, host: &Host, template: &Template, mut look: impl FnMut(&Sandbox)) {
    let before = lab.census();
    let image = template.memory_image();
    let (ram, times) = (fs::read(&image).unwrap(), image.metadata().unwrap().mtime());
    let name = image.file_name().unwrap();
    for mode in [None, Some(MemoryMode::Shared)] {
        let mut sandbox = host
            .launch(template, wish(mode))
            .unwrap_or_else(|error| panic!("{mode:?}: {}", chain(&error)));
        assert_eq!(mode_of(&sandbox), "shared", "{mode:?}");
        assert!(sandbox.timeline().at(Phase::MemoryOwned).is_some());
        look(&sandbox);
        let dir = lab.sandbox(sandbox.id());
        let own = inode(&dir.join("snapshot.0").join(name));
        assert_ne!(own, inode(&image));
        // What runs is no longer the template's: both can be removed in any order.
        assert_eq!(host.templates().users(template.id()).unwrap().vms, 0);

        sandbox
            .pause()
            .unwrap_or_else(|error| panic!("{mode:?}: {}", chain(&error)));
        assert!(!dir.join("snapshot.0").exists());
        let files: Vec<_> = fs::read_dir(dir.join("snapshot.1"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert!(
            !files.contains(&"memory-ranges".into()),
            "memory was written"
        );
        assert_eq!(inode(&dir.join("snapshot.1/memory")), own);

        let sandbox = host
            .resume(sandbox.id(), ResumeOptions::default())
            .unwrap_or_else(|error| panic!("{mode:?}: {}", chain(&error)));
        assert_eq!(mode_of(&sandbox), "shared", "{mode:?}");
        look(&sandbox);
        assert!(fs::read(&image).unwrap() == ram, "the template was written");
        assert_eq!(image.metadata().unwrap().mtime(), times);
        sandbox.destroy().unwrap();
        assert_eq!(lab.census(), before);
    }
    // Nobody who does not ask for it gets it.
    let sandbox = host.launch(template, LaunchOptions::default()).unwrap();
    assert_eq!(mode_of(&sandbox), "map");
    sandbox.destroy().unwrap();
}

fn lives_in_the_stand_in(test: &str, kind: &str) {
    let Some(lab) = Lab::new(test) else { return };
    let Some(_ground) = Ground::new(test, &lab, kind) else {
        return;
    };
    let host = lab.open();
    let template = lab.template(&host);
    let mut last = None;
    lives(&lab, &host, &template, |sandbox| {
        let now = memory_of(sandbox);
        if let Some((id, before)) = last.take()
            && id == *sandbox.id()
        {
            super::lab::Memory::goes_on_in(&before, &now);
        }
        last = Some((sandbox.id().clone(), now));
    });
}

#[test]
fn root_a_launch_on_xfs_owns_its_memory_and_leaves_the_template_alone() {
    let test = "root_a_launch_on_xfs_owns_its_memory_and_leaves_the_template_alone";
    lives_in_the_stand_in(test, "xfs");
}

#[test]
fn root_a_launch_on_btrfs_owns_its_memory_and_leaves_the_template_alone() {
    let test = "root_a_launch_on_btrfs_owns_its_memory_and_leaves_the_template_alone";
    lives_in_the_stand_in(test, "btrfs");
}

fn lives_for_real(test: &str, kind: &str) {
    let Some(lab) = Lab::new(test) else { return };
    let Some(vmm) = real::real(&lab, test) else {
        return;
    };
    let Some(_ground) = Ground::new(test, &lab, kind) else {
        return;
    };
    let host = Host::open(real::config(&lab, &vmm)).unwrap();
    let template = real::template(&lab, &host);
    let mut last = None;
    let mut round = 0;
    lives(&lab, &host, &template, |sandbox| {
        let mut ledger = match last.take() {
            Some((id, ledger)) if id == *sandbox.id() => ledger,
            _ => Ledger::open(sandbox),
        };
        ledger.check(sandbox, &format!("{kind}, {round}"));
        ledger.write(sandbox, round);
        round += 1;
        last = Some((sandbox.id().clone(), ledger));
    });
}

#[test]
fn root_kvm_a_guest_on_xfs_owns_its_memory_from_its_launch_on() {
    let test = "root_kvm_a_guest_on_xfs_owns_its_memory_from_its_launch_on";
    lives_for_real(test, "xfs");
}

#[test]
fn root_kvm_a_guest_on_btrfs_owns_its_memory_from_its_launch_on() {
    let test = "root_kvm_a_guest_on_btrfs_owns_its_memory_from_its_launch_on";
    lives_for_real(test, "btrfs");
}

/// Launches where memory of one's own cannot be had: who only wishes for it maps the
/// template's, and is told why; who insists gets an error that says so.
fn is_refused(lab: &Lab, host: &Host, template: &Template, reason: &str) {
    let before = lab.census();
    let image = template.memory_image();
    let ram = fs::read(&image).unwrap();
    let sandbox = host
        .launch(template, wish(None))
        .unwrap_or_else(|error| panic!("{}", chain(&error)));
    assert_eq!(mode_of(&sandbox), "map");
    let notes = sandbox.timeline().notes().to_vec();
    let expected = format!("Memory mode shared cannot be used: {reason}");
    assert!(
        notes.iter().any(|note| note.starts_with(&expected)),
        "{notes:?}"
    );
    assert!(!lab.sandbox(sandbox.id()).join("snapshot.0").exists());
    memory_of(&sandbox);
    sandbox.destroy().unwrap();

    let error = host
        .launch(template, wish(Some(MemoryMode::Shared)))
        .unwrap_err();
    assert!(error.leftovers.is_empty(), "{error:?}");
    let said = chain(&error);
    assert!(
        said.contains(reason) || error.is_busy(),
        "{said}, not {reason}"
    );
    assert_eq!(lab.census(), before, "{said}");
    assert!(fs::read(&image).unwrap() == ram, "the template was written");
}

#[test]
fn root_where_blocks_cannot_be_shared_a_launch_maps_the_template_and_says_why() {
    let test = "root_where_blocks_cannot_be_shared_a_launch_maps_the_template_and_says_why";
    let Some(lab) = Lab::new(test) else { return };
    let Some(_ground) = Ground::new(test, &lab, "ext4") else {
        return;
    };
    let host = lab.open();
    let template = lab.template(&host);
    let reason = "The blocks of memory cannot be shared (FICLONE: EOPNOTSUPP)";
    is_refused(&lab, &host, &template, reason);
}

#[test]
fn root_where_there_is_no_room_a_launch_maps_the_template_and_says_why() {
    let test = "root_where_there_is_no_room_a_launch_maps_the_template_and_says_why";
    let Some(lab) = Lab::new(test) else { return };
    let Some(_ground) = Ground::new(test, &lab, "xfs") else {
        return;
    };
    let host = lab.open();
    let template = lab.template(&host);
    let free = rustix::fs::statvfs(&lab.root).unwrap();
    let free = free.f_bavail * free.f_frsize;
    // Less than the guest's RAM is left, and more than everything else needs.
    let filler = File::create(lab.root.join("filler")).unwrap();
    let most = free - (super::lab::MEMORY.0 / 2);
    rustix::fs::fallocate(&filler, FallocateFlags::empty(), 0, most).unwrap();
    is_refused(&lab, &host, &template, "There is room for ");
}

/// Fails one step, before or after it was done.
struct Fail {
    step: &'static str,
    nth: usize,
    after: bool,
    seen: std::sync::atomic::AtomicUsize,
}

impl Fail {
    fn judge(&self, step: &str) -> Result<(), Errno> {
        use std::sync::atomic::Ordering;
        if step == self.step && self.seen.fetch_add(1, Ordering::SeqCst) == self.nth {
            return Err(Errno::NOSPC);
        }
        Ok(())
    }
}

impl Inject for Fail {
    fn before(&self, step: &str) -> Result<(), Errno> {
        if self.after { Ok(()) } else { self.judge(step) }
    }

    fn after(&self, step: &str) -> Result<(), Errno> {
        if self.after { self.judge(step) } else { Ok(()) }
    }
}

#[test]
fn root_memory_of_its_own_that_cannot_be_made_leaves_nothing() {
    let test = "root_memory_of_its_own_that_cannot_be_made_leaves_nothing";
    let Some(lab) = Lab::new(test) else { return };
    let Some(_ground) = Ground::new(test, &lab, "xfs") else {
        return;
    };
    let sound = lab.open();
    let template = lab.template(&sound);
    let before = lab.census();
    let steps = [("snapshot.own", 0..6), ("snapshot.own-clone", 0..1)];
    for (step, nths) in steps {
        for (nth, after) in nths.flat_map(|nth| [(nth, false), (nth, true)]) {
            for mode in [None, Some(MemoryMode::Shared)] {
                let fail = Arc::new(Fail {
                    step,
                    nth,
                    after,
                    seen: 0.into(),
                });
                let injector: Arc<dyn Inject> = fail.clone();
                let host = lab.open_with(&[], Faults::inject(injector));
                let outcome = host.launch(&template, wish(mode));
                let case = format!("{step} {nth} {after} {mode:?}");
                match outcome {
                    // Blocks that cannot be shared are a reason for another mode.
                    Ok(sandbox) => {
                        assert_eq!(step, "snapshot.own-clone", "{case}");
                        assert_eq!((mode, mode_of(&sandbox).as_str()), (None, "map"), "{case}");
                        memory_of(&sandbox);
                        sandbox.destroy().unwrap();
                    }
                    Err(error) => {
                        assert!(error.leftovers.is_empty(), "{case}: {}", chain(&error));
                        let said = chain(&error);
                        let named = said.contains("No space") || said.contains("ENOSPC");
                        assert!(named, "{case}: {said}");
                    }
                }
                assert!(
                    fail.seen.load(std::sync::atomic::Ordering::SeqCst) > nth,
                    "{case}"
                );
                assert_eq!(lab.census(), before, "{case}");
            }
        }
    }
}
