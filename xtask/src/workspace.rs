//! Where things lie: the checkout, the state of the local cluster and the user's cache.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use clap::Args;
use sha2::{Digest, Sha256};

/// What the machine tells us through its environment. Flags exist so that `--help` shows what is read.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Settings read from the environment")]
pub struct HostSettings {
    /// The user's home directory
    #[arg(long, env = "HOME", global = true, hide_env_values = true, value_name = "DIR")]
    home: Option<PathBuf>,
    /// Where built binaries and the base image are kept between runs
    #[arg(long, env = "XDG_CACHE_HOME", global = true, hide_env_values = true, value_name = "DIR")]
    cache_home: Option<PathBuf>,
    /// Cargo, as the one that started us wants to be called
    #[arg(long, env = "CARGO", global = true, hide = true, default_value = "cargo")]
    pub cargo: OsString,
    /// CA bundle of this machine, where it is not the one of Debian
    #[arg(long, env = "SSL_CERT_FILE", global = true, hide_env_values = true, value_name = "FILE")]
    pub ssl_cert_file: Option<PathBuf>,
    /// CA bundle that pip is told to use; wins over the one above
    #[arg(long, env = "PIP_CERT", global = true, hide_env_values = true, value_name = "FILE")]
    pub pip_cert: Option<PathBuf>,
    /// Python package index in place of pypi.org
    #[arg(long, env = "PIP_INDEX_URL", global = true, hide_env_values = true, value_name = "URL")]
    pub pip_index_url: Option<String>,
    /// More Python package indexes, separated by spaces
    #[arg(long, env = "PIP_EXTRA_INDEX_URL", global = true, hide_env_values = true, value_name = "URLS")]
    pub pip_extra_index_url: Option<String>,
    /// Proxy for https, which pods that build need as well
    #[arg(long, env = "HTTPS_PROXY", global = true, hide_env_values = true, value_name = "URL")]
    pub https_proxy: Option<String>,
    /// Proxy for http
    #[arg(long, env = "HTTP_PROXY", global = true, hide_env_values = true, value_name = "URL")]
    pub http_proxy: Option<String>,
    /// Debian archive that the base image is made from
    #[arg(
        long,
        env = "DEBIAN_MIRROR",
        global = true,
        default_value = "http://deb.debian.org/debian",
        value_name = "URL"
    )]
    pub debian_mirror: String,
    /// Hosts that are reached without the proxy
    #[arg(long, env = "NO_PROXY", global = true, hide_env_values = true, value_name = "HOSTS")]
    pub no_proxy: Option<String>,
}

/// Where the folder in `/run` begins; the rest names the checkout.
const RUN: &str = "/run/spaceport-local-";
/// The state of the local cluster below the checkout.
const LOCAL: &str = "target/local";

/// The paths everything else is derived from.
pub struct Workspace {
    /// The checkout.
    pub root: PathBuf,
    /// All state of the local cluster; gone after `down`.
    pub local: PathBuf,
    /// A real directory in `/run`, named after the checkout. It holds the link `local` and the note about what the
    /// machine was like before `up`; being in `/run`, the note ends with the boot that it speaks of.
    pub run: PathBuf,
    /// Built Go binaries, layers of images, the base image: survives `down` and `cargo clean`.
    pub cache: PathBuf,
    pub host: HostSettings,
}

/// What the cargo that runs us sets for us. Build scripts look at some of it (ring's does), so a cargo that inherits it
/// compiles again what a cargo at the terminal has compiled, with everything that depends on it.
const SET_FOR_US: [&str; 17] = [
    "CARGO_MANIFEST_DIR",
    "CARGO_MANIFEST_PATH",
    "CARGO_PKG_AUTHORS",
    "CARGO_PKG_DESCRIPTION",
    "CARGO_PKG_HOMEPAGE",
    "CARGO_PKG_LICENSE",
    "CARGO_PKG_LICENSE_FILE",
    "CARGO_PKG_NAME",
    "CARGO_PKG_README",
    "CARGO_PKG_REPOSITORY",
    "CARGO_PKG_RUST_VERSION",
    "CARGO_PKG_VERSION",
    "CARGO_PKG_VERSION_MAJOR",
    "CARGO_PKG_VERSION_MINOR",
    "CARGO_PKG_VERSION_PATCH",
    "CARGO_PKG_VERSION_PRE",
    "CARGO_MANIFEST_LINKS",
];

