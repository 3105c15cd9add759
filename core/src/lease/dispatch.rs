//! Who gets the next slot of a node, as its lanes say (`queue`). At the end of a lease its slot is given to the next one
//! while it still clears (L14).

use std::sync::Arc;

use super::Moment;
use super::change::PageChange;
use super::command::IdleWorker;
use super::event::{Departure, Event};
use super::mutant::Mutant;
use super::request::{Refusal, check_turn, explained, frees_in};
use super::state::{Account, Holder, Lease, Node, State};
use crate::ids::{IdSeed, LeaseId, NodeName, Size, Steady};
use crate::page::{CookieWindow, Hold};
use crate::protocol::{Denial, UnauthenticatedReason};
use crate::queue::{Choice, Fit, Lanes, Room, Waiting, WaitsFor};
use crate::quota::{self, Admission, Payer, Queued};
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
    // No card is kept for somebody who could not have it if it were free.
    let reserved = lanes.reserved().and_then(|place| state.queue.at(name, place));
    if let Some(parked) = reserved.and_then(|waiting| parked(at, state, waiting)) {
        return vec![parked];
    }
    // The broker's picture of the node is old, or nobody could start: it is looked again when the node has said more.
    let Some(found) = Found::on(at.steady, node, lanes.reserved().is_some()) else { return Vec::new() };
    let own = |idle: &&IdleWorker| state.queue.ready_for(name, idle.worker.as_ref()?, idle.size);
    let kept: Vec<u64> = found.idle.iter().filter_map(own).collect();
    match lanes.next(&found.room(), &kept) {
        None => Vec::new(),
        Some(Choice::Reserve { place, lane }) => {
            let kept = |waiting: &Arc<Waiting>| {
                let kept = || Event::CardKept { ticket: waiting.ticket.clone(), lane };
                parked(at, state, waiting).unwrap_or_else(kept)
            };
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
    state.queue.at(name, place).map(Arc::as_ref)
}

/// A request has its turn.
fn start(at: Moment, ids: &mut IdSeed, state: &State, waiting: &Arc<Waiting>, slot: Option<FoundSlot>) -> Vec<Event> {
    let Some(account) = state.accounts.get(&waiting.account).filter(|account| !account.policy.deleting) else {
        return refuse(at, state, waiting, Denial::AccountDeleting);
    };
    if account.policy.conflict.is_some() {
        let reason = UnauthenticatedReason::IdentityConflict;
        return refuse(at, state, waiting, Denial::Unauthenticated { reason });
    }
    if let Some(parked) = parked(at, state, waiting) {
        return vec![parked];
    }
    let page = state.page_of(account);
    let Some(slot) = slot else { return Vec::new() };
    let time = page.time(at.wall);
    let frees_in = frees_in(state, account, waiting.cookie.as_ref(), time);
    let allowance = state.allowance_of(account);
    let payer = Payer { page, allowance: &allowance, cookie: waiting.cookie.as_ref(), at: time };
    // Less may be left than when it came. Its place in the queue was given for more, which harms nobody.
    let clamps = state.space_settings(&waiting.space.uid).clamp_to_remaining;
    let demand = if clamps { quota::clamp(payer, waiting.demand, Queued::default()) } else { waiting.demand };
    let admission = match quota::admit(payer, &demand, Queued::default(), frees_in) {
        Ok(admission) => admission,
        Err(denial) => {
            let settings = state.settings(&waiting.node);
            return refuse(at, state, waiting, explained(settings, &account.policy.tier, payer, &demand, denial));
        }
    };
    if let Err(denial) = check_turn(state, page, waiting, demand.needed_ms()) {
        return refuse(at, state, waiting, denial);
    }
    let waiting = if demand == waiting.demand {
        Arc::clone(waiting)
    } else {
        Arc::new(Waiting { demand, ..Waiting::clone(waiting) })
    };
    reserve(at, ids, state, account, waiting, slot, admission)
}

/// It has its turn, but its own account or Space may have no other lease now.
fn parked(at: Moment, state: &State, waiting: &Waiting) -> Option<Event> {
    let account = state.accounts.get(&waiting.account)?;
    let waits_for = if account.is_blocked(state.page_of(account), waiting.cookie.as_ref(), at.steady) {
        WaitsFor::Account
    } else if state.is_space_full(&waiting.space.uid) {
        WaitsFor::Space
    } else {
        return None;
    };
    Some(Event::Parked { ticket: waiting.ticket.clone(), waits_for })
}

fn refuse(at: Moment, state: &State, waiting: &Waiting, denial: Denial) -> Vec<Event> {
    let mut events = vec![Event::Left { ticket: waiting.ticket.clone(), why: Departure::Refused }];
    events.extend(Refusal::of(waiting).events(at, state, denial));
    events
}

fn reserve(
    at: Moment,
    ids: &mut IdSeed,
    state: &State,
    account: &Account,
    waiting: Arc<Waiting>,
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
        cookie: admission.cookie.as_ref().map(|row| CookieWindow { cookie: row.cookie.clone(), start: row.start }),
        shortened: waiting.demand.shortened,
        budget: waiting.budget.clone(),
    };
    let change = PageChange::Hold {
        hold: Arc::new(hold),
        window: admission.window,
        grants: admission.grants,
        cookie: admission.cookie.map(Box::new),
    };
    let limits = state.settings(&waiting.node).limits;
    let mut events = vec![
        Event::Changed { account: waiting.account.clone(), change, at: at.steady },
        Event::Reserved { lease: lease.clone(), waiting, after: slot.after, avoid: slot.avoid, at: at.steady },
    ];
    if state.has(Mutant::OrderEarly) {
        events.push(Event::Ordered { lease, at: at.steady, limits, waits_ms: 0, avoid: Vec::new() });
    }
    events
}

