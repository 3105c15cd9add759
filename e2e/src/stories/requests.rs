//! What requests of a pod may and may not do.

use anyhow::{Result, ensure};
use serde_json::json;

use super::{SETTLE_LIMIT, schedule};
use crate::kubectl::at;
use crate::story::{CALLS, NAMESPACE};
use crate::token::Token;
use crate::world::World;

/// Every malformed query and every bad token: the status that the client understands, and the ledger untouched.
///
/// # Errors
/// What was not as it must be.
pub fn malformed_requests_get_an_answer_their_client_understands_and_leave_the_ledger_alone(
    world: &World,
) -> Result<()> {
    let uid = world.story_space()?;
    let account = world.new_account("malformed")?;
    let good = Token::one_call(&account, &uid);
    let expired = Token { lifetime_s: -60, ..good.clone() }.sign(&world.kubectl)?;
    let foreign =
        Token { audience: "00000000-0000-4000-8000-000000000000".to_owned(), ..good.clone() }.sign(&world.kubectl)?;
    let unknown = Token { account: "nobody-of-that-name".to_owned(), ..good.clone() }.sign(&world.kubectl)?;
    let token = world.token(&account)?;
    let forged = format!("{}AAAA", &token[..token.len() - 4]);
    let before = at(&world.page(&account)?, "/seq").clone();
    let space_account = world.space_account()?;
    let space_before = world.page(&space_account).map(|page| at(&page, "/windows").clone()).unwrap_or_default();

    let cases: Vec<(&str, String, u64)> = vec![
        ("no query", "/schedule".to_owned(), 400),
        ("no task", "/schedule?cgroupPath=%2F&enableQueue=true&tokenVersion=2&durationSeconds=5".to_owned(), 400),
        ("negative duration", schedule(&token, "-5", ""), 429),
        ("huge duration", schedule(&token, "99999999999999999999999", ""), 429),
        ("a day less 5 s, as the client makes of -5 s", schedule(&token, "86395", ""), 429),
        ("no time at all", schedule(&token, "0", ""), 429),
        ("a word as duration", schedule(&token, "five", ""), 400),
        ("unknown size", schedule(&token, "5", "gigantic"), 429),
        ("no token of ours", schedule("not-a-token", "5", ""), 401),
        ("expired token", schedule(&expired, "5", ""), 401),
        ("token of another Space", schedule(&foreign, "5", ""), 401),
        ("token of an unknown account", schedule(&unknown, "5", ""), 401),
        ("forged token", schedule(&forged, "5", ""), 401),
        ("unknown allowToken", "/allow?allowToken=unknown&pid=1".to_owned(), 404),
        ("no allowToken", "/allow?pid=7".to_owned(), 400),
        ("release of nothing", "/release?allowToken=unknown&fail=false".to_owned(), 404),
        ("unknown path", "/nothing".to_owned(), 404),
    ];
    let paths: Vec<String> = cases.iter().map(|(_, path, _)| path.clone()).collect();
    let answers = world.raw(&paths)?;
    for ((what, _, expected), answer) in cases.iter().zip(&answers) {
        ensure!(answer["status"] == *expected, "{what} is answered {answer}, not {expected}");
    }
    let page = world.page(&account)?;
    ensure!(at(&page, "/windows").as_array().is_none_or(Vec::is_empty), "a window was opened: {page}");
    ensure!(at(&page, "/holds").as_array().is_none_or(Vec::is_empty), "something is held: {page}");
    let written = at(&page, "/seq").as_i64().unwrap_or(0) - before.as_i64().unwrap_or(0);
    ensure!(written <= 2, "refusals are coalesced (L5), not {written} writes");
    let space_after = world.page(&space_account).map(|page| at(&page, "/windows").clone()).unwrap_or_default();
    ensure!(space_before == space_after, "a bad credential is never a guest (invariant 10)");
    Ok(())
}

