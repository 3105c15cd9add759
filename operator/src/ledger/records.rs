//! The records of leases that are open or just over, kept for their receipts (invariant 12). Pure, and bounded by the
//! ledger's own bounds: a record is dropped once its lease is settled and its slot is back.

use std::collections::{BTreeMap, HashSet};

use spaceport_core::ids::{AccountName, Epoch, LeaseId, LedgerTime, Ticket};
use spaceport_core::page::{Closed, Ending, Page, Shortened, ShortenedBy};
use spaceport_core::queue::Waiting;
use spaceport_proto::nodelink::Boundary;

use super::display::seconds;
use super::receipt::{Crossing, GivenCard, LeaseEnd, LeaseRecord, Progress};
use crate::fault::{self, Fault};

/// Records by lease.
#[derive(Debug, Default)]
pub struct Records {
    by_lease: BTreeMap<LeaseId, LeaseRecord>,
    /// Leases of requests that wait.
    by_ticket: BTreeMap<Ticket, LeaseId>,
}

/// A request that waited longer has a receipt of its own, which then needs an end: what it takes the writer to make one
/// (docs/rules.md, Writes per lease).
const RECEIPT_EXISTS_MS: u64 = 2_000;

/// What to do with the receipt of a request that waits no longer.
#[derive(Debug)]
pub enum Unserved {
    /// It may exist: write this end.
    End(Box<LeaseRecord>),
    /// It was never written.
    Drop(LeaseId),
}

/// The most boundaries of one lease that are kept: a receipt shows 32, and repeated reports add none.
const CROSSINGS_MAX: usize = 64;

impl Records {
    /// A request waits, and its lease has a name. Gives the record to write.
    pub fn queued(&mut self, lease: &LeaseId, waiting: &Waiting, epoch: Epoch, now: LedgerTime) -> LeaseRecord {
        self.by_ticket.insert(waiting.ticket.clone(), lease.clone());
        let record = self.of_request(lease, waiting, epoch);
        cross(record, "Queued", now, String::new());
        record.clone()
    }

    /// A slot is meant for a request. Nothing is durable yet.
    pub fn reserved(&mut self, lease: &LeaseId, waiting: &Waiting, epoch: Epoch) {
        self.by_ticket.remove(&waiting.ticket);
        self.of_request(lease, waiting, epoch);
    }

    fn of_request(&mut self, lease: &LeaseId, waiting: &Waiting, epoch: Epoch) -> &mut LeaseRecord {
        self.by_lease.entry(lease.clone()).or_insert_with(|| {
            let mut record = LeaseRecord {
                lease: lease.clone(),
                account: waiting.account.clone(),
                space: waiting.space.clone(),
                size: waiting.demand.size,
                weight: waiting.demand.weight,
                declared_ms: waiting.demand.asked_ms(),
                shortened: None,
                progress: Progress::Queued,
                node: Some(waiting.node.clone()),
                card: None,
                isolation: None,
                via: waiting.via.to_string(),
                epoch,
                generation: 0,
                parts: Vec::new(),
                timeline: Vec::new(),
                end: None,
            };
            cross(&mut record, "Requested", waiting.since, String::new());
            record
        })
    }

    /// A request was refused or left while it waited.
    pub fn unserved(&mut self, ticket: &Ticket, ending: Ending, message: String, now: LedgerTime) -> Option<Unserved> {
        let lease = self.by_ticket.remove(ticket)?;
        self.unreserved(&lease, ending, message, now)
    }

    /// The lease never was: its hold was not written, or its request waits no longer.
    pub fn unreserved(
        &mut self,
        lease: &LeaseId,
        ending: Ending,
        message: String,
        now: LedgerTime,
    ) -> Option<Unserved> {
        let mut record = self.by_lease.remove(lease)?;
        let requested = record.timeline.first().map_or(now, |crossing| crossing.at);
        if now.since(requested) < RECEIPT_EXISTS_MS {
            return Some(Unserved::Drop(lease.clone()));
        }
        cross(&mut record, "Settled", now, "used 0s, charged 0s".to_owned());
        record.end = Some(LeaseEnd { ending, used_ms: 0, charged_ms: 0, message });
        Some(Unserved::End(Box::new(record)))
    }

    /// Forgets the records of leases that are over although not everything was heard of them: a lost node's.
    pub fn keep(&mut self, is_there: impl Fn(&LeaseId) -> bool) {
        let Self { by_lease, by_ticket } = self;
        let waiting: HashSet<&LeaseId> = by_ticket.values().collect();
        by_lease.retain(|lease, _| is_there(lease) || waiting.contains(lease));
    }

