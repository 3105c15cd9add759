//! The durations that an app declares in its source, and which tiers would refuse them (requirement A14). Pure.
//!
//! `runtime/declared.py` reads the source while the environment is made and leaves a [`Report`] on the container's
//! termination log. The app's own code can write there too, so a report is worth a warning to its author and nothing else.

use std::collections::BTreeMap;

use serde::Deserialize;
use spaceport_core::ids::{CookieId, LedgerTime, Size};
use spaceport_core::lease::NodeSettings;
use spaceport_core::page::Page;
use spaceport_core::quota::{Allowance, Demand, Payer, check_source};
use spaceport_crds::conditions::{ConditionStatus, SpaceCondition, SpaceReason};
use spaceport_crds::{Callers, GpuSize, SpaceStatus};

use crate::ledger::display::seconds;
use crate::ledger::policy::allowance_of;
use crate::ledger::seen::TierSeen;

/// The form of a report that is understood.
const FORM: u32 = 1;
/// What kubelet keeps of a termination log.
const REPORT_BYTES_MAX: usize = 4096;
/// A function's row takes more than 40 bytes of that.
const FUNCTIONS_MAX: usize = REPORT_BYTES_MAX / 40;
/// The client sends the seconds of a day at most: days are lost in its conversion (device API A6).
const SECONDS_END: u32 = 24 * 60 * 60;
/// Longest name or path that is shown.
const NAME_CHARACTERS_MAX: usize = 120;
/// So many functions are told of one by one; whoever mends those sees the next ones.
const FUNCTIONS_TOLD_MAX: usize = 3;
/// So many tiers are named at a time.
const TIERS_TOLD_MAX: usize = 4;

/// What `declared.py` found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Functions whose duration stands in the source, the longest first.
    functions: Vec<Function>,
    /// How many others there are, whose duration or size is computed when they run.
    computed: u32,
    /// Functions and files that it had no room or no time for.
    missing: u32,
}

/// A function whose duration stands in the source.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Function {
    name: String,
    file: String,
    line: u32,
    /// As the client sends it, before it multiplies (L19).
    seconds: u32,
    /// What stands in the source, if the client sends something else.
    written: Option<i64>,
    /// The source names no duration.
    is_default: bool,
    size: Size,
}

/// What the tiers say about a report.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Verdict {
    /// The source was not read yet, or the tiers are not known yet: what is shown stays.
    #[default]
    Unseen,
    /// There is nothing to say.
    Nothing,
    /// The condition [`SpaceCondition::DurationsAllowed`].
    Judged {
        /// Its status.
        holds: ConditionStatus,
        /// Its reason.
        reason: SpaceReason,
        /// Which function, where, the numbers, and the next step.
        message: String,
    },
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Form {
    declared_durations: u32,
    functions: Vec<Row>,
    #[serde(default)]
    computed: u32,
    #[serde(default)]
    unread: u32,
    #[serde(default)]
    left_out: u32,
}

#[derive(Deserialize)]
struct Row {
    name: String,
    file: String,
    line: u32,
    seconds: u32,
    written: Option<i64>,
    #[serde(default)]
    default: bool,
    #[serde(default)]
    size: GpuSize,
}

/// A function that callers of some tiers cannot call.
struct Refused<'a> {
    function: &'a Function,
    /// Seconds that its source could declare for them, with the tiers' names.
    tiers: BTreeMap<u64, Vec<&'a str>>,
    /// Tiers whose callers can call it.
    allowing: Vec<&'a str>,
}

// === impl Report ===

impl Report {
    /// Reads what a container left on its termination log; none if that is no report.
    pub fn read(message: &str) -> Option<Self> {
        if message.len() > REPORT_BYTES_MAX {
            return None;
        }
        let form: Form = serde_json::from_str(message).ok()?;
        let is_sound = form.declared_durations == FORM
            && form.functions.len() <= FUNCTIONS_MAX
            && form.functions.iter().all(|row| row.seconds < SECONDS_END);
        is_sound.then(|| Self {
            functions: form.functions.into_iter().map(Function::from).collect(),
            computed: form.computed,
            missing: form.unread.saturating_add(form.left_out),
        })
    }

    /// True if there is nothing to judge, nor to say why.
    pub fn is_empty(&self) -> bool {
        self.functions.is_empty() && self.computed == 0
    }
}

impl From<Row> for Function {
    fn from(row: Row) -> Self {
        Self {
            name: printable(&row.name),
            file: printable(&row.file),
            line: row.line,
            seconds: row.seconds,
            written: row.written,
            is_default: row.default,
            size: match row.size {
                GpuSize::Large => Size::Large,
                GpuSize::Xlarge => Size::Xlarge,
            },
        }
    }
}

/// Names of an unknown author that end in a terminal.
fn printable(text: &str) -> String {
    let plain =
        |character: char| if character.is_alphanumeric() || "_-./".contains(character) { character } else { '?' };
    text.chars().take(NAME_CHARACTERS_MAX).map(plain).collect()
}

// === judging ===

