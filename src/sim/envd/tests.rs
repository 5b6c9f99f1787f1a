//! The recorded answers of the real agent (W-FC) and of the lab's newer one (W-CH).

use super::*;
use std::time::Duration;

struct Lab {
    clock: i64,
    pages: u64,
    unreadable: bool,
}

impl World for Lab {
    fn unix_ns(&self) -> i64 {
        self.clock
    }
    fn set_unix_ns(&mut self, ns: i64) {
        self.clock = ns;
    }
    fn ram_pages(&self) -> u64 {
        self.pages
    }
    fn ram_regions(&self) -> u64 {
        2
    }
    fn touch(&mut self, first: u64, _count: u64) -> Result<(), String> {
        if self.unreadable && first > 0 {
            return Err("/dev/mem: no; /proc/kcore: no".to_owned());
        }
        Ok(())
    }
    fn state(&mut self) -> Value {
        json!({})
    }
}

struct Peer {
    agent: Agent,
    lab: Lab,
    now: Instant,
}

impl Peer {
    fn new(dialect: Dialect) -> Self {
        let lab = Lab {
            clock: 1_795_447_294_000_000_000,
            pages: 10_240,
            unreadable: false,
        };
        Self {
            agent: Agent::new(dialect),
            lab,
            now: Instant::now(),
        }
    }

    /// Raw bytes in, raw bytes out, without the CORS headers and the date.
    fn raw(&mut self, request: &str) -> String {
        let mut conversation = Conversation::default();
        let answer = conversation.feed(request.as_bytes(), &mut self.agent, &mut self.lab);
        let text = String::from_utf8(answer).unwrap();
        let dropped = |line: &str| {
            line.starts_with("date: ")
                || http::CORS
                    .iter()
                    .any(|(name, _)| line.starts_with(&format!("{name}: ")))
        };
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
        let head: Vec<_> = head.split("\r\n").filter(|line| !dropped(line)).collect();
        format!("{}\r\n\r\n{body}", head.join("\r\n"))
    }

    fn status(&mut self, method: &str, path: &str) -> (u16, String) {
        let answer = self.raw(&format!("{method} {path} HTTP/1.1\r\nHost: g\r\n\r\n"));
        split(&answer)
    }

    fn init(&mut self, body: &str) -> (u16, String) {
        let length = body.len();
        let answer = self.raw(&format!(
            "POST /init HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
        ));
        split(&answer)
    }

    fn preload(&mut self, method: &str) -> Value {
        let (status, body) = self.status(method, "/memory/preload");
        assert_eq!(status, 200);
        serde_json::from_str(&body).unwrap()
    }

    fn steps(&mut self, count: u32, disturb: Disturb) {
        for _ in 0..count {
            self.now += Duration::from_millis(5);
            self.agent.advance(&mut self.lab, disturb, self.now);
        }
    }

    fn walk(&mut self) {
        self.steps(20, Disturb::default());
    }
}

fn split(answer: &str) -> (u16, String) {
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (
        head.split(' ').nth(1).unwrap().parse().unwrap(),
        body.to_owned(),
    )
}

const JSON: &str = "Content-Type: application/json\r\n";

