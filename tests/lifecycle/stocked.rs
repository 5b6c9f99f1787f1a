//! A host that keeps disks ready.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rewake::fault::{Faults, Inject};
use rewake::host::{Host, HostConfig, LaunchOptions, ResumeOptions};
use rewake::ids::TemplateId;
use rewake::resource::disk::DiskStock;
use rustix::io::Errno;

use super::lab::{Lab, chain, disk_of, memory_of, read_disk, soon, write_disk};

/// A host that keeps so many disks ready, and leaves those who launch in peace for a while.
fn stocked(lab: &Lab, target: usize) -> HostConfig {
    let mut config = lab.config(&[]);
    config.disk_stock.target = target;
    config.disk_stock.refill_interval_ms = 100;
    config
}

fn settle(host: &Host) -> &DiskStock {
    let stock = host.disk_stock().unwrap();
    assert!(stock.wait_settled(soon()), "{:?}", stock.stats());
    stock
}

#[test]
fn root_launches_take_disks_that_were_ready_and_templates_go_all_the_same() {
    let test = "root_launches_take_disks_that_were_ready_and_templates_go_all_the_same";
    let Some(lab) = Lab::new(test) else { return };
    // The walls of the host's network stay.
    drop(lab.open());
    let before = lab.census();
    let host = Host::open(stocked(&lab, 2)).unwrap();
    let template = lab.template(&host);
    host.keep_ready(&template).unwrap();
    settle(&host);
    let launch = || {
        let sandbox = host.launch(&template, LaunchOptions::default());
        sandbox.unwrap_or_else(|error| panic!("{}", chain(&error)))
    };
    let (mut first, second) = (launch(), launch());
    assert_eq!(host.disk_stock().unwrap().stats().taken, 2);
    let disks = [disk_of(&first), disk_of(&second)];
    for (disk, sandbox) in disks.iter().zip([&first, &second]) {
        assert!(disk.starts_with(lab.sandbox(sandbox.id())), "{disk:?}");
        assert_eq!(read_disk(disk, 8192), 7, "as in the image");
    }
    write_disk(&disks[0], 512, 1);
    assert_eq!(read_disk(&disks[1], 512), 0, "another's disk");

    // Such a sandbox is one like any other.
    let memory = memory_of(&first);
    first.pause().unwrap();
    first = host.resume(first.id(), ResumeOptions::default()).unwrap();
    memory.goes_on_in(&memory_of(&first));
    assert_eq!(read_disk(&disk_of(&first), 512), 1);

    // Whoever looks after the host meanwhile leaves the others alone.
    settle(&host);
    let other = lab.open();
    let census = other.recover(soon()).unwrap();
    assert!(census.is_clean(), "{census:?}");
    assert_eq!((census.adopted.len(), census.swept.len()), (2, 0));
    assert_eq!(host.disk_stock().unwrap().stats().ready, 2);

    // A template made of it has a shelf of its own from its first launch on.
    let name = TemplateId::new("later").unwrap();
    let later = first.snapshot(name.as_str()).unwrap();
    let third = host.launch(&later, LaunchOptions::default()).unwrap();
    assert_eq!(read_disk(&disk_of(&third), 512), 1);
    settle(&host);
    let fourth = host.launch(&later, LaunchOptions::default()).unwrap();
    assert_eq!(read_disk(&disk_of(&fourth), 512), 1);
    let stats = host.disk_stock().unwrap().stats();
    assert_eq!((stats.images, stats.taken), (2, 3), "{stats:?}");

    // Sandboxes keep their template, disks that are nobody's yet do not.
    host.templates().remove(&name, soon()).unwrap_err();
    for sandbox in [first, second, third, fourth] {
        sandbox.destroy().unwrap();
    }
    settle(&host);
    for name in [&name, template.id()] {
        other.templates().remove(name, soon()).unwrap();
    }
    drop((host, other));
    assert_eq!(lab.census(), before);
}

