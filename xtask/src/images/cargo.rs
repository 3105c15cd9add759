//! Release builds of our own crates for the images.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::command::progress;
use crate::workspace::Workspace;

/// How a binary is linked.
#[derive(Clone, Copy, PartialEq)]
pub enum Linking {
    /// Against the C library of the base image, for what loads libraries at run time.
    Dynamic,
    /// Into one file that needs no other.
    Static,
}

/// The programs that are linked into one file, by the names of their crates.
const STATIC_PROGRAMS: &str = "spaceport_operator spaceport_wait";

/// Builds a binary of the workspace and returns where it lies.
pub fn build_binary(workspace: &Workspace, binary: &str, linking: Linking) -> Result<PathBuf> {
    progress(&format!("building {binary}"));
    let path = built(cargo(workspace).args(["--bin", binary]), |artifact| {
        let found = artifact["target"]["name"] == binary;
        found.then(|| artifact["executable"].as_str()).flatten()
    })?;
    let is_static = !has_interpreter(&path)?;
    if is_static != (linking == Linking::Static) {
        bail!("{} {} a dynamic loader", path.display(), if is_static { "does not ask for" } else { "asks for" });
    }
    Ok(path)
}

/// Builds a program with the switches by which stories break it on purpose (feature `faults`). A debug build like the
/// tests themselves, so that no library is compiled for it alone.
pub fn build_breakable(workspace: &Workspace, binary: &str) -> Result<PathBuf> {
    progress(&format!("building {binary} with its faults"));
    let mut cargo = workspace.cargo(&["build", "--workspace", "--locked", "--message-format=json-render-diagnostics"]);
    // Both at once: one set of features, whichever of them is built.
    cargo.args(["--features", "spaceport-operator/faults,spaceport-device-plugin/faults", "--bin", binary]);
    built(&mut cargo, |artifact| {
        let found = artifact["target"]["name"] == binary;
        found.then(|| artifact["executable"].as_str()).flatten()
    })
}

/// Builds the C library of a package.
pub fn build_library(workspace: &Workspace, package: &str) -> Result<PathBuf> {
    progress(&format!("building the library {package}"));
    built(cargo(workspace).arg("--lib"), |artifact| {
        let names = artifact["filenames"].as_array()?;
        let is_package = artifact["package_id"].as_str().is_some_and(|id| id.contains(package));
        is_package.then(|| names.iter().filter_map(Value::as_str).find(|name| name.ends_with(".so"))).flatten()
    })
}

/// A release build of the whole workspace, so that cargo resolves the same features of the dependencies for every
/// image and compiles them once. What is compiled is what the caller adds.
fn cargo(workspace: &Workspace) -> Command {
    let mut cargo = workspace.cargo(&["build", "--release", "--workspace", "--locked"]);
    cargo.env("RUSTC_WORKSPACE_WRAPPER", workspace.root.join("xtask/programs/rustc-static"));
    cargo.env("STATIC_PROGRAMS", STATIC_PROGRAMS);
    cargo.arg("--message-format=json-render-diagnostics");
    cargo
}

/// Runs cargo, whose diagnostics go to the terminal, and picks the file from its messages.
fn built(cargo: &mut Command, pick: impl Fn(&Value) -> Option<&str>) -> Result<PathBuf> {
    artifacts(cargo)?
        .iter()
        .find_map(|artifact| pick(artifact).map(PathBuf::from))
        .context("cargo built nothing of that name")
}

/// Runs cargo with `--message-format=json-render-diagnostics`, and gives what it has built as its messages tell it.
pub fn artifacts(cargo: &mut Command) -> Result<Vec<Value>> {
    let output = cargo.stdin(Stdio::null()).stderr(Stdio::inherit()).output().context("cannot start cargo")?;
    if !output.status.success() {
        bail!("cargo failed ({})", output.status);
    }
    let messages = String::from_utf8(output.stdout).context("cargo's messages are not text")?;
    let parsed: Result<Vec<Value>, _> = messages.lines().map(serde_json::from_str).collect();
    let mut parsed = parsed.context("a message of cargo is not JSON")?;
    parsed.retain(|message| message["reason"] == "compiler-artifact");
    Ok(parsed)
}

/// Whether an ELF file of 64 bits names a dynamic loader (a program header of type PT_INTERP).
fn has_interpreter(path: &Path) -> Result<bool> {
    let file = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    parse_interpreter(&file).with_context(|| format!("{} is no ELF file of 64 bits", path.display()))
}

fn parse_interpreter(file: &[u8]) -> Option<bool> {
    const PT_INTERP: u32 = 3;
    let number = |at: usize, size: usize| -> Option<usize> {
        let bytes = file.get(at..at + size)?;
        // Little-endian, as every machine that we build for.
        Some(bytes.iter().rev().fold(0, |value, byte| value << 8 | usize::from(*byte)))
    };
    if file.get(..5)? != b"\x7fELF\x02" {
        return None;
    }
    let (start, size, count) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
    for index in 0..count {
        if number(start + index * size, 4)? == PT_INTERP as usize {
            return Some(true);
        }
    }
    Some(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dynamic_program_names_its_loader_and_text_is_no_program() {
        assert_eq!(parse_interpreter(&fs::read("/proc/self/exe").unwrap()), Some(true));
        assert_eq!(parse_interpreter(b"#!/bin/sh"), None);
    }
}
