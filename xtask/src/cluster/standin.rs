//! The stand-in for a GPU: device nodes without a driver, and NVML's C interface over a state file.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
use standin_nvml::{State, device_nodes};

use super::UpArguments;
use super::machine::Machine;
use crate::command::progress;
use crate::images::cargo;
use crate::workspace::Workspace;

/// Every NVIDIA driver has this one.
const DRIVER_NODE: &str = "/dev/nvidiactl";

/// The folder of the state file and the library, below `target/local`.
pub const FOLDER: &str = "standin";
/// The state file, below `target/local`.
pub const STATE: &str = "standin/state.json";
/// The library, below `target/local`, under the name that NVML has.
pub const LIBRARY: &str = "standin/libnvidia-ml.so.1";

/// Makes the nodes and the state file. Nodes that we did not make are never touched.
pub fn ensure(workspace: &Workspace, machine: &mut Machine, arguments: &UpArguments) -> Result<()> {
    let driver = Path::new(DRIVER_NODE);
    let is_ours = machine.devices.contains_key(driver);
    if arguments.real_gpu {
        if is_ours {
            bail!("the cluster is up with the stand-in: run `cargo xtask down` before `up --real-gpu`");
        }
        if !driver.exists() {
            bail!("there is no {DRIVER_NODE}: no NVIDIA driver is loaded");
        }
        return Ok(());
    }
    if driver.exists() && !is_ours {
        bail!("this machine has {DRIVER_NODE}, so an NVIDIA driver: say --real-gpu to use its cards");
    }
    let state_path = workspace.short(STATE);
    let wanted = State::h200(arguments.cards);
    // A test may have changed the cards; they stay as it left them as long as their number is the one wanted.
    let kept = if state_path.exists() { Some(State::load(&state_path)?) } else { None };
    let state = match kept {
        Some(kept) if kept.cards.len() == wanted.cards.len() => kept,
        _ => {
            fs::create_dir_all(workspace.local.join(FOLDER)).context("cannot create the stand-in's folder")?;
            wanted.save(&state_path)?;
            wanted
        }
    };
    make_nodes(workspace, machine, &state)
}

fn make_nodes(workspace: &Workspace, machine: &mut Machine, state: &State) -> Result<()> {
    let nodes: BTreeMap<PathBuf, u64> =
        device_nodes(state).into_iter().map(|node| (node.path, makedev(node.major, node.minor))).collect();
    for (path, device) in &machine.devices {
        if !nodes.contains_key(path) {
            remove_node(path, *device)?;
        }
    }
    for path in nodes.keys() {
        if path.exists() && !machine.devices.contains_key(path) {
            bail!("{} exists and is not ours", path.display());
        }
    }
    // Noted before they are made: a crash in between must not leave a node that nobody knows.
    machine.devices = nodes;
    machine.write(workspace)?;
    for (path, device) in &machine.devices {
        if !path.exists() {
            mknodat(CWD, path, FileType::CharacterDevice, Mode::empty(), *device)
                .with_context(|| format!("cannot make {}", path.display()))?;
        }
        // As the driver makes them: everybody may open, the gate decides.
        let everybody = <fs::Permissions as std::os::unix::fs::PermissionsExt>::from_mode(0o666);
        fs::set_permissions(path, everybody).with_context(|| format!("cannot open {} to all", path.display()))?;
    }
    progress(&format!("stand-in with {} card(s), {} device nodes", state.cards.len(), machine.devices.len()));
    Ok(())
}

/// Removes a node if it still is the one that we made; true if it did.
pub fn remove_node(path: &Path, device: u64) -> Result<bool> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_char_device() && found.rdev() == device => {
            fs::remove_file(path).with_context(|| format!("cannot remove {}", path.display()))?;
            Ok(true)
        }
        _ => Ok(false),
    }
}

/// Builds the library and puts it where the agent's pod mounts it from; its path for that pod.
pub fn build_library(workspace: &Workspace) -> Result<PathBuf> {
    let built = cargo::build_library(workspace, "standin-nvml")?;
    let target = workspace.local.join(LIBRARY);
    let contents = fs::read(&built).with_context(|| format!("cannot read {}", built.display()))?;
    // By rename: an agent that has the old one mapped keeps it.
    crate::workspace::write_atomically(&target, &contents)?;
    Ok(workspace.short(LIBRARY))
}
