//! One queue in one order: strict, where a blocked head blocks everyone, or with EASY backfill (Lifka, The ANL/IBM SP
//! scheduling system, 1995): the head gets a reservation, and whoever does not delay it may pass.

use std::collections::BTreeMap;

use spaceport_core::ids::Size;

use super::line::Line;
use super::reservation::{HalfRoom, Reservation};
use super::{Offer, Policy, Start};
use crate::node::Node;

/// The order of an [`Ordered`] queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// As they come.
    Arrival,
    /// Least declared time x slots first (with foresight: least true time x slots).
    Cost,
}

/// The policy.
#[derive(Clone, Debug)]
pub struct Ordered {
    order: Order,
    backfills: bool,
    line: Line<u64>,
    offers: BTreeMap<usize, Offer>,
}

// === impl Ordered ===

impl Ordered {
    /// An empty queue.
    pub const fn new(order: Order, backfills: bool) -> Self {
        Self { order, backfills, line: Line::new(), offers: BTreeMap::new() }
    }

    const fn key(&self, offer: &Offer) -> u64 {
        match self.order {
            Order::Arrival => 0,
            Order::Cost => offer.declared_ms * offer.size.weight(),
        }
    }

    fn take(&mut self, id: usize, card: u32) -> Option<Start> {
        let offer = self.offers.remove(&id)?;
        self.line.remove(offer.size, self.key(&offer), id);
        Some(Start { id, card })
    }

    /// The first half behind the blocked whole-card head that does not delay it.
    fn backfill(&self, now_ms: u64, head: usize, node: &Node) -> Option<Start> {
        let room = HalfRoom::beside(Reservation::of(head, node), node);
        if room.is_empty() {
            return None;
        }
        // Bounded by the queue: a comparison is no broker, and EASY looks at everyone.
        self.line.halves().find_map(|(_, id)| {
            let end_ms = now_ms + self.offers[id].hold_ms;
            room.for_end_at(end_ms).map(|card| Start { id: *id, card })
        })
    }
}

impl Policy for Ordered {
    fn arrive(&mut self, offer: Offer) {
        self.line.insert(offer.size, self.key(&offer), offer.id);
        self.offers.insert(offer.id, offer);
    }

    fn pick(&mut self, now_ms: u64, node: &Node) -> Option<Start> {
        let (size, (_, id)) = self.line.head()?;
        if let Some(card) = node.room(size, None) {
            return self.take(id, card);
        }
        // A blocked half means that there is no room at all.
        if !self.backfills || size == Size::Large {
            return None;
        }
        let start = self.backfill(now_ms, id, node)?;
        self.take(start.id, start.card)
    }

    fn ended(&mut self, _id: usize, _ran_ms: u64) {}
}
