//! A place in which `rewake bench` runs, and what its runs say.

#![allow(dead_code, reason = "every test takes what it needs")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::Value;

pub(crate) const REWAKE: &str = env!("CARGO_BIN_EXE_rewake");
pub(crate) const STAND_IN: &str = env!("CARGO_BIN_EXE_rewake-sim");

/// A directory in which everything of a run lies, and which must be empty after it.
pub(crate) struct Scratch {
    pub(crate) dir: PathBuf,
    pub(crate) temporary: PathBuf,
}

impl Scratch {
    /// `None`, said aloud, where a run cannot make its network.
    pub(crate) fn new(test: &str) -> Option<Self> {
        Self::within(&std::env::temp_dir(), test)
    }

    /// The same on a file system in memory.
    pub(crate) fn in_memory(test: &str) -> Option<Self> {
        // `linux/magic.h`, TMPFS_MAGIC.
        let shared = Path::new("/dev/shm");
        if !rustix::fs::statfs(shared).is_ok_and(|it| it.f_type == 0x0102_1994) {
            eprintln!("SKIP {test}: /dev/shm is not in memory");
            return None;
        }
        Self::within(shared, test)
    }

    fn within(parent: &Path, test: &str) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("SKIP {test}: not root");
            return None;
        }
        if let Err(error) = rewake_sys::netns::run_in_new(drop) {
            eprintln!("SKIP {test}: no network namespaces: {error}");
            return None;
        }
        for program in ["ip", "iptables", "unshare", "bash"] {
            if rewake::doctor::find_program(program).is_none() {
                eprintln!("SKIP {test}: no {program}");
                return None;
            }
        }
        // Sockets have short paths only.
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = parent.join(format!("rwb-{}-{count}", std::process::id()));
        let temporary = dir.join("t");
        fs::create_dir_all(&temporary).unwrap();
        Some(Self { dir, temporary })
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(REWAKE);
        command
            .arg("bench")
            .args(arguments)
            .env("TMPDIR", &self.temporary);
        command
    }

    pub(crate) fn bench(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// A run that must come to its end; its samples.
    pub(crate) fn samples(&self, name: &str, arguments: &[&str]) -> Vec<Value> {
        let out = self.path(name);
        let file = out.to_str().unwrap();
        let output = self.bench(&[&["--stand-in", "--out", file], arguments].concat());
        assert!(output.status.success(), "{}", words(&output));
        self.assert_nothing_left();
        lines(&out)
    }

    /// A program that plays the stand-in after doing something first.
    pub(crate) fn wrapper(&self, name: &str, first: &str) -> String {
        let path = self.path(name);
        fs::write(
            &path,
            format!("#!/bin/sh\n{first}\nexec {STAND_IN} $more \"$@\"\n"),
        )
        .unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path.to_str().unwrap().to_owned()
    }

    pub(crate) fn assert_nothing_left(&self) {
        let left: Vec<_> = fs::read_dir(&self.temporary).unwrap().flatten().collect();
        assert!(left.is_empty(), "{left:?}");
        assert!(rewake::vmm::orphan::list(&self.temporary).is_empty());
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let ours = self.temporary.to_str().unwrap();
        assert!(!mounts.contains(ours), "a mount is left");
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

pub(crate) fn words(output: &Output) -> String {
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    format!("{}{}", text(&output.stdout), text(&output.stderr))
}

pub(crate) fn lines(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}