#[test]
fn answers_byte_for_byte_as_recorded() {
    let text = "content-type: text/plain; charset=utf-8\r\n";
    let fresh = "HTTP/1.1 204 No Content\r\ncache-control: no-store\r\n\r\n";
    let init = |headers: &str, body: &str| {
        format!(
            "POST /init HTTP/1.1\r\nHost: g\r\n{headers}Content-Length: {}\r\n\r\n{body}",
            body.len()
        )
    };
    let cases = [
        ("health", "GET /health HTTP/1.1\r\nHost: g\r\n\r\n".to_owned(),
         "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncache-control: no-store\r\ncontent-length: 19\r\n\r\n{\"version\":\"0.2.0\"}".to_owned()),
        ("health, close", "GET /health HTTP/1.1\r\nConnection: close\r\n\r\n".to_owned(),
         "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncache-control: no-store\r\ncontent-length: 19\r\nconnection: close\r\n\r\n{\"version\":\"0.2.0\"}".to_owned()),
        ("prepare", "POST /snapshot/prepare HTTP/1.1\r\n\r\n".to_owned(), fresh.to_owned()),
        ("init without anything", init("", ""), fresh.to_owned()),
        ("init without content type", init("", "{\"envVars\":{\"B\":\"2\"}}"), fresh.to_owned()),
        ("init, charset", init("Content-Type: application/json; charset=utf-8\r\n", "{}"), fresh.to_owned()),
        ("init, unknown keys and null", init(JSON, "{\"x\":1,\"envVars\":null}"), fresh.to_owned()),
        ("init, empty body", init(JSON, ""),
         format!("HTTP/1.1 400 Bad Request\r\n{text}content-length: 86\r\n\r\nFailed to parse the request body as JSON: EOF while parsing a value at line 1 column 0")),
        ("init, torn", init(JSON, "{\"envVars\":"),
         format!("HTTP/1.1 400 Bad Request\r\n{text}content-length: 96\r\n\r\nFailed to parse the request body as JSON: envVars: EOF while parsing a value at line 1 column 11")),
        ("init, wrong type", init(JSON, "{\"envVars\":{\"A\":1}}"),
         format!("HTTP/1.1 422 Unprocessable Entity\r\n{text}content-length: 133\r\n\r\nFailed to deserialize the JSON body into the target type: envVars.A: invalid type: integer `1`, expected a string at line 1 column 17")),
        ("init, other content type", init("Content-Type: text/plain\r\n", "{}"),
         format!("HTTP/1.1 415 Unsupported Media Type\r\n{text}content-length: 54\r\n\r\nExpected request with `Content-Type: application/json`")),
        ("init, huge", init(JSON, &" ".repeat(3 << 20)),
         format!("HTTP/1.1 413 Payload Too Large\r\n{text}content-length: 56\r\n\r\nFailed to buffer the request body: length limit exceeded")),
        ("wrong method", "POST /health HTTP/1.1\r\n\r\n".to_owned(),
         "HTTP/1.1 405 Method Not Allowed\r\nallow: GET,HEAD\r\ncontent-length: 0\r\n\r\n".to_owned()),
        ("no preload", "GET /memory/preload HTTP/1.1\r\n\r\n".to_owned(),
         "HTTP/1.1 404 Not Found\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n45\r\n{\"code\":\"unimplemented\",\"message\":\"method not found: memory/preload\"}\r\n0\r\n\r\n".to_owned()),
        ("no preload, POST", "POST /memory/preload HTTP/1.1\r\nContent-Length: 0\r\n\r\n".to_owned(),
         "HTTP/1.1 415 Unsupported Media Type\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n".to_owned()),
        ("garbage", "GARBAGE\r\n\r\n".to_owned(),
         "HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".to_owned()),
    ];
    for (name, request, answer) in cases {
        assert_eq!(Peer::new(Dialect::WFc).raw(&request), answer, "{name}");
    }
}

#[test]
fn a_body_without_content_type_changes_nothing() {
    let mut peer = Peer::new(Dialect::WFc);
    peer.raw("POST /init HTTP/1.1\r\nContent-Length: 21\r\n\r\n{\"envVars\":{\"B\":\"2\"}}");
    assert_eq!(
        peer.status("GET", "/envs").1,
        "{\"WRENN_SANDBOX\":\"false\"}"
    );
    peer.init("{\"envVars\":{\"K\":\"V\"}}");
    assert_eq!(
        peer.status("GET", "/envs").1,
        "{\"K\":\"V\",\"WRENN_SANDBOX\":\"false\"}"
    );
}

