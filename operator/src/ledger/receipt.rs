//! Writes receipts, off the critical path (docs/rules.md, Writes per lease).
//!
//! A receipt is created when its lease has waited or run for 2 s, updated when the lease gets on, and written with its
//! end; a lease that is over before that is created once, at its end. Several states of one lease that wait to be written
//! are one write: the latest. While page writes are hard for the API server ([`PressureGauge`]) only ends are written, so
//! that each lease costs one write whatever it lives through. A receipt that cannot be written is tried again for ever, with bounded back-off: its row
//! stays in the account's outbox until it is (L10).

mod record;
mod schedule;
mod standing;

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use spaceport_core::ids::{AccountName, Epoch, LeaseId, LedgerTime};
use spaceport_crds::{GPULease, LeasePhase};
use spaceport_shell::error_chain;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

pub use record::{Crossing, GivenCard, LeaseEnd, LeaseRecord, Progress};
pub use standing::Standing;

use self::record::merged;
use self::schedule::{News, Pace, Pending, Written};
use super::pressure::PressureGauge;
use crate::clock;
use crate::kubeapi::{ApiError, KubeApi, Objects, pause};
use crate::metrics::Metrics;

/// Receipts that are followed at the same time: open leases, and ended ones not yet written. 64 holds of 256 busy
/// accounts; a record is about 2 KiB, so this is at most 32 MiB.
const FOLLOWED_MAX: usize = 16 * 1024;
/// As long as fewer are followed, those that an earlier leader left behind are as well: never instead of an open lease.
const LEFT_BEHIND_UP_TO: usize = FOLLOWED_MAX / 8;
/// Writes at the same time: enough for hundreds a second.
const WRITES_AT_ONCE: usize = 8;
/// The same under pressure: few beside the 16 page writes that callers wait for ...
const WRITES_UNDER_PRESSURE: usize = 2;
/// ... and one more for so many ends that wait, up to as many as ever: an outbox that fills pauses its account (L10).
const ENDS_FOR_ONE_MORE: usize = 128;
/// How often it is looked through all that are followed for receipts that are due. Nobody waits for a receipt; this bounds
/// the work of looking.
const LOOK_PERIOD: Duration = Duration::from_millis(50);
/// Receipts that one look finds at most, so that no newer end waits behind more than these; with more of them due, the next
/// look follows when they are begun. Some eight times what is written at once.
const FOUND_MAX: usize = 64;
/// Time between two writes that say nothing but where a lease stands in its queue: 20 a second, whoever many wait, are a small
/// part of what the API server writes of leases that begin and end at such a time.
const PLACES_APART: Duration = Duration::from_millis(50);
/// Time limit of a write.
const WRITE_LIMIT: Duration = Duration::from_secs(10);
/// Rounds of one write against others who change the same object: the retention, an admin.
const ROUNDS_MAX: usize = 3;

/// What the writer tells the broker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReceiptEvent {
    /// The final receipt is durable (or nobody can ever read it: its namespace is gone); the settled row can leave the
    /// outbox.
    Written {
        /// On whose page the row is.
        account: AccountName,
        /// Which row.
        lease: LeaseId,
    },
}

/// The broker's side: takes records, never waits. A cheap handle.
#[derive(Clone)]
pub struct Receipts {
    /// A std mutex: it is never held across an await.
    followed: Arc<Mutex<Followed>>,
    pressure: PressureGauge,
}

/// What the last look has found. Looking costs far more than a write: there are thousands of open leases that have nothing
/// to be written.
#[derive(Debug, Default)]
struct Found {
    /// When that was.
    at: Option<Instant>,
    /// Receipts that were due then: ends before others, then who waits longest first. What is written of one is what is
    /// known of it when its write begins.
    due: VecDeque<LeaseId>,
    /// More than these were due.
    is_part: bool,
    /// Receipts whose end was not written yet.
    unwritten_ends: usize,
    /// When the last write began that said nothing but where a lease stands.
    place_written: Option<Instant>,
}

/// What the handles share.
#[derive(Default)]
struct Followed {
    by_lease: HashMap<LeaseId, Pending>,
    /// The term that is served; None between two. Beside the leases, so that none of a term gets in behind its end.
    term: Option<Epoch>,
}

/// What becomes of the receipts that earlier leaders left behind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LeftBehind {
    /// So many are being ended from now on.
    pub ended: usize,
    /// So many have to wait until fewer receipts are followed.
    pub left: usize,
}

/// There are too many receipts to follow another. A record without end can be dropped; one with its end stays in the
/// outbox and has to be offered again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{FOLLOWED_MAX} receipts are being followed already")]
pub struct ReceiptsFull;

