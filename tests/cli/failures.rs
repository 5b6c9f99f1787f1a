//! What commands say when they fail, and how they end.

use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::place::{Place, Told, cells, launch_words, resume_words};

#[test]
fn root_failures_say_what_to_do() {
    let test = "root_failures_say_what_to_do";
    let Some(place) = Place::new(test) else {
        return;
    };
    let told = place.run("inspect one");
    assert_eq!(told.code, 1);
    assert!(told.err.contains("does not exist"), "{told:?}");
    drop(place);
    let Some(place) = Place::with_template(test) else {
        return;
    };
    place.launch("--id one");
    place.launch("--id two");
    place.succeed("pause two");
    let unknown = launch_words("").replace(" base ", " python ");
    let taken = launch_words("--id one");
    for (words, message, hint) in [
        (
            unknown.as_str(),
            "There is no template python",
            "rewake template ls",
        ),
        (&taken, "already", "choose another --id"),
        ("pause none", "There is no such sandbox", "rewake ls"),
        ("inspect none", "There is no such sandbox", "rewake ls"),
        (
            &resume_words("none"),
            "There is no such sandbox",
            "rewake ls",
        ),
        (
            &resume_words("one"),
            "It is running; this needs one that is paused",
            "rewake pause one",
        ),
        (
            "pause two",
            "It is paused; this needs one that is running",
            "rewake resume two",
        ),
        (
            "snapshot two x",
            "It is paused; this needs one that is running",
            "rewake resume two",
        ),
        ("snapshot one base", "exists already", "another name"),
    ] {
        let told = place.run(words);
        assert_eq!(told.code, 1, "{words}: {told:?}");
        assert!(told.out.is_empty(), "{words}: {told:?}");
        assert!(told.err.contains(message), "{words}: {told:?}");
        assert!(told.err.contains("hint: "), "{words}: {told:?}");
        assert!(told.err.contains(hint), "{words}: {told:?}");
        if !words.starts_with("pause") {
            let (code, document) = place.json(words);
            assert_eq!((code, &document["error"]["kind"]), (1, &"failed".into()));
            assert!(
                document["error"]["hint"].as_str().unwrap().contains(hint),
                "{document}"
            );
        }
    }
    // Some of several: each is told, the others are done.
    let (code, some) = place.json("pause one two none");
    assert_eq!((code, &some["paused"][0]["sandbox_id"]), (1, &"one".into()));
    let failed = some["failed"].as_array().unwrap();
    assert_eq!(failed.len(), 2, "{some}");
    assert_eq!(failed[0]["sandbox_id"], "two");
    assert!(failed[1]["error"]["hint"].is_string(), "{some}");
    let told = place.run("pause one none");
    assert_eq!(told.code, 1);
    assert!(told.err.contains("rewake: 2 of 2 failed"), "{told:?}");
    // The command line itself.
    assert_eq!(place.run("pause").code, 2);
    assert_eq!(place.run("launch base --env A").code, 2);
    assert_eq!(place.run("launch base --id Wrong!").code, 2);
    let mut without = place.command(&format!("{} ", "launch base"));
    let told = Told::of(&without.env("PATH", "/nonexistent").output().unwrap());
    assert_eq!(told.code, 1);
    assert!(told.err.contains("rewake doctor"), "{told:?}");
    place.succeed("destroy --all");
}

#[test]
fn root_a_sandbox_whose_vm_died_is_lost_and_its_log_is_kept() {
    let test = "root_a_sandbox_whose_vm_died_is_lost_and_its_log_is_kept";
    let Some(place) = Place::with_template(test) else {
        return;
    };
    let launched = place.launch("--id one");
    place.succeed("logs one");
    end(&launched["vm"]["pid"]);
    let row = until(&place, "one", |one| one["state"] == "lost");
    assert_eq!(row["lost"], "its Cloud Hypervisor has ended");
    let table = place.succeed("ls");
    assert_eq!(cells(table.lines().nth(1).unwrap())[1], "lost", "{table}");
    assert!(place.succeed("inspect one").contains("has ended"));
    let told = place.run("pause one");
    assert_eq!(told.code, 1, "{told:?}");
    for words in ["has ended", "rewake logs one", "rewake destroy one"] {
        assert!(told.err.contains(words), "{words}: {told:?}");
    }
    let told = place.run(&resume_words("one"));
    assert!(told.err.contains("It is lost"), "{told:?}");
    assert!(place.succeed("logs one").contains("rewake-sim"));
    let (code, census) = place.json("recover");
    assert_eq!((code, &census["lost"][0]), (0, &"one".into()), "{census}");
    place.succeed("destroy one");
}

