//! What an account has left, from which sources a call is paid, and which refusal it gets if it is not (docs/rules.md,
//! L12 and L18).
//!
//! All amounts are weighted milliseconds unless they are called declared.

mod in_source;

use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use self::in_source::check_source;

use crate::ids::{CookieId, LedgerTime, Size};
use crate::page::{
    COOKIES_MAX, CookieRow, CookieWindow, GRANTS_MAX, GrantRow, Hold, Page, Part, Shortened, ShortenedBy, Source,
    WINDOWS_MAX, Window,
};
use crate::protocol::{Denial, DurationLimit, Limiter};

/// How long a window lasts from its first hold.
pub const WINDOW_MS: u64 = 24 * 60 * 60 * 1000;

/// A call is never shortened to less: the client declares whole seconds, and an answer needs some time.
pub const SHORTENED_MIN_MS: u64 = 1_000;

/// What the account's tier and grants allow at the moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Allowance {
    /// Base quota of a window. On a guest page that of the whole address prefix.
    pub base_ms: u64,
    /// On a guest page the quota of each visitor beside it; None on every other page.
    pub per_cookie_ms: Option<u64>,
    /// Longest declared duration of one call, unweighted.
    pub longest_call_ms: u64,
    /// Most runs in one window, if that is limited: the account's, on a guest page the visitor's.
    pub runs_per_window: Option<u64>,
    /// Generation of the tier, repeated by every row that comes from it.
    pub generation: i64,
    /// The account's GPUQuotaGrants, in any order. Empty if the tier is not extendable.
    pub grants: Vec<Grant>,
}

/// A GPUQuotaGrant. Its spec is immutable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    /// uid of the object.
    pub uid: String,
    /// Granted.
    pub ms: u64,
    /// Unusable from here on.
    pub expires: LedgerTime,
}

/// What a call asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Demand {
    /// Size of the slot.
    pub size: Size,
    /// Charged milliseconds for each millisecond of use.
    pub weight: u64,
    /// Longest run, unweighted: a hard limit, and what is reserved.
    pub declared_ms: u64,
    /// Set if the function declares more.
    pub shortened: Option<Shortened>,
    /// What the client multiplies durations of `large` by on these cards, in percent (L19).
    pub duration_factor_percent: u64,
}

/// Who is to pay for a call, as it is at one moment.
#[derive(Clone, Copy, Debug)]
pub struct Payer<'a> {
    /// The account's page.
    pub page: &'a Page,
    /// What applies to it.
    pub allowance: &'a Allowance,
    /// The visitor, on a guest page.
    pub cookie: Option<&'a CookieId>,
    /// A time of the page.
    pub at: LedgerTime,
}

/// What waits already and is to be paid as well; nothing is reserved for it. Weighted milliseconds.
#[derive(Clone, Copy, Debug, Default)]
pub struct Queued {
    /// Of the account.
    pub account_ms: u64,
    /// Of the visitor, on a guest page.
    pub cookie_ms: u64,
}

/// When the first reservation ends at the latest, for the message. Milliseconds; 0 if there is none.
#[derive(Clone, Copy, Debug, Default)]
pub struct FreesIn {
    /// Of the account.
    pub account_ms: u64,
    /// Of the visitor, on a guest page.
    pub cookie_ms: u64,
}

/// How the account stands at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// Base and what can still be charged to grants, together with what is charged to the base.
    pub limit_ms: u64,
    /// limit - charged.
    pub uncharged_ms: u64,
    /// limit - charged - reserved.
    pub left_ms: u64,
    /// Reserved in the sources that can be used now.
    pub reserved_ms: u64,
    /// When the open window ends, if one is open.
    pub resets_at: Option<LedgerTime>,
}