#[test]
fn a_token_can_be_set_once_and_never_changed() {
    for (dialect, key) in [
        (Dialect::WFc, "accessToken"),
        (Dialect::WCh, "access_token"),
    ] {
        let mut peer = Peer::new(dialect);
        let mut set = |token: &str| {
            peer.init(&format!(
                "{{\"{key}\":\"{token}\",\"envVars\":{{\"G\":\"{token}\"}}}}"
            ))
        };
        assert_eq!(set("").0, 204);
        assert_eq!(set("tok-aaaa").0, 204);
        assert_eq!(
            set("tok-bbbb"),
            (401, "access token validation failed".to_owned())
        );
        assert_eq!(
            set(""),
            (401, "access token reset not authorized".to_owned())
        );
        assert_eq!(set("tok-aaaa").0, 204);
        assert_eq!(peer.init("{}").0, 204, "without the key nothing is checked");
        assert!(peer.status("GET", "/envs").1.contains("\"G\":\"tok-aaaa\""));
    }
}

#[test]
fn an_old_timestamp_is_accepted_and_nothing_applied() {
    let mut peer = Peer::new(Dialect::WCh);
    let at = |time: &str, var: &str| {
        format!("{{\"timestamp\":\"{time}\",\"envVars\":{{\"{var}\":\"1\"}}}}")
    };
    for (time, var, applied) in [
        ("2026-11-23T15:20:00.000000001Z", "FIRST", true),
        ("2026-11-23T15:20:00.000000001Z", "SAME", false),
        ("2001-01-01T00:00:00Z", "OLD", false),
        ("nonsense", "ODD", true),
        ("1795447294", "SECONDS", true),
    ] {
        assert_eq!(peer.init(&at(time, var)).0, 204);
        assert_eq!(
            peer.status("GET", "/envs").1.contains(var),
            applied,
            "{var}"
        );
    }
    assert_eq!(peer.init("{\"timestamp\":1}").0, 422);
    // The older agent reads seconds only, so other spellings never gate.
    let mut older = Peer::new(Dialect::WFc);
    older.init(&at("2026-11-23T15:20:00Z", "A"));
    older.init(&at("2001-01-01T00:00:00Z", "B"));
    assert!(older.status("GET", "/envs").1.contains('B'));
}

#[test]
fn the_preload_follows_the_recorded_sequence() {
    let mut peer = Peer::new(Dialect::WCh);
    let idle = "{\"state\":\"idle\",\"regions\":0,\"pages\":0,\"bytes\":0,\"elapsed_sec\":0.0,\"source\":\"\",\"error\":null}";
    assert_eq!(peer.status("GET", "/memory/preload").1, idle);
    peer.init("{\"lifecycle_id\":\"L1\"}");
    assert_eq!(peer.preload("POST")["state"], "running");
    peer.steps(3, Disturb::default());
    let running = peer.preload("POST");
    assert_eq!(
        (&running["state"], &running["pages"], &running["source"]),
        (&json!("running"), &json!(3072), &json!(""))
    );
    peer.walk();
    let done = peer.preload("GET");
    assert_eq!(
        (&done["state"], &done["pages"], &done["regions"]),
        (&json!("done"), &json!(10_240), &json!(2))
    );
    assert_eq!(done["bytes"], 41_943_040);
    assert_eq!(
        peer.preload("POST"),
        done,
        "nothing is walked twice in a lifecycle"
    );
    // A new id forgets it all; a walk in progress never publishes.
    peer.init("{\"lifecycle_id\":\"L2\"}");
    assert_eq!(peer.status("GET", "/memory/preload").1, idle);
    assert_eq!(peer.preload("POST")["state"], "running");
    peer.steps(2, Disturb::default());
    peer.init("{\"lifecycle_id\":\"L3\"}");
    peer.walk();
    let orphaned = peer.preload("GET");
    assert_eq!(
        (&orphaned["state"], &orphaned["pages"]),
        (&json!("idle"), &json!(2048)),
        "judge by state only"
    );
    // The same id resets nothing.
    peer.preload("POST");
    peer.init("{\"lifecycle_id\":\"L3\",\"timestamp\":\"2030-01-01T00:00:00Z\"}");
    assert_eq!(peer.preload("GET")["state"], "running");
    peer.walk();
    assert_eq!(peer.preload("GET")["state"], "done");
    assert_eq!(
        peer.status("POST", "/memory/preload/cancel"),
        (204, String::new())
    );
    assert_eq!(peer.preload("GET")["state"], "cancelled");
    assert_eq!(peer.preload("POST")["state"], "cancelled");
}

