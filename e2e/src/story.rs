//! Characters of the stories: accounts of their own, raw calls inside the pod, processes of the product on this machine.

use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use crate::kubectl::at;
use crate::token::Token;
use crate::wait::eventually;
use crate::world::{World, exec, told};

/// Namespace and name of the Space in which the stories happen: the one of `examples/`.
pub const NAMESPACE: &str = "demo";
/// See [`NAMESPACE`].
pub const SPACE: &str = "hello-zero";

/// A raw call of the device API in the pod, without a client library: `POST` on loopback.
const RAW: &str = r#"
import http.client, json, os, sys
def post(path, timeout=90):
    connection = http.client.HTTPConnection("127.0.0.1", 7999, timeout=timeout)
    connection.putrequest("POST", path, skip_accept_encoding=True)
    connection.putheader("Content-Length", "0")
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read().decode()
    return {"status": answer.status, "headers": dict(answer.getheaders()), "body": body}
"#;

/// What programs in the pod that speak to the device API themselves begin with.
pub(crate) const CALLS: &str = r#"
import http.client, json, os, re, socket, threading, time
def post(path):
    connection = http.client.HTTPConnection("127.0.0.1", 7999, timeout=60)
    connection.request("POST", path, body=b"")
    answer = connection.getresponse()
    return answer.status, answer.read().decode()
def queue_size():
    connection = http.client.HTTPConnection("127.0.0.1", 7999, timeout=10)
    connection.request("GET", "/queue-size")
    return json.loads(connection.getresponse().read())
def wait_for_queue(size, seconds):
    """Twice in a row: a call that has just been answered may still be counted."""
    end = time.monotonic() + seconds
    seen = 0
    while seen < 2 and time.monotonic() < end:
        seen = seen + 1 if queue_size() == size else 0
        time.sleep(0.1)
    return queue_size()
def queue(path):
    """A call on a connection of its own, whose answer nobody reads yet."""
    connection = socket.create_connection(("127.0.0.1", 7999))
    connection.sendall(("POST " + path + " HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n").encode())
    return connection
"#;

impl World {
    /// A new account of tier `demo` with a name that no earlier run used: pages cannot be reset.
    pub fn new_account(&self, story: &str) -> Result<String> {
        let name = format!("{story}-{}", ulid::Ulid::generate().to_string().to_lowercase());
        self.kubectl.apply(&account(&name, "demo").to_string())?;
        Ok(name)
    }

    /// Sets the allow limit of the example pool, in seconds; `None` is the default of the kind. The broker watches pools, so
    /// it knows before the next program in a pod is started.
    pub fn allow_limit(&self, seconds: Option<i32>) -> Result<()> {
        let patch = json!({ "spec": { "allowLimitSeconds": seconds } }).to_string();
        self.kubectl.run(&["patch", "gpupool", "default", "--type", "merge", "--patch", &patch])?;
        Ok(())
    }

    /// uid of the Space of the stories, once it runs.
    pub fn story_space(&self) -> Result<String> {
        self.running(NAMESPACE, SPACE, |_| {})
    }

    /// A token of `account` for the Space of the stories; worth many calls, as a story makes several.
    pub fn token(&self, account: &str) -> Result<String> {
        let uid = self.story_space()?;
        Token { max_calls: 100, ..Token::one_call(account, &uid) }.sign(&self.kubectl)
    }

    /// Sends raw requests from inside the pod, one after the other, and gives the answers.
    pub fn raw(&self, paths: &[String]) -> Result<Vec<Value>> {
        let program = format!(
            "{RAW}\nprint(json.dumps([post(path) for path in json.loads({:?})]))",
            serde_json::to_string(paths)?
        );
        let text = self.python(NAMESPACE, SPACE, &program)?;
        let line = text.lines().last().unwrap_or_default();
        serde_json::from_str(line).with_context(|| format!("the program printed {text:?}"))
    }

    /// Runs a program that imports `spaces` in the pod, as a second app would, and gives the JSON of its last line.
    pub fn app(&self, program: &str) -> Result<Value> {
        let text = self.python(NAMESPACE, SPACE, program)?;
        let line = text.lines().rev().find(|line| line.starts_with(['{', '['])).unwrap_or_default();
        serde_json::from_str(line).with_context(|| format!("the program printed {text:?}"))
    }

    /// The same, left running; its output can be read when it ends.
    pub fn start_app(&self, program: &str) -> Result<Child> {
        let pod = self.pod(NAMESPACE, SPACE)?;
        self.kubectl
            .command(&[&exec(NAMESPACE, &pod)[..], &["python", &told(program)?]].concat())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot start a program in the pod")
    }

