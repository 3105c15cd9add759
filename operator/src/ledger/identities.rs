//! Which accounts have which identity (L4): each belongs to one, the oldest. Pure.

use std::collections::{BTreeSet, HashMap};

use jiff::Timestamp;
use spaceport_core::ids::AccountName;
use spaceport_crds::Identity;

use super::seen::AccountSeen;

/// Accounts by identity, oldest first.
#[derive(Debug, Default)]
pub struct Identities {
    holders: HashMap<Identity, BTreeSet<(Timestamp, AccountName)>>,
}

impl Identities {
    /// An account has these identities.
    pub fn insert(&mut self, account: &AccountSeen) {
        for identity in &account.identities {
            self.holders.entry(identity.clone()).or_default().insert((account.created, account.name.clone()));
        }
    }

    /// It has them no longer.
    pub fn remove(&mut self, account: &AccountSeen) {
        for identity in &account.identities {
            let Some(holders) = self.holders.get_mut(identity) else { continue };
            holders.remove(&(account.created, account.name.clone()));
            if holders.is_empty() {
                self.holders.remove(identity);
            }
        }
    }

    /// The older account that one of its identities belongs to, if there is one; of accounts that were made in the same second
    /// the first by name.
    pub fn conflict(&self, account: &AccountSeen) -> Option<AccountName> {
        let oldest = account.identities.iter().filter_map(|identity| self.holders.get(identity)?.first());
        oldest.map(|(_, name)| name).find(|name| **name != account.name).cloned()
    }

    /// Every other account that has one of its identities as well.
    pub fn sharing(&self, account: &AccountSeen) -> BTreeSet<AccountName> {
        let holders = account.identities.iter().filter_map(|identity| self.holders.get(identity)).flatten();
        holders.map(|(_, name)| name).filter(|name| **name != account.name).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn account(name: &str, created: &str, subjects: &[&str]) -> AccountSeen {
        let identities: Vec<_> = subjects.iter().map(|subject| json!({"issuer": "i", "subject": subject})).collect();
        let account = json!({
            "apiVersion": "spaceport.dev/v1alpha1", "kind": "GPUAccount",
            "metadata": {"name": name, "uid": name, "creationTimestamp": created},
            "spec": {"identities": identities}
        });
        AccountSeen::of(&serde_json::from_value(account).unwrap())
    }

    #[test]
    fn an_identity_belongs_to_the_oldest_account_that_has_it() {
        let old = account("zoe", "2026-11-21T12:00:00Z", &["bob"]);
        let young = account("bob", "2026-11-21T12:00:01Z", &["eve", "bob"]);
        let other = account("eve", "2026-11-21T12:00:02Z", &["Bob"]);
        let mut identities = Identities::default();
        for account in [&young, &old, &other] {
            identities.insert(account);
        }
        assert_eq!(identities.conflict(&young), Some(old.name.clone()));
        assert_eq!(identities.conflict(&old), None);
        assert_eq!(identities.conflict(&other), None, "matched exactly");
        assert_eq!(identities.sharing(&old).into_iter().collect::<Vec<_>>(), std::slice::from_ref(&young.name));
        identities.remove(&old);
        assert_eq!(identities.conflict(&young), None, "the older account is gone");
        identities.remove(&young);
        identities.remove(&other);
        assert!(identities.holders.is_empty());
    }
}
