//! Traces as CSV: `arrival_s,duration_s,gpu_fraction_or_count,user[,declared_s[,tier[,function]]]`.
//!
//! A first line with these names is taken as a header and may be left out. Seconds are decimal numbers, kept as
//! milliseconds; the fraction is 0.5 (half a card) or 1 (a whole one). What is not declared is 60 s, as in the product,
//! but a longer duration is then declared as it is: a trace tells what did run. The tier is `free` where none stands.
//! Fields have no quotes and no commas.

use std::collections::HashMap;
use std::fmt::Write as _;

use spaceport_core::ids::Size;

use crate::demand::DECLARED_DEFAULT_MS;
use crate::request::{Request, Tier, Trace, User};

/// The columns, in their order. The first four must be there.
pub const COLUMNS: [&str; 7] =
    ["arrival_s", "duration_s", "gpu_fraction_or_count", "user", "declared_s", "tier", "function"];
/// Columns without which a line says nothing.
const COLUMNS_NEEDED: usize = 4;
/// Malformed lines that are told one by one; a file in another format has as many as it has lines.
const ERRORS_MAX: usize = 20;
/// Latest time that a trace may name: a year. Sums of slot-milliseconds stay far from overflow.
const SECONDS_MAX: f64 = 31_536_000.0;

/// Why a text is no trace.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TraceError {
    /// Lines that cannot be understood; none of the others is used either.
    #[error("{} malformed line(s):\n{}{}", lines.len() + more, list(lines), and_more(*more))]
    Malformed {
        /// The first of them.
        lines: Vec<LineError>,
        /// How many more there are.
        more: usize,
    },
    /// Nothing but, perhaps, a header.
    #[error("the trace has no requests; expected lines of {}", COLUMNS.join(","))]
    Empty,
}

/// One malformed field.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}, column {column}: found {found:?}, expected {expected}")]
pub struct LineError {
    /// Its line, from 1.
    pub line: usize,
    /// Name of the column.
    pub column: &'static str,
    /// What stands there.
    pub found: String,
    /// What should.
    pub expected: String,
}

fn list(lines: &[LineError]) -> String {
    lines.iter().map(|error| format!("  {error}")).collect::<Vec<_>>().join("\n")
}

fn and_more(more: usize) -> String {
    if more == 0 { String::new() } else { format!("\n  and {more} more") }
}

/// Reads a trace.
///
/// # Errors
/// Names every malformed line (the first ones in full), or says that there is none at all.
pub fn parse(text: &str) -> Result<Trace, TraceError> {
    let mut reader = Reader::default();
    let mut errors = Vec::new();
    let mut more = 0;
    for (index, line) in text.lines().enumerate() {
        if index == 0 && is_header(line) {
            continue;
        }
        match reader.line(index + 1, line) {
            Ok(()) => {}
            Err(error) if errors.len() < ERRORS_MAX => errors.push(error),
            Err(_) => more += 1,
        }
    }
    if !errors.is_empty() {
        return Err(TraceError::Malformed { lines: errors, more });
    }
    if reader.trace.requests.is_empty() {
        return Err(TraceError::Empty);
    }
    Ok(reader.trace)
}

/// Writes a trace as [`parse`] reads it, with all columns.
pub fn write(trace: &Trace) -> String {
    let mut text = COLUMNS.join(",");
    text.push('\n');
    for request in &trace.requests {
        let user = &trace.users[request.user];
        let fraction = match request.size {
            Size::Large => "0.5",
            Size::Xlarge => "1",
        };
        let function = request.function.map_or_else(String::new, |function| function.to_string());
        let [arrival, duration, declared] =
            [request.arrival_ms, request.duration_ms, request.declared_ms].map(decimal_seconds);
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "{arrival},{duration},{fraction},{},{declared},{},{function}",
            user.name,
            user.tier.as_str()
        );
    }
    text
}

fn decimal_seconds(milliseconds: u64) -> String {
    format!("{}.{:03}", milliseconds / 1000, milliseconds % 1000)
}

fn is_header(line: &str) -> bool {
    let names: Vec<&str> = line.trim_end_matches('\r').split(',').map(str::trim).collect();
    names.len() >= COLUMNS_NEEDED && COLUMNS.starts_with(&names)
}

