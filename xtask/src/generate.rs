//! `cargo xtask gen`: files written from the Rust types, and the check that they are not stale.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::workspace::{Workspace, write_atomically};

#[derive(Args)]
pub struct GenerateArguments {
    /// Writes nothing; fails and names the files that differ
    #[arg(long)]
    pub check: bool,
}

/// A folder that holds nothing but generated files: what we do not generate (any more) there is stale too.
const OWNED_FOLDER: &str = "charts/spaceport-crds/templates";

pub fn run(workspace: &Workspace, arguments: &GenerateArguments) -> Result<()> {
    let wanted = wanted();
    let stale = stale(&workspace.root, &wanted)?;
    if arguments.check {
        if stale.is_empty() {
            println!("{} generated files are up to date", wanted.len());
            return Ok(());
        }
        let list: Vec<String> = stale.iter().map(|path| format!("  {}", path.display())).collect();
        bail!("stale: run `cargo xtask gen` and commit the result\n{}", list.join("\n"));
    }
    for path in &stale {
        let absolute = workspace.root.join(path);
        match wanted.get(path) {
            Some(contents) => {
                write_atomically(&absolute, contents.as_bytes())?;
                println!("wrote {}", path.display());
            }
            None => {
                fs::remove_file(&absolute).with_context(|| format!("cannot remove {}", absolute.display()))?;
                println!("removed {}", path.display());
            }
        }
    }
    println!("{} generated files, {} changed", wanted.len(), stale.len());
    Ok(())
}

fn wanted() -> BTreeMap<PathBuf, String> {
    let mut files: BTreeMap<PathBuf, String> = spaceport_crds::yaml_files()
        .into_iter()
        .map(|(name, yaml)| (Path::new(OWNED_FOLDER).join(name), yaml))
        .collect();
    files.insert(PathBuf::from("docs/reference/crds.md"), spaceport_crds::reference_markdown());
    files
}

/// Paths, relative to the root, whose contents are not what they should be.
fn stale(root: &Path, wanted: &BTreeMap<PathBuf, String>) -> Result<Vec<PathBuf>> {
    let mut stale = Vec::new();
    for (path, contents) in wanted {
        match fs::read(root.join(path)) {
            Ok(found) if found == contents.as_bytes() => {}
            Ok(_) => stale.push(path.clone()),
            Err(error) if error.kind() == ErrorKind::NotFound => stale.push(path.clone()),
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
        }
    }
    match fs::read_dir(root.join(OWNED_FOLDER)) {
        Ok(entries) => {
            for entry in entries {
                let entry = entry.with_context(|| format!("cannot list {OWNED_FOLDER}"))?;
                let path = Path::new(OWNED_FOLDER).join(entry.file_name());
                if path.extension().is_some_and(|extension| extension == "yaml") && !wanted.contains_key(&path) {
                    stale.push(path);
                }
            }
        }
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(error).with_context(|| format!("cannot list {OWNED_FOLDER}")),
    }
    Ok(stale)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_changed_and_left_over_files_are_stale_and_equal_ones_are_not() {
        let root = std::env::temp_dir().join(format!("spaceport-gen-{}", std::process::id()));
        let folder = root.join(OWNED_FOLDER);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("same.yaml"), "a").unwrap();
        fs::write(folder.join("changed.yaml"), "a").unwrap();
        fs::write(folder.join("left-over.yaml"), "a").unwrap();
        let wanted = [("same", "a"), ("changed", "b"), ("missing", "c")]
            .map(|(name, text)| (Path::new(OWNED_FOLDER).join(format!("{name}.yaml")), text.to_string()))
            .into();
        let names: Vec<String> = stale(&root, &wanted)
            .unwrap()
            .iter()
            .map(|path| path.file_name().unwrap().to_string_lossy().into_owned())
            .collect();
        assert_eq!(names, ["changed.yaml", "missing.yaml", "left-over.yaml"]);
        fs::remove_dir_all(&root).unwrap();
    }
}
