//! The program that calls the device API inside the pod, and what it reports.

use std::io::{Read, Write as _};
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::Samples;
use crate::story::{NAMESPACE, SPACE};
use crate::wait::now;
use crate::world::World;

const PROGRAM: &str = include_str!("../../clients/grant_load.py");
/// Python of the app's own environment, in its container.
const PYTHON: &str = "/opt/environment/venv/bin/python";
/// Where the node agent listens in every Space's pod (N14).
const ADDRESS: (&str, u16) = ("127.0.0.1", 7999);
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

#[derive(Deserialize)]
#[serde(untagged)]
enum Answer {
    Failed { failed: String },
    Done(Load),
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
    let pod = world.pod(NAMESPACE, SPACE)?;
    let child = world
        .kubectl
        .command(&[
            "--namespace",
            NAMESPACE,
            "exec",
            "--stdin",
            &pod,
            "--container",
            "app",
            "--",
            PYTHON,
            "-c",
            PROGRAM,
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run kubectl exec")?;
    let plan = serde_json::to_vec(&Plan { phase, limit_s: limit.as_secs_f64() })?;
    let text = talk(child, plan, limit + OVERTIME)?;
    parse(&text).with_context(|| format!("the phase {} in the pod", phase.phase))
}

/// Gives the program its input and takes its output, in bounded time.
fn talk(mut child: Child, input: Vec<u8>, limit: Duration) -> Result<String> {
    let mut stdin = child.stdin.take().context("no input to the program")?;
    // Closed when written: the program reads its plan to the end. Some KiB, so that a pipe takes it at once.
    stdin.write_all(&input).context("the program does not take its plan")?;
    drop(stdin);
    let output = reader(child.stdout.take().context("no output of the program")?);
    let errors = reader(child.stderr.take().context("no errors of the program")?);
    let start = now();
    let status = loop {
        if let Some(status) = child.try_wait().context("cannot wait for the program")? {
            break status;
        }
        if start.elapsed() >= limit {
            // Fails only if it has ended meanwhile, which is as good.
            let _ = child.kill();
            let _ = child.wait();
            bail!("the program in the pod did not end within {} s", limit.as_secs());
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let joined = |thread: std::thread::JoinHandle<std::io::Result<String>>| {
        thread.join().map_err(|_| anyhow::anyhow!("a reader died"))?.context("cannot read what the program printed")
    };
    let (output, errors) = (joined(output)?, joined(errors)?);
    ensure!(status.success(), "the program in the pod ended with {status}: {errors}");
    Ok(output)
}

fn reader(mut stream: impl Read + Send + 'static) -> std::thread::JoinHandle<std::io::Result<String>> {
    std::thread::spawn(move || {
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    })
}

fn parse(text: &str) -> Result<Load> {
    let line = text.lines().last().unwrap_or_default();
    match serde_json::from_str(line).with_context(|| format!("the program printed {text:?}"))? {
        Answer::Done(load) => Ok(load),
        Answer::Failed { failed } => bail!("{failed}"),
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::process::Command;

    use super::*;

    #[test]
    fn what_the_program_says_is_a_result_or_a_failure() {
        let text = "{\"milliseconds\": [1.5, 2.5], \"granted\": [3], \"queued\": 1, \"reused\": 0, \"seconds\": 0.5, \"slots\": 0}\n";
        let load = parse(text).unwrap();
        assert_eq!((load.milliseconds.len(), load.granted.as_slice(), load.queued), (2, &[3][..], 1));
        assert_eq!(load.per_second().unwrap(), 4.0);
        assert!(load.remarks().contains("1 that waited"));
        assert_eq!(parse("{\"failed\": \"no\"}\n").unwrap_err().to_string(), "no");
        assert!(parse("").is_err());
    }

    /// The program itself, on a port where nobody listens: it says so, in its own form, and ends.
    #[test]
    fn the_program_tells_how_it_failed() {
        let free = TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port();
        let tokens = ["secret".to_owned()];
        let mut phase = Phase::grant(&tokens, &Samples { warm_up: 0, wanted: 1, least: 1 }, Duration::ZERO);
        phase.address.1 = free;
        let child = Command::new("python3")
            .args(["-c", PROGRAM])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let plan = serde_json::to_vec(&Plan { phase: &phase, limit_s: 5.0 }).unwrap();
        let text = talk(child, plan, Duration::from_secs(30)).unwrap();
        let failure = parse(&text).unwrap_err().to_string();
        assert!(failure.contains("ConnectionRefused") && !failure.contains("secret"), "{failure}");
    }

    #[test]
    fn a_program_that_hangs_is_ended() {
        let child = Command::new("python3")
            .args(["-c", "import signal; signal.pause()"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let error = talk(child, Vec::new(), Duration::from_millis(50)).unwrap_err();
        assert!(error.to_string().contains("did not end"), "{error}");
    }
}