/// What callers of these tiers will be told, on cards with these settings. With `clamps` (`clampToRemaining`) a call is never
/// too long for what is left.
pub fn judge<'a>(
    report: &'a Report,
    tiers: impl Iterator<Item = &'a TierSeen> + Clone,
    settings: NodeSettings,
    clamps: bool,
) -> Verdict {
    if report.is_empty() || tiers.clone().next().is_none() {
        return Verdict::Nothing;
    }
    let refused: Vec<Refused<'_>> =
        report.functions.iter().filter_map(|function| refused(function, tiers.clone(), settings, clamps)).collect();
    let judged = |holds, reason, message| Verdict::Judged { holds, reason, message };
    if !refused.is_empty() {
        return judged(ConditionStatus::False, SpaceReason::LongerThanTierAllows, refusal(&refused));
    }
    if report.functions.is_empty() {
        let message = format!(
            "{} computed when a function is called; what is illegal is refused then",
            count(report.computed, "duration is", "durations are")
        );
        return judged(ConditionStatus::Unknown, SpaceReason::KnownAtCallOnly, message);
    }
    let declared = u32::try_from(report.functions.len()).unwrap_or(u32::MAX);
    let mut message =
        format!("{} legal in every tier", count(declared, "declared duration is", "declared durations are"));
    if report.computed > 0 {
        message.push_str(&format!("; {} computed at each call", count(report.computed, "more is", "more are")));
    }
    if report.missing > 0 {
        message.push_str(&format!(
            "; {} not looked at",
            count(report.missing, "file or function was", "files or functions were")
        ));
    }
    judged(ConditionStatus::True, SpaceReason::WithinEveryTier, message)
}

/// The message, if the condition has just become false: what is told once.
pub fn turned_false<'a>(before: Option<&SpaceStatus>, after: &'a SpaceStatus) -> Option<&'a str> {
    fn refusal(status: &SpaceStatus) -> Option<&str> {
        let is_ours = |kind: &str| kind == SpaceCondition::DurationsAllowed.as_str();
        let found = status.conditions.iter().find(|condition| is_ours(&condition.type_))?;
        (found.status == ConditionStatus::False.as_str()).then_some(found.message.as_str())
    }
    refusal(after).filter(|_| before.and_then(refusal).is_none())
}

fn refused<'a>(
    function: &'a Function,
    tiers: impl Iterator<Item = &'a TierSeen>,
    settings: NodeSettings,
    clamps: bool,
) -> Option<Refused<'a>> {
    let Function { size, seconds, .. } = *function;
    let weight = settings.weight(size);
    let demand = Demand::of_source(size, u64::from(seconds), weight, settings.duration_factor_percent);
    let mut refused = Refused { function, tiers: BTreeMap::new(), allowing: Vec::new() };
    for tier in tiers {
        match check(tier, &demand, clamps) {
            Ok(()) => refused.allowing.push(&tier.name),
            // A tier that grants nothing at all, which no duration helps against.
            Err(0) => {}
            Err(longest) => refused.tiers.entry(longest).or_default().push(&tier.name),
        }
    }
    (!refused.tiers.is_empty()).then_some(refused)
}

/// The rule that refuses calls, for an account of the tier that has used nothing.
fn check(tier: &TierSeen, demand: &Demand, clamps: bool) -> Result<(), u64> {
    let guests = tier.callers == Callers::Guests;
    let mut allowance = allowance_of(tier, guests);
    if tier.extendable || clamps {
        // Grants may make the quota as large as is needed, or the call is made as short: the longest call is what remains.
        allowance =
            Allowance { base_ms: u64::MAX, per_cookie_ms: allowance.per_cookie_ms.map(|_| u64::MAX), ..allowance };
    }
    let anybody = CookieId::new("anybody");
    let page = Page::default();
    let cookie = guests.then_some(&anybody);
    check_source(Payer { page: &page, allowance: &allowance, cookie, at: LedgerTime(0) }, demand)
}

// === words ===

fn refusal(refused: &[Refused<'_>]) -> String {
    let told: Vec<String> = refused.iter().take(FUNCTIONS_TOLD_MAX).map(Refused::sentence).collect();
    let mut message = told.join(". ");
    let more = refused.len().saturating_sub(FUNCTIONS_TOLD_MAX);
    if more > 0 {
        message.push_str(&format!(". The same goes for {more} more"));
    }
    message
}

impl Refused<'_> {
    fn sentence(&self) -> String {
        let Function { name, file, line, size, written, is_default, .. } = self.function;
        let sent = seconds(u64::from(self.function.seconds) * 1000);
        let declares = match written {
            Some(written) => format!("declares {written}s, which the client sends as {sent},"),
            None if *is_default => format!("names no duration, which is {sent},"),
            None => format!("declares {sent}"),
        };
        let shortest = self.tiers.keys().next().copied().unwrap_or_default();
        let longest_for_all = seconds(shortest.saturating_mul(1000));
        if self.function.seconds == 0 {
            return format!(
                "{name} ({file}:{line}) {declares} of {size}, and no time at all is refused in every tier; declare from 1s to \
                 {longest_for_all}"
            );
        }
        let limits: Vec<String> = self
            .tiers
            .iter()
            .take(TIERS_TOLD_MAX)
            .map(|(longest, tiers)| format!("{} at most {}", names(tiers), seconds(longest.saturating_mul(1000))))
            .collect();
        let or = if self.allowing.is_empty() {
            String::new()
        } else {
            format!(", or leave it to callers of {}", names(&self.allowing))
        };
        format!(
            "{name} ({file}:{line}) {declares} of {size}, but tiers allow less: {}; declare at most {longest_for_all}{or}",
            limits.join(", "),
        )
    }
}

/// `free and pro`, and how many more there are.
fn names(tiers: &[&str]) -> String {
    let told = tiers.iter().take(TIERS_TOLD_MAX).copied();
    let more = tiers.len().saturating_sub(TIERS_TOLD_MAX);
    let mut told: Vec<String> = told.map(ToOwned::to_owned).collect();
    if more > 0 {
        told.push(format!("{more} more"));
    }
    match told.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} and {last}", rest.join(", ")),
        Some((last, _)) => last.clone(),
        None => String::new(),
    }
}

fn count(number: u32, one: &str, many: &str) -> String {
    format!("{number} {}", if number == 1 { one } else { many })
}

#[cfg(test)]
mod tests;
