//! What the guest answers, without a machine.

use crate::agent::timestamp;
use crate::frames::{
    ACK, FIN, GUEST, GUEST_MAC, PSH, PaperGuest, RST, SYN, ipv4_frame, read_ipv4, slow_checksum,
    tcp_frame,
};
use crate::http::{Parsed, parse};
use crate::json::{Malformed, strings};

const HEALTH: &str = "GET /health HTTP/1.1\r\nHost: x\r\n\r\n";

fn body(answer: &str) -> &str {
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("content-length:"))
        .unwrap()
        .trim();
    assert_eq!(length.parse(), Ok(body.len()), "{answer}");
    body
}

#[test]
fn answers_arp_for_its_own_address_only() {
    for (name, address, answered) in [
        ("its own", GUEST, true),
        ("another", [169, 254, 0, 23], false),
    ] {
        let mut request = vec![0xff; 6];
        request.extend([
            2, 0xfc, 0, 0, 0, 6, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1, 2, 0xfc, 0, 0, 0, 6, 169, 254, 0, 22,
        ]);
        request.extend([0; 6]);
        request.extend(address);
        let reply = PaperGuest::new().send(&request);
        assert_eq!(reply.is_some(), answered, "{name}");
        if let Some(reply) = reply {
            assert_eq!(reply[..6], request[6..12]);
            assert_eq!(reply[20..32], [&[0, 2][..], &GUEST_MAC, &GUEST].concat());
            assert_eq!(reply[32..42], request[22..32]);
        }
    }
}

#[test]
fn echoes_pings_of_any_length() {
    for length in [8, 9, 15, 16, 64, 1480] {
        let mut ping: Vec<u8> = (0..length).map(|byte| (byte * 7) as u8).collect();
        ping[..4].copy_from_slice(&[8, 0, 0, 0]);
        let checksum = slow_checksum(&ping);
        ping[2..4].copy_from_slice(&checksum.to_be_bytes());
        let reply = PaperGuest::new()
            .send(&ipv4_frame(1, GUEST, &ping))
            .expect("an echo");
        let reply = read_ipv4(&reply, 1);
        assert_eq!(
            (reply[0], slow_checksum(reply), &reply[4..]),
            (0, 0, &ping[4..]),
            "{length}"
        );
    }
}

#[test]
fn says_nothing_to_what_is_not_for_it() {
    let good = tcp_frame(40000, 49983, 1, 0, SYN, b"");
    let mut cases = vec![("empty", Vec::new()), ("cut", good[..40].to_vec())];
    let mut change = |name, at: usize, value: u8| {
        let mut frame = good.clone();
        frame[at] = value;
        cases.push((name, frame));
    };
    change("IPv6", 12, 0x86);
    change("another version", 14, 0x55);
    change("a short header", 14, 0x44);
    change("a header beyond the packet", 14, 0x4f);
    change("a fragment", 20, 0x20);
    change("a later fragment", 21, 1);
    change("UDP", 23, 17);
    change("another address", 33, 99);
    change("a TCP header too long", 46, 0xf0);
    change("a TCP header too short", 46, 0x40);
    for (name, frame) in cases {
        assert_eq!(PaperGuest::new().send(&frame), None, "{name}");
    }
}

