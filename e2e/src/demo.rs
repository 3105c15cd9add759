//! The demonstration: three calls as bob, and whether the ledger tells the truth about them.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::call::Answer;
use crate::kubectl::at;
use crate::world::World;

const NAMESPACE: &str = "demo";
const SPACE: &str = "hello-zero";
/// Invariant 4 gives a second; the rest is for this machine's load.
const SETTLE_LIMIT: Duration = Duration::from_secs(20);

/// Tells the story with a fresh account of tier `demo`, and checks it; `say` shows each step.
pub fn run(world: &World, account: &str, say: &mut dyn FnMut(&str)) -> Result<()> {
    say("applying examples/");
    world.apply_examples()?;
    say("waiting for Space demo/hello-zero (its first start installs gradio and spaces)");
    world.running(NAMESPACE, SPACE, |seen| say(&format!("  {seen}")))?;

    let before = world.charged_ms(account)?;
    ensure!(
        before == 0,
        "account {account} is already charged {before} ms: begin from nothing with `cargo xtask down`"
    );
    let receipts_before = world.receipts(NAMESPACE, account)?.len();
    for function in ["large", "xlarge"] {
        say(&format!("calling {function} as {account}"));
        let answer = world.call_as(account, NAMESPACE, SPACE, function)?;
        show(&answer, say);
        ensure!(answer.error.is_none(), "{function} was expected to work");
    }
    world.settled(account, SETTLE_LIMIT)?;
    let receipts = world.ended_receipts(NAMESPACE, account, receipts_before + 2)?;
    let receipts = &receipts[receipts_before..];
    check_charges(world, account, receipts)?;

    say(&format!("calling long as {account}: 50 s do not fit what is left"));
    let answer = world.call_as(account, NAMESPACE, SPACE, "long")?;
    show(&answer, say);
    check_refusal(world, account, &answer)?;

    say("");
    say(&world.kubectl.run(&["get", "spaces,gpuleases,gpuaccounts,gpunodes", "--all-namespaces"])?);
    let name = at(&receipts[0], "/metadata/name").as_str().context("a receipt has no name")?;
    say(&world.kubectl.run(&["--namespace", NAMESPACE, "describe", "gpulease", name])?);
    Ok(())
}

fn show(answer: &Answer, say: &mut dyn FnMut(&str)) {
    match &answer.error {
        None => say(&format!("  answered after {:.1} s: {}", answer.seconds, answer.result)),
        Some(error) => say(&format!(
            "  failed after {:.1} s: {}: {}",
            answer.seconds,
            error.title.as_deref().unwrap_or(&error.class),
            error.message
        )),
    }
}

/// Invariant 5 on the receipts, and their sum on the account, to the millisecond.
fn check_charges(world: &World, account: &str, receipts: &[Value]) -> Result<()> {
    let mut sum = 0;
    for (receipt, (size, weight)) in receipts.iter().zip([("large", 1), ("xlarge", 2)]) {
        let number = |field: &str| {
            at(receipt, &format!("/spec/{field}"))
                .as_i64()
                .with_context(|| format!("receipt without {field}: {receipt}"))
        };
        let (used, charged, declared) =
            (number("usedMilliseconds")?, number("chargedMilliseconds")?, number("declaredMilliseconds")?);
        ensure!(at(receipt, "/spec/size") == size, "expected the receipt of {size}: {receipt}");
        ensure!(at(receipt, "/spec/phase") == "Settled", "the lease of {size} is not settled: {receipt}");
        ensure!((4_900..=declared).contains(&used), "{size} works 5 s, its receipt says {used} ms of {declared} ms");
        ensure!(charged == weight * used, "{size} used {used} ms and is charged {charged} ms, not {weight} x");
        sum += charged;
    }
    let charged = world.charged_ms(account)?;
    ensure!(charged == sum, "the account is charged {charged} ms, its two receipts say {sum} ms");
    Ok(())
}

/// The refusal as the client shows it, on the page with its numbers, and at no charge.
fn check_refusal(world: &World, account: &str, answer: &Answer) -> Result<()> {
    let error = answer.error.as_ref().context("long was granted although it does not fit")?;
    ensure!(
        error.title.as_deref() == Some("ZeroGPU quota exceeded"),
        "long was refused, but not for its quota: {error:?}"
    );
    let charged = world.charged_ms(account)?;
    let page = crate::wait::eventually("the page shows the refusal", SETTLE_LIMIT, || {
        let page = world.page(account)?;
        Ok(if at(&page, "/lastDenial/kind") == "QuotaExceeded" {
            Ok(page)
        } else {
            Err(at(&page, "/lastDenial").to_string())
        })
    })?;
    let denial = at(&page, "/lastDenial");
    ensure!(denial["neededMilliseconds"] == 50_000, "needed 50 s: {denial}");
    ensure!(denial["leftMilliseconds"] == 60_000 - charged, "left is 60 s minus {charged} ms: {denial}");
    ensure!(denial["resetsAt"].is_string(), "the denial says when the next seconds come: {denial}");
    ensure!(at(&page, "/holds").as_array().is_none_or(Vec::is_empty), "a refusal holds nothing: {page}");
    ensure!(world.charged_ms(account)? == charged, "a refusal costs nothing");
    Ok(())
}
