//! The slots that cards are cut into, and whether a slot is as large as the client believes: pure (N17, N18).

use spaceport_core::ids::Size;
use spaceport_crds::{Isolation, LargeShare, SlicingMode};

use super::Card;
use crate::slots::{LARGE_SLOTS_MAX, Slot, of_card};

/// The agent cannot cut cards this way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("mode {mode} is not supported by this agent; use {} or {}", SlicingMode::Whole, SlicingMode::Shared)]
pub struct UnsupportedMode {
    /// What the pool asks for.
    pub mode: SlicingMode,
}

/// How many `large` leases a card holds at the same time: 2 where it is shared by halves, 1 where `large` is the whole
/// card.
///
/// # Errors
/// If the agent cannot cut cards in this mode.
pub const fn large_slots(mode: SlicingMode, large: LargeShare) -> Result<u32, UnsupportedMode> {
    match (mode, large) {
        (SlicingMode::Whole, _) | (SlicingMode::Shared, LargeShare::Whole) => Ok(1),
        (SlicingMode::Shared, LargeShare::Half) => Ok(LARGE_SLOTS_MAX),
        (SlicingMode::Mig | SlicingMode::Mps, _) => Err(UnsupportedMode { mode }),
    }
}

/// What separates two leases of one card in this mode (N18).
pub const fn isolation(mode: SlicingMode) -> Isolation {
    match mode {
        SlicingMode::Mig => Isolation::Hardware,
        SlicingMode::Mps => Isolation::Limited,
        SlicingMode::Shared => Isolation::None,
        SlicingMode::Whole => Isolation::Exclusive,
    }
}

/// A slot that a lease can get.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AllocatableSlot {
    /// `nvidiaIndex`: unique on the node ([`Slot::index`]: three to a card, two halves and the whole).
    pub nvidia_index: u32,
    /// Card and part of it.
    pub slot: Slot,
    /// `nvidiaUUID`. In the modes without instances it is the card's, for every slot of it.
    pub uuid: String,
    /// Memory a lease may use there.
    pub memory_bytes: u64,
}

impl AllocatableSlot {
    /// Size of the leases it takes.
    pub fn size(&self) -> Size {
        self.slot.size()
    }
}

/// Every slot of these cards, in the order of their indices. Slots of one card exclude each other as [`Slot::overlaps`]
/// says.
///
/// # Errors
/// If the agent cannot cut cards in this mode.
pub fn slots(cards: &[Card], mode: SlicingMode, large: LargeShare) -> Result<Vec<AllocatableSlot>, UnsupportedMode> {
    let large_slots = large_slots(mode, large)?;
    let of_size = |card: &Card, size: Size| {
        let share = match size {
            Size::Large => u64::from(large_slots),
            Size::Xlarge => 1,
        };
        let (uuid, memory_bytes) = (card.uuid.clone(), card.memory_total_bytes / share);
        of_card(card.index, large_slots, size).into_iter().map(move |slot| AllocatableSlot {
            nvidia_index: slot.index(),
            slot,
            uuid: uuid.clone(),
            memory_bytes,
        })
    };
    let mut slots: Vec<AllocatableSlot> =
        cards.iter().flat_map(|card| of_size(card, Size::Large).chain(of_size(card, Size::Xlarge))).collect();
    slots.sort_by_key(|slot| slot.nvidia_index);
    Ok(slots)
}

/// A `large` slot with less memory than the pool's `minMemory`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shortfall {
    /// Card.
    pub card: u32,
    /// Its model.
    pub model: String,
    /// What its `large` slot has.
    pub slot_bytes: u64,
    /// What the pool demands.
    pub minimum_bytes: u64,
}

/// The cards whose `large` slots are smaller than the pool's `sizes.minMemory` (N17: the client believes in 74 GB per
/// `large` on anything but RTX PRO 6000). A note for people, not a reason to refuse leases.
pub fn card_smaller_than_client_assumes(cards: &[Card], large_slots: u32, minimum_bytes: u64) -> Vec<Shortfall> {
    let slot_bytes = |card: &Card| card.memory_total_bytes / u64::from(large_slots.max(1));
    cards
        .iter()
        .filter(|card| slot_bytes(card) < minimum_bytes)
        .map(|card| Shortfall {
            card: card.index,
            model: card.model.clone(),
            slot_bytes: slot_bytes(card),
            minimum_bytes,
        })
        .collect()
}

/// The text is no amount of bytes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no amount of bytes")]
pub struct QuantityError {
    /// The text.
    pub text: String,
}

