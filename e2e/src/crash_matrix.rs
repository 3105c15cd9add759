//! kill -9 of everyone at each place of a lease's path (`cargo xtask test crash`).
//!
//! A case: operator or agent stands still at a place, somebody is killed, whoever stood there and lives goes on. Then the
//! account must add up, the lease be settled once, its slot be free, and others get leases again.

use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::Value;

use crate::books::is_over;
use crate::breakable::Part;
use crate::component::Component;
use crate::failpoint::Failpoint;
use crate::kubectl::{at, setting};
use crate::stories::schedule_of_new;
use crate::story::{CALLS, NAMESPACE};
use crate::wait::{eventually, now};
use crate::world::World;

/// Until leases are granted again: a container is restarted, a component is started anew, a lease of a dead leader runs
/// out. What it really takes is in the table.
const RECOVERY_LIMIT: Duration = Duration::from_secs(90);
/// Until the account of the case has nothing open and a receipt for everything: the bound of L9 for a node that never says
/// another word about the lease (45 s with the declared 3 s), and what writing takes.
const SETTLE_LIMIT: Duration = Duration::from_secs(120);
/// Until the caller has its answer and its second of work is over.
const CALLER_LIMIT: Duration = Duration::from_secs(90);
/// Declared seconds of the lease; its work takes one.
const DECLARED_S: &str = "3";
/// What its work takes, and what `/allow` and `/release` may add to it on a slow machine.
const WORK_MS: std::ops::RangeInclusive<i64> = 1_000..=2_000;
/// Until nothing is under way of earlier cases: another lease at the place would be taken for that of the case.
const QUIET_LIMIT: Duration = Duration::from_secs(60);

/// The places, in the order in which a lease passes them.
const PLACES: &[(Part, &str)] = &[
    (Part::DevicePlugin, "request-not-sent"),
    (Part::Operator, "request-received"),
    (Part::Operator, "hold-decided"),
    (Part::Operator, "hold-written"),
    (Part::DevicePlugin, "order-received"),
    (Part::DevicePlugin, "grant-not-answered"),
    (Part::DevicePlugin, "worker-not-admitted"),
    (Part::DevicePlugin, "running-not-sent"),
    (Part::DevicePlugin, "end-not-sent"),
    (Part::Operator, "end-received"),
    (Part::Operator, "settle-decided"),
    (Part::Operator, "settle-written"),
    (Part::DevicePlugin, "freed-not-sent"),
    (Part::Operator, "receipt-written"),
];

/// Cases that must come out wrong when the operator breaks one thing on purpose, and what is said of them then.
const BROKEN: &[(&str, &str, Victim, &str)] = &[
    ("receipts-say-less", "end-received", Victim::Operator, "does not add up"),
    ("charge-declared", "hold-written", Victim::Kubelet, "released and is not charged for its work"),
    ("acknowledge-early", "settle-decided", Victim::ApiServer, "released and is not charged for its work"),
];

/// Who is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Operator,
    Agent,
    ApiServer,
    Kubelet,
}

/// What must come of a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expected {
    /// The caller is cut off before it is answered, and pays nothing.
    CutOff,
    /// The lease was granted and its agent died before the clock was known to run: its worker is ended at no charge.
    Unstarted,
    /// The call notices nothing, and pays for its work.
    Worked,
}

/// What came of a case.
struct Row {
    place: &'static str,
    victim: Victim,
    caller: String,
    charged_ms: i64,
    receipts: Vec<String>,
    granted_again: Duration,
    settled: Duration,
}

impl fmt::Display for Victim {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(match self {
            Self::Operator => "operator",
            Self::Agent => "agent",
            Self::ApiServer => "API server",
            Self::Kubelet => "kubelet",
        })
    }
}

impl fmt::Display for Row {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { place, victim, caller, charged_ms, receipts, granted_again, settled } = self;
        let receipts = if receipts.is_empty() { "none".to_owned() } else { receipts.join(" ") };
        write!(
            formatter,
            "| {place:19} | {victim:10} | {caller:9} | {charged_ms:>5} | {receipts:22} | {:>5.1} | {:>5.1} |",
            granted_again.as_secs_f64(),
            settled.as_secs_f64()
        )
    }
}

const HEAD: &str = "\
| stands at           | killed     | caller    | ms    | receipts               | grants again, s | settled, s |
| ------------------- | ---------- | --------- | ----: | ---------------------- | ----: | ----: |";

impl Victim {
    const ALL: [Self; 4] = [Self::Operator, Self::Agent, Self::ApiServer, Self::Kubelet];

