//! How long the functions of a Space run, for its author (requirement A13). Pure.

use spaceport_core::queue::Learned;
use spaceport_crds::FunctionDuration;
use spaceport_crds::function_duration::MAX_FUNCTIONS;

use crate::ledger::convert::size_text;
use crate::ledger::display::seconds;

/// A percentile that moved by less is shown as it was, percent: a status that changed with every call would be written with
/// every call.
const MOVED_PERCENT: i64 = 10;

/// The rows to show, given those that are shown. A new term knows nothing at first: what was shown stays until it does.
pub fn rows(shown: &[FunctionDuration], learned: Option<&[Learned]>) -> Vec<FunctionDuration> {
    let Some(learned) = learned else { return shown.to_vec() };
    let rows = learned.iter().take(MAX_FUNCTIONS).map(row);
    let of = |row: &FunctionDuration, known: &&FunctionDuration| {
        known.size == row.size && known.declared_milliseconds == row.declared_milliseconds
    };
    rows.map(|row| shown.iter().find(|known| of(&row, known) && is_near(known, &row)).cloned().unwrap_or(row)).collect()
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

    fn learned(p50_ms: u64, suggested_ms: Option<u64>) -> Learned {
        Learned {
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
    fn small_changes_and_a_new_term_write_nothing() {
        let shown = rows(&[], Some(&[learned(2_000, Some(12_000))]));
        assert_eq!(rows(&shown, Some(&[learned(2_199, Some(12_000))])), shown, "within a tenth");
        assert_ne!(rows(&shown, Some(&[learned(2_201, Some(12_000))])), shown);
        assert_ne!(rows(&shown, Some(&[learned(2_000, Some(13_000))])), shown, "another suggestion is told at once");
        assert_eq!(rows(&shown, None), shown, "after a fail-over nothing is known yet");
    }
}
