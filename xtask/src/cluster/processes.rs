//! Starting the components detached, knowing later which process was which, and ending them.

use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::machine::boot_id;
use crate::command::{command, progress, tail};
use crate::prerequisites::unified_cgroup;
use crate::wait;
use crate::workspace::{Workspace, hex, write_atomically};

/// The cgroup that every component and whatever it starts is in (pods have `kubepods`). In the v2 tree, where one
/// write ends all of it. Only one local cluster can run on a machine, so the name needs no checkout in it.
pub const CGROUP: &str = "spaceport-local";

/// A component as it should run.
pub struct Component {
    pub name: &'static str,
    pub program: PathBuf,
    pub arguments: Vec<String>,
    /// Added to the environment.
    pub environment: Vec<(&'static str, String)>,
    /// Contents of the files it reads once at its start: another content is another component.
    pub reads: Vec<String>,
}

/// A component that was started. Pid and start time together name a process: pids are used again.
#[derive(Serialize, Deserialize)]
struct Record {
    pid: i32,
    start_ticks: u64,
    boot: String,
    fingerprint: String,
}

/// Starts a component unless exactly this one runs already; one that runs with other settings is replaced.
/// True when it was started now.
pub fn ensure_running(workspace: &Workspace, component: &Component) -> Result<bool> {
    let fingerprint = fingerprint(component);
    let path = record_path(workspace, component.name);
    if let Some(record) = read_record(&path)? {
        if record.fingerprint == fingerprint && is_alive(&record) {
            return Ok(false);
        }
        stop(component.name, &record, "its settings changed")?;
    }
    let pid = start(workspace, component)?;
    let start_ticks = start_ticks(pid)
        .with_context(|| format!("{} ended at once:\n{}", component.name, log_end(workspace, component.name)))?;
    let record = Record { pid, start_ticks, boot: boot_id()?, fingerprint };
    write_atomically(&path, &serde_json::to_vec_pretty(&record)?)?;
    progress(&format!("started {} (pid {pid})", component.name));
    Ok(true)
}

/// Ends a component, if it runs.
pub fn end(workspace: &Workspace, name: &str) -> Result<()> {
    match read_record(&record_path(workspace, name))? {
        Some(record) => stop(name, &record, "nobody needs it any more"),
        None => Ok(()),
    }
}

/// Fails with the end of its log if a component is not running: for waiting loops.
pub fn check_alive(workspace: &Workspace, name: &str) -> Result<()> {
    match read_record(&record_path(workspace, name))? {
        Some(record) if is_alive(&record) => Ok(()),
        _ => bail!("{name} is not running, the end of its log:\n{}", log_end(workspace, name)),
    }
}

/// The cgroup of the components, made if needed.
pub fn cgroup() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("cannot read the mounts")?;
    let folder = unified_cgroup(&mounts).context("there is no cgroup v2 tree")?.join(CGROUP);
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    Ok(folder)
}

fn start(workspace: &Workspace, component: &Component) -> Result<i32> {
    let log = log_path(workspace, component.name);
    fs::create_dir_all(workspace.local.join("logs")).context("cannot create the folder of logs")?;
    let open = || OpenOptions::new().create(true).append(true).open(&log);
    let out = open().with_context(|| format!("cannot write {}", log.display()))?;
    let errors = open().with_context(|| format!("cannot write {}", log.display()))?;
    // The shell joins the cgroup and is then replaced, so that the pid stays the one we get here: a child of ours
    // leads no group, in which case setsid needs no fork of its own.
    let mut starting = command("sh", &["-c", "echo $$ >\"$0\" && exec setsid \"$@\""]);
    starting.arg(cgroup()?.join("cgroup.procs")).arg(&component.program).args(&component.arguments);
    starting.envs(component.environment.iter().map(|(name, value)| (name, value)));
    starting.current_dir("/").stdin(Stdio::null()).stdout(out).stderr(errors);
    let child = starting.spawn().with_context(|| format!("cannot start {}", component.name))?;
    i32::try_from(child.id()).context("a pid fits an i32")
}

