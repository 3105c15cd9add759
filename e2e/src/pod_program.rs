//! Python programs that speak to the device API from inside the pod of the Space of the stories (`e2e/clients`).

use std::io::{Read, Write as _};
use std::process::{Child, Stdio};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::story::{NAMESPACE, SPACE};
use crate::wait::now;
use crate::world::World;

/// What each of the programs begins with.
macro_rules! with_device_api {
    ($program:literal) => {
        concat!(include_str!("../clients/device_api.py"), include_str!($program))
    };
}

/// The calls of `bench grant`.
pub(crate) const GRANT_LOAD: &str = with_device_api!("../clients/grant_load.py");
/// The calls of `bench grant --sustain`.
pub(crate) const SUSTAIN_LOAD: &str = with_device_api!("../clients/sustain_load.py");
/// The callers of `bench recovery`.
pub(crate) const RECOVERY_LOAD: &str = with_device_api!("../clients/recovery_load.py");
/// The calls of the storm.
pub(crate) const STORM: &str = with_device_api!("../clients/storm.py");

/// Where the node agent listens in every Space's pod (N14).
pub(crate) const ADDRESS: (&str, u16) = ("127.0.0.1", 7999);
/// Python of the app's own environment, in its container.
const PYTHON: &str = "/opt/environment/venv/bin/python";

/// Runs a program in the pod with its plan on standard input, at most for `limit`, and reads the result of its last line.
pub(crate) fn run<T: DeserializeOwned>(
    world: &World,
    program: &str,
    plan: &impl Serialize,
    limit: Duration,
) -> Result<T> {
    let child = start(world, program, Stdio::piped())?;
    parse(&talk(child, serde_json::to_vec(plan)?, limit)?)
}

/// Starts a program in the pod whose input and output are ours.
pub(crate) fn start(world: &World, program: &str, errors: Stdio) -> Result<Child> {
    let pod = world.pod(NAMESPACE, SPACE)?;
    let exec = ["--namespace", NAMESPACE, "exec", "--stdin", &pod, "--container", "app", "--", PYTHON, "-c", program];
    let mut command = world.kubectl.command(&exec);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(errors);
    command.spawn().context("cannot run kubectl exec")
}

/// Gives the program its input and takes its output, in bounded time.
fn talk(mut child: Child, input: Vec<u8>, limit: Duration) -> Result<String> {
    let mut stdin = child.stdin.take().context("no input to the program")?;
    // Closed when written: the program reads its plan to the end. On a thread, for a plan may be longer than a pipe and its
    // reader may be slow to start; it ends with the program at the latest.
    let writer = std::thread::spawn(move || stdin.write_all(&input));
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
    let (output, errors) = (joined(output)?, joined(errors)?);
    ensure!(status.success(), "the program in the pod ended with {status}: {errors}");
    writer.join().map_err(|_| anyhow!("a writer died"))?.context("the program did not take its plan")?;
    Ok(output)
}

fn reader(mut stream: impl Read + Send + 'static) -> JoinHandle<std::io::Result<String>> {
    std::thread::spawn(move || {
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    })
}

fn joined(thread: JoinHandle<std::io::Result<String>>) -> Result<String> {
    thread.join().map_err(|_| anyhow!("a reader died"))?.context("cannot read what the program printed")
}

/// The result, or the failure that the program told in its own form.
fn parse<T: DeserializeOwned>(text: &str) -> Result<T> {
    let line = text.lines().last().unwrap_or_default();
    let answer: Value = serde_json::from_str(line).with_context(|| format!("the program printed {line:?}"))?;
    if let Some(failed) = answer["failed"].as_str() {
        bail!("{failed}");
    }
    serde_json::from_value(answer).context("the program's result is not what was expected")
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::BTreeMap;
    use std::io::{BufRead as _, BufReader};
    use std::net::{TcpListener, TcpStream};
    use std::process::Command;
    use std::sync::{Arc, Mutex};

    use serde_json::json;

    use super::*;

    /// Runs a program on this machine instead of in a pod.
    pub(crate) fn here<T: DeserializeOwned>(program: &str, plan: &impl Serialize) -> Result<T> {
        let child = Command::new("python3")
            .args(["-c", program])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        parse(&talk(child, serde_json::to_vec(plan).unwrap(), Duration::from_secs(60)).unwrap())
    }

    /// Calls of each path that a [`device_api`] has answered.
    pub(crate) type Answered = Arc<Mutex<BTreeMap<String, u64>>>;

    /// A device API in miniature: grants everything at once, refuses what declares more than 50 s and every token that says
    /// `foreign`, and an account that says `hungry` from its third call on.
    pub(crate) fn device_api() -> (u16, Answered) {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let answered = Answered::default();
        let counted = Arc::clone(&answered);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let counted = Arc::clone(&counted);
                // A client that is gone in the middle of an answer is none of the server's business.
                std::thread::spawn(move || answer(stream.unwrap(), &counted).unwrap_or_default());
            }
        });
        (port, answered)
    }

    fn answer(mut stream: TcpStream, counted: &Mutex<BTreeMap<String, u64>>) -> std::io::Result<()> {
        let mut head = String::new();
        let mut reader = BufReader::new(stream.try_clone()?);
        while !head.ends_with("\r\n\r\n") {
            if reader.read_line(&mut head)? == 0 {
                return Ok(());
            }
        }
        let target = head.split(' ').nth(1).unwrap_or_default();
        let path = target.split('?').next().unwrap_or_default().to_owned();
        let value = |name: &str| {
            let found = target.split(['?', '&']).find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='));
            found.unwrap_or_default().to_owned()
        };
        let (number, calls) = {
            let mut counted = counted.lock().unwrap();
            let of_token = counted.entry(format!("{path} {}", value("token"))).or_default();
            *of_token += 1;
            let calls = *of_token;
            let all = counted.entry(path.clone()).or_default();
            *all += 1;
            (*all, calls)
        };
        let declared: u64 = value("durationSeconds").parse().unwrap_or(0);
        let (status, header, body) = match path.as_str() {
            "/schedule" if value("token") == "foreign" => (401, "", json!({})),
            "/schedule" if declared > 50 => (429, "X-Approve-Result: illegal-duration\r\n", json!({})),
            "/schedule" if value("token") == "hungry" && calls > 2 => {
                (429, "X-Approve-Result: quota-exceeded\r\n", json!({}))
            }
            "/schedule" => {
                let token = format!("lease-{number}");
                (200, "", json!({ "idle": false, "nvidiaIndex": 0, "nvidiaUUID": "GPU", "allowToken": token }))
            }
            _ => (200, "", Value::Null),
        };
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let head = format!("HTTP/1.1 {status} x\r\nContent-Type: application/json\r\n{header}");
        write!(stream, "{head}Content-Length: {}\r\n\r\n{body}", body.len())
    }

    #[test]
    fn what_the_program_says_is_a_result_or_a_failure() {
        assert_eq!(parse::<Vec<u64>>("warning\n[1, 2]\n").unwrap(), [1, 2]);
        assert_eq!(parse::<Value>("{\"failed\": \"no\"}\n").unwrap_err().to_string(), "no");
        assert!(parse::<Value>("").is_err());
        assert!(parse::<Vec<u64>>("{\"a\": 1}").is_err());
    }

    #[test]
    fn a_program_that_hangs_is_ended_also_before_it_has_read_a_long_plan() {
        let child = Command::new("python3")
            .args(["-c", "import signal; signal.pause()"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let error = talk(child, vec![b' '; 1 << 20], Duration::from_millis(50)).unwrap_err();
        assert!(error.to_string().contains("did not end"), "{error}");
    }
}
