//! The status of a Space, derived from what was observed. Pure; written only if it differs.

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use spaceport_core::ids::Revision;
use spaceport_core::queue::Learned;
use spaceport_core::stage::{Override, Progress, Stage, Steps, stage};
use spaceport_crds::conditions::{ConditionStatus, SpaceCondition, SpaceReason, condition, set};
use spaceport_crds::{Phase, Sdk, Space, SpaceStage, SpaceStatus};

use super::declared::Verdict;
use super::durations;
use super::observe::PodProgress;
use super::validate::Invalid;

/// Fetching a source; a repository that takes longer has a network problem.
const FETCH_LIMIT: SignedDuration = SignedDuration::from_mins(5);
/// Installing an environment: 7 GB of wheels from a slow index.
const INSTALL_LIMIT: SignedDuration = SignedDuration::from_mins(30);
/// Waiting for a node. Longer is capacity, and the scheduler's message says which.
const SCHEDULE_LIMIT: SignedDuration = SignedDuration::from_mins(10);
/// Longest line in the REASON column (the schema's bound).
const REASON_BYTES_MAX: usize = 1024;

/// What the reconciler knows about a Space at one moment.
#[derive(Clone, Debug, Default)]
pub struct Known {
    /// Why it cannot be started, if it cannot.
    pub invalid: Option<Invalid>,
    /// The newest pod of its revision.
    pub pod: Option<PodProgress>,
    /// A pod of an older revision answers.
    pub older_answers: bool,
    /// After front matter and spec.
    pub sdk: Option<Sdk>,
    /// Hash of what it is made from.
    pub revision: Option<String>,
    /// The host name claimed for it.
    pub host: Option<String>,
    /// The claim that failed, as a message.
    pub host_taken: Option<String>,
    /// How long its functions run, if the broker knows.
    pub learned: Option<Vec<Learned>>,
    /// The revision that answers its visitors; none while no pod does.
    pub answering: Option<Revision>,
    /// What the tiers say about the durations that its source declares.
    pub declared: Verdict,
}

/// The status, given the one before.
pub fn status(space: &Space, known: &Known, now: Timestamp) -> SpaceStatus {
    let before = space.status.clone().unwrap_or_default();
    let generation = space.metadata.generation;
    let overriding = overriding(space, known);
    let pod = known.pod.clone().unwrap_or_default();
    let steps = Steps {
        scheduled: if known.pod.is_some() { pod.scheduled } else { Progress::InProgress },
        source_fetched: pod.source,
        environment_built: pod.environment,
        started: pod.started,
        healthy: pod.healthy,
        // The Service is the route until there is a gateway; it follows readiness.
        routed: pod.healthy,
    };
    let phases = if overriding == Override::None { phases(space, &before, steps, &pod, now) } else { Vec::new() };
    let steps = overdue(steps, &phases, now);
    let derived = stage(overriding, steps, known.older_answers);

    let mut conditions = before.conditions.clone();
    let mut put = |kind: SpaceCondition, holds: ConditionStatus, reason: SpaceReason, message: String| {
        set(&mut conditions, condition(kind.as_str(), holds, reason.as_str(), message, generation, now));
    };
    for (kind, progress) in each(steps) {
        let (holds, reason) = match progress {
            _ if overriding != Override::None => (ConditionStatus::Unknown, override_reason(overriding, known)),
            Progress::Done => (ConditionStatus::True, SpaceReason::Succeeded),
            Progress::InProgress => (ConditionStatus::False, SpaceReason::InProgress),
            Progress::Waiting => (ConditionStatus::False, SpaceReason::WaitingForEarlierStep),
            Progress::Failed => (ConditionStatus::False, failure(kind)),
        };
        let message = match progress {
            Progress::InProgress | Progress::Failed => pod.message.clone(),
            Progress::Done | Progress::Waiting => String::new(),
        };
        put(kind, holds, reason, message);
    }
    match (&known.host, &known.host_taken) {
        (Some(host), _) => {
            put(
                SpaceCondition::HostClaimed,
                ConditionStatus::True,
                SpaceReason::Succeeded,
                format!("{host} belongs to this Space"),
            );
        }
        (None, Some(taken)) => {
            put(SpaceCondition::HostClaimed, ConditionStatus::False, SpaceReason::HostTaken, taken.clone())
        }
        (None, None) => {}
    }
    let why = why(space, known, overriding, &pod, &phases);
    let ready = derived == Stage::Running;
    let (holds, reason) = match (ready, overriding) {
        (true, _) => (ConditionStatus::True, SpaceReason::Succeeded),
        (false, Override::None) => (
            ConditionStatus::False,
            each(steps)
                .into_iter()
                .find(|(_, progress)| *progress == Progress::Failed)
                .map_or(SpaceReason::InProgress, |(kind, _)| failure(kind)),
        ),
        (false, overriding) => (ConditionStatus::False, override_reason(overriding, known)),
    };
    put(SpaceCondition::Ready, holds, reason, why.clone());
    // For the author. The Space runs all the same, and callers of other tiers can use it (requirement A14).
    let durations_allowed = SpaceCondition::DurationsAllowed.as_str();
    match &known.declared {
        Verdict::Judged { holds, reason, message } => {
            let shown = condition(durations_allowed, *holds, reason.as_str(), shortened(message), generation, now);
            set(&mut conditions, shown);
        }
        Verdict::Nothing => conditions.retain(|condition| condition.type_ != durations_allowed),
        Verdict::Unseen => {}
    }

    let durations = durations::rows(&before.durations, known.learned.as_deref(), known.answering);
    let stage = crd_stage(derived);
    let unchanged = before.stage == stage && before.since.is_some();
    SpaceStatus {
        stage,
        since: if unchanged { before.since } else { Some(Time(now)) },
        reason: (!why.is_empty()).then(|| shortened(&why)),
        host: known.host.clone().or(before.host),
        url: known.host.as_ref().map(|host| format!("https://{host}")).or(before.url),
        observed_generation: generation,
        commit: pod.commit.clone().filter(|commit| commit.len() <= 80).or_else(|| known.revision.clone()),
        sdk: known.sdk.or(before.sdk),
        environment: before.environment,
        build: before.build,
        suggested_duration: durations::suggested(&durations),
        durations,
        phases,
        conditions,
    }
}

