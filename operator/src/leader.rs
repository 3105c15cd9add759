//! Leader election by a coordination.k8s.io Lease, written with compare-and-swap on its resourceVersion.
//!
//! Election only decides who *tries*: what a leader may still do is fenced by the epoch in pages and orders (L6,
//! invariant 7). A leader that cannot renew in time steps down and is a standby again: what it watches stays
//! warm, so that it can lead again as soon as the API server answers.
//!
//! Clocks of other replicas are never compared with ours: a holder is taken for gone when its record has not *changed* for
//! the lease duration on our own monotonic clock, as Kubernetes' own components do it.

use std::time::{Duration, Instant};

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use spaceport_shell::error_chain;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::clock;
use crate::fault::{self, Fault};
use crate::kubeapi::{ApiError, KubeApi, Objects, pause};

/// How the election runs.
#[derive(Clone, Debug)]
pub struct LeaderSettings {
    /// Namespace of the Lease.
    pub namespace: String,
    /// Name of the Lease.
    pub name: String,
    /// Unique name of this process: replica and a random part, so that a restarted replica is another candidate.
    pub identity: String,
    /// How long a silent holder keeps the lease.
    pub duration: Duration,
    /// A holder that could not renew for this long stops.
    pub renew_deadline: Duration,
    /// Time between tries.
    pub retry_period: Duration,
}

/// Settings that would let two replicas lead at once or make a leader stop for nothing.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum LeaderSettingsError {
    /// The old leader would stop after the new one started.
    #[error("--renew-deadline ({} ms) must be below --lease-duration ({} ms)", .deadline.as_millis(), .duration.as_millis())]
    DeadlineTooLong {
        /// The renew deadline.
        deadline: Duration,
        /// The lease duration.
        duration: Duration,
    },
    /// There would not be two tries within the deadline.
    #[error("--retry-period ({} ms) must be above 0 and at most half of --renew-deadline ({} ms)", .period.as_millis(), .deadline.as_millis())]
    RetryTooLong {
        /// The retry period.
        period: Duration,
        /// The renew deadline.
        deadline: Duration,
    },
}

/// Why leading ended before the process was told to stop.
#[derive(Debug, thiserror::Error)]
enum SteppedDown {
    /// The lease could not be renewed in time.
    #[error("stopped leading: the Lease could not be renewed for {} ms", .silent.as_millis())]
    Lost {
        /// Time since the last renewal.
        silent: Duration,
        /// What the last try said.
        #[source]
        last: Option<ApiError>,
    },
    /// Another replica holds the lease now.
    #[error("stopped leading: the Lease is held by {holder}")]
    Deposed {
        /// Who holds it.
        holder: String,
    },
}

/// What a look at the Lease leads to. Pure; see [`Observation::next`].
#[derive(Clone, Debug, PartialEq)]
enum Step {
    /// Write this record over the one seen.
    Write(LeaseSpec),
    /// Another one holds it; look again later.
    Wait,
}

/// What this replica knows about the record: its content and since when, on our clock, it has been the same.
#[derive(Clone, Debug)]
struct Observation {
    spec: LeaseSpec,
    unchanged_since: Instant,
}

/// The lease as ours.
struct Held {
    lease: Lease,
    /// When its last successful write was *sent*: for others the lease may run from then on.
    renewed: Instant,
}

// === impl LeaderSettings ===

impl LeaderSettings {
    /// Checks the relation of the three times.
    ///
    /// # Errors
    /// See [`LeaderSettingsError`].
    pub fn validate(&self) -> Result<(), LeaderSettingsError> {
        if self.renew_deadline >= self.duration {
            return Err(LeaderSettingsError::DeadlineTooLong {
                deadline: self.renew_deadline,
                duration: self.duration,
            });
        }
        if self.retry_period.is_zero() || self.retry_period * 2 > self.renew_deadline {
            return Err(LeaderSettingsError::RetryTooLong { period: self.retry_period, deadline: self.renew_deadline });
        }
        Ok(())
    }

    /// Whole seconds for the Lease object, rounded up: a reader must never think that it ends earlier than we do.
    fn duration_seconds(&self) -> i32 {
        let seconds = self.duration.as_secs() + u64::from(self.duration.subsec_nanos() > 0);
        i32::try_from(seconds.max(1)).unwrap_or(i32::MAX)
    }

