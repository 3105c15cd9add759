//! The callers inside the pod that ask for leases all the time, and what they tell while they do.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::pod_program::{self, ADDRESS, RECOVERY_LOAD};
use crate::wait::now;
use crate::world::World;

/// What each call declares; it is given back at once.
const DECLARED_S: u64 = 5;
/// Between two calls of a caller: the finest that a recovery is told, beside the callers' own time.
const PAUSE: Duration = Duration::from_millis(50);
/// No program of a run goes on for longer, whatever happens to who started it.
const LIFE: Duration = Duration::from_secs(900);
/// A program that was told to end waits 5 s for its calls.
const END_LIMIT: Duration = Duration::from_secs(15);

/// The plan, as the program reads it.
#[derive(Serialize)]
struct Plan<'run> {
    address: (&'static str, u16),
    tokens: &'run [String],
    declared_s: u64,
    pause_s: f64,
    limit_s: f64,
}

/// What became of one call; seconds since 1970.
#[derive(Debug, Deserialize)]
struct Answer {
    asked: f64,
    granted: Option<f64>,
    refused: Option<String>,
}

/// The program; it ends with this.
pub(super) struct Probe {
    child: Child,
    /// It ends when this does.
    input: Option<ChildStdin>,
    answers: Receiver<String>,
}

impl Probe {
    /// Starts callers, one for each token.
    pub(super) fn start(world: &World, tokens: &[String]) -> Result<Self> {
        let child = pod_program::start(world, RECOVERY_LOAD, Stdio::inherit())?;
        Self::talk(child, ADDRESS, tokens)
    }

    fn talk(mut child: Child, address: (&'static str, u16), tokens: &[String]) -> Result<Self> {
        let plan =
            Plan { address, tokens, declared_s: DECLARED_S, pause_s: PAUSE.as_secs_f64(), limit_s: LIFE.as_secs_f64() };
        let mut input = child.stdin.take().context("no input to the program")?;
        let output = BufReader::new(child.stdout.take().context("no output of the program")?);
        // Not bounded: it takes as many answers as the callers can ask for in LIFE, which is some ten thousand short lines.
        let (sender, answers) = channel();
        // Ends with the program's output.
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        writeln!(input, "{}", serde_json::to_string(&plan)?).context("the program does not take its plan")?;
        Ok(Self { child, input: Some(input), answers })
    }

    /// When the first lease came that was asked for after `since`, seconds since 1970.
    pub(super) fn granted_after(&self, since: f64, limit: Duration) -> Result<f64> {
        let end = now() + limit;
        let mut refused = None;
        loop {
            let Some(line) = self.next(end)? else {
                let last = refused.unwrap_or_else(|| "no answer at all".to_owned());
                bail!("nothing was granted within {} s; last: {last}", limit.as_secs());
            };
            let answer: Answer =
                serde_json::from_str(&line).with_context(|| format!("the program printed {line:?}"))?;
            match answer.granted {
                Some(granted) if answer.asked > since => return Ok(granted),
                _ => refused = answer.refused.or(refused),
            }
        }
    }

    fn next(&self, end: Instant) -> Result<Option<String>> {
        match self.answers.recv_timeout(end.saturating_duration_since(now())) {
            Ok(line) => Ok(Some(line)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => bail!("the program in the pod has ended"),
        }
    }

    /// Ends the callers. Whatever they hold they give back.
    pub(super) fn stop(mut self) -> Result<()> {
        drop(self.input.take());
        let end = now() + END_LIMIT;
        loop {
            if let Some(status) = self.child.try_wait().context("cannot wait for the program")? {
                ensure!(status.success(), "the program in the pod ended with {status}");
                return Ok(());
            }
            ensure!(now() < end, "the program in the pod did not end within {} s", END_LIMIT.as_secs());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        // Fails only if it has ended, which is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::pod_program::tests::device_api;
    use crate::wait::wall;

    fn here(port: u16, tokens: &[&str]) -> Probe {
        let mut python = Command::new("python3");
        python.args(["-c", RECOVERY_LOAD]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let child = python.spawn().unwrap();
        let tokens: Vec<String> = tokens.iter().map(|token| (*token).to_owned()).collect();
        Probe::talk(child, ("127.0.0.1", port), &tokens).unwrap()
    }

    #[test]
    fn the_callers_tell_of_each_grant_until_they_are_stopped() {
        let (port, answered) = device_api();
        let probe = here(port, &["a", "b"]);
        let first = probe.granted_after(0.0, Duration::from_secs(20)).unwrap();
        let later = wall().unwrap();
        assert!(first < later);
        let granted = probe.granted_after(later, Duration::from_secs(20)).unwrap();
        assert!(granted > later && granted < wall().unwrap());
        probe.stop().unwrap();
        let answered = answered.lock().unwrap();
        assert!(answered["/schedule"] >= 3 && answered["/release"] >= 3, "{answered:?}");
    }

    #[test]
    fn a_refusal_is_no_grant_and_the_last_one_is_told() {
        let (port, _) = device_api();
        let probe = here(port, &["foreign"]);
        let error = probe.granted_after(0.0, Duration::from_secs(2)).unwrap_err().to_string();
        assert!(error.contains("nothing was granted within 2 s") && error.contains("401"), "{error}");
        probe.stop().unwrap();
    }

    /// Without an operator the agent does not answer in time, or closes the connection: the callers ask again.
    #[test]
    fn callers_outlive_a_device_api_that_is_away() {
        let free = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port();
        let probe = here(free, &["a"]);
        let error = probe.granted_after(0.0, Duration::from_secs(1)).unwrap_err().to_string();
        assert!(error.contains("ConnectionRefused"), "{error}");
        probe.stop().unwrap();
    }
}
