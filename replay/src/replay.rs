//! Replays a trace: events in integer milliseconds, ends before arrivals, then every policy decision that is possible.
//!
//! Not modelled: the time to start a worker and to clear a slot (leases end when they end; the limits around them count
//! in promises and reservations only), stickiness of idle workers, concurrency limits, and callers who give up.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap};

use spaceport_core::ids::Size;
use spaceport_core::queue::{LaneSettings, Priority, QueueBounds};

use crate::admission::{Admission, Hold, Quota, Refusal};
use crate::node::{Node, Running};
use crate::policy::{Offer, Policy, PolicyName, Start};
use crate::promise::{HoldLimits, Standing};
use crate::request::{Request, Trace};

/// What is replayed on, and by which rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rules {
    /// Nodes; a Space's calls go to one of them.
    pub nodes: usize,
    /// Cards of each.
    pub cards: u32,
    /// Times around a lease.
    pub limits: HoldLimits,
    /// Quota.
    pub quota: Quota,
    /// Bounds of the queue; None for no bounds.
    pub bounds: Option<QueueBounds>,
    /// Parameters of two-lane; the promise of every policy is made with its shares of the age lane.
    pub lanes: LaneSettings,
}

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It ran.
    Started {
        /// From its arrival to its start, milliseconds.
        wait_ms: u64,
        /// The longest wait that it was promised, milliseconds.
        promised_ms: u64,
        /// Node and card that it ran on.
        place: (usize, u32),
    },
    /// It did not.
    Refused(Refusal),
}

/// Outcomes of a trace, in its order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replay {
    /// One for each request.
    pub outcomes: Vec<Outcome>,
}

/// Replays a trace under a policy.
pub fn replay(trace: &Trace, policy: PolicyName, rules: &Rules) -> Replay {
    World::new(trace, policy, rules).run()
}

struct World<'a> {
    trace: &'a Trace,
    rules: &'a Rules,
    foresight: bool,
    sites: Vec<Site>,
    spaces: HashMap<u64, Space>,
    admission: Admission,
    ends: BinaryHeap<Reverse<(u64, usize)>>,
    running: BTreeMap<usize, Open>,
    longest_hold_ms: u64,
    pending: HashMap<usize, Pending>,
    outcomes: Vec<Outcome>,
}

/// A node with its queue.
struct Site {
    node: Node,
    policy: Box<dyn Policy>,
    /// Holds of those who wait, by class, lowest first.
    waiting_ms: [u64; 3],
    /// Those of them that wait for a whole card.
    wholes_ms: u64,
}

/// A Space stays on its node while anything of it waits or runs.
#[derive(Clone, Copy, Default)]
struct Space {
    site: usize,
    open: usize,
}

struct Pending {
    promised_ms: u64,
    site: usize,
    space: u64,
}

struct Open {
    hold: Hold,
    site: usize,
    space: u64,
}

// === impl Site ===

impl Site {
    /// Somebody joined the queue, or left it if the hold is negative.
    const fn count(&mut self, priority: Priority, size: Size, hold_ms: i64) {
        let waiting = &mut self.waiting_ms[priority as usize];
        *waiting = waiting.saturating_add_signed(hold_ms);
        if matches!(size, Size::Xlarge) {
            self.wholes_ms = self.wholes_ms.saturating_add_signed(hold_ms);
        }
    }
}

// === impl World ===

impl<'a> World<'a> {
    fn new(trace: &'a Trace, policy: PolicyName, rules: &'a Rules) -> Self {
        let site = || Site {
            node: Node::new(rules.cards),
            policy: policy.build(rules.lanes),
            waiting_ms: [0; 3],
            wholes_ms: 0,
        };
        let longest = trace.requests.iter().map(|request| request.declared_ms).max().unwrap_or(0);
        Self {
            trace,
            rules,
            foresight: policy.has_foresight(),
            sites: (0..rules.nodes.max(1)).map(|_| site()).collect(),
            spaces: HashMap::new(),
            admission: Admission::new(rules.quota, rules.bounds, trace.users.len(), rules.nodes.max(1)),
            ends: BinaryHeap::new(),
            running: BTreeMap::new(),
            longest_hold_ms: rules.limits.hold_ms(longest),
            pending: HashMap::new(),
            // Every request gets its own outcome below; a queue that never empties would be seen by `run`.
            outcomes: vec![Outcome::Refused(Refusal::QueueFull); trace.requests.len()],
        }
    }

    /// # Panics
    /// If the policy leaves requests waiting when everything has ended.
    fn run(mut self) -> Replay {
        let mut next = 0;
        // Each round handles at least one end or arrival, of which there are two a request at most.
        while let Some(now_ms) = self.next_event(next) {
            while let Some(&Reverse((at_ms, id))) = self.ends.peek()
                && at_ms <= now_ms
            {
                self.ends.pop();
                self.end(id);
            }
            while self.trace.requests.get(next).is_some_and(|request| request.arrival_ms <= now_ms) {
                self.arrive(now_ms, next);
                next += 1;
            }
            for site in 0..self.sites.len() {
                while let Some(start) = self.pick(site, now_ms) {
                    self.start(now_ms, site, start);
                }
            }
        }
        assert!(self.pending.is_empty(), "{} requests wait for ever", self.pending.len());
        Replay { outcomes: self.outcomes }
    }

