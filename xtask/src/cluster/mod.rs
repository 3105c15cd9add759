//! The local cluster: a real Kubernetes on this machine, all of its state below `target/local`.

pub mod binaries;
pub mod certificates;
pub mod control_plane;
pub mod machine;
pub mod network;
pub mod node;
pub mod processes;
pub mod standin;

use anyhow::Result;
use clap::Args;

use crate::command::headline;
use crate::down;
use crate::images;
use crate::prerequisites;
use crate::wait;
use crate::workspace::Workspace;

/// The name of the only node.
pub const NODE: &str = "spaceport-local";

#[derive(Args, Clone, Debug)]
pub struct UpArguments {
    /// How many cards the stand-in for NVML has
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(0..=16))]
    pub cards: u32,
    /// Use the NVIDIA cards of this machine and no stand-in
    #[arg(long)]
    pub real_gpu: bool,
}

impl Default for UpArguments {
    /// As without any flag.
    fn default() -> Self {
        Self { cards: 1, real_gpu: false }
    }
}

/// Brings the cluster to where it should be: starts what is missing, replaces what has other settings, leaves the rest.
pub fn up(workspace: &Workspace, arguments: &UpArguments) -> Result<()> {
    let start = wait::now();
    headline("prerequisites");
    prerequisites::building(workspace)?;
    prerequisites::running()?;
    headline("binaries");
    binaries::build_all(workspace)?;
    let pause = images::build(workspace, &[images::Name::Pause])?;
    headline("cluster");
    let _alone = machine::alone()?;
    down::end_abandoned(workspace)?;
    let mut machine = machine::claim(workspace)?;
    standin::ensure(workspace, &mut machine, arguments)?;
    network::ensure(workspace)?;
    certificates::ensure(workspace)?;
    control_plane::ensure(workspace)?;
    for image in &pause {
        node::ensure_containerd(workspace, &image.reference)?;
    }
    images::import_missing(workspace, &pause)?;
    node::ensure(workspace)?;
    eprintln!("==> the cluster is up ({:.0} s)", start.elapsed().as_secs_f64());
    eprintln!("cargo xtask kubectl get nodes");
    eprintln!("export KUBECONFIG={}", workspace.kubeconfig().display());
    Ok(())
}
