//! Many short leases of all kinds at once, watched as a user watches them.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::books::{self, Told};
use crate::pod_program::{self, ADDRESS, STORM};
use crate::pool::ChangedPool;
use crate::story::{NAMESPACE, account};
use crate::table::{Table, milliseconds};
use crate::token::{Signer, Token};
use crate::world::World;

/// Callers at once. The local card has two slots, so that nearly all of them wait.
const CALLERS: usize = 20;
/// Two callers an account: writes of one page meet.
const STEADY_ACCOUNTS: usize = 10;
/// Accounts whose quota the storm uses up, with a caller each.
const HUNGRY_ACCOUNTS: usize = 2;
/// Quota of tier `demo`, of which a caller of the storm uses a few seconds.
const STEADY_QUOTA_MS: i64 = 60_000;
/// The tier of the hungry, and its quota.
const HUNGRY_TIER: &str = "storm";
const HUNGRY_QUOTA_S: i64 = 2;
/// More than a call of tier `demo` may declare, and less than its quota.
const ILLEGAL_S: u64 = 55;
/// For a thousand leases on two slots, 20 a second are few: 60 were measured on a machine with two cores.
const STORM_LIMIT: Duration = Duration::from_secs(100);
/// Beyond it: the calls under way, each behind a queue.
const OVERTIME: Duration = Duration::from_secs(20);
/// From the last release to the last receipt.
const RECEIPTS_LIMIT: Duration = Duration::from_secs(30);
/// Between two looks at the table: as often as an impatient person.
const LOOK_PAUSE: Duration = Duration::from_millis(500);
/// Looks below which nobody can say that the table was watched.
const LOOKS_MIN: u64 = 3;
/// More receipts than the storm makes: none may be removed before it is counted.
const RECEIPTS_KEPT: u32 = 100_000;
/// A visitor who leaves in the instant of the grant keeps a slot for that long.
const ALLOW_LIMIT_S: u32 = 10;

/// `kubectl get gpuaccounts` during a storm of 1,000 mixed leases; afterwards the receipts say what the pages charge, to the
/// millisecond.
///
/// # Errors
/// What was not as it must be.
pub fn a_storm_of_a_thousand_mixed_leases_adds_up(world: &World) -> Result<()> {
    storm(world, 1_000)
}

/// The same with 100: enough to see a product that is wrong on purpose.
///
/// # Errors
/// What was not as it must be.
pub fn a_gust_of_a_hundred_mixed_leases_adds_up(world: &World) -> Result<()> {
    storm(world, 100)
}

/// The plan, as the program reads it.
#[derive(Serialize)]
struct Plan<'storm> {
    address: (&'static str, u16),
    tokens: &'storm [String],
    callers: usize,
    leases: usize,
    hungry: usize,
    foreign: &'storm str,
    illegal_s: u64,
    seed: u64,
    limit_s: f64,
}

/// What it tells.
#[derive(Debug, Deserialize)]
struct Seen {
    /// Leases with a worker.
    leases: usize,
    queued: u64,
    left: u64,
    given_back: u64,
    failed: u64,
    died: u64,
    /// By HTTP status.
    refused: BTreeMap<String, u64>,
    accounts: Vec<Told>,
}

fn storm(world: &World, leases: usize) -> Result<()> {
    let space = world.story_space()?;
    let run = ulid::Ulid::generate().to_string().to_lowercase();
    let names: Vec<String> =
        (0..STEADY_ACCOUNTS + HUNGRY_ACCOUNTS).map(|number| format!("storm-{run}-{number}")).collect();
    world.kubectl.apply(&manifest(&names).to_string())?;
    let signer = Signer::read(&world.kubectl)?;
    let sign = |token: Token| signer.sign(&Token { max_calls: 1_000_000, ..token });
    let tokens: Vec<String> = names.iter().map(|name| sign(Token::one_call(name, &space))).collect::<Result<_>>()?;
    let elsewhere = "00000000-0000-4000-8000-000000000000";
    let foreign = sign(Token::one_call(&names[0], elsewhere))?;
    let plan = Plan {
        address: ADDRESS,
        tokens: &tokens,
        callers: CALLERS,
        leases: leases.div_ceil(CALLERS),
        hungry: HUNGRY_ACCOUNTS,
        foreign: &foreign,
        illegal_s: ILLEGAL_S,
        seed: 1,
        limit_s: STORM_LIMIT.as_secs_f64(),
    };
    let changes = json!({ "receipts": { "perSpace": RECEIPTS_KEPT }, "allowLimitSeconds": ALLOW_LIMIT_S });
    let pool = ChangedPool::with(world, &changes)?;
    let mut watch = Watch::of(&names);
    let seen: Seen = std::thread::scope(|scope| {
        let storm = scope.spawn(|| pod_program::run(world, STORM, &plan, STORM_LIMIT + OVERTIME));
        // Bounded by the program's own limit; a look that fails is told when the storm is over.
        while !storm.is_finished() {
            watch.look(world);
            std::thread::sleep(LOOK_PAUSE);
        }
        storm.join().map_err(|_| anyhow::anyhow!("the storm's thread died"))?.context("the storm")
    })?;
    println!(
        "{} leases with a worker; {} waited, {} left the queue, {} given back, {} failed, {} died; refused: {:?}",
        seen.leases, seen.queued, seen.left, seen.given_back, seen.failed, seen.died, seen.refused
    );
    adds_up(world, &names, &seen, &mut watch)?;
    ensure!(seen.leases >= leases, "{} leases within {} s, not {leases}", seen.leases, STORM_LIMIT.as_secs());
    check_mixture(&seen)?;
    pool.put_back()?;
    // After a failure they stay for whoever looks. The stories after this one list all receipts of the Space.
    names.iter().try_for_each(|name| remove_receipts(world, name))
}

