//! What the guest agent says: every reader against every input.
//!
//! None panics; none believes what it was not told. A status that is read says the same when
//! its keys come in another order and among others; a preload driven by hostile answers never
//! reaches `Materialised` without the word `done`.

use std::time::Instant;

use rewake::envd::init::Lifecycle;
use rewake::envd::preload::{Answer, Limits, Preload, State};
use rewake::envd::reply;
use rewake::units::Bytes;
use serde_json::Value;

/// The input is a body.
pub fn run(data: &[u8]) {
    let version = reply::health_version(data);
    assert!(version.is_none_or(|version| version.as_str().len() < 300));
    let _ = reply::metrics(data);
    let _ = reply::activity(data);
    if let Ok(envs) = reply::envs(data) {
        // A map of texts is written and read back.
        let written = serde_json::to_vec(&envs).unwrap_or_default();
        assert_eq!(reply::envs(&written).ok(), Some(envs), "round trip");
    }
    let status = reply::preload_status(data);
    if let Ok(status) = &status {
        assert!(status.source.as_str().len() < 300);
        reordered(data, status);
    }
    drive(data, status.as_ref().ok());
}

fn reordered(data: &[u8], status: &reply::PreloadStatus) {
    let Ok(Value::Object(keys)) = serde_json::from_slice(data) else {
        panic!("a status that is no object");
    };
    let mut turned: Vec<_> = keys.into_iter().collect();
    turned.reverse();
    turned.push(("unknown_key".to_owned(), Value::Bool(true)));
    let parts: Vec<_> = turned
        .iter()
        .map(|(key, value)| format!("{}:{value}", Value::from(key.as_str())))
        .collect();
    let body = format!("{{{}}}", parts.join(","));
    // Rewriting numbers and escapes may pass the limit on length.
    if body.len() <= reply::LIMITS.bytes {
        let again = reply::preload_status(body.as_bytes());
        assert_eq!(again.ok().as_ref(), Some(status), "{body}");
    }
}

fn drive(data: &[u8], status: Option<&reply::PreloadStatus>) {
    let ram = Bytes::mib(512);
    let life = Lifecycle::random();
    let mut preload = Preload::restored(ram, Limits::of(ram));
    let now = Instant::now();
    let answer = || status.cloned().map_or(Answer::Garbled, Answer::Status);
    assert!(!preload.answered(now, life, answer()), "heard before /init");
    preload.init_acknowledged(life);
    for _ in 0..8 {
        preload.step(now);
        preload.answered(now, life, answer());
    }
    if preload.state() == State::Materialised {
        let said_done = data.windows(4).any(|w| w == b"done") || data.contains(&b'\\');
        assert!(said_done, "materialised without the word");
    }
}
