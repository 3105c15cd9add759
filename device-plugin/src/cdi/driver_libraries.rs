//! The driver's user-space libraries, found as the loader would find them: in the directories of `ld.so.conf`, then in the
//! built-in ones. The driver may live in a root of its own (`/run/nvidia/driver`), so links are followed inside that root.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Component, Path, PathBuf};

/// Where Debian keeps libraries of this machine's kind.
#[cfg(target_arch = "x86_64")]
pub(super) const MULTIARCH_DIRECTORY: &str = "/usr/lib/x86_64-linux-gnu";
/// Where Debian keeps libraries of this machine's kind.
#[cfg(not(target_arch = "x86_64"))]
pub(super) const MULTIARCH_DIRECTORY: &str = "/usr/lib/aarch64-linux-gnu";

/// `e_machine` of libraries that containers here can load.
#[cfg(target_arch = "x86_64")]
const ELF_MACHINE: u16 = 62;
/// `e_machine` of libraries that containers here can load.
#[cfg(not(target_arch = "x86_64"))]
const ELF_MACHINE: u16 = 183;

const BUILT_IN_DIRECTORIES: [&str; 5] = [MULTIARCH_DIRECTORY, "/usr/lib64", "/lib64", "/usr/lib", "/usr/lib/nvidia"];

/// What CUDA programs load of the driver, by SONAME; a driver has some of them.
const SONAMES: [&str; 9] = [
    "libcuda.so.1",
    "libcudadebugger.so.1",
    "libnvidia-cfg.so.1",
    "libnvidia-ml.so.1",
    "libnvidia-nvvm.so.4",
    "libnvidia-opencl.so.1",
    "libnvidia-pkcs11-openssl3.so.1",
    "libnvidia-ptxjitcompiler.so.1",
    "libnvidia-sandboxutils.so.1",
];

/// Libraries whose SONAME ends in the driver's version.
const VERSIONED: [&str; 1] = ["libnvidia-gpucomp.so."];

/// Links followed on the way to one file; the kernel's own limit.
const LINKS_MAX: usize = 40;
/// Files of `ld.so.conf.d` that are read; distributions have a handful.
const CONFIGURATION_FILES_MAX: usize = 64;

/// A library of the driver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Library {
    /// The name under which programs ask for it.
    pub soname: String,
    /// The file, as the host names it.
    pub host_path: PathBuf,
}

/// The file system that holds the driver.
#[derive(Clone, Debug)]
pub struct DriverRoot {
    /// On the host: `/`, or `/run/nvidia/driver` where a container installs the driver.
    pub on_host: PathBuf,
    /// Where this process sees it.
    pub here: PathBuf,
}

impl DriverRoot {
    /// The driver's libraries that are there, by SONAME. None on a machine without a driver.
    ///
    /// # Errors
    /// If a directory that is there cannot be read.
    pub fn libraries(&self) -> io::Result<Vec<Library>> {
        let directories = self.directories();
        let mut found = Vec::new();
        for soname in SONAMES {
            if let Some(path) = directories.iter().find_map(|directory| self.usable(&directory.join(soname))) {
                found.push(Library { soname: soname.to_owned(), host_path: self.on_host(&path) });
            }
        }
        for prefix in VERSIONED {
            for directory in &directories {
                let names = self.names_with(directory, prefix)?;
                let usable = |name: &String| self.usable(&directory.join(name)).map(|path| (name.clone(), path));
                if let Some((soname, path)) = names.iter().find_map(usable) {
                    found.push(Library { soname, host_path: self.on_host(&path) });
                    break;
                }
            }
        }
        found.sort_by(|a, b| a.soname.cmp(&b.soname));
        Ok(found)
    }

    /// Where this process finds the library of that SONAME, if the driver has it.
    pub fn library_here(&self, soname: &str) -> Option<PathBuf> {
        let directories = self.directories();
        let found = directories.iter().find_map(|directory| self.usable(&directory.join(soname)))?;
        Some(self.here(&found))
    }

    /// Directories in which the loader would look, as absolute paths inside the root.
    fn directories(&self) -> Vec<PathBuf> {
        let mut directories = Vec::new();
        self.configured(Path::new("/etc/ld.so.conf"), &mut directories, true);
        directories.extend(BUILT_IN_DIRECTORIES.map(PathBuf::from));
        let mut seen = BTreeSet::new();
        directories.retain(|directory| seen.insert(directory.clone()));
        directories
    }

