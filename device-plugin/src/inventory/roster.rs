//! Which card is which over time: pure. Leases and slots are named by the index a card had when this agent first saw it;
//! the uuid decides who it is.

use super::{Card, Health};

/// What a card says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) minor: u32,
    pub(super) uuid: String,
    pub(super) model: String,
    pub(super) memory_total_bytes: u64,
    pub(super) compute_capability: Option<String>,
    pub(super) mig_enabled: bool,
}

/// The outcome of reading the card at one NVML index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Reading {
    pub(super) nvml_index: u32,
    pub(super) outcome: Result<Identity, Health>,
}

/// The cards after a round of readings, by index, and a sentence for each card whose identity nobody knows.
///
/// A card that was known and cannot be read keeps its identity and gets the health of the failed reading. One that NVML
/// lists no longer is lost. Neither ever gives its index to another card.
pub(super) fn merge(known: &[Card], readings: Vec<Reading>) -> (Vec<Card>, Vec<String>) {
    let mut cards: Vec<Card> = Vec::with_capacity(known.len().max(readings.len()));
    let mut unknown = Vec::new();
    let (read, failed): (Vec<_>, Vec<_>) = readings.into_iter().partition(|reading| reading.outcome.is_ok());
    for reading in read {
        let Ok(identity) = reading.outcome else { continue };
        let index = match known.iter().find(|card| card.uuid == identity.uuid) {
            Some(card) => card.index,
            None => free_index(reading.nvml_index, known, &cards),
        };
        cards.push(Card {
            index,
            nvml_index: reading.nvml_index,
            minor: identity.minor,
            uuid: identity.uuid,
            model: identity.model,
            memory_total_bytes: identity.memory_total_bytes,
            compute_capability: identity.compute_capability,
            mig_enabled: identity.mig_enabled,
            health: Health::Healthy,
        });
    }
    for reading in failed {
        let Err(health) = reading.outcome else { continue };
        let was = known
            .iter()
            .find(|card| card.nvml_index == reading.nvml_index && cards.iter().all(|read| read.uuid != card.uuid));
        match was {
            Some(card) => cards.push(Card { health, ..card.clone() }),
            None => unknown.push(format!(
                "card {} is not listed, its identity was never read: {}",
                reading.nvml_index,
                health.reason().unwrap_or_default()
            )),
        }
    }
    for card in known {
        if cards.iter().all(|present| present.uuid != card.uuid) {
            let reason = format!("NVML no longer lists {}", card.uuid);
            cards.push(Card { health: Health::Lost { reason }, ..card.clone() });
        }
    }
    cards.sort_by_key(|card| card.index);
    (cards, unknown)
}

/// The cards when nothing can be read: all of them as `health` says, except those that are lost already.
pub(super) fn all_unread(known: &[Card], reason: &str) -> Vec<Card> {
    let unread = |card: &Card| match card.health {
        Health::Lost { .. } => card.clone(),
        _ => Card { health: Health::Unmonitored { reason: reason.to_owned() }, ..card.clone() },
    };
    known.iter().map(unread).collect()
}

fn free_index(wanted: u32, known: &[Card], cards: &[Card]) -> u32 {
    let taken = |index: u32| known.iter().chain(cards).any(|card| card.index == index);
    // As many indices as there are cards can be taken, so one of the next is free.
    (wanted..=u32::MAX).find(|index| !taken(*index)).unwrap_or(wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(nvml_index: u32, uuid: &str) -> Reading {
        let identity = Identity {
            minor: nvml_index,
            uuid: uuid.to_owned(),
            model: "NVIDIA H200".to_owned(),
            memory_total_bytes: 1,
            compute_capability: None,
            mig_enabled: false,
        };
        Reading { nvml_index, outcome: Ok(identity) }
    }

    fn hung(nvml_index: u32) -> Reading {
        Reading { nvml_index, outcome: Err(Health::Unmonitored { reason: "hung".to_owned() }) }
    }

    fn shown(cards: &[Card]) -> Vec<(u32, &str, u32, bool)> {
        cards.iter().map(|card| (card.index, card.uuid.as_str(), card.nvml_index, card.health.is_healthy())).collect()
    }

    #[test]
    fn a_card_keeps_its_index_when_nvml_numbers_anew() {
        let (before, _) = merge(&[], vec![read(0, "a"), read(1, "b"), read(2, "c")]);
        let (after, unknown) = merge(&before, vec![read(0, "b"), read(1, "c")]);
        assert_eq!(shown(&after), [(0, "a", 0, false), (1, "b", 0, true), (2, "c", 1, true)]);
        assert!(unknown.is_empty());
        assert!(matches!(after[0].health, Health::Lost { .. }));
        let (back, _) = merge(&after, vec![read(0, "a"), read(1, "b"), read(2, "c")]);
        assert_eq!(back, before);
    }

    #[test]
    fn a_new_card_never_takes_the_index_of_a_lost_one() {
        let (before, _) = merge(&[], vec![read(0, "a"), read(1, "b")]);
        let (after, _) = merge(&before, vec![read(0, "x"), read(1, "b")]);
        assert_eq!(shown(&after), [(0, "a", 0, false), (1, "b", 1, true), (2, "x", 0, true)]);
    }

    #[test]
    fn a_hung_card_keeps_its_identity_and_an_unknown_one_is_said() {
        let (before, _) = merge(&[], vec![read(0, "a"), read(1, "b")]);
        let (after, unknown) = merge(&before, vec![hung(0), read(1, "b")]);
        assert_eq!(shown(&after), [(0, "a", 0, false), (1, "b", 1, true)]);
        assert!(unknown.is_empty());
        let (first, unknown) = merge(&[], vec![hung(0), read(1, "b")]);
        assert_eq!(shown(&first), [(1, "b", 1, true)]);
        assert_eq!(unknown, ["card 0 is not listed, its identity was never read: hung"]);
    }

    #[test]
    fn what_is_lost_stays_lost_when_nothing_can_be_read() {
        let (before, _) = merge(&[], vec![read(0, "a"), read(1, "b")]);
        let (lost, _) = merge(&before, vec![read(1, "b")]);
        let cards = all_unread(&lost, "no driver");
        assert!(matches!(cards[0].health, Health::Lost { .. }));
        assert_eq!(cards[1].health, Health::Unmonitored { reason: "no driver".to_owned() });
    }
}