/// N9, N15: pids outside the pod, pid 1 and replayed tokens are refused; invariant 3.
///
/// # Errors
/// What was not as it must be.
pub fn a_worker_is_a_process_of_its_own_pod_and_its_token_is_spent_once(world: &World) -> Result<()> {
    let account = world.new_account("allow")?;
    let token = world.token(&account)?;
    let path = schedule(&token, "10", "");
    let program = format!(
        r#"{CALLS}
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
    ensure!(seen["schedule"] == 200, "{seen}");
    for wrong in ["init", "foreign", "negative", "replayed"] {
        ensure!(seen[wrong] != 200, "{wrong}: {seen}");
    }
    ensure!(seen["worker"] == 200, "{seen}");
    // 204: the device was never opened, and the client warns its author.
    ensure!(seen["release"] == 200 || seen["release"] == 204, "{seen}");
    ensure!(seen["again"] == 404, "{seen}");
    world.settled(&account, SETTLE_LIMIT)?;
    let receipts = world.ended_receipts(NAMESPACE, &account, 1)?;
    ensure!(receipts.len() == 1, "one lease, one receipt");
    ensure!(
        json!(world.charged_ms(&account)?) == receipts[0]["spec"]["chargedMilliseconds"],
        "exactly once (invariant 3)"
    );
    Ok(())
}

/// Closing the connection gives the place up, at no charge.
///
/// # Errors
/// What was not as it must be.
pub fn a_visitor_who_leaves_the_queue_is_forgotten(world: &World) -> Result<()> {
    let (first, second) = (world.new_account("queue-first")?, world.new_account("queue-second")?);
    let holder = schedule(&world.token(&first)?, "20", "xlarge");
    let waiter = schedule(&world.token(&second)?, "5", "xlarge");
    let program = format!(
        r#"{CALLS}
status, body = post({holder:?})
token = json.loads(body)["allowToken"]
worker = os.fork()
if worker == 0:
    time.sleep(40); os._exit(0)
allowed = post(f"/allow?allowToken={{token}}&pid={{worker}}")[0]
queued = queue({waiter:?})
head = queued.recv(4096).decode()
waiting = wait_for_queue(1, 10)
queued.close()
left = wait_for_queue(0, 10)
released = post(f"/release?allowToken={{token}}&fail=false")[0]
print(json.dumps({{"allowed": allowed, "head": head, "waiting": waiting, "left": left, "released": released}}))
"#
    );
    let seen = world.app(&program)?;
    ensure!(seen["allowed"] == 200, "{seen}");
    ensure!(seen["head"].as_str().unwrap_or_default().contains("text/event-stream"), "{seen}");
    ensure!(seen["waiting"] == 1, "{seen}");
    ensure!(seen["left"] == 0, "who has left still waits: {seen}");
    world.settled(&first, SETTLE_LIMIT)?;
    let page = world.settled(&second, SETTLE_LIMIT)?;
    ensure!(at(&page, "/windows").as_array().is_none_or(Vec::is_empty), "who left the queue pays nothing: {page}");
    Ok(())
}

/// The same although a worker, forked while the call waited, still has a copy of its connection: nobody reads the pings.
///
/// # Errors
/// What was not as it must be.
pub fn a_visitor_who_leaves_a_copy_of_the_connection_is_forgotten(world: &World) -> Result<()> {
    let (first, second) = (world.new_account("copy-first")?, world.new_account("copy-second")?);
    // Half of the only card for as long as its tier allows, so that a whole one is not free.
    let holder = schedule(&world.token(&first)?, "50", "large");
    let waiter = schedule(&world.token(&second)?, "5", "xlarge");
    let program = format!(
        r#"{CALLS}
status, body = post({holder:?})
token = json.loads(body)["allowToken"]
queued = queue({waiter:?})
reader = threading.Thread(target=lambda: [None for _ in iter(lambda: queued.recv(4096), b"")], daemon=True)
waiting = wait_for_queue(1, 10)
worker = os.fork()
if worker == 0:
    time.sleep(60); os._exit(0)
allowed = post(f"/allow?allowToken={{token}}&pid={{worker}}")[0]
reader.start()
# A visitor who waits and reads keeps the place for longer than one who does not.
time.sleep(8)
patient = queue_size()
# Not shutdown(): the worker's copy keeps the connection as it is. The reader's call returns with the descriptor's end.
os.dup2(os.open("/dev/null", os.O_RDONLY), queued.fileno())
left = wait_for_queue(0, 45)
alive = os.waitpid(worker, os.WNOHANG)[0] == 0
released = post(f"/release?allowToken={{token}}&fail=false")[0]
print(json.dumps({{"allowed": allowed, "waiting": waiting, "patient": patient, "left": left, "alive": alive, "released": released}}))
"#
    );
    let seen = world.app(&program)?;
    ensure!(seen["allowed"] == 200, "{seen}");
    ensure!(seen["waiting"] == 1, "{seen}");
    ensure!(seen["patient"] == 1, "who waits and reads lost the place: {seen}");
    ensure!(seen["left"] == 0, "who has left a copy of the connection still waits: {seen}");
    ensure!(seen["alive"] == true, "the worker that has the copy ended first: {seen}");
    world.settled(&first, SETTLE_LIMIT)?;
    let page = world.settled(&second, SETTLE_LIMIT)?;
    ensure!(at(&page, "/windows").as_array().is_none_or(Vec::is_empty), "who left the queue pays nothing: {page}");
    Ok(())
}
