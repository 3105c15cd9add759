//! What stands on a pod's device API socket: the head of a request, and the query in it.

use form_urlencoded::Serializer;
use spaceport_core::protocol::{
    ALLOW_TOKEN_MAX, CGROUP_PATH_MAX, Call, Request, ScheduleQuery, TARGET_MAX, malformed_head, parse_request, refuse,
};
use spaceport_device_plugin::device_api::head::{NoRequest, parse};

use crate::Verdict;
use crate::client::readable;

/// Stands for a visitor's token: no answer may show it.
const SECRET: &str = "eyJfaketoken";

/// The bytes as they come over a connection.
///
/// # Panics
/// If a head is read differently when its bytes come one after the other, a request does not survive being sent again by a
/// client, or a refusal is not one that a client can read.
pub fn check(bytes: &[u8]) -> Verdict {
    let whole = parse(bytes);
    // The end, the middle and shortly before the end: where a connection may be cut.
    for cut in [bytes.len() / 2, bytes.len().saturating_sub(1)] {
        match parse(&bytes[..cut]) {
            Ok(None) => {}
            early => assert_eq!(early.is_ok(), whole.is_ok(), "what comes after the head changes it"),
        }
    }
    match whole {
        Ok(Some(request)) => {
            taken(&request);
            Verdict::Taken
        }
        // No head yet: then the line alone.
        Ok(None) => target(bytes),
        Err(NoRequest::Gone) => panic!("bytes alone do not close a connection"),
        Err(NoRequest::Fault(fault)) => {
            readable(&malformed_head(fault), &[400, 408, 431, 505]);
            Verdict::Refused
        }
        Err(NoRequest::Bad(_)) => target(bytes),
    }
}

/// The first two words as method and target, whatever follows: so that queries are reached that no head can carry.
fn target(bytes: &[u8]) -> Verdict {
    let mut words = bytes.splitn(3, |byte| *byte == b' ');
    let (Some(method), Some(target)) = (words.next(), words.next()) else { return Verdict::Refused };
    let Ok(method) = std::str::from_utf8(method) else { return Verdict::Refused };
    match parse_request(method, target) {
        Ok(request) => {
            taken(&request);
            Verdict::Taken
        }
        Err(_) => {
            refused(method, target);
            Verdict::Refused
        }
    }
}

fn refused(method: &str, target: &[u8]) {
    // With a token in it, under both names that tokens have.
    let mut target = target.to_vec();
    let separator: &[u8] = if target.contains(&b'?') { b"&" } else { b"?" };
    target.extend([separator, b"token=", SECRET.as_bytes(), b"&allowToken=", SECRET.as_bytes()].concat());
    let Err(bad) = parse_request(method, &target) else { return };
    let statuses: &[u16] = match bad.call {
        Call::Schedule => &[400, 405, 414, 429],
        Call::Allow | Call::StartupReport | Call::QueueSize => &[400, 405, 414],
        // Anything else would make the client throw a finished result away.
        Call::Release => &[404, 405],
        Call::Unknown => &[404],
    };
    let answer = refuse(&bad);
    readable(&answer, statuses);
    let body = String::from_utf8_lossy(&answer.body);
    assert!(!body.contains(SECRET), "a refusal shows a token: {body}");
    assert!(answer.body.len() < 1024, "a refusal is short: {} bytes", answer.body.len());
}

fn taken(request: &Request) {
    within_bounds(request);
    let (method, target) = as_sent(request);
    if target.len() <= TARGET_MAX {
        assert_eq!(parse_request(method, target.as_bytes()).as_ref(), Ok(request), "{target}");
    }
}

fn within_bounds(request: &Request) {
    match request {
        Request::Schedule(query) => {
            assert!(query.cgroup_path.len() <= CGROUP_PATH_MAX);
            assert!(i64::try_from(query.declared_ms()).is_ok(), "a page can hold it");
        }
        Request::Allow { allow_token, pid } => {
            assert!(*pid > 0);
            assert!((1..=ALLOW_TOKEN_MAX).contains(&allow_token.expose().len()));
        }
        Request::Release { allow_token, .. } => {
            assert!((1..=ALLOW_TOKEN_MAX).contains(&allow_token.expose().len()));
        }
        Request::StartupReport | Request::QueueSize => {}
    }
}

/// The request as the client puts it onto the request line.
fn as_sent(request: &Request) -> (&'static str, String) {
    let query = |fields: &[(&str, &str)]| Serializer::new(String::new()).extend_pairs(fields).finish();
    match request {
        Request::Schedule(asked) => ("POST", format!("/schedule?{}", schedule(asked))),
        Request::Allow { allow_token, pid } => {
            let fields = query(&[("allowToken", allow_token.expose()), ("pid", &pid.to_string())]);
            ("POST", format!("/allow?{fields}"))
        }
        Request::Release { allow_token, failed } => {
            let fields = query(&[("allowToken", allow_token.expose()), ("fail", &failed.to_string())]);
            ("POST", format!("/release?{fields}"))
        }
        Request::StartupReport => ("POST", "/startup-report".to_owned()),
        Request::QueueSize => ("GET", "/queue-size".to_owned()),
    }
}

fn schedule(asked: &ScheduleQuery) -> String {
    let mut query = Serializer::new(String::new());
    query
        .append_pair("cgroupPath", &asked.cgroup_path)
        .append_pair("taskId", &asked.task_id.to_string())
        .append_pair("enableQueue", &asked.enable_queue.to_string())
        .append_pair("tokenVersion", &asked.token_version.to_string())
        .append_pair("durationSeconds", &asked.duration_seconds.to_string());
    if let Some(size) = asked.size {
        query.append_pair("gpuSize", size.as_str());
    }
    if let Some(token) = &asked.token {
        query.append_pair("token", token.expose());
    }
    query.finish()
}
