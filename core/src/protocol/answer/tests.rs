//! The status table, row by row, and a model of how the client reads it.

use proptest::prelude::*;
use serde_json::Value;

use super::super::{DurationLimit, LegalDurations, Limiter, QueueOf, UnauthenticatedReason};
use super::*;
use crate::ids::Size;

/// What a person in front of the app reads (device API A8).
#[derive(Debug, PartialEq, Eq)]
enum Message {
    Granted,
    PendingCredits,
    IllegalDuration,
    AppLimit,
    RunsLimit,
    Quota { left: i64, wait_seconds: i64 },
    NoGpu,
    ExpiredToken,
    ScheduleError(u16),
}

/// The client's decision table for `/schedule`, as its source has it. `Err` is a crash with a traceback.
fn client(answer: &Answer, has_token: bool) -> Result<Message, String> {
    // Anything else is "not a valid code" to httpx.
    if ![200, 400, 401, 404, 405, 414, 429, 503].contains(&answer.status) {
        return Err(format!("status {}", answer.status));
    }
    let header = |name: &str| answer.headers.iter().find(|(found, _)| *found == name).map(|(_, value)| value.as_str());
    let known = [
        ("X-Authenticated", &["regular", "pro"][..]),
        ("X-Queuing-Reason", &["node", "concurrency"][..]),
        (
            "X-Approve-Result",
            &["approved", "runs-exceeded", "quota-exceeded", "illegal-duration", "pending-overquota-exceeded"][..],
        ),
        ("Content-Type", &["application/json", "text/event-stream"][..]),
        ("Allow", &["GET", "POST"][..]),
    ];
    for (name, value) in &answer.headers {
        if !known.iter().any(|(known, values)| known == name && values.contains(&value.as_str())) {
            return Err(format!("header {name}: {value}"));
        }
    }
    match answer.status {
        200 | 429 => {}
        503 => return Ok(Message::NoGpu),
        401 => return Ok(Message::ExpiredToken),
        other => return Ok(Message::ScheduleError(other)),
    }
    header("Content-Type").ok_or("KeyError: content-type")?;
    let body: Value = serde_json::from_slice(&answer.body).map_err(|error| error.to_string())?;
    if answer.status == 200 {
        let complete = body["idle"].is_boolean()
            && body["nvidiaIndex"].is_i64()
            && body["nvidiaUUID"].is_string()
            && body["allowToken"].is_string();
        return if complete { Ok(Message::Granted) } else { Err(format!("ValidationError: {body}")) };
    }
    let left = body["left"].as_i64().ok_or("left must be whole")?;
    let wait_seconds = body["wait"].as_i64().ok_or("wait must be a duration")?;
    if wait_seconds > 999_999_999 * 86_400 {
        return Err("wait is beyond timedelta".to_owned());
    }
    Ok(if header("X-Approve-Result") == Some("pending-overquota-exceeded") {
        Message::PendingCredits
    } else if wait_seconds < 0 {
        Message::IllegalDuration
    } else if !has_token {
        Message::AppLimit
    } else if wait_seconds == 0 {
        Message::RunsLimit
    } else {
        Message::Quota { left, wait_seconds }
    })
}

fn quota(left_ms: u64, resets_in_ms: u64) -> Denial {
    Denial::QuotaExceeded {
        declared_ms: 50_000,
        given_ms: None,
        weight: 1,
        needed_ms: 50_000,
        left_ms,
        reserved_ms: 0,
        limit_ms: 60_000,
        resets_in_ms,
        largest_declared_ms: left_ms,
        limiter: Limiter::Account,
    }
}

fn pending(left_ms: u64, frees_in_ms: u64) -> Denial {
    Denial::PendingOverquota {
        declared_ms: 30_000,
        given_ms: None,
        weight: 2,
        needed_ms: 60_000,
        left_ms,
        reserved_ms: 60_000,
        limit_ms: 120_000,
        frees_in_ms,
        largest_declared_ms: left_ms / 2,
        limiter: Limiter::AddressPrefix,
    }
}

