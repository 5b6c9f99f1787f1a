//! Every captured request of a real Cloud Hypervisor, and the answers it gave.

use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::process::{Vmm, event_names, read_response};

fn fixtures(release: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("fixtures/ch-{release}"))
}

/// What may differ: who it is, and the order of keys.
fn comparable(response: &[u8]) -> (String, Value) {
    let text = String::from_utf8_lossy(response);
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    let mut body: Value = serde_json::from_str(body).unwrap_or_else(|_| body.into());
    let is_json = body.is_object();
    if let Some(map) = body.as_object_mut() {
        map.remove("build_version");
        map.remove("pid");
    }
    // The length of what was just taken out.
    let keep = |line: &&str| !is_json || !line.starts_with("Content-Length");
    let head: Vec<_> = head.split("\r\n").filter(keep).collect();
    (head.join("\r\n"), body)
}

fn replay(release: &str, setting: &str) {
    let captures = fixtures(release).join("http");
    let mut names: Vec<_> = std::fs::read_dir(&captures)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter_map(|name| name.strip_suffix(".request").map(str::to_owned))
        .collect();
    names.sort_unstable();
    assert_eq!(names.len(), 31, "captures of {release}");
    let mut vmm = Vmm::start(&[setting, "fill-pages-per-ms=1000000"]);
    let kernel = vmm.scratch.path("probe.elf");
    std::fs::write(&kernel, "never read").unwrap();
    let lab = vmm.scratch.path("s1");
    std::fs::create_dir(&lab).unwrap();
    for name in names {
        let read = |kind: &str| std::fs::read(captures.join(format!("{name}.{kind}"))).unwrap();
        let request = String::from_utf8(read("request")).unwrap();
        let request = with_paths(&request, &kernel, &lab);
        let wanted = String::from_utf8(read("response")).unwrap();
        let wanted = wanted.replace("\"probe.elf\"", &format!("{kernel:?}"));
        let mut stream = vmm.connect();
        stream.write_all(request.as_bytes()).unwrap();
        // Two answers to two requests; one `100 Continue` before an answer.
        let answers = wanted.matches("HTTP/1.1 ").count();
        let pieces: Vec<&str> = wanted.split("HTTP/1.1 ").skip(1).collect();
        for piece in pieces.iter().take(answers) {
            let got = read_response(&mut stream).unwrap();
            let wanted = format!("HTTP/1.1 {piece}");
            assert_eq!(
                comparable(&got),
                comparable(wanted.as_bytes()),
                "{release} {name}"
            );
        }
    }
    assert_eq!(vmm.wait().code(), Some(0));
    let captured =
        std::fs::read_to_string(fixtures(release).join("events/boot-pause-snapshot.txt"));
    assert_eq!(
        vmm.event_names(),
        event_names(&captured.unwrap()),
        "{release}"
    );
}

/// The paths of this run in place of those of the capture, lengths corrected.
fn with_paths(request: &str, kernel: &Path, lab: &Path) -> String {
    let changed = request
        .replace("\"probe.elf\"", &format!("{kernel:?}"))
        .replace("/srv/rewake-lab/s1", lab.to_str().unwrap());
    let Some((head, body)) = changed.split_once("\r\n\r\n") else {
        return changed;
    };
    if changed == request {
        return changed;
    }
    let lines = head.split("\r\n").map(|line| {
        if line.starts_with("Content-Length") {
            format!("Content-Length: {}", body.len())
        } else {
            line.to_owned()
        }
    });
    format!("{}\r\n\r\n{body}", lines.collect::<Vec<_>>().join("\r\n"))
}

#[test]
fn answers_captured_requests_as_v53_did() {
    replay("v53", "version=53");
}

#[test]
fn answers_captured_requests_as_v52_did() {
    replay("v52", "version=52");
}

#[test]
fn the_eleventh_connection_is_turned_away() {
    let mut vmm = Vmm::start(&[]);
    let mut held = Vec::new();
    for _ in 0..10 {
        let mut stream = vmm.connect();
        stream
            .write_all(b"GET /api/v1/vmm.ping HTTP/1.1\r\n\r\n")
            .unwrap();
        read_response(&mut stream).unwrap();
        held.push(stream);
    }
    let got = read_response(&mut vmm.connect()).unwrap();
    let wanted = "HTTP/1.1 503\r\nServer: Firecracker API\r\nConnection: close\r\nContent-Length: 40\r\n\r\n{ \"error\": \"Too many open connections\" }";
    assert_eq!(String::from_utf8(got).unwrap(), wanted);
}

#[test]
fn a_half_closed_connection_gets_no_answer() {
    let mut vmm = Vmm::start(&[]);
    // Both must have happened before the server looks.
    vmm.call("GET", "vmm.ping", None);
    for _ in 0..10 {
        let mut stream = vmm.connect();
        stream
            .write_all(b"GET /api/v1/vmm.ping HTTP/1.1\r\n\r\n")
            .unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        // Closed with the request unread in it, so it is a reset more often than an end.
        if read_response(&mut stream).map_or(true, |bytes| bytes.is_empty()) {
            return;
        }
    }
    panic!("ten half-closed connections were all answered");
}
