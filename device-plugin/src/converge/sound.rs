//! What every snapshot of a machine is. One that is read back and is not like this would make the machine give a slot
//! twice, or keep one for ever.

use std::collections::BTreeSet;

use super::state::Snapshot;
use crate::slots::{LARGE_SLOTS_MAX, Place, Slot};

/// Why a snapshot is none of a machine's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unsound {
    /// It could not be told which one is meant.
    #[error("lease {0} is there more than once")]
    LeaseTwice(String),
    /// No card has such a slot.
    #[error("a card has no slot like {0:?}")]
    NoSlot(Slot),
    /// Invariant 6.
    #[error("{one:?} and {other:?} overlap, and both are owned")]
    Overlap {
        /// An owned slot.
        one: Slot,
        /// Another.
        other: Slot,
    },
    /// Invariant 6: the slot counts as free while somebody has it.
    #[error("lease {lease} has {slot:?}, which is not owned")]
    NotOwned {
        /// Its slot.
        slot: Slot,
        /// An open lease.
        lease: String,
    },
    /// Nothing would ever give the slot back.
    #[error("{slot:?} is owned by {lease}, which is no open lease with this slot")]
    NoOwner {
        /// The slot.
        slot: Slot,
        /// Its owner, as the book has it.
        lease: String,
    },
}

impl Snapshot {
    /// True of every snapshot that a machine makes.
    ///
    /// # Errors
    /// The first thing that is not so; then nothing of it may be believed.
    pub fn sound(&self) -> Result<(), Unsound> {
        let mut leases = BTreeSet::new();
        for lease in &self.leases {
            if !leases.insert(&lease.id) {
                return Err(Unsound::LeaseTwice(lease.id.clone()));
            }
        }
        let book = &self.book;
        let of_leases = self.leases.iter().filter_map(|lease| lease.slot);
        let cleared = book.clearing.values().map(|clearing| clearing.slot);
        let of_book = book.owners.keys().chain(book.idle.keys()).chain(book.quarantined.keys()).copied();
        if let Some(slot) = of_leases.chain(cleared).chain(of_book).find(|slot| !exists(*slot)) {
            return Err(Unsound::NoSlot(slot));
        }
        let owned: Vec<Slot> = book.owners.keys().copied().collect();
        for (at, one) in owned.iter().enumerate() {
            if let Some(other) = owned[at + 1..].iter().find(|other| other.overlaps(*one)) {
                return Err(Unsound::Overlap { one: *one, other: *other });
            }
        }
        for (slot, id) in &book.owners {
            let owner = self.leases.iter().find(|lease| lease.id == *id);
            if !owner.is_some_and(|lease| lease.slot == Some(*slot) && !lease.is_over()) {
                return Err(Unsound::NoOwner { slot: *slot, lease: id.clone() });
            }
        }
        let open = self.leases.iter().filter(|lease| !lease.is_over());
        let mut with_slot = open.filter_map(|lease| Some((lease, lease.slot?)));
        match with_slot.find(|(lease, slot)| book.owners.get(slot) != Some(&lease.id)) {
            Some((lease, slot)) => Err(Unsound::NotOwned { slot, lease: lease.id.clone() }),
            None => Ok(()),
        }
    }
}

fn exists(slot: Slot) -> bool {
    match slot.place {
        Place::Part(part) => part < LARGE_SLOTS_MAX,
        Place::Whole => true,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use spaceport_proto::nodelink as link;

    use super::super::{Event, Machine, Step};
    use super::*;

    fn lease(id: &str, slot: &Value, phase: &Value) -> Value {
        let caller = json!({
            "pod": {"namespace": "demo", "name": "p", "space": "hello", "spaceUid": "s", "podUid": "u"}, "container": "c",
        });
        json!({
            "id": id, "arrival": 1, "ticket": 1, "caller": caller, "task": 1, "size": "large", "slot": slot,
            "after": null, "avoid": [], "declaredMs": 1000, "graceMs": 2000, "allowLimitMs": 30_000,
            "clearLimitMs": 10_000, "class": 2, "phase": phase, "worker": null, "contextSeen": false,
            "uncertain": false, "marks": [],
        })
    }

    fn part(part: u32) -> Value {
        json!({"card": 0, "place": {"part": part}})
    }

    fn assigned(id: &str, slot: u32) -> Value {
        lease(id, &part(slot), &json!({"assigned": {"sinceMs": 5}}))
    }

    fn snapshot(leases: &[Value], owners: &Value) -> Snapshot {
        let book = json!({"owners": owners, "idle": [], "clearing": [], "quarantined": []});
        serde_json::from_value(json!({"leases": leases, "book": book})).unwrap()
    }

    #[test]
    fn a_snapshot_that_would_give_a_slot_twice_or_keep_one_for_ever_says_why() {
        let good = snapshot(&[assigned("a", 0), assigned("b", 1)], &json!([[part(0), "a"], [part(1), "b"]]));
        assert_eq!(good.sound(), Ok(()));
        let whole = json!({"card": 0, "place": "whole"});
        let cases = [
            ("lease a is there more than once", snapshot(&[assigned("a", 0), assigned("a", 1)], &json!([]))),
            ("no slot like", snapshot(&[assigned("a", 2)], &json!([]))),
            ("overlap", snapshot(&[assigned("a", 0)], &json!([[part(0), "a"], [whole, "a"]]))),
            ("is owned by b, which is no open lease", snapshot(&[assigned("a", 0)], &json!([[part(1), "b"]]))),
            ("which is not owned", snapshot(&[assigned("a", 0)], &json!([]))),
            ("is owned by a, which is no open lease", snapshot(&[assigned("a", 0)], &json!([[part(1), "a"]]))),
        ];
        for (complaint, snapshot) in cases {
            let said = snapshot.sound().unwrap_err().to_string();
            assert!(said.contains(complaint), "{said}");
        }
    }

    #[test]
    fn counts_and_times_at_their_end_do_not_end_the_agent() {
        let last = json!({"acknowledged": false, "sentMs": u64::MAX});
        let ending = json!({"kind": "Released", "usedMs": 1, "opens": 1, "message": ""});
        let phase = json!({"ended": {"ending": ending, "report": last, "freed": ["Free", ""], "freedReport": last}});
        let mut ended = lease("a", &Value::Null, &phase);
        ended["arrival"] = json!(u64::MAX);
        let mut machine = Machine::new("agent-1".to_owned(), 0);
        machine.restore(1000, snapshot(&[ended], &json!([])), &BTreeSet::new());
        assert_eq!(machine.next_wake(), None, "no broker to send it to");
        let (declared_ms, caller) = (1000, super::super::Caller::default());
        machine.handle(1000, Event::Scheduled { ticket: 1, caller, task: 1, size: None, declared_ms, token: None });
        let order = link::Start {
            lease: "b".to_owned(),
            ticket: 1,
            boottime_ms: 1000,
            agent_instance: "agent-1".to_owned(),
            size: link::Size::Large.into(),
            ..link::Start::default()
        };
        let steps = machine.handle(1000, Event::Start(order));
        let refused = |step: &Step| matches!(step, Step::Send(link::node_message::Message::Refused(_)));
        assert!(steps.iter().any(refused), "there is no card: {steps:?}");
    }
}
