//! What a pod's device API calls mean to the node: each becomes an input of the actor.

use std::sync::PoisonError;
use std::sync::{Arc, RwLock};

use spaceport_core::protocol::{AllowRefusal, CallerClass, Denial, Released, ScheduleQuery, Secret};
use tokio::sync::oneshot;

use crate::converge::{Caller, SpacePod};
use crate::device_api::{Denied, PodBackend, ScheduleOutcome};
use crate::node_actor::{Input, NodeHandle};

/// The id of a pod's app container, kept up to date by whoever watches the pod. A std lock: never held across an await.
pub type AppContainer = Arc<RwLock<String>>;

/// One Space's pod (N14: which one stands here, not in a call).
#[derive(Debug)]
pub struct SpaceBackend {
    pod: SpacePod,
    container: AppContainer,
    node: NodeHandle,
}

impl SpaceBackend {
    /// For the pod whose socket it will serve.
    pub fn new(pod: SpacePod, container: AppContainer, node: NodeHandle) -> Self {
        Self { pod, container, node }
    }

    fn caller(&self) -> Caller {
        let container = self.container.read().unwrap_or_else(PoisonError::into_inner).clone();
        Caller { pod: self.pod.clone(), container }
    }
}

impl PodBackend for SpaceBackend {
    async fn schedule(&self, query: ScheduleQuery) -> ScheduleOutcome {
        let ticket = self.node.ticket();
        let (reply, outcome) = oneshot::channel();
        // Acts if this future is dropped: the caller has gone.
        let place = self.node.withdraw(ticket);
        self.node.send(Input::Schedule {
            ticket,
            caller: self.caller(),
            task: query.task_id,
            size: query.size,
            declared_ms: query.duration_seconds.saturating_mul(1000),
            token: query.token,
            reply,
        });
        match outcome.await {
            Ok(outcome) => {
                place.disarm();
                outcome
            }
            // The agent stops.
            Err(_) => {
                ScheduleOutcome::Answer(Err(Denied { denial: Denial::BrokerUnavailable, caller: CallerClass::Guest }))
            }
        }
    }

    async fn allow(&self, allow_token: Secret, pid: i32) -> Result<(), AllowRefusal> {
        let pid = u32::try_from(pid).map_err(|_| AllowRefusal::ForeignProcess)?;
        let (reply, answer) = oneshot::channel();
        let pod_uid = self.pod.pod_uid.clone();
        self.node.send(Input::Allow { pod_uid, token: allow_token, pid, reply });
        answer.await.unwrap_or(Err(AllowRefusal::DeviceUnavailable))
    }

    async fn release(&self, allow_token: Secret, failed: bool) -> Released {
        let (reply, answer) = oneshot::channel();
        let pod_uid = self.pod.pod_uid.clone();
        self.node.send(Input::Release { pod_uid, token: allow_token, fail: failed, reply });
        // An agent that stops charges by its checkpoint; the function's result must not suffer.
        answer.await.unwrap_or(Released::Ended)
    }

    fn queue_size(&self) -> u32 {
        let view = self.node.view();
        let queued = view.borrow().queued.get(&self.pod.pod_uid).copied();
        queued.unwrap_or(0)
    }
}
