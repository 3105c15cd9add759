//! Two operators of which one dies, and an API server that is away.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use jiff::Timestamp;
use serde_json::Value;

use super::{SETTLE_LIMIT, schedule_of_new};
use crate::component::Component;
use crate::crash_matrix::granted_again;
use crate::kubectl::at;
use crate::replicas::{Replicas, kill, leader_pid};
use crate::story::{CALLS, NAMESPACE};
use crate::wait::{eventually, wall};
use crate::world::World;

/// From the start of a program in the pod until its lease runs and its visitors wait.
const READY_LIMIT: Duration = Duration::from_secs(40);
/// Everything after it: a fail-over, three short leases, and a slow machine.
const END_LIMIT: Duration = Duration::from_secs(90);
/// From waiting to a receipt that says so: 2 s, and a slow machine.
const SHOWN_LIMIT: Duration = Duration::from_secs(15);
/// How long the API server is away: four leader leases. Whoever led has stepped down after one, and who asks after that has
/// an answer long before the end.
const OUTAGE: Duration = Duration::from_secs(8);
/// Of the outage: the leader has stepped down by then.
const STEPPED_DOWN_S: f64 = 3.0;
/// Who asks while nobody leads waits for 2 s; the rest is for a loaded machine.
const ANSWER_LIMIT_S: f64 = 4.0;

/// One of two operators leads and is killed while a whole card is in use and two visitors wait for it, which kubectl shows: the
/// lease that runs is charged what it used, and the visitors get the card in the order in which they came (L17).
///
/// # Errors
/// What was not as it must be.
pub fn those_who_wait_keep_their_place_when_the_leader_dies(world: &World) -> Result<()> {
    let replicas = Replicas::note(world)?;
    replicas.set(2)?;
    let holder = world.new_account("failover-holder")?;
    let waiting = [world.new_account("failover-first")?, world.new_account("failover-second")?];
    let paths = [
        schedule_of_new(&world.token(&holder)?, "30", "xlarge"),
        schedule_of_new(&world.token(&waiting[0])?, "5", "xlarge"),
        schedule_of_new(&world.token(&waiting[1])?, "5", "xlarge"),
    ];
    let told = format!("/tmp/failover-{holder}.json");
    world.start_detached(&format!(
        r#"{CALLS}
paths = {paths}
def say(**said):
    with open("{told}.new", "w") as file:
        file.write(json.dumps(said) + "\n")
    os.rename("{told}.new", "{told}")
def allowed(token):
    worker = os.fork()
    if worker == 0:
        time.sleep(90); os._exit(0)
    return worker, post(f"/allow?allowToken={{token}}&pid={{worker}}")[0]
status, body = post(paths[0])
held = json.loads(body)["allowToken"]
worker, allow = allowed(held)
begin = time.monotonic()
order = []
def wait(name, connection):
    text = b""
    while b"succeeded" not in text or not text.rstrip().endswith(b"}}"):
        more = connection.recv(65536)
        if not more:
            break
        text += more
    granted = re.search(r'"allowToken"\s*:\s*"([^"]+)"', text.decode())
    order.append({{"who": name, "granted": granted is not None, "at": time.time(), "said": "" if granted else text.decode()}})
    if granted:
        post(f"/release?allowToken={{granted[1]}}&fail=true")
threads = []
for name, path in (("first", paths[1]), ("second", paths[2])):
    thread = threading.Thread(target=wait, args=(name, queue(path)))
    thread.start()
    threads.append(thread)
    wait_for_queue(len(threads), 20)
say(ready=queue_size(), allow=allow)
while not os.path.exists("{told}.go"):
    time.sleep(0.02)
released = post(f"/release?allowToken={{held}}&fail=false")[0]
seconds = time.monotonic() - begin
for thread in threads:
    thread.join(80)
say(ready=2, allow=allow, released=released, seconds=seconds, order=order)
"#,
        paths = serde_json::to_string(&paths)?,
    ))?;
    let ready = world.told(&told, READY_LIMIT, |said| !said["ready"].is_null())?;
    ensure!(ready["ready"] == 2 && ready["allow"] == 200, "{ready}");

    for (place, account) in [(1, &waiting[0]), (2, &waiting[1])] {
        the_place_is_shown(world, account, place)?;
    }
    let leader = leader_pid(world)?;
    let killed_at = wall()?;
    kill(leader)?;
    world.in_pod(&["touch", &format!("{told}.go")])?;
    let said = world.told(&told, END_LIMIT, |said| !said["order"].is_null())?;
    ensure!(said["released"] == 200 || said["released"] == 204, "{said}");
    let order: Vec<_> = said["order"].as_array().into_iter().flatten().collect();
    ensure!(order.iter().all(|waited| waited["granted"] == true), "a visitor got nothing: {said}");
    let names: Vec<_> = order.iter().filter_map(|waited| waited["who"].as_str()).collect();
    ensure!(names == ["first", "second"], "the places were lost (L17): {said}");
    let again = order.first().and_then(|waited| waited["at"].as_f64()).context("nobody was granted anything")?;
    println!("the next leader granted {:.1} s after the old one was killed", again - killed_at);
    world.settled(&holder, SETTLE_LIMIT)?;
    let receipts = world.ended_receipts(NAMESPACE, &holder, 1)?;
    ensure!(receipts.len() == 1, "one lease, one receipt: {receipts:?}");
    ensure!(at(&receipts[0], "/spec/phase") == "Settled", "it ran on through the fail-over: {receipts:?}");
    // A whole card counts twice.
    charged_for(world, &holder, &receipts[0], 2.0 * said["seconds"].as_f64().unwrap_or_default())?;
    replicas.put_back()
}