impl Workspace {
    /// Cargo with these words, as from a terminal in the checkout.
    pub fn cargo(&self, words: &[&str]) -> Command {
        let mut cargo = Command::new(&self.host.cargo);
        SET_FOR_US.iter().for_each(|variable| {
            cargo.env_remove(variable);
        });
        cargo.args(words).current_dir(&self.root);
        cargo
    }

    pub fn locate(host: HostSettings) -> Result<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("..")
            .canonicalize()
            .context("the checkout that this xtask was built from is gone")?;
        let cache_home = match (&host.cache_home, &host.home) {
            (Some(cache_home), _) if cache_home.is_absolute() => cache_home.clone(),
            (_, Some(home)) => home.join(".cache"),
            (_, None) => anyhow::bail!("neither XDG_CACHE_HOME nor HOME is set: say --cache-home DIR"),
        };
        let digest = Sha256::digest(root.as_os_str().as_bytes());
        let run = PathBuf::from(format!("{RUN}{}", &hex(&digest)[..8]));
        Ok(Self { local: root.join(LOCAL), run, cache: cache_home.join("spaceport"), root, host })
    }

    /// The other checkouts that have or had a cluster on this machine, by what they left in `/run`.
    pub fn others(&self) -> Result<Vec<Self>> {
        let entries = std::fs::read_dir("/run").context("cannot list /run")?;
        let runs = entries.flatten().map(|entry| entry.path());
        let theirs = runs.filter(|run| {
            run.as_os_str().as_bytes().starts_with(RUN.as_bytes())
                && *run != self.run
                && run.join("machine.json").exists()
        });
        Ok(theirs.map(|run| self.other(run)).collect())
    }

    fn other(&self, run: PathBuf) -> Self {
        // Without its link nothing but the folder in `/run` tells of that checkout.
        let local = std::fs::read_link(run.join("local")).unwrap_or_else(|_| run.clone());
        let root = local.ancestors().nth(Path::new(LOCAL).components().count()).unwrap_or(&local).to_owned();
        Self { root, local, run, cache: self.cache.clone(), host: self.host.clone() }
    }

    /// The path of something under `target/local` through the link in `/run`.
    ///
    /// The path of a Unix socket has at most 107 bytes, and kubelet and containerd add 40 of their own: in a deep
    /// checkout that is too long. So every component gets its paths through this short link, in every checkout, so
    /// that there is one way and not two.
    pub fn short(&self, below_local: &str) -> PathBuf {
        self.run.join("local").join(below_local)
    }

    /// `short` as text for a flag.
    pub fn short_text(&self, below_local: &str) -> String {
        self.short(below_local).display().to_string()
    }

    pub fn kubeconfig(&self) -> PathBuf {
        self.local.join("kubeconfig")
    }
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Writes a file by a temporary name, so that a reader or a crash never sees half of it.
pub fn write_atomically(path: &Path, contents: &[u8]) -> Result<()> {
    let directory = path.parent().context("a file needs a directory")?;
    std::fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))?;
    let mut name = path.file_name().context("a file needs a name")?.to_owned();
    name.push(".new");
    let temporary = directory.join(name);
    std::fs::write(&temporary, contents).with_context(|| format!("cannot write {}", temporary.display()))?;
    std::fs::rename(&temporary, path).with_context(|| format!("cannot put {} in place", path.display()))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Settings {
        #[command(flatten)]
        host: HostSettings,
    }

    #[test]
    fn another_checkout_is_known_by_its_link() {
        let ours = Workspace::locate(Settings::parse_from(["x", "--home", "/home/somebody"]).host).unwrap();
        let run = std::env::temp_dir().join(format!("spaceport-other-{}", std::process::id()));
        std::fs::create_dir_all(&run).unwrap();
        assert_eq!(ours.other(run.clone()).local, run);
        std::os::unix::fs::symlink("/elsewhere/checkout/target/local", run.join("local")).unwrap();
        let theirs = ours.other(run.clone());
        std::fs::remove_dir_all(&run).unwrap();
        assert_eq!(theirs.root, Path::new("/elsewhere/checkout"));
        assert_eq!(theirs.local, Path::new("/elsewhere/checkout/target/local"));
        assert_eq!((&theirs.run, &theirs.cache), (&run, &ours.cache));
    }
}
