//! From a running clock back to a free slot: release, death, deadline, clearing, and the reports of it.

use spaceport_core::protocol::Released;
use spaceport_proto::nodelink::{self as link, node_message::Message};

use super::state::{Ending, EndingKind, FreedKind, Idle, Lease, Phase, Report};
use super::{Answer, Machine, NEIGHBOUR_MS, Step, wire};
use crate::gate::{Device, Opens};
use crate::slots::Slot;

impl Machine {
    pub(super) fn release(&mut self, now_ms: u64, call: u64, pod_uid: &str, token: &str, fail: bool) {
        let lease = self.leases.get(token).filter(|lease| lease.caller.pod.pod_uid == pod_uid);
        match lease.map(|lease| &lease.phase) {
            None | Some(Phase::Ended { .. } | Phase::Closing { .. }) => {
                self.steps.push_back(Step::ReplyRelease { call, reply: Released::Unknown });
            }
            Some(Phase::Running { .. }) => {
                let (kind, message) = if fail {
                    (EndingKind::Failed, "the function failed")
                } else {
                    (EndingKind::Released, "the function returned")
                };
                self.end(now_ms, token, kind, message, Some(call));
            }
            // The visitor left, or /allow was refused: nothing ran, nothing is charged (invariant 4).
            Some(Phase::Waiting | Phase::Assigned { .. } | Phase::Starting { .. }) => {
                let message = "released before a worker was allowed";
                self.end(now_ms, token, EndingKind::NeverAllowed, message, Some(call));
            }
        }
    }

    /// Stops the clock. What has a worker is finished when its gate is closed, the rest at once.
    pub(super) fn end(&mut self, now_ms: u64, id: &str, kind: EndingKind, message: &str, call: Option<u64>) {
        let Some(lease) = self.leases.get_mut(id) else { return };
        let ending = |used_ms| Ending { kind, used_ms, opens: 0, message: message.to_owned() };
        match lease.phase {
            Phase::Ended { .. } | Phase::Closing { .. } => {}
            Phase::Waiting | Phase::Assigned { .. } | Phase::Starting { .. } => {
                if matches!(lease.phase, Phase::Waiting | Phase::Starting { call: None, .. }) {
                    // Its caller has no answer yet, and would wait for one.
                    let answer = Answer::Unavailable { reason: message.to_owned() };
                    self.steps.push_back(Step::Answer { ticket: lease.ticket, answer });
                }
                lease.mark(now_ms, mark_of(kind), message);
                lease.phase = Phase::Closing { ending: ending(0), call };
                self.dirty = true;
                self.finish(now_ms, id, 0, false);
            }
            Phase::Running { started_ms, died_ms, .. } => {
                // A worker that died by itself used the card until then, not until its parent said so.
                let stopped_ms = died_ms.unwrap_or(now_ms);
                let ending = ending(stopped_ms.saturating_sub(started_ms));
                lease.mark(now_ms, mark_of(kind), format!("{message}, {} ms used", ending.used_ms));
                lease.phase = Phase::Closing { ending, call };
                self.dirty = true;
                if let Some(worker) = lease.worker.clone() {
                    let caller = lease.caller.clone();
                    self.steps.push_back(Step::CloseGate { lease: id.to_owned(), worker, caller });
                } else {
                    self.finish(now_ms, id, 0, false);
                }
                if died_ms.is_some()
                    && let Some(lease) = self.leases.get_mut(id)
                {
                    lease.mark(stopped_ms, "WorkerExited", "");
                }
            }
        }
    }

    pub(super) fn gate_closed(&mut self, now_ms: u64, id: &str, opens: &Opens) {
        let Some(lease) = self.leases.get_mut(id) else { return };
        let died = lease.marks.iter().any(|mark| mark.name == "WorkerExited");
        if let Some(first) = opens.first {
            // A worker of a reused lease that kept its descriptor does not open again: then there is no such line.
            let Device { major, minor } = first.device;
            lease.mark_earlier(first.at_ms, "DeviceOpened", format!("device {major}:{minor}"));
        }
        lease.mark(now_ms, "GateClosed", format!("{} opens", opens.count));
        self.finish(now_ms, id, opens.count, !died);
    }

