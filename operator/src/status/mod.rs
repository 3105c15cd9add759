//! The statuses of what admins write: tiers, pools and grants say what became of them.
//!
//! [`observe`] keeps what the ledger's watches show, [`Findings`] are what the broker found. [`grants`], [`tiers`] and
//! [`pools`] (pure) make statuses of both; the loop here decides only *when* they are written: after each of the broker's
//! findings those that differ from what is shown, up to a bound. Nothing is remembered from one round to the next but where
//! it ended: what failed, or was not reached, differs in the next one too.

pub mod grants;
pub mod observe;
pub mod pools;
pub mod tiers;

use std::fmt;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::Resource;
use kube::core::object::HasStatus;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;
use spaceport_crds::conditions::{ConditionStatus, set};
use spaceport_crds::names::API_VERSION;
use spaceport_crds::{GPUPool, GPUQuotaGrant, GPUTier};
use spaceport_shell::error_chain;
use tokio::sync::watch;
use tokio::task::coop::consume_budget;
use tokio_util::sync::CancellationToken;

use self::observe::{Observed, Revision};
use crate::clock;
use crate::kubeapi::{ApiError, KubeApi, pause};
use crate::ledger::findings::Findings;
use crate::ledger::pressure::PressureGauge;

/// Writes of one round. With a round every few seconds thousands of grants that a change of their tier concerns are told
/// within minutes, and the API server has at most ten such writes a second, beside the pages that callers wait for.
const ROUND_MAX: usize = 50;
/// Pause after each write, so that a round is no burst.
const WRITE_PAUSE: Duration = Duration::from_millis(20);
/// For one write. Nobody waits for it, and the next round tries again.
const WRITE_LIMIT: Duration = Duration::from_secs(10);

/// Writes statuses whenever the broker has found something, until `stop`. Only the leader runs it; a second one would do no
/// harm, for every write is of one revision.
pub async fn run(
    api: KubeApi,
    observed: Observed,
    mut findings: watch::Receiver<Option<Arc<Findings>>>,
    pressure: PressureGauge,
    stop: CancellationToken,
) {
    let mut after = String::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            changed = findings.changed() => if changed.is_err() {
                // The broker has ended. It says why, and the process ends by that.
                stop.cancelled().await;
                return;
            },
        }
        let found = findings.borrow_and_update().clone();
        if let Some(found) = found {
            let _ = Round::new(&api, &pressure, &stop).show_all(&observed, &found, &mut after).await;
        }
    }
}

/// One round of writes.
struct Round<'a> {
    api: &'a KubeApi,
    pressure: &'a PressureGauge,
    stop: &'a CancellationToken,
    /// Writes that it may still make.
    left: usize,
}

impl<'a> Round<'a> {
    fn new(api: &'a KubeApi, pressure: &'a PressureGauge, stop: &'a CancellationToken) -> Self {
        Self { api, pressure, stop, left: ROUND_MAX }
    }

    /// Writes what differs. Pools and tiers, which are few, come first; grants in the order of their names, from the one
    /// behind `after` on, where the round before ended: so each has its turn, however often those before it change. Breaks
    /// off where the round has to end early.
    async fn show_all(&mut self, observed: &Observed, found: &Findings, after: &mut String) -> ControlFlow<()> {
        let now = clock::wall();
        let nodes = observed.nodes.all();
        for pool in observed.pools.all() {
            let Some(generation) = found.pools.get(&pool.name) else { continue };
            let wanted = pools::status(pool.status.as_ref(), &pool.name, *generation, &nodes, found, now);
            self.show::<GPUPool>(&pool, &wanted).await?;
        }
        for tier in observed.tiers.all() {
            let Some(seen) = found.tiers.get(&tier.name) else { continue };
            let wanted = tiers::status(tier.status.as_ref(), seen, found, now);
            self.show::<GPUTier>(&tier, &wanted).await?;
        }
        let grants = observed.grants.all();
        let first = grants.partition_point(|grant| grant.name <= *after);
        for grant in grants[first..].iter().chain(&grants[..first]) {
            if let Some(judged) = found.grants.get(&grant.uid) {
                let wanted = grants::status(grant.status.as_ref(), grant.generation, judged, now);
                self.show::<GPUQuotaGrant>(grant, &wanted).await?;
            }
            after.clone_from(&grant.name);
        }
        ControlFlow::Continue(())
    }