    /// Starts a program in the pod that outlives the connection it was started through: that goes by way of the API server and
    /// kubelet. What it finds out it writes to a file; see [`Self::told`].
    pub(crate) fn start_detached(&self, program: &str) -> Result<()> {
        let shell = r#"setsid "/opt/environment/venv/bin/python" -c "$0" >/tmp/detached.log 2>&1 </dev/null &"#;
        self.in_pod(&["sh", "-c", shell, program]).map(drop)
    }

    /// Runs a command in the pod of the stories.
    pub(crate) fn in_pod(&self, command: &[&str]) -> Result<String> {
        let pod = self.pod(NAMESPACE, SPACE)?;
        let exec = ["--namespace", NAMESPACE, "exec", &pod, "--container", "app", "--"];
        self.kubectl.run(&[&exec[..], command].concat())
    }

    /// Waits until a detached program has written what is `wanted`.
    pub(crate) fn told(&self, file: &str, limit: Duration, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        eventually(&format!("the program in the pod writes {file}"), limit, || {
            let text = match self.in_pod(&["cat", file, "/tmp/detached.log"]) {
                Ok(text) => text,
                Err(error) => return Ok(Err(format!("{error:#}"))),
            };
            let said = text.lines().next().and_then(|line| serde_json::from_str::<Value>(line).ok());
            Ok(said.filter(&wanted).ok_or(text))
        })
    }

    /// The account of calls without a token from the Space of the stories.
    pub fn space_account(&self) -> Result<String> {
        Ok(format!("space-{}", self.story_space()?))
    }

    /// Kills the container process of one of our programs, as a crash does, and gives its pid.
    pub fn kill_program(&self, program: &str) -> Result<u32> {
        let pids = pids_of(program)?;
        let [pid] = pids[..] else { bail!("expected one process of {program}, found {pids:?}") };
        let status = std::process::Command::new("kill").args(["-KILL", &pid.to_string()]).status()?;
        if !status.success() {
            bail!("cannot kill {program} (pid {pid}): {status}");
        }
        Ok(pid)
    }

    /// Waits until a program runs again under another pid, and its pod is ready.
    pub fn program_is_back(&self, program: &str, old: u32, selector: &str, limit: Duration) -> Result<()> {
        eventually(&format!("{program} runs again"), limit, || {
            let pids = pids_of(program)?;
            let pods =
                self.kubectl.items(&["--namespace", "spaceport-system", "get", "pods", "--selector", selector])?;
            let ready = pods.iter().any(|pod| {
                at(pod, "/status/conditions")
                    .as_array()
                    .into_iter()
                    .flatten()
                    .any(|condition| condition["type"] == "Ready" && condition["status"] == "True")
            });
            let new = pids.iter().any(|pid| *pid != old);
            Ok(if new && ready { Ok(()) } else { Err(format!("pids {pids:?}, ready: {ready}")) })
        })
    }

    /// What a person would ask for when a story fails.
    pub fn evidence(&self) -> String {
        let mut text = String::new();
        for arguments in [
            &["get", "pods,spaces,gpuleases,gpuaccounts,gpunodes", "--all-namespaces", "--output", "wide"][..],
            &["get", "gputiers,gpupools,gpuquotagrants", "--output", "wide"],
            &["get", "gpuaccounts", "--output", "yaml"],
            &["--namespace", "spaceport-system", "logs", "deployment/spaceport-operator", "--tail", "60"],
            &["--namespace", "spaceport-system", "logs", "daemonset/spaceport-device-plugin", "--tail", "60"],
        ] {
            text.push_str(&format!("\n$ kubectl {}\n", arguments.join(" ")));
            match self.kubectl.output(arguments) {
                Ok(output) => {
                    text.push_str(&String::from_utf8_lossy(&output.stdout));
                    text.push_str(&String::from_utf8_lossy(&output.stderr));
                }
                Err(error) => text.push_str(&format!("{error:#}\n")),
            }
        }
        text
    }
}

/// A GPUAccount of this tier, with an identity of its own.
pub(crate) fn account(name: &str, tier: &str) -> Value {
    json!({
        "apiVersion": "spaceport.dev/v1alpha1",
        "kind": "GPUAccount",
        "metadata": { "name": name },
        "spec": {
            "identities": [{ "issuer": "https://issuer.example.com", "subject": format!("{name}@example.com") }],
            "tier": tier,
        },
    })
}

/// Pids of the processes whose program has this name.
pub(crate) fn pids_of(program: &str) -> Result<Vec<u32>> {
    let mut pids = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let entry = entry?;
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        // A process that has just ended has no link any more.
        let Ok(path) = std::fs::read_link(entry.path().join("exe")) else { continue };
        if path.file_name().is_some_and(|name| name == program) {
            pids.push(pid);
        }
    }
    Ok(pids)
}
