//! A pod as the kernel sees one: a cgroup below a pods' cgroup, a container with its own pid namespace, an app as its first
//! process and a worker that the app forked. Shells play both; they open what they are told and say what came of it.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use spaceport_device_plugin::gate::hierarchy::Tree;
use spaceport_device_plugin::gate::lease_cgroup::LeaseCgroup;
use spaceport_device_plugin::gate::{self, Device, Gate, GateSettings};

/// What came of opening a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Denied {
    /// It is open.
    Not,
    /// EPERM.
    ByGate,
    /// ENXIO: the gate let it through and no driver is there.
    NoDevice,
}

/// A node: cgroup above its pods, a bpffs, a directory. All of it is gone at the end of the test.
pub struct Node {
    pub pods: PathBuf,
    directory: PathBuf,
}

impl Node {
    pub fn new(name: &str) -> Self {
        assert!(rustix::process::geteuid().is_root(), "these tests load a BPF program: run them as root");
        let tree = Tree::find("/sys/fs/cgroup".as_ref()).unwrap();
        let unique = format!("spaceport-gate-{name}-{}", std::process::id());
        let node = Self { pods: tree.root().join(&unique), directory: std::env::temp_dir().join(&unique) };
        fs::create_dir(&node.pods).unwrap();
        fs::create_dir(&node.directory).unwrap();
        node.gate();
        node
    }

    /// What a starting agent does.
    pub fn gate(&self) -> Arc<Gate> {
        let settings = GateSettings {
            pin_directory: self.directory.join("bpf/gate"),
            pods_cgroup: self.pods.clone(),
            majors: BTreeSet::from([super::NVIDIA]),
        };
        Arc::new(Gate::establish(settings).unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    pub fn device(&self, name: &str, major: u32, minor: u32) -> PathBuf {
        let path = self.path(name);
        let made = Command::new("mknod").arg(&path).args(["c", &major.to_string(), &minor.to_string()]).status();
        assert!(made.unwrap().success());
        path
    }

    pub fn pod(&self, uid: &str) -> Pod {
        let cgroup = self.pods.join(format!("pod{uid}"));
        let container = cgroup.join(format!("container-{uid}"));
        fs::create_dir_all(&container).unwrap();
        let mut app = Shell::start(&container, "unshare --pid --fork --kill-child sh -c");
        let worker = app.forks();
        Pod { uid: uid.to_owned(), cgroup, container, app, worker }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // Everything below dies; then the directories go from the leaves up.
        let _ = fs::write(self.pods.join("cgroup.kill"), "1");
        let _ = LeaseCgroup::open(&self.pods).and_then(|all| all.wait_empty(Duration::from_secs(5)));
        remove_cgroups(&self.pods);
        let _ = gate::unpin(&self.directory.join("bpf/gate"));
        let _ = rustix::mount::unmount(self.directory.join("bpf"), rustix::mount::UnmountFlags::DETACH);
        let _ = fs::remove_dir_all(&self.directory);
    }
}

fn remove_cgroups(directory: &Path) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroups(&entry.path());
        }
    }
    let _ = fs::remove_dir(directory);
}

/// A pod with one container.
pub struct Pod {
    pub uid: String,
    cgroup: PathBuf,
    container: PathBuf,
    app: Shell,
    worker: Shell,
}

impl Pod {
    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    pub fn id(&self) -> u64 {
        gate::cgroup_id(&self.cgroup).unwrap()
    }

    pub fn container(&self) -> &Path {
        &self.container
    }

    pub fn container_id(&self) -> u64 {
        gate::cgroup_id(&self.container).unwrap()
    }

    /// The app itself.
    pub fn parent(&mut self) -> &mut Shell {
        &mut self.app
    }

    /// The process that the app forked for a function.
    pub fn worker(&mut self) -> &mut Shell {
        &mut self.worker
    }

    /// A process of the container that came to a device on some other way than by opening it.
    pub fn joins_holding(&self, device: &str) -> Shell {
        let command = format!("exec 9<{device}; echo $$ > {}/cgroup.procs; exec sh -c", self.container.display());
        Shell::spawn(Command::new("sh").arg("-c").arg(format!("{command} '{LISTEN}'")))
    }
}

/// Reads a path a line, tries to open it, answers with what came of it. `fork` starts another listener on a pair of named
/// pipes; `spin` counts in a file for as long as it runs; `trap` handles SIGTERM as a worker of the client does.
const LISTEN: &str = r#"
echo $$ $(sed -n "s/^NSpid:[[:space:]]*\([0-9]*\).*/\1/p" /proc/self/status)
while read -r verb path rest; do
    case "$verb" in
    open) (: < "$path") 2>&1 && echo opened ;;
    mknod) mknod "$path" c $rest && echo made ;;
    fork) sh -c "$LISTEN" < "$path.in" > "$path.out" & echo forked ;;
    spin) (n=0; while :; do n=$((n+1)); echo $n > "$path"; done) & echo spinning ;;
    trap) trap "exit 0" TERM; echo trapped ;;
    exit) exit 0 ;;
    esac
done
"#;

