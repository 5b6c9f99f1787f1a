//! Compiles the probe guest (`fixtures/guest`) into the library.
//!
//! The guest needs no further target: it is freestanding, built by the same `rustc`, and
//! linked by the same `cc`. Where that fails, the library is built without it and says so.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

const SOURCE: &str = "fixtures/guest";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed={SOURCE}");
    println!("cargo::rustc-check-cfg=cfg(probe_guest)");
    if env::var_os("CARGO_FEATURE_PROBE_GUEST").is_none() {
        return;
    }
    match compile() {
        Ok(elf) => {
            println!("cargo::rustc-cfg=probe_guest");
            println!("cargo::rustc-env=REWAKE_PROBE_GUEST={}", elf.display());
        }
        Err(reason) => {
            println!("cargo::warning=The probe guest is left out: {reason}");
        }
    }
}

fn compile() -> Result<PathBuf, String> {
    let variable = |name| env::var_os(name).ok_or_else(|| format!("{name} is not set"));
    let target = env::var("TARGET").map_err(|error| error.to_string())?;
    if env::var("CARGO_CFG_TARGET_ARCH").as_deref() != Ok("x86_64") {
        return Err(format!("it is an x86-64 program, and this is {target}"));
    }
    let source = Path::new(&variable("CARGO_MANIFEST_DIR")?).join(SOURCE);
    let elf = Path::new(&variable("OUT_DIR")?).join("probe-guest.elf");
    let mut command = Command::new(variable("RUSTC")?);
    command
        .args(["--edition", "2024", "--crate-name", "probe_guest"])
        .args(["--crate-type", "bin", "--target", &target])
        // Without SSE there are integer instructions only. `rustc` warns that functions with
        // floating-point arguments would not fit the target's ABI: the guest has none, and
        // whole-program optimisation compiles what it uses of `core` anew. A test
        // disassembles the result.
        .args(["-C", "target-feature=-sse,-sse2"])
        .args(["-C", "lto=fat", "-C", "codegen-units=1"])
        // Time in the guest is instructions, where an interpreter runs them.
        .args(["-C", "opt-level=2", "-C", "panic=abort"])
        .args(["-C", "relocation-model=static", "-C", "no-redzone=yes"])
        .args(["-C", "strip=symbols"]);
    if let Some(linker) = env::var_os("RUSTC_LINKER") {
        command
            .arg("-C")
            .arg(format!("linker={}", linker.display()));
    }
    for argument in [
        "-nostartfiles",
        "-nostdlib",
        "-static",
        "-no-pie",
        "-Wl,--build-id=none",
    ] {
        command.args(["-C", &format!("link-arg={argument}")]);
    }
    let output = command
        .arg("-C")
        .arg(format!(
            "link-arg=-Wl,-T{}",
            source.join("link.ld").display()
        ))
        .arg("-o")
        .arg(&elf)
        .arg(source.join("src/main.rs"))
        .output()
        .map_err(|error| format!("{}: {error}", command.get_program().display()))?;
    if output.status.success() {
        return Ok(elf);
    }
    let errors = String::from_utf8_lossy(&output.stderr);
    let first = errors.lines().find(|line| line.starts_with("error"));
    Err(first.unwrap_or("rustc failed").to_owned())
}
