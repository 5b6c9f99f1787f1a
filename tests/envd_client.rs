//! The client against a scripted agent: what it sends, what it repeats, what it refuses.

#![allow(clippy::unwrap_used, reason = "a test fails where it fails")]

mod fake_envd;

use std::collections::BTreeMap;
use std::error::Error;
use std::time::{Duration, Instant};

use fake_envd::{Act, Asked, FakeEnvd, json_answer};
use rewake::deadline::Deadline;
use rewake::envd::client::{Applied, Client, ClientError, ClientOptions, Incarnation};
use rewake::envd::dialect::{Dialect, Family};
use rewake::envd::init::{AccessToken, Init, Lifecycle};
use rewake::envd::reply::WalkState;
use rewake::ids::SandboxId;
use rewake::units::Bytes;

const INIT: &str = "POST /init";
const PRELOAD: &str = "GET /memory/preload";
const START: &str = "POST /memory/preload";

fn client_of(guest: &FakeEnvd, lifecycle: Lifecycle, options: ClientOptions) -> Client {
    let incarnation = Incarnation {
        sandbox: SandboxId::new("sb-1").unwrap(),
        lifecycle,
    };
    Client::new(guest.address, incarnation, options)
}

fn client(guest: &FakeEnvd) -> Client {
    client_of(guest, Lifecycle::random(), ClientOptions::default())
}

fn soon() -> Deadline {
    Deadline::after(Duration::from_secs(5))
}

#[test]
fn init_says_its_content_type_and_closes() {
    let guest = FakeEnvd::start(&[(INIT, &[Act::no_content()])]);
    let init = Init {
        env: BTreeMap::from([("K".into(), "V".into())]),
        ..Init::new()
    };
    let client = client_of(&guest, init.lifecycle, ClientOptions::default());
    let done = client.init(&init, soon()).unwrap();
    assert_eq!((done.lifecycle, done.attempts), (init.lifecycle, 1));
    let asked = &guest.asked()[0];
    assert!(
        asked.has_header("content-type: application/json"),
        "{}",
        asked.head
    );
    assert!(asked.has_header("connection: close"), "{}", asked.head);
    assert_eq!(asked.json()["envVars"]["K"], "V");
    assert_eq!(asked.json()["lifecycle_id"], init.lifecycle.to_string());
}

#[test]
fn init_is_repeated_with_the_same_id_and_a_later_time() {
    let cut = b"HTTP/1.1 204 No Con".to_vec();
    let guest = FakeEnvd::start(&[(
        INIT,
        &[
            Act::Close,
            Act::SendAndReset(cut),
            Act::status("503 Service Unavailable"),
            Act::status("502 Bad Gateway"),
            Act::no_content(),
        ],
    )]);
    let init = Init::new();
    let client = client_of(&guest, init.lifecycle, ClientOptions::default());
    let done = client.init(&init, soon()).unwrap();
    assert_eq!(done.attempts, 5);
    let bodies: Vec<_> = guest.asked().iter().map(Asked::json).collect();
    assert_eq!(bodies.len(), 5);
    for pair in bodies.windows(2) {
        assert_eq!(pair[0]["lifecycle_id"], pair[1]["lifecycle_id"]);
        let times = pair.iter().map(|body| body["timestamp"].as_str().unwrap());
        let times: Vec<jiff::Timestamp> = times.map(|time| time.parse().unwrap()).collect();
        assert!(times[0] < times[1]);
    }
    assert_eq!(guest.connections(), 5);
}

#[test]
fn statuses_that_repeating_cannot_cure_end_the_call_at_once() {
    for status in [
        "200 OK",
        "302 Found",
        "400 Bad Request",
        "401 Unauthorized",
        "405 Method Not Allowed",
        "413 Payload Too Large",
        "415 Unsupported Media Type",
        "422 Unprocessable Entity",
        "500 Internal Server Error",
    ] {
        let guest = FakeEnvd::start(&[(INIT, &[Act::status(status)])]);
        let init = Init::new();
        let client = client_of(&guest, init.lifecycle, ClientOptions::default());
        let error = client.init(&init, soon()).unwrap_err();
        let code: u16 = status[..3].parse().unwrap();
        assert_eq!(error.status(), Some(code), "{status}: {error}");
        assert_eq!(guest.asked().len(), 1, "{status}");
    }
}

