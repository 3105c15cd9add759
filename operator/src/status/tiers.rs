//! The status of a GPUTier. Pure.

use jiff::Timestamp;
use spaceport_crds::GPUTierStatus;
use spaceport_crds::conditions::{ConditionStatus, GPUTierCondition, GPUTierReason, condition};

use super::{holds_if, with};
use crate::ledger::findings::Findings;
use crate::ledger::policy::{Overruled, has_no_say, overruled};
use crate::ledger::seen::TierSeen;

/// What the tier shows at `now`, where it has shown `shown` so far.
pub fn status(shown: Option<&GPUTierStatus>, tier: &TierSeen, found: &Findings, now: Timestamp) -> GPUTierStatus {
    let overruled = overruled(tier, &found.tiers);
    let generation = Some(tier.generation);
    let made = |kind: GPUTierCondition, holds: ConditionStatus, reason: GPUTierReason, message: String| {
        condition(kind.as_str(), holds, reason.as_str(), message, generation, now)
    };
    let reason = |is_overruled| if is_overruled { GPUTierReason::OverlappingRule } else { GPUTierReason::AsExpected };
    let unheard = has_no_say(tier, &overruled);
    let accepted = if unheard { "only accounts that name it in spec.tier are in it" } else { "its rules apply" };
    let accepted = made(GPUTierCondition::Accepted, holds_if(!unheard), reason(unheard), accepted.to_owned());
    let is_overruled = !overruled.is_empty();
    let conflicted = conflict(tier, &overruled);
    let conflicted = made(GPUTierCondition::Conflicted, holds_if(is_overruled), reason(is_overruled), conflicted);
    let accounts = found.accounts.get(&tier.name).copied().unwrap_or_default();
    GPUTierStatus {
        observed_generation: generation,
        accounts: i32::try_from(accounts).unwrap_or(i32::MAX),
        conditions: with(shown.map(|shown| &shown.conditions[..]).unwrap_or_default(), [accepted, conflicted]),
    }
}

fn conflict(tier: &TierSeen, overruled: &[Overruled<'_>]) -> String {
    let Some(Overruled { rule, by }) = overruled.first() else {
        return "no older tier takes what it has a rule for".to_owned();
    };
    let more = match overruled.len() {
        1 => String::new(),
        count => format!("; so for {count} of its {} rules", tier.identities.len()),
    };
    match rule {
        Some(rule) => format!(
            "tier {by}, which was created first, has an equally specific rule for those of spec.identities[{rule}], and \
             has them{more}; change or delete one of the rules"
        ),
        None => format!(
            "tier {by}, which was created first, is for callers: {} too, and has them; delete one of the two",
            tier.callers
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use spaceport_crds::{Callers, GPUTier, GPUTierSpec, IdentityRule};

    use super::*;

    fn tier(name: &str, second: i64, callers: Callers, rules: usize) -> (String, TierSeen) {
        let identities = vec![IdentityRule::default(); rules];
        let mut tier = GPUTier::new(name, GPUTierSpec { callers, identities, ..GPUTierSpec::default() });
        tier.metadata.generation = Some(second);
        let created = Timestamp::from_second(second).unwrap();
        (name.to_owned(), TierSeen { created, ..TierSeen::try_from(&tier).unwrap() })
    }

    /// Status and reason of both conditions.
    fn told(status: &GPUTierStatus) -> Vec<(&str, &str, &str)> {
        let conditions = status.conditions.iter();
        conditions.map(|found| (found.type_.as_str(), found.status.as_str(), found.reason.as_str())).collect()
    }

    #[test]
    fn a_tier_says_who_is_in_it_and_which_older_one_has_whom_it_is_for() {
        let tiers = BTreeMap::from([
            tier("free", 1, Callers::SignedIn, 1),
            tier("guest", 2, Callers::Guests, 0),
            tier("late", 3, Callers::SignedIn, 2),
            tier("late-guest", 4, Callers::Guests, 0),
        ]);
        let found = Findings {
            tiers: tiers.clone(),
            accounts: BTreeMap::from([("free".to_owned(), 7)]),
            ..Findings::default()
        };
        let now = Timestamp::UNIX_EPOCH;
        let free = status(None, &tiers["free"], &found, now);
        assert_eq!((free.accounts, free.observed_generation), (7, Some(1)));
        assert_eq!(told(&free), [("Accepted", "True", "AsExpected"), ("Conflicted", "False", "AsExpected")]);
        let beaten = [("Accepted", "False", "OverlappingRule"), ("Conflicted", "True", "OverlappingRule")];
        for (name, said) in [
            (
                "late",
                "tier free, which was created first, has an equally specific rule for those of spec.identities[0]",
            ),
            ("late", "so for 2 of its 2 rules"),
            ("late-guest", "tier guest, which was created first, is for callers: Guests too"),
        ] {
            let late = status(None, &tiers[name], &found, now);
            assert_eq!((late.accounts, told(&late)), (0, beaten.to_vec()), "{name}");
            assert!(late.conditions[1].message.contains(said), "{}", late.conditions[1].message);
        }
    }
}
