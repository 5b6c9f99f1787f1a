//! What the codec allocates: a handful of buffers per response, nothing per header.

use rewake::wire::http::{Limits, Method, Progress, Request, ResponseParser};

/// Allocations, and bytes at the peak, of parsing this in pieces of this size.
fn measure(bytes: &[u8], piece: usize) -> (u64, u64) {
    let info = allocation_counter::measure(|| {
        let mut parser = ResponseParser::new(Method::Get, Limits::VMM);
        for piece in bytes.chunks(piece) {
            parser.feed(piece).expect("an acceptable response");
        }
        let response = parser.finish().expect("a complete response");
        std::hint::black_box(&response);
    });
    (info.count_total, info.bytes_max)
}

fn with_headers(count: usize) -> Vec<u8> {
    let lines = "Name: value\r\n".repeat(count - 1);
    format!("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n{lines}\r\nhi").into_bytes()
}

#[test]
fn allocates_one_buffer_for_the_head_and_one_for_the_body() {
    for count in [1, 4, 16, 64] {
        let (allocations, _) = measure(&with_headers(count), usize::MAX);
        assert_eq!(allocations, 2, "{count} headers");
    }
    let (allocations, _) = measure(b"HTTP/1.1 204 \r\nServer: x\r\n\r\n", usize::MAX);
    assert_eq!(allocations, 1, "no body");
}

#[test]
fn small_pieces_grow_the_buffer_of_the_head_and_nothing_else() {
    for count in [1, 4, 16, 64] {
        let bytes = with_headers(count);
        let (allocations, _) = measure(&bytes, 1);
        // 512 bytes to begin with, then twice as many.
        let growths = u64::from(bytes.len() > 512);
        assert_eq!(allocations, 2 + growths, "{count} headers");
    }
}

#[test]
fn an_announced_size_allocates_nothing() {
    let cases = [
        "HTTP/1.1 200 OK\r\nContent-Length: 8388608\r\n\r\nx",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n800000\r\nx",
    ];
    for bytes in cases {
        let info = allocation_counter::measure(|| {
            let mut parser = ResponseParser::new(Method::Get, Limits::VMM);
            let progress = parser.feed(bytes.as_bytes());
            assert_eq!(progress, Ok(Progress::Incomplete), "{bytes}");
        });
        assert!(
            info.bytes_max < 1024,
            "{} bytes for {bytes}",
            info.bytes_max
        );
    }
}

#[test]
fn a_request_is_encoded_in_one_buffer() {
    let request = Request::new(Method::Put, "/api/v1/vm.restore")
        .header("Accept", "application/json")
        .json(vec![b'x'; 1000]);
    let info = allocation_counter::measure(|| {
        std::hint::black_box(request.encode().expect("an acceptable request"));
    });
    // The buffer, the length's digits, and the shared copy.
    assert_eq!(info.count_total, 3);
}
