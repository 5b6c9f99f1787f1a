//! Heads of responses, judged by the codec and by httparse.
//!
//! Both see heads made by mutating real ones. Where the two may differ, the reason is one of
//! the deliberate rules below; everywhere else they must agree, on refusal as well as on
//! every name and value.

use httparse::Status;
use rewake::wire::http::{HttpError, Limits, Method, Progress, ResponseParser, Rule};

/// xorshift64*, seeded: the same heads on every run.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let number = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16;
        number as usize % end.max(1)
    }
}

/// Rules about framing, of which httparse, a parser of heads, knows nothing.
fn is_about_framing(rule: Rule) -> bool {
    matches!(
        rule,
        Rule::ContentLength
            | Rule::DuplicateLength
            | Rule::LengthAndCoding
            | Rule::TransferCoding
            | Rule::CodingBeforeHttp11
            | Rule::BodyForbidden
            | Rule::Upgrade
    )
}

/// Where we are stricter on purpose.
fn is_stricter(rule: Rule, head: &[u8]) -> bool {
    match rule {
        // httparse takes a bare LF as a line end.
        Rule::BareLf => true,
        // It takes 000 to 999.
        Rule::StatusCode => true,
        // It skips empty lines before the status line.
        Rule::StatusLine => head.starts_with(b"\r\n") || head.starts_with(b"\n"),
        _ => is_about_framing(rule),
    }
}

/// Compares the verdicts on one head. `true` where both took it.
fn compare(head: &[u8]) -> bool {
    let mut fields = [httparse::EMPTY_HEADER; 64];
    let mut theirs = httparse::Response::new(&mut fields);
    let verdict = theirs.parse(head);
    let mut parser = ResponseParser::new(Method::Head, Limits::GUEST);
    let ours = parser.feed(head);
    let text = head.escape_ascii();
    match (ours, verdict) {
        (Ok(Progress::Complete { consumed }), Ok(Status::Complete(end))) => {
            assert_eq!(consumed, end, "{text}");
            let response = parser.finish().expect("complete");
            assert_eq!(Some(response.status), theirs.code, "{text}");
            let theirs: Vec<_> = theirs.headers.iter().map(|h| (h.name, h.value)).collect();
            let ours: Vec<_> = response.headers.iter().collect();
            assert_eq!(ours, theirs, "{text}");
            true
        }
        (Ok(Progress::Incomplete), Ok(Status::Partial)) => false,
        // Interim answers: we go on to the next head, httparse reports the first.
        (Ok(_) | Err(HttpError::TooLarge { .. }), _) if theirs.code.is_some_and(|c| c < 200) => {
            false
        }
        // httparse judges byte by byte, we judge when a line is complete.
        (Ok(Progress::Incomplete), Err(_)) => false,
        // We stop at our bounds; httparse has none but the number of lines.
        (Err(HttpError::TooLarge { .. }), _) => false,
        (Err(HttpError::Refused { .. }), Err(_)) => false,
        (Err(HttpError::Refused { rule, .. }), Ok(_)) if is_stricter(rule, head) => false,
        (ours, theirs) => panic!("{text}\n  ours: {ours:?}\n  httparse: {theirs:?}"),
    }
}

fn mutate(head: &mut Vec<u8>, random: &mut Random) {
    const BYTES: &[u8] = b"\r\n\0\t \":;,=-+0129azAZHTP/.!\x0b\x1b\x7f\x80\xc3\xff";
    let at = random.below(head.len());
    match random.below(5) {
        0 => head[at] = BYTES[random.below(BYTES.len())],
        1 => head.insert(at, BYTES[random.below(BYTES.len())]),
        2 => drop(head.remove(at)),
        3 => {
            let end = (at + random.below(24)).min(head.len());
            let part = head[at..end].to_vec();
            let to = random.below(head.len());
            head.splice(to..to, part);
        }
        _ => head[at] = random.below(256) as u8,
    }
}

#[test]
fn agrees_with_httparse_on_mutated_heads() {
    let seeds: [&[u8]; 5] = [
        include_bytes!("../fixtures/ch-v53/http/02-info-no-vm.response"),
        include_bytes!("../fixtures/ch-v53/http/12-create.response"),
        include_bytes!("../fixtures/http/envd-health.response"),
        include_bytes!("../fixtures/http/envd-no-preload-get.response"),
        b"HTTP/1.1 503\r\nServer: Firecracker API\r\nA:\t b c \r\nE:\r\n\r\n",
    ];
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let (mut taken, mut count) = (0, 0);
    for seed in seeds {
        assert!(compare(seed), "a seed is refused: {}", seed.escape_ascii());
        for _ in 0..20_000 {
            let mut head = seed.to_vec();
            for _ in 0..=random.below(3) {
                mutate(&mut head, &mut random);
            }
            taken += usize::from(compare(&head));
            count += 1;
        }
    }
    // Both kinds of verdict must have been compared, not only refusals.
    let share = taken * 100 / count;
    assert!((20..=90).contains(&share), "{share} % taken by both");
}
