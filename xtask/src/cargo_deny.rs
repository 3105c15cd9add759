//! cargo-deny at a pinned version, built once into the user's cache.

use std::path::PathBuf;

use anyhow::Result;

use crate::command::run_long;
use crate::workspace::Workspace;

const VERSION: &str = "0.20.2";

/// The program, built first where it is missing.
pub fn program(workspace: &Workspace) -> Result<PathBuf> {
    let folder = workspace.cache.join("cargo-deny").join(VERSION);
    let program = folder.join("bin/cargo-deny");
    if !program.exists() {
        let mut install = workspace.cargo(&["install", "cargo-deny", "--locked", "--version", VERSION, "--root"]);
        run_long(
            "building cargo-deny (about 4 minutes)",
            install.arg(&folder),
            &workspace.cache.join("logs/cargo-deny.log"),
        )?;
    }
    Ok(program)
}
