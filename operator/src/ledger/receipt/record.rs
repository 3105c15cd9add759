//! What is known of one lease, and the receipt that people read. Pure.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use spaceport_core::ids::{AccountName, Epoch, LeaseId, LedgerTime, NodeName, Size, SpaceKey, Steady};
use spaceport_core::page::{Closed, Ending, Hold, Part, ShortenedBy};
use spaceport_crds::gpu_lease::MAX_TIMELINE;
use spaceport_crds::names::{ACCOUNT_LABEL, LEASE_LABEL, SPACE_LABEL};
use spaceport_crds::{GPULease, GPULeaseSpec, Isolation, LeaseBoundaries, LeasePhase};

use super::standing::Standing;
use crate::fault::{self, Fault};
use crate::ledger::convert::{outcome_reason, part_row, shortened, shortened_reason, size_of, size_text};
use crate::ledger::display::seconds;

/// Longest value of a label; names may be longer.
const LABEL_MAX: usize = 63;
/// Longest UUID that the schema of a receipt takes; NVML's have 40 characters.
const UUID_MAX: usize = 96;
/// Longest line of a timeline, characters; the schema allows 256.
const LINE_MAX: usize = 255;

/// One lease as the broker knows it.
#[derive(Clone, Debug, PartialEq)]
pub struct LeaseRecord {
    /// Its id.
    pub lease: LeaseId,
    /// Who pays.
    pub account: AccountName,
    /// Who asked; the receipt lies in its namespace.
    pub space: SpaceKey,
    /// Size asked for.
    pub size: Size,
    /// Charged milliseconds for each of use.
    pub weight: u64,
    /// Longest run as the function declares it, unweighted milliseconds.
    pub declared_ms: u64,
    /// What it was given of that, and why it is less.
    pub shortened: Option<(u64, ShortenedBy)>,
    /// Where it is, while it has no end.
    pub progress: Progress,
    /// Where it stands in its queue, or stood last.
    pub standing: Option<Standing>,
    /// The node: that of its pod while it waits, and the same once there is a hold.
    pub node: Option<NodeName>,
    /// The card, once the node has picked it.
    pub card: Option<GivenCard>,
    /// What separates it from its neighbour, as the node says it.
    pub isolation: Option<String>,
    /// How the identity was obtained.
    pub via: String,
    /// Term in which it was made.
    pub epoch: Epoch,
    /// Generation of the tier it was admitted under.
    pub generation: i64,
    /// Which sources it was taken from.
    pub parts: Vec<Part>,
    /// When its request came; None if nobody saw it in this term. How long it waited is measured by this, for the clock of
    /// its timeline may be stepped (L20).
    pub arrived: Option<Steady>,
    /// The boundaries it has crossed, in any order.
    pub timeline: Vec<Crossing>,
    /// Its end, once it is on the page.
    pub end: Option<LeaseEnd>,
}

/// A card that a lease was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GivenCard {
    index: u32,
    uuid: Option<String>,
}

impl GivenCard {
    /// Its index on its node, and its UUID as the node's inventory has it. One that no receipt can show is left out: a
    /// receipt must never fail to be written because of it (L10).
    pub fn new(index: u32, uuid: &str) -> Self {
        let shown = !uuid.is_empty() && uuid.chars().count() <= UUID_MAX;
        Self { index, uuid: shown.then(|| uuid.to_owned()) }
    }
}

/// Where a lease without end is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Progress {
    /// Waits for its place.
    Queued,
    /// Reserved; the worker is not let in yet.
    Reserved,
    /// The clock runs.
    Running,
}

/// A boundary that was crossed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Crossing {
    /// `Requested`, `Queued`, `Reserved`, `Assigned`, `Allowed`, … (docs/rules.md).
    pub boundary: String,
    /// When, in ledger time.
    pub at: LedgerTime,
    /// Numbers, or empty.
    pub detail: String,
}

/// How a lease ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseEnd {
    /// How.
    pub ending: Ending,
    /// Unweighted milliseconds from clock start to end.
    pub used_ms: u64,
    /// Charged, weighted milliseconds.
    pub charged_ms: u64,
    /// One sentence for people; empty where there is nothing to add.
    pub message: String,
}

