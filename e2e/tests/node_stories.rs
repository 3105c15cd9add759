//! What only a real node can show, as stories. Each begins with an account of its own.
#![cfg(feature = "cluster")]
#![allow(clippy::unwrap_used, clippy::panic)] // A test fails by panicking, its helpers too.

use std::panic::AssertUnwindSafe;
use std::time::Duration;

use serde_json::{Value, json};
use spaceport_e2e::story::{NAMESPACE, SPACE};
use spaceport_e2e::{Token, World, at, demo, eventually};

/// An allow limit of 30 s, a second, and this machine's load.
const ALLOW_LIMIT: Duration = Duration::from_secs(45);
/// Restart of a container, leader election included.
const RESTART_LIMIT: Duration = Duration::from_secs(120);
const SETTLE_LIMIT: Duration = Duration::from_secs(30);

/// Runs a story; when it fails, prints what a person would ask for.
fn story(tell: impl FnOnce(&World) -> anyhow::Result<()>) {
    let world = World::connect().unwrap();
    world.apply_examples().unwrap();
    world.story_space().unwrap();
    let told = std::panic::catch_unwind(AssertUnwindSafe(|| tell(&world)));
    match told {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            eprintln!("{}", world.evidence());
            panic!("{error:#}");
        }
        Err(panic) => {
            eprintln!("{}", world.evidence());
            std::panic::resume_unwind(panic);
        }
    }
}

fn schedule(token: &str, duration: &str, size: &str) -> String {
    let size = if size.is_empty() { String::new() } else { format!("&gpuSize={size}") };
    let token = if token.is_empty() { String::new() } else { format!("&token={token}") };
    format!(
        "/schedule?cgroupPath=%2F&taskId=140654172626816&enableQueue=true&tokenVersion=2&durationSeconds={duration}{size}{token}"
    )
}

fn granted(answer: &Value) -> String {
    assert_eq!(answer["status"], 200, "{answer}");
    let body: Value = serde_json::from_str(answer["body"].as_str().unwrap())
        .unwrap_or_else(|_| panic!("not granted at once: {answer}"));
    body["allowToken"].as_str().unwrap().to_owned()
}

#[test]
fn first_light() {
    story(|world| {
        let account = world.new_account("first-light")?;
        demo::run(world, &account, &mut |line| println!("{line}"))
    });
}

#[test]
fn only_the_allowed_worker_opens_the_card() {
    story(|world| {
        let program = r#"
import errno, json, os, spaces
def device():
    try:
        os.close(os.open("/dev/nvidia0", os.O_RDWR))
        return "opened"
    except OSError as error:
        return errno.errorcode[error.errno]
parent_end, child_end = os.pipe()
@spaces.GPU(duration=10)
def worker():
    seen = device()
    # The parent answers while the lease runs.
    os.write(child_end, b"x")
    import time; time.sleep(0.5)
    return seen
def watch(into):
    os.read(parent_end, 1)
    into.append(device())
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
        assert_eq!(seen["before"], "EPERM", "without a lease: {seen}");
        assert_ne!(seen["worker"], "EPERM", "in the allowed worker: {seen}");
        assert_eq!(seen["parent_during"], "EPERM", "the parent during the lease: {seen}");
        assert_eq!(seen["after"], "EPERM", "after the lease: {seen}");
        Ok(())
    });
}

#[test]
fn an_idle_worker_does_not_compute() {
    story(|world| {
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
        assert!(seen["counted"].as_i64().unwrap_or(0) > 0, "the thread did run during the lease: {seen}");
        assert_eq!(seen["first"], seen["second"], "the thread of the idle worker computes on: {seen}");
        Ok(())
    });
}

#[test]
fn the_deadline_ends_the_worker_and_closes_the_gate() {
    story(|world| {
        let account = world.space_account()?;
        let program = r#"
import errno, json, os, time, spaces
@spaces.GPU(duration=2)
def too_long():
    open("/tmp/worker.pid", "w").write(str(os.getpid()))
    time.sleep(60)
if __name__ == "__main__":
    start = time.monotonic()
    try:
        too_long(); ended = "returned"
    except BaseException as error:
        ended = str(error)
    seconds = time.monotonic() - start
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
    print(json.dumps({"ended": ended, "seconds": seconds, "alive": alive, "gate": gate}))
"#;
        let charged = world.charged_ms(&account).unwrap_or(0);
        let seen = world.app(program)?;
        assert!(seen["ended"].as_str().unwrap_or_default().contains("aborted"), "{seen}");
        assert!(seen["seconds"].as_f64().unwrap_or(99.0) < 20.0, "2 s declared, 2 s grace: {seen}");
        assert_eq!(seen["alive"], false, "{seen}");
        assert_eq!(seen["gate"], "EPERM", "{seen}");
        world.settled(&account, SETTLE_LIMIT)?;
        assert_eq!(world.charged_ms(&account)? - charged, 2_000, "charged is bounded by declared (invariant 5)");
        Ok(())
    });
}