/// The three books, and the table during the storm and after it.
fn adds_up(world: &World, names: &[String], seen: &Seen, watch: &mut Watch) -> Result<()> {
    ensure!(seen.accounts.len() == names.len(), "the storm tells of {} accounts", seen.accounts.len());
    let told: BTreeMap<String, Told> = names.iter().cloned().zip(seen.accounts.iter().cloned()).collect();
    let verdict = books::judged(world, &told, RECEIPTS_LIMIT)?;
    println!(
        "{} ms charged on the pages, {} ms on the receipts; {} leases given up at no charge",
        verdict.charged_ms, verdict.receipts_ms, verdict.given_up
    );
    let wrong = [verdict.open.as_slice(), &verdict.problems].concat().join("; ");
    ensure!(
        verdict.adds_up(),
        "the ledger does not add up: {} lost, {} doubled: {wrong}",
        verdict.lost,
        verdict.doubled
    );
    ensure!(verdict.charged_ms == verdict.receipts_ms, "the sums differ: {verdict:?}");
    watch.look(world);
    println!("{}", watch.last);
    ensure!(watch.wrong.is_empty(), "`kubectl get gpuaccounts` during the storm: {}", watch.wrong.join("; "));
    ensure!(watch.looks >= LOOKS_MIN, "the table was seen {} times only", watch.looks);
    // The column shows what the page charges.
    let shown: i64 = watch.used.values().sum();
    ensure!(
        shown == verdict.charged_ms,
        "the column USED shows {shown} ms, the pages charge {} ms",
        verdict.charged_ms
    );
    Ok(())
}

/// The storm had in it what its name says.
fn check_mixture(seen: &Seen) -> Result<()> {
    let refused = |status: &str| seen.refused.get(status).copied().unwrap_or_default();
    for (what, count) in [
        ("waited in the queue", seen.queued),
        ("left it", seen.left),
        ("were given back", seen.given_back),
        ("failed", seen.failed),
        ("lost their worker", seen.died),
        ("were refused by a limit", refused("429")),
        ("were refused for their token", refused("401")),
    ] {
        ensure!(count > 0, "no calls {what}: {seen:?}");
    }
    Ok(())
}

fn manifest(names: &[String]) -> Value {
    let tier = json!({
        "apiVersion": "spaceport.dev/v1alpha1",
        "kind": "GPUTier",
        "metadata": { "name": HUNGRY_TIER },
        "spec": {
            "callers": "SignedIn",
            "authenticatedAs": "Pro",
            "priority": "Medium",
            "gpuSecondsPerWindow": HUNGRY_QUOTA_S,
            "longestCallSeconds": 1,
            "concurrentLeases": 2,
            "extendableByGrants": "Never",
            "windowPolicy": "FirstUse24h",
        },
    });
    let (steady, hungry) = names.split_at(STEADY_ACCOUNTS);
    let accounts = steady.iter().map(|name| account(name, "demo"));
    let accounts = accounts.chain(hungry.iter().map(|name| account(name, HUNGRY_TIER)));
    let items: Vec<Value> = [tier].into_iter().chain(accounts).collect();
    json!({ "apiVersion": "v1", "kind": "List", "items": items })
}

/// In one call for all of an account's: kubectl would ask for each.
fn remove_receipts(world: &World, account: &str) -> Result<()> {
    let path = format!(
        "/apis/spaceport.dev/v1alpha1/namespaces/{NAMESPACE}/gpuleases?labelSelector=spaceport.dev%2Faccount%3D{account}"
    );
    world.kubectl.run(&["delete", "--raw", &path])?;
    Ok(())
}

/// What `kubectl get gpuaccounts` showed of some accounts, again and again.
struct Watch {
    quota_ms: BTreeMap<String, i64>,
    used: BTreeMap<String, i64>,
    looks: u64,
    /// The last table.
    last: String,
    wrong: Vec<String>,
}

impl Watch {
    fn of(names: &[String]) -> Self {
        let quota = |index| if index < STEADY_ACCOUNTS { STEADY_QUOTA_MS } else { HUNGRY_QUOTA_S * 1000 };
        Self {
            quota_ms: names.iter().enumerate().map(|(index, name)| (name.clone(), quota(index))).collect(),
            used: names.iter().map(|name| (name.clone(), 0)).collect(),
            looks: 0,
            last: String::new(),
            wrong: Vec::new(),
        }
    }

