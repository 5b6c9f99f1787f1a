//! Completion scripts and manual pages.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use super::place::{REWAKE, Told};

fn rewake(words: &[&str]) -> Told {
    Told::of(&Command::new(REWAKE).args(words).output().unwrap())
}

/// Runs a program on a text; `None`, said aloud, where it is not there.
fn feed(test: &str, program: &str, arguments: &[&str], text: &str) -> Option<Told> {
    let child = Command::new(program)
        .args(arguments)
        .env("LC_ALL", "C.UTF-8")
        .env("MANWIDTH", "80")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = match child {
        Ok(child) => child,
        Err(error) => {
            eprintln!("SKIP {test}: {program}: {error}");
            return None;
        }
    };
    child
        .stdin
        .take()
        .unwrap()
        .write_all(text.as_bytes())
        .unwrap();
    Some(Told::of(&child.wait_with_output().unwrap()))
}

#[test]
fn completion_scripts_are_parsed_by_their_shells() {
    let test = "completion_scripts_are_parsed_by_their_shells";
    for (shell, arguments) in [
        ("bash", &["-n"][..]),
        ("zsh", &["-n"]),
        ("fish", &["--no-execute"]),
    ] {
        let script = rewake(&["completion", shell]);
        assert_eq!((script.code, script.err.as_str()), (0, ""), "{shell}");
        for word in ["launch", "resume", "memory-mode", "recover"] {
            assert!(script.out.contains(word), "{shell} {word}");
        }
        if let Some(parsed) = feed(test, shell, arguments, &script.out) {
            assert_eq!((parsed.code, parsed.err.as_str()), (0, ""), "{shell}");
        }
    }
    assert_eq!(rewake(&["completion", "tcsh"]).code, 2);
}

#[test]
fn bash_completes_commands_and_options() {
    let test = "bash_completes_commands_and_options";
    let script = rewake(&["completion", "bash"]).out;
    let ask = "COMP_WORDS=(rewake la); COMP_CWORD=1; _rewake rewake la rewake; \
               echo \"${COMPREPLY[@]}\"; \
               COMP_WORDS=(rewake launch --memory-m); COMP_CWORD=2; \
               _rewake rewake --memory-m launch; echo \"${COMPREPLY[@]}\"";
    if let Some(told) = feed(test, "bash", &[], &format!("{script}\n{ask}\n")) {
        assert_eq!(told.out, "launch\n--memory-mode\n", "{told:?}");
    }
}

#[test]
fn manual_pages_exist_for_every_command_and_render_without_a_complaint() {
    let test = "manual_pages_exist_for_every_command_and_render_without_a_complaint";
    let dir = std::env::temp_dir().join(format!("rewake-man-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let _scratch = Scratch(dir.clone());
    let written = rewake(&["man", "--dir", dir.to_str().unwrap()]);
    assert_eq!(written.code, 0, "{written:?}");
    let pages: BTreeSet<String> = std::fs::read_dir(&dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    for page in [
        "rewake.1",
        "rewake-launch.1",
        "rewake-ls.1",
        "rewake-template-build.1",
        "rewake-net-create.1",
    ] {
        assert!(pages.contains(page), "{page}: {pages:?}");
    }
    let one = rewake(&["man", "launch"]).out;
    let file = std::fs::read_to_string(dir.join("rewake-launch.1")).unwrap();
    assert_eq!(one, file);
    for words in [
        "TEMPLATE",
        "memory",
        "sandbox_id",
        "HOST",
        "NOTES",
        "private_bytes",
    ] {
        assert!(one.contains(words), "{words}: {one}");
    }
    for page in pages {
        let text = std::fs::read_to_string(dir.join(&page)).unwrap();
        let arguments = ["--local-file", "--warnings", "-"];
        let Some(told) = feed(test, "man", &arguments, &text) else {
            break;
        };
        if told.out.trim().is_empty() || told.err.contains("minimized") {
            // Small systems ship a man that shows nothing.
            eprintln!("SKIP {test}: man renders nothing here");
            break;
        }
        assert_eq!((told.code, told.err.as_str()), (0, ""), "{page}");
        assert!(told.out.contains("NAME"), "{page}: {}", told.out);
    }
    let told = rewake(&["man", "launhc"]);
    assert_eq!(told.code, 1);
    assert!(told.err.contains("launhc"), "{told:?}");
}

#[test]
fn doctor_looks_at_the_root_that_is_named_and_does_not_make_it() {
    let root = std::env::temp_dir().join(format!("rewake-doctor-cli-{}", std::process::id()));
    let words = ["doctor", "--json", "--root", root.to_str().unwrap()];
    let told = rewake(&words);
    assert!([0, 3].contains(&told.code), "{told:?}");
    let document: serde_json::Value = serde_json::from_str(&told.out).unwrap();
    let findings = document["findings"].as_array().unwrap();
    let names: Vec<&str> = findings
        .iter()
        .map(|it| it["name"].as_str().unwrap())
        .collect();
    for name in [
        "kernel",
        "kvm",
        "userfaultfd",
        "cloud-hypervisor",
        "root directory",
        "disks",
        "free space",
    ] {
        let times = names.iter().filter(|it| **it == name).count();
        assert_eq!(times, 1, "{name}: {names:?}");
    }
    assert!(!root.exists());
}

struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
