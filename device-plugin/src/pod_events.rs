//! Kubernetes Events about this node's pods: what the agent did to one, where `kubectl describe pod` shows it. Each is also
//! a line of the log, so one that cannot be written is not tried again.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::Api;
use kube::api::{ObjectMeta, PostParams};
use spaceport_shell::error_chain;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::clock::boottime_ms;
use crate::converge::SpacePod;

/// Reason of an Event: a process held a GPU device outside every lease, and its container was ended (N10).
pub const DEVICE_HELD_WITHOUT_LEASE: &str = "DeviceHeldWithoutLease";

/// Who reports.
const CONTROLLER: &str = "spaceport.dev/device-plugin";
/// Events of one pod with one reason are at least this far apart: a container that restarts and does it again would
/// otherwise fill the namespace, whose Events the API server keeps for an hour.
const PAUSE_MS: u64 = 60_000;
/// Events waiting to be written. They come from the end of leases, which takes longer than a write.
const WAITING_MAX: usize = 64;
/// Pods and reasons remembered for [`PAUSE_MS`]. A node has a few hundred pods; beyond that nothing is written.
const REMEMBERED_MAX: usize = 1024;
/// One write. The API server answers within milliseconds or is away.
const WRITE_LIMIT: Duration = Duration::from_secs(10);
/// Lengths that the API server allows.
const NOTE_CHARACTERS_MAX: usize = 1024;

/// Something that was done to a pod, for its owner to see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodEvent {
    /// Which.
    pub pod: SpacePod,
    /// One word, of this module's constants.
    pub reason: &'static str,
    /// What was done, one word.
    pub action: &'static str,
    /// What happened, with the numbers, and what to do about it.
    pub note: String,
}

/// The way to the writer; cheap to clone.
#[derive(Clone, Debug)]
pub struct PodEvents(mpsc::Sender<PodEvent>);

impl PodEvents {
    /// The way and its end, for [`run`].
    pub fn channel() -> (Self, mpsc::Receiver<PodEvent>) {
        let (sender, receiver) = mpsc::channel(WAITING_MAX);
        (Self(sender), receiver)
    }

    /// Has an Event written; never waits. Beyond the bounds it is left out.
    pub fn tell(&self, event: PodEvent) {
        if let Err(error) = self.0.try_send(event) {
            tracing::warn!(%error, "An Event was left out");
        }
    }
}

/// Decides which Events are written: of each pod and reason one at a time, and after a pause the newest of those that came
/// meanwhile, which says how many it stands for.
#[derive(Debug, Default)]
struct Limiter {
    told: BTreeMap<(String, &'static str), Told>,
}

#[derive(Debug)]
struct Told {
    again_ms: u64,
    left_out: u32,
    newest: Option<PodEvent>,
}

impl Limiter {
    /// The event itself if it is to be written now.
    fn admit(&mut self, now_ms: u64, event: PodEvent) -> Option<PodEvent> {
        let key = (event.pod.pod_uid.clone(), event.reason);
        if let Some(told) = self.told.get_mut(&key) {
            told.left_out = told.left_out.saturating_add(1);
            told.newest = Some(event);
            return None;
        }
        if self.told.len() >= REMEMBERED_MAX {
            return None;
        }
        self.told.insert(key, Told { again_ms: now_ms.saturating_add(PAUSE_MS), left_out: 0, newest: None });
        Some(event)
    }

    /// When [`Self::due`] has something to do.
    fn next_due(&self) -> Option<u64> {
        self.told.values().map(|told| told.again_ms).min()
    }

