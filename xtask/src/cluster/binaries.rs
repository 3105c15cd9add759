//! The Go binaries of the cluster: built once from pinned modules and kept in the user's cache.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use crate::command::{command, output, run_long};
use crate::workspace::{Workspace, hex};

/// A Go module below `e2e/cluster` and what is built from it.
struct Module {
    name: &'static str,
    /// Whether it needs the C compiler.
    cgo: bool,
    tags: &'static str,
    ldflags: &'static str,
    /// Name of the binary and its package.
    binaries: &'static [(&'static str, &'static str)],
    /// What the progress line says.
    about: &'static str,
}

const KUBERNETES: Module = Module {
    name: "kubernetes",
    cgo: false,
    tags: "",
    // Without these the version reads as v0.0.0, which clients take for a server of the stone age.
    ldflags: "-s -w -X k8s.io/component-base/version.gitVersion=v1.34.4 \
              -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=34",
    binaries: &[("kubernetes", ".")],
    about: "Kubernetes 1.34 and etcd (about 5 minutes on 2 cores)",
};

const CONTAINERD: Module = Module {
    name: "containerd",
    cgo: false,
    tags: "no_btrfs,no_zfs,no_devmapper,no_aufs",
    ldflags: "-s -w",
    binaries: &[
        ("containerd", "github.com/containerd/containerd/v2/cmd/containerd"),
        ("containerd-shim-runc-v2", "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2"),
        ("ctr", "github.com/containerd/containerd/v2/cmd/ctr"),
    ],
    about: "containerd (about 2 minutes)",
};

const RUNC: Module = Module {
    name: "runc",
    cgo: true,
    // Without the tag every pod with the RuntimeDefault profile fails with "seccomp not supported".
    tags: "seccomp",
    ldflags: "-s -w -X main.version=1.4.3",
    binaries: &[("runc", "github.com/opencontainers/runc")],
    about: "runc",
};

const CNI: Module = Module {
    name: "cni",
    cgo: false,
    tags: "",
    ldflags: "-s -w",
    binaries: &[
        ("bridge", "github.com/containernetworking/plugins/plugins/main/bridge"),
        ("host-local", "github.com/containernetworking/plugins/plugins/ipam/host-local"),
    ],
    about: "the CNI plugins",
};

const HELM: Module = Module {
    name: "helm",
    cgo: false,
    tags: "",
    ldflags: "-s -w",
    binaries: &[("helm", "helm.sh/helm/v3/cmd/helm")],
    about: "helm (about 2 minutes)",
};

/// The binary that is every Kubernetes component, etcd and kubectl.
pub fn kubernetes(workspace: &Workspace) -> Result<PathBuf> {
    Ok(folder(workspace, &KUBERNETES)?.join("kubernetes"))
}

/// The folder with containerd, its shim and ctr.
pub fn containerd(workspace: &Workspace) -> Result<PathBuf> {
    folder(workspace, &CONTAINERD)
}

/// runc.
pub fn runc(workspace: &Workspace) -> Result<PathBuf> {
    Ok(folder(workspace, &RUNC)?.join("runc"))
}

/// The folder with the CNI plugins.
pub fn cni(workspace: &Workspace) -> Result<PathBuf> {
    folder(workspace, &CNI)
}

/// helm.
pub fn helm(workspace: &Workspace) -> Result<PathBuf> {
    Ok(folder(workspace, &HELM)?.join("helm"))
}

/// Builds whatever is not in the cache yet, so that nothing has to be built while the cluster starts.
pub fn build_all(workspace: &Workspace) -> Result<()> {
    for module in [&KUBERNETES, &CONTAINERD, &RUNC, &CNI, &HELM] {
        folder(workspace, module)?;
    }
    Ok(())
}

/// The cache folder of a module, built first where it is missing.
fn folder(workspace: &Workspace, module: &Module) -> Result<PathBuf> {
    let source = workspace.root.join("e2e/cluster").join(module.name);
    let folder = workspace.cache.join(module.name).join(key(module, &source)?);
    if !folder.exists() {
        build(module, &source, &folder).with_context(|| format!("cannot build {}", source.display()))?;
    }
    Ok(folder)
}

/// Everything that decides what comes out of a build: the pinned sources, the compiler and how it is called.
fn key(module: &Module, source: &Path) -> Result<String> {
    let mut digest = Sha256::new();
    for name in ["go.mod", "go.sum", "main.go"] {
        let path = source.join(name);
        if name == "main.go" && !path.exists() {
            continue;
        }
        let contents = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        digest.update(Sha256::digest(&contents));
    }
    let go = output(command("go", &["env", "GOVERSION", "GOARCH"]).current_dir(source).env("GOWORK", "off"))?;
    let recipe = format!("{go} {} {} {} {:?}", module.cgo, module.tags, module.ldflags, module.binaries);
    digest.update(recipe.as_bytes());
    Ok(hex(&digest.finalize()))
}

/// Builds into a temporary folder beside the wanted one and renames it: the folder is there complete or not at all.
fn build(module: &Module, source: &Path, folder: &Path) -> Result<()> {
    let temporary = folder.with_extension(format!("building-{}", std::process::id()));
    let log = folder.with_extension("log");
    fs::create_dir_all(&temporary).with_context(|| format!("cannot create {}", temporary.display()))?;
    let binaries = module.binaries.len();
    for (number, (name, package)) in module.binaries.iter().enumerate() {
        let mut go = command("go", &["build", "-trimpath", "-ldflags", module.ldflags, "-tags", module.tags, "-o"]);
        go.arg(temporary.join(name)).arg(package).current_dir(source);
        go.env("GOWORK", "off").env("CGO_ENABLED", if module.cgo { "1" } else { "0" });
        run_long(&format!("building {}, {} of {binaries}: {name}", module.about, number + 1), &mut go, &log)?;
    }
    if let Err(error) = fs::rename(&temporary, folder) {
        // Another xtask was faster: its result is as good as ours.
        fs::remove_dir_all(&temporary).with_context(|| format!("cannot remove {}", temporary.display()))?;
        if !folder.exists() {
            return Err(error).with_context(|| format!("cannot put {} in place", folder.display()));
        }
    }
    Ok(())
}