#[test]
fn a_cancel_before_the_walk_ends_it_at_once() {
    let mut peer = Peer::new(Dialect::WCh);
    peer.status("POST", "/memory/preload/cancel");
    assert_eq!(peer.preload("POST")["state"], "running");
    peer.walk();
    let wanted = "{\"state\":\"cancelled\",\"regions\":2,\"pages\":0,\"bytes\":0,\"elapsed_sec\":8e-6,\"source\":\"/proc/kcore\",\"error\":null}";
    assert_eq!(peer.status("GET", "/memory/preload").1, wanted);
}

#[test]
fn a_failed_walk_stays_failed() {
    for (unreadable, disturb) in [
        (true, Disturb::default()),
        (
            false,
            Disturb {
                fail: true,
                stall: false,
            },
        ),
    ] {
        let mut peer = Peer::new(Dialect::WCh);
        peer.lab.unreadable = unreadable;
        peer.preload("POST");
        peer.steps(20, disturb);
        let failed = peer.preload("GET");
        assert_eq!(
            (&failed["state"], &failed["pages"], &failed["source"]),
            (&json!("failed"), &json!(1024), &json!(""))
        );
        assert!(failed["error"].as_str().unwrap().contains("/dev/mem: "));
        assert_eq!(peer.preload("POST"), failed, "no retry");
    }
}

#[test]
fn a_stalled_walk_makes_no_progress() {
    let mut peer = Peer::new(Dialect::WCh);
    peer.preload("POST");
    peer.steps(1, Disturb::default());
    peer.steps(
        20,
        Disturb {
            fail: false,
            stall: true,
        },
    );
    let status = peer.preload("GET");
    assert_eq!(
        (&status["state"], &status["pages"]),
        (&json!("running"), &json!(1024))
    );
}

#[test]
fn the_first_lifecycle_is_only_recorded_and_the_next_sets_the_clock_back_too() {
    let mut peer = Peer::new(Dialect::WCh);
    peer.status("POST", "/snapshot/prepare");
    peer.init("{\"lifecycle_id\":\"L1\",\"timestamp\":\"2027-01-01T00:00:00Z\"}");
    assert_eq!(peer.lab.clock, 1_795_447_294_000_000_000);
    assert_eq!(peer.agent.summary()["ports_stopped"], true);
    peer.init("{\"lifecycle_id\":\"L2\",\"timestamp\":\"2001-01-01T00:00:00Z\",\"envVars\":{\"LATE\":\"1\"}}");
    assert_eq!(peer.lab.clock, 978_307_200_000_000_000);
    assert_eq!(peer.agent.summary()["ports_stopped"], false);
    assert!(
        !peer.status("GET", "/envs").1.contains("LATE"),
        "the gate comes after the lifecycle"
    );
}

#[test]
fn the_older_agent_is_undone_by_a_health_check() {
    let mut peer = Peer::new(Dialect::WFc);
    peer.status("POST", "/snapshot/prepare");
    assert_eq!(peer.agent.summary()["ports_stopped"], true);
    peer.status("GET", "/health");
    assert_eq!(peer.agent.summary()["ports_stopped"], false);
}