    /// What is to be written now for the events left out before. Forgets pods of which nothing more came.
    fn due(&mut self, now_ms: u64) -> Vec<PodEvent> {
        let mut due = Vec::new();
        self.told.retain(|_, told| {
            if told.again_ms > now_ms {
                return true;
            }
            let Some(mut event) = told.newest.take() else { return false };
            if told.left_out > 1 {
                event.note.push_str(&format!("; the last of {} in {} s", told.left_out, PAUSE_MS / 1_000));
            }
            due.push(event);
            (told.again_ms, told.left_out) = (now_ms.saturating_add(PAUSE_MS), 0);
            true
        });
        due
    }
}

/// Writes Events until `stop`. `node` is the reporting instance.
pub async fn run(client: kube::Client, node: String, mut events: mpsc::Receiver<PodEvent>, stop: CancellationToken) {
    let mut limiter = Limiter::default();
    loop {
        let pause = limiter.next_due().map(|due_ms| Duration::from_millis(due_ms.saturating_sub(boottime_ms())));
        let due = tokio::select! {
            () = stop.cancelled() => return,
            event = events.recv() => match event {
                None => return stop.cancelled().await, // Nobody is left who could tell of anything.
                Some(event) => limiter.admit(boottime_ms(), event).into_iter().collect(),
            },
            () = tokio::time::sleep(pause.unwrap_or_default()), if pause.is_some() => limiter.due(boottime_ms()),
        };
        for event in due {
            let (pod, namespace) = (event.pod.name.clone(), event.pod.namespace.clone());
            let events: Api<Event> = Api::namespaced(client.clone(), &namespace);
            let (how, body) = (PostParams::default(), object(event, &node, now()));
            match tokio::time::timeout(WRITE_LIMIT, events.create(&how, &body)).await {
                Ok(Ok(_)) => {}
                Ok(Err(error)) => {
                    tracing::warn!(error = %error_chain(&error), pod, namespace, "An Event was not written")
                }
                Err(_) => tracing::warn!(limit_s = WRITE_LIMIT.as_secs(), pod, namespace, "An Event took too long"),
            }
        }
    }
}

fn object(event: PodEvent, node: &str, now: Timestamp) -> Event {
    let PodEvent { pod, reason, action, note } = event;
    Event {
        metadata: ObjectMeta {
            generate_name: Some(format!("{}.", pod.name)),
            namespace: Some(pod.namespace.clone()),
            ..ObjectMeta::default()
        },
        event_time: Some(MicroTime(now)),
        reporting_controller: Some(CONTROLLER.to_owned()),
        reporting_instance: Some(node.to_owned()),
        action: Some(action.to_owned()),
        reason: Some(reason.to_owned()),
        note: Some(note.chars().take(NOTE_CHARACTERS_MAX).collect()),
        type_: Some("Warning".to_owned()),
        regarding: Some(ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Pod".to_owned()),
            name: Some(pod.name),
            namespace: Some(pod.namespace),
            uid: Some(pod.pod_uid),
            ..ObjectReference::default()
        }),
        ..Event::default()
    }
}

/// Stamps what people read; nothing is decided from it.
#[allow(clippy::disallowed_methods, reason = "the shell's clock for what people read")]
fn now() -> Timestamp {
    Timestamp::now()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(pod: &str, note: &str) -> PodEvent {
        let pod = SpacePod {
            namespace: "demo".to_owned(),
            name: pod.to_owned(),
            pod_uid: format!("uid-{pod}"),
            ..SpacePod::default()
        };
        PodEvent { pod, reason: DEVICE_HELD_WITHOUT_LEASE, action: "EndContainer", note: note.to_owned() }
    }

    #[test]
    fn one_event_a_pod_and_minute_is_written_and_the_last_of_the_rest_says_how_many_there_were() {
        let mut limiter = Limiter::default();
        assert_eq!(limiter.admit(1_000, held("a", "first")), Some(held("a", "first")));
        for note in ["second", "third", "fourth"] {
            assert_eq!(limiter.admit(2_000, held("a", note)), None);
        }
        assert_eq!(limiter.admit(2_000, held("b", "other pod")), Some(held("b", "other pod")));
        assert_eq!(limiter.next_due(), Some(61_000));
        assert_eq!(limiter.due(60_999), []);
        assert_eq!(limiter.due(61_000), [held("a", "fourth; the last of 3 in 60 s")]);
        // That one counts as the next minute's.
        assert_eq!(limiter.admit(62_000, held("a", "fifth")), None);
        assert_eq!(limiter.due(121_000), [held("a", "fifth")]);
        assert_eq!(limiter.due(181_000), []);
        assert!(limiter.told.is_empty() && limiter.next_due().is_none(), "quiet pods are forgotten");
        assert_eq!(limiter.admit(200_000, held("a", "new")), Some(held("a", "new")));
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut limiter = Limiter::default();
        let admitted = |limiter: &mut Limiter, pod: usize| limiter.admit(0, held(&pod.to_string(), "")).is_some();
        let count = (0..REMEMBERED_MAX + 10).filter(|pod| admitted(&mut limiter, *pod)).count();
        assert_eq!(count, REMEMBERED_MAX);
    }

    #[test]
    fn the_event_names_the_pod_and_has_what_the_api_server_asks_for() {
        let event = object(held("a", &"x".repeat(2_000)), "gpu-1", Timestamp::UNIX_EPOCH);
        let value = serde_json::to_value(&event).unwrap();
        assert_eq!(value["apiVersion"], "events.k8s.io/v1");
        let regarding = serde_json::json!(
            {"apiVersion": "v1", "kind": "Pod", "namespace": "demo", "name": "a", "uid": "uid-a"}
        );
        assert_eq!(value["regarding"], regarding);
        assert_eq!(value["metadata"], serde_json::json!({"generateName": "a.", "namespace": "demo"}));
        assert_eq!(value["note"].as_str().unwrap().len(), NOTE_CHARACTERS_MAX);
        for field in ["eventTime", "reportingController", "reportingInstance", "action", "reason", "type"] {
            assert!(value[field].is_string(), "{field}: {value}");
        }
    }
}
