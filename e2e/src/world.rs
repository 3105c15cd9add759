//! The cluster as a story sees it: Spaces, accounts, receipts, calls.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::books::{charged_ms, is_over};
use crate::call::{Answer, Call};
use crate::kubectl::{Kubectl, at};
use crate::token::Token;
use crate::wait::eventually;

/// A Space's environment is installed from the package index on its first start; slow indexes need minutes.
const RUNNING_LIMIT: Duration = Duration::from_secs(480);
/// A receipt follows its lease off the critical path, within a second unless writes are under pressure.
const RECEIPT_LIMIT: Duration = Duration::from_secs(20);

/// The local cluster.
#[derive(Clone, Debug)]
pub struct World {
    /// Plain kubectl.
    pub kubectl: Kubectl,
}

impl World {
    /// The cluster that `cargo xtask` named.
    pub fn connect() -> Result<Self> {
        Ok(Self { kubectl: Kubectl::from_environment()? })
    }

    /// Applies every file of `examples/`, in the order of their names.
    pub fn apply_examples(&self) -> Result<()> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
        let path = folder.to_str().context("the path of the repository is not UTF-8")?;
        self.kubectl.run(&["apply", "--filename", path])?;
        Ok(())
    }

    /// Waits until the Space is Running and gives its uid; `progress` hears each new stage and reason.
    pub fn running(&self, namespace: &str, space: &str, mut progress: impl FnMut(&str)) -> Result<String> {
        let mut told = String::new();
        eventually(&format!("Space {namespace}/{space} is Running"), RUNNING_LIMIT, || {
            let object = self.kubectl.json(&["--namespace", namespace, "get", "space", space])?;
            let stage = at(&object, "/status/stage").as_str().unwrap_or("(no stage yet)").to_owned();
            let reason = at(&object, "/status/reason").as_str().unwrap_or_default().to_owned();
            let seen = if reason.is_empty() { stage.clone() } else { format!("{stage}: {reason}") };
            if seen != told {
                progress(&seen);
                told.clone_from(&seen);
            }
            match stage.as_str() {
                "Running" => Ok(Ok(at(&object, "/metadata/uid").as_str().unwrap_or_default().to_owned())),
                "ConfigError" | "BuildError" | "RuntimeError" | "NoAppFile" => {
                    bail!("Space {namespace}/{space} is {seen}: {}", at(&object, "/status"))
                }
                _ => Ok(Err(seen)),
            }
        })
    }

    /// The page of an account.
    pub fn page(&self, account: &str) -> Result<Value> {
        Ok(at(&self.kubectl.json(&["get", "gpuaccount", account])?, "/status").clone())
    }

    /// Charged in the account's windows and grants, milliseconds.
    pub fn charged_ms(&self, account: &str) -> Result<i64> {
        Ok(charged_ms(&self.page(account)?))
    }

    /// Waits until nothing of the account is held, and gives its page.
    pub fn settled(&self, account: &str, limit: Duration) -> Result<Value> {
        eventually(&format!("account {account} has no open hold"), limit, || {
            let page = self.page(account)?;
            let holds = at(&page, "/holds").as_array().map_or(0, Vec::len);
            Ok(if holds == 0 { Ok(page) } else { Err(at(&page, "/holds").to_string()) })
        })
    }

    /// Receipts of one account in a namespace, oldest first.
    pub fn receipts(&self, namespace: &str, account: &str) -> Result<Vec<Value>> {
        let mut receipts = self.kubectl.items(&["--namespace", namespace, "get", "gpuleases"])?;
        receipts.retain(|receipt| at(receipt, "/spec/account") == account);
        // The name ends with the lease's ULID, which sorts by time; the Space's name may differ.
        receipts.sort_by_key(|receipt| at(receipt, "/spec/lease").as_str().unwrap_or_default().to_owned());
        Ok(receipts)
    }

    /// Waits for `count` receipts of the account that have ended.
    pub fn ended_receipts(&self, namespace: &str, account: &str, count: usize) -> Result<Vec<Value>> {
        eventually(&format!("{count} ended receipts of {account}"), RECEIPT_LIMIT, || {
            let receipts = self.receipts(namespace, account)?;
            let phases: Vec<_> = receipts.iter().map(|receipt| at(receipt, "/spec/phase").to_string()).collect();
            let ended = receipts.iter().filter(|receipt| is_over(receipt)).count();
            Ok(if ended >= count { Ok(receipts) } else { Err(phases.join(", ")) })
        })
    }

    /// Address of a Space as other pods and this machine reach it.
    pub fn url(&self, namespace: &str, space: &str) -> Result<String> {
        let service = self.kubectl.json(&["--namespace", namespace, "get", "service", space])?;
        let address =
            at(&service, "/spec/clusterIP").as_str().context("the Space's Service has no address")?.to_owned();
        let port = at(&service, "/spec/ports/0/port").as_u64().context("the Space's Service has no port")?;
        Ok(format!("http://{address}:{port}"))
    }

    /// Calls a function as `account`, with a token worth one call, and waits for the answer.
    pub fn call_as(&self, account: &str, namespace: &str, space: &str, api_name: &str) -> Result<Answer> {
        self.start_call(Some(account), namespace, space, api_name)?.answer()
    }

    /// The same without waiting; without an account the call carries no token.
    pub(crate) fn start_call(
        &self,
        account: Option<&str>,
        namespace: &str,
        space: &str,
        api_name: &str,
    ) -> Result<Call> {
        let object = self.kubectl.json(&["--namespace", namespace, "get", "space", space])?;
        let uid = at(&object, "/metadata/uid").as_str().context("the Space has no uid")?;
        let token = account.map(|account| Token::one_call(account, uid).sign(&self.kubectl)).transpose()?;
        Call::start(&self.url(namespace, space)?, api_name, token.as_deref(), &[])
    }

    /// Name of the Space's running pod.
    pub fn pod(&self, namespace: &str, space: &str) -> Result<String> {
        let selector = format!("spaceport.dev/space={space}");
        let pods = self.kubectl.items(&["--namespace", namespace, "get", "pods", "--selector", &selector])?;
        let running = pods
            .iter()
            .find(|pod| at(pod, "/status/phase") == "Running" && at(pod, "/metadata/deletionTimestamp").is_null());
        let pod = running.with_context(|| format!("Space {namespace}/{space} has no running pod"))?;
        Ok(at(pod, "/metadata/name").as_str().context("a pod without name")?.to_owned())
    }

    /// Runs a Python program in the Space's pod, in the app's environment, and gives what it printed.
    pub fn python(&self, namespace: &str, space: &str, program: &str) -> Result<String> {
        let pod = self.pod(namespace, space)?;
        self.kubectl.run(&[&exec(namespace, &pod)[..], &["python", &told(program)?]].concat())
    }
}

/// `kubectl exec` of a shell that runs its argument as a program and prints what it said.
///
/// The program's output goes through a file: workers that it forked and that are kept frozen for reuse have its output open,
/// and kubectl would wait for them.
pub(crate) fn exec<'a>(namespace: &'a str, pod: &'a str) -> [&'a str; 10] {
    let shell = r#"said=$(mktemp); "/opt/environment/venv/bin/$0" -c "$1" >"$said" 2>&1 </dev/null; code=$?; cat "$said"; exit $code"#;
    ["--namespace", namespace, "exec", pod, "--container", "app", "--", "sh", "-c", shell]
}

/// The program with an end that does not wait for its frozen workers, as the interpreter's own end would.
pub(crate) fn told(program: &str) -> Result<String> {
    let program = serde_json::to_string(program)?;
    Ok(format!(
        r#"
import os, sys, traceback
code = 0
try:
    exec(compile({program}, "story", "exec"), {{"__name__": "__main__"}})
except BaseException:
    traceback.print_exc()
    code = 1
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)
"#
    ))
}
