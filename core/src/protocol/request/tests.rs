//! Requests as the client sends them, and everything it does not send.

use proptest::prelude::*;

use super::super::{Answer, refuse};
use super::*;

/// As observed on the wire (device API A2).
const SCHEDULE: &str = "/schedule?cgroupPath=%2Fkubepods%2Fpod%20a%2Fctr&taskId=140654172626816&enableQueue=true&tokenVersion=2&durationSeconds=45&gpuSize=xlarge&token=a.b%2Bc";

fn post(target: &str) -> Result<Request, BadRequest> {
    parse_request("POST", target.as_bytes())
}

fn problem(target: &str) -> Problem {
    post(target).unwrap_err().problem
}

/// The schedule query with `field` set to `value`, percent-encoded already; `None` leaves the field out.
fn schedule_with(field: &str, value: Option<&str>) -> String {
    let pairs = [("cgroupPath", "%2F"), ("taskId", "7"), ("enableQueue", "true"), ("tokenVersion", "2")];
    let mut query: Vec<String> =
        pairs.iter().filter(|(name, _)| *name != field).map(|(name, value)| format!("{name}={value}")).collect();
    query.extend(value.map(|value| format!("{field}={value}")));
    format!("/schedule?{}", query.join("&"))
}

fn schedule(field: &str, value: &str) -> Result<ScheduleQuery, Problem> {
    match post(&schedule_with(field, Some(value))) {
        Ok(Request::Schedule(query)) => Ok(query),
        Ok(other) => panic!("{other:?}"),
        Err(bad) => Err(bad.problem),
    }
}

#[test]
fn the_clients_own_requests_parse() {
    assert_eq!(
        post(SCHEDULE),
        Ok(Request::Schedule(ScheduleQuery {
            cgroup_path: "/kubepods/pod a/ctr".to_owned(),
            task_id: 140_654_172_626_816,
            enable_queue: true,
            token_version: 2,
            duration_seconds: 45,
            size: Some(Size::Xlarge),
            token: Some(Secret::new("a.b+c")),
        }))
    );
    assert_eq!(post("/allow?allowToken=abc&pid=31"), Ok(Request::Allow { allow_token: Secret::new("abc"), pid: 31 }));
    assert_eq!(
        post("/release?allowToken=abc&fail=true"),
        Ok(Request::Release { allow_token: Secret::new("abc"), failed: true })
    );
    assert_eq!(post("/startup-report"), Ok(Request::StartupReport));
    assert_eq!(parse_request("GET", b"/queue-size"), Ok(Request::QueueSize));
}

#[test]
fn what_may_be_left_out_has_the_clients_default() {
    let Ok(Request::Schedule(query)) = post(&schedule_with("durationSeconds", None)) else { panic!() };
    assert_eq!((query.duration_seconds, query.size, query.token), (60, None, None));
    // A newer client may send more.
    assert!(post("/allow?allowToken=abc&pid=31&color=red").is_ok());
    // An empty token was presented, so it is one, and a bad one.
    assert_eq!(schedule("token", "").unwrap().token, Some(Secret::new("")));
}

#[test]
fn missing_and_doubled_fields_are_named() {
    for field in ["cgroupPath", "taskId", "enableQueue", "tokenVersion"] {
        assert_eq!(problem(&schedule_with(field, None)), Problem::Missing { field });
    }
    assert_eq!(problem("/allow?allowToken=&pid=3"), Problem::Missing { field: "allowToken" });
    assert_eq!(problem("/allow?allowToken=a"), Problem::Missing { field: "pid" });
    assert_eq!(problem("/release?fail=true"), Problem::Missing { field: "allowToken" });
    assert_eq!(problem("/release?allowToken=a"), Problem::Missing { field: "fail" });
    assert_eq!(problem(&format!("{SCHEDULE}&taskId=1")), Problem::Duplicate { field: "taskId" });
    assert_eq!(problem(&format!("{SCHEDULE}&token=1")), Problem::Duplicate { field: "token" });
}

#[test]
fn numbers_are_whole_and_in_range() {
    assert_eq!(schedule("taskId", "18446744073709551615").unwrap().task_id, u64::MAX);
    assert_eq!(schedule("durationSeconds", "0").unwrap().duration_seconds, 0);
    let longest = schedule("durationSeconds", "18446744073709551615").unwrap();
    assert_eq!(longest.declared_ms(), i64::MAX.unsigned_abs());
    assert_eq!(schedule("durationSeconds", "45").unwrap().declared_ms(), 45_000);
    for value in ["-1", "18446744073709551616", "-0", "99999999999999999999999999999"] {
        let out = Problem::OutOfRange { field: "durationSeconds", value: value.to_owned(), least: 0, most: u64::MAX };
        assert_eq!(schedule("durationSeconds", value), Err(out));
    }
    for value in ["", "-", "abc", "1.5", "1e3", "%2B5", "0x10", "%D9%A3", "5 "] {
        let found = schedule("durationSeconds", value);
        assert!(matches!(found, Err(Problem::NotANumber { field: "durationSeconds", .. })), "{value}: {found:?}");
    }
    for pid in ["0", "-1", "2147483648"] {
        let found = problem(&format!("/allow?allowToken=a&pid={pid}"));
        assert!(matches!(found, Problem::OutOfRange { field: "pid", .. }), "{pid}: {found:?}");
    }
}

