//! Who gets the next slot of a node, as its lanes say (`queue`). At the end of a lease its slot is given to the next one
//! while it still clears (L14).

use std::sync::Arc;

use super::Moment;
use super::change::PageChange;
use super::event::Event;
use super::mutant::Mutant;
use super::request::{Refusal, frees_in_ms, give_back};
use super::state::{Account, Holder, Node, State};
use crate::ids::{IdSeed, LeaseId, NodeName, Size, Steady};
use crate::page::Hold;
use crate::protocol::Denial;
use crate::queue::{Choice, Fit, Lanes, Room, Waiting};
use crate::quota::{self, Admission};
use crate::slots;

/// Makes at most one decision about the node's queue: a request gets a slot, is refused, is passed because it waits for its
/// own account, or has a card kept for it. Empty when nothing can be done now.
pub fn dispatch(at: Moment, ids: &mut IdSeed, state: &State, name: &NodeName) -> Vec<Event> {
    let Some(node) = state.nodes.get(name).filter(|node| node.joined && !node.rests) else { return Vec::new() };
    // Nothing is granted by a wrong clock (L20), nor before the nodes had time to say what they have (L17).
    let early = !state.awaited.is_empty() && at.steady.0 < super::state::REJOIN_WAIT_MS;
    if early || state.ended.is_some() || state.clock_off_ms.is_some() {
        return Vec::new();
    }
    let Some(lanes) = state.queue.lanes(name).filter(|lanes| !lanes.is_empty()) else { return Vec::new() };
    if let Some(waiting) = impossible(state, node, name, lanes) {
        return refuse(at, state, waiting, Denial::NoCapacity { size: waiting.demand.size });
    }
    // The broker's picture of the node is old, or nobody could start: it is looked again when the node has said more.
    let Some(found) = Found::on(at.steady, node, lanes.reserved().is_some()) else { return Vec::new() };
    match lanes.next(&found.room()) {
        None => Vec::new(),
        Some(Choice::Reserve { place, lane }) => {
            let kept = |waiting: &Waiting| Event::CardKept { ticket: waiting.ticket.clone(), lane };
            state.queue.at(name, place).map(kept).into_iter().collect()
        }
        Some(Choice::Start { place, fit }) => {
            let Some(waiting) = state.queue.at(name, place) else { return Vec::new() };
            let mut events = start(at, ids, state, waiting, found.of(waiting.demand.size, fit));
            if fit == Fit::InsteadOfReserved {
                events.insert(0, Event::CardReleased { node: name.clone() });
            }
            events
        }
    }
}

/// Somebody who asks for a size that the node can not serve any more: a card was lost or set aside since.
fn impossible<'a>(state: &'a State, node: &Node, name: &NodeName, lanes: &Lanes) -> Option<&'a Waiting> {
    let place = [Size::Large, Size::Xlarge]
        .into_iter()
        .find_map(|size| lanes.first_of(size).filter(|_| !slots::possible(&node.cards, size)))?;
    state.queue.at(name, place)
}

/// A request has its turn.
fn start(at: Moment, ids: &mut IdSeed, state: &State, waiting: &Waiting, slot: Option<FoundSlot>) -> Vec<Event> {
    let Some(account) = state.accounts.get(&waiting.account).filter(|account| !account.policy.deleting) else {
        return refuse(at, state, waiting, Denial::AccountDeleting);
    };
    let page = state.page_of(account);
    if account.is_blocked(page, at.steady) {
        return vec![Event::Parked { ticket: waiting.ticket.clone() }];
    }
    let Some(slot) = slot else { return Vec::new() };
    let time = page.time(at.wall);
    let frees_in_ms = frees_in_ms(state, account, time);
    match quota::admit(page, &account.policy.allowance, time, &waiting.demand, 0, frees_in_ms) {
        Ok(admission) => reserve(at, ids, state, account, waiting, slot, admission),
        Err(denial) => refuse(at, state, waiting, denial),
    }
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
        avoid: slot.avoid.clone(),
        size: waiting.demand.size,
        weight: waiting.demand.weight,
        declared_ms: waiting.demand.declared_ms,
        epoch: state.epoch,
        since: account.working.time(at.wall),
        after: slot.after.clone(),
        generation: account.policy.allowance.generation,
        via: waiting.via.to_string(),
    };
    let change = PageChange::Hold { hold: Arc::new(hold), window: admission.window, grants: admission.grants };
    let mut events = vec![
        Event::Changed { account: waiting.account.clone(), change, at: at.steady },
        Event::Reserved {
            lease: lease.clone(),
            waiting: Box::new(waiting.clone()),
            after: slot.after,
            avoid: slot.avoid,
        },
    ];
    if state.has(Mutant::OrderEarly) {
        let limits = state.settings(&waiting.node).limits;
        events.push(Event::Ordered { lease, at: at.steady, limits, waits_ms: 0 });
    }
    events
}

