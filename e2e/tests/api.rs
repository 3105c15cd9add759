//! What only a real API server can show: the admission policies of the chart say no, with a message that helps.
#![cfg(feature = "cluster")]
#![allow(clippy::unwrap_used, clippy::panic)] // A test fails by panicking, its helpers too.

use std::process::Output;

use serde_json::{Value, json};
use spaceport_e2e::World;

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
        "spec": { "identities": [{ "issuer": "https://issuer.example.com", "subject": format!("{name}@example.com") }], "tier": "demo" },
    })
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
    world.kubectl.apply(&account(name).to_string()).unwrap();

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
    world.kubectl.apply(&account(name).to_string()).unwrap();
    let page = |seq: u64, charged: u64| {
        json!({
            "seq": seq, "epoch": 1, "writeId": format!("write-{seq}"), "lastTimeMilliseconds": 1,
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