/// Who waits can be seen, with the reason, the place and the latest start, as times that stay true while time passes.
fn the_place_is_shown(world: &World, account: &str, place: i64) -> Result<()> {
    let waits = format!("the receipt of {account} says that it waits at place {place}");
    let receipt = eventually(&waits, SHOWN_LIMIT, || {
        let receipts = world.receipts(NAMESPACE, account)?;
        let found = receipts.iter().find(|receipt| at(receipt, "/spec/place/position").as_i64() == Some(place));
        Ok(found.cloned().ok_or_else(|| format!("{receipts:?}")))
    })?;
    ensure!(at(&receipt, "/spec/phase") == "Queued" && at(&receipt, "/spec/place/reason") == "Node", "{receipt}");
    let time = |field: &str| -> Result<Timestamp> {
        let text = at(&receipt, &format!("/spec/place/{field}")).as_str().with_context(|| format!("no {field}"))?;
        text.parse().with_context(|| format!("{field} is no timestamp: {text}"))
    };
    let (as_of, expected, latest) = (time("asOf")?, time("expectedStart")?, time("latestStart")?);
    ensure!(as_of < expected && expected <= latest, "it begins in the past, or later than promised: {receipt}");
    let line = format!("Queued: position {place} of the node, expected ");
    let timeline = at(&receipt, "/spec/timeline").as_array();
    let is_told = timeline.into_iter().flatten().filter_map(Value::as_str).any(|told| told.contains(&line));
    ensure!(is_told, "no line of the timeline says {line:?}: {receipt}");
    let table = world.kubectl.run(&["--namespace", NAMESPACE, "get", "gpuleases"])?;
    let shown = ["Queued".to_owned(), format!("node, {}", if place == 1 { "1st" } else { "2nd" })];
    let row = table.lines().find(|line| line.contains(account) && shown.iter().all(|word| line.contains(word)));
    ensure!(row.is_some(), "`kubectl get gpuleases` does not show {shown:?} for {account}:\n{table}");
    Ok(())
}