/// A write of a receipt panicked: a bug of ours, and its lease would wait for ever.
#[derive(Debug, thiserror::Error)]
#[error("a write of a receipt died")]
pub struct ReceiptWriteDied(#[source] tokio::task::JoinError);

/// How a write of a receipt ended.
enum Outcome {
    Written {
        resource_version: String,
    },
    /// There is no namespace to write it to, and so nobody to read it.
    NoPlace,
    Failed(ApiError),
}

// === impl Receipts ===

impl Default for Receipts {
    fn default() -> Self {
        Self::new()
    }
}

impl Receipts {
    /// Nothing to write yet.
    pub fn new() -> Self {
        Self { followed: Arc::default(), pressure: PressureGauge::default() }
    }

    /// The same, which gives way while page writes are hard for the API server.
    #[must_use]
    pub fn giving_way_to(self, pressure: PressureGauge) -> Self {
        Self { pressure, ..self }
    }

    /// Takes the state of a lease as it is now; it replaces what was taken before. `live`: the receipt is to be written
    /// while the lease is open, not only at its end (the pool's `receipts.timing`).
    ///
    /// # Errors
    /// [`ReceiptsFull`], if the lease is not followed yet.
    pub fn record(&self, record: LeaseRecord, live: bool) -> Result<(), ReceiptsFull> {
        let now = clock::monotonic();
        let by_lease = &mut self.lock().by_lease;
        if let Some(known) = by_lease.get_mut(&record.lease) {
            known.update(record, live, now);
            return Ok(());
        }
        if by_lease.len() >= FOLLOWED_MAX {
            return Err(ReceiptsFull);
        }
        by_lease.insert(record.lease.clone(), Pending::new(record, live, now));
        Ok(())
    }

    /// Stops following a lease that never was: its hold failed to be written, or its request left. False if it has a
    /// receipt, or one is being written: that would say `Queued` for ever, so it needs an end.
    pub fn drop_unwritten(&self, lease: &LeaseId) -> bool {
        let by_lease = &mut self.lock().by_lease;
        let is_unwritten = by_lease.get(lease).is_none_or(Pending::is_unwritten);
        if is_unwritten {
            by_lease.remove(lease);
        }
        is_unwritten
    }

    /// A term begins, and with it new leases of those who wait.
    pub fn begin(&self, term: Epoch) {
        self.lock().term = Some(term);
    }

    /// The term that is served; None between two.
    pub fn term(&self) -> Option<Epoch> {
        self.lock().term
    }

    /// The term is over: stops following every lease. Their rows stay in the outboxes, from where the next term offers them
    /// again (L10).
    pub fn forget(&self) {
        *self.lock() = Followed::default();
    }

    /// Ends the receipts of requests that waited in earlier terms: their leases were never held, so nobody else does. Those of
    /// this term are followed, and of an earlier one what has a hold or a row in an outbox. Some of very many are left to the
    /// next time. None while no term is served.
    pub fn end_left_behind(&self, receipts: &[GPULease], now: LedgerTime) -> LeftBehind {
        let begun = clock::monotonic();
        let mut found = LeftBehind::default();
        let mut followed = self.lock();
        let Followed { by_lease, term: Some(term) } = &mut *followed else { return found };
        let term = i64::try_from(term.0).unwrap_or(i64::MAX);
        let waited = receipts.iter().filter(|receipt| {
            let spec = &receipt.spec;
            spec.phase == LeasePhase::Queued && spec.epoch < term
        });
        for record in waited.filter_map(|receipt| LeaseRecord::left_behind(receipt, now)) {
            if by_lease.contains_key(&record.lease) {
                continue;
            }
            if by_lease.len() < LEFT_BEHIND_UP_TO {
                by_lease.insert(record.lease.clone(), Pending::new(record, true, begun));
                found.ended = found.ended.saturating_add(1);
            } else {
                found.left = found.left.saturating_add(1);
            }
        }
        found
    }

    /// Receipts whose end is not written yet.
    #[cfg(test)]
    pub fn unwritten_ends(&self) -> usize {
        self.lock().by_lease.values().filter(|pending| pending.end_is_unwritten()).count()
    }

    /// The newest state of a lease that is followed.
    #[cfg(test)]
    pub fn latest(&self, lease: &LeaseId) -> Option<LeaseRecord> {
        self.lock().by_lease.get(lease).map(|pending| pending.record().clone())
    }

    /// The newest states of all leases that are followed.
    #[cfg(test)]
    pub fn followed(&self) -> Vec<LeaseRecord> {
        self.lock().by_lease.values().map(|pending| pending.record().clone()).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Followed> {
        self.followed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Up to `count` receipts that are due, marked as being written: of those that the last look has found, or of a new
    /// one.
    fn take_due(
        &self,
        now: Instant,
        count: usize,
        pace: Pace,
        found: &mut Found,
    ) -> Vec<(LeaseRecord, Option<Written>)> {
        let by_lease = &mut self.lock().by_lease;
        if found.rests(now).is_zero() {
            look(by_lease, now, pace, found);
        }
        let mut taken = Vec::new();
        while taken.len() < count {
            if found.due.is_empty() && found.is_part {
                look(by_lease, now, pace, found);
            }
            let Some(lease) = found.due.pop_front() else { break };
            // It may have got on since, or be over.
            let Some(pending) = by_lease.get_mut(&lease) else { continue };
            if pending.overdue_since(now, pace).is_some() && found.may_write(pending.news(), now) {
                taken.push(pending.begin());
            }
        }
        taken
    }

    /// Takes in how a write ended. True if the end of the lease is durable now and was not before.
    fn finish(&self, written: &LeaseRecord, outcome: &Outcome, now: Instant) -> bool {
        let by_lease = &mut self.lock().by_lease;
        let Some(known) = by_lease.get_mut(&written.lease) else { return false };
        match outcome {
            Outcome::Written { resource_version } => known.succeeded(written, resource_version.clone(), now),
            Outcome::NoPlace => {
                by_lease.remove(&written.lease);
                written.end.is_some()
            }
            Outcome::Failed(_) => {
                known.failed(now);
                false
            }
        }
    }
}

// === impl Found ===

impl Found {
    /// How long it is until the next look, if what was found lasts so long.
    fn rests(&self, now: Instant) -> Duration {
        self.at.map_or(Duration::ZERO, |at| LOOK_PERIOD.saturating_sub(now.saturating_duration_since(at)))
    }

    /// A write that says nothing but a place does not begin so soon after the last one.
    fn may_write(&mut self, news: News, now: Instant) -> bool {
        if news != News::Place {
            return true;
        }
        let may = self.place_written.is_none_or(|at| now.saturating_duration_since(at) >= PLACES_APART);
        if may {
            self.place_written = Some(now);
        }
        may
    }
}

/// Looks for receipts that are due, and stops following those of which nothing more is to be written.
fn look(by_lease: &mut HashMap<LeaseId, Pending>, now: Instant, pace: Pace, found: &mut Found) {
    // Under pressure that lasts: better a receipt without its last boundaries than an outbox that fills (L10).
    let is_full = by_lease.len() >= FOLLOWED_MAX;
    by_lease.retain(|_, pending| !(pending.is_over(now) || (is_full && pending.can_be_spared())));
    found.at = Some(now);
    found.unwritten_ends = 0;
    let mut due: Vec<(News, Instant, &LeaseId)> = Vec::new();
    // The next look comes no sooner than another place may be written: one is enough.
    let mut place: Option<(Instant, &LeaseId)> = None;
    for (lease, pending) in by_lease.iter() {
        found.unwritten_ends += usize::from(pending.end_is_unwritten());
        let Some(since) = pending.overdue_since(now, pace) else { continue };
        match pending.news() {
            News::Place if place.is_some_and(|(longest, _)| longest <= since) => {}
            News::Place => place = Some((since, lease)),
            news => due.push((news, since, lease)),
        }
    }
    let order = |(news, since, _): &(News, Instant, &LeaseId)| (*news, *since);
    found.is_part = due.len() > FOUND_MAX;
    if found.is_part {
        due.select_nth_unstable_by_key(FOUND_MAX, order);
        due.truncate(FOUND_MAX);
    }
    due.sort_unstable_by_key(order);
    let place = place.map(|(_, lease)| lease).filter(|_| !found.is_part);
    found.due = due.into_iter().map(|(_, _, lease)| lease).chain(place).cloned().collect();
}

/// Writes what is due until `stop`. What is not written then is found again in the outbox at the next start (L10).
///
/// # Errors
/// [`ReceiptWriteDied`]: the process must end.
pub async fn run<I>(
    receipts: Receipts,
    api: KubeApi,
    metrics: Metrics,
    events: mpsc::Sender<I>,
    stop: CancellationToken,
) -> Result<(), ReceiptWriteDied>
where
    I: From<ReceiptEvent> + Send + 'static,
{
    let mut writes: JoinSet<(LeaseRecord, Outcome)> = JoinSet::new();
    let mut found = Found::default();
    loop {
        let now = clock::monotonic();
        let is_high = receipts.pressure.is_high(now);
        let at_once = if is_high { at_once_under_pressure(found.unwritten_ends) } else { WRITES_AT_ONCE };
        let room = at_once.saturating_sub(writes.len());
        metrics.set_write_pressure(is_high);
        let pace = if is_high { Pace::EndsOnly } else { Pace::Live };
        for (record, written) in receipts.take_due(now, room, pace, &mut found) {
            let api = api.clone();
            writes.spawn(async move {
                let objects = api.namespace::<GPULease>(&record.space.namespace);
                let outcome = write(&objects, &record, written).await;
                (record, outcome)
            });
        }
        metrics.set_receipts_pending(found.unwritten_ends);
        tokio::select! {
            Some(ended) = writes.join_next() => {
                let (record, outcome) = ended.map_err(ReceiptWriteDied)?;
                if !take_outcome(&receipts, &metrics, &events, record, &outcome).await {
                    return Ok(());
                }
            }
            waited = pause(found.rests(now), &stop) => if !waited { return Ok(()) },
        }
    }
}

const fn at_once_under_pressure(unwritten_ends: usize) -> usize {
    let at_once = WRITES_UNDER_PRESSURE + unwritten_ends / ENDS_FOR_ONE_MORE;
    if at_once < WRITES_AT_ONCE { at_once } else { WRITES_AT_ONCE }
}

/// False if the broker is gone.
async fn take_outcome<I: From<ReceiptEvent>>(
    receipts: &Receipts,
    metrics: &Metrics,
    events: &mpsc::Sender<I>,
    record: LeaseRecord,
    outcome: &Outcome,
) -> bool {
    metrics.receipt_write(matches!(outcome, Outcome::Written { .. }));
    match outcome {
        Outcome::Written { .. } => {}
        Outcome::NoPlace => tracing::warn!(
            lease = %record.lease, namespace = record.space.namespace,
            "A receipt is given up: its namespace is gone"
        ),
        Outcome::Failed(error) => {
            if error.is_overload() {
                receipts.pressure.overloaded();
            }
            tracing::warn!(
                lease = %record.lease, namespace = record.space.namespace, error = %error_chain(error),
                "A receipt cannot be written; it is tried again"
            );
        }
    }
    if !receipts.finish(&record, outcome, clock::monotonic()) {
        return true;
    }
    let event = ReceiptEvent::Written { account: record.account, lease: record.lease };
    events.send(event.into()).await.is_ok()
}

/// Creates or replaces one receipt. Idempotent: written again it changes nothing.
async fn write(objects: &Objects<GPULease>, record: &LeaseRecord, written: Option<Written>) -> Outcome {
    let mut known_version = written.map(|written| written.resource_version);
    for _ in 0..ROUNDS_MAX {
        let mut receipt = record.receipt();
        let result = match known_version.take() {
            Some(version) => {
                receipt.metadata.resource_version = Some(version);
                objects.replace(&receipt, WRITE_LIMIT).await
            }
            None => objects.create(&receipt).await,
        };
        match result {
            Ok(receipt) => return written_as(receipt),
            Err(ApiError::Exists { .. } | ApiError::Conflict { .. }) => {}
            // Created below if it was deleted, else its namespace is gone.
            Err(ApiError::NotFound { .. }) => match objects.create(&record.receipt()).await {
                Ok(receipt) => return written_as(receipt),
                Err(ApiError::NotFound { .. }) => return Outcome::NoPlace,
                Err(ApiError::Exists { .. }) => {}
                Err(error) => return refused(error),
            },
            Err(error) => return refused(error),
        }
        match replace_found(objects, record).await {
            Ok(Some(outcome)) => return outcome,
            Ok(None) => {}
            Err(error) => return refused(error),
        }
    }
    let call = crate::kubeapi::Call { verb: "write", kind: "GPULease".to_owned(), name: record.object_name() };
    Outcome::Failed(ApiError::Conflict { call })
}

/// Writes over a receipt that is there. None if it has changed or gone meanwhile.
async fn replace_found(objects: &Objects<GPULease>, record: &LeaseRecord) -> Result<Option<Outcome>, ApiError> {
    let Some(mut found) = objects.get(&record.object_name()).await? else { return Ok(None) };
    let Some(spec) = merged(&found.spec, record.receipt().spec) else { return Ok(Some(written_as(found))) };
    found.spec = spec;
    match objects.replace(&found, WRITE_LIMIT).await {
        Ok(receipt) => Ok(Some(written_as(receipt))),
        Err(ApiError::Conflict { .. } | ApiError::NotFound { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

fn written_as(receipt: GPULease) -> Outcome {
    Outcome::Written { resource_version: receipt.metadata.resource_version.unwrap_or_default() }
}

fn refused(error: ApiError) -> Outcome {
    match &error {
        // Nothing can be created in a namespace that is being deleted; the API server says so in words only.
        ApiError::Refused { code: 403, message, .. } if message.contains("because it is being terminated") => {
            Outcome::NoPlace
        }
        _ => Outcome::Failed(error),
    }
}

#[cfg(test)]
mod tests;
