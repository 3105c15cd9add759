//! Which tier an account is in, and what tier and grants allow it; which pool a node is in, and what applies there. Pure.

use std::collections::BTreeMap;

use spaceport_core::lease::{Limits, NodeSettings, Policy, Priority};
use spaceport_core::page::COOKIES_MAX;
use spaceport_core::protocol::CallerClass;
use spaceport_core::queue::QueueBounds;
use spaceport_core::quota::{Allowance, Grant};
use spaceport_crds::names::{GUEST_PAGE_PREFIX, SPACE_PAGE_PREFIX};
use spaceport_crds::{Callers, Identity, IdentityRule, Priority as TierPriority};

use super::seen::{AccountSeen, GrantSeen, PoolSeen, TierSeen};

/// The tier that applies: `spec.tier`, else by kind of account, else the most specific rule of the oldest tier (L4).
pub fn tier_of<'a>(account: &AccountSeen, tiers: &'a BTreeMap<String, TierSeen>) -> Option<&'a TierSeen> {
    if let Some(name) = &account.tier {
        return tiers.get(name);
    }
    let name = account.name.as_str();
    let callers = if name.starts_with(GUEST_PAGE_PREFIX) {
        Callers::Guests
    } else if name.starts_with(SPACE_PAGE_PREFIX) {
        Callers::Spaces
    } else {
        Callers::SignedIn
    };
    chosen(callers, &account.identities, tiers)
}

/// The tier of callers of a kind who have these identities.
fn chosen<'a>(
    callers: Callers,
    identities: &[Identity],
    tiers: &'a BTreeMap<String, TierSeen>,
) -> Option<&'a TierSeen> {
    let of_kind = tiers.values().filter(|tier| tier.callers == callers);
    if callers != Callers::SignedIn {
        return of_kind.min_by_key(|tier| tier.created);
    }
    of_kind
        .filter_map(|tier| Some((specificity(tier, identities)?, tier)))
        .max_by(|(a, first), (b, second)| a.cmp(b).then_with(|| second.created.cmp(&first.created)))
        .map(|(_, tier)| tier)
}

/// What a tier is meant for and another one has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overruled<'a> {
    /// Index of the rule in `spec.identities`; none of a tier for guests or Spaces, which has no rules.
    pub rule: Option<usize>,
    /// Name of the tier that was created first.
    pub by: &'a str,
}

/// Where a tier fits as well as one that was created first, so that it has no say. Each of its rules is tried with an
/// identity that it describes, and the choice is that of any account. That another tier has a more specific rule is no
/// conflict. Of tiers that were created within one second any may be the first.
pub fn overruled<'a>(tier: &TierSeen, tiers: &'a BTreeMap<String, TierSeen>) -> Vec<Overruled<'a>> {
    let chosen_before = |identities: &[Identity]| {
        let chosen = chosen(tier.callers, identities, tiers)?;
        let fits_as_well = specificity(chosen, identities) == specificity(tier, identities);
        (chosen.name != tier.name && fits_as_well).then_some(chosen.name.as_str())
    };
    if tier.callers != Callers::SignedIn {
        return chosen_before(&[]).map(|by| Overruled { rule: None, by }).into_iter().collect();
    }
    let described = tier.identities.iter().enumerate().filter_map(|(rule, described)| Some((rule, whom(described)?)));
    described.filter_map(|(rule, whom)| Some(Overruled { rule: Some(rule), by: chosen_before(&[whom])? })).collect()
}

