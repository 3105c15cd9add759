//! The conditions of an account, derived from its page and what applies to it. Pure.
//!
//! They are part of the page's object and are written with the page only ([`crate::ledger::display`]). One write of their
//! own is asked for where `Ready` would stay wrong ([`is_shown`]); the rest follows from the page, so that whatever
//! changes it is written anyway.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use spaceport_core::lease::Policy;
use spaceport_core::page::{CLOSED_MAX, GRANTS_MAX, Page};
use spaceport_crds::conditions::{ConditionStatus, GPUAccountCondition, GPUAccountReason, condition};

use crate::ledger::seen::ReadyShown;

/// Whether a condition holds, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// It holds.
    pub holds: bool,
    /// Why.
    pub reason: GPUAccountReason,
    /// With the numbers, as of the page, and the next step.
    pub message: String,
}

/// `Ready`: the first thing that keeps the account from getting a GPU for longer than its own leases and its quota do.
/// `tier` is `spec.tier`.
pub fn ready(page: &Page, policy: &Policy, tier: Option<&str>) -> Finding {
    let not = |reason, message| Finding { holds: false, reason, message };
    if policy.deleting {
        return not(GPUAccountReason::Deleting, deleting(page));
    }
    if let Some(other) = &policy.conflict {
        let message = format!(
            "the older account {other} has one of its identities, and an identity belongs to one account; take it from one \
             of them"
        );
        return not(GPUAccountReason::IdentityConflict, message);
    }
    if policy.tier.is_empty() {
        return match tier {
            Some(tier) => {
                let message = format!("there is no GPUTier {tier}; create it, or change spec.tier");
                not(GPUAccountReason::UnknownTier, message)
            }
            None => {
                let message = "no GPUTier has a rule for this account; add one, or set spec.tier";
                not(GPUAccountReason::NoTier, message.to_owned())
            }
        };
    }
    let (holds, closed) = (page.holds.len(), page.closed.len());
    // Every open hold will need a row of the outbox (L10).
    if closed > 0 && holds + closed >= CLOSED_MAX {
        let message = format!(
            "{closed} leases wait for their receipts and {holds} are open, of {CLOSED_MAX} together; it goes on when \
             the operator can write GPULeases again"
        );
        return not(GPUAccountReason::ReceiptsPending, message);
    }
    let usable = policy.allowance.grants.iter().filter(|grant| page.last_time < grant.expires).count();
    if usable > GRANTS_MAX {
        let message = format!(
            "tier {}; of {usable} grants {GRANTS_MAX} have room on the page, those that expire first; the rest wait until \
             some of these have expired or are deleted",
            policy.tier
        );
        return Finding { holds: true, reason: GPUAccountReason::TooManyGrants, message };
    }
    let message = format!("tier {}", policy.tier);
    Finding { holds: true, reason: GPUAccountReason::AsExpected, message }
}

fn deleting(page: &Page) -> String {
    let end = page.open_window(page.last_time).and_then(|window| Timestamp::from_millisecond(window.end().0).ok());
    let keeps = [
        (!page.holds.is_empty()).then(|| format!("the end of its leases ({} open)", page.holds.len())),
        (!page.closed.is_empty()).then(|| format!("its receipts ({} to be written)", page.closed.len())),
        end.map(|end| format!("the end of its window at {end}")),
    ];
    let keeps: Vec<String> = keeps.into_iter().flatten().collect();
    let waits = if keeps.is_empty() { String::new() } else { format!("; it waits for {}", keeps.join(", ")) };
    format!("it is being deleted and gets no GPU any more{waits}")
}

/// `OutboxDrained`: every settled lease is known to have its receipt. A row may stay a while after its receipt was
/// written: it leaves with the next write of the page.
pub fn outbox_drained(page: &Page) -> Finding {
    match page.closed.len() {
        0 => Finding {
            holds: true,
            reason: GPUAccountReason::AsExpected,
            message: "every settled lease has its receipt".to_owned(),
        },
        closed => {
            let message = format!("{closed} of at most {CLOSED_MAX} settled leases are in status.closed");
            Finding { holds: false, reason: GPUAccountReason::ReceiptsPending, message }
        }
    }
}

/// Both conditions of a page, for its write at time `now`.
pub fn conditions(
    page: &Page,
    policy: &Policy,
    tier: Option<&str>,
    generation: Option<i64>,
    now: Timestamp,
) -> Vec<Condition> {
    let made = |kind: GPUAccountCondition, Finding { holds, reason, message }: Finding| {
        let holds = if holds { ConditionStatus::True } else { ConditionStatus::False };
        condition(kind.as_str(), holds, reason.as_str(), message, generation, now)
    };
    vec![
        made(GPUAccountCondition::OutboxDrained, outbox_drained(page)),
        made(GPUAccountCondition::Ready, ready(page, policy, tier)),
    ]
}

/// True if the page shows what was found, so that no write is needed. An account that is as expected and shows nothing
/// yet is not wrong: a new one costs no write before its first lease.
pub fn is_shown(found: &Finding, shown: Option<&ReadyShown>) -> bool {
    match shown {
        None => found.holds && found.reason == GPUAccountReason::AsExpected,
        Some(shown) => shown.holds == found.holds && shown.reason == found.reason.as_str(),
    }
}

#[cfg(test)]
mod tests {
    use spaceport_core::ids::{AccountName, Epoch, LeaseId, LedgerTime, NodeName, Size, SpaceKey};
    use spaceport_core::lease::Priority;
    use spaceport_core::page::{Closed, Ending, Hold, Window};
    use spaceport_core::protocol::CallerClass;
    use spaceport_core::quota::{Allowance, Grant};

