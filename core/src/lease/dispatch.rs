//! Who gets the next slot: oldest first for each node, the head blocks (`queue`). At the end of a lease its slot is given
//! to the next one while it still clears (L14).

use std::collections::BTreeMap;

use super::Moment;
use super::change::PageChange;
use super::event::Event;
use super::mutant::Mutant;
use super::request::{Refusal, frees_in_ms, give_back};
use super::state::{Account, Node, SlotUse, State};
use crate::ids::{IdSeed, LeaseId, NodeName, Size};
use crate::page::Hold;
use crate::protocol::Denial;
use crate::queue::Waiting;
use crate::quota::{self, Admission};
use crate::slots::{self, Occupancy};

/// Takes at most one request out of the node's queue: it gets a slot or is refused. Empty when nothing can be done now.
pub fn dispatch(at: Moment, ids: &mut IdSeed, state: &State, name: &NodeName) -> Vec<Event> {
    let Some(node) = state.nodes.get(name).filter(|node| node.joined && !node.rests) else { return Vec::new() };
    // Nothing is granted by a wrong clock (L20), nor before the nodes had time to say what they have (L17).
    let early = !state.awaited.is_empty() && at.steady.0 < super::state::REJOIN_WAIT_MS;
    if early || state.ended.is_some() || state.clock_off_ms.is_some() {
        return Vec::new();
    }
    for waiting in state.queue.line(name).filter(|waiting| waiting.unconfirmed.is_none()) {
        let Some(account) = state.accounts.get(&waiting.account).filter(|account| !account.policy.deleting) else {
            return refuse(at, state, waiting, Denial::AccountDeleting);
        };
        let page = state.page_of(account);
        if account.is_blocked(page, at.steady) {
            // It waits for its own account, not for the node: it is passed, and keeps its place.
            continue;
        }
        let Some(slot) = find_slot(state, node, waiting.demand.size) else {
            if slots::possible(&node.cards, waiting.demand.size) {
                // The head blocks: whoever is behind it came later.
                return Vec::new();
            }
            return refuse(at, state, waiting, Denial::NoCapacity { size: waiting.demand.size });
        };
        let time = page.time(at.wall);
        let frees_in_ms = frees_in_ms(state, account, time);
        return match quota::admit(page, &account.policy.allowance, time, &waiting.demand, 0, frees_in_ms) {
            Ok(admission) => reserve(at, ids, state, account, waiting, slot, admission),
            Err(denial) => refuse(at, state, waiting, denial),
        };
    }
    Vec::new()
}

fn refuse(at: Moment, state: &State, waiting: &Waiting, denial: Denial) -> Vec<Event> {
    let mut events = vec![Event::Left { ticket: waiting.ticket.clone() }];
    events.extend(give_back(waiting, waiting.demand.needed_ms(), true));
    events.extend(Refusal::of(waiting).events(at, state, denial));
    events
}

fn reserve(
    at: Moment,
    ids: &mut IdSeed,
    state: &State,
    account: &Account,
    waiting: &Waiting,
    slot: FoundSlot,
    admission: Admission,
) -> Vec<Event> {
    let lease = waiting.lease.clone().unwrap_or_else(|| LeaseId::new(ids.draw()));
    let hold = Hold {
        lease: lease.clone(),
        space: waiting.space.clone(),
        parts: admission.parts,
        node: waiting.node.clone(),
        // Only the two-lane queue reserves cards for others; oldest first blocks instead.
        avoid: Vec::new(),
        size: waiting.demand.size,
        weight: waiting.demand.weight,
        declared_ms: waiting.demand.declared_ms,
        epoch: state.epoch,
        since: account.working.time(at.wall),
        after: slot.after.clone(),
        generation: account.policy.allowance.generation,
        via: waiting.via.clone(),
    };
    let change = PageChange::Hold { hold: Box::new(hold), window: admission.window, grants: admission.grants };
    let mut events = vec![
        Event::Changed { account: waiting.account.clone(), change, at: at.steady },
        Event::Reserved { lease: lease.clone(), waiting: Box::new(waiting.clone()), after: slot.after },
    ];
    if state.has(Mutant::OrderEarly) {
        let limits = state.settings(&waiting.node).limits;
        events.push(Event::Ordered { lease, at: at.steady, limits, waits_ms: 0 });
    }
    events
}

/// Room for one more lease.
struct FoundSlot {
    after: Option<LeaseId>,
}

