//! What a run leaves: one JSON object a line, each with all that tells it from another run's.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, BufRead, Write};
use std::path::Path;
use std::process::Command;

use rewake::timeline::Phase;
use serde::{Deserialize, Serialize};

/// The word that every line of a run without the real thing carries.
pub(super) const STAND_IN: &str = "stand-in";

/// On what something was measured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Machine {
    pub(super) commit: String,
    pub(super) kernel: String,
    pub(super) cpu: String,
    pub(super) cores: usize,
    /// Cloud Hypervisor's version with the suffixes of its build; where the stand-in plays
    /// it, the word is in there and in [`Self::vmm_kind`].
    pub(super) vmm: String,
    pub(super) vmm_kind: String,
    /// `release`, or the word that says that times mean nothing.
    pub(super) build: String,
}

impl Machine {
    pub(super) fn here(vmm: &str) -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let cpu = read("/proc/cpuinfo");
        let model = cpu.lines().find_map(|line| line.strip_prefix("model name"));
        let model = model.unwrap_or("unknown").trim_matches(['\t', ' ', ':']);
        Self {
            commit: commit().unwrap_or_else(version),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            cpu: model.to_owned(),
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            vmm: vmm.to_owned(),
            vmm_kind: if vmm.contains(STAND_IN) {
                STAND_IN.to_owned()
            } else {
                "cloud-hypervisor".to_owned()
            },
            build: if cfg!(debug_assertions) {
                "debug"
            } else {
                "release"
            }
            .to_owned(),
        }
    }

    /// Of a measurement that does not say where it was made.
    pub(super) fn untold() -> Self {
        let unknown = || "unknown".to_owned();
        Self {
            commit: unknown(),
            kernel: unknown(),
            cpu: unknown(),
            cores: 0,
            vmm: unknown(),
            vmm_kind: "none".to_owned(),
            build: unknown(),
        }
    }

    pub(super) fn is_stand_in(&self) -> bool {
        self.vmm_kind == STAND_IN
    }

    /// One line for tables and plots.
    pub(super) fn line(&self) -> String {
        if self.vmm_kind == "none" {
            return "a baseline of criterion, which does not say where it was measured".to_owned();
        }
        let vmm = if self.is_stand_in() {
            format!("the stand-in, not Cloud Hypervisor ({})", self.vmm)
        } else {
            format!("Cloud Hypervisor {}", self.vmm)
        };
        format!(
            "{vmm}; rewake {} ({}); Linux {}; {} x {}",
            self.commit, self.build, self.kernel, self.cores, self.cpu
        )
    }
}

/// The newest commit that this program can be of, where it still lies in the tree that it
/// was built in: the last one before it was linked.
fn commit() -> Option<String> {
    let tree = Path::new(env!("CARGO_MANIFEST_DIR"));
    let program = std::env::current_exe().ok()?;
    if !program.starts_with(tree) {
        return None;
    }
    let linked = fs::metadata(program).ok()?.modified().ok()?;
    let linked = linked.duration_since(std::time::UNIX_EPOCH).ok()?.as_secs();
    let git = |words: &[&str]| {
        // Whatever is asked for, nothing is written: a run may be killed meanwhile.
        let mut git = Command::new("git");
        git.arg("--no-optional-locks").arg("-C").arg(tree);
        let output = git.args(words).output();
        let output = output.ok().filter(|output| output.status.success())?;
        Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let before = format!("--before=@{linked}");
    let commit = git(&["log", "-1", "--format=%h", &before])?;
    let changed = git(&["status", "--porcelain", "--untracked-files=no"])?;
    Some(if changed.is_empty() {
        commit
    } else {
        format!("{commit}+changes")
    })
}

/// What an installed program can tell: it is not in its tree any more.
fn version() -> String {
    concat!("v", env!("CARGO_PKG_VERSION"), ", commit unknown").to_owned()
}

/// What was varied.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) struct Variant {
    /// `launch`, `resume`, `pause`, `destroy`; in whole lives also `pause-first` and
    /// `resume-first`.
    pub(super) operation: String,
    /// Who does it: `rewake`, `floor`, `conventional`.
    pub(super) arm: String,
    /// Whether what can be prepared in advance was.
    pub(super) pools: bool,
    pub(super) memory_mode: String,
    pub(super) disk: String,
    pub(super) ram_mib: u64,
    pub(super) concurrency: usize,
    /// `warm` or `cold`: whether the snapshot's files were in the page cache.
    pub(super) page_cache: String,
    /// How long the snapshot had lain, in seconds; absent where nobody waited for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) age_s: Option<u64>,
    /// The template that was chosen; absent: the probe guest's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) template: Option<String>,
}

