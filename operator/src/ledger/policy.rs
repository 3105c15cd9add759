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
    let of_kind = tiers.values().filter(|tier| tier.callers == callers);
    if callers != Callers::SignedIn {
        return of_kind.min_by_key(|tier| tier.created);
    }
    of_kind
        .filter_map(|tier| Some((specificity(tier, &account.identities)?, tier)))
        .max_by(|(a, first), (b, second)| a.cmp(b).then_with(|| second.created.cmp(&first.created)))
        .map(|(_, tier)| tier)
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
}