    /// Whoever dies, what a lease has used is known and nobody is sent away, with one exception: connections of the pod are
    /// the agent's, and what it has not written down it does not know.
    fn expects(self, place: &str) -> Expected {
        let number = |place: &str| PLACES.iter().position(|(_, known)| *known == place);
        match self {
            Self::Agent if number(place) <= number("grant-not-answered") => Expected::CutOff,
            Self::Agent if number(place) <= number("running-not-sent") => Expected::Unstarted,
            _ => Expected::Worked,
        }
    }

    fn is(self, part: Part) -> bool {
        matches!((self, part), (Self::Operator, Part::Operator) | (Self::Agent, Part::DevicePlugin))
    }

    fn kill(self, world: &World) -> Result<()> {
        match self {
            Self::Operator => world.kill_program(Part::Operator.program()).map(drop),
            Self::Agent => world.kill_program(Part::DevicePlugin.program()).map(drop),
            Self::ApiServer => Component::ApiServer.kill(),
            Self::Kubelet => Component::Kubelet.kill(),
        }
    }

    /// Starts what nothing else starts again: on a host, its service manager does.
    fn start_again(self) -> Result<()> {
        match self {
            // kubelet does.
            Self::Operator | Self::Agent => Ok(()),
            Self::ApiServer | Self::Kubelet => Component::start_all(),
        }
    }
}

/// Tells every case, on builds for tests of operator and agent, and prints the table. `SPACEPORT_CRASH_ONLY` is a
/// part of a place's name, to look at some of them again.
///
/// # Errors
/// The cases in which something was not as it must be; the others are in the table all the same.
pub fn tell(world: &World) -> Result<()> {
    let only = setting("SPACEPORT_CRASH_ONLY")?;
    let operator = Part::Operator.replace(world)?;
    let agent = Part::DevicePlugin.replace(world)?;
    operator.for_tests()?;
    agent.for_tests()?;
    let left_before = left_before(world)?;
    let (mut rows, mut wrong) = (Vec::new(), Vec::new());
    for (part, place) in PLACES.iter().filter(|(_, place)| place.contains(&only)) {
        for victim in Victim::ALL {
            match case(world, &left_before, *part, place, victim) {
                Ok(row) => {
                    println!("{row}");
                    rows.push(row);
                }
                Err(error) => {
                    println!("{place}, {victim} killed: {error:#}");
                    wrong.push(format!("{place}, {victim} killed: {error:#}\n{}", world.evidence()));
                    // The next case begins with a world that works.
                    victim.start_again()?;
                    granted_again(world)?;
                }
            }
        }
    }
    agent.put_back()?;
    operator.put_back()?;
    println!("\n{HEAD}");
    rows.iter().for_each(|row| println!("{row}"));
    ensure!(wrong.is_empty(), "{} of {} cases are wrong:\n{}", wrong.len(), wrong.len() + rows.len(), wrong.join("\n"));
    ensure!(!rows.is_empty(), "no place has {only:?} in its name");
    Ok(())
}

/// Tells some cases on operators that are broken on purpose, each of which must be seen.
///
/// # Errors
/// The faults that were not.
pub fn tell_broken(world: &World) -> Result<()> {
    let operator = Part::Operator.replace(world)?;
    let left_before = left_before(world)?;
    let mut missed = Vec::new();
    for (fault, place, victim, complaint) in BROKEN {
        operator.with(fault)?;
        match case(world, &left_before, Part::Operator, place, *victim) {
            Ok(row) => missed.push(format!("{fault}: nothing is wrong with\n{row}")),
            Err(error) if format!("{error:#}").contains(complaint) => println!("{fault} is seen: {complaint}"),
            Err(error) => missed.push(format!("{fault}: expected {complaint:?}, not: {error:#}")),
        }
        victim.start_again()?;
    }
    operator.put_back()?;
    ensure!(missed.is_empty(), "{}\n{}", missed.join("\n"), world.evidence());
    Ok(())
}

