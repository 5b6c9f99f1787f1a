//! Every dependency has a licence that `deny.toml` allows and comes from crates.io.
//!
//! This is the part of `cargo deny` that matters most, without cargo-deny and without
//! the network: `cargo metadata` knows the licences of what is already downloaded.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot prepare itself may panic"
)]

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
const CARGO: &str = env!("CARGO");

/// The strings of the array `key` in `deny.toml`. No TOML library for one list:
/// the file is ours, and a wrong reading fails the positive controls below.
fn listed(key: &str) -> Vec<String> {
    let text = std::fs::read_to_string(Path::new(ROOT).join("deny.toml")).unwrap();
    let start = format!("\n{key} = [");
    let from = text.find(&start).unwrap() + start.len();
    let list = &text[from..from + text[from..].find(']').unwrap()];
    list.split('"')
        .skip(1)
        .step_by(2)
        .map(str::to_owned)
        .collect()
}

/// An SPDX expression, split into parentheses, operators and licences with their exception.
fn tokens(expression: &str) -> Vec<String> {
    let spaced = expression
        .replace('/', " OR ")
        .replace('(', " ( ")
        .replace(')', " ) ");
    let mut tokens: Vec<String> = Vec::new();
    let mut words = spaced.split_whitespace();
    while let Some(word) = words.next() {
        match (word, tokens.last_mut()) {
            ("WITH", Some(licence)) => {
                licence.push_str(" WITH ");
                licence.push_str(words.next().unwrap_or_default());
            }
            _ => tokens.push(word.to_owned()),
        }
    }
    tokens
}

/// Whether the expression can be met with allowed licences. AND binds before OR.
fn allowed(expression: &str, allow: &[String]) -> Result<bool, String> {
    let tokens = tokens(expression);
    let mut rest = tokens.as_slice();
    let met = any_of(&mut rest, allow)?;
    match rest {
        [] => Ok(met),
        [word, ..] => Err(format!("unexpected `{word}` in `{expression}`")),
    }
}

fn any_of(rest: &mut &[String], allow: &[String]) -> Result<bool, String> {
    let mut met = all_of(rest, allow)?;
    while take(rest, "OR") {
        met |= all_of(rest, allow)?;
    }
    Ok(met)
}

fn all_of(rest: &mut &[String], allow: &[String]) -> Result<bool, String> {
    let mut met = one(rest, allow)?;
    while take(rest, "AND") {
        met &= one(rest, allow)?;
    }
    Ok(met)
}

fn one(rest: &mut &[String], allow: &[String]) -> Result<bool, String> {
    if take(rest, "(") {
        let met = any_of(rest, allow)?;
        return if take(rest, ")") {
            Ok(met)
        } else {
            Err("parenthesis left open".to_owned())
        };
    }
    let Some((licence, after)) = rest.split_first() else {
        return Err("expression ends early".to_owned());
    };
    *rest = after;
    Ok(allow.contains(licence))
}

fn take(rest: &mut &[String], word: &str) -> bool {
    match rest.split_first() {
        Some((first, after)) if first == word => {
            *rest = after;
            true
        }
        _ => false,
    }
}

/// The packages of one workspace, or why they cannot be known here.
fn packages(manifest: &Path) -> Result<Vec<Value>, String> {
    let output = Command::new(CARGO)
        .args(["metadata", "--format-version", "1", "--offline", "--locked"])
        .args([
            "--filter-platform",
            "x86_64-unknown-linux-gnu",
            "--manifest-path",
        ])
        .arg(manifest)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("{CARGO} cannot be run here: {error}"))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        return Err(format!(
            "cargo metadata: {}",
            text.lines().next().unwrap_or("no reason given")
        ));
    }
    let metadata: Value =
        serde_json::from_slice(&output.stdout).map_err(|error| error.to_string())?;
    Ok(metadata["packages"].as_array().cloned().unwrap_or_default())
}

fn complaints(packages: &[Value], allow: &[String], registries: &[String]) -> Vec<String> {
    let mut complaints = Vec::new();
    for package in packages {
        let name = format!("{} {}", package["name"], package["version"]);
        match package["source"].as_str() {
            // A path in this repository.
            None => continue,
            Some(source)
                if registries
                    .iter()
                    .any(|url| source == format!("registry+{url}")) => {}
            Some(source) => complaints.push(format!("{name}: comes from {source}")),
        }
        match package["license"].as_str() {
            None => complaints.push(format!("{name}: names no licence")),
            Some(expression) => match allowed(expression, allow) {
                Ok(true) => {}
                Ok(false) => complaints.push(format!("{name}: {expression}")),
                Err(error) => complaints.push(format!("{name}: {error}")),
            },
        }
    }
    complaints
}

