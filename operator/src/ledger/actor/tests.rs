//! Stories of the broker against a store that can lose answers, and an agent played by the test.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use jiff::Timestamp;
use spaceport_core::protocol::UnauthenticatedReason;
use spaceport_crds as crds;
use spaceport_proto::nodelink as proto;
use spaceport_proto::nodelink::node_message::Message as Incoming;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::*;
use crate::identity::KeySet;
use crate::kubeapi::ApiError;
use crate::ledger::durations::Durations;
use crate::ledger::receipt::ReceiptEvent;
use crate::ledger::seen::{MalformedAccount, TermSeen, TierSeen};
use crate::ledger::store::CreateError;
use crate::ledger::store::WriteOutcome;
use crate::ledger::watches::Watched;
use crate::node_link::{NodeEvent, Outbound, SessionId};

mod accounts;
mod cards;
mod findings;
mod objects;
mod places;
mod pools;
mod terms;

/// Longest wait for anything; a broker that answers at all answers within milliseconds.
const LIMIT: Duration = Duration::from_secs(20);
const NODE: &str = "gpu-1";
const SPACE: &str = "space-space-uid";

/// What becomes of a write.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fate {
    /// It happens, and nobody hears of it.
    LostAnswer,
    /// It does not happen, and nobody hears of it.
    LostRequest,
    /// Somebody edits the spec before it.
    SpecEdited,
    /// It is refused.
    Refused,
    /// It is refused when the test says so.
    RefusedLater,
    /// It does not happen, for the account is gone, which is answered when the test says so.
    GoneLater,
    /// It does not happen, and it takes for ever to say so.
    NoAnswer,
}

/// What becomes of a try to begin a term.
#[derive(Debug)]
enum TermFate {
    /// It fails so.
    Fails(TermError),
    /// It is written, and the answer waits until the test says so.
    AnsweredLater,
    /// Nothing comes of it, and nobody says so.
    NoAnswer,
}

#[derive(Default)]
struct Objects {
    accounts: BTreeMap<AccountName, (u64, Page)>,
    fates: VecDeque<Fate>,
    /// What the last write of each account showed beside its page.
    shown: BTreeMap<AccountName, Display>,
    epoch: u64,
    term_fates: VecDeque<TermFate>,
    writes: u64,
    /// Lets the write of [`Fate::RefusedLater`] or [`Fate::GoneLater`] go on.
    refuse: Arc<tokio::sync::Notify>,
    /// Which object of its name an account is, if it is not the first.
    uids: BTreeMap<AccountName, String>,
    /// Answers to reads wait until the test says so; what they say is what was there before.
    holds_reads: bool,
    reads: u64,
    answer: Arc<tokio::sync::Notify>,
}

impl Objects {
    fn uid(&self, name: &AccountName) -> String {
        self.uids.get(name).cloned().unwrap_or_else(|| "uid".to_owned())
    }
}

#[derive(Clone, Default)]
struct Memory(Arc<Mutex<Objects>>);

impl Memory {
    fn page(&self, account: &str) -> Page {
        self.0
            .lock()
            .unwrap()
            .accounts
            .get(&AccountName::new(account))
            .map(|(_, page)| page.clone())
            .unwrap_or_default()
    }

    fn fate(&self, fate: Fate) {
        self.0.lock().unwrap().fates.push_back(fate);
    }

    fn seen(name: &AccountName, revision: u64, page: &Page) -> AccountSeen {
        AccountSeen {
            name: name.clone(),
            uid: "uid".to_owned(),
            resource_version: revision.to_string(),
            created: Timestamp::UNIX_EPOCH,
            tier: None,
            identities: Vec::new(),
            deleting: false,
            finalizers: Vec::new(),
            generation: Some(1),
            ready: None,
            break_glass: None,
            page: page.sound().map_err(MalformedAccount::Unsound).map(|()| page.clone()),
        }
    }
}

