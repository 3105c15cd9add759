//! The data of the machine; all of it goes into the checkpoint.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use spaceport_core::ids::{Revision, Size};
use spaceport_core::protocol::Secret;
use spaceport_proto::nodelink as link;

use super::places::Place;
use super::{DEATH_GRACE_MS, REPEAT_MS, REUSED_DEATH_GRACE_MS};
use crate::slots::Slot;

/// The pod behind a device API socket.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SpacePod {
    /// Namespace of pod and Space.
    pub namespace: String,
    /// Name of the pod.
    pub name: String,
    /// Name of the Space.
    pub space: String,
    /// uid of the Space.
    pub space_uid: String,
    /// uid of the pod.
    pub pod_uid: String,
    /// Which version of the Space's app it runs; not known to checkpoints of before.
    #[serde(default)]
    pub revision: Revision,
}

/// A container of a pod: who schedules, allows and releases.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Caller {
    /// Its pod.
    pub pod: SpacePod,
    /// Container id of the app container; changes when it restarts.
    pub container: String,
}

/// A card as leases see it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Card {
    /// NVML index.
    pub index: u32,
    /// NVML UUID, what `CUDA_VISIBLE_DEVICES` takes.
    pub uuid: String,
    /// Product name.
    pub model: String,
    /// How many `large` slots it has: 2 for halves, 1 where `large` is the whole card.
    pub large_slots: u32,
    /// New leases are possible.
    pub grantable: bool,
    /// Why it is sick, if it is: its leases end as PlatformFault (N20).
    pub fault: Option<String>,
}

/// An allowed process and its cgroup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Worker {
    /// Host pid.
    pub pid: u32,
    /// Start time in clock ticks (`/proc/<pid>/stat`): with the pid it names the process for good.
    pub start_ticks: u64,
    /// Directory of its lease cgroup. A reused worker keeps the one of its first lease.
    pub cgroup: PathBuf,
    /// Id of that cgroup: the key of the gate.
    pub cgroup_id: u64,
    /// Host pid of the process that forked it, as at its `/allow`; `None` where an earlier agent did not record it.
    #[serde(default)]
    pub parent: Option<u32>,
    /// It opened a device in an earlier lease; a reused worker does not open it again.
    pub opened: bool,
}

/// One boundary in a lease's life (invariant 12).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Mark {
    /// `Assigned`, `Allowed`, `Reused`, `DeviceOpened`, `ContextSeen`, `Released`, `GateClosed`, `Freed`, ...
    pub name: String,
    /// BOOTTIME.
    pub at_ms: u64,
    /// Numbers.
    pub detail: String,
}

/// How a lease ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum EndingKind {
    /// `/release` with fail=false.
    Released,
    /// `/release` with fail=true.
    Failed,
    /// The worker died by itself.
    WorkerDied,
    /// Killed at declared end plus grace.
    Deadline,
    /// `/allow` did not come.
    NeverAllowed,
    /// The caller was gone before the answer reached it.
    Undelivered,
    /// Cancel order.
    Cancelled,
    /// Card, gate or node failed.
    PlatformFault,
    /// Failed without ever seeing a GPU.
    NoDevice,
}

/// An ending with its numbers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Ending {
    /// How.
    pub kind: EndingKind,
    /// From clock start to end.
    pub used_ms: u64,
    /// Opens counted by the gate.
    pub opens: u64,
    /// One sentence, with the numbers.
    pub message: String,
}

/// What became of the slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FreedKind {
    /// Gate closed, memory back.
    Free,
    /// The worker is kept frozen for reuse.
    Held,
    /// Did not clear in time.
    Quarantined,
}

/// Something the broker must acknowledge (L10).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// It did.
    pub acknowledged: bool,
    /// When it was last sent, BOOTTIME.
    pub sent_ms: u64,
}

/// Where a lease stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Phase {
    /// Its slot is reserved but still clears; the client waits.
    Waiting,
    /// The client has its answer; `/allow` has not come.
    #[serde(rename_all = "camelCase")]
    Assigned {
        /// When it was answered.
        since_ms: u64,
    },
    /// The worker is being admitted, or an idle one thawed: hardware is touched.
    #[serde(rename_all = "camelCase")]
    Starting {
        /// `/allow` to reply to; `None` for an idle worker.
        call: Option<u64>,
        /// When it was assigned, to go back to if the pid is refused.
        since_ms: u64,
    },
    /// The clock runs.
    #[serde(rename_all = "camelCase")]
    Running {
        /// Clock start, BOOTTIME.
        started_ms: u64,
        /// An idle worker was reused.
        reused: bool,
        /// The worker ended by itself at this time and its parent has not said so yet.
        died_ms: Option<u64>,
    },
    /// The clock has stopped; the gate is being closed.
    #[serde(rename_all = "camelCase")]
    Closing {
        /// What to report; the opens are not counted yet.
        ending: Ending,
        /// `/release` to reply to.
        call: Option<u64>,
    },
    /// Over. Kept until the broker has acknowledged both reports.
    #[serde(rename_all = "camelCase")]
    Ended {
        /// How.
        ending: Ending,
        /// Of `Ended`.
        report: Report,
        /// What became of the slot; `None` while it clears.
        freed: Option<(FreedKind, String)>,
        /// Of `Freed`.
        freed_report: Report,
    },
}

