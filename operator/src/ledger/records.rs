//! The records of leases that are open or just over, kept for their receipts (invariant 12). Pure, and bounded by the
//! ledger's own bounds: a record is dropped once its lease is settled and its slot is back.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use spaceport_core::ids::{AccountName, Epoch, LeaseId, LedgerTime, Steady, Ticket};
use spaceport_core::lease::{Moment, Place};
use spaceport_core::page::{Closed, Ending, Page, Shortened, ShortenedBy};
use spaceport_core::queue::Waiting;
use spaceport_proto::nodelink::Boundary;

use super::display::seconds;
use super::receipt::{Crossing, GivenCard, LeaseEnd, LeaseRecord, Progress, Standing};
use crate::fault::{self, Fault};

/// Records by lease.
#[derive(Debug, Default)]
pub struct Records {
    by_lease: BTreeMap<LeaseId, LeaseRecord>,
    /// Leases of requests that wait.
    by_ticket: BTreeMap<Ticket, Queued>,
    /// The same by when it is looked where they stand.
    looks: BTreeSet<(Steady, Ticket)>,
}

/// A lease whose request waits.
#[derive(Debug)]
struct Queued {
    lease: LeaseId,
    look: Steady,
}

/// A request that waits is looked at again after this long. Its receipt is not written more often, so that what was found
/// in between would be seen by nobody.
const LOOK_AGAIN_MS: u64 = 10_000;
/// Lines of a timeline about the same wait: what it is told is issued anew when it waits for something else, or when its
/// node loses cards. More of them would push out the rest, of which a receipt has at most eleven.
const QUEUED_LINES_MAX: usize = 8;

/// A request that waited longer has a receipt of its own, which then needs an end: what it takes the writer to make one
/// (docs/rules.md, Writes per lease).
const RECEIPT_EXISTS_MS: u64 = 2_000;

/// The end of a lease that never was: its request waits no longer, or its hold was not written.
#[derive(Debug)]
pub struct Unserved {
    /// For its receipt.
    pub record: LeaseRecord,
    /// It waited for so little time that it has no receipt: then it needs none.
    pub is_short: bool,
}

/// The boundary that a waiting lease has crossed.
const QUEUED: &str = "Queued";
/// The most boundaries of one lease that are kept: a receipt shows 32, and repeated reports add none.
const CROSSINGS_MAX: usize = 64;

impl Records {
    /// A request waits, its lease has a name, and its caller is told where it stands. Gives the record to write.
    pub fn queued(
        &mut self,
        lease: &LeaseId,
        waiting: &Waiting,
        place: &Place,
        epoch: Epoch,
        at: Moment,
    ) -> LeaseRecord {
        self.follow(&waiting.ticket, lease, at.steady);
        let record = self.of_request(lease, waiting, epoch);
        let standing = Standing::of(place, at.wall);
        let lines = record.timeline.iter().filter(|crossing| crossing.boundary == QUEUED).count();
        if record.standing.as_ref().is_none_or(|before| standing.is_told_anew(before)) && lines < QUEUED_LINES_MAX {
            let (boundary, detail) = (QUEUED.to_owned(), standing.detail());
            record.timeline.push(Crossing { boundary, at: at.wall, detail });
        }
        take_news(record, standing);
        record.clone()
    }

    /// Requests that were not looked at for long, who waits longest for it first: at most `count`, whose next look is put
    /// off with that.
    pub fn looks_due(&mut self, now: Steady, count: usize) -> Vec<Ticket> {
        let due: Vec<(Steady, Ticket)> =
            self.looks.iter().take_while(|(look, _)| *look <= now).take(count).cloned().collect();
        for (_, ticket) in &due {
            if let Some(queued) = self.by_ticket.get(ticket) {
                let lease = queued.lease.clone();
                self.follow(ticket, &lease, now);
            }
        }
        due.into_iter().map(|(_, ticket)| ticket).collect()
    }

    /// Where a request stands now. Gives the record to write, if that is news.
    pub fn stands(&mut self, place: &Place, now: LedgerTime) -> Option<LeaseRecord> {
        let lease = &self.by_ticket.get(&place.ticket)?.lease;
        let record = self.by_lease.get_mut(lease)?;
        let standing = Standing::of(place, now);
        take_news(record, standing).then(|| record.clone())
    }

