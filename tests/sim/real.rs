//! The stand-in beside the real Cloud Hypervisor: the same requests, the same answers.

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use super::process::{Answer, Scratch, Vmm};

/// The real binary, or why there is none to compare with.
fn real() -> Result<Vmm, String> {
    let output = Command::new("cloud-hypervisor").arg("--version").output();
    let output = output.map_err(|error| format!("no cloud-hypervisor on PATH: {error}"))?;
    let version = String::from_utf8_lossy(&output.stdout);
    if !version.starts_with("cloud-hypervisor v53.") {
        return Err(format!("not v53: {}", version.trim()));
    }
    std::fs::File::open("/dev/kvm").map_err(|error| format!("/dev/kvm: {error}"))?;
    if rewake::probe_guest::ELF.is_none() {
        return Err("the probe guest was not built".to_owned());
    }
    Ok(Vmm::spawn(Scratch::new(), Command::new("cloud-hypervisor")))
}

/// What may differ between the two runs: their directories, and who they are.
fn comparable(answer: &Answer, scratch: &Path) -> Answer {
    let mut body = answer.body.replace(scratch.to_str().unwrap(), "SCRATCH");
    if let Ok(Value::Object(mut map)) = serde_json::from_str(&body) {
        map.remove("build_version");
        map.remove("pid");
        // BARs are where this machine's address width puts them.
        map.remove("device_tree");
        // Latencies that were never measured.
        for value in map.values_mut().filter_map(Value::as_object_mut) {
            value.retain(|key, _| !key.contains("latency"));
        }
        body = Value::Object(map).to_string();
    }
    // Where in the text a type was wrong is not reproduced.
    while let Some(start) = body.find(" at line ") {
        let end = body[start..]
            .find('"')
            .map_or(body.len(), |len| start + len);
        body.replace_range(start..end, "");
    }
    Answer {
        status: answer.status,
        body,
    }
}