/// Bytes of a Kubernetes quantity: `74Gi`, `74G`, `1.5Ti`, `74e9`. Fractions of a byte are rounded up, as Kubernetes does.
///
/// # Errors
/// If it is none, is negative, or does not fit 64 bits.
pub fn bytes_of_quantity(text: &str) -> Result<u64, QuantityError> {
    let refuse = || QuantityError { text: text.to_owned() };
    let digits_end = text.find(|c: char| !c.is_ascii_digit() && c != '.' && c != '+').unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits_end);
    let number = number.strip_prefix('+').unwrap_or(number);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() {
        return Err(refuse());
    }
    let (factor, divisor): (u128, u128) = match suffix {
        "" => (1, 1),
        "n" => (1, 1_000_000_000),
        "u" => (1, 1_000_000),
        "m" => (1, 1_000),
        "k" => (1_000, 1),
        "M" => (1_000_000, 1),
        "G" => (1_000_000_000, 1),
        "T" => (1_000_000_000_000, 1),
        "P" => (1_000_000_000_000_000, 1),
        "E" => (1_000_000_000_000_000_000, 1),
        "Ki" => (1 << 10, 1),
        "Mi" => (1 << 20, 1),
        "Gi" => (1 << 30, 1),
        "Ti" => (1 << 40, 1),
        "Pi" => (1 << 50, 1),
        "Ei" => (1 << 60, 1),
        exponent => {
            let power: i32 = exponent
                .strip_prefix(['e', 'E'])
                .and_then(|power| power.parse().ok())
                .filter(|power| (-18..=18).contains(power))
                .ok_or_else(refuse)?;
            let ten = 10_u128.pow(power.unsigned_abs());
            if power < 0 { (1, ten) } else { (ten, 1) }
        }
    };
    // Eighteen decimals are beyond any byte of a fraction; more only overflow.
    let fraction = fraction.get(..fraction.len().min(18)).ok_or_else(refuse)?;
    let scale = 10_u128.pow(u32::try_from(fraction.len()).map_err(|_| refuse())?);
    let parse = |digits: &str| if digits.is_empty() { Ok(0) } else { digits.parse::<u128>().map_err(|_| refuse()) };
    let bytes = parse(whole)?
        .checked_mul(scale)
        .and_then(|scaled| scaled.checked_add(parse(fraction).ok()?))
        .and_then(|scaled| scaled.checked_mul(factor))
        .map(|scaled| scaled.div_ceil(scale * divisor));
    bytes.and_then(|bytes| u64::try_from(bytes).ok()).ok_or_else(refuse)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inventory::tests::{H200_BYTES, h200};
    use crate::slots::Place;

    #[test]
    fn a_shared_card_has_two_halves_and_a_whole_each_with_its_own_index_and_the_cards_uuid() {
        let found = slots(&[h200(0), h200(1)], SlicingMode::Shared, LargeShare::Half).unwrap();
        let shown: Vec<_> = found
            .iter()
            .map(|slot| (slot.nvidia_index, slot.slot.place, slot.uuid.as_str(), slot.memory_bytes))
            .collect();
        let half = H200_BYTES / 2;
        assert_eq!(
            shown,
            [
                (0, Place::Part(0), "GPU-0", half),
                (1, Place::Part(1), "GPU-0", half),
                (2, Place::Whole, "GPU-0", H200_BYTES),
                (3, Place::Part(0), "GPU-1", half),
                (4, Place::Part(1), "GPU-1", half),
                (5, Place::Whole, "GPU-1", H200_BYTES),
            ]
        );
    }

    #[test]
    fn where_large_is_the_whole_card_both_sizes_have_one_slot_and_indices_stay() {
        for (mode, large) in [
            (SlicingMode::Whole, LargeShare::Half),
            (SlicingMode::Whole, LargeShare::Whole),
            (SlicingMode::Shared, LargeShare::Whole),
        ] {
            let found = slots(&[h200(1)], mode, large).unwrap();
            let shown: Vec<_> = found.iter().map(|slot| (slot.nvidia_index, slot.size(), slot.memory_bytes)).collect();
            assert_eq!(shown, [(3, Size::Large, H200_BYTES), (5, Size::Xlarge, H200_BYTES)]);
        }
    }

    #[test]
    fn modes_that_this_agent_lacks_are_refused_by_name() {
        let refused = slots(&[h200(0)], SlicingMode::Mps, LargeShare::Half).unwrap_err();
        assert_eq!(refused.to_string(), "mode Mps is not supported by this agent; use Whole or Shared");
    }

    #[test]
    fn a_slice_below_the_pools_minimum_is_named_with_its_numbers() {
        let small = Card { model: "NVIDIA L40S".to_owned(), memory_total_bytes: 48 << 30, ..h200(1) };
        let cards = [h200(0), small];
        let minimum = bytes_of_quantity("74G").unwrap();
        assert_eq!(
            card_smaller_than_client_assumes(&cards, 2, minimum),
            [Shortfall { card: 1, model: "NVIDIA L40S".to_owned(), slot_bytes: 24 << 30, minimum_bytes: minimum }]
        );
        assert!(card_smaller_than_client_assumes(&cards, 1, 48 << 30).is_empty());
    }

    #[test]
    fn quantities_are_read_as_kubernetes_writes_them() {
        for (text, bytes) in [
            ("0", 0),
            ("74625056768", 74_625_056_768),
            ("74G", 74_000_000_000),
            ("+70Gi", 70 << 30),
            ("1.5Ki", 1536),
            (".5k", 500),
            ("1.", 1),
            ("74e9", 74_000_000_000),
            ("1E3", 1000),
            ("15e-1", 2),
            ("1500m", 2),
        ] {
            assert_eq!(bytes_of_quantity(text), Ok(bytes), "{text}");
        }
        for text in ["", "-1", "Gi", "1.2.3", "1Zi", "1 G", "e9", "99999999999E", "."] {
            assert!(bytes_of_quantity(text).is_err(), "{text}");
        }
    }
}
