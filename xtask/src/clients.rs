//! The Python with the unmodified `gradio_client`, and the variables by which stories and demo find everything.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result};
use sha2::{Digest as _, Sha256};

use crate::cluster::binaries;
use crate::command::{command, run_long};
use crate::workspace::{Workspace, hex};

const REQUIREMENTS: &str = "e2e/clients/requirements.txt";

/// Python of a virtual environment in the user's cache, keyed by the pinned requirements.
pub fn python(workspace: &Workspace) -> Result<PathBuf> {
    let requirements = workspace.root.join(REQUIREMENTS);
    let key = &hex(&Sha256::digest(std::fs::read(&requirements)?))[..16];
    let folder = workspace.cache.join("clients").join(key);
    let python = folder.join("bin/python");
    let complete = folder.join("complete");
    if !complete.exists() {
        let log = workspace.cache.join("logs/clients.log");
        run_long(
            "making a Python environment for gradio_client",
            command("python3", &["-m", "venv", "--clear"]).arg(&folder),
            &log,
        )?;
        let install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--requirement"];
        run_long("installing gradio_client", command(&python, &install).arg(&requirements), &log)?;
        std::fs::write(&complete, "")?;
    }
    Ok(python)
}

/// Adds what `spaceport-e2e` reads.
pub fn environment(workspace: &Workspace, command: &mut Command) -> Result<()> {
    command
        .env("KUBECONFIG", workspace.kubeconfig())
        .env("SPACEPORT_KUBECTL", binaries::kubernetes(workspace)?)
        .env("SPACEPORT_CLIENT_PYTHON", python(workspace)?)
        .env("SPACEPORT_LOCAL", &workspace.local)
        // Stories kill components and start them again.
        .env("SPACEPORT_XTASK", std::env::current_exe().context("this program has no path")?);
    Ok(())
}
