//! The cards of a node while a trace is replayed. Cards have two halves; which card a lease gets is decided by the
//! function that the nodes themselves use ([`slots::pick`]).

use std::collections::BTreeMap;

use spaceport_core::ids::Size;
use spaceport_core::slots::{self, Card, Occupancy};

/// A node with its leases.
#[derive(Clone, Debug)]
pub struct Node {
    cards: Vec<Card>,
    leases: BTreeMap<usize, Running>,
}

/// A lease that runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Running {
    /// Card that it is on.
    pub card: u32,
    /// Half of it or all.
    pub size: Size,
    /// When the slot is free at the latest, milliseconds of the trace.
    pub deadline_ms: u64,
}

// === impl Node ===

impl Node {
    /// A node with so many cards, nothing running.
    pub fn new(cards: u32) -> Self {
        let card = |index| Card { index, large_slots: 2, grantable: true, quarantined_slots: 0 };
        Self { cards: (0..cards).map(card).collect(), leases: BTreeMap::new() }
    }

    /// Halves of cards that it has.
    pub fn slots(&self) -> u64 {
        self.cards.iter().map(|card| u64::from(card.large_slots)).sum()
    }

    /// Slot-milliseconds that running leases may still take.
    pub fn held_ms(&self, now_ms: u64) -> u64 {
        self.leases.values().map(|lease| lease.deadline_ms.saturating_sub(now_ms) * lease.size.weight()).sum()
    }

    /// The card that a lease of this size would get.
    pub fn room(&self, size: Size, avoid: Option<u32>) -> Option<u32> {
        slots::pick(&self.cards, &self.occupancy(), size, avoid.as_slice())
    }

    /// True if this card has room for a lease of this size.
    pub fn has_room_on(&self, card: u32, size: Size) -> bool {
        let used: u64 = self.on(card).map(|lease| lease.size.weight()).sum();
        used + size.weight() <= Size::Xlarge.weight()
    }

    /// When a card is empty at the latest.
    pub fn drained_at(&self, card: u32) -> u64 {
        self.on(card).map(|lease| lease.deadline_ms).max().unwrap_or(0)
    }

    /// The card that is empty first at the latest, with that time.
    pub fn first_drained(&self) -> Option<(u32, u64)> {
        self.cards.iter().map(|card| (card.index, self.drained_at(card.index))).min_by_key(|(card, at)| (*at, *card))
    }

    /// Starts a lease.
    ///
    /// # Panics
    /// If its card has no room: the policy that chose it is wrong (invariant 6).
    pub fn start(&mut self, id: usize, lease: Running) {
        assert!(self.has_room_on(lease.card, lease.size), "card {} has no room for a {}", lease.card, lease.size);
        assert!((lease.card as usize) < self.cards.len(), "there is no card {}", lease.card);
        let before = self.leases.insert(id, lease);
        assert!(before.is_none(), "request {id} runs twice");
    }

    /// Ends one.
    pub fn end(&mut self, id: usize) -> Option<Running> {
        self.leases.remove(&id)
    }

    fn on(&self, card: u32) -> impl Iterator<Item = &Running> {
        self.leases.values().filter(move |lease| lease.card == card)
    }

    fn occupancy(&self) -> Occupancy {
        let mut occupancy = Occupancy::default();
        for lease in self.leases.values() {
            occupancy.add(lease.card, if lease.size == Size::Xlarge { 2 } else { 1 });
        }
        occupancy
    }
}
