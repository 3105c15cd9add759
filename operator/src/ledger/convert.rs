//! A page as the API server stores it (`GPUAccount.status`) and as the core knows it, both ways.
//!
//! Reading is all or nothing: a status with one wrong field gives no page, so that its account fails closed and is never
//! half-stored. What the stored form does not hold (the whole of a denial, the cards a settled hold avoided) is not
//! decided upon; see [`page_of`].

use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use spaceport_core::ids::{CookieId, Epoch, LeaseId, LedgerTime, NodeName, Size, SpaceKey};
use spaceport_core::page::{
    BUDGETS_MAX, Budget, BudgetRow, Budgets, CLOSED_MAX, COOKIES_MAX, Closed, CookieRow, CookieWindow, DenialRow,
    Ending, GRANTS_MAX, GrantRow, HOLDS_MAX, Hold, OUTCOMES_MAX, Outcome, Page, Part, Shortened, ShortenedBy, Source,
    WINDOWS_MAX, Window,
};
use spaceport_core::protocol::{Denial, Limiter, human_message};
use spaceport_core::queue::WaitsFor;
use spaceport_crds as crds;
use spaceport_crds::conditions::{LeaseOutcome, ShortenedReason};
use spaceport_crds::{GpuSize, WaitReason};

use super::display::{Display, seconds};
use crate::fault::{self, Fault};

/// Longest text in a row, characters; the schema allows 1024. Ours have up to 300, with all their numbers.
const MESSAGE_MAX: usize = 512;

/// Why a stored status is no page, or a page cannot be stored.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PageError {
    /// A number that must not be negative is, or one does not fit the other form.
    #[error("{field} is {value}, which is out of range")]
    OutOfRange {
        /// Path of the field.
        field: &'static str,
        /// Its value.
        value: i128,
    },
    /// `<namespace>/<name>` was expected.
    #[error("{value:?} does not name a Space as namespace/name")]
    Space {
        /// What is there.
        value: String,
    },
    /// A part's source is neither a window nor a grant.
    #[error("{value:?} is no source; expected window:<milliseconds> or grant:<uid>")]
    Source {
        /// What is there.
        value: String,
    },
    /// An ending that this version does not know.
    #[error("{value:?} is not an ending that this version knows")]
    Ending {
        /// What is there.
        value: String,
    },
    /// A reason for giving a call less than it declares that this version does not know.
    #[error("{value:?} is no reason that this version knows for giving a call less than it declares")]
    Shortened {
        /// What is there.
        value: String,
    },
    /// A list is longer than its bound (L1).
    #[error("{list} has {length} rows, of which {max} are allowed")]
    TooMany {
        /// Which list.
        list: &'static str,
        /// Its length.
        length: usize,
        /// Its bound.
        max: usize,
    },
}

/// The page in a stored status.
///
/// `last_denial` is left out: the stored form holds its numbers for people, not the typed denial, and no decision rests on
/// it. The store keeps the stored row until a new one replaces it ([`status_of`]).
///
/// # Errors
/// See [`PageError`]; then nothing of the status may be used.
pub fn page_of(status: &crds::GPUAccountStatus) -> Result<Page, PageError> {
    bounded("windows", status.windows.len(), WINDOWS_MAX)?;
    bounded("cookies", status.cookies.len(), COOKIES_MAX)?;
    bounded("holds", status.holds.len(), HOLDS_MAX)?;
    bounded("grants", status.grants.len(), GRANTS_MAX)?;
    bounded("closed", status.closed.len(), CLOSED_MAX)?;
    bounded("budgets", status.budgets.len(), BUDGETS_MAX)?;
    bounded("recentOutcomes", status.recent_outcomes.len(), OUTCOMES_MAX)?;
    Ok(Page {
        windows: status.windows.iter().map(window_of).collect::<Result<_, _>>()?,
        cookies: status.cookies.iter().map(cookie_of).collect::<Result<_, _>>()?,
        holds: status.holds.iter().map(|row| hold_of(row).map(Arc::new)).collect::<Result<_, _>>()?,
        grants: status.grants.iter().map(grant_of).collect::<Result<_, _>>()?,
        closed: status.closed.iter().map(closed_of).collect::<Result<_, _>>()?,
        budgets: budgets_of(status)?,
        last_denial: None,
        recent_outcomes: status.recent_outcomes.iter().map(|row| Arc::new(outcome_of(row))).collect(),
        last_time: LedgerTime(status.last_time_milliseconds),
        seq: unsigned("seq", status.seq)?,
        write_id: status.write_id.clone(),
        epoch: Epoch(unsigned("epoch", status.epoch)?),
    })
}