#[test]
fn answers_health_from_syn_to_last_ack() {
    let mut guest = PaperGuest::new();
    for port in 50000..50100 {
        let answer = guest.exchange(port, HEALTH);
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        assert_eq!(body(&answer), r#"{"version":"0.1.0-probe"}"#);
    }
}

#[test]
fn resets_what_it_does_not_know() {
    let mut guest = PaperGuest::new();
    let reset = guest.segment(40000, 5, 9, ACK, b"data").expect("a reset");
    assert_eq!((reset.flags, reset.sequence), (RST, 9));
    let reset = guest
        .send(&tcp_frame(40000, 80, 5, 0, SYN, b""))
        .expect("a reset");
    let reset = crate::frames::read_segment(&reset);
    assert_eq!((reset.flags, reset.acknowledged), (RST | ACK, 6));
    assert_eq!(guest.segment(40000, 5, 0, RST, b""), None);
    let next = guest.connect(40001, 100);
    assert_eq!(guest.segment(40001, 101, next, RST, b""), None);
    assert_eq!(
        guest.segment(40001, 101, next, ACK, b"x").map(|s| s.flags),
        Some(RST),
        "forgotten after a reset"
    );
}

#[test]
fn repeats_itself_when_its_peer_does() {
    let mut guest = PaperGuest::new();
    let first = guest.segment(40000, 7, 0, SYN, b"");
    assert_eq!(guest.segment(40000, 7, 0, SYN, b""), first, "the same SYN");
    let next = first.unwrap().sequence.wrapping_add(1);
    let answer = guest
        .segment(40000, 8, next, PSH | ACK, HEALTH.as_bytes())
        .unwrap();
    let counted = guest.agent.board.touched.len();
    assert_eq!(
        guest.segment(40000, 8, next, PSH | ACK, HEALTH.as_bytes()),
        Some(answer),
        "the same request"
    );
    assert_eq!(guest.agent.board.touched.len(), counted);
    // The last answer of a connection comes again with its FIN.
    let closing = "GET /health HTTP/1.1\r\nConnection: close\r\n\r\n";
    let mut guest = PaperGuest::new();
    let next = guest.connect(40000, 7);
    let answer = guest
        .segment(40000, 8, next, PSH | ACK, closing.as_bytes())
        .unwrap();
    assert_eq!(answer.flags, PSH | ACK | FIN);
    assert_eq!(
        guest.segment(40000, 8, next, PSH | ACK, closing.as_bytes()),
        Some(answer)
    );
}

#[test]
fn starts_anew_on_a_syn_from_a_port_it_remembers() {
    let mut guest = PaperGuest::new();
    guest.connect(40001, 1000);
    let next = guest.connect(40001, 777_000);
    let answer = guest
        .segment(40001, 777_001, next, PSH | ACK, HEALTH.as_bytes())
        .unwrap();
    assert!(answer.payload.starts_with(b"HTTP/1.1 200"));
}

#[test]
fn keeps_a_served_connection_through_a_storm_of_abandoned_ones() {
    let mut guest = PaperGuest::new();
    let mut next = guest.connect(40000, 100);
    let mut sequence = 101;
    for round in 0..3 {
        let answer = guest
            .segment(40000, sequence, next, PSH | ACK, HEALTH.as_bytes())
            .expect("an answer");
        assert!(answer.payload.starts_with(b"HTTP/1.1 200"), "round {round}");
        next = next.wrapping_add(answer.payload.len() as u32);
        sequence += HEALTH.len() as u32;
        for port in 0..500 {
            guest
                .segment(41000 + port, 1, 0, SYN, b"")
                .expect("an answer to SYN");
        }
        assert!(
            guest
                .exchange(45000 + round, HEALTH)
                .starts_with("HTTP/1.1 200")
        );
    }
}

#[test]
fn takes_a_request_in_pieces_of_any_size() {
    let body = r#"{"lifecycle_id":"7f9c","timestamp":"2026-11-23T15:20:00.000000001Z"}"#;
    let request = format!(
        "POST /init HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    for size in 1..request.len() {
        let mut guest = PaperGuest::new();
        let next = guest.connect(40000, 0xffff_ff80);
        let mut sequence = 0xffff_ff81_u32;
        let mut answer = None;
        for piece in request.as_bytes().chunks(size) {
            let reply = guest
                .segment(40000, sequence, next, PSH | ACK, piece)
                .expect("an acknowledgement");
            sequence = sequence.wrapping_add(piece.len() as u32);
            assert_eq!(reply.acknowledged, sequence, "pieces of {size}");
            answer = Some(reply.payload);
        }
        assert!(
            answer.unwrap().starts_with(b"HTTP/1.1 204 "),
            "pieces of {size}"
        );
        let probe = guest.exchange(40001, "GET /probe HTTP/1.1\r\n\r\n");
        assert!(
            probe.contains(
                r#""lifecycle_id":"7f9c","generation":0,"timestamp_ns":1795447200000000001,"#
            ),
            "{probe}"
        );
    }
}

#[test]
fn answers_two_requests_of_one_segment() {
    let mut guest = PaperGuest::new();
    let next = guest.connect(40000, 1);
    let both = [
        HEALTH,
        "POST /snapshot/prepare HTTP/1.1\r\n\r\n",
        &HEALTH[..20],
    ]
    .concat();
    let answer = guest
        .segment(40000, 2, next, PSH | ACK, both.as_bytes())
        .unwrap()
        .payload;
    let answer = String::from_utf8(answer).unwrap();
    assert!(
        answer.starts_with("HTTP/1.1 200")
            && answer.contains("HTTP/1.1 204")
            && answer.ends_with("\r\n\r\n"),
        "{answer}"
    );
    let rest = &HEALTH[20..];
    let next = next.wrapping_add(answer.len() as u32);
    let answer = guest
        .segment(
            40000,
            2 + both.len() as u32,
            next,
            PSH | ACK,
            rest.as_bytes(),
        )
        .unwrap();
    assert!(answer.payload.starts_with(b"HTTP/1.1 200"));
    assert_eq!(
        guest.agent.board.touched,
        [0, 1, 2],
        "prepare armed three pages, the next health touched them"
    );
}

#[test]
fn answers_as_the_agent_does() {
    let json = "Content-Type: application/json\r\n";
    for (name, request, status) in [
        (
            "no body, no type",
            "POST /init HTTP/1.1\r\nContent-Length: 0\r\n\r\n".to_owned(),
            "204 ",
        ),
        (
            "body without type",
            with_body("/init", "", r#"{"lifecycle_id":"a"}"#),
            "204 ",
        ),
        ("an empty JSON body", with_body("/init", json, ""), "400 "),
        (
            "broken JSON",
            with_body("/init", json, r#"{"lifecycle_id":"#),
            "400 ",
        ),
        (
            "a wrong type",
            with_body("/init", json, r#"{"timestamp":1}"#),
            "422 ",
        ),
        (
            "another content type",
            with_body("/init", "Content-Type: text/plain\r\n", "{}"),
            "415 ",
        ),
        (
            "a charset",
            with_body(
                "/init",
                "content-type: application/json; charset=utf-8\r\n",
                "{}",
            ),
            "204 ",
        ),
        (
            "null and unknown",
            with_body(
                "/init",
                json,
                r#"{"lifecycle_id":null,"envVars":{"a":"}"},"x":[1]}"#,
            ),
            "204 ",
        ),
        (
            "a wrong method",
            "POST /health HTTP/1.1\r\n\r\n".to_owned(),
            "405 ",
        ),
        (
            "an unknown GET",
            "GET /files HTTP/1.1\r\n\r\n".to_owned(),
            "404 ",
        ),
        (
            "an unknown POST",
            "POST /files HTTP/1.1\r\n\r\n".to_owned(),
            "415 ",
        ),
        ("garbage", "GARBAGE\r\n\r\n".to_owned(), "400 "),
        (
            "chunked",
            "POST /init HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n".to_owned(),
            "400 ",
        ),
        (
            "too long",
            "POST /init HTTP/1.1\r\nContent-Length: 5000\r\n\r\n".to_owned(),
            "413 ",
        ),
        (
            "metrics",
            "GET /metrics HTTP/1.1\r\n\r\n".to_owned(),
            "200 ",
        ),
    ] {
        let answer = PaperGuest::new().exchange(40000, &request);
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status}")),
            "{name}: {answer}"
        );
    }
}

fn with_body(path: &str, headers: &str, body: &str) -> String {
    format!(
        "POST {path} HTTP/1.1\r\n{headers}Content-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

fn init(guest: &mut PaperGuest, id: &str, time: &str) {
    let body = format!(r#"{{"timestamp":"{time}","lifecycle_id":"{id}"}}"#);
    let request = with_body("/init", "Content-Type: application/json\r\n", &body);
    assert!(
        guest
            .exchange(40000, &request)
            .starts_with("HTTP/1.1 204 No Content\r\n")
    );
}

#[test]
fn walks_all_memory_once_per_lifecycle() {
    let mut guest = PaperGuest::new();
    let state = |guest: &mut PaperGuest, method: &str| {
        let answer = guest.exchange(41000, &format!("{method} /memory/preload HTTP/1.1\r\n\r\n"));
        body(&answer).to_owned()
    };
    let idle = r#"{"state":"idle","regions":0,"pages":0,"bytes":0,"elapsed_sec":0.000000,"source":"","error":null}"#;
    let done = r#"{"state":"done","regions":2,"pages":256,"bytes":1048576,"elapsed_sec":0.000256,"source":"ram","error":null}"#;
    init(&mut guest, "L1", "1795447294");
    assert_eq!(state(&mut guest, "GET"), idle);
    assert!(state(&mut guest, "POST").starts_with(r#"{"state":"running","regions":0,"pages":0,"#));
    guest.agent.advance();
    assert!(state(&mut guest, "GET").contains(r#""running","regions":0,"pages":64,"#));
    while guest.agent.advance() {}
    assert_eq!(state(&mut guest, "GET"), done);
    assert_eq!(
        state(&mut guest, "POST"),
        done,
        "a second start walks nothing"
    );
    init(&mut guest, "L1", "1795447295");
    assert_eq!(state(&mut guest, "GET"), done, "the same lifecycle");
    init(&mut guest, "L2", "1795440000");
    assert_eq!(
        state(&mut guest, "GET"),
        idle,
        "a new lifecycle, though its time is old"
    );
    assert!(
        guest
            .exchange(41000, "POST /memory/preload/cancel HTTP/1.1\r\n\r\n")
            .starts_with("HTTP/1.1 204")
    );
    guest.agent.board.read = 0;
    assert!(state(&mut guest, "POST").starts_with(r#"{"state":"running""#));
    guest.agent.advance();
    assert!(
        state(&mut guest, "POST").starts_with(r#"{"state":"cancelled","regions":2,"pages":64,"#)
    );
    let probe = guest.exchange(41000, "GET /probe HTTP/1.1\r\n\r\n");
    assert!(
        probe.contains(r#""lifecycle_id":"L2","generation":1,"timestamp_ns":1795447295000000000,"#),
        "{probe}"
    );
}

#[test]
fn an_init_with_an_old_time_begins_a_life_and_changes_nothing_else() {
    let mut guest = PaperGuest::new();
    let envs = |guest: &mut PaperGuest| {
        body(&guest.exchange(41000, "GET /envs HTTP/1.1\r\n\r\n")).to_owned()
    };
    let json = "Content-Type: application/json\r\n";
    for (name, body, id, generation) in [
        (
            "first",
            r#"{"sandbox_id":"s1","lifecycle_id":"L1","timestamp":"100"}"#,
            "s1",
            0,
        ),
        (
            "old",
            r#"{"sandbox_id":"s2","lifecycle_id":"L2","timestamp":"100"}"#,
            "s1",
            1,
        ),
        (
            "newer",
            r#"{"sandbox_id":"s3","lifecycle_id":"L2","timestamp":"101"}"#,
            "s3",
            1,
        ),
        ("without time", r#"{"sandbox_id":"s4"}"#, "s4", 1),
    ] {
        assert!(
            guest
                .exchange(40000, &with_body("/init", json, body))
                .starts_with("HTTP/1.1 204")
        );
        assert_eq!(
            envs(&mut guest),
            format!(r#"{{"WRENN_SANDBOX_ID":"{id}"}}"#),
            "{name}"
        );
        let probe = guest.exchange(40001, "GET /probe HTTP/1.1\r\n\r\n");
        assert!(
            probe.contains(&format!(r#""generation":{generation},"#)),
            "{name}: {probe}"
        );
    }
}

#[test]
fn touches_and_sums_as_many_pages_as_there_are() {
    let mut guest = PaperGuest::new();
    let mut ask = |request: &str| guest.exchange(40000, &format!("{request} HTTP/1.1\r\n\r\n"));
    assert_eq!(
        body(&ask("GET /probe/checksum?pages=2")),
        r#"{"pages":2,"checksum":"000000000000000c"}"#
    );
    assert_eq!(
        body(&ask("GET /probe/checksum")),
        r#"{"pages":4,"checksum":"00000000000004d2"}"#
    );
    assert_eq!(
        body(&ask("POST /probe/touch?x=1&pages=99")),
        r#"{"pages":4}"#
    );
    assert!(ask("POST /probe/arm?pages=1").starts_with("HTTP/1.1 204"));
    assert!(ask("GET /health").starts_with("HTTP/1.1 200"));
    assert!(ask("GET /health").starts_with("HTTP/1.1 200"));
    assert!(body(&ask("GET /probe")).ends_with(r#""pattern_pages":4,"touched_pages":5}"#));
    assert_eq!(guest.agent.board.touched, [0, 1, 2, 3, 0]);
}

#[test]
fn keeps_words_in_any_page_of_memory() {
    let mut guest = PaperGuest::new();
    let mut ask = |request: &str| guest.exchange(40000, &format!("{request} HTTP/1.1\r\n\r\n"));
    let written = ask("POST /probe/word?page=2&pages=3&value=70");
    let sum = rewake::probe_guest::checksum_of_words(70, 3);
    let expected = format!(r#"{{"pages":3,"checksum":"{sum:016x}"}}"#);
    assert_eq!(body(&written), expected);
    assert_eq!(body(&ask("GET /probe/word?page=2&pages=3")), expected);
    assert_ne!(body(&ask("GET /probe/word?page=1&pages=3")), expected);
    for (request, status) in [
        ("GET /probe/word", "400"),
        ("POST /probe/word?page=2", "400"),
        ("GET /probe/word?page=99", "404"),
        ("GET /probe/word?page=2&pages=99", "404"),
        ("PUT /probe/word?page=2", "405"),
    ] {
        let answer = ask(request);
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status}")),
            "{request}: {answer}"
        );
    }
    ask("POST /probe/word?page=1&pages=2&stride=5&value=9");
    assert_eq!(guest.agent.board.words[1..7], [9, 70, 71, 72, 0, 10]);
}

#[test]
fn reads_times_as_jiff_does() {
    for text in [
        "2026-11-23T15:20:00.000000001Z",
        "1970-01-01T00:00:00Z",
        "2000-02-29T23:59:59.5Z",
        "2100-03-01T00:00:00Z",
        "2024-12-31t12:00:00z",
        "2026-11-23T15:20:00+05:30",
        "2026-11-23T15:20:00.123456789-08:00",
        "2026-11-23T15:20:00.1234567Z",
        "2026-11-23T15:20:00.12345678Z",
        "2026-11-23T15:20:00.12345678+01:00",
    ] {
        let expected: jiff::Timestamp = text.parse().unwrap();
        assert_eq!(
            timestamp(text.as_bytes()).map(i128::from),
            Some(expected.as_nanosecond()),
            "{text}"
        );
    }
    assert_eq!(timestamp(b"1795447294"), Some(1_795_447_294_000_000_000));
    for text in [
        "",
        "now",
        "2026-11-23",
        "2026-13-23T15:20:00Z",
        "2026-11-23T15:20:00",
        "2026-11-23T15:20:00.Z",
        "2026-11-23T15:20:00.1234567",
        "2026-11-23T15:20:00.1234:678Z",
        "2026-11-23T15:20:00.1234/6789Z",
        "2026-1/-23T15:20:00Z",
        "2026-11-23T15:2::00Z",
        "-5",
        "99999999999999999999",
    ] {
        assert_eq!(timestamp(text.as_bytes()), None, "{text}");
    }
}

#[test]
fn strings_of_any_length_end_at_their_own_quotation_mark() {
    for length in 0..40 {
        // Letters beyond ASCII and every byte above the forbidden ones, but the two that count.
        let plain: String = "\u{e4} !#[]^~\u{7f}z"
            .chars()
            .cycle()
            .take(length)
            .collect();
        for at in (0..=plain.len()).filter(|at| plain.is_char_boundary(*at)) {
            let (before, after) = plain.split_at(at);
            let escaped = format!(r#"{before}\"{after}"#);
            let text = format!(r#"{{"a":"{plain}","b":"{escaped}"}}"#);
            let found = strings(text.as_bytes(), [b"a", b"b"]).unwrap();
            assert_eq!(found, [Some(plain.as_bytes()), Some(escaped.as_bytes())]);
            for bad in ['\0', '\n', '\u{1f}'] {
                let text = format!(r#"{{"a":"{before}{bad}{after}"}}"#);
                let refused = strings(text.as_bytes(), [b"a"]);
                assert_eq!(refused, Err(Malformed::Syntax), "{text:?}");
            }
        }
        let open = format!(r#"{{"a":"{plain}"#);
        assert_eq!(strings(open.as_bytes(), [b"a"]), Err(Malformed::Syntax));
    }
}

#[test]
fn never_panics_on_cut_or_bent_input() {
    let json = br#" { "a" : "x\"y" , "b":[{"c":"]"},-1.5e3,true], "d" : null } "#;
    assert_eq!(
        strings(json, [b"a", b"d", b"e"]),
        Ok([Some(&br#"x\"y"#[..]), None, None])
    );
    assert_eq!(strings(b"{}", [b"a"]), Ok([None]));
    assert_eq!(strings(br#"{"a":{}}"#, [b"a"]), Err(Malformed::WrongType));
    for cut in 0..json.len() - 2 {
        assert_eq!(
            strings(&json[..cut], [b"a"]),
            Err(Malformed::Syntax),
            "cut at {cut}"
        );
    }
    let deep = [&b"{\"x\":"[..], &[b'['; 100], &[b']'; 100], b"}"].concat();
    assert_eq!(strings(&deep, [b"a"]), Err(Malformed::Syntax), "too deep");
    let request = b"POST /init?a=b HTTP/1.1\r\ncontent-length: 3\r\nC: d\r\n\r\nabc";
    for cut in 0..request.len() {
        assert!(
            matches!(parse(&request[..cut], 4096), Parsed::Partial),
            "cut at {cut}"
        );
        for byte in [0, b'\n', b' ', b':', 0xff] {
            let mut bent = request.to_vec();
            bent[cut] = byte;
            let _ = parse(&bent, 4096);
        }
    }
}