/// `also` is what this workspace may have besides.
fn check(test: &str, manifest: &str, least: usize, also: &[&str]) {
    let manifest = Path::new(ROOT).join(manifest);
    if !manifest.exists() {
        eprintln!("SKIP {test}: {} is not there", manifest.display());
        return;
    }
    let packages = match packages(&manifest) {
        Ok(packages) => packages,
        Err(reason) => {
            eprintln!("SKIP {test}: {reason}");
            return;
        }
    };
    assert!(
        packages.len() >= least,
        "only {} packages seen",
        packages.len()
    );
    let mut allow = listed("allow");
    allow.extend(also.iter().map(|&licence| licence.to_owned()));
    let complaints = complaints(&packages, &allow, &listed("allow-registry"));
    assert!(
        complaints.is_empty(),
        "not allowed by deny.toml:\n{}",
        complaints.join("\n")
    );
}

#[test]
fn workspace_dependencies_have_allowed_licences() {
    check(
        "workspace_dependencies_have_allowed_licences",
        "Cargo.toml",
        10,
        &[],
    );
}

#[test]
fn fuzz_dependencies_have_allowed_licences() {
    check(
        "fuzz_dependencies_have_allowed_licences",
        "fuzz/Cargo.toml",
        2,
        &[],
    );
}

#[test]
fn rival_dependencies_have_allowed_licences() {
    check(
        "rival_dependencies_have_allowed_licences",
        "benches/rivals/Cargo.toml",
        2,
        &[],
    );
}

#[test]
fn oracle_dependencies_have_allowed_licences() {
    // Linked into a test of its own only, which is given to nobody.
    check(
        "oracle_dependencies_have_allowed_licences",
        "tests/oracle-dm/Cargo.toml",
        2,
        &["MPL-2.0"],
    );
}

#[test]
fn reads_licence_expressions() {
    let allow = [
        "MIT".to_owned(),
        "Unicode-3.0".to_owned(),
        "Apache-2.0 WITH LLVM-exception".to_owned(),
    ];
    let cases = [
        ("one", "MIT", Ok(true)),
        ("one that is not allowed", "GPL-3.0", Ok(false)),
        ("a choice", "GPL-3.0 OR MIT", Ok(true)),
        ("a choice, old spelling", "GPL-3.0/MIT", Ok(true)),
        ("both needed", "MIT AND GPL-3.0", Ok(false)),
        ("and before or", "MIT OR GPL-3.0 AND GPL-2.0", Ok(true)),
        (
            "parentheses first",
            "(MIT OR GPL-3.0) AND Unicode-3.0",
            Ok(true),
        ),
        (
            "parentheses, refused",
            "(MIT OR GPL-3.0) AND GPL-2.0",
            Ok(false),
        ),
        (
            "an exception belongs to its licence",
            "Apache-2.0 WITH LLVM-exception",
            Ok(true),
        ),
        ("without the exception", "Apache-2.0", Ok(false)),
        ("open parenthesis", "(MIT", Err(())),
        ("two licences without operator", "MIT MIT", Err(())),
        ("nothing", "", Err(())),
    ];
    for (name, expression, wanted) in cases {
        assert_eq!(
            allowed(expression, &allow).map_err(|_| ()),
            wanted,
            "{name}: {expression}"
        );
    }
}

#[test]
fn complains_about_foreign_sources_and_missing_licences() {
    let package = |licence: Value, source: &str| serde_json::json!({"name": "x", "version": "1", "license": licence, "source": source});
    let registry = "registry+https://github.com/rust-lang/crates.io-index";
    let cases = [
        ("fine", package("MIT".into(), registry), 0),
        ("no licence", package(Value::Null, registry), 1),
        (
            "licence not listed",
            package("SSPL-1.0".into(), registry),
            1,
        ),
        (
            "from git",
            package("MIT".into(), "git+https://example.org/x"),
            1,
        ),
    ];
    for (name, package, wanted) in cases {
        let found = complaints(&[package], &listed("allow"), &listed("allow-registry"));
        assert_eq!(found.len(), wanted, "{name}: {found:?}");
    }
}

#[test]
fn has_no_known_advisories() {
    let test = "has_no_known_advisories";
    let deny = |arguments: &[&str]| {
        let mut command = Command::new(CARGO);
        command
            .arg("deny")
            .args(arguments)
            .current_dir(ROOT)
            .stdin(Stdio::null());
        command.output()
    };
    match deny(&["--version"]) {
        Ok(output) if output.status.success() => {}
        _ => {
            eprintln!("SKIP {test}: cargo-deny is not installed");
            return;
        }
    }
    let output = deny(&["--offline", "check", "advisories"]).unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    if text.contains("failed to load advisory database")
        || text.contains("unable to open advisory database")
    {
        eprintln!("SKIP {test}: no advisory database is downloaded");
        return;
    }
    assert!(output.status.success(), "{text}");
}