/// The status to store for a page. `kept` is the status that is stored at present: what the page does not carry is taken
/// from it.
///
/// # Errors
/// See [`PageError`]; nothing must be written then.
pub fn status_of(
    page: &Page,
    display: Display,
    kept: Option<&KeptFields>,
) -> Result<crds::GPUAccountStatus, PageError> {
    bounded("windows", page.windows.len(), WINDOWS_MAX)?;
    bounded("cookies", page.cookies.len(), COOKIES_MAX)?;
    bounded("holds", page.holds.len(), HOLDS_MAX)?;
    bounded("grants", page.grants.len(), GRANTS_MAX)?;
    bounded("closed", page.closed.len(), CLOSED_MAX)?;
    let budgets = page.budgets.as_deref();
    bounded("budgets", budgets.map_or(0, |budgets| budgets.rows.len()), BUDGETS_MAX)?;
    bounded("recentOutcomes", page.recent_outcomes.len(), OUTCOMES_MAX)?;
    let last_denial = match &page.last_denial {
        _ if fault::is(Fault::RefusalsLeaveNothing) => None,
        Some(row) => Some(denial_row(row)?),
        None => kept.and_then(|kept| kept.last_denial.clone()),
    };
    let mut conditions = kept.map(|kept| kept.conditions.clone()).unwrap_or_default();
    for condition in display.conditions {
        crds::conditions::set(&mut conditions, condition);
    }
    Ok(crds::GPUAccountStatus {
        seq: signed("seq", page.seq)?,
        write_id: page.write_id.clone(),
        epoch: signed("epoch", page.epoch.0)?,
        last_time_milliseconds: page.last_time.0,
        windows: page.windows.iter().map(window_row).collect::<Result<_, _>>()?,
        cookies: page.cookies.iter().map(|row| cookie_row(page, row)).collect::<Result<_, _>>()?,
        guests: (!page.cookies.is_empty()).then(|| i32::try_from(page.cookies.len()).unwrap_or(i32::MAX)),
        holds: page.holds.iter().map(|hold| hold_row(hold)).collect::<Result<_, _>>()?,
        grants: page.grants.iter().map(grant_row).collect::<Result<_, _>>()?,
        closed: page.closed.iter().map(closed_row).collect::<Result<_, _>>()?,
        budgets: budgets.iter().flat_map(|budgets| &budgets.rows).map(budget_row).collect::<Result<_, _>>()?,
        budgets_forgotten_milliseconds: budgets.map(|budgets| budgets.forgotten.0).filter(|forgotten| *forgotten > 0),
        last_denial,
        recent_outcomes: page.recent_outcomes.iter().map(|outcome| outcome_row(outcome)).collect(),
        tier: display.tier,
        used: shown(display.used),
        reserved: shown(display.reserved),
        left: shown(display.left),
        resets_at: display.resets_at,
        leases: display.leases,
        observed_generation: display.generation.or_else(|| kept.and_then(|kept| kept.observed_generation)),
        conditions,
    })
}

/// The term page shows nothing.
fn shown(text: String) -> Option<String> {
    Some(text).filter(|text| !text.is_empty())
}

/// Fields of a stored status that a page does not carry and a write must not lose.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct KeptFields {
    last_denial: Option<crds::LastDenial>,
    observed_generation: Option<i64>,
    conditions: Vec<k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition>,
}