// === impl LeaseRecord ===

impl LeaseRecord {
    /// The record of an open hold of which nothing else is known: after a fail-over.
    pub fn of_hold(account: &AccountName, hold: &Hold) -> Self {
        Self {
            lease: hold.lease.clone(),
            account: account.clone(),
            space: hold.space.clone(),
            size: hold.size,
            weight: hold.weight,
            declared_ms: hold.shortened.map_or(hold.declared_ms, |shortened| shortened.declared_ms),
            shortened: hold.shortened.map(|shortened| (hold.declared_ms, shortened.by)),
            progress: Progress::Reserved,
            standing: None,
            node: Some(hold.node.clone()),
            card: None,
            isolation: None,
            via: hold.via.clone(),
            epoch: hold.epoch,
            generation: hold.generation,
            parts: hold.parts.clone(),
            arrived: None,
            timeline: vec![Crossing { boundary: "Reserved".to_owned(), at: hold.since, detail: String::new() }],
            end: None,
        }
    }

    /// The record of a settled row whose receipt was lost with its writer, from the page alone.
    pub fn rebuilt(account: &AccountName, closed: &Closed) -> Self {
        let mut record = Self::of_hold(account, &closed.hold);
        let entry = |boundary: &str, detail: String| Crossing { boundary: boundary.to_owned(), at: closed.at, detail };
        let settled = format!("used {}, charged {}", seconds(closed.used_ms), seconds(closed.charged_ms));
        record.timeline.push(entry("Settled", settled));
        record.timeline.push(entry("Rebuilt", "from the account's page; boundaries not listed were lost".to_owned()));
        record.end = Some(LeaseEnd {
            ending: closed.ending,
            used_ms: closed.used_ms,
            charged_ms: closed.charged_ms,
            message: String::new(),
        });
        record
    }

    /// The end of a request that waited under an earlier leader, from its receipt alone: its lease was never held, so no page
    /// knows of it. None if the receipt does not say what one of the ledger's says.
    pub fn left_behind(receipt: &GPULease, now: LedgerTime) -> Option<Self> {
        let spec = &receipt.spec;
        let hold = Hold {
            lease: LeaseId::new(&spec.lease),
            space: SpaceKey::new(receipt.metadata.namespace.as_deref()?, &spec.space, &spec.space_uid),
            parts: Vec::new(),
            node: NodeName::new(spec.node.as_deref()?),
            avoid: Vec::new(),
            size: size_of(spec.size),
            weight: u64::try_from(spec.weight).ok()?,
            declared_ms: u64::try_from(spec.declared_milliseconds).ok()?,
            epoch: Epoch(u64::try_from(spec.epoch).ok()?),
            since: now,
            after: None,
            generation: spec.generation,
            via: spec.via.clone(),
            cookie: None,
            shortened: None,
            budget: None,
        };
        let record = Self::of_hold(&AccountName::new(&spec.account), &hold);
        let timeline =
            vec![Crossing { boundary: "Settled".to_owned(), at: now, detail: "used 0s, charged 0s".to_owned() }];
        let message =
            "the leader's term ended while the request waited; a caller who stayed has another lease since".to_owned();
        let end = LeaseEnd { ending: Ending::Undelivered, used_ms: 0, charged_ms: 0, message };
        let record = Self { progress: Progress::Queued, timeline, end: Some(end), ..record };
        // It is written under its name, or not at all.
        (receipt.metadata.name.as_deref() == Some(record.object_name().as_str())).then_some(record)
    }

