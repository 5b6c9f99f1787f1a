//! A host that `rewake` is pointed at: root, runtime directory, network namespace.

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::{Command, Output};

use serde_json::Value;

use crate::netlab;

pub(crate) const REWAKE: &str = env!("CARGO_BIN_EXE_rewake");
pub(crate) const STAND_IN: &str = env!("CARGO_BIN_EXE_rewake-sim");

/// A host that shares nothing with any other test's.
pub(crate) struct Place {
    pub(crate) net: netlab::Lab,
    pub(crate) root: PathBuf,
}

impl Place {
    /// `None`, said aloud, where no namespaces can be made.
    pub(crate) fn new(test: &str) -> Option<Self> {
        let net = netlab::Lab::new(test)?;
        let root = net.dir.join("root");
        let mut config = net.config();
        config.runtime_dir = net.dir.join("run");
        let text = serde_json::to_vec(&config).unwrap();
        fs::write(net.dir.join("net.json"), text).unwrap();
        Some(Self { net, root })
    }

    /// The same with a template called `base`.
    pub(crate) fn with_template(test: &str) -> Option<Self> {
        let place = Self::new(test)?;
        let (kernel, image) = (place.file("kernel"), place.file("image.raw"));
        fs::write(&kernel, "the stand-in does not read it").unwrap();
        fs::write(&image, vec![7; 256 << 10]).unwrap();
        let build = format!(
            "template build base --kernel {kernel} --rootfs {image} --memory-mib 32 \
             --disk-mode copy --vmm {STAND_IN}"
        );
        let (code, built) = place.json(&build);
        assert_eq!(code, 0, "{built}");
        assert_eq!(built["name"], "base");
        Some(place)
    }

    pub(crate) fn file(&self, name: &str) -> String {
        self.net.dir.join(name).to_str().unwrap().to_owned()
    }

    /// `rewake` with these words, pointed at this host.
    pub(crate) fn command(&self, words: &str) -> Command {
        let mut command = Command::new(REWAKE);
        command.args(words.split_whitespace());
        command.arg("--root").arg(&self.root);
        command.arg("--runtime-dir").arg(self.net.dir.join("run"));
        command
            .arg("--net-config")
            .arg(self.net.dir.join("net.json"));
        let (pid, fd) = (std::process::id(), self.net.host.as_raw_fd());
        command.arg("--netns").arg(format!("/proc/{pid}/fd/{fd}"));
        command.env_remove("RUST_LOG");
        command
    }

    /// What it prints, and its exit code.
    pub(crate) fn run(&self, words: &str) -> Told {
        Told::of(&self.command(words).output().unwrap())
    }

    /// The same; it must succeed.
    pub(crate) fn succeed(&self, words: &str) -> String {
        let told = self.run(words);
        assert_eq!(told.code, 0, "{words}: {} {}", told.out, told.err);
        told.out
    }

    /// Exit code and document of `rewake --json`.
    pub(crate) fn json(&self, words: &str) -> (i32, Value) {
        let told = self.run(&format!("--json {words}"));
        let document = serde_json::from_str(&told.out);
        let document = document.unwrap_or_else(|error| panic!("{words}: {error}: {told:?}"));
        (told.code, document)
    }

    /// Launches from `base`; the document of the sandbox.
    pub(crate) fn launch(&self, words: &str) -> Value {
        let (code, launched) = self.json(&launch_words(words));
        assert_eq!(code, 0, "{launched}");
        launched
    }

    /// Everything that the commands could leave behind.
    pub(crate) fn census(&self) -> BTreeSet<String> {
        let run = self.net.dir.join("run");
        let prefix = self.net.config().prefix;
        let mut lines = netlab::census::Census::take(&self.net.host, &prefix, &run).0;
        for dir in ["root/sandboxes", "root/templates", "run/vm", "run/slots"] {
            let entries = fs::read_dir(self.net.dir.join(dir)).into_iter().flatten();
            for entry in entries.flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                if name != "next" {
                    lines.insert(format!("file {dir}/{name}"));
                }
            }
        }
        let found = rewake::vmm::orphan::list(&run);
        lines.extend(found.iter().map(|it| format!("process {}", it.process.pid)));
        lines
    }
}

/// `launch base` with the stand-in.
pub(crate) fn launch_words(words: &str) -> String {
    format!("launch base --vmm {STAND_IN} --disk-mode copy --memory-reserve 0 {words}")
}

/// `resume` with the stand-in.
pub(crate) fn resume_words(words: &str) -> String {
    format!("resume --vmm {STAND_IN} --memory-reserve 0 {words}")
}

/// What a command said.
#[derive(Debug)]
pub(crate) struct Told {
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Told {
    pub(crate) fn of(output: &Output) -> Self {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Self {
            code: output.status.code().unwrap_or(-1),
            out: text(&output.stdout),
            err: text(&output.stderr),
        }
    }
}

/// The cells of a table: columns are two spaces or more apart.
pub(crate) fn cells(line: &str) -> Vec<&str> {
    line.split("  ")
        .map(str::trim)
        .filter(|it| !it.is_empty())
        .collect()
}
