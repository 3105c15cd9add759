//! The status of a GPUQuotaGrant. Pure.

use jiff::Timestamp;
use spaceport_core::page::GRANTS_MAX;
use spaceport_crds::GPUQuotaGrantStatus;
use spaceport_crds::conditions::{ConditionStatus, GPUQuotaGrantCondition, GPUQuotaGrantReason as Reason, condition};

use super::with;
use crate::fault::{self, Fault};
use crate::ledger::display::{seconds, time};
use crate::ledger::findings::{GrantFate, GrantFound};

/// What the grant shows at `now`, where it has shown `shown` so far. Only a settled lease changes its amounts (L21); that
/// its time is over is written once.
pub fn status(
    shown: Option<&GPUQuotaGrantStatus>,
    generation: Option<i64>,
    found: &GrantFound,
    now: Timestamp,
) -> GPUQuotaGrantStatus {
    let used_ms = if fault::is(Fault::GrantsLookUnused) { 0 } else { used_ms(shown, found) };
    let (reason, message) = applied(found);
    let holds = match reason {
        Reason::OnPage | Reason::UsedUp => ConditionStatus::True,
        Reason::AccountMissing | Reason::TierNotExtendable | Reason::PageFull | Reason::Expired => {
            ConditionStatus::False
        }
    };
    let kind = GPUQuotaGrantCondition::Applied.as_str();
    let applied = condition(kind, holds, reason.as_str(), message, generation, now);
    GPUQuotaGrantStatus {
        observed_generation: generation,
        used_milliseconds: i64::try_from(used_ms).unwrap_or(i64::MAX),
        used: Some(seconds(used_ms)),
        conditions: with(shown.map(|shown| &shown.conditions[..]).unwrap_or_default(), [applied]),
    }
}

/// A row leaves its page when the grant has expired, and the page goes with its account: what it had paid by then stays
/// shown. While the grant can have a row and has none, it has paid nothing.
fn used_ms(shown: Option<&GPUQuotaGrantStatus>, found: &GrantFound) -> u64 {
    let kept = || shown.map_or(0, |shown| u64::try_from(shown.used_milliseconds).unwrap_or(0));
    match (found.used_ms, &found.fate) {
        (Some(used_ms), _) => used_ms,
        (None, GrantFate::Expired | GrantFate::NoAccount) => kept(),
        (None, _) => 0,
    }
}

fn applied(found: &GrantFound) -> (Reason, String) {
    let GrantFound { account, ms, expires, used_ms, fate } = found;
    let end = time(*expires).map_or_else(|| "its end".to_owned(), |end| end.0.to_string());
    match fate {
        GrantFate::InForce => {
            let row =
                if used_ms.is_some() { "" } else { ", and comes onto its page with the first hold that takes from it" };
            (Reason::OnPage, format!("it counts for account {account} until {end}{row}"))
        }
        GrantFate::UsedUp => (Reason::UsedUp, format!("all of its {} are charged to account {account}", seconds(*ms))),
        GrantFate::Expired => {
            (Reason::Expired, format!("it ended at {end}; what account {account} had not used is gone"))
        }
        GrantFate::NoAccount => {
            (Reason::AccountMissing, format!("there is no GPUAccount {account}; it counts from when there is one"))
        }
        GrantFate::NoTier => {
            let message = format!("no GPUTier applies to account {account}; see the condition Ready of the account");
            (Reason::TierNotExtendable, message)
        }
        GrantFate::NotExtendable { tier } => {
            let message = format!(
                "tier {tier} of account {account} takes no grants; set its extendableByGrants to Always, or give the \
                 account another tier"
            );
            (Reason::TierNotExtendable, message)
        }
        GrantFate::PageFull => {
            let message = format!(
                "the page of account {account} holds {GRANTS_MAX} grants, those that expire first; it counts when one of \
                 them has expired or is deleted"
            );
            (Reason::PageFull, message)
        }
    }
}

#[cfg(test)]
mod tests {
    use spaceport_core::ids::{AccountName, LedgerTime};

    use super::*;

    fn found(fate: GrantFate, used_ms: Option<u64>) -> GrantFound {
        let expires = LedgerTime(1_800_000_000_000);
        GrantFound { account: AccountName::new("bob"), ms: 60_000, expires, used_ms, fate }
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn a_grant_says_what_became_of_it() {
        let not_extendable = || GrantFate::NotExtendable { tier: "free".to_owned() };
        let table = [
            (found(GrantFate::InForce, Some(4_500)), "4.5s", "True", "OnPage", "until 2027-01-15T08:00:00Z"),
            (found(GrantFate::InForce, None), "0s", "True", "OnPage", "with the first hold"),
            (found(GrantFate::UsedUp, Some(60_000)), "60s", "True", "UsedUp", "all of its 60s"),
            (found(GrantFate::Expired, Some(7)), "0.007s", "False", "Expired", "ended at 2027-01-15T08:00:00Z"),
            (found(GrantFate::NoAccount, None), "0s", "False", "AccountMissing", "no GPUAccount bob"),
            (found(GrantFate::NoTier, None), "0s", "False", "TierNotExtendable", "no GPUTier"),
            (found(not_extendable(), Some(1_000)), "1s", "False", "TierNotExtendable", "tier free"),
            (found(GrantFate::PageFull, None), "0s", "False", "PageFull", "32 grants"),
        ];
        for (found, used, holds, reason, said) in table {
            let status = status(None, Some(1), &found, at(5));
            let [applied] = &status.conditions[..] else { panic!("{status:?}") };
            assert_eq!((status.used.as_deref(), status.observed_generation), (Some(used), Some(1)), "{found:?}");
            assert_eq!(
                (applied.type_.as_str(), applied.status.as_str(), applied.reason.as_str()),
                ("Applied", holds, reason)
            );
            assert!(applied.message.contains(said), "{}", applied.message);
        }
    }

    #[test]
    fn what_was_paid_stays_shown_when_the_row_is_gone_and_time_moves_with_the_status_only() {
        let paid = status(None, Some(1), &found(GrantFate::InForce, Some(4_500)), at(5));
        assert_eq!(status(Some(&paid), Some(1), &found(GrantFate::InForce, Some(4_500)), at(6)), paid);
        let over = status(Some(&paid), Some(1), &found(GrantFate::Expired, None), at(7));
        assert_eq!((over.used_milliseconds, over.used.as_deref()), (4_500, Some("4.5s")));
        assert_eq!(
            (paid.conditions[0].last_transition_time.0, over.conditions[0].last_transition_time.0),
            (at(5), at(7))
        );
        let gone = status(Some(&over), Some(1), &found(GrantFate::NoAccount, None), at(8));
        assert_eq!((gone.used_milliseconds, gone.conditions[0].last_transition_time.0), (4_500, at(7)));
        // Another account of that name has another page.
        assert_eq!(status(Some(&gone), Some(1), &found(GrantFate::InForce, None), at(9)).used_milliseconds, 0);
    }
}
