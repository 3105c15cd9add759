//! Tables as kubectl prints them, read as a person does: by the places of the columns.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};

/// A table.
#[derive(Debug)]
pub(crate) struct Table<'text> {
    /// Each row by the names of its columns; a cell can be empty.
    pub(crate) rows: Vec<BTreeMap<&'text str, &'text str>>,
}

impl<'text> Table<'text> {
    /// Reads the output of `kubectl get`.
    pub(crate) fn read(text: &'text str) -> Result<Self> {
        let mut lines = text.lines();
        let head = lines.next().context("kubectl printed no table")?;
        // The names of our columns have no blanks. Every cell begins where its column's name does.
        let names: Vec<(usize, &str)> =
            head.split_whitespace().map(|name| (name.as_ptr() as usize - head.as_ptr() as usize, name)).collect();
        ensure!(!names.is_empty(), "kubectl printed no table but {text:?}");
        let ends = names.iter().skip(1).map(|(begin, _)| Some(*begin)).chain([None]);
        let columns: Vec<(&str, usize, Option<usize>)> =
            names.iter().zip(ends).map(|((begin, name), end)| (*name, *begin, end)).collect();
        let row = |line: &'text str| {
            let cell = |begin: usize, end: Option<usize>| {
                let end = end.unwrap_or(line.len()).min(line.len());
                line.get(begin.min(end)..end).unwrap_or_default().trim()
            };
            columns.iter().map(|(name, begin, end)| (*name, cell(*begin, *end))).collect()
        };
        Ok(Self { rows: lines.map(row).collect() })
    }
}

/// Milliseconds of a cell like `18.4s`; an account that was never charged shows nothing.
pub(crate) fn milliseconds(cell: &str) -> Result<i64> {
    if cell.is_empty() || cell == "<none>" {
        return Ok(0);
    }
    let seconds = cell.strip_suffix('s').with_context(|| format!("{cell:?} is no number of seconds"))?;
    let (whole, decimals) = seconds.split_once('.').unwrap_or((seconds, ""));
    ensure!(decimals.len() <= 3, "{cell:?} is finer than a millisecond");
    let number =
        |text: &str| text.parse::<u32>().map(i64::from).with_context(|| format!("{cell:?} is no number of seconds"));
    Ok(number(whole)? * 1000 + number(&format!("{decimals:0<3}"))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_are_found_by_their_column_also_beside_empty_ones() {
        let text = "\
NAME      USER              TIER   USED     LEFT    RESETS                 LEASES
bob       bob@example.com   demo   18.4s    41.6s   2026-11-21T12:00:00Z   2
new       new@example.com                                                  
space-1                     space  0s       120s
";
        let table = Table::read(text).unwrap();
        let column = |name: &str| table.rows.iter().map(|row| row[name]).collect::<Vec<_>>();
        assert_eq!(column("NAME"), ["bob", "new", "space-1"]);
        assert_eq!(column("USED"), ["18.4s", "", "0s"]);
        assert_eq!(column("LEASES"), ["2", "", ""]);
        assert!(Table::read("").is_err());
    }

    #[test]
    fn seconds_are_read_to_the_millisecond() {
        let read = |cell| milliseconds(cell).unwrap();
        assert_eq!(
            [read("0.045s"), read("18.4s"), read("60s"), read(""), read("1840.001s")],
            [45, 18_400, 60_000, 0, 1_840_001]
        );
        for wrong in ["60", "s", "1.2345s", "-", "1.-2s"] {
            assert!(milliseconds(wrong).is_err(), "{wrong}");
        }
    }
}