#[test]
fn malformed_requests_get_an_answer_their_client_understands_and_leave_the_ledger_alone() {
    story(|world| {
        let uid = world.story_space()?;
        let account = world.new_account("malformed")?;
        let good = Token::one_call(&account, &uid);
        let expired = Token { lifetime_s: -60, ..good.clone() }.sign(&world.kubectl)?;
        let foreign = Token { audience: "00000000-0000-4000-8000-000000000000".to_owned(), ..good.clone() }
            .sign(&world.kubectl)?;
        let unknown = Token { account: "nobody-of-that-name".to_owned(), ..good.clone() }.sign(&world.kubectl)?;
        let token = world.token(&account)?;
        let forged = format!("{}AAAA", &token[..token.len() - 4]);
        let before = at(&world.page(&account)?, "/seq").clone();
        let space_account = world.space_account()?;
        let space_before = world.page(&space_account).map(|page| at(&page, "/windows").clone()).unwrap_or_default();

        let cases: Vec<(String, u64)> = vec![
            ("/schedule".to_owned(), 400),
            ("/schedule?cgroupPath=%2F&enableQueue=true&tokenVersion=2&durationSeconds=5".to_owned(), 400),
            (schedule(&token, "-5", ""), 429),
            (schedule(&token, "99999999999999999999999", ""), 429),
            (schedule(&token, "86395", ""), 429),
            (schedule(&token, "0", ""), 429),
            (schedule(&token, "five", ""), 400),
            (schedule(&token, "5", "gigantic"), 429),
            (schedule("not-a-token", "5", ""), 401),
            (schedule(&expired, "5", ""), 401),
            (schedule(&foreign, "5", ""), 401),
            (schedule(&unknown, "5", ""), 401),
            (schedule(&forged, "5", ""), 401),
            ("/allow?allowToken=unknown&pid=1".to_owned(), 404),
            ("/allow?pid=7".to_owned(), 400),
            ("/release?allowToken=unknown&fail=false".to_owned(), 404),
            ("/nothing".to_owned(), 404),
        ];
        let paths: Vec<String> = cases.iter().map(|(path, _)| path.clone()).collect();
        let answers = world.raw(&paths)?;
        for ((path, expected), answer) in cases.iter().zip(&answers) {
            let shown = path.split("&token=").next().unwrap_or_default();
            assert_eq!(answer["status"], *expected, "{shown}: {answer}");
        }
        let page = world.page(&account)?;
        assert!(at(&page, "/windows").as_array().is_none_or(Vec::is_empty), "a window was opened: {page}");
        assert!(at(&page, "/holds").as_array().is_none_or(Vec::is_empty), "something is held: {page}");
        let written = at(&page, "/seq").as_i64().unwrap_or(0) - before.as_i64().unwrap_or(0);
        assert!(written <= 2, "refusals are coalesced (L5), not {written} writes");
        let space_after = world.page(&space_account).map(|page| at(&page, "/windows").clone()).unwrap_or_default();
        assert_eq!(space_before, space_after, "a bad credential is never a guest (invariant 10)");
        Ok(())
    });
}

