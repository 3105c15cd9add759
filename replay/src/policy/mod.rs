//! Who goes next. A policy sees what a broker knows when it has to decide: what is declared, what was learned of a
//! function, what an account has used; never how long a request will really run, except where foresight is its point.

mod line;
mod ordered;
mod reservation;
mod two_lane;

use serde::Serialize;
use spaceport_core::ids::Size;
use spaceport_core::queue::{LaneSettings, Priority};

pub use ordered::{Order, Ordered};
pub use two_lane::TwoLane;

use crate::node::Node;

/// A request as its node's queue gets it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Its number; later ones are larger.
    pub id: usize,
    /// Half a card or a whole one.
    pub size: Size,
    /// Class of its tier.
    pub priority: Priority,
    /// Declared milliseconds; with foresight the time it will take.
    pub declared_ms: u64,
    /// Longest time from its start to a free slot, milliseconds (H).
    pub hold_ms: u64,
    /// What its account has used, holds and has queued, of its quota, when it came; at most 100.
    pub used_percent: u64,
    /// Which function it is, where that is known.
    pub function: Option<u32>,
}

/// A decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Start {
    /// Number of the request.
    pub id: usize,
    /// Card that it goes to; it has room.
    pub card: u32,
}

/// The queue of one node and its order.
pub trait Policy {
    /// A request joins the queue.
    fn arrive(&mut self, offer: Offer);

    /// Who starts now, if anyone. Asked again after each start, until nobody does.
    fn pick(&mut self, now_ms: u64, node: &Node) -> Option<Start>;

    /// A request of this node has run so long, milliseconds; one that was killed, as long as it was allowed.
    fn ended(&mut self, id: usize, ran_ms: u64);
}

/// The policies that are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum PolicyName {
    /// First come, first served; the head blocks.
    #[serde(rename = "fcfs")]
    Fcfs,
    /// The same, with EASY backfill past a blocked head.
    #[serde(rename = "fcfs+easy")]
    FcfsEasy,
    /// Shortest declared first, with EASY backfill.
    #[serde(rename = "sjf+easy")]
    SjfEasy,
    /// Two lanes: the product's.
    #[serde(rename = "two-lane")]
    TwoLane,
    /// Shortest first by the true durations, with backfill: what nobody can do.
    #[serde(rename = "clairvoyant")]
    Clairvoyant,
}

// === impl PolicyName ===

impl PolicyName {
    /// All of them, in the order of the reports.
    pub const ALL: [Self; 5] = [Self::Fcfs, Self::FcfsEasy, Self::SjfEasy, Self::TwoLane, Self::Clairvoyant];

    /// As the reports call it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Fcfs => "fcfs",
            Self::FcfsEasy => "fcfs+easy",
            Self::SjfEasy => "sjf+easy",
            Self::TwoLane => "two-lane",
            Self::Clairvoyant => "clairvoyant",
        }
    }

    /// True if it is told how long requests will run.
    pub const fn has_foresight(self) -> bool {
        matches!(self, Self::Clairvoyant)
    }

    /// The policy, with an empty queue.
    pub fn build(self, lanes: LaneSettings) -> Box<dyn Policy> {
        match self {
            Self::Fcfs => Box::new(Ordered::new(Order::Arrival, false)),
            Self::FcfsEasy => Box::new(Ordered::new(Order::Arrival, true)),
            Self::SjfEasy | Self::Clairvoyant => Box::new(Ordered::new(Order::Cost, true)),
            Self::TwoLane => Box::new(TwoLane::new(lanes)),
        }
    }
}
