//! Layers and images in the OCI layout, written so that the same input gives the same digest.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::workspace::{hex, write_atomically};

/// A file of a layer.
pub struct Entry {
    /// Where it lies in the image, without the first slash.
    target: String,
    source: PathBuf,
    mode: u32,
}

impl Entry {
    /// A file that everybody may execute.
    pub fn program(target: &str, source: PathBuf) -> Self {
        Self { target: target.to_owned(), source, mode: 0o755 }
    }
}

/// A layer: an uncompressed tar file (it only travels over a pipe on this machine).
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Layer {
    #[serde(skip)]
    path: PathBuf,
    digest: String,
    size: u64,
}

impl Layer {
    /// Writes a layer of these files, owned by root and of no date.
    pub fn write(path: &Path, entries: &[Entry]) -> Result<Self> {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        }
        let file = File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
        let mut tar = tar::Builder::new(io::BufWriter::new(file));
        let mut folders = BTreeSet::new();
        for entry in entries {
            append_parents(&mut tar, &entry.target, &mut folders)?;
            let contents =
                fs::read(&entry.source).with_context(|| format!("cannot read {}", entry.source.display()))?;
            append(&mut tar, &entry.target, tar::EntryType::Regular, entry.mode, &contents)?;
        }
        tar.into_inner().and_then(|mut file| file.flush()).context("cannot finish a layer")?;
        Self::read(path)
    }

    /// A layer that lies there already.
    pub fn read(path: &Path) -> Result<Self> {
        let failed = || format!("cannot read {}", path.display());
        let mut file = File::open(path).with_context(failed)?;
        let mut digest = Sha256::new();
        let mut buffer = vec![0; 1 << 20];
        let mut size = 0;
        loop {
            let count = file.read(&mut buffer).with_context(failed)?;
            if count == 0 {
                break;
            }
            digest.update(&buffer[..count]);
            size += count as u64;
        }
        Ok(Self { path: path.to_owned(), digest: hex(&digest.finalize()), size })
    }

    /// A large layer that is never written again: its digest is kept beside it (reading 300 MB takes a debug build of
    /// xtask 10 s).
    pub fn read_cached(path: &Path) -> Result<Self> {
        let note = path.with_extension("json");
        if let Ok(bytes) = fs::read(&note) {
            let kept: Self =
                serde_json::from_slice(&bytes).with_context(|| format!("{} is damaged", note.display()))?;
            return Ok(Self { path: path.to_owned(), ..kept });
        }
        let layer = Self::read(path)?;
        write_atomically(&note, &serde_json::to_vec(&layer)?)?;
        Ok(layer)
    }

    fn descriptor(&self) -> Value {
        descriptor("application/vnd.oci.image.layer.v1.tar", &self.digest, self.size)
    }
}

/// What a container of the image runs by default.
#[derive(Default)]
pub struct Config {
    pub entrypoint: Vec<String>,
    pub command: Vec<String>,
    pub environment: Vec<String>,
    /// `uid:gid`; empty is root.
    pub user: &'static str,
}

/// An image ready for import.
pub struct Image {
    pub name: &'static str,
    /// Version of the workspace and first digits of the manifest's digest: never moves, says what it is.
    pub reference: String,
    layers: Vec<Layer>,
    config: Vec<u8>,
    manifest: Vec<u8>,
}

impl Image {
    pub fn new(name: &'static str, layers: Vec<Layer>, config: &Config) -> Result<Self> {
        let config = serde_json::to_vec(&json!({
            "architecture": go_architecture(),
            "os": "linux",
            "config": {
                "Entrypoint": config.entrypoint,
                "Cmd": config.command,
                "Env": config.environment,
                "User": config.user,
            },
            "rootfs": {
                "type": "layers",
                "diff_ids": layers.iter().map(|layer| format!("sha256:{}", layer.digest)).collect::<Vec<_>>(),
            },
        }))?;
        let manifest = serde_json::to_vec(&json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": descriptor("application/vnd.oci.image.config.v1+json", &sha256(&config), config.len() as u64),
            "layers": layers.iter().map(Layer::descriptor).collect::<Vec<_>>(),
        }))?;
        let tag = &sha256(&manifest)[..12];
        let reference = format!("spaceport.local/{name}:{}-{tag}", env!("CARGO_PKG_VERSION"));
        Ok(Self { name, reference, layers, config, manifest })
    }
}

