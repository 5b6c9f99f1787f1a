//! The life of a sandbox, command by command.

use std::collections::BTreeSet;

use serde_json::Value;

use super::place::{Place, STAND_IN, cells, launch_words, resume_words};

#[test]
fn root_people_launch_pause_resume_snapshot_and_destroy() {
    let test = "root_people_launch_pause_resume_snapshot_and_destroy";
    let Some(place) = Place::new(test) else {
        return;
    };
    assert_eq!(cells(&place.succeed("ls"))[0], "sandbox");
    assert!(!place.root.exists(), "looking makes nothing");
    drop(place);
    let Some(place) = Place::with_template(test) else {
        return;
    };
    let before = place.census();

    let told = place.succeed(&launch_words("--id one --env A=b"));
    assert!(
        told.starts_with("This is the stand-in, not Cloud Hypervisor"),
        "{told}"
    );
    for words in [
        "phase ",
        "slot_acquired ",
        "ready ",
        "sandbox   one",
        "address   10.11.0.",
        "memory    32 MiB (map)",
        "Memory mode map was chosen",
    ] {
        assert!(told.contains(words), "{words}: {told}");
    }
    let quiet = place.run(&launch_words("--quiet"));
    let other = quiet.out.trim();
    assert_eq!(quiet.out, format!("{other}\n"));
    assert!(other.starts_with("sb-"), "{quiet:?}");
    assert!(quiet.err.contains("stand-in"), "{quiet:?}");

    let table = place.succeed("ls");
    let lines: Vec<_> = table.lines().map(cells).collect();
    assert_eq!(
        lines[0],
        [
            "sandbox", "state", "age", "ram", "private", "shared", "disk", "address", "template"
        ]
    );
    assert_eq!(lines.len(), 3, "{table}");
    let row = &lines[1];
    assert_eq!((row[0], row[1], row[3]), ("one", "running", "32 MiB"));
    assert!(row[2].ends_with(" s"), "{table}");
    assert!(row[4].ends_with("iB") && row[5].ends_with("iB"), "{table}");
    assert!(row[6].ends_with(" of 256 KiB"), "{table}");
    assert_eq!(row[8], "base");
    let ids = place.succeed("ls --quiet");
    assert_eq!(ids, format!("one\n{other}\n"));

    let paused = place.succeed("pause one");
    assert!(
        paused.starts_with("one paused in ") && paused.ends_with(" ms\n"),
        "{paused}"
    );
    let table = place.succeed("ls --state paused");
    assert_eq!(table.lines().count(), 2, "{table}");
    let row = cells(table.lines().nth(1).unwrap());
    assert_eq!((row[1], row[4], row[5]), ("paused", "-", "-"), "{table}");
    let shown = place.succeed("inspect one");
    assert!(
        shown.contains("snapshot.1 (") && shown.contains(", counts, on the disk)"),
        "{shown}"
    );

    let resumed = place.succeed(&resume_words("one"));
    assert!(resumed.contains("memory    32 MiB (shared)"), "{resumed}");
    let made = place.succeed("snapshot one warm");
    assert!(made.starts_with("template warm from sandbox one"), "{made}");
    let templates = place.succeed("template ls");
    assert!(templates.contains("warm "), "{templates}");
    let warm = launch_words("--id two").replace(" base ", " warm ");
    place.succeed(&warm);
    let log = place.succeed("logs two");
    assert!(log.contains("rewake-sim"), "{log}");

    let gone = place.succeed("destroy one two");
    assert!(gone.starts_with("one destroyed in "), "{gone}");
    assert_eq!(place.succeed("destroy one"), "one was not there\n");
    assert_eq!(place.succeed("destroy --all").lines().count(), 1);
    assert_eq!(place.succeed("ls").lines().count(), 1);
    place.succeed("template rm warm");
    assert_eq!(place.census(), before);
    place.succeed("template rm base");
}

