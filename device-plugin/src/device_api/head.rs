//! Reads the head of one request. Targets hold tokens: nothing here is logged.

use std::io;

use spaceport_core::protocol::{BadRequest, HeadFault, Request, parse_request};
use tokio::io::AsyncReadExt as _;
use tokio::net::tcp::ReadHalf;

/// Longest head that is read, bytes: request line and headers. The client's are below 3 KiB.
const HEAD_MAX: usize = 16 * 1024;
/// Most header lines; the client sends six.
const HEADERS_MAX: usize = 64;

/// Why there is no request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NoRequest {
    /// The peer closed without asking anything, as a probe of the port does, or the connection broke.
    Gone,
    /// The head is not one.
    Fault(HeadFault),
    /// The head is one, the call is not.
    Bad(BadRequest),
}

/// Reads up to the end of the head and parses it. Bytes after it are not looked at: calls have no body, and there is
/// one request a connection.
pub(super) async fn read(reader: &mut ReadHalf<'_>) -> Result<Request, NoRequest> {
    let mut bytes = Vec::with_capacity(2048);
    // Ends at the latest after HEAD_MAX bytes; the caller bounds the time.
    loop {
        let read = match reader.take((HEAD_MAX - bytes.len()) as u64).read_buf(&mut bytes).await {
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return Err(NoRequest::Gone),
        };
        if read == 0 {
            return Err(NoRequest::Gone);
        }
        if let Some(request) = parse(&bytes)? {
            return Ok(request);
        }
        if bytes.len() >= HEAD_MAX {
            return Err(NoRequest::Fault(HeadFault::TooLong));
        }
    }
}

/// The request, or `None` while the head is not complete. Pure.
///
/// # Errors
/// See [`NoRequest`].
pub fn parse(bytes: &[u8]) -> Result<Option<Request>, NoRequest> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut head = httparse::Request::new(&mut headers);
    match head.parse(bytes) {
        Ok(httparse::Status::Complete(_)) => {}
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::Version) => return Err(NoRequest::Fault(HeadFault::Version)),
        Err(httparse::Error::TooManyHeaders) => return Err(NoRequest::Fault(HeadFault::TooLong)),
        Err(_) => return Err(NoRequest::Fault(HeadFault::Malformed)),
    }
    if head.version != Some(1) {
        return Err(NoRequest::Fault(HeadFault::Version));
    }
    let has_body = head.headers.iter().any(|header| {
        header.name.eq_ignore_ascii_case("transfer-encoding")
            || header.name.eq_ignore_ascii_case("content-length") && header.value.trim_ascii() != b"0"
    });
    if has_body {
        return Err(NoRequest::Fault(HeadFault::Body));
    }
    let (method, target) = (head.method.unwrap_or_default(), head.path.unwrap_or_default());
    parse_request(method, target.as_bytes()).map(Some).map_err(NoRequest::Bad)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(text: &str) -> HeadFault {
        match parse(text.as_bytes()) {
            Err(NoRequest::Fault(fault)) => fault,
            other => panic!("{text:?}: {other:?}"),
        }
    }

    #[test]
    fn heads_are_whole_or_waited_for() {
        let head = "POST /startup-report HTTP/1.1\r\nHost: 127.0.0.1:7000\r\nContent-Length: 0\r\n\r\n";
        for end in 0..head.len() {
            assert!(matches!(parse(&head.as_bytes()[..end]), Ok(None)), "{end}");
        }
        assert!(matches!(parse(head.as_bytes()), Ok(Some(Request::StartupReport))));
    }

    #[test]
    fn bodies_and_other_versions_are_refused() {
        let with = |header: &str| format!("POST /startup-report HTTP/1.1\r\nHost: h\r\n{header}\r\n\r\n");
        assert_eq!(fault(&with("Content-Length: 3")), HeadFault::Body);
        assert_eq!(fault(&with("content-length: 0\r\nContent-Length: 1")), HeadFault::Body);
        assert_eq!(fault(&with("Transfer-Encoding: chunked")), HeadFault::Body);
        assert_eq!(fault("POST /startup-report HTTP/1.0\r\n\r\n"), HeadFault::Version);
        assert_eq!(fault("POST /startup-report HTTP/2.0\r\n\r\n"), HeadFault::Version);
        assert_eq!(fault("\u{16}\u{3}\u{1} hello\r\n\r\n"), HeadFault::Malformed);
        assert_eq!(fault(&with(&"A: b\r\n".repeat(80))), HeadFault::TooLong);
    }
}
