//! Every captured exchange with a real Cloud Hypervisor, replayed through builders and
//! decoders; and what is refused before anything is sent.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::*;
use crate::vm_config::{
    BalloonConfig, ConsoleConfig, CpuProfile, CpusConfig, DeviceConfig, GenericVhostUserConfig,
    MemoryConfig, NetConfig, PayloadConfig, SerialConfig, VmConfig,
};
use crate::wire::http::{Limits, Method, Progress, Response, ResponseParser};

fn fixture(version: Version, name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fixtures")
        .join(format!("ch-v{}", version.major))
        .join("http")
        .join(name);
    fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn captured_answer(version: Version, name: &str, method: Method) -> Response {
    let bytes = fixture(version, &format!("{name}.response"));
    let mut parser = ResponseParser::new(method, Limits::VMM);
    let progress = parser.feed(&bytes).unwrap();
    let all = Progress::Complete {
        consumed: bytes.len(),
    };
    assert_eq!(progress, all, "{name}");
    parser.finish().unwrap()
}

/// Method, target and body of raw bytes.
fn split_request(bytes: &[u8]) -> (String, String, Vec<u8>) {
    let end = bytes.windows(4).position(|w| w == b"\r\n\r\n").unwrap();
    let head = std::str::from_utf8(&bytes[..end]).unwrap();
    let mut words = head.lines().next().unwrap().split(' ');
    let (method, target) = (words.next().unwrap(), words.next().unwrap());
    assert_eq!(words.next(), Some("HTTP/1.1"));
    (
        method.to_owned(),
        target.to_owned(),
        bytes[end + 4..].to_vec(),
    )
}

/// Checks that `call` asks for what was asked for in the capture, and reads its answer.
fn replay<T: Answer>(version: Version, name: &str, call: &Call<T>) -> Result<T, ApiError> {
    let captured = split_request(&fixture(version, &format!("{name}.request")));
    let sent = split_request(call.encode().unwrap().as_bytes());
    assert_eq!((&sent.0, &sent.1), (&captured.0, &captured.1), "{name}");
    assert_eq!(sent.2.is_empty(), captured.2.is_empty(), "{name}");
    if !captured.2.is_empty() {
        let json = |body: &[u8]| serde_json::from_slice::<Value>(body).unwrap();
        assert_eq!(json(&sent.2), json(&captured.2), "{name}");
    }
    call.decode(&captured_answer(version, name, call.operation().method()))
}

fn refusal<T: std::fmt::Debug>(answer: Result<T, ApiError>) -> (u16, Vec<String>, ApiError) {
    let error = answer.unwrap_err();
    let (status, texts) = (error.status(), error.chain().map(|c| c.texts().to_vec()));
    (status.unwrap(), texts.unwrap(), error)
}

const VERSIONS: [Version; 2] = [Version::V52, Version::V53];

fn restore_of(directory: &str) -> RestoreConfig {
    RestoreConfig {
        source_url: file_url(Path::new(directory)).unwrap(),
        ..RestoreConfig::default()
    }
}

#[test]
fn replays_the_calls_before_a_vm_exists() {
    for version in VERSIONS {
        let ping = replay(version, "01-ping", &Call::ping()).unwrap();
        assert_eq!(ping.parsed_version(), Ok(version));
        assert_eq!(ping.features, ["io_uring", "kvm"]);
        assert_eq!(ping.build_version, format!("v{}.0-dirty", version.major));

        let (status, texts, error) = refusal(replay(version, "02-info-no-vm", &Call::info()));
        let missing = if Features::of(version).missing_vm_is_404 {
            404
        } else {
            500
        };
        assert_eq!(status, missing);
        assert_eq!(
            texts,
            [
                "Error from API",
                "The VM info is not available",
                "VM is not created"
            ]
        );
        assert!(error.is_vm_missing() && !error.is_unknown_operation());

        let (status, texts, error) = refusal(replay(version, "03-pause-no-vm", &Call::pause()));
        assert_eq!(
            (status, texts[1].as_str()),
            (500, "The VM could not be paused")
        );
        assert!(error.is_not_running() && !error.is_vm_missing());

        let restore = Call::restore(&restore_of("/nonexistent"), 0, version).unwrap();
        let (status, texts, error) =
            refusal(replay(version, "06-restore-missing-dir", &restore.call));
        assert_eq!((status, texts.len()), (500, 5));
        assert!(error.says("Destination is not a directory: \"/nonexistent\""));
    }
}

#[test]
fn replays_the_life_of_a_vm() {
    for version in VERSIONS {
        let done = |name: &str, call: &Call<()>| replay(version, name, call).unwrap();
        let state = |name: &str| replay(version, name, &Call::info()).unwrap().state;
        let directory = Path::new("/srv/rewake-lab/s1");

        assert_eq!(state("13-info-created"), VmState::Created);
        done("14-boot", &Call::boot());
        let info = replay(version, "15-info-running", &Call::info()).unwrap();
        assert_eq!(
            (info.state, info.memory_actual_size),
            (VmState::Running, 128 << 20)
        );
        let tree = info.device_tree.unwrap();
        assert_eq!(
            tree["__balloon"].parent.as_deref(),
            Some("_virtio-pci-__balloon")
        );
        assert_eq!(
            tree["_virtio-pci-__rng"].pci_bdf.as_deref(),
            Some("0000:00:01.0")
        );
        let profile = (version == Version::V53).then_some(CpuProfile::Host);
        assert_eq!(info.config.cpus.profile, profile);

        assert!(
            replay(version, "16-counters", &Call::counters())
                .unwrap()
                .is_empty()
        );
        let deflate = Resize {
            desired_balloon: Some(0),
            ..Resize::default()
        };
        done("17-balloon-resize", &Call::resize(&deflate).unwrap());
        let call = Call::snapshot(Path::new("/tmp")).unwrap();
        let (status, texts, _) = refusal(replay(version, "18-snapshot-while-running", &call));
        assert_eq!(status, 500);
        assert_eq!(
            texts.last().unwrap(),
            "Trying to snapshot while VM is running"
        );

        done("19-pause", &Call::pause());
        let (_, _, error) = refusal(replay(version, "20-pause-twice", &Call::pause()));
        assert!(error.is_invalid_transition());
        done("21-snapshot", &Call::snapshot(directory).unwrap());
        let call = Call::snapshot(directory).unwrap();
        let (_, _, error) = refusal(replay(version, "22-snapshot-same-dir", &call));
        assert!(error.is_destination_taken());
        done("23-resume", &Call::resume());
        done("24-delete", &Call::delete());

        let mut restore = restore_of("/srv/rewake-lab/s1");
        let call = |config: &RestoreConfig| Call::restore(config, 0, version).unwrap();
        done("25-restore-paused", &call(&restore).call);
        assert_eq!(state("26-info-paused"), VmState::Paused);
        let again = replay(version, "27-restore-while-present", &call(&restore).call);
        assert!(refusal(again).2.is_already_created());
        done("28-shutdown-vm", &Call::shutdown());
        done("29-delete-2", &Call::delete());
        restore.memory_restore_mode = MemoryRestoreMode::OnDemand;
        restore.resume = true;
        assert!(call(&restore).then.is_none());
        done("30-restore-ondemand-resumed", &call(&restore).call);
        done("31-shutdown-vmm", &Call::shutdown_vmm());
    }
}

#[test]
fn replays_the_creation_of_a_vm() {
    let config = VmConfig {
        cpus: CpusConfig::default(),
        memory: MemoryConfig {
            size: 128 << 20,
            shared: true,
            thp: false,
            ..MemoryConfig::default()
        },
        payload: Some(PayloadConfig {
            kernel: Some(PathBuf::from("probe.elf")),
            ..PayloadConfig::default()
        }),
        serial: SerialConfig::OFF,
        console: ConsoleConfig::OFF,
        balloon: Some(BalloonConfig {
            deflate_on_oom: true,
            free_page_reporting: true,
            ..BalloonConfig::default()
        }),
        ..VmConfig::default()
    };
    for version in VERSIONS {
        // The capture leaves out what is CH's default; a configuration from here says it.
        let (_, _, body) = split_request(&fixture(version, "12-create.request"));
        assert_eq!(VmConfig::parse(&body).unwrap().0, config);
        let call = Call::create(&config).unwrap();
        let sent = split_request(call.encode().unwrap().as_bytes());
        assert_eq!(
            (sent.0.as_str(), sent.1.as_str()),
            ("PUT", "/api/v1/vm.create")
        );
        assert_eq!(VmConfig::parse(&sent.2).unwrap().0, config);
        call.decode(&captured_answer(version, "12-create", Method::Put))
            .unwrap();
    }
}

#[test]
fn reads_the_answers_to_broken_requests() {
    for version in VERSIONS {
        for (name, method, status, texts) in [
            ("04-unknown-path", Method::Get, 404, &["Not Found"][..]),
            (
                "05-bad-json",
                Method::Put,
                400,
                &[
                    "Failed to deserialize JSON",
                    "key must be a string at line 1 column 2",
                ],
            ),
            (
                "07-restore-bad-mode",
                Method::Put,
                400,
                &[
                    "Failed to deserialize JSON",
                    "unknown variant `ondemand`, expected `Copy` or `OnDemand` at line 1 column 71",
                ],
            ),
            (
                "08-parser-error",
                Method::Get,
                400,
                &[
                    "Invalid request.",
                    "All previous unanswered requests will be dropped.",
                ],
            ),
            (
                "09-post-method",
                Method::Post,
                400,
                &[
                    "Invalid HTTP Method: Unsupported HTTP method.",
                    "All previous unanswered requests will be dropped.",
                ],
            ),
        ] {
            let answer = captured_answer(version, name, method);
            let (got, chain, error) = refusal(Call::pause().decode(&answer));
            assert_eq!(got, status, "{name}");
            assert_eq!(chain, texts, "{name}");
            assert_eq!(error.is_unknown_operation(), status == 404, "{name}");
        }
        let answer = captured_answer(version, "11-expect-continue", Method::Put);
        let error = Call::resize(&Resize::default())
            .unwrap()
            .decode(&answer)
            .unwrap_err();
        assert!(error.is_vm_missing());
    }
}

#[test]
fn reads_the_info_of_a_linux_guest() {
    let body = fixture(Version::V53, "linux-guest-vm.info.json");
    let info = Call::info().decode(&answer(200, &body)).unwrap();
    assert_eq!(info.state, VmState::Running);
    assert_eq!(
        info.config.net.as_ref().unwrap()[0].tap.as_deref(),
        Some("tap0")
    );
    assert_eq!(info.config.vsock.as_ref().unwrap().cid, 3);
    assert_eq!(
        info.device_tree.as_ref().unwrap()["_disk0"].children,
        [""; 0]
    );
    // All of it is kept.
    let written = serde_json::to_value(&info).unwrap();
    assert_eq!(written, serde_json::from_slice::<Value>(&body).unwrap());
}

fn answer(status: u16, body: &[u8]) -> Response {
    let head = format!(
        "HTTP/1.1 {status} \r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    let mut parser = ResponseParser::new(Method::Put, Limits::VMM);
    parser.feed(head.as_bytes()).unwrap();
    if status != 204 {
        parser.feed(body).unwrap();
    }
    parser.finish().unwrap()
}

#[test]
fn tolerates_what_a_later_version_may_add_to_its_answers() {
    let body =
        br#"{"build_version":"v60.0","version":"60.0.0","pid":1,"features":[],"new":{"a":1}}"#;
    let ping = Call::ping().decode(&answer(200, body)).unwrap();
    assert_eq!(ping.parsed_version().unwrap().support(), Support::Newer);
    let body =
        br#"{"config":{"new_device":{"a":[1]}},"state":"Hibernated","memory_actual_size":1}"#;
    let info = Call::info().decode(&answer(200, body)).unwrap();
    assert_eq!(info.state, VmState::Unknown);
    Call::pause().decode(&answer(200, b"{\"new\":1}")).unwrap();
}

#[test]
fn success_without_the_promised_body_is_an_error() {
    let deep = "[".repeat(100);
    for (name, body) in [
        ("empty", ""),
        ("no JSON", "OK"),
        ("other shape", "[]"),
        ("deep", &deep),
    ] {
        let error = Call::ping()
            .decode(&answer(200, body.as_bytes()))
            .unwrap_err();
        assert!(
            matches!(error, ApiError::UnreadableAnswer { status: 200, .. }),
            "{name}: {error:?}"
        );
        assert!(error.may_have_run(), "{name}");
    }
    let added = Call::add_net(&NetConfig::default(), 0).unwrap();
    assert_eq!(added.decode(&answer(204, b"")).unwrap(), None);
    let device = added.decode(&answer(200, br#"{"id":"_net3","bdf":"0000:00:05.0"}"#));
    assert_eq!(device.unwrap().unwrap().bdf, "0000:00:05.0");
    assert!(added.decode(&answer(200, b"{}")).is_err());
}

#[test]
fn a_restore_is_fitted_to_the_version() {
    let mut config = restore_of("/s");
    config.resume = true;
    for (version, key, then) in [
        (Version::V50, None, true),
        (Version::V51, None, true),
        (Version::V52, Some(true), false),
        (Version::V53, Some(true), false),
    ] {
        let restore = Call::restore(&config, 0, version).unwrap();
        let body: Value = serde_json::from_slice(&restore.call.request().body).unwrap();
        assert_eq!(
            body.get("resume").and_then(Value::as_bool),
            key,
            "{version}"
        );
        let operation = restore.then.map(|call| call.operation());
        assert_eq!(operation, then.then_some(Operation::Resume), "{version}");
    }
    for (mode, version, known) in [
        (MemoryRestoreMode::OnDemand, Version::V51, false),
        (MemoryRestoreMode::OnDemand, Version::V52, true),
        (MemoryRestoreMode::CopyOnWrite, Version::V53, false),
        (MemoryRestoreMode::Copy, Version::V50, true),
    ] {
        config.memory_restore_mode = mode;
        let restore = Call::restore(&config, 0, version);
        assert_eq!(restore.is_ok(), known, "{mode:?} in {version}");
        if let Err(error) = restore {
            assert!(matches!(error, ApiError::Unsupported { .. }));
            assert!(error.to_string().contains(&version.to_string()), "{error}");
        }
    }
}

#[test]
fn descriptors_and_requests_must_fit_together() {
    let nets = |counts: &[usize]| RestoreConfig {
        net_fds: Some(
            counts
                .iter()
                .map(|count| RestoredNet {
                    id: "n".to_owned(),
                    num_fds: *count,
                })
                .collect(),
        ),
        ..restore_of("/s")
    };
    let restore = |config: &RestoreConfig, fds| Call::restore(config, fds, Version::V53).is_ok();
    assert!(restore(&nets(&[1, 2]), 3) && !restore(&nets(&[1, 2]), 2));
    assert!(!restore(&restore_of("/s"), 1));
    assert!(!restore(&nets(&[usize::MAX, 2]), 1));

    let net = NetConfig {
        num_queues: 4,
        fds: Some(vec![7, 8]),
        ..NetConfig::default()
    };
    let call = Call::add_net(&net, 2).unwrap();
    let body: Value = serde_json::from_slice(&call.request().body).unwrap();
    assert_eq!(body.get("fds"), None);
    assert!(Call::add_net(&net, 1).is_err() && Call::add_net(&net, 0).is_err());

    let by_path = DeviceConfig {
        path: Some(PathBuf::from("/sys/x")),
        ..DeviceConfig::default()
    };
    let opened = DeviceConfig::default();
    for (name, config, fds, version, fine) in [
        ("path", &by_path, 0, Version::V50, true),
        ("descriptor", &opened, 1, Version::V53, true),
        ("descriptor in v52", &opened, 1, Version::V52, false),
        ("nothing", &opened, 0, Version::V53, false),
        ("two", &opened, 2, Version::V53, false),
    ] {
        assert_eq!(
            Call::add_device(config, fds, version).is_ok(),
            fine,
            "{name}"
        );
    }
    let vhost = GenericVhostUserConfig::default();
    assert!(Call::add_generic_vhost_user(&vhost, Version::V51).is_err());
    assert!(Call::add_generic_vhost_user(&vhost, Version::V52).is_ok());
}

#[test]
fn refuses_bodies_that_the_server_would_refuse() {
    let of_size = |bytes: usize| {
        let empty = Call::remove_device("").unwrap().request().body.len();
        Call::remove_device(&"x".repeat(bytes - empty))
    };
    assert_eq!(
        of_size(MAX_BODY_BYTES).unwrap().request().body.len(),
        MAX_BODY_BYTES
    );
    let error = of_size(MAX_BODY_BYTES + 1).unwrap_err();
    assert!(
        matches!(
            error,
            ApiError::BodyTooLarge {
                bytes: 51_201,
                limit: 51_200,
                ..
            }
        ),
        "{error:?}"
    );
    assert!(!error.may_have_run());
}

#[test]
fn refuses_paths_that_cannot_be_sent() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    let foreign = Path::new(OsStr::from_bytes(b"/a\xff"));
    for path in [Path::new("relative"), Path::new(""), foreign] {
        assert!(
            matches!(Call::snapshot(path), Err(ApiError::Path { .. })),
            "{path:?}"
        );
    }
    assert_eq!(
        file_url(Path::new("/a b%20/ü")).unwrap(),
        "file:///a b%20/ü"
    );
    let payload = PayloadConfig {
        kernel: Some(foreign.into()),
        ..PayloadConfig::default()
    };
    let config = VmConfig {
        payload: Some(payload),
        ..VmConfig::default()
    };
    assert!(matches!(Call::create(&config), Err(ApiError::Body { .. })));
}

#[test]
fn every_operation_has_its_method_and_target() {
    let names: std::collections::BTreeSet<_> = Operation::ALL.iter().map(|o| o.name()).collect();
    assert_eq!((names.len(), Operation::ALL.len()), (31, 31));
    for operation in Operation::ALL {
        let get = matches!(
            operation,
            Operation::Ping | Operation::Info | Operation::Counters
        );
        assert_eq!(operation.method() == Method::Get, get, "{operation}");
        assert_eq!(operation.target(), format!("/api/v1/{}", operation.name()));
    }
}
