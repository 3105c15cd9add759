//! `cargo xtask demo`: everything from nothing, up to three calls and their receipts.

use std::process::Stdio;

use anyhow::{Context, Result, ensure};

use crate::charts::{self, ChartsArguments};
use crate::clients;
use crate::cluster::{self, UpArguments};
use crate::command::headline;
use crate::workspace::Workspace;

pub fn demo(workspace: &Workspace) -> Result<()> {
    headline("the local cluster");
    cluster::up(workspace, &UpArguments::default())?;
    headline("images and charts");
    charts::run(workspace, &ChartsArguments::default())?;
    headline("the story");
    // Without --package, so that cargo resolves the same features as for the tests and compiles nothing twice.
    let mut story = workspace.cargo(&["run", "--quiet", "--locked", "--bin", "spaceport-demo"]);
    clients::environment(workspace, &mut story)?;
    let status = story.stdin(Stdio::null()).status().context("cannot start the story")?;
    ensure!(status.success(), "what the cluster shows is not right (see above); it stays up for you to look");
    headline(
        "all of it is right. The cluster stays up: `cargo xtask kubectl get gpuleases -A`, then `cargo xtask down`",
    );
    Ok(())
}