/// Use of one card.
#[derive(Default)]
struct CardUse {
    /// Slots of leases that have theirs, or will have it as soon as their order arrives.
    taken: u32,
    /// Slots that clear.
    clearing: u32,
    /// Slots of leases that will get one that clears.
    following: u32,
}

/// Every card's use: what the node has said, and then each order that it has not answered yet where the node will put it.
/// The node says what it does in order, so what it has freed by its last word is free when those orders arrive; more may be
/// free by then, which never hurts: `large` leases fill what is begun. None if not all of them have a place: the broker's
/// picture is old, and nothing more is promised.
struct Picture<'a> {
    node: &'a Node,
    uses: BTreeMap<u32, CardUse>,
}

impl<'a> Picture<'a> {
    fn of(state: &'a State, node: &'a Node) -> Option<Self> {
        let mut picture = Self { node, uses: BTreeMap::new() };
        let mut unplaced = Vec::new();
        for lease in node.leases.iter().filter_map(|id| state.leases.get(id)) {
            match (lease.slot, lease.card) {
                (SlotUse::Free, _) => {}
                (_, None) => unplaced.push(lease),
                (SlotUse::Clearing, Some(card)) => picture.entry(card, lease.size, |card_use| &mut card_use.clearing),
                (SlotUse::Taken, Some(card)) => picture.entry(card, lease.size, |card_use| &mut card_use.taken),
            }
        }
        unplaced.sort_by_key(|lease| lease.number);
        for lease in unplaced {
            if lease.after.is_none()
                && let Some(card) = slots::pick(&node.cards, &picture.now(), lease.size, &[])
            {
                picture.entry(card, lease.size, |card_use| &mut card_use.taken);
            } else {
                let card = slots::pick(&node.cards, &picture.soon(), lease.size, &[])?;
                picture.entry(card, lease.size, |card_use| &mut card_use.following);
            }
        }
        Some(picture)
    }

    fn entry(&mut self, card: u32, size: Size, field: fn(&mut CardUse) -> &mut u32) {
        let slots = slots_of(self.node, card, size);
        let used = field(self.uses.entry(card).or_default());
        *used = used.saturating_add(slots);
    }

    fn occupancy(&self, used: fn(&CardUse) -> u32) -> Occupancy {
        let mut occupancy = Occupancy::default();
        for (card, card_use) in &self.uses {
            occupancy.add(*card, used(card_use));
        }
        occupancy
    }

    /// What is in use until more is freed.
    fn now(&self) -> Occupancy {
        self.occupancy(|card| card.taken.saturating_add(card.clearing.max(card.following)))
    }

    /// What will be in use when all that clears is free.
    fn soon(&self) -> Occupancy {
        self.occupancy(|card| card.taken.saturating_add(card.following))
    }
}

fn find_slot(state: &State, node: &Node, size: Size) -> Option<FoundSlot> {
    let picture = Picture::of(state, node)?;
    if slots::pick(&node.cards, &picture.now(), size, &[]).is_some() {
        return Some(FoundSlot { after: None });
    }
    let soon = picture.soon();
    let mut avoid = Vec::new();
    // Each round rules one card out.
    while let Some(card) = slots::pick(&node.cards, &soon, size, &avoid) {
        if let Some(after) = predecessor(state, node, card, size) {
            return Some(FoundSlot { after: Some(after) });
        }
        avoid.push(card);
    }
    None
}

fn slots_of(node: &Node, card: u32, size: Size) -> u32 {
    let found = node.cards.iter().find(|known| known.index == card);
    // A card that is gone from the inventory has no slots to give, so the number does not matter.
    found.map_or(1, |card| card.slots_of(size))
}

/// A lease on this card whose slot clears and is meant for nobody yet. A whole card is only handed over by the one lease
/// that still clears on it: an order can wait for one.
fn predecessor(state: &State, node: &Node, card: u32, size: Size) -> Option<LeaseId> {
    let leases = || node.leases.iter().filter_map(|id| Some((id, state.leases.get(id)?)));
    let clearing: Vec<_> =
        leases().filter(|(_, lease)| lease.card == Some(card) && lease.slot == SlotUse::Clearing).collect();
    if size == Size::Xlarge && clearing.len() != 1 {
        return None;
    }
    clearing
        .into_iter()
        .find(|(id, lease)| {
            let followers = leases().filter(|(_, other)| other.after.as_ref() == Some(id));
            let promised: u32 = followers.map(|(_, other)| slots_of(node, card, other.size)).sum();
            promised < slots_of(node, card, lease.size)
        })
        .map(|(id, _)| id.clone())
}