/// Operation, template, memory, guests at once, page cache, age.
pub(super) type Circumstances = (String, Option<String>, u64, usize, String, Option<u64>);

impl Variant {
    /// A name for tables, and for finding the same variant in another file.
    pub(super) fn name(&self) -> String {
        if self.arm.is_empty() {
            return self.operation.clone();
        }
        let (operation, series) = (&self.operation, self.series());
        format!("{operation} {series} {}{}", self.memory_mode, self.rest())
    }

    /// The last words of its name: under which circumstances. What was forgotten, as a zero, is
    /// left out.
    pub(super) fn rest(&self) -> String {
        let mut rest = String::new();
        if self.ram_mib > 0 {
            rest.push_str(&format!(" {} MiB", self.ram_mib));
        }
        if self.concurrency > 1 {
            rest.push_str(&format!(" x{}", self.concurrency));
        }
        if self.page_cache == "cold" {
            rest.push_str(" cold-cache");
        }
        if let Some(age) = self.age_s {
            rest.push_str(&format!(" after {age} s"));
        }
        if let Some(template) = &self.template {
            rest.push_str(&format!(" of {template}"));
        }
        rest
    }

    /// What is the same for everybody who is compared.
    pub(super) fn circumstances(&self) -> Circumstances {
        (
            self.operation.clone(),
            self.template.clone(),
            self.ram_mib,
            self.concurrency,
            self.page_cache.clone(),
            self.age_s,
        )
    }

    /// The arm, and for rewake whether its pools were used.
    pub(super) fn series(&self) -> &str {
        match (self.arm.as_str(), self.pools) {
            ("rewake", true) => "rewake-warm",
            ("rewake", false) => "rewake-cold",
            (other, _) => other,
        }
    }
}

/// One operation on one sandbox.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Sample {
    pub(super) iteration: usize,
    /// Milliseconds from the call until it was done; absent where it failed.
    pub(super) ms: Option<f64>,
    /// When each phase was reached, in milliseconds from the call.
    #[serde(default)]
    pub(super) phases: BTreeMap<String, f64>,
    /// Why it failed: a failure has no time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) error: Option<String>,
    /// Milliseconds that all of its batch took together, where several ran at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) batch_ms: Option<f64>,
}

/// A line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Line {
    #[serde(flatten)]
    pub(super) machine: Machine,
    #[serde(flatten)]
    pub(super) variant: Variant,
    #[serde(flatten)]
    pub(super) sample: Sample,
}

/// A file of lines cannot be read.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReadError {
    #[error("Cannot read {path}")]
    File { path: String, source: io::Error },
    #[error("{path}, line {number}: no sample")]
    Line {
        path: String,
        number: usize,
        source: serde_json::Error,
    },
    #[error("{path} holds no sample")]
    Empty { path: String },
}

pub(super) fn write(out: &mut impl Write, line: &Line) -> io::Result<()> {
    serde_json::to_writer(&mut *out, line)?;
    out.write_all(b"\n")
}

pub(super) fn read(path: &Path) -> Result<Vec<Line>, ReadError> {
    let name = path.display().to_string();
    let failed = |source| ReadError::File {
        path: name.clone(),
        source,
    };
    let file = fs::File::open(path).map_err(failed)?;
    let mut lines = Vec::new();
    for (index, text) in io::BufReader::new(file).lines().enumerate() {
        let text = text.map_err(failed)?;
        if text.trim().is_empty() {
            continue;
        }
        let line = serde_json::from_str(&text).map_err(|source| ReadError::Line {
            path: name.clone(),
            number: index + 1,
            source,
        })?;
        lines.push(line);
    }
    if lines.is_empty() {
        return Err(ReadError::Empty { path: name });
    }
    Ok(lines)
}