#[test]
fn refusals_are_quoted_escaped_and_cut() {
    let text = format!("access token \u{1b}[31mfailed{}", "!".repeat(1000));
    let answer = format!(
        "HTTP/1.1 401 Unauthorized\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{text}",
        text.len()
    );
    let guest = FakeEnvd::start(&[(INIT, &[Act::Send(answer.into())])]);
    let init = Init::new();
    let client = client_of(&guest, init.lifecycle, ClientOptions::default());
    let shown = client.init(&init, soon()).unwrap_err().to_string();
    assert!(shown.contains("access token \\u{1b}[31mfailed"), "{shown}");
    assert!(shown.len() < 350, "{}", shown.len());
}

#[test]
fn an_answer_that_breaks_http_is_not_asked_for_again() {
    for (name, act) in [
        ("garbage", Act::Send(b"hello there\r\n\r\n".to_vec())),
        (
            "endless head",
            Act::Endless(b"HTTP/1.1 200 OK\r\nx: ".to_vec()),
        ),
        (
            "endless body",
            Act::Endless(b"HTTP/1.1 200 OK\r\n\r\n".to_vec()),
        ),
        (
            "two lengths",
            Act::Send(
                b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nx".to_vec(),
            ),
        ),
    ] {
        let guest = FakeEnvd::start(&[("GET /envs", &[act])]);
        let error = client(&guest).envs(soon()).unwrap_err();
        assert!(
            matches!(error, ClientError::Garbled(_)),
            "{name}: {error:?}"
        );
        assert!(error.source().is_some(), "{name}");
        assert_eq!(guest.asked().len(), 1, "{name}");
    }
}

#[test]
fn a_silent_agent_costs_the_deadline_and_not_more() {
    for (name, act) in [
        ("accept, then silence", Act::Silence),
        (
            "trickle",
            Act::Trickle(vec![b'H'; 500], Duration::from_millis(30)),
        ),
        (
            "late answer",
            Act::no_content().after(Duration::from_secs(2)),
        ),
    ] {
        let guest = FakeEnvd::start(&[(INIT, &[act])]);
        let init = Init::new();
        let client = client_of(&guest, init.lifecycle, ClientOptions::default());
        let begun = Instant::now();
        let limit = Duration::from_millis(200);
        let error = client.init(&init, Deadline::after(limit)).unwrap_err();
        let took = begun.elapsed();
        assert!(
            error.is_timeout() || matches!(error, ClientError::Garbled(_)),
            "{name}: {error:?}"
        );
        assert!(
            took < limit + Duration::from_millis(100),
            "{name}: {took:?}"
        );
    }
}

#[test]
fn a_refused_connection_is_tried_until_the_deadline() {
    let guest = FakeEnvd::start(&[]);
    let client = client(&guest);
    drop(guest);
    let begun = Instant::now();
    let error = client
        .health(Deadline::after(Duration::from_millis(150)))
        .unwrap_err();
    let ClientError::NoAnswer { attempts, last } = error else {
        panic!("{error:?}");
    };
    assert!(attempts >= 3, "{attempts}");
    assert!(last.is_some());
    assert!(begun.elapsed() < Duration::from_millis(250));
}

