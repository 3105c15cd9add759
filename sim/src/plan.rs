//! The world that a seed stands for: how many of everything, what they may do, and the weather.

use std::collections::BTreeMap;

use spaceport_core::ids::{AccountName, Epoch, LedgerTime, NodeName, SpaceKey};
use spaceport_core::lease::{Limits, Policy, Priority, SpaceSettings};
use spaceport_core::page::{Page, Window};
use spaceport_core::protocol::CallerClass;
use spaceport_core::queue::QueueBounds;
use spaceport_core::quota::{Allowance, Grant, WINDOW_MS};

use crate::broken::Broken;
use crate::random::Random;
use crate::weather::Weather;

/// Wall clock at the beginning of every history, milliseconds since the Unix epoch.
pub const START: LedgerTime = LedgerTime(1_800_000_000_000);

/// The other limits that a pool may have. None is above the defaults, which is what a new leader takes for the limits of a
/// lease of an earlier term: so they are never too short (docs/status.md).
pub const QUICK: Limits = Limits { allow_limit_ms: 3_000, grace_ms: 500, clear_limit_ms: 1_000, order_ttl_ms: 4_000 };

/// A world.
#[derive(Clone, Debug)]
pub struct Plan {
    /// What everything follows from.
    pub seed: u64,
    /// Nodes.
    pub nodes: Vec<NodePlan>,
    /// Accounts.
    pub accounts: Vec<AccountPlan>,
    /// Spaces.
    pub spaces: Vec<SpaceKey>,
    /// What their owners chose, by uid.
    pub chosen: BTreeMap<String, SpaceSettings>,
    /// Tokens that calls come with.
    pub tokens: Vec<TokenPlan>,
    /// Calls that clients make, retries apart.
    pub calls: u64,
    /// Mean time between two of them, milliseconds.
    pub call_gap_ms: u64,
    /// Longest declared time of a call, milliseconds.
    pub declared_max_ms: u64,
    /// Bounds of the queues.
    pub queue: QueueBounds,
    /// Longest undisturbed way of a message, milliseconds.
    pub latency_ms: u64,
    /// Nodes keep workers also where others wait, who may be preferred for theirs then. The agent does not, but a broker has
    /// to do with what nodes do.
    pub keeps_eagerly: bool,
    /// Faults.
    pub weather: Weather,
    /// What is wrong on purpose.
    pub broken: Option<Broken>,
}

/// A node.
#[derive(Clone, Debug)]
pub struct NodePlan {
    /// Its name.
    pub name: NodeName,
    /// `large` slots of each card.
    pub cards: Vec<u32>,
    /// Limits of its pool.
    pub limits: Limits,
}

/// An account.
#[derive(Clone, Debug)]
pub struct AccountPlan {
    /// Its name.
    pub name: AccountName,
    /// What it may do at first.
    pub policy: Policy,
    /// What it did before.
    pub page: Page,
}

/// A token, which several calls may begin with.
#[derive(Clone, Debug)]
pub struct TokenPlan {
    /// Its `root_jti`.
    pub root: String,
    /// Whose it is: an index into the accounts.
    pub account: usize,
    /// Weighted milliseconds that it is worth.
    pub max_ms: u64,
    /// Calls that it is worth.
    pub max_calls: u64,
    /// When it is worth nothing any more; of half of the seeds long after all is over.
    pub expires: LedgerTime,
}

// === impl Plan ===

impl Plan {
    /// The world of a seed.
    pub fn of(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let weather = Weather::draw(&mut random);
        let nodes = (1..=random.between(1, 3)).map(|number| node(number, &mut random)).collect();
        let mut accounts: Vec<AccountPlan> =
            (0..random.between(2, 4)).map(|number| account(number, &mut random)).collect();
        let mut tokens: Vec<TokenPlan> =
            (0..random.between(1, 4)).map(|number| token(number, accounts.len(), &mut random)).collect();
        let spaces: Vec<SpaceKey> = (0..random.between(1, 2)).map(space).collect();
        // In a quarter of the histories, and drawn apart: the others are told as they always were.
        let mut chosen = BTreeMap::new();
        if seed % 4 == 3 {
            let mut random = Random::new(seed ^ 0x6775_6573_7473);
            accounts.push(guests(&mut random));
            chosen = spaces.iter().map(|space| (space.uid.clone(), choice(&mut random))).collect();
        }
        if seed % 2 == 1 {
            // Drawn apart, as the guests are.
            let mut random = Random::new(seed ^ 0x746f_6b65_6e73);
            tokens.iter_mut().for_each(|token| token.expires = START.plus(random.between(10_000, 120_000)));
        }
        Self {
            seed,
            nodes,
            accounts,
            spaces,
            chosen,
            tokens,
            calls: random.between(8, 40),
            call_gap_ms: random.between(100, 3_000),
            declared_max_ms: random.between(5_000, 30_000),
            queue: queue(&mut random),
            latency_ms: random.between(2, 40),
            keeps_eagerly: seed.is_multiple_of(2),
            weather,
            broken: None,
        }
    }

