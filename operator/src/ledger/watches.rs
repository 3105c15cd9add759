//! The broker's watches: accounts, tiers, pools, nodes and grants as parsed values on its bounded input, and how far our clock
//! is from the API server's.
//!
//! A list (at the start, and again after a watch was too far behind) is delivered as a whole when it is complete: first
//! what is gone, then everything that is there, the term page last. So when the broker sees its own term, every page
//! written before it is already in its hands (L6).

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use futures::StreamExt as _;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::core::DeserializeGuard;
use kube::runtime::watcher::{self, Event};
use kube::{Resource, ResourceExt as _};
use serde::de::DeserializeOwned;
use spaceport_core::ids::{AccountName, NodeName};
use spaceport_crds::names::TERM_PAGE;
use spaceport_crds::{
    GPUAccount, GPUNode, GPUPool, GPUPoolStatus, GPUQuotaGrant, GPUQuotaGrantStatus, GPUTier, GPUTierStatus, Space,
};
use spaceport_shell::error_chain;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::retention::Retention;
use super::seen::{AccountSeen, GrantSeen, NodeSeen, PoolSeen, SpaceSeen, TermSeen, TierSeen};
use super::store::PageStore;
use crate::account::WorkQueue;
use crate::clock::ClockDifference;
use crate::kubeapi::{KubeApi, Objects, pause};
use crate::metrics::Metrics;
use crate::status::observe::{NodeObserved, Observed, Revision, Shown};

/// Time between two looks at the API server's clock; clocks that drift apart by seconds a minute are broken anyway.
const CLOCK_PERIOD: Duration = Duration::from_secs(30);
/// The same after a look that failed.
const CLOCK_RETRY: Duration = Duration::from_secs(2);

/// A watched kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Watched {
    /// GPUAccount.
    Accounts,
    /// GPUTier.
    Tiers,
    /// GPUPool.
    Pools,
    /// GPUNode.
    Nodes,
    /// GPUQuotaGrant.
    Grants,
    /// Space.
    Spaces,
}

impl Watched {
    /// All of them: the broker decides nothing before each was listed once.
    pub const ALL: [Self; 6] = [Self::Accounts, Self::Tiers, Self::Pools, Self::Nodes, Self::Grants, Self::Spaces];
}

/// What the watches tell the broker. Objects that cannot be used count as gone, but for accounts, which are there and
/// closed.
#[derive(Clone, Debug, PartialEq)]
pub enum StoreEvent {
    /// An account as it is.
    Account(Box<AccountSeen>),
    /// An account does not exist any more.
    AccountGone {
        /// Its name.
        name: AccountName,
        /// Which object of that name.
        uid: String,
    },
    /// The term page; never delivered as an account.
    Term(TermSeen),
    /// A tier as it is.
    Tier(Box<TierSeen>),
    /// A tier does not exist any more.
    TierGone {
        /// Its name.
        name: String,
    },
    /// A pool as it is.
    Pool(Box<PoolSeen>),
    /// A pool does not exist any more.
    PoolGone {
        /// Its name.
        name: String,
    },
    /// A GPUNode as it is.
    Node(NodeSeen),
    /// A GPUNode does not exist any more.
    NodeGone {
        /// Its name.
        name: NodeName,
    },
    /// A grant as it is.
    Grant(GrantSeen),
    /// A grant does not exist any more.
    GrantGone {
        /// Its uid.
        uid: String,
    },
    /// A Space as it is.
    Space(SpaceSeen),
    /// A Space does not exist any more.
    SpaceGone {
        /// Its uid.
        uid: String,
    },
    /// Everything of this kind that was there at the beginning, or after a gap, has been delivered.
    Listed(Watched),
    /// How far our clock is from the API server's (L20).
    Clock(ClockDifference),
}

/// How a watched kind becomes events.
trait Translate {
    type Object: Resource<DynamicType = ()> + Clone + std::fmt::Debug + DeserializeOwned + Send + 'static;
    const WATCHED: Watched;

