//! Tables of text, as Markdown, so that they can be pasted where they are needed.

use crate::admission::Refusal;
use crate::comparison::{Comparison, Figures, Waits};
use crate::policy::PolicyName;
use crate::sweep::SweepRow;

/// The policies side by side: all requests, then by tier and size, then what was refused.
pub fn comparison_table(comparison: &Comparison) -> String {
    let Comparison { nodes, cards, traces, requests, load, policies, .. } = comparison;
    let intro = format!(
        "{requests} requests of {traces} trace(s), {nodes} node(s) with {cards} cards each, load {load:.2}. Waits in \
         seconds.\n\n"
    );
    let all = rows(
        &["policy", "mean", "p50", "p95", "p99", "max", "of fcfs+easy", "worst / bound", "Jain", "goodput", "killed"],
        policies.iter().map(|(policy, figures)| all_row(*policy, figures)),
    );
    let groups = rows(
        &["policy", "of", "requests", "mean", "p50", "p95", "p99", "max"],
        policies.iter().flat_map(|(policy, figures)| group_rows(*policy, figures)),
    );
    let refusals = policies.iter().flat_map(|(policy, figures)| {
        let row = |(cause, count): (&Refusal, &usize)| {
            vec![policy.as_str().to_owned(), format!("{cause:?}"), count.to_string()]
        };
        figures.refused.iter().map(row).collect::<Vec<_>>()
    });
    let refusals: Vec<_> = refusals.collect();
    let refused = if refusals.is_empty() {
        "No request was refused.\n".to_owned()
    } else {
        rows(&["policy", "refused because", "requests"], refusals.into_iter())
    };
    format!("{intro}{all}\n{groups}\n{refused}")
}

/// Quotas with what they refuse and what the others wait.
pub fn sweep_table(sweep: &[SweepRow]) -> String {
    rows(
        &["quota, slot-s a day", "refused", "load let in", "mean wait", "p50", "p95", "p99", "max"],
        sweep.iter().map(|row| {
            let quota = row.quota_s.map_or_else(|| "none".to_owned(), |seconds| seconds.to_string());
            let refused = format!("{:.1} %", row.refused_share * 100.0);
            [vec![quota, refused, format!("{:.2}", row.load)], wait_cells(&row.waits)].concat()
        }),
    )
}

fn all_row(policy: PolicyName, figures: &Figures) -> Vec<String> {
    let shares = [figures.mean_over_fcfs_easy, figures.worst_over_bound, figures.jain, figures.goodput_ratio];
    let shares = shares.map(|share| format!("{share:.2}")).to_vec();
    [vec![policy.as_str().to_owned()], wait_cells(&figures.waits), shares, vec![figures.killed.to_string()]].concat()
}

fn group_rows(policy: PolicyName, figures: &Figures) -> Vec<Vec<String>> {
    let tiers = figures.by_tier.iter().map(|(tier, waits)| (tier.as_str(), waits));
    let sizes = figures.by_size.iter().map(|(size, waits)| (*size, waits));
    tiers
        .chain(sizes)
        .map(|(group, waits)| {
            let names = vec![policy.as_str().to_owned(), group.to_owned(), waits.started.to_string()];
            [names, wait_cells(waits)].concat()
        })
        .collect()
}

fn wait_cells(waits: &Waits) -> Vec<String> {
    [waits.mean_wait_s, waits.p50_wait_s, waits.p95_wait_s, waits.p99_wait_s, waits.max_wait_s]
        .map(|seconds| if seconds < 10.0 { format!("{seconds:.1}") } else { format!("{seconds:.0}") })
        .to_vec()
}

/// Columns as wide as their widest cell; the first one to the left, the others to the right.
fn rows(header: &[&str], body: impl Iterator<Item = Vec<String>>) -> String {
    let header: Vec<String> = header.iter().map(|cell| (*cell).to_owned()).collect();
    let body: Vec<Vec<String>> = body.collect();
    let widths: Vec<usize> = (0..header.len())
        .map(|column| {
            let cells = std::iter::once(&header).chain(&body).map(|row| row[column].len());
            cells.max().unwrap_or_default().max(3)
        })
        .collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, width))| match column {
            0 => format!("{cell:<width$}"),
            _ => format!("{cell:>width$}"),
        });
        format!("| {} |\n", cells.collect::<Vec<_>>().join(" | "))
    };
    let rule = widths.iter().enumerate().map(|(column, width)| match column {
        0 => "-".repeat(*width),
        _ => format!("{}:", "-".repeat(width - 1)),
    });
    let rule = format!("| {} |\n", rule.collect::<Vec<_>>().join(" | "));
    format!("{}{rule}{}", line(&header), body.iter().map(line).collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_stand_under_each_other() {
        let body = [vec!["a".to_owned(), "1.0".to_owned()], vec!["long name".to_owned(), "12345".to_owned()]];
        assert_eq!(
            rows(&["who", "how"], body.into_iter()),
            "| who       |   how |\n| --------- | ----: |\n| a         |   1.0 |\n| long name | 12345 |\n"
        );
    }
}