#[test]
fn root_a_launch_under_way_is_listed_and_busy_and_recovered_once_its_maker_is_dead() {
    let test = "root_a_launch_under_way_is_listed_and_busy_and_recovered_once_its_maker_is_dead";
    let Some(place) = Place::with_template(test) else {
        return;
    };
    let before = place.census();
    let mut maker = begin(&place, "half");
    let half = until(&place, "half", |one| one["state"] == "launching");
    assert_eq!(half["stranded"], false, "{half}");
    let table = place.succeed("ls");
    let row = cells(table.lines().nth(1).unwrap());
    assert_eq!((row[0], row[1]), ("half", "launching"), "{table}");

    let (code, busy) = place.json(&resume_words("half"));
    assert_eq!(
        (code, &busy["error"]["kind"]),
        (5, &"busy".into()),
        "{busy}"
    );
    let told = place.run("pause half");
    assert_eq!(told.code, 5, "{told:?}");
    assert!(told.err.contains("rewake recover"), "{told:?}");
    let (code, census) = place.json("recover");
    assert_eq!((code, &census["under_way"][0]), (0, &"half".into()));

    maker.kill().unwrap();
    maker.wait().unwrap();
    let half = until(&place, "half", |one| one["stranded"] == true);
    assert_eq!(half["state"], "launching");
    let table = place.succeed("ls");
    assert!(table.contains("launching, stranded"), "{table}");
    let told = place.succeed("recover");
    let row = told.lines().find(|line| line.starts_with("reclaimed"));
    assert_eq!(*cells(row.unwrap()).last().unwrap(), "half", "{told}");
    assert_eq!(place.census(), before);
    let (_, listed) = place.json("ls");
    assert_eq!(listed["sandboxes"], Value::Array(Vec::new()));

    // Destroying one that is being made ends its launch.
    let maker = begin(&place, "other");
    until(&place, "other", |one| one["state"] == "launching");
    place.succeed("destroy other");
    let ended = maker.wait_with_output_soon();
    assert_eq!(ended.code, 1, "{ended:?}");
    assert!(ended.err.contains("It is being destroyed"), "{ended:?}");
    assert_eq!(place.census(), before);
}

#[test]
fn root_a_full_host_and_a_passed_time_limit_have_codes_of_their_own() {
    let test = "root_a_full_host_and_a_passed_time_limit_have_codes_of_their_own";
    let Some(place) = Place::with_template(test) else {
        return;
    };
    place.launch("--id one --max-running 1");
    let told = place.run(&launch_words("--id two --max-running 1"));
    assert_eq!(told.code, 5, "{told:?}");
    for words in ["The host is full: 1 sandboxes run already", "--max-running"] {
        assert!(told.err.contains(words), "{words}: {told:?}");
    }
    let silent = "--id three --vmm-arg --sim --vmm-arg fault=guest:silent --timeout 1";
    let told = place.run(&launch_words(silent));
    assert_eq!(told.code, 4, "{told:?}");
    for words in ["wait for envd", "left over: nothing", "--timeout"] {
        assert!(told.err.contains(words), "{words}: {told:?}");
    }
    let (code, late) = place.json(&launch_words(silent));
    assert_eq!((code, &late["error"]["kind"]), (4, &"timeout".into()));
    assert_eq!(late["error"]["leftovers"], Value::Array(Vec::new()));
    // What does not come up says what Cloud Hypervisor said.
    let dies = "--id four --vmm-arg --sim --vmm-arg fault=on-restore:die";
    let told = place.run(&launch_words(dies));
    assert_eq!(told.code, 1, "{told:?}");
    assert!(told.err.contains("cloud-hypervisor: "), "{told:?}");
    assert_eq!(place.succeed("ls --quiet --state running"), "one\n");
    place.succeed("destroy --all");
}

#[test]
fn root_progress_is_drawn_on_a_terminal_only_and_gone_at_the_end() {
    let test = "root_progress_is_drawn_on_a_terminal_only_and_gone_at_the_end";
    let Some(place) = Place::with_template(test) else {
        return;
    };
    let words = "--id slow --vmm-arg --sim --vmm-arg fault=guest:silent --timeout 1.5";
    let told = place.run(&launch_words(words));
    assert!(!told.err.contains('\u{1b}'), "{told:?}");
    let command = place.command(&launch_words(words));
    let mut line = command.get_program().to_str().unwrap().to_owned();
    for argument in command.get_args() {
        line = format!("{line} {}", argument.to_str().unwrap());
    }
    // It gives its command a terminal.
    let mut script = std::process::Command::new("script");
    let output = match script.args(["-qec", &line, "/dev/null"]).output() {
        Ok(output) => output,
        Err(error) => return eprintln!("SKIP {test}: script: {error}"),
    };
    let shown = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(4), "{shown}");
    assert!(shown.contains("\r\u{1b}[Klaunch from base … "), "{shown:?}");
    assert!(
        shown.contains("\r\u{1b}[Krewake: Sandbox slow"),
        "{shown:?}"
    );
}

/// A launch that does not come to its end by itself.
fn begin(place: &Place, id: &str) -> Maker {
    let words = format!("--id {id} --vmm-arg --sim --vmm-arg fault=guest:silent --timeout 60");
    let mut command = place.command(&launch_words(&words));
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    Maker(Some(command.spawn().unwrap()))
}

/// A `rewake` at work; a test that fails does not leave it behind.
struct Maker(Option<Child>);

impl Maker {
    fn kill(&mut self) -> std::io::Result<()> {
        self.0.as_mut().unwrap().kill()
    }

    fn wait(&mut self) -> std::io::Result<std::process::ExitStatus> {
        self.0.as_mut().unwrap().wait()
    }

    fn wait_with_output_soon(mut self) -> Told {
        Told::of(&self.0.take().unwrap().wait_with_output().unwrap())
    }
}

impl Drop for Maker {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Asks `ls` until a sandbox looks like this.
fn until(place: &Place, id: &str, wanted: impl Fn(&Value) -> bool) -> Value {
    let give_up = Instant::now() + Duration::from_secs(30);
    loop {
        let (code, listed) = place.json("ls");
        assert_eq!(code, 0, "{listed}");
        let all = listed["sandboxes"].as_array().unwrap();
        let one = all.iter().find(|it| it["sandbox_id"] == id);
        if let Some(one) = one.filter(|one| wanted(one)) {
            return one.clone();
        }
        assert!(Instant::now() < give_up, "{listed}");
    }
}

/// Ends a VM behind the back of everybody.
fn end(pid: &Value) {
    let pid = i32::try_from(pid.as_i64().unwrap()).unwrap();
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}
