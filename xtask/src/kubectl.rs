//! `cargo xtask kubectl …`: the kubectl that was built with the cluster, on the cluster's kubeconfig.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Result, bail};
use clap::Args;

use crate::cluster::binaries;
use crate::workspace::Workspace;

#[derive(Args)]
pub struct KubectlArguments {
    /// Passed on as they are
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

/// Replaces this process by kubectl, so that signals, the terminal and the exit code are kubectl's own.
pub fn run(workspace: &Workspace, arguments: &KubectlArguments) -> Result<()> {
    if !workspace.kubeconfig().exists() {
        bail!("no local cluster: run `cargo xtask up` first");
    }
    let error = command(workspace)?.args(&arguments.arguments).exec();
    Err(anyhow::Error::from(error).context("cannot start kubectl"))
}

/// kubectl on the local cluster, for the other commands.
pub fn command(workspace: &Workspace) -> Result<Command> {
    let mut command = Command::new(binaries::kubernetes(workspace)?);
    command.arg("kubectl").env("KUBECONFIG", workspace.kubeconfig());
    Ok(command)
}