/// Room for one more lease.
#[derive(Clone, Default)]
struct FoundSlot {
    /// It gets the slot that this lease clears.
    after: Option<LeaseId>,
    /// Cards that are kept for somebody else.
    avoid: Vec<u32>,
}

/// Where leases of each size could begin.
struct Found {
    /// A half on a card that is not reserved.
    large: Option<FoundSlot>,
    xlarge: Option<FoundSlot>,
    /// A half on the reserved card, with the time until that drains.
    on_reserved: Option<(FoundSlot, u64)>,
}

impl Found {
    /// None if the picture of the node does not hold.
    fn on(now: Steady, node: &Node, reserved: bool) -> Option<Self> {
        let picture = Picture::of(now, node)?;
        let xlarge = picture.slot(Size::Xlarge, &[]);
        // With room for a whole card nothing has to be kept.
        let kept = if reserved && xlarge.is_none() { picture.drains_first() } else { None };
        let avoid: Vec<u32> = kept.iter().map(|(card, _)| *card).collect();
        let large = picture.slot(Size::Large, &avoid);
        let on_reserved = kept.and_then(|(card, drained)| {
            let others: Vec<u32> = node.cards.iter().map(|card| card.index).filter(|index| *index != card).collect();
            picture.slot(Size::Large, &others).map(|slot| (slot, drained.since(now)))
        });
        Some(Self { large, xlarge, on_reserved })
    }

    fn room(&self) -> Room {
        Room {
            large: self.large.is_some(),
            xlarge: self.xlarge.is_some(),
            reserved_for_ms: self.on_reserved.as_ref().map(|(_, ms)| *ms),
        }
    }

    fn of(self, size: Size, fit: Fit) -> Option<FoundSlot> {
        match (size, fit) {
            (Size::Large, Fit::BeforeDrain | Fit::InsteadOfReserved) => self.on_reserved.map(|(slot, _)| slot),
            (Size::Large, Fit::Open) => self.large,
            (Size::Xlarge, _) => self.xlarge,
        }
    }
}

/// Use of one card.
#[derive(Clone, Default)]
struct CardUse {
    /// Slots of leases that have theirs, or will have it as soon as their order arrives.
    taken: u32,
    /// Slots that clear.
    clearing: u32,
    /// Slots of leases that will get one that clears.
    following: u32,
    /// When all of them have surely given it back.
    drained: Steady,
}

/// How a lease uses its slots.
#[derive(Clone, Copy)]
enum Use {
    Taken,
    Clearing,
    Following,
}

impl CardUse {
    /// What is in use until more is freed.
    fn now(&self) -> u32 {
        self.taken.saturating_add(self.clearing.max(self.following))
    }

    /// What will be in use when all that clears is free.
    const fn soon(&self) -> u32 {
        self.taken.saturating_add(self.following)
    }
}

/// Every card's use: what the node has said, and then each order that it has not answered yet where the node will put it.
/// The node says what it does in order, so what it has freed by its last word is free when those orders arrive; more may be
/// free by then, which never hurts: `large` leases fill what is begun. None if not all of them have a place: the broker's
/// picture is old, and nothing more is promised.
struct Picture<'a> {
    now: Steady,
    node: &'a Node,
    /// In the order of the node's cards.
    uses: Vec<CardUse>,
    /// Halves that were to wait for one to clear, and of which the node has not said where they are: if another card was clear
    /// first, they went there. What each of them avoids.
    halves_under_way: Vec<&'a [u32]>,
}

