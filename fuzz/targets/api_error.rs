//! Error bodies of Cloud Hypervisor's API: what comes out is small and fit to print, and a
//! chain of texts comes out as it went in.

use rewake::vmm::api::Chain;
use rewake::wire::excerpt::{EXCERPT_BYTES, excerpt};

use super::Choices;

/// The input is a body, and then again the texts of one.
pub fn run(data: &[u8]) {
    let chain = Chain::decode(data);
    assert!(chain.texts().len() <= Chain::MAX_TEXTS, "few texts");
    for text in chain.texts() {
        assert!(text.len() <= EXCERPT_BYTES + '…'.len_utf8(), "short texts");
        assert!(!text.chars().any(char::is_control), "nothing to obey");
    }
    assert_eq!(chain.texts().is_empty(), chain.root_cause().is_none());

    let mut choices = Choices::from_bytes(data);
    let pieces = choices.pieces(data, 40);
    let texts: Vec<_> = pieces.into_iter().map(String::from_utf8_lossy).collect();
    let body = serde_json::to_vec(&texts).expect("texts are JSON");
    let mut expected: Vec<String> = texts.iter().map(|text| excerpt(text.as_bytes())).collect();
    if let Some(last) = expected.pop() {
        expected.truncate(Chain::MAX_TEXTS - 1);
        expected.push(last);
    }
    if body.len() <= 64 * 1024 {
        assert_eq!(Chain::decode(&body).texts(), expected, "round trip");
    }
}
