//! Directories that only their owner can look into.

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;

/// Makes directories with mode 0700.
pub(crate) fn private() -> DirBuilder {
    let mut builder = DirBuilder::new();
    builder.mode(0o700);
    builder
}
