//! What this node is for: the pool it belongs to and what an admin took out of service (N3, N4). Watched here,
//! derived by a pure function, published for whoever needs it.

use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};

use futures::StreamExt as _;
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::ResourceExt as _;
use kube::runtime::{WatchStreamExt as _, watcher};
use spaceport_crds::{CardSelection, Cordon, CordonScope, GPUNode, GPUPool, LargeShare, SlicingMode};
use spaceport_shell::error_chain;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// What the node's cards are for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Policy {
    /// The pool that has this node, and what it says; `None`: nothing is granted.
    pub pool: Option<PoolPolicy>,
    /// Names of the other pools that select the node, oldest first. They count for nothing here.
    pub other_pools: Vec<String>,
    /// What an admin took out of service.
    pub cordon: Option<Cordon>,
    /// Generation of the GPUNode's spec that the cordon is of.
    pub generation: Option<i64>,
}

/// The parts of a pool that an agent follows; limits in time come with each order.
#[derive(Clone, Debug, PartialEq)]
pub struct PoolPolicy {
    /// Its name.
    pub name: String,
    /// How cards are cut.
    pub mode: SlicingMode,
    /// What `large` means.
    pub large: LargeShare,
    /// Which cards.
    pub cards: CardSelection,
    /// Seats for time-shared pods.
    pub seats: u32,
    /// Memory a `large` must have.
    pub min_memory: Option<Quantity>,
}

impl Policy {
    /// An admin wants nothing new on this card.
    pub fn is_cordoned(&self, card: u32) -> bool {
        self.cordon.as_ref().is_some_and(|cordon| match cordon.scope {
            CordonScope::Node => true,
            CordonScope::Cards => cordon.cards.iter().any(|index| u32::try_from(*index) == Ok(card)),
        })
    }
}

/// The policy of a node with these labels. Of overlapping pools the oldest wins (docs/rules.md).
pub fn derive(pools: &[GPUPool], labels: &BTreeMap<String, String>, node: Option<&GPUNode>) -> Policy {
    let selects = |pool: &&GPUPool| pool.spec.node_selector.iter().all(|(key, value)| labels.get(key) == Some(value));
    let mut selecting: Vec<&GPUPool> = pools.iter().filter(selects).collect();
    selecting.sort_by_key(|pool| {
        // An object without a time was not read from an API server; it counts as the youngest.
        (pool.metadata.creation_timestamp.is_none(), pool.metadata.creation_timestamp.clone(), pool.name_any())
    });
    let mut selecting = selecting.into_iter();
    let oldest = selecting.next();
    Policy {
        other_pools: selecting.map(|pool| pool.name_any()).collect(),
        pool: oldest.map(|pool| PoolPolicy {
            name: pool.name_any(),
            mode: pool.spec.mode,
            large: pool.spec.sizes.large,
            cards: pool.spec.cards.clone(),
            seats: u32::try_from(pool.spec.seats_per_node).unwrap_or(0),
            min_memory: pool.spec.sizes.min_memory.clone(),
        }),
        cordon: node.and_then(|node| node.spec.cordon.clone()),
        generation: node.and_then(|node| node.metadata.generation),
    }
}

#[derive(Default)]
struct Objects {
    pools: Vec<GPUPool>,
    labels: Option<BTreeMap<String, String>>,
    node: Option<GPUNode>,
    listed: [bool; 3],
}

