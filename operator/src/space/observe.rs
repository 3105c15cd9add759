//! What the cluster says about one Space. Reads only.

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ContainerState, ContainerStatus, Pod};
use spaceport_core::ids::Revision;
use spaceport_core::stage::Progress;
use spaceport_crds::GPUNode;

use super::declared::Report;
use super::plan::{
    ANNOTATION_REVISION, CONTAINER_APP, CONTAINER_DEVICE_API, CONTAINER_ENVIRONMENT, CONTAINER_SOURCE, LABEL_SPACE_UID,
};
use crate::kubeapi::{ApiError, KubeApi};

/// What was found.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    /// The Space's Deployment, if there is one.
    pub deployment: Option<Deployment>,
    /// Its pods, newest first.
    pub pods: Vec<Pod>,
}

/// Reads the Deployment and the pods of a Space.
///
/// # Errors
/// The API server could not be read.
pub async fn observe(api: &KubeApi, namespace: &str, name: &str, uid: &str) -> Result<Observed, ApiError> {
    let deployment = api.namespace::<Deployment>(namespace).get(name).await?;
    let mut pods = api.namespace::<Pod>(namespace).list(Some(&format!("{LABEL_SPACE_UID}={uid}"))).await?;
    pods.retain(|pod| pod.metadata.deletion_timestamp.is_none());
    pods.sort_by(|a, b| b.metadata.creation_timestamp.cmp(&a.metadata.creation_timestamp));
    Ok(Observed { deployment, pods })
}

/// The pool of the pod's node, by name: the one that the node's agent follows. None without a node or a pool.
///
/// # Errors
/// The API server could not be read.
pub async fn pool(api: &KubeApi, pod: &Pod) -> Result<Option<String>, ApiError> {
    let Some(node) = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()) else { return Ok(None) };
    let node = api.cluster::<GPUNode>().get(node).await?;
    Ok(node.and_then(|node| node.status?.pool))
}

/// How far one pod has come, with the words of kubelet where something went wrong.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodProgress {
    /// Has a node.
    pub scheduled: Progress,
    /// Init container `source`.
    pub source: Progress,
    /// Init container `environment`.
    pub environment: Progress,
    /// The app's process (after the device API answered).
    pub started: Progress,
    /// The app answers.
    pub healthy: Progress,
    /// What is going on or went wrong: container, reason, message.
    pub message: String,
    /// What the source container reported (the commit).
    pub commit: Option<String>,
    /// What the app's source declares, once its environment is there; empty if the container reported nothing of the kind.
    pub declared: Option<Report>,
}

impl Observed {
    /// The newest pod of this revision.
    pub fn current(&self, revision: &str) -> Option<&Pod> {
        self.pods.iter().find(|pod| is_of(pod, revision))
    }

    /// The revision that visitors reach: that of the newest pod which answers.
    pub fn answering(&self) -> Option<Revision> {
        let newest = self.pods.iter().find(|pod| progress(pod).healthy == Progress::Done);
        newest.and_then(revision).map(Revision::of)
    }

    /// A pod of an older revision still answers.
    pub fn older_answers(&self, revision: &str) -> bool {
        self.pods.iter().any(|pod| !is_of(pod, revision) && progress(pod).healthy == Progress::Done)
    }
}

fn revision(pod: &Pod) -> Option<&str> {
    pod.metadata.annotations.as_ref()?.get(ANNOTATION_REVISION).map(String::as_str)
}

fn is_of(pod: &Pod, wanted: &str) -> bool {
    revision(pod).is_some_and(|of| of == wanted)
}