#[test]
fn a_worker_is_a_process_of_its_own_pod_and_its_token_is_spent_once() {
    story(|world| {
        let account = world.new_account("allow")?;
        let token = world.token(&account)?;
        let path = schedule(&token, "10", "");
        let program = format!(
            r#"
import http.client, json, os, time
def post(path):
    connection = http.client.HTTPConnection("127.0.0.1", 7999, timeout=60)
    connection.request("POST", path, body=b"")
    answer = connection.getresponse(); body = answer.read().decode()
    return answer.status, body
status, body = post({path:?})
token = json.loads(body)["allowToken"]
seen = {{"schedule": status}}
seen["init"] = post(f"/allow?allowToken={{token}}&pid=1")[0]
seen["foreign"] = post(f"/allow?allowToken={{token}}&pid=4000000")[0]
seen["negative"] = post(f"/allow?allowToken={{token}}&pid=-1")[0]
worker = os.fork()
if worker == 0:
    time.sleep(30); os._exit(0)
seen["worker"] = post(f"/allow?allowToken={{token}}&pid={{worker}}")[0]
seen["replayed"] = post(f"/allow?allowToken={{token}}&pid={{worker}}")[0]
seen["release"] = post(f"/release?allowToken={{token}}&fail=false")[0]
seen["again"] = post(f"/release?allowToken={{token}}&fail=false")[0]
print(json.dumps(seen))
"#
        );
        let seen = world.app(&program)?;
        assert_eq!(seen["schedule"], 200, "{seen}");
        for wrong in ["init", "foreign", "negative", "replayed"] {
            assert_ne!(seen[wrong], 200, "{wrong}: {seen}");
        }
        assert_eq!(seen["worker"], 200, "{seen}");
        // 204: the device was never opened, and the client warns its author.
        assert!(seen["release"] == 200 || seen["release"] == 204, "{seen}");
        assert_eq!(seen["again"], 404, "{seen}");
        world.settled(&account, SETTLE_LIMIT)?;
        let receipts = world.ended_receipts(NAMESPACE, &account, 1)?;
        assert_eq!(receipts.len(), 1, "one lease, one receipt");
        assert_eq!(
            json!(world.charged_ms(&account)?),
            receipts[0]["spec"]["chargedMilliseconds"],
            "exactly once (invariant 3)"
        );
        Ok(())
    });
}

#[test]
fn a_grant_that_nobody_uses_is_refunded() {
    story(|world| {
        let account = world.new_account("never-allowed")?;
        let answers = world.raw(&[schedule(&world.token(&account)?, "10", "")])?;
        granted(&answers[0]);
        world.settled(&account, ALLOW_LIMIT)?;
        assert_eq!(world.charged_ms(&account)?, 0, "no GPU, no charge (invariant 4)");
        let receipts = world.ended_receipts(NAMESPACE, &account, 1)?;
        assert_eq!(receipts[0]["spec"]["phase"], "Refunded", "{}", receipts[0]);
        let page = world.page(&account)?;
        assert!(
            at(&page, "/windows").as_array().is_none_or(Vec::is_empty),
            "a window whose holds all end at 0 is dropped (L12): {page}"
        );
        Ok(())
    });
}

#[test]
fn a_visitor_who_leaves_the_queue_is_forgotten() {
    story(|world| {
        let (first, second) = (world.new_account("queue-first")?, world.new_account("queue-second")?);
        let holder = schedule(&world.token(&first)?, "20", "xlarge");
        let waiter = schedule(&world.token(&second)?, "5", "xlarge");
        let program = format!(
            r#"
import http.client, json, os, socket, time
def post(path):
    connection = http.client.HTTPConnection("127.0.0.1", 7999, timeout=60)
    connection.request("POST", path, body=b"")
    answer = connection.getresponse(); body = answer.read().decode()
    return answer.status, body
def queue_size():
    connection = http.client.HTTPConnection("127.0.0.1", 7999, timeout=10)
    connection.request("GET", "/queue-size")
    return json.loads(connection.getresponse().read())
def wait_for(size):
    end = time.monotonic() + 10
    while queue_size() != size and time.monotonic() < end:
        time.sleep(0.05)
    return queue_size()
status, body = post({holder:?})
token = json.loads(body)["allowToken"]
worker = os.fork()
if worker == 0:
    time.sleep(40); os._exit(0)
allowed = post(f"/allow?allowToken={{token}}&pid={{worker}}")[0]
queued = socket.create_connection(("127.0.0.1", 7999))
queued.sendall(("POST " + {waiter:?} + " HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n").encode())
head = queued.recv(4096).decode()
waiting = wait_for(1)
queued.close()
left = wait_for(0)
released = post(f"/release?allowToken={{token}}&fail=false")[0]
print(json.dumps({{"allowed": allowed, "head": head, "waiting": waiting, "left": left, "released": released}}))
"#
        );
        let seen = world.app(&program)?;
        assert_eq!(seen["allowed"], 200, "{seen}");
        assert!(seen["head"].as_str().unwrap_or_default().contains("text/event-stream"), "{seen}");
        assert_eq!(seen["waiting"], 1, "{seen}");
        assert_eq!(seen["left"], 0, "{seen}");
        world.settled(&first, SETTLE_LIMIT)?;
        let page = world.settled(&second, SETTLE_LIMIT)?;
        assert!(at(&page, "/windows").as_array().is_none_or(Vec::is_empty), "who left the queue pays nothing: {page}");
        Ok(())
    });
}

