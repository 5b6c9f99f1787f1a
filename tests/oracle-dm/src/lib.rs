//! Nothing but a home for the test: see `tests/oracle.rs`.
