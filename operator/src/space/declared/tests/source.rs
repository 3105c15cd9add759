//! `runtime/declared.py` on sample apps, and `runtime/prepare.py` where it passes the report on.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::super::*;

const APP: &str = r#"
import datetime as dt
import spaces as s
from datetime import timedelta
from other import get_duration
from spaces import GPU, GPU as gpu

MINUTES = 5
LONG = MINUTES * 60
TWICE = 1
TWICE = 2

@s.GPU(duration=300)
def a(): ...
@gpu
def b(): ...
@GPU(duration=60 * 5.0, size="xlarge")
def c(): ...
@GPU(LONG)
def d(): ...
@GPU("xlarge")
def e(): ...
@GPU(duration=timedelta(minutes=2, seconds=1))
async def f(): ...
@GPU(duration=dt.timedelta(1, 5))
def g(): ...
@GPU(duration=None, size="large")
def h(): ...
@GPU(duration=-5)
def i(): ...
@GPU(duration=1.9)
def j(): ...
class Model:
    @s.GPU()
    def k(self): ...
l = s.GPU(Model().k, duration=45)
m = s.GPU(duration=46)(get_duration)
"#;

/// None of these is known before it is called.
const COMPUTED: &str = r#"
import os, spaces
from datetime import timedelta
from spaces import *
ENVIRONMENT = int(os.environ["SECONDS"])
if ENVIRONMENT:
    BRANCH = 1
BRANCH = 2
SELF = SELF + 1
LOCAL = 1
def shadow(LOCAL): ...

@GPU(duration=ENVIRONMENT)
def a(): ...
@GPU(duration=BRANCH)
def b(): ...
@GPU(duration=SELF)
def c(): ...
@GPU(duration=LOCAL)
def d(): ...
@GPU(duration=lambda n: n)
def e(n): ...
@GPU(e)
def f(): ...
@GPU(**{"duration": 300})
def g(): ...
@GPU(duration=10 ** 10 ** 10)
def h(): ...
@GPU(duration=1e400)
def i(): ...
@GPU(duration=300, size="huge")
def j(): ...
@GPU(duration=timedelta(seconds=300, fortnights=1))
def k(): ...
@GPU(duration=300 if ENVIRONMENT else 30)
def l(): ...
@GPU(duration=True)
def m(): ...
@GPU(duration="300")
def n(): ...
"#;

const FOREIGN: &str = "import spaces\n@spaces.GPU(duration=4000)\ndef foreign(): ...\n";

/// A folder of its own for each test.
fn folder(test: &str, files: &[(&str, &str)]) -> PathBuf {
    let folder = std::env::temp_dir().join(format!("spaceport-declared-{test}-{}", std::process::id()));
    for (path, text) in files {
        let path = folder.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    folder
}

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../runtime").join(name)
}

/// What the script prints about an app, as it is read here. The folder is removed.
fn read(app: &Path) -> Report {
    let output = Command::new("python3").arg("-I").arg(script("declared.py")).arg(app).arg("app.py").output().unwrap();
    fs::remove_dir_all(app).unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    Report::read(&said).unwrap()
}

fn rows(report: &Report) -> Vec<(&str, u32, u32, Size)> {
    let mut rows: Vec<_> =
        report.functions.iter().map(|found| (found.name.as_str(), found.line, found.seconds, found.size)).collect();
    rows.sort_unstable_by_key(|row| row.1);
    rows
}

#[test]
fn every_way_to_write_a_duration_down_is_read() {
    use Size::{Large, Xlarge};
    let found = read(&folder("ways", &[("app.py", APP)]));
    assert_eq!((found.computed, found.missing), (0, 0));
    assert_eq!(
        rows(&found),
        [
            ("a", 13, 300, Large),
            ("b", 15, 60, Large),
            ("c", 17, 300, Xlarge),
            ("d", 19, 300, Large),
            ("e", 21, 60, Xlarge),
            ("f", 23, 121, Large),
            ("g", 25, 5, Large),
            ("h", 27, 60, Large),
            ("i", 29, 86_395, Large),
            ("j", 31, 1, Large),
            ("k", 34, 60, Large),
            ("k", 36, 45, Large),
            ("get_duration", 37, 46, Large),
        ]
    );
    let named = |name: &str| found.functions.iter().find(|function| function.name == name).unwrap();
    assert_eq!((named("g").written, named("i").written, named("j").written), (Some(86_405), Some(-5), None));
    assert!(named("b").is_default && named("h").is_default && !named("a").is_default);
}

#[test]
fn what_is_not_certain_is_computed() {
    let found = read(&folder("computed", &[("app.py", COMPUTED)]));
    assert_eq!((rows(&found), found.computed, found.missing), (Vec::new(), 14, 0));
}

