//! What those who wait are told: how many are before them, when they can expect to begin, and when they begin at the latest
//! (invariant 11, docs/rules.md, Queue).

use std::sync::Arc;

use super::command::Limits;
use super::state::{Stage, State};
use crate::ids::{NodeName, Size, Steady};
use crate::queue::{Ahead, Lanes, Promise, Waiting};
use crate::slots;

impl State {
    /// What was told of a node's slots does not hold any more. Nor for a request whose order is on its way: it may come back
    /// to its place, and is told anew then.
    pub(super) fn withdraw_promises(&mut self, node: &NodeName) {
        self.queue.withdraw_promises(node);
        for id in self.nodes.get(node).into_iter().flat_map(|known| &known.leases) {
            let lease = self.leases.get_mut(id).filter(|lease| lease.stage < Stage::Running);
            let request = lease.and_then(|lease| lease.request.as_mut());
            if let Some(waiting) = request.filter(|waiting| waiting.promise.is_some()) {
                Arc::make_mut(waiting).promise = None;
            }
        }
    }
}

/// What its leases still hold of a node.
#[derive(Default)]
struct Held {
    /// If each runs as long as it declared, slot-milliseconds.
    expected_ms: u64,
    /// If each uses every limit, slot-milliseconds: R of docs/rules.md.
    longest_ms: u64,
    /// The longest of them, milliseconds.
    drain_ms: u64,
}

fn held(now: Steady, state: &State, node: &NodeName) -> Held {
    let Some(known) = state.nodes.get(node) else { return Held::default() };
    let mut held = Held::default();
    let whole = super::request::slots_of(state, node, Size::Xlarge);
    for holder in &known.holders {
        let slots = if holder.size == Size::Xlarge { whole } else { 1 };
        let drain_ms = holder.drained_by(now).since(now);
        let expected_ms = holder.declared_ms.saturating_sub(now.since(holder.sent.unwrap_or(now)));
        held.expected_ms = held.expected_ms.saturating_add(expected_ms.min(drain_ms).saturating_mul(slots));
        held.longest_ms = held.longest_ms.saturating_add(drain_ms.saturating_mul(slots));
        held.drain_ms = held.drain_ms.max(drain_ms);
    }
    held
}

fn slots_on(state: &State, node: &NodeName) -> u64 {
    let cards = state.nodes.get(node).map(|node| node.cards.as_slice()).unwrap_or_default();
    slots::capacity(cards, Size::Large).max(1)
}

/// The longest that anybody of the term can hold a slot of the node: whoever comes later may be next before us, but no
/// longer than this.
fn longest_ms(state: &State, limits: &Limits, waiting: &Waiting) -> u64 {
    let factor_percent = state.settings(&waiting.node).duration_factor_percent.max(100);
    let longest_call_ms = state.longest_call_ms.saturating_mul(factor_percent) / 100;
    limits.order_ttl_ms.saturating_add(limits.held_ms(longest_call_ms.max(waiting.demand.declared_ms)))
}

/// When a request that comes now begins at the latest, whoever comes after it (docs/rules.md, Queue):
/// (R + (A + d) / (phi s) + 6 H) / (C - 1) + H, and B more for a whole card.
///
/// A class that earns phi s / (1 - phi) for each slot-second out of turn can pay for those before it and for itself when
/// the lanes have used (A + d) / (phi s). 6 H is what can be under way when its turn comes: what the other two classes may
/// have saved, two slots for H each, and the start that makes up the last of it. One half idles at most while a card
/// drains, hence C - 1. The last H is that drain, which a half too may have to sit out. Whole cards pass one reservation,
/// one after the other, whatever their class: B is what all of them can hold.
pub(super) fn promise(now: Steady, state: &State, waiting: &Waiting) -> Promise {
    let settings = state.settings(&waiting.node);
    let held = held(now, state, &waiting.node);
    let (phi, class) = (settings.lanes.age_percent.clamp(1, 100), waiting.turn.class);
    let floor = settings.lanes.floors[class as usize].max(1);
    let lanes = state.queue.lanes(&waiting.node);
    // All of its class that wait are before it, and it is among them itself: A + d.
    let of_class_ms = lanes.map_or(0, |lanes| lanes.held_by_class_ms(class));
    let lanes_ms = of_class_ms.saturating_mul(100 * 100) / (phi * floor);
    let longest_ms = longest_ms(state, &settings.limits, waiting).max(held.drain_ms);
    let work_ms = held.longest_ms.saturating_add(lanes_ms).saturating_add(longest_ms.saturating_mul(6));
    let slots = slots_on(state, &waiting.node).saturating_sub(1).max(1);
    let in_line_ms = match waiting.demand.size {
        Size::Large => 0,
        Size::Xlarge => lanes.map_or(0, Lanes::whole_cards_hold_ms),
    };
    let wait_ms = (work_ms / slots).saturating_add(longest_ms).saturating_add(in_line_ms);
    Promise::new(now, wait_ms)
}

/// How many are before it, and when it can expect to begin if calls run as long as they are expected to.
pub(super) fn position(now: Steady, state: &State, waiting: &Waiting) -> (u32, u64) {
    let lanes = state.queue.lanes(&waiting.node);
    let Ahead { count, sum } =
        lanes.map(|lanes| lanes.ahead_by_key(waiting.turn.key, waiting.place)).unwrap_or_default();
    let work_ms = held(now, state, &waiting.node).expected_ms.saturating_add(sum);
    (u32::try_from(count).unwrap_or(u32::MAX).saturating_add(1), work_ms / slots_on(state, &waiting.node))
}