/// The API server is away for some seconds: the lease that runs goes on and is charged what it used, and nothing is granted
/// meanwhile, because nothing could be written down; who asks waits, or is told why not.
///
/// # Errors
/// What was not as it must be.
pub fn without_an_api_server_leases_run_on_and_nothing_is_granted(world: &World) -> Result<()> {
    let (runs, asks) = (world.new_account("outage-runs")?, world.new_account("outage-asks")?);
    let running = schedule_of_new(&world.token(&runs)?, "40", "");
    let asking = schedule_of_new(&world.token(&asks)?, "2", "");
    let told = format!("/tmp/outage-{runs}.json");
    world.start_detached(&format!(
        r#"{CALLS}
def say(**said):
    with open("{told}.new", "w") as file:
        file.write(json.dumps(said) + "\n")
    os.rename("{told}.new", "{told}")
status, body = post({running:?})
token = json.loads(body)["allowToken"]
beats = "{told}.beats"
worker = os.fork()
if worker == 0:
    for beat in range(600):
        with open(beats, "a") as file:
            file.write(".")
        time.sleep(0.1)
    os._exit(0)
begin = time.monotonic()
allow = post(f"/allow?allowToken={{token}}&pid={{worker}}")[0]
say(ready=True, allow=allow)
answers = []
def ask():
    begun = time.time()
    try:
        status, body = post({asking:?})
    except (OSError, http.client.HTTPException) as error:
        status, body = 0, type(error).__name__
    granted = re.search(r'"allowToken"\s*:\s*"([^"]+)"', body)
    answers.append({{"begun": begun, "at": time.time(), "granted": granted is not None, "status": status,
                     "body": "" if granted else body[:300]}})
    if granted:
        post(f"/release?allowToken={{granted[1]}}&fail=true")
asking = []
while not os.path.exists("{told}.stop") and len(asking) < 90:
    asking.append(threading.Thread(target=ask))
    asking[-1].start()
    time.sleep(1)
for thread in asking:
    thread.join(60)
beaten = os.path.getsize(beats)
released = post(f"/release?allowToken={{token}}&fail=false")[0]
say(ready=True, allow=allow, released=released, beats=beaten, seconds=time.monotonic() - begin, answers=answers)
"#
    ))?;
    let ready = world.told(&told, READY_LIMIT, |said| said["ready"] == true)?;
    ensure!(ready["allow"] == 200, "{ready}");

    Component::ApiServer.kill()?;
    let away = wall()?;
    // What is told: an outage of this length.
    std::thread::sleep(OUTAGE);
    let back = wall()?;
    Component::start_all()?;
    granted_again(world)?;
    let again = wall()?;
    world.in_pod(&["touch", &format!("{told}.stop")])?;
    let said = world.told(&told, END_LIMIT, |said| !said["answers"].is_null())?;

    let answers: Vec<_> = said["answers"].as_array().into_iter().flatten().collect();
    let at_of = |answer: &Value| answer["at"].as_f64().unwrap_or_default();
    // A hold that was durable before may be granted after.
    let begun = |answer: &Value| answer["begun"].as_f64().unwrap_or_default();
    let meanwhile: Vec<_> = answers.iter().filter(|answer| begun(answer) > away && at_of(answer) < back).collect();
    ensure!(meanwhile.iter().all(|answer| answer["granted"] == false), "granted from memory: {said}");
    let silent = meanwhile.iter().find(|answer| answer["status"] != 503 || answer["body"] == "");
    ensure!(silent.is_none(), "who is not served is told why: {silent:?}");
    let in_time =
        |answer: &&&Value| begun(answer) > away + STEPPED_DOWN_S && at_of(answer) - begun(answer) < ANSWER_LIMIT_S;
    ensure!(meanwhile.iter().any(in_time), "nobody is told in time that nothing is granted: {said}");
    let first = answers.iter().find(|answer| at_of(answer) > back && answer["granted"] == true);
    let first = first.with_context(|| format!("nothing was granted after the outage: {said}"))?;
    println!(
        "{} answers while the API server was away for {:.1} s, then a grant {:.1} s after it was started ({:.1} s for a stranger)",
        meanwhile.len(),
        back - away,
        at_of(first) - back,
        again - back,
    );
    let (beats, seconds) = (said["beats"].as_f64().unwrap_or_default(), said["seconds"].as_f64().unwrap_or_default());
    // A tenth of a second each, and what the machine takes for itself.
    ensure!(beats >= seconds * 5.0, "the lease did not run on: {beats} beats in {seconds} s");
    ensure!(said["released"] == 200 || said["released"] == 204, "{said}");
    world.settled(&runs, SETTLE_LIMIT)?;
    let receipts = world.ended_receipts(NAMESPACE, &runs, 1)?;
    ensure!(receipts.len() == 1, "one lease, one receipt: {receipts:?}");
    charged_for(world, &runs, &receipts[0], seconds)
}

/// The only lease of the account is charged what its caller measured from `/allow` to `/release`, on page and receipt.
fn charged_for(world: &World, account: &str, receipt: &Value, seconds: f64) -> Result<()> {
    let charged = at(receipt, "/spec/chargedMilliseconds").as_i64().unwrap_or_default();
    ensure!(charged == world.charged_ms(account)?, "page and receipt differ: {receipt}");
    ensure!((charged as f64 / 1_000.0 - seconds).abs() < 2.0, "charged {charged} ms for {seconds} s of use: {receipt}");
    Ok(())
}
