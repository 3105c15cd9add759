//! Nodelink messages as the ledger's commands, and the ledger's effects as nodelink messages. Pure.

use spaceport_core::ids::{AccountName, Epoch, LeaseId, NodeName, Size, WorkerKey};
use spaceport_core::lease::{
    AgentLease, AgentPhase, Command, EndReport, FreedAs, IdleWorker, Order, PickedSlot, Place,
};
use spaceport_core::page::Ending;
use spaceport_core::protocol::{CallerClass, Denial};
use spaceport_core::queue::{Presented, Promised, WaitsFor};
use spaceport_core::slots::Card;
use spaceport_proto::nodelink as proto;
use spaceport_proto::nodelink::broker_message::Message as Outgoing;
use spaceport_proto::nodelink::node_message::Message as Incoming;

/// Most workers that a node keeps: one on each slot, and 16 cards have two slots each. Of a message that does not say which
/// cards there are.
const IDLE_MAX: u64 = 128;

/// A message that makes no sense; the session that sent it is ended, and the agent begins anew.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}: {problem}")]
pub struct Nonsense {
    message: &'static str,
    problem: &'static str,
}

/// The command of a report. None for messages that are no reports: Hello, Request and Dequeue need more than the message.
///
/// # Errors
/// [`Nonsense`].
pub fn command(node: &NodeName, message: &Incoming) -> Result<Option<Command>, Nonsense> {
    let node = node.clone();
    Ok(Some(match message {
        Incoming::Hello(_) | Incoming::Request(_) | Incoming::Dequeue(_) => return Ok(None),
        Incoming::Joined(joined) => Command::NodeJoined {
            node,
            epoch: Epoch(joined.epoch),
            cards: joined.cards.iter().map(card).collect(),
            leases: joined.leases.iter().map(agent_lease).collect::<Result<_, _>>()?,
            idle: idle_workers("Joined", &joined.idle, Some(&joined.cards))?,
        },
        Incoming::Heartbeat(heartbeat) => Command::Heartbeat {
            node,
            cards: heartbeat.inventory_changed.then(|| heartbeat.cards.iter().map(card).collect()),
            idle: if heartbeat.idle_changed {
                let cards = heartbeat.inventory_changed.then_some(heartbeat.cards.as_slice());
                Some(idle_workers("Heartbeat", &heartbeat.idle, cards)?)
            } else {
                None
            },
        },
        Incoming::Started(started) => Command::Started {
            node,
            lease: LeaseId::new(&started.lease),
            slot: picked(started.waiting, started.slot_picked, started.card),
        },
        Incoming::Refused(refused) => Command::Refused { node, lease: LeaseId::new(&refused.lease) },
        Incoming::Running(running) => Command::Running { node, lease: LeaseId::new(&running.lease) },
        Incoming::Ended(ended) => {
            let (lease, report) = (LeaseId::new(&ended.lease), end_report(ended)?);
            Command::Ended { node, lease, report, kept: ended.kept }
        }
        Incoming::Freed(freed) => Command::Freed {
            node,
            lease: LeaseId::new(&freed.lease),
            how: match freed.kind() {
                proto::FreedKind::Free => FreedAs::Free,
                proto::FreedKind::Held => FreedAs::Held,
                proto::FreedKind::Quarantined => FreedAs::Quarantined,
                proto::FreedKind::Unspecified => return Err(Nonsense { message: "Freed", problem: "no kind" }),
            },
        },
    }))
}

/// The slot of a lease that waits for one or has it.
const fn picked(waiting: bool, slot_picked: bool, card: u32) -> PickedSlot {
    match (waiting, slot_picked) {
        (false, _) => PickedSlot::Has(card),
        (true, true) => PickedSlot::Awaits(card),
        (true, false) => PickedSlot::Open,
    }
}

/// What a request was told before it is presented here; none if nothing.
pub fn presented(request: &proto::Request) -> Option<Presented> {
    let promised = Promised { wait_ms: request.promised_ms, ago_ms: request.promised_ago_ms };
    (request.place_number > 0).then_some(Presented {
        epoch: Epoch(request.place_epoch),
        number: request.place_number,
        promised: (promised.wait_ms > 0).then_some(promised),
    })
}

/// Whose kept worker can serve a request; none if it does not say which function of which container it is of.
pub fn worker(pod: &proto::Pod, task: u64) -> Option<WorkerKey> {
    WorkerKey::new(&pod.pod_uid, &pod.container, task)
}