    /// The object as an event.
    fn present(&self, object: DeserializeGuard<Self::Object>) -> StoreEvent;

    /// The end of an object as an event.
    fn gone(&self, name: &str, uid: &str) -> StoreEvent;

    /// True for what is delivered after everything else of a list.
    fn comes_last(&self, _name: &str) -> bool {
        false
    }
}

/// The broker's input as the watches see it.
struct Sink<I> {
    events: mpsc::Sender<I>,
}

/// The broker is gone; the process is about to end.
struct BrokerGone;

impl<I: From<StoreEvent>> Sink<I> {
    async fn deliver(&self, event: StoreEvent) -> Result<(), BrokerGone> {
        self.events.send(event.into()).await.map_err(|_| BrokerGone)
    }
}

/// What [`run`] needs.
pub struct WatchParts<I> {
    /// The cluster.
    pub api: KubeApi,
    /// Remembers what pages do not carry.
    pub store: PageStore,
    /// Keeps the accounts themselves (L4).
    pub accounts: WorkQueue,
    /// What tiers, pools, grants and nodes show of themselves.
    pub observed: Observed,
    /// Counts what cannot be used.
    pub metrics: Metrics,
    /// How long receipts are kept, from the pools: the longest, or none while there is no pool.
    pub retention: watch::Sender<Option<Retention>>,
    /// The broker's bounded input. When it is full, the watches wait.
    pub events: mpsc::Sender<I>,
}

/// Watches all kinds until `stop` or until the broker is gone.
pub async fn run<I>(parts: WatchParts<I>, stop: CancellationToken)
where
    I: From<StoreEvent> + Send + 'static,
{
    let WatchParts { api, store, accounts, observed, metrics, retention, events } = parts;
    let sink = Sink { events };
    let malformed = Malformed { metrics: metrics.clone() };
    let accounts = Accounts { store, kept: accounts, malformed: malformed.clone() };
    let Observed { tiers, pools, grants, nodes } = observed;
    let tiers = Tiers { malformed: malformed.clone(), shown: tiers };
    let pools = Pools { malformed: malformed.clone(), shown: pools, by_pool: Mutex::new(BTreeMap::new()), retention };
    let nodes = Nodes { malformed: malformed.clone(), shown: nodes };
    let grants = Grants { malformed: malformed.clone(), shown: grants };
    // All in one task: they end together, and each waits for the broker's input only.
    tokio::select! {
        () = follow(&api, accounts, &sink, &stop) => {}
        () = follow(&api, tiers, &sink, &stop) => {}
        () = follow(&api, pools, &sink, &stop) => {}
        () = follow(&api, nodes, &sink, &stop) => {}
        () = follow(&api, grants, &sink, &stop) => {}
        () = follow(&api, Spaces { malformed }, &sink, &stop) => {}
        () = measure_clock(&api, &metrics, &sink, &stop) => {}
    }
}

/// Which object of its kind.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    /// None of what belongs to the cluster.
    namespace: Option<String>,
    name: String,
}

/// Uids of all objects that were delivered and are not gone: a list shows only what is there.
type Delivered = BTreeMap<Key, String>;

fn key(object: &impl Resource) -> Key {
    Key { namespace: object.namespace(), name: object.name_any() }
}

