//! What only a real API server can show: the admission policies of the chart say no, with a message that helps.
#![cfg(feature = "cluster")]
#![allow(clippy::unwrap_used, clippy::panic)] // A test fails by panicking, its helpers too.

use std::process::Output;
use std::time::Duration;

use serde_json::{Value, json};
use spaceport_e2e::{World, at, eventually};

const OPERATOR: &str = "system:serviceaccount:spaceport-system:spaceport-operator";

/// Gives this object to kubectl as a file.
fn with_file(world: &World, arguments: &[&str], object: &Value) -> Output {
    let name = object["metadata"]["name"].as_str().unwrap();
    let file = std::env::temp_dir().join(format!("spaceport-api-{}-{name}.json", std::process::id()));
    std::fs::write(&file, object.to_string()).unwrap();
    let output = world.kubectl.output(&[arguments, &["--filename", file.to_str().unwrap()]].concat()).unwrap();
    std::fs::remove_file(&file).unwrap();
    output
}

/// What the API server said when it refused the object.
fn refusal(world: &World, arguments: &[&str], object: &Value) -> String {
    let output = with_file(world, arguments, object);
    assert!(!output.status.success(), "taken: kubectl {} of {object}", arguments.join(" "));
    String::from_utf8(output.stderr).unwrap()
}

fn account(name: &str) -> Value {
    json!({
        "apiVersion": "spaceport.dev/v1alpha1",
        "kind": "GPUAccount",
        "metadata": { "name": name },
        "spec": { "identities": [{ "issuer": "https://issuer.example.com", "subject": format!("{name}@example.com") }], "tier": "api" },
    })
}

/// Without a tier the operator would say on the page that the account gets nothing, and be faster than the test.
fn tier() -> Value {
    json!({
        "apiVersion": "spaceport.dev/v1alpha1",
        "kind": "GPUTier",
        "metadata": { "name": "api" },
        "spec": {
            "callers": "SignedIn", "authenticatedAs": "Regular", "priority": "Medium", "gpuSecondsPerWindow": 60,
            "longestCallSeconds": 50, "concurrentLeases": 2, "extendableByGrants": "Never", "windowPolicy": "FirstUse24h",
        },
    })
}

const FINALIZER: &str = "spaceport.dev/ledger";
/// The operator puts its finalizer on an account within milliseconds; after a change of the leader within a minute.
const OPERATOR_LIMIT: Duration = Duration::from_secs(90);

/// Makes an account and waits until the operator keeps it: only then its revision stands still.
fn make_account(world: &World, name: &str) {
    world.kubectl.apply(&tier().to_string()).unwrap();
    world.kubectl.apply(&account(name).to_string()).unwrap();
    eventually("the operator keeps the account", OPERATOR_LIMIT, || {
        let found = world.kubectl.json(&["get", "gpuaccount", name])?;
        let finalizers = at(&found, "/metadata/finalizers");
        let kept = finalizers.as_array().is_some_and(|list| list.iter().any(|finalizer| finalizer == FINALIZER));
        Ok(if kept { Ok(()) } else { Err(finalizers.to_string()) })
    })
    .unwrap();
}

/// Writes a page as the operator does, by PUT of the status at the revision that is there.
fn write_page(world: &World, name: &str, user: Option<&str>, status: &Value) -> Result<(), String> {
    let mut object = world.kubectl.json(&["get", "gpuaccount", name]).unwrap();
    object["status"] = status.clone();
    let mut arguments = vec!["replace", "--subresource", "status"];
    if let Some(user) = user {
        arguments.extend(["--as", user]);
    }
    let output = with_file(world, &arguments, &object);
    if output.status.success() { Ok(()) } else { Err(String::from_utf8(output.stderr).unwrap()) }
}

