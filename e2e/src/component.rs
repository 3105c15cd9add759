//! Components of the local cluster, which `cargo xtask up` started and nothing starts again by itself.

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::kubectl::setting;

/// One that stories kill.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Component {
    ApiServer,
    Kubelet,
}

impl Component {
    fn name(self) -> &'static str {
        match self {
            Self::ApiServer => "kube-apiserver",
            Self::Kubelet => "kubelet",
        }
    }

    /// kill -9 of the process that `cargo xtask up` noted.
    pub(crate) fn kill(self) -> Result<()> {
        let path = format!("{}/pids/{}.json", setting("SPACEPORT_LOCAL")?, self.name());
        let record: Value = serde_json::from_slice(&std::fs::read(&path).with_context(|| path.clone())?)?;
        let pid = record["pid"].as_u64().with_context(|| format!("{path} has no pid"))?;
        let status = std::process::Command::new("kill").args(["-KILL", &pid.to_string()]).status()?;
        ensure!(status.success(), "cannot kill {} (pid {pid}): {status}", self.name());
        Ok(())
    }

    /// Starts whatever does not run, as a host's service manager would.
    pub(crate) fn start_all() -> Result<()> {
        let output = std::process::Command::new(setting("SPACEPORT_XTASK")?).arg("up").output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "`up` ended with {}: {said}", output.status);
        Ok(())
    }
}
