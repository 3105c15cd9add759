//! What a client of the device API can read: see docs/rules.md, device API A2 and A5.

use spaceport_core::protocol::Answer;

/// Checks that an answer is one that the unmodified client and any HTTP client can read.
///
/// # Panics
/// If it is not.
pub fn readable(answer: &Answer, statuses: &[u16]) {
    assert!(statuses.contains(&answer.status), "status {}, expected one of {statuses:?}", answer.status);
    for (name, value) in &answer.headers {
        let plain = |text: &str| text.bytes().all(|byte| (0x20..0x7f).contains(&byte));
        assert!(plain(name) && plain(value), "header {name}: {value}");
    }
    let bytes = answer.encode();
    let end = bytes.windows(4).position(|window| window == b"\r\n\r\n").expect("a head ends") + 4;
    let (head, body) = bytes.split_at(end);
    let head = std::str::from_utf8(head).expect("a head is text");
    if answer.status == 204 {
        assert!(body.is_empty(), "a 204 with a body");
        return;
    }
    assert!(head.contains(&format!("\r\nContent-Length: {}\r\n", body.len())), "{head}");
    if !body.is_empty() {
        serde_json::from_slice::<serde_json::Value>(body).expect("a body is JSON");
    }
}