#[test]
fn a_slow_first_byte_is_waited_for() {
    let healthy = Act::json(r#"{"version":"0.2.0"}"#);
    let act = healthy.after(Duration::from_millis(300));
    let guest = FakeEnvd::start(&[("GET /health", &[act])]);
    let agent = client(&guest).health(soon()).unwrap();
    assert_eq!(agent.family, Family::Wrenn);
    assert_eq!(guest.asked().len(), 1);
}

#[test]
fn a_204_with_a_body_is_a_204() {
    let act = Act::Send(b"HTTP/1.1 204 No Content\r\n\r\nsurprise".to_vec());
    let guest = FakeEnvd::start(&[(INIT, &[act])]);
    let init = Init::new();
    let client = client_of(&guest, init.lifecycle, ClientOptions::default());
    assert_eq!(client.init(&init, soon()).unwrap().attempts, 1);
}

#[test]
fn a_client_serves_one_life_only() {
    let guest = FakeEnvd::start(&[(INIT, &[Act::no_content()])]);
    let client = client(&guest);
    let init = Init::new();
    let error = client.init(&init, soon()).unwrap_err();
    assert!(matches!(error, ClientError::OtherLife { .. }), "{error:?}");
    assert!(guest.asked().is_empty());
    client.reborn(init.lifecycle).init(&init, soon()).unwrap();
}

#[test]
fn a_guest_that_may_never_have_seen_an_id_is_sent_two() {
    let guest = FakeEnvd::start(&[(INIT, &[Act::no_content()])]);
    let init = Init {
        access_token: Some(AccessToken::new("tok-aaaa").unwrap()),
        sandbox_id: Some("sb-1".into()),
        ..Init::new()
    };
    let client = client_of(&guest, init.lifecycle, ClientOptions::default());
    client.init_twice(&init, soon()).unwrap();
    let bodies: Vec<_> = guest.asked().iter().map(Asked::json).collect();
    assert_eq!(bodies.len(), 2);
    assert_ne!(bodies[0]["lifecycle_id"], bodies[1]["lifecycle_id"]);
    assert_eq!(bodies[1]["lifecycle_id"], init.lifecycle.to_string());
    // E2B's agent takes a missing token for an order to clear it.
    assert_eq!(bodies[0]["accessToken"], "tok-aaaa");
    assert_eq!(bodies[0].get("sandbox_id"), None);
    assert!(bodies[0]["timestamp"].as_str() < bodies[1]["timestamp"].as_str());
}

#[test]
fn proof_of_an_init_is_in_the_environment() {
    let init = Init {
        sandbox_id: Some("sb-1".into()),
        env: BTreeMap::from([("K".into(), "V".into())]),
        ..Init::new()
    };
    let no = |name: &str, found: Option<&str>| Applied::No {
        name: name.into(),
        found: found.map(Into::into),
    };
    for (envs, verdict) in [
        (
            r#"{"K":"V","WRENN_SANDBOX_ID":"sb-1","X":"y"}"#,
            Applied::Yes,
        ),
        (
            r#"{"K":"V","WRENN_SANDBOX_ID":"sb-0"}"#,
            no("WRENN_SANDBOX_ID", Some("sb-0")),
        ),
        (r#"{"WRENN_SANDBOX_ID":"sb-1"}"#, no("K", None)),
    ] {
        let guest = FakeEnvd::start(&[("GET /envs", &[Act::json(envs)])]);
        assert_eq!(
            client(&guest).verify_applied(&init, soon()).unwrap(),
            verdict,
            "{envs}"
        );
    }
    let guest = FakeEnvd::start(&[]);
    let nothing = client(&guest).verify_applied(&Init::new(), soon()).unwrap();
    assert_eq!(nothing, Applied::NothingToTell);
    assert!(guest.asked().is_empty());
}

#[test]
fn dialects_are_told_apart_by_two_requests() {
    let wrenn = Act::json(r#"{"version":"0.3.0"}"#);
    let unimplemented = b"HTTP/1.1 404 Not Found\r\ncontent-type: application/json\r\n\
        transfer-encoding: chunked\r\n\r\n45\r\n\
        {\"code\":\"unimplemented\",\"message\":\"method not found: memory/preload\"}\r\n0\r\n\r\n";
    for (dialect, health, preload) in [
        (
            Dialect::WrennCloudHypervisor,
            wrenn.clone(),
            Act::walk("idle", 0),
        ),
        (
            Dialect::WrennFirecracker,
            wrenn,
            Act::Send(unimplemented.to_vec()),
        ),
        (Dialect::E2b, Act::no_content(), Act::Close),
    ] {
        let guest = FakeEnvd::start(&[("GET /health", &[health]), (PRELOAD, &[preload])]);
        assert_eq!(client(&guest).dialect(soon()).unwrap(), dialect);
    }
}

#[test]
fn a_preload_is_asked_for_before_it_is_started() {
    let guest = FakeEnvd::start(&[
        (PRELOAD, &[Act::walk("idle", 0)]),
        (START, &[Act::walk("running", 0)]),
    ]);
    let status = client(&guest).start_preload(soon()).unwrap();
    assert_eq!(status.state, WalkState::Running);
    assert_eq!(guest.lines(), [PRELOAD, START]);
    for status in ["404 Not Found", "415 Unsupported Media Type"] {
        let guest = FakeEnvd::start(&[(PRELOAD, &[Act::status(status)])]);
        let error = client(&guest).start_preload(soon()).unwrap_err();
        assert!(matches!(error, ClientError::NoPreload { .. }), "{error:?}");
        assert_eq!(guest.lines(), [PRELOAD], "{status}");
    }
}

#[test]
fn the_token_goes_with_everything_but_health() {
    let guest = FakeEnvd::start(&[
        ("GET /health", &[Act::no_content()]),
        ("GET /metrics", &[Act::json("{}")]),
        ("GET /activity", &[Act::json("{}")]),
        ("POST /snapshot/prepare", &[Act::no_content()]),
    ]);
    let options = ClientOptions {
        token: Some(AccessToken::new("tok-aaaa").unwrap()),
        ..ClientOptions::default()
    };
    let client = client_of(&guest, Lifecycle::random(), options);
    client.health(soon()).unwrap();
    client.metrics(soon()).unwrap();
    client.activity(soon()).unwrap();
    client.prepare_snapshot(Bytes::gib(1), soon()).unwrap();
    for asked in guest.asked() {
        let with_token = asked.has_header("x-access-token: tok-aaaa");
        assert_eq!(
            with_token,
            !asked.line.ends_with("/health"),
            "{}",
            asked.line
        );
    }
}

#[test]
fn a_kept_connection_that_died_costs_no_more_than_a_new_one() {
    use rewake::envd::hedge::Hedge;
    use rewake::envd::ready::Prober;
    use rewake::envd::socket::CurrentNetns;
    use rewake::envd::watch::drive_while_alive;
    use rewake::wire::reactor::TokenRange;
    use std::sync::Arc;

    let keep = json_answer(r#"{"version":"1"}"#, "keep-alive");
    for (name, health, connections) in [
        ("kept", Act::SendAndKeep(keep), 1),
        ("closed", Act::json(r#"{"version":"1"}"#), 2),
    ] {
        let guest = FakeEnvd::start(&[("GET /health", &[health]), (INIT, &[Act::no_content()])]);
        let tokens = TokenRange::new(0, Prober::TOKENS);
        let sockets = Arc::new(CurrentNetns);
        let hedge = Hedge::default();
        let prober = Prober::new(guest.address, sockets, hedge, true, soon(), tokens);
        let ready = drive_while_alive(&mut prober.unwrap(), None)
            .unwrap()
            .unwrap();
        let init = Init::new();
        let client = client_of(&guest, init.lifecycle, ClientOptions::default());
        let call = client.begin_init(&init, ready.connection, soon(), tokens);
        let done = drive_while_alive(&mut call.unwrap(), None)
            .unwrap()
            .unwrap();
        assert_eq!(done.lifecycle, init.lifecycle, "{name}");
        let asked = guest.asked_of(INIT);
        assert_eq!(asked.len(), 1, "{name}");
        let of_health = guest.asked_of("GET /health");
        let reused = of_health
            .iter()
            .any(|h| h.connection == asked[0].connection);
        assert_eq!(reused, connections == 1, "{name}");
    }
}

/// What an agent really sent, from `fixtures/envd`.
fn recorded(name: &str) -> Act {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/envd");
    let bytes = std::fs::read(path.join(name)).unwrap();
    match name.strip_suffix(".json") {
        Some(_) => Act::json(std::str::from_utf8(&bytes).unwrap()),
        None => Act::Send(bytes),
    }
}

#[test]
fn recorded_answers_are_understood() {
    let guest = FakeEnvd::start(&[
        ("GET /health", &[recorded("health.response")]),
        (INIT, &[recorded("init.response")]),
        ("GET /metrics", &[recorded("metrics.response")]),
        ("GET /activity", &[recorded("activity.json")]),
        ("GET /envs", &[recorded("envs.response")]),
        ("POST /snapshot/prepare", &[recorded("prepare.response")]),
        (PRELOAD, &[recorded("no-preload-get.response")]),
    ]);
    let init = Init {
        env: BTreeMap::from([("K".into(), "V".into())]),
        ..Init::new()
    };
    let client = client_of(&guest, init.lifecycle, ClientOptions::default());
    let version = client.version(soon()).unwrap().unwrap();
    assert_eq!(version.as_str(), "0.2.0");
    assert_eq!(client.dialect(soon()).unwrap(), Dialect::WrennFirecracker);
    client.init(&init, soon()).unwrap();
    assert_eq!(client.verify_applied(&init, soon()).unwrap(), Applied::Yes);
    let metrics = client.metrics(soon()).unwrap();
    assert_eq!(metrics.ts, Some(1_795_447_294));
    assert_eq!(metrics.mem_total, Some(25_276_502_016));
    assert_eq!(metrics.mem_cache, None);
    let activity = client.activity(soon()).unwrap();
    assert_eq!(activity.cpu_used_pct, Some(4.98));
    client.prepare_snapshot(Bytes::gib(1), soon()).unwrap();
}

#[test]
fn recorded_refusals_of_init_are_told_in_the_agents_words() {
    for (name, status, words) in [
        (
            "init-empty.response",
            400,
            "EOF while parsing a value at line 1 column 0",
        ),
        ("init-cut.response", 400, "envVars: EOF while parsing"),
        (
            "init-wrong-type.response",
            422,
            "invalid type: integer `1`, expected a string",
        ),
        (
            "init-other-type.response",
            415,
            "Expected request with `Content-Type",
        ),
        ("init-too-long.response", 413, "length limit exceeded"),
        (
            "init-token-refused.response",
            401,
            "access token validation failed",
        ),
        (
            "init-token-reset.response",
            401,
            "access token reset not authorized",
        ),
    ] {
        let guest = FakeEnvd::start(&[(INIT, &[recorded(name)])]);
        let init = Init::new();
        let client = client_of(&guest, init.lifecycle, ClientOptions::default());
        let error = client.init(&init, soon()).unwrap_err();
        assert_eq!(error.status(), Some(status), "{name}");
        assert!(error.to_string().contains(words), "{name}: {error}");
        assert_eq!(guest.asked().len(), 1, "{name}");
    }
}

#[test]
fn recorded_states_of_the_preload_are_read_by_their_state_alone() {
    for (name, state, pages) in [
        ("preload-idle.json", WalkState::Idle, 0),
        ("preload-stale-idle.json", WalkState::Idle, 20_480),
        ("preload-running.json", WalkState::Running, 29_696),
        ("preload-done.json", WalkState::Done, 101_376),
        ("preload-cancelled.json", WalkState::Cancelled, 0),
        ("preload-failed.json", WalkState::Failed, 20_480),
    ] {
        let guest = FakeEnvd::start(&[(PRELOAD, &[recorded(name)])]);
        let status = client(&guest).preload_status(soon()).unwrap();
        assert_eq!((status.state, status.pages), (state, pages), "{name}");
    }
    for (name, code) in [
        ("no-preload-get.response", 404),
        ("no-preload-post.response", 415),
    ] {
        let guest = FakeEnvd::start(&[(PRELOAD, &[recorded(name)])]);
        let error = client(&guest).preload_status(soon()).unwrap_err();
        assert!(
            matches!(error, ClientError::NoPreload { status } if status == code),
            "{name}"
        );
    }
}

#[test]
fn the_guests_fin_is_seen_before_a_call_returns() {
    // The agent answers, and closes its end a little later.
    let answer = b"HTTP/1.1 204 No Content\r\nconnection: close\r\n\r\n".to_vec();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let lag = Duration::from_millis(60);
    let server = std::thread::spawn(move || {
        use std::io::{Read, Write};
        let (mut stream, _) = listener.accept().unwrap();
        let mut request = [0; 1024];
        let _ = stream.read(&mut request).unwrap();
        stream.write_all(&answer).unwrap();
        std::thread::sleep(lag);
    });
    let incarnation = Incarnation {
        sandbox: SandboxId::random(),
        lifecycle: Lifecycle::random(),
    };
    let client = Client::new(address, incarnation, ClientOptions::default());
    let begun = Instant::now();
    client.prepare_snapshot(Bytes::gib(1), soon()).unwrap();
    assert!(begun.elapsed() >= lag, "{:?}", begun.elapsed());
    assert!(begun.elapsed() < lag + Duration::from_millis(200));
    server.join().unwrap();
}