/// A hold that fits: what it is paid from, and the rows that come onto the page with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admission {
    /// The window it belongs to: the open one with the base that applies now, or a new one.
    pub window: Window,
    /// In the order in which they will be charged; the first is of the window.
    pub parts: Vec<Part>,
    /// Copies of the grants among the parts.
    pub grants: Vec<GrantRow>,
    /// On a guest page the visitor's row: the open one with the base that applies now, or a new one.
    pub cookie: Option<CookieRow>,
}

/// A source that can be used now.
struct Usable {
    source: Source,
    limit_ms: u64,
    charged_ms: u64,
    reserved_ms: u64,
}

impl Usable {
    const fn uncharged_ms(&self) -> u64 {
        self.limit_ms.saturating_sub(self.charged_ms)
    }

    const fn left_ms(&self) -> u64 {
        self.uncharged_ms().saturating_sub(self.reserved_ms)
    }
}

impl Demand {
    /// weight x declared.
    pub const fn needed_ms(&self) -> u64 {
        self.weight.saturating_mul(self.declared_ms)
    }

    /// What the function declares.
    pub const fn asked_ms(&self) -> u64 {
        match self.shortened {
            Some(shortened) => shortened.declared_ms,
            None => self.declared_ms,
        }
    }

    /// The same for less, if that is less and not too little.
    #[must_use]
    pub const fn shortened_to(self, limit_ms: u64, by: ShortenedBy) -> Self {
        if limit_ms < SHORTENED_MIN_MS || limit_ms >= self.declared_ms {
            return self;
        }
        let shortened = Some(Shortened { declared_ms: self.asked_ms(), by });
        Self { declared_ms: limit_ms, shortened, ..self }
    }

    /// The largest declared duration of this size that the longest call allows (L19: only `large` is multiplied).
    const fn longest_declared_ms(&self, longest_call_ms: u64) -> u64 {
        let percent = self.duration_factor_percent;
        match self.size {
            Size::Large => {
                let multiplied_ms = longest_call_ms.saturating_mul(percent) / 100;
                // What the client sends of exactly the longest call: rounded, it may be half a second more.
                let sent_ms = Self::of_source(self.size, longest_call_ms / 1000, self.weight, percent).declared_ms;
                if sent_ms > multiplied_ms { sent_ms } else { multiplied_ms }
            }
            Size::Xlarge => longest_call_ms,
        }
    }

    const fn declared_for(&self, ms: u64) -> u64 {
        // A weight of 0 would make every duration free; then any fits.
        match ms.checked_div(self.weight) {
            Some(declared) => declared,
            None => u64::MAX,
        }
    }
}

impl Window {
    /// When it ends.
    pub const fn end(&self) -> LedgerTime {
        self.start.plus(WINDOW_MS)
    }

    /// True if `at` lies within its 24 hours.
    pub fn covers(&self, at: LedgerTime) -> bool {
        self.start <= at && at < self.end()
    }
}

impl CookieRow {
    /// When it ends.
    pub const fn end(&self) -> LedgerTime {
        self.start.plus(WINDOW_MS)
    }

    /// True if `at` lies within its 24 hours.
    pub fn covers(&self, at: LedgerTime) -> bool {
        self.start <= at && at < self.end()
    }

    /// True if it is the row that a hold names.
    pub fn is_of(&self, window: &CookieWindow) -> bool {
        self.start == window.start && self.cookie == window.cookie
    }

    /// True if a page has to keep it: it was charged within its 24 hours, or an open hold will be charged to it.
    pub(crate) fn is_kept(&self, page: &Page, at: LedgerTime) -> bool {
        let unused = self.charged_ms == 0 && self.runs == 0;
        page.holds_of_row(self).next().is_some() || (!unused && at < self.end())
    }
}

impl Hold {
    /// What it has reserved, of all its sources together.
    pub fn held_ms(&self) -> u64 {
        self.parts.iter().fold(0, |sum, part| sum.saturating_add(part.ms))
    }
}

impl Page {
    /// Ledger time on this page: never before anything that was decided on it (L20).
    pub fn time(&self, now: LedgerTime) -> LedgerTime {
        now.max(self.last_time)
    }