#[test]
fn a_ledger_page_is_written_by_the_operator_alone_and_one_step_at_a_time() {
    let world = World::connect().unwrap();
    let name = "api-page";
    world.kubectl.run(&["delete", "gpuaccount", name, "--ignore-not-found"]).unwrap();
    make_account(&world, name);

    let page = |seq: u64, epoch: u64| json!({ "seq": seq, "epoch": epoch, "writeId": format!("write-{seq}"), "lastTimeMilliseconds": 1 });
    let said = write_page(&world, name, None, &page(1, 1)).unwrap_err();
    assert!(said.contains("only the operator writes it"), "{said}");
    let said = write_page(&world, name, Some("system:serviceaccount:default:somebody"), &page(1, 1)).unwrap_err();
    assert!(said.contains("orbidden"), "{said}");

    write_page(&world, name, Some(OPERATOR), &page(1, 7)).unwrap();
    let said = write_page(&world, name, Some(OPERATOR), &page(3, 7)).unwrap_err();
    assert!(said.contains("seq of a ledger page goes up by one"), "{said}");
    let said = write_page(&world, name, Some(OPERATOR), &page(1, 7)).unwrap_err();
    assert!(said.contains("seq of a ledger page goes up by one"), "{said}");
    let said = write_page(&world, name, Some(OPERATOR), &page(2, 6)).unwrap_err();
    assert!(said.contains("epoch"), "an epoch never falls (L5): {said}");
    write_page(&world, name, Some(OPERATOR), &page(2, 8)).unwrap();
    world.kubectl.run(&["delete", "gpuaccount", name]).unwrap();
}

#[test]
fn charges_within_a_window_never_fall() {
    let world = World::connect().unwrap();
    let name = "api-window";
    world.kubectl.run(&["annotate", "gpuaccount", name, "spaceport.dev/break-glass=test"]).ok();
    world.kubectl.run(&["delete", "gpuaccount", name, "--ignore-not-found"]).unwrap();
    make_account(&world, name);
    let page = |seq: u64, charged: u64| {
        json!({
            "seq": seq, "epoch": 1, "writeId": format!("write-{seq}"), "lastTimeMilliseconds": 1000,
            "windows": [{ "startMilliseconds": 1000, "baseMilliseconds": 60000, "chargedMilliseconds": charged, "runs": 1, "generation": 1 }],
        })
    };
    write_page(&world, name, Some(OPERATOR), &page(1, 500)).unwrap();
    let said = write_page(&world, name, Some(OPERATOR), &page(2, 400)).unwrap_err();
    assert!(said.contains("charged"), "{said}");
    write_page(&world, name, Some(OPERATOR), &page(2, 600)).unwrap();

    // An open window is quota that was used; deleting the account would give it back.
    let output = world.kubectl.output(&["delete", "gpuaccount", name]).unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && said.contains("open window"), "{said}");
    world.kubectl.run(&["annotate", "gpuaccount", name, "spaceport.dev/break-glass=test"]).unwrap();
    world.kubectl.run(&["delete", "gpuaccount", name]).unwrap();
}

#[test]
fn charges_of_a_visitor_never_fall_and_its_row_stays_for_its_day() {
    let world = World::connect().unwrap();
    let name = "guest-api";
    world.kubectl.run(&["annotate", "gpuaccount", name, "spaceport.dev/break-glass=test"]).ok();
    world.kubectl.run(&["delete", "gpuaccount", name, "--ignore-not-found"]).unwrap();
    make_account(&world, name);
    let row = |cookie: &str, charged: u64| json!({ "cookie": cookie, "startMilliseconds": 1000, "baseMilliseconds": 60000, "chargedMilliseconds": charged, "runs": 1 });
    let page = |seq: u64, time: u64, rows: Vec<Value>| json!({ "seq": seq, "epoch": 1, "writeId": format!("write-{seq}"), "lastTimeMilliseconds": time, "cookies": rows });
    write_page(&world, name, Some(OPERATOR), &page(1, 1000, vec![row("a", 500), row("b", 500)])).unwrap();
    let said =
        write_page(&world, name, Some(OPERATOR), &page(2, 1000, vec![row("a", 400), row("b", 600)])).unwrap_err();
    assert!(said.contains("charged to a cookie"), "{said}");
    let said = write_page(&world, name, Some(OPERATOR), &page(2, 1000, vec![row("a", 500)])).unwrap_err();
    assert!(said.contains("row with a charge stays"), "{said}");
    write_page(&world, name, Some(OPERATOR), &page(2, 1000 + 86_400_000, vec![row("a", 600)])).unwrap();
    world.kubectl.run(&["annotate", "gpuaccount", name, "spaceport.dev/break-glass=test"]).unwrap();
    world.kubectl.run(&["delete", "gpuaccount", name]).unwrap();
}