/// Follows one kind. Returns when it is time to stop.
async fn follow<T, I>(api: &KubeApi, translate: T, sink: &Sink<I>, stop: &CancellationToken)
where
    T: Translate,
    I: From<StoreEvent>,
{
    let objects: Objects<DeserializeGuard<T::Object>> = api.cluster();
    let mut events = std::pin::pin!(objects.watch(watcher::Config::default()));
    let mut known = Delivered::new();
    let mut list: Vec<DeserializeGuard<T::Object>> = Vec::new();
    loop {
        let event = tokio::select! {
            event = events.next() => event,
            () = stop.cancelled() => return,
        };
        let delivered = match event {
            Some(Ok(Event::Init)) => {
                list.clear();
                Ok(())
            }
            Some(Ok(Event::InitApply(mut object))) => {
                // Nobody asks who wrote which field, and it is a third of what a list of all accounts takes.
                object.meta_mut().managed_fields = None;
                list.push(object);
                Ok(())
            }
            Some(Ok(Event::InitDone)) => deliver_list(&translate, std::mem::take(&mut list), &mut known, sink).await,
            Some(Ok(Event::Apply(object))) => deliver(&translate, object, &mut known, sink).await,
            Some(Ok(Event::Delete(object))) => {
                known.remove(&key(&object));
                sink.deliver(translate.gone(&object.name_any(), &object.uid().unwrap_or_default())).await
            }
            Some(Err(error)) => {
                tracing::warn!(kind = ?T::WATCHED, error = %error_chain(&error), "A watch was interrupted");
                Ok(())
            }
            None => return,
        };
        if delivered.is_err() {
            return;
        }
    }
}

async fn deliver<T, I>(
    translate: &T,
    object: DeserializeGuard<T::Object>,
    known: &mut Delivered,
    sink: &Sink<I>,
) -> Result<(), BrokerGone>
where
    T: Translate,
    I: From<StoreEvent>,
{
    known.insert(key(&object), object.uid().unwrap_or_default());
    sink.deliver(translate.present(object)).await
}

async fn deliver_list<T, I>(
    translate: &T,
    list: Vec<DeserializeGuard<T::Object>>,
    known: &mut Delivered,
    sink: &Sink<I>,
) -> Result<(), BrokerGone>
where
    T: Translate,
    I: From<StoreEvent>,
{
    let listed: Delivered = list.iter().map(|object| (key(object), object.uid().unwrap_or_default())).collect();
    for (key, uid) in std::mem::take(known) {
        // An object of the same name with another uid is another object: the old one is gone.
        if listed.get(&key) != Some(&uid) {
            sink.deliver(translate.gone(&key.name, &uid)).await?;
        }
    }
    let (last, first): (Vec<_>, Vec<_>) = list.into_iter().partition(|object| translate.comes_last(&object.name_any()));
    for object in first.into_iter().chain(last) {
        deliver(translate, object, known, sink).await?;
    }
    sink.deliver(StoreEvent::Listed(T::WATCHED)).await
}

async fn measure_clock<I: From<StoreEvent>>(
    api: &KubeApi,
    metrics: &Metrics,
    sink: &Sink<I>,
    stop: &CancellationToken,
) {
    let mut wait = Duration::ZERO;
    while pause(wait, stop).await {
        wait = match api.clock_difference().await {
            Ok(difference) => {
                metrics.set_clock_ahead(difference.ahead_ms);
                if sink.deliver(StoreEvent::Clock(difference)).await.is_err() {
                    return;
                }
                CLOCK_PERIOD
            }
            Err(error) => {
                tracing::warn!(error = %error_chain(&error), "Cannot compare clocks with the API server");
                CLOCK_RETRY
            }
        };
    }
}

/// Says what cannot be used: in the log and in a metric.
#[derive(Clone)]
struct Malformed {
    metrics: Metrics,
}

impl Malformed {
    fn report(&self, kind: &'static str, metadata: &ObjectMeta, error: &str) {
        let name = metadata.name.as_deref().unwrap_or_default();
        tracing::error!(kind, name, error, "An object cannot be used");
        self.metrics.malformed(kind);
    }

    /// The parsed object, or nothing after saying why.
    fn parse<K, S>(&self, kind: &'static str, object: DeserializeGuard<K>) -> Result<S, Box<ObjectMeta>>
    where
        K: Resource,
        S: for<'a> TryFrom<&'a K, Error = super::seen::OutOfRange>,
    {
        match object.0 {
            Ok(object) => S::try_from(&object).map_err(|error| {
                self.report(kind, object.meta(), &error.to_string());
                Box::new(object.meta().clone())
            }),
            Err(invalid) => {
                self.report(kind, &invalid.metadata, &invalid.error);
                Err(Box::new(invalid.metadata))
            }
        }
    }
}

struct Accounts {
    store: PageStore,
    kept: WorkQueue,
    malformed: Malformed,
}

impl Translate for Accounts {
    type Object = GPUAccount;
    const WATCHED: Watched = Watched::Accounts;