#[test]
fn root_disks_of_a_host_that_died_are_swept() {
    let test = "root_disks_of_a_host_that_died_are_swept";
    let Some(lab) = Lab::new(test) else { return };
    // The walls of the host's network stay.
    drop(lab.open());
    let before = lab.census();
    let host = Host::open(stocked(&lab, 3)).unwrap();
    let template = lab.template(&host);
    host.keep_ready(&template).unwrap();
    settle(&host);
    let ready = DiskStock::ids(&lab.root.join("disks"));
    assert_eq!(ready.len(), 3);
    // What a program leaves that died: everything but its locks.
    let (kept, died) = (lab.root.join("disks"), lab.net.dir.join("kept"));
    let copied = std::process::Command::new("cp")
        .args(["-a".as_ref(), kept.as_os_str(), died.as_os_str()])
        .status();
    assert!(copied.unwrap().success());
    drop(host);
    assert!(DiskStock::ids(&kept).is_empty());
    std::fs::remove_dir(&kept).unwrap();
    std::fs::rename(&died, &kept).unwrap();
    let host = lab.open();
    assert!(DiskStock::ids(&kept).is_empty(), "swept when it was opened");
    host.templates().remove(template.id(), soon()).unwrap();
    drop(host);
    assert_eq!(lab.census(), before);
}

#[test]
fn root_a_stock_in_another_file_system_is_refused() {
    let test = "root_a_stock_in_another_file_system_is_refused";
    let Some(lab) = Lab::new(test) else { return };
    let kept = lab.root.join("disks");
    // A link is as good as a mount, and needs no cleaning up.
    let elsewhere =
        std::path::PathBuf::from(format!("/dev/shm/rewake-stock-{}", std::process::id()));
    std::fs::create_dir(&elsewhere).unwrap();
    std::os::unix::fs::symlink(&elsewhere, &kept).unwrap();
    let error = Host::open(stocked(&lab, 1)).unwrap_err();
    let said = chain(&error);
    let left = std::fs::read_dir(&elsewhere).unwrap().count();
    std::fs::remove_dir_all(&elsewhere).unwrap();
    assert!(said.contains(kept.to_str().unwrap()), "{said}");
    assert_eq!(left, 0);
}

/// Fails the step that a countdown has come to, before or after it was done.
struct Countdown {
    left: AtomicUsize,
    late: bool,
}

impl Countdown {
    fn judge(&self, is_late: bool) -> Result<(), Errno> {
        if is_late != self.late || self.left.load(Ordering::SeqCst) == usize::MAX {
            return Ok(());
        }
        match self.left.fetch_sub(1, Ordering::SeqCst) {
            // From here on nothing fails.
            0 => Err(Errno::IO),
            _ => Ok(()),
        }
    }
}

impl Inject for Countdown {
    fn before(&self, _: &str) -> Result<(), Errno> {
        self.judge(false)
    }

    fn after(&self, _: &str) -> Result<(), Errno> {
        self.judge(true)
    }
}

#[test]
fn root_a_launch_with_a_ready_disk_that_fails_anywhere_leaves_nothing() {
    let test = "root_a_launch_with_a_ready_disk_that_fails_anywhere_leaves_nothing";
    let Some(lab) = Lab::new(test) else { return };
    let sound = lab.open();
    let template = lab.template(&sound);
    let before = lab.census();
    for late in [false, true] {
        let countdown = Arc::new(Countdown {
            left: AtomicUsize::new(usize::MAX),
            late,
        });
        let injector: Arc<dyn Inject> = countdown.clone();
        let mut config = stocked(&lab, 2);
        config.faults = Faults::inject(injector);
        let host = Host::open(config).unwrap();
        host.keep_ready(&template).unwrap();
        let mut failures = 0;
        for target in 0.. {
            let stats = settle(&host).stats();
            countdown.left.store(target, Ordering::SeqCst);
            let launched = host.launch(&template, LaunchOptions::default());
            let struck = countdown.left.swap(usize::MAX, Ordering::SeqCst) == usize::MAX;
            let case = format!("late: {late}, {target}");
            match launched {
                Ok(sandbox) => {
                    memory_of(&sandbox);
                    let now = host.disk_stock().unwrap().stats();
                    let took = now.taken - stats.taken;
                    // One that could not be looked at is not handed out.
                    assert!(took == 1 || struck, "{case}: {now:?}");
                    sound.destroy(sandbox.id(), soon()).unwrap();
                }
                Err(error) => {
                    failures += 1;
                    let case = format!("{case}: {}", chain(&error));
                    assert!(error.leftovers.is_empty(), "{case}");
                    assert!(sound.ids().unwrap().is_empty(), "{case}");
                }
            }
            if !struck {
                break;
            }
            assert!(target < 300, "there is no end");
        }
        assert!(failures > 20, "only {failures} steps");
        drop(host);
        assert_eq!(lab.census(), before, "late: {late}");
    }
}
