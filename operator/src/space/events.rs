//! Kubernetes Events about Spaces, where `kubectl describe space` shows them. Each repeats what a condition says at the moment
//! at which it began, so one that cannot be written is not tried again.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use kube::ResourceExt as _;
use spaceport_crds::Space;
use spaceport_crds::conditions::SpaceReason;
use spaceport_crds::names::API_VERSION;

use crate::kubeapi::FIELD_MANAGER;

/// Who reports.
const CONTROLLER: &str = "spaceport.dev/operator";
/// Length that the API server allows.
const NOTE_CHARACTERS_MAX: usize = 1024;

/// Callers of some tiers will be refused (requirement A14). Pure.
pub fn durations_refused(space: &Space, note: &str, now: Timestamp) -> Event {
    let (name, namespace) = (space.name_any(), space.namespace());
    Event {
        metadata: ObjectMeta {
            generate_name: Some(format!("{name}.")),
            namespace: namespace.clone(),
            ..ObjectMeta::default()
        },
        event_time: Some(MicroTime(now)),
        reporting_controller: Some(CONTROLLER.to_owned()),
        reporting_instance: Some(FIELD_MANAGER.to_owned()),
        action: Some("CompareWithTiers".to_owned()),
        reason: Some(SpaceReason::LongerThanTierAllows.as_str().to_owned()),
        note: Some(note.chars().take(NOTE_CHARACTERS_MAX).collect()),
        type_: Some("Warning".to_owned()),
        regarding: Some(ObjectReference {
            api_version: Some(API_VERSION.to_owned()),
            kind: Some("Space".to_owned()),
            name: Some(name),
            namespace,
            uid: space.uid(),
            ..ObjectReference::default()
        }),
        ..Event::default()
    }
}

#[cfg(test)]
mod tests {
    use super::super::validate::tests::inline;
    use super::*;

    #[test]
    fn the_event_names_the_space_and_has_what_the_api_server_asks_for() {
        let event = durations_refused(&inline(&[("app.py", "")]), &"x".repeat(2_000), Timestamp::UNIX_EPOCH);
        let value = serde_json::to_value(&event).unwrap();
        assert_eq!(value["metadata"], serde_json::json!({ "generateName": "app.", "namespace": "team" }));
        assert_eq!(value["regarding"]["uid"], "3e0f7a52-0000-4000-8000-000000000001");
        assert_eq!(value["note"].as_str().unwrap().len(), NOTE_CHARACTERS_MAX);
        for field in ["eventTime", "reportingController", "reportingInstance", "action", "reason", "type"] {
            assert!(value[field].is_string(), "{field}: {value}");
        }
    }
}
