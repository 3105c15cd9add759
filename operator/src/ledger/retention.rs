//! Looks through all receipts once in a while. Those of requests that waited under an earlier leader are ended. Old ones are
//! removed, in batches: beyond the number kept for a Space, and beyond their age; open ones stay. A batch is one request, and
//! none is sent while page writes are hard for the API server.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use kube::ResourceExt as _;
use spaceport_core::ids::{Epoch, LedgerTime};
use spaceport_crds::GPULease;
use spaceport_crds::names::LEASE_LABEL;
use spaceport_shell::error_chain;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::pressure::PressureGauge;
use super::receipt::{LeftBehind, Receipts};
use crate::clock;
use crate::kubeapi::{KubeApi, pause};

/// From the beginning of a term to its first round: by then all leases are known, and whoever still waits has another. A
/// leader that leads for a few minutes removes something too. And from a round that could not do all to the next one.
const FIRST_AFTER: Duration = Duration::from_secs(60);
/// Time between two rounds when nothing more is old.
const PERIOD: Duration = Duration::from_secs(600);
/// How often it is looked whether a round is due, and whether another term has begun.
const LOOK_PERIOD: Duration = Duration::from_secs(1);
/// Receipts removed in one round. Each is a list of all receipts, so they are few; and each looks anew at what pools say, so
/// none lasts longer than two minutes.
const ROUND_MAX: usize = 5000;
/// Receipts of one request. The selector that names them, 27 bytes for each, fits any limit of a request line, and the
/// server, which deletes them one after the other, answers in time.
const BATCH_MAX: usize = 50;
/// Pause after each request, so that the server deletes at most 50 receipts a second.
const BATCH_PAUSE: Duration = Duration::from_secs(1);
/// How often it is looked whether the pressure is over. Nobody waits for the removal.
const PRESSURE_PAUSE: Duration = Duration::from_secs(5);

/// How long receipts are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    /// Final receipts of one Space.
    pub kept: usize,
    /// Age of a final receipt, seconds.
    pub age_max_seconds: u64,
}

impl Retention {
    /// The more generous of two: a Space may have receipts from several pools.
    #[must_use]
    pub fn or_longer(self, other: Self) -> Self {
        Self { kept: self.kept.max(other.kept), age_max_seconds: self.age_max_seconds.max(other.age_max_seconds) }
    }
}

/// What a round did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Round {
    /// Receipts that it removed.
    pub removed: usize,
    /// It has seen all receipts, and none of an earlier leader is left to the next one.
    pub is_whole: bool,
}

/// When the rounds are. Pure.
#[derive(Debug)]
struct Rounds {
    next: Instant,
    term: Option<Epoch>,
}

/// Receipts that one request removes.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Batch<'a> {
    namespace: &'a str,
    /// Values of their label [`LEASE_LABEL`].
    leases: Vec<&'a str>,
}

// === impl Rounds ===

impl Rounds {
    /// Leading begins.
    fn new(now: Instant) -> Self {
        Self { next: now + FIRST_AFTER, term: None }
    }

    /// Whether it is time for a round. Each term has its own first one, however long it took to begin, and also one that
    /// begins while we lead: what waited in the term before is to be ended.
    fn is_due(&mut self, term: Option<Epoch>, now: Instant) -> bool {
        if term.is_some() && term != self.term {
            self.next = now + FIRST_AFTER;
        }
        self.term = term;
        self.next <= now
    }

    fn ended(&mut self, round: Round, now: Instant) {
        self.next = now + wait_after(round);
    }
}

/// Ends and removes receipts until `stop`. While no pool says how long they are kept, none is removed.
pub async fn run(
    api: KubeApi,
    retention: watch::Receiver<Option<Retention>>,
    receipts: Receipts,
    pressure: PressureGauge,
    stop: CancellationToken,
) {
    let mut rounds = Rounds::new(clock::monotonic());
    while pause(LOOK_PERIOD, &stop).await {
        if rounds.is_due(receipts.term(), clock::monotonic()) {
            let current = *retention.borrow();
            let round = round(&api, current, &receipts, &pressure, &stop).await;
            rounds.ended(round, clock::monotonic());
        }
    }
}

/// The wait after a round: none if it removed about as many as it may, for then more are old. What is left of one that the
/// API server refused waits. Pure.
const fn wait_after(round: Round) -> Duration {
    match round {
        Round { removed, .. } if removed > ROUND_MAX / 2 => Duration::ZERO,
        Round { is_whole: false, .. } => FIRST_AFTER,
        Round { is_whole: true, .. } => PERIOD,
    }
}