/// What matters of a lease's order until it has begun.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Order {
    /// Its term: a later leader does not know which request the lease is for.
    pub epoch: u64,
    /// BOOTTIME after which it may not begin any more, for the broker may have given it up (L9).
    pub begin_by_ms: u64,
    /// How long it might wait here when it came.
    pub wait_limit_ms: u64,
    /// Where its request waited, in case it has to go back (L17).
    pub place: Option<Place>,
}

/// One lease on this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Lease {
    /// ULID minted by the broker; also the client's `allowToken`: only the pod it was given to can present it.
    pub id: String,
    /// Order of arrival.
    pub arrival: u64,
    /// Of the request.
    pub ticket: u64,
    /// Whose it is.
    pub caller: Caller,
    /// CPython `id()` of the function.
    pub task: u64,
    /// Half or whole card.
    pub size: Size,
    /// Where. `None` only while it waits for a slot that another lease still owns (L14), and after a loss.
    pub slot: Option<Slot>,
    /// Of its order. Never written down: what has not begun ends with its agent.
    #[serde(skip)]
    pub order: Order,
    /// The lease whose slot it waits for (L14).
    pub after: Option<String>,
    /// Cards it may not use (L7).
    pub avoid: Vec<u32>,
    /// Longest run.
    pub declared_ms: u64,
    /// Added to it before the kill.
    pub grace_ms: u64,
    /// How long `/allow` may take.
    pub allow_limit_ms: u64,
    /// How long clearing may take.
    pub clear_limit_ms: u64,
    /// Class of the account (`nodelink.CallerClass`).
    pub class: i32,
    /// Who pays, for a later leader that does not know the lease (L7); empty where an earlier agent did not record it.
    #[serde(default)]
    pub account: String,
    /// `X-IP-Token` of the request, in case it has to go back to the broker. Never written down.
    #[serde(skip)]
    pub token: Option<Secret>,
    /// Where it stands.
    pub phase: Phase,
    /// Its worker, once allowed.
    pub worker: Option<Worker>,
    /// NVML has shown its worker on the card.
    pub context_seen: bool,
    /// The agent restarted since it was answered: the client may not have the answer (L16).
    pub uncertain: bool,
    /// Its timeline.
    pub marks: Vec<Mark>,
}

impl Order {
    /// An order that is taken. Its stamp was made before it was sent, so `begin_by_ms` comes before the broker's bound for the
    /// same wait.
    pub(super) fn taken(order: &link::Start, place: Option<Place>) -> Self {
        let wait_limit_ms = order.order_ttl_ms.saturating_add(order.wait_limit_ms);
        Self { epoch: order.epoch, begin_by_ms: order.boottime_ms.saturating_add(wait_limit_ms), wait_limit_ms, place }
    }

    pub(super) const fn is_overdue(&self, now_ms: u64) -> bool {
        self.begin_by_ms < now_ms
    }

    pub(super) fn overdue_reason(&self) -> String {
        format!("no slot for it was clear within {} ms of its order", self.wait_limit_ms)
    }
}

impl Lease {
    pub(super) fn mark(&mut self, now_ms: u64, name: &str, detail: impl Into<String>) {
        self.marks.push(Mark { name: name.to_owned(), at_ms: now_ms, detail: detail.into() });
    }

    /// Adds a boundary of a running worker that is heard of after later ones: of those of its millisecond it is behind what lets
    /// it begin, and before what ends it.
    pub(super) fn mark_earlier(&mut self, at_ms: u64, name: &str, detail: String) {
        let lets_begin = |mark: &Mark| matches!(mark.name.as_str(), "Assigned" | "Allowed" | "Reused");
        let is_later = |mark: &Mark| mark.at_ms > at_ms || (mark.at_ms == at_ms && !lets_begin(mark));
        let place = self.marks.iter().position(is_later).unwrap_or(self.marks.len());
        self.marks.insert(place, Mark { name: name.to_owned(), at_ms, detail });
    }