/// A shell that listens.
pub struct Shell {
    input: Box<dyn std::io::Write + Send>,
    output: BufReader<Box<dyn std::io::Read + Send>>,
    child: Option<Child>,
    pub host_pid: u32,
    pub container_pid: u32,
}

impl Shell {
    fn start(container: &Path, prefix: &str) -> Self {
        // The shell enters the cgroup before it becomes the container's first process.
        let script = format!("echo $$ > {}/cgroup.procs; exec {prefix} \"$LISTEN\"", container.display());
        let mut shell = Self::spawn(Command::new("sh").arg("-c").arg(script));
        shell.host_pid = host_pid(container, shell.container_pid);
        shell
    }

    fn spawn(command: &mut Command) -> Self {
        let mut child = command.env("LISTEN", LISTEN).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let input: ChildStdin = child.stdin.take().unwrap();
        let output: ChildStdout = child.stdout.take().unwrap();
        let mut shell = Self {
            input: Box::new(input),
            output: BufReader::new(Box::new(output)),
            host_pid: child.id(),
            child: Some(child),
            container_pid: 0,
        };
        shell.container_pid = shell.introduces_itself();
        shell
    }

    fn introduces_itself(&mut self) -> u32 {
        let line = self.line();
        line.split(' ').next().unwrap().parse().unwrap_or_else(|_| panic!("no pid in {line:?}"))
    }

    /// The shell forks a listener of its own, as an app forks a worker.
    pub fn forks(&mut self) -> Self {
        let name = std::env::temp_dir().join(format!(
            "spaceport-gate-pipe-{}-{}-{:?}",
            std::process::id(),
            self.host_pid,
            std::thread::current().id()
        ));
        let pipe = |end: &str| PathBuf::from(format!("{}.{end}", name.display()));
        for end in ["in", "out"] {
            let _ = fs::remove_file(pipe(end));
            assert!(Command::new("mkfifo").arg(pipe(end)).status().unwrap().success());
        }
        assert_eq!(self.asks(&format!("fork {}", name.display())), "forked");
        let input = fs::OpenOptions::new().write(true).open(pipe("in")).unwrap();
        let output = fs::File::open(pipe("out")).unwrap();
        for end in ["in", "out"] {
            fs::remove_file(pipe(end)).unwrap();
        }
        let mut worker = Self {
            input: Box::new(input),
            output: BufReader::new(Box::new(output)),
            child: None,
            host_pid: 0,
            container_pid: 0,
        };
        worker.container_pid = worker.introduces_itself();
        let container = cgroup_of(self.host_pid);
        worker.host_pid = host_pid(&container, worker.container_pid);
        worker
    }

    /// Tries to open a device.
    pub fn opens(&mut self, path: &Path) -> Denied {
        let answer = self.asks(&format!("open {}", path.display()));
        match answer.as_str() {
            "opened" => Denied::Not,
            text if text.contains("Operation not permitted") => Denied::ByGate,
            text if text.contains("No such device or address") => Denied::NoDevice,
            text => panic!("opening {} gave {text}", path.display()),
        }
    }

    /// Makes a device node.
    pub fn makes_node(&mut self, path: &Path, major: u32, minor: u32) {
        assert_eq!(self.asks(&format!("mknod {} {major} {minor}", path.display())), "made");
    }

    /// Leaves something behind that counts in a file for as long as it gets to run.
    pub fn leaves_counter(&mut self, path: &Path) {
        assert_eq!(self.asks(&format!("spin {}", path.display())), "spinning");
    }

    /// Handles SIGTERM from now on.
    pub fn traps(&mut self) {
        assert_eq!(self.asks("trap"), "trapped");
    }

    /// Ends by itself.
    pub fn exits(&mut self) {
        writeln!(self.input, "exit").unwrap();
    }

    fn asks(&mut self, question: &str) -> String {
        writeln!(self.input, "{question}").unwrap();
        self.line()
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The host's pid of the process that its container calls `container_pid`.
fn host_pid(container: &Path, container_pid: u32) -> u32 {
    let pids = fs::read_to_string(container.join("cgroup.procs")).unwrap();
    let is_it = |pid: &u32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("NSpid:")).unwrap_or_default();
        let inner: Vec<&str> = line.split_ascii_whitespace().collect();
        inner.len() > 1 && inner.last() == Some(&container_pid.to_string().as_str())
    };
    pids.lines().filter_map(|pid| pid.parse().ok()).find(is_it).unwrap()
}

fn cgroup_of(pid: u32) -> PathBuf {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let path = gate::hierarchy::unified_path(&text).unwrap();
    Tree::find("/sys/fs/cgroup".as_ref()).unwrap().directory(path)
}

/// Opens a device in the test's own cgroup.
pub fn open_here(path: &Path) -> Denied {
    match fs::File::open(path).map_err(|error| error.raw_os_error()) {
        Ok(_) => Denied::Not,
        Err(Some(1)) => Denied::ByGate,
        Err(Some(6)) => Denied::NoDevice,
        Err(other) => panic!("{other:?}"),
    }
}

/// Major and minor of a device node.
pub fn numbers(path: &Path) -> Device {
    let device = fs::metadata(path).unwrap().rdev();
    Device { major: rustix::fs::major(device), minor: rustix::fs::minor(device) }
}