impl KeptFields {
    /// Those of a stored status.
    pub fn of(status: &crds::GPUAccountStatus) -> Self {
        Self {
            last_denial: status.last_denial.clone(),
            observed_generation: status.observed_generation,
            conditions: status.conditions.clone(),
        }
    }
}

// === numbers and names ===

fn bounded(list: &'static str, length: usize, max: usize) -> Result<(), PageError> {
    if length > max { Err(PageError::TooMany { list, length, max }) } else { Ok(()) }
}

fn unsigned(field: &'static str, value: i64) -> Result<u64, PageError> {
    u64::try_from(value).map_err(|_| PageError::OutOfRange { field, value: i128::from(value) })
}

fn signed(field: &'static str, value: u64) -> Result<i64, PageError> {
    i64::try_from(value).map_err(|_| PageError::OutOfRange { field, value: i128::from(value) })
}

fn space_of(text: &str, uid: &str) -> Result<SpaceKey, PageError> {
    match text.split_once('/') {
        Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
            Ok(SpaceKey::new(namespace, name, uid))
        }
        _ => Err(PageError::Space { value: text.to_owned() }),
    }
}

fn space_text(space: &SpaceKey) -> String {
    format!("{}/{}", space.namespace, space.name)
}

/// The size in the form of the custom resources.
pub fn size_text(size: Size) -> GpuSize {
    match size {
        Size::Large => GpuSize::Large,
        Size::Xlarge => GpuSize::Xlarge,
    }
}

/// The size of a custom resource.
pub fn size_of(size: GpuSize) -> Size {
    match size {
        GpuSize::Large => Size::Large,
        GpuSize::Xlarge => Size::Xlarge,
    }
}

/// The ending as a reason.
pub fn outcome_reason(ending: Ending) -> LeaseOutcome {
    match ending {
        Ending::Released => LeaseOutcome::Released,
        Ending::Failed => LeaseOutcome::Failed,
        Ending::WorkerDied => LeaseOutcome::WorkerDied,
        Ending::Deadline => LeaseOutcome::Deadline,
        Ending::NeverAllowed => LeaseOutcome::NeverAllowed,
        Ending::Undelivered => LeaseOutcome::Undelivered,
        Ending::Cancelled => LeaseOutcome::Cancelled,
        Ending::Refused => LeaseOutcome::Refused,
        Ending::PlatformFault => LeaseOutcome::PlatformFault,
        Ending::NoDevice => LeaseOutcome::NoDevice,
        Ending::Expired => LeaseOutcome::Expired,
    }
}

/// Every ending; the match in [`outcome_reason`] does not compile without a new one, the test not pass.
const ENDINGS: [Ending; 11] = [
    Ending::Released,
    Ending::Failed,
    Ending::WorkerDied,
    Ending::Deadline,
    Ending::NeverAllowed,
    Ending::Undelivered,
    Ending::Cancelled,
    Ending::Refused,
    Ending::PlatformFault,
    Ending::NoDevice,
    Ending::Expired,
];

fn ending_of(reason: &str) -> Result<Ending, PageError> {
    let found = ENDINGS.into_iter().find(|ending| outcome_reason(*ending).as_str() == reason);
    found.ok_or_else(|| PageError::Ending { value: reason.to_owned() })
}

/// At most [`MESSAGE_MAX`] characters.
pub fn shortened(text: &str) -> String {
    text.chars().take(MESSAGE_MAX).collect()
}

// === rows ===

fn window_of(row: &crds::Window) -> Result<Window, PageError> {
    Ok(Window {
        start: LedgerTime(row.start_milliseconds),
        base_ms: unsigned("windows[].baseMilliseconds", row.base_milliseconds)?,
        charged_ms: unsigned("windows[].chargedMilliseconds", row.charged_milliseconds)?,
        runs: unsigned("windows[].runs", row.runs)?,
        generation: row.generation,
    })
}

