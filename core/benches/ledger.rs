//! How fast the ledger decides, and what an idle account costs (docs/figures): `cargo xtask bench ledger`.
//!
//! 100,000 accounts, 10,000 requests that wait on ten nodes, every slot taken. Each lease that ends hands its slot to the
//! next, and a new request takes the place of the one that got it. What a shell would do is done at once: writes succeed,
//! nodes obey. Only the calls of `step`, decide and apply, are timed.

#![allow(clippy::disallowed_methods)] // A benchmark reads the clock; what it measures does not.

use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use spaceport_core::ids::{
    AccountName, Epoch, IdSeed, LeaseId, LedgerTime, NodeName, Revision, Size, SpaceKey, Steady, Ticket, WorkerKey,
};
use spaceport_core::lease::{
    Command, Effect, EndReport, FreedAs, Moment, NodeSettings, Order, Outcome, PickedSlot, Policy, Priority, Request,
    State, step,
};
use spaceport_core::page::{Ending, Page, Window};
use spaceport_core::protocol::CallerClass;
use spaceport_core::queue::QueueBounds;
use spaceport_core::quota::Allowance;
use spaceport_core::slots::{self, Card, Occupancy};

const ACCOUNTS: usize = 100_000;
const QUEUED: usize = 10_000;
const NODES: usize = 10;
const CARDS: u32 = 16;
const SPACES: u64 = 200;
/// Steps that are timed.
const STEPS: usize = 1_000_000;
const START: i64 = 1_800_000_000_000;

/// Counts what is allocated.
struct Counting;

static ALLOCATED: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATED.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        ALLOCATED.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What a shell would be.
struct Bench {
    state: State,
    now: u64,
    ids: u128,
    tickets: u64,
    random: u64,
    /// What happens next, in order.
    next: VecDeque<Command>,
    /// Leases that run.
    running: VecDeque<Running>,
    /// Used slots of the cards of each node.
    used: BTreeMap<NodeName, Vec<u32>>,
    nanoseconds: Vec<u32>,
    timed: bool,
}

/// A lease on its card.
struct Running {
    node: NodeName,
    lease: LeaseId,
    card: u32,
    slots: u32,
    declared_ms: u64,
}

fn node(index: usize) -> NodeName {
    NodeName::new(format!("gpu-{index:02}"))
}

fn card(index: u32) -> Card {
    Card { index, large_slots: 2, grantable: true, quarantined_slots: 0 }
}

fn account(index: usize) -> AccountName {
    AccountName::new(format!("user-{index:06}"))
}

impl Bench {
    fn new() -> Self {
        Self {
            state: State::new(Epoch(1), BTreeSet::new()),
            now: 1_000,
            ids: 0,
            tickets: 0,
            random: 1,
            next: VecDeque::new(),
            running: VecDeque::new(),
            used: (0..NODES).map(|index| (node(index), vec![0; CARDS as usize])).collect(),
            nanoseconds: Vec::with_capacity(STEPS),
            timed: false,
        }
    }

    /// SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators).
    fn draw(&mut self, below: u64) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % below
    }

    fn step(&mut self, command: Command) {
        let at = Moment { wall: LedgerTime(START.saturating_add_unsigned(self.now)), steady: Steady(self.now) };
        self.ids += 1;
        let begun = Instant::now();
        let outcome = step(&mut self.state, at, IdSeed(self.ids << 32), command);
        let took = begun.elapsed();
        if self.timed {
            self.nanoseconds.push(u32::try_from(took.as_nanos()).unwrap_or(u32::MAX));
        }
        let Outcome { effects, violations, .. } = outcome;
        assert!(violations.is_empty(), "{violations:?}");
        for effect in effects {
            self.effect(effect);
        }
    }

    fn effect(&mut self, effect: Effect) {
        match effect {
            Effect::Write { account, page } => {
                self.next.push_back(Command::PageWritten { account, write_id: page.write_id.clone() });
            }
            Effect::Receipt { account, closed } => {
                self.next.push_back(Command::ReceiptWritten { account, lease: closed.hold.lease.clone() });
            }
            Effect::Start(order) => {
                let Order { node, lease, declared_ms, size, avoid, .. } = *order;
                let card = self.place(&node, size, &avoid);
                self.next.push_back(Command::Started {
                    node: node.clone(),
                    lease: lease.clone(),
                    slot: PickedSlot::Has(card),
                });
                self.next.push_back(Command::Running { node: node.clone(), lease: lease.clone() });
                let slots = if size == Size::Large { 1 } else { 2 };
                self.running.push_back(Running { node, lease, card, slots, declared_ms });
            }
            _ => {}
        }
    }

    /// The card that the node picks: the broker orders only what fits.
    fn place(&mut self, node: &NodeName, size: Size, avoid: &[u32]) -> u32 {
        let used = self.used.get_mut(node).expect("a known node");
        let mut occupancy = Occupancy::default();
        for (card, slots) in used.iter().enumerate() {
            occupancy.add(card as u32, *slots);
        }
        let cards: Vec<Card> = (0..CARDS).map(card).collect();
        let card = slots::pick(&cards, &occupancy, size, avoid).expect("room for what was ordered");
        used[card as usize] += if size == Size::Large { 1 } else { 2 };
        card
    }

    /// Until nothing follows from what happened.
    fn run(&mut self, steps: usize) -> usize {
        let mut done = 0;
        while done < steps {
            let Some(command) = self.next.pop_front() else { break };
            self.step(command);
            done += 1;
        }
        done
    }

    fn request(&mut self) {
        self.tickets += 1;
        let account = account(usize::try_from(self.draw(ACCOUNTS as u64)).unwrap_or(0));
        let at = usize::try_from(self.draw(NODES as u64)).unwrap_or(0);
        let space = self.draw(SPACES);
        let size = if self.draw(100) < 85 { Size::Large } else { Size::Xlarge };
        let declared_ms = (5 + 5 * self.draw(12)) * 1000;
        self.next.push_back(Command::Request(Box::new(Request {
            cookie: None,
            ticket: Ticket { agent_instance: format!("instance-{at}").into(), number: self.tickets },
            node: node(at),
            space: SpaceKey::new("demo", format!("space-{space}"), format!("00000000-0000-0000-0000-{space:012}")),
            revision: Revision::default(),
            worker: WorkerKey::new(format!("00000000-0000-0000-{at:04}-{space:012}"), "0123456789abcdef", 1),
            size,
            declared_ms,
            caller: Ok(account),
            budget: None,
            presented: None,
        })));
    }

    /// One lease comes to its end.
    fn end_one(&mut self) {
        let Some(Running { node, lease, card, slots, declared_ms }) = self.running.pop_front() else { return };
        if let Some(used) = self.used.get_mut(&node) {
            used[card as usize] -= slots;
        }
        let used_ms = declared_ms * (30 + self.draw(60)) / 100;
        let report = EndReport { ending: Ending::Released, used_ms };
        self.next.push_back(Command::Ended { node: node.clone(), lease: lease.clone(), report, kept: false });
        self.next.push_back(Command::Freed { node, lease, how: FreedAs::Free });
    }
}