    /// The record by which this replica takes or keeps the lease.
    fn record(&self, seen: &LeaseSpec, wall: Timestamp) -> LeaseSpec {
        let ours = seen.holder_identity.as_deref() == Some(self.identity.as_str());
        let transitions = seen.lease_transitions.unwrap_or(0);
        LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: Some(self.duration_seconds()),
            acquire_time: if ours { seen.acquire_time.clone() } else { Some(MicroTime(wall)) },
            renew_time: Some(MicroTime(wall)),
            lease_transitions: Some(if ours { transitions } else { transitions.saturating_add(1) }),
            ..LeaseSpec::default()
        }
    }
}

// === impl Observation ===

impl Observation {
    /// Takes in what was read; the clock of a record that did not change runs on.
    fn refresh(previous: Option<Self>, spec: LeaseSpec, now: Instant) -> Self {
        match previous {
            Some(previous) if previous.spec == spec => previous,
            _ => Self { spec, unchanged_since: now },
        }
    }

    /// What to do now. Pure.
    fn next(&self, settings: &LeaderSettings, now: Instant, wall: Timestamp) -> Step {
        let holder = self.spec.holder_identity.as_deref().unwrap_or_default();
        let seconds = u64::try_from(self.spec.lease_duration_seconds.unwrap_or(0)).unwrap_or(0);
        // Our own setting counts too: a record with a shorter time than ours must not be taken early.
        let kept = Duration::from_secs(seconds).max(settings.duration);
        let expired = now.saturating_duration_since(self.unchanged_since) >= kept;
        if holder.is_empty() || holder == settings.identity || expired {
            Step::Write(settings.record(&self.spec, wall))
        } else {
            Step::Wait
        }
    }
}

/// Tries to lead and leads, again and again, until `stop`. `leading` is true while the lease is ours. On `stop` the lease is
/// given back, so that the next replica need not wait. Failing to become leader is no error; it is tried for ever.
pub async fn run(api: KubeApi, settings: LeaderSettings, leading: watch::Sender<bool>, stop: CancellationToken) {
    let leases = api.namespace::<Lease>(&settings.namespace);
    while let Some(mut held) = acquire(&leases, &settings, &stop).await {
        tracing::info!(lease = settings.name, identity = settings.identity, "Leading");
        leading.send_replace(true);
        let result = keep(&leases, &settings, &mut held, &stop).await;
        leading.send_replace(false);
        match result {
            Ok(()) => return give_back(&leases, &settings, held.lease).await,
            Err(reason) => tracing::warn!(error = %error_chain(&reason), "Not leading any more; standing by"),
        }
        // Everything that runs under the term sees that it is over before another try could end that.
        if !pause(settings.retry_period, &stop).await {
            return;
        }
    }
}

/// Waits until the lease is ours. None when it is time to stop.
async fn acquire(leases: &Objects<Lease>, settings: &LeaderSettings, stop: &CancellationToken) -> Option<Held> {
    let mut observation: Option<Observation> = None;
    loop {
        match try_acquire(leases, settings, &mut observation).await {
            Ok(Some(held)) => return Some(held),
            Ok(None) => {}
            Err(error) => tracing::warn!(error = %error_chain(&error), "Cannot try for the Lease"),
        }
        if !pause(settings.retry_period, stop).await {
            return None;
        }
    }
}