fn window_row(window: &Window) -> Result<crds::Window, PageError> {
    Ok(crds::Window {
        start_milliseconds: window.start.0,
        base_milliseconds: signed("windows[].baseMilliseconds", window.base_ms)?,
        charged_milliseconds: signed("windows[].chargedMilliseconds", window.charged_ms)?,
        runs: signed("windows[].runs", window.runs)?,
        generation: window.generation,
    })
}

fn cookie_of(row: &crds::CookieRow) -> Result<CookieRow, PageError> {
    Ok(CookieRow {
        cookie: CookieId::new(&row.cookie),
        start: LedgerTime(row.start_milliseconds),
        base_ms: unsigned("cookies[].baseMilliseconds", row.base_milliseconds)?,
        charged_ms: unsigned("cookies[].chargedMilliseconds", row.charged_milliseconds)?,
        runs: unsigned("cookies[].runs", row.runs)?,
        generation: row.generation,
    })
}

fn cookie_row(page: &Page, row: &CookieRow) -> Result<crds::CookieRow, PageError> {
    Ok(crds::CookieRow {
        cookie: row.cookie.to_string(),
        start_milliseconds: row.start.0,
        base_milliseconds: signed("cookies[].baseMilliseconds", row.base_ms)?,
        charged_milliseconds: signed("cookies[].chargedMilliseconds", row.charged_ms)?,
        runs: signed("cookies[].runs", row.runs)?,
        generation: row.generation,
        used: seconds(row.charged_ms),
        reserved: seconds(page.reserved_of_row_ms(row)),
    })
}

fn cookie_window_of(row: &crds::CookieWindow) -> CookieWindow {
    CookieWindow { cookie: CookieId::new(&row.cookie), start: LedgerTime(row.start_milliseconds) }
}

fn cookie_window_row(window: &CookieWindow) -> crds::CookieWindow {
    crds::CookieWindow { cookie: window.cookie.to_string(), start_milliseconds: window.start.0 }
}

/// Why a call got less than it declares, as a reason.
pub fn shortened_reason(by: ShortenedBy) -> ShortenedReason {
    match by {
        ShortenedBy::RemainingQuota => ShortenedReason::RemainingQuota,
        ShortenedBy::LearnedDuration => ShortenedReason::LearnedDuration,
    }
}

/// What a request waits for, as a reason.
pub const fn wait_reason(waits_for: WaitsFor) -> WaitReason {
    match waits_for {
        WaitsFor::Node => WaitReason::Node,
        WaitsFor::Account => WaitReason::Account,
        WaitsFor::Space => WaitReason::Space,
    }
}

fn shortened_of(row: &crds::Shortened) -> Result<Shortened, PageError> {
    let by = [ShortenedBy::RemainingQuota, ShortenedBy::LearnedDuration]
        .into_iter()
        .find(|by| shortened_reason(*by).as_str() == row.by)
        .ok_or_else(|| PageError::Shortened { value: row.by.clone() })?;
    Ok(Shortened { declared_ms: unsigned("shortened.declaredMilliseconds", row.declared_milliseconds)?, by })
}

fn shortened_row(shortened: Shortened) -> Result<crds::Shortened, PageError> {
    Ok(crds::Shortened {
        declared_milliseconds: signed("shortened.declaredMilliseconds", shortened.declared_ms)?,
        by: shortened_reason(shortened.by).as_str().to_owned(),
    })
}

fn budget_of(row: &crds::Budget) -> Result<Budget, PageError> {
    Ok(Budget {
        root: row.root.clone(),
        max_ms: unsigned("holds[].budget.maxMilliseconds", row.max_milliseconds)?,
        max_calls: unsigned("holds[].budget.maxCalls", row.max_calls)?,
        expires: LedgerTime(row.expires_milliseconds),
    })
}

fn budget_entry(budget: &Budget) -> Result<crds::Budget, PageError> {
    Ok(crds::Budget {
        root: budget.root.clone(),
        max_milliseconds: signed("holds[].budget.maxMilliseconds", budget.max_ms)?,
        max_calls: signed("holds[].budget.maxCalls", budget.max_calls)?,
        expires_milliseconds: budget.expires.0,
    })
}

