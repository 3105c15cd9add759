//! The account controller: no GPUAccount vanishes while something of it is open (L4).
//!
//! Every account gets our finalizer, with its creation if the operator makes it. An account that is being deleted keeps it
//! until nothing is open, the outbox is empty and the window has ended; meanwhile its calls are answered AccountDeleting.
//!
//! The steps are [`observe`] (what the ledger's watch shows), [`plan`] (pure) and [`execute`] (writes metadata only);
//! there is nothing to validate. [`status`] (pure) derives the conditions, which the ledger writes with its pages. The
//! [`WorkQueue`] between watch and controller decides only *when*: at once after a change, at the end of a window, and
//! again after a failure.

pub mod execute;
pub mod observe;
pub mod plan;
mod queue;
pub mod status;

use std::time::Duration;

use spaceport_core::ids::LedgerTime;
use spaceport_shell::error_chain;
use tokio_util::sync::CancellationToken;

use self::execute::{ExecuteError, execute};
use self::observe::Observed;
use self::plan::{Plan, plan};
pub use self::queue::WorkQueue;
use self::queue::{Item, Next};
use crate::clock;
use crate::kubeapi::{ApiError, KubeApi, pause};

/// First wait after a failed write; doubles with each further one up to the last.
const BACKOFF_FIRST: Duration = Duration::from_secs(1);
/// A cluster that is back after an outage is noticed within this time.
const BACKOFF_LAST: Duration = Duration::from_secs(60);
/// Longest wait for the end of a window without a look at the wall clock, which may be stepped meanwhile.
const WAIT_MAX: Duration = Duration::from_secs(3600);
/// Pause after each write: at most 50 a second, so that they never crowd out page writes.
const WRITE_PAUSE: Duration = Duration::from_millis(20);

/// Works on what the queue has until `stop`. Only the leader runs it; a second one would do no harm, for every write is
/// of one revision.
pub async fn run(api: KubeApi, queue: WorkQueue, clock_skew_max: Duration, stop: CancellationToken) {
    loop {
        let due = match queue.next(clock::monotonic()) {
            Next::Due(item) => {
                let taken = item.clone();
                tokio::select! {
                    () = stop.cancelled() => {
                        // Whoever leads next finds it in its own queue, which may be this one.
                        queue.put_back(taken, clock::monotonic());
                        return;
                    }
                    () = work_on(&api, &queue, item, clock_skew_max) => {}
                }
                if !pause(WRITE_PAUSE, &stop).await {
                    return;
                }
                continue;
            }
            Next::At(due) => due,
        };
        let wait = async {
            match due {
                Some(due) => tokio::time::sleep_until(due.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = stop.cancelled() => return,
            () = queue.changed() => {}
            () = wait => {}
        }
    }
}

async fn work_on(api: &KubeApi, queue: &WorkQueue, item: Item, clock_skew_max: Duration) {
    let Item { observed, failures } = item;
    let now = LedgerTime(clock::wall().as_millisecond());
    let plan = plan(&observed, now);
    if let Plan::Wait { until } = plan {
        let wait = Duration::from_millis(until.since(now)).clamp(BACKOFF_FIRST, WAIT_MAX);
        queue.put_back(Item { observed, failures: 0 }, clock::monotonic() + wait);
        return;
    }
    match execute(api, &observed, plan, clock_skew_max).await {
        Ok(()) => note(&observed, plan),
        Err(error) if is_outdated(&error) => {}
        Err(error) => {
            let (account, wait) = (&observed.name, backoff(failures));
            let retry_s = wait.as_secs();
            tracing::warn!(%account, retry_s, error = %error_chain(&error), "The finalizer of an account is not as it should be");
            queue.put_back(Item { observed, failures: failures.saturating_add(1) }, clock::monotonic() + wait);
        }
    }
}

/// True if the write failed because its revision is not the newest: it would fail for ever. The watch has shown the newer
/// one or will show it, and whether anything is to be done is decided on that.
fn is_outdated(error: &ExecuteError) -> bool {
    matches!(error, ExecuteError::Api(ApiError::NotFound { .. } | ApiError::Conflict { .. }))
}

fn note(observed: &Observed, plan: Plan) {
    match plan {
        Plan::Release { .. } => {
            tracing::info!(account = %observed.name, "Nothing of a deleted account is open: it goes")
        }
        Plan::Keep => tracing::debug!(account = %observed.name, "The account is kept while something of it is open"),
        Plan::Nothing | Plan::Wait { .. } => {}
    }
}

/// The wait after so many failures in a row.
fn backoff(failures: u32) -> Duration {
    BACKOFF_FIRST.saturating_mul(1 << failures.min(6)).min(BACKOFF_LAST)
}

#[cfg(test)]
mod tests {
    use spaceport_crds::{GPUAccount, GPUAccountSpec};

    use super::*;
    use crate::kubeapi::Call;
    use crate::kubeapi::fake::FakeApi;
    use crate::ledger::seen::AccountSeen;

    #[tokio::test]
    async fn a_write_that_is_not_answered_does_not_outlive_the_term_and_is_not_forgotten() {
        let (queue, stop) = (WorkQueue::default(), CancellationToken::new());
        queue.seen(&AccountSeen::of(&GPUAccount::new("bob", GPUAccountSpec::default())));
        let api = FakeApi::silent().connect();
        let running = tokio::spawn(run(api, queue.clone(), Duration::from_secs(5), stop.clone()));
        tokio::task::yield_now().await;
        assert_eq!(queue.next(clock::monotonic()), Next::At(None), "it is worked on");
        stop.cancel();
        // The request itself would be given up after 10 s.
        tokio::time::timeout(Duration::from_secs(5), running).await.expect("it ends at once").unwrap();
        let next = queue.next(clock::monotonic());
        assert!(matches!(next, Next::Due(Item { failures: 0, .. })), "{next:?}");
    }

    #[test]
    fn a_write_of_an_old_revision_is_not_tried_again() {
        let call = || Call { verb: "patch", kind: "GPUAccount".to_owned(), name: "bob".to_owned() };
        assert!(is_outdated(&ExecuteError::Api(ApiError::Conflict { call: call() })));
        assert!(is_outdated(&ExecuteError::Api(ApiError::NotFound { call: call() })));
        assert!(!is_outdated(&ExecuteError::ClockSkew { ahead_ms: 6_000 }));
        let (reason, message) = ("Forbidden".to_owned(), "not now".to_owned());
        assert!(!is_outdated(&ExecuteError::Api(ApiError::Refused { call: call(), code: 403, reason, message })));
    }

    #[test]
    fn failures_are_tried_again_ever_more_seldom_but_at_least_once_a_minute() {
        let waits = [0, 1, 2, 5, 6, 40].map(|failures| backoff(failures).as_secs());
        assert_eq!(waits, [1, 2, 4, 32, 60, 60]);
    }
}