    /// Reads one configuration file of the loader; `include`s are followed one level deep, as they are used.
    fn configured(&self, file: &Path, directories: &mut Vec<PathBuf>, includes: bool) {
        let Some(text) = self.resolve(file).and_then(|path| std::fs::read_to_string(self.here(&path)).ok()) else {
            return;
        };
        for line in text.lines().map(|line| line.split('#').next().unwrap_or_default().trim()) {
            if line.starts_with('/') {
                directories.push(PathBuf::from(line));
            } else if let Some(pattern) = line.strip_prefix("include ").map(str::trim).filter(|_| includes) {
                let pattern = Path::new("/etc").join(pattern);
                for file in self.included(&pattern) {
                    self.configured(&file, directories, false);
                }
            }
        }
    }

    /// The files of `<directory>/*<suffix>`, in the order of their names, or the one file that is named.
    fn included(&self, pattern: &Path) -> Vec<PathBuf> {
        let name = pattern.file_name().and_then(OsStr::to_str).unwrap_or_default();
        let (Some(suffix), Some(directory)) = (name.strip_prefix('*'), pattern.parent()) else {
            return vec![pattern.to_owned()];
        };
        let Some(entries) = self.resolve(directory).and_then(|path| std::fs::read_dir(self.here(&path)).ok()) else {
            return Vec::new();
        };
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        let mut files: Vec<PathBuf> =
            names.filter(|name| name.ends_with(suffix)).map(|name| directory.join(name)).collect();
        files.sort();
        files.truncate(CONFIGURATION_FILES_MAX);
        files
    }

    fn names_with(&self, directory: &Path, prefix: &str) -> io::Result<Vec<String>> {
        let Some(path) = self.resolve(directory) else { return Ok(Vec::new()) };
        let mut names = Vec::new();
        for entry in std::fs::read_dir(self.here(&path))? {
            names.extend(entry?.file_name().into_string().ok().filter(|name| name.starts_with(prefix)));
        }
        names.sort();
        Ok(names)
    }

    /// The real file behind this path if containers here can load it; a 32-bit library of the same name is passed over.
    fn usable(&self, path: &Path) -> Option<PathBuf> {
        let path = self.resolve(path)?;
        let mut head = [0; 20];
        File::open(self.here(&path)).and_then(|mut file| file.read_exact(&mut head)).ok()?;
        let loads = head[..5] == *b"\x7fELF\x02" && u16::from_le_bytes([head[18], head[19]]) == ELF_MACHINE;
        loads.then_some(path)
    }

    /// Follows every link of an absolute path inside the root; `None` if it leads nowhere.
    fn resolve(&self, path: &Path) -> Option<PathBuf> {
        let mut resolved = PathBuf::from("/");
        let mut rest: Vec<PathBuf> = parts(path);
        let mut links = 0;
        // Each turn takes one part away; a link adds some, LINKS_MAX times at most.
        while let Some(part) = rest.pop() {
            if part == Path::new("..") {
                resolved.pop();
                continue;
            }
            let next = resolved.join(&part);
            let metadata = std::fs::symlink_metadata(self.here(&next)).ok()?;
            if !metadata.is_symlink() {
                resolved = next;
                continue;
            }
            links += 1;
            if links > LINKS_MAX {
                return None;
            }
            let target = std::fs::read_link(self.here(&next)).ok()?;
            if target.is_absolute() {
                resolved = PathBuf::from("/");
            }
            rest.extend(parts(&target));
        }
        Some(resolved)
    }

    fn here(&self, inside: &Path) -> PathBuf {
        self.here.join(inside.strip_prefix("/").unwrap_or(inside))
    }

    fn on_host(&self, inside: &Path) -> PathBuf {
        self.on_host.join(inside.strip_prefix("/").unwrap_or(inside))
    }
}

/// The parts of a path, last first.
fn parts(path: &Path) -> Vec<PathBuf> {
    let part = |component: Component<'_>| match component {
        Component::Normal(name) => Some(PathBuf::from(name)),
        Component::ParentDir => Some(PathBuf::from("..")),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    };
    path.components().rev().filter_map(part).collect()
}
