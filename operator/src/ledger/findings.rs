//! What the broker finds of what admins write, for those who show it: who is in a tier, what became of a grant, which pools
//! are in use. Nothing is decided by it, and all of it comes from what decides: the policies of accounts and their durable
//! pages.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use spaceport_core::ids::{AccountName, LedgerTime, NodeName};
use spaceport_core::lease::{Policy, State};
use spaceport_core::page::Page;

use super::known::Known;
use super::seen::{GrantSeen, TierSeen};

/// All of it, at one moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Findings {
    /// Tiers by name.
    pub tiers: BTreeMap<String, TierSeen>,
    /// Accounts by the name of their tier; none of those without one, or whose page cannot be used.
    pub accounts: BTreeMap<String, usize>,
    /// Grants by uid; none of an account whose page cannot be used, for nobody can tell.
    pub grants: HashMap<String, GrantFound>,
    /// Generations of the pools, by name.
    pub pools: BTreeMap<String, i64>,
    /// Nodes that are in this term: their agents are here and have accepted its epoch.
    pub joined: BTreeSet<NodeName>,
}

/// What became of a grant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GrantFound {
    /// The account that it is for.
    pub account: AccountName,
    /// Granted, weighted milliseconds.
    pub ms: u64,
    /// When it ends.
    pub expires: LedgerTime,
    /// Charged to its row, weighted milliseconds; none if it has no row on the page: before the first hold that takes from
    /// it, and after its end.
    pub used_ms: Option<u64>,
    /// Whether it is in force.
    pub fate: GrantFate,
}

/// Whether a grant is in force, and why not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GrantFate {
    /// It pays when the base is used up.
    InForce,
    /// All of it was charged.
    UsedUp,
    /// Its time is over.
    Expired,
    /// There is no such account.
    NoAccount,
    /// No tier applies to its account.
    NoTier,
    /// Its account's tier takes no grants.
    NotExtendable {
        /// Name of the tier.
        tier: String,
    },
    /// The page has as many rows as it can hold, of grants that expire earlier.
    PageFull,
}

impl Findings {
    /// What is found at `now`, by the wall clock: in one pass over the accounts, and one over the grants.
    pub fn of(state: &State, known: &Known, now: LedgerTime) -> Self {
        let mut accounts: BTreeMap<&str, usize> = BTreeMap::new();
        for account in state.accounts.values() {
            *accounts.entry(account.policy.tier.as_str()).or_default() += 1;
        }
        accounts.remove("");
        let mut grants = HashMap::new();
        for (name, of_account) in known.grants() {
            let account = state.accounts.get(name).map(|found| (&*found.durable, &*found.policy));
            if account.is_some() || !known.accounts.contains_key(name) {
                grants.extend(judged(&of_account, account, now));
            }
        }
        Self {
            tiers: known.tiers.clone(),
            accounts: accounts.into_iter().map(|(tier, count)| (tier.to_owned(), count)).collect(),
            grants,
            pools: known.pools.iter().map(|(name, pool)| (name.clone(), pool.generation)).collect(),
            joined: state.nodes.iter().filter(|(_, node)| node.joined).map(|(name, _)| name.clone()).collect(),
        }
    }
}

/// The grants of one account, by uid. Pure.
fn judged(
    grants: &[&GrantSeen],
    account: Option<(&Page, &Policy)>,
    now: LedgerTime,
) -> impl Iterator<Item = (String, GrantFound)> {
    // By the page's time, as everything about it (L20).
    let at = account.map_or(now, |(page, _)| page.time(now));
    let usable = account.map(|(page, policy)| page.usable_grants(&policy.allowance, at)).unwrap_or_default();
    let usable: BTreeSet<String> = usable.into_iter().collect();
    grants.iter().map(move |grant| {
        let row = account.and_then(|(page, _)| page.grants.iter().find(|row| row.uid == grant.uid));
        let fate = match account {
            _ if grant.expires <= at => GrantFate::Expired,
            None => GrantFate::NoAccount,
            Some((_, policy)) if policy.tier.is_empty() => GrantFate::NoTier,
            // All of an account's grants are in its allowance, or none (policy.rs).
            Some((_, policy)) if policy.allowance.grants.is_empty() => {
                GrantFate::NotExtendable { tier: policy.tier.clone() }
            }
            Some(_) if row.is_some_and(|row| row.used_ms >= grant.ms) => GrantFate::UsedUp,
            Some(_) if usable.contains(&grant.uid) => GrantFate::InForce,
            Some(_) => GrantFate::PageFull,
        };
        let GrantSeen { uid, account, ms, expires, .. } = grant;
        let used_ms = row.map(|row| row.used_ms);
        (uid.clone(), GrantFound { account: account.clone(), ms: *ms, expires: *expires, used_ms, fate })
    })
}