    fn look(&mut self, world: &World) {
        self.looks += 1;
        let seen = world.kubectl.run(&["get", "gpuaccounts", "--request-timeout", "10s"]);
        let judged = seen.and_then(|text| {
            self.last = text;
            self.judge()
        });
        if let Err(error) = judged {
            self.wrong.push(format!("look {}: {error:#}", self.looks));
        }
    }

    /// Every account has a row; what it used never exceeds its quota and never falls.
    fn judge(&mut self) -> Result<()> {
        let table = Table::read(&self.last)?;
        for (name, used) in &mut self.used {
            let row = table.rows.iter().find(|row| row.get("NAME") == Some(&name.as_str()));
            let row = row.with_context(|| format!("{name} has no row"))?;
            let shown = milliseconds(row.get("USED").context("there is no column USED")?)?;
            let quota = self.quota_ms.get(name).copied().unwrap_or_default();
            ensure!(shown <= quota, "{name} used {shown} ms of {quota} ms");
            ensure!(shown >= *used, "{name} used {used} ms and then {shown} ms");
            *used = shown;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod_program::tests::{device_api, here};

    /// The program itself, on a device API in miniature that never queues: who would have left gives the grant back.
    #[test]
    fn the_storm_is_mixed_and_tells_of_every_lease_that_it_was_given() {
        let (port, answered) = device_api();
        let tokens = ["a", "b", "hungry"].map(str::to_owned);
        let plan = Plan {
            address: ("127.0.0.1", port),
            tokens: &tokens,
            callers: 4,
            leases: 60,
            hungry: 1,
            foreign: "foreign",
            illegal_s: ILLEGAL_S,
            seed: 1,
            limit_s: 60.0,
        };
        let seen: Seen = here(STORM, &plan).unwrap();
        // The hungry one is granted two.
        assert_eq!(seen.leases, 4 * 60 + 2);
        let told: usize = seen.accounts.iter().map(Told::ran).sum();
        assert_eq!((told, seen.accounts[2].ran()), (seen.leases, 2));
        let free: usize = seen.accounts.iter().map(|told| told.free.len()).sum();
        assert_eq!(free as u64, seen.given_back);
        let answered = answered.lock().unwrap();
        assert_eq!(answered["/allow"], seen.leases as u64);
        assert_eq!(answered["/release"], seen.leases as u64 + seen.given_back);
        // Refused once, and five times more.
        assert!(seen.refused["429"] > 6 && seen.refused["401"] > 0, "{:?}", seen.refused);
        assert!(seen.failed > 0 && seen.died > 0, "{seen:?}");
        assert_eq!(seen.accounts.iter().map(|told| told.either.len() as u64).sum::<u64>(), seen.failed + seen.died);
        assert!(seen.accounts[0].least_ms > 0 && seen.accounts[0].least_ms <= seen.accounts[0].most_ms);
    }

    #[test]
    fn a_table_that_lies_is_noticed() {
        let name = "storm-x-0".to_owned();
        let told = |first: &str, second: &str| {
            let mut watch = Watch::of(std::slice::from_ref(&name));
            let table = |used: &str| format!("NAME        USED\nstorm-x-0   {used}\n");
            watch.last = table(first);
            watch.judge()?;
            watch.last = table(second);
            watch.judge().map(|()| watch.used[&name])
        };
        assert_eq!(told("", "18.4s").unwrap(), 18_400);
        assert_eq!(told("5s", "5s").unwrap(), 5_000);
        assert!(told("5s", "4.999s").unwrap_err().to_string().contains("used 5000 ms and then 4999 ms"));
        assert!(told("5s", "").unwrap_err().to_string().contains("and then 0 ms"));
        assert!(told("60s", "60.001s").unwrap_err().to_string().contains("60001 ms of 60000 ms"));
        let mut watch = Watch::of(&[name]);
        watch.last = "NAME   USED\nbob    1s\n".to_owned();
        assert!(watch.judge().unwrap_err().to_string().contains("has no row"));
    }

    #[test]
    fn the_accounts_are_of_the_kinds_they_say() {
        let names: Vec<String> = (0..STEADY_ACCOUNTS + HUNGRY_ACCOUNTS).map(|number| format!("s-{number}")).collect();
        let list = manifest(&names);
        let items = list["items"].as_array().unwrap();
        assert_eq!(items.len(), 1 + names.len());
        let tier: spaceport_crds::GPUTierSpec = serde_json::from_value(items[0]["spec"].clone()).unwrap();
        assert_eq!(serde_json::to_value(tier).unwrap(), items[0]["spec"]);
        let hungry = items.iter().filter(|item| item["spec"]["tier"] == HUNGRY_TIER).count();
        assert_eq!(hungry, HUNGRY_ACCOUNTS);
    }
}