    pub(super) fn deadline_ms(&self, started_ms: u64) -> u64 {
        started_ms.saturating_add(self.declared_ms).saturating_add(self.grace_ms)
    }

    pub(super) fn death_limit_ms(died_ms: u64, reused: bool) -> u64 {
        died_ms.saturating_add(if reused { REUSED_DEATH_GRACE_MS } else { DEATH_GRACE_MS })
    }

    /// Its own worker that it got back, as long as nobody has noticed that this one died.
    pub(super) fn reused_worker(&self) -> Option<&Worker> {
        matches!(self.phase, Phase::Running { reused: true, died_ms: None, .. })
            .then_some(self.worker.as_ref())
            .flatten()
    }

    pub(super) fn next_wake(&self, linked: bool) -> Option<u64> {
        match &self.phase {
            Phase::Waiting => Some(self.order.begin_by_ms.saturating_add(1)),
            Phase::Starting { .. } | Phase::Closing { .. } => None,
            Phase::Assigned { since_ms } => Some(since_ms.saturating_add(self.allow_limit_ms)),
            Phase::Running { started_ms, reused, died_ms } => {
                let deadline = self.deadline_ms(*started_ms);
                Some(died_ms.map_or(deadline, |died| Self::death_limit_ms(died, *reused).min(deadline)))
            }
            Phase::Ended { report, freed, freed_report, .. } => {
                let unsent =
                    |report: &Report| (!report.acknowledged).then_some(report.sent_ms.saturating_add(REPEAT_MS));
                let freed = freed.as_ref().and_then(|_| unsent(freed_report));
                linked.then(|| unsent(report).into_iter().chain(freed).min()).flatten()
            }
        }
    }

    pub(super) fn is_over(&self) -> bool {
        matches!(self.phase, Phase::Ended { .. })
    }

    /// Class of the account.
    pub fn caller_class(&self) -> link::CallerClass {
        link::CallerClass::try_from(self.class).unwrap_or_default()
    }
}

/// A frozen worker that keeps its slot until somebody needs it (N12, L16).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Idle {
    /// Whose it is.
    pub caller: Caller,
    /// The function it was forked for.
    pub task: u64,
    /// The process.
    pub worker: Worker,
    /// Limit for clearing it.
    pub clear_limit_ms: u64,
    /// Since when it is idle.
    pub since_ms: u64,
}

/// A worker whose slot is on its way back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Clearing {
    /// Which slot it holds up.
    pub slot: Slot,
    /// Reports `Freed` when it is done; `None` for an evicted idle worker.
    pub lease: Option<String>,
    /// What is being cleared.
    pub worker: Worker,
    /// When it is overdue.
    pub limit_ms: u64,
}

/// Who has which slot. A slot in none of the maps is free.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Book {
    /// Leases that are waiting for their slot, assigned or running.
    #[serde(with = "pairs")]
    pub owners: BTreeMap<Slot, String>,
    /// Frozen workers.
    #[serde(with = "pairs")]
    pub idle: BTreeMap<Slot, Idle>,
    /// Workers on the way out, by the id of their cgroup.
    #[serde(with = "pairs")]
    pub clearing: BTreeMap<u64, Clearing>,
    /// Did not come back in time, with the reason.
    #[serde(with = "pairs")]
    pub quarantined: BTreeMap<Slot, String>,
}

impl Book {
    /// Something is on its way out of some part of the slot.
    pub(super) fn clears(&self, slot: Slot) -> bool {
        self.clearing.values().any(|clearing| clearing.slot.overlaps(slot))
    }

    /// Invariant 6: no two owners overlap.
    pub(super) fn assert_exclusive(&self) {
        let slots: Vec<&Slot> = self.owners.keys().collect();
        for (at, slot) in slots.iter().enumerate() {
            let alone = slots[at + 1..].iter().all(|other| !other.overlaps(**slot));
            assert!(alone, "two leases own overlapping slots: {:?}", self.owners);
        }
    }
}

/// What the checkpoint keeps.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Snapshot {
    /// All leases not yet forgotten.
    pub leases: Vec<Lease>,
    /// Who has which slot.
    pub book: Book,
}

/// Maps keyed by a struct, as lists of pairs: JSON keys are text.
mod pairs {
    use std::collections::BTreeMap;

    use serde::de::DeserializeOwned;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<K: Serialize, V: Serialize, S: Serializer>(
        map: &BTreeMap<K, V>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(map)
    }

    pub(super) fn deserialize<'de, K: DeserializeOwned + Ord, V: DeserializeOwned, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<BTreeMap<K, V>, D::Error> {
        Ok(Vec::<(K, V)>::deserialize(deserializer)?.into_iter().collect())
    }
}
