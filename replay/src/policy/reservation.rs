//! The one exact reservation for a whole-card request that is blocked (docs/rules.md, Queue).
//!
//! Leases have hard deadlines, so the card that is empty first at the latest is known. It is kept for the request; a
//! half may use it only if its own deadline comes before that moment.

use spaceport_core::ids::Size;

use crate::node::Node;

/// A card that is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reservation {
    /// For whom.
    pub id: usize,
    /// Which.
    pub card: u32,
    /// When it is empty at the latest, milliseconds.
    pub drained_ms: u64,
}

/// Where a half may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HalfRoom {
    /// A card that is not reserved.
    pub open: Option<u32>,
    /// The reserved card, with its latest moment for an end.
    pub until: Option<(u32, u64)>,
}

// === impl Reservation ===

impl Reservation {
    /// The reservation of a blocked request: of the card that drains first. None on a node without cards.
    pub fn of(id: usize, node: &Node) -> Option<Self> {
        let (card, drained_ms) = node.first_drained()?;
        Some(Self { id, card, drained_ms })
    }
}

// === impl HalfRoom ===

impl HalfRoom {
    /// The room for halves beside a reservation.
    pub fn beside(reservation: Option<Reservation>, node: &Node) -> Self {
        let open = node.room(Size::Large, reservation.map(|reservation| reservation.card));
        let until = reservation
            .filter(|reservation| node.has_room_on(reservation.card, Size::Large))
            .map(|reservation| (reservation.card, reservation.drained_ms));
        Self { open, until }
    }

    /// Where a half that ends at this time at the latest may go.
    pub fn for_end_at(&self, end_ms: u64) -> Option<u32> {
        self.open.or_else(|| self.until.filter(|(_, until_ms)| end_ms <= *until_ms).map(|(card, _)| card))
    }

    /// True if no half can go anywhere.
    pub const fn is_empty(&self) -> bool {
        self.open.is_none() && self.until.is_none()
    }
}
