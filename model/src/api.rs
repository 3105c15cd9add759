//! The API server: pages that change by compare-and-swap, and an auditor who looks at each change.

use spaceport_core::ids::Epoch;
use spaceport_core::page::{Ending, Page, Source};

use crate::bounds::ACCOUNTS;
use crate::names::lease_number;
use crate::shared::Shared;

/// What the API server holds, and the writes on their way to it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Api {
    /// The account pages. A page's `seq` is its revision as well: nothing else writes the objects here.
    pub pages: [Shared<Page>; ACCOUNTS],
    /// Epoch of the page `spaceport-term`.
    pub term: u64,
    /// Writes that were not answered yet, in the order they were sent; the network is free to change it.
    pub writes: Vec<Write>,
    /// Leases that were ever held on a durable page, ascending.
    pub held_ever: Vec<u32>,
    /// How each of them was settled, ascending by lease.
    pub settled: Vec<Settled>,
    /// Leases with a receipt, ascending.
    pub receipts: Vec<u32>,
}

/// A page write on its way.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Write {
    /// Who waits for the answer; none once it was given up.
    pub broker: Option<usize>,
    /// Whose page.
    pub account: usize,
    /// What is written.
    pub page: Shared<Page>,
    /// The revision it expects.
    pub expects: u64,
    /// How far it is.
    pub fate: Fate,
}

/// How far a write is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fate {
    /// Has not reached the API server.
    Sent,
    /// Done; the answer is on its way.
    Done,
    /// Another revision was there; the answer is on its way.
    Conflict,
    /// The schema or an admission policy refused it (L5); the answer is on its way.
    Refused,
}

/// A lease that was settled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Settled {
    /// Which.
    pub lease: u32,
    /// How.
    pub ending: Ending,
    /// Weighted milliseconds.
    pub charged_ms: u64,
}

/// A rule that was broken, in the order of the invariants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Broken {
    /// Invariant 1: a page admits a hold above the limit of its source.
    Quota,
    /// Invariant 2: something was told that is not durable.
    Visible,
    /// Invariant 3: a hold is settled twice, without a hold, or disappears.
    Once,
    /// Invariants 4 and 5: a charge is not weight x min(used, declared), or what a page gained is not what was charged.
    Charge,
    /// Invariant 6, in calm: a node has no slot for what its broker orders.
    Room,
    /// Invariant 7: a node obeys an epoch below one it has seen.
    Fence,
    /// L9: what was given up runs.
    GivenUp,
    /// L7: a fail-over ends a lease that is held and healthy.
    Killed,
    /// L3: a working page is not what is durable, in flight and pending, or has a hold that nobody will settle.
    Working,
    /// L10: a lease is settled otherwise than its node ended it.
    Report,
    /// L15: a call is granted twice.
    TwoGrants,
    /// The ledger refused an event of its own.
    Misfit,
}

impl Api {
    /// Nothing was ever written.
    pub fn new() -> Self {
        let empty = Shared::new(Page::default());
        Self {
            pages: std::array::from_fn(|_| empty.clone()),
            term: 0,
            writes: Vec::new(),
            held_ever: Vec::new(),
            settled: Vec::new(),
            receipts: Vec::new(),
        }
    }

    /// The lease has an open hold on its page.
    pub fn is_held(&self, lease: u32) -> bool {
        self.pages.iter().flat_map(|page| &page.holds).any(|hold| lease_number(&hold.lease) == lease)
    }

    /// How the lease was settled.
    pub fn settled(&self, lease: u32) -> Option<&Settled> {
        self.settled.iter().find(|settled| settled.lease == lease)
    }

    /// A write reaches the API server. With `blind` it names no revision.
    pub fn take(&mut self, index: usize, blind: bool, broken: &mut Vec<Broken>) {
        let write = self.writes[index].clone();
        let old = self.pages[write.account].clone();
        let fate = if old.seq != write.expects && !blind {
            Fate::Conflict
        } else if (write.page.seq != old.seq + 1 || write.page.epoch < old.epoch) && !blind {
            Fate::Refused
        } else {
            self.audit(&old, &write.page, broken);
            self.pages[write.account] = write.page.clone();
            Fate::Done
        };
        self.writes[index].fate = fate;
        self.forget_impossible(blind);
    }

