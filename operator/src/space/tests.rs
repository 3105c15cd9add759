//! When the controller looks at which Space.

use spaceport_core::ids::{Revision, Size};
use spaceport_core::queue::Learned;
use spaceport_crds::SpaceSpec;

use super::*;
use crate::kubeapi::fake::FakeApi;

fn controller(fake: &FakeApi) -> Controller {
    let settings = Settings {
        python_image: "python".to_owned(),
        tools_image: "tools".to_owned(),
        image_pull_policy: "IfNotPresent".to_owned(),
        index_url: None,
        extra_index_urls: None,
        http_proxy: None,
        https_proxy: None,
        no_proxy: None,
        ca_bundle: None,
        domain: "spaces.example.com".to_owned(),
    };
    Controller::new(fake.connect(), settings, Durations::default())
}

fn shown(name: &str) -> Change {
    let mut space = Space::new(name, SpaceSpec::default());
    space.metadata.namespace = Some("demo".to_owned());
    space.metadata.uid = Some(format!("uid-{name}"));
    Change::Space(Box::new(space))
}

fn listed(controller: &mut Controller, names: &[&str]) {
    controller.take(Change::ListBegins);
    for name in names {
        controller.take(shown(name));
    }
    controller.take(Change::ListEnds);
}

#[tokio::test]
async fn a_space_that_is_missing_in_a_later_list_is_gone_with_what_was_learned_of_it() {
    let mut controller = controller(&FakeApi::default());
    listed(&mut controller, &["kept", "deleted"]);
    let learned = Learned {
        revision: Revision::default(),
        size: Size::Large,
        declared_ms: 10_000,
        calls: 5,
        p50_ms: 1_000,
        p95_ms: 1_000,
        max_ms: 1_000,
        suggested_ms: None,
    };
    for name in ["kept", "deleted"] {
        controller.durations.put(&format!("uid-{name}"), learned);
    }
    controller.take(Change::ListBegins);
    controller.take(shown("kept"));
    controller.everything();
    assert!(controller.durations.get("uid-deleted").is_some(), "it may come yet");
    controller.take(Change::ListEnds);
    let kept = ("demo".to_owned(), "kept".to_owned());
    assert_eq!(controller.spaces.keys().chain(controller.due.keys()).collect::<Vec<_>>(), [&kept, &kept]);
    controller.everything();
    assert_eq!(controller.durations.get("uid-deleted"), None);
    assert!(controller.durations.get("uid-kept").is_some());
}

#[tokio::test]
async fn every_space_is_looked_at_once_in_a_while_also_one_that_waits_for_a_deadline() {
    let mut controller = controller(&FakeApi::default());
    listed(&mut controller, &["waits"]);
    let (waits, deadline) = (("demo".to_owned(), "waits".to_owned()), clock::monotonic() + Duration::from_secs(1800));
    controller.due.insert(waits.clone(), deadline);
    controller.everything();
    assert!(controller.due[&waits] <= clock::monotonic());
}

#[tokio::test]
async fn a_reconcile_that_is_not_answered_does_not_outlive_the_term() {
    let fake = FakeApi::silent();
    let mut controller = controller(&fake);
    listed(&mut controller, &["a", "b"]);
    let stop = CancellationToken::new();
    let token = stop.clone();
    let reconciling = tokio::spawn(async move { controller.reconcile_due(&token).await });
    tokio::task::yield_now().await;
    stop.cancel();
    // Each of the requests would be given up after 10 s.
    tokio::time::timeout(Duration::from_secs(5), reconciling).await.expect("it ends at once").unwrap();
}