fn illegal(what: DurationLimit) -> Denial {
    Denial::IllegalDuration { declared_ms: 300_000, limit_ms: 120_000, what, legal: None }
}

#[test]
fn every_row_of_the_table() {
    use Message as M;
    let rows: Vec<(Denial, u16, Option<&str>, M)> = vec![
        (quota(12_999, 89_001), 429, Some("quota-exceeded"), M::Quota { left: 12, wait_seconds: 90 }),
        (quota(0, 0), 429, Some("quota-exceeded"), M::Quota { left: 0, wait_seconds: 1 }),
        (
            quota(u64::MAX, u64::MAX),
            429,
            Some("quota-exceeded"),
            M::Quota { left: 18_446_744_073_709_551, wait_seconds: 31_622_400 },
        ),
        (pending(1, 1), 429, Some("pending-overquota-exceeded"), M::PendingCredits),
        (
            Denial::TooManyGuests { limit: 64, frees_in_ms: 1_500 },
            429,
            Some("quota-exceeded"),
            M::Quota { left: 0, wait_seconds: 2 },
        ),
        (Denial::RunsExceeded { limit: 20, resets_in_ms: 7_000 }, 429, Some("runs-exceeded"), M::RunsLimit),
        (illegal(DurationLimit::LongestCall), 429, Some("illegal-duration"), M::IllegalDuration),
        (illegal(DurationLimit::WholeQuota), 429, Some("illegal-duration"), M::IllegalDuration),
        (illegal(DurationLimit::Zero), 429, Some("illegal-duration"), M::IllegalDuration),
        (Denial::ConcurrencyExceeded { limit: 2, of: QueueOf::Account }, 503, None, M::NoGpu),
        (Denial::NoCapacity { size: Size::Xlarge }, 503, None, M::NoGpu),
        (Denial::QueueFull { bound: 64, of: QueueOf::Space }, 503, None, M::NoGpu),
        (Denial::Unauthenticated { reason: UnauthenticatedReason::Expired }, 401, None, M::ExpiredToken),
        (Denial::AccountDeleting, 503, None, M::NoGpu),
        (Denial::AccountUnusable, 503, None, M::NoGpu),
        (Denial::ClockSkew { ms: 6_000 }, 503, None, M::NoGpu),
        (Denial::BrokerUnavailable, 503, None, M::NoGpu),
        (Denial::PlatformFault, 503, None, M::NoGpu),
    ];
    for (denial, status, result, message) in rows {
        let answer = wire(&denial, CallerClass::Pro);
        let found = answer.headers.iter().find(|(name, _)| *name == "X-Approve-Result").map(|(_, value)| &**value);
        assert_eq!((answer.status, found), (status, result), "{denial:?}");
        assert_eq!(client(&answer, true), Ok(message), "{denial:?}");
        let body: Value = serde_json::from_slice(&answer.body).unwrap();
        assert_eq!(body["reason"], denial.kind());
        assert_eq!(body["detail"], human_message(&denial));
    }
}