/// True if every rule of a tier that fits anybody is overruled: then only accounts that name it in `spec.tier` are in it.
pub fn has_no_say(tier: &TierSeen, overruled: &[Overruled<'_>]) -> bool {
    let rules = tier.identities.iter().filter(|rule| whom(rule).is_some()).count();
    !overruled.is_empty() && overruled.len() >= rules
}

/// An identity that a rule fits, and no rule that says more; none if it fits nobody.
fn whom(rule: &IdentityRule) -> Option<Identity> {
    let IdentityRule { issuer, subject, subject_suffix, group } = rule;
    // An empty text ends with no suffix and is no issuer's or subject's name.
    let subject = subject.as_ref().or(subject_suffix.as_ref());
    let identity = |of: Option<&String>| of.cloned().unwrap_or_default();
    group.is_none().then(|| Identity { issuer: identity(issuer.as_ref()), subject: identity(subject) })
}

/// Fields of the tier's most specific rule that fits one of the identities; none if no rule fits.
fn specificity(tier: &TierSeen, identities: &[Identity]) -> Option<usize> {
    let fits = |rule: &IdentityRule, identity: &Identity| {
        let IdentityRule { issuer, subject, subject_suffix, group } = rule;
        // Groups are known to the gateway only: a rule that asks for one fits nobody here.
        group.is_none()
            && issuer.as_ref().is_none_or(|issuer| *issuer == identity.issuer)
            && subject.as_ref().is_none_or(|subject| *subject == identity.subject)
            && subject_suffix.as_ref().is_none_or(|suffix| identity.subject.ends_with(suffix.as_str()))
    };
    let fields = |rule: &IdentityRule| {
        [&rule.issuer, &rule.subject, &rule.subject_suffix].into_iter().filter(|field| field.is_some()).count()
    };
    let rules = tier.identities.iter().filter(|rule| identities.iter().any(|identity| fits(rule, identity)));
    rules.map(fields).max()
}

/// What the account may do. Without a tier nothing: every call is refused with a limit of zero.
pub fn policy_of(account: &AccountSeen, tier: Option<&TierSeen>, grants: &[&GrantSeen]) -> Policy {
    let Some(tier) = tier else {
        return Policy {
            tier: String::new(),
            allowance: Allowance {
                per_cookie_ms: None,
                base_ms: 0,
                longest_call_ms: 0,
                runs_per_window: None,
                generation: 0,
                grants: Vec::new(),
            },
            concurrent: 0,
            priority: Priority::Low,
            caller: CallerClass::Guest,
            deleting: account.deleting,
            conflict: None,
        };
    };
    let grants = if tier.extendable { grants } else { &[] };
    let grants = grants.iter().map(|grant| Grant { uid: grant.uid.clone(), ms: grant.ms, expires: grant.expires });
    Policy {
        tier: tier.name.clone(),
        allowance: Allowance { grants: grants.collect(), ..allowance_of(tier, account.name.is_guests()) },
        concurrent: tier.concurrent_leases,
        priority: match tier.priority {
            TierPriority::Low => Priority::Low,
            TierPriority::Medium => Priority::Medium,
            TierPriority::Highest => Priority::Highest,
        },
        caller: tier.class,
        deleting: account.deleting,
        conflict: None,
    }
}

/// What a tier alone allows an account, or a page of guests.
pub fn allowance_of(tier: &TierSeen, guests: bool) -> Allowance {
    // Without a limit of its own a prefix has as much as all the visitors that its page can hold.
    let prefix_ms = || tier.address_prefix_ms.unwrap_or_else(|| tier.base_ms.saturating_mul(COOKIES_MAX as u64));
    Allowance {
        per_cookie_ms: guests.then_some(tier.base_ms),
        base_ms: if guests { prefix_ms() } else { tier.base_ms },
        longest_call_ms: tier.longest_call_ms,
        runs_per_window: tier.runs_per_window,
        generation: tier.generation,
        grants: Vec::new(),
    }
}

/// Why the pool of a node is not known.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoPool {
    /// Its GPUNode is not there yet, or says that no pool selects the node; then its agent shares no card.
    #[error("its GPUNode names no pool")]
    NotNamed,
    /// There is no usable pool of that name.
    #[error("its GPUNode names the pool {name}, which is not there or cannot be used")]
    Unknown {
        /// The name.
        name: String,
    },
}

/// The pool of a node: the one that its agent says it follows (`status.pool` of the GPUNode). The agent alone selects, by
/// all labels of its Node; nobody selects a second time, so the two can not differ.
///
/// # Errors
/// [`NoPool`]: the defaults apply.
pub fn pool_of<'a>(named: Option<&str>, pools: &'a BTreeMap<String, PoolSeen>) -> Result<&'a PoolSeen, NoPool> {
    let name = named.ok_or(NoPool::NotNamed)?;
    pools.get(name).ok_or_else(|| NoPool::Unknown { name: name.to_owned() })
}