fn case(world: &World, left_before: &BTreeSet<String>, part: Part, place: &'static str, victim: Victim) -> Result<Row> {
    let account = world.new_account("crash")?;
    quiet(world, left_before)?;
    let point = Failpoint::want(world, part, place)?;
    let told = format!("/tmp/{account}.json");
    start_caller(world, &account, &told)?;
    if let Err(error) = point.reached() {
        point.let_go();
        return Err(error);
    }
    let killed = now();
    victim.kill(world)?;
    if !victim.is(part) {
        point.let_go();
    }
    victim.start_again()?;
    granted_again(world)?;
    let granted_again = now().duration_since(killed);
    let said = world.told(&told, CALLER_LIMIT, |said| !said["granted"].is_null())?;
    let (charged_ms, receipts) = adds_up(world, &account)?;
    let settled = now().duration_since(killed);
    judge(victim.expects(place), &said, charged_ms, &receipts)?;
    whole_card_is_free(world)?;
    let caller = match (&said["granted"], &said["status"]) {
        (Value::Bool(true), _) => "granted".to_owned(),
        // The agent died before it answered.
        (_, status) if status == 0 => "cut off".to_owned(),
        (_, status) => format!("told {status}"),
    };
    Ok(Row { place, victim, caller, charged_ms, receipts, granted_again, settled })
}

fn judge(expected: Expected, said: &Value, charged_ms: i64, receipts: &[String]) -> Result<()> {
    let settled = receipts.iter().filter(|phase| *phase == "Settled").count();
    let told = || format!("{charged_ms} ms, {receipts:?}, {said}");
    match expected {
        Expected::CutOff => {
            ensure!(said["granted"] == false && said["status"] == 0, "the caller was to be cut off: {}", told());
            ensure!(charged_ms == 0, "who was cut off pays: {}", told());
        }
        Expected::Unstarted => {
            ensure!(said["granted"] == true && !receipts.is_empty(), "it was granted and left nothing: {}", told());
            ensure!(charged_ms == 0 && settled == 0, "a lease that is not known to have run is charged: {}", told());
        }
        Expected::Worked => {
            ensure!(said["granted"] == true && said["allow"] == 200, "the call was not served: {}", told());
            ensure!(said["release"] == 200 || said["release"] == 204, "its release was refused: {}", told());
            ensure!(
                WORK_MS.contains(&charged_ms),
                "the lease was released and is not charged for its work: {}",
                told()
            );
            ensure!(settled == 1, "one lease of the call was used, and is settled: {}", told());
        }
    }
    Ok(())
}

/// A caller that behaves as the client does: a worker asks to be allowed, works a second, the parent releases; the worker
/// lives on, to be used again. It survives an agent that is gone.
fn start_caller(world: &World, account: &str, told: &str) -> Result<()> {
    let path = schedule_of_new(&world.token(account)?, DECLARED_S, "");
    world.start_detached(&format!(
        r#"{CALLS}
def tried(path):
    try:
        return post(path)
    except OSError as error:
        return 0, type(error).__name__
    except http.client.HTTPException as error:
        return 0, type(error).__name__
status, body = tried({path:?})
token = re.search(r'"allowToken"\s*:\s*"([^"]+)"', body) if status == 200 else None
said = {{"granted": token is not None, "status": status}}
if token:
    ready, tell = os.pipe()
    worker = os.fork()
    if worker == 0:
        status, _ = tried(f"/allow?allowToken={{token[1]}}&pid={{os.getpid()}}")
        time.sleep(1)
        os.write(tell, str(status).encode())
        time.sleep(30)
        os._exit(0)
    os.close(tell)
    # Empty if the worker was ended.
    said["allow"] = int(os.read(ready, 16) or 0)
    said["release"], _ = tried(f"/release?allowToken={{token[1]}}&fail=false")
with open("{told}.new", "w") as file:
    file.write(json.dumps(said) + "\n")
os.rename("{told}.new", "{told}")
"#
    ))
}

/// Waits until a stranger gets a lease.
pub(crate) fn granted_again(world: &World) -> Result<()> {
    let end = now() + RECOVERY_LIMIT;
    loop {
        match world.new_account("probe").and_then(|account| probe(world, &account, "")) {
            Ok(()) => return Ok(()),
            Err(error) if now() >= end => {
                return Err(error.context(format!("no lease within {} s", RECOVERY_LIMIT.as_secs())));
            }
            // Without API server or kubelet there is not even a way into the pod.
            Err(_) => std::thread::sleep(Duration::from_millis(100)),
        }
    }
}

/// The rows of a list on all pages.
fn rows(world: &World, list: &str) -> Result<Vec<Value>> {
    let pages = world.kubectl.items(&["get", "gpuaccounts"])?;
    let of_page = |page: &Value| at(page, list).as_array().cloned().unwrap_or_default();
    Ok(pages.iter().flat_map(of_page).collect())
}