#[test]
fn only_the_apps_own_files_are_read_and_none_can_stop_the_rest() {
    let deep = format!("import spaces\nspaces.GPU\nx = {}1{}", "(".repeat(50_000), ")".repeat(50_000));
    let chain = format!("import spaces\n@spaces.GPU(duration=1{})\ndef f(): ...\n", "+1".repeat(50_000));
    let huge = format!("import spaces\nspaces.GPU\n#{}", "x".repeat(512 * 1024));
    let app = folder(
        "files",
        &[
            ("app.py", "import spaces\n@spaces.GPU(duration=5)\ndef own(): ...\n"),
            ("pages/other.py", "import spaces\n\n@spaces.GPU(duration=6)\ndef page(): ...\n"),
            ("anything/pyvenv.cfg", ""),
            ("anything/lib/foreign.py", FOREIGN),
            (".git/foreign.py", FOREIGN),
            ("node_modules/foreign.py", FOREIGN),
            ("notes.txt", FOREIGN),
            ("unrelated.py", "GPU = duration = 4000\n@GPU(duration=4000)\ndef f(): ...\n# spaces\n"),
            ("bad/broken.py", "import spaces\n@spaces.GPU(duration=7\n"),
            ("bad/nul.py", "import spaces\n\0spaces.GPU"),
            ("bad/deep.py", &deep),
            ("bad/chain.py", &chain),
            ("bad/huge.py", &huge),
        ],
    );
    let outside = folder("outside", &[("foreign.py", FOREIGN)]);
    std::os::unix::fs::symlink(outside.join("foreign.py"), app.join("bad/link.py")).unwrap();
    std::os::unix::fs::symlink(&outside, app.join("linked")).unwrap();
    // Nobody ever writes into it.
    assert!(Command::new("mkfifo").arg(app.join("bad/pipe.py")).status().unwrap().success());
    let found = read(&app);
    fs::remove_dir_all(outside).unwrap();
    assert_eq!(rows(&found), [("own", 2, 5, Size::Large), ("page", 3, 6, Size::Large)]);
    assert_eq!(
        found.functions.iter().map(|function| function.file.as_str()).collect::<Vec<_>>(),
        ["pages/other.py", "app.py"]
    );
    assert_eq!((found.computed, found.missing), (0, 7), "each file that was not looked at is counted");
}

#[test]
fn a_file_whose_name_is_not_utf_8_is_read_with_the_others() {
    use std::os::unix::ffi::OsStrExt as _;
    let long = "import spaces\n@spaces.GPU(duration=300)\ndef far():\n    pass\n";
    let app = folder("name", &[("app.py", "import spaces\n@spaces.GPU\ndef near():\n    pass\n")]);
    fs::write(app.join(std::ffi::OsStr::from_bytes(b"\xff.py")), long).unwrap();
    let found = read(&app);
    let far = found.functions.iter().find(|function| function.name == "far").unwrap();
    assert_eq!((far.seconds, far.file.as_str(), found.functions.len()), (300, "?.py", 2));
}

#[test]
fn what_has_no_room_is_counted_and_the_longest_stay() {
    let functions: String =
        (1..=300).map(|seconds| format!("@spaces.GPU(duration={seconds})\ndef function_{seconds}(): ...\n")).collect();
    let found = read(&folder("room", &[("app.py", &format!("import spaces\n{functions}"))]));
    let (shown, longest) = (found.functions.len(), found.functions[0].seconds);
    assert!((40..FUNCTIONS_MAX).contains(&shown), "{shown}");
    assert_eq!((longest, usize::try_from(found.missing).unwrap()), (300, 300 - shown));
}

#[test]
fn the_report_reaches_the_termination_log_and_nothing_can_end_the_container() {
    let app = folder("log", &[("app.py", "import spaces\n@spaces.GPU(duration=300)\ndef own(): ...\n")]);
    let log = app.join("termination-log");
    let tell = |change: &str| {
        let program = format!(
            "import sys; sys.path.insert(0, sys.argv[1]); import prepare; from pathlib import Path\n\
             prepare.TERMINATION_LOG = Path(sys.argv[2])\n{change}\nprepare.tell_declared_durations()"
        );
        let mut python = Command::new("python3");
        python.args(["-B", "-c", &program]).arg(script("")).arg(&log).env("SPACEPORT_APP_DIR", &app);
        let output = python.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        fs::read_to_string(&log).ok().and_then(|words| Report::read(&words))
    };
    for broken in [
        "prepare.DECLARED = Path('/none')",
        "prepare.SCAN_SECONDS_MAX = 0",
        "prepare.REPORT_BYTES_MAX = 5",
        "prepare.TERMINATION_LOG = Path('/none/log')",
    ] {
        assert_eq!(tell(broken), None, "{broken}");
    }
    assert_eq!(rows(&tell("").unwrap()), [("own", 2, 300, Size::Large)]);
    fs::remove_dir_all(app).unwrap();
}