    fn present(&self, account: DeserializeGuard<GPUAccount>) -> StoreEvent {
        let metadata = account.meta().clone();
        let seen = self.store.see(account);
        self.kept.seen(&seen);
        if let Err(error) = &seen.page {
            self.malformed.report("GPUAccount", &metadata, &error_chain(error));
        }
        match seen {
            AccountSeen { name, page: Ok(page), .. } if name.as_str() == TERM_PAGE => {
                StoreEvent::Term(TermSeen { epoch: page.epoch, write_id: page.write_id })
            }
            // A term page that cannot be read is delivered as an account that is closed: no term starts by it.
            seen => StoreEvent::Account(Box::new(seen)),
        }
    }

    fn gone(&self, name: &str, uid: &str) -> StoreEvent {
        let name = AccountName::new(name);
        self.store.forget(&name);
        self.kept.gone(&name);
        StoreEvent::AccountGone { name, uid: uid.to_owned() }
    }

    fn comes_last(&self, name: &str) -> bool {
        name == TERM_PAGE
    }
}

struct Tiers {
    malformed: Malformed,
    shown: Shown<Revision<GPUTierStatus>>,
}

impl Translate for Tiers {
    type Object = GPUTier;
    const WATCHED: Watched = Watched::Tiers;

    fn present(&self, tier: DeserializeGuard<GPUTier>) -> StoreEvent {
        self.shown.see_any(&tier);
        match self.malformed.parse::<_, TierSeen>("GPUTier", tier) {
            Ok(tier) => StoreEvent::Tier(Box::new(tier)),
            Err(metadata) => self.gone(&metadata.name.unwrap_or_default(), ""),
        }
    }

    fn gone(&self, name: &str, _uid: &str) -> StoreEvent {
        self.shown.remove(name);
        StoreEvent::TierGone { name: name.to_owned() }
    }
}

struct Pools {
    malformed: Malformed,
    shown: Shown<Revision<GPUPoolStatus>>,
    /// A std mutex: it is never held across an await.
    by_pool: Mutex<BTreeMap<String, Retention>>,
    retention: watch::Sender<Option<Retention>>,
}

impl Pools {
    /// Takes what a pool says about receipts, or that it says nothing any more.
    fn keep_receipts(&self, pool: &str, retention: Option<Retention>) {
        let mut pools = self.by_pool.lock().unwrap_or_else(PoisonError::into_inner);
        match retention {
            Some(retention) => pools.insert(pool.to_owned(), retention),
            None => pools.remove(pool),
        };
        self.retention.send_replace(pools.values().copied().reduce(Retention::or_longer));
    }
}

impl Translate for Pools {
    type Object = GPUPool;
    const WATCHED: Watched = Watched::Pools;

    fn present(&self, pool: DeserializeGuard<GPUPool>) -> StoreEvent {
        self.shown.see_any(&pool);
        match self.malformed.parse::<_, PoolSeen>("GPUPool", pool) {
            Ok(pool) => {
                let (kept, age_max_seconds) = (pool.receipts_kept, pool.receipt_age_max_seconds);
                self.keep_receipts(&pool.name, Some(Retention { kept, age_max_seconds }));
                StoreEvent::Pool(Box::new(pool))
            }
            Err(metadata) => self.gone(&metadata.name.unwrap_or_default(), ""),
        }
    }

    fn gone(&self, name: &str, _uid: &str) -> StoreEvent {
        self.shown.remove(name);
        self.keep_receipts(name, None);
        StoreEvent::PoolGone { name: name.to_owned() }
    }
}

struct Nodes {
    malformed: Malformed,
    shown: Shown<NodeObserved>,
}

impl Translate for Nodes {
    type Object = GPUNode;
    const WATCHED: Watched = Watched::Nodes;