    /// Settles a closing lease: answers its release, reports `Ended`, and decides what becomes of the slot.
    fn finish(&mut self, now_ms: u64, id: &str, opens: u64, worker_lives: bool) {
        let others_wait = self.leases.get(id).is_some_and(|lease| self.others_wait(lease));
        let disturbed = self.leases.get(id).and_then(|lease| self.disturbed_by(now_ms, lease));
        let Some(lease) = self.leases.get_mut(id) else { return };
        let Phase::Closing { ending, call } = &lease.phase else { return };
        let (mut ending, call) = (ending.clone(), *call);
        ending.opens = opens;
        let worker = lease.worker.clone();
        let saw_device = opens > 0 || lease.context_seen || worker.as_ref().is_some_and(|worker| worker.opened);
        if matches!(ending.kind, EndingKind::Failed | EndingKind::WorkerDied) && !saw_device {
            // N16: charge 0; the broker bounds it per Space and hour.
            ending.kind = EndingKind::NoDevice;
            ending.message.push_str("; its worker never opened the device");
        }
        if let Some(neighbour) = disturbed {
            ending.kind = EndingKind::PlatformFault;
            ending.message.push_str(&format!("; its neighbour {neighbour} on the card was killed just before"));
        }
        if let Some(call) = call {
            let unused = ending.kind == EndingKind::Released && !saw_device;
            let reply = if unused { Released::DeviceNotUsed } else { Released::Ended };
            self.steps.push_back(Step::ReplyRelease { call, reply });
        }
        let (slot, limit_ms) = (lease.slot, lease.clear_limit_ms);
        let grantable = |slot: Slot| self.cards.iter().any(|card| card.index == slot.card && card.grantable);
        let may_keep = ending.kind == EndingKind::Released && worker_lives && !others_wait;
        let kept = may_keep && worker.is_some() && slot.is_some_and(grantable);
        lease.phase = Phase::Ended {
            ending,
            report: Report { acknowledged: false, sent_ms: now_ms },
            freed: None,
            freed_report: Report::default(),
        };
        // Here what becomes of the slot is not on the lease yet.
        let ended = wire::ended(lease, now_ms).map(|ended| link::Ended { kept, ..ended });
        let (caller, task) = (lease.caller.clone(), lease.task);
        self.steps.extend(ended.map(|ended| Step::Send(Message::Ended(ended))));
        self.send_unsent(now_ms);
        self.book.owners.retain(|_, owner| owner != id);
        self.dirty = true;
        match (slot, worker) {
            (Some(slot), Some(mut worker)) if kept => {
                worker.opened = saw_device;
                self.steps.push_back(Step::Hold { worker: worker.clone(), card: slot.card });
                let idle = Idle { caller, task, worker, clear_limit_ms: limit_ms, since_ms: now_ms };
                self.expect_idle_look(now_ms);
                self.book.idle.insert(slot, idle);
                self.freed(now_ms, id, FreedKind::Held, "the worker is kept frozen for reuse");
            }
            (Some(slot), Some(worker)) => self.clear(slot, Some(id.to_owned()), worker, limit_ms),
            _ => self.freed(now_ms, id, FreedKind::Free, "no worker was allowed"),
        }
        self.begin_waiting(now_ms);
    }

    /// The neighbour on a shared card whose kill may have brought this lease down (N18): they share a fault domain.
    fn disturbed_by(&self, now_ms: u64, lease: &Lease) -> Option<String> {
        let Phase::Closing { ending, .. } = &lease.phase else { return None };
        let failed = matches!(ending.kind, EndingKind::Failed | EndingKind::WorkerDied) && lease.worker.is_some();
        let slot = lease.slot.filter(|slot| failed && self.memory_share(*slot) > 1)?;
        let (neighbour, at_ms) = self.trouble.get(&slot.card)?;
        let soon = now_ms.saturating_sub(*at_ms) <= NEIGHBOUR_MS;
        (soon && *neighbour != lease.id).then(|| neighbour.clone())
    }