fn budgets_of(status: &crds::GPUAccountStatus) -> Result<Option<Box<Budgets>>, PageError> {
    let row = |row: &crds::BudgetRow| {
        Ok(BudgetRow {
            root: row.root.clone(),
            calls: unsigned("budgets[].calls", row.calls)?,
            ms: unsigned("budgets[].milliseconds", row.milliseconds)?,
            expires: LedgerTime(row.expires_milliseconds),
        })
    };
    // The schema's own bound, and one that is stored as nothing.
    let forgotten = status.budgets_forgotten_milliseconds.unwrap_or_default();
    unsigned("budgetsForgottenMilliseconds", forgotten)?;
    let budgets =
        Budgets { rows: status.budgets.iter().map(row).collect::<Result<_, _>>()?, forgotten: LedgerTime(forgotten) };
    Ok((budgets != Budgets::default()).then(|| Box::new(budgets)))
}

fn budget_row(row: &BudgetRow) -> Result<crds::BudgetRow, PageError> {
    Ok(crds::BudgetRow {
        root: row.root.clone(),
        calls: signed("budgets[].calls", row.calls)?,
        milliseconds: signed("budgets[].milliseconds", row.ms)?,
        expires_milliseconds: row.expires.0,
    })
}

fn part_of(row: &crds::Part) -> Result<Part, PageError> {
    let wrong = || PageError::Source { value: row.source.clone() };
    let source = match row.source.split_once(':').ok_or_else(wrong)? {
        ("window", start) => Source::Window(LedgerTime(start.parse().map_err(|_| wrong())?)),
        ("grant", uid) if !uid.is_empty() => Source::Grant(uid.to_owned()),
        _ => return Err(wrong()),
    };
    Ok(Part { source, ms: unsigned("parts[].milliseconds", row.milliseconds)? })
}

/// A part in the form of the custom resources.
///
/// # Errors
/// [`PageError::OutOfRange`].
pub fn part_row(part: &Part) -> Result<crds::Part, PageError> {
    let source = match &part.source {
        Source::Window(start) => format!("window:{}", start.0),
        Source::Grant(uid) => format!("grant:{uid}"),
    };
    Ok(crds::Part { source, milliseconds: signed("parts[].milliseconds", part.ms)? })
}

fn hold_of(row: &crds::Hold) -> Result<Hold, PageError> {
    let card = |index: &i32| {
        u32::try_from(*index).map_err(|_| PageError::OutOfRange { field: "holds[].avoid", value: i128::from(*index) })
    };
    Ok(Hold {
        lease: LeaseId::new(&row.lease),
        space: space_of(&row.space, &row.space_uid)?,
        parts: row.parts.iter().map(part_of).collect::<Result<_, _>>()?,
        node: NodeName::new(&row.node),
        avoid: row.avoid.iter().map(card).collect::<Result<_, _>>()?,
        size: size_of(row.size),
        weight: unsigned("holds[].weight", row.weight)?,
        declared_ms: unsigned("holds[].declaredMilliseconds", row.declared_milliseconds)?,
        epoch: Epoch(unsigned("holds[].epoch", row.epoch)?),
        since: LedgerTime(row.since_milliseconds),
        after: row.after.as_ref().map(LeaseId::new),
        generation: row.generation,
        via: row.via.clone(),
        cookie: row.cookie.as_ref().map(cookie_window_of),
        shortened: row.shortened.as_ref().map(shortened_of).transpose()?,
        budget: row.budget.as_ref().map(budget_of).transpose()?,
    })
}

