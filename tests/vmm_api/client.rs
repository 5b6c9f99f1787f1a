//! The client against a server that misbehaves on order.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rewake::deadline::Deadline;
use rewake::vm_config::NetConfig;
use rewake::vmm::api::{ApiError, Client, RestoreConfig, RestoredNet, Version};
use rewake::wire::conn::Stream;

use crate::scratch::Scratch;
use crate::server::{OK, Received, Reply, Server, answer, ping};
use crate::soon;

/// A server with a script, and a client that has not connected yet.
fn pair(
    scratch: &Scratch,
    version: Version,
    script: impl Fn(usize, &Received) -> Reply + Send + 'static,
) -> (Server, Client) {
    let socket = scratch.path("api.sock");
    let server = Server::start(&socket, script);
    (server, Client::assuming(socket, version))
}

#[test]
fn one_connection_serves_all_calls() {
    let scratch = Scratch::new();
    let (server, mut client) = pair(&scratch, Version::V53, |_, _| Reply::Bytes(OK.to_vec()));
    for _ in 0..50 {
        client.pause(soon()).unwrap();
        client.resume(soon()).unwrap();
    }
    let received = server.received();
    assert_eq!(received.len(), 100);
    for request in received {
        assert_eq!(request.connection, 0);
        assert!(request.body.is_empty());
        assert!(!request.half_closed);
    }
}

#[test]
fn the_version_is_learnt_once() {
    for (told, version) in [
        ("53.0.0", Some(Version::V53)),
        ("50.1.0", "50.1".parse().ok()),
        ("60.2.0-dirty", "60.2".parse().ok()),
        ("next\u{1b}[2J", None),
    ] {
        let scratch = Scratch::new();
        let socket = scratch.path("api.sock");
        let escaped = told.replace('\u{1b}', "\\u001b");
        let server = Server::start(&socket, move |_, _| Reply::Bytes(ping(&escaped)));
        let client = Client::connect(&socket, soon());
        assert_eq!(server.lines(), [(0, "GET /api/v1/vmm.ping".to_owned())]);
        match client {
            Ok(client) => assert_eq!(Some(client.version()), version, "{told:?}"),
            Err(error) => {
                assert!(
                    matches!(error, ApiError::UnreadableVersion { .. }),
                    "{error:?}"
                );
                assert!(!error.to_string().contains('\u{1b}'));
                assert_eq!(version, None, "{told:?}");
            }
        }
    }
}

#[test]
fn a_new_connection_follows_every_doubtful_answer() {
    let too_many = "{ \"error\": \"Too many open connections\" }";
    let parser =
        "{ \"error\": \"Invalid request.\nAll previous unanswered requests will be dropped.\" }";
    // The answer, and the connection on which the call after it comes.
    let cases: [(&str, Vec<u8>, bool, usize); 9] = [
        ("success", OK.to_vec(), false, 0),
        ("refusal", answer(500, "[\"no\"]"), false, 0),
        ("not found", answer(404, "[\"no\"]"), false, 0),
        ("bad request", answer(400, parser), false, 1),
        ("too many connections", answer(503, too_many), true, 1),
        ("success and close", OK.to_vec(), true, 1),
        ("garbage", b"HELLO\r\n\r\n".to_vec(), false, 1),
        ("two answers", [OK, OK].concat(), false, 1),
        ("nothing", Vec::new(), true, 1),
    ];
    for (name, bytes, close, next) in cases {
        let scratch = Scratch::new();
        let (server, mut client) = pair(&scratch, Version::V53, move |count, _| match count {
            0 if close => Reply::Last(bytes.clone()),
            0 => Reply::Bytes(bytes.clone()),
            _ => Reply::Bytes(OK.to_vec()),
        });
        let first = client.pause(soon());
        assert_eq!(
            first.is_ok(),
            name.contains("success") || name == "two answers",
            "{name}: {first:?}"
        );
        if close {
            server.await_close();
        }
        client.resume(soon()).unwrap();
        let expected = [
            (0, "PUT /api/v1/vm.pause".to_owned()),
            (next, "PUT /api/v1/vm.resume".to_owned()),
        ];
        assert_eq!(server.lines(), expected, "{name}");
        if let Err(error) = first {
            assert_eq!(
                error.is_too_many_connections(),
                name == "too many connections"
            );
            assert_eq!(
                error.is_disconnected(),
                name == "nothing",
                "{name}: {error:?}"
            );
            assert_eq!(
                error.may_have_run(),
                ["garbage", "nothing"].contains(&name),
                "{name}"
            );
        }
    }
}