    /// The phase that the receipt shows.
    pub fn phase(&self) -> LeasePhase {
        let Some(end) = &self.end else {
            return match self.progress {
                Progress::Queued => LeasePhase::Queued,
                Progress::Reserved => LeasePhase::Reserved,
                Progress::Running => LeasePhase::Running,
            };
        };
        match end.ending {
            Ending::Expired => LeasePhase::Expired,
            Ending::NeverAllowed | Ending::Undelivered | Ending::Refused | Ending::PlatformFault | Ending::NoDevice => {
                LeasePhase::Refunded
            }
            // Cancelled before it ran.
            Ending::Cancelled if end.charged_ms == 0 => LeasePhase::Refunded,
            Ending::Cancelled | Ending::Released | Ending::Failed | Ending::WorkerDied | Ending::Deadline => {
                LeasePhase::Settled
            }
        }
    }

    /// What the receipt says of its place in the queue: nothing once it waits no longer.
    pub fn shown_standing(&self) -> Option<&Standing> {
        self.standing.as_ref().filter(|_| self.phase() == LeasePhase::Queued)
    }

    /// True once the slot is back, or if it never had one: nothing more will be known of it.
    pub fn is_complete(&self) -> bool {
        let crossed = |name: &str| self.timeline.iter().any(|crossing| crossing.boundary == name);
        self.end.is_some() && (crossed("Freed") || crossed("Rebuilt") || !crossed("Assigned"))
    }

    /// Name of the receipt: `<space>-<ulid>`.
    pub fn object_name(&self) -> String {
        format!("{}-{}", self.space.name, self.lease)
    }

    /// The receipt.
    pub fn receipt(&self) -> GPULease {
        let labels = [
            (SPACE_LABEL, self.space.name.as_str()),
            (ACCOUNT_LABEL, self.account.as_str()),
            (LEASE_LABEL, self.lease.as_str()),
        ];
        // A label's value may not be as long as a name; `spec` has the whole name, and field selectors for it.
        let labels = labels.into_iter().filter(|(_, value)| value.len() <= LABEL_MAX);
        GPULease {
            metadata: ObjectMeta {
                name: Some(self.object_name()),
                namespace: Some(self.space.namespace.clone()),
                labels: Some(labels.map(|(key, value)| (key.to_owned(), value.to_owned())).collect()),
                ..ObjectMeta::default()
            },
            spec: self.spec(),
        }
    }

    fn spec(&self) -> GPULeaseSpec {
        let end = self.end.as_ref();
        let isolation = self.isolation.as_deref();
        let is_less = fault::is(Fault::ReceiptsSayLess);
        GPULeaseSpec {
            lease: self.lease.to_string(),
            account: self.account.to_string(),
            space: self.space.name.clone(),
            space_uid: self.space.uid.clone(),
            size: size_text(self.size),
            weight: amount(self.weight),
            phase: self.phase(),
            place: self.shown_standing().map(Standing::row),
            waits: self.shown_standing().map(Standing::column),
            declared_milliseconds: amount(self.declared_ms),
            used_milliseconds: end.map(|end| amount(end.used_ms)),
            charged_milliseconds: end.map(|end| amount(end.charged_ms / if is_less { 2 } else { 1 })),
            declared: seconds(self.declared_ms),
            granted_milliseconds: self.shortened.map(|(granted_ms, _)| amount(granted_ms)),
            granted: self.shortened.map(|(granted_ms, _)| seconds(granted_ms)),
            shortened_by: self.shortened.map(|(_, by)| shortened_reason(by).as_str().to_owned()),
            used: end.map(|end| seconds(end.used_ms)),
            charged: end.map(|end| seconds(end.charged_ms)),
            node: self.node.as_ref().map(ToString::to_string),
            gpu: self.card.as_ref().and_then(|card| i32::try_from(card.index).ok()),
            gpu_uuid: self.card.as_ref().and_then(|card| card.uuid.clone()),
            isolation: isolation.and_then(|text| Isolation::ALL.iter().copied().find(|known| known.as_str() == text)),
            outcome: end.map(|end| outcome_reason(end.ending).as_str().to_owned()),
            message: end.map(|end| shortened(&end.message)).filter(|message| !message.is_empty()),
            via: self.via.clone(),
            request_id: None,
            epoch: amount(self.epoch.0),
            generation: self.generation,
            // A part that cannot be stored could not have been held either.
            parts: self.parts.iter().filter_map(|part| part_row(part).ok()).collect(),
            timeline: self.lines(),
            boundaries: self.boundaries(),
        }
    }

