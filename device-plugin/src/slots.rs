//! The node's slots, their indices, and which one a lease gets (L7, N17).

use serde::{Deserialize, Serialize};
use spaceport_core::ids::Size;

/// Most `large` slots of one card: halves.
pub const LARGE_SLOTS_MAX: u32 = 2;

/// Indices per card: one for each half and one for the whole card. Fixed, so that a card keeps its indices when another
/// card of the node changes its mode.
const INDICES_PER_CARD: u32 = LARGE_SLOTS_MAX + 1;

/// Which part of a card a slot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Place {
    /// The n-th `large` slot.
    Part(u32),
    /// All of it: `xlarge`.
    Whole,
}

/// One slot of the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Slot {
    /// Index of the card.
    pub card: u32,
    /// Part of the card.
    pub place: Place,
}

impl Slot {
    /// The slot's own `nvidiaIndex`, unique on the node. The client keys its workers by it and uses it for nothing else;
    /// two slots that shared one would have a worker of the one reused on the other.
    pub fn index(self) -> u32 {
        let within = match self.place {
            Place::Part(part) => part,
            Place::Whole => LARGE_SLOTS_MAX,
        };
        self.card.saturating_mul(INDICES_PER_CARD).saturating_add(within)
    }

    /// The two cannot be leased at the same time (invariant 6).
    pub fn overlaps(self, other: Self) -> bool {
        self.card == other.card
            && (self.place == other.place || self.place == Place::Whole || other.place == Place::Whole)
    }

    /// Size of the leases it takes.
    pub fn size(self) -> Size {
        match self.place {
            Place::Part(_) => Size::Large,
            Place::Whole => Size::Xlarge,
        }
    }
}

/// All slots of a size on a card with this many `large` slots.
pub fn of_card(card: u32, large_slots: u32, size: Size) -> Vec<Slot> {
    match size {
        Size::Large => {
            (0..large_slots.min(LARGE_SLOTS_MAX)).map(|part| Slot { card, place: Place::Part(part) }).collect()
        }
        Size::Xlarge => vec![Slot { card, place: Place::Whole }],
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_slot_of_a_node_has_an_index_of_its_own() {
        let mut indices = BTreeSet::new();
        let mut count = 0;
        for card in 0..16 {
            for size in [Size::Large, Size::Xlarge] {
                for slot in of_card(card, LARGE_SLOTS_MAX, size) {
                    indices.insert(slot.index());
                    count += 1;
                }
            }
        }
        assert_eq!(indices.len(), count);
    }

    #[test]
    fn a_whole_card_excludes_its_halves_and_halves_do_not_exclude_each_other() {
        let half = |part| Slot { card: 1, place: Place::Part(part) };
        let whole = Slot { card: 1, place: Place::Whole };
        assert!(!half(0).overlaps(half(1)));
        assert!(half(0).overlaps(whole) && whole.overlaps(half(1)) && whole.overlaps(whole));
        assert!(!whole.overlaps(Slot { card: 2, place: Place::Whole }));
    }
}
