//! Images without a container engine: layers written as tar files, put together and imported into containerd.

mod base;
pub mod cargo;
pub mod containerd;
mod oci;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};

use self::oci::{Config, Entry, Image, Layer};
use crate::command::{command, headline, progress, run};
use crate::prerequisites;
use crate::workspace::{Workspace, write_atomically};

#[derive(Args)]
pub struct ImagesArguments {
    /// Only these; without a name, all that a cluster runs
    names: Vec<Name>,
    /// Also write each as an OCI archive into this folder, for a registry of your own
    #[arg(long, value_name = "DIR")]
    save: Option<PathBuf>,
}

/// The images of this project.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd, ValueEnum)]
pub enum Name {
    /// Holds the namespaces of a pod
    Pause,
    /// Debian with Python and git
    Base,
    /// Base, uv and the programs that prepare an app: what Spaces run in
    Python,
    /// The operator, static
    Operator,
    /// The node agent, on the base
    DevicePlugin,
    /// The init container that waits for the device API, static
    Tools,
    /// The operator with the faults that stories choose from; in no chart
    BreakableOperator,
    /// The node agent with the faults that stories choose from; in no chart
    BreakableDevicePlugin,
}

impl Name {
    /// What a cluster runs.
    const SHIPPED: [Self; 6] = [Self::Pause, Self::Base, Self::Python, Self::Operator, Self::DevicePlugin, Self::Tools];

    /// As it stands in `images.json` and in the reference.
    pub fn text(self) -> &'static str {
        match self {
            Self::Pause => "pause",
            Self::Base => "base",
            Self::Python => "python",
            Self::Operator => "operator",
            Self::DevicePlugin => "device-plugin",
            Self::Tools => "tools",
            Self::BreakableOperator => "breakable-operator",
            Self::BreakableDevicePlugin => "breakable-device-plugin",
        }
    }
}

/// A user that exists nowhere, for images of one static binary.
const NOBODY: &str = "65532:65532";

/// `cargo xtask images`.
pub fn run_command(workspace: &Workspace, arguments: &ImagesArguments) -> Result<()> {
    prerequisites::building(workspace)?;
    let names = if arguments.names.is_empty() { &Name::SHIPPED[..] } else { &arguments.names };
    headline("images");
    let images = build(workspace, names)?;
    if workspace.short(containerd::SOCKET).exists() {
        import_missing(workspace, &images)?;
    } else {
        progress("the cluster is not up, so nothing is imported");
    }
    if let Some(folder) = &arguments.save {
        save(folder, &images)?;
    }
    for image in &images {
        println!("{}", image.reference);
    }
    Ok(())
}

/// One archive an image, `<name>.tar`, as `skopeo copy oci-archive:…` and others read them.
fn save(folder: &Path, images: &[Image]) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    for image in images {
        let path = folder.join(image.name).with_extension("tar");
        let file = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
        oci::write_layout(&[image], BufWriter::with_capacity(1 << 20, file))?;
        progress(&format!("wrote {}", path.display()));
    }
    Ok(())
}

/// Builds images and notes their references in `target/local/images.json`.
pub fn build(workspace: &Workspace, names: &[Name]) -> Result<Vec<Image>> {
    let mut images = Vec::new();
    for name in names {
        images.push(build_one(workspace, *name).with_context(|| format!("cannot build the image {}", name.text()))?);
    }
    let mut references = references(workspace)?;
    references.extend(images.iter().map(|image| (image.name.to_owned(), image.reference.clone())));
    write_atomically(&references_path(workspace), &serde_json::to_vec_pretty(&references)?)?;
    Ok(images)
}

