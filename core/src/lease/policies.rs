//! One copy of what the accounts of a tier may do, instead of one for each account.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use super::command::Policy;

/// For each tier the policy that was seen last: an account with the same one shares it. As many entries as there were tiers
/// in the term, which people create one by one.
#[derive(Clone, Default)]
pub(super) struct Policies(BTreeMap<String, Arc<Policy>>);

impl Policies {
    /// The shared copy of a policy.
    pub fn share(&mut self, policy: &Policy) -> Arc<Policy> {
        if let Some(known) = self.0.get(&policy.tier).filter(|known| ***known == *policy) {
            return Arc::clone(known);
        }
        let shared = Arc::new(policy.clone());
        // What is one account's own is worth nothing to the others.
        if policy.allowance.grants.is_empty() && !policy.deleting && policy.conflict.is_none() {
            self.0.insert(policy.tier.clone(), Arc::clone(&shared));
        }
        shared
    }
}

/// What is shared changes no decision: two states that differ in nothing else do the same.
impl PartialEq for Policies {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Policies {}

/// Without its entries, for the same reason.
impl fmt::Debug for Policies {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Policies")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::LedgerTime;
    use crate::protocol::CallerClass;
    use crate::queue::Priority;
    use crate::quota::{Allowance, Grant};

    fn policy(base_ms: u64, grants: Vec<Grant>) -> Policy {
        Policy {
            tier: "free".to_owned(),
            allowance: Allowance {
                base_ms,
                per_cookie_ms: None,
                longest_call_ms: 1,
                runs_per_window: None,
                generation: 1,
                grants,
            },
            concurrent: 1,
            priority: Priority::Medium,
            caller: CallerClass::Regular,
            deleting: false,
            conflict: None,
        }
    }

    #[test]
    fn accounts_of_a_tier_share_its_newest_policy_and_others_have_their_own() {
        let mut policies = Policies::default();
        let (old, new) = (policy(1, Vec::new()), policy(2, Vec::new()));
        let first = policies.share(&old);
        assert!(Arc::ptr_eq(&first, &policies.share(&old)));
        let own = policy(1, vec![Grant { uid: "g".to_owned(), ms: 1, expires: LedgerTime(1) }]);
        assert_eq!(*policies.share(&own), own);
        assert!(Arc::ptr_eq(&first, &policies.share(&old)), "an account's own grants change nothing for the others");
        let changed = policies.share(&new);
        assert_eq!(*changed, new);
        assert!(Arc::ptr_eq(&changed, &policies.share(&new)));
    }
}
