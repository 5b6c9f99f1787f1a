//! Tables for people, JSON for programs, errors for both.

use std::error::Error;
use std::fmt::Write as _;
use std::io::{self, Write as _};

use super::{Failure, Global};

/// Prints a failure once, with all its causes.
pub(super) fn error(error: &(dyn Error + 'static), global: Global) {
    let mut chain = Vec::new();
    let mut next = Some(error);
    while let Some(cause) = next {
        chain.push(cause.to_string());
        next = cause.source();
    }
    if global.json {
        let document = serde_json::json!({"error": {"message": chain.join(": "), "chain": chain}});
        println!("{document}");
    } else {
        eprintln!("rewake: {}", chain.join(": "));
    }
}

/// Prints one JSON document on standard output.
pub(super) fn json(document: &serde_json::Value) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, document).map_err(io::Error::from)?;
    writeln!(out)?;
    Ok(())
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
