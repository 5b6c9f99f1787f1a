//! The journal of one sandbox: what it is, what exists because of it, what became of it.
//!
//! An append-only file of JSON lines under the sandbox's directory. Every undo step is written
//! before the thing exists; every change of state is a line. Whoever reads it to its end knows
//! what to adopt, what to undo and what to leave alone, whichever moment its writer died at.
//!
//! A line counts when its line end is there. `write(2)` puts a line into the page cache as a
//! whole, which survives the death of the process; what must survive the loss of power as well
//! is written with [`Journal::commit`]. After a loss of power the end of the file may be cut
//! or filled with zeros: reading stops at the first line that is not one.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::state::{State, Status};
use crate::fault::Faults;
use crate::ids::{SandboxId, TemplateId};
use crate::resource::ledger::{Step, StepLog};
use crate::units::Bytes;

/// A journal above this size was not written by us: a life takes about a dozen lines.
const MAX_BYTES: u64 = 16 << 20;
/// What this version writes and reads.
const FORMAT: u32 = 1;

/// Why a journal cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JournalError {
    /// A file operation failed.
    #[error("Cannot {what} {}", .path.display())]
    File {
        /// What was attempted.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It does not begin as ours do.
    #[error("{} is not a journal of this version", .path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
    },
    /// A state that may not follow on the last one: a programming error, or two writers.
    #[error("A sandbox that is {from} cannot become {to}")]
    Transition {
        /// The last state.
        from: State,
        /// The one that was to be written.
        to: State,
    },
}

/// What never changes about a sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Format of the journal.
    pub format: u32,
    /// Its id.
    pub id: SandboxId,
    /// What it was launched from.
    pub template: Option<TemplateId>,
    /// When.
    pub created: Timestamp,
    /// The guest's memory.
    pub memory: Bytes,
    /// Number of vCPUs.
    pub vcpus: u64,
    /// Whether it has a disk of its own.
    pub disk: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    Sandbox(Identity),
    Made(Step),
    Undone(Step),
    Status(Status),
}

/// What a journal says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Story {
    /// Whose journal it is.
    pub identity: Identity,
    /// The last status.
    pub status: Status,
    /// What may exist, oldest first.
    pub steps: Vec<Step>,
}

/// A journal in the hands of whoever holds the sandbox's lock.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    faults: Faults,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    file: File,
    story: Story,
    /// Bytes of whole lines. A line that could not be written to its end is cut off again.
    length: u64,
}

impl Journal {
    /// Begins a journal; there must be none. The first two lines are written as one.
    ///
    /// # Errors
    /// [`JournalError::File`]; no file is left then.
    pub fn create(path: &Path, identity: Identity, faults: Faults) -> Result<Self, JournalError> {
        let failed = |what| {
            move |source| JournalError::File {
                what,
                path: path.to_owned(),
                source,
            }
        };
        let open = || {
            OpenOptions::new()
                .append(true)
                .create_new(true)
                .mode(0o600)
                .open(path)
        };
        let file = faults
            .call("make the journal", open)
            .map_err(failed("make"))?;
        let status = Status::launching();
        let story = Story {
            identity,
            status,
            steps: Vec::new(),
        };
        let journal = Self {
            path: path.to_owned(),
            faults,
            inner: Mutex::new(Inner {
                file,
                story: story.clone(),
                length: 0,
            }),
        };
        let lines = [Line::Sandbox(story.identity), Line::Status(story.status)];
        if let Err(error) = journal.append(&lines, false) {
            // Nothing exists yet but the file.
            let _ = std::fs::remove_file(path);
            return Err(error);
        }
        Ok(journal)
    }