#[test]
fn a_deleted_account_stays_while_something_of_it_is_open() {
    let world = World::connect().unwrap();
    let name = "api-open";
    world.kubectl.run(&["annotate", "gpuaccount", name, "spaceport.dev/break-glass=test"]).ok();
    world.kubectl.run(&["delete", "gpuaccount", name, "--ignore-not-found", "--wait=false"]).unwrap();
    eventually("an earlier run's account is gone", OPERATOR_LIMIT, || {
        let output = world.kubectl.output(&["get", "gpuaccount", name])?;
        Ok(if output.status.success() { Err("it is there".to_owned()) } else { Ok(()) })
    })
    .unwrap();
    make_account(&world, name);
    let take_off = || {
        let patch = json!({ "metadata": { "finalizers": null } }).to_string();
        let output =
            world.kubectl.output(&["patch", "gpuaccount", name, "--type", "merge", "--patch", &patch]).unwrap();
        if output.status.success() { Ok(()) } else { Err(String::from_utf8(output.stderr).unwrap()) }
    };

    // A lease of a node that does not exist: open until the term's bound for silent nodes (L9), about a minute.
    let page = json!({
        "seq": 1, "epoch": 1, "writeId": "write-1", "lastTimeMilliseconds": 1000,
        "windows": [{ "startMilliseconds": 1000, "baseMilliseconds": 60000, "chargedMilliseconds": 0, "runs": 0, "generation": 1 }],
        "holds": [{
            "lease": "01jd8x0000000000000000000b", "space": "default/api", "spaceUID": "api", "node": "api-nowhere",
            "parts": [{ "source": "window:1000", "milliseconds": 1000 }], "size": "large", "weight": 1,
            "declaredMilliseconds": 1000, "epoch": 1, "sinceMilliseconds": 1000,
        }],
    });
    write_page(&world, name, Some(OPERATOR), &page).unwrap();
    let said = take_off().unwrap_err();
    assert!(said.contains("1 leases are open") && said.contains("the operator takes it off"), "{said}");

    let output = world.kubectl.output(&["delete", "gpuaccount", name]).unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && said.contains("1 open holds"), "{said}");
    world.kubectl.run(&["annotate", "gpuaccount", name, "spaceport.dev/break-glass=test"]).unwrap();
    world.kubectl.run(&["delete", "gpuaccount", name, "--wait=false"]).unwrap();
    let ready = eventually("the account says that it is being deleted", OPERATOR_LIMIT, || {
        let found = world.kubectl.json(&["get", "gpuaccount", name])?;
        let conditions = at(&found, "/status/conditions").as_array().cloned().unwrap_or_default();
        let ready = conditions.into_iter().find(|condition| condition["type"] == "Ready");
        let ready = ready.filter(|ready| ready["reason"] == "Deleting");
        Ok(ready.ok_or_else(|| at(&found, "/status").to_string()))
    })
    .unwrap();
    assert!(ready["status"] == "False" && ready["message"].as_str().unwrap().contains("1 open"), "{ready}");
    assert!(take_off().unwrap_err().contains("1 leases are open"), "deleting it changes nothing");

    // The lease expires, its receipt is written, its window is long over: now it goes by itself.
    eventually("the account is gone", Duration::from_secs(300), || {
        let output = world.kubectl.output(&["get", "gpuaccount", name, "--output", "yaml"])?;
        let shown = String::from_utf8_lossy(&output.stdout).into_owned();
        Ok(if output.status.success() { Err(shown) } else { Ok(()) })
    })
    .unwrap();
    let receipt = "api-01jd8x0000000000000000000b";
    world.kubectl.run(&["--namespace", "default", "delete", "gpulease", receipt, "--ignore-not-found"]).unwrap();
}

