//! The stage of a Space, derived from its conditions and never stored on its own (docs/rules.md, Space).

use std::fmt;

use serde::{Deserialize, Serialize};

/// How far one step from source to URL has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Progress {
    /// An earlier step has not ended.
    #[default]
    Waiting,
    /// Going on, with a deadline.
    InProgress,
    /// Ended as it should.
    Done,
    /// Ended with an error, or its deadline passed.
    Failed,
}

/// The steps of the newest revision, in order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Steps {
    /// `SourceFetched`.
    pub source_fetched: Progress,
    /// `EnvironmentBuilt`.
    pub environment_built: Progress,
    /// `Scheduled`.
    pub scheduled: Progress,
    /// `Started`.
    pub started: Progress,
    /// `Healthy`.
    pub healthy: Progress,
    /// `Routed`.
    pub routed: Progress,
}

/// What overrides the steps, strongest first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Override {
    /// Nothing does.
    #[default]
    None,
    /// The object is being deleted.
    Deleting,
    /// Somebody paused it.
    Paused,
    /// The spec or the front matter cannot be used.
    ConfigError,
    /// The source has no app file.
    NoAppFile,
    /// Nobody used it for long enough.
    Sleeping,
}

/// Stages as the hosted service names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Stage {
    /// The source has no app file.
    NoAppFile,
    /// The spec or the front matter cannot be used.
    ConfigError,
    /// Source or environment are being made.
    Building,
    /// Source or environment failed.
    BuildError,
    /// Waiting for a node, or started and not answering yet.
    AppStarting,
    /// Answers.
    Running,
    /// An older revision answers while a newer one is being built.
    RunningBuilding,
    /// An older revision answers while a newer one starts.
    RunningAppStarting,
    /// The app ended or did not answer in time.
    RuntimeError,
    /// Stopped until the next visitor.
    Sleeping,
    /// Stopped until its owner resumes it.
    Paused,
    /// Going away.
    Deleting,
}

impl fmt::Display for Stage {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, formatter)
    }
}

/// The one rule. `older_answers`: a pod of an older revision still serves.
pub const fn stage(overriding: Override, steps: Steps, older_answers: bool) -> Stage {
    match overriding {
        Override::Deleting => return Stage::Deleting,
        Override::Paused => return Stage::Paused,
        Override::ConfigError => return Stage::ConfigError,
        Override::NoAppFile => return Stage::NoAppFile,
        Override::Sleeping => return Stage::Sleeping,
        Override::None => {}
    }
    if matches!(steps.source_fetched, Progress::Failed) || matches!(steps.environment_built, Progress::Failed) {
        return Stage::BuildError;
    }
    if matches!(steps.scheduled, Progress::Failed)
        || matches!(steps.started, Progress::Failed)
        || matches!(steps.healthy, Progress::Failed)
    {
        return Stage::RuntimeError;
    }
    if matches!(steps.healthy, Progress::Done) && matches!(steps.routed, Progress::Done) {
        return Stage::Running;
    }
    // The pod is scheduled before its init containers fetch and install, so a pod without a node is still building.
    let built = matches!(steps.environment_built, Progress::Done);
    match (built, older_answers) {
        (false, false) => Stage::Building,
        (false, true) => Stage::RunningBuilding,
        (true, false) => Stage::AppStarting,
        (true, true) => Stage::RunningAppStarting,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Progress; 4] = [Progress::Waiting, Progress::InProgress, Progress::Done, Progress::Failed];

    fn done() -> Steps {
        Steps {
            source_fetched: Progress::Done,
            environment_built: Progress::Done,
            scheduled: Progress::Done,
            started: Progress::Done,
            healthy: Progress::Done,
            routed: Progress::Done,
        }
    }

    #[test]
    fn runs_only_when_every_step_is_done() {
        assert_eq!(stage(Override::None, done(), false), Stage::Running);
        for progress in ALL {
            for older in [false, true] {
                let steps = Steps { healthy: progress, ..done() };
                assert_eq!(stage(Override::None, steps, older) == Stage::Running, progress == Progress::Done);
                let steps = Steps { routed: progress, ..done() };
                assert_eq!(stage(Override::None, steps, older) == Stage::Running, progress == Progress::Done);
            }
        }
    }

    #[test]
    fn names_the_step_that_failed() {
        assert_eq!(
            stage(Override::None, Steps { source_fetched: Progress::Failed, ..Steps::default() }, true),
            Stage::BuildError
        );
        assert_eq!(
            stage(Override::None, Steps { environment_built: Progress::Failed, ..done() }, false),
            Stage::BuildError
        );
        assert_eq!(stage(Override::None, Steps { started: Progress::Failed, ..done() }, false), Stage::RuntimeError);
    }

    #[test]
    fn an_older_revision_is_told_apart() {
        let building = Steps { source_fetched: Progress::InProgress, ..Steps::default() };
        assert_eq!(stage(Override::None, building, false), Stage::Building);
        assert_eq!(stage(Override::None, building, true), Stage::RunningBuilding);
        let starting = Steps { healthy: Progress::InProgress, routed: Progress::Waiting, ..done() };
        assert_eq!(stage(Override::None, starting, false), Stage::AppStarting);
        assert_eq!(stage(Override::None, starting, true), Stage::RunningAppStarting);
    }

    #[test]
    fn overrides_win() {
        for (overriding, expected) in [
            (Override::Deleting, Stage::Deleting),
            (Override::Paused, Stage::Paused),
            (Override::ConfigError, Stage::ConfigError),
            (Override::NoAppFile, Stage::NoAppFile),
            (Override::Sleeping, Stage::Sleeping),
        ] {
            assert_eq!(stage(overriding, done(), true), expected);
        }
    }
}