    /// Nobody hears of a write that was given up, so it is over when it was done, or can not be done any more.
    pub fn forget_impossible(&mut self, blind: bool) {
        let pages = &self.pages;
        self.writes.retain(|write| {
            let possible = write.fate == Fate::Sent && (blind || write.expects == pages[write.account].seq);
            write.broker.is_some() || possible
        });
    }

    fn audit(&mut self, old: &Page, new: &Page, broken: &mut Vec<Broken>) {
        self.audit_holds(old, new, broken);
        let mut charged_ms = 0;
        for closed in &new.closed {
            let lease = lease_number(&closed.hold.lease);
            if old.closed.iter().any(|known| known.hold.lease == closed.hold.lease) {
                continue;
            }
            let was_open = old.holds.iter().any(|hold| hold.lease == closed.hold.lease);
            if !was_open || self.settled(lease).is_some() {
                broken.push(Broken::Once);
            }
            if closed.charged_ms != charge(closed.ending, closed.hold.weight, closed.used_ms, closed.hold.declared_ms) {
                broken.push(Broken::Charge);
            }
            charged_ms += closed.charged_ms;
            let at = self.settled.partition_point(|known| known.lease < lease);
            self.settled.insert(at, Settled { lease, ending: closed.ending, charged_ms: closed.charged_ms });
        }
        // The window is dropped again where all of its holds were void (L12): then nothing was charged before.
        let sum = |page: &Page| page.windows.iter().map(|window| window.charged_ms).sum::<u64>();
        if sum(new) != sum(old) + charged_ms {
            broken.push(Broken::Charge);
        }
        let left =
            |row: &&spaceport_core::page::Closed| !new.closed.iter().any(|kept| kept.hold.lease == row.hold.lease);
        if old.closed.iter().filter(left).any(|row| !self.receipts.contains(&lease_number(&row.hold.lease))) {
            // L10: a row that leaves the outbox without a receipt is lost for people.
            broken.push(Broken::Once);
        }
    }

    fn audit_holds(&mut self, old: &Page, new: &Page, broken: &mut Vec<Broken>) {
        for hold in &new.holds {
            let lease = lease_number(&hold.lease);
            if self.settled(lease).is_some() {
                broken.push(Broken::Once);
            }
            if old.holds.iter().any(|known| known.lease == hold.lease) {
                continue;
            }
            match self.held_ever.binary_search(&lease) {
                Ok(_) => broken.push(Broken::Once),
                Err(at) => self.held_ever.insert(at, lease),
            }
            if hold.parts.iter().any(|part| part.ms > 0 && is_over(new, &part.source)) {
                broken.push(Broken::Quota);
            }
        }
        for hold in &old.holds {
            let kept = new.holds.iter().any(|open| open.lease == hold.lease);
            let closed = new.closed.iter().any(|closed| closed.hold.lease == hold.lease);
            if kept == closed {
                broken.push(Broken::Once);
            }
        }
    }

    /// The term page is raised; it is read and written at one point, as a failed try changes nothing (L6).
    pub fn begin_term(&mut self) -> Epoch {
        self.term += 1;
        Epoch(self.term)
    }
}

impl Default for Api {
    fn default() -> Self {
        Self::new()
    }
}

/// Charged + reserved of the source is above its limit. Grants do not occur here.
fn is_over(page: &Page, source: &Source) -> bool {
    let Source::Window(start) = source else { return true };
    let window = page.windows.iter().find(|window| window.start == *start);
    window.is_none_or(|window| window.charged_ms + page.reserved_ms(source) > window.base_ms)
}

/// What a lease owes (L11).
fn charge(ending: Ending, weight: u64, used_ms: u64, declared_ms: u64) -> u64 {
    match ending {
        Ending::Released | Ending::Failed | Ending::WorkerDied | Ending::Deadline | Ending::Cancelled => {
            weight * used_ms.min(declared_ms)
        }
        Ending::NeverAllowed
        | Ending::Undelivered
        | Ending::Refused
        | Ending::PlatformFault
        | Ending::NoDevice
        | Ending::Expired => 0,
    }
}