#[test]
fn receipts_are_written_by_the_operator_alone() {
    let world = World::connect().unwrap();
    let receipt = json!({
        "apiVersion": "spaceport.dev/v1alpha1",
        "kind": "GPULease",
        "metadata": { "name": "forged-01jd8x0000000000000000000a", "namespace": "default" },
        "spec": {
            "lease": "01jd8x0000000000000000000a", "account": "bob", "space": "forged", "size": "large", "weight": 1,
            "phase": "Settled", "declaredMilliseconds": 1000,
        },
    });
    let said = refusal(&world, &["create"], &receipt);
    assert!(said.contains("only the operator writes them"), "{said}");
}

#[test]
fn seats_and_the_names_of_spaces_are_for_spaces() {
    let world = World::connect().unwrap();
    let pod = |labels: Value, limits: Value| {
        json!({
            "metadata": { "labels": labels },
            "spec": { "containers": [{ "name": "c", "image": "example.com/c:1", "resources": { "limits": limits } }] },
        })
    };
    let seat = pod(json!({}), json!({ "spaceport.dev/seat": "1" }));
    let forged = pod(json!({ "spaceport.dev/space-uid": "somebody-else" }), json!({}));
    for template in [&seat, &forged] {
        let mut object = template.clone();
        object["apiVersion"] = json!("v1");
        object["kind"] = json!("Pod");
        object["metadata"]["name"] = json!("thief");
        object["metadata"]["namespace"] = json!("default");
        let said = refusal(&world, &["create"], &object);
        assert!(said.contains("create a Space instead"), "{said}");

        let mut template = template.clone();
        template["metadata"]["labels"]["app"] = json!("thief");
        let deployment = json!({
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": { "name": "thief", "namespace": "default" },
            "spec": { "selector": { "matchLabels": { "app": "thief" } }, "template": template },
        });
        let said = refusal(&world, &["create"], &deployment);
        assert!(said.contains("create a Space instead"), "{said}");
    }
}

#[test]
fn the_state_of_a_node_is_written_by_its_own_agent() {
    let world = World::connect().unwrap();
    let nodes = world.kubectl.items(&["get", "gpunodes"]).unwrap();
    let name = nodes.first().expect("the agent has reported its node")["metadata"]["name"].as_str().unwrap().to_owned();
    let patch = json!({ "status": { "driverVersion": "forged" } }).to_string();
    let base = ["patch", "gpunode", &name, "--subresource", "status", "--type", "merge", "--patch", &patch];
    let said = String::from_utf8(world.kubectl.output(&base).unwrap().stderr).unwrap();
    assert!(said.contains("is written by its node agent"), "{said}");
    // The agent's name without the claim of a pod-bound token names no node.
    let agent = "system:serviceaccount:spaceport-system:spaceport-device-plugin";
    let said =
        String::from_utf8(world.kubectl.output(&[&base[..], &["--as", agent]].concat()).unwrap().stderr).unwrap();
    assert!(said.contains("only the GPUNode of its own node"), "{said}");
}

#[test]
fn a_space_has_exactly_one_source() {
    let world = World::connect().unwrap();
    let space = |source: Value| {
        json!({
            "apiVersion": "spaceport.dev/v1alpha1",
            "kind": "Space",
            "metadata": { "name": "two-sources", "namespace": "default" },
            "spec": { "source": source },
        })
    };
    let inline = json!({ "files": { "app.py": "print(1)" } });
    let git = json!({ "url": "https://git.example.com/app.git" });
    for source in [json!({}), json!({ "inline": inline, "git": git })] {
        let said = refusal(&world, &["create", "--dry-run=server"], &space(source));
        assert!(said.contains("source"), "{said}");
    }
}
