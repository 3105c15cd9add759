//! Two lanes, bounded overtaking: the product's own module ([`spaceport_core::queue::Lanes`]) on the node of the replay.

use std::collections::BTreeMap;

use spaceport_core::ids::{Revision, Size};
use spaceport_core::queue::{Choice, Fit, Function, History, Job, Lane, LaneSettings, Lanes, Room};

use super::{Offer, Policy, Start};
use crate::node::Node;

/// The policy.
#[derive(Clone, Debug)]
pub struct TwoLane {
    settings: LaneSettings,
    lanes: Lanes,
    history: History,
    offers: BTreeMap<u64, Offer>,
    running: BTreeMap<usize, Started>,
}

#[derive(Clone, Debug)]
struct Started {
    offer: Offer,
    lane: Lane,
    expected_ms: u64,
}

// === impl TwoLane ===

impl TwoLane {
    /// An empty queue.
    pub fn new(settings: LaneSettings) -> Self {
        Self {
            settings,
            lanes: Lanes::new(settings),
            history: History::default(),
            offers: BTreeMap::new(),
            running: BTreeMap::new(),
        }
    }

    /// What is free, and the card that is kept.
    fn room(&self, now_ms: u64, node: &Node) -> (Room, Option<u32>) {
        let xlarge = node.room(Size::Xlarge, None).is_some();
        let kept = node.first_drained().filter(|_| self.lanes.reserved().is_some() && !xlarge);
        let card = kept.map(|(card, _)| card);
        let room = Room {
            large: node.room(Size::Large, card).is_some(),
            xlarge,
            reserved_for_ms: kept
                .filter(|(card, _)| node.has_room_on(*card, Size::Large))
                .map(|(_, drained_ms)| drained_ms.saturating_sub(now_ms)),
        };
        (room, card)
    }
}

impl Policy for TwoLane {
    fn arrive(&mut self, offer: Offer) {
        let expected_ms = function(&offer).map_or(offer.declared_ms, |function| self.history.expected_ms(&function));
        let slots = offer.size.weight();
        let place = offer.id as u64;
        self.lanes.insert(Job {
            place,
            size: offer.size,
            class: offer.priority,
            key: self.settings.key(offer.priority, expected_ms, slots, offer.used_percent, 100),
            expected_ms,
            declared_ms: offer.declared_ms,
            held_ms: offer.hold_ms,
            slots,
        });
        self.offers.insert(place, offer);
    }

    fn pick(&mut self, now_ms: u64, node: &Node) -> Option<Start> {
        // One reservation at a time, which passes on at most once, from one lane to the other: three rounds.
        loop {
            let (room, kept) = self.room(now_ms, node);
            let (place, fit) = match self.lanes.next(&room, &[])? {
                Choice::Start { place, fit } => (place, fit),
                Choice::Reserve { place, lane } => {
                    self.lanes.reserve(place, lane);
                    continue;
                }
            };
            let offer = self.offers.remove(&place)?;
            let card = match (offer.size, fit) {
                (Size::Large, Fit::Open) => node.room(Size::Large, kept)?,
                (Size::Large, Fit::BeforeDrain | Fit::InsteadOfReserved) => kept?,
                (Size::Xlarge, _) => node.room(Size::Xlarge, None)?,
            };
            if fit == Fit::InsteadOfReserved {
                self.lanes.release();
            }
            let (job, lane) = self.lanes.started(place)?;
            let id = offer.id;
            self.running.insert(id, Started { offer, lane, expected_ms: job.expected_ms });
            return Some(Start { id, card });
        }
    }

    fn ended(&mut self, id: usize, ran_ms: u64) {
        let Some(Started { offer, lane, expected_ms }) = self.running.remove(&id) else { return };
        if lane == Lane::Fast {
            self.lanes.owe(ran_ms.saturating_sub(expected_ms) * offer.size.weight());
        }
        if let Some(function) = function(&offer) {
            self.history.learn(&function, ran_ms);
        }
    }
}

fn function(offer: &Offer) -> Option<Function> {
    let space_uid = offer.function?.to_string();
    Some(Function { space_uid, revision: Revision::default(), size: offer.size, declared_ms: offer.declared_ms })
}
