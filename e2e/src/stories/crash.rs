//! kill -9 in the middle of a lease: the ledger adds up afterwards.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::SETTLE_LIMIT;
use crate::books::is_over;
use crate::kubectl::at;
use crate::story::NAMESPACE;
use crate::wait::eventually;
use crate::world::World;

/// Restart of a container, leader election included.
const RESTART_LIMIT: Duration = Duration::from_secs(120);
/// A new leader waits for what is left of the old one's lease, a new agent for its broker.
const SETTLE_AFTER_CRASH_LIMIT: Duration = Duration::from_secs(90);

/// The operator is killed.
///
/// # Errors
/// What was not as it must be.
pub fn kill_9_of_the_operator_in_mid_lease(world: &World) -> Result<()> {
    crash(world, "spaceport-operator", "app.kubernetes.io/name=spaceport-operator")
}

/// The node agent is killed.
///
/// # Errors
/// What was not as it must be.
pub fn kill_9_of_the_node_agent_in_mid_lease(world: &World) -> Result<()> {
    crash(world, "spaceport-device-plugin", "app.kubernetes.io/name=spaceport-device-plugin")
}

/// A lease of 10 s in the pod, with the program killed under it: the app gets its result, and pays for what it used.
fn crash(world: &World, program: &str, selector: &str) -> Result<()> {
    let account = world.space_account()?;
    let charged = world.charged_ms(&account).unwrap_or(0);
    let receipts = world.receipts(NAMESPACE, &account)?.len();
    let app = r#"
import json, os, time, spaces
@spaces.GPU(duration=15)
def work():
    open("/tmp/crash.pid", "w").write(str(os.getpid()))
    time.sleep(10)
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
    let saw = String::from_utf8_lossy(&output.stdout);
    ensure!(saw.contains(r#"{"answer": "done"}"#), "the app lost its result: {} {saw}", output.status);
    world.program_is_back(program, old, selector, RESTART_LIMIT)?;
    world.settled(&account, SETTLE_AFTER_CRASH_LIMIT)?;
    let after = eventually("one more ended receipt", SETTLE_LIMIT, || {
        let all = world.receipts(NAMESPACE, &account)?;
        let ended = all.iter().filter(|receipt| is_over(receipt)).count();
        Ok(if ended > receipts { Ok(all) } else { Err(format!("{ended} ended of {}", all.len())) })
    })?;
    ensure!(after.len() == receipts + 1, "settled exactly once (invariant 3): {after:?}");
    let last = after.last().map(|receipt| at(receipt, "/spec/chargedMilliseconds").as_i64().unwrap_or(0)).unwrap_or(0);
    let difference = world.charged_ms(&account)? - charged;
    ensure!(
        difference == last,
        "the account does not add up: {difference} ms more on the page, {last} ms on the receipt"
    );
    ensure!((10_000..=15_000).contains(&last), "it ran on and pays for what it used (N19, invariant 5): {last} ms");
    Ok(())
}