/// False if it is time to stop. Without a limit: receipts that stay too long cost less than what they would delay.
async fn is_calm(pressure: &PressureGauge, stop: &CancellationToken) -> bool {
    while pressure.is_high(clock::monotonic()) {
        if !pause(PRESSURE_PAUSE, stop).await {
            return false;
        }
    }
    true
}

/// One round. Waits while page writes are hard for the API server, and for no longer than until `stop`.
pub async fn round(
    api: &KubeApi,
    retention: Option<Retention>,
    followed: &Receipts,
    pressure: &PressureGauge,
    stop: &CancellationToken,
) -> Round {
    // A list of all receipts is a load as well.
    if !is_calm(pressure, stop).await {
        return Round::default();
    }
    let objects = api.cluster::<GPULease>();
    let listed = tokio::select! {
        () = stop.cancelled() => return Round::default(),
        listed = objects.list(None) => listed,
    };
    let receipts = match listed {
        Ok(receipts) => receipts,
        Err(error) => {
            tracing::warn!(error = %error_chain(&error), "Cannot list receipts; old ones stay for now");
            return Round::default();
        }
    };
    let now = clock::wall();
    let LeftBehind { ended, left } = followed.end_left_behind(&receipts, LedgerTime(now.as_millisecond()));
    if ended > 0 || left > 0 {
        tracing::info!(ended, left, "Requests waited under an earlier leader: their receipts are ended");
    }
    let old = retention.map(|retention| old_receipts(&receipts, retention, now)).unwrap_or_default();
    let mut removed = 0_usize;
    for batch in batches(&old) {
        let objects = api.namespace::<GPULease>(batch.namespace);
        let deleted = tokio::select! {
            () = stop.cancelled() => break,
            deleted = objects.delete_labelled(LEASE_LABEL, &batch.leases) => deleted,
        };
        match deleted {
            Ok(gone) => removed = removed.saturating_add(gone),
            Err(error) => {
                if error.is_overload() {
                    pressure.overloaded();
                }
                tracing::warn!(error = %error_chain(&error), "Cannot remove old receipts; the next round tries again");
            }
        }
        if !pause(BATCH_PAUSE, stop).await || !is_calm(pressure, stop).await {
            break;
        }
    }
    if removed > 0 {
        tracing::info!(removed, left = old.len().saturating_sub(removed), "Removed old receipts");
    }
    Round { removed, is_whole: left == 0 }
}

/// The receipts to remove, oldest first. Pure.
fn old_receipts(receipts: &[GPULease], retention: Retention, now: Timestamp) -> Vec<&GPULease> {
    let created = |receipt: &GPULease| receipt.creation_timestamp().map_or(Timestamp::MAX, |time| time.0);
    let mut spaces: BTreeMap<(String, &str), Vec<&GPULease>> = BTreeMap::new();
    for receipt in receipts.iter().filter(|receipt| receipt.spec.phase.is_final()) {
        spaces.entry((receipt.namespace().unwrap_or_default(), &receipt.spec.space)).or_default().push(receipt);
    }
    let age_max = jiff::SignedDuration::from_secs(i64::try_from(retention.age_max_seconds).unwrap_or(i64::MAX));
    let mut old = Vec::new();
    for mut receipts in spaces.into_values() {
        receipts.sort_by_key(|receipt| std::cmp::Reverse(created(receipt)));
        for (index, receipt) in receipts.into_iter().enumerate() {
            if index >= retention.kept || now.duration_since(created(receipt)) > age_max {
                old.push(receipt);
            }
        }
    }
    old.sort_by_key(|receipt| created(receipt));
    old
}

