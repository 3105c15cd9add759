//! How long the functions of a Space run, for its author (requirement A13). Pure.

use spaceport_core::ids::Revision;
use spaceport_core::queue::{Learned, SAMPLES_MAX, SUGGEST_MIN};
use spaceport_crds::FunctionDuration;
use spaceport_crds::function_duration::MAX_FUNCTIONS;

use crate::ledger::convert::size_text;
use crate::ledger::display::seconds;

/// A percentile that moved by less is shown as it was, percent: a status that changed with every call would be written with
/// every call.
const MOVED_PERCENT: i64 = 10;

/// The rows to show, given those that are shown: of the revision that answers visitors, and while none does, what is shown
/// stays. A new term knows nothing at first: what was shown of a function of this revision stays until this term knows as
/// much of it. It goes when another one of the Space has run as often as is remembered: then it is hardly called any more.
pub fn rows(
    shown: &[FunctionDuration],
    learned: Option<&[Learned]>,
    answering: Option<Revision>,
) -> Vec<FunctionDuration> {
    let Some(revision) = answering else { return shown.to_vec() };
    let text = revision.to_string();
    let shown: Vec<&FunctionDuration> = shown.iter().filter(|row| row.revision == text).collect();
    let learned: Vec<&Learned> =
        learned.unwrap_or_default().iter().filter(|learned| learned.revision == revision).collect();
    let is_known = |shown: &FunctionDuration| learned.iter().any(|known| is_same(shown, &row(known)));
    let before = |found: &FunctionDuration| shown.iter().copied().find(|shown| is_same(shown, found));
    let mut rows: Vec<FunctionDuration> = learned.iter().map(|known| row_over(before(&row(known)), known)).collect();
    if learned.iter().all(|known| known.calls < SAMPLES_MAX) {
        rows.extend(shown.iter().copied().filter(|shown| !is_known(shown)).cloned());
    }
    rows.truncate(MAX_FUNCTIONS);
    rows.sort_by_key(|row| (row.size == spaceport_crds::GpuSize::Xlarge, row.declared_milliseconds));
    rows
}

/// The row of a function, given the one that is shown of it.
fn row_over(shown: Option<&FunctionDuration>, learned: &Learned) -> FunctionDuration {
    let found = row(learned);
    let Some(shown) = shown else { return found };
    // Of so few calls nothing is suggested; an earlier term knew more.
    let is_too_little = learned.calls < SUGGEST_MIN;
    let suggested_duration = if is_too_little { shown.suggested_duration.clone() } else { found.suggested_duration };
    let found = FunctionDuration { suggested_duration, ..found };
    if is_near(shown, &found) { shown.clone() } else { found }
}

fn is_same(one: &FunctionDuration, other: &FunctionDuration) -> bool {
    one.size == other.size && one.declared_milliseconds == other.declared_milliseconds
}

/// One line for the column: `12s for 60s, 30s for 120s xlarge`; none if nothing is suggested.
pub fn suggested(rows: &[FunctionDuration]) -> Option<String> {
    let line = |row: &FunctionDuration| {
        let size = if row.size == spaceport_crds::GpuSize::Xlarge { " xlarge" } else { "" };
        let declared = seconds(u64::try_from(row.declared_milliseconds).unwrap_or_default());
        row.suggested_duration.as_ref().map(|suggested| format!("{suggested} for {declared}{size}"))
    };
    let lines: Vec<String> = rows.iter().filter_map(line).collect();
    (!lines.is_empty()).then(|| lines.join(", "))
}

fn row(learned: &Learned) -> FunctionDuration {
    let amount = |ms: u64| i64::try_from(ms).unwrap_or(i64::MAX);
    FunctionDuration {
        revision: learned.revision.to_string(),
        size: size_text(learned.size),
        declared_milliseconds: amount(learned.declared_ms),
        calls: i32::try_from(learned.calls).unwrap_or(i32::MAX),
        p50_milliseconds: amount(learned.p50_ms),
        p95_milliseconds: amount(learned.p95_ms),
        max_milliseconds: amount(learned.max_ms),
        suggested_duration: learned.suggested_ms.map(seconds),
    }
}

fn is_near(shown: &FunctionDuration, found: &FunctionDuration) -> bool {
    let near = |shown: i64, found: i64| shown.abs_diff(found) <= shown.unsigned_abs() / MOVED_PERCENT.unsigned_abs();
    shown.suggested_duration == found.suggested_duration
        && near(shown.p50_milliseconds, found.p50_milliseconds)
        && near(shown.p95_milliseconds, found.p95_milliseconds)
        && near(shown.max_milliseconds, found.max_milliseconds)
}