    /// Writes a status if another is shown. Breaks if the round is over: it has written as much as it may, page writes are
    /// hard for the API server, or it is time to stop.
    async fn show<K>(&mut self, object: &Revision<K::Status>, wanted: &K::Status) -> ControlFlow<()>
    where
        K: Resource<DynamicType = ()> + HasStatus + Clone + DeserializeOwned + fmt::Debug,
        K::Status: Serialize + PartialEq,
    {
        // There may be thousands of objects, and of most of them nothing has to be written.
        consume_budget().await;
        if object.status.as_ref() == Some(wanted) {
            return ControlFlow::Continue(());
        }
        if self.left == 0 || self.pressure.is_high(clock::monotonic()) {
            return ControlFlow::Break(());
        }
        self.left -= 1;
        let body = json!({
            "apiVersion": API_VERSION,
            "kind": K::kind(&()),
            "metadata": {
                "name": object.name,
                "uid": object.uid,
                "resourceVersion": object.resource_version,
            },
            "status": wanted,
        });
        let objects = self.api.cluster::<K>();
        let written = tokio::select! {
            () = self.stop.cancelled() => return ControlFlow::Break(()),
            written = objects.put_status(&object.name, &body, WRITE_LIMIT) => written,
        };
        match written {
            // The watch brings the newer revision, and the next round looks at that.
            Ok(_) | Err(ApiError::Conflict { .. } | ApiError::NotFound { .. }) => {}
            Err(error) => {
                tracing::warn!(error = %error_chain(&error), "A status was not written; the next round tries again");
                if error.is_overload() {
                    self.pressure.overloaded();
                    return ControlFlow::Break(());
                }
            }
        }
        if pause(WRITE_PAUSE, self.stop).await { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    }
}

/// The conditions that are shown, with those that were found. What others have put there stays.
fn with(shown: &[Condition], found: impl IntoIterator<Item = Condition>) -> Vec<Condition> {
    let mut conditions = shown.to_vec();
    for condition in found {
        set(&mut conditions, condition);
    }
    conditions
}

const fn holds_if(holds: bool) -> ConditionStatus {
    if holds { ConditionStatus::True } else { ConditionStatus::False }
}

#[cfg(test)]
mod tests {
    use spaceport_core::ids::{AccountName, LedgerTime};
    use spaceport_crds::GPUTierSpec;

    use super::*;
    use crate::kubeapi::fake::{FakeApi, failure};
    use crate::ledger::findings::{GrantFate, GrantFound};
    use crate::ledger::seen::TierSeen;

    /// What an API server shows of one tier and so many grants, none of which has a status.
    fn unwritten(grants: usize) -> (Observed, Findings) {
        let (observed, mut found) = (Observed::default(), Findings::default());
        let tier = GPUTier::new("free", GPUTierSpec::default());
        observed.tiers.see(&tier);
        found.tiers.insert("free".to_owned(), TierSeen::try_from(&tier).unwrap());
        for number in 0..grants {
            let name = format!("grant-{number:03}");
            let uid = format!("uid-{number:03}");
            let revision = Revision { name: name.clone(), uid: uid.clone(), ..Revision::default() };
            observed.grants.put(name, revision);
            let judged = GrantFound {
                account: AccountName::new("bob"),
                ms: 1_000,
                expires: LedgerTime(1_800_000_000_000),
                used_ms: None,
                fate: GrantFate::InForce,
            };
            found.grants.insert(uid, judged);
        }
        (observed, found)
    }

    async fn round(fake: &FakeApi, observed: &Observed, found: &Findings, after: &mut String) -> ControlFlow<()> {
        let (api, pressure, stop) = (fake.connect(), PressureGauge::default(), CancellationToken::new());
        Round::new(&api, &pressure, &stop).show_all(observed, found, after).await
    }