/// Reads a pod's status. Pure.
pub fn progress(pod: &Pod) -> PodProgress {
    let mut progress = PodProgress::default();
    let Some(status) = &pod.status else { return progress };
    let condition = |kind: &str| status.conditions.iter().flatten().find(|condition| condition.type_ == kind);
    match condition("PodScheduled") {
        Some(scheduled) if scheduled.status == "True" => progress.scheduled = Progress::Done,
        scheduled => {
            progress.scheduled = Progress::InProgress;
            progress.message = scheduled.and_then(|scheduled| scheduled.message.clone()).unwrap_or_default();
            return progress;
        }
    }
    // The kubelet refuses a pod as a whole (a seat that is gone after a reboot, say).
    if status.phase.as_deref() == Some("Failed") && status.container_statuses.is_none() {
        progress.started = Progress::Failed;
        progress.message = format!(
            "{}: {}",
            status.reason.as_deref().unwrap_or("the pod failed"),
            status.message.as_deref().unwrap_or_default()
        );
        return progress;
    }
    let find = |name: &str| {
        let all = status.init_container_statuses.iter().flatten().chain(status.container_statuses.iter().flatten());
        all.into_iter().find(|container| container.name == name)
    };
    progress.source = init(find(CONTAINER_SOURCE), &mut progress.message);
    progress.commit = last_words(find(CONTAINER_SOURCE)).map(ToOwned::to_owned);
    if progress.source != Progress::Done {
        return progress;
    }
    progress.environment = init(find(CONTAINER_ENVIRONMENT), &mut progress.message);
    if progress.environment != Progress::Done {
        return progress;
    }
    progress.declared = Some(last_words(find(CONTAINER_ENVIRONMENT)).and_then(Report::read).unwrap_or_default());
    if let Some(waits) = find(CONTAINER_DEVICE_API) {
        progress.started = init(Some(waits), &mut progress.message);
        if progress.started != Progress::Done {
            return progress;
        }
    }
    let Some(app) = find(CONTAINER_APP) else { return progress };
    progress.started = match &app.state {
        Some(ContainerState { running: Some(_), .. }) => Progress::Done,
        state => {
            let ended = state.as_ref().and_then(|state| state.terminated.as_ref());
            let last = app.last_state.as_ref().and_then(|state| state.terminated.as_ref());
            let waits = state.as_ref().and_then(|state| state.waiting.as_ref());
            match ended.or(last) {
                Some(ended) => {
                    progress.message = format!(
                        "the app ended with exit code {} ({}), restarted {} times; see its log: kubectl logs --previous",
                        ended.exit_code,
                        ended.reason.as_deref().unwrap_or("no reason"),
                        app.restart_count
                    );
                    Progress::Failed
                }
                None => {
                    progress.message = waits.map(waiting).unwrap_or_default();
                    Progress::InProgress
                }
            }
        }
    };
    if progress.started == Progress::Done {
        progress.healthy = if app.ready { Progress::Done } else { Progress::InProgress };
    }
    progress
}

/// What a container that ended well left on its termination log.
fn last_words(container: Option<&ContainerStatus>) -> Option<&str> {
    let ended = container?.state.as_ref()?.terminated.as_ref()?;
    ended.message.as_deref().filter(|_| ended.exit_code == 0)
}

fn waiting(waiting: &k8s_openapi::api::core::v1::ContainerStateWaiting) -> String {
    match (waiting.reason.as_deref(), waiting.message.as_deref()) {
        (Some("PodInitializing") | None, None) => String::new(),
        (reason, message) => format!("{}: {}", reason.unwrap_or("waiting"), message.unwrap_or("no message")),
    }
}

/// An init container: done when it ended with 0; failed while it waits for its next try after an error.
fn init(container: Option<&ContainerStatus>, message: &mut String) -> Progress {
    let Some(container) = container else { return Progress::Waiting };
    let state = container.state.as_ref();
    let ended = state.and_then(|state| state.terminated.as_ref());
    let last = container.last_state.as_ref().and_then(|state| state.terminated.as_ref());
    match (ended, last) {
        (Some(ended), _) if ended.exit_code == 0 => Progress::Done,
        (Some(ended), _) | (None, Some(ended)) => {
            *message = format!(
                "{}: {} (exit code {}, tried {} times)",
                container.name,
                ended.message.as_deref().map(str::trim).or(ended.reason.as_deref()).unwrap_or("no message"),
                ended.exit_code,
                container.restart_count + 1
            );
            Progress::Failed
        }
        (None, None) => {
            if let Some(waits) = state.and_then(|state| state.waiting.as_ref()) {
                let said = waiting(waits);
                if !said.is_empty() {
                    *message = format!("{}: {said}", container.name);
                }
                return if state.is_some_and(|state| {
                    state.waiting.as_ref().is_some_and(|w| w.reason.as_deref() == Some("PodInitializing"))
                }) {
                    Progress::Waiting
                } else {
                    Progress::InProgress
                };
            }
            Progress::InProgress
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(revision: &str, ready: bool) -> Pod {
        let ended = json!({"name": "source", "ready": true, "restartCount": 0, "image": "", "imageID": "",
            "state": {"terminated": {"exitCode": 0}}});
        let mut environment = ended.clone();
        environment["name"] = json!("environment");
        serde_json::from_value(json!({
            "metadata": {"annotations": {ANNOTATION_REVISION: revision}},
            "status": {
                "conditions": [{"type": "PodScheduled", "status": "True"}],
                "initContainerStatuses": [ended, environment],
                "containerStatuses": [{"name": "app", "ready": ready, "restartCount": 0, "image": "", "imageID": "",
                    "state": {"running": {}}}],
            },
        }))
        .unwrap()
    }

    #[test]
    fn visitors_reach_the_newest_revision_that_answers() {
        let of = |pods: Vec<Pod>| Observed { deployment: None, pods }.answering();
        let (new, old) = ("00000000000000b2", "00000000000000a1");
        assert_eq!(of(vec![pod(new, false), pod(old, true)]), Some(Revision(0xa1)), "the new one starts");
        assert_eq!(of(vec![pod(new, true), pod(old, true)]), Some(Revision(0xb2)));
        assert_eq!(of(vec![pod(new, false)]), None);
    }
}