async fn try_acquire(
    leases: &Objects<Lease>,
    settings: &LeaderSettings,
    observation: &mut Option<Observation>,
) -> Result<Option<Held>, ApiError> {
    let Some(mut lease) = leases.get(&settings.name).await? else {
        let lease = Lease {
            metadata: ObjectMeta {
                name: Some(settings.name.clone()),
                namespace: Some(settings.namespace.clone()),
                ..ObjectMeta::default()
            },
            spec: Some(settings.record(&LeaseSpec::default(), clock::wall())),
        };
        let renewed = clock::monotonic();
        return match leases.create(&lease).await {
            Ok(lease) => Ok(Some(Held { lease, renewed })),
            Err(ApiError::Exists { .. }) => Ok(None),
            Err(error) => Err(error),
        };
    };
    let spec = lease.spec.clone().unwrap_or_default();
    let seen = Observation::refresh(observation.take(), spec, clock::monotonic());
    let step = seen.next(settings, clock::monotonic(), clock::wall());
    *observation = Some(seen);
    let Step::Write(record) = step else { return Ok(None) };
    lease.spec = Some(record);
    let renewed = clock::monotonic();
    match leases.replace(&lease, settings.renew_deadline).await {
        Ok(lease) => Ok(Some(Held { lease, renewed })),
        // Another candidate was faster.
        Err(ApiError::Conflict { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Renews until `stop`. The deadline counts from when the last successful write was *sent*.
async fn keep(
    leases: &Objects<Lease>,
    settings: &LeaderSettings,
    held: &mut Held,
    stop: &CancellationToken,
) -> Result<(), SteppedDown> {
    let mut last = None;
    let mut wait = settings.retry_period;
    while pause(wait, stop).await {
        let sent = clock::monotonic();
        let silent = sent.saturating_duration_since(held.renewed);
        let leads_on = fault::is(Fault::GrantsFromMemory);
        let left = settings.renew_deadline.saturating_sub(if leads_on { Duration::ZERO } else { silent });
        if left.is_zero() {
            return Err(SteppedDown::Lost { silent, last });
        }
        match renew(leases, settings, &mut held.lease, left).await {
            Ok(()) => {
                held.renewed = sent;
                last = None;
            }
            Err(RenewError::Deposed { holder }) => return Err(SteppedDown::Deposed { holder }),
            Err(RenewError::Api(error)) => {
                tracing::warn!(error = %error_chain(&error), "Cannot renew the Lease");
                last = Some(error);
            }
        }
        // From one try to the next, not from an answer: one that was slow has used up of the deadline what a pause would.
        wait = settings.retry_period.saturating_sub(clock::monotonic().saturating_duration_since(sent));
    }
    Ok(())
}

enum RenewError {
    Deposed { holder: String },
    Api(ApiError),
}

async fn renew(
    leases: &Objects<Lease>,
    settings: &LeaderSettings,
    held: &mut Lease,
    limit: Duration,
) -> Result<(), RenewError> {
    let mut next = held.clone();
    next.spec = Some(settings.record(&held.spec.clone().unwrap_or_default(), clock::wall()));
    match leases.replace(&next, limit).await {
        Ok(lease) => {
            *held = lease;
            Ok(())
        }
        Err(conflict @ ApiError::Conflict { .. }) => {
            // Someone changed the record: an earlier renewal of ours whose answer was lost, an admin's label, or a rival.
            let lease = leases.get(&settings.name).await.map_err(RenewError::Api)?;
            let holder = lease.as_ref().and_then(|lease| lease.spec.as_ref()?.holder_identity.clone());
            match (lease, holder) {
                // Still ours, but this was no renewal: the next try is made on what was read.
                (Some(lease), Some(holder)) if holder == settings.identity => {
                    *held = lease;
                    Err(RenewError::Api(conflict))
                }
                (_, holder) => Err(RenewError::Deposed { holder: holder.unwrap_or_else(|| "nobody".to_owned()) }),
            }
        }
        Err(error) => Err(RenewError::Api(error)),
    }
}

/// Leaves the lease to whoever comes next. Best effort: if it fails, the next one waits for the lease duration.
async fn give_back(leases: &Objects<Lease>, settings: &LeaderSettings, held: Lease) {
    let spec = held.spec.clone().unwrap_or_default();
    let free = Lease { spec: Some(LeaseSpec { holder_identity: Some(String::new()), ..spec }), ..held };
    match leases.replace(&free, settings.retry_period).await {
        Ok(_) => tracing::info!(lease = settings.name, "Gave the Lease back"),
        Err(error) => tracing::warn!(error = %error_chain(&error), "Cannot give the Lease back"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::kubeapi::fake::{FakeApi, failure};

    fn settings(identity: &str) -> LeaderSettings {
        LeaderSettings {
            namespace: "ns".to_owned(),
            name: "operator".to_owned(),
            identity: identity.to_owned(),
            duration: Duration::from_millis(1500),
            renew_deadline: Duration::from_millis(1000),
            retry_period: Duration::from_millis(300),
        }
    }

    fn wall(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    /// A moment of the monotonic clock to count from; tests advance it by hand.
    fn start() -> Instant {
        clock::monotonic()
    }

    fn holder(step: &Step) -> Option<&str> {
        match step {
            Step::Write(spec) => spec.holder_identity.as_deref(),
            Step::Wait => None,
        }
    }

    #[test]
    fn settings_that_allow_two_leaders_are_refused() {
        assert_eq!(settings("a").validate(), Ok(()));
        let late = LeaderSettings { renew_deadline: Duration::from_millis(1500), ..settings("a") };
        assert!(matches!(late.validate(), Err(LeaderSettingsError::DeadlineTooLong { .. })));
        let slow = LeaderSettings { retry_period: Duration::from_millis(501), ..settings("a") };
        assert!(matches!(slow.validate(), Err(LeaderSettingsError::RetryTooLong { .. })));
        let zero = LeaderSettings { retry_period: Duration::ZERO, ..settings("a") };
        assert!(matches!(zero.validate(), Err(LeaderSettingsError::RetryTooLong { .. })));
    }

    #[test]
    fn free_record_is_taken_at_once() {
        let seen = Observation::refresh(None, LeaseSpec::default(), start());
        let step = seen.next(&settings("a"), start(), wall(100));
        let Step::Write(record) = step else { panic!("waits for nobody") };
        assert_eq!(record.holder_identity.as_deref(), Some("a"));
        assert_eq!(record.lease_duration_seconds, Some(2), "1.5 s is rounded up");
        assert_eq!(record.lease_transitions, Some(1));
        assert_eq!(record.acquire_time, Some(MicroTime(wall(100))));
    }

    #[test]
    fn renewing_holder_is_waited_for_and_a_silent_one_is_not() {
        let begin = start();
        let other = settings("b").record(&LeaseSpec::default(), wall(100));
        let mut seen = Observation::refresh(None, other.clone(), begin);
        assert_eq!(seen.next(&settings("a"), begin, wall(100)), Step::Wait);
        // It renews just before its time is over: the clock starts anew.
        let renewed_at = begin + Duration::from_millis(1900);
        seen = Observation::refresh(Some(seen), settings("b").record(&other, wall(101)), renewed_at);
        let later = begin + Duration::from_millis(3800);
        assert_eq!(seen.next(&settings("a"), later, wall(103)), Step::Wait);
        // It says nothing more: reading the same record again does not prolong it.
        seen = Observation::refresh(Some(seen.clone()), seen.spec.clone(), later);
        let end = renewed_at + Duration::from_secs(2);
        assert_eq!(holder(&seen.next(&settings("a"), end, wall(104))), Some("a"));
    }

    #[test]
    fn wall_clocks_of_others_do_not_matter() {
        let begin = start();
        let other = settings("b").record(&LeaseSpec::default(), wall(9_000_000_000));
        let seen = Observation::refresh(None, other, begin);
        assert_eq!(seen.next(&settings("a"), begin, wall(5)), Step::Wait);
        assert_eq!(holder(&seen.next(&settings("a"), begin + Duration::from_secs(2), wall(5))), Some("a"));
    }

    #[test]
    fn taking_over_counts_a_transition_and_renewing_does_not() {
        let first = settings("a").record(&LeaseSpec::default(), wall(1));
        let renewed = settings("a").record(&first, wall(2));
        assert_eq!((renewed.lease_transitions, &renewed.acquire_time), (Some(1), &first.acquire_time));
        let taken = settings("b").record(&renewed, wall(3));
        assert_eq!((taken.lease_transitions, &taken.acquire_time), (Some(2), &Some(MicroTime(wall(3)))));
    }

    #[tokio::test]
    async fn the_first_deadline_counts_from_when_the_lease_was_asked_for() {
        let lease = json!({"metadata": {"name": "operator", "resourceVersion": "1"}});
        let fake = FakeApi::answering([failure(404, "NotFound"), (200, lease)]).taking(Duration::from_millis(600));
        let settings = LeaderSettings { retry_period: Duration::from_millis(1), ..settings("a") };
        let (leases, stop) = (fake.connect().namespace::<Lease>("ns"), CancellationToken::new());
        let mut held = acquire(&leases, &settings, &stop).await.expect("it is free");
        assert!(start() - held.renewed >= Duration::from_millis(600), "the answer took so long");
        held.renewed = start().checked_sub(settings.renew_deadline).unwrap();
        let over = keep(&leases, &settings, &mut held, &stop).await;
        assert!(matches!(over, Err(SteppedDown::Lost { last: None, .. })), "{over:?}");
        assert_eq!(fake.asked().len(), 2, "nothing is renewed that may be another's");
    }
}