fn policy() -> Policy {
    Policy {
        tier: "free".to_owned(),
        allowance: Allowance {
            per_cookie_ms: None,
            base_ms: 300_000,
            longest_call_ms: 120_000,
            runs_per_window: None,
            generation: 1,
            grants: Vec::new(),
        },
        concurrent: 2,
        priority: Priority::Medium,
        caller: CallerClass::Regular,
        deleting: false,
        conflict: None,
    }
}

/// An account that has been used today and is not in use now.
fn idle_page(index: usize) -> Page {
    Page {
        windows: vec![Window {
            start: LedgerTime(START - 3_600_000),
            base_ms: 300_000,
            charged_ms: (index % 60) as u64 * 1000,
            runs: 3,
            generation: 1,
        }],
        last_time: LedgerTime(START - 1000),
        seq: 7,
        write_id: format!("{index:026}"),
        epoch: Epoch(1),
        ..Page::default()
    }
}

fn main() {
    let json = std::env::args().any(|argument| argument == "--json");
    let mut bench = Bench::new();
    let before = ALLOCATED.load(Ordering::Relaxed);
    for index in 0..ACCOUNTS {
        let (account, page, policy) = (account(index), Box::new(idle_page(index)), policy());
        bench.step(Command::AccountSeen { account, page, policy });
    }
    let bytes_per_idle_account = (ALLOCATED.load(Ordering::Relaxed) - before) / ACCOUNTS;
    for index in 0..NODES {
        let node = node(index);
        let queue = QueueBounds { node: 2 * QUEUED, space: QUEUED, account: 16 };
        let settings = NodeSettings { queue, ..NodeSettings::default() };
        bench.step(Command::NodeSettings { node: node.clone(), settings });
        let agent_instance = format!("instance-{index}");
        bench.step(Command::NodeHello { node: node.clone(), agent_instance, highest_epoch: Epoch(0) });
        let cards = (0..CARDS).map(card).collect();
        bench.step(Command::NodeJoined { node, epoch: Epoch(1), cards, leases: Vec::new(), idle: Vec::new() });
    }
    while bench.state.queue.len() < QUEUED {
        bench.request();
        bench.run(usize::MAX);
    }
    bench.timed = true;
    let begun = Instant::now();
    let mut ticked = 0;
    while bench.nanoseconds.len() < STEPS {
        bench.now += 2;
        // As the shell does it: twice a second.
        if bench.now >= ticked + 500 {
            ticked = bench.now;
            bench.step(Command::Tick);
        }
        bench.end_one();
        bench.run(usize::MAX);
        while bench.state.queue.len() < QUEUED {
            bench.request();
            bench.run(usize::MAX);
        }
    }
    report(&mut bench.nanoseconds, begun.elapsed(), bytes_per_idle_account, json);
}

fn report(nanoseconds: &mut [u32], elapsed: Duration, bytes_per_idle_account: usize, json: bool) {
    let total: u64 = nanoseconds.iter().copied().map(u64::from).sum();
    nanoseconds.sort_unstable();
    let at = |permille: usize| f64::from(nanoseconds[(nanoseconds.len() - 1) * permille / 1000]) / 1000.0;
    let ops_per_s = nanoseconds.len() as f64 / (total as f64 / 1e9);
    if json {
        println!(
            "{{\"ops_per_s\":{ops_per_s:.0},\"decision_p99_us\":{:.1},\"bytes_per_idle_account\":{bytes_per_idle_account}}}",
            at(990)
        );
        return;
    }
    println!(
        "{ACCOUNTS} accounts, {QUEUED} requests that wait, {} steps in {:.1} s",
        nanoseconds.len(),
        elapsed.as_secs_f64()
    );
    println!("decide and apply, a second and core  {ops_per_s:>10.0}   goal 200000");
    println!("one decision, p50                    {:>10.1} us", at(500));
    println!("one decision, p99                    {:>10.1} us goal 50", at(990));
    println!("one decision, longest                {:>10.1} us", at(1000));
    println!("memory of an idle account            {bytes_per_idle_account:>10} bytes, goal 512");
}
