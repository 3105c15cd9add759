//! Removes old receipts, in batches: beyond the number kept for a Space, and beyond their age. Open ones stay.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use kube::ResourceExt as _;
use spaceport_crds::GPULease;
use spaceport_shell::error_chain;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::clock;
use crate::kubeapi::{KubeApi, pause};

/// Time between two rounds.
const PERIOD: Duration = Duration::from_secs(600);
/// Receipts removed in one round; more are left to the next, so that deletes never crowd out page writes.
const BATCH_MAX: usize = 500;
/// Pause after each delete: at most 50 a second.
const DELETE_PAUSE: Duration = Duration::from_millis(20);

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

/// Removes receipts until `stop`. While no pool says how long they are kept, all are.
pub async fn run(api: KubeApi, retention: watch::Receiver<Option<Retention>>, stop: CancellationToken) {
    while pause(PERIOD, &stop).await {
        let current = *retention.borrow();
        if let Some(retention) = current {
            remove_old(&api, retention, &stop).await;
        }
    }
}

async fn remove_old(api: &KubeApi, retention: Retention, stop: &CancellationToken) {
    let receipts = match api.cluster::<GPULease>().list(None).await {
        Ok(receipts) => receipts,
        Err(error) => {
            tracing::warn!(error = %error_chain(&error), "Cannot list receipts; old ones stay for now");
            return;
        }
    };
    let old = old_receipts(&receipts, retention, clock::wall());
    let mut removed = 0_usize;
    for receipt in old.iter().take(BATCH_MAX) {
        let namespace = receipt.namespace().unwrap_or_default();
        let uid = receipt.uid().unwrap_or_default();
        match api.namespace::<GPULease>(&namespace).delete(&receipt.name_any(), &uid).await {
            Ok(()) => removed += 1,
            Err(error) => tracing::warn!(error = %error_chain(&error), "Cannot remove an old receipt"),
        }
        if !pause(DELETE_PAUSE, stop).await {
            break;
        }
    }
    if removed > 0 {
        tracing::info!(removed, left = old.len() - removed, "Removed old receipts");
    }
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

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    use spaceport_crds::{GPULeaseSpec, LeasePhase};

    use super::*;

    fn receipt(namespace: &str, name: &str, phase: LeasePhase, age_seconds: i64) -> GPULease {
        let mut receipt =
            GPULease::new(name, GPULeaseSpec { space: "hello".to_owned(), phase, ..GPULeaseSpec::default() });
        receipt.metadata.namespace = Some(namespace.to_owned());
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
}
