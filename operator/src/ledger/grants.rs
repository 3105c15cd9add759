//! The GPUQuotaGrants that were shown last, by the account that gets them: when a tier changes, everybody's are looked up.

use std::collections::BTreeMap;

use spaceport_core::ids::AccountName;

use super::seen::GrantSeen;

/// Grants, each once.
#[derive(Default)]
pub struct Grants {
    /// By uid; no account without any.
    by_account: BTreeMap<AccountName, BTreeMap<String, GrantSeen>>,
    /// Whose each is, by uid.
    accounts: BTreeMap<String, AccountName>,
}

impl Grants {
    /// A grant as it is.
    pub fn insert(&mut self, grant: GrantSeen) {
        // Its account cannot be changed; who has the right to may replace the object all the same.
        self.remove(&grant.uid);
        self.accounts.insert(grant.uid.clone(), grant.account.clone());
        self.by_account.entry(grant.account.clone()).or_default().insert(grant.uid.clone(), grant);
    }

    /// It does not exist any more.
    pub fn remove(&mut self, uid: &str) {
        let Some(account) = self.accounts.remove(uid) else { return };
        let Some(grants) = self.by_account.get_mut(&account) else { return };
        grants.remove(uid);
        if grants.is_empty() {
            self.by_account.remove(&account);
        }
    }

    /// Whose it is.
    pub fn account(&self, uid: &str) -> Option<&AccountName> {
        self.accounts.get(uid)
    }

    /// Those of an account, by uid.
    pub fn of(&self, account: &AccountName) -> impl Iterator<Item = &GrantSeen> {
        self.by_account.get(account).into_iter().flat_map(BTreeMap::values)
    }
}

#[cfg(test)]
mod tests {
    use spaceport_core::ids::LedgerTime;

    use super::*;

    fn grant(uid: &str, account: &str) -> GrantSeen {
        let (name, account) = (uid.to_owned(), AccountName::new(account));
        GrantSeen { name, uid: uid.to_owned(), account, ms: 1, expires: LedgerTime(0) }
    }

    #[test]
    fn a_grant_is_of_one_account_until_it_is_gone() {
        let mut grants = Grants::default();
        let of = |grants: &Grants, account: &str| {
            grants.of(&AccountName::new(account)).map(|grant| grant.uid.as_str()).collect::<Vec<_>>().join(" ")
        };
        for (uid, account) in [("2", "bob"), ("1", "bob"), ("3", "ann")] {
            grants.insert(grant(uid, account));
        }
        assert_eq!([of(&grants, "bob"), of(&grants, "ann")], ["1 2", "3"]);
        grants.insert(grant("2", "ann"));
        assert_eq!([of(&grants, "bob"), of(&grants, "ann")], ["1", "2 3"]);
        assert_eq!(grants.account("2"), Some(&AccountName::new("ann")));
        for uid in ["1", "2", "3"] {
            grants.remove(uid);
        }
        assert!(grants.by_account.is_empty() && grants.accounts.is_empty());
    }
}