    /// The window that is open at `at`.
    pub fn open_window(&self, at: LedgerTime) -> Option<&Window> {
        self.windows.iter().find(|window| window.covers(at))
    }

    /// What open holds have reserved in a source.
    pub fn reserved_ms(&self, source: &Source) -> u64 {
        let parts = self.holds.iter().flat_map(|hold| &hold.parts).filter(|part| part.source == *source);
        parts.fold(0, |sum, part| sum.saturating_add(part.ms))
    }

    /// The row of a visitor that is open at `at`.
    pub fn open_cookie(&self, cookie: &CookieId, at: LedgerTime) -> Option<&CookieRow> {
        self.cookies.iter().find(|row| row.cookie == *cookie && row.covers(at))
    }

    /// Open holds of a visitor's row.
    pub fn holds_of_row<'a>(&'a self, row: &'a CookieRow) -> impl Iterator<Item = &'a Hold> {
        self.holds.iter().map(Arc::as_ref).filter(|hold| hold.cookie.as_ref().is_some_and(|window| row.is_of(window)))
    }

    /// What open holds have reserved in a visitor's row.
    pub fn reserved_of_row_ms(&self, row: &CookieRow) -> u64 {
        self.holds_of_row(row).fold(0, |sum, hold| sum.saturating_add(hold.held_ms()))
    }

    /// True if an open hold has a part, of any amount, in the source.
    pub fn is_referenced(&self, source: &Source) -> bool {
        self.holds.iter().flat_map(|hold| &hold.parts).any(|part| part.source == *source)
    }

    /// How the account stands at `at`, a time of this page.
    pub fn standing(&self, allowance: &Allowance, at: LedgerTime) -> Standing {
        let usable = usable(self, allowance, at);
        let sum =
            |value: fn(&Usable) -> u64| usable.iter().fold(0_u64, |sum, source| sum.saturating_add(value(source)));
        Standing {
            limit_ms: sum(|source| match source.source {
                Source::Window(_) => source.limit_ms,
                // What a grant has paid never comes back, so it is no part of the quota any more.
                Source::Grant(_) => source.uncharged_ms(),
            }),
            uncharged_ms: sum(Usable::uncharged_ms),
            left_ms: sum(Usable::left_ms),
            reserved_ms: sum(|source| source.reserved_ms),
            resets_at: self.open_window(at).map(Window::end),
        }
    }

    /// Uids of the grants that can pay at `at`, a time of this page, in the order in which they do. One that has expired is
    /// not among them, nor one for which the page has no room.
    pub fn usable_grants(&self, allowance: &Allowance, at: LedgerTime) -> Vec<String> {
        let sources = usable(self, allowance, at).into_iter().map(|usable| usable.source);
        let grants = sources.filter_map(|source| match source {
            Source::Grant(uid) => Some(uid),
            Source::Window(_) => None,
        });
        grants.collect()
    }
}

/// Sources in the order in which they are used: base first, then the grant that expires soonest.
fn usable(page: &Page, allowance: &Allowance, at: LedgerTime) -> Vec<Usable> {
    let open = page.open_window(at);
    let start = open.map_or(at, |window| window.start);
    let base = Source::Window(start);
    let mut sources = vec![Usable {
        limit_ms: allowance.base_ms,
        charged_ms: open.map_or(0, |window| window.charged_ms),
        reserved_ms: page.reserved_ms(&base),
        source: base,
    }];
    let mut grants: Vec<&Grant> = allowance.grants.iter().filter(|grant| at < grant.expires).collect();
    grants.sort_by(|one, other| (one.expires, &one.uid).cmp(&(other.expires, &other.uid)));
    // Beyond what the page can hold a grant cannot be used, whatever its order; rows in use keep their place.
    let mut free_rows = GRANTS_MAX.saturating_sub(page.grants.iter().filter(|row| keeps(page, row, at)).count());
    for grant in grants {
        let row = page.grants.iter().find(|row| row.uid == grant.uid);
        if row.is_none() {
            match free_rows.checked_sub(1) {
                Some(rest) => free_rows = rest,
                None => continue,
            }
        }
        let source = Source::Grant(grant.uid.clone());
        sources.push(Usable {
            limit_ms: grant.ms,
            charged_ms: row.map_or(0, |row| row.used_ms),
            reserved_ms: page.reserved_ms(&source),
            source,
        });
    }
    sources
}