    fn lines(&self) -> Vec<String> {
        let mut crossings: Vec<&Crossing> = self.timeline.iter().collect();
        // Stable: boundaries of one millisecond stay in the order in which they were noted.
        crossings.sort_by_key(|crossing| crossing.at);
        bounded(crossings.into_iter().map(Crossing::line).collect())
    }

    fn boundaries(&self) -> LeaseBoundaries {
        let mut boundaries = LeaseBoundaries::default();
        for crossing in &self.timeline {
            let Some(field) = field_of(&mut boundaries, &crossing.boundary) else { continue };
            let at = Timestamp::from_millisecond(crossing.at.0).ok().map(MicroTime);
            // Of boundaries crossed twice (a promise issued anew) the first time counts; the timeline has both.
            if field.is_none() {
                *field = at;
            }
        }
        boundaries
    }
}

fn amount(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn field_of<'a>(boundaries: &'a mut LeaseBoundaries, name: &str) -> Option<&'a mut Option<MicroTime>> {
    Some(match name {
        "Requested" => &mut boundaries.requested,
        "Queued" => &mut boundaries.queued,
        "Reserved" => &mut boundaries.reserved,
        "Assigned" => &mut boundaries.assigned,
        // A reused worker sends no /allow: its clock starts when the grant is answered.
        "Allowed" | "Reused" => &mut boundaries.allowed,
        "DeviceOpened" => &mut boundaries.device_opened,
        "ContextSeen" => &mut boundaries.context_seen,
        "Released" => &mut boundaries.released,
        "GateClosed" => &mut boundaries.gate_closed,
        "Settled" => &mut boundaries.settled,
        "Freed" => &mut boundaries.freed,
        _ => return None,
    })
}

impl Crossing {
    /// `2026-11-21T12:00:00.123Z Settled: used 5s, charged 10s`. Lines sort by time as text.
    fn line(&self) -> String {
        let time = Timestamp::from_millisecond(self.at.0).unwrap_or(Timestamp::UNIX_EPOCH);
        let time = time.strftime("%Y-%m-%dT%H:%M:%S%.3fZ");
        let text = match self.detail.as_str() {
            "" => format!("{time} {}", self.boundary),
            detail => format!("{time} {}: {detail}", self.boundary),
        };
        text.chars().take(LINE_MAX).collect()
    }
}

/// The first and the last lines of a timeline that is too long: the beginning and the end say most.
fn bounded(mut lines: Vec<String>) -> Vec<String> {
    if lines.len() > MAX_TIMELINE {
        let last = lines.split_off(lines.len() - MAX_TIMELINE / 2);
        lines.truncate(MAX_TIMELINE - last.len());
        lines.extend(last);
    }
    lines
}

/// What to write where a receipt exists already, made by a writer that is gone: the newer state, with the lines and times
/// of both. None if what is there is final, and so says everything that counts. What is final stays as it is (invariant 3,
/// and the API server would refuse another phase or charge for ever): at most the return of its slot is added.
pub fn merged(found: &GPULeaseSpec, mut ours: GPULeaseSpec) -> Option<GPULeaseSpec> {
    if found.phase.is_final() && ours.boundaries.freed.is_none() {
        return None;
    }
    let mut lines = found.timeline.clone();
    lines.extend(ours.timeline.iter().filter(|line| !found.timeline.contains(line)).cloned());
    lines.sort();
    ours.timeline = bounded(lines);
    let known = &found.boundaries;
    let mine = &mut ours.boundaries;
    for (mine, known) in [
        (&mut mine.requested, &known.requested),
        (&mut mine.queued, &known.queued),
        (&mut mine.reserved, &known.reserved),
        (&mut mine.assigned, &known.assigned),
        (&mut mine.allowed, &known.allowed),
        (&mut mine.device_opened, &known.device_opened),
        (&mut mine.context_seen, &known.context_seen),
        (&mut mine.released, &known.released),
        (&mut mine.gate_closed, &known.gate_closed),
        (&mut mine.settled, &known.settled),
        (&mut mine.freed, &known.freed),
    ] {
        if mine.is_none() {
            mine.clone_from(known);
        }
    }
    ours.gpu = ours.gpu.or(found.gpu);
    if ours.gpu == found.gpu {
        ours.gpu_uuid = ours.gpu_uuid.or_else(|| found.gpu_uuid.clone());
    }
    ours.isolation = ours.isolation.or(found.isolation);
    ours.message = ours.message.or_else(|| found.message.clone());
    if found.phase.is_final() {
        let end = found.clone();
        ours.phase = end.phase;
        (ours.used_milliseconds, ours.used) = (end.used_milliseconds, end.used);
        (ours.charged_milliseconds, ours.charged) = (end.charged_milliseconds, end.charged);
        ours.outcome = end.outcome;
        ours.message = end.message.or(ours.message);
        // Only a lease that waits has a place.
        (ours.place, ours.waits) = (None, None);
    }
    Some(ours)
}