impl Pages for Memory {
    async fn write(&self, target: &PageTarget, page: &Page, display: Display) -> WriteOutcome {
        let fate = self.0.lock().unwrap().fates.pop_front();
        if fate == Some(Fate::NoAnswer) {
            return std::future::pending().await;
        }
        if matches!(fate, Some(Fate::RefusedLater | Fate::GoneLater)) {
            let refuse = Arc::clone(&self.0.lock().unwrap().refuse);
            refuse.notified().await;
            let gone = fate == Some(Fate::GoneLater);
            return if gone { WriteOutcome::Gone } else { WriteOutcome::Refused { reason: "test".to_owned() } };
        }
        let mut objects = self.0.lock().unwrap();
        let lost = WriteOutcome::Unknown { reason: "test".to_owned() };
        objects.writes += 1;
        if objects.uid(&target.name) != target.uid {
            return WriteOutcome::Conflict;
        }
        let Some((revision, stored)) = objects.accounts.get_mut(&target.name) else { return WriteOutcome::Gone };
        match fate {
            Some(Fate::LostRequest) => return lost,
            Some(Fate::Refused) => return WriteOutcome::Refused { reason: "test".to_owned() },
            Some(Fate::SpecEdited) => *revision += 1,
            Some(Fate::LostAnswer | Fate::NoAnswer | Fate::RefusedLater | Fate::GoneLater) | None => {}
        }
        if revision.to_string() != target.resource_version {
            return WriteOutcome::Conflict;
        }
        assert_eq!(page.seq, stored.seq + 1);
        *revision += 1;
        *stored = page.clone();
        let resource_version = revision.to_string();
        objects.shown.insert(target.name.clone(), display);
        if fate == Some(Fate::LostAnswer) { lost } else { WriteOutcome::Written { resource_version } }
    }

    async fn read(&self, name: &AccountName) -> Result<Option<AccountSeen>, ApiError> {
        let (found, answer) = {
            let mut objects = self.0.lock().unwrap();
            objects.reads += 1;
            let found = objects.accounts.get(name).map(|(revision, page)| Self::seen(name, *revision, page));
            let found = found.map(|seen| AccountSeen { uid: objects.uid(name), ..seen });
            (found, objects.holds_reads.then(|| Arc::clone(&objects.answer)))
        };
        if let Some(answer) = answer {
            answer.notified().await;
        }
        Ok(found)
    }

    async fn create(&self, name: &AccountName) -> Result<AccountSeen, CreateError> {
        let mut objects = self.0.lock().unwrap();
        let (revision, page) = objects.accounts.entry(name.clone()).or_insert((1, Page::default()));
        Ok(Self::seen(name, *revision, page))
    }

    async fn begin_term(&self, above: Epoch) -> Result<TermBegun, TermError> {
        let fate = self.0.lock().unwrap().term_fates.pop_front();
        match fate {
            Some(TermFate::Fails(error)) => return Err(error),
            Some(TermFate::NoAnswer) => return std::future::pending().await,
            Some(TermFate::AnsweredLater) | None => {}
        }
        let (epoch, answer) = {
            let mut objects = self.0.lock().unwrap();
            objects.epoch = objects.epoch.max(above.0) + 1;
            (objects.epoch, Arc::clone(&objects.answer))
        };
        if fate.is_some() {
            answer.notified().await;
        }
        Ok(TermBegun { epoch: Epoch(epoch), write_id: format!("term-{epoch}") })
    }
}

fn tier() -> TierSeen {
    TierSeen {
        name: "space".to_owned(),
        generation: 1,
        created: Timestamp::UNIX_EPOCH,
        base_ms: 60_000,
        longest_call_ms: 50_000,
        address_prefix_ms: None,
        concurrent_leases: 2,
        runs_per_window: None,
        extendable: false,
        callers: crds::Callers::Spaces,
        class: CallerClass::Guest,
        priority: crds::Priority::Low,
        identities: Vec::new(),
    }
}

/// A broker with its store, its inputs, and the agent's end of its session.
struct Story {
    memory: Memory,
    inputs: mpsc::Sender<Input>,
    receipts: Receipts,
    metrics: Metrics,
    durations: Durations,
    findings: watch::Receiver<Option<Arc<Findings>>>,
    leading: watch::Sender<bool>,
    broker: JoinHandle<Result<(), TermOver>>,
    stop: CancellationToken,
    from_broker: mpsc::Receiver<Result<proto::BrokerMessage, tonic::Status>>,
    session: u64,
}

impl Story {
    /// A broker begins its term on what the store has.
    async fn begin(memory: Memory) -> Self {
        let above = memory.0.lock().unwrap().epoch;
        let story = Self::before_its_term(memory).await;
        story.see_term(above).await;
        story
    }