/// True if a grant's row has to stay: it can still be used, or an open hold will be charged to it.
pub(crate) fn keeps(page: &Page, row: &GrantRow, at: LedgerTime) -> bool {
    at < row.expires || page.is_referenced(&Source::Grant(row.uid.clone()))
}

impl Payer<'_> {
    /// How the account stands.
    pub fn standing(&self) -> Standing {
        self.page.standing(self.allowance, self.at)
    }

    /// How the visitor stands, on a guest page.
    fn visitor(&self) -> Option<Standing> {
        let (cookie, limit_ms) = (self.cookie?, self.allowance.per_cookie_ms?);
        let row = self.page.open_cookie(cookie, self.at);
        let uncharged_ms = limit_ms.saturating_sub(row.map_or(0, |row| row.charged_ms));
        let reserved_ms = row.map_or(0, |row| self.page.reserved_of_row_ms(row));
        Some(Standing {
            limit_ms,
            uncharged_ms,
            left_ms: uncharged_ms.saturating_sub(reserved_ms),
            reserved_ms,
            resets_at: row.map(CookieRow::end),
        })
    }

    /// All limits that apply, each with what waits for it already, the narrower first.
    fn limits(&self, queued: Queued) -> impl Iterator<Item = (Limiter, Standing, u64)> {
        let visitor = self.visitor();
        let whole = if visitor.is_some() { Limiter::AddressPrefix } else { Limiter::Account };
        let visitor = visitor.map(|standing| (Limiter::Cookie, standing, queued.cookie_ms));
        visitor.into_iter().chain([(whole, self.standing(), queued.account_ms)])
    }

    /// What a new hold can take now, weighted milliseconds.
    pub fn left_ms(&self, queued: Queued) -> u64 {
        let left = self.limits(queued).map(|(_, standing, queued_ms)| standing.left_ms.saturating_sub(queued_ms));
        left.min().unwrap_or_default()
    }

    /// The row that a hold of the visitor would belong to; the refusal if the page has no room for it.
    fn row(&self) -> Result<Option<CookieRow>, Denial> {
        let Some((cookie, base_ms)) = self.cookie.zip(self.allowance.per_cookie_ms) else { return Ok(None) };
        let generation = self.allowance.generation;
        if let Some(row) = self.page.open_cookie(cookie, self.at) {
            return Ok(Some(CookieRow { base_ms, generation, ..row.clone() }));
        }
        let kept = || self.page.cookies.iter().filter(|row| row.is_kept(self.page, self.at));
        if kept().count() >= COOKIES_MAX {
            // The first whose day is over. One that is over and still in use is free when its leases have ended.
            let frees = kept().map(|row| row.end().since(self.at)).min().unwrap_or_default();
            return Err(Denial::TooManyGuests { limit: COOKIES_MAX as u64, frees_in_ms: frees.max(1) });
        }
        Ok(Some(CookieRow { cookie: cookie.clone(), start: self.at, base_ms, charged_ms: 0, runs: 0, generation }))
    }
}

