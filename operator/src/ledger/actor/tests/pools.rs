//! Which pool applies to a node.

use spaceport_core::ids::{Size, SpaceKey};
use spaceport_core::page::{Hold, Part, Source, Window};

use super::*;
use crate::ledger::seen::{NodeSeen, PoolSeen};

/// A pool that selects nodes by labels: which ones only their agents can tell.
fn labelled_pool(name: &str, allow_limit_seconds: i32) -> PoolSeen {
    let node_selector = BTreeMap::from([("example.com/gpu".to_owned(), "h200".to_owned())]);
    let spec = crds::GPUPoolSpec { node_selector, allow_limit_seconds, ..crds::GPUPoolSpec::default() };
    PoolSeen::try_from(&crds::GPUPool::new(name, spec)).unwrap()
}

impl Story {
    /// Waits until so many nodes are counted as being without a pool.
    async fn counts_without_pool(&self, nodes: u32) {
        let line = format!("spaceport_nodes_without_pool {nodes}");
        wait_for(|| self.metrics.encode().unwrap().lines().any(|found| found == line).then_some(())).await;
    }

    /// Waits until the broker has ticked after everything that it was told so far. A node must have joined.
    pub(super) async fn tick(&self) {
        self.store(StoreEvent::Pool(Box::new(labelled_pool("quick", 7)))).await;
        self.follows(None).await;
        self.counts_without_pool(1).await;
        self.follows(Some("quick")).await;
        self.counts_without_pool(0).await;
    }

    /// The agent's GPUNode names a pool, or none.
    async fn follows(&self, pool: Option<&str>) {
        let node = NodeSeen { name: NodeName::new(NODE), pool: pool.map(str::to_owned) };
        self.store(StoreEvent::Node(node)).await;
    }

    async fn allow_limit_ms(&mut self, ticket: u64) -> u64 {
        self.request(ticket, 1_000, "").await;
        let order = self.order().await;
        self.run_lease(&order.lease, 10).await;
        order.allow_limit_ms
    }
}

#[tokio::test]
async fn a_node_has_the_times_of_the_pool_that_its_agent_says_it_follows() {
    let mut story = Story::begin(Memory::default()).await;
    story.store(StoreEvent::Pool(Box::new(labelled_pool("quick", 7)))).await;
    story.store(StoreEvent::Pool(Box::new(labelled_pool("slow", 40)))).await;
    story.follows(Some("quick")).await;
    story.join(Vec::new()).await;
    assert_eq!(story.allow_limit_ms(1).await, 7_000);
    // Its labels change, and with them its pool.
    story.follows(Some("slow")).await;
    assert_eq!(story.allow_limit_ms(2).await, 40_000);
    // The pool itself changes.
    story.store(StoreEvent::Pool(Box::new(labelled_pool("slow", 50)))).await;
    assert_eq!(story.allow_limit_ms(3).await, 50_000);
    story.stop().await;
}

#[tokio::test]
async fn a_node_whose_pool_is_not_known_has_the_defaults_and_is_counted() {
    let mut story = Story::begin(Memory::default()).await;
    story.store(StoreEvent::Pool(Box::new(labelled_pool("quick", 7)))).await;
    story.join(Vec::new()).await;
    assert_eq!(story.allow_limit_ms(1).await, 30_000, "its GPUNode is not there yet");
    story.follows(Some("deleted")).await;
    assert_eq!(story.allow_limit_ms(2).await, 30_000);
    story.counts_without_pool(1).await;
    story.follows(Some("quick")).await;
    assert_eq!(story.allow_limit_ms(3).await, 7_000);
    story.counts_without_pool(0).await;
    story.stop().await;
}

/// A hold that is made now.
pub(super) fn hold(node: &str, now: LedgerTime) -> Hold {
    Hold {
        cookie: None,
        shortened: None,
        budget: None,
        lease: LeaseId::new("01jd8x0000000000000000000a"),
        space: SpaceKey::new("demo", "hello", "space-uid"),
        parts: vec![Part { source: Source::Window(now), ms: 20_000 }],
        node: NodeName::new(node),
        avoid: Vec::new(),
        size: Size::Large,
        weight: 1,
        declared_ms: 20_000,
        epoch: Epoch(1),
        since: now,
        after: None,
        generation: 1,
        via: "space".to_owned(),
    }
}

/// A silent node's lease expires only after all limits of its pool (L9): so a new term has to know that pool too.
#[tokio::test]
async fn a_new_term_knows_the_pools_of_nodes_whose_agents_are_away() {
    let now = LedgerTime(clock::wall().as_millisecond());
    let window = Window { start: now, base_ms: 60_000, charged_ms: 0, runs: 0, generation: 1 };
    let holds = vec![hold("gpu-away", now).into()];
    let page = Page { windows: vec![window], holds, last_time: now, ..Page::default() };
    let memory = Memory::default();
    memory.0.lock().unwrap().accounts.insert(AccountName::new(SPACE), (1, page));
    let mut story = Story::begin(memory).await;
    story.store(StoreEvent::Pool(Box::new(labelled_pool("patient", 200)))).await;
    let away = NodeSeen { name: NodeName::new("gpu-away"), pool: Some("patient".to_owned()) };
    story.store(StoreEvent::Node(away)).await;
    // Another node makes a second term begin.
    story.connect(40).await;
    story.see_term(40).await;
    assert_eq!(story.hear().await, Outgoing::Welcome(proto::Welcome { epoch: 41 }));
    story.joined(41, Vec::new()).await;
    story.request(1, 50_000, "").await;
    let Denial::PendingOverquota { frees_in_ms, .. } = story.denial().await else { panic!("another refusal") };
    assert!((200_000..=242_000).contains(&frees_in_ms), "{frees_in_ms}");
    story.stop().await;
}