    fn follow(&mut self, ticket: &Ticket, lease: &LeaseId, now: Steady) {
        self.unfollow(ticket);
        let look = now.plus(LOOK_AGAIN_MS);
        self.looks.insert((look, ticket.clone()));
        self.by_ticket.insert(ticket.clone(), Queued { lease: lease.clone(), look });
    }

    fn unfollow(&mut self, ticket: &Ticket) -> Option<LeaseId> {
        let Queued { lease, look } = self.by_ticket.remove(ticket)?;
        self.looks.remove(&(look, ticket.clone()));
        Some(lease)
    }

    /// A slot is meant for a request. Nothing is durable yet.
    pub fn reserved(&mut self, lease: &LeaseId, waiting: &Waiting, epoch: Epoch) {
        self.unfollow(&waiting.ticket);
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
                standing: None,
                node: Some(waiting.node.clone()),
                card: None,
                isolation: None,
                via: waiting.via.to_string(),
                epoch,
                generation: 0,
                parts: Vec::new(),
                arrived: Some(waiting.arrived),
                timeline: Vec::new(),
                end: None,
            };
            cross(&mut record, "Requested", waiting.since, String::new());
            record
        })
    }

    /// A request was refused or left while it waited.
    pub fn unserved(&mut self, ticket: &Ticket, ending: Ending, message: String, at: Moment) -> Option<Unserved> {
        let lease = self.unfollow(ticket)?;
        self.unreserved(&lease, ending, message, at)
    }

    /// The lease never was: its hold was not written, or its request waits no longer.
    pub fn unreserved(&mut self, lease: &LeaseId, ending: Ending, message: String, at: Moment) -> Option<Unserved> {
        let mut record = self.by_lease.remove(lease)?;
        let is_short = record.arrived.is_some_and(|arrived| at.steady.since(arrived) < RECEIPT_EXISTS_MS);
        cross(&mut record, "Settled", at.wall, "used 0s, charged 0s".to_owned());
        record.end = Some(LeaseEnd { ending, used_ms: 0, charged_ms: 0, message });
        Some(Unserved { record, is_short })
    }

    /// Forgets the records of leases that are over although not everything was heard of them: a lost node's.
    pub fn keep(&mut self, is_there: impl Fn(&LeaseId) -> bool) {
        let Self { by_lease, by_ticket, .. } = self;
        let waiting: HashSet<&LeaseId> = by_ticket.values().map(|waiting| &waiting.lease).collect();
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

/// Notes where it stands, if that is news: then true.
fn take_news(record: &mut LeaseRecord, standing: Standing) -> bool {
    let is_news = record.standing.as_ref().is_none_or(|before| standing.is_news(before));
    if is_news {
        record.standing = Some(standing);
    }
    is_news
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

#[cfg(test)]
mod tests {
    use spaceport_core::ids::{NodeName, Revision, Size, SpaceKey};
    use spaceport_core::protocol::CallerClass;
    use spaceport_core::queue::{Priority, Turn, WaitsFor};
    use spaceport_core::quota::Demand;

    use super::*;

    const BEGIN: LedgerTime = LedgerTime(1_800_000_000_000);

    fn ticket(number: u64) -> Ticket {
        Ticket { agent_instance: "a".into(), number }
    }

    fn waiting(number: u64) -> Waiting {
        Waiting {
            ticket: ticket(number),
            place: number,
            node: NodeName::new("gpu-1"),
            account: AccountName::new("bob"),
            cookie: None,
            space: SpaceKey::new("demo", "hello", "u"),
            revision: Revision::default(),
            worker: None,
            demand: Demand {
                size: Size::Large,
                weight: 1,
                declared_ms: 10_000,
                duration_factor_percent: 100,
                shortened: None,
            },
            turn: Turn { class: Priority::Medium, key: 1, expected_ms: 1, held_ms: 1, slots: 1 },
            caller: CallerClass::Regular,
            budget: None,
            via: "token".into(),
            since: BEGIN,
            arrived: Steady(0),
            attempts: 0,
            told: None,
            promise: None,
            waits_for: WaitsFor::Node,
            lease: None,
            unconfirmed: None,
        }
    }

    fn place(number: u64, position: u32, latest_start_ms: u64) -> Place {
        Place {
            ticket: ticket(number),
            node: NodeName::new("gpu-1"),
            waits_for: WaitsFor::Node,
            position,
            eta_ms: 1_000,
            latest_start_ms: Some(latest_start_ms),
            late_ms: 0,
            place: (Epoch(1), number),
            caller: CallerClass::Regular,
        }
    }

    fn at(ms: u64) -> Moment {
        Moment { wall: BEGIN.plus(ms), steady: Steady(ms) }
    }

    fn lease(number: u64) -> LeaseId {
        LeaseId::new(format!("lease-{number}"))
    }

    fn comes(records: &mut Records, number: u64, ms: u64) -> LeaseRecord {
        records.queued(&lease(number), &waiting(number), &place(number, 3, 60_000), Epoch(1), at(ms))
    }

    fn lines(record: &LeaseRecord) -> Vec<String> {
        record.receipt().spec.timeline
    }

    #[test]
    fn a_receipt_says_where_its_lease_stood_when_it_came_and_where_it_stands() {
        let mut records = Records::default();
        let record = comes(&mut records, 1, 0);
        let told =
            "2027-01-15T08:00:00.000Z Queued: position 3 of the node, expected 08:00:01Z, at the latest 08:01:00Z";
        assert_eq!(lines(&record), ["2027-01-15T08:00:00.000Z Requested", told]);
        assert_eq!(record.receipt().spec.waits.as_deref(), Some("node, 3rd"));
        assert!(records.stands(&place(1, 3, 50_000), BEGIN.plus(10_000)).is_none(), "time has passed, no more");
        let moved = records.stands(&place(1, 1, 40_000), BEGIN.plus(20_000)).unwrap();
        assert_eq!(moved.receipt().spec.waits.as_deref(), Some("node, 1st"));
        assert_eq!(lines(&moved), lines(&record), "a step of the queue is no boundary");
    }

    #[test]
    fn what_is_told_anew_is_another_line_but_not_for_ever() {
        let mut records = Records::default();
        comes(&mut records, 1, 0);
        let mut told = |ms, latest_ms| {
            let place = place(1, 3, latest_ms);
            lines(&records.queued(&lease(1), &waiting(1), &place, Epoch(1), at(ms))).len()
        };
        assert_eq!(told(10_000, 50_000), 2, "the same again, behind a cut stream");
        assert_eq!(told(20_000, 90_000), 3, "the node has lost a card");
        let many = (3..60).map(|step| told(step * 10_000, 90_000 * step)).max();
        assert_eq!(many, Some(1 + QUEUED_LINES_MAX), "the other boundaries keep their room");
    }

    #[test]
    fn how_long_a_request_waited_does_not_depend_on_the_wall_clock() {
        let left = |waited_ms, stepped_ms: i64| {
            let mut records = Records::default();
            comes(&mut records, 1, 0);
            let at = Moment { wall: LedgerTime(BEGIN.0 + stepped_ms), steady: Steady(waited_ms) };
            records.unserved(&ticket(1), Ending::Undelivered, String::new(), at).unwrap()
        };
        let stepped_back = left(10_000, -10_000);
        assert!(!stepped_back.is_short && stepped_back.record.end.is_some(), "its receipt is there, and says Queued");
        assert!(left(1_999, 3_600_000).is_short, "stepped forward");
    }

    #[test]
    fn who_waits_is_looked_at_again_and_who_waits_no_longer_is_not() {
        let mut records = Records::default();
        for number in 1..=3 {
            comes(&mut records, number, number);
        }
        let looks = |records: &mut Records, ms| -> Vec<u64> {
            records.looks_due(Steady(ms), 2).iter().map(|ticket| ticket.number).collect()
        };
        assert_eq!(looks(&mut records, 9_999), [0; 0]);
        assert_eq!(looks(&mut records, 10_003), [1, 2], "so many at once");
        assert_eq!(looks(&mut records, 10_003), [3]);
        assert_eq!(looks(&mut records, 20_002), [0; 0]);
        records.reserved(&lease(1), &waiting(1), Epoch(1));
        records.unserved(&ticket(2), Ending::Undelivered, String::new(), at(20_000));
        assert_eq!(looks(&mut records, 60_000), [3]);
        assert!(records.stands(&place(1, 1, 1), BEGIN).is_none());
        assert_eq!((records.looks.len(), records.by_ticket.len()), (1, 1));
    }
}
