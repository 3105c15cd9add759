//! Domain to nodelink messages and back. Durations cross the wire, never timestamps (L20).

use spaceport_core::ids::Size;
use spaceport_proto::nodelink as link;

use crate::slots::{Slot, of_card};

use super::state::{Book, Caller, Card, Ending, EndingKind, FreedKind, Idle, Lease, Mark, Phase};

pub(super) fn size(size: Size) -> link::Size {
    match size {
        Size::Large => link::Size::Large,
        Size::Xlarge => link::Size::Xlarge,
    }
}

pub(super) fn read_size(size: link::Size) -> Option<Size> {
    match size {
        link::Size::Unspecified => None,
        link::Size::Large => Some(Size::Large),
        link::Size::Xlarge => Some(Size::Xlarge),
    }
}

pub(super) fn pod(caller: &Caller) -> link::Pod {
    link::Pod {
        namespace: caller.pod.namespace.clone(),
        space: caller.pod.space.clone(),
        space_uid: caller.pod.space_uid.clone(),
        pod_uid: caller.pod.pod_uid.clone(),
        container: caller.container.clone(),
        revision: caller.pod.revision.0,
    }
}

/// How many `large` slots of a card are out of use.
pub(super) fn quarantined(card: &Card, book: &Book) -> u32 {
    let parts = of_card(card.index, card.large_slots, Size::Large);
    let lost = parts.iter().filter(|part| book.quarantined.keys().any(|slot| slot.overlaps(**part))).count();
    // A card has at most two.
    lost as u32
}

pub(super) fn card(card: &Card, book: &Book) -> link::Card {
    link::Card {
        index: card.index,
        uuid: card.uuid.clone(),
        model: card.model.clone(),
        large_slots: card.large_slots,
        grantable: card.grantable,
        quarantined_slots: quarantined(card, book),
    }
}

pub(super) fn idle(slot: Slot, idle: &Idle) -> link::IdleWorker {
    link::IdleWorker {
        pod_uid: idle.caller.pod.pod_uid.clone(),
        container: idle.caller.container.clone(),
        task_id: idle.task,
        card: slot.card,
        size: size(slot.size()).into(),
        leaving: false,
    }
}

pub(super) fn leaving(slot: Slot) -> link::IdleWorker {
    let (card, size) = (slot.card, size(slot.size()).into());
    link::IdleWorker { card, size, leaving: true, ..link::IdleWorker::default() }
}

fn boundaries(marks: &[Mark], now_ms: u64) -> Vec<link::Boundary> {
    marks
        .iter()
        .map(|mark| link::Boundary {
            name: mark.name.clone(),
            ago_ms: now_ms.saturating_sub(mark.at_ms),
            detail: mark.detail.clone(),
        })
        .collect()
}

pub(super) fn started(lease: &Lease, isolation: &str, now_ms: u64) -> link::Started {
    link::Started {
        lease: lease.id.clone(),
        card: lease.slot.map_or(0, |slot| slot.card),
        slot: lease.slot.map_or(0, |slot| slot.index()),
        isolation: isolation.to_owned(),
        waiting: lease.phase == Phase::Waiting,
        boundaries: boundaries(&lease.marks, now_ms),
        slot_picked: lease.slot.is_some(),
    }
}

pub(super) fn running(lease: &Lease, reused: bool, now_ms: u64) -> link::Running {
    link::Running { lease: lease.id.clone(), reused, boundaries: boundaries(&lease.marks, now_ms) }
}

fn end_kind(kind: EndingKind) -> link::EndKind {
    match kind {
        EndingKind::Released => link::EndKind::Released,
        EndingKind::Failed => link::EndKind::Failed,
        EndingKind::WorkerDied => link::EndKind::WorkerDied,
        EndingKind::Deadline => link::EndKind::Deadline,
        EndingKind::NeverAllowed => link::EndKind::NeverAllowed,
        EndingKind::Undelivered => link::EndKind::Undelivered,
        EndingKind::Cancelled => link::EndKind::Cancelled,
        EndingKind::PlatformFault => link::EndKind::PlatformFault,
        EndingKind::NoDevice => link::EndKind::NoDevice,
    }
}

fn ended_message(lease: &str, ending: &Ending) -> link::Ended {
    link::Ended {
        lease: lease.to_owned(),
        kind: end_kind(ending.kind).into(),
        used_ms: ending.used_ms,
        device_opens: ending.opens,
        context_seen: false,
        message: ending.message.clone(),
        boundaries: Vec::new(),
        card: 0,
        kept: false,
    }
}

/// `None` if the lease is not over.
pub(super) fn ended(lease: &Lease, now_ms: u64) -> Option<link::Ended> {
    let Phase::Ended { ending, freed, .. } = &lease.phase else { return None };
    Some(link::Ended {
        context_seen: lease.context_seen,
        boundaries: boundaries(&lease.marks, now_ms),
        card: lease.slot.map_or(0, |slot| slot.card),
        kept: matches!(freed, Some((FreedKind::Held, _))),
        ..ended_message(&lease.id, ending)
    })
}

/// The answer to a Cancel of a lease that is not here.
pub(super) fn unknown_ended(lease: &str, ending: &Ending) -> link::Ended {
    ended_message(lease, ending)
}

/// `None` while the slot has not come back.
pub(super) fn freed(lease: &Lease, now_ms: u64) -> Option<link::Freed> {
    let Phase::Ended { freed: Some((kind, reason)), .. } = &lease.phase else { return None };
    let kind = match kind {
        FreedKind::Free => link::FreedKind::Free,
        FreedKind::Held => link::FreedKind::Held,
        FreedKind::Quarantined => link::FreedKind::Quarantined,
    };
    Some(link::Freed {
        lease: lease.id.clone(),
        kind: kind.into(),
        reason: reason.clone(),
        boundaries: boundaries(&lease.marks, now_ms),
    })
}

/// The answer to a Cancel of a lease that is not here.
pub(super) fn unknown_freed(lease: &str) -> link::Freed {
    link::Freed {
        lease: lease.to_owned(),
        kind: link::FreedKind::Free.into(),
        reason: "this node does not know the lease".to_owned(),
        boundaries: Vec::new(),
    }
}

pub(super) fn node_lease(lease: &Lease, now_ms: u64) -> link::NodeLease {
    let (phase, running_ms) = match &lease.phase {
        Phase::Waiting | Phase::Assigned { .. } | Phase::Starting { .. } => (link::LeasePhase::Assigned, 0),
        Phase::Running { started_ms, .. } => (link::LeasePhase::Running, now_ms.saturating_sub(*started_ms)),
        Phase::Closing { ending, .. } => (link::LeasePhase::Running, ending.used_ms),
        Phase::Ended { .. } => (link::LeasePhase::Ended, 0),
    };
    link::NodeLease {
        lease: lease.id.clone(),
        phase: phase.into(),
        size: size(lease.size).into(),
        card: lease.slot.map_or(0, |slot| slot.card),
        running_ms,
        ended: ended(lease, now_ms),
        freed: matches!(&lease.phase, Phase::Ended { freed: Some(_), .. }),
        waiting: lease.phase == Phase::Waiting,
        slot_picked: lease.slot.is_some(),
        account: lease.account.clone(),
    }
}
