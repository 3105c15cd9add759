//! What kubectl's columns and the conditions show of a page. Pure; computed with each write and decided upon by nobody. Nothing that only
//! the passing of time changes is shown (L21): amounts are as of the write, the end of the window is a time.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use spaceport_core::ids::LedgerTime;
use spaceport_core::page::Page;
use spaceport_core::quota::Allowance;

/// The strings beside the numbers of a page.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Display {
    /// Name of the tier that applies.
    pub tier: Option<String>,
    /// Charged in the open window: `18.4s`.
    pub used: String,
    /// Held by open leases.
    pub reserved: String,
    /// What a new lease can still take.
    pub left: String,
    /// End of the open window; none while there is none (L12).
    pub resets_at: Option<Time>,
    /// Open leases.
    pub leases: i32,
    /// Its conditions, as of the write; what stands on the page keeps its time of transition where nothing changed.
    pub conditions: Vec<Condition>,
    /// Generation of the spec that the conditions are about.
    pub generation: Option<i64>,
}

/// The tier as far as the columns need it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TierShown {
    /// Its name.
    pub name: String,
    /// What it and the account's grants allow.
    pub allowance: Allowance,
}

impl Display {
    /// The columns of a page at its own time, `page.last_time`, without conditions. Without a tier there is nothing to
    /// take.
    pub fn of(page: &Page, tier: Option<&TierShown>) -> Self {
        let window = page.open_window(page.last_time);
        let parts = page.holds.iter().flat_map(|hold| &hold.parts);
        let reserved = parts.fold(0, |sum: u64, part| sum.saturating_add(part.ms));
        let left = tier.map_or(0, |tier| page.standing(&tier.allowance, page.last_time).left_ms);
        Self {
            tier: tier.map(|tier| tier.name.clone()),
            used: seconds(window.map_or(0, |window| window.charged_ms)),
            reserved: seconds(reserved),
            left: seconds(left),
            resets_at: window.and_then(|window| time(window.end())),
            leases: i32::try_from(page.holds.len()).unwrap_or(i32::MAX),
            conditions: Vec::new(),
            generation: None,
        }
    }
}

/// Seconds with as many decimals as are not zero: `60s`, `18.4s`, `0.045s`.
pub fn seconds(milliseconds: u64) -> String {
    let (whole, rest) = (milliseconds / 1000, milliseconds % 1000);
    if rest == 0 {
        return format!("{whole}s");
    }
    let decimals = format!("{rest:03}");
    format!("{whole}.{}s", decimals.trim_end_matches('0'))
}

/// A ledger time as a Kubernetes time; none if it is outside what a timestamp can hold.
pub fn time(at: LedgerTime) -> Option<Time> {
    Timestamp::from_millisecond(at.0).ok().map(Time)
}

#[cfg(test)]
mod tests {
    use spaceport_core::ids::{Epoch, LeaseId, NodeName, Size, SpaceKey};
    use spaceport_core::page::{GrantRow, Hold, Part, Source, Window};
    use spaceport_core::quota::{Grant, WINDOW_MS};

    use super::*;

    const START: LedgerTime = LedgerTime(1_800_000_000_000);

    fn tier(grants: Vec<Grant>) -> TierShown {
        let allowance = Allowance {
            base_ms: 60_000,
            per_cookie_ms: None,
            longest_call_ms: 50_000,
            runs_per_window: None,
            generation: 1,
            grants,
        };
        TierShown { name: "demo".to_owned(), allowance }
    }

    fn window(charged_ms: u64) -> Window {
        Window { start: START, base_ms: 60_000, charged_ms, runs: 2, generation: 1 }
    }

    fn hold(parts: Vec<Part>) -> Hold {
        Hold {
            lease: LeaseId::new("l"),
            space: SpaceKey::new("demo", "hello", "u"),
            parts,
            node: NodeName::new("n"),
            avoid: Vec::new(),
            size: Size::Large,
            weight: 1,
            declared_ms: 10_000,
            epoch: Epoch(1),
            since: START,
            after: None,
            generation: 1,
            via: "token".to_owned(),
            cookie: None,
            shortened: None,
            budget: None,
        }
    }

    #[test]
    fn seconds_are_exact() {
        let shown = [0, 45, 999, 1000, 18_400, 60_000, 1_840_001].map(seconds);
        assert_eq!(shown, ["0s", "0.045s", "0.999s", "1s", "18.4s", "60s", "1840.001s"]);
    }

    #[test]
    fn new_account_has_its_whole_tier_and_no_reset() {
        let display = Display::of(&Page::default(), Some(&tier(Vec::new())));
        assert_eq!((display.used.as_str(), display.reserved.as_str(), display.left.as_str()), ("0s", "0s", "60s"));
        assert_eq!((display.tier.as_deref(), display.resets_at, display.leases), (Some("demo"), None, 0));
        assert_eq!(Display::of(&Page::default(), None).left, "0s");
    }

    #[test]
    fn open_window_shows_charge_reservation_and_its_end() {
        let mut page = Page { last_time: START.plus(1), windows: vec![window(15_125)], ..Page::default() };
        let grant = |uid: &str, expires| Grant { uid: uid.to_owned(), ms: 30_000, expires };
        page.grants.push(GrantRow { uid: "g".to_owned(), ms: 30_000, expires: START.plus(2), used_ms: 1000 });
        page.holds.push(
            hold(vec![
                Part { source: Source::Window(START), ms: 5000 },
                Part { source: Source::Grant("g".to_owned()), ms: 4000 },
            ])
            .into(),
        );
        let display = Display::of(&page, Some(&tier(vec![grant("g", START.plus(2)), grant("old", START)])));
        assert_eq!((display.used.as_str(), display.reserved.as_str()), ("15.125s", "9s"));
        assert_eq!(display.left, "64.875s", "60 - 15.125 - 5 of the base, 30 - 1 - 4 of the grant, nothing expired");
        assert_eq!(display.resets_at, time(START.plus(WINDOW_MS)));
        assert_eq!(display.leases, 1);
    }

    #[test]
    fn window_that_has_ended_is_not_shown() {
        let page = Page { last_time: START.plus(WINDOW_MS), windows: vec![window(50_000)], ..Page::default() };
        let display = Display::of(&page, Some(&tier(Vec::new())));
        assert_eq!((display.used.as_str(), display.left.as_str(), display.resets_at), ("0s", "60s", None));
    }

    #[test]
    fn lowered_tier_leaves_nothing_instead_of_less() {
        let page = Page { last_time: START, windows: vec![window(70_000)], ..Page::default() };
        assert_eq!(Display::of(&page, Some(&tier(Vec::new()))).left, "0s");
    }
}