    /// Remembers a kill, for [`Self::disturbed_by`].
    fn note_trouble(&mut self, now_ms: u64, id: &str) {
        let slot = self.leases.get(id).and_then(|lease| lease.worker.as_ref().and(lease.slot));
        if let Some(slot) = slot {
            self.trouble.insert(slot.card, (id.to_owned(), now_ms));
        }
    }

    fn freed(&mut self, now_ms: u64, id: &str, kind: FreedKind, reason: &str) {
        let Some(lease) = self.leases.get_mut(id) else { return };
        lease.mark(now_ms, "Freed", reason);
        if let Phase::Ended { freed, freed_report, .. } = &mut lease.phase {
            *freed = Some((kind, reason.to_owned()));
            *freed_report = Report { acknowledged: false, sent_ms: now_ms };
        }
        self.dirty = true;
        let message = wire::freed(lease, now_ms);
        self.steps.extend(message.map(|freed| Step::Send(Message::Freed(freed))));
    }

    pub(super) fn cleared(&mut self, now_ms: u64, cgroup_id: u64) {
        let Some(clearing) = self.book.clearing.remove(&cgroup_id) else { return };
        self.dirty = true;
        if self.book.quarantined.remove(&clearing.slot).is_some() {
            self.report_inventory();
        } else if let Some(id) = clearing.lease {
            self.freed(now_ms, &id, FreedKind::Free, "gate closed, processes and memory gone");
        }
        self.begin_waiting(now_ms);
    }

    pub(super) fn clear_overdue(&mut self, now_ms: u64, cgroup_id: u64, reason: &str) {
        let Some(clearing) = self.book.clearing.get_mut(&cgroup_id) else { return };
        let (slot, lease) = (clearing.slot, clearing.lease.take());
        self.book.quarantined.insert(slot, reason.to_owned());
        self.dirty = true;
        if let Some(id) = lease {
            self.freed(now_ms, &id, FreedKind::Quarantined, reason);
        }
        // Whoever waits for any part of this slot looks for another.
        let waiting: Vec<String> = self
            .leases
            .values()
            .filter(|lease| lease.phase == Phase::Waiting && lease.slot.is_some_and(|other| other.overlaps(slot)))
            .map(|lease| lease.id.clone())
            .collect();
        for id in &waiting {
            self.book.owners.retain(|_, owner| owner != id);
            if let Some(lease) = self.leases.get_mut(id) {
                lease.slot = None;
            }
        }
        self.report_inventory();
        self.begin_waiting(now_ms);
        for id in waiting {
            let is_open = self.leases.get(&id).is_some_and(|lease| lease.slot.is_none());
            if is_open {
                self.tell_waiting(now_ms, &id);
            }
        }
    }

    pub(super) fn worker_exited(&mut self, now_ms: u64, cgroup_id: u64) {
        self.end_idle(|idle| idle.worker.cgroup_id == cgroup_id);
        let has_worker = |lease: &Lease| lease.worker.as_ref().is_some_and(|worker| worker.cgroup_id == cgroup_id);
        let running = self.leases.values_mut().find(|lease| has_worker(lease) && !lease.is_over());
        if let Some(Phase::Running { died_ms: died @ None, .. }) = running.map(|lease| &mut lease.phase) {
            *died = Some(now_ms);
            self.dirty = true;
        }
    }

    pub(super) fn context_seen(&mut self, now_ms: u64, cgroup_id: u64) {
        let lease = self.leases.values_mut().find(|lease| {
            matches!(lease.phase, Phase::Running { .. })
                && lease.worker.as_ref().is_some_and(|worker| worker.cgroup_id == cgroup_id)
        });
        if let Some(lease) = lease.filter(|lease| !lease.context_seen) {
            lease.context_seen = true;
            lease.mark(now_ms, "ContextSeen", "");
            self.dirty = true;
        }
    }