#[cfg(test)]
pub(super) mod tests {
    use spaceport_core::page::Shortened;

    use super::super::standing::tests::place;
    use super::*;

    const AT: LedgerTime = LedgerTime(1_800_000_000_123);

    pub(in super::super) fn hold() -> Hold {
        Hold {
            cookie: None,
            shortened: None,
            budget: None,
            lease: LeaseId::new("01jd8x0000000000000000000a"),
            space: SpaceKey::new("demo", "hello", "u"),
            parts: Vec::new(),
            node: NodeName::new("gpu-1"),
            avoid: Vec::new(),
            size: Size::Xlarge,
            weight: 2,
            declared_ms: 10_000,
            epoch: Epoch(3),
            since: AT,
            after: None,
            generation: 1,
            via: "token".to_owned(),
        }
    }

    fn bob() -> AccountName {
        AccountName::new("bob")
    }

    fn crossing(boundary: &str, after_ms: u64) -> Crossing {
        Crossing { boundary: boundary.to_owned(), at: AT.plus(after_ms), detail: String::new() }
    }

    fn ended(record: LeaseRecord, ending: Ending, used_ms: u64, charged_ms: u64) -> LeaseRecord {
        LeaseRecord { end: Some(LeaseEnd { ending, used_ms, charged_ms, message: String::new() }), ..record }
    }

    #[test]
    fn running_lease_shows_nothing_that_time_changes() {
        let mut record = LeaseRecord::of_hold(&bob(), &hold());
        record.progress = Progress::Running;
        record.card = Some(GivenCard::new(1, "GPU-5c1f"));
        record.isolation = Some("Exclusive".to_owned());
        record.timeline.push(crossing("Allowed", 20));
        let receipt = record.receipt();
        assert_eq!(receipt.metadata.name.as_deref(), Some("hello-01jd8x0000000000000000000a"));
        assert_eq!(receipt.metadata.namespace.as_deref(), Some("demo"));
        let spec = receipt.spec;
        assert_eq!(
            (spec.phase, spec.declared.as_str(), spec.used, spec.charged),
            (LeasePhase::Running, "10s", None, None)
        );
        assert_eq!((spec.gpu, spec.isolation), (Some(1), Some(Isolation::Exclusive)));
        assert_eq!(spec.gpu_uuid.as_deref(), Some("GPU-5c1f"));
        assert_eq!(spec.timeline, ["2027-01-15T08:00:00.123Z Reserved", "2027-01-15T08:00:00.143Z Allowed"]);
        assert!(spec.boundaries.allowed.is_some() && spec.boundaries.freed.is_none());
    }

    #[test]
    fn only_a_lease_that_waits_shows_its_place() {
        let mut record = LeaseRecord::of_hold(&bob(), &hold());
        record.standing = Some(Standing::of(&place(3), AT));
        assert_eq!(record.receipt().spec.place, None, "it has its turn");
        record.progress = Progress::Queued;
        let spec = record.receipt().spec;
        assert_eq!((spec.waits.as_deref(), spec.place.and_then(|place| place.position)), (Some("node, 3rd"), Some(3)));
        let left = ended(record, Ending::Undelivered, 0, 0).receipt().spec;
        assert_eq!((left.phase, left.waits, left.place), (LeasePhase::Refunded, None, None));
    }

