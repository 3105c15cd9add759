//! The program that calls the device API inside the pod, and what it reports.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};

use super::Samples;
use crate::pod_program::{self, ADDRESS, GRANT_LOAD};
use crate::world::World;

/// What a call declares when it ends at once.
const SHORT_S: u64 = 5;
/// What a call declares that keeps its slot while others are measured; no more than the tier's longest call.
pub(super) const LONG_S: u64 = 110;
/// Beyond the program's own limit: its start, one call under way, and the release of every slot.
const OVERTIME: Duration = Duration::from_secs(30);

/// One phase, as the program reads it.
#[derive(Debug, Serialize)]
pub(super) struct Phase<'run> {
    phase: &'static str,
    address: (&'static str, u16),
    tokens: &'run [String],
    declared_s: u64,
    pause_s: f64,
    warm_up: usize,
    samples: usize,
}

impl<'run> Phase<'run> {
    /// Each token a caller, all at once.
    pub(super) fn grant(tokens: &'run [String], samples: &Samples, pause: Duration) -> Self {
        Self::new("grant", tokens, samples, pause, SHORT_S)
    }

    /// All slots taken, one call waits.
    pub(super) fn handover(tokens: &'run [String], samples: &Samples, pause: Duration) -> Self {
        Self::new("handover", tokens, samples, pause, LONG_S)
    }

    fn new(phase: &'static str, tokens: &'run [String], samples: &Samples, pause: Duration, declared_s: u64) -> Self {
        Self {
            phase,
            address: ADDRESS,
            tokens,
            declared_s,
            pause_s: pause.as_secs_f64(),
            warm_up: samples.warm_up,
            samples: samples.wanted,
        }
    }
}

/// The plan: a phase and its limit.
#[derive(Serialize)]
struct Plan<'run> {
    #[serde(flatten)]
    phase: &'run Phase<'run>,
    limit_s: f64,
}

/// What the program measured.
#[derive(Debug, Deserialize)]
pub(super) struct Load {
    /// The samples.
    pub(super) milliseconds: Vec<f64>,
    /// Leases of each account, measured or not.
    pub(super) granted: Vec<u64>,
    /// Calls that had to wait.
    queued: u64,
    /// Calls that were given a worker of an earlier call.
    reused: u64,
    /// From the first to the last measured call.
    seconds: f64,
    /// Slots that were taken before the first hand-over.
    slots: u64,
}

impl Load {
    /// Measured calls a second.
    pub(super) fn per_second(&self) -> Result<f64> {
        ensure!(self.seconds > 0.0, "the measured calls took no time");
        Ok(self.milliseconds.len() as f64 / self.seconds)
    }

    /// What a person should know beside the numbers.
    pub(super) fn remarks(&self) -> String {
        let samples = self.milliseconds.len();
        match self.slots {
            0 => format!(
                "  {samples} samples; not counted: {} that waited, {} with a reused worker",
                self.queued, self.reused
            ),
            slots => format!("  {samples} samples on {slots} slots"),
        }
    }
}

/// Runs one phase in the pod; no call is begun after `limit`.
pub(super) fn run(world: &World, phase: &Phase<'_>, limit: Duration) -> Result<Load> {
    let plan = Plan { phase, limit_s: limit.as_secs_f64() };
    pod_program::run(world, GRANT_LOAD, &plan, limit + OVERTIME)
        .with_context(|| format!("the phase {} in the pod", phase.phase))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;
    use crate::pod_program::tests::{device_api, here};

    #[test]
    fn what_the_program_measured_is_read() {
        let text =
            r#"{"milliseconds": [1.5, 2.5], "granted": [3], "queued": 1, "reused": 0, "seconds": 0.5, "slots": 0}"#;
        let load: Load = serde_json::from_str(text).unwrap();
        assert_eq!((load.milliseconds.len(), load.granted.as_slice(), load.queued), (2, &[3][..], 1));
        assert_eq!(load.per_second().unwrap(), 4.0);
        assert!(load.remarks().contains("1 that waited"));
    }

    /// The program itself, on a device API in miniature: two callers, each with a call that is not measured.
    #[test]
    fn the_program_measures_the_calls_of_each_caller() {
        let (port, answered) = device_api();
        let tokens = ["a".to_owned(), "b".to_owned()];
        let mut phase = Phase::grant(&tokens, &Samples { warm_up: 1, wanted: 2, least: 2 }, Duration::ZERO);
        phase.address.1 = port;
        let load: Load = here(GRANT_LOAD, &Plan { phase: &phase, limit_s: 30.0 }).unwrap();
        assert_eq!((load.milliseconds.len(), load.granted.as_slice()), (4, &[3, 3][..]));
        let answered = answered.lock().unwrap();
        assert_eq!((answered["/schedule"], answered["/allow"], answered["/release"]), (6, 6, 6));
    }

    /// On a port where nobody listens it says so, in its own form, and ends.
    #[test]
    fn the_program_tells_how_it_failed() {
        let free = TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port();
        let tokens = ["secret".to_owned()];
        let mut phase = Phase::grant(&tokens, &Samples { warm_up: 0, wanted: 1, least: 1 }, Duration::ZERO);
        phase.address.1 = free;
        let failure = here::<Load>(GRANT_LOAD, &Plan { phase: &phase, limit_s: 5.0 }).unwrap_err().to_string();
        assert!(failure.contains("ConnectionRefused") && !failure.contains("secret"), "{failure}");
    }
}