/// Cards that an order avoids which leaves now: those of its hold, and those of leases that it overtakes, for the writes of
/// their pages take longer. Its node gives slots in the order in which it gets the orders.
pub(super) fn avoided(now: Steady, state: &State, id: &LeaseId, lease: &Lease) -> Vec<u32> {
    let mut avoid = lease.avoid.clone();
    let Some(node) = state.nodes.get(&lease.node) else { return avoid };
    // What one account has reserved leaves in order.
    let of_another = |other: &LeaseId| state.leases.get(other).is_some_and(|other| other.account != lease.account);
    let is_overtaken = |other: &Holder| other.sent.is_none() && other.number < lease.number && of_another(&other.lease);
    // Mostly nobody is: then the picture is not needed.
    if !node.holders.iter().any(is_overtaken) {
        return avoid;
    }
    let Some(Picture { under_way, .. }) = Picture::of(now, node) else { return avoid };
    let own = under_way.iter().find(|(holder, _)| holder.lease == *id).map(|(_, card)| *card);
    let overtaken = under_way.iter().filter(|(holder, _)| is_overtaken(holder)).map(|(_, card)| *card);
    // Two halves of one card do not stand in each other's way.
    avoid.extend(overtaken.filter(|card| Some(*card) != own));
    avoid.sort_unstable();
    avoid.dedup();
    avoid
}

/// Room for one more lease.
struct FoundSlot {
    /// It gets the slot that this lease clears.
    after: Option<LeaseId>,
    /// Cards that are kept for somebody else.
    avoid: Vec<u32>,
}

/// Where a lease could begin.
struct Opening {
    /// When this one has given its slot back; None: at once.
    after: Option<LeaseId>,
}

/// Where leases of each size could begin.
struct Found<'a> {
    now: Steady,
    node: &'a Node,
    /// The card that is kept for who has the reservation, and when it drains.
    kept: Option<(u32, Steady)>,
    /// A half on a card that is not kept.
    large: Option<Opening>,
    xlarge: Option<Opening>,
    /// A half on the card that is kept.
    on_reserved: Option<Opening>,
    /// Workers that a call of their own function would find there (L16).
    idle: Vec<&'a IdleWorker>,
}

impl<'a> Found<'a> {
    /// None if the picture of the node does not hold.
    fn on(now: Steady, node: &'a Node, reserved: bool) -> Option<Self> {
        let picture = Picture::of(now, node)?;
        // Halves that were to wait for one to clear: if another card is clear first, they go there.
        let xlarge = picture.slot(Size::Xlarge, |card| picture.is_open(card, |half, _| half.follows));
        // With room for a whole card nothing has to be kept.
        let kept = if reserved && xlarge.is_none() { picture.drains_first() } else { None };
        let is_kept = |card| kept.is_some_and(|(kept, _)| kept == card);
        // A half that is meant for the card that is kept can go elsewhere, and who avoids that card could not go there instead.
        let large = picture.slot(Size::Large, |card| !is_kept(card) && picture.is_open(card, |_, card| is_kept(card)));
        // Nor is that card promised while a half that was to wait for another one may find it clear first.
        let is_ours = |card| is_kept(card) && picture.is_open(card, |half, _| half.follows);
        let on_reserved = if kept.is_some() { picture.slot(Size::Large, is_ours) } else { None };
        // A half goes to the card that is kept for somebody else only where there is no other, see `of`.
        let (to_kept, mut idle) = (large.is_none(), picture.idle);
        idle.retain(|idle| idle.size == Size::Xlarge || is_kept(idle.card) == to_kept);
        Some(Self { now, node, kept, large, xlarge, on_reserved, idle })
    }