/// The settings of the nodes of a pool.
pub fn settings_of(pool: &PoolSeen) -> NodeSettings {
    let bound = |requests: u64| usize::try_from(requests).unwrap_or(usize::MAX);
    NodeSettings {
        limits: Limits {
            allow_limit_ms: pool.allow_limit_ms,
            grace_ms: pool.grace_ms,
            clear_limit_ms: pool.clear_limit_ms,
            order_ttl_ms: pool.order_ttl_ms,
        },
        duration_factor_percent: pool.duration_factor_percent,
        large_weight: pool.large_weight,
        xlarge_weight: pool.xlarge_weight,
        queue: QueueBounds {
            node: bound(pool.queue_per_pool),
            space: bound(pool.queue_per_space),
            account: bound(pool.queue_per_account),
        },
        lanes: pool.lanes,
    }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

    use super::*;

    fn account(name: &str) -> AccountSeen {
        let metadata = ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() };
        AccountSeen::malformed(&metadata, String::new())
    }

    fn tier(address_prefix_ms: Option<u64>) -> TierSeen {
        TierSeen {
            name: "guest".to_owned(),
            generation: 1,
            created: Timestamp::UNIX_EPOCH,
            base_ms: 120_000,
            address_prefix_ms,
            longest_call_ms: 60_000,
            concurrent_leases: 1,
            runs_per_window: None,
            extendable: false,
            callers: Callers::Guests,
            class: CallerClass::Guest,
            priority: TierPriority::Low,
            identities: Vec::new(),
        }
    }

    /// The limits of the tier `guest`: 120 s for each visitor, 600 s for the address prefix.
    #[test]
    fn a_guest_page_has_a_limit_for_each_visitor_and_one_for_its_address_prefix() {
        let limits = |name: &str, tier: &TierSeen| {
            let allowance = policy_of(&account(name), Some(tier), &[]).allowance;
            (allowance.per_cookie_ms, allowance.base_ms)
        };
        assert_eq!(limits("guest-0af3", &tier(Some(600_000))), (Some(120_000), 600_000));
        assert_eq!(limits("guest-0af3", &tier(None)), (Some(120_000), 64 * 120_000), "all that the page can hold");
        assert_eq!(limits("bob", &tier(Some(600_000))), (None, 120_000), "an account has one limit");
        let tiers = BTreeMap::from([("guest".to_owned(), tier(None))]);
        assert_eq!(tier_of(&account("guest-0af3"), &tiers).map(|tier| tier.name.as_str()), Some("guest"));
        assert_eq!(tier_of(&account("bob"), &tiers), None);
    }

    fn rule(issuer: &str, subject: &str, suffix: &str, group: &str) -> IdentityRule {
        let given = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
        IdentityRule {
            issuer: given(issuer),
            subject: given(subject),
            subject_suffix: given(suffix),
            group: given(group),
        }
    }

    /// Tiers by name, created one second after the other.
    fn created_in_turn(tiers: Vec<(&str, Callers, Vec<IdentityRule>)>) -> BTreeMap<String, TierSeen> {
        let numbered = tiers.into_iter().zip(1..);
        let made = numbered.map(|((name, callers, identities), second)| {
            let created = Timestamp::from_second(second).unwrap();
            (name.to_owned(), TierSeen { name: name.to_owned(), created, callers, identities, ..tier(None) })
        });
        made.collect()
    }

    /// Rules of the tier that are overruled, and by whom, and whether it has no say at all.
    fn told<'a>(name: &str, tiers: &'a BTreeMap<String, TierSeen>) -> (Vec<(Option<usize>, &'a str)>, bool) {
        let overruled = overruled(&tiers[name], tiers);
        (overruled.iter().map(|found| (found.rule, found.by)).collect(), has_no_say(&tiers[name], &overruled))
    }

    #[test]
    fn a_rule_that_an_older_tier_has_too_is_overruled_and_one_that_says_less_is_not() {
        use Callers::SignedIn;
        let tiers = created_in_turn(vec![
            ("everyone", SignedIn, vec![rule("", "", "", "")]),
            ("team", SignedIn, vec![rule("i", "", "@team", "")]),
            ("twin", SignedIn, vec![rule("", "", "", ""), rule("i", "", "@team", ""), rule("j", "", "@team", "")]),
            ("one", SignedIn, vec![rule("i", "bob@team", "", "")]),
            ("named-only", SignedIn, Vec::new()),
            ("group", SignedIn, vec![rule("i", "", "", "staff")]),
            ("issuer", SignedIn, vec![rule("i", "", "", "")]),
            ("again", SignedIn, vec![rule("", "", "", ""), rule("i", "", "", "staff")]),
        ]);
        let none = || (Vec::new(), false);
        assert_eq!(told("everyone", &tiers), none());
        assert_eq!(told("team", &tiers), none());
        assert_eq!(told("twin", &tiers), (vec![(Some(0), "everyone"), (Some(1), "team")], false));
        assert_eq!(told("one", &tiers), (vec![(Some(0), "team")], true), "a subject counts like a suffix");
        for name in ["named-only", "group", "issuer"] {
            assert_eq!(told(name, &tiers), none(), "{name}");
        }
        assert_eq!(told("again", &tiers), (vec![(Some(0), "everyone")], true), "its other rule fits nobody");
        // An account is in the tier that is told.
        let identities = vec![Identity { issuer: "i".to_owned(), subject: "bob@team".to_owned() }];
        let bob = AccountSeen { identities, ..account("bob") };
        assert_eq!(tier_of(&bob, &tiers).map(|tier| tier.name.as_str()), Some("team"));
    }

    #[test]
    fn of_two_tiers_for_guests_the_younger_has_no_say() {
        let tiers = created_in_turn(vec![
            ("guests", Callers::Guests, Vec::new()),
            ("spaces", Callers::Spaces, Vec::new()),
            ("more-guests", Callers::Guests, Vec::new()),
        ]);
        assert_eq!(told("guests", &tiers), (Vec::new(), false));
        assert_eq!(told("spaces", &tiers), (Vec::new(), false));
        assert_eq!(told("more-guests", &tiers), (vec![(None, "guests")], true));
    }
}
