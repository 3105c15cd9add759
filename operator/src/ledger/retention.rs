//! Removes old receipts, in batches: beyond the number kept for a Space, and beyond their age. Open ones stay, and those of
//! requests that waited under an earlier leader are ended first. A batch is one request, and none is sent while page writes
//! are hard for the API server.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use kube::ResourceExt as _;
use spaceport_core::ids::LedgerTime;
use spaceport_crds::GPULease;
use spaceport_crds::names::LEASE_LABEL;
use spaceport_shell::error_chain;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::pressure::PressureGauge;
use super::receipt::Receipts;
use crate::clock;
use crate::kubeapi::{KubeApi, pause};

/// From the beginning of leading to the first round: by then all leases are known, and whoever still waits has another. A
/// leader that leads for a few minutes removes something too.
const FIRST_AFTER: Duration = Duration::from_secs(60);
/// Time between two rounds when nothing more is old.
const PERIOD: Duration = Duration::from_secs(600);
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

/// Receipts that one request removes.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Batch<'a> {
    namespace: &'a str,
    /// Values of their label [`LEASE_LABEL`].
    leases: Vec<&'a str>,
}

/// Removes receipts until `stop`. While no pool says how long they are kept, all are.
pub async fn run(
    api: KubeApi,
    retention: watch::Receiver<Option<Retention>>,
    written: Receipts,
    pressure: PressureGauge,
    stop: CancellationToken,
) {
    let mut wait = FIRST_AFTER;
    while pause(wait, &stop).await {
        let current = *retention.borrow();
        let removed = match current {
            Some(retention) => remove_old(&api, retention, &written, &pressure, &stop).await,
            None => 0,
        };
        wait = wait_after(removed);
    }
}

/// The wait after a round that removed so many: none if it was about as many as it may, for then more are old. What is left
/// of one that the API server refused waits. Pure.
const fn wait_after(removed: usize) -> Duration {
    if removed > ROUND_MAX / 2 { Duration::ZERO } else { PERIOD }
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

/// One round: says how many receipts were removed. Waits while page writes are hard for the API server, and for no longer
/// than until `stop`.
pub async fn remove_old(
    api: &KubeApi,
    retention: Retention,
    written: &Receipts,
    pressure: &PressureGauge,
    stop: &CancellationToken,
) -> usize {
    // A list of all receipts is a load as well.
    if !is_calm(pressure, stop).await {
        return 0;
    }
    let objects = api.cluster::<GPULease>();
    let listed = tokio::select! {
        () = stop.cancelled() => return 0,
        listed = objects.list(None) => listed,
    };
    let receipts = match listed {
        Ok(receipts) => receipts,
        Err(error) => {
            tracing::warn!(error = %error_chain(&error), "Cannot list receipts; old ones stay for now");
            return 0;
        }
    };
    let now = clock::wall();
    let ended = written.end_left_behind(&receipts, LedgerTime(now.as_millisecond()));
    if ended > 0 {
        tracing::info!(ended, "Requests waited under an earlier leader: their receipts are ended");
    }
    let old = old_receipts(&receipts, retention, now);
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
    removed
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
    use spaceport_crds::{GPULeaseSpec, LeasePhase};

    use super::*;
    use crate::kubeapi::fake::FakeApi;

    fn receipt(namespace: &str, name: &str, phase: LeasePhase, age_seconds: i64) -> GPULease {
        let mut receipt =
            GPULease::new(name, GPULeaseSpec { space: "hello".to_owned(), phase, ..GPULeaseSpec::default() });
        receipt.metadata.namespace = Some(namespace.to_owned());
        receipt.metadata.labels = Some(BTreeMap::from([(LEASE_LABEL.to_owned(), format!("lease-{name}"))]));
        receipt.metadata.creation_timestamp = Some(Time(Timestamp::from_second(10_000 - age_seconds).unwrap()));
        receipt
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
        assert_eq!(wait_after(ROUND_MAX), Duration::ZERO);
        assert_eq!(wait_after(ROUND_MAX - BATCH_MAX), Duration::ZERO, "some were gone already");
        assert_eq!((wait_after(3), wait_after(0)), (PERIOD, PERIOD));
    }

    #[tokio::test]
    async fn a_list_that_is_not_answered_does_not_outlive_the_term() {
        let stop = CancellationToken::new();
        let (api, token) = (FakeApi::silent().connect(), stop.clone());
        let retention = Retention { kept: 1, age_max_seconds: 1 };
        let removing = tokio::spawn(async move {
            remove_old(&api, retention, &Receipts::new(), &PressureGauge::default(), &token).await
        });
        tokio::task::yield_now().await;
        stop.cancel();
        // The request itself would be given up after 10 s.
        let removed = tokio::time::timeout(Duration::from_secs(5), removing).await;
        assert_eq!(removed.expect("it ends at once").unwrap(), 0);
    }

    #[test]
    fn a_receipt_without_its_label_stays() {
        let mut bare = receipt("a", "bare", LeasePhase::Settled, 900);
        bare.metadata.labels = None;
        assert_eq!(batches(&[&bare]), []);
    }
}