#[test]
fn root_programs_read_json_with_the_keys_that_help_tells() {
    let test = "root_programs_read_json_with_the_keys_that_help_tells";
    let Some(place) = Place::with_template(test) else {
        return;
    };
    let launched = place.launch("--id one");
    assert_eq!(launched["sandbox_id"], "one");
    assert_eq!(launched["state"], "running");
    assert_eq!(launched["generation"], 1);
    assert_eq!(launched["memory_bytes"], 32 << 20);
    assert_eq!(launched["vm"]["stand_in"], true);
    assert_eq!(launched["vm"]["memory_mode"], "map");
    let phases = launched["timeline"]["phases"].as_array().unwrap();
    assert!(phases.iter().any(|it| it["phase"] == "ready"), "{launched}");

    let (_, listed) = place.json("ls");
    let sandbox = &listed["sandboxes"][0];
    assert_eq!(sandbox["address"], launched["address"]);
    assert_eq!(sandbox["disk"]["kind"], "copy");
    assert!(
        sandbox["memory"]["process"]["private_bytes"]
            .as_u64()
            .unwrap()
            > 0
    );
    let (_, shown) = place.json("inspect one");
    let notes = shown["vm"]["notes"].to_string();
    assert!(notes.contains("was chosen"), "why: {notes}");
    let steps = shown["steps"].as_array().unwrap();
    assert!(!steps.is_empty(), "{shown}");
    let pid = &shown["vm"]["pid"];
    assert!(
        steps.iter().any(|step| step["pid"] == *pid),
        "its process is on record: {shown}"
    );
    is_told(&place, "ls", &listed);
    is_told(&place, "inspect", &shown);
    is_told(&place, "launch", &launched);

    let (code, paused) = place.json("pause --all");
    assert_eq!(
        (code, &paused["paused"][0]["sandbox_id"]),
        (0, &"one".into())
    );
    assert_eq!(paused["failed"], Value::Array(Vec::new()));
    is_told(&place, "pause", &paused);
    let (_, shown) = place.json("inspect one");
    assert_eq!(shown["state"], "paused");
    assert_eq!(
        (&shown["vm"], &shown["memory"]),
        (&Value::Null, &Value::Null)
    );
    let counts = shown["snapshots"].as_array().unwrap();
    assert!(counts.iter().any(|it| it["counts"] == true), "{shown}");
    assert_eq!(shown["durable"], true);

    let (code, resumed) = place.json(&resume_words("one"));
    assert_eq!(code, 0, "{resumed}");
    assert_eq!(resumed["address"], launched["address"], "it is kept");
    assert_eq!(resumed["generation"], 2);
    let (code, made) = place.json("snapshot one warm");
    assert_eq!((code, &made["template"]), (0, &"warm".into()), "{made}");
    is_told(&place, "snapshot", &made);
    let (_, log) = place.json("logs one");
    assert!(!log["lines"].as_array().unwrap().is_empty(), "{log}");
    is_told(&place, "logs", &log);
    let (_, census) = place.json("recover");
    assert_eq!(census["adopted"], serde_json::json!(["one"]));
    is_told(&place, "recover", &census);
    let (code, gone) = place.json("destroy one");
    assert_eq!((code, &gone["destroyed"][0]["existed"]), (0, &true.into()));
    is_told(&place, "destroy", &gone);
}

/// Every key of a document stands in the command's long help. What a timeline, an error or a
/// step consists of is told elsewhere.
fn is_told(place: &Place, command: &str, document: &Value) {
    let help = place.run(&format!("help {command}"));
    let help = if help.code == 0 {
        help.out
    } else {
        place.succeed(&format!("{command} --help"))
    };
    let words: BTreeSet<&str> = help
        .split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'))
        .collect();
    let mut keys = BTreeSet::new();
    collect(document, &mut keys);
    let untold: Vec<_> = keys
        .iter()
        .filter(|key| !words.contains(key.as_str()))
        .collect();
    assert!(untold.is_empty(), "{command} does not tell of {untold:?}");
}

fn collect(value: &Value, keys: &mut BTreeSet<String>) {
    match value {
        Value::Array(all) => all.iter().for_each(|it| collect(it, keys)),
        Value::Object(all) => {
            for (key, value) in all {
                keys.insert(key.clone());
                if !["timeline", "error", "steps"].contains(&key.as_str()) {
                    collect(value, keys);
                }
            }
        }
        _ => {}
    }
}

#[test]
fn root_the_stand_in_is_built_in() {
    let test = "root_the_stand_in_is_built_in";
    let Some(place) = Place::with_template(test) else {
        return;
    };
    let words = launch_words("--id one").replace(&format!("--vmm {STAND_IN}"), "--stand-in");
    place.succeed(&words);
    let trace = place.file("trace.json");
    place.succeed("pause one --warm --no-prepare");
    let words = resume_words("one").replace(&format!("--vmm {STAND_IN}"), "--stand-in");
    place.succeed(&format!("{words} --trace {trace}"));
    let trace: Value = serde_json::from_slice(&std::fs::read(trace).unwrap()).unwrap();
    assert!(trace.to_string().contains("ready"));
    place.succeed("destroy --all");
}