/// The call with no more than its payer has left, if that is anything (requirement A3). Where less is left than it could be
/// given, it asks for what the payer would have without the calls that run, or in the next window: its refusal then says
/// what helps, waiting for those calls or for the window.
pub fn clamp(payer: Payer<'_>, demand: Demand, queued: Queued) -> Demand {
    let least = |amount: fn(&Standing) -> u64| {
        payer.limits(Queued::default()).map(|(_, standing, _)| amount(&standing)).min().unwrap_or_default()
    };
    let amounts = [least(|standing| standing.limit_ms), least(|standing| standing.uncharged_ms), payer.left_ms(queued)];
    amounts
        .into_iter()
        .fold(demand, |demand, ms| demand.shortened_to(demand.declared_for(ms), ShortenedBy::RemainingQuota))
}

/// The longest duration that a call of this size can ever declare, unweighted.
pub fn longest_legal_ms(payer: Payer<'_>, demand: &Demand) -> u64 {
    let whole = payer.limits(Queued::default()).map(|(_, standing, _)| standing.limit_ms).min().unwrap_or_default();
    demand.longest_declared_ms(payer.allowance.longest_call_ms).min(demand.declared_for(whole))
}

/// Refuses what no window could ever admit.
///
/// # Errors
/// [`Denial::IllegalDuration`].
pub fn check_legal(payer: Payer<'_>, demand: &Demand) -> Result<(), Denial> {
    let limit_ms = payer.limits(Queued::default()).map(|(_, standing, _)| standing.limit_ms).min().unwrap_or_default();
    let quota_declared_ms = demand.declared_for(limit_ms);
    let longest_declared_ms = demand.longest_declared_ms(payer.allowance.longest_call_ms);
    let declared_ms = demand.asked_ms();
    let illegal = |limit_ms, what| Err(Denial::IllegalDuration { declared_ms, limit_ms, what, legal: None });
    if demand.declared_ms == 0 {
        return illegal(longest_declared_ms.min(quota_declared_ms), DurationLimit::Zero);
    }
    // Also of a call that would be given less: what a tier forbids no Space can allow.
    if declared_ms > longest_declared_ms {
        return illegal(longest_declared_ms, DurationLimit::LongestCall);
    }
    if demand.declared_ms > quota_declared_ms {
        return illegal(quota_declared_ms, DurationLimit::WholeQuota);
    }
    Ok(())
}

/// Decides whether a call fits now, beside what waits already, and what pays for it.
///
/// # Errors
/// [`Denial::IllegalDuration`], [`Denial::RunsExceeded`], [`Denial::TooManyGuests`], [`Denial::QuotaExceeded`] or
/// [`Denial::PendingOverquota`], in this order; of the last two that of the visitor before that of the address prefix.
pub fn admit(payer: Payer<'_>, demand: &Demand, queued: Queued, frees_in: FreesIn) -> Result<Admission, Denial> {
    check_legal(payer, demand)?;
    let cookie = payer.row()?;
    check_runs(payer, cookie.as_ref())?;
    let needed_ms = demand.needed_ms();
    let (declared_ms, weight) = (demand.asked_ms(), demand.weight);
    let given_ms = demand.shortened.map(|_| demand.declared_ms);
    // The same in every refusal: what would pass has to fit all limits.
    let largest_declared_ms =
        demand.declared_for(payer.left_ms(queued)).min(demand.longest_declared_ms(payer.allowance.longest_call_ms));
    let pending = |(limiter, standing, queued_ms): (Limiter, Standing, u64)| Denial::PendingOverquota {
        declared_ms,
        given_ms,
        weight,
        needed_ms,
        left_ms: standing.left_ms.saturating_sub(queued_ms),
        reserved_ms: standing.reserved_ms.saturating_add(queued_ms),
        limit_ms: standing.limit_ms,
        frees_in_ms: match limiter {
            Limiter::Cookie => frees_in.cookie_ms.max(1),
            Limiter::Account | Limiter::AddressPrefix => frees_in.account_ms.max(1),
        },
        largest_declared_ms,
        limiter,
    };
    if let Some((limiter, standing, queued_ms)) = payer.limits(queued).find(|limit| needed_ms > limit.1.uncharged_ms) {
        return Err(Denial::QuotaExceeded {
            declared_ms,
            given_ms,
            weight,
            needed_ms,
            left_ms: standing.left_ms.saturating_sub(queued_ms),
            reserved_ms: standing.reserved_ms.saturating_add(queued_ms),
            limit_ms: standing.limit_ms,
            // Without a window nothing is charged, so nothing has to come back; then this number is not shown.
            resets_in_ms: standing.resets_at.map_or(WINDOW_MS, |end| end.since(payer.at)).max(1),
            largest_declared_ms,
            limiter,
        });
    }
    if let Some(limit) = payer.limits(queued).find(|limit| needed_ms > limit.1.left_ms.saturating_sub(limit.2)) {
        return Err(pending(limit));
    }
    // A third window cannot be while holds of two older ones are open: it waits for them like any reservation.
    let whole = || payer.limits(queued).last().map(pending).unwrap_or(Denial::PlatformFault);
    plan(payer.page, payer.allowance, payer.at, needed_ms, cookie).ok_or_else(whole)
}

