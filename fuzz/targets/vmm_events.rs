//! The event monitor's stream: the same at any cut, and found again after any damage.

use rewake::vmm::events::{Damage, Event, EventParser};

use super::Choices;

const RECORD: &[u8] = b"\n\n{\n  \"timestamp\": {\n    \"secs\": 1,\n    \"nanos\": 2\n  },\n  \
    \"source\": \"vm\",\n  \"event\": \"resumed\",\n  \"properties\": null\n}\n\n";

/// The input is a stream, cut somewhere, before a whole record.
pub fn run(data: &[u8]) {
    let whole = parse(&[data, RECORD]);
    match whole.last() {
        Some(Ok(event)) => assert_eq!(event.event, "resumed", "the record after the damage"),
        other => panic!("a whole record is lost: {other:?}"),
    }
    let mut choices = Choices::from_bytes(data);
    let mut pieces = choices.pieces(data, 64);
    pieces.extend(choices.pieces(RECORD, 8));
    assert_eq!(parse(&pieces), whole, "any cut");
}

fn parse(pieces: &[&[u8]]) -> Vec<Result<Event, Damage>> {
    let (mut parser, mut records) = (EventParser::new(), Vec::new());
    for piece in pieces {
        parser.feed(piece, |record| records.push(record));
    }
    parser.finish(|record| records.push(record));
    records
}
