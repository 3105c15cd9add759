//! The queue stream (device API A4). The client does not reassemble: one read chunk is one event to it.

use super::CallerClass;
use super::answer::{ScheduleResponse, head};

/// Why a call waits; chooses the client's toast.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum QueuingReason {
    /// No slot of the node is free.
    Node,
    /// The account's or Space's limit of concurrent leases is reached.
    Concurrency,
}

/// What a queue stream can say. There is no comment, id or retry line: they end the client with an assertion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event<'response> {
    /// Still waiting. The only moment when the client notices that its visitor has left.
    Ping,
    /// No GPU; the client says so in its own words.
    Failed,
    /// Granted.
    Succeeded(&'response ScheduleResponse),
}

impl Event<'_> {
    fn payload(self) -> String {
        match self {
            Self::Ping => "event: ping\n\n".to_owned(),
            Self::Failed => "event: failed\n\n".to_owned(),
            Self::Succeeded(response) => format!("event: succeeded\ndata: {}\n\n", response.json()),
        }
    }
}

/// One event as one HTTP chunk in one buffer: to be sent by one `write`, or the client may see half of it.
pub fn chunk(event: Event<'_>) -> Vec<u8> {
    let payload = event.payload();
    format!("{:x}\r\n{payload}\r\n", payload.len()).into_bytes()
}

/// The end of the stream, after the verdict.
pub const fn last_chunk() -> &'static [u8] {
    b"0\r\n\r\n"
}

/// Status line and headers that open a queue stream. No event may be in front of the first real one.
pub fn sse_head(reason: QueuingReason, caller: CallerClass) -> Vec<u8> {
    let mut headers = vec![("Content-Type", "text/event-stream".to_owned())];
    headers.extend(caller.header());
    headers.push((
        "X-Queuing-Reason",
        match reason {
            QueuingReason::Node => "node",
            QueuingReason::Concurrency => "concurrency",
        }
        .to_owned(),
    ));
    headers.push(("Transfer-Encoding", "chunked".to_owned()));
    head(200, &headers)
}

#[cfg(test)]
mod tests {
    use super::super::Secret;
    use super::*;

    #[test]
    fn frames_are_exact() {
        assert_eq!(chunk(Event::Ping), b"d\r\nevent: ping\n\n\r\n");
        assert_eq!(chunk(Event::Failed), b"f\r\nevent: failed\n\n\r\n");
        let response = ScheduleResponse {
            idle: false,
            nvidia_index: 3,
            nvidia_uuid: "MIG-0".to_owned(),
            allow_token: Secret::new("t\n1"),
        };
        // The line break in the token stays escaped, or it would end the data line.
        let payload = "event: succeeded\ndata: {\"allowToken\":\"t\\n1\",\"idle\":false,\"nvidiaIndex\":3,\"nvidiaUUID\":\"MIG-0\"}\n\n";
        let expected = format!("{:x}\r\n{payload}\r\n", payload.len());
        assert_eq!(String::from_utf8(chunk(Event::Succeeded(&response))).unwrap(), expected);
        assert_eq!(last_chunk(), b"0\r\n\r\n");
    }

    #[test]
    fn the_head_uses_only_values_that_the_client_knows() {
        let text = |reason, caller| String::from_utf8(sse_head(reason, caller)).unwrap();
        assert_eq!(
            text(QueuingReason::Node, CallerClass::Guest),
            "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nX-Queuing-Reason: node\r\nTransfer-Encoding: \
             chunked\r\nCache-Control: no-store\r\nConnection: close\r\n\r\n"
        );
        let pro = text(QueuingReason::Concurrency, CallerClass::Pro);
        assert!(pro.contains("\r\nX-Authenticated: pro\r\nX-Queuing-Reason: concurrency\r\n"), "{pro}");
    }
}