    fn next_event(&self, next: usize) -> Option<u64> {
        let arrival = self.trace.requests.get(next).map(|request| request.arrival_ms);
        let end = self.ends.peek().map(|Reverse((at_ms, _))| *at_ms);
        arrival.into_iter().chain(end).min()
    }

    fn arrive(&mut self, now_ms: u64, id: usize) {
        let request = &self.trace.requests[id];
        let tier = self.trace.tier(request);
        let space = space_of(request);
        let site_index = self.site_of(space, now_ms);
        if let Err(refusal) = self.admission.arrive(now_ms, request, tier, site_index, space) {
            self.outcomes[id] = Outcome::Refused(refusal);
            return;
        }
        self.spaces.entry(space).or_default().open += 1;
        let priority = tier.priority();
        let site = &mut self.sites[site_index];
        let hold_ms = self.rules.limits.hold_ms(request.declared_ms);
        let standing = Standing {
            held_ms: site.node.held_ms(now_ms),
            ahead_ms: site.waiting_ms[priority as usize],
            wholes_ms: site.wholes_ms,
            longest_hold_ms: self.longest_hold_ms,
            slots: site.node.slots(),
            age_lane_percent: self.rules.lanes.age_percent,
            floor_percent: self.rules.lanes.floors[priority as usize],
        };
        let promised_ms = standing.latest_ms(request, hold_ms);
        self.pending.insert(id, Pending { promised_ms, site: site_index, space });
        site.count(priority, request.size, (hold_ms * request.slots()).cast_signed());
        let known_ms = if self.foresight { request.served_ms() } else { request.declared_ms };
        site.policy.arrive(Offer {
            id,
            size: request.size,
            priority,
            declared_ms: known_ms,
            hold_ms: if self.foresight { known_ms } else { hold_ms },
            used_percent: self.admission.used_percent(request.user, tier),
            function: request.function,
        });
    }

    /// The node of a Space: where it is busy, or else the least loaded one.
    fn site_of(&mut self, space: u64, now_ms: u64) -> usize {
        let entry = self.spaces.entry(space).or_default();
        if entry.open == 0 {
            let load = |site: &Site| site.node.held_ms(now_ms) + site.waiting_ms.iter().sum::<u64>();
            let least = self.sites.iter().enumerate().min_by_key(|(index, site)| (load(site), *index));
            entry.site = least.map_or(0, |(index, _)| index);
        }
        entry.site
    }

    fn pick(&mut self, site: usize, now_ms: u64) -> Option<Start> {
        let Site { node, policy, .. } = &mut self.sites[site];
        policy.pick(now_ms, node)
    }

    fn start(&mut self, now_ms: u64, site_index: usize, start: Start) {
        let Start { id, card } = start;
        let request = &self.trace.requests[id];
        let Some(Pending { promised_ms, site, space }) = self.pending.remove(&id) else {
            unreachable!("request {id} was started without waiting");
        };
        assert_eq!(site, site_index, "request {id} belongs to another node");
        let priority = self.trace.tier(request).priority();
        let limits = self.rules.limits;
        let known_ms = if self.foresight { request.served_ms() } else { limits.running_ms(request.declared_ms) };
        let site = &mut self.sites[site_index];
        let hold_ms = limits.hold_ms(request.declared_ms);
        site.count(priority, request.size, -(hold_ms * request.slots()).cast_signed());
        site.node.start(id, Running { card, size: request.size, deadline_ms: now_ms + known_ms });
        let hold = self.admission.start(now_ms, request, site_index, space);
        self.running.insert(id, Open { hold, site: site_index, space });
        self.ends.push(Reverse((now_ms + request.served_ms(), id)));
        let wait_ms = now_ms - request.arrival_ms;
        self.outcomes[id] = Outcome::Started { wait_ms, promised_ms, place: (site_index, card) };
    }

    fn end(&mut self, id: usize) {
        let request = &self.trace.requests[id];
        let Some(Open { hold, site, space }) = self.running.remove(&id) else { return };
        let site = &mut self.sites[site];
        site.node.end(id);
        site.policy.ended(id, request.served_ms());
        self.admission.end(hold, request.served_ms() * request.slots());
        if let Some(space) = self.spaces.get_mut(&space) {
            space.open -= 1;
        }
    }
}

/// A Space is a function where the trace names them, else everything of a user.
fn space_of(request: &Request) -> u64 {
    // Users and functions are numbered apart from each other.
    request.function.map_or((1 << 32) + request.user as u64, u64::from)
}