    use super::*;

    const START: LedgerTime = LedgerTime(1_800_000_000_000);

    fn policy(tier: &str) -> Policy {
        Policy {
            tier: tier.to_owned(),
            allowance: Allowance {
                per_cookie_ms: None,
                base_ms: 60_000,
                longest_call_ms: 50_000,
                runs_per_window: None,
                generation: 1,
                grants: Vec::new(),
            },
            concurrent: 2,
            priority: Priority::Medium,
            caller: CallerClass::Regular,
            deleting: false,
            conflict: None,
        }
    }

    fn hold(lease: usize) -> Hold {
        Hold {
            cookie: None,
            shortened: None,
            budget: None,
            lease: LeaseId::new(lease.to_string()),
            space: SpaceKey::new("demo", "hello", "u"),
            parts: Vec::new(),
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
        }
    }

    fn page(holds: usize, closed: usize) -> Page {
        let closed_row =
            |lease| Closed { hold: hold(lease).into(), ending: Ending::Released, used_ms: 1, charged_ms: 1, at: START };
        Page {
            holds: (0..holds).map(|lease| hold(lease).into()).collect(),
            closed: (100..100 + closed).map(closed_row).collect(),
            ..Page::default()
        }
    }

    #[test]
    fn ready_names_the_first_thing_that_keeps_the_account_from_a_gpu() {
        let found = |page: &Page, policy: &Policy, tier| {
            let found = ready(page, policy, tier);
            (found.holds, found.reason)
        };
        assert_eq!(found(&page(2, 3), &policy("demo"), None), (true, GPUAccountReason::AsExpected));
        assert_eq!(found(&page(0, 0), &policy(""), Some("gone")), (false, GPUAccountReason::UnknownTier));
        assert_eq!(found(&page(0, 0), &policy(""), None), (false, GPUAccountReason::NoTier));
        let full = page(2, CLOSED_MAX - 2);
        assert_eq!(found(&full, &policy("demo"), None), (false, GPUAccountReason::ReceiptsPending));
        let busy = page(CLOSED_MAX, 0);
        assert_eq!(found(&busy, &policy("demo"), None), (true, GPUAccountReason::AsExpected), "no receipt is missing");
        let deleting = Policy { deleting: true, ..policy("") };
        assert_eq!(found(&full, &deleting, None), (false, GPUAccountReason::Deleting));
    }

    #[test]
    fn an_identity_of_another_account_and_too_many_grants_are_told_with_the_next_step() {
        let conflict = Policy { conflict: Some(AccountName::new("zoe")), ..policy("demo") };
        let found = ready(&page(0, 0), &conflict, None);
        assert_eq!((found.holds, found.reason), (false, GPUAccountReason::IdentityConflict));
        assert!(found.message.contains("the older account zoe"), "{}", found.message);
        let mut many = policy("demo");
        let grant = |number: usize, expires| Grant { uid: number.to_string(), ms: 1, expires };
        many.allowance.grants = (0..=GRANTS_MAX).map(|number| grant(number, START)).collect();
        let found = ready(&page(0, 0), &many, None);
        assert_eq!((found.holds, found.reason), (true, GPUAccountReason::TooManyGrants));
        assert!(found.message.contains("of 33 grants 32"), "{}", found.message);
        assert!(!is_shown(&found, None), "the admin who made them is told at once");
        many.allowance.grants[0].expires = LedgerTime(i64::MIN);
        assert_eq!(ready(&page(0, 0), &many, None).reason, GPUAccountReason::AsExpected, "expired ones do not count");
    }

    #[test]
    fn a_deleted_account_says_what_it_waits_for() {
        let window = Window { start: START, base_ms: 60_000, charged_ms: 1, runs: 1, generation: 1 };
        let page = Page { windows: vec![window], last_time: START, ..page(2, 1) };
        let policy = Policy { deleting: true, ..policy("demo") };
        assert_eq!(
            ready(&page, &policy, None).message,
            "it is being deleted and gets no GPU any more; it waits for the end of its leases (2 open), its receipts \
             (1 to be written), the end of its window at 2027-01-16T08:00:00Z"
        );
        let nothing = ready(&Page::default(), &policy, None).message;
        assert_eq!(nothing, "it is being deleted and gets no GPU any more");
    }

    #[test]
    fn the_outbox_is_drained_when_no_settled_lease_is_on_the_page() {
        assert!(outbox_drained(&page(3, 0)).holds);
        let waits = outbox_drained(&page(0, 2));
        assert_eq!((waits.holds, waits.reason), (false, GPUAccountReason::ReceiptsPending));
    }

    #[test]
    fn only_a_wrong_ready_asks_for_a_write() {
        let well = ready(&page(0, 0), &policy("demo"), None);
        let untiered = ready(&page(0, 0), &policy(""), None);
        let shown = |holds, reason: GPUAccountReason| ReadyShown { holds, reason: reason.as_str().to_owned() };
        assert!(is_shown(&well, None), "a new account costs no write");
        assert!(!is_shown(&untiered, None), "one that gets nothing says why");
        assert!(is_shown(&untiered, Some(&shown(false, GPUAccountReason::NoTier))));
        assert!(!is_shown(&untiered, Some(&shown(true, GPUAccountReason::AsExpected))));
        assert!(!is_shown(&untiered, Some(&shown(false, GPUAccountReason::Deleting))), "the reason is another");
        assert!(!is_shown(&well, Some(&shown(false, GPUAccountReason::NoTier))), "its tier is back");
    }
}