/// Leases whose receipts are not whole and were not before the first case: some faults of other tests leave such as can never
/// be written.
fn left_before(world: &World) -> Result<BTreeSet<String>> {
    let closed = rows(world, "/status/closed")?;
    Ok(closed.iter().filter_map(|row| at(row, "/lease").as_str()).map(str::to_owned).collect())
}

/// Waits until every lease but those is settled, has its whole receipt, and has given its slot back.
fn quiet(world: &World, left_before: &BTreeSet<String>) -> Result<()> {
    eventually("nothing is under way of earlier cases", QUIET_LIMIT, || {
        let receipts = world.kubectl.items(&["--namespace", NAMESPACE, "get", "gpuleases"])?;
        let holds = rows(world, "/status/holds")?.len();
        let is_old = |row: &Value| at(row, "/lease").as_str().is_some_and(|lease| left_before.contains(lease));
        let is_told = |row: &Value| {
            let mut own = receipts.iter().filter(|receipt| at(receipt, "/spec/lease") == at(row, "/lease"));
            let has = |receipt: &Value, boundary| !at(receipt, &format!("/spec/boundaries/{boundary}")).is_null();
            own.any(|receipt| is_over(receipt) && (has(receipt, "freed") || !has(receipt, "assigned")))
        };
        let closed = rows(world, "/status/closed")?;
        let closed = closed.iter().filter(|row| !is_old(row) && !is_told(row)).count();
        let done = holds == 0 && closed == 0;
        Ok(if done { Ok(()) } else { Err(format!("{holds} holds, {closed} leases without their whole receipt")) })
    })
}

/// The slot of the case is free, and so is the other one.
fn whole_card_is_free(world: &World) -> Result<()> {
    let account = world.new_account("whole")?;
    eventually("a whole card is granted", RECOVERY_LIMIT, || {
        Ok(probe(world, &account, "xlarge").map_err(|error| format!("{error:#}")))
    })
}

fn probe(world: &World, account: &str, size: &str) -> Result<()> {
    let path = schedule_of_new(&world.token(account)?, "1", size);
    let seen = world.app(&format!(
        r#"{CALLS}
status, body = post({path:?})
token = re.search(r'"allowToken"\s*:\s*"([^"]+)"', body) if status == 200 else None
if token:
    post(f"/release?allowToken={{token[1]}}&fail=true")
print(json.dumps({{"granted": token is not None, "status": status, "body": body if token is None else ""}}))
"#
    ))?;
    ensure!(seen["granted"] == true, "{seen}");
    Ok(())
}

/// Waits until nothing of the account is open, then adds up: charges on the page and on the receipts, one receipt for each
/// lease, nothing above what was declared. Gives the charge and the phases of the receipts.
fn adds_up(world: &World, account: &str) -> Result<(i64, Vec<String>)> {
    let receipts = eventually(&format!("everything of {account} is settled"), SETTLE_LIMIT, || {
        let page = world.page(account)?;
        let holds = at(&page, "/holds").as_array().map_or(0, Vec::len);
        let receipts = world.receipts(NAMESPACE, account)?;
        // Rows whose receipt is written leave the outbox with a later write.
        let unwritten = |row: &&Value| {
            !receipts.iter().any(|receipt| is_over(receipt) && at(receipt, "/spec/lease") == at(row, "/lease"))
        };
        let closed = at(&page, "/closed").as_array().into_iter().flatten().filter(unwritten).count();
        let open = receipts.iter().filter(|receipt| !is_over(receipt)).count();
        let done = holds == 0 && closed == 0 && open == 0;
        let seen = format!("{holds} holds, {closed} without a receipt, {open} open receipts");
        Ok(if done { Ok(receipts) } else { Err(seen) })
    })?;
    let charged = world.charged_ms(account)?;
    let sum: i64 = receipts.iter().map(|receipt| at(receipt, "/spec/chargedMilliseconds").as_i64().unwrap_or(0)).sum();
    ensure!(
        charged == sum,
        "the account does not add up: {charged} ms on the page, {sum} ms on {} receipts",
        receipts.len()
    );
    let phases: Vec<String> =
        receipts.iter().map(|receipt| at(receipt, "/spec/phase").as_str().unwrap_or_default().to_owned()).collect();
    // A lease that was given up before it began, and its successor, may both be there; paid for is one.
    let paid = receipts.iter().filter(|receipt| at(receipt, "/spec/chargedMilliseconds").as_i64() > Some(0)).count();
    ensure!(paid <= 1, "one call is paid for once (invariant 3): {phases:?}");
    Ok((charged, phases))
}