    /// Takes up a journal, and cuts off what was not written to its end.
    ///
    /// # Errors
    /// [`JournalError`].
    pub fn open(path: &Path, faults: Faults) -> Result<Self, JournalError> {
        let failed = |what| {
            move |source| JournalError::File {
                what,
                path: path.to_owned(),
                source,
            }
        };
        let (story, length) = read(path)?;
        let file = OpenOptions::new().append(true).open(path);
        let file = file.map_err(failed("open"))?;
        if file.metadata().map_err(failed("look at"))?.len() != length {
            file.set_len(length).map_err(failed("mend"))?;
        }
        Ok(Self {
            path: path.to_owned(),
            faults,
            inner: Mutex::new(Inner {
                file,
                story,
                length,
            }),
        })
    }

    /// What a journal says, without taking it up: for looking on.
    ///
    /// # Errors
    /// [`JournalError`].
    pub fn story_of(path: &Path) -> Result<Story, JournalError> {
        read(path).map(|(story, _)| story)
    }

    /// What it says so far.
    #[must_use]
    pub fn story(&self) -> Story {
        self.lock().story.clone()
    }

    /// Its last status.
    #[must_use]
    pub fn status(&self) -> Status {
        self.lock().story.status.clone()
    }

    /// Writes a new status down; it outlives the process.
    ///
    /// # Errors
    /// [`JournalError::Transition`], [`JournalError::File`]; the old status then stands.
    pub fn change(&self, status: Status) -> Result<(), JournalError> {
        self.change_to(status, false)
    }

    /// The same for a status that must outlive a loss of power as well. Blocks for the disk.
    ///
    /// # Errors
    /// As [`Journal::change`].
    pub fn commit(&self, status: Status) -> Result<(), JournalError> {
        self.change_to(status, true)
    }

    fn change_to(&self, status: Status, synced: bool) -> Result<(), JournalError> {
        let from = self.lock().story.status.state;
        let to = status.state;
        if from != to && !from.may_become(to) {
            return Err(JournalError::Transition { from, to });
        }
        self.append(&[Line::Status(status)], synced)
    }