/// Requirement A9: each kind has a name, a row and a message of its own, and the message has its numbers. A new kind does not
/// compile without a line here.
#[test]
fn no_kind_of_refusal_stands_in_for_another() {
    const fn is_listed(denial: &Denial) -> bool {
        match denial {
            Denial::QuotaExceeded { .. }
            | Denial::PendingOverquota { .. }
            | Denial::TooManyGuests { .. }
            | Denial::RunsExceeded { .. }
            | Denial::IllegalDuration { .. }
            | Denial::ConcurrencyExceeded { .. }
            | Denial::NoCapacity { .. }
            | Denial::QueueFull { .. }
            | Denial::Unauthenticated { .. }
            | Denial::AccountDeleting
            | Denial::AccountUnusable
            | Denial::ClockSkew { .. }
            | Denial::BrokerUnavailable
            | Denial::PlatformFault => true,
        }
    }
    let legal = LegalDurations { tier: "free".to_owned(), size: Size::Large, large_ms: 120_000, xlarge_ms: 119_000 };
    let illegal = Denial::IllegalDuration {
        declared_ms: 300_000,
        limit_ms: 120_000,
        what: DurationLimit::LongestCall,
        legal: Some(Box::new(legal)),
    };
    // Kind, what the client is told, and the numbers that a person has to find.
    let rows: [(Denial, u16, Option<&str>, &[&str]); 14] = [
        (quota(44_000, 89_000), 429, Some("quota-exceeded"), &["50 s", "weight 1", "44 s", "60 s", "89 s"]),
        (
            pending(1_000, 5_000),
            429,
            Some("pending-overquota-exceeded"),
            &["60 s", "weight 2", "1 s", "120 s", "5 s", "behind this address"],
        ),
        (Denial::TooManyGuests { limit: 64, frees_in_ms: 90_000 }, 429, Some("quota-exceeded"), &["64", "90 s"]),
        (Denial::RunsExceeded { limit: 20, resets_in_ms: 7_000 }, 429, Some("runs-exceeded"), &["20", "7 s"]),
        (illegal, 429, Some("illegal-duration"), &["300 s", "large", "free", "120 s of large", "119 s of xlarge"]),
        (Denial::ConcurrencyExceeded { limit: 2, of: QueueOf::Space }, 503, None, &["Space", "2"]),
        (Denial::NoCapacity { size: Size::Xlarge }, 503, None, &["xlarge"]),
        (Denial::QueueFull { bound: 16, of: QueueOf::Account }, 503, None, &["account", "16"]),
        (Denial::Unauthenticated { reason: UnauthenticatedReason::Expired }, 401, None, &["expired"]),
        (Denial::AccountDeleting, 503, None, &["deleted"]),
        (Denial::AccountUnusable, 503, None, &["repair"]),
        (Denial::ClockSkew { ms: 6_500 }, 503, None, &["6.5 s"]),
        (Denial::BrokerUnavailable, 503, None, &["broker"]),
        (Denial::PlatformFault, 503, None, &["nothing was charged"]),
    ];
    let (mut kinds, mut messages) = (std::collections::BTreeSet::new(), std::collections::BTreeSet::new());
    for (denial, status, result, numbers) in rows {
        assert!(is_listed(&denial) && kinds.insert(denial.kind()), "{} is there twice", denial.kind());
        let message = human_message(&denial);
        for number in numbers {
            assert!(message.contains(number), "{number} is not in {message:?}");
        }
        assert!(messages.insert(message));
        let answer = wire(&denial, CallerClass::Guest);
        let found = answer.headers.iter().find(|(name, _)| *name == "X-Approve-Result").map(|(_, value)| &**value);
        assert_eq!((answer.status, found), (status, result), "{denial:?}");
        let body: Value = serde_json::from_slice(&answer.body).unwrap();
        let wait = body["wait"].as_i64();
        let expected = match &denial {
            Denial::RunsExceeded { .. } => wait == Some(0),
            Denial::IllegalDuration { .. } => wait < Some(0),
            _ if status == 429 => wait >= Some(1),
            _ => wait.is_none(),
        };
        assert!(expected, "{denial:?} waits {wait:?}");
    }
}

#[test]
fn callers_are_told_apart_by_one_header() {
    let header = |caller| {
        let answer = wire(&quota(1, 1), caller);
        answer.headers.into_iter().find(|(name, _)| *name == "X-Authenticated").map(|(_, value)| value)
    };
    assert_eq!(header(CallerClass::Guest), None);
    assert_eq!(header(CallerClass::Regular).as_deref(), Some("regular"));
    assert_eq!(header(CallerClass::Pro).as_deref(), Some("pro"));
}