/// `cards` are those of the message, if it has them.
fn idle_workers(
    message: &'static str,
    idle: &[proto::IdleWorker],
    cards: Option<&[proto::Card]>,
) -> Result<Vec<IdleWorker>, Nonsense> {
    let slots = cards.map(|cards| cards.iter().map(|card| u64::from(card.large_slots)).sum::<u64>());
    if idle.len() as u64 > slots.unwrap_or(IDLE_MAX).min(IDLE_MAX) {
        return Err(Nonsense { message, problem: "more kept workers than slots" });
    }
    let parsed = |idle: &proto::IdleWorker| -> Result<IdleWorker, Nonsense> {
        let named = WorkerKey::new(&idle.pod_uid, &idle.container, idle.task_id);
        let worker = named.filter(|_| !idle.leaving);
        if worker.is_none() && !idle.leaving {
            return Err(Nonsense { message, problem: "a kept worker without the names of its pod and container" });
        }
        let size =
            size(idle.size()).ok_or(Nonsense { message, problem: "a kept worker without the size of its slot" })?;
        Ok(IdleWorker { worker, card: idle.card, size })
    };
    idle.iter().map(parsed).collect()
}

fn card(card: &proto::Card) -> Card {
    Card {
        index: card.index,
        large_slots: card.large_slots,
        grantable: card.grantable,
        quarantined_slots: card.quarantined_slots,
    }
}

fn agent_lease(lease: &proto::NodeLease) -> Result<AgentLease, Nonsense> {
    let wrong = |problem| Nonsense { message: "Joined", problem };
    let phase = match lease.phase() {
        proto::LeasePhase::Assigned => AgentPhase::Assigned,
        proto::LeasePhase::Running => AgentPhase::Running,
        proto::LeasePhase::Ended => {
            let ended = lease.ended.as_ref().ok_or(wrong("an ended lease without its end"))?;
            AgentPhase::Ended { report: end_report(ended)?, freed: lease.freed }
        }
        proto::LeasePhase::Unspecified => return Err(wrong("a lease without phase")),
    };
    let size = size(lease.size()).ok_or(wrong("a lease without size"))?;
    let slot = picked(lease.waiting, lease.slot_picked, lease.card);
    let account = (!lease.account.is_empty()).then(|| AccountName::new(&lease.account));
    Ok(AgentLease { lease: LeaseId::new(&lease.lease), account, size, slot, phase })
}

fn end_report(ended: &proto::Ended) -> Result<EndReport, Nonsense> {
    let ending = match ended.kind() {
        proto::EndKind::Released => Ending::Released,
        proto::EndKind::Failed => Ending::Failed,
        proto::EndKind::WorkerDied => Ending::WorkerDied,
        proto::EndKind::Deadline => Ending::Deadline,
        proto::EndKind::NeverAllowed => Ending::NeverAllowed,
        proto::EndKind::Undelivered => Ending::Undelivered,
        proto::EndKind::Cancelled => Ending::Cancelled,
        proto::EndKind::PlatformFault => Ending::PlatformFault,
        proto::EndKind::NoDevice => Ending::NoDevice,
        proto::EndKind::Unspecified => return Err(Nonsense { message: "Ended", problem: "no kind" }),
    };
    Ok(EndReport { ending, used_ms: ended.used_ms })
}

/// A size on the wire; none if it is not given.
pub const fn size(size: proto::Size) -> Option<Size> {
    match size {
        proto::Size::Large => Some(Size::Large),
        proto::Size::Xlarge => Some(Size::Xlarge),
        proto::Size::Unspecified => None,
    }
}

const fn caller(class: CallerClass) -> proto::CallerClass {
    match class {
        CallerClass::Guest => proto::CallerClass::Guest,
        CallerClass::Regular => proto::CallerClass::Regular,
        CallerClass::Pro => proto::CallerClass::Pro,
    }
}

/// The order to begin a lease. `boottime_ms` is the node's last stamp (L8).
pub fn start(order: &Order, boottime_ms: u64) -> Outgoing {
    let size = match order.size {
        Size::Large => proto::Size::Large,
        Size::Xlarge => proto::Size::Xlarge,
    };
    Outgoing::Start(proto::Start {
        epoch: order.epoch.0,
        boottime_ms,
        lease: order.lease.to_string(),
        ticket: order.ticket.number,
        agent_instance: order.ticket.agent_instance.to_string(),
        size: size.into(),
        declared_ms: order.declared_ms,
        grace_ms: order.limits.grace_ms,
        allow_limit_ms: order.limits.allow_limit_ms,
        clear_limit_ms: order.limits.clear_limit_ms,
        order_ttl_ms: order.limits.order_ttl_ms,
        after: order.after.as_ref().map(ToString::to_string).unwrap_or_default(),
        avoid: order.avoid.clone(),
        caller: caller(order.caller).into(),
        wait_limit_ms: order.wait_ms,
        account: order.account.to_string(),
    })
}

