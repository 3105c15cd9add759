//! What the broker has learned of how long functions run, for those who show it (requirement A13). Nothing is decided by it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use spaceport_core::queue::{FUNCTIONS_MAX, Learned};

/// By uid of the Space. A cheap handle.
#[derive(Clone, Default)]
pub struct Durations {
    /// A std mutex: it is never held across an await.
    by_space: Arc<Mutex<HashMap<String, Vec<Learned>>>>,
}

impl Durations {
    /// What is known of a Space's functions now. Of more Spaces than functions are remembered nothing is kept.
    pub fn put(&self, space_uid: &str, learned: Vec<Learned>) {
        let mut by_space = self.lock();
        if !learned.is_empty() && (by_space.len() < FUNCTIONS_MAX || by_space.contains_key(space_uid)) {
            by_space.insert(space_uid.to_owned(), learned);
        }
    }

    /// The same, to be shown; none if this term knows too little yet.
    pub fn get(&self, space_uid: &str) -> Option<Vec<Learned>> {
        self.lock().get(space_uid).cloned()
    }

    /// Only these Spaces are left.
    pub fn keep(&self, is_left: impl Fn(&str) -> bool) {
        self.lock().retain(|space_uid, _| is_left(space_uid));
    }

    /// The term is over. What another leader learns meanwhile is newer.
    pub fn forget_term(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Vec<Learned>>> {
        self.by_space.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
