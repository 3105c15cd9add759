//! What the ledger's watches show of the objects whose status is written, and of nodes, which a pool's status sums up. It
//! has no watch of its own: a second one would double what every change costs the API server.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kube::core::DeserializeGuard;
use kube::core::object::HasStatus;
use kube::{Resource, ResourceExt as _};
use spaceport_crds::conditions::{ConditionStatus, GPUNodeCondition};
use spaceport_crds::{GPUNode, GPUPoolStatus, GPUQuotaGrantStatus, GPUTierStatus};

/// The objects of a kind by name, as they were shown last. A cheap handle. Bounded by the objects that there are.
pub struct Shown<T> {
    /// A std mutex: it is never held across an await.
    by_name: Arc<Mutex<BTreeMap<String, Arc<T>>>>,
}

/// All of them.
#[derive(Clone, Default)]
pub struct Observed {
    /// GPUTiers.
    pub tiers: Shown<Revision<GPUTierStatus>>,
    /// GPUPools.
    pub pools: Shown<Revision<GPUPoolStatus>>,
    /// GPUQuotaGrants.
    pub grants: Shown<Revision<GPUQuotaGrantStatus>>,
    /// GPUNodes.
    pub nodes: Shown<NodeObserved>,
}

/// One revision of an object, as far as a write of its status depends on it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Revision<S> {
    /// Its name.
    pub name: String,
    /// Which object of that name; the compare of a write.
    pub uid: String,
    /// Which revision of it; the compare of a write.
    pub resource_version: String,
    /// Generation of its spec.
    pub generation: Option<i64>,
    /// Its status; none if none was written yet.
    pub status: Option<S>,
}

/// What the agent of a node reports of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeObserved {
    /// Its name.
    pub name: String,
    /// The pool that it follows.
    pub pool: Option<String>,
    /// Pools that select it and have no say, for `pool` was there before.
    pub other_pools: Vec<String>,
    /// Its cards.
    pub cards: usize,
    /// Slots in use, of all; (0, 0) before the agent has told.
    pub slots: (u32, u32),
    /// Its seats for time-shared pods.
    pub seats: i32,
    /// Why it cannot grant leases, in words; none if it can.
    pub not_ready: Option<String>,
}

// === impl Shown ===

impl<T> Clone for Shown<T> {
    fn clone(&self) -> Self {
        Self { by_name: Arc::clone(&self.by_name) }
    }
}

impl<T> Default for Shown<T> {
    fn default() -> Self {
        Self { by_name: Arc::default() }
    }
}

impl<T> Shown<T> {
    /// An object as it is.
    pub fn put(&self, name: String, object: T) {
        self.lock().insert(name, Arc::new(object));
    }

    /// It does not exist any more, or cannot be used.
    pub fn remove(&self, name: &str) {
        self.lock().remove(name);
    }

    /// All of them, in the order of their names.
    pub fn all(&self) -> Vec<Arc<T>> {
        self.lock().values().cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Arc<T>>> {
        self.by_name.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<S: Clone> Shown<Revision<S>> {
    /// The object as its watch shows it.
    pub fn see(&self, object: &(impl Resource + HasStatus<Status = S>)) {
        let metadata = object.meta();
        let revision = Revision {
            name: object.name_any(),
            uid: object.uid().unwrap_or_default(),
            resource_version: object.resource_version().unwrap_or_default(),
            generation: metadata.generation,
            status: object.status().cloned(),
        };
        self.put(revision.name.clone(), revision);
    }

    /// The same, if it can be read.
    pub fn see_any(&self, object: &DeserializeGuard<impl Resource + HasStatus<Status = S>>) {
        if let Ok(object) = &object.0 {
            self.see(object);
        }
    }
}

// === impl NodeObserved ===

impl From<&GPUNode> for NodeObserved {
    fn from(node: &GPUNode) -> Self {
        let name = node.name_any();
        let Some(status) = &node.status else {
            return Self { name, not_ready: Some("its agent has not reported it yet".to_owned()), ..Self::default() };
        };
        let ready = status.conditions.iter().find(|condition| condition.type_ == GPUNodeCondition::Ready.as_str());
        let not_ready = match ready {
            None => Some("its agent has not said yet whether it is ready".to_owned()),
            Some(ready) if ready.status == ConditionStatus::True.as_str() => None,
            Some(ready) => Some(format!("{}: {}", ready.reason, ready.message)),
        };
        Self {
            name,
            pool: status.pool.clone(),
            other_pools: status.other_pools.clone(),
            cards: status.cards.len(),
            // The agent's own count, as its column shows it: which states count as in use is for the agent to say.
            slots: status.slots.as_deref().and_then(in_use_of_all).unwrap_or_default(),
            seats: status.seats.total,
            not_ready,
        }
    }
}

/// `1/2` as numbers.
fn in_use_of_all(column: &str) -> Option<(u32, u32)> {
    let (in_use, all) = column.split_once('/')?;
    Some((in_use.parse().ok()?, all.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use spaceport_crds::{GPUTier, GPUTierSpec};

    use super::*;

    fn node(status: Value) -> NodeObserved {
        let node = json!({
            "apiVersion": "spaceport.dev/v1alpha1", "kind": "GPUNode",
            "metadata": {"name": "gpu-1"}, "spec": {}, "status": status,
        });
        NodeObserved::from(&serde_json::from_value::<GPUNode>(node).unwrap())
    }

    #[test]
    fn a_node_is_what_its_agent_says() {
        let card = json!({
            "index": 0, "uuid": "GPU-0", "model": "H200", "memoryBytes": 1, "minor": 0, "mode": "Shared", "health": "Healthy",
        });
        let condition = |status: &str, reason: &str, message: &str| {
            json!([{
                "type": "Ready", "status": status, "reason": reason, "message": message,
                "lastTransitionTime": "2026-01-01T00:00:00Z",
            }])
        };
        let ready = node(json!({
            "pool": "default", "otherPools": ["young"], "cards": [card], "slots": "1/2", "seats": {"total": 16, "used": 3},
            "conditions": condition("True", "AsExpected", "1 cards are shared"),
        }));
        let expected = NodeObserved {
            name: "gpu-1".to_owned(),
            pool: Some("default".to_owned()),
            other_pools: vec!["young".to_owned()],
            cards: 1,
            slots: (1, 2),
            seats: 16,
            not_ready: None,
        };
        assert_eq!(ready, expected);
        let sick = node(json!({ "conditions": condition("False", "NvmlHangs", "reboot it") }));
        assert_eq!(sick.not_ready.as_deref(), Some("NvmlHangs: reboot it"));
        assert!(node(json!({})).not_ready.is_some() && node(Value::Null).not_ready.is_some());
    }

    #[test]
    fn a_column_that_is_none_counts_for_nothing() {
        let columns = ["3/8", "0/0", "", "3", "3/", "-1/8", "3/8/9"].map(in_use_of_all);
        assert_eq!(columns, [Some((3, 8)), Some((0, 0)), None, None, None, None, None]);
    }

    #[test]
    fn of_an_object_its_last_revision_is_known() {
        let observed = Observed::default();
        let mut tier = GPUTier::new("free", GPUTierSpec::default());
        for revision in ["1", "2"] {
            tier.metadata.resource_version = Some(revision.to_owned());
            observed.tiers.see(&tier);
        }
        let all = observed.clone().tiers.all();
        assert_eq!((all.len(), all[0].resource_version.as_str(), all[0].status.as_ref()), (1, "2", None));
        observed.tiers.remove("free");
        assert!(observed.tiers.all().is_empty());
    }
}