/// The references built last, by the name of the image.
pub fn references(workspace: &Workspace) -> Result<BTreeMap<String, String>> {
    let path = references_path(workspace);
    match fs::read(&path) {
        Ok(bytes) => serde_json::from_slice(&bytes).with_context(|| format!("{} is damaged", path.display())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(BTreeMap::new()),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}

/// Imports those that containerd does not have under exactly this reference, all in one go: a layer that several of
/// them have is sent once.
pub fn import_missing(workspace: &Workspace, images: &[Image]) -> Result<()> {
    let present = containerd::references(workspace)?;
    let missing: Vec<&Image> = images.iter().filter(|image| !present.contains(&image.reference)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let list: Vec<&str> = missing.iter().map(|image| image.reference.as_str()).collect();
    progress(&format!("importing {}", list.join(", ")));
    containerd::import(workspace, &missing)
}

fn references_path(workspace: &Workspace) -> PathBuf {
    workspace.local.join("images.json")
}

/// Layers of our own binaries; `down` and `up` do not need to write them again.
fn layer_path(workspace: &Workspace, name: Name) -> PathBuf {
    workspace.root.join("target/images").join(format!("{}.tar", name.text()))
}

fn build_one(workspace: &Workspace, name: Name) -> Result<Image> {
    let path = layer_path(workspace, name);
    let (layers, config) = match name {
        Name::Pause => {
            let layer = Layer::write(&path, &[Entry::program("pause", pause_program(workspace)?)])?;
            (vec![layer], Config { entrypoint: vec!["/pause".into()], user: NOBODY, ..Config::default() })
        }
        Name::Base => (vec![base::layer(workspace)?], base_config()),
        Name::Python => {
            let runtime = workspace.root.join("runtime");
            let files = [
                Entry::program("usr/local/bin/uv", base::uv(workspace)?),
                Entry::program("opt/spaceport/prepare.py", runtime.join("prepare.py")),
                Entry::program("opt/spaceport/declared.py", runtime.join("declared.py")),
            ];
            (vec![base::layer(workspace)?, Layer::write(&path, &files)?], base_config())
        }
        Name::Operator => static_image(workspace, name, "spaceport-operator")?,
        Name::Tools => static_image(workspace, name, "spaceport-wait")?,
        Name::DevicePlugin => {
            let binary = cargo::build_binary(workspace, "spaceport-device-plugin", cargo::Linking::Dynamic)?;
            on_base(workspace, &path, "spaceport-device-plugin", binary)?
        }
        Name::BreakableOperator => {
            let binary = cargo::build_breakable(workspace, "spaceport-operator")?;
            on_base(workspace, &path, "spaceport-operator", binary)?
        }
        Name::BreakableDevicePlugin => {
            let binary = cargo::build_breakable(workspace, "spaceport-device-plugin")?;
            on_base(workspace, &path, "spaceport-device-plugin", binary)?
        }
    };
    Image::new(name.text(), layers, &config)
}

/// A program that needs the C library, on the base image.
fn on_base(workspace: &Workspace, layer: &Path, name: &str, binary: PathBuf) -> Result<(Vec<Layer>, Config)> {
    let target = format!("usr/local/bin/{name}");
    let layer = Layer::write(layer, &[Entry::program(&target, binary)])?;
    let config = Config { entrypoint: vec![format!("/{target}")], command: Vec::new(), ..base_config() };
    Ok((vec![base::layer(workspace)?, layer], config))
}

fn static_image(workspace: &Workspace, name: Name, binary: &str) -> Result<(Vec<Layer>, Config)> {
    let program = cargo::build_binary(workspace, binary, cargo::Linking::Static)?;
    let layer = Layer::write(&layer_path(workspace, name), &[Entry::program(binary, program)])?;
    Ok((vec![layer], Config { entrypoint: vec![format!("/{binary}")], user: NOBODY, ..Config::default() }))
}

fn base_config() -> Config {
    Config {
        environment: vec![
            "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".into(),
            "LANG=C.UTF-8".into(),
            // A Space's log is read while it runs.
            "PYTHONUNBUFFERED=1".into(),
        ],
        command: vec!["/bin/bash".into()],
        ..Config::default()
    }
}

fn pause_program(workspace: &Workspace) -> Result<PathBuf> {
    let source = workspace.root.join("e2e/images/pause.c");
    let program = workspace.root.join("target/images/pause");
    fs::create_dir_all(workspace.root.join("target/images")).context("cannot create the folder of images")?;
    let mut compile = command("cc", &["-static", "-Os", "-s", "-Wall", "-Wextra", "-Werror", "-o"]);
    run(compile.arg(&program).arg(&source)).context("cannot compile the pause program")?;
    Ok(program)
}

/// The reference of an image that was built; fails with what to do if it was not.
pub fn reference(references: &BTreeMap<String, String>, name: Name) -> Result<String> {
    match references.get(name.text()) {
        Some(reference) => Ok(reference.clone()),
        None => bail!("the image {} was not built yet: run `cargo xtask images`", name.text()),
    }
}
