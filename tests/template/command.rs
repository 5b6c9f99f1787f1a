//! `rewake template` from the command line, with the stand-in.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use super::place::Root;

/// Runs `rewake --json template` on this root; exit code and document.
fn rewake(root: &Root, arguments: &[&str]) -> (i32, Value) {
    let output = command(root, &["--json"], arguments).output().unwrap();
    let document = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| {
        let errors = String::from_utf8_lossy(&output.stderr);
        panic!("{arguments:?}: {error}: {errors}")
    });
    (output.status.code().unwrap(), document)
}

/// The same for people: exit code, what was printed, what was complained about.
fn told(root: &Root, arguments: &[&str]) -> (i32, String, String) {
    let output = command(root, &[], arguments).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let code = output.status.code().unwrap();
    (code, text(&output.stdout), text(&output.stderr))
}

fn command(root: &Root, before: &[&str], arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rewake"));
    command.args(before).arg("template").args(arguments);
    command.arg("--root").arg(root.path());
    command.arg("--runtime-dir").arg(root.join("run"));
    command
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn people_build_list_show_import_and_remove_templates() {
    let root = Root::new("command");
    let kernel = root.join("kernel");
    let image = root.join("image.raw");
    fs::write(&kernel, "not read").unwrap();
    fs::write(&image, vec![1; 1 << 20]).unwrap();
    let build = [
        "build",
        "python",
        "--stand-in",
        "--loopback",
        "--kernel",
        text(&kernel),
        "--rootfs",
        text(&image),
        "--memory-mib",
        "64",
        "--disk-mode",
        "copy",
        "--env",
        "A=b",
    ];
    let (code, built) = rewake(&root, &build);
    assert_eq!(
        (code, built["name"].as_str()),
        (0, Some("python")),
        "{built}"
    );
    assert_eq!(built["manifest"]["memory"]["bytes"], 64 << 20);
    assert!(built["milliseconds"].as_f64().unwrap() > 0.0);
    let (code, refused) = rewake(&root, &build);
    assert_eq!(code, 1);
    assert_eq!(refused["error"]["stage"], "check");
    let message = refused["error"]["message"].as_str().unwrap();
    assert!(message.ends_with("never overwritten"), "{message}");

    let source = built["dir"].as_str().unwrap().to_owned();
    let import = ["import", "copy", &source, "--rootfs", text(&image)];
    let (code, imported) = rewake(&root, &import);
    assert_eq!(
        (code, imported["manifest"]["kind"].as_str()),
        (0, Some("imported")),
        "{imported}"
    );
    let (code, refused) = rewake(&root, &["import", "other", &source]);
    assert_eq!(code, 1);
    assert!(
        refused["error"]["message"]
            .as_str()
            .unwrap()
            .contains("--rootfs"),
        "{refused}"
    );

    fs::create_dir(root.join("templates/broken")).unwrap();
    let (code, listed) = rewake(&root, &["ls"]);
    assert_eq!(code, 0);
    let names: Vec<&str> = listed["templates"]
        .as_array()
        .unwrap()
        .iter()
        .map(|it| it["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["broken", "copy", "python"]);
    assert!(listed["templates"][0]["error"].is_string(), "{listed}");
    let (code, table, complaints) = told(&root, &["ls"]);
    assert_eq!(code, 0);
    let lines: Vec<&str> = table.lines().collect();
    assert!(lines[0].starts_with("template  kind"), "{table}");
    assert!(lines[1].starts_with("broken    damaged"), "{table}");
    assert!(
        lines[3].contains("built") && lines[3].contains("64 MiB"),
        "{table}"
    );
    assert!(complaints.contains("rewake.json"), "{complaints}");

    let vmm = ["--vmm", env!("CARGO_BIN_EXE_rewake-sim")];
    let show = [&["show", "python"][..], &vmm].concat();
    let (code, shown) = rewake(&root, &show);
    assert_eq!((code, &shown["usable"]), (0, &Value::Bool(true)), "{shown}");
    assert_eq!(shown["working_set"], Value::Null, "{shown}");
    let set = rewake::memory::WorkingSet::of_pages(vec![1, 2, 700]);
    set.save(&root.join("templates/python")).unwrap();
    let (_, shown) = rewake(&root, &show);
    let expected = serde_json::json!({"bytes": 3 * 4096, "extents": 2});
    assert_eq!(shown["working_set"], expected, "{shown}");
    let (_, shown, _) = told(&root, &show);
    assert!(shown.contains("working set 12 KiB in 2 pieces"), "{shown}");
    assert!(
        shown.contains("check       it is whole and can run here"),
        "{shown}"
    );
    assert!(
        shown.contains("stand-in"),
        "it must say what froze it: {shown}"
    );
    fs::remove_file(root.join("templates/python/rootfs.raw")).unwrap();
    let (_, shown) = rewake(&root, &show);
    assert!(
        shown["problem"].as_str().unwrap().contains("rootfs.raw"),
        "{shown}"
    );

    let (code, removed) = rewake(&root, &["rm", "python", "copy", "broken"]);
    assert_eq!((code, removed["removed"].as_array().unwrap().len()), (0, 3));
    let (code, missing) = rewake(&root, &["rm", "python"]);
    assert_eq!(code, 1);
    assert_eq!(missing["error"]["message"], "There is no template python");
    assert!(root.names().is_empty());
}

#[test]
fn a_build_that_fails_says_where_and_that_nothing_is_left() {
    let root = Root::new("command-fails");
    let kernel = root.join("kernel");
    fs::write(&kernel, "not read").unwrap();
    let (code, _, complaints) = told(
        &root,
        &[
            "build",
            "x",
            "--kernel",
            text(&kernel),
            "--stand-in",
            "--loopback",
            "--memory-mib",
            "3",
        ],
    );
    assert_eq!(code, 1);
    assert!(
        complaints.contains("no multiple of 2 MiB; left over: nothing"),
        "{complaints}"
    );
    assert!(root.names().is_empty());
}
