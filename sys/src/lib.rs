//! Raw Linux system calls for rewake, typed and checked. The only crate with `unsafe`.