/// Follows pools, the Node and the GPUNode until `stop`. Nothing is published before all three were read once.
pub async fn run(client: kube::Client, node: &str, publish: watch::Sender<Policy>, stop: CancellationToken) {
    // A std mutex: never held across an await.
    let objects = Arc::new(Mutex::new(Objects::default()));
    let update = |change: &dyn Fn(&mut Objects)| {
        let mut objects = objects.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut objects);
        if let Objects { listed: [true, true, true], pools, labels: Some(labels), node } = &*objects {
            let policy = derive(pools, labels, node.as_ref());
            publish.send_if_modified(|old| std::mem::replace(old, policy.clone()) != policy);
        }
    };
    let own = watcher::Config::default().fields(&format!("metadata.name={node}"));
    let pools = follow(kube::Api::<GPUPool>::all(client.clone()), watcher::Config::default(), |pools: Vec<GPUPool>| {
        update(&|objects| {
            objects.pools.clone_from(&pools);
            objects.listed[0] = true;
        });
    });
    let nodes = follow(kube::Api::<Node>::all(client.clone()), own.clone(), |nodes: Vec<Node>| {
        update(&|objects| {
            objects.labels = nodes.first().map(|node| node.metadata.labels.clone().unwrap_or_default());
            objects.listed[1] = true;
        });
    });
    let gpu_nodes = follow(kube::Api::<GPUNode>::all(client), own, |nodes: Vec<GPUNode>| {
        update(&|objects| {
            objects.node = nodes.first().cloned();
            objects.listed[2] = true;
        });
    });
    tokio::select! {
        () = stop.cancelled() => {}
        _ = async { tokio::join!(pools, nodes, gpu_nodes) } => {}
    }
}

/// Calls `changed` with all objects after each change, from the first complete list on.
async fn follow<K>(api: kube::Api<K>, config: watcher::Config, changed: impl Fn(Vec<K>))
where
    K: kube::Resource + Clone + std::fmt::Debug + serde::de::DeserializeOwned + Send + 'static,
{
    let mut events = pin!(watcher(api, config).default_backoff());
    let mut known: BTreeMap<String, K> = BTreeMap::new();
    let mut listing = true;
    while let Some(event) = events.next().await {
        match event {
            Ok(watcher::Event::Init) => {
                listing = true;
                known.clear();
            }
            Ok(watcher::Event::Apply(object) | watcher::Event::InitApply(object)) => {
                known.insert(object.name_any(), object);
            }
            Ok(watcher::Event::Delete(object)) => {
                known.remove(&object.name_any());
            }
            Ok(watcher::Event::InitDone) => listing = false,
            Err(error) => {
                tracing::warn!(error = %error_chain(&error), kind = std::any::type_name::<K>(), "Objects cannot be watched");
                continue;
            }
        }
        if !listing {
            changed(known.values().cloned().collect());
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pool(name: &str, created: &str, selector: serde_json::Value) -> GPUPool {
        serde_json::from_value(json!({
            "apiVersion": "spaceport.dev/v1alpha1",
            "kind": "GPUPool",
            "metadata": {"name": name, "creationTimestamp": created},
            "spec": {"mode": "Shared", "nodeSelector": selector},
        }))
        .unwrap()
    }

    #[test]
    fn of_the_pools_that_select_the_node_the_oldest_has_it() {
        let labels = BTreeMap::from([("gpu".to_owned(), "h200".to_owned())]);
        let pools = [
            pool("young", "2026-02-01T00:00:00Z", json!({})),
            pool("old", "2026-01-01T00:00:00Z", json!({"gpu": "h200"})),
            pool("oldest-but-elsewhere", "2025-01-01T00:00:00Z", json!({"gpu": "l40s"})),
        ];
        let found = |pools: &[GPUPool], labels: &BTreeMap<String, String>| {
            let Policy { pool, other_pools, .. } = derive(pools, labels, None);
            (pool.map(|pool| pool.name), other_pools)
        };
        assert_eq!(found(&pools, &labels), (Some("old".to_owned()), vec!["young".to_owned()]));
        assert_eq!(found(&pools, &BTreeMap::new()), (Some("young".to_owned()), Vec::new()));
        assert_eq!(found(&[], &labels), (None, Vec::new()));
    }

    #[test]
    fn a_cordon_covers_the_node_or_the_cards_it_lists() {
        let of = |scope, cards: Vec<i32>| Policy {
            cordon: Some(Cordon { scope, cards, reason: None }),
            ..Policy::default()
        };
        assert!(of(CordonScope::Node, Vec::new()).is_cordoned(3));
        let listed = of(CordonScope::Cards, vec![1]);
        assert!(listed.is_cordoned(1) && !listed.is_cordoned(0));
        assert!(!Policy::default().is_cordoned(0));
    }
}
