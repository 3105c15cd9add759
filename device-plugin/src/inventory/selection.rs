//! Which cards a pool shares in time and which it dedicates: pure (N4).

use std::collections::BTreeMap;

use spaceport_crds::{CardSelection, GpuSize, SelectCards};

use super::Card;

/// What a card is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// Leases share it.
    TimeShared,
    /// A pod has it for its whole life and asked for it by this resource, the only one that advertises it.
    Dedicated(GpuSize),
    /// The pool does not select it.
    Unused,
}

/// The use of every card, by index. Dedicated wins over time-shared, as `select: All` means "all that are not dedicated".
/// The API server refuses a selection that dedicates a card twice.
pub fn card_uses(cards: &[Card], selection: &CardSelection) -> BTreeMap<u32, Use> {
    let listed = |indexes: &[i32], index: u32| indexes.iter().any(|wanted| u32::try_from(*wanted) == Ok(index));
    let used = |card: &Card| {
        if let Some(dedicated) = selection.dedicated.iter().find(|cards| listed(&cards.indexes, card.index)) {
            return Use::Dedicated(dedicated.size);
        }
        let shared = match selection.time_shared.select {
            SelectCards::All => true,
            SelectCards::Listed => listed(&selection.time_shared.indexes, card.index),
            SelectCards::None => false,
        };
        if shared { Use::TimeShared } else { Use::Unused }
    };
    cards.iter().map(|card| (card.index, used(card))).collect()
}

/// The cards that leases share.
pub fn time_shared(cards: &[Card], selection: &CardSelection) -> Vec<Card> {
    let uses = card_uses(cards, selection);
    cards.iter().filter(|card| uses.get(&card.index) == Some(&Use::TimeShared)).cloned().collect()
}

#[cfg(test)]
mod tests {
    use spaceport_crds::{DedicatedCards, TimeSharedCards};

    use super::*;
    use crate::inventory::tests::h200;

    fn dedicated(size: GpuSize, indexes: &[i32]) -> DedicatedCards {
        DedicatedCards { size, indexes: indexes.to_vec() }
    }

    #[test]
    fn all_means_all_that_are_not_dedicated() {
        let cards: Vec<Card> = (0..3).map(h200).collect();
        let selection =
            CardSelection { dedicated: vec![dedicated(GpuSize::Xlarge, &[1, 9])], ..CardSelection::default() };
        let uses: Vec<Use> = card_uses(&cards, &selection).into_values().collect();
        assert_eq!(uses, [Use::TimeShared, Use::Dedicated(GpuSize::Xlarge), Use::TimeShared]);
        assert_eq!(time_shared(&cards, &selection).iter().map(|card| card.index).collect::<Vec<_>>(), [0, 2]);
    }

    #[test]
    fn a_list_leaves_the_others_unused() {
        let cards: Vec<Card> = (0..3).map(h200).collect();
        let time_shared = TimeSharedCards { select: SelectCards::Listed, indexes: vec![2] };
        let selection = CardSelection { time_shared, dedicated: vec![dedicated(GpuSize::Large, &[0])] };
        let uses: Vec<Use> = card_uses(&cards, &selection).into_values().collect();
        assert_eq!(uses, [Use::Dedicated(GpuSize::Large), Use::Unused, Use::TimeShared]);
    }
}