fn overriding(space: &Space, known: &Known) -> Override {
    if space.metadata.deletion_timestamp.is_some() {
        Override::Deleting
    } else if space.spec.paused.is_some() {
        Override::Paused
    } else if let Some(invalid) = &known.invalid {
        invalid.overriding
    } else {
        Override::None
    }
}

fn override_reason(overriding: Override, known: &Known) -> SpaceReason {
    match overriding {
        Override::Deleting => SpaceReason::Deleting,
        Override::Paused => SpaceReason::Paused,
        Override::Sleeping => SpaceReason::Idle,
        Override::ConfigError | Override::NoAppFile | Override::None => {
            known.invalid.as_ref().map_or(SpaceReason::InvalidConfiguration, |invalid| invalid.reason)
        }
    }
}

fn each(steps: Steps) -> [(SpaceCondition, Progress); 6] {
    [
        (SpaceCondition::Scheduled, steps.scheduled),
        (SpaceCondition::SourceFetched, steps.source_fetched),
        (SpaceCondition::EnvironmentBuilt, steps.environment_built),
        (SpaceCondition::Started, steps.started),
        (SpaceCondition::Healthy, steps.healthy),
        (SpaceCondition::Routed, steps.routed),
    ]
}

fn failure(step: SpaceCondition) -> SpaceReason {
    match step {
        SpaceCondition::Scheduled => SpaceReason::Unschedulable,
        SpaceCondition::SourceFetched => SpaceReason::FetchFailed,
        SpaceCondition::EnvironmentBuilt => SpaceReason::DependenciesFailed,
        SpaceCondition::Started => SpaceReason::AppExited,
        SpaceCondition::Healthy => SpaceReason::StartTimeout,
        _ => SpaceReason::PlatformFault,
    }
}

fn limit(step: SpaceCondition, space: &Space) -> SignedDuration {
    match step {
        SpaceCondition::Scheduled => SCHEDULE_LIMIT,
        SpaceCondition::SourceFetched => FETCH_LIMIT,
        SpaceCondition::EnvironmentBuilt => INSTALL_LIMIT,
        _ => SignedDuration::from_secs(i64::from(space.spec.startup_timeout_seconds)),
    }
}