#[test]
fn other_values_are_named_and_shown_in_part() {
    assert_eq!(schedule("gpuSize", "weird"), Err(Problem::UnknownSize { value: "weird".to_owned() }));
    assert_eq!(schedule("gpuSize", ""), Err(Problem::UnknownSize { value: String::new() }));
    assert_eq!(
        schedule("enableQueue", "True"),
        Err(Problem::NotABoolean { field: "enableQueue", value: "True".to_owned() })
    );
    let bad = post(&schedule_with("gpuSize", Some(&format!("%0A{}", "x".repeat(200))))).unwrap_err();
    assert_eq!(bad.to_string(), format!("/schedule: `gpuSize` is `\\n{}…`, must be large or xlarge", "x".repeat(63)));
}

#[test]
fn lengths_and_encodings_are_checked() {
    let path = "a".repeat(CGROUP_PATH_MAX);
    assert_eq!(schedule("cgroupPath", &path).unwrap().cgroup_path.len(), CGROUP_PATH_MAX);
    assert_eq!(
        schedule("cgroupPath", &format!("{path}a")),
        Err(Problem::TooLong { field: "cgroupPath", bytes: CGROUP_PATH_MAX + 1, limit: CGROUP_PATH_MAX })
    );
    assert_eq!(schedule("token", "%FF"), Err(Problem::NotUtf8 { field: "token" }));
    assert_eq!(problem("/allow?%C3%28=1"), Problem::NotUtf8 { field: "a field's name" });
    let long = schedule_with("token", Some(&"a".repeat(TARGET_MAX)));
    assert_eq!(problem(&long), Problem::TargetTooLong { bytes: long.len() });
    let token = "a".repeat(ALLOW_TOKEN_MAX + 1);
    assert!(matches!(problem(&format!("/allow?allowToken={token}&pid=2")), Problem::TooLong { .. }));
}

#[test]
fn paths_and_methods_are_the_clients() {
    for path in ["", "/", "/Schedule", "/schedule/", "schedule?x", "/api/v1/schedule", "*", "http://h/schedule"] {
        assert_eq!(post(path).unwrap_err().call, Call::Unknown, "{path}");
    }
    let bad = parse_request("GET", SCHEDULE.as_bytes()).unwrap_err();
    assert_eq!(bad.problem, Problem::WrongMethod { method: "GET".to_owned(), expected: "POST" });
    assert!(parse_request("POST", b"/queue-size").is_err());
}

#[test]
fn tokens_are_never_printed() {
    let parsed = post(SCHEDULE).unwrap();
    assert!(!format!("{parsed:?}").contains("a.b+c"));
    for target in [
        "/allow?allowToken=s3cret&pid=x",
        "/allow?allowToken=s3cret&allowToken=s3cret&pid=1",
        "/release?allowToken=s3cret&fail=maybe",
        "/schedule?token=s3cret",
        "/schedule?token=s3cret&token=s3cret",
        "/unknown?token=s3cret",
        "/allow?allowToken=s3cret%FF&pid=1",
    ] {
        let bad = post(target).unwrap_err();
        let Answer { body, .. } = refuse(&bad);
        let shown = format!("{bad} {bad:?} {}", String::from_utf8_lossy(&body));
        assert!(!shown.contains("s3cret"), "{shown}");
    }
}

proptest! {
    #[test]
    fn no_bytes_panic(method in ".{0,8}", target in proptest::collection::vec(any::<u8>(), 0..200)) {
        if let Err(bad) = parse_request(&method, &target) {
            refuse(&bad).encode();
        }
    }

    #[test]
    fn no_query_panics(
        call in prop::sample::select(vec!["/schedule", "/allow", "/release", "/startup-report"]),
        query in prop::collection::vec(
            (
                prop::sample::select(vec![
                    "cgroupPath", "taskId", "enableQueue", "tokenVersion", "durationSeconds", "gpuSize", "token",
                    "allowToken", "pid", "fail", "other",
                ]),
                prop_oneof![
                    any::<String>(), any::<i128>().prop_map(|number| number.to_string()),
                    Just("true".to_owned()), Just("large".to_owned()),
                ],
            ),
            0..12,
        ),
    ) {
        let query = form_urlencoded::Serializer::new(String::new()).extend_pairs(query).finish();
        if let Err(bad) = parse_request("POST", format!("{call}?{query}").as_bytes()) {
            let status = refuse(&bad).status;
            prop_assert!(matches!(
                (bad.call, status),
                (Call::Schedule, 400 | 429) | (Call::Allow, 400) | (Call::Release, 404)
            ));
        }
    }

    #[test]
    fn what_is_encoded_is_what_is_read(path in "[^\u{fffd}]{0,40}", task_id: u64, duration: u64, token in "[^\u{fffd}]{0,40}") {
        let query = form_urlencoded::Serializer::new(String::new())
            .append_pair("cgroupPath", &path)
            .append_pair("taskId", &task_id.to_string())
            .append_pair("enableQueue", "true")
            .append_pair("tokenVersion", "1")
            .append_pair("durationSeconds", &duration.to_string())
            .append_pair("token", &token)
            .finish();
        let Ok(Request::Schedule(read)) = post(&format!("/schedule?{query}")) else { panic!("{query}") };
        prop_assert_eq!(read.cgroup_path, path);
        prop_assert_eq!((read.task_id, read.duration_seconds), (task_id, duration));
        prop_assert_eq!(read.token, Some(Secret::new(token)));
    }
}