    fn present(&self, node: DeserializeGuard<GPUNode>) -> StoreEvent {
        if let Ok(node) = &node.0 {
            self.shown.put(node.name_any(), NodeObserved::from(node));
        }
        match self.malformed.parse::<_, NodeSeen>("GPUNode", node) {
            Ok(node) => StoreEvent::Node(node),
            Err(metadata) => self.gone(&metadata.name.unwrap_or_default(), ""),
        }
    }

    fn gone(&self, name: &str, _uid: &str) -> StoreEvent {
        self.shown.remove(name);
        StoreEvent::NodeGone { name: NodeName::new(name) }
    }
}

struct Spaces {
    malformed: Malformed,
}

impl Translate for Spaces {
    type Object = Space;
    const WATCHED: Watched = Watched::Spaces;

    fn present(&self, space: DeserializeGuard<Space>) -> StoreEvent {
        match self.malformed.parse::<_, SpaceSeen>("Space", space) {
            Ok(space) => StoreEvent::Space(space),
            Err(metadata) => StoreEvent::SpaceGone { uid: metadata.uid.unwrap_or_default() },
        }
    }

    fn gone(&self, _name: &str, uid: &str) -> StoreEvent {
        StoreEvent::SpaceGone { uid: uid.to_owned() }
    }
}

struct Grants {
    malformed: Malformed,
    shown: Shown<Revision<GPUQuotaGrantStatus>>,
}

impl Translate for Grants {
    type Object = GPUQuotaGrant;
    const WATCHED: Watched = Watched::Grants;

    fn present(&self, grant: DeserializeGuard<GPUQuotaGrant>) -> StoreEvent {
        self.shown.see_any(&grant);
        match self.malformed.parse::<_, GrantSeen>("GPUQuotaGrant", grant) {
            Ok(grant) => StoreEvent::Grant(grant),
            Err(metadata) => self.gone(&metadata.name.unwrap_or_default(), &metadata.uid.unwrap_or_default()),
        }
    }

    fn gone(&self, name: &str, uid: &str) -> StoreEvent {
        self.shown.remove(name);
        StoreEvent::GrantGone { uid: uid.to_owned() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space(namespace: &str, uid: &str) -> DeserializeGuard<Space> {
        let mut space = Space::new("hello", spaceport_crds::SpaceSpec::default());
        space.metadata.namespace = Some(namespace.to_owned());
        space.metadata.uid = Some(uid.to_owned());
        DeserializeGuard(Ok(space))
    }

    /// What the broker is told when everything is listed again: who is gone, and who is there.
    async fn told_by_list(known: &mut Delivered, list: Vec<DeserializeGuard<Space>>) -> [String; 2] {
        let (events, mut inbox) = mpsc::channel::<StoreEvent>(16);
        let translate = Spaces { malformed: Malformed { metrics: Metrics::new() } };
        assert!(deliver_list(&translate, list, known, &Sink { events }).await.is_ok());
        let (mut gone, mut there) = (Vec::new(), Vec::new());
        while let Ok(event) = inbox.try_recv() {
            match event {
                StoreEvent::SpaceGone { uid } => gone.push(uid),
                StoreEvent::Space(seen) => there.push(seen.uid),
                _ => {}
            }
        }
        [gone.join(" "), there.join(" ")]
    }

    #[tokio::test]
    async fn spaces_of_one_name_in_two_namespaces_are_two() {
        let mut known = Delivered::new();
        told_by_list(&mut known, vec![space("a", "1"), space("b", "2")]).await;
        let again = told_by_list(&mut known, vec![space("a", "1"), space("b", "2")]).await;
        assert_eq!(again, ["", "1 2"]);
        // One has gone while the watch was cut, another is a new one.
        let after = told_by_list(&mut known, vec![space("b", "3")]).await;
        assert_eq!(after, ["1 2", "3"]);
    }
}
