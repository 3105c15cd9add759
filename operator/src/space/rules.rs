//! Tiers and pools as the Space controller sees them: what declared durations are judged by (requirement A14).
//!
//! Their statuses change with every account and card. Only what is parsed from their specs counts as a change here, so that
//! not every Space is looked at each time.

use std::collections::BTreeMap;

use kube::core::DeserializeGuard;
use kube::runtime::watcher::Event;
use kube::{Resource, ResourceExt as _};
use spaceport_crds::{GPUPool, GPUTier};

use crate::ledger::seen::{PoolSeen, TierSeen};

/// Objects of the cluster by their names.
type ByName<T> = BTreeMap<String, T>;

/// All objects of a kind that can be used, by name.
#[derive(Debug)]
pub struct Listed<T> {
    /// None until the first list is complete: judged by half of the tiers, a duration could seem legal.
    all: Option<ByName<T>>,
    /// The list that is being read.
    next: ByName<T>,
}

/// What is known at the moment.
#[derive(Debug, Default)]
pub struct Rules {
    tiers: Listed<TierSeen>,
    pools: Listed<PoolSeen>,
}

impl<T> Default for Listed<T> {
    fn default() -> Self {
        Self { all: None, next: BTreeMap::new() }
    }
}

impl<T: PartialEq> Listed<T> {
    /// Takes an event of the watch; true if something changed. What cannot be parsed is left out: the broker, which does not
    /// use it either, says so.
    fn take<K>(&mut self, event: Event<DeserializeGuard<K>>) -> bool
    where
        K: Resource,
        T: for<'a> TryFrom<&'a K>,
    {
        match event {
            Event::Init => {
                self.next.clear();
                false
            }
            Event::InitApply(object) => {
                self.next.extend(parsed(&object));
                false
            }
            Event::InitDone => {
                let next = Some(std::mem::take(&mut self.next));
                let changed = self.all != next;
                self.all = next;
                changed
            }
            Event::Apply(object) => {
                let Some(all) = &mut self.all else { return false };
                match parsed(&object) {
                    Some((name, value)) => {
                        let changed = all.get(&name) != Some(&value);
                        all.insert(name, value);
                        changed
                    }
                    None => all.remove(&object.name_any()).is_some(),
                }
            }
            Event::Delete(object) => self.all.as_mut().is_some_and(|all| all.remove(&object.name_any()).is_some()),
        }
    }
}

fn parsed<K, T>(object: &DeserializeGuard<K>) -> Option<(String, T)>
where
    K: Resource,
    T: for<'a> TryFrom<&'a K>,
{
    let value = T::try_from(object.0.as_ref().ok()?).ok()?;
    Some((object.name_any(), value))
}

impl Rules {
    /// An event of the watch of tiers; true if something changed.
    pub fn take_tier(&mut self, event: Event<DeserializeGuard<GPUTier>>) -> bool {
        self.tiers.take(event)
    }

    /// An event of the watch of pools; true if something changed.
    pub fn take_pool(&mut self, event: Event<DeserializeGuard<GPUPool>>) -> bool {
        self.pools.take(event)
    }

    /// Tiers and pools by name, once both are known.
    pub fn listed(&self) -> Option<(&ByName<TierSeen>, &ByName<PoolSeen>)> {
        self.tiers.all.as_ref().zip(self.pools.all.as_ref())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn tier(name: &str, longest: i64, accounts: i32) -> DeserializeGuard<GPUTier> {
        let tier: Value = json!({
            "apiVersion": "spaceport.dev/v1alpha1",
            "kind": "GPUTier",
            "metadata": { "name": name },
            "spec": { "gpuSecondsPerWindow": 600, "longestCallSeconds": longest, "concurrentLeases": 1 },
            "status": { "accounts": accounts },
        });
        serde_json::from_value(tier).unwrap()
    }

    #[test]
    fn nothing_is_known_before_both_lists_are_complete() {
        let mut rules = Rules::default();
        rules.take_tier(Event::Init);
        assert!(!rules.take_tier(Event::InitApply(tier("free", 120, 0))));
        assert!(rules.take_pool(Event::InitDone));
        assert!(rules.listed().is_none(), "half of the tiers are no tiers");
        assert!(rules.take_tier(Event::InitDone));
        let (tiers, pools) = rules.listed().unwrap();
        assert_eq!((tiers.len(), pools.len()), (1, 0));
    }

    #[test]
    fn only_a_change_of_what_is_decided_from_is_a_change() {
        let mut rules = Rules::default();
        rules.take_tier(Event::InitDone);
        assert!(rules.take_tier(Event::Apply(tier("free", 120, 0))));
        assert!(!rules.take_tier(Event::Apply(tier("free", 120, 7))), "accounts come and go");
        assert!(rules.take_tier(Event::Apply(tier("free", 60, 7))));
        assert!(!rules.take_tier(Event::Init));
        assert!(!rules.take_tier(Event::InitApply(tier("free", 60, 8))));
        assert!(!rules.take_tier(Event::InitDone), "a watch that began anew");
        assert!(rules.take_tier(Event::Apply(tier("free", -1, 8))), "one that cannot be used is as good as gone");
        assert!(!rules.take_tier(Event::Delete(tier("free", 60, 8))));
    }
}