/// Every step that began, with its start and deadline kept from the status before. A step that is awaited always has a
/// deadline: "Building" without one cannot exist.
fn phases(space: &Space, before: &SpaceStatus, steps: Steps, pod: &PodProgress, now: Timestamp) -> Vec<Phase> {
    let awaited = each(steps).into_iter().find(|(_, progress)| *progress != Progress::Done);
    let mut phases = Vec::new();
    for (kind, progress) in each(steps) {
        let old = before.phases.iter().find(|phase| phase.name == kind);
        let running = awaited.is_some_and(|(first, _)| first == kind);
        let finished = progress == Progress::Done;
        if !running && !finished {
            continue;
        }
        // A step that ran, ended and runs again (a new revision) begins anew.
        let kept = old.filter(|old| finished || old.finished_at.is_none());
        let started = kept.and_then(|old| old.started_at.as_ref()).map_or(now, |time| time.0);
        phases.push(Phase {
            name: kind,
            started_at: Some(Time(started)),
            deadline: Some(Time(started.saturating_add(limit(kind, space)).unwrap_or(Timestamp::MAX))),
            finished_at: finished.then(|| kept.and_then(|old| old.finished_at.clone()).unwrap_or(Time(now))),
            message: (running && !pod.message.is_empty()).then(|| pod.message.chars().take(200).collect()),
        });
    }
    phases
}

/// A step beyond its deadline has failed, whatever its container says.
fn overdue(mut steps: Steps, phases: &[Phase], now: Timestamp) -> Steps {
    let late = |kind: SpaceCondition| {
        phases.iter().any(|phase| {
            phase.name == kind
                && phase.finished_at.is_none()
                && phase.deadline.as_ref().is_some_and(|deadline| deadline.0 <= now)
        })
    };
    for (kind, step) in [
        (SpaceCondition::Scheduled, &mut steps.scheduled),
        (SpaceCondition::SourceFetched, &mut steps.source_fetched),
        (SpaceCondition::EnvironmentBuilt, &mut steps.environment_built),
        (SpaceCondition::Started, &mut steps.started),
        (SpaceCondition::Healthy, &mut steps.healthy),
    ] {
        if matches!(step, Progress::InProgress | Progress::Waiting) && late(kind) {
            *step = Progress::Failed;
        }
    }
    steps
}

fn why(space: &Space, known: &Known, overriding: Override, pod: &PodProgress, phases: &[Phase]) -> String {
    match overriding {
        Override::Paused => space.spec.paused.as_ref().map_or_else(String::new, |paused| {
            format!("paused by {} since {}: {}", paused.by, paused.since.0, paused.reason)
        }),
        Override::Deleting => "the Space is being deleted".to_owned(),
        Override::ConfigError | Override::NoAppFile | Override::Sleeping => {
            known.invalid.as_ref().map_or_else(String::new, |invalid| invalid.message.clone())
        }
        Override::None if !pod.message.is_empty() => pod.message.clone(),
        Override::None => match phases.iter().find(|phase| phase.finished_at.is_none()).map(|phase| phase.name) {
            Some(SpaceCondition::Scheduled) => "waiting for a node".to_owned(),
            Some(SpaceCondition::SourceFetched) => "fetching the source".to_owned(),
            Some(SpaceCondition::EnvironmentBuilt) => "installing the requirements".to_owned(),
            Some(SpaceCondition::Started) => "starting the app".to_owned(),
            Some(SpaceCondition::Healthy | SpaceCondition::Routed) => "waiting for the app's first answer".to_owned(),
            _ => String::new(),
        },
    }
}

