//! Working sets: any bytes are refused or mean extents in order that come back as they were.

use rewake::memory::WorkingSet;

/// The input is a file.
pub fn run(data: &[u8]) {
    if let Ok(set) = WorkingSet::decode(data) {
        assert_eq!(set.encode(), data, "one spelling for each set");
        let mut end = 0;
        for extent in set.extents() {
            assert!(extent.first >= end && extent.pages > 0);
            end = extent.first + extent.pages;
        }
        assert!(end <= u64::MAX / 4096);
    }
    // The input is a list of pages.
    let pages = data
        .chunks_exact(8)
        .map(|bytes| bytes.iter().fold(0, |all, byte| all << 8 | u64::from(*byte)))
        .collect::<Vec<_>>();
    let set = WorkingSet::of_pages(pages.clone());
    assert_eq!(WorkingSet::decode(&set.encode()).as_ref(), Ok(&set));
    for page in pages.into_iter().filter(|page| *page < u64::MAX / 4096) {
        let found = set
            .extents()
            .iter()
            .any(|extent| page >= extent.first && page - extent.first < extent.pages);
        assert!(found, "page {page} is lost");
    }
}
