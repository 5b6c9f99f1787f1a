//! Snapshot directories: open, check, rewrite.