/// Ends a component that we recorded: SIGTERM, and after 10 s (kubelet and etcd need 1 to 2) SIGKILL.
fn stop(name: &str, record: &Record, why: &str) -> Result<()> {
    let Some(pid) = Pid::from_raw(record.pid) else { return Ok(()) };
    // The descriptor keeps naming this process; what it names is checked after it is open.
    let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else { return Ok(()) };
    if !is_alive(record) {
        return Ok(());
    }
    progress(&format!("stopping {name} (pid {}), {why}", record.pid));
    pidfd_send_signal(&process, Signal::TERM).with_context(|| format!("cannot stop {name}"))?;
    let gone = |limit| wait::until(name, limit, || Ok((!is_alive(record)).then_some(())));
    if gone(Duration::from_secs(10)).is_err() {
        pidfd_send_signal(&process, Signal::KILL).with_context(|| format!("cannot kill {name}"))?;
        gone(Duration::from_secs(5))?;
    }
    Ok(())
}

fn is_alive(record: &Record) -> bool {
    boot_id().is_ok_and(|boot| boot == record.boot) && start_ticks(record.pid) == Some(record.start_ticks)
}

/// Field 22 of `/proc/PID/stat`; none for a process that is gone or a zombie.
fn start_ticks(pid: i32) -> Option<u64> {
    parse_start_ticks(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

fn parse_start_ticks(stat: &str) -> Option<u64> {
    // The second field is the name in brackets and may contain anything, so counting begins behind the last bracket.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = fields.next()?;
    if state == "Z" || state == "X" {
        return None;
    }
    // The state was field 3.
    fields.nth(22 - 4)?.parse().ok()
}

fn fingerprint(component: &Component) -> String {
    let mut digest = Sha256::new();
    let parts = [component.program.display().to_string()];
    let environment = component.environment.iter().map(|(name, value)| format!("{name}={value}"));
    for part in parts.into_iter().chain(component.arguments.iter().cloned()).chain(environment) {
        digest.update(Sha256::digest(part.as_bytes()));
    }
    for contents in &component.reads {
        digest.update(Sha256::digest(contents.as_bytes()));
    }
    hex(&digest.finalize())
}

fn record_path(workspace: &Workspace, name: &str) -> PathBuf {
    workspace.local.join("pids").join(format!("{name}.json"))
}

fn read_record(path: &Path) -> Result<Option<Record>> {
    match fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map(Some).with_context(|| format!("{} is damaged", path.display())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}

fn log_path(workspace: &Workspace, name: &str) -> PathBuf {
    workspace.local.join("logs").join(format!("{name}.log"))
}

fn log_end(workspace: &Workspace, name: &str) -> String {
    tail(&log_path(workspace, name), 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_time_is_read_behind_a_name_with_brackets_and_a_zombie_has_none() {
        let rest = "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20";
        assert_eq!(parse_start_ticks(&format!("12 (a ) b) S {rest}")), Some(4711));
        assert_eq!(parse_start_ticks(&format!("12 (a ) b) Z {rest}")), None);
        assert_eq!(parse_start_ticks(""), None);
    }

    #[test]
    fn our_own_start_time_is_the_same_each_time_we_look() {
        let own = i32::try_from(std::process::id()).unwrap();
        assert!(start_ticks(own).is_some());
        assert_eq!(start_ticks(own), start_ticks(own));
    }

    #[test]
    fn another_argument_or_file_is_another_component() {
        let component = |argument: &str, file: &str| Component {
            name: "x",
            program: "/bin/x".into(),
            arguments: vec![argument.into()],
            environment: vec![],
            reads: vec![file.into()],
        };
        assert_eq!(fingerprint(&component("a", "b")), fingerprint(&component("a", "b")));
        assert_ne!(fingerprint(&component("a", "b")), fingerprint(&component("c", "b")));
        assert_ne!(fingerprint(&component("a", "b")), fingerprint(&component("a", "c")));
    }
}