/// Writes images as one OCI layout; what they share is in it once.
pub fn write_layout(images: &[&Image], out: impl Write) -> Result<()> {
    let mut tar = tar::Builder::new(out);
    append(&mut tar, "oci-layout", tar::EntryType::Regular, 0o644, br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    let mut written = BTreeSet::new();
    let mut manifests = Vec::new();
    for image in images {
        for blob in [&image.config, &image.manifest] {
            let digest = sha256(blob);
            if written.insert(digest.clone()) {
                append(&mut tar, &format!("blobs/sha256/{digest}"), tar::EntryType::Regular, 0o644, blob)?;
            }
        }
        for layer in &image.layers {
            if written.insert(layer.digest.clone()) {
                let file = File::open(&layer.path).with_context(|| format!("cannot read {}", layer.path.display()))?;
                let mut header = header(tar::EntryType::Regular, 0o644, layer.size);
                // Bounded by the size in the header: a file that grew meanwhile fails the digest, not the archive.
                tar.append_data(&mut header, format!("blobs/sha256/{}", layer.digest), file.take(layer.size))?;
            }
        }
        let mut manifest = descriptor(
            "application/vnd.oci.image.manifest.v1+json",
            &sha256(&image.manifest),
            image.manifest.len() as u64,
        );
        manifest["annotations"] = json!({ "io.containerd.image.name": image.reference });
        manifest["platform"] = json!({ "os": "linux", "architecture": go_architecture() });
        manifests.push(manifest);
    }
    let index = serde_json::to_vec(&json!({ "schemaVersion": 2, "manifests": manifests }))?;
    append(&mut tar, "index.json", tar::EntryType::Regular, 0o644, &index)?;
    tar.into_inner().and_then(|mut out| out.flush()).context("cannot finish the archive")
}

/// The folders above a file, the outermost first, each once in a layer.
fn append_parents<W: Write>(tar: &mut tar::Builder<W>, target: &str, written: &mut BTreeSet<PathBuf>) -> Result<()> {
    let mut parents: Vec<&Path> = Path::new(target).ancestors().skip(1).collect();
    parents.reverse();
    for parent in parents.iter().filter(|parent| !parent.as_os_str().is_empty()) {
        if written.insert(parent.to_path_buf()) {
            append(tar, &format!("{}/", parent.display()), tar::EntryType::Directory, 0o755, &[])?;
        }
    }
    Ok(())
}

fn append<W: Write>(tar: &mut tar::Builder<W>, name: &str, kind: tar::EntryType, mode: u32, data: &[u8]) -> Result<()> {
    let mut header = header(kind, mode, data.len() as u64);
    tar.append_data(&mut header, name, data).with_context(|| format!("cannot write {name} into an archive"))
}

fn header(kind: tar::EntryType, mode: u32, size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(size);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header
}

fn descriptor(media_type: &str, digest: &str, size: u64) -> Value {
    json!({ "mediaType": media_type, "digest": format!("sha256:{digest}"), "size": size })
}

fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// This machine's architecture as images name it.
fn go_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(folder: &Path, name: &'static str, contents: &str) -> Image {
        fs::create_dir_all(folder).unwrap();
        let program = folder.join("program");
        fs::write(&program, contents).unwrap();
        let layer = Layer::write(&folder.join("layer.tar"), &[Entry::program("usr/bin/program", program)]).unwrap();
        Image::new(name, vec![layer], &Config::default()).unwrap()
    }

    fn names(archive: &[u8]) -> Vec<String> {
        let mut tar = tar::Archive::new(archive);
        let entries = tar.entries().unwrap();
        entries.map(|entry| entry.unwrap().path().unwrap().display().to_string()).collect()
    }

    #[test]
    fn the_same_contents_give_the_same_reference_and_others_another() {
        let folder = std::env::temp_dir().join(format!("spaceport-oci-{}", std::process::id()));
        let first = image(&folder.join("1"), "x", "a");
        let again = image(&folder.join("2"), "x", "a");
        let other = image(&folder.join("3"), "x", "b");
        assert_eq!(first.reference, again.reference);
        assert_ne!(first.reference, other.reference);
        let layer = fs::read(folder.join("1/layer.tar")).unwrap();
        assert_eq!(names(&layer), ["usr/", "usr/bin/", "usr/bin/program"]);
        let mut archive = Vec::new();
        write_layout(&[&first, &again], &mut archive).unwrap();
        // Both manifests in the index, config, manifest and layer once each.
        assert_eq!(names(&archive).len(), 5);
        fs::remove_dir_all(&folder).unwrap();
    }
}