/// What has been read.
#[derive(Default)]
struct Reader {
    trace: Trace,
    users: HashMap<String, usize>,
}

// === impl Reader ===

impl Reader {
    fn line(&mut self, line: usize, text: &str) -> Result<(), LineError> {
        let fields: Vec<&str> = text.trim_end_matches('\r').split(',').map(str::trim).collect();
        if fields.len() < COLUMNS_NEEDED || fields.len() > COLUMNS.len() {
            return Err(LineError {
                line,
                column: COLUMNS[fields.len().min(COLUMNS.len() - 1)],
                found: text.to_owned(),
                expected: format!("{COLUMNS_NEEDED} to {} fields: {}", COLUMNS.len(), COLUMNS.join(",")),
            });
        }
        let fail = |column: usize, expected: &str| LineError {
            line,
            column: COLUMNS[column],
            found: fields[column].to_owned(),
            expected: expected.to_owned(),
        };
        let field = |column: usize| fields.get(column).copied().filter(|field| !field.is_empty());
        let arrival_ms =
            milliseconds(fields[0]).ok_or_else(|| fail(0, "seconds from the start of the trace, 0 to a year"))?;
        let last_ms = self.trace.last_arrival_ms();
        if arrival_ms < last_ms {
            return Err(fail(0, &format!("no time before the line above, {}", decimal_seconds(last_ms))));
        }
        let positive = |column: usize| milliseconds(fields[column]).filter(|time| *time > 0);
        let duration_ms = positive(1).ok_or_else(|| fail(1, "seconds, 0.001 to a year"))?;
        let size = match fields[2].parse::<f64>() {
            Ok(0.5) => Size::Large,
            Ok(1.0) => Size::Xlarge,
            _ => return Err(fail(2, "0.5 (half a card) or 1 (a whole card)")),
        };
        if fields[3].is_empty() || fields[3].contains('"') {
            return Err(fail(3, "the name of a user, without quotes"));
        }
        let declared_ms = match field(4) {
            Some(_) => positive(4).ok_or_else(|| fail(4, "seconds, 0.001 to a year, or nothing"))?,
            None => DECLARED_DEFAULT_MS.max(duration_ms),
        };
        let tier = match field(5) {
            Some(name) => Tier::ALL
                .into_iter()
                .find(|tier| tier.as_str() == name)
                .ok_or_else(|| fail(5, "guest, free, pro, enterprise, or nothing"))?,
            None => Tier::Free,
        };
        let function = match field(6) {
            Some(number) => Some(number.parse().map_err(|_| fail(6, "the number of a function, or nothing"))?),
            None => None,
        };
        let user = self.user(fields[3], tier);
        let first = self.trace.users[user].tier;
        if first != tier {
            return Err(fail(
                5.min(fields.len() - 1),
                &format!("the tier that the user had before, {}", first.as_str()),
            ));
        }
        self.trace.requests.push(Request { arrival_ms, duration_ms, declared_ms, size, user, function });
        Ok(())
    }

    fn user(&mut self, name: &str, tier: Tier) -> usize {
        if let Some(index) = self.users.get(name) {
            return *index;
        }
        let index = self.trace.users.len();
        self.users.insert(name.to_owned(), index);
        self.trace.users.push(User { name: name.to_owned(), tier });
        index
    }
}