    #[test]
    fn a_lease_that_was_given_less_shows_both_durations_and_why() {
        let shortened = Some(Shortened { declared_ms: 60_000, by: ShortenedBy::RemainingQuota });
        let record = LeaseRecord::of_hold(&bob(), &Hold { shortened, ..hold() });
        let spec = record.receipt().spec;
        assert_eq!((spec.declared.as_str(), spec.declared_milliseconds), ("60s", 60_000));
        assert_eq!((spec.granted.as_deref(), spec.granted_milliseconds), (Some("10s"), Some(10_000)));
        assert_eq!(spec.shortened_by.as_deref(), Some("RemainingQuota"));
        let whole = LeaseRecord::of_hold(&bob(), &hold()).receipt().spec;
        assert_eq!((whole.granted, whole.shortened_by), (None, None));
    }

    #[test]
    fn a_uuid_that_no_receipt_may_have_is_left_out() {
        for uuid in [String::new(), "G".repeat(UUID_MAX + 1)] {
            let record = LeaseRecord { card: Some(GivenCard::new(1, &uuid)), ..LeaseRecord::of_hold(&bob(), &hold()) };
            let spec = record.receipt().spec;
            assert_eq!((spec.gpu, spec.gpu_uuid), (Some(1), None));
        }
    }

    #[test]
    fn ended_lease_shows_use_and_charge() {
        let record = ended(LeaseRecord::of_hold(&bob(), &hold()), Ending::Released, 5020, 10_040);
        let spec = record.receipt().spec;
        assert_eq!((spec.phase, spec.outcome.as_deref()), (LeasePhase::Settled, Some("Released")));
        assert_eq!((spec.used.as_deref(), spec.charged.as_deref()), (Some("5.02s"), Some("10.04s")));
        assert_eq!((spec.used_milliseconds, spec.charged_milliseconds), (Some(5020), Some(10_040)));
    }

    #[test]
    fn phase_says_whether_it_was_charged_refunded_or_given_up() {
        let phase = |ending, charged| ended(LeaseRecord::of_hold(&bob(), &hold()), ending, 10, charged).phase();
        assert_eq!(phase(Ending::Deadline, 20), LeasePhase::Settled);
        assert_eq!(phase(Ending::Released, 0), LeasePhase::Settled);
        assert_eq!(phase(Ending::NeverAllowed, 0), LeasePhase::Refunded);
        assert_eq!(phase(Ending::Cancelled, 0), LeasePhase::Refunded);
        assert_eq!(phase(Ending::Cancelled, 20), LeasePhase::Settled);
        assert_eq!(phase(Ending::PlatformFault, 0), LeasePhase::Refunded);
        assert_eq!(phase(Ending::Expired, 0), LeasePhase::Expired);
    }

    #[test]
    fn lines_are_in_order_of_time_and_bounded() {
        let mut record = LeaseRecord::of_hold(&bob(), &hold());
        record.timeline.extend((1..100).rev().map(|step| crossing("Queued", step)));
        let lines = record.receipt().spec.timeline;
        assert_eq!(lines.len(), MAX_TIMELINE);
        assert!(lines.is_sorted());
        assert!(lines[0].ends_with("Reserved") && lines[MAX_TIMELINE - 1].contains("00.222Z"), "{lines:?}");
    }

    #[test]
    fn rebuilt_receipt_says_so_and_is_complete() {
        let closed = Closed {
            hold: hold().into(),
            ending: Ending::Released,
            used_ms: 5000,
            charged_ms: 10_000,
            at: AT.plus(9000),
        };
        let record = LeaseRecord::rebuilt(&bob(), &closed);
        assert!(record.is_complete());
        let spec = record.receipt().spec;
        assert_eq!(spec.timeline[1], "2027-01-15T08:00:09.123Z Settled: used 5s, charged 10s");
        assert!(spec.timeline[2].contains("Rebuilt: from the account's page"));
    }

