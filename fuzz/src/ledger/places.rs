//! Places and promises that agents present, and what becomes of them under this leader and the next (L17).

use std::collections::BTreeMap;

use spaceport_core::ids::{Epoch, Size, Steady, Ticket};
use spaceport_core::lease::{Place, Stage};
use spaceport_core::protocol::{Denial, QueueOf};
use spaceport_core::queue::{Presented, WaitsFor, parts_of, place_of};
use spaceport_core::quota::Demand;

use super::{Ledger, ticket};

impl Ledger {
    /// A call that may have been told a place by this or an earlier leader, and presents it. Gives the place that it has then,
    /// none if it was refused.
    ///
    /// # Panics
    /// If that is another place than L17 says or somebody else's, if another start is promised than was, or if those who came
    /// later push it out.
    pub fn presents(
        &mut self,
        number: u64,
        size: Size,
        declared_ms: u64,
        presented: Option<Presented>,
    ) -> Option<(Epoch, u64)> {
        let ticket = ticket(number);
        let (known, next) = (self.place(&ticket), self.state.next_place);
        let own = presented.filter(|presented| self.is_free(&ticket, presented));
        let (told, denied) = (self.told.len(), self.denied.len());
        self.call(None, number, size, declared_ms, presented);
        let place = self.place(&ticket);
        if let Some(place) = place {
            let own = own.map(|own| place_of(own.epoch, own.number));
            let expected = known.or(own).unwrap_or(next);
            assert_eq!(parts_of(place), parts_of(expected), "{ticket:?} presented {presented:?}");
        }
        self.differ();
        // Whoever is known here keeps what it was told here.
        if let (None, Some(own)) = (known, own) {
            for (_, denial) in self.denied[denied..].iter().filter(|(of, _)| *of == ticket) {
                assert!(!pushes_out(denial), "{ticket:?} had a place and is refused: {denial:?}");
            }
            if let Some(told) = self.told[told..].iter().find(|told| told.ticket == ticket) {
                self.keeps(told, &own);
            }
        }
        place.map(parts_of)
    }

    /// Who waits, the oldest place first: where, and what for.
    pub fn waiting(&self) -> Vec<(Place, Demand)> {
        let standing = |ticket: &Ticket| self.state.standing(ticket, self.now());
        let waiting = self.state.queue.iter();
        waiting.filter_map(|waiting| Some((standing(&waiting.ticket)?, waiting.demand))).collect()
    }

    /// The ledger of the next term: it reads the page, and has heard of nobody who waits.
    #[must_use]
    pub fn next_term(&self) -> Self {
        let mut next = Self::new(Epoch(self.state.epoch.0 + 1)).drawing_from(self.ids);
        next.account(self.durable.clone());
        next
    }

    fn now(&self) -> Steady {
        Steady(self.elapsed_ms)
    }

    /// Where a request waits, or waited before it was given the lease that is open for it.
    fn place(&self, ticket: &Ticket) -> Option<u64> {
        let open = self.state.leases().filter(|(_, lease)| lease.stage < Stage::Settling);
        let mut given = open.filter_map(|(_, lease)| lease.request.as_ref()).filter(|waited| waited.ticket == *ticket);
        let waits = self.state.queue.get(ticket).map(|waiting| waiting.place);
        waits.or_else(|| given.next().map(|waited| waited.place))
    }

    /// All places that are somebody's, also of those whose leases may still be refused.
    fn places(&self) -> impl Iterator<Item = (&Ticket, u64)> {
        let waiting = self.state.queue.iter().map(|waiting| (&waiting.ticket, waiting.place));
        let given = self.state.leases().filter_map(|(_, lease)| lease.request.as_ref());
        waiting.chain(given.map(|waited| (&waited.ticket, waited.place)))
    }

    /// What is presented was told to somebody, and is nobody else's now; anything else is the agent's invention.
    fn is_free(&self, ticket: &Ticket, presented: &Presented) -> bool {
        let place = place_of(presented.epoch, presented.number);
        let is_others = self.places().any(|(of, taken)| taken == place && of != ticket);
        presented.number > 0 && place < self.state.next_place && !is_others
    }

    fn differ(&self) {
        let mut taken: BTreeMap<u64, &Ticket> = BTreeMap::new();
        for (ticket, place) in self.places() {
            let other = taken.insert(place, ticket);
            assert!(other.is_none_or(|other| other == ticket), "{other:?} and {ticket:?} have one place");
        }
    }

    /// Invariant 11 over terms: what was promised is promised again, unless it has passed; then something else is.
    fn keeps(&self, told: &Place, presented: &Presented) {
        if told.waits_for != WaitsFor::Node {
            assert_eq!(told.latest_start_ms, None, "it waits for its account, which promises nothing");
            return;
        }
        let latest_start_ms = told.latest_start_ms.expect("who waits for the node is promised a start");
        match presented.promised.filter(|promised| !promised.is_over()) {
            Some(promised) => {
                // As far as the clock counts.
                let left_ms = self.now().plus(promised.wait_ms - promised.ago_ms).since(self.now());
                assert_eq!(latest_start_ms, left_ms, "{promised:?} was promised");
            }
            None => assert!(latest_start_ms > 0, "a start that has passed is promised"),
        }
    }
}

/// Refusals for the sake of others of its account or Space. The bound of the node's queue is for all.
fn pushes_out(denial: &Denial) -> bool {
    match denial {
        Denial::QueueFull { of, .. } => matches!(of, QueueOf::Account | QueueOf::Space),
        Denial::ConcurrencyExceeded { .. } => true,
        _ => false,
    }
}
