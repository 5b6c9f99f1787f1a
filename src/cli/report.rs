//! Tables for people, JSON for programs, errors for both.

use std::error::Error;
use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use rewake::restore::RestoreError;
use rewake::trace::Trace;

use super::{Failure, Global};

/// Prints a failure once, with all its causes.
pub(super) fn error(error: &(dyn Error + 'static), global: Global) {
    let mut chain = Vec::new();
    let mut next = Some(error);
    while let Some(cause) = next {
        chain.push(cause.to_string());
        next = cause.source();
    }
    let restore = error.downcast_ref::<RestoreError>();
    let leftovers: Vec<String> = restore.map_or_else(Vec::new, |error| {
        error.leftovers.iter().map(ToString::to_string).collect()
    });
    if global.json {
        let document = serde_json::json!({"error": {
            "message": chain.join(": "),
            "chain": chain,
            "leftovers": leftovers,
            "stage": restore.map(|error| error.stage.name()),
            "log": restore.map(|error| &error.log),
            "timeline": restore.map(|error| error.timeline.to_json()),
        }});
        println!("{document}");
        return;
    }
    let mut text = chain.join(": ");
    if let Some(error) = restore {
        let left = if leftovers.is_empty() {
            "nothing".to_owned()
        } else {
            leftovers.join(", ")
        };
        // Writing into a String cannot fail.
        let _ = write!(text, "; left over: {left}");
        for line in &error.log {
            let _ = write!(text, "\n  cloud-hypervisor: {line}");
        }
    }
    eprintln!("rewake: {text}");
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