/// The requests of one round, the oldest receipts first. One without its label, which somebody took off, stays. Pure.
fn batches<'a>(old: &[&'a GPULease]) -> Vec<Batch<'a>> {
    let mut batches: Vec<Batch<'a>> = Vec::new();
    for receipt in old.iter().take(ROUND_MAX) {
        let (Some(namespace), Some(lease)) = (&receipt.metadata.namespace, receipt.labels().get(LEASE_LABEL)) else {
            continue;
        };
        let open = batches.iter_mut().find(|batch| batch.namespace == namespace && batch.leases.len() < BATCH_MAX);
        match open {
            Some(batch) => batch.leases.push(lease),
            None => batches.push(Batch { namespace, leases: vec![lease] }),
        }
    }
    batches
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    use serde_json::{Value, json};
    use spaceport_core::ids::LeaseId;
    use spaceport_crds::{GPULeaseSpec, LeasePhase};

    use super::*;
    use crate::kubeapi::fake::{FakeApi, failure};

    const STRICT: Retention = Retention { kept: 1, age_max_seconds: 1 };

    fn receipt(namespace: &str, name: &str, phase: LeasePhase, age_seconds: i64) -> GPULease {
        let mut receipt =
            GPULease::new(name, GPULeaseSpec { space: "hello".to_owned(), phase, ..GPULeaseSpec::default() });
        receipt.metadata.namespace = Some(namespace.to_owned());
        receipt.metadata.labels = Some(BTreeMap::from([(LEASE_LABEL.to_owned(), format!("lease-{name}"))]));
        receipt.metadata.creation_timestamp = Some(Time(Timestamp::from_second(10_000 - age_seconds).unwrap()));
        receipt
    }

    /// Of a request that waited under the leader of term 3.
    fn waited(lease: &str) -> GPULease {
        let mut receipt = receipt("a", &format!("hello-{lease}"), LeasePhase::Queued, 900);
        receipt.spec.lease = lease.to_owned();
        receipt.spec.account = "bob".to_owned();
        receipt.spec.node = Some("gpu-1".to_owned());
        receipt.spec.epoch = 3;
        receipt
    }

    fn list(receipts: &[GPULease]) -> (u16, Value) {
        let list =
            json!({"apiVersion": "spaceport.dev/v1alpha1", "kind": "GPULeaseList", "metadata": {}, "items": receipts});
        (200, list)
    }

    fn removed(receipts: &[GPULease], retention: Retention) -> Vec<String> {
        let now = Timestamp::from_second(10_000).unwrap();
        old_receipts(receipts, retention, now).into_iter().map(|receipt| receipt.name_any()).collect()
    }

    #[test]
    fn oldest_final_receipts_beyond_the_number_go() {
        let receipts = [
            receipt("a", "new", LeasePhase::Settled, 1),
            receipt("a", "running", LeasePhase::Running, 900),
            receipt("a", "oldest", LeasePhase::Refunded, 50),
            receipt("a", "old", LeasePhase::Settled, 40),
            receipt("b", "other-space", LeasePhase::Settled, 60),
        ];
        assert_eq!(removed(&receipts, Retention { kept: 1, age_max_seconds: 1000 }), ["oldest", "old"]);
    }

    #[test]
    fn final_receipts_beyond_their_age_go() {
        let receipts = [
            receipt("a", "old", LeasePhase::Settled, 101),
            receipt("a", "young", LeasePhase::Settled, 100),
            receipt("a", "waiting", LeasePhase::Queued, 500),
        ];
        assert_eq!(removed(&receipts, Retention { kept: 10, age_max_seconds: 100 }), ["old"]);
    }

    #[test]
    fn a_batch_is_of_one_namespace_and_bounded_and_a_round_too() {
        let many: Vec<GPULease> =
            (0..ROUND_MAX + 100).map(|index| receipt("a", &format!("r{index}"), LeasePhase::Settled, 900)).collect();
        let other = receipt("b", "other", LeasePhase::Settled, 900);
        let old: Vec<&GPULease> = std::iter::once(&other).chain(&many).collect();
        let batches = batches(&old);
        assert_eq!(batches[0], Batch { namespace: "b", leases: vec!["lease-other"] });
        assert!(batches[1..].iter().all(|batch| batch.namespace == "a" && batch.leases.len() <= BATCH_MAX));
        assert_eq!(batches.iter().map(|batch| batch.leases.len()).sum::<usize>(), ROUND_MAX);
        assert_eq!(batches.len(), ROUND_MAX / BATCH_MAX + 1, "not one request for each receipt");
        assert_eq!(batches[1].leases[..2], ["lease-r0", "lease-r1"]);
    }

    #[test]
    fn a_round_that_had_enough_to_do_is_followed_by_another() {
        let wait = |removed, is_whole| wait_after(Round { removed, is_whole });
        assert_eq!(wait(ROUND_MAX, true), Duration::ZERO);
        assert_eq!(wait(ROUND_MAX - BATCH_MAX, false), Duration::ZERO, "some were gone already");
        assert_eq!((wait(3, true), wait(0, true)), (PERIOD, PERIOD));
        assert_eq!((wait(3, false), wait(0, false)), (FIRST_AFTER, FIRST_AFTER), "it could not do all");
    }

    #[tokio::test]
    async fn what_waited_under_an_earlier_leader_is_ended_a_minute_after_each_term_begins() {
        let fake = FakeApi::answering([list(&[waited("a")]), list(&[waited("a")])]);
        let (api, receipts, stop) = (fake.connect(), Receipts::new(), CancellationToken::new());
        // No pool says how long receipts are kept.
        let look = async || round(&api, None, &receipts, &PressureGauge::default(), &stop).await;
        let begin = clock::monotonic();
        let after = |seconds| begin + Duration::from_secs(seconds);
        let mut rounds = Rounds::new(begin);
        assert!(rounds.is_due(receipts.term(), after(60)), "the term takes long to begin");
        rounds.ended(look().await, after(60));
        assert!(receipts.followed().is_empty());
        receipts.begin(Epoch(4));
        assert!(!rounds.is_due(receipts.term(), after(70)), "those who stayed come back first");
        assert!(!rounds.is_due(receipts.term(), after(129)));
        assert!(rounds.is_due(receipts.term(), after(130)));
        rounds.ended(look().await, after(130));
        assert!(receipts.latest(&LeaseId::new("a")).is_some_and(|record| record.end.is_some()));
        assert!(!rounds.is_due(receipts.term(), after(729)) && rounds.is_due(receipts.term(), after(730)));

        // A node is ahead: another term begins while we lead.
        rounds.ended(Round { removed: 0, is_whole: true }, after(730));
        receipts.forget();
        assert!(!rounds.is_due(receipts.term(), after(740)));
        receipts.begin(Epoch(9));
        assert!(!rounds.is_due(receipts.term(), after(741)));
        assert!(rounds.is_due(receipts.term(), after(801)));
    }

    #[tokio::test]
    async fn a_round_that_cannot_do_all_is_followed_by_another_soon() {
        let many: Vec<GPULease> = (0..5_000).map(|number| waited(&number.to_string())).collect();
        let fake = FakeApi::answering([list(&many), failure(500, "InternalError")]);
        let (api, receipts, stop) = (fake.connect(), Receipts::new(), CancellationToken::new());
        receipts.begin(Epoch(4));
        let look = async || round(&api, None, &receipts, &PressureGauge::default(), &stop).await;
        let partly = look().await;
        assert!((1..many.len()).contains(&receipts.unwritten_ends()), "open leases keep their room");
        assert_eq!(partly, Round { removed: 0, is_whole: false });
        assert_eq!(look().await, Round::default(), "the list failed");
        assert_eq!(wait_after(partly), FIRST_AFTER);
    }

    #[tokio::test]
    async fn while_pages_are_hard_to_write_nothing_is_asked() {
        let fake = FakeApi::answering([list(&[])]);
        let (api, pressure, stop) = (fake.connect(), PressureGauge::default(), CancellationToken::new());
        pressure.overloaded();
        let token = stop.clone();
        let mut waiting =
            tokio::spawn(async move { round(&api, Some(STRICT), &Receipts::new(), &pressure, &token).await });
        // An answer would be here at once, and the round be over.
        let early = tokio::time::timeout(Duration::from_millis(200), &mut waiting).await;
        assert!(early.is_err() && fake.asked().is_empty(), "{early:?}");
        stop.cancel();
        let late = tokio::time::timeout(Duration::from_secs(5), waiting).await;
        assert_eq!(late.expect("it ends at once").unwrap(), Round::default());
    }

    #[tokio::test]
    async fn a_list_that_is_not_answered_does_not_outlive_the_term() {
        let stop = CancellationToken::new();
        let (api, token) = (FakeApi::silent().connect(), stop.clone());
        let removing = tokio::spawn(async move {
            round(&api, Some(STRICT), &Receipts::new(), &PressureGauge::default(), &token).await
        });
        tokio::task::yield_now().await;
        stop.cancel();
        // The request itself would be given up after 10 s.
        let ended = tokio::time::timeout(Duration::from_secs(5), removing).await;
        assert_eq!(ended.expect("it ends at once").unwrap(), Round::default());
    }

    #[test]
    fn a_receipt_without_its_label_stays() {
        let mut bare = receipt("a", "bare", LeasePhase::Settled, 900);
        bare.metadata.labels = None;
        assert_eq!(batches(&[&bare]), []);
    }
}