/// The samples of each variant, in the order in which variants first appear.
pub(super) fn by_variant(lines: &[Line]) -> Vec<(Variant, Vec<&Sample>)> {
    let mut groups: Vec<(Variant, Vec<&Sample>)> = Vec::new();
    for line in lines {
        match groups
            .iter_mut()
            .find(|(variant, _)| *variant == line.variant)
        {
            Some((_, samples)) => samples.push(&line.sample),
            None => groups.push((line.variant.clone(), vec![&line.sample])),
        }
    }
    groups
}

/// The times of those that did not fail.
pub(super) fn times(samples: &[&Sample]) -> Vec<f64> {
    samples.iter().filter_map(|sample| sample.ms).collect()
}

/// When a phase was reached, in those samples that reached it and did not fail later.
pub(super) fn reached(samples: &[&Sample], phase: Phase) -> Vec<f64> {
    let came = samples.iter().filter(|sample| sample.ms.is_some());
    came.filter_map(|sample| sample.phases.get(phase.name()).copied())
        .collect()
}

pub(super) fn failures(samples: &[&Sample]) -> usize {
    samples.iter().filter(|sample| sample.ms.is_none()).count()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in super::super) fn line(arm: &str, vmm: &str, iteration: usize, ms: Option<f64>) -> Line {
        Line {
            machine: Machine {
                commit: "abc".into(),
                kernel: "6.1".into(),
                cpu: "a <cpu>".into(),
                cores: 2,
                ..Machine::here(vmm)
            },
            variant: Variant {
                operation: "launch".into(),
                arm: arm.into(),
                pools: false,
                memory_mode: "map".into(),
                disk: "none".into(),
                ram_mib: 128,
                concurrency: 1,
                page_cache: "warm".into(),
                age_s: None,
                template: None,
            },
            sample: Sample {
                iteration,
                ms,
                phases: ms
                    .iter()
                    .flat_map(|ms| [("spawned".to_owned(), ms / 2.0), ("ready".to_owned(), *ms)])
                    .collect(),
                error: ms.is_none().then(|| "it broke".to_owned()),
                batch_ms: None,
            },
        }
    }

    #[test]
    fn lines_are_read_back_as_they_were_written() {
        let lines = [
            line("rewake", "v53.0", 0, Some(12.5)),
            line("rewake", "v53.0", 1, None),
        ];
        let path = std::env::temp_dir().join(format!("rewake-lines-{}", std::process::id()));
        let mut file = fs::File::create(&path).unwrap();
        for line in &lines {
            write(&mut file, line).unwrap();
        }
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(text.lines().count(), 2);
        assert_eq!(read(&path).unwrap(), lines);
        fs::write(&path, format!("{text}{{}}\n")).unwrap();
        let error = read(&path).unwrap_err().to_string();
        assert!(error.ends_with("line 3: no sample"), "{error}");
        fs::write(&path, "\n").unwrap();
        assert!(matches!(read(&path), Err(ReadError::Empty { .. })));
        fs::remove_file(&path).unwrap();
    }

    #[test]
    fn every_line_of_a_run_on_the_stand_in_says_so() {
        let line = line("rewake", "53.0-stand-in", 0, Some(1.0));
        let mut text = Vec::new();
        write(&mut text, &line).unwrap();
        let text = String::from_utf8(text).unwrap();
        assert!(text.contains(r#""vmm_kind":"stand-in""#), "{text}");
        assert!(line.machine.line().starts_with("the stand-in, not"));
    }

    #[test]
    fn a_failure_is_counted_and_has_no_time() {
        let lines = [
            line("floor", "v53.0", 0, Some(3.0)),
            line("rewake", "v53.0", 0, None),
            line("rewake", "v53.0", 1, Some(4.0)),
        ];
        let groups = by_variant(&lines);
        assert_eq!(groups.len(), 2);
        assert_eq!(groups[0].0.name(), "launch floor map 128 MiB");
        assert_eq!(times(&groups[1].1), [4.0]);
        assert_eq!(failures(&groups[1].1), 1);
    }
}
