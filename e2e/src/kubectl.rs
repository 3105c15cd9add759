//! kubectl as a user types it, with JSON read back.

use std::io::Write as _;
use std::process::{Command, Output, Stdio};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

/// The local cluster's kubectl.
#[derive(Clone, Debug)]
pub struct Kubectl {
    program: String,
}

impl Kubectl {
    /// From `SPACEPORT_KUBECTL`, as `cargo xtask` sets it.
    pub fn from_environment() -> Result<Self> {
        let program = setting("SPACEPORT_KUBECTL")?;
        setting("KUBECONFIG")?;
        Ok(Self { program })
    }

    /// The command with these arguments, not started.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        // The program is several components in one; the first argument chooses.
        command.arg("kubectl").args(arguments).stdin(Stdio::null());
        command
    }

    /// Runs it and gives its output whatever its exit status.
    pub fn output(&self, arguments: &[&str]) -> Result<Output> {
        self.command(arguments).output().with_context(|| format!("cannot run kubectl {}", arguments.join(" ")))
    }

    /// Runs it; an exit status other than 0 is an error with what it printed.
    pub fn run(&self, arguments: &[&str]) -> Result<String> {
        let output = self.output(arguments)?;
        if !output.status.success() {
            bail!(
                "kubectl {} ended with {}: {}{}",
                arguments.join(" "),
                output.status,
                String::from_utf8_lossy(&output.stderr),
                String::from_utf8_lossy(&output.stdout)
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// `get … -o json`.
    pub fn json(&self, arguments: &[&str]) -> Result<Value> {
        let text = self.run(&[arguments, &["--output", "json"]].concat())?;
        serde_json::from_str(&text).with_context(|| format!("kubectl {} printed no JSON", arguments.join(" ")))
    }

    /// The items of `get … -o json` on a kind.
    pub fn items(&self, arguments: &[&str]) -> Result<Vec<Value>> {
        match self.json(arguments)? {
            Value::Object(mut list) => match list.remove("items") {
                Some(Value::Array(items)) => Ok(items),
                _ => bail!("kubectl {} answered no list", arguments.join(" ")),
            },
            _ => bail!("kubectl {} answered no object", arguments.join(" ")),
        }
    }

    /// `apply -f -` of this YAML or JSON.
    pub fn apply(&self, manifest: &str) -> Result<String> {
        let mut child = self
            .command(&["apply", "--filename", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot run kubectl apply")?;
        child.stdin.take().context("kubectl has no input")?.write_all(manifest.as_bytes())?;
        let output = child.wait_with_output()?;
        if !output.status.success() {
            bail!("kubectl apply ended with {}: {}", output.status, String::from_utf8_lossy(&output.stderr));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

/// The value at this JSON pointer, or null: a missing field is a value to wait on, not an error.
pub fn at<'a>(object: &'a Value, pointer: &str) -> &'a Value {
    object.pointer(pointer).unwrap_or(&Value::Null)
}

#[allow(clippy::disallowed_methods)] // The one place of this crate that reads its settings.
pub(crate) fn setting(name: &str) -> Result<String> {
    std::env::var(name)
        .with_context(|| format!("{name} is not set: run this through `cargo xtask test e2e` or `cargo xtask demo`"))
}