    /// A broker that leads and has seen everything but its term.
    async fn before_its_term(memory: Memory) -> Self {
        let (inputs, receiver) = mpsc::channel(64);
        let (_, keys) = watch::channel(Arc::new(KeySet::default()));
        let (leading, leads) = watch::channel(true);
        let (receipts, metrics, stop) = (Receipts::new(), Metrics::new(), CancellationToken::new());
        let durations = Durations::default();
        let (findings_sender, findings) = watch::channel(None);
        let parts = ActorParts {
            inputs: receiver,
            leading: leads,
            store: memory.clone(),
            receipts: receipts.clone(),
            verifier: TokenVerifier::new("issuer", keys),
            metrics: metrics.clone(),
            durations: durations.clone(),
            findings: findings_sender,
            clock_skew_max: Duration::from_secs(5),
        };
        let broker = tokio::spawn(run(parts, stop.clone()));
        let (_, from_broker) = mpsc::channel(1);
        let story = Self {
            memory,
            inputs,
            receipts,
            metrics,
            durations,
            findings,
            leading,
            broker,
            stop,
            from_broker,
            session: 0,
        };
        story.store(StoreEvent::Tier(Box::new(tier()))).await;
        story.see_pages().await;
        for watched in Watched::ALL {
            story.store(StoreEvent::Listed(watched)).await;
        }
        story
    }

    /// Our watch shows every page.
    async fn see_pages(&self) {
        let accounts = self.memory.0.lock().unwrap().accounts.clone();
        for (name, (revision, page)) in accounts {
            self.store(StoreEvent::Account(Box::new(Memory::seen(&name, revision, &page)))).await;
        }
    }

    /// A term above `above` begins, and our watch shows its page.
    async fn see_term(&self, above: u64) {
        let epoch = wait_for(|| Some(self.memory.0.lock().unwrap().epoch).filter(|epoch| *epoch > above)).await;
        self.store(StoreEvent::Term(TermSeen { epoch: Epoch(epoch), write_id: format!("term-{epoch}") })).await;
    }

    async fn store(&self, event: StoreEvent) {
        self.inputs.send(Input::Store(event)).await.unwrap();
    }

    async fn connect(&mut self, highest_epoch: u64) {
        let (outbound, from_broker) = Outbound::channel(64);
        self.from_broker = from_broker;
        self.session += 1;
        let hello = proto::Hello {
            node: NODE.to_owned(),
            boot_id: "boot".to_owned(),
            agent_instance: "agent-1".to_owned(),
            highest_epoch,
        };
        let (session, node) = (SessionId(self.session), NodeName::new(NODE));
        let connected = NodeEvent::Connected { session, node, hello, boottime_ms: 1, outbound };
        self.inputs.send(Input::Node(connected)).await.unwrap();
    }

    async fn say(&self, boottime_ms: u64, message: Incoming) {
        let message = proto::NodeMessage { boottime_ms, message: Some(message) };
        let (session, node) = (SessionId(self.session), NodeName::new(NODE));
        self.inputs.send(Input::Node(NodeEvent::Message { session, node, message })).await.unwrap();
    }

    async fn hear(&mut self) -> Outgoing {
        let message = tokio::time::timeout(LIMIT, self.from_broker.recv()).await.expect("the broker is silent");
        message.expect("the session is over").unwrap().message.unwrap()
    }

    /// Connects, and tells of one card with two slots and of these leases.
    async fn join(&mut self, leases: Vec<proto::NodeLease>) {
        self.connect(0).await;
        let Outgoing::Welcome(proto::Welcome { epoch }) = self.hear().await else { panic!("no Welcome") };
        self.joined(epoch, leases).await;
    }

    async fn joined(&self, epoch: u64, leases: Vec<proto::NodeLease>) {
        let card = proto::Card {
            index: 0,
            uuid: "GPU-0".to_owned(),
            model: "NVIDIA H200".to_owned(),
            large_slots: 2,
            grantable: true,
            quarantined_slots: 0,
        };
        let joined = proto::Joined { epoch, cards: vec![card], leases, ..proto::Joined::default() };
        self.say(2, Incoming::Joined(joined)).await;
    }

    async fn request(&self, ticket: u64, declared_ms: u64, token: &str) {
        let pod = proto::Pod {
            namespace: "demo".to_owned(),
            space: "hello".to_owned(),
            space_uid: "space-uid".to_owned(),
            pod_uid: "pod".to_owned(),
            container: "container".to_owned(),
            revision: 7,
        };
        let request = proto::Request {
            ticket,
            pod: Some(pod),
            task_id: 1,
            size: proto::Size::Large.into(),
            declared_ms,
            token: token.to_owned(),
            ..proto::Request::default()
        };
        self.say(7, Incoming::Request(request)).await;
    }

    async fn order(&mut self) -> proto::Start {
        match self.hear().await {
            Outgoing::Start(start) => start,
            other => panic!("{other:?} instead of an order"),
        }
    }

    async fn denial(&mut self) -> Denial {
        match self.hear().await {
            Outgoing::Denied(denied) => serde_json::from_str(&denied.denial).unwrap(),
            other => panic!("{other:?} instead of a refusal"),
        }
    }