    fn room(&self) -> Room {
        let drains_in_ms = self.kept.map(|(_, drained)| drained.since(self.now));
        Room {
            large: self.large.is_some(),
            xlarge: self.xlarge.is_some(),
            reserved_for_ms: drains_in_ms.filter(|_| self.on_reserved.is_some()),
        }
    }

    fn of(self, size: Size, fit: Fit) -> Option<FoundSlot> {
        let is_kept = |card: u32| self.kept.is_some_and(|(kept, _)| kept == card);
        let avoid = |avoided: &dyn Fn(u32) -> bool| {
            self.node.cards.iter().map(|card| card.index).filter(|card| avoided(*card)).collect()
        };
        match (size, fit) {
            (Size::Large, Fit::BeforeDrain | Fit::InsteadOfReserved) => {
                self.on_reserved.map(|Opening { after }| FoundSlot { after, avoid: avoid(&|card| !is_kept(card)) })
            }
            (Size::Large, Fit::Open) => self.large.map(|Opening { after }| FoundSlot { after, avoid: avoid(&is_kept) }),
            (Size::Xlarge, _) => self.xlarge.map(|Opening { after }| FoundSlot { after, avoid: Vec::new() }),
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
    /// Slots of workers that are kept: as good as free (L16).
    idle: u32,
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

    /// What is in use or kept.
    fn beside_idle(&self) -> u32 {
        self.now().saturating_add(self.idle)
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
    /// Workers that are kept, and that no order takes or ends.
    idle: Vec<&'a IdleWorker>,
    /// Leases of which the node has not said where they are or will be, and the card that each gets unless another one is
    /// clear first.
    under_way: Vec<(&'a Holder, u32)>,
}

impl<'a> Picture<'a> {
    fn of(now: Steady, node: &'a Node) -> Option<Self> {
        let uses = vec![CardUse::default(); node.cards.len()];
        let mut picture = Self { now, node, uses, idle: Vec::new(), under_way: Vec::new() };
        for holder in &node.holders {
            match (holder.card, holder.awaits) {
                (Some(card), _) => picture.add(card, holder, if holder.clearing { Use::Clearing } else { Use::Taken }),
                (None, Some(card)) => picture.add(card, holder, Use::Following),
                (None, None) => {}
            }
        }
        // Those first that clear: how much they leave for the others.
        let (leaving, kept): (Vec<_>, Vec<_>) = node.idle.iter().partition(|idle| idle.worker.is_none());
        leaving.into_iter().chain(kept).for_each(|idle| picture.keep(idle));
        // In the order in which they were reserved. An order that leaves earlier keeps off the cards of those before it.
        for holder in node.holders.iter().filter(|holder| holder.card.is_none() && holder.awaits.is_none()) {
            let now = if holder.after.is_none() { picture.pick_now(holder) } else { None };
            let (card, how) = match now {
                Some(card) => (card, Use::Taken),
                None => {
                    let allowed = |card| !holder.avoid.contains(&card);
                    (picture.pick(holder.size, CardUse::soon, allowed)?, Use::Following)
                }
            };
            picture.add(card, holder, how);
            picture.under_way.push((holder, card));
        }
        Some(picture)
    }

    fn add(&mut self, card: u32, holder: &Holder, how: Use) {
        // A card that is gone from the inventory has no slots to give.
        let Some(place) = self.place_of(card) else { return };
        let node = self.node;
        let (card, card_use) = (&node.cards[place], &mut self.uses[place]);
        let slots = card.slots_of(holder.size);
        card_use.drained = card_use.drained.max(holder.drained_by(self.now));
        let used = match how {
            Use::Taken => &mut card_use.taken,
            Use::Clearing => &mut card_use.clearing,
            Use::Following => &mut card_use.following,
        };
        *used = used.saturating_add(slots);
        // Workers that are kept make room: the first of the card, for its node gives its slots in their order.
        while self.uses[place].beside_idle() > card.large_slots.saturating_sub(card.quarantined_slots) {
            let Some(first) = self.idle.iter().position(|idle| idle.card == card.index) else { break };
            self.take_idle(first);
        }
    }

    /// Counts a worker that is kept, or clears because it has to go. One that is kept where there is no slot for it, as its
    /// node says, is none: the node gains nothing by it.
    fn keep(&mut self, idle: &'a IdleWorker) {
        let Some(place) = self.place_of(idle.card) else { return };
        let card = &self.node.cards[place];
        let slots = card.slots_of(idle.size);
        let card_use = &mut self.uses[place];
        if idle.worker.is_none() {
            card_use.clearing = card_use.clearing.saturating_add(slots);
            return;
        }
        let used = card_use.beside_idle().saturating_add(card.quarantined_slots);
        if card.fits(idle.size) && used.saturating_add(slots) <= card.large_slots {
            card_use.idle += slots;
            self.idle.push(idle);
        }
    }

    /// A worker is not kept any more: a lease has it, or its slot.
    fn take_idle(&mut self, index: usize) -> u32 {
        let idle = self.idle.remove(index);
        if let Some(place) = self.place_of(idle.card) {
            let slots = self.node.cards[place].slots_of(idle.size);
            self.uses[place].idle = self.uses[place].idle.saturating_sub(slots);
        }
        idle.card
    }

    /// Where the node puts an order that comes now, if it has a slot that is clear or kept: with its own worker, else where
    /// no worker has to go, else anywhere.
    fn pick_now(&mut self, holder: &Holder) -> Option<u32> {
        let allowed = |card: u32| !holder.avoid.contains(&card);
        let is_own = |idle: &IdleWorker| idle.worker == holder.worker && idle.size == holder.size;
        let own = self.idle.iter().position(|idle| is_own(idle) && allowed(idle.card));
        if let Some(own) = own {
            return Some(self.take_idle(own));
        }
        let beside_idle = self.pick(holder.size, CardUse::beside_idle, allowed);
        beside_idle.or_else(|| self.pick(holder.size, CardUse::now, allowed))
    }

    /// Where a card is in the inventory: mostly where its index says.
    fn place_of(&self, index: u32) -> Option<usize> {
        let (cards, likely) = (&self.node.cards, usize::try_from(index).ok()?);
        if cards.get(likely).is_some_and(|card| card.index == index) {
            return Some(likely);
        }
        cards.iter().position(|card| card.index == index)
    }

    fn pick(&self, size: Size, used: impl Fn(&CardUse) -> u32, allowed: impl Fn(u32) -> bool) -> Option<u32> {
        slots::pick_by(&self.node.cards, |place, _| self.uses.get(place).map_or(0, &used), size, allowed)
    }

    /// A card that is clear, or will be, may be one of these halves' by then, unless that half avoids it.
    fn is_open(&self, card: u32, which: impl Fn(&Holder, u32) -> bool) -> bool {
        let halves = self.under_way.iter().filter(|(holder, card)| holder.size == Size::Large && which(holder, *card));
        halves.map(|(half, _)| half).all(|half| half.avoid.contains(&card))
    }

    /// The card that can be had as a whole first, and when it is surely free. Leases that begin on it meanwhile are over by
    /// then and others avoid it, so while somebody waits for it that time only comes nearer.
    fn drains_first(&self) -> Option<(u32, Steady)> {
        let cards = self.node.cards.iter().zip(&self.uses);
        cards
            .filter(|(card, _)| card.fits(Size::Xlarge))
            .map(|(card, card_use)| (card.index, card_use.drained.max(self.now)))
            .min_by_key(|(index, drained)| (*drained, *index))
    }

    /// Where a lease of this size could begin on one of the cards that are allowed.
    fn slot(&self, size: Size, allowed: impl Fn(u32) -> bool) -> Option<Opening> {
        if self.pick(size, CardUse::now, &allowed).is_some() {
            return Some(Opening { after: None });
        }
        if !self.uses.iter().any(|card_use| card_use.clearing > 0) {
            return None;
        }
        let mut passed = Vec::new();
        // Each round rules one card out.
        while let Some(card) = self.pick(size, CardUse::soon, |card| allowed(card) && !passed.contains(&card)) {
            if let Some(after) = predecessor(self.node, card, size) {
                return Some(Opening { after: Some(after) });
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