    #[tokio::test]
    async fn what_differs_is_written_and_what_is_shown_is_not() {
        let (observed, found) = unwritten(1);
        let (fake, mut after) = (FakeApi::default(), String::new());
        assert!(round(&fake, &observed, &found, &mut after).await.is_continue());
        let asked = fake.asked();
        assert_eq!(asked.len(), 2);
        let path = "PUT /apis/spaceport.dev/v1alpha1";
        assert!(asked[0].starts_with(&format!("{path}/gputiers/free/status?")), "{asked:?}");
        assert!(asked[1].starts_with(&format!("{path}/gpuquotagrants/grant-000/status?")), "{asked:?}");
        // The watches show it, and with it nothing is left to write.
        let shown = tiers::status(None, &found.tiers["free"], &found, clock::wall());
        let tier = GPUTier { status: Some(shown), ..GPUTier::new("free", GPUTierSpec::default()) };
        observed.tiers.see(&tier);
        let shown = grants::status(None, None, &found.grants["uid-000"], clock::wall());
        let (name, uid) = ("grant-000".to_owned(), "uid-000".to_owned());
        observed.grants.put(name.clone(), Revision { name, uid, status: Some(shown), ..Revision::default() });
        assert!(round(&fake, &observed, &found, &mut after).await.is_continue());
        assert_eq!(fake.asked().len(), 2);
    }

    #[tokio::test]
    async fn a_round_is_bounded_and_the_next_one_goes_on_behind_it() {
        let (observed, found) = unwritten(60);
        let (first, second, mut after) = (FakeApi::default(), FakeApi::default(), String::new());
        assert!(round(&first, &observed, &found, &mut after).await.is_break());
        assert_eq!((first.asked().len(), after.as_str()), (ROUND_MAX, "grant-048"), "the tier and 49 grants");
        assert!(round(&second, &observed, &found, &mut after).await.is_break());
        assert!(second.asked()[1].contains("/grant-049/"), "{:?}", second.asked());
        assert!(second.asked()[12].contains("/grant-000/"), "{:?}", second.asked());
    }

    #[tokio::test]
    async fn what_is_refused_is_left_to_the_next_round_and_an_overloaded_server_in_peace() {
        let (observed, found) = unwritten(2);
        let mut after = String::new();
        let refused = [failure(422, "Invalid"), failure(409, "Conflict"), failure(404, "NotFound")];
        let fake = FakeApi::answering(refused);
        assert!(round(&fake, &observed, &found, &mut after).await.is_continue());
        assert_eq!(fake.asked().len(), 3);
        let fake = FakeApi::answering([failure(429, "TooManyRequests")]);
        let (api, pressure, stop) = (fake.connect(), PressureGauge::default(), CancellationToken::new());
        for _ in 0..2 {
            let ended = Round::new(&api, &pressure, &stop).show_all(&observed, &found, &mut after).await;
            assert!(ended.is_break());
        }
        assert_eq!(fake.asked().len(), 1, "under pressure nothing is written");
    }

    #[tokio::test]
    async fn a_write_that_is_not_answered_does_not_outlive_the_term() {
        let (observed, found) = unwritten(0);
        let (sender, findings) = watch::channel(None);
        let stop = CancellationToken::new();
        let api = FakeApi::silent().connect();
        let running = tokio::spawn(run(api, observed, findings, PressureGauge::default(), stop.clone()));
        sender.send_replace(Some(Arc::new(found)));
        tokio::task::yield_now().await;
        stop.cancel();
        // The request itself would be given up after 10 s.
        tokio::time::timeout(Duration::from_secs(5), running).await.expect("it ends at once").unwrap();
    }

    #[test]
    fn conditions_of_others_stay() {
        let now = jiff::Timestamp::UNIX_EPOCH;
        let made = |kind, holds| spaceport_crds::conditions::condition(kind, holds_if(holds), "Why", "", Some(1), now);
        let shown = [made("Theirs", true), made("Applied", false)];
        let all = with(&shown, [made("Applied", true)]);
        let kinds: Vec<(&str, &str)> = all.iter().map(|found| (found.type_.as_str(), found.status.as_str())).collect();
        assert_eq!(kinds, [("Theirs", "True"), ("Applied", "True")]);
    }
}
