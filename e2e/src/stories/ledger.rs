//! What the pages and the receipts say afterwards.

use anyhow::{Context as _, Result, ensure};
use jiff::Timestamp;
use serde_json::Value;

use super::{SETTLE_LIMIT, granted, schedule};
use crate::demo;
use crate::kubectl::at;
use crate::story::{NAMESPACE, SPACE};
use crate::world::World;

/// The demonstration with an account of its own.
///
/// # Errors
/// What was not as it must be.
pub fn first_light(world: &World) -> Result<()> {
    let account = world.new_account("first-light")?;
    demo::run(world, &account, &mut |line| println!("{line}"))
}

/// Invariant 4: a grant whose `/allow` never comes costs nothing and is gone within 1 s of the allow limit.
///
/// # Errors
/// What was not as it must be.
pub fn a_grant_that_nobody_uses_is_refunded(world: &World) -> Result<()> {
    const ALLOW_LIMIT_S: i32 = 4;
    world.allow_limit(Some(ALLOW_LIMIT_S))?;
    let told = refunded_in_time(world, ALLOW_LIMIT_S);
    // Also for the stories after one that failed.
    world.allow_limit(None)?;
    told
}

fn refunded_in_time(world: &World, allow_limit_s: i32) -> Result<()> {
    let account = world.new_account("never-allowed")?;
    granted(&world.raw(&[schedule(&world.token(&account)?, "10", "")])?[0])?;
    world.settled(&account, SETTLE_LIMIT)?;
    let charged = world.charged_ms(&account)?;
    ensure!(charged == 0, "no GPU, no charge (invariant 4), not {charged} ms");
    let receipts = world.ended_receipts(NAMESPACE, &account, 1)?;
    ensure!(at(&receipts[0], "/spec/phase") == "Refunded", "{}", receipts[0]);
    let page = world.page(&account)?;
    ensure!(
        at(&page, "/windows").as_array().is_none_or(Vec::is_empty),
        "a window whose holds all end at 0 is dropped (L12): {page}"
    );
    // The clock of the limit begins with the answer to the client.
    let waited = crossed(&receipts[0], "settled")?.duration_since(crossed(&receipts[0], "assigned")?);
    let limit = i64::from(allow_limit_s);
    // Both boundaries are told as so many whole milliseconds ago.
    ensure!(
        (limit * 1000 - 2..=(limit + 1) * 1000).contains(&(waited.as_millis() as i64)),
        "refunded {} ms after the grant, with a limit of {limit} s and 1 s to settle (invariant 4): {}",
        waited.as_millis(),
        receipts[0]
    );
    Ok(())
}

fn crossed(receipt: &Value, boundary: &str) -> Result<Timestamp> {
    let text = at(receipt, &format!("/spec/boundaries/{boundary}"));
    let text = text.as_str().with_context(|| format!("the receipt does not say when it was {boundary}: {receipt}"))?;
    text.parse().with_context(|| format!("{boundary} is no timestamp: {text}"))
}

/// Invariant 12: one line a boundary in `kubectl describe`, in the order in which they were crossed.
///
/// # Errors
/// What was not as it must be.
pub fn a_receipt_tells_every_boundary_in_order(world: &World) -> Result<()> {
    let account = world.new_account("timeline")?;
    let answer = world.call_as(&account, NAMESPACE, SPACE, "large")?;
    ensure!(answer.error.is_none(), "{answer:?}");
    world.settled(&account, SETTLE_LIMIT)?;
    let receipts = world.ended_receipts(NAMESPACE, &account, 1)?;
    let name = receipts[0]["metadata"]["name"].as_str().unwrap_or_default();
    let described = world.kubectl.run(&["--namespace", NAMESPACE, "describe", "gpulease", name])?;
    let mut from = described.find("Timeline").unwrap_or(described.len());
    for boundary in
        ["Requested", "Reserved", "Assigned", "Allowed", "DeviceOpened", "Released", "GateClosed", "Settled"]
    {
        let found = described[from..].find(boundary);
        ensure!(found.is_some(), "{boundary} is missing or out of order in\n{described}");
        from += found.unwrap_or(0);
    }
    let columns = world.kubectl.run(&["--namespace", NAMESPACE, "get", "gpuleases"])?;
    let head: Vec<&str> = columns.lines().next().unwrap_or_default().split_whitespace().collect();
    let wanted =
        ["NAME", "SPACE", "ACCOUNT", "SIZE", "PHASE", "WAITS", "DECLARED", "USED", "CHARGED", "NODE", "GPU", "AGE"];
    ensure!(head == wanted, "the columns of `kubectl get gpuleases` are {head:?}, not {wanted:?}");
    Ok(())
}