fn hold_row(hold: &Hold) -> Result<crds::Hold, PageError> {
    let card = |index: &u32| {
        i32::try_from(*index).map_err(|_| PageError::OutOfRange { field: "holds[].avoid", value: i128::from(*index) })
    };
    Ok(crds::Hold {
        lease: hold.lease.to_string(),
        space: space_text(&hold.space),
        space_uid: hold.space.uid.clone(),
        parts: hold.parts.iter().map(part_row).collect::<Result<_, _>>()?,
        node: hold.node.to_string(),
        avoid: hold.avoid.iter().map(card).collect::<Result<_, _>>()?,
        size: size_text(hold.size),
        weight: signed("holds[].weight", hold.weight)?,
        declared_milliseconds: signed("holds[].declaredMilliseconds", hold.declared_ms)?,
        epoch: signed("holds[].epoch", hold.epoch.0)?,
        since_milliseconds: hold.since.0,
        after: hold.after.as_ref().map(ToString::to_string),
        generation: hold.generation,
        via: hold.via.clone(),
        cookie: hold.cookie.as_ref().map(cookie_window_row),
        shortened: hold.shortened.map(shortened_row).transpose()?,
        budget: hold.budget.as_ref().map(budget_entry).transpose()?,
    })
}

fn grant_of(row: &crds::GrantRow) -> Result<GrantRow, PageError> {
    Ok(GrantRow {
        uid: row.uid.clone(),
        ms: unsigned("grants[].milliseconds", row.milliseconds)?,
        expires: LedgerTime(row.expires_milliseconds),
        used_ms: unsigned("grants[].usedMilliseconds", row.used_milliseconds)?,
    })
}

fn grant_row(grant: &GrantRow) -> Result<crds::GrantRow, PageError> {
    Ok(crds::GrantRow {
        uid: grant.uid.clone(),
        milliseconds: signed("grants[].milliseconds", grant.ms)?,
        expires_milliseconds: grant.expires.0,
        used_milliseconds: signed("grants[].usedMilliseconds", grant.used_ms)?,
    })
}

fn closed_of(row: &crds::ClosedLease) -> Result<Closed, PageError> {
    Ok(Closed {
        hold: Arc::new(Hold {
            lease: LeaseId::new(&row.lease),
            space: space_of(&row.space, &row.space_uid)?,
            parts: row.parts.iter().map(part_of).collect::<Result<_, _>>()?,
            node: NodeName::new(&row.node),
            avoid: Vec::new(),
            size: size_of(row.size),
            weight: unsigned("closed[].weight", row.weight)?,
            declared_ms: unsigned("closed[].declaredMilliseconds", row.declared_milliseconds)?,
            epoch: Epoch(unsigned("closed[].epoch", row.epoch)?),
            since: LedgerTime(row.since_milliseconds),
            after: None,
            generation: row.generation,
            via: row.via.clone(),
            cookie: row.cookie.as_ref().map(cookie_window_of),
            shortened: row.shortened.as_ref().map(shortened_of).transpose()?,
            // What it took is in the rows of the budgets.
            budget: None,
        }),
        ending: ending_of(&row.outcome)?,
        used_ms: unsigned("closed[].usedMilliseconds", row.used_milliseconds)?,
        charged_ms: unsigned("closed[].chargedMilliseconds", row.charged_milliseconds)?,
        at: LedgerTime(row.at_milliseconds),
    })
}

fn closed_row(closed: &Closed) -> Result<crds::ClosedLease, PageError> {
    let hold = &closed.hold;
    Ok(crds::ClosedLease {
        lease: hold.lease.to_string(),
        space: space_text(&hold.space),
        space_uid: hold.space.uid.clone(),
        node: hold.node.to_string(),
        size: size_text(hold.size),
        weight: signed("closed[].weight", hold.weight)?,
        declared_milliseconds: signed("closed[].declaredMilliseconds", hold.declared_ms)?,
        used_milliseconds: signed("closed[].usedMilliseconds", closed.used_ms)?,
        charged_milliseconds: signed("closed[].chargedMilliseconds", closed.charged_ms)?,
        outcome: outcome_reason(closed.ending).as_str().to_owned(),
        at_milliseconds: closed.at.0,
        parts: hold.parts.iter().map(part_row).collect::<Result<_, _>>()?,
        epoch: signed("closed[].epoch", hold.epoch.0)?,
        since_milliseconds: hold.since.0,
        generation: hold.generation,
        via: hold.via.clone(),
        cookie: hold.cookie.as_ref().map(cookie_window_row),
        shortened: hold.shortened.map(shortened_row).transpose()?,
    })
}

