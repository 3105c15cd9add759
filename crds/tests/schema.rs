//! The definitions as a whole: what every kind must have, that the examples fit their types, that every CEL rule is
//! known, and that what `cargo xtask gen` writes is the same each time. The ledger's rules are tried on a real API
//! server in e2e/tests/api.rs.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on fails by panicking, also in its helpers"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use serde::de::DeserializeOwned;
use serde::{Deserialize as _, Serialize};
use serde_json::Value;
use spaceport_crds::conditions::documented;
use spaceport_crds::{
    GPUAccount, GPUPool, GPUTier, LeaseBoundaries, Space, all, conditions, names, reference_markdown, yaml_files,
};

fn schema(definition: &CustomResourceDefinition) -> Value {
    let schema = definition.spec.versions[0].schema.as_ref().unwrap();
    serde_json::to_value(schema.open_api_v3_schema.as_ref().unwrap()).unwrap()
}

#[test]
fn every_kind_has_its_short_name_category_and_policy() {
    let short: BTreeMap<String, String> = all()
        .iter()
        .map(|definition| {
            let spec = &definition.spec;
            assert_eq!(spec.group, names::GROUP);
            assert_eq!(spec.versions.len(), 1);
            assert_eq!(spec.versions[0].name, names::VERSION);
            assert_eq!(spec.names.categories.as_deref(), Some(&[names::CATEGORY.to_owned()][..]));
            let annotations = definition.metadata.annotations.as_ref().unwrap();
            assert_eq!(annotations["helm.sh/resource-policy"], "keep", "{}", spec.names.kind);
            (spec.names.kind.clone(), spec.names.short_names.as_ref().unwrap().join(","))
        })
        .collect();
    let expected = [
        ("GPUAccount", "gacct"),
        ("GPULease", "gl"),
        ("GPUNode", "gnode"),
        ("GPUPool", "gpool"),
        ("GPUQuotaGrant", "ggrant"),
        ("GPUTier", "gtier"),
        ("Space", "sp"),
        ("SpaceBuild", "spb"),
    ];
    assert_eq!(short, expected.map(|(kind, short)| (kind.to_owned(), short.to_owned())).into());
}

#[test]
fn scopes_and_status_subresources_are_as_designed() {
    for definition in all() {
        let kind = definition.spec.names.kind.as_str();
        let namespaced = matches!(kind, "Space" | "SpaceBuild" | "GPULease");
        assert_eq!(definition.spec.scope == "Namespaced", namespaced, "{kind}");
        let subresources = definition.spec.versions[0].subresources.as_ref();
        let has_status = subresources.is_some_and(|subresources| subresources.status.is_some());
        // A receipt is one write (docs/rules.md, Writes per lease).
        assert_eq!(has_status, kind != "GPULease", "{kind}");
    }
}

