//! `smaps` of any content: sums never run over, and what is read does not depend on keys that
//! are not known.

use rewake::memory::{Saving, Usage, parse};

/// The input is a whole file.
pub fn run(data: &[u8]) {
    let Ok(mappings) = parse(data) else {
        return;
    };
    for mapping in &mappings {
        assert!(mapping.start < mapping.end);
        let parts = mapping.file().checked_add(mapping.private());
        assert!(parts.is_none_or(|parts| parts >= mapping.file()));
    }
    // A key that nobody knows after every line that ends.
    let mut longer = Vec::new();
    for line in data.split_inclusive(|byte| *byte == b'\n') {
        longer.extend_from_slice(line);
        if line.ends_with(b"\n") && !longer.iter().all(|byte| *byte == b'\n') {
            longer.extend_from_slice(b"Unheard_Of:  0 pages\n");
        }
    }
    assert_eq!(parse(&longer).as_ref(), Ok(&mappings));
    let usage = Usage::of(mappings);
    assert!(usage.guest.resident <= usage.process.resident);
    assert!(usage.guest.private <= usage.process.private);
    let saving = Saving::of([&usage, &usage]);
    assert!(saving.saved() <= saving.alone);
}