fn milliseconds(text: &str) -> Option<u64> {
    let seconds: f64 = text.parse().ok()?;
    // Also false for what is not a number.
    (0.0..=SECONDS_MAX).contains(&seconds).then(|| (seconds * 1000.0).round() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn errors(text: &str) -> Vec<String> {
        match parse(text) {
            Err(TraceError::Malformed { lines, .. }) => lines.iter().map(ToString::to_string).collect(),
            other => panic!("expected malformed lines, got {other:?}"),
        }
    }

    #[test]
    fn a_trace_with_and_without_header_reads_the_same() {
        let lines = "0,12.5,0.5,ann\n3.25,90,1,bob,120\n3.25,70,1.0,ann\n";
        let bare = parse(lines).unwrap();
        assert_eq!(
            bare,
            parse(&format!("arrival_s,duration_s,gpu_fraction_or_count,user,declared_s\n{lines}")).unwrap()
        );
        let summary: Vec<_> = bare
            .requests
            .iter()
            .map(|request| (request.arrival_ms, request.duration_ms, request.declared_ms, request.size, request.user))
            .collect();
        assert_eq!(
            summary,
            [
                (0, 12_500, 60_000, Size::Large, 0),
                (3250, 90_000, 120_000, Size::Xlarge, 1),
                (3250, 70_000, 70_000, Size::Xlarge, 0),
            ]
        );
        assert_eq!(bare.users[1], User { name: "bob".into(), tier: Tier::Free });
    }

    #[test]
    fn every_malformed_line_is_told_with_what_is_wrong() {
        let text = "0,1,0.5,ann\n1,0,0.5,ann\n2,-3,0.5,ann\n2,x,0.5,ann\n3,1,0.25,ann\n3,1,2,ann\n1.5,1,0.5,ann\n\
                    -1,1,0.5,ann\nnan,1,0.5,ann\n4,1,0.5,\n4,1,0.5\n4,1,0.5,ann,0\n4,1,0.5,ann,9,boss\n\
                    4,1,0.5,ann,9,pro\n4,1,0.5,ann,9,free,f\n\n4,1,0.5,ann,9,free,1,1\n0,1,0.5,ann\n";
        assert_eq!(
            errors(text),
            [
                "line 2, column duration_s: found \"0\", expected seconds, 0.001 to a year",
                "line 3, column duration_s: found \"-3\", expected seconds, 0.001 to a year",
                "line 4, column duration_s: found \"x\", expected seconds, 0.001 to a year",
                "line 5, column gpu_fraction_or_count: found \"0.25\", expected 0.5 (half a card) or 1 (a whole card)",
                "line 6, column gpu_fraction_or_count: found \"2\", expected 0.5 (half a card) or 1 (a whole card)",
                "line 8, column arrival_s: found \"-1\", expected seconds from the start of the trace, 0 to a year",
                "line 9, column arrival_s: found \"nan\", expected seconds from the start of the trace, 0 to a year",
                "line 10, column user: found \"\", expected the name of a user, without quotes",
                "line 11, column user: found \"4,1,0.5\", expected 4 to 7 fields: arrival_s,duration_s,\
                 gpu_fraction_or_count,user,declared_s,tier,function",
                "line 12, column declared_s: found \"0\", expected seconds, 0.001 to a year, or nothing",
                "line 13, column tier: found \"boss\", expected guest, free, pro, enterprise, or nothing",
                "line 14, column tier: found \"pro\", expected the tier that the user had before, free",
                "line 15, column function: found \"f\", expected the number of a function, or nothing",
                "line 16, column duration_s: found \"\", expected 4 to 7 fields: arrival_s,duration_s,\
                 gpu_fraction_or_count,user,declared_s,tier,function",
                "line 17, column function: found \"4,1,0.5,ann,9,free,1,1\", expected 4 to 7 fields: arrival_s,\
                 duration_s,gpu_fraction_or_count,user,declared_s,tier,function",
                "line 18, column arrival_s: found \"0\", expected no time before the line above, 1.500",
            ]
        );
    }

    #[test]
    fn a_file_of_another_kind_does_not_flood() {
        let error = parse(&"hello\n".repeat(100)).unwrap_err().to_string();
        assert!(error.starts_with("100 malformed line(s):\n  line 1, column duration_s: found \"hello\""), "{error}");
        assert!(error.ends_with("\n  and 80 more"), "{error}");
        assert_eq!(parse("").unwrap_err(), TraceError::Empty);
        assert_eq!(parse("arrival_s,duration_s,gpu_fraction_or_count,user\n").unwrap_err(), TraceError::Empty);
    }

    #[test]
    fn what_is_written_reads_back() {
        let demand = crate::demand::Demand {
            load: 0.5,
            hours: 0.2,
            slots: 22,
            declare: crate::demand::Declare::AsFitted,
            between_functions: 0.5,
        };
        let mut trace = demand.generate(3);
        let back = parse(&write(&trace)).unwrap();
        // Users are numbered as they come, so they are compared by name.
        let named =
            |trace: &Trace| trace.requests.iter().map(|request| trace.users[request.user].clone()).collect::<Vec<_>>();
        assert_eq!(named(&trace), named(&back));
        trace.requests.iter_mut().zip(&back.requests).for_each(|(request, read)| request.user = read.user);
        assert_eq!(trace.requests, back.requests);
    }
}