/// The order to end a lease.
pub fn cancel(epoch: Epoch, lease: &LeaseId, reason: &str, boottime_ms: u64, order_ttl_ms: u64) -> Outgoing {
    Outgoing::Cancel(proto::Cancel {
        epoch: epoch.0,
        boottime_ms,
        lease: lease.to_string(),
        reason: reason.to_owned(),
        order_ttl_ms,
    })
}

/// A report that need not be repeated.
pub fn acknowledged(lease: &LeaseId, ended: bool, freed: bool) -> Outgoing {
    Outgoing::Acknowledged(proto::Acknowledged { lease: lease.to_string(), ended, freed })
}

/// A refusal for its agent.
///
/// # Errors
/// The denial cannot be written as JSON; none of its values causes that.
pub fn denied(number: u64, denial: &Denial, class: CallerClass) -> Result<Outgoing, serde_json::Error> {
    Ok(Outgoing::Denied(proto::Denied {
        ticket: number,
        denial: serde_json::to_string(denial)?,
        caller: caller(class).into(),
    }))
}

/// A place in the queue for its agent.
pub fn queued(place: &Place) -> Outgoing {
    Outgoing::Queued(proto::Queued {
        ticket: place.ticket.number,
        concurrency: place.waits_for != WaitsFor::Node,
        position: place.position,
        eta_ms: place.eta_ms,
        latest_start_ms: place.latest_start_ms.unwrap_or(0),
        place_epoch: place.place.0.0,
        place_number: place.place.1,
        caller: caller(place.caller).into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_without_its_kind_is_nonsense() {
        let node = NodeName::new("gpu-1");
        let ended = Incoming::Ended(proto::Ended { lease: "x".to_owned(), ..proto::Ended::default() });
        assert_eq!(command(&node, &ended).unwrap_err().to_string(), "Ended: no kind");
        let freed = Incoming::Freed(proto::Freed { lease: "x".to_owned(), ..proto::Freed::default() });
        assert_eq!(command(&node, &freed).unwrap_err().to_string(), "Freed: no kind");
        let lease = proto::NodeLease { phase: proto::LeasePhase::Ended.into(), ..proto::NodeLease::default() };
        let joined = Incoming::Joined(proto::Joined { leases: vec![lease], ..proto::Joined::default() });
        assert!(command(&node, &joined).is_err());
    }

    fn kept(task_id: u64) -> proto::IdleWorker {
        let (pod_uid, container) = ("pod".to_owned(), "container".to_owned());
        proto::IdleWorker { pod_uid, container, task_id, card: 3, size: proto::Size::Xlarge.into(), leaving: false }
    }

    fn joined(slots: u32, idle: Vec<proto::IdleWorker>) -> Incoming {
        let card = proto::Card { large_slots: slots, ..proto::Card::default() };
        Incoming::Joined(proto::Joined { cards: vec![card], idle, ..proto::Joined::default() })
    }

    #[test]
    fn kept_workers_are_told_as_a_whole_or_not_at_all() {
        let node = NodeName::new("gpu-1");
        let expected = IdleWorker { worker: WorkerKey::new("pod", "container", 7), card: 3, size: Size::Xlarge };
        match command(&node, &joined(2, vec![kept(7)])) {
            Ok(Some(Command::NodeJoined { idle, .. })) => assert_eq!(idle, std::slice::from_ref(&expected)),
            other => panic!("{other:?}"),
        }
        let told = |idle_changed, idle| {
            let heartbeat = proto::Heartbeat { idle_changed, idle, ..proto::Heartbeat::default() };
            match command(&node, &Incoming::Heartbeat(heartbeat)) {
                Ok(Some(Command::Heartbeat { idle, cards: None, .. })) => idle,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(told(true, vec![kept(7)]), Some(vec![expected.clone()]));
        let leaving = proto::IdleWorker { leaving: true, ..kept(7) };
        assert_eq!(told(true, vec![leaving]), Some(vec![IdleWorker { worker: None, ..expected }]));
        assert_eq!(told(true, Vec::new()), Some(Vec::new()), "none any more");
        assert_eq!(told(false, Vec::new()), None, "as before");
    }

    #[test]
    fn an_end_says_whether_its_worker_is_kept() {
        let told = |kept| {
            let kind = proto::EndKind::Released.into();
            let ended = proto::Ended { lease: "x".to_owned(), kind, kept, ..proto::Ended::default() };
            match command(&NodeName::new("gpu-1"), &Incoming::Ended(ended)) {
                Ok(Some(Command::Ended { kept, .. })) => kept,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!((told(true), told(false)), (true, false));
    }

    #[test]
    fn a_node_keeps_no_more_workers_than_it_has_slots_and_names_each() {
        let node = NodeName::new("gpu-1");
        let problem = |message: &Incoming| command(&node, message).unwrap_err().to_string();
        assert!(command(&node, &joined(2, vec![kept(1), kept(2)])).is_ok());
        let more = vec![kept(1), kept(2), kept(3)];
        assert_eq!(problem(&joined(2, more)), "Joined: more kept workers than slots");
        let many = (0..=IDLE_MAX).map(kept).collect();
        assert_eq!(problem(&joined(u32::MAX, many)), "Joined: more kept workers than slots");
        let heartbeat =
            |idle| Incoming::Heartbeat(proto::Heartbeat { idle_changed: true, idle, ..proto::Heartbeat::default() });
        let many = (0..=IDLE_MAX).map(kept).collect();
        assert_eq!(problem(&heartbeat(many)), "Heartbeat: more kept workers than slots");
        let nameless = proto::IdleWorker { container: String::new(), ..kept(1) };
        let expected = "Heartbeat: a kept worker without the names of its pod and container";
        assert_eq!(problem(&heartbeat(vec![nameless])), expected);
        let sizeless = proto::IdleWorker { size: 0, ..kept(1) };
        assert_eq!(problem(&heartbeat(vec![sizeless])), "Heartbeat: a kept worker without the size of its slot");
        // One that says nothing of workers is not asked about them.
        let quiet = proto::Heartbeat { idle: vec![proto::IdleWorker::default()], ..proto::Heartbeat::default() };
        assert!(command(&node, &Incoming::Heartbeat(quiet)).is_ok());
    }

    #[test]
    fn a_request_names_the_function_that_its_worker_must_have_served() {
        let pod = proto::Pod { pod_uid: "pod".to_owned(), container: "container".to_owned(), ..proto::Pod::default() };
        assert_eq!(worker(&pod, 7), WorkerKey::new("pod", "container", 7));
        assert_eq!(worker(&proto::Pod::default(), 7), None);
    }

    #[test]
    fn a_lease_without_its_record_names_no_account() {
        let told = |account: &str| {
            let (size, phase) = (proto::Size::Large.into(), proto::LeasePhase::Running.into());
            let lease = proto::NodeLease { size, phase, account: account.to_owned(), ..proto::NodeLease::default() };
            agent_lease(&lease).unwrap().account
        };
        assert_eq!((told(""), told("bob")), (None, Some(AccountName::new("bob"))));
    }

    #[test]
    fn a_lease_that_waits_has_no_card_but_may_know_which_it_will_have() {
        let node = NodeName::new("gpu-1");
        let slot = |waiting, slot_picked| {
            let started =
                proto::Started { lease: "x".to_owned(), card: 3, waiting, slot_picked, ..proto::Started::default() };
            match command(&node, &Incoming::Started(started)) {
                Ok(Some(Command::Started { slot, .. })) => slot,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(slot(true, false), PickedSlot::Open);
        assert_eq!(slot(true, true), PickedSlot::Awaits(3));
        assert_eq!((slot(false, false), slot(false, true)), (PickedSlot::Has(3), PickedSlot::Has(3)));
    }

    #[test]
    fn a_request_presents_what_it_was_told() {
        let request = proto::Request::default();
        assert_eq!(presented(&request), None);
        let placed = proto::Request { place_epoch: 3, place_number: 9, ..request };
        let expected = Presented { epoch: Epoch(3), number: 9, promised: None };
        assert_eq!(presented(&placed), Some(expected));
        let promised = proto::Request { promised_ms: 60_000, promised_ago_ms: 5_000, ..placed };
        let promise = Promised { wait_ms: 60_000, ago_ms: 5_000 };
        assert_eq!(presented(&promised), Some(Presented { promised: Some(promise), ..expected }));
    }
}