    #[test]
    fn what_waited_under_an_earlier_leader_ends_at_no_charge_and_keeps_its_lines() {
        let queued = LeaseRecord { progress: Progress::Queued, ..LeaseRecord::of_hold(&bob(), &hold()) };
        let found = queued.receipt();
        let end = LeaseRecord::left_behind(&found, AT.plus(60_000)).unwrap();
        assert!(end.is_complete());
        assert_eq!((&end.lease, &end.account, &end.space), (&queued.lease, &queued.account, &queued.space));
        let spec = merged(&found.spec, end.receipt().spec).unwrap();
        assert_eq!((spec.phase, spec.outcome.as_deref()), (LeasePhase::Refunded, Some("Undelivered")));
        assert_eq!((spec.charged_milliseconds, spec.epoch), (Some(0), 3));
        let lines = ["2027-01-15T08:00:00.123Z Reserved", "2027-01-15T08:01:00.123Z Settled: used 0s, charged 0s"];
        assert_eq!(spec.timeline, lines);
        let renamed = GPULease { metadata: ObjectMeta { name: Some("x".to_owned()), ..found.metadata }, ..found };
        assert_eq!(LeaseRecord::left_behind(&renamed, AT), None);
    }

    #[test]
    fn what_is_final_only_learns_that_its_slot_is_back() {
        let refunded = ended(LeaseRecord::of_hold(&bob(), &hold()), Ending::Undelivered, 0, 0).receipt().spec;
        let mut record = ended(LeaseRecord::of_hold(&bob(), &hold()), Ending::Released, 5000, 10_000);
        assert_eq!(merged(&refunded, record.receipt().spec), None);
        record.timeline.push(crossing("Freed", 9000));
        let spec = merged(&refunded, record.receipt().spec).unwrap();
        assert_eq!((spec.phase, spec.outcome.as_deref()), (LeasePhase::Refunded, Some("Undelivered")));
        assert_eq!((spec.charged_milliseconds, spec.charged.as_deref()), (Some(0), Some("0s")));
        assert_eq!((spec.used_milliseconds, spec.used.as_deref()), (Some(0), Some("0s")));
        assert!(spec.boundaries.freed.is_some());
    }

    #[test]
    fn complete_only_when_the_slot_is_back() {
        let mut record = LeaseRecord::of_hold(&bob(), &hold());
        assert!(!record.is_complete());
        record.timeline.push(crossing("Assigned", 1));
        record = ended(record, Ending::Released, 1, 2);
        assert!(!record.is_complete());
        record.timeline.push(crossing("Freed", 2));
        assert!(record.is_complete());
        let never_assigned = ended(LeaseRecord::of_hold(&bob(), &hold()), Ending::Refused, 0, 0);
        assert!(never_assigned.is_complete());
    }

    #[test]
    fn what_a_lost_writer_knew_is_kept() {
        let mut running = LeaseRecord::of_hold(&bob(), &hold());
        running.progress = Progress::Running;
        running.card = Some(GivenCard::new(1, "GPU-5c1f"));
        running.timeline.push(crossing("Allowed", 20));
        let found = running.receipt().spec;
        let closed = Closed {
            hold: hold().into(),
            ending: Ending::Released,
            used_ms: 5000,
            charged_ms: 10_000,
            at: AT.plus(9000),
        };
        let rebuilt = LeaseRecord::rebuilt(&bob(), &closed).receipt().spec;
        let merged_spec = merged(&found, rebuilt.clone()).unwrap();
        assert_eq!(merged_spec.phase, LeasePhase::Settled);
        assert_eq!(merged_spec.boundaries.allowed, found.boundaries.allowed);
        assert_eq!((merged_spec.gpu, merged_spec.timeline.len()), (Some(1), 4));
        assert_eq!(merged_spec.gpu_uuid.as_deref(), Some("GPU-5c1f"));
        assert_eq!(merged(&merged_spec, rebuilt), None, "what is final stays");
    }
}