#[test]
fn a_late_answer_is_not_taken_for_the_next_one() {
    let scratch = Scratch::new();
    let (server, mut client) = pair(&scratch, Version::V53, |count, _| match count {
        0 => Reply::Silence,
        _ => Reply::Bytes(OK.to_vec()),
    });
    let begin = Instant::now();
    let error = client
        .pause(Deadline::after(Duration::from_millis(50)))
        .unwrap_err();
    assert!(error.is_timeout() && error.may_have_run(), "{error:?}");
    let took = begin.elapsed();
    assert!(
        took >= Duration::from_millis(50) && took < Duration::from_secs(5),
        "{took:?}"
    );
    client.resume(soon()).unwrap();
    let connections: Vec<_> = server
        .lines()
        .into_iter()
        .map(|(connection, _)| connection)
        .collect();
    assert_eq!(connections, [0, 1]);
}

#[test]
fn an_answer_without_end_is_refused() {
    for (name, head, filler) in [
        (
            "body",
            "HTTP/1.1 500 \r\nContent-Length: 99999999\r\n\r\n",
            "x",
        ),
        ("headers", "HTTP/1.1 500 \r\n", "A: b\r\n"),
        ("status line", "HTTP/1.1 500 ", "x"),
    ] {
        let scratch = Scratch::new();
        let bytes = [head, &filler.repeat(100_000)].concat().into_bytes();
        let (_server, mut client) = pair(&scratch, Version::V53, move |_, _| {
            Reply::Last(bytes.clone())
        });
        let error = client.pause(soon()).unwrap_err();
        assert!(
            matches!(error, ApiError::NoAnswer { .. }),
            "{name}: {error:?}"
        );
        assert!(!error.is_timeout(), "{name}: {error:?}");
    }
}

#[test]
fn a_process_that_is_gone_is_told_from_a_slow_one() {
    let scratch = Scratch::new();
    let mut client = Client::assuming(scratch.path("nobody.sock"), Version::V53);
    let error = client.pause(soon()).unwrap_err();
    assert!(
        error.is_disconnected() && !error.may_have_run(),
        "{error:?}"
    );

    let stale = scratch.path("stale.sock");
    drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
    let error = Client::connect(&stale, soon()).unwrap_err();
    assert!(
        error.is_disconnected() && !error.may_have_run(),
        "{error:?}"
    );
}

fn same_file(a: impl AsFd, b: impl AsFd) -> bool {
    let identity = |fd| rustix::fs::fstat(fd).map(|stat| (stat.st_dev, stat.st_ino));
    identity(a.as_fd()) == identity(b.as_fd())
}