    /// The node runs the lease for so long; the broker makes the end durable.
    async fn run_lease(&mut self, lease: &str, used_ms: u64) {
        let started = proto::Started { lease: lease.to_owned(), card: 0, slot: 0, ..proto::Started::default() };
        self.say(8, Incoming::Started(started)).await;
        self.say(9, Incoming::Running(proto::Running { lease: lease.to_owned(), ..proto::Running::default() })).await;
        self.end_lease(lease, used_ms).await;
    }

    async fn end_lease(&mut self, lease: &str, used_ms: u64) {
        self.say(10, Incoming::Ended(ended(lease, used_ms))).await;
        let acknowledged = self.hear().await;
        let expected = proto::Acknowledged { lease: lease.to_owned(), ended: true, freed: false };
        assert_eq!(acknowledged, Outgoing::Acknowledged(expected));
        let freed =
            proto::Freed { lease: lease.to_owned(), kind: proto::FreedKind::Free.into(), ..proto::Freed::default() };
        self.say(11, Incoming::Freed(freed)).await;
        let acknowledged = self.hear().await;
        let expected = proto::Acknowledged { lease: lease.to_owned(), ended: false, freed: true };
        assert_eq!(acknowledged, Outgoing::Acknowledged(expected));
    }

    async fn stop(self) -> Memory {
        self.stop.cancel();
        self.broker.await.unwrap().unwrap();
        self.memory
    }
}

fn ended(lease: &str, used_ms: u64) -> proto::Ended {
    proto::Ended { lease: lease.to_owned(), kind: proto::EndKind::Released.into(), used_ms, ..proto::Ended::default() }
}