    fn append(&self, lines: &[Line], synced: bool) -> Result<(), JournalError> {
        let failed = |source| JournalError::File {
            what: "write",
            path: self.path.clone(),
            source,
        };
        let mut text = Vec::with_capacity(512);
        for line in lines {
            serde_json::to_writer(&mut text, line).map_err(|error| failed(error.into()))?;
            text.push(b'\n');
        }
        let mut inner = self.lock();
        let written = self.faults.call("write the journal", || {
            inner.file.write_all(&text)?;
            if synced {
                inner.file.sync_data()?;
            }
            Ok(())
        });
        if let Err(error) = written {
            // Half a line must not stand before the next one, nor a line that was refused.
            let length = inner.length;
            let cut = inner.file.set_len(length);
            if let Err(error) = cut {
                log::warn!("{}: cannot mend: {error}", self.path.display());
            }
            return Err(failed(error));
        }
        inner.length += text.len() as u64;
        for line in lines {
            inner.story.hear(line);
        }
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        // The story is changed only after the line was written, in one go.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl StepLog for Journal {
    fn made(&self, step: &Step) -> io::Result<()> {
        self.append(&[Line::Made(step.clone())], false)
            .map_err(io::Error::other)
    }

    fn undone(&self, step: &Step) {
        if let Err(error) = self.append(&[Line::Undone(step.clone())], false) {
            log::debug!("{step} is gone, but stays on record: {error}");
        }
    }
}

impl Story {
    fn hear(&mut self, line: &Line) {
        match line {
            Line::Sandbox(_) => {}
            Line::Made(step) => self.steps.push(step.clone()),
            Line::Undone(step) => {
                if let Some(at) = self.steps.iter().rposition(|it| it == step) {
                    self.steps.remove(at);
                }
            }
            Line::Status(status) => self.status = status.clone(),
        }
    }
}

/// Reads all whole lines; the second result is how many bytes they take.
fn read(path: &Path) -> Result<(Story, u64), JournalError> {
    let failed = |source| JournalError::File {
        what: "read",
        path: path.to_owned(),
        source,
    };
    let foreign = || JournalError::Foreign {
        path: path.to_owned(),
    };
    let length = std::fs::metadata(path).map_err(failed)?.len();
    if length > MAX_BYTES {
        return Err(foreign());
    }
    let text = std::fs::read(path).map_err(failed)?;
    parse(&text).ok_or_else(foreign)
}

/// Whether nothing of a journal ever got to the disk: a loss of power soon after it was made
/// leaves its name, and no bytes or zeros under it.
pub(crate) fn is_blank(path: &Path) -> bool {
    let length = std::fs::metadata(path).map(|found| found.len());
    let zeros = |text: Vec<u8>| text.iter().all(|byte| *byte == 0);
    length.is_ok_and(|length| length <= MAX_BYTES) && std::fs::read(path).is_ok_and(zeros)
}

/// The story that the whole lines of a journal tell, and how many bytes they take. `None`
/// where the first line is not of a journal of this version.
#[must_use]
pub fn parse(text: &[u8]) -> Option<(Story, u64)> {
    let mut story = None::<Story>;
    let mut length = 0;
    for line in text.split_inclusive(|byte| *byte == b'\n') {
        if line.last() != Some(&b'\n') {
            break;
        }
        let Ok(line_said) = serde_json::from_slice::<Line>(line) else {
            break;
        };
        match (&mut story, line_said) {
            (None, Line::Sandbox(identity)) if identity.format == FORMAT => {
                story = Some(Story {
                    identity,
                    status: Status::launching(),
                    steps: Vec::new(),
                });
            }
            (None, _) => return None,
            (Some(story), said) => story.hear(&said),
        }
        length += line.len() as u64;
    }
    story.map(|story| (story, length))
}

impl Identity {
    /// The identity of a sandbox that is made now.
    #[must_use]
    pub fn new(id: SandboxId, template: Option<TemplateId>, memory: Bytes, vcpus: u64) -> Self {
        Self {
            format: FORMAT,
            id,
            template,
            created: Timestamp::now(),
            memory,
            vcpus,
            disk: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Scratch(PathBuf);
    impl Scratch {
        fn new(name: &str) -> Self {
            let name = format!("rewake-journal-{}-{name}", std::process::id());
            Self(std::env::temp_dir().join(name))
        }
    }
    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.0);
        }
    }

    fn identity() -> Identity {
        Identity::new(SandboxId::random(), None, Bytes::mib(128), 1)
    }

    fn directory(n: u32) -> Step {
        Step::Directory {
            path: format!("/run/rewake/vm/{n}").into(),
        }
    }

    #[test]
    fn a_journal_read_again_tells_the_same_story() {
        let scratch = Scratch::new("same");
        let journal = Journal::create(&scratch.0, identity(), Faults::NONE).unwrap();
        for n in 0..3 {
            journal.made(&directory(n)).unwrap();
        }
        journal.undone(&directory(1));
        let running = journal.status().now(State::Running);
        journal.commit(running).unwrap();
        let told = journal.story();
        drop(journal);
        assert_eq!(Journal::story_of(&scratch.0).unwrap(), told);
        assert_eq!(told.steps, [directory(0), directory(2)]);
        let again = Journal::open(&scratch.0, Faults::NONE).unwrap();
        assert_eq!(again.story(), told);
    }

    /// Whatever byte the writer got to, the reader sees a prefix of what was written.
    #[test]
    fn a_journal_cut_at_any_byte_tells_a_prefix_of_the_story() {
        let scratch = Scratch::new("cut");
        let journal = Journal::create(&scratch.0, identity(), Faults::NONE).unwrap();
        journal.made(&directory(1)).unwrap();
        journal
            .change(journal.status().now(State::Running))
            .unwrap();
        drop(journal);
        let whole = std::fs::read(&scratch.0).unwrap();
        let mut states = Vec::new();
        for cut in 0..=whole.len() {
            for tail in [&b""[..], &[0; 64], b"{\"status\":"] {
                let mut text = whole[..cut].to_vec();
                text.extend_from_slice(tail);
                match parse(&text) {
                    None => assert!(!whole[..cut].contains(&b'\n'), "{cut}"),
                    Some((story, length)) => {
                        assert!(length <= cut as u64);
                        assert_eq!(whole[usize::try_from(length).unwrap() - 1], b'\n');
                        states.push(story.status.state);
                    }
                }
            }
        }
        assert!(states.is_sorted_by_key(|state| *state == State::Running));
        assert_eq!(states.last(), Some(&State::Running));
    }

