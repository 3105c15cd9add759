use serde_json::{Value, json};
use spaceport_crds::{GPUTier, Space, SpaceStage};

use super::super::observe::{self, PodProgress};
use super::super::status::{Known, status};
use super::super::validate::tests::inline;
use super::*;

fn report(functions: &Value) -> Report {
    let form = json!({ "declaredDurations": 1, "functions": functions, "computed": 0, "unread": 0, "leftOut": 0 });
    Report::read(&form.to_string()).unwrap()
}

fn function(name: &str, seconds: u32) -> Value {
    json!({ "name": name, "file": "app.py", "line": 12, "seconds": seconds })
}

fn tier(spec: &Value) -> TierSeen {
    let object: GPUTier = serde_json::from_value(spec.clone()).unwrap();
    TierSeen::try_from(&object).unwrap()
}

fn plain_tier(name: &str, seconds_per_window: i64, longest: i64) -> Value {
    json!({
        "apiVersion": "spaceport.dev/v1alpha1",
        "kind": "GPUTier",
        "metadata": { "name": name },
        "spec": { "gpuSecondsPerWindow": seconds_per_window, "longestCallSeconds": longest, "concurrentLeases": 1 },
    })
}

/// The tiers that the project ships, without the small one of the demonstration.
fn shipped() -> Vec<TierSeen> {
    let text = include_str!("../../../../examples/tiers.yaml");
    let documents = serde_norway::Deserializer::from_str(text);
    let tiers = documents.map(|document| tier(&Value::deserialize(document).unwrap()));
    tiers.filter(|tier| tier.name != "demo").collect()
}

