//! The trace files of `replay`, and the comparison of policies that they are for.

use std::collections::BTreeSet;

use spaceport_core::queue::LaneSettings;
use spaceport_replay::admission::Quota;
use spaceport_replay::comparison::Comparison;
use spaceport_replay::policy::PolicyName;
use spaceport_replay::promise::HoldLimits;
use spaceport_replay::replay::Rules;
use spaceport_replay::request::Trace;
use spaceport_replay::trace::{COLUMNS, TraceError, parse, write};

use crate::Verdict;

/// Latest time and longest duration of a trace, milliseconds: a year.
const TIME_MAX_MS: u64 = 31_536_000_000;
/// Malformed lines that are told one by one.
const TOLD_MAX: usize = 20;
/// Requests of a trace that is replayed as well: more of them take longer, and no longer file comes near a bound.
const REPLAYED_MAX: usize = 100;

/// A file.
///
/// # Panics
/// If a trace is out of its bounds, does not survive being written, or cannot be replayed; or if lines are refused that are
/// not there, or not all that are in the way of the others.
pub fn check(bytes: &[u8]) -> Verdict {
    // What is no text is told before it is parsed.
    let Ok(text) = std::str::from_utf8(bytes) else { return Verdict::Refused };
    let parsed = parse(text);
    let of_windows = parse(&text.replace('\n', "\r\n"));
    assert_eq!(of_windows.as_ref().ok(), parsed.as_ref().ok(), "with other line ends it is another trace");
    match parsed {
        Ok(trace) => {
            within_bounds(&trace);
            let lines = text.lines().count();
            assert!(trace.requests.len() <= lines, "{} requests of {lines} lines", trace.requests.len());
            let written = write(&trace);
            assert_eq!(parse(&written), Ok(trace.clone()), "written and read again: {written}");
            if trace.requests.len() <= REPLAYED_MAX {
                replayed(&trace);
            }
            Verdict::Taken
        }
        Err(error) => {
            refused(text, &error);
            Verdict::Refused
        }
    }
}

fn within_bounds(trace: &Trace) {
    let mut last_ms = 0;
    for request in &trace.requests {
        assert!((last_ms..=TIME_MAX_MS).contains(&request.arrival_ms), "{request:?} after {last_ms} ms");
        last_ms = request.arrival_ms;
        for ms in [request.duration_ms, request.declared_ms] {
            assert!((1..=TIME_MAX_MS).contains(&ms), "{request:?}");
        }
    }
    let callers: BTreeSet<usize> = trace.requests.iter().map(|request| request.user).collect();
    assert!(callers.into_iter().eq(0..trace.users.len()), "each user has requests, and each request a user");
    let names: BTreeSet<&str> = trace.users.iter().map(|user| user.name.as_str()).collect();
    assert_eq!(names.len(), trace.users.len(), "a user is there twice: {names:?}");
    // Or it would be another name when it is read again.
    let is_name = |name: &&str| !name.is_empty() && name.trim() == *name && !name.contains([',', '"', '\n']);
    assert!(names.iter().all(is_name), "{names:?}");
}

fn refused(text: &str, error: &TraceError) {
    let TraceError::Malformed { lines, more } = error else {
        assert!(text.lines().count() <= 1, "there is more than a header: {error}");
        return;
    };
    assert!((1..=TOLD_MAX).contains(&lines.len()) && (*more == 0 || lines.len() == TOLD_MAX), "{error}");
    let mut last = 0;
    for wrong in lines {
        assert!(wrong.line > last, "in the order of the file: {error}");
        last = wrong.line;
        let line = text.lines().nth(wrong.line - 1).expect("a line of the file");
        assert!(line.contains(&wrong.found) && COLUMNS.contains(&wrong.column), "{wrong} of {line:?}");
        assert!(error.to_string().contains(&wrong.to_string()), "{error}");
    }
    if *more == 0 {
        let is_told = |number: usize| lines.iter().any(|wrong| wrong.line == number);
        let rest: Vec<&str> =
            (1..).zip(text.lines()).filter(|(number, _)| !is_told(*number)).map(|(_, line)| line).collect();
        let rest = parse(&rest.join("\n"));
        assert!(matches!(rest, Ok(_) | Err(TraceError::Empty)), "without the lines that are told: {rest:?}");
    }
}

/// On two cards, so that somebody waits. A policy that gives a slot twice or lets somebody wait for ever panics by itself.
fn replayed(trace: &Trace) {
    let rules = Rules {
        nodes: 1,
        cards: 2,
        limits: HoldLimits::PRODUCT,
        quota: Quota::Off,
        bounds: None,
        lanes: LaneSettings::default(),
    };
    let comparison = Comparison::of(std::slice::from_ref(trace), &rules);
    for (policy, figures) in &comparison.policies {
        let (started, requests) = (figures.waits.started, trace.requests.len());
        assert_eq!(started, requests, "{}: nobody is refused without a rule", policy.as_str());
    }
    let worst = comparison.policies[&PolicyName::TwoLane].worst_over_bound;
    assert!(worst <= 1.0, "somebody waited {worst} times as long as promised (invariant 11)");
}
