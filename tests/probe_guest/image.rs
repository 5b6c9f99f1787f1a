//! The image that the build script made.

use std::process::Command;

use rewake::probe_guest::{ELF, Settings, expected_checksum, write_to};

/// The image, or a loud skip.
pub(crate) fn image(test: &str) -> Option<&'static [u8]> {
    if ELF.is_none() {
        eprintln!("SKIP {test}: the probe guest was not built");
    }
    ELF
}

#[test]
fn is_a_small_pvh_image() {
    let Some(elf) = image("is_a_small_pvh_image") else {
        return;
    };
    assert!(
        elf.starts_with(b"\x7fELF\x02\x01\x01"),
        "not a 64-bit ELF file"
    );
    assert!(elf.len() <= 40 * 1024, "{} bytes", elf.len());
    // The note that names the 32-bit entry: sizes 4 and 8, type 18, "Xen".
    let note = [4, 0, 0, 0, 8, 0, 0, 0, 18, 0, 0, 0, b'X', b'e', b'n', 0];
    assert!(
        elf.windows(note.len()).any(|window| window == note),
        "no PVH note"
    );
}

/// An interpreted guest stops at the first instruction that is not plain.
#[test]
fn has_plain_integer_instructions_only() {
    let test = "has_plain_integer_instructions_only";
    if image(test).is_none() {
        return;
    }
    let path = std::env::temp_dir().join(format!("rewake-probe-guest-{}", std::process::id()));
    write_to(&path).unwrap();
    let output = Command::new("objdump")
        .args(["-d", "--no-show-raw-insn"])
        .arg(&path)
        .output();
    std::fs::remove_file(&path).unwrap();
    let output = match output {
        Ok(output) => output,
        Err(error) => {
            eprintln!("SKIP {test}: objdump: {error}");
            return;
        }
    };
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let listing = String::from_utf8(output.stdout).unwrap();
    let instructions: Vec<&str> = listing
        .lines()
        .filter_map(|line| line.split_once(":\t").map(|(_, text)| text))
        .collect();
    assert!(
        instructions.len() > 1000 && instructions.iter().any(|text| text.starts_with("ret")),
        "no listing:\n{listing}"
    );
    let vector = ["%xmm", "%ymm", "%zmm", "%mm", "%st", "%k"];
    // `tzcnt` may stay: the compiler emits it as `rep bsf` where the operand is not zero, and a
    // processor or interpreter that knows `bsf` alone comes to the same result.
    let beyond = [
        "fence", "popcnt", "lzcnt", "fx", "xsave", "prefetch", "endbr",
    ];
    for text in instructions {
        let mnemonic = text.split_whitespace().next().unwrap_or_default();
        let plain = !vector.iter().any(|register| text.contains(register))
            && !beyond.iter().any(|word| mnemonic.contains(word))
            && !mnemonic.starts_with('f');
        assert!(plain, "not a plain integer instruction: {text}");
    }
}

/// The pattern is written twice, here and in the guest. The guest's is the one that counts.
#[test]
fn host_and_guest_agree_on_the_pattern() {
    for (nonce, pages) in [(0, 0), (1, 1), (0x0123_4567_89ab_cdef, 64)] {
        let mut sum = 0;
        for page in 0..pages {
            let first = crate::agent::pattern(nonce, page);
            for line in 0..64 {
                sum = crate::agent::checksum(sum, first.wrapping_add(line));
            }
        }
        assert_eq!(expected_checksum(nonce, pages), sum);
    }
    assert_ne!(expected_checksum(1, 64), expected_checksum(2, 64));
    assert_ne!(expected_checksum(1, 64), expected_checksum(1, 63));
    assert!(
        Settings::default()
            .to_string()
            .starts_with("ip=169.254.0.21:")
    );
}

/// The guest is no member of the workspace, so `cargo fmt` passes it by.
#[test]
fn its_sources_are_formatted() {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/guest/src/main.rs");
    let mut rustfmt = Command::new("rustfmt");
    match rustfmt
        .args(["--edition", "2024", "--check", root])
        .output()
    {
        Ok(output) => assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stdout)
        ),
        Err(error) => eprintln!("SKIP its_sources_are_formatted: rustfmt: {error}"),
    }
}
