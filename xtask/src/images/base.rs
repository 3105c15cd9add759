//! The base image: a small Debian with Python and git, made once by debootstrap and cached; and uv.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use super::oci::Layer;
use crate::command::{command, run, run_long};
use crate::prerequisites;
use crate::workspace::{Workspace, hex};

/// Beside Debian's own minimum. git fetches the sources of a Space, python3-venv makes its environment.
const PACKAGES: &str = "ca-certificates,git,python3,python3-venv";

/// Counted up when what is done to the tree after debootstrap changes.
const RECIPE: u32 = 1;

/// Files that no program in a container reads: half of the size.
const REMOVED: &[&str] =
    &["usr/share/doc", "usr/share/man", "usr/share/info", "usr/share/locale", "var/cache/apt", "var/lib/apt/lists"];

/// The layer of the base image, made first if it is not in the cache.
pub fn layer(workspace: &Workspace) -> Result<Layer> {
    let suite = suite();
    let mirror = &workspace.host.debian_mirror;
    let recipe = format!("{suite} {mirror} {PACKAGES} {RECIPE} {}", REMOVED.join(" "));
    let folder = workspace.cache.join("base");
    let path = folder.join(format!("{}.tar", hex(&Sha256::digest(recipe))));
    if !path.exists() {
        if !prerequisites::is_root() {
            bail!("making the base image needs root (debootstrap makes device nodes and changes owners)");
        }
        fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        let tree = path.with_extension(format!("building-{}", std::process::id()));
        let made = make(&tree, &suite, mirror, &path);
        remove_tree(&tree)?;
        made?;
    }
    Layer::read_cached(&path)
}

/// The release of this machine where it is a Debian, so that what is built here finds its C library there.
fn suite() -> String {
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let value =
        |key: &str| release.lines().find_map(|line| line.strip_prefix(key)).map(|value| value.trim_matches('"'));
    match (value("ID="), value("VERSION_CODENAME=")) {
        (Some("debian"), Some(codename)) => codename.to_owned(),
        _ => "bookworm".to_owned(),
    }
}

fn make(tree: &Path, suite: &str, mirror: &str, path: &Path) -> Result<()> {
    let mut debootstrap = command("debootstrap", &["--variant=minbase", &format!("--include={PACKAGES}"), suite]);
    debootstrap.arg(tree).arg(mirror);
    let what = format!("making the base image from Debian {suite} (about a minute)");
    run_long(&what, &mut debootstrap, &path.with_extension("log"))?;
    for removed in REMOVED {
        let removed = tree.join(removed);
        if removed.exists() {
            fs::remove_dir_all(&removed).with_context(|| format!("cannot remove {}", removed.display()))?;
        }
    }
    // The user that Spaces run as: programs that ask for the name or home of uid 1000 fail without an entry.
    run(command("chroot", &[]).arg(tree).args(["useradd", "--uid", "1000", "--create-home", "user"]))?;
    // What the machine that built it happened to have.
    for file in ["etc/hostname", "etc/resolv.conf", "etc/machine-id"] {
        fs::write(tree.join(file), "").with_context(|| format!("cannot empty {file}"))?;
    }
    let temporary = path.with_extension("tar.new");
    let mut tar = command("tar", &["--create", "--numeric-owner", "--sort=name", "--xattrs", "--one-file-system"]);
    // Device nodes come from the container runtime.
    run(tar.arg("--exclude=./dev/*").arg("--file").arg(&temporary).arg("--directory").arg(tree).arg("."))?;
    fs::rename(&temporary, path).with_context(|| format!("cannot put {} in place", path.display()))
}

/// Removes a tree that debootstrap may have left something mounted in.
fn remove_tree(tree: &Path) -> Result<()> {
    if !tree.exists() {
        return Ok(());
    }
    crate::down::unmount_below(tree)?;
    fs::remove_dir_all(tree).with_context(|| format!("cannot remove {}", tree.display()))
}

/// The program uv, from the Python index, in the version and with the hash of `e2e/images/uv.txt`.
pub fn uv(workspace: &Workspace) -> Result<PathBuf> {
    let requirements = workspace.root.join("e2e/images/uv.txt");
    let pinned = fs::read(&requirements).with_context(|| format!("cannot read {}", requirements.display()))?;
    let folder = workspace.cache.join("uv").join(hex(&Sha256::digest(&pinned)));
    let program = folder.join("bin/uv");
    if program.exists() {
        return Ok(program);
    }
    let log = folder.with_extension("log");
    let temporary = folder.with_extension(format!("building-{}", std::process::id()));
    // An environment of its own brings pip, which Debian's Python does not have.
    let mut venv = command("python3", &["-m", "venv"]);
    run_long("fetching uv", venv.arg(&temporary), &log)?;
    let mut pip = command(temporary.join("bin/pip"), &["install", "--require-hashes", "--no-deps"]);
    pip.args(["--only-binary", ":all:", "--requirement"]).arg(&requirements);
    run_long("  from the Python index", &mut pip, &log)?;
    fs::rename(&temporary, &folder).with_context(|| format!("cannot put {} in place", folder.display()))?;
    Ok(program)
}