#[test]
fn descriptors_arrive_in_order_with_their_request_only() {
    let scratch = Scratch::new();
    let files: Vec<File> = ["a", "b", "c"]
        .map(|name| File::create(scratch.path(name)).unwrap())
        .into();
    let (server, mut client) = pair(&scratch, Version::V53, |_, _| Reply::Bytes(OK.to_vec()));
    let net = |id: &str, num_fds| RestoredNet {
        id: id.to_owned(),
        num_fds,
    };
    let config = RestoreConfig {
        source_url: "file:///s".to_owned(),
        net_fds: Some(vec![net("_net1", 2), net("_net2", 1)]),
        ..RestoreConfig::default()
    };
    client.pause(soon()).unwrap();
    let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
    client.restore(&config, &fds, soon()).unwrap();
    client.resume(soon()).unwrap();
    let tap = NetConfig::default();
    assert_eq!(client.add_net(&tap, &fds[..1], soon()).unwrap(), None);

    let received = server.received();
    let counts: Vec<_> = received.iter().map(|request| request.fds.len()).collect();
    assert_eq!(counts, [0, 3, 0, 1]);
    for (ours, theirs) in files.iter().zip(&received[1].fds) {
        assert!(same_file(ours, theirs));
    }
    assert!(same_file(&files[0], &received[3].fds[0]));
    let body: serde_json::Value = serde_json::from_slice(&received[1].body).unwrap();
    assert_eq!(body["net_fds"][0]["num_fds"], 2);
}

#[test]
fn nothing_is_sent_that_does_not_fit() {
    let scratch = Scratch::new();
    let (server, mut client) = pair(&scratch, Version::V51, |_, _| Reply::Bytes(OK.to_vec()));
    let file = File::create(scratch.path("a")).unwrap();
    let config = RestoreConfig {
        source_url: "file:///s".to_owned(),
        memory_restore_mode: rewake::vmm::api::MemoryRestoreMode::OnDemand,
        ..RestoreConfig::default()
    };
    for (name, refused) in [
        ("mode", client.restore(&config, &[], soon())),
        ("size", client.remove_device(&"x".repeat(60_000), soon())),
        ("path", client.snapshot(Path::new("relative"), soon())),
        (
            "descriptor",
            client
                .add_device(&Default::default(), Some(file.as_fd()), soon())
                .map(drop),
        ),
        (
            "version",
            client
                .add_generic_vhost_user(&Default::default(), soon())
                .map(drop),
        ),
    ] {
        let error = refused.unwrap_err();
        assert!(!error.may_have_run(), "{name}: {error:?}");
    }
    assert!(server.lines().is_empty());
}

#[test]
fn an_old_version_is_resumed_in_a_second_step() {
    let restore = |version, fail: bool| {
        let scratch = Scratch::new();
        let (server, mut client) = pair(&scratch, version, move |_, _| {
            Reply::Bytes(if fail {
                answer(500, "[\"no\"]")
            } else {
                OK.to_vec()
            })
        });
        let config = RestoreConfig {
            source_url: "file:///s".to_owned(),
            resume: true,
            ..RestoreConfig::default()
        };
        let restored = client.restore(&config, &[], soon());
        assert_eq!(restored.is_err(), fail);
        let lines = server.lines();
        lines.into_iter().map(|(_, line)| line).collect::<Vec<_>>()
    };
    let (first, second) = ("PUT /api/v1/vm.restore", "PUT /api/v1/vm.resume");
    assert_eq!(restore(Version::V53, false), [first]);
    assert_eq!(restore(Version::V51, false), [first, second]);
    assert_eq!(restore(Version::V51, true), [first]);
}

#[test]
fn a_connection_made_elsewhere_can_be_adopted() {
    let scratch = Scratch::new();
    let socket = scratch.path("api.sock");
    let server = Server::start(&socket, |count, _| match count {
        1 => Reply::Last(OK.to_vec()),
        _ => Reply::Bytes(OK.to_vec()),
    });
    let stream = Stream::from_connected(UnixStream::connect(&socket).unwrap()).unwrap();
    let mut client = Client::adopt(&socket, Version::V53, stream).unwrap();
    client.pause(soon()).unwrap();
    client.pause(soon()).unwrap();
    server.await_close();
    client.pause(soon()).unwrap();
    let connections: Vec<_> = server
        .lines()
        .into_iter()
        .map(|(connection, _)| connection)
        .collect();
    assert_eq!(connections, [0, 0, 1]);
}
