//! Who is ready to start, by the worker that could serve the call again (docs/rules.md, L16): so that the requests of the
//! few workers that a node keeps are found without a look at everybody who waits.

use std::collections::{BTreeMap, BTreeSet};

use super::Waiting;
use crate::ids::{Size, WorkerKey};

/// Those of one node who are in its lanes and whose function is known, each function's in the order of the fast lane.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Ready(BTreeMap<(WorkerKey, Size), BTreeSet<(u64, u64)>>);

impl Ready {
    pub(super) fn insert(&mut self, waiting: &Waiting) {
        if let Some(worker) = &waiting.worker {
            let of_worker = self.0.entry((worker.clone(), waiting.demand.size)).or_default();
            of_worker.insert((waiting.turn.key, waiting.place));
        }
    }

    pub(super) fn remove(&mut self, waiting: &Waiting) {
        let Some(worker) = &waiting.worker else { return };
        let of = (worker.clone(), waiting.demand.size);
        let Some(of_worker) = self.0.get_mut(&of) else { return };
        of_worker.remove(&(waiting.turn.key, waiting.place));
        if of_worker.is_empty() {
            self.0.remove(&of);
        }
    }

    /// The place of the one with the smallest key.
    pub(super) fn first(&self, worker: &WorkerKey, size: Size) -> Option<u64> {
        let of_worker = self.0.get(&(worker.clone(), size))?;
        of_worker.first().map(|(_, place)| *place)
    }
}