fn judged(report: &Report, tiers: &[TierSeen]) -> (ConditionStatus, SpaceReason, String) {
    match judge(report, tiers.iter(), NodeSettings::default(), false) {
        Verdict::Judged { holds, reason, message } => (holds, reason, message),
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_author_is_told_whom_a_duration_shuts_out_and_what_to_do() {
    let (holds, reason, message) = judged(&report(&json!([function("generate", 300)])), &shipped());
    assert_eq!((holds, reason), (ConditionStatus::False, SpaceReason::LongerThanTierAllows));
    assert_eq!(
        message,
        "generate (app.py:12) declares 300s of large, but tiers allow less: guest and space at most 60s, free at most 120s; \
         declare at most 60s, or leave it to callers of pro, team and enterprise"
    );

    let (.., message) = judged(&report(&json!([function("endless", 4000)])), &shipped());
    assert!(message.ends_with("pro, team and enterprise at most 300s; declare at most 60s"), "{message}");

    let all = json!([function("short", 60), { "name": "plain", "file": "app.py", "line": 3, "seconds": 60, "default": true }]);
    let (holds, reason, message) = judged(&report(&all), &shipped());
    assert_eq!((holds, reason), (ConditionStatus::True, SpaceReason::WithinEveryTier));
    assert_eq!(message, "2 declared durations are legal in every tier");
}

#[test]
fn what_the_client_makes_of_a_number_is_said() {
    let [day, nothing, default] = [
        json!({ "name": "day", "file": "app.py", "line": 1, "seconds": 3600, "written": 90_000 }),
        function("nothing", 0),
        json!({ "name": "plain", "file": "app.py", "line": 3, "seconds": 60, "default": true }),
    ]
    .map(|row| judged(&report(&json!([row])), &[tier(&plain_tier("tiny", 60, 50))]).2);
    assert!(day.starts_with("day (app.py:1) declares 90000s, which the client sends as 3600s, of large"), "{day}");
    assert!(nothing.ends_with("no time at all is refused in every tier; declare from 1s to 50s"), "{nothing}");
    assert!(default.starts_with("plain (app.py:3) names no duration, which is 60s, of large"), "{default}");
}

#[test]
fn the_rule_is_the_one_that_refuses_calls() {
    let row = |seconds: u32, size: &str| {
        report(&json!([{ "name": "f", "file": "a.py", "line": 1, "seconds": seconds, "size": size }]))
    };
    let refused = |report: &Report, tier: &TierSeen, settings, clamps| {
        let verdict = judge(report, [tier].into_iter(), settings, clamps);
        matches!(verdict, Verdict::Judged { holds: ConditionStatus::False, .. })
    };
    let plain = NodeSettings::default();
    let small = tier(&plain_tier("small", 60, 50));
    assert!(!refused(&row(50, "large"), &small, plain, false));
    assert!(refused(&row(51, "large"), &small, plain, false));
    assert!(!refused(&row(30, "xlarge"), &small, plain, false));
    assert!(
        refused(&row(31, "xlarge"), &small, plain, false),
        "a whole card counts twice: 62 s are more than the whole quota"
    );
    assert!(!refused(&row(31, "xlarge"), &small, plain, true), "clampToRemaining makes the call shorter");
    assert!(refused(&row(51, "xlarge"), &small, plain, true), "and never legal what is above the longest call");

    let mut grants = plain_tier("grants", 60, 50);
    grants["spec"]["extendableByGrants"] = "Always".into();
    assert!(!refused(&row(31, "xlarge"), &tier(&grants), plain, false), "a grant may make the quota large enough");

    let factor = NodeSettings { duration_factor_percent: 150, ..plain };
    let roomy = tier(&plain_tier("roomy", 600, 60));
    assert!(
        !refused(&row(60, "large"), &roomy, factor, false),
        "the limit is multiplied as the client multiplies (L19)"
    );
    assert!(refused(&row(61, "large"), &roomy, factor, false));

    let mut guests = plain_tier("guests", 60, 50);
    guests["spec"]["callers"] = "Guests".into();
    guests["spec"]["gpuSecondsPerAddressPrefix"] = 600.into();
    assert!(
        refused(&row(31, "xlarge"), &tier(&guests), plain, false),
        "a visitor's own quota counts, not the prefix's"
    );

    let none = tier(&plain_tier("none", 0, 50));
    assert!(!refused(&row(50, "large"), &none, plain, false), "no duration helps where nothing is granted");
}

#[test]
fn what_is_computed_at_the_call_is_never_judged() {
    let computed = Report { computed: 2, ..Report::default() };
    let (holds, reason, message) = judged(&computed, &shipped());
    assert_eq!((holds, reason), (ConditionStatus::Unknown, SpaceReason::KnownAtCallOnly));
    assert!(message.starts_with("2 durations are computed"), "{message}");
    let both = Report { computed: 1, missing: 1, ..report(&json!([function("short", 10)])) };
    let (.., message) = judged(&both, &shipped());
    assert_eq!(
        message,
        "1 declared duration is legal in every tier; 1 more is computed at each call; 1 file or function was not looked at"
    );
    let nothing = |report: &Report, tiers: &[TierSeen]| judge(report, tiers.iter(), NodeSettings::default(), false);
    assert_eq!(nothing(&Report::default(), &shipped()), Verdict::Nothing);
    assert_eq!(
        nothing(&report(&json!([function("long", 4000)])), &[]),
        Verdict::Nothing,
        "there is nothing to compare with"
    );
}

#[test]
fn a_long_list_is_told_in_part() {
    let functions: Vec<Value> = (0..5).map(|number| function(&format!("f{number}"), 300)).collect();
    let tiers: Vec<TierSeen> = (0..9).map(|number| tier(&plain_tier(&format!("t{number}"), 600, 60))).collect();
    let (.., message) = judged(&report(&functions.into()), &tiers);
    assert!(message.contains("t0, t1, t2, t3 and 5 more at most 60s"), "{message}");
    assert!(message.ends_with("f2 (app.py:12) declares 300s of large, but tiers allow less: t0, t1, t2, t3 and 5 more at most 60s; declare at most 60s. The same goes for 2 more"), "{message}");
}

#[test]
fn whoever_writes_something_else_is_ignored() {
    let with = |field: &str, value: Value| {
        let mut form = json!({ "declaredDurations": 1, "functions": [function("f", 60)] });
        form[field] = value;
        Report::read(&form.to_string())
    };
    assert!(with("later", 1.into()).is_some(), "a newer writer may say more");
    assert_eq!(with("declaredDurations", 2.into()), None);
    assert_eq!(with("functions", json!([function("f", SECONDS_END)])), None);
    assert_eq!(with("functions", json!(vec![json!({}); 3])), None);
    assert_eq!(with("computed", (-1).into()), None);
    assert_eq!(with("computed", "x".repeat(REPORT_BYTES_MAX).into()), None);
    for garbage in ["", "0123456789abcdef", "null", "[]", "{}", "\u{0}", &"[".repeat(REPORT_BYTES_MAX)] {
        assert_eq!(Report::read(garbage), None, "{garbage:?}");
    }
    let hostile =
        with("functions", json!([{ "name": "\u{1b}[2J\u{202e}f", "file": "a\nb.py", "line": 1, "seconds": 60 }]));
    let (.., message) = judged(&hostile.unwrap(), &[tier(&plain_tier("tiny", 60, 50))]);
    assert!(message.starts_with("??2J?f (a?b.py:1)"), "{message}");
}

/// A pod whose init container `environment` left these last words.
fn pod(words: &str) -> PodProgress {
    let ended = |name: &str, message: &str| {
        json!({
            "name": name, "image": "", "imageID": "", "ready": true, "restartCount": 0,
            "state": { "terminated": { "exitCode": 0, "message": message } },
        })
    };
    let pod = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "status": {
            "conditions": [{ "type": "PodScheduled", "status": "True" }],
            "initContainerStatuses": [ended("source", "0123abcd"), ended("environment", words)],
        },
    });
    observe::progress(&serde_json::from_value(pod).unwrap())
}

