//! Tables for people, JSON for programs, errors for both.

use std::error::Error;
use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use rewake::restore::RestoreError;
use rewake::template::BuildError;
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
    let details = Details::of(error);
    if global.json {
        let document = serde_json::json!({"error": {
            "message": chain.join(": "),
            "chain": chain,
            "leftovers": details.leftovers.unwrap_or_default(),
            "stage": details.stage,
            "log": details.log,
            "timeline": details.timeline,
        }});
        println!("{document}");
        return;
    }
    let mut text = chain.join(": ");
    if let Some(leftovers) = details.leftovers {
        let left = if leftovers.is_empty() {
            "nothing".to_owned()
        } else {
            leftovers.join(", ")
        };
        // Writing into a String cannot fail.
        let _ = write!(text, "; left over: {left}");
    }
    for line in details.log.into_iter().flatten() {
        let _ = write!(text, "\n  cloud-hypervisor: {line}");
    }
    eprintln!("rewake: {text}");
}

/// What some errors know beside their causes.
#[derive(Default)]
struct Details {
    leftovers: Option<Vec<String>>,
    stage: Option<&'static str>,
    log: Option<Vec<String>>,
    timeline: Option<serde_json::Value>,
}

impl Details {
    fn of(error: &(dyn Error + 'static)) -> Self {
        fn told<T: ToString>(leftovers: &[T]) -> Option<Vec<String>> {
            Some(leftovers.iter().map(ToString::to_string).collect())
        }
        if let Some(error) = error.downcast_ref::<RestoreError>() {
            return Self {
                leftovers: told(&error.leftovers),
                stage: Some(error.stage.name()),
                log: Some(error.log.clone()),
                timeline: Some(error.timeline.to_json()),
            };
        }
        if let Some(error) = error.downcast_ref::<BuildError>() {
            return Self {
                leftovers: told(&error.leftovers),
                stage: Some(error.stage.name()),
                log: Some(error.log.clone()),
                timeline: None,
            };
        }
        Self::default()
    }
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
