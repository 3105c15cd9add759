//! The agent's checkpoint: a file that an earlier start left behind.

use std::collections::BTreeSet;
use std::path::Path;

use spaceport_device_plugin::checkpoint::{Checkpoint, Found};
use spaceport_device_plugin::converge::{Event, Machine, Snapshot};

use crate::Verdict;
use crate::nodelink_orders::{AGENT, Node, card};

/// BOOTTIME of the start that reads it.
const NOW_MS: u64 = 1_000_000;
/// Steps that may follow from a restart: a few for each lease.
const STEPS_MAX: usize = 100_000;

/// A whole file; or a snapshot alone, which gets the head and checksum of a file.
///
/// # Panics
/// If a file is taken that does not survive being written again, or the machine stumbles over it.
pub fn check(bytes: &[u8]) -> Verdict {
    let checkpoint = Checkpoint::new(Path::new("/nowhere"), "boot-1".to_owned());
    // Line ends belong to the file, not to the snapshot.
    let content: Vec<u8> = bytes.iter().copied().filter(|byte| *byte != b'\n').collect();
    let sealed = checkpoint.sealed(content).expect("a head is JSON");
    let found = checkpoint.parse(bytes).or_else(|whole| {
        assert!(!whole.is_empty(), "refused without words");
        checkpoint.parse(&sealed)
    });
    match found {
        Err(problem) => {
            assert!(!problem.is_empty(), "refused without words");
            Verdict::Refused
        }
        Ok(Found::Nothing) => panic!("a text is something"),
        Ok(Found::SameBoot(snapshot) | Found::OtherBoot(snapshot)) => {
            survives(&checkpoint, &snapshot);
            same_boot(&checkpoint, &snapshot);
            other_boot(&checkpoint, snapshot);
            Verdict::Taken
        }
    }
}

fn survives(checkpoint: &Checkpoint, snapshot: &Snapshot) {
    let text = checkpoint.text(snapshot).expect("a snapshot is JSON");
    let read = checkpoint.parse(&text);
    assert!(matches!(&read, Ok(Found::SameBoot(again)) if again == snapshot), "{read:?} of {snapshot:?}");
}

/// The agent restarted; every other worker is still there.
fn same_boot(checkpoint: &Checkpoint, snapshot: &Snapshot) {
    let workers = snapshot.leases.iter().filter_map(|lease| lease.worker.as_ref());
    let idle = snapshot.book.idle.values().map(|idle| &idle.worker);
    let alive: BTreeSet<u64> = workers.chain(idle).map(|worker| worker.cgroup_id).step_by(2).collect();
    let mut machine = Machine::new(AGENT.to_owned(), 7);
    machine.restore(NOW_MS, snapshot.clone(), &alive);
    lives_on(checkpoint, machine);
}

/// The node rebooted.
fn other_boot(checkpoint: &Checkpoint, snapshot: Snapshot) {
    let mut machine = Machine::new(AGENT.to_owned(), 7);
    machine.restore_lost(NOW_MS, snapshot, "the node rebooted");
    lives_on(checkpoint, machine);
}

fn lives_on(checkpoint: &Checkpoint, machine: Machine) {
    let mut node = Node::new(machine, NOW_MS);
    for event in [Event::Inventory(vec![card(0), card(1)]), Event::Linked { epoch: 7 }, Event::Tick] {
        node.happens(event);
    }
    node.schedules(1);
    node.ordered(1, "01aaaaaaaaaaaaaaaaaaaaaaaa");
    node.now_ms += 24 * 3600 * 1000;
    node.happens(Event::Tick);
    assert!(node.steps < STEPS_MAX, "{} steps", node.steps);
    survives(checkpoint, &node.machine.snapshot());
}