    /// The hold is durable, as it stands on this page. Gives the record to write.
    pub fn held(&mut self, account: &AccountName, lease: &LeaseId, page: &Page, at: LedgerTime) -> Option<LeaseRecord> {
        let hold = page.holds.iter().find(|hold| hold.lease == *lease)?;
        let record = self.by_lease.entry(lease.clone()).or_insert_with(|| LeaseRecord::of_hold(account, hold));
        record.progress = record.progress.max(Progress::Reserved);
        record.parts.clone_from(&hold.parts);
        record.generation = hold.generation;
        record.shortened = hold.shortened.map(|shortened| (hold.declared_ms, shortened.by));
        let after = hold.after.as_ref().map(|after| format!("begins when {after} is freed"));
        let less = hold.shortened.map(|shortened| less_than_declared(hold.declared_ms, shortened));
        let details: Vec<String> = after.into_iter().chain(less).collect();
        cross(record, "Reserved", at, details.join("; "));
        Some(record.clone())
    }

    /// What the node says of a lease. Gives the record to write if anything is new.
    pub fn report(
        &mut self,
        lease: &LeaseId,
        boundaries: &[Boundary],
        now: LedgerTime,
        report: Report,
    ) -> Option<LeaseRecord> {
        let record = self.by_lease.get_mut(lease)?;
        let before = (record.timeline.len(), record.progress, record.card.clone());
        for boundary in boundaries {
            let ago = i64::try_from(boundary.ago_ms).unwrap_or(i64::MAX);
            let at = LedgerTime(now.0.saturating_sub(ago));
            cross(record, &boundary.name, at, boundary.detail.clone());
        }
        match report {
            Report::Started { card, isolation } => {
                record.card = card.or(record.card.take());
                if !isolation.is_empty() {
                    record.isolation = Some(isolation);
                }
            }
            Report::Running => record.progress = Progress::Running,
            Report::Over => {}
        }
        let is_new = before != (record.timeline.len(), record.progress, record.card.clone());
        let record = record.clone();
        if record.is_complete() {
            self.by_lease.remove(lease);
        }
        is_new.then_some(record)
    }

    /// The settlement is durable. Gives the final record to write.
    pub fn settled(&mut self, account: &AccountName, closed: &Closed, message: String) -> LeaseRecord {
        let Some(record) = self.by_lease.get_mut(&closed.hold.lease) else {
            return LeaseRecord::rebuilt(account, closed);
        };
        let detail = format!("used {}, charged {}", seconds(closed.used_ms), seconds(closed.charged_ms));
        cross(record, "Settled", closed.at, detail);
        record.end =
            Some(LeaseEnd { ending: closed.ending, used_ms: closed.used_ms, charged_ms: closed.charged_ms, message });
        let record = record.clone();
        if record.is_complete() {
            self.by_lease.remove(&closed.hold.lease);
        }
        record
    }

    /// The account of a lease that is known.
    pub fn account(&self, lease: &LeaseId) -> Option<&AccountName> {
        self.by_lease.get(lease).map(|record| &record.account)
    }
}

/// What a node's report says besides its boundaries.
pub enum Report {
    /// It has a slot.
    Started {
        /// Which card, once it is known.
        card: Option<GivenCard>,
        /// What separates it from its neighbour.
        isolation: String,
    },
    /// The clock runs.
    Running,
    /// It is over, or its slot is back.
    Over,
}

/// What a call was given of what it declares, and why.
fn less_than_declared(granted_ms: u64, shortened: Shortened) -> String {
    let why = match shortened.by {
        ShortenedBy::RemainingQuota => "its caller has no more left",
        ShortenedBy::LearnedDuration => "earlier calls needed no more",
    };
    format!("given {} of the declared {}: {why}", seconds(granted_ms), seconds(shortened.declared_ms))
}

/// Notes a boundary once: reports are repeated (L10), and the first time counts.
fn cross(record: &mut LeaseRecord, boundary: &str, at: LedgerTime, detail: String) {
    if fault::is(Fault::ReceiptsForgetAllowed) && boundary == "Allowed" {
        return;
    }
    let known = record.timeline.iter().any(|crossing| crossing.boundary == boundary);
    if !known && record.timeline.len() < CROSSINGS_MAX {
        record.timeline.push(Crossing { boundary: boundary.to_owned(), at, detail });
    }
}