async fn wait_for<T>(mut value: impl FnMut() -> Option<T>) -> T {
    let found = async {
        loop {
            if let Some(value) = value() {
                return value;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(LIMIT, found).await.expect("it never came to be")
}

#[tokio::test]
async fn a_first_call_makes_its_account_and_is_charged_to_it() {
    let mut story = Story::begin(Memory::default()).await;
    story.join(Vec::new()).await;
    story.request(1, 10_000, "").await;
    let order = story.order().await;
    assert_eq!((order.ticket, order.declared_ms, order.epoch), (1, 10_000, 1));
    assert_eq!(order.boottime_ms, 7, "the order echoes the last stamp");
    assert_eq!(story.memory.page(SPACE).holds.len(), 1, "the hold is durable before the order leaves");
    story.run_lease(&order.lease, 3_210).await;
    let page = story.memory.page(SPACE);
    assert_eq!((page.holds.len(), page.closed.len(), page.windows[0].charged_ms), (0, 1, 3_210));
    assert_eq!(story.receipts.unwritten_ends(), 1);
    let (account, lease) = (AccountName::new(SPACE), LeaseId::new(&order.lease));
    story.inputs.send(Input::Receipt(ReceiptEvent::Written { account, lease })).await.unwrap();
    // The row leaves with the next write of the page.
    story.request(2, 10_000, "").await;
    story.order().await;
    assert!(story.memory.page(SPACE).closed.is_empty());
    story.stop().await;
}

#[tokio::test]
async fn what_is_learned_of_a_function_is_left_to_those_who_show_it() {
    let mut story = Story::begin(Memory::default()).await;
    story.join(Vec::new()).await;
    for ticket in 1..=6 {
        story.request(ticket, 10_000, "").await;
        let order = story.order().await;
        story.run_lease(&order.lease, 1_000).await;
    }
    let learned = story.durations.get("space-uid").unwrap();
    assert_eq!((learned.len(), learned[0].revision.0), (1, 7));
    assert_eq!((learned[0].calls, learned[0].declared_ms, learned[0].p50_ms), (6, 10_000, 1_000));
    story.stop().await;
}

#[tokio::test]
async fn a_refusal_carries_its_numbers_and_is_remembered() {
    let mut story = Story::begin(Memory::default()).await;
    story.join(Vec::new()).await;
    story.request(1, 30_000, "").await;
    let order = story.order().await;
    story.run_lease(&order.lease, 30_000).await;
    story.request(2, 40_000, "").await;
    let Denial::QuotaExceeded { needed_ms: 40_000, left_ms: 30_000, resets_in_ms, .. } = story.denial().await else {
        panic!("another refusal")
    };
    assert!(resets_in_ms > 0);
    let memory = story.memory.clone();
    let row = wait_for(|| memory.page(SPACE).last_denial).await;
    assert_eq!(row.denial.kind(), "QuotaExceeded");
    story.request(3, 10_000, "not.a.token").await;
    let denial = story.denial().await;
    assert_eq!(denial, Denial::Unauthenticated { reason: UnauthenticatedReason::NotAToken });
    story.stop().await;
}

#[tokio::test]
async fn a_write_whose_answer_is_lost_is_granted_once() {
    for fate in [Fate::LostAnswer, Fate::LostRequest, Fate::SpecEdited] {
        let mut story = Story::begin(Memory::default()).await;
        story.join(Vec::new()).await;
        story.memory.fate(fate);
        story.request(1, 10_000, "").await;
        let order = story.order().await;
        assert_eq!(story.memory.page(SPACE).holds.len(), 1, "{fate:?}");
        story.memory.fate(fate);
        story.run_lease(&order.lease, 1_000).await;
        let page = story.memory.page(SPACE);
        assert_eq!((page.seq, page.holds.len(), page.windows[0].charged_ms), (2, 0, 1_000), "{fate:?}");
        story.stop().await;
    }
}

#[tokio::test]
async fn a_write_that_is_refused_grants_nothing_and_is_tried_again() {
    let mut story = Story::begin(Memory::default()).await;
    story.join(Vec::new()).await;
    story.memory.fate(Fate::Refused);
    story.request(1, 10_000, "").await;
    // It waits for the account's back-off, and is told so.
    let Outgoing::Queued(queued) = story.hear().await else { panic!("no place in the queue") };
    assert!(queued.concurrency);
    let order = story.order().await;
    assert_eq!((order.ticket, story.memory.page(SPACE).holds.len()), (1, 1));
    story.stop().await;
}

/// L2: the watch shows an old leader's late page while a write of ours is under way. It was found by the simulation that the
/// next write then went over that page, with its number.
#[tokio::test]
async fn a_page_that_is_seen_during_a_write_is_not_written_over() {
    let mut story = Story::begin(Memory::default()).await;
    story.join(Vec::new()).await;
    story.request(1, 10_000, "").await;
    let order = story.order().await;
    story.run_lease(&order.lease, 1_000).await;
    story.memory.fate(Fate::RefusedLater);
    story.request(2, 10_000, "").await;
    wait_for(|| story.memory.0.lock().unwrap().fates.is_empty().then_some(())).await;
    let late = {
        let mut objects = story.memory.0.lock().unwrap();
        let (revision, page) = objects.accounts.get_mut(&AccountName::new(SPACE)).unwrap();
        (*revision, page.seq, page.write_id) = (*revision + 1, page.seq + 1, "late".to_owned());
        Memory::seen(&AccountName::new(SPACE), *revision, page)
    };
    let seq = late.page.as_ref().unwrap().seq;
    story.store(StoreEvent::Account(Box::new(late))).await;
    story.memory.0.lock().unwrap().refuse.notify_one();
    let Outgoing::Queued(_) = story.hear().await else { panic!("no place in the queue") };
    assert_eq!(story.order().await.ticket, 2);
    assert_eq!(story.memory.page(SPACE).seq, seq + 1, "our page came after the late one");
    story.stop().await;
}

#[tokio::test]
async fn the_next_leader_takes_running_leases_over() {
    let mut story = Story::begin(Memory::default()).await;
    story.join(Vec::new()).await;
    for ticket in 1..=2 {
        story.request(ticket, 10_000, "").await;
    }
    let (runs, lost) = (story.order().await, story.order().await);
    let memory = story.stop().await;
    assert_eq!(memory.page(SPACE).holds.len(), 2);

    let mut story = Story::begin(memory).await;
    // The node has one of them; the order of the other never reached it.
    let lease = proto::NodeLease {
        lease: runs.lease.clone(),
        phase: proto::LeasePhase::Running.into(),
        size: proto::Size::Large.into(),
        running_ms: 100,
        ..proto::NodeLease::default()
    };
    story.join(vec![lease]).await;
    let acknowledged = story.hear().await;
    let expected = proto::Acknowledged { lease: lost.lease.clone(), ended: true, freed: false };
    assert_eq!(acknowledged, Outgoing::Acknowledged(expected), "the lost one is voided at no charge");
    story.end_lease(&runs.lease, 2_000).await;
    let page = story.memory.page(SPACE);
    assert_eq!((page.epoch, page.holds.len(), page.windows[0].charged_ms), (Epoch(2), 0, 2_000));
    // What it repeats changes nothing (L10).
    story.say(12, Incoming::Ended(ended(&runs.lease, 2_000))).await;
    let expected = proto::Acknowledged { lease: runs.lease.clone(), ended: true, freed: false };
    assert_eq!(story.hear().await, Outgoing::Acknowledged(expected));
    assert_eq!(story.memory.page(SPACE).windows[0].charged_ms, 2_000);
    story.stop().await;
}