/// The limit on runs, of the visitor where there is one.
fn check_runs(payer: Payer<'_>, cookie: Option<&CookieRow>) -> Result<(), Denial> {
    let Some(limit) = payer.allowance.runs_per_window else { return Ok(()) };
    let page = payer.page;
    let (runs, open, end) = match (cookie, page.open_window(payer.at)) {
        (Some(row), _) => (row.runs, page.holds_of_row(row).count(), row.end()),
        (None, Some(window)) => {
            let source = Source::Window(window.start);
            let is_of = |hold: &&Arc<Hold>| hold.parts.iter().any(|part| part.source == source);
            (window.runs, page.holds.iter().filter(is_of).count(), window.end())
        }
        (None, None) => (0, 0, payer.at.plus(WINDOW_MS)),
    };
    if runs.saturating_add(open as u64) < limit {
        return Ok(());
    }
    Err(Denial::RunsExceeded { limit, resets_in_ms: end.since(payer.at).max(1) })
}

fn plan(
    page: &Page,
    allowance: &Allowance,
    at: LedgerTime,
    needed_ms: u64,
    cookie: Option<CookieRow>,
) -> Option<Admission> {
    let window = match page.open_window(at) {
        Some(window) => Window { base_ms: allowance.base_ms, generation: allowance.generation, ..window.clone() },
        None => {
            let kept = page.windows.iter().filter(|window| page.is_referenced(&Source::Window(window.start)));
            if kept.count() >= WINDOWS_MAX {
                return None;
            }
            Window { start: at, base_ms: allowance.base_ms, charged_ms: 0, runs: 0, generation: allowance.generation }
        }
    };
    let mut missing_ms = needed_ms;
    let mut parts = Vec::new();
    let mut grants = Vec::new();
    for source in usable(page, allowance, at) {
        let ms = source.left_ms().min(missing_ms);
        missing_ms -= ms;
        // The window's part comes also with 0 ms: the hold belongs to that window, whoever pays.
        if ms == 0 && !parts.is_empty() {
            continue;
        }
        if let Source::Grant(uid) = &source.source {
            let grant = allowance.grants.iter().find(|grant| grant.uid == *uid)?;
            let used_ms = source.charged_ms;
            grants.push(GrantRow { uid: uid.clone(), ms: grant.ms, expires: grant.expires, used_ms });
        }
        parts.push(Part { source: source.source, ms });
    }
    (missing_ms == 0).then_some(Admission { window, parts, grants, cookie })
}

/// Splits a charge over the parts of its hold, in their order.
pub fn fill(parts: &[Part], charged_ms: u64) -> impl Iterator<Item = (&Source, u64)> {
    let mut rest_ms = charged_ms;
    parts.iter().map(move |part| {
        let ms = part.ms.min(rest_ms);
        rest_ms -= ms;
        (&part.source, ms)
    })
}

#[cfg(test)]
mod tests;
