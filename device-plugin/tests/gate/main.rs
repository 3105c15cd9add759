//! Gate, lease cgroups and the node actor on a real cgroup v2 tree: needs root, a kernel of 5.14 or later, and nothing
//! else. Each test works in cgroups, a bpffs and a state directory of its own.
//!
//! `cargo test -p spaceport-device-plugin --features root-tests --test gate`
#![allow(clippy::unwrap_used, clippy::panic)] // Also helpers are tests; clippy only knows the test functions.
#![allow(missing_docs)] // Nobody reads docs of a test binary.

mod leases;
mod pod;

use std::collections::{BTreeSet, HashSet};

use pod::{Denied, Node};
use spaceport_device_plugin::clock::boottime_ms;
use spaceport_device_plugin::gate::lease_cgroup::LeaseCgroup;
use spaceport_device_plugin::gate::{Device, bpf};
use spaceport_device_plugin::processes;

/// Major of NVIDIA's devices; this machine has no driver for it, so an open that passes the gate finds no device.
const NVIDIA: u32 = 195;

#[test]
fn no_process_of_a_pod_opens_a_gated_device_and_everything_else_stays_open() {
    let node = Node::new("closed");
    let mut pod = node.pod("a");
    let gpu = node.device("nvidia0", NVIDIA, 0);
    assert_eq!(pod.worker().opens(&gpu), Denied::ByGate);
    assert_eq!(pod.worker().opens("/dev/null".as_ref()), Denied::Not);
    // A node that the pod makes itself is no way around.
    let made = node.path("made");
    pod.worker().makes_node(&made, NVIDIA, 0);
    assert_eq!(pod.worker().opens(&made), Denied::ByGate);
    // Outside the pods' cgroup the gate does not exist.
    assert_eq!(pod::open_here(&gpu), Denied::NoDevice);
}

#[test]
fn a_lease_opens_its_own_devices_for_its_own_cgroup_only() {
    let node = Node::new("lease");
    let mut pod = node.pod("a");
    let (mine, other) = (node.device("nvidia0", NVIDIA, 0), node.device("nvidia1", NVIDIA, 1));
    let gate = node.gate();
    let lease = LeaseCgroup::create(pod.container(), "01abc").unwrap();
    lease.take_in(pod.worker().host_pid).unwrap();
    assert_eq!(pod.worker().opens(&mine), Denied::ByGate, "moved is not yet allowed");

    let before_ms = boottime_ms();
    gate.open(lease.id(), &[Device { major: NVIDIA, minor: 0 }]).unwrap();
    // The worker opens in a child of its own: forks stay inside.
    assert_eq!(pod.worker().opens(&mine), Denied::NoDevice);
    assert_eq!(pod.worker().opens(&other), Denied::ByGate, "the other card stays shut");
    assert_eq!(pod.parent().opens(&mine), Denied::ByGate, "the Gradio parent stays out during a lease");
    let opens = gate.opens(lease.id()).unwrap();
    assert_eq!(opens.count, 1);
    let first = opens.first.unwrap();
    assert!((before_ms..=boottime_ms()).contains(&first.at_ms), "{first:?} is not after {before_ms}");
    assert_eq!(first.device, Device { major: NVIDIA, minor: 0 });

    // An agent that restarts finds the gate as it was, counters too.
    drop(gate);
    assert_eq!(pod.worker().opens(&mine), Denied::NoDevice);
    let gate = node.gate();
    assert!(gate.is_attached());
    let closed = gate.close(lease.id()).unwrap();
    assert_eq!((closed.count, closed.first), (2, Some(first)), "a second open does not move the first");
    assert_eq!(pod.worker().opens(&mine), Denied::ByGate);
}

/// Key of the allow map.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Door {
    cgroup: u64,
    major: u32,
    minor: u32,
}

// SAFETY: three integers that fill 16 bytes without padding; every bit pattern is a value.
unsafe impl bpf::Plain for Door {}

