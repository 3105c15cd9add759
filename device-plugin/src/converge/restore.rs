//! After a restart of the agent: the checkpoint against what is really there (N19).

use std::collections::BTreeSet;

use spaceport_core::ids::Size;

use super::state::{Caller, Ending, EndingKind, FreedKind, Lease, Order, Phase, Report, Snapshot};
use super::{Machine, Step};

impl Machine {
    /// Takes a checkpoint of this boot over. `alive` holds the cgroup ids whose recorded worker (pid and start time) still
    /// lives in its cgroup. Half-done work is rolled back; live workers run on under their recorded clock; deadlines that
    /// passed meanwhile are dealt with by the first [`super::Event::Tick`]. The steps of it come with that tick.
    pub fn restore(&mut self, now_ms: u64, snapshot: Snapshot, alive: &BTreeSet<u64>) {
        self.arrivals = snapshot.leases.iter().map(|lease| lease.arrival).max().unwrap_or(0);
        self.book = snapshot.book;
        self.leases = snapshot.leases.into_iter().map(|lease| (lease.id.clone(), lease)).collect();
        self.dirty = true;
        let ids: Vec<String> = self.leases.keys().cloned().collect();
        for id in ids {
            self.restore_lease(now_ms, &id, alive);
        }
        let dead: Vec<u64> =
            self.book.idle.values().map(|idle| idle.worker.cgroup_id).filter(|id| !alive.contains(id)).collect();
        self.end_idle(|idle| dead.contains(&idle.worker.cgroup_id));
        for idle in self.book.idle.values() {
            self.steps.push_back(Step::Watch { worker: idle.worker.clone() });
        }
        for clearing in self.book.clearing.values() {
            let step =
                Step::Clear { slot: clearing.slot, worker: clearing.worker.clone(), limit_ms: clearing.limit_ms };
            if !self.steps.contains(&step) {
                self.steps.push_back(step);
            }
        }
    }

    fn restore_lease(&mut self, now_ms: u64, id: &str, alive: &BTreeSet<u64>) {
        let Some(lease) = self.leases.get_mut(id) else { return };
        let lives = lease.worker.as_ref().is_some_and(|worker| alive.contains(&worker.cgroup_id));
        match &lease.phase {
            Phase::Waiting => {
                self.end(now_ms, id, EndingKind::Undelivered, "the agent restarted before the call was answered", None);
            }
            // The answer may have reached its client: it may still send /allow.
            Phase::Assigned { .. } | Phase::Ended { .. } => {}
            Phase::Starting { .. } => {
                self.end(now_ms, id, EndingKind::PlatformFault, "the agent restarted while the lease began", None);
            }
            Phase::Closing { .. } => {
                if let Some(worker) = lease.worker.clone() {
                    let caller = lease.caller.clone();
                    self.steps.push_back(Step::CloseGate { lease: id.to_owned(), worker: worker.clone(), caller });
                    // It may be kept for reuse. Of one that is dead this says so, behind that decision.
                    self.steps.push_back(Step::Watch { worker });
                }
            }
            Phase::Running { reused, .. } if lives => {
                lease.uncertain = *reused;
                let worker = lease.worker.clone();
                self.steps.extend(worker.map(|worker| Step::Watch { worker }));
            }
            // When it ended is not known, so nothing is charged for it.
            Phase::Running { .. } => {
                self.end(now_ms, id, EndingKind::PlatformFault, "the worker ended while the agent was away", None);
            }
        }
    }

    /// Another boot, or a checkpoint that cannot be read: nothing of it runs any more. The leases that are known by name are
    /// reported as PlatformFault until the broker acknowledges them (L10); ended ones keep their numbers.
    pub fn restore_lost(&mut self, now_ms: u64, snapshot: Snapshot, reason: &str) {
        for mut lease in snapshot.leases {
            lease.slot = None;
            lease.worker = None;
            let id = lease.id.clone();
            let over = lease.is_over();
            if let Phase::Ended { freed, report, freed_report, .. } = &mut lease.phase {
                // Stamps of another boot mean nothing here.
                report.sent_ms = now_ms;
                freed_report.sent_ms = now_ms;
                freed.get_or_insert((FreedKind::Free, reason.to_owned()));
            }
            for mark in &mut lease.marks {
                mark.at_ms = mark.at_ms.min(now_ms);
            }
            if let Phase::Running { started_ms, .. } = &mut lease.phase {
                *started_ms = now_ms;
            }
            self.leases.insert(id.clone(), lease);
            if !over {
                self.end(now_ms, &id, EndingKind::PlatformFault, reason, None);
            }
        }
        self.dirty = true;
    }

    /// A lease cgroup was found that no checkpoint names; it has been killed. The broker knows what it was, or that it
    /// was settled long ago, in which case this changes nothing (L10).
    pub fn report_lost_cgroup(&mut self, now_ms: u64, lease: &str) {
        if self.leases.contains_key(lease) {
            return;
        }
        let message = "the agent lost its record of this lease and killed its worker".to_owned();
        let report = Report { acknowledged: false, sent_ms: now_ms };
        let lost = Lease {
            id: lease.to_owned(),
            arrival: 0,
            ticket: 0,
            caller: Caller::default(),
            task: 0,
            size: Size::Large,
            slot: None,
            order: Order::default(),
            after: None,
            avoid: Vec::new(),
            declared_ms: 0,
            grace_ms: 0,
            allow_limit_ms: 0,
            clear_limit_ms: 0,
            class: 0,
            account: String::new(),
            token: None,
            phase: Phase::Ended {
                ending: Ending { kind: EndingKind::PlatformFault, used_ms: 0, opens: 0, message: message.clone() },
                report: report.clone(),
                freed: Some((FreedKind::Free, message)),
                freed_report: report,
            },
            worker: None,
            context_seen: false,
            uncertain: false,
            marks: Vec::new(),
        };
        self.leases.insert(lost.id.clone(), lost);
        self.dirty = true;
    }
}
