//! Which account has which grants. Pure. A new term looks up those of every account: by account, that is one look each.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use spaceport_core::ids::AccountName;

use super::seen::GrantSeen;

/// Grants by uid, and the uids of each account's.
#[derive(Debug, Default)]
pub struct Grants {
    by_uid: HashMap<String, GrantSeen>,
    of_account: BTreeMap<AccountName, BTreeSet<String>>,
}

impl Grants {
    /// A grant as it is.
    pub fn insert(&mut self, grant: GrantSeen) {
        self.remove(&grant.uid);
        self.of_account.entry(grant.account.clone()).or_default().insert(grant.uid.clone());
        self.by_uid.insert(grant.uid.clone(), grant);
    }

    /// It does not exist any more.
    pub fn remove(&mut self, uid: &str) {
        let Some(grant) = self.by_uid.remove(uid) else { return };
        if let Some(uids) = self.of_account.get_mut(&grant.account) {
            uids.remove(uid);
            if uids.is_empty() {
                self.of_account.remove(&grant.account);
            }
        }
    }

    /// The grant with this uid.
    pub fn get(&self, uid: &str) -> Option<&GrantSeen> {
        self.by_uid.get(uid)
    }

    /// Those of an account, in the order of their uids.
    pub fn of(&self, account: &AccountName) -> Vec<&GrantSeen> {
        let uids = self.of_account.get(account).into_iter().flatten();
        uids.filter_map(|uid| self.by_uid.get(uid)).collect()
    }

    /// Those of every account that is named by any, whether it exists or not.
    pub fn by_account(&self) -> impl Iterator<Item = (&AccountName, Vec<&GrantSeen>)> {
        self.of_account.keys().map(|account| (account, self.of(account)))
    }
}

#[cfg(test)]
mod tests {
    use spaceport_core::ids::LedgerTime;

    use super::*;

    fn grant(uid: &str, account: &str, ms: u64) -> GrantSeen {
        let name = format!("grant-{uid}");
        GrantSeen { name, uid: uid.to_owned(), account: AccountName::new(account), ms, expires: LedgerTime(1) }
    }

    #[test]
    fn an_account_has_its_grants_as_they_were_shown_last() {
        let mut grants = Grants::default();
        for seen in [grant("b", "bob", 1), grant("a", "bob", 2), grant("c", "eve", 3), grant("b", "bob", 4)] {
            grants.insert(seen);
        }
        let of = |grants: &Grants, account| -> Vec<u64> {
            grants.of(&AccountName::new(account)).iter().map(|grant| grant.ms).collect()
        };
        assert_eq!((of(&grants, "bob"), of(&grants, "eve"), of(&grants, "zoe")), (vec![2, 4], vec![3], vec![]));
        grants.insert(grant("b", "eve", 5));
        assert_eq!((of(&grants, "bob"), of(&grants, "eve")), (vec![2], vec![5, 3]));
        let counted: Vec<(&str, usize)> =
            grants.by_account().map(|(account, grants)| (account.as_str(), grants.len())).collect();
        assert_eq!(counted, [("bob", 1), ("eve", 2)]);
        assert_eq!(grants.get("b").map(|grant| grant.account.as_str()), Some("eve"));
        for uid in ["a", "b", "c", "c"] {
            grants.remove(uid);
        }
        assert!(grants.by_uid.is_empty() && grants.of_account.is_empty());
    }
}