/// At most what the schema takes, cut at a character.
fn shortened(text: &str) -> String {
    let mut end = text.len().min(REASON_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.get(..end).unwrap_or_default().to_owned()
}

const fn crd_stage(stage: Stage) -> SpaceStage {
    match stage {
        Stage::NoAppFile => SpaceStage::NoAppFile,
        Stage::ConfigError => SpaceStage::ConfigError,
        Stage::Building => SpaceStage::Building,
        Stage::BuildError => SpaceStage::BuildError,
        Stage::AppStarting => SpaceStage::AppStarting,
        Stage::Running => SpaceStage::Running,
        Stage::RunningBuilding => SpaceStage::RunningBuilding,
        Stage::RunningAppStarting => SpaceStage::RunningAppStarting,
        Stage::RuntimeError => SpaceStage::RuntimeError,
        Stage::Sleeping => SpaceStage::Sleeping,
        Stage::Paused => SpaceStage::Paused,
        Stage::Deleting => SpaceStage::Deleting,
    }
}

#[cfg(test)]
mod tests {
    use spaceport_crds::Paused;

    use super::super::validate::tests::inline;
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + second).unwrap()
    }

    fn pod(
        scheduled: Progress,
        source: Progress,
        environment: Progress,
        started: Progress,
        healthy: Progress,
    ) -> Known {
        let pod = PodProgress { scheduled, source, environment, started, healthy, ..PodProgress::default() };
        Known { pod: Some(pod), ..Known::default() }
    }

    fn awaited(status: &SpaceStatus) -> Vec<SpaceCondition> {
        status.phases.iter().filter(|phase| phase.finished_at.is_none()).map(|phase| phase.name).collect()
    }

    #[test]
    fn every_awaited_stage_has_one_unfinished_phase_with_a_deadline() {
        use Progress::{Done, InProgress, Waiting};
        let space = inline(&[("app.py", "")]);
        for (known, stage, phase) in [
            (Known::default(), SpaceStage::Building, SpaceCondition::Scheduled),
            (pod(Done, InProgress, Waiting, Waiting, Waiting), SpaceStage::Building, SpaceCondition::SourceFetched),
            (pod(Done, Done, InProgress, Waiting, Waiting), SpaceStage::Building, SpaceCondition::EnvironmentBuilt),
            (pod(Done, Done, Done, InProgress, Waiting), SpaceStage::AppStarting, SpaceCondition::Started),
            (pod(Done, Done, Done, Done, InProgress), SpaceStage::AppStarting, SpaceCondition::Healthy),
        ] {
            let status = status(&space, &known, at(0));
            assert_eq!(status.stage, stage);
            assert_eq!(awaited(&status), [phase]);
            assert!(status.phases.iter().all(|phase| phase.deadline.is_some()));
            assert!(status.reason.is_some(), "{stage}: the column says what is awaited");
        }
    }

    #[test]
    fn times_stay_while_nothing_changes() {
        use Progress::{Done, InProgress, Waiting};
        let mut space = inline(&[("app.py", "")]);
        let known = pod(Done, InProgress, Waiting, Waiting, Waiting);
        let first = status(&space, &known, at(0));
        space.status = Some(first.clone());
        assert_eq!(status(&space, &known, at(7)), first, "nothing that only time changes is written (L21)");
        let done = status(&space, &pod(Done, Done, Done, Done, Done), at(9));
        assert_eq!(done.stage, SpaceStage::Running);
        assert_eq!(done.since, Some(Time(at(9))));
        assert!(awaited(&done).is_empty());
        assert_eq!(done.reason, None);
    }

    #[test]
    fn a_step_beyond_its_deadline_has_failed() {
        use Progress::{Done, InProgress, Waiting};
        let mut space = inline(&[("app.py", "")]);
        let known = pod(Done, Done, InProgress, Waiting, Waiting);
        space.status = Some(status(&space, &known, at(0)));
        let late = status(&space, &known, at(31 * 60));
        assert_eq!(late.stage, SpaceStage::BuildError);
        let built = late.conditions.iter().find(|condition| condition.type_ == "EnvironmentBuilt").unwrap();
        assert_eq!((built.status.as_str(), built.reason.as_str()), ("False", "DependenciesFailed"));
    }

    #[test]
    fn a_pause_says_who_and_why() {
        let mut space = inline(&[("app.py", "")]);
        space.spec.paused =
            Some(Paused { by: "alice".to_owned(), reason: "maintenance".to_owned(), since: Time(at(0)) });
        let paused = status(&space, &Known::default(), at(1));
        assert_eq!(paused.stage, SpaceStage::Paused);
        let reason = paused.reason.unwrap();
        assert!(reason.contains("alice") && reason.contains("maintenance"), "{reason}");
    }
}