#[cfg(test)]
mod tests {
    use spaceport_core::lease::Priority;
    use spaceport_core::page::{GRANTS_MAX, GrantRow};
    use spaceport_core::protocol::CallerClass;
    use spaceport_core::quota::{Allowance, Grant};

    use super::*;

    const NOW: LedgerTime = LedgerTime(1_800_000_000_000);

    fn grant(uid: &str, ms: u64, expires: LedgerTime) -> GrantSeen {
        let name = format!("grant-{uid}");
        GrantSeen { name, uid: uid.to_owned(), account: AccountName::new("bob"), ms, expires }
    }

    fn policy(tier: &str, grants: &[GrantSeen]) -> Policy {
        let copy = |grant: &GrantSeen| Grant { uid: grant.uid.clone(), ms: grant.ms, expires: grant.expires };
        Policy {
            tier: tier.to_owned(),
            allowance: Allowance {
                base_ms: 60_000,
                per_cookie_ms: None,
                longest_call_ms: 50_000,
                runs_per_window: None,
                generation: 1,
                grants: grants.iter().map(copy).collect(),
            },
            concurrent: 2,
            priority: Priority::Medium,
            caller: CallerClass::Regular,
            deleting: false,
            conflict: None,
        }
    }

    fn row(uid: &str, used_ms: u64) -> GrantRow {
        GrantRow { uid: uid.to_owned(), ms: 1_000, expires: NOW.plus(1), used_ms }
    }

    fn fate(grant: &GrantSeen, account: Option<(&Page, &Policy)>) -> (Option<u64>, GrantFate) {
        let (_, found) = judged(&[grant], account, NOW).next().unwrap();
        (found.used_ms, found.fate)
    }

    #[test]
    fn a_grant_is_judged_by_its_account_its_tier_its_row_and_the_time_of_the_page() {
        let (live, over) = (grant("g", 1_000, NOW.plus(1)), grant("g", 1_000, NOW));
        let takes = policy("pro", std::slice::from_ref(&live));
        let (refuses, untiered) = (policy("free", &[]), policy("", &[]));
        let (new, ahead) = (Page::default(), Page { last_time: NOW.plus(1), ..Page::default() });
        let used = |used_ms| Page { grants: vec![row("g", used_ms)], ..Page::default() };
        let (some, all) = (used(400), used(1_000));
        let not_extendable = GrantFate::NotExtendable { tier: "free".to_owned() };
        let table = [
            (&live, Some((&new, &takes)), (None, GrantFate::InForce)),
            (&live, Some((&some, &takes)), (Some(400), GrantFate::InForce)),
            (&live, Some((&all, &takes)), (Some(1_000), GrantFate::UsedUp)),
            (&live, Some((&ahead, &takes)), (None, GrantFate::Expired)),
            (&live, Some((&some, &refuses)), (Some(400), not_extendable)),
            (&live, Some((&new, &untiered)), (None, GrantFate::NoTier)),
            (&live, None, (None, GrantFate::NoAccount)),
            (&over, None, (None, GrantFate::Expired)),
            // A lease that is still open keeps the row.
            (&over, Some((&some, &takes)), (Some(400), GrantFate::Expired)),
        ];
        for (grant, account, expected) in table {
            assert_eq!(fate(grant, account), expected, "{grant:?} of {account:?}");
        }
    }

    #[test]
    fn of_more_grants_than_the_page_can_hold_the_last_to_expire_wait() {
        let grants: Vec<GrantSeen> =
            (0..=GRANTS_MAX).map(|number| grant(&format!("{number:02}"), 1_000, NOW.plus(1 + number as u64))).collect();
        let (page, policy) = (Page::default(), policy("pro", &grants));
        let shown: Vec<&GrantSeen> = grants.iter().collect();
        let found: BTreeMap<String, GrantFound> = judged(&shown, Some((&page, &policy)), NOW).collect();
        let waits: Vec<&str> =
            found.iter().filter(|(_, found)| found.fate == GrantFate::PageFull).map(|(uid, _)| uid.as_str()).collect();
        assert_eq!((found.len(), waits), (GRANTS_MAX + 1, vec!["32"]));
    }
}