    pub(super) fn breach(&mut self, now_ms: u64, cgroup_id: u64, message: &str) {
        let lease = self.leases.values().find(|lease| {
            matches!(lease.phase, Phase::Running { .. })
                && lease.worker.as_ref().is_some_and(|worker| worker.cgroup_id == cgroup_id)
        });
        if let Some(id) = lease.map(|lease| lease.id.clone()) {
            self.note_trouble(now_ms, &id);
            self.end(now_ms, &id, EndingKind::Failed, message, None);
        }
    }

    pub(super) fn tick(&mut self, now_ms: u64) {
        self.give_up_tickets(now_ms);
        self.refuse_overdue(now_ms);
        let due: Vec<(String, EndingKind, String)> = self
            .leases
            .values()
            .filter_map(|lease| Some((lease.id.clone(), due(lease, now_ms)?)))
            .map(|(id, (kind, message))| (id, kind, message))
            .collect();
        for (id, kind, message) in due {
            if kind == EndingKind::Deadline {
                self.note_trouble(now_ms, &id);
            }
            self.end(now_ms, &id, kind, &message, None);
        }
        if self.linked {
            self.repeat_reports(now_ms, false);
        }
        self.look_at_idle(now_ms);
    }

    /// Sends reports that are not acknowledged again: all of them, or those whose time has come.
    pub(super) fn repeat_reports(&mut self, now_ms: u64, all: bool) {
        let is_due = |report: &Report| {
            !report.acknowledged && (all || report.sent_ms.saturating_add(super::REPEAT_MS) <= now_ms)
        };
        for lease in self.leases.values_mut() {
            let Phase::Ended { report, freed, freed_report, .. } = &mut lease.phase else { continue };
            let (send_ended, send_freed) = (is_due(report), freed.is_some() && is_due(freed_report));
            if send_ended {
                report.sent_ms = now_ms;
            }
            if send_freed {
                freed_report.sent_ms = now_ms;
            }
            if send_ended {
                self.steps.extend(wire::ended(lease, now_ms).map(|ended| Step::Send(Message::Ended(ended))));
            }
            if send_freed {
                self.steps.extend(wire::freed(lease, now_ms).map(|freed| Step::Send(Message::Freed(freed))));
            }
        }
    }

    pub(super) fn acknowledged(&mut self, acknowledged: &link::Acknowledged) {
        let Some(lease) = self.leases.get_mut(&acknowledged.lease) else { return };
        let Phase::Ended { report, freed, freed_report, .. } = &mut lease.phase else { return };
        report.acknowledged |= acknowledged.ended;
        freed_report.acknowledged |= acknowledged.freed && freed.is_some();
        let done = report.acknowledged && freed_report.acknowledged;
        self.dirty = true;
        if done {
            self.leases.remove(&acknowledged.lease);
        }
    }
}

/// The limit a lease has passed, if any.
fn due(lease: &Lease, now_ms: u64) -> Option<(EndingKind, String)> {
    match lease.phase {
        Phase::Assigned { since_ms } if since_ms.saturating_add(lease.allow_limit_ms) <= now_ms => {
            Some((EndingKind::NeverAllowed, format!("/allow did not come within {} ms", lease.allow_limit_ms)))
        }
        Phase::Running { started_ms, .. } if lease.deadline_ms(started_ms) <= now_ms => Some((
            EndingKind::Deadline,
            format!("killed at the declared {} ms plus {} ms", lease.declared_ms, lease.grace_ms),
        )),
        Phase::Running { died_ms: Some(died_ms), reused, .. } if Lease::death_limit_ms(died_ms, reused) <= now_ms => {
            Some((EndingKind::WorkerDied, "the worker died".to_owned()))
        }
        _ => None,
    }
}

fn mark_of(kind: EndingKind) -> &'static str {
    match kind {
        EndingKind::Released => "Released",
        EndingKind::Failed => "Failed",
        EndingKind::WorkerDied => "WorkerDied",
        EndingKind::Deadline => "Deadline",
        EndingKind::NeverAllowed => "NeverAllowed",
        EndingKind::Undelivered => "Undelivered",
        EndingKind::Cancelled => "Cancelled",
        EndingKind::PlatformFault => "PlatformFault",
        EndingKind::NoDevice => "NoDevice",
    }
}