    #[test]
    fn a_journal_that_never_got_to_the_disk_is_told_from_one_that_is_damaged() {
        let scratch = Scratch::new("blank");
        assert!(!is_blank(&scratch.0), "it is not there");
        for (text, blank) in [(&b""[..], true), (&[0; 700], true), (b"\0\0{", false)] {
            std::fs::write(&scratch.0, text).unwrap();
            assert_eq!(is_blank(&scratch.0), blank, "{text:?}");
        }
    }

    #[test]
    fn a_torn_end_is_cut_off_before_the_next_line() {
        let scratch = Scratch::new("torn");
        let journal = Journal::create(&scratch.0, identity(), Faults::NONE).unwrap();
        journal.made(&directory(1)).unwrap();
        drop(journal);
        let mut text = std::fs::read(&scratch.0).unwrap();
        text.extend_from_slice(b"{\"made\":{\"step\":\"direc");
        std::fs::write(&scratch.0, &text).unwrap();
        let journal = Journal::open(&scratch.0, Faults::NONE).unwrap();
        journal.made(&directory(2)).unwrap();
        let told = Journal::story_of(&scratch.0).unwrap();
        assert_eq!(told.steps, [directory(1), directory(2)]);
    }

    #[test]
    fn what_may_not_follow_is_refused_and_changes_nothing() {
        let scratch = Scratch::new("order");
        let journal = Journal::create(&scratch.0, identity(), Faults::NONE).unwrap();
        let error = journal
            .change(journal.status().now(State::Paused))
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "A sandbox that is launching cannot become paused"
        );
        assert_eq!(
            Journal::story_of(&scratch.0).unwrap().status.state,
            State::Launching
        );
    }

    #[test]
    fn what_is_no_journal_of_this_version_is_refused() {
        let mut later = serde_json::to_value(Line::Sandbox(identity())).unwrap();
        later["sandbox"]["format"] = 2.into();
        for (name, text) in [
            ("empty", String::new()),
            ("garbage", "garbage\n".to_owned()),
            ("no beginning", "{\"undone\":{}}\n".to_owned()),
            ("later version", format!("{later}\n")),
        ] {
            assert!(parse(text.as_bytes()).is_none(), "{name}");
        }
    }

    #[test]
    fn a_line_that_cannot_be_written_leaves_the_last_ones_standing() {
        use crate::fault::Inject;
        use rustix::io::Errno;
        use std::sync::Arc;
        struct Refuse(bool);
        impl Inject for Refuse {
            fn before(&self, step: &str) -> Result<(), Errno> {
                if self.0 && step == "write the journal" {
                    return Err(Errno::NOSPC);
                }
                Ok(())
            }
            fn after(&self, step: &str) -> Result<(), Errno> {
                if !self.0 && step == "write the journal" {
                    return Err(Errno::IO);
                }
                Ok(())
            }
        }
        let scratch = Scratch::new("full");
        let journal = Journal::create(&scratch.0, identity(), Faults::NONE).unwrap();
        journal.made(&directory(1)).unwrap();
        let told = journal.story();
        drop(journal);
        for before in [true, false] {
            let faults = Faults::inject(Arc::new(Refuse(before)));
            let journal = Journal::open(&scratch.0, faults).unwrap();
            journal.made(&directory(2)).unwrap_err();
            assert_eq!(journal.story(), told);
            drop(journal);
            assert_eq!(Journal::story_of(&scratch.0).unwrap(), told);
        }
    }
}