/// A lease of 6 s in the pod, with the program killed under it; the ledger adds up afterwards.
fn crash(world: &World, program: &str, selector: &str) -> anyhow::Result<()> {
    let account = world.space_account()?;
    let charged = world.charged_ms(&account).unwrap_or(0);
    let receipts = world.receipts(NAMESPACE, &account)?.len();
    let app = r#"
import json, os, time, spaces
@spaces.GPU(duration=8)
def work():
    open("/tmp/crash.pid", "w").write(str(os.getpid()))
    time.sleep(6)
    return "done"
if __name__ == "__main__":
    try:
        answer = work()
    except BaseException as error:
        answer = f"{type(error).__name__}: {error}"
    print(json.dumps({"answer": answer}))
"#;
    let running = world.start_app(app)?;
    eventually("the lease runs", Duration::from_secs(30), || {
        let page = world.page(&account)?;
        let receipts = world.receipts(NAMESPACE, &account)?;
        let phases: Vec<_> = receipts.iter().map(|receipt| at(receipt, "/spec/phase").clone()).collect();
        Ok(if phases.iter().any(|phase| phase == "Running") {
            Ok(())
        } else {
            Err(format!("{phases:?} {}", at(&page, "/holds")))
        })
    })?;
    let old = world.kill_program(program)?;
    let output = running.wait_with_output()?;
    println!("the app saw {}", String::from_utf8_lossy(&output.stdout).trim());
    world.program_is_back(program, old, selector, RESTART_LIMIT)?;
    world.settled(&account, Duration::from_secs(90))?;
    let after = eventually("one more ended receipt", SETTLE_LIMIT, || {
        let all = world.receipts(NAMESPACE, &account)?;
        let ended = all.iter().filter(|receipt| at(receipt, "/spec/phase") != "Running").count();
        Ok(if ended > receipts { Ok(all) } else { Err(format!("{ended} ended of {}", all.len())) })
    })?;
    assert_eq!(after.len(), receipts + 1, "settled exactly once (invariant 3)");
    let last = after.last().map(|receipt| at(receipt, "/spec/chargedMilliseconds").as_i64().unwrap_or(0)).unwrap_or(0);
    assert_eq!(world.charged_ms(&account)? - charged, last, "the account adds up");
    assert!((0..=8_000).contains(&last), "charged is bounded (invariant 5): {last}");
    Ok(())
}

#[test]
fn kill_9_of_the_operator_in_mid_lease() {
    story(|world| crash(world, "spaceport-operator", "app.kubernetes.io/name=spaceport-operator"));
}

#[test]
fn kill_9_of_the_node_agent_in_mid_lease() {
    story(|world| crash(world, "spaceport-device-plugin", "app.kubernetes.io/name=spaceport-device-plugin"));
}

#[test]
fn a_receipt_tells_every_boundary_in_order() {
    story(|world| {
        let account = world.new_account("timeline")?;
        let answer = world.call_as(&account, NAMESPACE, SPACE, "large")?;
        assert!(answer.error.is_none(), "{answer:?}");
        world.settled(&account, SETTLE_LIMIT)?;
        let receipts = world.ended_receipts(NAMESPACE, &account, 1)?;
        let name = receipts[0]["metadata"]["name"].as_str().unwrap_or_default();
        let described = world.kubectl.run(&["--namespace", NAMESPACE, "describe", "gpulease", name])?;
        let mut from = described.find("Timeline").unwrap_or(described.len());
        for boundary in
            ["Requested", "Reserved", "Assigned", "Allowed", "DeviceOpened", "Released", "GateClosed", "Settled"]
        {
            let found = described[from..].find(boundary);
            assert!(found.is_some(), "{boundary} is missing or out of order in\n{described}");
            from += found.unwrap_or(0);
        }
        Ok(())
    });
}
