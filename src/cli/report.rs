//! Tables for people, JSON for programs, errors for both.

use std::error::Error;
use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use rewake::host::{self, Cause};
use rewake::restore::RestoreError;
use rewake::template::BuildError;
use rewake::timeline::Timeline;
use rewake::trace::Trace;

use super::{Failure, Global, failure};

/// Prints a failure once, with all its causes, what is left over, and what to do.
pub(super) fn error(error: &(dyn Error + 'static), global: Global) {
    if global.json {
        println!("{}", serde_json::json!({ "error": error_document(error) }));
        return;
    }
    let told = Told::of(error);
    let mut text = words(error);
    if let Some(leftovers) = &told.leftovers {
        let left = if leftovers.is_empty() {
            "nothing".to_owned()
        } else {
            leftovers.join(", ")
        };
        // Writing into a String cannot fail.
        let _ = write!(text, "; left over: {left}");
    }
    for line in told.log {
        let _ = write!(text, "\n  cloud-hypervisor: {line}");
    }
    if let Some(hint) = failure::hint(error) {
        let _ = write!(text, "\n  hint: {hint}");
    }
    eprintln!("rewake: {text}");
}

/// A failure for programs.
pub(super) fn error_document(error: &(dyn Error + 'static)) -> serde_json::Value {
    let chain = chain(error);
    let told = Told::of(error);
    serde_json::json!({
        "message": chain.join(": "),
        "kind": failure::Kind::of(error).word(),
        "hint": failure::hint(error),
        "chain": chain,
        "leftovers": told.leftovers.unwrap_or_default(),
        "stage": told.stage,
        "log": told.log,
        "timeline": told.timeline.map(Timeline::to_json),
    })
}

/// An error and its causes, outermost first. A cause that its error shows as its own words
/// is not repeated.
pub(super) fn chain(error: &dyn Error) -> Vec<String> {
    let mut chain = vec![error.to_string()];
    let mut next = error.source();
    while let Some(cause) = next {
        let text = cause.to_string();
        if chain.last() != Some(&text) {
            chain.push(text);
        }
        next = cause.source();
    }
    chain
}

/// The same on one line.
pub(super) fn words(error: &dyn Error) -> String {
    chain(error).join(": ")
}

/// What errors of the library tell beside their causes.
#[derive(Default)]
struct Told<'e> {
    /// What could not be undone; `None` where nothing was to be.
    leftovers: Option<Vec<String>>,
    stage: Option<&'static str>,
    log: &'e [String],
    timeline: Option<&'e Timeline>,
}

impl<'e> Told<'e> {
    fn of(error: &'e (dyn Error + 'static)) -> Self {
        if let Some(error) = error.downcast_ref::<RestoreError>() {
            return Self {
                leftovers: Some(texts(&error.leftovers)),
                stage: Some(error.stage.name()),
                log: &error.log,
                timeline: Some(&error.timeline),
            };
        }
        if let Some(error) = error.downcast_ref::<BuildError>() {
            return Self {
                leftovers: Some(texts(&error.leftovers)),
                stage: Some(error.stage.name()),
                log: &error.log,
                timeline: None,
            };
        }
        let Some(error) = error.downcast_ref::<host::Error>() else {
            return Self::default();
        };
        let told = Self {
            leftovers: Some(texts(&error.leftovers)),
            ..Self::default()
        };
        match &*error.cause {
            Cause::Restore { stage, log, .. } => Self {
                stage: Some(stage.name()),
                log,
                ..told
            },
            // Nothing was begun, so nothing was to be undone.
            _ if error.leftovers.is_empty() => Self::default(),
            _ => told,
        }
    }
}

fn texts(things: &[impl ToString]) -> Vec<String> {
    things.iter().map(ToString::to_string).collect()
}

/// Prints one JSON document on standard output.
pub(super) fn json(document: &serde_json::Value) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, document).map_err(io::Error::from)?;
    writeln!(out)?;
    Ok(())
}

/// A file could not be written.
#[derive(Debug, thiserror::Error)]
#[error("Cannot write {}", path.display())]
pub(super) struct WriteError {
    pub(super) path: PathBuf,
    pub(super) source: io::Error,
}

/// Writes a trace to a file.
pub(super) fn trace(path: &Path, trace: Trace) -> Result<(), WriteError> {
    std::fs::write(path, trace.into_json().to_string()).map_err(|source| WriteError {
        path: path.to_owned(),
        source,
    })
}

/// Prints rows under a header, each column as wide as its widest cell.
pub(super) fn table(header: &[&str], rows: &[Vec<String>]) -> Result<(), Failure> {
    let mut widths: Vec<usize> = header.iter().map(|cell| cell.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut out = io::stdout().lock();
    let header: Vec<String> = header.iter().map(ToString::to_string).collect();
    for row in std::iter::once(&header).chain(rows) {
        let mut line = String::new();
        for (width, cell) in widths.iter().zip(row) {
            // Writing into a String cannot fail.
            let _ = write!(line, "{cell:<width$}  ");
        }
        writeln!(out, "{}", line.trim_end())?;
    }
    Ok(())
}