fn outcome_of(row: &crds::RecentOutcome) -> Outcome {
    Outcome {
        id: row.id.clone(),
        kind: row.kind.clone(),
        boundary: row.boundary.clone(),
        // As it would be written again.
        message: shortened(&row.message),
        at: LedgerTime(row.at_milliseconds),
    }
}

fn outcome_row(outcome: &Outcome) -> crds::RecentOutcome {
    crds::RecentOutcome {
        id: outcome.id.clone(),
        kind: outcome.kind.clone(),
        boundary: outcome.boundary.clone(),
        at_milliseconds: outcome.at.0,
        message: shortened(&outcome.message),
        ..crds::RecentOutcome::default()
    }
}

fn denial_row(row: &DenialRow) -> Result<crds::LastDenial, PageError> {
    /// Largest number that is stored of a refused request: a caller may have asked for anything.
    const LARGEST: u64 = i64::MAX as u64;
    let amount = |ms: u64| signed("lastDenial", ms.min(LARGEST));
    let numbers = Numbers::of(&row.denial);
    Ok(crds::LastDenial {
        kind: row.denial.kind().to_owned(),
        limiter: numbers.limiter.map(|limiter| limiter.as_str().to_owned()).unwrap_or_default(),
        needed_milliseconds: amount(numbers.needed_ms)?,
        left_milliseconds: amount(numbers.left_ms)?,
        reserved_milliseconds: amount(numbers.reserved_ms)?,
        limit_milliseconds: amount(numbers.limit_ms)?,
        resets_at: numbers.resets_in_ms.and_then(|ms| Timestamp::from_millisecond(row.at.plus(ms).0).ok().map(Time)),
        space: space_text(&row.space),
        at_milliseconds: row.at.0,
        message: human_message(&row.denial),
    })
}

/// The amounts of a denial; 0 where it has none.
#[derive(Default)]
struct Numbers {
    needed_ms: u64,
    left_ms: u64,
    reserved_ms: u64,
    limit_ms: u64,
    resets_in_ms: Option<u64>,
    limiter: Option<Limiter>,
}

impl Numbers {
    fn of(denial: &Denial) -> Self {
        match denial {
            Denial::QuotaExceeded {
                needed_ms, left_ms, reserved_ms, limit_ms, resets_in_ms: back, limiter, ..
            }
            | Denial::PendingOverquota {
                needed_ms, left_ms, reserved_ms, limit_ms, frees_in_ms: back, limiter, ..
            } => Self {
                needed_ms: *needed_ms,
                left_ms: *left_ms,
                reserved_ms: *reserved_ms,
                limit_ms: *limit_ms,
                resets_in_ms: Some(*back),
                limiter: Some(*limiter),
            },
            Denial::TooManyGuests { frees_in_ms, .. } => Self { resets_in_ms: Some(*frees_in_ms), ..Self::default() },
            Denial::RunsExceeded { resets_in_ms, .. } => Self { resets_in_ms: Some(*resets_in_ms), ..Self::default() },
            Denial::IllegalDuration { declared_ms, limit_ms, .. } => {
                Self { needed_ms: *declared_ms, limit_ms: *limit_ms, ..Self::default() }
            }
            Denial::ClockSkew { .. }
            | Denial::ConcurrencyExceeded { .. }
            | Denial::NoCapacity { .. }
            | Denial::QueueFull { .. }
            | Denial::Unauthenticated { .. }
            | Denial::AccountDeleting
            | Denial::AccountUnusable
            | Denial::BrokerUnavailable
            | Denial::PlatformFault => Self::default(),
        }
    }
}

#[cfg(test)]
mod tests;