#[test]
fn the_report_comes_with_the_pod_and_garbage_has_no_effect() {
    let words = json!({ "declaredDurations": 1, "functions": [function("f", 60)] }).to_string();
    assert_eq!(pod(&words).declared, Some(report(&json!([function("f", 60)]))));
    assert_eq!(pod("").declared, Some(Report::default()));
    let garbage = pod("\u{1b}[2J{");
    assert_eq!(garbage.declared, Some(Report::default()));
    assert_eq!(garbage, pod(""));
    assert_eq!(PodProgress::default().declared, None, "nothing is known before the environment is there");
}

fn shown(space: &Space) -> Option<(String, String)> {
    let status = space.status.as_ref()?;
    let found = status.conditions.iter().find(|condition| condition.type_ == "DurationsAllowed")?;
    Some((found.status.clone(), found.reason.clone()))
}

#[test]
fn the_condition_stops_nothing_and_stays_while_nothing_is_known() {
    use spaceport_core::stage::Progress::Done;
    let mut space = inline(&[("app.py", "")]);
    let running = PodProgress {
        scheduled: Done,
        source: Done,
        environment: Done,
        started: Done,
        healthy: Done,
        ..PodProgress::default()
    };
    let now = jiff::Timestamp::UNIX_EPOCH;
    let mut look = |declared: Verdict| {
        let known = Known { pod: Some(running.clone()), declared, ..Known::default() };
        let after = status(&space, &known, now);
        assert_eq!(after.stage, SpaceStage::Running);
        assert_eq!(after.reason, None);
        let told = turned_false(space.status.as_ref(), &after).map(ToOwned::to_owned);
        space.status = Some(after);
        (shown(&space), told)
    };
    let refused = || judge(&report(&json!([function("long", 300)])), shipped().iter(), NodeSettings::default(), false);
    let is_false = Some(("False".to_owned(), "LongerThanTierAllows".to_owned()));
    assert_eq!(look(Verdict::Unseen), (None, None));
    let (seen, told) = look(refused());
    assert_eq!(seen, is_false);
    assert!(told.is_some_and(|message| message.starts_with("long (app.py:12)")), "an Event says it once");
    assert_eq!(look(refused()), (is_false.clone(), None), "and not again");
    assert_eq!(look(Verdict::Unseen), (is_false, None), "a new pod has not come so far yet");
    let fits = judge(&report(&json!([function("long", 30)])), shipped().iter(), NodeSettings::default(), false);
    assert_eq!(look(fits), (Some(("True".to_owned(), "WithinEveryTier".to_owned())), None));
    assert!(look(refused()).1.is_some(), "it turned false again");
    assert_eq!(look(Verdict::Nothing), (None, None));
}

mod source;