fn sequence(vmm: &mut Vmm) -> Vec<(String, Answer)> {
    let scratch = vmm.scratch.path("");
    let path = |name: &str| scratch.join(name);
    std::fs::write(path("kernel"), rewake::probe_guest::ELF.unwrap()).unwrap();
    std::fs::write(path("disk"), vec![0; 1 << 20]).unwrap();
    let config = |extra: Value| {
        let mut config = json!({
            "payload": {"kernel": path("kernel")}, "memory": {"size": 64 << 20, "thp": false},
            "cpus": {"boot_vcpus": 1, "max_vcpus": 1},
            "serial": {"mode": "Off"}, "console": {"mode": "Off"},
        });
        for (key, value) in extra.as_object().unwrap() {
            config[key] = value.clone();
        }
        config
    };
    let dir = |name: &str, files: &[(&str, &str)]| {
        let url = vmm.scratch.url(name);
        for (file, text) in files {
            std::fs::write(scratch.join(name).join(file), text).unwrap();
        }
        json!({"source_url": url})
    };
    let good = "{\"payload\":{\"kernel\":\"k\"}}";
    let both = json!({"source_url": vmm.scratch.url("d"), "memory_restore_mode": "OnDemand", "prefault": true});
    std::fs::write(path("d").join("config.json"), good).unwrap();
    let disk = json!([{"path": path("disk"), "image_type": "Raw"}]);
    let boots = [
        config(json!({})),
        config(json!({"disks": [{"path": path("nothing"), "image_type": "Raw"}]})),
        config(
            json!({"disks": [{"path": path("disk"), "id": "a", "image_type": "Raw"}, {"path": path("disk"), "id": "a", "image_type": "Raw"}]}),
        ),
        config(json!({"vsock": {"cid": 2, "socket": path("v")}})),
        config(json!({"cpus": {"boot_vcpus": 2, "max_vcpus": 1}})),
        config(json!({"memory": {"size": 0}})),
        config(json!({"memory": {"size": 1 << 20, "zones": [{"id": "mem0", "size": 64 << 20}]}})),
        config(json!({"balloon": {"size": 1_u64 << 40}})),
        config(json!({"payload": {}})),
        config(json!({"rng": {"src": path("nothing")}})),
    ];
    let mut steps: Vec<(&str, &str, Option<Value>)> = vec![
        ("GET", "vmm.ping", None),
        ("GET", "vm.info", None),
        ("GET", "vm.counters", None),
        ("GET", "vm.boot", None),
        ("PUT", "vmm.ping", None),
        ("PATCH", "vm.info", None),
        ("PATCH", "vm.resize", None),
        ("PUT", "vm.create", None),
        ("PUT", "vm.restore", None),
        ("PUT", "vm.pause", Some(json!({}))),
    ];
    for endpoint in [
        "vm.boot",
        "vm.pause",
        "vm.resume",
        "vm.shutdown",
        "vm.reboot",
        "vm.nmi",
        "vm.power-button",
        "vm.delete",
        "vm.coredump",
    ] {
        steps.push(("PUT", endpoint, None));
    }
    steps.extend([
        ("PUT", "vm.resize", Some(json!({}))),
        (
            "PUT",
            "vm.snapshot",
            Some(json!({"destination_url": "file:///"})),
        ),
        ("PUT", "vm.snapshot", Some(json!({}))),
        ("PUT", "vm.add-disk", Some(json!({"path": "/x"}))),
        ("PUT", "vm.add-net", Some(json!({"tap": "t"}))),
        ("PUT", "vm.remove-device", Some(json!({"id": "x"}))),
        ("PUT", "vm.restore", Some(json!({}))),
        ("PUT", "vm.restore", Some(json!({"source_url": "/x"}))),
        (
            "PUT",
            "vm.restore",
            Some(json!({"source_url": "file:///nonexistent"})),
        ),
        ("PUT", "vm.restore", Some(dir("a", &[]))),
        (
            "PUT",
            "vm.restore",
            Some(dir("b", &[("config.json", "{oops")])),
        ),
        (
            "PUT",
            "vm.restore",
            Some(dir(
                "c",
                &[("config.json", "{\"memory\":{\"size\":\"x\"}}")],
            )),
        ),
        (
            "PUT",
            "vm.restore",
            Some(dir("e", &[("config.json", good)])),
        ),
        (
            "PUT",
            "vm.restore",
            Some(dir("f", &[("config.json", good), ("state.json", "{oops")])),
        ),
        ("PUT", "vm.restore", Some(both)),
    ]);
    for boot in boots {
        steps.push(("PUT", "vm.create", Some(boot)));
        steps.push(("GET", "vm.info", None));
        steps.push(("PUT", "vm.boot", None));
        steps.push(("GET", "vm.counters", None));
        steps.push(("PUT", "vm.delete", None));
    }
    let whole = config(
        json!({"disks": disk, "balloon": {"size": 0}, "vsock": {"cid": 3, "socket": path("v")}}),
    );
    steps.extend([
        ("PUT", "vm.create", Some(whole.clone())),
        ("PUT", "vm.create", Some(whole)),
        ("PUT", "vm.resize", Some(json!({"desired_balloon": 4096}))),
        ("PUT", "vm.boot", None),
        ("PUT", "vm.boot", None),
        ("GET", "vm.info", None),
        ("GET", "vm.counters", None),
        ("PUT", "vm.resume", None),
        ("PUT", "vm.resize", Some(json!({"desired_balloon": 0}))),
        ("PUT", "vm.resize", Some(json!({"desired_ram": 128 << 20}))),
        ("PUT", "vm.resize", Some(json!({"desired_balloon": "x"}))),
        ("PUT", "vm.remove-device", Some(json!({"id": "zz"}))),
        (
            "PUT",
            "vm.snapshot",
            Some(json!({"destination_url": "file:///"})),
        ),
        ("PUT", "vm.pause", None),
        ("PUT", "vm.pause", None),
        ("GET", "vm.info", None),
        ("PUT", "vm.snapshot", Some(json!({"destination_url": "/x"}))),
        (
            "PUT",
            "vm.snapshot",
            Some(json!({"destination_url": "file:///nonexistent"})),
        ),
        ("PUT", "vm.resume", None),
        ("PUT", "vm.shutdown", None),
        ("GET", "vm.info", None),
        ("PUT", "vm.pause", None),
        (
            "PUT",
            "vm.restore",
            Some(json!({"source_url": "file:///nonexistent"})),
        ),
        ("PUT", "vm.delete", None),
    ]);
    let mut answers = Vec::new();
    for (number, (method, endpoint, body)) in steps.into_iter().enumerate() {
        let answer = vmm.call(method, endpoint, body.as_ref());
        let name = format!("{number} {method} {endpoint} {}", body.unwrap_or_default());
        let name = name.replace(scratch.to_str().unwrap(), "SCRATCH");
        answers.push((name, comparable(&answer, &scratch)));
    }
    answers
}

#[test]
fn kvm_answers_what_the_real_one_answers() {
    let mut original = match real() {
        Ok(vmm) => vmm,
        Err(reason) => {
            eprintln!("SKIP kvm_answers_what_the_real_one_answers: {reason}");
            return;
        }
    };
    let mut stand_in = Vmm::spawn(
        Scratch::new(),
        Command::new(env!("CARGO_BIN_EXE_rewake-sim")),
    );
    let wanted = sequence(&mut original);
    let given = sequence(&mut stand_in);
    assert_eq!(wanted.len(), given.len());
    // Some kernels cannot save a vCPU; the real one then gets no further than that.
    let cannot_save = |answer: &Answer| answer.body.contains("GetNestedState");
    let mut blind = false;
    for (wanted, given) in wanted.iter().zip(&given) {
        if cannot_save(&wanted.1) {
            blind = true;
            assert_eq!(wanted.1.status, given.1.status, "{}", wanted.0);
        } else {
            assert_eq!(wanted, given);
        }
    }
    let seen = |names: Vec<String>| -> Vec<String> {
        let mut names = names;
        names.retain(|name| !blind || name != "vm/snapshotted");
        names
    };
    assert_eq!(seen(original.event_names()), seen(stand_in.event_names()));
}
