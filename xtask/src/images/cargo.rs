//! Release builds of our own crates for the images.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::command::{output, progress};
use crate::workspace::Workspace;

/// How a binary is linked.
#[derive(Clone, Copy, PartialEq)]
pub enum Linking {
    /// Against the C library of the base image, for what loads libraries at run time.
    Dynamic,
    /// Into one file that needs no other.
    Static,
}

/// Builds a binary of the workspace and returns where it lies.
pub fn build_binary(workspace: &Workspace, binary: &str, linking: Linking) -> Result<PathBuf> {
    let package = package_of(workspace, binary)?;
    progress(&format!("building {binary}"));
    let mut cargo = cargo(workspace);
    cargo.args(["rustc", "--release", "--package", &package, "--bin", binary]);
    cargo.arg("--message-format=json-render-diagnostics");
    if linking == Linking::Static {
        // For this crate only and without --target, so that the dependencies are the same builds as for everything
        // else. What is linked is decided here, at the last step.
        cargo.args(["--", "-C", "target-feature=+crt-static"]);
    }
    let path = built(&mut cargo, |artifact| {
        let found = artifact["target"]["name"] == binary;
        found.then(|| artifact["executable"].as_str()).flatten()
    })?;
    if linking == Linking::Static && has_interpreter(&path)? {
        bail!("{} is not static: it asks for a dynamic loader", path.display());
    }
    Ok(path)
}

/// Builds the C library of a package.
pub fn build_library(workspace: &Workspace, package: &str) -> Result<PathBuf> {
    progress(&format!("building the library {package}"));
    let mut cargo = cargo(workspace);
    cargo.args(["build", "--release", "--package", package, "--lib", "--message-format=json-render-diagnostics"]);
    built(&mut cargo, |artifact| {
        let names = artifact["filenames"].as_array()?;
        let is_package = artifact["package_id"].as_str().is_some_and(|id| id.contains(package));
        is_package.then(|| names.iter().filter_map(Value::as_str).find(|name| name.ends_with(".so"))).flatten()
    })
}

fn cargo(workspace: &Workspace) -> Command {
    let mut cargo = Command::new(&workspace.host.cargo);
    cargo.current_dir(&workspace.root);
    cargo
}

/// Runs cargo, whose diagnostics go to the terminal, and picks the file from its messages.
fn built(cargo: &mut Command, pick: impl Fn(&Value) -> Option<&str>) -> Result<PathBuf> {
    let output = cargo.stdin(Stdio::null()).stderr(Stdio::inherit()).output().context("cannot start cargo")?;
    if !output.status.success() {
        bail!("cargo failed ({})", output.status);
    }
    let messages = String::from_utf8(output.stdout).context("cargo's messages are not text")?;
    for line in messages.lines() {
        let message: Value = serde_json::from_str(line).context("a message of cargo is not JSON")?;
        if message["reason"] == "compiler-artifact"
            && let Some(path) = pick(&message)
        {
            return Ok(PathBuf::from(path));
        }
    }
    bail!("cargo built nothing of that name")
}

/// The package that a binary belongs to.
fn package_of(workspace: &Workspace, binary: &str) -> Result<String> {
    let text = output(cargo(workspace).args(["metadata", "--no-deps", "--format-version", "1"]))?;
    let metadata: Value = serde_json::from_str(&text).context("cargo metadata is not JSON")?;
    let has_it = |package: &&Value| {
        package["targets"].as_array().into_iter().flatten().any(|target| {
            target["name"] == binary && target["kind"].as_array().is_some_and(|kinds| kinds.contains(&"bin".into()))
        })
    };
    let packages = metadata["packages"].as_array().context("cargo metadata lists no packages")?;
    let package = packages.iter().find(has_it).with_context(|| format!("no package has a binary {binary}"))?;
    Ok(package["name"].as_str().context("a package without a name")?.to_owned())
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
