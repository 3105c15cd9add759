//! The image store of the cluster's containerd, spoken to with ctr.

use std::collections::BTreeSet;
use std::io::{BufWriter, Read};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use super::oci::{Image, write_layout};
use crate::cluster::binaries;
use crate::command::{output, succeeds};
use crate::workspace::Workspace;

/// containerd's socket, below `target/local`.
pub const SOCKET: &str = "containerd/containerd.sock";

/// ctr in the namespace of kubelet. Its address must be absolute.
pub fn ctr(workspace: &Workspace) -> Result<Command> {
    let mut ctr = Command::new(binaries::containerd(workspace)?.join("ctr"));
    ctr.arg("--address").arg(workspace.short(SOCKET)).args(["--namespace", "k8s.io"]);
    Ok(ctr)
}

/// The references that containerd has.
pub fn references(workspace: &Workspace) -> Result<BTreeSet<String>> {
    let list = output(ctr(workspace)?.args(["images", "list", "--quiet"])).context("containerd does not answer")?;
    Ok(list.lines().map(str::to_owned).collect())
}

/// Sends images to containerd, which unpacks them.
pub fn import(workspace: &Workspace, images: &[&Image]) -> Result<()> {
    let mut child = ctr(workspace)?
        .args(["images", "import", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot start ctr")?;
    let stdin = child.stdin.take().context("ctr has no standard input")?;
    let sent = write_layout(images, BufWriter::with_capacity(1 << 20, stdin));
    // ctr says little on standard error, so the pipe cannot fill while we still write.
    let mut said = String::new();
    if let Some(mut errors) = child.stderr.take() {
        errors.read_to_string(&mut said).context("cannot read what ctr says")?;
    }
    let status = child.wait().context("cannot wait for ctr")?;
    if !status.success() {
        bail!("ctr images import failed ({status}): {}", said.trim());
    }
    sent?;
    for image in images {
        let mut inspect = ctr(workspace)?;
        if !succeeds(inspect.args(["images", "check", &format!("name=={}", image.reference)])) {
            bail!("containerd took {} but does not have it", image.reference);
        }
    }
    Ok(())
}