#[test]
fn a_grant_is_complete_and_its_token_is_not_in_debug() {
    let response = ScheduleResponse {
        idle: true,
        nvidia_index: 7,
        nvidia_uuid: "GPU-1".to_owned(),
        allow_token: Secret::new("s3cret"),
    };
    let answer = scheduled(&response, CallerClass::Regular);
    assert_eq!(client(&answer, false), Ok(Message::Granted));
    assert_eq!(
        String::from_utf8(answer.encode()).unwrap(),
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nX-Authenticated: regular\r\nContent-Length: \
         72\r\nCache-Control: no-store\r\nConnection: close\r\n\r\n\
         {\"allowToken\":\"s3cret\",\"idle\":true,\"nvidiaIndex\":7,\"nvidiaUUID\":\"GPU-1\"}"
    );
    assert!(!format!("{response:?}").contains("s3cret"));
}

#[test]
fn allow_is_200_or_not() {
    assert_eq!(allowed().status, 200);
    use AllowRefusal as R;
    let refusals =
        [R::UnknownToken, R::AlreadyUsed, R::TooLate, R::ForeignProcess, R::InitProcess, R::DeviceUnavailable];
    assert_eq!(refusals.map(|refusal| not_allowed(refusal).status), [404, 409, 410, 403, 403, 503]);
}

#[test]
fn release_never_costs_a_finished_result() {
    let all = [Released::Ended, Released::DeviceNotUsed, Released::Unknown];
    assert_eq!(all.map(|outcome| released(outcome).status), [200, 204, 404]);
    let unused = String::from_utf8(released(Released::DeviceNotUsed).encode()).unwrap();
    assert!(!unused.contains("Content-Length") && unused.ends_with("\r\n\r\n"), "{unused}");
}

#[test]
fn what_cannot_be_parsed_gets_what_the_client_can_read() {
    use super::super::parse_request;
    let base = "/schedule?cgroupPath=%2F&taskId=1&enableQueue=true&tokenVersion=2";
    let rows = [
        ("POST", format!("{base}&durationSeconds=-5"), 429, Some(Message::IllegalDuration)),
        ("POST", format!("{base}&durationSeconds=99999999999999999999"), 429, Some(Message::IllegalDuration)),
        ("POST", format!("{base}&gpuSize=weird"), 429, Some(Message::IllegalDuration)),
        ("POST", format!("{base}&durationSeconds=soon"), 400, Some(Message::ScheduleError(400))),
        ("POST", "/schedule".to_owned(), 400, Some(Message::ScheduleError(400))),
        ("POST", format!("{base}&token={}", "a".repeat(20_000)), 414, Some(Message::ScheduleError(414))),
        ("GET", base.to_owned(), 405, Some(Message::ScheduleError(405))),
        ("POST", "/nothing".to_owned(), 404, None),
        ("POST", "/allow?allowToken=a&pid=0".to_owned(), 400, None),
        ("POST", "/release?allowToken=a&fail=maybe".to_owned(), 404, None),
        ("POST", format!("/release?allowToken={}&fail=true", "a".repeat(20_000)), 404, None),
    ];
    for (method, target, status, message) in rows {
        let bad = parse_request(method, target.as_bytes()).unwrap_err();
        let answer = refuse(&bad);
        assert_eq!(answer.status, status, "{bad}");
        if let Some(message) = message {
            assert_eq!(client(&answer, true), Ok(message), "{bad}");
        }
    }
}

#[test]
fn faults_of_the_head_have_statuses_of_their_own() {
    use HeadFault as F;
    let all = [F::Malformed, F::Version, F::TooLong, F::TooSlow, F::Body];
    assert_eq!(all.map(|fault| malformed_head(fault).status), [400, 505, 431, 408, 400]);
}

#[test]
fn the_small_answers() {
    assert_eq!(startup_reported().status, 200);
    assert_eq!(queue_size(3).body, b"3");
}

fn any_denial() -> impl Strategy<Value = Denial> {
    let number = any::<u64>;
    prop_oneof![
        (number(), number()).prop_map(|(left, resets)| quota(left, resets)),
        (number(), number()).prop_map(|(left, frees)| pending(left, frees)),
        (number(), number()).prop_map(|(limit, frees_in_ms)| Denial::TooManyGuests { limit, frees_in_ms }),
        (number(), number()).prop_map(|(limit, resets_in_ms)| Denial::RunsExceeded { limit, resets_in_ms }),
        (
            number(),
            number(),
            prop::sample::select(vec![DurationLimit::LongestCall, DurationLimit::WholeQuota, DurationLimit::Zero])
        )
            .prop_map(|(declared_ms, limit_ms, what)| Denial::IllegalDuration {
                declared_ms,
                limit_ms,
                what,
                legal: None
            }),
        number().prop_map(|limit| Denial::ConcurrencyExceeded { limit, of: QueueOf::Space }),
        Just(Denial::NoCapacity { size: Size::Large }),
        (number(), prop::sample::select(vec![QueueOf::Pool, QueueOf::Space, QueueOf::Account, QueueOf::Pod]))
            .prop_map(|(bound, of)| Denial::QueueFull { bound, of }),
        prop::sample::select(vec![
            UnauthenticatedReason::NotAToken,
            UnauthenticatedReason::UnknownKey,
            UnauthenticatedReason::BadSignature,
            UnauthenticatedReason::Expired,
            UnauthenticatedReason::WrongAudience,
            UnauthenticatedReason::UnknownAccount,
            UnauthenticatedReason::IdentityConflict,
            UnauthenticatedReason::Exhausted,
        ])
        .prop_map(|reason| Denial::Unauthenticated { reason }),
        Just(Denial::AccountDeleting),
        Just(Denial::AccountUnusable),
        number().prop_map(|ms| Denial::ClockSkew { ms }),
        Just(Denial::BrokerUnavailable),
        Just(Denial::PlatformFault),
    ]
}

proptest! {
    #[test]
    fn the_client_reads_every_denial_for_what_it_is(
        denial in any_denial(),
        caller in prop::sample::select(vec![CallerClass::Guest, CallerClass::Regular, CallerClass::Pro]),
        has_token: bool,
    ) {
        let answer = wire(&denial, caller);
        let message = client(&answer, has_token);
        prop_assert!(message.is_ok(), "{:?}", message);
        let fits = match (&denial, message.unwrap()) {
            (Denial::QuotaExceeded { left_ms, resets_in_ms, .. }, Message::Quota { left, wait_seconds }) => {
                has_token
                    && left.unsigned_abs() == left_ms / 1000
                    && wait_seconds >= 1
                    && wait_seconds.unsigned_abs() == resets_in_ms.div_ceil(1000).clamp(1, WAIT_MAX_SECONDS)
            }
            (Denial::TooManyGuests { .. }, Message::Quota { left: 0, wait_seconds }) => has_token && wait_seconds >= 1,
            (
                Denial::QuotaExceeded { .. } | Denial::RunsExceeded { .. } | Denial::TooManyGuests { .. },
                Message::AppLimit,
            ) => !has_token,
            (Denial::RunsExceeded { .. }, Message::RunsLimit) => has_token,
            (Denial::PendingOverquota { .. }, Message::PendingCredits)
            | (Denial::IllegalDuration { .. }, Message::IllegalDuration)
            | (Denial::Unauthenticated { .. }, Message::ExpiredToken) => true,
            (_, Message::NoGpu) => answer.status == 503,
            _ => false,
        };
        prop_assert!(fits);
        // One answer is one well-formed message: no header can break out of its line.
        let bytes = answer.encode();
        let end = bytes.windows(4).position(|window| window == b"\r\n\r\n").unwrap() + 4;
        prop_assert_eq!(&bytes[end..], &answer.body[..]);
    }

    #[test]
    fn denials_survive_the_link_and_the_page(denial in any_denial()) {
        let text = serde_json::to_string(&denial).unwrap();
        prop_assert_eq!(serde_json::from_str::<Denial>(&text).unwrap(), denial);
    }
}
