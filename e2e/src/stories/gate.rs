//! What the gate, the freezer and the deadline do to processes.

use anyhow::{Result, ensure};

use super::SETTLE_LIMIT;
use crate::world::World;

/// Invariant 9, N9: EPERM without a lease, for the parent during one and after it; never EPERM for the allowed worker.
///
/// # Errors
/// What was not as it must be.
pub fn only_the_allowed_worker_opens_the_card(world: &World) -> Result<()> {
    let program = r#"
import errno, json, os, spaces
def device():
    try:
        os.close(os.open("/dev/nvidia0", os.O_RDWR))
        return "opened"
    except OSError as error:
        return errno.errorcode[error.errno]
look_from, look_to = os.pipe()
seen_from, seen_to = os.pipe()
@spaces.GPU(duration=10)
def worker():
    seen = device()
    os.write(look_to, b"x")
    # The parent looks while the lease runs.
    os.read(seen_from, 1)
    return seen
def watch(into):
    os.read(look_from, 1)
    into.append(device())
    os.write(seen_to, b"x")
if __name__ == "__main__":
    import threading
    during = []
    before = device()
    watcher = threading.Thread(target=watch, args=(during,)); watcher.start()
    inside = worker()
    watcher.join()
    print(json.dumps({"before": before, "worker": inside, "parent_during": during[0], "after": device()}))
"#;
    let seen = world.app(program)?;
    ensure!(seen["before"] == "EPERM", "without a lease: {seen}");
    ensure!(seen["worker"] != "EPERM", "in the allowed worker: {seen}");
    ensure!(seen["parent_during"] == "EPERM", "the parent during the lease: {seen}");
    ensure!(seen["after"] == "EPERM", "after the lease: {seen}");
    Ok(())
}

/// N11, L16: a thread left behind in a worker that is kept for reuse makes no progress.
///
/// # Errors
/// What was not as it must be.
pub fn an_idle_worker_does_not_compute(world: &World) -> Result<()> {
    let program = r#"
import json, mmap, os, struct, threading, time, spaces
shared = mmap.mmap(-1, 8)
def count():
    value = 0
    while True:
        value += 1
        shared[:8] = struct.pack("q", value)
        time.sleep(0.001)
@spaces.GPU(duration=10)
def leaves_a_thread():
    threading.Thread(target=count, daemon=True).start()
    time.sleep(0.3)
    return os.getpid()
@spaces.GPU(duration=10)
def nothing():
    return os.getpid()
if __name__ == "__main__":
    pid = leaves_a_thread()
    read = lambda: struct.unpack("q", shared[:8])[0]
    counted = read()
    # Time for the freeze, then a second in which a running thread would count to hundreds.
    time.sleep(0.5)
    first = read(); time.sleep(1.0); second = read()
    again = leaves_a_thread()
    print(json.dumps({"counted": counted, "first": first, "second": second, "same_worker": pid == again}))
"#;
    let seen = world.app(program)?;
    ensure!(seen["counted"].as_i64().unwrap_or(0) > 0, "the thread did run during the lease: {seen}");
    ensure!(seen["first"] == seen["second"], "the thread of the idle worker computes on: {seen}");
    ensure!(seen["same_worker"] == true, "the next call of the same function did not find its idle worker: {seen}");
    Ok(())
}

/// N12: an app that has made a call and comes to its end is not held up by the worker that is kept frozen for it.
///
/// # Errors
/// What was not as it must be.
pub fn an_app_ends_although_its_worker_is_frozen(world: &World) -> Result<()> {
    // The interpreter's own end waits for its children, and tells them to end; a frozen one cannot hear that.
    let program = r#"
import json, subprocess, sys
app = """
import os, spaces
@spaces.GPU(duration=5)
def work():
    return os.getpid()
if __name__ == "__main__":
    print("worked", work(), flush=True)
"""
process = subprocess.Popen([sys.executable, "-c", app], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
line = ""
while not line.startswith("worked"):
    line = process.stdout.readline()
    if not line:
        break
try:
    code = process.wait(timeout=20)
except subprocess.TimeoutExpired:
    code = "it does not end"
    process.kill()
print(json.dumps({"said": line.strip(), "code": code}))
"#;
    let seen = world.app(program)?;
    ensure!(seen["said"].as_str().unwrap_or_default().starts_with("worked"), "the app made no call: {seen}");
    ensure!(seen["code"] == 0, "after its call the app did not end: {seen}");
    Ok(())
}

/// Invariant 8: after the declared end and the grace the worker is gone; invariant 5: no more than declared is charged.
///
/// # Errors
/// What was not as it must be.
pub fn the_deadline_ends_the_worker_and_closes_the_gate(world: &World) -> Result<()> {
    let account = world.space_account()?;
    let program = r#"
import errno, json, os, time, spaces
@spaces.GPU(duration=2)
def too_long():
    open("/tmp/worker.pid", "w").write(str(os.getpid()))
    time.sleep(12)
if __name__ == "__main__":
    try:
        too_long(); ended = "returned"
    except BaseException as error:
        ended = str(error)
    pid = int(open("/tmp/worker.pid").read())
    try:
        os.kill(pid, 0); alive = True
    except ProcessLookupError:
        alive = False
    except PermissionError:
        alive = True
    # A killed child that its parent has not waited for is a zombie: it computes nothing.
    if alive:
        alive = open(f"/proc/{pid}/stat").read().split(")")[1].split()[0] != "Z"
    try:
        os.close(os.open("/dev/nvidia0", os.O_RDWR)); gate = "opened"
    except OSError as error:
        gate = errno.errorcode[error.errno]
    print(json.dumps({"ended": ended, "alive": alive, "gate": gate}))
"#;
    let charged = world.charged_ms(&account).unwrap_or(0);
    let seen = world.app(program)?;
    ensure!(seen["ended"].as_str().unwrap_or_default().contains("aborted"), "it was not ended before its 12 s: {seen}");
    ensure!(seen["alive"] == false, "the worker outlived its deadline: {seen}");
    ensure!(seen["gate"] == "EPERM", "the gate is open after the deadline: {seen}");
    world.settled(&account, SETTLE_LIMIT)?;
    ensure!(world.charged_ms(&account)? - charged == 2_000, "charged is bounded by declared (invariant 5)");
    Ok(())
}