#[cfg(test)]
mod tests {
    use spaceport_core::ids::Size;

    use super::*;

    const OLD: Revision = Revision(1);
    const NEW: Revision = Revision(2);

    fn rows(shown: &[FunctionDuration], learned: Option<&[Learned]>) -> Vec<FunctionDuration> {
        super::rows(shown, learned, Some(NEW))
    }

    fn learned(p50_ms: u64, suggested_ms: Option<u64>) -> Learned {
        Learned {
            revision: NEW,
            size: Size::Large,
            declared_ms: 60_000,
            calls: 32,
            p50_ms,
            p95_ms: 7_000,
            max_ms: 7_900,
            suggested_ms,
        }
    }

    #[test]
    fn an_author_is_told_what_would_have_been_enough() {
        let shown =
            rows(&[], Some(&[learned(2_000, Some(12_000)), Learned { size: Size::Xlarge, ..learned(1, None) }]));
        assert_eq!((shown.len(), shown[0].p50_milliseconds, shown[0].calls), (2, 2_000, 32));
        assert_eq!(suggested(&shown).as_deref(), Some("12s for 60s"));
        assert_eq!(suggested(&rows(&[], Some(&[learned(1, None)]))), None);
    }

    #[test]
    fn what_an_old_version_needed_is_shown_until_the_new_one_answers() {
        let old = [Learned { revision: OLD, ..learned(9_000, Some(14_000)) }];
        let shown = super::rows(&[], Some(&old), Some(OLD));
        assert_eq!((shown.len(), shown[0].revision.as_str()), (1, "0000000000000001"));
        assert_eq!(super::rows(&shown, Some(&old), None), shown, "neither answers for a moment");
        assert_eq!(rows(&shown, Some(&old)), []);
        assert_eq!(rows(&shown, None), [], "nor after a fail-over");
        let both = [old[0], learned(2_000, Some(12_000))];
        assert_eq!(suggested(&rows(&shown, Some(&both))).as_deref(), Some("12s for 60s"));
        assert_eq!(super::rows(&[], Some(&both), Some(OLD)), shown, "and who goes back finds it again");
    }

    #[test]
    fn small_changes_and_a_new_term_write_nothing() {
        let shown = rows(&[], Some(&[learned(2_000, Some(12_000))]));
        assert_eq!(rows(&shown, Some(&[learned(2_199, Some(12_000))])), shown, "within a tenth");
        assert_ne!(rows(&shown, Some(&[learned(2_201, Some(12_000))])), shown);
        assert_ne!(rows(&shown, Some(&[learned(2_000, Some(13_000))])), shown, "another suggestion is told at once");
        assert_eq!(rows(&shown, None), shown, "after a fail-over nothing is known yet");
    }

    #[test]
    fn a_new_term_replaces_what_was_shown_only_by_what_it_knows_as_well() {
        let large = learned(2_000, Some(12_000));
        let xlarge = Learned { size: Size::Xlarge, ..learned(5_000, Some(20_000)) };
        let shown = rows(&[], Some(&[large, xlarge]));
        let few = Learned { calls: 5, suggested_ms: None, ..xlarge };
        assert_eq!(rows(&shown, Some(&[few])), shown, "of five calls no suggestion is known, and nothing of the other");
        let slower = rows(&shown, Some(&[Learned { p50_ms: 6_900, ..few }]));
        assert_eq!((&slower[0], slower[1].p50_milliseconds, slower[1].calls), (&shown[0], 6_900, 5));
        assert_eq!(suggested(&slower), suggested(&shown));
        let enough = Learned { calls: 20, suggested_ms: None, ..xlarge };
        assert_eq!(rows(&shown, Some(&[enough]))[1].suggested_duration, None, "now it would be no less");
        assert_eq!(rows(&shown, Some(&[xlarge])), shown[1..], "the other one is not called any more");
    }

    #[test]
    fn functions_that_are_known_are_shown_before_those_of_an_earlier_term() {
        let declared = |declared_ms| Learned { declared_ms, calls: 5, ..learned(1, None) };
        let many: Vec<Learned> = (1..=MAX_FUNCTIONS as u64).map(|second| declared(second * 1_000)).collect();
        let shown = rows(&[], Some(&many));
        let shown = rows(&shown, Some(&[declared(500), declared(99_000)]));
        let seconds: Vec<i64> = shown.iter().map(|row| row.declared_milliseconds).collect();
        assert_eq!((shown.len(), seconds[0], seconds[1], seconds[15]), (MAX_FUNCTIONS, 500, 1_000, 99_000));
    }
}
