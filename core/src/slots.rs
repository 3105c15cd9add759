//! Which card of a node a lease gets. The broker predicts with it, the node decides with it (L7): one function,
//! so that the prediction is right unless the broker's picture of the node is old.

use serde::{Deserialize, Serialize};

use crate::ids::Size;

/// A time-shared card, as far as packing needs to know it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Card {
    /// Index on the node.
    pub index: u32,
    /// How many `large` leases fit: 2 for halves, 1 where `large` is the whole card.
    pub large_slots: u32,
    /// New leases may be put on it: healthy and not cordoned.
    pub grantable: bool,
    /// Slots that did not clear and are out of use.
    pub quarantined_slots: u32,
}

impl Card {
    /// How many of its slots a lease takes.
    pub const fn slots_of(&self, size: Size) -> u32 {
        match size {
            Size::Large => 1,
            Size::Xlarge => self.large_slots,
        }
    }

    /// True if a lease of this size has a place on it when nothing else runs.
    pub const fn fits(&self, size: Size) -> bool {
        self.takes(size, 0)
    }

    const fn takes(&self, size: Size, used: u32) -> bool {
        // Quarantined slots are as good as used, for good: an xlarge needs the card without one (invariant 6).
        let used = used.saturating_add(self.quarantined_slots);
        self.grantable
            && self.large_slots > 0
            && match size {
                Size::Large => used < self.large_slots,
                Size::Xlarge => used == 0,
            }
    }
}

/// Used slots by card, of which a node has a few. An idle worker that can be evicted at any time uses none (L16).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Occupancy(Vec<(u32, u32)>);

impl Occupancy {
    /// Counts a lease.
    pub fn add(&mut self, card: u32, slots: u32) {
        match self.0.iter_mut().find(|(known, _)| *known == card) {
            Some((_, used)) => *used = used.saturating_add(slots),
            None => self.0.push((card, slots)),
        }
    }

    /// Slots in use on a card.
    pub fn used(&self, card: u32) -> u32 {
        self.0.iter().find(|(known, _)| *known == card).map_or(0, |(_, used)| *used)
    }
}

/// The card for a lease of this size, or None if there is no room now.
///
/// `large` goes to the fullest card that has room, so that whole cards stay free; among equals, and for `xlarge`, to the
/// one with the lowest index.
pub fn pick(cards: &[Card], occupancy: &Occupancy, size: Size, avoid: &[u32]) -> Option<u32> {
    pick_by(cards, |_, card| occupancy.used(card.index), size, |card| !avoid.contains(&card))
}

/// The same, where `used` says how many slots of a card are in use; it is given the card's place among `cards` as well.
/// `allowed` says which cards may be used, by their indices.
pub fn pick_by(
    cards: &[Card],
    used: impl Fn(usize, &Card) -> u32,
    size: Size,
    allowed: impl Fn(u32) -> bool,
) -> Option<u32> {
    let mut best: Option<(u32, u32)> = None;
    for (place, card) in cards.iter().enumerate() {
        let used = used(place, card);
        if !card.takes(size, used) || !allowed(card.index) {
            continue;
        }
        let filled = used.saturating_add(card.quarantined_slots);
        if best.is_none_or(|(fullest, index)| filled > fullest || (filled == fullest && card.index < index)) {
            best = Some((filled, card.index));
        }
    }
    best.map(|(_, index)| index)
}

/// True if a lease of this size has a place on these cards when nothing else runs.
pub fn possible(cards: &[Card], size: Size) -> bool {
    cards.iter().any(|card| card.fits(size))
}

/// How many leases of this size the cards hold at the same time.
pub fn capacity(cards: &[Card], size: Size) -> u64 {
    cards
        .iter()
        .filter(|card| card.takes(size, 0))
        .map(|card| match size {
            Size::Large => u64::from(card.large_slots.saturating_sub(card.quarantined_slots)),
            Size::Xlarge => 1,
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cards(count: u32) -> Vec<Card> {
        (0..count).map(|index| Card { index, large_slots: 2, grantable: true, quarantined_slots: 0 }).collect()
    }

    fn used(slots: &[(u32, u32)]) -> Occupancy {
        let mut occupancy = Occupancy::default();
        for (card, slots) in slots {
            occupancy.add(*card, *slots);
        }
        occupancy
    }

    #[test]
    fn large_fills_the_card_that_is_begun() {
        assert_eq!(pick(&cards(3), &used(&[]), Size::Large, &[]), Some(0));
        assert_eq!(pick(&cards(3), &used(&[(1, 1)]), Size::Large, &[]), Some(1));
        assert_eq!(pick(&cards(3), &used(&[(1, 2)]), Size::Large, &[]), Some(0));
        assert_eq!(pick(&cards(3), &used(&[(2, 1)]), Size::Large, &[2]), Some(0));
    }

    #[test]
    fn xlarge_needs_an_empty_card() {
        assert_eq!(pick(&cards(2), &used(&[(0, 1)]), Size::Xlarge, &[]), Some(1));
        assert_eq!(pick(&cards(2), &used(&[(0, 1), (1, 1)]), Size::Xlarge, &[]), None);
        assert_eq!(pick(&cards(2), &used(&[(0, 1)]), Size::Xlarge, &[1]), None);
    }

    #[test]
    fn sick_and_quarantined_slots_are_not_given() {
        let mut sick = cards(2);
        sick[0].grantable = false;
        sick[1].quarantined_slots = 1;
        assert_eq!(pick(&sick, &used(&[]), Size::Large, &[]), Some(1));
        assert_eq!(pick(&sick, &used(&[(1, 1)]), Size::Large, &[]), None);
        assert!(!possible(&sick, Size::Xlarge));
        assert_eq!((capacity(&sick, Size::Large), capacity(&sick, Size::Xlarge)), (1, 0));
    }

    #[test]
    fn whole_card_as_large_takes_one() {
        let whole = [Card { index: 4, large_slots: 1, grantable: true, quarantined_slots: 0 }];
        assert_eq!(pick(&whole, &used(&[]), Size::Large, &[]), Some(4));
        assert_eq!(pick(&whole, &used(&[(4, 1)]), Size::Large, &[]), None);
        assert_eq!(whole[0].slots_of(Size::Xlarge), 1);
    }
}
