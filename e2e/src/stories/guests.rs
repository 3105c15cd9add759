//! Visitors who are not signed in.

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::{SETTLE_LIMIT, schedule_of_new};
use crate::kubectl::at;
use crate::story::{CALLS, NAMESPACE};
use crate::token::Token;
use crate::wait::eventually;
use crate::world::World;

/// Two visitors of one address prefix share its page, and each has a row of the own limits: what one holds is not in the way
/// of the other, and a refusal says whose limit it was.
///
/// # Errors
/// What was not as it must be.
pub fn visitors_of_one_network_have_rows_of_their_own(world: &World) -> Result<()> {
    let space = world.story_space()?;
    let page = format!("guest-{}", ulid::Ulid::generate().to_string().to_lowercase());
    let schedule = |visitor: &str, seconds: &str| -> Result<String> {
        let token = Token { max_calls: 100, ..Token::one_call_of_guest(&page, visitor, &space) };
        Ok(schedule_of_new(&token.sign(&world.kubectl)?, seconds, ""))
    };
    // As long as a guest's call may be: of the 120 s of a visitor one such fits beside what is used, and not two.
    let (first, second, third) = (schedule("one", "60")?, schedule("one", "60")?, schedule("one", "60")?);
    let (too_long, others) = (schedule("one", "61")?, schedule("two", "60")?);
    let seen = world.app(&format!(
        r#"{CALLS}
def scheduled(path):
    connection = http.client.HTTPConnection("127.0.0.1", 7999, timeout=60)
    connection.request("POST", path, body=b"")
    answer = connection.getresponse()
    found = re.search(r'"allowToken"\s*:\s*"([^"]+)"', answer.read().decode())
    return answer.status, found[1] if found else None, answer.getheader("X-Authenticated")
seen = {{}}
seen["first"], token, seen["class"] = scheduled({first:?})
worker = os.fork()
if worker == 0:
    time.sleep(30); os._exit(0)
seen["allow"], _ = post(f"/allow?allowToken={{token}}&pid={{worker}}")
time.sleep(1)
seen["release"], _ = post(f"/release?allowToken={{token}}&fail=false")
seen["tooLong"], _, _ = scheduled({too_long:?})
seen["second"], held, _ = scheduled({second:?})
seen["third"], _, _ = scheduled({third:?})
seen["others"], theirs, _ = scheduled({others:?})
for token in (held, theirs):
    if token:
        post(f"/release?allowToken={{token}}&fail=true")
print(json.dumps(seen))
"#
    ))?;
    ensure!(seen["first"] == 200 && seen["allow"] == 200, "a visitor gets a lease: {seen}");
    ensure!(seen["class"].is_null(), "to the client a visitor is nobody: {seen}");
    ensure!(seen["release"] == 200 || seen["release"] == 204, "{seen}");
    ensure!(seen["tooLong"] == 429, "61 s are more than a guest may declare: {seen}");
    ensure!(seen["second"] == 200, "60 s of the other 119 are there: {seen}");
    ensure!(seen["third"] == 429, "60 s more are not: {seen}");
    ensure!(seen["others"] == 200, "what one visitor holds is in the way of another: {seen}");

    let status = eventually("the page says who was refused what", SETTLE_LIMIT, || {
        let status = world.settled(&page, SETTLE_LIMIT)?;
        let denial = at(&status, "/lastDenial");
        let is_told = denial["kind"] == "PendingOverquota" && denial["limiter"] == "Cookie";
        Ok(if is_told { Ok(status) } else { Err(denial.to_string()) })
    })?;
    ensure!(at(&status, "/tier") == "guest" && at(&status, "/guests") == 1, "{status}");
    let rows = at(&status, "/cookies").as_array().context("the page has no rows of visitors")?;
    let [row] = &rows[..] else { anyhow::bail!("one visitor used something, and has a row: {status}") };
    let charged = |value: &Value| value["chargedMilliseconds"].as_i64().unwrap_or_default();
    ensure!(row["cookie"] == "one" && (1_000..=60_000).contains(&charged(row)), "{status}");
    ensure!(charged(row) == world.charged_ms(&page)?, "row and page differ: {status}");
    let receipts = world.ended_receipts(NAMESPACE, &page, 3)?;
    let on_receipts: i64 = receipts.iter().map(|receipt| charged(at(receipt, "/spec"))).sum();
    ensure!(on_receipts == charged(row), "row and receipts differ: {receipts:?}");
    Ok(())
}