impl<'a> Picture<'a> {
    fn of(now: Steady, node: &'a Node) -> Option<Self> {
        let mut picture =
            Self { now, node, uses: vec![CardUse::default(); node.cards.len()], halves_under_way: Vec::new() };
        for holder in &node.holders {
            if let Some(card) = holder.card {
                picture.add(card, holder, if holder.clearing { Use::Clearing } else { Use::Taken });
            }
        }
        // In the order in which they were reserved.
        for holder in node.holders.iter().filter(|holder| holder.card.is_none()) {
            if holder.follows && holder.size == Size::Large {
                picture.halves_under_way.push(&holder.avoid);
            }
            let now = picture.pick(holder.size, &holder.avoid, CardUse::now).filter(|_| holder.after.is_none());
            match now {
                Some(card) => picture.add(card, holder, Use::Taken),
                None => {
                    let card = picture.pick(holder.size, &holder.avoid, CardUse::soon)?;
                    picture.add(card, holder, Use::Following);
                }
            }
        }
        Some(picture)
    }

    fn add(&mut self, card: u32, holder: &Holder, how: Use) {
        // A card that is gone from the inventory has no slots to give.
        let known = self.node.cards.iter().zip(&mut self.uses).find(|(known, _)| known.index == card);
        let Some((card, card_use)) = known else { return };
        let slots = card.slots_of(holder.size);
        card_use.drained = card_use.drained.max(holder.drained_by(self.now));
        let used = match how {
            Use::Taken => &mut card_use.taken,
            Use::Clearing => &mut card_use.clearing,
            Use::Following => &mut card_use.following,
        };
        *used = used.saturating_add(slots);
    }

    fn pick(&self, size: Size, avoid: &[u32], used: fn(&CardUse) -> u32) -> Option<u32> {
        slots::pick_by(&self.node.cards, |place, _| self.uses.get(place).map_or(0, used), size, avoid)
    }

    /// The card that can be had as a whole first, and when it is surely free. Leases that begin on it meanwhile are over by
    /// then and others avoid it, so while somebody waits for it that time only comes nearer.
    fn drains_first(&self) -> Option<(u32, Steady)> {
        let cards = self.node.cards.iter().zip(&self.uses);
        cards
            .filter(|(card, _)| slots::possible(std::slice::from_ref(*card), Size::Xlarge))
            .map(|(card, card_use)| (card.index, card_use.drained.max(self.now)))
            .min_by_key(|(index, drained)| (*drained, *index))
    }

    fn slot(&self, size: Size, avoid: &[u32]) -> Option<FoundSlot> {
        let mut passed = avoid.to_vec();
        if size == Size::Xlarge {
            // A whole card that is clear, or will be, may be a half's by then, unless that half avoids it.
            let is_open = |card: u32| self.halves_under_way.iter().all(|avoided| avoided.contains(&card));
            passed.extend(self.node.cards.iter().map(|card| card.index).filter(|card| !is_open(*card)));
        }
        if self.pick(size, &passed, CardUse::now).is_some() {
            return Some(FoundSlot { after: None, avoid: avoid.to_vec() });
        }
        if !self.uses.iter().any(|card_use| card_use.clearing > 0) {
            return None;
        }
        // Each round rules one card out.
        while let Some(card) = self.pick(size, &passed, CardUse::soon) {
            if let Some(after) = predecessor(self.node, card, size) {
                return Some(FoundSlot { after: Some(after), avoid: avoid.to_vec() });
            }
            passed.push(card);
        }
        None
    }
}

fn slots_of(node: &Node, card: u32, size: Size) -> u32 {
    let found = node.cards.iter().find(|known| known.index == card);
    // A card that is gone from the inventory has no slots to give, so the number does not matter.
    found.map_or(1, |card| card.slots_of(size))
}

/// A lease on this card whose slot clears and is meant for nobody yet. A whole card is only handed over by the one lease
/// that still clears on it: an order can wait for one.
fn predecessor(node: &Node, card: u32, size: Size) -> Option<LeaseId> {
    let mut clearing = node.holders.iter().filter(|holder| holder.card == Some(card) && holder.clearing);
    if size == Size::Xlarge && clearing.clone().count() != 1 {
        return None;
    }
    let is_free = |holder: &&Holder| {
        let followers = node.holders.iter().filter(|other| other.after.as_ref() == Some(&holder.lease));
        let promised: u32 = followers.map(|other| slots_of(node, card, other.size)).sum();
        promised < slots_of(node, card, holder.size)
    };
    clearing.find(is_free).map(|holder| holder.lease.clone())
}
