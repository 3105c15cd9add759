//! Finds the cgroup v2 tree of the host and the pods' cgroup in it (N8).

use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{FsWord, statfs};

const CGROUP2_MAGIC: FsWord = 0x6367_7270;
const TMPFS_MAGIC: FsWord = 0x0102_1994;

/// Where kubelet puts its pods, by cgroup driver (cgroupfs, systemd), plain and below the `kubelet` root that nested
/// clusters use.
const PODS_CGROUPS: [&str; 4] =
    ["kubepods", "kubepods.slice", "kubelet/kubepods", "kubelet.slice/kubelet-kubepods.slice"];

/// Why the v2 tree or the pods' cgroup was not found.
#[derive(Debug, thiserror::Error)]
pub enum HierarchyError {
    /// Only v1 controllers are mounted.
    #[error(
        "{root} holds cgroup v1 controllers only ({found}): the GPU gate needs the cgroup v2 tree; boot with \
         systemd.unified_cgroup_hierarchy=1, or mount it beside v1 at {root}/unified"
    )]
    PureV1 {
        /// Directory that was looked at.
        root: PathBuf,
        /// What lies there.
        found: String,
    },
    /// No cgroup file system at all.
    #[error("{root} is no cgroup tree (file system type {magic:#x}): mount the host's /sys/fs/cgroup there")]
    NoCgroups {
        /// Directory that was looked at.
        root: PathBuf,
        /// Type number of its file system.
        magic: u64,
    },
    /// None of the known places exists.
    #[error("no pods' cgroup in {root}: looked for {looked_for}; set --pods-cgroup if kubelet uses another")]
    NoPodsCgroup {
        /// Root of the v2 tree.
        root: PathBuf,
        /// Names that were tried.
        looked_for: String,
    },
    /// The directory cannot be looked at.
    #[error("cannot look at {path}")]
    Unreadable {
        /// What was looked at.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// The v2 tree of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tree {
    root: PathBuf,
    hybrid: bool,
}

impl Tree {
    /// Finds the tree at `root` (pure v2) or `root/unified` (hybrid).
    ///
    /// # Errors
    /// Pure v1 and anything that is no cgroup tree, with what was found there.
    pub fn find(root: &Path) -> Result<Self, HierarchyError> {
        let unreadable = |path: &Path| {
            let path = path.to_owned();
            move |source| HierarchyError::Unreadable { path, source }
        };
        let magic = statfs(root).map_err(io::Error::from).map_err(unreadable(root))?.f_type;
        if magic == CGROUP2_MAGIC {
            return Ok(Self { root: root.to_owned(), hybrid: false });
        }
        let unified = root.join("unified");
        if statfs(&unified).is_ok_and(|found| found.f_type == CGROUP2_MAGIC) {
            return Ok(Self { root: unified, hybrid: true });
        }
        if magic != TMPFS_MAGIC {
            return Err(HierarchyError::NoCgroups { root: root.to_owned(), magic: magic.cast_unsigned() as u64 });
        }
        let mut names: Vec<String> = std::fs::read_dir(root)
            .map_err(unreadable(root))?
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .collect();
        names.sort();
        Err(HierarchyError::PureV1 { root: root.to_owned(), found: names.join(", ") })
    }

    /// Root directory of the v2 tree.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// v1 controllers are mounted beside it.
    pub fn is_hybrid(&self) -> bool {
        self.hybrid
    }

    /// The directory of a cgroup path as `/proc/<pid>/cgroup` shows it on the host.
    pub fn directory(&self, cgroup: &str) -> PathBuf {
        self.root.join(cgroup.trim_start_matches('/'))
    }

    /// The cgroup above all pods; `setting` if it is not empty, else the first of the usual places that exists.
    ///
    /// # Errors
    /// If none exists.
    pub fn pods_cgroup(&self, setting: &str) -> Result<PathBuf, HierarchyError> {
        let candidates: Vec<&str> = if setting.is_empty() { PODS_CGROUPS.to_vec() } else { vec![setting] };
        candidates
            .iter()
            .map(|name| self.directory(name))
            .find(|path| path.is_dir())
            .ok_or_else(|| HierarchyError::NoPodsCgroup { root: self.root.clone(), looked_for: candidates.join(", ") })
    }
}

/// Path in the v2 tree from the text of `/proc/<pid>/cgroup`: the line of hierarchy 0.
pub fn unified_path(proc_cgroup: &str) -> Option<&str> {
    proc_cgroup.lines().find_map(|line| line.strip_prefix("0::"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_v2_line_is_found_on_hybrid_and_pure_hosts() {
        let hybrid = "9:name=systemd:/\n5:devices:/kubepods/x\n0::/kubepods/besteffort/podA/c\n";
        assert_eq!(unified_path(hybrid), Some("/kubepods/besteffort/podA/c"));
        assert_eq!(unified_path("0::/kubepods.slice/a.scope\n"), Some("/kubepods.slice/a.scope"));
        assert_eq!(unified_path("5:devices:/\n"), None);
    }

    #[test]
    fn a_directory_that_is_no_cgroup_tree_is_refused_with_what_it_is() {
        let error = Tree::find(Path::new("/proc")).unwrap_err();
        assert!(error.to_string().contains("is no cgroup tree"), "{error}");
    }
}
