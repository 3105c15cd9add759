//! What the broker has learned of how long functions run, for those who show it (requirement A13). Nothing is decided by it.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use spaceport_core::ids::{Revision, Size};
use spaceport_core::queue::{FUNCTIONS_MAX, Learned};

/// Functions of one Space that are kept: several times what its status shows.
const OF_SPACE_MAX: usize = 64;

/// By what a function is known by within its Space: revision, size, and declared milliseconds.
type Functions = BTreeMap<(Revision, Size, u64), Learned>;

/// By uid of the Space. A cheap handle.
#[derive(Clone, Default)]
pub struct Durations {
    /// A std mutex: it is never held across an await.
    by_space: Arc<Mutex<HashMap<String, Functions>>>,
}

impl Durations {
    /// What is known of a function of a Space now. Of more Spaces than functions are remembered nothing is kept. Of a Space
    /// with very many functions those of this revision stay, as many as are kept.
    pub fn put(&self, space_uid: &str, learned: Learned) {
        let mut by_space = self.lock();
        if !by_space.contains_key(space_uid) && by_space.len() < FUNCTIONS_MAX {
            by_space.insert(space_uid.to_owned(), Functions::new());
        }
        let Some(known) = by_space.get_mut(space_uid) else { return };
        let function = (learned.revision, learned.size, learned.declared_ms);
        if known.len() >= OF_SPACE_MAX && !known.contains_key(&function) {
            known.retain(|(revision, ..), _| *revision == learned.revision);
        }
        if known.len() < OF_SPACE_MAX || known.contains_key(&function) {
            known.insert(function, learned);
        }
    }

    /// All that is known of a Space, to be shown, by revision, size and declared duration; none if this term knows too
    /// little yet.
    pub fn get(&self, space_uid: &str) -> Option<Vec<Learned>> {
        self.lock().get(space_uid).map(|known| known.values().copied().collect())
    }

    /// Only these Spaces are left.
    pub fn keep(&self, is_left: impl Fn(&str) -> bool) {
        self.lock().retain(|space_uid, _| is_left(space_uid));
    }

    /// The term is over. What another leader learns meanwhile is newer.
    pub fn forget_term(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Functions>> {
        self.by_space.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn learned(revision: u64, declared_ms: u64, calls: usize) -> Learned {
        Learned {
            revision: Revision(revision),
            size: Size::Large,
            declared_ms,
            calls,
            p50_ms: 1,
            p95_ms: 1,
            max_ms: 1,
            suggested_ms: None,
        }
    }

    #[test]
    fn what_is_learned_of_one_function_leaves_what_is_known_of_the_others() {
        let durations = Durations::default();
        for learned in [learned(2, 10, 5), learned(1, 20, 5), learned(2, 10, 6), learned(1, 10, 9)] {
            durations.put("u", learned);
        }
        assert_eq!(durations.get("u").unwrap(), [learned(1, 10, 9), learned(1, 20, 5), learned(2, 10, 6)]);
        assert_eq!(durations.get("v"), None);
    }

    #[test]
    fn of_a_space_with_very_many_functions_some_are_kept_first_of_all_the_newest_version() {
        let durations = Durations::default();
        durations.put("u", learned(1, 1, 5));
        (1..=500).for_each(|declared_ms| durations.put("u", learned(2, declared_ms, 5)));
        durations.put("u", learned(2, 1, 6));
        let kept = durations.get("u").unwrap();
        assert_eq!((kept.len(), kept[0]), (OF_SPACE_MAX, learned(2, 1, 6)));
        durations.put("u", learned(3, 1, 5));
        assert_eq!(durations.get("u").unwrap(), [learned(3, 1, 5)]);
    }
}