#[test]
fn a_gate_with_plain_counters_is_taken_over_with_its_doors() {
    let node = Node::new("former");
    let mut pod = node.pod("a");
    let gpu = node.device("nvidia0", NVIDIA, 0);
    let lease = LeaseCgroup::create(pod.container(), "01abc").unwrap();
    lease.take_in(pod.worker().host_pid).unwrap();
    let pin = node.path("bpf/gate/allow-1");
    let former: bpf::HashMap<Door, u64> = bpf::HashMap::create("sp_allow", 4096).unwrap();
    former.insert(&Door { cgroup: lease.id(), major: NVIDIA, minor: 0 }, &5).unwrap();
    bpf::pin(former.fd(), &pin).unwrap();

    let gate = node.gate();
    assert!(!pin.exists());
    assert_eq!(pod.worker().opens(&gpu), Denied::NoDevice, "the lease runs on");
    assert_eq!(pod.parent().opens(&gpu), Denied::ByGate);
    let opens = gate.close(lease.id()).unwrap();
    assert_eq!((opens.count, opens.first), (6, None), "when it opened first was not kept");
}

#[test]
fn a_gate_without_an_agent_is_shut_and_strangers_lose_their_doors() {
    let node = Node::new("strangers");
    let mut pod = node.pod("a");
    let gpu = node.device("nvidia0", NVIDIA, 0);
    let gate = node.gate();
    gate.open(pod.container_id(), &[Device { major: NVIDIA, minor: 0 }]).unwrap();
    assert_eq!(pod.parent().opens(&gpu), Denied::NoDevice);
    assert_eq!(gate.close_all_but(&HashSet::new()).unwrap(), 1);
    drop(gate);
    assert_eq!(pod.parent().opens(&gpu), Denied::ByGate);
}

#[test]
fn an_exempt_pod_passes_with_all_its_containers() {
    let node = Node::new("exempt");
    let (mut dedicated, mut other) = (node.pod("dedicated"), node.pod("other"));
    let gpu = node.device("nvidia0", NVIDIA, 0);
    let gate = node.gate();
    gate.set_exempt(&HashSet::from([dedicated.id()])).unwrap();
    assert_eq!(dedicated.parent().opens(&gpu), Denied::NoDevice);
    assert_eq!(other.parent().opens(&gpu), Denied::ByGate);
    gate.set_exempt(&HashSet::new()).unwrap();
    assert_eq!(dedicated.parent().opens(&gpu), Denied::ByGate);
}

#[test]
fn a_major_that_the_driver_gets_later_is_covered_without_a_gap() {
    let node = Node::new("majors");
    let mut pod = node.pod("a");
    let uvm = node.device("nvidia-uvm", 511, 0);
    let gate = node.gate();
    assert_eq!(pod.worker().opens(&uvm), Denied::NoDevice);
    assert!(gate.maintain(&BTreeSet::from([NVIDIA, 511])).unwrap());
    assert_eq!(pod.worker().opens(&uvm), Denied::ByGate);
    assert!(!gate.maintain(&BTreeSet::from([NVIDIA, 511])).unwrap(), "nothing to do twice");
}

#[test]
fn only_a_process_of_the_container_itself_can_be_allowed() {
    let node = Node::new("pids");
    let (mut mine, mut other) = (node.pod("mine"), node.pod("other"));
    let refused = |pod: &pod::Pod, pid: u32| processes::in_container(pod.container(), pid).unwrap_err().to_string();
    let worker = mine.worker().container_pid;
    assert_eq!(processes::in_container(mine.container(), worker).unwrap().pid, mine.worker().host_pid);
    assert!(refused(&mine, 1).contains("pid 1"));
    assert!(refused(&mine, 4_000_000).contains("no process of this pod"));
    // A host pid means nothing in a container.
    let foreign = other.worker().host_pid;
    assert!(refused(&mine, foreign).contains("no process of this pod"));
    // The worker of one lease is not the worker of another.
    let lease = LeaseCgroup::create(mine.container(), "01abc").unwrap();
    lease.take_in(mine.worker().host_pid).unwrap();
    assert!(refused(&mine, worker).contains("no process of this pod"));
}

#[test]
fn a_descriptor_that_outlives_its_lease_is_found_by_its_number() {
    let node = Node::new("holders");
    let pod = node.pod("a");
    // Any character device that can be opened here stands for the card's.
    let numbers = pod::numbers("/dev/full".as_ref());
    let holder = pod.joins_holding("/dev/full");
    let majors = BTreeSet::from([numbers.major]);
    let found = processes::holders(pod.cgroup(), &majors).unwrap();
    assert!(found.contains(&processes::Holder { pid: holder.host_pid, device: numbers }), "{found:?}");
    assert!(processes::holders(pod.cgroup(), &BTreeSet::from([NVIDIA])).unwrap().is_empty());
}