#[test]
fn wrong_methods_name_the_right_ones() {
    let mut peer = Peer::new(Dialect::WCh);
    for (method, path, allow) in [
        ("GET", "/memory/preload/cancel", "POST"),
        ("PUT", "/memory/preload", "GET,HEAD,POST"),
        ("GET", "/init", "POST"),
        ("DELETE", "/metrics", "GET,HEAD"),
    ] {
        let answer = peer.raw(&format!("{method} {path} HTTP/1.1\r\n\r\n"));
        let wanted = format!(
            "HTTP/1.1 405 Method Not Allowed\r\nallow: {allow}\r\ncontent-length: 0\r\n\r\n"
        );
        assert_eq!(answer, wanted, "{method} {path}");
    }
    let head = peer.raw("HEAD /health HTTP/1.1\r\n\r\n");
    assert!(head.ends_with("content-length: 19\r\n\r\n"), "{head}");
}

#[test]
fn e2b_says_204_for_health_and_its_version_on_init() {
    let mut peer = Peer::new(Dialect::E2b);
    let health = peer.raw("GET /health HTTP/1.1\r\n\r\n");
    assert!(
        health.starts_with(
            "HTTP/1.1 204 No Content\r\nCache-Control: no-store\r\nContent-Type: \r\n"
        ),
        "{health}"
    );
    let torn = peer.raw("POST /init HTTP/1.1\r\nContent-Length: 5\r\n\r\n{oops");
    assert!(
        torn.starts_with("HTTP/1.1 400 Bad Request\r\nX-Envd-Version: 0.6.13\r\n"),
        "{torn}"
    );
    let empty = peer.raw("POST /init HTTP/1.1\r\nContent-Length: 0\r\n\r\n");
    assert!(
        empty.starts_with("HTTP/1.1 204 No Content\r\nX-Envd-Version: 0.6.13\r\n"),
        "{empty}"
    );
    assert_eq!(
        peer.init("{\"ACCESSTOKEN\":\"t\",\"envVars\":{\"A\":\"1\"}}")
            .0,
        204
    );
    assert_eq!(peer.status("GET", "/envs").0, 401);
    let answer = peer.raw("GET /envs HTTP/1.1\r\nX-Access-Token: t\r\n\r\n");
    assert!(answer.ends_with("{\"A\":\"1\"}"), "{answer}");
    for body in ["{}", "{\"accessToken\":\"u\"}"] {
        assert_eq!(peer.init(body).0, 401, "{body}");
    }
    assert_eq!(peer.init("{\"accessToken\":\"\"}").0, 400);
}

#[test]
fn metrics_show_the_guest_clock() {
    let mut peer = Peer::new(Dialect::WCh);
    let (_, body) = peer.status("GET", "/metrics");
    assert!(
        body.starts_with(
            "{\"ts\":1795447294,\"cpu_count\":1,\"cpu_used_pct\":0.0,\"mem_total_mib\":40,"
        ),
        "{body}"
    );
    let answer = Conversation::default().feed(
        b"GET /health HTTP/1.1\r\n\r\n",
        &mut peer.agent,
        &mut peer.lab,
    );
    let answer = String::from_utf8(answer).unwrap();
    assert!(
        answer.contains("\r\ndate: Mon, 23 Nov 2026 15:21:34 GMT\r\n"),
        "{answer}"
    );
    assert!(
        answer.contains("\r\naccess-control-allow-origin: *\r\n"),
        "{answer}"
    );
}

#[test]
fn a_restored_agent_remembers() {
    let mut peer = Peer::new(Dialect::WCh);
    peer.init("{\"lifecycle_id\":\"L1\",\"access_token\":\"t\",\"envVars\":{\"A\":\"1\"}}");
    peer.preload("POST");
    peer.steps(2, Disturb::default());
    let image = serde_json::to_vec(&peer.agent).unwrap();
    peer.agent = serde_json::from_slice(&image).unwrap();
    peer.walk();
    assert_eq!(
        peer.preload("GET")["state"],
        "done",
        "the frozen walk goes on"
    );
    assert_eq!(peer.init("{\"access_token\":\"u\"}").0, 401);
    assert!(peer.status("GET", "/envs").1.contains("\"A\":\"1\""));
}