#[test]
fn printer_columns() {
    let mut table = String::new();
    for definition in all() {
        let columns: Vec<String> = definition.spec.versions[0]
            .additional_printer_columns
            .iter()
            .flatten()
            .map(|column| {
                let wide = if column.priority.unwrap_or(0) > 0 { "(wide)" } else { "" };
                format!("{}{wide}", column.name.to_uppercase())
            })
            .collect();
        table.push_str(&format!("{}: {}\n", definition.spec.names.kind, columns.join(" ")));
    }
    insta::assert_snapshot!(table, @r"
    GPUAccount: USER TIER USED RESERVED LEFT RESETS LEASES GUESTS(wide)
    GPULease: SPACE ACCOUNT SIZE PHASE WAITS DECLARED USED CHARGED NODE GPU AGE GRANTED(wide) OUTCOME(wide) ISOLATION(wide) MESSAGE(wide)
    GPUNode: CARDS MODE SLOTS HEALTH DRIVER AGE READY(wide) ISOLATION(wide) HOLDERS(wide)
    GPUPool: MODE NODES CARDS SLOTS SEATS AGE READY(wide) RECEIPTS(wide)
    GPUQuotaGrant: ACCOUNT GPU-SECONDS KIND USED EXPIRES REASON AGE
    GPUTier: GPU-SECONDS LONGEST CONCURRENT PRIORITY ACCOUNTS AGE CALLERS(wide) RUNS(wide) GRANTS(wide)
    SpaceBuild: SPACE LANE COMMIT STAGE TOOK REASON AGE TRIGGER(wide) LOCK(wide)
    Space: SDK HARDWARE STAGE SINCE URL REASON OWNER(wide) SUGGESTED(wide) COMMIT(wide)
    ");
}

/// A column whose path names no field would print nothing, for ever, and nobody would notice.
#[test]
fn every_printer_column_reads_a_field_that_exists() {
    for definition in all() {
        let schema = schema(&definition);
        for column in definition.spec.versions[0].additional_printer_columns.iter().flatten() {
            if column.json_path.starts_with(".metadata.") || column.json_path.contains("[?(") {
                continue;
            }
            let field = column.json_path.trim_start_matches('.').split('.').try_fold(&schema, |at, step| {
                let properties = at.get("properties")?;
                match step.split_once('[') {
                    Some((list, _)) => properties.get(list)?.get("items"),
                    None => properties.get(step),
                }
            });
            assert!(field.is_some(), "{}: {}", definition.spec.names.kind, column.json_path);
        }
    }
}

fn rules(schema: &Value, path: &str, found: &mut Vec<String>) {
    for rule in schema["x-kubernetes-validations"].as_array().into_iter().flatten() {
        let message = rule["message"].as_str().unwrap_or_default();
        assert!(!message.is_empty(), "a rule without a message at {path}: {rule}");
        found.push(format!("{path}: {message}"));
    }
    for (name, field) in schema["properties"].as_object().into_iter().flatten() {
        rules(field, &format!("{path}.{name}"), found);
    }
    if schema["items"].is_object() {
        rules(&schema["items"], &format!("{path}[]"), found);
    }
}

#[test]
fn every_cel_rule_is_listed() {
    let mut found = Vec::new();
    for definition in all() {
        rules(&schema(&definition), &definition.spec.names.kind, &mut found);
    }
    insta::assert_snapshot!(found.join("\n"), @r"
    GPUAccount: the ledger page cannot be removed from its account
    GPUAccount.status: the epoch of a page never falls: another leader has written it (L5, L6)
    GPUAccount.status: ledger time never goes back (L20)
    GPUAccount.status: a window with a charge stays on the page until its 24 hours are over (L5, L12)
    GPUAccount.status: a cookie's row with a charge stays on the page until its 24 hours are over (L1, L5)
    GPUAccount.status.closed: a lease is settled once (invariant 3)
    GPUAccount.status.closed[]: a charge is at most weight x declared (invariant 5)
    GPUAccount.status.cookies: what was charged to a cookie never falls (L5)
    GPUAccount.status.grants: what was used of a grant never falls (L12)
    GPUAccount.status.windows: what was charged to a window never falls (L5)
    GPULease.spec: account, space, size, weight and declared duration of a receipt never change
    GPULease.spec: a lease ends once: its last phase and its charge never change (invariant 3)
    GPULease.spec: a charge is at most weight x declared (invariant 5)
    GPULease.spec: a lease is never given more than it declares
    GPULease.spec: a refunded or expired lease is charged nothing
    GPULease.spec: only a lease that waits has a place in a queue
    GPUNode.spec.cordon: give cards with scope: Cards, and only then
    GPUPool.spec: if large is a whole card both sizes hold the same and must weigh the same
    GPUPool.spec.cards: a card is shared in time or dedicated, not both (N4)
    GPUPool.spec.cards: a dedicated card is large or xlarge, not both (N4)
    GPUPool.spec.cards.timeShared: give indexes with select: Listed, and only then
    GPUPool.spec.queue: queue bounds must not shrink: perAccount <= perSpace <= perPool
    GPUPool.spec.queue.priorities: the floor shares of the three priorities add up to 100 percent
    GPUQuotaGrant.spec: a grant is immutable: delete it and write another (L1)
    GPUTier.spec: longestCallSeconds is more than the whole window: no call that long could ever be admitted
    GPUTier.spec: gpuSecondsPerAddressPrefix is for tiers with callers: Guests
    GPUTier.spec: identities are for tiers with callers: SignedIn; guests and Spaces have none
    GPUTier.spec.identities[]: give a subject or a subjectSuffix, not both
    GPUTier.spec.identities[]: a subject or group means nothing without its issuer: another issuer may call somebody else the same
    SpaceBuild.spec: a build is immutable: another build is another object
    SpaceBuild.status: a failed build says why, and no other does
    SpaceBuild.status: a build ends once
    Space.spec: duplicateOf is set once, when the Space is made
    Space.spec: a source that is an image needs sdk: docker, or none
    Space.spec.appFile: appFile stays inside the source
    Space.spec.egress: give allow with policy: Listed, and only then
    Space.spec.sleepAfterSeconds: sleepAfterSeconds is -1 (never) or at least 60
    Space.spec.source: give exactly one of git, inline, image, archive
    Space.spec.source.archive: give exactly one of url, claimName
    Space.spec.source.archive: an archive in a volume needs its path
    Space.spec.source.archive.path: path stays inside the volume
    Space.spec.source.git.path: path stays inside the repository
    Space.spec.source.inline.files: give at least one file
    Space.spec.source.inline.files: a file's path is relative, made of letters, digits, dot, dash and underscore, and stays inside the source
    Space.status: a stage that something is awaited in needs an unfinished phase with a deadline
    ");
}

fn bounds(schema: &Value, path: &str) {
    if schema["type"] == "array" {
        assert!(schema["maxItems"].is_u64(), "a list without a maximum: {path}");
        bounds(&schema["items"], &format!("{path}[]"));
    }
    for (name, field) in schema["properties"].as_object().into_iter().flatten() {
        bounds(field, &format!("{path}.{name}"));
    }
}

#[test]
fn every_list_has_a_maximum() {
    for definition in all() {
        bounds(&schema(&definition)["properties"], &definition.spec.names.kind);
        for part in ["spec", "status"] {
            bounds(&schema(&definition)["properties"][part], &format!("{}.{part}", definition.spec.names.kind));
        }
    }
}

#[test]
fn the_ledger_page_has_the_bounds_of_l1() {
    let account = all().into_iter().find(|definition| definition.spec.names.kind == "GPUAccount").unwrap();
    let page = &schema(&account)["properties"]["status"]["properties"];
    let most = |list: &str| page[list]["maxItems"].as_u64().unwrap();
    assert_eq!(["windows", "cookies", "holds", "grants", "closed"].map(most), [2, 64, 64, 32, 32], "L1");
    assert_eq!(most("recentOutcomes"), 20);
    let hold = &page["holds"]["items"]["properties"];
    assert_eq!(hold["parts"]["maxItems"], 33);
    assert_eq!(hold["avoid"]["maxItems"], 16);
}

#[test]
fn reasons_and_condition_types_are_camel_case_and_unique() {
    let camel_case = |text: &str| {
        text.chars().next().is_some_and(|first| first.is_ascii_uppercase())
            && text.chars().all(|character| character.is_ascii_alphanumeric())
    };
    let documented = documented();
    assert_eq!(documented.len(), all().len());
    for kind in &documented {
        let vocabularies = kind.reasons.iter().map(|(_, values)| values).chain([&kind.types]);
        for values in vocabularies {
            let mut seen = BTreeSet::new();
            for (name, meaning) in values {
                assert!(camel_case(name), "{}: {name}", kind.kind);
                assert!(!meaning.is_empty(), "{}: {name} is not explained", kind.kind);
                assert!(seen.insert(name), "{}: {name} twice", kind.kind);
            }
        }
    }
}

#[test]
fn what_gen_writes_is_the_same_each_time_and_a_plain_template() {
    let files = yaml_files();
    assert_eq!(files, yaml_files());
    assert_eq!(reference_markdown(), reference_markdown());
    assert!(files.is_sorted_by_key(|(name, _)| *name));
    for ((name, yaml), definition) in files.iter().zip(all()) {
        assert_eq!(*name, format!("{}.yaml", definition.spec.names.plural));
        assert!(!yaml.contains("{{"), "{name} would be read as a template");
        let read: CustomResourceDefinition = serde_norway::from_str(yaml).unwrap();
        assert_eq!(read, definition, "{name}");
    }
}

#[test]
fn schemas_have_no_null_and_only_formats_that_kubernetes_knows() {
    fn walk(value: &Value, path: &str) {
        match value {
            Value::Object(map) => {
                assert!(!map.contains_key("nullable"), "{path}");
                if let Some(Value::String(format)) = map.get("format") {
                    assert!(["int32", "int64", "date-time"].contains(&format.as_str()), "{path}: {format}");
                }
                map.iter().for_each(|(key, value)| walk(value, &format!("{path}.{key}")));
            }
            Value::Array(items) => items.iter().for_each(|item| walk(item, path)),
            _ => {}
        }
    }
    for definition in all() {
        walk(&schema(&definition), &definition.spec.names.kind);
    }
}

/// Every document of an example, as it stands in the file.
fn documents(file: &str) -> Vec<Value> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples").join(file);
    let text = std::fs::read_to_string(&path).unwrap();
    serde_norway::Deserializer::from_str(&text).map(|document| Value::deserialize(document).unwrap()).collect()
}

/// Nothing that the example says may be lost on the way through the type.
fn contains(whole: &Value, part: &Value, path: &str) {
    match (whole, part) {
        (Value::Object(whole), Value::Object(part)) => {
            for (key, value) in part {
                let found = whole.get(key).unwrap_or_else(|| panic!("{path}.{key} was lost"));
                contains(found, value, &format!("{path}.{key}"));
            }
        }
        (Value::Array(whole), Value::Array(part)) => {
            assert_eq!(whole.len(), part.len(), "{path}");
            whole.iter().zip(part).for_each(|(whole, part)| contains(whole, part, path));
        }
        _ => assert_eq!(whole, part, "{path}"),
    }
}

fn round_trip<Kind: DeserializeOwned + Serialize + PartialEq + std::fmt::Debug>(document: &Value) -> Kind {
    let parsed: Kind = serde_json::from_value(document.clone()).unwrap();
    let written = serde_json::to_value(&parsed).unwrap();
    contains(&written, document, document["kind"].as_str().unwrap());
    assert_eq!(serde_json::from_value::<Kind>(written).unwrap(), parsed);
    parsed
}

#[test]
fn examples_round_trip() {
    let mut kinds = Vec::new();
    for file in ["tiers.yaml", "pool.yaml", "account-bob.yaml", "hello-zero.yaml"] {
        for document in documents(file) {
            let kind = document["kind"].as_str().unwrap().to_owned();
            match kind.as_str() {
                "GPUTier" => drop(round_trip::<GPUTier>(&document)),
                "GPUPool" => drop(round_trip::<GPUPool>(&document)),
                "GPUAccount" => drop(round_trip::<GPUAccount>(&document)),
                "Space" => drop(round_trip::<Space>(&document)),
                "Namespace" => {}
                other => panic!("{file}: no check for {other}"),
            }
            kinds.push(kind);
        }
    }
    assert_eq!(kinds.iter().filter(|kind| *kind == "GPUTier").count(), 7);
    assert_eq!(kinds.len(), 11);
}

#[test]
fn defaults_of_the_types_are_those_of_the_schema() {
    let pool: GPUPool = round_trip(&documents("pool.yaml")[0]);
    let spec = pool.spec;
    assert_eq!(
        (spec.allow_limit_seconds, spec.grace_seconds, spec.clear_limit_seconds, spec.order_ttl_seconds),
        (30, 2, 10, 5),
        "L8, L9"
    );
    assert_eq!(spec.queue.age_lane_percent, 25, "docs/rules.md");
    let definition = all().into_iter().find(|definition| definition.spec.names.kind == "GPUPool").unwrap();
    let fields = &schema(&definition)["properties"]["spec"]["properties"];
    assert_eq!(fields["allowLimitSeconds"]["default"], 30);
    assert_eq!(fields["orderTTLSeconds"]["default"], 5);
    assert_eq!(fields["queue"]["default"], serde_json::to_value(&spec.queue).unwrap());
}

#[test]
fn a_lease_without_boundaries_writes_none() {
    assert!(LeaseBoundaries::default().is_empty());
}

#[test]
fn set_moves_the_transition_time_only_with_the_status() {
    let at = |seconds| jiff::Timestamp::from_second(seconds).unwrap();
    let ready = |status, message: &str, seconds| {
        conditions::condition("Ready", status, "AsExpected", message, Some(1), at(seconds))
    };
    let mut list = Vec::new();
    assert!(conditions::set(&mut list, ready(conditions::ConditionStatus::True, "a", 10)));
    assert!(!conditions::set(&mut list, ready(conditions::ConditionStatus::True, "a", 20)));
    assert!(conditions::set(&mut list, ready(conditions::ConditionStatus::True, "b", 30)));
    assert_eq!(list[0].last_transition_time.0, at(10));
    assert!(conditions::set(&mut list, ready(conditions::ConditionStatus::False, "b", 40)));
    assert_eq!(list[0].last_transition_time.0, at(40));
    assert_eq!(list.len(), 1);
}