    /// The same world without a fault.
    #[must_use]
    pub fn calm(self) -> Self {
        Self { weather: Weather::calm(), ..self }
    }
}

fn node(number: u64, random: &mut Random) -> NodePlan {
    let large_slots = if random.chance(150) { 1 } else { 2 };
    NodePlan {
        name: NodeName::new(format!("gpu-{number}")),
        cards: (0..random.between(1, 3)).map(|_| large_slots).collect(),
        limits: if random.chance(500) { Limits::default() } else { QUICK },
    }
}

fn queue(random: &mut Random) -> QueueBounds {
    if random.chance(700) {
        return QueueBounds::default();
    }
    QueueBounds { node: 6, space: 5, account: 2 }
}

fn space(number: u64) -> SpaceKey {
    SpaceKey::new("lab", format!("space-{number}"), format!("s{number}"))
}

fn token(number: u64, accounts: usize, random: &mut Random) -> TokenPlan {
    TokenPlan {
        root: format!("root-{number}"),
        account: usize::try_from(random.below(accounts as u64)).unwrap_or_default(),
        max_ms: random.between(20_000, 200_000),
        max_calls: random.between(2, 12),
        expires: START.plus(40 * WINDOW_MS),
    }
}

fn account(number: u64, random: &mut Random) -> AccountPlan {
    let name = AccountName::new(["ann", "bob", "eve", "joe"][usize::try_from(number % 4).unwrap_or_default()]);
    let base_ms = random.between(20_000, 150_000);
    let grants = (0..random.between(0, 2)).map(|number| grant(&format!("{name}-g{number}"), 0, random)).collect();
    let policy = Policy {
        tier: "demo".into(),
        allowance: Allowance {
            per_cookie_ms: None,
            base_ms,
            longest_call_ms: 50_000,
            runs_per_window: random.chance(250).then(|| random.between(2, 8)),
            generation: 1,
            grants,
        },
        concurrent: u32::try_from(random.between(1, 4)).unwrap_or(1),
        priority: *random.pick(&[Priority::Low, Priority::Medium, Priority::Highest]).unwrap_or(&Priority::Medium),
        caller: *random.pick(&[CallerClass::Guest, CallerClass::Regular]).unwrap_or(&CallerClass::Regular),
        deleting: false,
        conflict: None,
    };
    // Half of the accounts come with a window that ends soon.
    let page = if random.chance(500) { used(base_ms, random) } else { Page::default() };
    AccountPlan { name, policy, page }
}

/// An address prefix, with limits that its few visitors reach.
fn guests(random: &mut Random) -> AccountPlan {
    let policy = Policy {
        tier: "guest".into(),
        allowance: Allowance {
            base_ms: random.between(20_000, 120_000),
            per_cookie_ms: Some(random.between(10_000, 60_000)),
            longest_call_ms: 50_000,
            runs_per_window: random.chance(250).then(|| random.between(2, 8)),
            generation: 1,
            grants: Vec::new(),
        },
        concurrent: u32::try_from(random.between(1, 2)).unwrap_or(1),
        priority: Priority::Low,
        caller: CallerClass::Guest,
        deleting: false,
        conflict: None,
    };
    AccountPlan { name: AccountName::new("guest-0af3"), policy, page: Page::default() }
}

fn choice(random: &mut Random) -> SpaceSettings {
    SpaceSettings {
        concurrent: random.chance(600).then(|| u32::try_from(random.between(1, 3)).unwrap_or(1)),
        clamp_to_remaining: random.chance(500),
        learned_reservation: random.chance(500),
    }
}

/// A grant as an admin makes it at `now_ms`: for long, or until soon.
pub fn grant(uid: &str, now_ms: u64, random: &mut Random) -> Grant {
    let lasts_ms = if random.chance(500) { 40 * WINDOW_MS } else { random.between(5_000, 60_000) };
    Grant { uid: uid.to_owned(), ms: random.between(5_000, 60_000), expires: START.plus(now_ms + lasts_ms) }
}

fn used(base_ms: u64, random: &mut Random) -> Page {
    let ends_in_ms = i64::try_from(random.between(3_000, 60_000)).unwrap_or_default();
    let start = LedgerTime(START.0 + ends_in_ms - i64::try_from(WINDOW_MS).unwrap_or_default());
    Page {
        windows: vec![Window { start, base_ms, charged_ms: random.between(1, base_ms / 2), runs: 1, generation: 1 }],
        last_time: start,
        seq: 1,
        write_id: "before".to_owned(),
        epoch: Epoch(0),
        ..Page::default()
    }
}
